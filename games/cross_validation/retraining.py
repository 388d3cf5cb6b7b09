"""One candidate's follower, or several at once, retrained to convergence; kept in files, never done twice."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

import bilevel as bl
from bilevel.solving import checkpoint as checkpoints
from bilevel.tree import detached, flatten, map_leaves
from games.cross_validation.candidates import Candidate

Outcome = dict[str, Any]
"""What became of a candidate, as its file has it: losses, stationarity, gradients, and the follower's "answer"."""


@final
@dataclass(frozen=True)
class Retraining:
    """The follower from its init to convergence, with others held at a candidate."""

    optimizer: Callable[..., torch.optim.Optimizer] | bl.inner.InnerSolver
    steps: int
    tolerance: float
    follower: str
    seed: int

    def one(self, game: bl.Game, candidate: Candidate, file: Path | None) -> Outcome:
        """One candidate's outcome, from its file when that is there."""
        others = {name: candidate.get(name, game.initial(name)) for name in game.names if name != self.follower}
        identity = self._identity(game, others)
        kept = _kept(file, identity)
        if kept is not None:
            return kept
        answer, report = self._answer(game, others)
        batch, _ = game.draw(self.follower, game.start(self.follower, self.seed))
        everybody = {**others, self.follower: answer}
        with torch.no_grad():
            outcome = {
                "identity": identity,
                "leader_loss": float(self._leader_loss(game, everybody)),
                "follower_loss": float(game.loss(self.follower, everybody, batch)),
                "stationarity": float(report.stationarity),
                "gradients": report.gradients,
                "answer": answer,
            }
        if file is not None:
            checkpoints.save(file, outcome)
        return outcome

    def stacked(
        self, game: bl.Game, candidates: Sequence[Candidate], files: Sequence[Path | None], *, together: int
    ) -> Iterator[tuple[int, Outcome]]:
        """Each candidate's place and outcome, `together` of them at once; in all folds at once when `game` is many."""
        folds = game if isinstance(game, bl.Games) else bl.Games(game, 1)
        count, alone = folds.count, folds.game(0)
        missing: list[tuple[int, str]] = []
        for index, candidate in enumerate(candidates):
            start = {name: candidate.get(name, alone.initial(name)) for name in game.names if name != self.follower}
            if game is folds:
                start = map_leaves(lambda leaf: leaf.expand(count, *leaf.shape), start)
            identity = self._identity(game, start)
            kept = _kept(files[index], identity)
            if kept is None:
                missing.append((index, identity))
            else:
                yield index, kept
        for first in range(0, len(missing), together):
            some = missing[first : first + together]
            games = folds.chosen(list(range(count)) * len(some))
            others = {}
            for name in (n for n in game.names if n != self.follower):
                rows = [candidates[index].get(name, alone.initial(name)) for index, _ in some]
                others[name] = map_leaves(lambda *leaves: torch.stack(leaves).repeat_interleave(count, 0), *rows)
            answer, report = self._answer(games, others)
            batch, _ = games.draw(self.follower, games.start(self.follower, self.seed))
            with torch.no_grad():
                everybody = {**others, self.follower: answer}
                leader = self._leader_loss(games, everybody).reshape(len(some), count)
                own = games.loss(self.follower, everybody, batch).reshape(len(some), count)
            stationarity = report.stationarity.reshape(len(some), count)
            for row, (index, identity) in enumerate(some):
                places = slice(row * count, (row + 1) * count) if game is folds else row
                outcome = {
                    "identity": identity,
                    "leader_loss": float(leader[row].mean()),
                    "fold_losses": leader[row].tolist(),
                    "follower_loss": float(own[row].mean()),
                    "stationarity": float(stationarity[row].max()),
                    "gradients": report.gradients if row == 0 else 0,
                    "answer": map_leaves(lambda leaf, places=places: leaf[places].clone(), answer),
                }
                file = files[index]
                if file is not None:
                    checkpoints.save(file, outcome)
                yield index, outcome

    def _answer(self, game: bl.Game, others: Candidate) -> tuple[Any, bl.responses.Report]:
        """The retrained follower, and the report of the response that did it."""
        response = bl.Implicit(self.optimizer, steps=self.steps, tolerance=self.tolerance, warm_start=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bl.errors.NonConvergenceWarning)  # told once, for all candidates together
            answer, state = response(game, others, response.init(game, follower=self.follower, seed=self.seed))
        return detached(answer), response.report(state)

    def _leader_loss(self, game: bl.Game, variables: Mapping[str, Any]) -> Tensor:
        """The first player's loss, its mean over one pass of its batches."""
        leader = game.names[0]
        if game.players[leader].data is None:
            return game.loss(leader, variables, None)
        batches = game.whole_pass(leader, game.start(leader, self.seed), "CrossValidation")
        return torch.stack([game.loss(leader, variables, batch) for batch in batches]).double().mean(0)

    def _identity(self, game: bl.Game, others: Candidate) -> str:
        settings = (self.optimizer, self.steps, self.tolerance, self.follower, self.seed)
        digest = hashlib.sha256(repr(settings).encode())
        start = {**others, self.follower: game.initial(self.follower)}
        for name, variables in sorted(start.items()):
            batch, _ = game.draw(name, game.start(name, self.seed))
            with torch.no_grad():  # of the same data as well, as far as one loss can tell
                digest.update(repr(float(game.total(game.loss(name, start, batch)))).encode())
            digest.update(name.encode() + flatten(variables).detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def _kept(file: Path | None, identity: str) -> Outcome | None:
    """What an earlier run left of a candidate."""
    if file is None or not file.exists():
        return None
    kept = checkpoints.load(file)
    if kept.get("identity") != identity:
        raise bl.errors.CheckpointError(
            f"{file} is of another search: other candidates, settings or start. Choose another folder."
        )
    return kept

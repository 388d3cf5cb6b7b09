"""Algorithm 1 of arXiv 1802.09419: retrain at every candidate, keep the best. The baseline of every other method."""

from __future__ import annotations

import hashlib
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

import bilevel as bl
from bilevel.solving import checkpoint as checkpoints
from bilevel.tree import detached, flatten, map_leaves
from games.errors import MissingExtraError

Candidate = Mapping[str, Any]
"""Player -> its variables, for the follower to answer. Players that are left out stay at their init."""


def grid(game: bl.Game, axes: Mapping[str, Sequence[float] | Tensor]) -> list[Candidate]:
    """Every combination of the players' values, the last player's changing fastest.

    `axes[player]` are numbers, such as `torch.linspace(-1, 3, 11)`; each fills all entries of that player's
    variables. Raises `ValueError` for an unknown player or an empty axis.
    """
    for name, values in axes.items():
        _require_player(game, name)
        if len(values) == 0:
            raise ValueError(f"grid: the axis of player {name!r} is empty; expected at least one value.")
    combinations = itertools.product(*([float(value) for value in values] for values in axes.values()))
    return [
        {
            name: map_leaves(lambda leaf, value=value: torch.full_like(leaf, value), game.initial(name))
            for name, value in zip(axes, values, strict=True)
        }
        for values in combinations
    ]


def random(game: bl.Game, bounds: Mapping[str, tuple[float, float]], *, count: int, seed: int = 0) -> list[Candidate]:
    """`count` candidates; each entry of each player's variables is uniform between its bounds (low, high).

    Raises `ValueError` for an unknown player, bounds in the wrong order, or a count below 1.
    """
    if count < 1:
        raise ValueError(f"random: count={count}; expected at least 1.")
    for name, (low, high) in bounds.items():
        _require_player(game, name)
        if not low < high:
            raise ValueError(f"random: the bounds of player {name!r} are ({low}, {high}); expected low < high.")
    generator = torch.Generator().manual_seed(seed)

    def drawn(leaf: Tensor, low: float, high: float) -> Tensor:
        share = torch.rand(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
        return low + (high - low) * share

    return [
        {
            name: map_leaves(lambda leaf, low=low, high=high: drawn(leaf, low, high), game.initial(name))
            for name, (low, high) in bounds.items()
        }
        for _ in range(count)
    ]


@dataclass(frozen=True, eq=False)
class CrossValidated:
    """What each candidate is worth, in the candidates' order.

    `leader_losses: [n]` are means over the leader's whole data, `follower_losses: [n]` are on the follower's last
    batch; `stationarity: [n]` is |gradient| of the follower in units of that at its init, at most the tolerance where
    `converged: [n]`. `best` is the candidate of least leader loss, `answer` the follower's variables there.
    `gradients` are those of all retraining together; one of a stack counts once.

    Of folds these are means over the folds, and the largest stationarity; `fold_losses: [n, folds]` are the leader's in
    each, and `answer` has a leading dimension of folds.
    """

    candidates: Sequence[Candidate]
    leader_losses: Tensor
    follower_losses: Tensor
    stationarity: Tensor
    converged: Tensor
    gradients: int
    best_index: int
    answer: Any = field(repr=False)
    fold_losses: Tensor = field(repr=False)

    @property
    def best(self) -> Candidate:
        """The candidate of least leader loss."""
        return self.candidates[self.best_index]


@final
@dataclass(frozen=True)
class CrossValidation:
    r"""Algorithm 1: at each candidate retrain the follower from its init to convergence, then take the leader's loss.

        argmin over i of  L(w*(x_i)),    |grad_w f(x_i, w*)| <= tolerance * |grad_w f(x_init, w_init)|

    `optimizer` is a callable from tensors to any torch.optim optimiser or an inner solver, `Scipy("L-BFGS-B")` by
    default; it stops by the gradient's norm, or after `steps` steps, which is then told. The norm is taken on the last
    batch drawn: a follower that should converge has its whole data as one batch. `jobs` processes work side by side
    (joblib; -1: one a core). Works for any game of leaders and one `follower` (default: the last player).

    `together` candidates are retrained at once in one process, stacked as `bl.Games` are, each to its own end: for
    small followers and an optimiser that can (SGD, Adam, `ClosedForm`) tens of times faster, with the numbers that they
    have one by one; memory grows with it. A `bl.Games` in place of the game is the folds: games that differ in their
    data. Each candidate, still of one game's form, is then retrained in all folds at once, and judged by the mean.

    `CrossValidation()(game, candidates)` costs a whole training for each candidate, and the number of candidates that
    cover a box grows exponentially with the leader's entries. The least of many noisy losses is biased downwards:
    judge the winner on other data.
    Source: Lorraine and Duvenaud 2018 (arXiv 1802.09419), Algorithm 1.

    >>> game = bl.Game(
    ...     x=bl.Player(lambda y: (y - 3.0) ** 2, torch.tensor(0.0)),
    ...     y=bl.Player(lambda x, y: (y - 2 * x) ** 2, torch.tensor(1.0)),
    ... )
    >>> CrossValidation()(game, grid(game, {"x": [1.0, 1.5, 2.0]})).best["x"].item()
    1.5
    """

    optimizer: Callable[..., torch.optim.Optimizer] | bl.inner.InnerSolver = field(
        default_factory=lambda: bl.Scipy("L-BFGS-B")
    )
    steps: int = 10_000
    tolerance: float = 1e-5
    jobs: int = 1
    together: int = 1

    def __post_init__(self) -> None:
        if not self.tolerance > 0.0:
            raise ValueError(f"CrossValidation: tolerance={self.tolerance}; expected a number above 0.")
        if self.jobs == 0:
            raise ValueError("CrossValidation: jobs=0; expected a number of processes, or -1 for one a core.")
        if self.together < 1 or (self.together > 1 and self.jobs != 1):
            raise ValueError(
                f"CrossValidation: together={self.together}, jobs={self.jobs}; expected at least 1 candidate at a "
                "time, and one process when there are more."
            )
        bl.Implicit(self.optimizer, steps=self.steps)  # it says what is wrong with these

    def __call__(
        self,
        game: bl.Game,
        candidates: Sequence[Candidate],
        *,
        follower: str | None = None,
        folder: str | Path | None = None,
        progress: bool = False,
        seed: int = 0,
    ) -> CrossValidated:
        """Retrain at each candidate.

        `folder` keeps each candidate's end in a file as soon as it is there; a later run of the same candidates goes
        on with those that are missing. `progress` shows a bar with the best so far and the time left. `seed` is of
        the order of batches.

        Raises `ValueError` for no candidates or variables that are not the game's, `CheckpointError` when `folder` is
        of another search, and what retraining raises; warns (`NonConvergenceWarning`) of what did not converge.
        """
        if isinstance(game, bl.Games) and self.jobs != 1:
            raise ValueError(f"CrossValidation: jobs={self.jobs}; folds are retrained in one process. Use together=.")
        one = game.game(0) if isinstance(game, bl.Games) else game
        name = game.names[-1] if follower is None else follower
        if not candidates:
            raise ValueError("CrossValidation: there are no candidates; expected at least one.")
        for candidate in candidates:
            for player, variables in candidate.items():
                _require_player(game, player)
                one.check(player, variables)
        files = [None if folder is None else Path(folder) / f"{index:05d}.pt" for index in range(len(candidates))]
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        if isinstance(game, bl.Games) or self.together > 1:
            work = _stacked(self, game, candidates, name, files, seed)
        else:
            work = self._each([(self, game, c, name, file, seed) for c, file in zip(candidates, files, strict=True)])
        found: list[dict[str, Any] | None] = [None] * len(candidates)
        with _bar(progress, len(candidates)) as show:
            for index, end in work:
                found[index] = end
                show(end["leader_loss"])
        ends = [end for end in found if end is not None]
        result = _gathered(candidates, ends, self.tolerance)
        if not bool(result.converged.all()):
            warnings.warn(
                f"CrossValidation: {int((~result.converged).sum())} of {len(ends)} candidates did not converge in "
                f"{self.steps} steps: the gradient is up to {float(result.stationarity.max()):.2g} of that at init, "
                f"wanted {self.tolerance:g}. Their losses are those of unfinished training. Give steps=, another "
                "optimizer, or float64 data.",
                bl.errors.NonConvergenceWarning,
                stacklevel=2,
            )
        return result

    def _each(self, work: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, dict[str, Any]]]:
        if self.jobs == 1:
            yield from ((index, _retrained(*item)) for index, item in enumerate(work))
            return
        try:
            from joblib import Parallel, delayed  # type: ignore[import-untyped]
        except ImportError as error:
            raise MissingExtraError(f"jobs={self.jobs} needs joblib ({error}). pip install 'bilevel[data]'") from error
        parallel = Parallel(n_jobs=self.jobs, return_as="generator_unordered")
        yield from parallel(delayed(_numbered)(index, item) for index, item in enumerate(work))


def _numbered(index: int, item: tuple[Any, ...]) -> tuple[int, dict[str, Any]]:
    torch.set_num_threads(1)  # in a process of its own, beside others
    return index, _retrained(*item)


def _retrained(
    search: CrossValidation, game: bl.Game, candidate: Candidate, follower: str, file: Path | None, seed: int
) -> dict[str, Any]:
    """One candidate's end, from its file when that is there."""
    others = {name: candidate.get(name, game.initial(name)) for name in game.names if name != follower}
    identity = _identity(search, game, others, follower, seed)
    kept = _kept(file, identity)
    if kept is not None:
        return kept
    answer, state = _answered(search, game, others, follower, seed)
    batch, _ = game.draw(follower, game.start(follower, seed))
    with torch.no_grad():
        end = {
            "identity": identity,
            "leader_loss": float(_whole_loss(game, {**others, follower: answer}, seed)),
            "follower_loss": float(game.loss(follower, {**others, follower: answer}, batch)),
            "stationarity": float(state["stationarity"]),
            "gradients": int(state["gradients"]),
            "answer": answer,
        }
    if file is not None:
        checkpoints.save(file, end)
    return end


def _kept(file: Path | None, identity: str) -> dict[str, Any] | None:
    """What an earlier run left of a candidate."""
    if file is None or not file.exists():
        return None
    kept = checkpoints.load(file)
    if kept.get("identity") != identity:
        raise bl.errors.CheckpointError(
            f"{file} is of another search: other candidates, settings or start. Choose another folder."
        )
    return kept


def _answered(
    search: CrossValidation, game: bl.Game, others: Candidate, follower: str, seed: int
) -> tuple[Any, dict[str, Any]]:
    """The retrained follower and its response's state."""
    response = bl.Implicit(search.optimizer, steps=search.steps, tolerance=search.tolerance, warm_start=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.errors.NonConvergenceWarning)  # told once, for all candidates together
        answer, state = response(game, others, response.init(game, follower=follower, seed=seed))
    return detached(answer), state


def _stacked(
    search: CrossValidation,
    game: bl.Game,
    candidates: Sequence[Candidate],
    follower: str,
    files: Sequence[Path | None],
    seed: int,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every candidate's end, `search.together` of them at once, in all folds at once when `game` is many."""
    folds = game if isinstance(game, bl.Games) else bl.Games(game, 1)
    count, alone = folds.count, folds.game(0)
    missing: list[tuple[int, str]] = []
    for index, candidate in enumerate(candidates):
        start = {name: candidate.get(name, alone.initial(name)) for name in game.names if name != follower}
        if game is folds:
            start = map_leaves(lambda leaf: leaf.expand(count, *leaf.shape), start)
        identity = _identity(search, game, start, follower, seed)
        kept = _kept(files[index], identity)
        if kept is None:
            missing.append((index, identity))
        else:
            yield index, kept
    for first in range(0, len(missing), search.together):
        some = missing[first : first + search.together]
        games = folds.chosen(list(range(count)) * len(some))
        others = {}
        for name in (n for n in game.names if n != follower):
            rows = [candidates[index].get(name, alone.initial(name)) for index, _ in some]
            others[name] = map_leaves(lambda *leaves: torch.stack(leaves).repeat_interleave(count, 0), *rows)
        answer, state = _answered(search, games, others, follower, seed)
        batch, _ = games.draw(follower, games.start(follower, seed))
        with torch.no_grad():
            everybody = {**others, follower: answer}
            leader = _whole_loss(games, everybody, seed).reshape(len(some), count)
            own = games.loss(follower, everybody, batch).reshape(len(some), count)
        stationarity = state["stationarity"].reshape(len(some), count)
        for row, (index, identity) in enumerate(some):
            places = slice(row * count, (row + 1) * count) if game is folds else row
            end = {
                "identity": identity,
                "leader_loss": float(leader[row].mean()),
                "fold_losses": leader[row].tolist(),
                "follower_loss": float(own[row].mean()),
                "stationarity": float(stationarity[row].max()),
                "gradients": int(state["gradients"]) if row == 0 else 0,
                "answer": map_leaves(lambda leaf, places=places: leaf[places].clone(), answer),
            }
            file = files[index]
            if file is not None:
                checkpoints.save(file, end)
            yield index, end


def _whole_loss(game: bl.Game, variables: Mapping[str, Any], seed: int) -> Tensor:
    """The first player's loss, meaned over one pass of its batches."""
    leader = game.names[0]
    if game.players[leader].data is None:
        return game.loss(leader, variables, None)
    losses: list[Tensor] = []
    batch, position = game.draw(leader, game.start(leader, seed))
    while position is not None and position["epoch"] == 0:
        losses.append(game.loss(leader, variables, batch))
        batch, position = game.draw(leader, position)
    return torch.stack(losses).double().mean(0)


def _identity(search: CrossValidation, game: bl.Game, others: Candidate, follower: str, seed: int) -> str:
    digest = hashlib.sha256(repr((search.optimizer, search.steps, search.tolerance, follower, seed)).encode())
    start = {**others, follower: game.initial(follower)}
    for name, variables in sorted(start.items()):
        batch, _ = game.draw(name, game.start(name, seed))
        with torch.no_grad():  # of the same data as well, as far as one loss can tell
            digest.update(repr(float(game.total(game.loss(name, start, batch)))).encode())
        digest.update(name.encode() + flatten(variables).detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _gathered(candidates: Sequence[Candidate], ends: Sequence[dict[str, Any]], tolerance: float) -> CrossValidated:
    losses = torch.tensor([end["leader_loss"] for end in ends], dtype=torch.float64)
    stationarity = torch.tensor([end["stationarity"] for end in ends], dtype=torch.float64)
    # A loss that is NaN never wins; argmin alone would choose it.
    best = int(torch.where(losses.isnan(), math.inf, losses).argmin())
    return CrossValidated(
        candidates=candidates,
        leader_losses=losses,
        follower_losses=torch.tensor([end["follower_loss"] for end in ends], dtype=torch.float64),
        stationarity=stationarity,
        converged=stationarity <= tolerance,
        gradients=sum(end["gradients"] for end in ends),
        best_index=best,
        answer=ends[best]["answer"],
        fold_losses=torch.tensor([end.get("fold_losses", [end["leader_loss"]]) for end in ends], dtype=torch.float64),
    )


def _require_player(game: bl.Game, name: str) -> None:
    if name not in game.names:
        raise ValueError(f"There is no player {name!r}; players are {list(game.names)}.")


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[float], None]]:
    """A bar on stderr with the least leader loss so far and the time left."""
    if not shown:
        yield lambda loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("retrained"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        best = math.inf

        def show(loss: float) -> None:
            nonlocal best
            best = min(best, loss)
            bar.update(task, advance=1, description=f"least loss {best:.4g}")

        yield show

"""Algorithm 1 of arXiv 1802.09419: retrain at every candidate, keep the best. The baseline of every other method."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

import bilevel as bl
from bilevel.workers import require_workers, side_by_side
from games.cross_validation.candidates import Candidate, require_player
from games.cross_validation.retraining import Outcome, Retraining
from games.errors import MissingExtraError


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
    (joblib; -1: one a core); with `cluster`, on a Ray cluster by its address, or "local": one on this machine. Works
    for any game of leaders and one `follower` (default: the last player).

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
    >>> from games.cross_validation.candidates import grid
    >>> CrossValidation()(game, grid(game, {"x": [1.0, 1.5, 2.0]})).best["x"].item()
    1.5
    """

    optimizer: Callable[..., torch.optim.Optimizer] | bl.inner.InnerSolver = field(
        default_factory=lambda: bl.Scipy("L-BFGS-B")
    )
    steps: int = 10_000
    tolerance: float = 1e-5
    jobs: int = 1
    cluster: str | None = None
    together: int = 1

    def __post_init__(self) -> None:
        if not self.tolerance > 0.0:
            raise ValueError(f"CrossValidation: tolerance={self.tolerance}; expected a number above 0.")
        try:
            require_workers("CrossValidation", self.jobs, self.cluster)
        except ImportError as error:
            raise MissingExtraError(str(error)) from error
        spread = self.jobs != 1 or self.cluster is not None
        if self.together < 1 or (self.together > 1 and spread):
            raise ValueError(
                f"CrossValidation: together={self.together}, jobs={self.jobs}, cluster={self.cluster!r}; expected at "
                "least 1 candidate at a time, and one process when there are more."
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
        of another search, and what retraining raises; warns (`FollowerNonConvergenceWarning`) of what did not converge.
        """
        if isinstance(game, bl.Games) and (self.jobs != 1 or self.cluster is not None):
            raise ValueError(
                f"CrossValidation: jobs={self.jobs}, cluster={self.cluster!r}; folds are retrained in one process. Use "
                "together=."
            )
        one = game.game(0) if isinstance(game, bl.Games) else game
        name = game.names[-1] if follower is None else follower
        game.require_end(game.names[0], "CrossValidation", read=True)
        if not candidates:
            raise ValueError("CrossValidation: there are no candidates; expected at least one.")
        for candidate in candidates:
            for player, variables in candidate.items():
                require_player(game, player)
                one.check(player, variables)
        files = [None if folder is None else Path(folder) / f"{index:05d}.pt" for index in range(len(candidates))]
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
        retraining = Retraining(self.optimizer, self.steps, self.tolerance, name, seed)
        if isinstance(game, bl.Games) or self.together > 1:
            work = retraining.stacked(game, candidates, files, together=self.together)
        else:
            work = self._one_by_one(retraining, game, candidates, files)
        found: dict[int, Outcome] = {}
        with _bar(progress, len(candidates)) as show:
            for index, outcome in work:
                found[index] = outcome
                show(outcome["leader_loss"])
        result = _gathered(candidates, [found[index] for index in range(len(candidates))], self.tolerance)
        if not bool(result.converged.all()):
            warnings.warn(
                f"CrossValidation: {int((~result.converged).sum())} of {len(candidates)} candidates did not converge "
                f"in {self.steps} steps: the gradient is up to {float(result.stationarity.max()):.2g} of that at init, "
                f"wanted {self.tolerance:g}. Their losses are those of unfinished training. Give steps=, another "
                "optimizer, or float64 data.",
                bl.errors.FollowerNonConvergenceWarning,
                stacklevel=2,
            )
        return result

    def _one_by_one(
        self, retraining: Retraining, game: bl.Game, candidates: Sequence[Candidate], files: Sequence[Path | None]
    ) -> Iterator[tuple[int, Outcome]]:
        pairs = zip(candidates, files, strict=True)
        work = [partial(retraining.one, game, candidate, file) for candidate, file in pairs]
        yield from side_by_side(work, jobs=self.jobs, cluster=self.cluster)


def _gathered(candidates: Sequence[Candidate], ends: Sequence[Outcome], tolerance: float) -> CrossValidated:
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

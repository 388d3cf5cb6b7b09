"""The loop: leaders step along gradients that see their followers' responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any, overload

import torch

from bilevel.dynamics import Dynamics, Simultaneous
from bilevel.errors import CheckpointError, StopRun
from bilevel.files import remove_abandoned
from bilevel.game import Game
from bilevel.inner import Scipy
from bilevel.inner.torch_optim import SchedulerFactory
from bilevel.many import Games
from bilevel.parallel import DataParallel
from bilevel.randomness import random_kept
from bilevel.responses import Response
from bilevel.solving import checkpoint as checkpoints
from bilevel.solving.best import best_of, checkpoint_of
from bilevel.solving.description import Describer
from bilevel.solving.drawn import Start, starts_of
from bilevel.solving.end import solution
from bilevel.solving.history import Observe, Record
from bilevel.solving.identity import described
from bilevel.solving.leaders import LeaderOptimizer, tolerated
from bilevel.solving.progress import progress_bar
from bilevel.solving.run import Run
from bilevel.solving.solution import End, Solution
from bilevel.solving.solutions import Solutions
from bilevel.solving.together import Alone, company_of
from bilevel.tree import Variables

Callback = Callable[[int, Record, Mapping[str, Variables]], object]


@overload
def solve(  # type: ignore[overload-overlap]  # who says Game and means Games gets Solutions, typed Solution
    game: Games,
    *,
    optimizer: LeaderOptimizer | Mapping[str, LeaderOptimizer] | None = None,
    steps: int = 100,
    scheduler: SchedulerFactory | None = None,
    clip_norm: float | None = None,
    dynamics: Dynamics | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool | None = None,
    accept_changes: bool = False,
    progress: bool = False,
    seed: int = 0,
    record: Observe | None = None,
    parallel: DataParallel | None = None,
    starts: int | Sequence[Start] | None = None,
    **responses: Response,
) -> Solutions: ...


@overload
def solve(
    game: Game,
    *,
    optimizer: LeaderOptimizer | Mapping[str, LeaderOptimizer] | None = None,
    steps: int = 100,
    scheduler: SchedulerFactory | None = None,
    clip_norm: float | None = None,
    dynamics: Dynamics | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool | None = None,
    accept_changes: bool = False,
    progress: bool = False,
    seed: int = 0,
    record: Observe | None = None,
    parallel: DataParallel | None = None,
    starts: int | Sequence[Start] | None = None,
    **responses: Response,
) -> Solution: ...


def solve(
    game: Game,
    *,
    optimizer: LeaderOptimizer | Mapping[str, LeaderOptimizer] | None = None,
    steps: int = 100,
    scheduler: SchedulerFactory | None = None,
    clip_norm: float | None = None,
    dynamics: Dynamics | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool | None = None,
    accept_changes: bool = False,
    progress: bool = False,
    seed: int = 0,
    record: Observe | None = None,
    parallel: DataParallel | None = None,
    starts: int | Sequence[Start] | None = None,
    **responses: Response,
) -> End[Any]:
    """Play a game: every player without a response leads; the others answer by theirs.

    With no response at all it is simultaneous gradient play. With responses for b and c of players a, b, c in order of
    play, a anticipates both and b anticipates c. Warnings are gathered into the solution; what still holds at the end
    is issued, once.

    Args:
        game: A `Game`; or `Games`, played at once, which gives `Solutions`.
        optimizer: From tensors to the leaders' torch.optim optimiser, or one by leader; default: Adam, lr 0.01. For a
            leader with functions, `bl.constraints.AugmentedLagrangian(optimiser)` says how they become terms of its
            loss. For one leader on a fixed batch also `bl.Scipy("SLSQP")`, which sees them, or `bl.Scipy("L-BFGS-B")`.
        steps: Of the leaders; with `bl.Scipy` evaluations at most.
        scheduler: From that optimiser to a torch learning-rate scheduler.
        clip_norm: Largest norm of a leader's gradient; None: as it is.
        dynamics: How several leaders follow their field; default: `Simultaneous()`.
        callbacks: Called as `callback(step, record, variables)` after each step; one that raises `bl.errors.StopRun`
            ends the run there.
        checkpoint: A file to write, also when interrupted.
        checkpoint_every: So many steps.
        resume: Go on from the checkpoint, bit for bit. None: where there is one; True: it must be there; False: begin
            again, and overwrite it.
        accept_changes: Go on although settings differ from the checkpoint's; the present ones hold.
        progress: Show a bar.
        seed: Of batches and responses; dropout's is torch's own.
        record: From everybody's variables after a step to further numbers for the history, by name.
        parallel: Play it in all processes of torchrun or a process group, each with a part of every batch, or with some
            of many `Games`; all call `solve` alike. The first writes the checkpoint; the history tells the bytes sent a
            step.
        starts: Play from so many starts and give the best end that keeps the leader's functions: from `init`, and then
            from points drawn by `seed`, uniformly from the leader's bounded set or range; or a list of starts,
            `[{"x": tensor}, ...]`. Ends whose follower stopped short come last, however low their values.
            `solution.starts` has the spread. All at once where the responses and the optimiser can, as `Games`; else
            one by one, each with a checkpoint of its own, "run.3.pt". A start that fails is told.
        **responses: Follower -> its response.

    Raises:
        ValueError: For wrong arguments, before any work.
        NonFiniteError: If a leader's gradient is NaN or infinite.
        CheckpointError: For a file of another run, which says in what, for one that is damaged, where none can be
            written, and with resume=True where none is.
        ParallelError: On all ranks, where they disagree or one of them has ended.

    Examples:
        >>> import torch, bilevel as bl
        >>> x = bl.Player(lambda y: (y - 3) ** 2, torch.tensor(0.0))
        >>> y = bl.Player(lambda x, y: (y - 2 * x) ** 2, torch.tensor(0.0))
        >>> response = bl.Implicit(bl.ClosedForm(lambda x: 2 * x))
        >>> solution = solve(bl.Game(x=x, y=y), y=response, steps=500)
        >>> round(solution.variables["x"].item(), 2)
        1.5
    """
    if not isinstance(game, Game):
        raise TypeError(f"solve: game is {game!r}; expected a bilevel.Game.")
    _require_options(
        {"steps": steps, "checkpoint_every": checkpoint_every, "seed": seed},
        {"accept_changes": accept_changes, "progress": progress},
        resume,
        clip_norm,
        callbacks,
        record,
    )
    if resume is True and checkpoint is None:
        raise ValueError("solve: resume=True goes on from a checkpoint; say which, checkpoint=path.")
    if starts is not None and parallel is not None:
        raise ValueError("solve: starts= plays many games, and parallel= one in many processes. Give one of them.")
    if starts is not None:
        options: dict[str, Any] = {
            "optimizer": optimizer,
            "steps": steps,
            "scheduler": scheduler,
            "clip_norm": clip_norm,
            "dynamics": dynamics,
            "callbacks": callbacks,
            "checkpoint_every": checkpoint_every,
            "resume": False if resume is False else None,  # starts that had not begun have no checkpoint
            "accept_changes": accept_changes,
            "progress": progress,
            "seed": seed,
            "record": record,
            **responses,
        }

        def one(game: Game, path: Path | None) -> Any:
            return solve(game, checkpoint=path, **options)

        game.require_one("solve(starts=...)")
        leading = [name for name in game.names if name not in responses]
        if len(leading) != 1 or game.members(leading[0]) != (leading[0],):
            raise ValueError(
                f"solve: starts= compares the loss of one leader, and {leading} lead. Play them one by one."
            )
        method = optimizer[leading[0]] if isinstance(optimizer, Mapping) else optimizer
        points = starts_of(game, leading, starts, seed)
        tolerance = tolerated(method, torch.finfo(game.like.dtype).eps)
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and resume is True and not any(one.exists() for one in (path, checkpoint_of(path, 0))):
            raise _nothing_to_resume(path)
        together = not isinstance(method, Scipy)
        return best_of(game, leading[0], points, one, path, tolerance, together=together)
    company = company_of(game, parallel)
    try:
        with company.playing():
            company.agree(
                lambda: {
                    "responses": Describer().describe(responses),
                    "optimizer": Describer().describe(optimizer),
                    "scheduler": Describer().describe(scheduler),
                    "dynamics": Describer().describe(dynamics),
                    "options": {
                        "clip_norm": clip_norm,
                        "seed": seed,
                        "steps": steps,
                        "checkpoint": checkpoint is not None,
                        "checkpoint_every": checkpoint_every,
                        "resume": resume,
                        "callbacks": len(callbacks),
                    },
                    "players": {name: described(Describer(), player) for name, player in game.players.items()},
                }
            )
            run = Run(
                company.game,
                responses,
                optimizer,
                scheduler,
                dynamics or Simultaneous(),
                clip_norm,
                seed,
                company.observed(record),
            )
            path = None if checkpoint is None else Path(checkpoint)
            if path is not None and company.writes and not path.parent.is_dir():
                raise ValueError(f"solve: checkpoint={path}: its folder does not exist. Create it first.")
            saved = None if path is None or resume is False else company.read(path)
            if saved is None and path is not None and resume is True:
                raise _nothing_to_resume(path)
            if saved is not None and path is not None:
                run.restore(saved, path, accept_changes=accept_changes)
            if run.now.step > steps:
                raise ValueError(
                    f"solve: steps={steps}, but {path} has already {run.now.step}. Ask for more steps, or pass "
                    "resume=False."
                )
            if run.now.step < steps:
                if saved is not None and path is not None and parallel is None:
                    run.require_batches(saved, path)  # of several ranks each has read its own
                with (
                    progress_bar(progress and company.writes, run.now.step, steps) as show,
                    _saving(company, run, path, checkpoint_every) as save_if_due,
                ):

                    def after(told: Record) -> bool:
                        show(told)
                        stopped = company.stopped(_call(callbacks, run, told), run.shared)
                        save_if_due()
                        return stopped

                    if run.leaders.driven:
                        run.drive(steps, after)
                    else:
                        while run.now.step < steps and not after(run.step()):
                            pass
            return solution(run)
    finally:
        game.stop_reading()


def _nothing_to_resume(path: Path) -> CheckpointError:
    return CheckpointError(
        f"solve: resume=True, and there is no checkpoint {path}. Name the file of the run to go on with, or leave "
        "resume= out: then a run goes on where there is a file, and begins where there is none."
    )


def _require_options(
    numbers: Mapping[str, object],
    flags: Mapping[str, object],
    resume: object,
    clip_norm: object,
    callbacks: object,
    record: object,
) -> None:
    """Refuse options of another kind than was asked for."""
    for name, number in numbers.items():
        if not isinstance(number, Integral) or isinstance(number, bool):
            raise TypeError(f"solve: {name}={number!r}; expected a whole number.")
        if name != "seed" and int(number) < 1:
            raise ValueError(f"solve: {name}={number}; expected at least 1.")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"solve: {name}={flag!r}; expected True or False.")
    if not (resume is None or isinstance(resume, bool)):
        raise TypeError(f"solve: resume={resume!r}; expected True, False, or None: where there is a checkpoint.")
    if clip_norm is not None:
        if not isinstance(clip_norm, Real) or isinstance(clip_norm, bool):
            raise TypeError(f"solve: clip_norm={clip_norm!r}; expected a number, or None.")
        if not float(clip_norm) > 0.0:
            raise ValueError(f"solve: clip_norm={clip_norm}; expected a positive norm, or None for no clipping.")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(f"solve: callbacks={callbacks!r}; expected a list of functions (step, record, variables).")
    if not (record is None or callable(record)):
        raise TypeError(f"solve: record={record!r}; expected a function of everybody's variables.")


@contextmanager
def _saving(company: Alone, run: Run, path: Path | None, every: int) -> Iterator[Callable[[], None]]:
    """Saves the run at once, so that a folder without room or permission is known before any work, and at the end.

    Gives a function to call after each step. Stopped inside a step, where some have moved and others not, the file
    keeps what it has.
    """
    if path is None:
        yield lambda: None
        return
    steps = [-1]

    def save(state: Mapping[str, Any]) -> None:
        # The second is the first with everything in it that later ones have.
        checkpoints.save(path, state, check=len(steps) < 3)
        steps.append(run.now.step)

    def save_together() -> None:
        state = company.stored(run.state())
        company.write(lambda: save(state))

    def save_if_due() -> None:
        if run.now.step % every == 0:
            save_together()

    if company.writes:
        remove_abandoned(path)
    save_together()
    try:
        yield save_if_due
    except CheckpointError:
        raise  # it would fail once more
    except BaseException:
        # Alone: the others may not be there any more.
        if run.whole and run.now.step > steps[-1] and company.can_save(run.state()):
            save(run.state())
        raise
    if run.now.step % every != 0:
        save_together()


def _call(callbacks: Sequence[Callback], run: Run, record: Record) -> bool:
    """Whether one of them wants the run to end; the others are called all the same."""
    stopped = False
    # Random numbers that a callback draws are its own: a run that is stopped in one goes on as if it had ended.
    for callback in callbacks:
        with random_kept(run.game.device):
            try:
                callback(run.now.step, record, run.variables)
            except StopRun:
                stopped = True
    return stopped

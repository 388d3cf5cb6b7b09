"""The loop: leaders step along gradients that see their followers' responses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

from bilevel.dynamics import Dynamics, Simultaneous
from bilevel.game import Game
from bilevel.inner.torch_optim import OptimizerFactory, SchedulerFactory
from bilevel.many import Games
from bilevel.responses import Response
from bilevel.solving import checkpoint as checkpoints
from bilevel.solving.run import Record, Run
from bilevel.solving.solution import Solution
from bilevel.solving.solutions import Solutions
from bilevel.tree import Variables

Callback = Callable[[int, Record, Mapping[str, Variables]], object]


@overload
def solve(  # type: ignore[overload-overlap]  # who says Game and means Games gets Solutions, typed Solution
    game: Games,
    *,
    optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
    steps: int = 100,
    scheduler: SchedulerFactory | None = None,
    clip_norm: float | None = None,
    dynamics: Dynamics | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = True,
    progress: bool = False,
    seed: int = 0,
    **responses: Response,
) -> Solutions: ...


@overload
def solve(
    game: Game,
    *,
    optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
    steps: int = 100,
    scheduler: SchedulerFactory | None = None,
    clip_norm: float | None = None,
    dynamics: Dynamics | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = True,
    progress: bool = False,
    seed: int = 0,
    **responses: Response,
) -> Solution: ...


def solve(
    game: Game,
    *,
    optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
    steps: int = 100,
    scheduler: SchedulerFactory | None = None,
    clip_norm: float | None = None,
    dynamics: Dynamics | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool = True,
    progress: bool = False,
    seed: int = 0,
    **responses: Response,
) -> Solution | Solutions:
    """Play a game: every player without a response leads; the others answer by theirs.

    With no response at all it is simultaneous gradient play. With responses for b and c of players a, b, c in order of
    play, a anticipates both and b anticipates c. Warnings are gathered into the solution; what still holds at the end
    is issued, once.

    Args:
        game: A `Game`; or `Games`, played at once, which gives `Solutions`.
        optimizer: From tensors to the leaders' torch.optim optimiser, or one by leader; default: Adam, lr 0.01.
        steps: Of the leaders.
        scheduler: From that optimiser to a torch learning-rate scheduler.
        clip_norm: Largest norm of a leader's gradient; None: as it is.
        dynamics: How several leaders follow their field; default: `Simultaneous()`.
        callbacks: Called as `callback(step, record, variables)` after each step.
        checkpoint: A file to write, also when interrupted.
        checkpoint_every: So many steps.
        resume: Go on from the checkpoint, bit for bit.
        progress: Show a bar.
        seed: Of batches and responses; dropout's is torch's own.
        **responses: Follower -> its response.

    Raises:
        ValueError: For wrong arguments, before any work.
        NonFiniteError: If a leader's gradient is NaN or infinite.
        CheckpointError: For a file of another game.

    Examples:
        >>> import torch, bilevel as bl
        >>> x = bl.Player(lambda y: (y - 3) ** 2, torch.tensor(0.0))
        >>> y = bl.Player(lambda x, y: (y - 2 * x) ** 2, torch.tensor(0.0))
        >>> response = bl.Implicit(bl.ClosedForm(lambda x: 2 * x))
        >>> solution = solve(bl.Game(x=x, y=y), y=response, steps=500)
        >>> round(solution.variables["x"].item(), 2)
        1.5
    """
    try:
        run = Run(game, responses, optimizer, scheduler, dynamics or Simultaneous(), clip_norm, seed)
        if steps < 1 or checkpoint_every < 1:
            raise ValueError(f"solve: steps={steps}, checkpoint_every={checkpoint_every}; expected at least 1 of each.")
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"solve: checkpoint={path}: its folder does not exist. Create it first.")
        if path is not None and resume and path.exists():
            run.restore(checkpoints.load(path), path)
        if run.step_count > steps:
            raise ValueError(
                f"solve: steps={steps}, but {path} has already {run.step_count}. Ask for more steps, or pass "
                "resume=False."
            )
        saved = run.step_count
        try:
            with _progress_bar(progress, run.step_count, steps) as show:
                while run.step_count < steps:
                    record = run.step()
                    show(record)
                    for callback in callbacks:
                        callback(run.step_count, record, run.variables)
                    if path is not None and run.step_count % checkpoint_every == 0:
                        checkpoints.save(path, run.state())
                        saved = run.step_count
        finally:
            # Stopped in the middle of a step, the players are of two minds: the file keeps the last whole one.
            if path is not None and run.whole and run.step_count > saved:
                checkpoints.save(path, run.state())
        return run.solution()
    finally:
        game.stop_reading()


@contextmanager
def _progress_bar(wanted: bool, done: int, steps: int) -> Iterator[Callable[[Record], None]]:
    if not wanted:
        yield lambda record: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn  # noqa: PLC0415

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("starting", total=steps, completed=done)

        def show(record: Record) -> None:
            shown = [f"{k} {v:.4g}" for k, v in record.items() if k not in _NOT_SHOWN and "." not in k]
            bar.update(task, completed=int(record["step"]), description="  ".join(shown))

        yield show


_NOT_SHOWN = {"step", "gradient_norm", "gradients", "products", "seconds", "work"}

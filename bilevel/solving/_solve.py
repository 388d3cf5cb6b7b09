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

    `solve(game, weights=Implicit(...), optimizer=partial(Adam, lr=0.05), steps=200)`. With no response at all it is
    simultaneous gradient play: everybody assumes that the others stand still. With responses for b and c of players
    a, b, c in order of play, a anticipates both and b anticipates c.

    `Games` are many games, played at once and each to its own end: `Solutions`.

    `optimizer`: a callable from tensors to a torch.optim optimiser (default Adam, lr 0.01), or one per leader by name.
    `scheduler`: from that optimiser to a torch learning-rate scheduler, stepped once a step. `clip_norm`: largest
    norm of a leader's gradient. `dynamics`: how several leaders follow their field (default `Simultaneous()`).
    `callbacks`: called as `callback(step, record, variables)` after each step. `progress`: show a bar with the losses
    and the time left. `seed`: of the order of batches and of the responses' randomness. A loss's own
    randomness (dropout) is torch's: set it by `torch.manual_seed`; a checkpoint carries it on.

    `checkpoint`: a file that is written every `checkpoint_every` steps and when the run is interrupted; with `resume`
    a run that finds it goes on from there, and ends bit for bit where an uninterrupted one ends.

    Warnings of the responses are gathered into the solution; what still holds at the last step is issued, once.
    Raises `ValueError`/`TypeError` for wrong arguments before any work, `NonFiniteError` when a leader's gradient is
    NaN or infinite (its variables are then still finite), `CheckpointError` for a file of another game.

    >>> import torch
    >>> from functools import partial
    >>> from bilevel import Game, Player, Unrolled
    >>> def lead(y): return (y - 3) ** 2
    >>> def follow(x, y): return (y - 2 * x) ** 2
    >>> game = Game(x=Player(lead, torch.tensor(0.0)), y=Player(follow, torch.tensor(0.0)))
    >>> response = Unrolled(partial(torch.optim.SGD, lr=0.25), steps=20)
    >>> solution = solve(game, y=response, optimizer=partial(torch.optim.SGD, lr=0.1), steps=50)
    >>> round(solution.variables["x"].item(), 3)
    1.5
    """
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
            f"solve: steps={steps}, but {path} has already {run.step_count}. Ask for more steps, or pass resume=False."
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

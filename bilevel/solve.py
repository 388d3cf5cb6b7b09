"""The loop: leaders step along gradients that see their followers' responses."""

from __future__ import annotations

import inspect
import math
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from bilevel import checkpoint as checkpoints
from bilevel.dynamics import (
    LOLA,
    Alternating,
    Consensus,
    Dynamics,
    ExactLOLA,
    Extragradient,
    Field,
    LookAhead,
    NegativeMomentum,
    Optimistic,
    Simultaneous,
    SymplecticAdjustment,
    TwoTimescale,
)
from bilevel.errors import (
    BilevelWarning,
    CheckpointError,
    NonConvergenceWarning,
    NonFiniteError,
    UnreliableResponseWarning,
)
from bilevel.game import Buffers, Game
from bilevel.inner.torch_optim import OptimizerFactory, build
from bilevel.many import Games
from bilevel.randomness import random_kept, random_state, set_random_state
from bilevel.responses import Response
from bilevel.responses.base import among
from bilevel.responses.many import refuse_mixing
from bilevel.solution import Solution
from bilevel.solutions import Solutions, summary
from bilevel.tree import Variables, leaves, map_leaves

Record = dict[str, float]
Callback = Callable[[int, Record, Mapping[str, Variables]], object]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


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

    >>> def lead(y): return (y - 3) ** 2
    >>> def follow(x, y): return (y - 2 * x) ** 2
    >>> from bilevel.game import Player
    >>> from bilevel.responses import Unrolled
    >>> game = Game(x=Player(lead, torch.tensor(0.0)), y=Player(follow, torch.tensor(0.0)))
    >>> response = Unrolled(partial(torch.optim.SGD, lr=0.25), steps=20)
    >>> solution = solve(game, y=response, optimizer=partial(torch.optim.SGD, lr=0.1), steps=50)
    >>> round(solution.variables["x"].item(), 3)
    1.5
    """
    run = _Run(game, responses, optimizer, scheduler, dynamics or Simultaneous(), clip_norm, seed)
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


class _Run:
    """One run: everything that a checkpoint holds, and how one step moves it."""

    def __init__(
        self,
        game: Game,
        responses: Mapping[str, Response],
        optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None,
        scheduler: SchedulerFactory | None,
        dynamics: Dynamics,
        clip_norm: float | None,
        seed: int,
    ) -> None:
        self.game, self.dynamics, self.clip_norm = game, dynamics, clip_norm
        for name, response in responses.items():
            if name not in game.names:
                raise TypeError(f"solve: {name!r} is neither an option nor a player; players are {list(game.names)}.")
            if not isinstance(response, Response):
                raise TypeError(
                    f"solve: {name}={response!r} is no response; expected Unrolled, Implicit, Hypernetwork, ..."
                )
        self.followers = {name: responses[name] for name in game.names if name in responses}
        self.leaders = [name for name in game.names if name not in responses]
        if not self.leaders or game.names[0] in responses:
            raise ValueError(f"solve: {game.names[0]!r} moves first and leads; it can have no response.")
        self._in_place = [name for name, response in self.followers.items() if response.in_place]
        if self._in_place and len(self.followers) > 1:
            raise ValueError(
                f"solve: {self._in_place} write into their states at every call, and with several followers the others "
                "call them too. Use in_place=False."
            )
        self.states: dict[str, Any] = {}
        for name, response in reversed(list(self.followers.items())):
            view = self._nest(self.states)[name]
            self.states[name] = response.init(view, follower=name, seed=seed)
        self.points = {name: [t.requires_grad_() for t in leaves(game.initial(name))] for name in self.leaders}
        default: OptimizerFactory = partial(torch.optim.Adam, lr=0.01)
        if isinstance(optimizer, Mapping) and set(optimizer) != set(self.leaders):
            raise ValueError(f"solve: optimizer has {sorted(optimizer)}; expected one for each leader, {self.leaders}.")
        factories = optimizer if isinstance(optimizer, Mapping) else dict.fromkeys(self.leaders, optimizer or default)
        if game.count is not None:
            _refuse_mixing_dynamics(dynamics, game.count)
            for name in self.leaders:
                refuse_mixing("solve", factories[name], game, name)
        self.optimizers = {name: build(factories[name], self.points[name]) for name in self.leaders}
        for name, built in self.optimizers.items():
            _refuse_searching(name, built)
        self.schedulers = {} if scheduler is None else {n: scheduler(o) for n, o in self.optimizers.items()}
        self.positions = {name: game.start(name, seed) for name in self.leaders}
        self.batches: dict[str, Any] = {}
        self.step_count, self.seconds, self.gradients, self.products = 0, 0.0, 0, 0
        self.history: list[Record] = []
        self.whole, self.seed = True, seed
        self.memory: dict[str, Any] = {}  # of the dynamics
        self.warned: dict[str, list[Any]] = {}
        # The leaders' own modules advance too when there is no follower to carry them.
        self.buffers: Buffers = {name: b for name, b in game.buffers().items() if b}

    @property
    def variables(self) -> dict[str, Variables]:
        """Everybody's present variables, detached; the followers' as they last answered."""
        result = {}
        for name in self.game.names:
            structure = self.game.structure(name)
            given = self.states[name]["variables"] if name in self.states else structure.build(self.points[name])
            result[name] = map_leaves(lambda t: t.detach().clone(), given)
        return result

    def _nest(self, states: Mapping[str, Any]) -> dict[str, Game]:
        """The game as each follower sees it: those who move after it answer by their responses, from these states."""
        views: dict[str, Game] = {}
        view = self.game
        for name, response in reversed(list(self.followers.items())):
            views[name] = view
            if name in states:

                def answer(
                    variables: Mapping[str, Variables],
                    name: str = name,
                    response: Response = response,
                    inner: Game = view,
                ) -> Variables:
                    earlier = self.game.names[: self.game.names.index(name)]
                    given = {n: v for n, v in variables.items() if n in earlier or n not in self.followers}
                    return response(inner, given, states[name])[0]

                view = view.anticipate(**{name: answer})
        return views

    def respond(
        self, point: Mapping[str, Variables], states: Mapping[str, Any]
    ) -> tuple[dict[str, Variables], dict[str, Any]]:
        """Everybody's variables when the leaders play `point`, and the followers' next states."""
        variables, after = dict(point), dict(states)
        views = self._nest(states)
        for name, response in self.followers.items():
            given = {n: v for n, v in variables.items() if n != name}
            variables[name], after[name] = response(views[name], given, states[name])
        return variables, after

    def step(self) -> Record:
        """One step of every leader."""
        began = time.perf_counter()
        positions = dict(self.positions)
        for name in self.leaders:
            self.batches[name], positions[name] = self.game.draw(name, self.positions[name])
        found: dict[str, Any] = {}
        random = random_state(self.game.device)
        # A response that writes into its state is of two minds from its call on.
        self.whole = not self._in_place

        def play(point: Mapping[str, list[Tensor]], wanted: Sequence[str]) -> dict[str, Tensor]:
            """The wanted players' losses at a point, on this step's batches, random numbers and states."""
            if "losses" in found:  # again within the step: the same dropout masks as the first time
                if self._in_place:
                    raise ValueError(
                        f"solve: {self.dynamics!r} evaluates the players more than once a step, and each time "
                        f"{self._in_place} would move on the states that they write into. Use in_place=False."
                    )
                set_random_state(random, self.game.device)
            trees = {name: self.game.structure(name).build(point[name]) for name in self.leaders}
            variables, states = self.respond(trees, self.states)
            buffers = self._buffers(states)
            losses, values = {}, {}
            for name in self.leaders if "losses" not in found else wanted:
                values[name], after = self.game.evaluate(name, variables, self.batches[name], buffers)
                losses[name] = self.game.total(values[name])
                advanced = {n: b for n, b in after.items() if n in self.leaders and b}
            if "losses" not in found:  # what the step is remembered by is where the players are
                found["losses"] = {name: value.detach() for name, value in values.items()}
                found["variables"], found["states"], found["buffers"] = variables, states, advanced
            return losses

        def evaluate(
            point: Mapping[str, list[Tensor]], wanted: Sequence[str], differentiable: bool
        ) -> dict[str, list[Tensor]]:
            """The wanted players' own gradients there."""
            with torch.enable_grad(), self._gathering():
                losses, slopes = play(point, wanted), {}
                for name in wanted:
                    grads = torch.autograd.grad(
                        losses[name],
                        point[name],
                        retain_graph=differentiable or name != wanted[-1],
                        create_graph=differentiable,
                        allow_unused=True,
                        materialize_grads=False,
                    )
                    slopes[name] = self._known(name, point[name], grads)
                    self.gradients += 1
            return slopes

        def losses(point: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
            """Everybody's losses there, differentiable."""
            self.gradients += len(self.leaders)
            with torch.enable_grad():
                return play(point, self.leaders)

        moving = [(name,) for name in self.leaders] if self.dynamics.alternates else [tuple(self.leaders)]
        norms: list[Tensor] = []
        memory = self.memory
        for movers in moving:
            with self._gathering():
                field = Field(evaluate, self.points, movers, losses)
                directions, memory = self.dynamics.directions(field, memory)
            self.whole = False
            self.products += field.products
            norms += [self._apply(name, directions[name]) for name in movers]
        self.memory, self.buffers = memory, found["buffers"]
        self.states, self.positions = found["states"], positions
        self.step_count += 1
        self.whole = True
        self.seconds += time.perf_counter() - began
        record: Record = {
            "step": self.step_count,
            **summary("gradient_norm", torch.linalg.vector_norm(torch.stack(norms).double(), dim=0)),
        }
        shown = dict(found["losses"])
        for name in self.followers:
            shown |= self._shown_losses(name, found["variables"], self.states)
            shown[f"{name}.stationarity"] = self.states[name]["stationarity"]
        for name, value in shown.items():
            record |= summary(name, value)
        record |= {"gradients": self._gradients(), "products": self._products(), "seconds": self.seconds}
        record["work"] = record["gradients"] + record["products"]
        self.history.append(record)
        return record

    def _known(self, name: str, point: list[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
        if all(grad is None for grad in grads):
            raise NonFiniteError(
                f"Player {name!r}: its hypergradient is missing, not zero: no path leads from its loss to its "
                "variables. Its loss must use them, or a follower's variables that respond to them."
            )
        return [torch.zeros_like(p) if g is None else g for p, g in zip(point, grads, strict=True)]

    def _apply(self, name: str, direction: list[Tensor]) -> Tensor:
        """Step one player along a direction; its norm, of many games one each."""
        norm = self.game.norms(direction)
        if not bool(torch.isfinite(norm).all()):
            where = f"norm {float(norm)}" if self.game.count is None else f"no finite norm{among(norm)}"
            raise NonFiniteError(
                f"Player {name!r}: its gradient at step {self.step_count + 1} has {where}. Lower the learning "
                "rates; its variables are still those of the step before."
            )
        for parameter, slope in zip(self.points[name], direction, strict=True):
            parameter.grad = slope
            if self.clip_norm is not None:
                scale = torch.where(norm <= self.clip_norm, 1.0, self.clip_norm / norm)
                parameter.grad = slope * scale.reshape(-1, *[1] * (slope.ndim - 1)) if scale.ndim else slope * scale
        self.optimizers[name].step()
        if name in self.schedulers:
            self.schedulers[name].step()
        return norm

    def _buffers(self, states: Mapping[str, Any]) -> Buffers:
        return {**self.buffers, **{name: state["buffers"] for name, state in states.items() if state["buffers"]}}

    def _shown_losses(
        self, name: str, variables: Mapping[str, Variables], states: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """A player's own loss on its last batch, or for a follower on the one that comes next: shown, not used.

        Of a joint player, its members'.
        """
        with torch.no_grad(), random_kept(self.game.device):
            if name in self.batches:
                batch = self.batches[name]
            else:
                position = states[name]["data"] if name in states else self.positions[name]
                batch, _ = self.game.draw(name, position)
            detached, buffers = map_leaves(lambda t: t.detach(), dict(variables)), self._buffers(states)
            members = self.game.members(name)
            if members == (name,):
                return {name: self.game.loss(name, detached, batch, buffers)}
            return {m: self.game.loss(m, detached, None if batch is None else batch[m], buffers) for m in members}

    def _gradients(self) -> int:
        return self.gradients + sum(int(state["gradients"]) for state in self.states.values())

    def _products(self) -> int:
        return self.products + sum(
            int(state["products"]) + int(state["linear"]["products"] if "linear" in state else 0)
            for state in self.states.values()
        )

    @contextmanager
    def _gathering(self, *, counted: bool = True) -> Iterator[None]:
        """Keep the responses' warnings, with the step of each; other libraries' pass through."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
        for entry in caught:
            if issubclass(entry.category, BilevelWarning):
                kind, text = entry.category.__name__, str(entry.message)
                # One entry for each solver that speaks, whatever numbers it gives.
                key = f"{kind} {text.split(maxsplit=1)[0]}"
                count, *_ = self.warned.get(key, [0])
                self.warned[key] = [count + counted, self.step_count + 1, text, kind]
            else:
                warnings.warn_explicit(entry.message, entry.category, entry.filename, entry.lineno)

    def state(self) -> dict[str, Any]:
        """All of it, as tensors, numbers and strings."""
        return {
            "players": {n: [list(s) for s in self.game.structure(n).shapes] for n in self.game.names},
            "responses": {name: _told(response) for name, response in self.followers.items()},
            "seed": self.seed,
            "step": self.step_count,
            "points": {name: [t.detach() for t in point] for name, point in self.points.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "schedulers": {name: scheduler.state_dict() for name, scheduler in self.schedulers.items()},
            "states": self.states,
            "positions": self.positions,
            "buffers": self.buffers,
            "dynamics": _told(self.dynamics),
            "memory": self.memory,
            "random": random_state(self.game.device),
            "history": self.history,
            "warned": self.warned,
            "gradients": self.gradients,
            "products": self.products,
            "seconds": self.seconds,
        }

    def restore(self, saved: Mapping[str, Any], path: Path) -> None:
        """Go on from what `state` gave; raises `CheckpointError` when it belongs to another game."""
        own = self.state()
        for key in ("players", "responses", "dynamics", "seed"):
            if saved[key] != own[key]:
                raise CheckpointError(
                    f"{path} is a checkpoint of another run: its {key}: {saved[key]}; here: {own[key]}. "
                    "Pass another checkpoint=, or resume=False to overwrite it."
                )
        with torch.no_grad():
            for name, point in self.points.items():
                for parameter, value in zip(point, saved["points"][name], strict=True):
                    parameter.copy_(value)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(saved["optimizers"][name])
        for name, scheduler in self.schedulers.items():
            scheduler.load_state_dict(saved["schedulers"][name])
        set_random_state(saved["random"], self.game.device)
        self.step_count, self.seconds = saved["step"], saved["seconds"]
        self.gradients, self.products = saved["gradients"], saved["products"]
        self.states, self.positions, self.buffers = saved["states"], saved["positions"], saved["buffers"]
        self.history, self.warned, self.memory = saved["history"], saved["warned"], saved["memory"]

    def solution(self) -> Solution | Solutions:
        """The leaders where they are and the followers' answer to them; warns of what still holds."""
        point = {name: self.game.structure(name).build(self.points[name]) for name in self.leaders}
        with torch.no_grad(), random_kept(self.game.device), self._gathering(counted=False):
            variables, states = self.respond(point, self.states)
        buffers = self._buffers(states)
        values = {k: v for name in self.game.names for k, v in self._shown_losses(name, variables, states).items()}
        told = []
        for count, last, text, kind in self.warned.values():
            when = f"in {count} of {self.step_count} steps, last in step {min(last, self.step_count)}"
            told.append(f"{kind} {when if count else 'in the answer to where the leaders ended'}: {text}")
            if last >= self.step_count:
                warnings.warn(told[-1], _CATEGORIES.get(kind, BilevelWarning), stacklevel=3)
        for name, state in self.states.items():
            looser = state["leader"]["factor"] if "leader" in state and state["leader"]["calls"] else 1.0
            if looser > 1.0:
                told.append(
                    f"The run ended while the inexactness= of {name!r} was still {looser:.3g} times looser than its "
                    "tolerances: the leader's last step was taken with that. Give it more steps, or a faster schedule."
                )
                warnings.warn(told[-1], NonConvergenceWarning, stacklevel=3)
        # The last backward solve belongs to the last step; the answer here needs none.
        solves = {n: s["linear"] for n, s in self.states.items() if "linear" in s}
        ended: dict[str, Any] = {
            "variables": map_leaves(lambda t: t.detach().clone(), {name: variables[name] for name in self.game.names}),
            "history": list(self.history),
            "stationarity": {name: state["stationarity"] for name, state in states.items()},
            "gradients": self.gradients + sum(state["gradients"] for state in states.values()),
            "products": self._products(),
            "seconds": self.seconds,
            "warnings": tuple(told),
            "states": states,
            "buffers": buffers,
        }
        if self.game.count is not None:
            residuals = {n: solve["memory"]["residuals"].clone() for n, solve in solves.items()}
            return Solutions(values=values, residuals=residuals, **ended)
        residuals = {n: float(solve["residual"]) for n, solve in solves.items()}
        residuals |= {n: float(s["residual"]) for n, s in states.items() if "residual" in s}
        estimates = {n: float(solve["error"]) for n, solve in solves.items()}
        return Solution(
            values={n: float(value) for n, value in values.items()},
            residuals=residuals,
            errors={n: error for n, error in estimates.items() if not math.isnan(error)},
            **ended,
        )


_SEPARABLE = (
    *(Simultaneous, Alternating, TwoTimescale, Extragradient, Optimistic, NegativeMomentum),
    *(Consensus, LookAhead, LOLA, ExactLOLA),
)


def _refuse_mixing_dynamics(dynamics: Dynamics, count: int) -> None:
    """Refuse a rule with a number that is made of the whole field, such as a sign or a solver's step length."""
    fixed = isinstance(dynamics, SymplecticAdjustment) and not dynamics.aligned
    if not (isinstance(dynamics, _SEPARABLE) or fixed):
        raise TypeError(
            f"solve: {dynamics!r} follows the whole field of {count} games by common numbers, which would mix them. "
            f"Use {', '.join(rule.__name__ for rule in _SEPARABLE)} or SymplecticAdjustment(aligned=False), or solve "
            "them one by one: solve(games.game(i), ...)."
        )


def _refuse_searching(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser that evaluates the loss itself: a leader's loss is a whole round of the followers."""
    (_, *arguments) = inspect.signature(type(optimizer).step).parameters.values()
    if any(argument.default is argument.empty for argument in arguments):
        raise TypeError(
            f"solve: the optimizer of {name!r} is {type(optimizer).__name__}, whose step() wants a closure to evaluate "
            "the loss with, several times a step; solve gives it one gradient a step, on that step's batch and states. "
            "Use one such as Adam or SGD here; a follower's own optimiser may be LBFGS: Implicit(LBFGS, ...)."
        )


def _told(response: Response | Dynamics) -> str:
    """A response's or a rule's configuration as text, the same from one process to the next."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(response))


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


_CATEGORIES = {kind.__name__: kind for kind in (NonConvergenceWarning, UnreliableResponseWarning)}
_NOT_SHOWN = {"step", "gradient_norm", "gradients", "products", "seconds", "work"}

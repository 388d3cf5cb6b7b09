"""Measures one response on one game: hypergradients at a ladder of budgets, memory, and a whole run."""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel.comparison.memory import peak_bytes
from bilevel.comparison.reference import converged, least, settled
from bilevel.comparison.rows import Point, Reference, Row, Step
from bilevel.dynamics import Dynamics
from bilevel.errors import BilevelWarning
from bilevel.game import Game
from bilevel.game.data import Batch
from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.randomness import random_kept
from bilevel.responses import Response
from bilevel.responses.base import State
from bilevel.solving import solve
from bilevel.tree import Variables, flatten, leaves, map_leaves

if TYPE_CHECKING:
    from bilevel.testing.known import KnownGame

CHECKS = 8
"""At about so many steps of a run is the leader's true value looked up."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A game at one seed: its leader (the first player), its follower, and the batches that are held."""

    name: str
    game: Game
    known: KnownGame | None
    follower: str
    seed: int

    @property
    def leader(self) -> str:
        """The player whose hypergradient is measured."""
        return self.game.names[0]

    def held(self, player: str) -> Batch:
        """A player's first batch."""
        return self.game.draw(player, self.game.start(player, self.seed))[0]

    def vector(self, variables: Variables) -> Tensor:
        """The leader's variables `[n]`, float64, in the order of the exact answer."""
        flat = flatten(variables) if self.known is None else self.known.leader_form.read(variables)
        return flat.detach().to("cpu", torch.float64)


@dataclass(frozen=True)
class Hypergradient:
    """What one call and one backward gave, and what they took."""

    vector: Tensor
    gradients: int
    products: int
    seconds: float
    stationarity: float
    residual: float


def hypergradient(setting: Setting, response: Response) -> Hypergradient:
    """d leader's loss / d leader's variables `[n]` at the game's start, from a fresh state, every batch held."""
    game, leader = setting.game, setting.leader
    batches = {name: setting.held(name) for name in (leader, setting.follower)}
    began = _clock(game.device)
    state = response.init(game, follower=setting.follower, seed=setting.seed)
    others = {name: game.initial(name) for name in game.names if name != setting.follower}
    others[leader] = map_leaves(lambda leaf: leaf.requires_grad_(), others[leader])
    with torch.enable_grad():
        answer, state = response(game, others, state, batches[setting.follower])
        everybody = {**others, setting.follower: answer}
        buffers = game.statistics(everybody, {setting.follower: state}, batches)
        value = game.loss(leader, everybody, batches[leader], buffers)
    slopes = torch.autograd.grad(value, leaves(others[leader]), allow_unused=True, materialize_grads=True)
    seconds = _clock(game.device) - began
    report = response.report(response.after_backward(state, answer))
    return Hypergradient(
        vector=setting.vector(game.structure(leader).build(slopes)),
        gradients=1 + report.gradients,
        products=report.products,
        seconds=seconds,
        stationarity=float(report.stationarity),
        residual=math.nan if report.residual is None else float(report.residual),
    )


def refer(setting: Setting, response: Response | None) -> tuple[Reference, list[float] | None]:
    """What the hypergradients are held against, and its entries; the response stands in for an exact answer."""
    known, name, seed = setting.known, setting.name, setting.seed
    if known is not None:
        exact = known.hypergradient(known.x0).detach()
        start = float(known.value(known.x0))
        return Reference(name, seed, "exact", float(exact.norm()), start=start, least=least(known)), exact.tolist()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BilevelWarning)  # the numbers that they would tell are in the reference
            found = hypergradient(setting, response or converged(_dtype(setting.game)))
            value = Valuation(setting, response)(setting.game.initial(setting.leader))
    except Exception as failure:  # without a reference the runs still have all else
        return Reference(name, seed, "converged", failure=told(failure)), None
    if not bool(found.vector.isfinite().all()):
        return Reference(name, seed, "converged", failure="its hypergradient is not finite"), None
    left = (_finite(found.stationarity), _finite(found.residual))
    reference = Reference(name, seed, "converged", float(found.vector.norm()), *left, start=value)
    return reference, found.vector.tolist()


class Valuation:
    """The leader's loss once the follower has converged; each solve starts from the last one's answer."""

    def __init__(self, setting: Setting, response: Response | None) -> None:
        self.setting = setting
        self.response = response or settled(_dtype(setting.game))
        self.state: State | None = None

    def __call__(self, variables: Variables) -> float | None:
        """At a leader's variables; None where the follower has no answer."""
        setting, known = self.setting, self.setting.known
        if known is not None:
            return _finite(float(known.value(setting.vector(variables))))
        game, follower = setting.game, setting.follower
        if self.state is None:
            self.state = self.response.init(game, follower=follower, seed=setting.seed)
        others = {name: game.initial(name) for name in game.names if name != follower}
        others[setting.leader] = variables
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", BilevelWarning)
            answer, self.state = self.response(game, others, self.state, setting.held(follower))
            everybody = {**others, follower: answer}
            buffers = game.statistics(everybody, {follower: self.state})
            loss = game.loss(setting.leader, everybody, setting.held(setting.leader), buffers)
        return _finite(float(loss))


def measure(
    setting: Setting,
    name: str,
    response: Response | Dynamics,
    *,
    optimizer: OptimizerFactory | None,
    steps: int,
    budgets: Sequence[float],
    reference: Response | None,
    exact: Sequence[float] | None,
) -> Row:
    """The row of one response; what it raises is in the row, with all that was measured before."""
    row = Row(setting.name, name, setting.seed)
    caught: list[warnings.WarningMessage] = []
    stage = "hypergradient"
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", BilevelWarning)
            troubles: list[str] = []
            if isinstance(response, Response):
                # First: it pays for what torch loads on first use, so that the clocks below do not.
                memory = peak_bytes(lambda: hypergradient(setting, response), setting.game.device)
                row = dataclasses.replace(row, memory=memory)
                points, troubles = _ladder(setting, response, budgets, exact)
                row = dataclasses.replace(row, errors=points)
            stage = "solve"
            row = _played(setting, row, response, optimizer, steps, reference)
    except Exception as failure:  # a row with its error: the others go on
        row = dataclasses.replace(row, failure=f"{stage}: {told(failure)}")
        troubles = []
    said = [str(entry.message) for entry in caught if issubclass(entry.category, BilevelWarning)]
    return dataclasses.replace(row, warnings=tuple(dict.fromkeys([*said, *troubles, *row.warnings])))


def _ladder(
    setting: Setting, response: Response, budgets: Sequence[float], exact: Sequence[float] | None
) -> tuple[tuple[Point, ...], list[str]]:
    points, troubles = [], []
    truth = None if exact is None else torch.tensor(exact, dtype=torch.float64)
    size = math.nan if truth is None else float(truth.norm())
    for budget in budgets:
        given = budgeted(response, budget)
        if given is None:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", BilevelWarning)  # a small budget is meant to be too small
                found = hypergradient(setting, given)
        except Exception as failure:
            if budget == 1.0:
                raise
            troubles.append(f"With {budget:g} times its budget: {told(failure)}")
            continue
        error = None if truth is None or size == 0.0 else float((found.vector - truth).norm()) / size
        points.append(Point(budget, found.gradients, found.products, found.seconds, _finite(error)))
    return tuple(points), troubles


def budgeted(response: Response, budget: float) -> Response | None:
    """The response with `budget` times its own budget of steps; None if it has none."""
    if budget == 1.0:
        return response
    return None if response.budget is None else response.with_budget(max(1, round(budget * response.budget)))


def _played(
    setting: Setting,
    row: Row,
    response: Response | Dynamics,
    optimizer: OptimizerFactory | None,
    steps: int,
    reference: Response | None,
) -> Row:
    """The row with a whole run of `solve`, and the true value of where the leader was at some of its steps."""
    wanted = {1, steps} | {round(steps ** (index / (CHECKS - 1))) for index in range(CHECKS)}
    seen: list[tuple[int, float, float, Variables]] = []

    def look(step: int, record: Mapping[str, float], variables: Mapping[str, Variables]) -> None:
        if step in wanted:
            seen.append((step, record["work"], record[setting.leader], variables[setting.leader]))

    played = {setting.follower: response} if isinstance(response, Response) else {"dynamics": response}
    solution = solve(
        setting.game,
        optimizer=optimizer,
        steps=steps,
        seed=setting.seed,
        callbacks=(look,),
        **played,
    )
    value = Valuation(setting, reference)
    history = tuple(Step(step, work, value(leader), seen_loss) for step, work, seen_loss, leader in seen)
    return dataclasses.replace(
        row,
        history=history,
        gradients=solution.gradients,
        products=solution.products,
        seconds=solution.seconds,
        stationarity=_finite(solution.stationarity.get(setting.follower)),
        residual=_finite(solution.residuals.get(setting.follower)),
        warnings=solution.warnings,
    )


def in_own_randomness(seed: int, device: torch.device, work: Callable[[], Any]) -> Any:
    """`work()` with torch's random numbers from `seed`, and the caller's as they were afterwards."""
    with random_kept(device, start=seed):
        return work()


def told(failure: BaseException) -> str:
    """What was raised, and where."""
    where = traceback.extract_tb(failure.__traceback__)[-1]
    return f"{type(failure).__name__}: {failure} ({Path(where.filename).name}, line {where.lineno})"


def _dtype(game: Game) -> torch.dtype:
    return flatten(game.initial(game.names[0])).dtype


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

"""Rules that see the leader's and the follower's loss together, and need first derivatives alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as option
from typing import Any, final

import torch
from torch import Tensor

from bilevel.dynamics.base import Dynamics, State
from bilevel.dynamics.field import Field
from bilevel.errors import require_kinds
from bilevel.inner import TorchOptimizer
from bilevel.inner.base import FreeProblem
from bilevel.inner.optimizer import torch_optimizer
from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.tree import Structure, Variables, join, structure_of

Point = list[Tensor]
"""The leaves of one player's variables."""

Weights = tuple[float, float]
"""How much of the leader's loss and of the follower's."""

Found = tuple[dict[str, list[Tensor]], State]
"""The directions, or places, by player, and the next state; "multiplier" of it is told in the history."""


class ValueFunctionMethod(ABC):
    """How the follower's value g*(x), the least of its loss, enters the leader's step; a configuration."""

    @property
    def places_follower(self) -> bool:
        """Whether the method moves the follower by the rule's own optimiser; else `solve`'s moves it too."""
        return True

    @abstractmethod
    def play(self, losses: BothLosses, state: State) -> Found:
        """One step of both players."""


@final
@dataclass(frozen=True)
class F2SA2(ValueFunctionMethod):
    r"""The follower settles twice, for and against the leader: a two-sided difference of first derivatives.

    $$
    y_\pm \approx \arg\min_y g \pm \nu f, \qquad
    d_x = \frac{\nabla_x (g + \nu f)(x, y_+) - \nabla_x (g - \nu f)(x, y_-)}{2 \nu}
    $$

    The follower is placed between the two, within \(O(\nu^2)\) of its optimum; \(d_x\) is the hypergradient with an
    error of \(O(\nu^2)\), and what the two are short of settling, divided by \(\nu\).

    Costs `steps` gradients of each loss at two points, and two of each more. The paper also divides
    \(d_x\) by its norm, which with a constant rate settles nowhere; here `solve(clip_norm=...)` bounds it.

    Args:
        nudge: \(\nu\), in the unit of the follower's loss over the leader's.
        steps: Of the rule's optimiser for both points together.
        rejoin: Whether each call begins both from the point between them, where the follower is. From where they were,
            they settle further; but the points of a network that is trained for few steps drift apart, and what is
            between two networks is none.

    Source: arXiv 2509.02937.

    Examples:
        >>> F2SA2(nudge=1e-3).steps
        10
    """

    nudge: float = 0.01
    steps: int = 10
    rejoin: bool = False

    def __post_init__(self) -> None:
        require_kinds(self)
        _require(self, "nudge", self.nudge > 0.0 and self.nudge < float("inf"), "a positive finite number")
        _require_steps(self, self.steps)

    def play(self, losses: BothLosses, state: State) -> Found:
        """Settle on both sides; the difference."""
        nu = self.nudge
        sides: list[Weights] = [(nu, 1.0), (-nu, 1.0)]
        between = [losses.y, losses.y]
        starts = between if self.rejoin else state.get("sides", between)
        (up, down), memory = losses.settled(starts, sides, state.get("optimizer"), self.steps)
        losses.advance()
        above, below = losses.slopes(up, sides[0], "x"), losses.slopes(down, sides[1], "x")
        direction = [(a - b) / (2.0 * nu) for a, b in zip(above, below, strict=True)]
        middle = [(a + b) / 2.0 for a, b in zip(up, down, strict=True)]
        after = {"sides": [up, down], "optimizer": memory, "multiplier": 1.0 / nu}
        return {losses.leader: direction, losses.follower: middle}, after


@final
@dataclass(frozen=True)
class F2SA(ValueFunctionMethod):
    r"""The follower settles for itself, and once more with the leader's loss added: fully first-order approximation.

    $$
    z \approx \arg\min_y g, \qquad y_\lambda \approx \arg\min_y f + \lambda g
    $$

    $$
    d_x = \nabla_x f(x, y_\lambda) + \lambda \left(\nabla_x g(x, y_\lambda) - \nabla_x g(x, z)\right)
    $$

    with \(\lambda = \text{start} + \text{growth} \cdot t\) in step t. The follower is placed at z. \(d_x\) is the
    hypergradient with an error of \(O(1/\lambda)\), and what the two are short of settling, times \(\lambda\): rates
    must fall as \(\lambda\) grows (the paper: those of the leader like \(t^{-5/7}\), of the follower \(t^{-4/7}\)).

    Costs `steps` gradients of the leader's loss and twice as many of the follower's, and three more.

    Args:
        start: The first multiplier.
        growth: How much it grows in each step; the field's benchmark uses the default.
        steps: Of the rule's optimiser for both points together, from where they were; it steps along
            \(\nabla_y g + \nabla_y f / \lambda\), so that one rate serves all multipliers.

    Source: Kwon et al. 2023 (arXiv 2301.11389).

    Examples:
        >>> F2SA(growth=0.01).start
        1.0
    """

    start: float = 1.0
    growth: float = 0.1
    steps: int = 10

    def __post_init__(self) -> None:
        require_kinds(self)
        _require(self, "start", 0.0 < self.start < float("inf"), "a positive finite number")
        _require(self, "growth", 0.0 <= self.growth < float("inf"), "a finite number >= 0")
        _require_steps(self, self.steps)

    def play(self, losses: BothLosses, state: State) -> Found:
        """Settle twice; the difference."""
        taken = int(state.get("taken", 0))
        multiplier = self.start + self.growth * taken
        sides: list[Weights] = [(0.0, 1.0), (1.0 / multiplier, 1.0)]
        starts = state.get("sides", [losses.y, losses.y])
        (own, pushed), memory = losses.settled(starts, sides, state.get("optimizer"), self.steps)
        losses.advance()
        there = losses.slopes(pushed, (1.0, multiplier), "x")
        value = losses.slopes(own, (0.0, multiplier), "x")
        direction = [a - b for a, b in zip(there, value, strict=True)]
        after = {"sides": [own, pushed], "optimizer": memory, "multiplier": multiplier, "taken": taken + 1}
        return {losses.leader: direction, losses.follower: own}, after


@final
@dataclass(frozen=True)
class BOME(ValueFunctionMethod):
    r"""Both players descend the leader's loss, and are turned so that the follower's gap to its optimum shrinks.

    With \(\hat y\) some plain steps from y, held, and \(q = g(x, y) - g(x, \hat y)\),

    $$
    d = \nabla f + \lambda \nabla q, \qquad
    \lambda = \max\left(\frac{\eta |\nabla q|^2 - \langle \nabla f, \nabla q \rangle}{|\nabla q|^2},\; 0\right)
    $$

    for x and y together. `solve(optimizer=...)` moves both; the paper has one rate. Near the end, where
    \(\nabla q\) vanishes, it is slow: y stays some way from its optimum.

    Costs `steps` gradients of the follower's loss, one of each loss, and one more.

    Args:
        eta: \(\eta\); the paper's value.
        steps: Of the rule's optimiser towards \(\hat y\), without a memory.

    Source: Ye et al. 2022 (arXiv 2209.08709).

    Examples:
        >>> BOME().eta
        0.5
    """

    eta: float = 0.5
    steps: int = 10

    def __post_init__(self) -> None:
        require_kinds(self)
        _require(self, "eta", 0.0 < self.eta < float("inf"), "a positive finite number")
        _require_steps(self, self.steps)

    @property
    def places_follower(self) -> bool:
        """No: it moves along a direction as the leader does."""
        return False

    def play(self, losses: BothLosses, state: State) -> Found:
        """Both along f and q."""
        (near,), _ = losses.settled([losses.y], [(0.0, 1.0)], None, self.steps)
        losses.advance()
        lead = losses.slopes(losses.y, (1.0, 0.0), "xy")
        gap = losses.slopes(losses.y, (0.0, 1.0), "xy")
        value = losses.slopes(near, (0.0, 1.0), "x")
        gap = [slope - value[i] if i < len(value) else slope for i, slope in enumerate(gap)]
        flat_gap, flat_lead = join(gap), join(lead)
        size = float(flat_gap @ flat_gap)
        multiplier = max((self.eta * size - float(flat_lead @ flat_gap)) / size, 0.0) if size > 0.0 else 0.0
        direction = [a + multiplier * b for a, b in zip(lead, gap, strict=True)]
        count = len(value)
        return {losses.leader: direction[:count], losses.follower: direction[count:]}, {"multiplier": multiplier}


@final
@dataclass(frozen=True)
class VPBGD(ValueFunctionMethod):
    r"""Both players descend the leader's loss plus a multiple of the follower's gap: penalty-based gradient descent.

    $$
    d = \nabla \left( f + \gamma\, (g(x, y) - g(x, \hat y)) \right), \qquad \hat y \approx \arg\min_y g
    $$

    with \(\hat y\) held, and stepped from where it was. `solve(optimizer=...)` moves x and y. Its limit is the
    penalised problem's: y is off its optimum by \(O(1/\gamma)\), and the leader's value with it.

    Costs `steps` gradients of the follower's loss, one of each loss, and one more.

    Args:
        multiplier: \(\gamma\), in the end.
        ramp: So many steps in which \(\gamma\) grows to it from 0, evenly; 0: constant. Hyper-cleaning with a linear
            model is published with 0.2 reached after 30,000 of 40,000 steps.
        steps: Of the rule's optimiser for \(\hat y\).

    Source: Shen and Chen 2023 (arXiv 2302.05185).

    Examples:
        >>> VPBGD(multiplier=10.0, ramp=0).steps
        1
    """

    multiplier: float = 0.2
    ramp: int = 30_000
    steps: int = 1

    def __post_init__(self) -> None:
        require_kinds(self)
        _require(self, "multiplier", 0.0 < self.multiplier < float("inf"), "a positive finite number")
        _require(self, "ramp", self.ramp >= 0, "a number of steps >= 0")
        _require_steps(self, self.steps)

    @property
    def places_follower(self) -> bool:
        """No: it moves along a direction as the leader does."""
        return False

    def play(self, losses: BothLosses, state: State) -> Found:
        """Both along the penalised loss."""
        taken = int(state.get("taken", 0))
        gamma = self.multiplier * (min(taken / self.ramp, 1.0) if self.ramp else 1.0)
        near = state.get("near", losses.y)
        (near,), memory = losses.settled([near], [(0.0, 1.0)], state.get("optimizer"), self.steps)
        losses.advance()
        there, value = losses.slopes(losses.y, (1.0, gamma), "xy"), losses.slopes(near, (0.0, gamma), "x")
        count = len(value)
        lead = [a - b for a, b in zip(there, value, strict=False)]
        after = {"near": near, "optimizer": memory, "multiplier": gamma, "taken": taken + 1}
        return {losses.leader: lead, losses.follower: there[count:]}, after


@final
@dataclass(frozen=True)
class ValueFunction(Dynamics):
    r"""One leader and one follower, without a response: both losses together, by first derivatives alone.

    The follower's optimality is said by its value, \(g(x, y) \le \min_y g(x, \cdot)\), which enters the leader's loss
    with a multiplier. No derivative of a derivative is taken anywhere. Each player draws batches of its own, a new one
    for each inner step.

        bl.solve(game, dynamics=bl.ValueFunction(partial(SGD, lr=0.1)), optimizer=partial(SGD, lr=0.01))

    In `history` the multiplier is under "dynamics.multiplier". Nothing measures the hypergradient's error: each
    method says what its limit is off by.

    Args:
        optimizer: What moves the follower's points: a callable from tensors to a torch.optim optimiser, or
            `TorchOptimizer(...)` with a schedule. Points that move together are clipped together.
            `solve(optimizer=)` moves the leader; with `BOME` and `VPBGD` the follower's own variables too.
        method: `F2SA2()`, `F2SA()`, `BOME()` or `VPBGD()`.

    Raises:
        ValueError: In the first step, unless there is one leader and one follower, none with a response.
        TypeError: In the first step, for a follower that minimises no loss of its own.

    Examples:
        >>> import bilevel as bl
        >>> from functools import partial
        >>> x = bl.Player(lambda x, y: (y - 1.0) ** 2 + x ** 2, torch.tensor(0.0))
        >>> y = bl.Player(lambda x, y: (y - x) ** 2, torch.tensor(0.0))
        >>> sgd = partial(torch.optim.SGD, lr=0.1)
        >>> found = bl.solve(bl.Game(x=x, y=y), dynamics=ValueFunction(sgd), optimizer={"x": sgd}, steps=100)
        >>> round(found.variables["x"].item(), 2)
        0.5
    """

    optimizer: OptimizerFactory | TorchOptimizer
    method: ValueFunctionMethod = option(default_factory=F2SA2)

    def __post_init__(self) -> None:
        torch_optimizer("ValueFunction", self.optimizer)
        if not isinstance(self.method, ValueFunctionMethod):
            raise TypeError(f"ValueFunction: method={self.method!r}; expected F2SA2(), F2SA(), BOME() or VPBGD().")

    def placed(self, names: Sequence[str]) -> tuple[str, ...]:
        """The follower, where the method settles it."""
        return tuple(names[1:]) if self.method.places_follower else ()

    def report(self, state: State) -> Mapping[str, float]:
        """The multiplier."""
        return {"multiplier": float(state["multiplier"])}

    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """The method's."""
        if len(field.names) != 2:
            raise ValueError(
                f"ValueFunction plays one leader and one follower without a response; here {list(field.names)} have "
                "none. Leave out the response of the player that is to follow, give any further player one, or join "
                "followers by game.joined(...)."
            )
        field.play.require_minimum("ValueFunction", field.names[1])
        return self.method.play(BothLosses(field, torch_optimizer("ValueFunction", self.optimizer)), state)


class BothLosses:
    """The leader's loss f and the follower's g during one step, as a method asks for them.

    `x` and `y` are the leaves where the players are.
    """

    def __init__(self, field: Field, optimizer: TorchOptimizer) -> None:
        self._field, self._optimizer = field, optimizer
        self.leader, self.follower = field.names
        self.x, self.y = (field.point[name] for name in field.names)

    def slopes(self, y: Sequence[Tensor], weights: Weights, wanted: str) -> list[Tensor]:
        """Gradients of `weights` of f and g at (x, y): in the leaves of "x", of "y", or of both, "xy"."""
        return self._slopes(y, weights, wanted)[1]

    def advance(self, *, leader: bool = True) -> None:
        """On to the next batches; of the follower alone where the leader's loss was not asked for."""
        self._field.play.advance(self._field.names if leader else (self.follower,))

    def settled(
        self, starts: Sequence[Point], sides: Sequence[Weights], memory: Any, steps: int
    ) -> tuple[list[Point], Any]:
        """Points of y after steps down `weights` of f and g each, side by side on the same batches; and the memory."""
        problem = _Sides(self, sides)
        joint = [leaf for start in starts for leaf in start]
        found, memory = self._optimizer.minimise(problem, joint, memory, steps=steps, threshold=0.0)
        size = len(self.y)
        return [found[i * size : (i + 1) * size] for i in range(len(sides))], memory

    def tree(self, leaves: Sequence[Tensor]) -> Variables:
        """The follower's variables."""
        return self._field.play.tree(self.follower, leaves)

    def _slopes(self, y: Sequence[Tensor], weights: Weights, wanted: str) -> tuple[Tensor, list[Tensor]]:
        at = {
            name: [leaf.detach().requires_grad_(letter in wanted) for leaf in leaves]
            for name, letter, leaves in ((self.leader, "x", self.x), (self.follower, "y", y))
        }
        with torch.enable_grad():
            losses = [
                weight * self._field.play.own(name, at, ())
                for name, weight in zip(self._field.names, weights, strict=True)
                if weight != 0.0
            ]
            loss = sum(losses, y[0].new_zeros(()))
            asked = [leaf for leaves in at.values() for leaf in leaves if leaf.requires_grad]
            if not loss.requires_grad:
                return loss, [torch.zeros_like(leaf) for leaf in asked]
            return loss.detach(), list(torch.autograd.grad(loss, asked, materialize_grads=True))


class _Sides(FreeProblem):
    """Several points of the follower, each with weights of its own, as the one problem that an inner solver sees."""

    batch: Any = None

    def __init__(self, losses: BothLosses, sides: Sequence[Weights]) -> None:
        self._losses, self._sides = losses, sides
        self.name = losses.follower
        self.form: Structure = structure_of([losses.tree(losses.y) for _ in sides])
        self.others: Mapping[str, Variables] = {}

    def gradients(self, y: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The sum of the sides' losses, and each side's own gradient."""
        size, total = len(self._losses.y), y[0].new_zeros(())
        found: list[Tensor] = []
        for index, weights in enumerate(self._sides):
            loss, slopes = self._losses._slopes(y[index * size : (index + 1) * size], weights, "y")
            total, found = total + loss.detach(), found + slopes
        return total, found

    def advance(self) -> None:
        """The next batches of those whose losses are asked for."""
        self._losses.advance(leader=any(lead != 0.0 for lead, _ in self._sides))


def _require(method: ValueFunctionMethod, name: str, right: bool, expected: str) -> None:
    if not right:
        raise ValueError(f"{type(method).__name__}: {name}={getattr(method, name)}; expected {expected}.")


def _require_steps(method: ValueFunctionMethod, steps: int) -> None:
    _require(method, "steps", isinstance(steps, int) and steps >= 1, "at least 1")

"""How the step of an optimiser moves with the leader's entries, given how its gradient does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, optim

from bilevel.inner.differentiable import SEEDS
from bilevel.inner.torch_optim import Memory, build, player_parameters
from bilevel.responses.unrolled.differentiation import Point, Steps, detach_memory
from bilevel.responses.unrolled.segment import COUNTERS
from bilevel.tree import Variables

Slot = dict[str, Tensor]


class Tangents(ABC):
    """The optimiser on its way, and for each entry of the leader's the derivatives of the leaves and of its memory."""

    memory: Memory | None

    @abstractmethod
    def columns(self) -> list[list[Tensor]]:
        """For each entry the derivative of the leaves."""

    @abstractmethod
    def step(self, y: list[Tensor], slopes: list[Tensor], along: Iterator[list[Tensor]]) -> list[Tensor]:
        """The leaves after one step; `along` gives for each entry the derivative of the gradients `slopes`."""


def moving_tangents(
    steps: Steps, start: Point, others: Mapping[str, Variables], chosen: Sequence[Tensor], units: list[list[Tensor]]
) -> Tangents:
    """Those of the steps' optimiser from `start`; `units` hold the unit vectors of the variables `chosen`."""
    named = player_parameters(steps.factory, others)
    optimizer = steps.stepper(start, others).optimizer
    if named and isinstance(optimizer, optim.ASGD):
        raise TypeError(
            f"ForwardMode: torch's ASGD reads its learning rate as a plain number, so that {named[0]!r} would get no "
            "derivative. Use SGD, Adam or another optimiser."
        )
    if isinstance(optimizer, optim.SGD) and not named:
        return _Linear(steps, start, len(units))
    return _Elementwise(steps, start, others, chosen, units if named else [[] for _ in units])


class _Linear(Tangents):
    """SGD's step is linear in leaves, gradient and momentum: its derivative is a step of its own, by torch itself."""

    def __init__(self, steps: Steps, start: Point, entries: int) -> None:
        follower = steps.follower
        self._stepper = steps.stepper(start, follower.others)
        self._stepper.own_memory()
        self._columns = [[torch.zeros_like(leaf) for leaf in start.y] for _ in range(entries)]
        players = {name: value for name, value in follower.others.items() if name in follower.game.names}
        self._optimizers = [build(steps.factory, column, players) for column in self._columns]
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["foreach"] = False

    @property
    def memory(self) -> Memory | None:  # type: ignore[override]
        """The optimiser's own."""
        return self._stepper.memory

    def columns(self) -> list[list[Tensor]]:
        """For each entry the derivative of the leaves."""
        return self._columns

    def step(self, y: list[Tensor], slopes: list[Tensor], along: Iterator[list[Tensor]]) -> list[Tensor]:
        """The leaves after one step."""
        fresh = self._stepper.memory is None
        for column, optimizer, moved in zip(self._columns, self._optimizers, along, strict=True):
            slope_of = dict(zip(map(id, column), moved, strict=True))
            for group in optimizer.param_groups:
                for tangent in group["params"]:
                    tangent.grad = slope_of[id(tangent)]
                    if tangent not in optimizer.state:  # the first step: as memory begins, so does its derivative
                        seed = SEEDS[optim.SGD](tangent, tangent.grad, group)
                        optimizer.state[tangent] = seed if fresh else {k: torch.zeros_like(t) for k, t in seed.items()}
            optimizer.step()
        return self._stepper.step_in_place(y, slopes)


class _Elementwise(Tangents):
    """Every other optimiser treats each entry alike: its step's derivatives are diagonals, the same for every column.

    Hyperparameters of it that are players' variables move all entries at once, and are added.
    """

    def __init__(
        self,
        steps: Steps,
        start: Point,
        others: Mapping[str, Variables],
        chosen: Sequence[Tensor],
        units: list[list[Tensor]],
    ) -> None:
        self._stepper = steps.stepper(start, others)
        self._chosen, self._units = chosen, units
        self._tangents: list[list[Slot]] = [[{"y": torch.zeros_like(leaf)} for leaf in start.y] for _ in units]

    @property
    def memory(self) -> Memory | None:  # type: ignore[override]
        """The optimiser's own."""
        return self._stepper.memory

    def columns(self) -> list[list[Tensor]]:
        """For each entry the derivative of the leaves."""
        return [[slot["y"] for slot in column] for column in self._tangents]

    def step(self, y: list[Tensor], slopes: list[Tensor], along: Iterator[list[Tensor]]) -> list[Tensor]:
        """The leaves after one step."""
        stepper = self._stepper
        inputs: list[Slot] = [
            {"y": leaf.detach().requires_grad_(), "slope": slope.detach().requires_grad_()}
            for leaf, slope in zip(y, slopes, strict=True)
        ]
        if stepper.memory is not None:
            for slot, remembered in zip(inputs, stepper.memory, strict=True):
                slot |= {k: v.detach().requires_grad_() for k, v in remembered.items() if _moves(k, v)}
            stepper.memory = [
                m | {k: slot[k] for k in m if k in slot} for m, slot in zip(stepper.memory, inputs, strict=True)
            ]
        with torch.enable_grad():
            after = stepper.step([slot["y"] for slot in inputs], [slot["slope"] for slot in inputs])
            outputs: list[Slot] = [
                {"y": leaf} | {k: v for k, v in remembered.items() if _moves(k, v)}
                for leaf, remembered in zip(after, stepper.memory or (), strict=True)
            ]
            diagonals = _diagonals(outputs, inputs)
            shared = _Shared(outputs, self._chosen) if self._units[0] else None
        stepper.memory = detach_memory(stepper.memory)
        for number, (column, moved) in enumerate(zip(self._tangents, along, strict=True)):
            added = None if shared is None else shared.along(self._units[number])
            for index, (slot, slope) in enumerate(zip(column, moved, strict=True)):
                given = slot | {"slope": slope}
                column[index] = {
                    kind: _summed(
                        [(d, given[k]) for k, d in of.items() if k in given],
                        outputs[index][kind] if added is None else added[index][kind],
                        start=None if added is None else added[index][kind],
                    )
                    for kind, of in diagonals[index].items()
                }
        return [leaf.detach() for leaf in after]


class _Shared:
    """The derivative of a step's outputs in the hyperparameters of the optimiser, by transposing that backward pass."""

    def __init__(self, outputs: Sequence[Slot], chosen: Sequence[Tensor]) -> None:
        self._outputs = outputs
        flat = [tensor for slot in outputs for tensor in slot.values()]
        self._seeds = [torch.zeros_like(tensor).requires_grad_() for tensor in flat]
        attached = [index for index, tensor in enumerate(flat) if tensor.requires_grad]
        linear = torch.autograd.grad(
            [flat[i] for i in attached],
            chosen,
            [self._seeds[i] for i in attached],
            create_graph=True,
            materialize_grads=True,
        )
        self._linear = [(index, value) for index, value in enumerate(linear) if value.requires_grad]

    def along(self, unit: Sequence[Tensor]) -> list[Slot]:
        """The derivative of each output along a unit vector of the chosen variables."""
        if not self._linear:
            return [{kind: torch.zeros_like(tensor) for kind, tensor in slot.items()} for slot in self._outputs]
        found = iter(
            torch.autograd.grad(
                [value for _, value in self._linear],
                self._seeds,
                [unit[index] for index, _ in self._linear],
                retain_graph=True,
                materialize_grads=True,
            )
        )
        return [{kind: next(found) for kind in slot} for slot in self._outputs]


def _diagonals(outputs: Sequence[Slot], inputs: Sequence[Slot]) -> list[dict[str, Slot]]:
    """For each leaf: output -> input -> the derivative of each entry in the same entry."""
    found: list[dict[str, Slot]] = [{} for _ in outputs]
    flat = [tensor for slot in inputs for tensor in slot.values()]
    for kind in dict.fromkeys(kind for slot in outputs for kind in slot):
        owners = [index for index, slot in enumerate(outputs) if kind in slot]
        attached = [outputs[i][kind] for i in owners if outputs[i][kind].requires_grad]
        ones = [torch.ones_like(tensor) for tensor in attached]
        given = (
            [None] * len(flat)
            if not attached
            else torch.autograd.grad(attached, flat, ones, retain_graph=True, allow_unused=True)
        )
        slopes = iter(given)
        for index, slot in enumerate(inputs):
            row = {name: next(slopes) for name in slot}
            if index in owners:
                found[index][kind] = {name: d for name, d in row.items() if d is not None}
    return found


def _summed(terms: Sequence[tuple[Tensor, Tensor]], like: Tensor, *, start: Tensor | None) -> Tensor:
    total = start
    for diagonal, tangent in terms:
        total = diagonal * tangent if total is None else total.addcmul_(diagonal, tangent)
    return torch.zeros_like(like) if total is None else total


def _moves(name: str, value: object) -> bool:
    """Whether what is remembered leads from y to y; ASGD's rate depends on no y, and no y on its average."""
    return isinstance(value, Tensor) and name not in COUNTERS and name not in ("eta", "ax")

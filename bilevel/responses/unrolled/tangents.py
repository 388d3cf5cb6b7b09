"""How the step of an optimiser moves with the leader's entries, given how its gradient does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, optim

from bilevel.inner.schedule import applied
from bilevel.inner.seeds import SEEDS
from bilevel.inner.torch_optim import Memory
from bilevel.responses.unrolled.differentiation import Point, Steps, detach_memory
from bilevel.responses.unrolled.pushforward import Pushforward
from bilevel.responses.unrolled.recipe import InnerStep
from bilevel.responses.unrolled.segment import INERT, PointForm
from bilevel.tree import Variables, leaf_names

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
    settings, step = steps.recipe.settings, steps.stepper(start, others)
    named = settings.players(others)
    moving: Tangents
    # ASGD remembers its rate, and NAdam a product of its betas: one number for all entries of a leaf.
    if step.stepper.kind is None or (step.stepper.kind in (optim.ASGD, optim.NAdam) and named):
        moving = _General(step, start, chosen, units)
    elif step.stepper.kind is optim.SGD and not named:
        moving = _Linear(steps, start, len(units))
    else:
        moving = _Elementwise(step, start, chosen, units if named else [[] for _ in units])
    return _Clipped(moving, step, chosen, units) if step.clips else moving


class _Clipped(Tangents):
    """Along gradients that are clipped first: by their norm, all entries of them move each."""

    def __init__(
        self, moving: Tangents, step: InnerStep, chosen: Sequence[Tensor], units: Sequence[Sequence[Tensor]]
    ) -> None:
        self._moving, self._clip, self._chosen, self._units = moving, step.clip, chosen, units

    @property
    def memory(self) -> Memory | None:  # type: ignore[override]
        """The optimiser's own."""
        return self._moving.memory

    def columns(self) -> list[list[Tensor]]:
        """For each entry the derivative of the leaves."""
        return self._moving.columns()

    def step(self, y: list[Tensor], slopes: list[Tensor], along: Iterator[list[Tensor]]) -> list[Tensor]:
        """The leaves after one step."""
        with torch.enable_grad():
            raw = [slope.detach().requires_grad_() for slope in slopes]
            clipped = self._clip(raw)
            moves = Pushforward(clipped, [*raw, *self._chosen])
        moved = (moves([*slope, *unit]) for slope, unit in zip(along, self._units, strict=True))
        return self._moving.step(y, [slope.detach() for slope in clipped], moved)


class _Linear(Tangents):
    """SGD's step is linear in leaves, gradient and momentum: its derivative is a step of its own, by torch itself."""

    def __init__(self, steps: Steps, start: Point, entries: int) -> None:
        follower = steps.follower
        self._stepper = steps.stepper(start, follower.others)
        self._stepper.own_memory()
        self._columns = [[torch.zeros_like(leaf) for leaf in start.y] for _ in range(entries)]
        names = leaf_names(follower.form.build(start.y), follower.name)
        self._optimizers = [steps.recipe.settings.build(column, names) for column in self._columns]
        self._originals = [dict(group) for group in self._optimizers[0].param_groups]
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
        changes = self._stepper.next_changes()
        settings = applied(changes, self._originals)  # a rate that is a tensor is scheduled as a function of it
        for column, optimizer, moved in zip(self._columns, self._optimizers, along, strict=True):
            slope_of = dict(zip(map(id, column), moved, strict=True))
            for index, group in enumerate(optimizer.param_groups):
                group |= settings[index]
                for tangent in group["params"]:
                    tangent.grad = slope_of[id(tangent)]
                    if tangent not in optimizer.state:  # the first step: as memory begins, so does its derivative
                        seed = SEEDS[optim.SGD](tangent, tangent.grad, group)
                        optimizer.state[tangent] = seed if fresh else {k: torch.zeros_like(t) for k, t in seed.items()}
            optimizer.step()
        return self._stepper.stepper.step_in_place(y, slopes, changes)


class _Elementwise(Tangents):
    """Every other optimiser treats each entry alike: its step's derivatives are diagonals, the same for every column.

    Hyperparameters of it that are players' variables move all entries at once, and are added.
    """

    def __init__(
        self, step: InnerStep, start: Point, chosen: Sequence[Tensor], units: Sequence[Sequence[Tensor]]
    ) -> None:
        self._stepper = step
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
            after = stepper.move([slot["y"] for slot in inputs], [slot["slope"] for slot in inputs])
            outputs: list[Slot] = [
                {"y": leaf} | {k: v for k, v in remembered.items() if _moves(k, v)}
                for leaf, remembered in zip(after, stepper.memory or (), strict=True)
            ]
            diagonals = _diagonals(outputs, inputs)
            flat = [tensor for slot in outputs for tensor in slot.values()]
            shared = Pushforward(flat, self._chosen) if self._units[0] else None
        stepper.memory = detach_memory(stepper.memory)
        for number, (column, moved) in enumerate(zip(self._tangents, along, strict=True)):
            added = None if shared is None else _laid_out(shared(self._units[number]), outputs)
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


class _General(Tangents):
    """An optimiser of the user's own: any entry after a step may depend on any entry of the leaf before it."""

    def __init__(
        self, step: InnerStep, start: Point, chosen: Sequence[Tensor], units: Sequence[Sequence[Tensor]]
    ) -> None:
        self._stepper, self._chosen, self._units, self._leaves = step, chosen, units, len(start.y)
        # Without a derivative yet, what is remembered from an earlier call as well as the leaves.
        _, tensors = PointForm.of(start)
        self._tangents = [[torch.zeros_like(tensor) for tensor in tensors] for _ in units]

    @property
    def memory(self) -> Memory | None:  # type: ignore[override]
        """The optimiser's own."""
        return self._stepper.memory

    def columns(self) -> list[list[Tensor]]:
        """For each entry the derivative of the leaves."""
        return [column[: self._leaves] for column in self._tangents]

    def step(self, y: list[Tensor], slopes: list[Tensor], along: Iterator[list[Tensor]]) -> list[Tensor]:
        """The leaves after one step."""
        stepper = self._stepper
        form, tensors = PointForm.of(Point(y, stepper.memory))
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
            raw = [slope.detach().requires_grad_() for slope in slopes]
            before, _ = form.point(inputs)
            stepper.memory = before.memory
            moved = stepper.move(before.y, raw)
            _, outputs = PointForm.of(Point(moved, stepper.memory))
            floating = [index for index, tensor in enumerate(inputs) if tensor.requires_grad]
            moves = Pushforward(outputs, [*(inputs[index] for index in floating), *raw, *self._chosen])
        stepper.memory = detach_memory(stepper.memory)
        for number, (slope, unit) in enumerate(zip(along, self._units, strict=True)):
            column = self._tangents[number]
            self._tangents[number] = moves([*(column[index] for index in floating), *slope, *unit])
        return [leaf.detach() for leaf in moved]


def _laid_out(tensors: Sequence[Tensor], like: Sequence[Slot]) -> list[Slot]:
    given = iter(tensors)
    return [{kind: next(given) for kind in slot} for slot in like]


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
    # What autograd handed out is not ours to write to: torch 2.6 gives a leaf that requires grad.
    total = None if start is None else start.detach()
    for number, (diagonal, tangent) in enumerate(terms):
        if total is None:
            total = diagonal * tangent
        else:
            total = total.addcmul_(diagonal, tangent) if number else total.addcmul(diagonal, tangent)
    return torch.zeros_like(like) if total is None else total


def _moves(name: str, value: object) -> bool:
    """Whether what is remembered leads from y to y: rates depend on no y."""
    return isinstance(value, Tensor) and name not in INERT and name not in ("eta", "mu_product")

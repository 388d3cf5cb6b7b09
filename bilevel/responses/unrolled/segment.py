"""Some steps of a follower that can be taken again, exactly."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bilevel.autodiff import NewLeafTracker, captured_leaves
from bilevel.errors import BilevelError, CapturedTensorError
from bilevel.game import Buffers, Follower
from bilevel.game.data import Batch
from bilevel.game.situation import Situation
from bilevel.randomness import random_kept, random_state, set_random_state
from bilevel.responses.unrolled.differentiation import Point, Steps
from bilevel.responses.unrolled.memory_plan import Sizes, measured_graph, unique_bytes
from bilevel.responses.unrolled.recipe import Recipe
from bilevel.second_order import differentiated_thrice

# What torch's optimisers remember and no later step's derivative needs: counts, and ASGD's average.
INERT = frozenset(("step", "mu", "ax"))


@dataclass(frozen=True)
class PointForm:
    """How a point and its buffers are laid out in tensors; what never depends on x stays in `rest`."""

    spec: pytree.TreeSpec
    rest: tuple[Any, ...]
    taken: int

    @staticmethod
    def of(point: Point, buffers: Buffers | None = None) -> tuple[PointForm, list[Tensor]]:
        """The layout, and the tensors that may depend on x, buffers included."""
        pairs, spec = pytree.tree_flatten_with_path((point.y, point.memory, buffers or {}))
        tensors: list[Tensor] = []
        rest: list[Any] = []
        for path, leaf in pairs:
            # Those of torch lie right in a leaf's memory, which is the second of the pair.
            inert = len(path) == 3 and path[0] == pytree.SequenceKey(1) and getattr(path[2], "key", None) in INERT
            moves = isinstance(leaf, Tensor) and not inert
            tensors += [leaf] if moves else []
            rest.append(_Moving if moves else leaf)
        return PointForm(spec, tuple(rest), point.taken), tensors

    def point(self, tensors: Sequence[Tensor]) -> tuple[Point, Buffers]:
        """The point and the buffers with these tensors."""
        left = iter(tensors)
        y, memory, buffers = pytree.tree_unflatten([next(left) if r is _Moving else r for r in self.rest], self.spec)
        return Point(y, memory, self.taken), buffers

    @property
    def size(self) -> int:
        """How many tensors there are."""
        return sum(r is _Moving for r in self.rest)


class _Moving:
    """Stands in a layout where a tensor goes."""


@dataclass(frozen=True)
class Record:
    """What a gradient uses besides the point where it is taken: its batch, random numbers and automatic casts."""

    batch: Batch
    random: dict[str, Tensor]
    casts: tuple[tuple[str, bool, torch.dtype], ...]

    @staticmethod
    def now(follower: Follower) -> Record:
        """That of the gradient that is taken next."""
        device = follower.game.device
        kinds = dict.fromkeys(("cpu", device.type))
        casts = tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds)
        return Record(follower.batch, random_state(device), casts)

    @contextmanager
    def again(self, device: torch.device) -> Iterator[None]:
        """As it was then."""
        set_random_state(self.random, device)
        (cpu, on, kind), *others = self.casts
        with torch.autocast(cpu, dtype=kind, enabled=on):
            if not others:
                yield
                return
            (there, on, kind), *_ = others
            with torch.autocast(there, dtype=kind, enabled=on):
                yield


@dataclass(frozen=True, eq=False)
class Segment:
    """Steps as a function of the tensors of their start (laid out as `form`) and of the others' variables.

    `captured` are the tensors that require grad and enter by another way. It is held by the graph, so that nothing that
    it holds may lead back there.
    """

    recipe: Recipe
    form: PointForm
    records: list[Record]
    captured: list[Tensor]

    @staticmethod
    def starting(steps: Steps, point: Point, captured: list[Tensor]) -> tuple[Segment, list[Tensor]]:
        """A segment without steps yet, and the tensors of its start."""
        form, tensors = PointForm.of(point, steps.follower.buffers)
        return Segment(steps.recipe, form, [], captured), tensors

    def again(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors of the end; `tensors` are those of the start, and then the others'."""
        recipe, size = self.recipe, self.form.size
        game, name, batches = recipe.game, recipe.player, recipe.settings.accumulate
        point, buffers = self.form.point(tensors[:size])
        others = recipe.input_form.build(tensors[size:])
        stepper, y = recipe.stepper(point.y, point.memory, point.taken, others), point.y
        total: list[Tensor] | None = None
        with random_kept(game.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were issued the first time
            for number, record in enumerate(self.records, start=1):
                with record.again(game.device):
                    _, slopes, after = recipe.rests.field(Situation(game, name, others, record.batch, buffers), y)
                    total = slopes if total is None else [a + b for a, b in zip(total, slopes, strict=True)]
                    if number % batches == 0:
                        y, total = stepper.step(y, recipe.settings.mean(total)), None
                buffers = {name: after[name]} if buffers else {}
        return PointForm.of(Point(y, stepper.memory))[1]

    def pulled(
        self,
        inputs: Sequence[Tensor],
        ends: Sequence[Tensor],
        wanted: Sequence[int],
        cotangents: Sequence[Tensor | None],
    ) -> Sequence[Tensor | None]:
        """The vector-Jacobian products for the wanted inputs, of the ends' cotangents.

        They are differentiable themselves when grad is enabled.
        """
        further = torch.is_grad_enabled()
        own = len(inputs) - len(self.captured)
        with torch.enable_grad():
            given = [tensor.detach() for tensor in inputs[:own]] + self.captured
            # The leaves always: where one does not require grad, its gradient is taken at a leaf of the library's own.
            for index in {*wanted, *range(len(self.recipe.form.shapes))}:
                if index < own:
                    # An alias: derivatives stop here even when one input depends on another through its own graph.
                    aliased = further and inputs[index].requires_grad
                    given[index] = inputs[index].view_as(inputs[index]) if aliased else given[index].requires_grad_()
            with NewLeafTracker() as born, differentiated_thrice(further):
                found = self.again(given[:own])
        if not self.recipe.game.anticipated:  # a nested response makes leaves of its own in its backward
            self._refuse_strangers(captured_leaves(found, [*given, *born.leaves]))
        self._require_same(found, ends, inputs)
        pairs = [(e, c) for e, c in zip(found, cotangents, strict=True) if c is not None and e.requires_grad]
        if not pairs or not wanted:
            return [None] * len(wanted)
        # The graph before a captured tensor is the user's, and other segments go through it too.
        return torch.autograd.grad(
            [end for end, _ in pairs],
            [given[index] for index in wanted],
            [cotangent for _, cotangent in pairs],
            create_graph=further,
            retain_graph=further or bool(self.captured),
            allow_unused=True,
        )

    def _refuse_strangers(self, strangers: Sequence[Tensor]) -> None:
        if strangers:
            raise CapturedTensorError(
                f"Segments: the steps of player {self.recipe.player!r} use a tensor of shape "
                f"{tuple(strangers[0].shape)} that requires grad and that the first step did not use; its derivative "
                "would be lost. Pass it as a player's variables, detach it, or use ReverseMode()."
            )

    def _require_same(self, found: Sequence[Tensor], ends: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Hold the steps taken again against where they ended: rounding apart, the same."""
        count = len(self.recipe.form.shapes)
        with torch.no_grad():
            apart, moved, size = (
                float(torch.stack([torch.linalg.vector_norm(a - b) for a, b in pairs]).norm())
                for pairs in (
                    list(zip(found[:count], ends[:count], strict=True)),
                    list(zip(ends[:count], inputs[:count], strict=True)),
                    [(end, torch.zeros_like(end)) for end in ends[:count]],
                )
            )
        eps = torch.finfo(found[0].dtype).eps
        steps = len(self.records) // self.recipe.settings.accumulate
        if not apart <= eps**0.5 * moved + 10.0 * eps * size:
            raise BilevelError(
                f"Segments: {steps} steps of player {self.recipe.player!r}, taken again in backward, "
                f"end {apart:.3g} from where they ended in the call, having moved by {moved:.3g}. Something outside "
                "the game changed in between: a module's train() or eval(), data written in place, an objective with "
                "state or random numbers of its own. Run backward before it changes, or use ReverseMode()."
            )


def tried(steps: Steps, start: Point) -> tuple[list[Tensor], Sizes]:
    """What the first step captures and how much memory it takes, from a trial that leaves no trace but its cost."""
    follower = steps.follower
    steps.draw()
    segment, tensors = Segment.starting(steps, start, [])
    segment.records.extend([Record.now(follower)] * steps.batches)
    batch = [leaf for leaf in pytree.tree_leaves(follower.batch) if isinstance(leaf, Tensor)]
    buffers = [tensor for tensors in follower.buffers.values() for tensor in tensors.values()]
    moving = len(tensors) - len(buffers)
    with torch.enable_grad():
        own, xs = ([t.detach().requires_grad_() for t in given] for given in (tensors[:moving], follower.xs))
        with measured_graph([*xs, *batch]) as graph, NewLeafTracker() as born:
            ends = segment.again([*own, *tensors[moving:], *xs])
    owners = [follower.game.players[member] for member in follower.game.members(follower.name)]
    copies = not follower.fixed and not all(isinstance(owner.data, list | tuple) for owner in owners)
    # Processes that play together take the same segments, though their parts of a batch differ in size.
    graph_bytes, state_bytes, batch_bytes = follower.game.largest(
        [
            sum(storage.nbytes() for storage in graph.values()),
            unique_bytes([*ends, *buffers]),
            unique_bytes(batch) * steps.batches if copies else 0,
        ]
    )
    sizes = Sizes(graph=graph_bytes, state=state_bytes, batch=batch_bytes)
    return captured_leaves(ends, [*own, *xs, *born.leaves]), sizes

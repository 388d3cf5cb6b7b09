"""Forward mode: each leader's entry carries the steps' derivative along, and nothing of the steps is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import transforms_active
from bilevel.errors import BilevelError, CapturedTensorError, require_kinds
from bilevel.game import Follower, Game
from bilevel.responses.unrolled.differentiation import Differentiation, Followed, Point, ReverseMode, Steps
from bilevel.responses.unrolled.pushforward import Pushforward
from bilevel.responses.unrolled.segment import tried
from bilevel.responses.unrolled.tangents import moving_tangents
from bilevel.second_order import differentiated_twice
from bilevel.sharding.tensor import noise_like

_ROUNDINGS = 100.0
"""So many times the rounding of one product two of them may be apart: it is a sample of few entries."""

_PARTS = (3.0, 7.0)
"""No powers of two, which round nothing; two, since one may round by luck to the right number."""

Product = Callable[[Sequence[Tensor]], list[Tensor]]
"""From a direction of (y, x), as leaves, to the derivative of grad_y f along it."""


@final
@dataclass(frozen=True)
class ForwardMode(Differentiation):
    r"""The derivative dy_k/dx carried along with the steps, one column for each entry of the leader's variables.

        dy_{k+1}/dx = (dy_{k+1}/dy_k) (dy_k/dx) + partial y_{k+1}/partial x,    from dy_0/dx = 0

    The same number as `ReverseMode`'s, up to rounding. For p entries that require grad: memory of p states and one
    step's graph, whatever the number of steps; p Hessian-vector products a step, taken when it is called; backward is
    a product with the Jacobian [p, n] that is held until then. For few entries: more than `most` are refused.

    Where the follower's gradient is that of one loss, the product is one backward pass through it, by the symmetry of
    the Hessian of f(x, y) in both. That it is symmetric is checked in the first step and in the last, by ten products
    in all, and a few more where most of a Hessian is rounding; where it is not (joint followers, surrogate gradients),
    products take a second graph a step.

    First derivatives alone: differentiating the hypergradient again raises `BilevelError`. Inside a `torch.func`
    transform every step is stored, as by `ReverseMode`.
    Raises `BilevelError` for more than `most` entries, saying what they would take, and `CapturedTensorError` for
    a tensor that requires grad and is nobody's variable.
    Source: Franceschi et al. 2017 (arXiv 1703.01785); Pearlmutter 1994 for the products.

    >>> ForwardMode().most
    200
    """

    most: int = 200

    def __post_init__(self) -> None:
        require_kinds(self)
        if self.most < 1:
            raise ValueError(f"ForwardMode: most={self.most}; expected at least 1.")

    def require(self, game: Game) -> None:
        """Refuse many games at once: it carries a derivative for every leader's entry, of all of them."""
        game.require_one("ForwardMode, which carries a derivative for every leader's entry,")
        game.require_whole("ForwardMode")

    def require_follower(self, follower: Follower) -> None:
        """Refuse projected steps: it carries the derivative through the optimiser's step alone."""
        if follower.rests.projects:
            raise TypeError(
                f"ForwardMode: the steps of player {follower.name!r} are projected, with {follower.rests.told}, which "
                "it does not carry the derivative through. Use ReverseMode() or Segments()."
            )

    def follow(self, steps: Steps, start: Point, count: int) -> Followed:
        """Where the steps lead, attached to the others' variables by the derivative that was carried along."""
        if transforms_active():
            return ReverseMode().follow(steps, start, count)
        follower = steps.follower
        if any(leaf.requires_grad for leaf in start.y):
            raise TypeError(
                f"ForwardMode carries derivatives from a start that is fixed, and player {follower.name!r} starts at a "
                "function of those before it (start=). Use ReverseMode() or Segments()."
            )
        wanted = [index for index, x in enumerate(follower.xs) if x.requires_grad]
        entries = sum(follower.xs[index].numel() for index in wanted)
        captured, sizes = tried(steps, start)
        if captured:
            raise CapturedTensorError(
                f"ForwardMode: the steps of player {follower.name!r} use a tensor of shape {tuple(captured[0].shape)} "
                "that requires grad and is nobody's variable; its derivative would be lost in silence. Make it a "
                "player's variables, or use ReverseMode() or Segments(), which give it its gradient."
            )
        if entries > self.most:
            raise BilevelError(
                f"ForwardMode: {entries:,} entries of the leaders require grad, and most={self.most}. They would take "
                f"{entries:,} Hessian-vector products a step and {entries * sizes.state:,} bytes. Use Segments(), or "
                f"ForwardMode(most={entries}) to accept that."
            )
        if not entries:
            return Followed(steps.alone(start, count), steps.batches, 0)
        carried = _Carried(steps, start, wanted)
        for step in range(count):
            carried.step(first=step == 0, last=step == count - 1)
        jacobian = [torch.stack(columns) for columns in zip(*carried.columns(), strict=True)]
        xs = [follower.xs[index] for index in wanted]
        y = _Attached.apply(jacobian, len(jacobian), *carried.y, *xs)  # type: ignore[no-untyped-call]
        return Followed(Point(list(y), carried.memory, start.taken + count), steps.batches, carried.products)


class _Carried:
    """A follower on its way, and for each entry of the wanted variables how it moves with that entry."""

    def __init__(self, steps: Steps, start: Point, wanted: Sequence[int]) -> None:
        self.steps, self.wanted = steps, wanted
        follower = steps.follower
        self.xs = [x.detach() for x in follower.xs]
        for index in wanted:
            self.xs[index].requires_grad_()
        self.chosen = [self.xs[index] for index in wanted]
        self.others = follower.input_form.build(self.xs)
        self.units = _units(self.chosen)
        here = start.detached()
        self.y = [leaf.clone() for leaf in here.y]
        self.moving = moving_tangents(steps, here, self.others, self.chosen, self.units)
        self.products = 0
        self.symmetric = follower.symmetric
        self._sizes = [torch.zeros((), dtype=self.y[0].dtype, device=self.y[0].device) for _ in range(2)]
        self._rounded = list(self._sizes)

    @property
    def memory(self) -> Any:
        """The optimiser's."""
        return self.moving.memory

    def columns(self) -> list[list[Tensor]]:
        """For each entry dy/dx, as leaves."""
        return self.moving.columns()

    def step(self, *, first: bool, last: bool) -> None:
        """One step of y and of its derivative."""
        settings = self.steps.recipe.settings
        losses: list[Tensor] = []
        own: list[Tensor] | None = None
        along: Iterator[list[Tensor]] = iter(())
        for batch in range(self.steps.batches):
            loss, slopes, product = self._batch(first=first and not batch, last=last and not batch)
            # Made one by one as they are used, which takes the memory of one gradient in place of p.
            moved = (product([*column, *unit]) for column, unit in zip(self.columns(), self.units, strict=True))
            losses.append(loss)
            own = slopes if own is None else _added(own, slopes)
            along = iter([*map(_added, along, moved)]) if batch else iter([*moved] if self.steps.batches > 1 else moved)
        mean = settings.mean(own or [])
        self.steps.note(losses, mean)
        self.y = self.moving.step(self.y, mean, map(settings.mean, along))
        self.products += len(self.units) * self.steps.batches

    def _batch(self, *, first: bool, last: bool) -> tuple[Tensor, list[Tensor], Product]:
        """The loss and the gradient on the next batch, and how the gradient moves."""
        steps, follower = self.steps, self.steps.follower
        steps.take()
        with torch.enable_grad(), differentiated_twice():
            y = [leaf.detach().requires_grad_() for leaf in self.y]
            if self.symmetric:
                loss = follower.loss(follower.form.build(y), self.others, advance_buffers=True)
                follower.gradient_count += 1
                slopes = list(torch.autograd.grad(loss, [*y, *self.chosen], create_graph=True, materialize_grads=True))
            else:
                loss, slopes = follower.gradients(y, self.others)
            own = slopes[: len(y)]
            if self.symmetric and (first or last) and not self._is_symmetric(y, slopes):
                self._turn(first=first)
            product = self._by_symmetry(y, slopes) if self.symmetric else self._by_transpose(y, own)
        return loss.detach(), [slope.detach() for slope in own], product

    def _turn(self, *, first: bool) -> None:
        """Go on by transposed products; refuses when steps were taken by the others already."""
        if not first:
            self.steps.require_finite(self.y)  # of NaN nothing is symmetric
            raise BilevelError(
                f"ForwardMode: the Hessian of player {self.steps.follower.name!r} was symmetric in the first step, and "
                "is not in the last: its gradient is no longer that of its loss. Use ReverseMode() or Segments()."
            )
        self.symmetric = False

    def _by_symmetry(self, y: Sequence[Tensor], slopes: Sequence[Tensor]) -> Product:
        """grad_y <(f_y, f_x), v>, which is the derivative of f_y along v where the joint Hessian is symmetric."""
        attached = [index for index, slope in enumerate(slopes) if slope.requires_grad]

        def product(direction: Sequence[Tensor]) -> list[Tensor]:
            return _pulled([slopes[i] for i in attached], y, [direction[i] for i in attached])

        return product

    def _by_transpose(self, y: Sequence[Tensor], own: Sequence[Tensor]) -> Product:
        """The derivative of the gradient along any direction of y and x."""
        self.products += any(slope.requires_grad for slope in own)
        return Pushforward(own, [*y, *self.chosen])

    def _is_symmetric(self, y: Sequence[Tensor], slopes: Sequence[Tensor]) -> bool:
        """Hold the two products against each other in a random direction of y and in one of x."""
        ours, true = self._by_symmetry(y, slopes), self._by_transpose(y, slopes[: len(y)])
        for index, direction in enumerate(self._random_directions()):
            found, wanted = ours(direction), true(direction)
            self.products += 2
            apart, size = _distance(found, wanted), _distance(wanted)
            # In units of the largest that was seen: near an optimum of loss 0 what is left of a Hessian is rounding.
            self._sizes[index] = torch.maximum(size, self._sizes[index])
            if bool(apart <= torch.finfo(size.dtype).eps ** 0.5 * self._sizes[index]):
                continue
            # Where a softmax saturates, terms of order 1 cancel from the start, and what they leave is rounding.
            self.products += 4
            seen = [
                _rounding(p, direction, whole, part) for p, whole in ((ours, found), (true, wanted)) for part in _PARTS
            ]
            self._rounded[index] = torch.stack([*seen, self._rounded[index]]).amax()
            if not bool(apart <= _ROUNDINGS * self._rounded[index]):
                return False
        return True

    def _random_directions(self) -> list[list[Tensor]]:
        """One of y and one of x."""
        generator = torch.Generator().manual_seed(0)
        places, size = [*self.y, *self.chosen], len(self.y)
        random = [noise_like(t, generator) for t in places]
        zero = [torch.zeros_like(t) for t in places]
        return [[*random[:size], *zero[size:]], [*zero[:size], *random[size:]]]


class _Attached(torch.autograd.Function):
    """Hands the leaves on, and multiplies by the Jacobian, [entries, *leaf] for each leaf, in backward."""

    @staticmethod
    def forward(ctx: Any, jacobian: list[Tensor], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.jacobian, ctx.count = jacobian, count
        ctx.save_for_backward(*tensors[count:])
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        xs = ctx.saved_tensors
        rows = [j.reshape(len(j), -1) @ c.reshape(-1) for j, c in zip(ctx.jacobian, cotangents, strict=True)]
        total = torch.stack(rows).sum(0)
        if torch.is_grad_enabled():
            total = _Once.apply(total, *xs)  # type: ignore[no-untyped-call]
        parts = torch.split(total, [x.numel() for x in xs])
        return (None, None, *([None] * ctx.count), *(part.view_as(x) for part, x in zip(parts, xs, strict=True)))


class _Once(torch.autograd.Function):
    """Refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *xs: Tensor) -> Tensor:
        return total.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise BilevelError(
            "ForwardMode has first derivatives alone: its hypergradient cannot be differentiated again. Use "
            "ReverseMode() or Segments()."
        )


def _distance(some: Sequence[Tensor], others: Sequence[Tensor] | None = None) -> Tensor:
    """The norm of what is between some tensors and others, taken together; by default 0."""
    between = some if others is None else [a - b for a, b in zip(some, others, strict=True)]
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t) for t in between]))  # type: ignore[no-any-return]


def _rounding(product: Product, direction: Sequence[Tensor], whole: Sequence[Tensor], part: float) -> Tensor:
    """How far a product with a part of a direction is from that part of the `whole` one: all of it is rounding."""
    found = product([tensor / part for tensor in direction])
    return part * _distance(found, [tensor / part for tensor in whole])


def _pulled(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> list[Tensor]:
    if not outputs:
        return [torch.zeros_like(tensor) for tensor in inputs]
    return list(torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, materialize_grads=True))


def _added(some: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(some, others, strict=True)]


def _units(xs: Sequence[Tensor]) -> list[list[Tensor]]:
    """For each entry of some tensors: those tensors, 1 there and 0 elsewhere."""
    found = []
    for index, x in enumerate(xs):
        for entry in range(x.numel()):
            unit = [torch.zeros_like(other) for other in xs]
            unit[index].view(-1)[entry] = 1.0
            found.append(unit)
    return found

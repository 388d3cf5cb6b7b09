"""What an implicit derivative's own linear solve tells of the follower's answer: whether it is an optimum, and near."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bilevel.autodiff import Pullback
from bilevel.errors import BilevelWarning, FollowerNonConvergenceWarning, UnreliableResponseWarning
from bilevel.game import Follower, Game, Size
from bilevel.linear import LinearSolution
from bilevel.responses.batches import FixedResidual
from bilevel.tree import join, leaves

NEAR = 0.1
"""What a Newton step may still change along what the leader sees, of the variables' size and of the leader's reach."""

FLAT = 1e-8
"""A curvature so many times below the average one on the way from the start is none."""


class Examination:
    """Examines a follower's answer y, where A = dF/dy, by the first backward solve through it, A'u = v.

    By Newton's step the follower is A^-1 F from its optimum, which moves the leader's loss by v'A^-1 F = u'F, to first
    order: one dot product. It is held against what changes of the follower's variables as large as they are, |v| |y|,
    and what changes of the leader's as large as these are, |x| |(dF/dx)'u|, could move: both without units. The
    curvature along u is u'A'u / u'u = u'v / u'u, which no minimum has below 0. It is held against the mean one
    on the way from the start of the game.

    Before there is a u, `at_once` puts the gradient's own step F / c in its place, c the curvature along F, which is
    shorter than Newton's.

    Costs a few dot products. One player costs no product with A, or two where the solver passes over saddles; several
    who answer together up to two each, since each one's own curvature is what counts. `at_once` costs one product
    where the start of the game was far.
    """

    def __init__(
        self,
        game: Game,
        follower: Follower,
        residual: FixedResidual,
        y: Tensor,
        slope: Tensor,
        *,
        reference: Size,
        near: bool,
        curved: bool = True,
        hidden: bool = False,
    ) -> None:
        self.game, self.follower, self.residual, self.y, self.slope = game, follower, residual, y, slope
        self.reference = torch.as_tensor(reference)
        self.near = near
        """Whether to ask how far it is: not where it is known to have stopped short."""
        self.curved = curved
        """Whether curvature tells a minimum: not of one whom constraints may hold."""
        self.hidden = hidden
        """Whether the solver passes over negative curvature, so that the plane of u and A u is asked for it."""
        self.products = 0
        """How many it took."""

    def at_once(self, xs: list[Tensor], products: Pullback) -> BilevelWarning | None:
        """What can be told of the answer before anybody differentiates it; `products` has no memory of its own."""
        if not self.near:
            return None
        way, here = self._size(self._way()), self._size(self.y)
        if not bool((way > 0.5 * here).any()):  # the gradient at the start is one of the answer's own scale
            return None
        self.products += 1
        with torch.no_grad():
            product, *mixed = products(self.slope)
        curvature = self.follower.inner(self.slope, product)
        square = self.follower.inner(self.slope, self.slope)
        rate = torch.where(curvature > 0.0, square / torch.where(curvature > 0.0, curvature, 1.0), 0.0)
        # shift = u'F = rate |F|^2, and both of what it is held against as u = rate F makes them.
        told = self._distance(
            rate * square, square.sqrt(), xs, rate * self.game.norms_of_others(mixed, summed=True), way
        )
        self.near = told is None
        return told

    def __call__(
        self, found: LinearSolution, rhs: Tensor, moving: list[Tensor], mixed: tuple[Tensor, ...], products: Pullback
    ) -> list[BilevelWarning]:
        """What the backward solve tells; `moving` are the leaders' leaves, `mixed` (dF/dx)'u."""
        told = [self._curvature(found, rhs, products)] if self.curved else []
        if self.near and bool(found.beats_zero):  # else it has been told, and no length can be read off the answer
            shift = self.follower.inner(found.solution, self.slope).abs()
            reach = self.game.norms_of_others(mixed, summed=True)
            told.append(self._distance(shift, self._size(rhs), moving, reach, None))
        return [warning for warning in told if warning is not None]

    # How far ---------------------------------------------------------------------------------------------------------

    def _distance(
        self, shift: Tensor, size: Tensor, moving: list[Tensor], reach: Tensor, way: Tensor | None
    ) -> BilevelWarning | None:
        """A warning where u'F, |v| and |(dF/dx)'u| say that the optimum is far; `way` from the start if it is known."""
        own = size * self._size(self.y)
        whole = self.game.norms_of_others([x.detach() for x in moving]) * reach
        far = (shift > NEAR * own) & (shift > NEAR * whole)
        if bool(far.any()):
            # Where everybody's equilibrium is at 0, what the leaders started from says what size they are of.
            first = [leaf for n in self.follower.inputs for leaf in leaves(self.game.initial(n))]
            reach = torch.maximum(whole, self.game.norms_of_others(first) * reach)
            far = far & (shift > NEAR * reach)
        if bool(far.any()):
            # Leaders at 0 tell no size: then the way from the start does.
            way = self._size(self._way()) if way is None else way
            far = far & ((reach > 0.0) | (shift > 0.1 * NEAR * size * way))
        if not bool(far.any()):
            return None
        share = torch.where(far, shift / torch.where(own > 0.0, own, 1.0), 0.0)
        worst, where, games = self._worst(far, share)
        start = float(self.reference.reshape(-1)[worst if self.reference.ndim else 0])
        return FollowerNonConvergenceWarning(
            f"Player {self.follower.name!r} is not at its optimum{where}, although its gradient is within the "
            f"tolerance: one Newton step would still move its variables by {float(share.reshape(-1)[worst]):.0%} of "
            "their size, and the hypergradient can be wrong by as much. The tolerance is relative to the gradient at "
            f"the start of the game, {start:.3g}, which was large. Give a smaller tolerance= with enough steps, or "
            "start the player nearer to its optimum.",
            games=games,
        )

    def _size(self, vector: Tensor) -> Tensor:
        return self.follower.inner(vector, vector).sqrt()

    def _way(self) -> Tensor:
        return self.y - join(leaves(self.game.initial(self.follower.name)))

    # Whether it is a minimum -----------------------------------------------------------------------------------------

    def _curvature(self, found: LinearSolution, v: Tensor, products: Pullback) -> BilevelWarning | None:
        follower = self.follower
        if follower.minimises:
            inner, u = follower.inner, found.solution
            if bool(found.beats_zero):
                value, left = inner(u, v), found.residual_norm
            else:  # a solve that failed, perhaps because there is no curvature: along v itself, at a product
                self.products += 1
                u, left = v, torch.zeros_like(found.residual_norm)
                with torch.no_grad():
                    value = inner(v, products(v, slice(1))[0])
            # In units of its own: the squares of an adjoint of 1e20 overflow float32, and those of 1e-30 vanish.
            unit = u.abs().amax()
            unit = torch.where(unit > 0.0, unit, 1.0)
            u, value, left = u / unit, value / unit / unit, left / unit
            square = inner(u, u)
            seen = square > 0.0
            square = torch.where(seen, square, 1.0)
            left = left / square.sqrt()  # what the residual leaves open of u'A'u / u'u
            curvature = value / square
            bound = curvature.abs() + left
            flat = seen & self._nothing(bound, self.reference, self.y)
            if bool(flat.any()):
                # The gradient at the start was another leader's, and a size of y tells nothing of an optimum at 0: what
                # counts is the gradient's mean slope on the way from there for the leader as it is.
                flat = flat & self._nothing(bound, self._size(self._start()), self._way())
            negative = seen & (curvature < -left) & ~flat
            if self.hidden and len(u) > 1 and bool(found.beats_zero) and not bool((flat | negative).any()):
                self.products += 2
                with torch.no_grad():
                    curvature = _lowest(inner, u, lambda v: products(v, slice(1))[0])
                negative = seen & (curvature < 0.0)
            return self._told(follower.name, curvature, flat, negative)
        for member in self.game.members(follower.name):
            warning = self._member(member, found.solution, products)
            if warning is not None:
                return warning
        return None

    def _member(self, member: str, u: Tensor, products: Pullback) -> BilevelWarning | None:
        """The same of one among several who answer together: by its own block of A, along its own part of u.

        Where it curves up along that, a saddle may still be hidden, as A^-1 weighs directions: then also in the plane
        of that part and of its product.
        """
        follower, form = self.follower, self.follower.form
        if follower.name == member or not self.game.residual(member).minimises:
            return None
        places = leaves(form.build(range(len(form.shapes)))[member])  # type: ignore[arg-type]
        inner, parts = follower.inner, form.split(u)
        own = join([parts[i] if i in places else torch.zeros_like(parts[i]) for i in range(len(parts))])
        here = join([torch.full_like(parts[i], float(i in places)) for i in range(len(parts))])
        own = own if bool(own.any()) else here
        self.products += 1
        with torch.no_grad():
            product = here * products(own, slice(1))[0]
        square = inner(own, own)
        seen = square > 0.0
        curvature = inner(own, product) / torch.where(seen, square, 1.0)
        flat = seen & self._nothing(curvature.abs(), self.reference, here * self.y)
        if bool(flat.any()):
            # The same, of its own gradient: players differ in their units.
            start = self._start()
            size = inner(here * start, here * start).sqrt()
            flat = flat & self._nothing(curvature.abs(), size, here * self._way())
        negative = seen & (curvature < 0.0) & ~flat
        if not bool((flat | negative).any()) and int(here.sum()) > 1:
            self.products += 1
            with torch.no_grad():
                curvature = _lowest(inner, own, lambda v: here * products(v, slice(1))[0], product)
            negative = seen & (curvature < 0.0)
        return self._told(member, curvature, flat, negative)

    def _start(self) -> Tensor:
        """F where the follower's variables were at the start of the game, everybody else where they are."""
        with torch.no_grad():
            begun = join(leaves(self.game.initial(self.follower.name)))
            return self.residual(begun, *[x.detach() for x in self.follower.xs])

    def _nothing(self, curvature: Tensor, slope: Tensor, way: Tensor) -> Tensor:
        """Whether a curvature is none beside the one that a gradient's norm would have lost along a way."""
        length = self._size(way)
        return (length > 0.0) & (curvature * length <= FLAT * slope)

    def _told(self, name: str, curvature: Tensor, flat: Tensor, negative: Tensor) -> BilevelWarning | None:
        if bool(flat.any()):
            worst, where, games = self._worst(flat, -curvature.abs())
            value = float(curvature.reshape(-1)[worst])
            return UnreliableResponseWarning(
                f"Player {name!r} has no curvature where it ended{where}: {value:.3g} along what the leader's loss "
                "sees of it, nothing beside that on its way from the start. Its gradient vanishes because its loss is "
                "flat there, as where a softmax saturates or a demand dies out, and not at an optimum that can be "
                "followed. Start it elsewhere, keep it from the flat region by bounds, a penalty or an entropy, or "
                "choose coordinates that do not saturate.",
                games=games,
            )
        if bool(negative.any()):
            worst, where, games = self._worst(negative, -curvature)
            value = float(curvature.reshape(-1)[worst])
            return UnreliableResponseWarning(
                f"Player {name!r} is not at a minimum of its own loss{where}: its gradient vanishes there, but its own "
                f"curvature is {value:.3g} along what the leader's loss sees of it, so that it would leave. The "
                "hypergradient is that of a saddle or of a maximum. Start it elsewhere, or use an inner solver that "
                "descends.",
                games=games,
            )
        return None

    @staticmethod
    def _worst(which: Tensor, by: Tensor) -> tuple[int, str, list[int] | None]:
        """The worst game's place, and in which games it is so, in words and numbers; nothing of these of one game."""
        if which.ndim == 0:
            return 0, "", None
        worst = int(torch.where(which, by, -torch.inf).argmax())
        games = which.nonzero().flatten().tolist()
        return worst, f" in {len(games)} of {len(which)} games, the worst being game {worst}", games


def _lowest(
    inner: Callable[[Tensor, Tensor], Tensor],
    u: Tensor,
    product: Callable[[Tensor], Tensor],
    once: Tensor | None = None,
) -> Tensor:
    """The lowest curvature of H in the plane of u and H u, `once` if it is known; 0 where rounding may have made it up.

    Two steps of Lanczos' method. What is below 0 is so beyond rounding: the plane has an angle of at least sqrt(eps),
    by which the rounding of H's products is magnified.
    """
    once = product(u) if once is None else once
    # In units of their own, as squares of a loss of 1e-20 vanish in float32.
    length, unit = (torch.where(size > 0.0, size, 1.0) for size in (u.abs().amax(), once.abs().amax()))
    u, once = u / length, once / unit
    unit = unit / length
    twice = product(once) / unit
    square = inner(u, u)
    square = torch.where(square > 0.0, square, 1.0)
    first, turned, third = inner(u, once) / square, inner(once, once) / square, inner(once, twice) / square
    angle = torch.finfo(u.dtype).eps ** 0.5
    across = turned - first * first
    plane = across > angle * turned
    across = torch.where(plane, across, 1.0)
    second = (third - 2.0 * first * turned + first**3) / across
    lowest = 0.5 * (first + second) - (0.25 * (first - second) ** 2 + across).sqrt()
    largest = (third / torch.where(turned > 0.0, turned, 1.0)).abs()
    return unit * torch.where(plane & (lowest < -10.0 * angle * largest), lowest, 0.0)

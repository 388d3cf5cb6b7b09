"""Sets with a projection: bounds, simplices, balls, halfspaces, affine sets, cones, and their products."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from bilevel.constraints.base import (
    ConstraintSet,
    Limits,
    Margins,
    Number,
    by_leaf,
    check_number,
    each_leaf,
    number,
)
from bilevel.constraints.projections import broadcasts, clipped, on_cone, on_simplex, semidefinite, simplex_threshold
from bilevel.errors import require_kinds
from bilevel.tree import Variables, flatten, leaves, named_leaves, structure_of


class _Bounds(ConstraintSet):
    """A lower and an upper bound for every entry."""

    @property
    def entrywise(self) -> bool:
        """Yes."""
        return True

    def _pair(self, y: Variables) -> tuple[list[Any], list[Any]]:
        raise NotImplementedError

    def limits(self, y: Variables) -> Limits:
        """The bounds, each in the shape of its leaf."""
        lows, highs = self._pair(y)
        expanded = [
            [number(bound, leaf).expand(leaf.shape) for bound, leaf in zip(bounds, leaves(y), strict=True)]
            for bounds in (lows, highs)
        ]
        return expanded[0], expanded[1]

    def project(self, y: Variables) -> Variables:
        """Each entry clipped to its bounds."""
        lows, highs = self._pair(y)
        rows = zip(leaves(y), lows, highs, strict=True)
        return structure_of(y).build([clipped(leaf, number(a, leaf), number(b, leaf)) for leaf, a, b in rows])

    def margins(self, z: Variables, step: Any) -> Margins:
        """From each bound."""
        found: Margins = {}
        for (path, leaf), low, high in zip(named_leaves(z), *self._pair(z), strict=True):
            found[path, "lower bound"] = leaf - number(low, leaf)
            found[path, "upper bound"] = number(high, leaf) - leaf
        return found


@final
@dataclass(frozen=True, eq=False)
class Box(_Bounds):
    r"""Bounds for every entry, $\{y : \text{low} \le y \le \text{high}\}$.

    Args:
        low: A number, a tensor that broadcasts to the variables, a pytree of them, or a function of players.
        high: Likewise. Both may be infinite.

    Raises:
        ValueError: For a box without points, or bounds that are NaN.

    Examples:
        >>> Box(0.0, 1.0).project(torch.tensor([-1.0, 0.5, 2.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """

    low: Number = -math.inf
    high: Number = math.inf

    def __post_init__(self) -> None:
        for name, bound in (("low", self.low), ("high", self.high)):
            for value in leaves(bound):
                check_number(value, f"Box: {name}", infinite=True)
        if self.functions or not all(isinstance(b, int | float) for b in (self.low, self.high)):
            return
        _refuse_empty(torch.tensor(self.low), torch.tensor(self.high), "Box")

    def _pair(self, y: Variables) -> tuple[list[Any], list[Any]]:
        return by_leaf(self.low, y, "Box: low"), by_leaf(self.high, y, "Box: high")

    def check(self, y: Variables, who: str) -> None:
        """Refuse bounds that do not fit the variables, or leave nothing between them."""
        for (path, leaf), low, high in zip(named_leaves(y), *self._pair(y), strict=True):
            for name, bound in (("low", low), ("high", high)):
                _require_broadcast(number(bound, leaf), leaf, f"{who}{path}: the {name} of its Box")
                check_number(bound, f"{who}{path}: the {name} of its Box", infinite=True)
            _refuse_empty(number(low, leaf), number(high, leaf), f"{who}{path}: its Box")


@final
@dataclass(frozen=True, eq=False)
class NonNegative(_Bounds):
    r"""The non-negative numbers in every entry, $\{y : y \ge 0\}$.

    Examples:
        >>> NonNegative().project(torch.tensor([-1.0, 0.5]))
        tensor([0.0000, 0.5000])
    """

    def _pair(self, y: Variables) -> tuple[list[Any], list[Any]]:
        count = len(leaves(y))
        return [0.0] * count, [math.inf] * count

    def check(self, y: Variables, who: str) -> None:
        """Anything fits."""


@final
@dataclass(frozen=True, eq=False)
class Simplex(ConstraintSet):
    r"""Shares of a total, $\{y \ge 0 : \sum_i y_i = \text{total}\}$, along the last dimension of each tensor.

    Args:
        total: What they add up to: a positive number, or a function of players.

    The projection sorts: n log n for n entries. Source: Held, Wolfe & Crowder 1974, Math. Programming 6.

    Examples:
        >>> Simplex().project(torch.tensor([0.5, 0.9, -1.0]))
        tensor([0.3000, 0.7000, 0.0000])
    """

    total: Number = 1.0

    def __post_init__(self) -> None:
        check_number(self.total, "Simplex: total")

    def project(self, y: Variables) -> Variables:
        """The nearest shares."""
        return each_leaf(lambda leaf: on_simplex(leaf, number(self.total, leaf)), y)

    def margins(self, z: Variables, step: Any) -> Margins:
        """From each share's 0."""
        return {
            (path, "bound 0"): leaf - simplex_threshold(leaf, number(self.total, leaf))
            for path, leaf in named_leaves(z)
        }

    def check(self, y: Variables, who: str) -> None:
        """Refuse scalars, which have nothing to share, and totals that are not positive."""
        for path, leaf in named_leaves(y):
            total = number(self.total, leaf)
            if leaf.ndim == 0 or total.ndim > 0:
                raise ValueError(
                    f"{who}{path} has shape {tuple(leaf.shape)} and its Simplex a total of shape {tuple(total.shape)}; "
                    "expected variables of at least one dimension, and one number."
                )
            if not float(total) > 0.0:
                raise ValueError(f"{who}{path}: the total of its Simplex is {float(total)}; expected a number above 0.")


@final
@dataclass(frozen=True, eq=False)
class Ball(ConstraintSet):
    r"""A ball around 0, $\{y : |y|_p \le \text{radius}\}$, all of a player's tensors together as one vector.

    Args:
        radius: A positive number, or a function of players.
        p: 1, 2 or `math.inf`.

    Examples:
        >>> Ball(1.0).project(torch.tensor([3.0, 4.0]))
        tensor([0.6000, 0.8000])
    """

    radius: Number = 1.0
    p: float = 2.0

    def __post_init__(self) -> None:
        require_kinds(self)
        check_number(self.radius, "Ball: radius")
        if self.p not in (1, 2, math.inf):
            raise ValueError(f"Ball: p={self.p!r}; expected 1, 2 or math.inf.")

    @property
    def entrywise(self) -> bool:
        """With p = inf it is a box."""
        return self.p == math.inf

    def limits(self, y: Variables) -> Limits | None:
        """With p = inf."""
        return self._box.limits(y) if self.p == math.inf else None

    @property
    def _box(self) -> Box:
        return Box(-self.radius, self.radius)  # type: ignore[operator]

    def project(self, y: Variables) -> Variables:
        """The nearest point of the ball."""
        if self.p == math.inf:
            return self._box.project(y)
        flat, form = flatten(y), structure_of(y)
        radius = number(self.radius, flat)
        if self.p == 1:
            outside = flat.abs().sum() > radius
            return form.unflatten(torch.where(outside, flat.sign() * on_simplex(flat.abs(), radius), flat))
        square = flat.square().sum()
        outside = square > radius.square()
        size = torch.where(outside, square, 1.0).sqrt()
        return form.unflatten(torch.where(outside, flat * (radius / size), flat))

    def margins(self, z: Variables, step: Any) -> Margins:
        """From the surface; on that of p = 1 from each entry's 0 as well."""
        if self.p == math.inf:
            return self._box.margins(z, step)
        flat = flatten(z)
        radius = number(self.radius, flat)
        if self.p == 2:
            return {("", "ball's surface"): radius - torch.linalg.vector_norm(flat)}
        size = flat.abs()
        from_zero = torch.where(size.sum() > radius, size - simplex_threshold(size, radius), math.inf)
        found: Margins = {("", "ball's surface"): radius - size.sum()}
        parts = structure_of(z).split(from_zero)
        return found | {(p, "value 0"): part for (p, _), part in zip(named_leaves(z), parts, strict=True)}

    def check(self, y: Variables, who: str) -> None:
        """Refuse a radius that is no positive number."""
        radius = number(self.radius, leaves(y)[0])
        if radius.ndim > 0 or not float(radius) > 0.0:
            raise ValueError(f"{who}: the radius of its Ball is {self.radius!r}; expected one number above 0.")


@final
@dataclass(frozen=True, eq=False)
class Halfspace(ConstraintSet):
    r"""One linear inequality, $\{y : \langle \text{normal}, y \rangle \le \text{offset}\}$.

    Args:
        normal: A tensor or a pytree in the form of the variables.
        offset: A number, or a function of players.

    Examples:
        >>> Halfspace(torch.ones(2), 1.0).project(torch.tensor([1.0, 1.0]))
        tensor([0.5000, 0.5000])
    """

    normal: Variables
    offset: Number

    def __post_init__(self) -> None:
        check_number(self.offset, "Halfspace: offset")

    def _parts(self, y: Variables) -> tuple[Tensor, Tensor, Tensor]:
        """z, the normal of length 1, and how far z is within."""
        flat = flatten(y)
        normal = number(flatten(self.normal), flat)
        size = torch.linalg.vector_norm(normal)
        return flat, normal / size, (number(self.offset, flat) - normal @ flat) / size

    def project(self, y: Variables) -> Variables:
        """The nearest point of the halfspace."""
        flat, unit, within = self._parts(y)
        return structure_of(y).unflatten(flat + torch.where(within < 0.0, within, 0.0) * unit)

    def margins(self, z: Variables, step: Any) -> Margins:
        """From the plane."""
        return {("", "halfspace's plane"): self._parts(z)[2]}

    def check(self, y: Variables, who: str) -> None:
        """Refuse a normal that is 0, not finite, or not in the form of the variables."""
        came = [tuple(leaf.shape) for leaf in leaves(self.normal)]
        wanted = [tuple(leaf.shape) for leaf in leaves(y)]
        if came != wanted:
            raise ValueError(f"{who}: the normal of its Halfspace has shapes {came}; expected its own, {wanted}.")
        size = float(torch.linalg.vector_norm(flatten(self.normal)))
        if not 0.0 < size < math.inf:
            raise ValueError(f"{who}: the normal of its Halfspace has the norm {size}; expected a finite one above 0.")


@final
@dataclass(frozen=True, eq=False)
class Affine(ConstraintSet):
    r"""Linear equations, $\{y : A y = b\}$, all of a player's tensors together as one vector y `[n]`.

    Args:
        matrix: A `[k, n]`; its rows may depend on each other.
        right: b `[k]`, or a function of players.

    Costs one singular value decomposition of A, and 2 k n a projection.

    Examples:
        >>> Affine(torch.ones(1, 2), torch.ones(1)).project(torch.zeros(2))
        tensor([0.5000, 0.5000])
    """

    matrix: Tensor
    right: Number

    def __post_init__(self) -> None:
        if not isinstance(self.matrix, Tensor) or self.matrix.ndim != 2:
            raise TypeError("Affine: the matrix is no tensor of two dimensions; expected A [k, n].")
        check_number(self.matrix, "Affine: the matrix")
        check_number(self.right, "Affine: the right-hand side")

    @cached_property
    def _inverse(self) -> Tensor:
        """The pseudo-inverse of A `[n, k]`, in float64: a rounded one would leave the set by more than rounding."""
        inverse: Tensor = torch.linalg.pinv(self.matrix.detach().double())
        return inverse

    def project(self, y: Variables) -> Variables:
        """The nearest solution."""
        flat = flatten(y)
        missing = number(self.matrix, flat) @ flat - number(self.right, flat)
        return structure_of(y).unflatten(flat - number(self._inverse, flat) @ missing)

    def margins(self, z: Variables, step: Any) -> Margins:
        """It has no kinks."""
        return {}

    def check(self, y: Variables, who: str) -> None:
        """Refuse equations of other sizes, and those that contradict each other."""
        flat = flatten(y)
        rows, columns = self.matrix.shape
        right = number(self.right, flat)
        if columns != flat.numel() or right.shape != (rows,):
            raise ValueError(
                f"{who}: its Affine has a matrix {[rows, columns]} and a right-hand side {list(right.shape)}; expected "
                f"[k, {flat.numel()}] and [k]."
            )
        matrix, wanted = self.matrix.double(), right.detach().double()
        left = float(torch.linalg.vector_norm(matrix @ (self._inverse.to(matrix) @ wanted) - wanted))
        if left > 1e3 * torch.finfo(flat.dtype).eps * max(1.0, float(torch.linalg.vector_norm(wanted))):
            raise ValueError(
                f"{who}: the equations of its Affine contradict each other; the best y misses them by {left:.3g}."
            )


@final
@dataclass(frozen=True, eq=False)
class SecondOrderCone(ConstraintSet):
    r"""$\{(x, t) : |x|_2 \le t\}$ along the last dimension of each tensor, whose last entry is t.

    Examples:
        >>> SecondOrderCone().project(torch.tensor([3.0, 4.0, 0.0]))
        tensor([1.5000, 2.0000, 2.5000])
    """

    def project(self, y: Variables) -> Variables:
        """The nearest point of the cone."""
        return each_leaf(on_cone, y)

    def margins(self, z: Variables, step: Any) -> Margins:
        """From the cone's surface, and from that of its polar cone."""
        found: Margins = {}
        for path, leaf in named_leaves(z):
            size, t = torch.linalg.vector_norm(leaf[..., :-1], dim=-1), leaf[..., -1]
            found[path, "cone's surface"] = t - size
            found[path, "polar cone's surface"] = t + size
        return found

    def check(self, y: Variables, who: str) -> None:
        """Refuse tensors with fewer than two entries in the last dimension."""
        for path, leaf in named_leaves(y):
            if leaf.ndim == 0 or leaf.shape[-1] < 2:
                raise ValueError(
                    f"{who}{path} has shape {tuple(leaf.shape)}; a SecondOrderCone wants (x, t) in the last dimension, "
                    "at least two entries."
                )


@final
@dataclass(frozen=True, eq=False)
class PositiveSemidefinite(ConstraintSet):
    r"""Symmetric matrices with eigenvalues of at least 0, in the last two dimensions of each tensor.

    Costs an eigendecomposition a projection. Derivatives are right up to the fifth order.

    Examples:
        >>> PositiveSemidefinite().project(torch.tensor([[1.0, 0.0], [0.0, -1.0]]))
        tensor([[1., 0.],
                [0., 0.]])
    """

    def project(self, y: Variables) -> Variables:
        """The symmetric part without its negative eigenvalues."""
        return each_leaf(semidefinite, y)

    def margins(self, z: Variables, step: Any) -> Margins:
        """From each eigenvalue's 0."""
        found: Margins = {}
        for path, leaf in named_leaves(z):
            found[path, "eigenvalue 0"] = torch.linalg.eigvalsh(0.5 * (leaf + leaf.mT))
        return found

    def check(self, y: Variables, who: str) -> None:
        """Refuse what is no square matrix."""
        for path, leaf in named_leaves(y):
            if leaf.ndim < 2 or leaf.shape[-1] != leaf.shape[-2]:
                raise ValueError(f"{who}{path} has shape {tuple(leaf.shape)}; PositiveSemidefinite wants square ones.")


@final
@dataclass(frozen=True, eq=False)
class Product(ConstraintSet):
    """A set for each branch of a pytree: `Product({"price": Box(0.0, 5.0), "share": Simplex()})`.

    Args:
        parts: A dict with the keys of the variables, or a sequence as long as they are; None leaves a branch free.

    Examples:
        >>> both = Product({"a": Box(0.0, 1.0), "b": None})
        >>> both.project({"a": torch.tensor(2.0), "b": torch.tensor(2.0)})
        {'a': tensor(1.), 'b': tensor(2.)}
    """

    parts: Mapping[str, ConstraintSet | None] | Sequence[ConstraintSet | None]

    def __post_init__(self) -> None:
        if not isinstance(self.parts, Mapping | list | tuple) or not len(self.parts):
            raise TypeError(f"Product: parts is {self.parts!r}; expected a dict or a list of sets.")
        for key, part in self.items:
            if not (part is None or isinstance(part, ConstraintSet)):
                raise TypeError(f"Product: part {key!r} is a {type(part).__name__}; expected a set, or None.")

    @property
    def items(self) -> list[tuple[Any, ConstraintSet | None]]:
        """Its parts by key."""
        return list(self.parts.items() if isinstance(self.parts, Mapping) else enumerate(self.parts))

    @property
    def entrywise(self) -> bool:
        """Where all its parts are."""
        return all(part is None or part.entrywise for _, part in self.items)

    @property
    def players(self) -> tuple[str, ...]:
        """Those of its parts."""
        return tuple(dict.fromkeys(name for _, part in self.items if part is not None for name in part.players))

    def settled(self, players: Mapping[str, Variables]) -> Product:
        """With its parts settled."""
        if not self.players:
            return self
        parts = {key: part if part is None else part.settled(players) for key, part in self.items}
        return replace(self, parts=parts if isinstance(self.parts, Mapping) else list(parts.values()))

    def _over(self, y: Any) -> list[tuple[Any, ConstraintSet | None, Variables]]:
        return [(key, part, y[key]) for key, part in self.items]

    def limits(self, y: Variables) -> Limits | None:
        """Where all its parts are bounds."""
        lows: list[Tensor] = []
        highs: list[Tensor] = []
        parts = dict(self.items)
        for key in y if isinstance(y, Mapping) else range(len(y)):
            found = (parts[key] or Box()).limits(y[key])
            if found is None:
                return None
            lows, highs = lows + found[0], highs + found[1]
        return lows, highs

    def project(self, y: Variables) -> Variables:
        """Each branch projected."""
        found = {key: branch if part is None else part.project(branch) for key, part, branch in self._over(y)}
        if isinstance(y, Mapping):
            return {key: found[key] for key in y}
        return type(y)(found[index] for index in range(len(y)))

    def margins(self, z: Variables, step: Any) -> Margins:
        """Those of its parts."""
        return {
            (f"[{key!r}]{path}", wall): margin
            for key, part, branch in self._over(z)
            if part is not None
            for (path, wall), margin in part.margins(branch, step).items()
        }

    def check(self, y: Variables, who: str) -> None:
        """Refuse variables with other branches."""
        here = list(y) if isinstance(y, Mapping) else list(range(len(y))) if isinstance(y, list | tuple) else None
        keys = [key for key, _ in self.items]
        if here is None or set(here) != set(keys):
            what = "no dict, list or tuple" if here is None else f"branches {here}"
            raise ValueError(f"{who} has {what}; its Product has parts {keys}. Give one for each branch.")
        for key, part, branch in self._over(y):
            if part is not None:
                part.check(branch, f"{who}[{key!r}]")


def _refuse_empty(low: Tensor, high: Tensor, what: str) -> None:
    if bool((low > high).any()) or bool((low == math.inf).any()) or bool((high == -math.inf).any()):
        gap = float((low - high).max())
        raise ValueError(f"{what} is empty: its low lies up to {gap:.3g} above its high. Expected low <= high.")


def _require_broadcast(bound: Tensor, leaf: Tensor, what: str) -> None:
    if not broadcasts(bound.shape, leaf.shape):
        raise ValueError(
            f"{what} has shape {tuple(bound.shape)}; expected one number, or a tensor that broadcasts to the shape of "
            f"the variables, {tuple(leaf.shape)}."
        )

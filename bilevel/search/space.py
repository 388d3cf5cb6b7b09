"""The box that is searched: a coordinate in it for each name, and back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from bilevel.constraints import Choice, Coordinate, Log

_LIKE = torch.zeros((), dtype=torch.float64)


class Axis(ABC):
    """One name's coordinate."""

    is_category = False

    @property
    @abstractmethod
    def start(self) -> float:
        """Where the first point is."""

    @abstractmethod
    def place(self, name: str, value: Any) -> float:
        """A natural value's coordinate. Raises `ValueError`, by the name, for a value out of its range."""

    @abstractmethod
    def value(self, place: float) -> Any:
        """The natural value there."""

    @abstractmethod
    def slope_scale(self, value: Any) -> float:
        """The derivative of the natural value in the coordinate."""

    @abstractmethod
    def drawn(self, share: float) -> float:
        """The coordinate at a share of the range, from 0 to below 1: where shares are uniform, so are coordinates."""


@final
@dataclass(frozen=True)
class RangeAxis(Axis):
    """A range, from 0 to 1; `Log` by its logarithm."""

    kind: Coordinate

    @property
    def start(self) -> float:
        """The range's own."""
        return self.place("start", float(self.kind.tensor(_LIKE)))

    def place(self, name: str, value: Any) -> float:
        """From 0 to 1."""
        (low, high), z = self.kind.range, float(value)
        if not low <= z <= high:
            raise ValueError(f"GradientSearch: {name}={z} is outside its range, {low} to {high}.")
        return math.log(z / low) / math.log(high / low) if isinstance(self.kind, Log) else (z - low) / (high - low)

    def value(self, place: float) -> float:
        """Within the range; rounding may leave it."""
        low, high = self.kind.range
        z = low * (high / low) ** place if isinstance(self.kind, Log) else low + (high - low) * place
        return min(max(z, low), high)

    def slope_scale(self, value: Any) -> float:
        """Constant, or as the value."""
        low, high = self.kind.range
        return float(value) * math.log(high / low) if isinstance(self.kind, Log) else high - low

    def drawn(self, share: float) -> float:
        """The share itself."""
        return share


class OptionAxis(Axis):
    """A choice, by the rank of its options."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice

    @property
    def count(self) -> int:
        """The number of options."""
        return len(self.choice.ranked)

    @abstractmethod
    def rank(self, place: float) -> int:
        """The rank of the option at a coordinate."""

    @abstractmethod
    def of_rank(self, rank: int) -> float:
        """The coordinate of an option."""

    @abstractmethod
    def within(self, low: float, high: float, centre: float) -> range:
        """The ranks of the options in reach: between low and high, and the neighbours of the centre."""

    @property
    def start(self) -> float:
        """The choice's own."""
        return self.of_rank(self.choice.rank(self.choice.first))

    def place(self, name: str, value: Any) -> float:
        """Of the option."""
        try:
            return self.of_rank(self.choice.rank(value))
        except ValueError as error:
            raise ValueError(f"GradientSearch: {name}: {error}") from None

    def value(self, place: float) -> Any:
        """The option."""
        return self.choice.ranked[self.rank(place)]

    def drawn(self, share: float) -> float:
        """Each option is as likely."""
        return self.of_rank(min(int(share * self.count), self.count - 1))


@final
class NumberAxis(OptionAxis):
    """Ordered numbers, from 0 to 1."""

    def rank(self, place: float) -> int:
        """Of the nearest."""
        return self.choice.rank_at(place)

    def of_rank(self, rank: int) -> float:
        """By its value, or its logarithm."""
        return self.choice.place(rank)

    def within(self, low: float, high: float, centre: float) -> range:
        """As said."""
        own = self.rank(centre)
        first, last = min(self.rank(low), own - 1), max(self.rank(high), own + 1)
        return range(max(first, 0), min(last, self.count - 1) + 1)

    def slope_scale(self, value: Any) -> float:
        """As a range of the same ends."""
        low, high = (float(self.choice.ranked[i]) for i in (0, -1))
        return float(value) * math.log(high / low) if self.choice.log else high - low

    def drawn(self, share: float) -> float:
        """By place, as the numbers are: of integers with `log`, small ones as often as large ones."""
        if self.choice.log:
            return self.of_rank(self.rank(share))
        return super().drawn(share)


@final
class CategoryAxis(OptionAxis):
    """Categories: the coordinate is the rank, and only whether two are the same counts."""

    is_category = True

    def rank(self, place: float) -> int:
        """The coordinate itself."""
        return round(place)

    def of_rank(self, rank: int) -> float:
        """The rank itself."""
        return float(rank)

    def within(self, low: float, high: float, centre: float) -> range:
        """All."""
        return range(self.count)

    def slope_scale(self, value: Any) -> float:
        """There is none."""
        raise TypeError("a category has no slope")


@final
@dataclass(frozen=True)
class Space:
    """Names with their ranges and choices. Raises as `GradientSearch` tells."""

    kinds: Mapping[str, Coordinate | Choice]

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ValueError("GradientSearch: the space is empty; expected at least one name with its range.")
        for name, kind in self.kinds.items():
            if isinstance(kind, Choice):
                continue
            if not isinstance(kind, Coordinate) or not all(math.isfinite(end) for end in kind.range):
                raise TypeError(
                    f"GradientSearch: {name!r} is {kind!r}; expected Log, Unit or Interval, ranges with two finite "
                    "ends, or a Choice. A positive number is searched between two of them: Log(1e-6, 1e2)."
                )
            if isinstance(kind.start, Tensor) and kind.start.dim():
                raise ValueError(
                    f"GradientSearch: {name!r} starts at a tensor {list(kind.start.shape)}; expected one number. Give "
                    "each entry a name of its own; for hundreds of them use bl.solve."
                )

    @cached_property
    def axes(self) -> dict[str, Axis]:
        """One for each name."""
        return {name: _axis(kind) for name, kind in self.kinds.items()}

    @cached_property
    def options(self) -> dict[int, OptionAxis]:
        """The axes that are choices, by column."""
        return {i: axis for i, axis in enumerate(self.axes.values()) if isinstance(axis, OptionAxis)}

    @cached_property
    def categories(self) -> Tensor:
        """Which columns are categories: bools `[d]`."""
        return torch.tensor([axis.is_category for axis in self.axes.values()])

    @cached_property
    def described(self) -> list[str]:
        """What the coordinates of a state are those of, the same in every process: names, ranges and options."""
        return [f"{name}: {_described(kind)}" for name, kind in self.kinds.items()]

    @property
    def start(self) -> Tensor:
        """The first point `[d]`."""
        return torch.tensor([axis.start for axis in self.axes.values()], dtype=torch.float64)

    def drawn(self, shares: Tensor) -> Tensor:
        """A point `[d]` by its shares of the ranges."""
        pairs = zip(self.axes.values(), shares.tolist(), strict=True)
        return torch.tensor([axis.drawn(share) for axis, share in pairs], dtype=torch.float64)

    def place(self, point: Mapping[str, Any]) -> Tensor:
        """The coordinates `[d]` of natural values."""
        if set(point) != set(self.axes):
            raise ValueError(f"GradientSearch: the point names {sorted(point)}; expected {sorted(self.axes)}.")
        return torch.tensor([a.place(n, point[n]) for n, a in self.axes.items()], dtype=torch.float64)

    def scattered(self, shares: Tensor, taken: Sequence[Tensor]) -> Tensor:
        """The first of `shares: [m, d]` whose point is none of those that are taken; the last where all are."""
        places = [self.drawn(row) for row in shares]
        known = {tuple(place.tolist()) for place in taken}
        return next((place for place in places if tuple(place.tolist()) not in known), places[-1])

    def values(self, place: Tensor) -> dict[str, Any]:
        """The natural values at coordinates `[d]`."""
        return {n: axis.value(at) for (n, axis), at in zip(self.axes.items(), place.tolist(), strict=True)}

    def slopes(self, point: Mapping[str, Any], gradient: Mapping[str, float]) -> Tensor:
        """A gradient in natural values as one in coordinates `[d]`; NaN where it names nothing. Raises `ValueError`."""
        if not set(gradient) <= set(self.axes):
            raise ValueError(
                f"GradientSearch: the gradient names {sorted(gradient)}; expected some or all of {sorted(self.axes)}."
            )
        named = [name for name in gradient if self.axes[name].is_category]
        if named:
            raise ValueError(
                f"GradientSearch: the gradient names {named[0]!r}, which is one of several categories and has no "
                "slope. Leave it out."
            )
        scaled = [
            float(gradient[name]) * axis.slope_scale(point[name]) if name in gradient else math.nan
            for name, axis in self.axes.items()
        ]
        return torch.tensor(scaled, dtype=torch.float64)

    def distances(self, points: Tensor, centre: Tensor) -> Tensor:
        """Of points `[n, d]` from one `[d]`: another category is as far as the other end of a range."""
        apart = points - centre
        apart[:, self.categories] = (apart[:, self.categories] != 0.0).double()
        found: Tensor = torch.linalg.vector_norm(apart, dim=1)
        return found


def _axis(kind: Coordinate | Choice) -> Axis:
    if isinstance(kind, Coordinate):
        return RangeAxis(kind)
    return NumberAxis(kind) if kind.is_ordered else CategoryAxis(kind)


def _described(kind: Coordinate | Choice) -> str:
    if not isinstance(kind, Choice):
        low, high = kind.range
        return f"{type(kind).__name__}({low}, {high})"
    options = [o if isinstance(o, str | int | float) else getattr(o, "__qualname__", type(o)) for o in kind.ranked]
    return f"Choice({options}{', log=True' if kind.log else ''})"

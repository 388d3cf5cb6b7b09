"""Values and hypergradients in, the next points to try out; and the loop around it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from bilevel.constraints.coordinates import Coordinate, Log
from bilevel.search.process import Process, fitted

State = dict[str, Any]
CANDIDATES, REFINED, NEAREST = 512, 4, 30
"""Random points of the trust region, how many of them are refined, and how many observations a process takes."""


@final
@dataclass(frozen=True)
class GradientSearch:
    r"""Proposes values of hyperparameters from the losses and hypergradients of those that were tried.

    A Gaussian process with derivative observations and an additive kernel is fitted to what was told; the next point is
    where its mean is least, within a trust region around the best so far. The region is a box of half-width
    `radius[0]` of each range at first and `radius[1]` after `evaluations`. The first point is each range's start.

    Nothing is written to: `init()` gives a state, a plain dict of tensors and numbers, which `torch.load(...,
    weights_only=True)` reads; `ask` and `tell` return the next one. From one state the same proposals follow.

    A proposal costs 84 Cholesky factors of at most 30 (1 + d) rows, for d hyperparameters. It finds a local optimum:
    the region looks nowhere else. Hypergradients that are wrong mislead it more than none.
    Source of derivative observations: Wu et al. 2017 (arXiv 1703.04389); of the trust region: Eriksson et al. 2019
    (arXiv 1910.01739).

    Args:
        space: Name -> `Log`, `Unit` or `Interval`, of one number each. `Log` is searched by its logarithm.
        evaluations: How many are planned: by then the region has its last size.
        radius: First and last half-width of the trust region, in shares of each range.
        cap: A loss above it, where a landscape is a plateau or a wall, counts as this one without its slope.
        slope_cap: The largest norm of a slope, in losses per range; a longer one is shortened. Default: none.

    Raises:
        TypeError: For a range that is not one of these.
        ValueError: For an empty space, or settings out of their bounds.

    Examples:
        >>> search = GradientSearch({"rate": Log(1e-4, 1.0)})
        >>> points, state = search.ask(search.init())
        >>> points
        [{'rate': 0.01}]
        >>> state = search.tell(state, points[0], 0.7, {"rate": -3.0})
        >>> points, state = search.ask(state)
        >>> points[0]["rate"] > 0.01
        True
    """

    space: Mapping[str, Coordinate]
    evaluations: int = field(default=20, kw_only=True)
    radius: tuple[float, float] = field(default=(0.3, 0.1), kw_only=True)
    cap: float | None = field(default=None, kw_only=True)
    slope_cap: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what cannot be searched."""
        if not self.space:
            raise ValueError("GradientSearch: the space is empty; expected at least one name with its range.")
        for name, kind in self.space.items():
            if not isinstance(kind, Coordinate) or not all(math.isfinite(end) for end in kind.range):
                raise TypeError(
                    f"GradientSearch: {name!r} is {kind!r}; expected Log, Unit or Interval, ranges with two finite "
                    "ends. A positive number is searched between two of them: Log(1e-6, 1e2)."
                )
            if isinstance(kind.start, Tensor) and kind.start.dim():
                raise ValueError(
                    f"GradientSearch: {name!r} starts at a tensor {list(kind.start.shape)}; expected one number. Give "
                    "each entry a name of its own; for hundreds of them use bl.solve."
                )
        if self.evaluations < 1:
            raise ValueError(f"GradientSearch: evaluations={self.evaluations}; expected at least 1.")
        if not 0.0 < self.radius[1] <= self.radius[0] <= 1.0:
            raise ValueError(f"GradientSearch: radius={self.radius}; expected 0 < last <= first <= 1.")
        if self.cap is not None and not math.isfinite(self.cap):
            raise ValueError(f"GradientSearch: cap={self.cap}; expected a finite loss, or None.")
        if self.slope_cap is not None and not self.slope_cap > 0.0:
            raise ValueError(f"GradientSearch: slope_cap={self.slope_cap}; expected a number above 0, or None.")

    def init(self, seed: int = 0) -> State:
        """The state before the first point; `seed` is of the random candidates."""
        none = torch.empty(0, len(self.space), dtype=torch.float64)
        return {"points": none, "values": none[:, 0], "slopes": none, "pending": none, "asked": 0, "seed": seed}

    def ask(self, state: State, count: int = 1) -> tuple[list[dict[str, float]], State]:
        """The next `count` points, to be tried side by side, and the next state.

        They keep away from each other, and from points that were asked for earlier and whose losses were not told yet.
        Tell `math.nan` for one whose training was lost. Raises `ValueError` for a count below 1.
        """
        if count < 1:
            raise ValueError(f"GradientSearch.ask: count={count}; expected at least 1.")
        generator = torch.Generator().manual_seed((1_000_003 * state["seed"] + state["asked"]) % 2**63)
        chosen: list[Tensor] = []
        if not bool(state["values"].isfinite().any()):
            if state["asked"] == 0:
                chosen.append(self._place({name: float(kind.tensor(_LIKE)) for name, kind in self.space.items()}))
            while len(chosen) < count:
                chosen.append(torch.rand(len(self.space), generator=generator, dtype=torch.float64))
        else:
            process, low, high = self._model(state)
            for _ in range(count):
                chosen.append(_least(process, low, high, [*state["pending"], *chosen], generator))
        return [self._values(place) for place in chosen], {
            **state,
            "pending": torch.cat([state["pending"], torch.stack(chosen)]),
            "asked": state["asked"] + count,
        }

    def tell(
        self, state: State, point: Mapping[str, float], loss: float, gradient: Mapping[str, float] | None = None
    ) -> State:
        """The state that knows a loss, and its hypergradient in the natural values where there is one.

        A gradient may leave out names, whose slopes count as not seen: a learning rate beside decays. A loss that is
        NaN or infinite is one that failed: it counts as the worst that was seen, without a slope. Points that were not
        asked for may be told. Raises `ValueError` for other names, a point outside the ranges, or a gradient with NaN
        beside a finite loss.
        """
        place = self._place(point)
        slope = torch.full_like(place, math.nan)
        if gradient is not None and math.isfinite(loss):
            if not set(gradient) <= set(self.space):
                raise ValueError(
                    f"GradientSearch: the gradient names {sorted(gradient)}; expected some or all of "
                    f"{sorted(self.space)}."
                )
            if not all(math.isfinite(value) for value in gradient.values()):
                raise ValueError(
                    f"GradientSearch.tell: the gradient is {dict(gradient)} beside a loss of {loss}; expected finite "
                    "numbers. Leave out the names of those that are not."
                )
            # In units of the box: dz/d(place).
            for i, (name, kind) in enumerate(self.space.items()):
                if name in gradient:
                    low, high = kind.range
                    scale = float(point[name]) * math.log(high / low) if isinstance(kind, Log) else high - low
                    slope[i] = float(gradient[name]) * scale
        return {
            **state,
            "points": torch.cat([state["points"], place[None]]),
            "values": torch.cat([state["values"], torch.tensor([loss], dtype=torch.float64)]),
            "slopes": torch.cat([state["slopes"], slope[None]]),
            # A natural value and back: a rounding apart.
            "pending": state["pending"][(state["pending"] - place).abs().amax(1) > 1e-9],
        }

    def expect(self, state: State, point: Mapping[str, float]) -> State:
        """The state in which a point that was chosen elsewhere is waited for, as those are that were asked for."""
        return {**state, "pending": torch.cat([state["pending"], self._place(point)[None]])}

    def best(self, state: State) -> tuple[dict[str, float], float]:
        """The point of the least loss, and that loss. Raises `ValueError` where no finite loss was told."""
        values = state["values"]
        if not bool(values.isfinite().any()):
            raise ValueError(f"GradientSearch.best: none of {len(values)} losses told is finite.")
        index = int(values.nan_to_num(math.inf, math.inf, math.inf).argmin())
        return self._values(state["points"][index]), float(values[index])

    # ------------------------------------------------------------------------------------------------------------------

    def _model(self, state: State) -> tuple[Process, Tensor, Tensor]:
        """The process of what was told, and the trust region."""
        points, values, slopes = state["points"], state["values"].clone(), state["slopes"].clone()
        failed = ~values.isfinite()
        values[failed] = values[~failed].max()
        if self.cap is not None:
            slopes[values > self.cap] = math.nan
            values = values.clamp(max=self.cap)
        if self.slope_cap is not None:
            norms = slopes.nan_to_num(0.0).norm(dim=1, keepdim=True)
            slopes = slopes * (self.slope_cap / norms).clamp(max=1.0)
        # Failures never are the best, though a landscape may be flat.
        index = int(values.masked_fill(failed, math.inf).argmin())
        centre = points[index]
        near = (points - centre).norm(dim=1).argsort()[:NEAREST]
        share = min(1.0, max(0.0, (len(values) - 1) / max(1, self.evaluations - 2)))
        width = self.radius[0] * (self.radius[1] / self.radius[0]) ** share
        low, high = (centre - width).clamp(min=0.0), (centre + width).clamp(max=1.0)
        return fitted(points[near], values[near], slopes[near]), low, high

    def _place(self, point: Mapping[str, float]) -> Tensor:
        """Natural values as a point of the unit box."""
        self._require_names("the point", point)
        places = []
        for name, kind in self.space.items():
            (low, high), z = kind.range, float(point[name])
            if not low <= z <= high:
                raise ValueError(f"GradientSearch: {name}={z} is outside its range, {low} to {high}.")
            places.append(
                math.log(z / low) / math.log(high / low) if isinstance(kind, Log) else (z - low) / (high - low)
            )
        return torch.tensor(places, dtype=torch.float64)

    def _values(self, place: Tensor) -> dict[str, float]:
        found = {}
        for share, (name, kind) in zip(place.tolist(), self.space.items(), strict=True):
            low, high = kind.range
            z = low * (high / low) ** share if isinstance(kind, Log) else low + (high - low) * share
            found[name] = min(max(z, low), high)  # rounding may leave the range
        return found

    def _require_names(self, what: str, given: Mapping[str, float]) -> None:
        if set(given) != set(self.space):
            raise ValueError(f"GradientSearch: {what} names {sorted(given)}; expected {sorted(self.space)}.")


_LIKE = torch.zeros((), dtype=torch.float64)


def _least(process: Process, low: Tensor, high: Tensor, taken: list[Tensor], generator: torch.Generator) -> Tensor:
    """Where the mean is least between low and high, away from the points that are taken."""
    from scipy.optimize import minimize  # noqa: PLC0415

    places = low + (high - low) * torch.rand(CANDIDATES, len(low), generator=generator, dtype=torch.float64)
    spread = float(process.mean(places)[0].std())
    reach = 0.25 * (high - low)

    def cost(x: Tensor) -> tuple[Tensor, Tensor]:
        mean, slope = process.mean(x)
        for other in taken:
            bump = spread * (-0.5 * ((x - other) / reach).square().sum(1)).exp()
            mean, slope = mean + bump, slope - bump[:, None] * (x - other) / reach.square()
        return mean, slope

    def flat(x: Any) -> tuple[float, Any]:
        mean, slope = cost(torch.as_tensor(x)[None])
        return float(mean), slope[0].numpy()

    starts = places[cost(places)[0].argsort()[:REFINED]]
    bounds = list(zip(low.tolist(), high.tolist(), strict=True))
    ends = [minimize(flat, start.numpy(), jac=True, method="L-BFGS-B", bounds=bounds) for start in starts]
    return torch.as_tensor(min(ends, key=lambda end: float(end.fun)).x).clamp(low, high)


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Attributes:
        values: The hyperparameters of the least loss.
        loss: That loss.
        losses: Of every evaluation, in order; NaN where one failed.
        state: What a further search goes on from.
    """

    values: dict[str, float]
    loss: float
    losses: list[float]
    state: State = field(repr=False)


def minimise(
    objective: Callable[..., Tensor], search: GradientSearch, *, state: State | None = None, seed: int = 0
) -> Found:
    """Evaluate `search.evaluations` points of an objective, each with its gradient.

    `objective` has parameters named after the space, which are 0-d float64 tensors, and returns a 0-d loss. Where that
    has a graph its gradient is taken by autograd, through a response for instance, which makes it a hypergradient;
    where it has none the search goes by losses alone. A parameter that the graph does not hold, as after `.item()`,
    and a slope that is not finite count as not seen. `state` goes on from an earlier end, whose evaluations count.
    Raises `TypeError` for names that differ or a loss that is no number, `ValueError` where every loss failed.

    >>> from bilevel.constraints import Interval
    >>> space = {"x": Interval(-2.0, 2.0), "y": Interval(-2.0, 2.0)}
    >>> found = minimise(lambda x, y: (x - 1) ** 2 + (y + 0.5) ** 2, GradientSearch(space, evaluations=10))
    >>> round(found.values["x"], 2), round(found.values["y"], 2)
    (1.0, -0.5)
    """
    names = list(inspect.signature(objective).parameters)
    if set(names) != set(search.space):
        raise TypeError(
            f"minimise: the objective takes {names}; expected the names of the space, {list(search.space)}."
        )
    state = search.init(seed) if state is None else state
    while len(state["values"]) < search.evaluations:
        (point,), state = search.ask(state)
        given = {name: torch.tensor(z, dtype=torch.float64, requires_grad=True) for name, z in point.items()}
        loss = objective(**given)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(f"minimise: the objective returned {loss!r}; expected a tensor with one number, the loss.")
        gradient = {}
        if loss.requires_grad:
            # No zeros in the place of None: what the graph does not hold has an unknown slope, not a flat one.
            slopes = torch.autograd.grad(loss.sum(), list(given.values()), allow_unused=True)
            gradient = {
                name: float(slope)
                for name, slope in zip(given, slopes, strict=True)
                if slope is not None and bool(slope.isfinite())
            }
        state = search.tell(state, point, float(loss.detach()), gradient)
    values, least = search.best(state)
    return Found(values, least, state["values"].tolist(), state)

"""Values and hypergradients in, the next points to try out; and the loop around it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, final

import torch
from torch import Tensor

from bilevel.constraints import Choice, Coordinate
from bilevel.search.process import ADDITIVE, Process, fitted
from bilevel.search.proposals import Region, least
from bilevel.search.space import Space
from bilevel.workers import on_cluster, require_workers, side_by_side

State = dict[str, Any]
NEAREST, SCATTERED = 30, 32
"""How many observations a process takes; draws of a point that is not tried already, while no loss is known."""


@final
@dataclass(frozen=True)
class GradientSearch:
    r"""Proposes values of hyperparameters from the losses and hypergradients of those that were tried.

    A Gaussian process with derivative observations and an additive kernel is fitted to what was told; the next point is
    where its mean is least, within a trust region around the best so far. The region is a box of half-width
    `radius[0]` of each range at first and `radius[1]` after `evaluations`. The first point is each range's start.

    Integers and other numbers with gaps are searched at the numbers themselves, the process seeing each where it rounds
    to (Garrido-Merchan & Hernandez-Lobato 2017, arXiv 1706.03673). Of options, which have no slopes, those are proposed
    that may be better than the best so far by a standard deviation. In a space of choices alone no point comes twice
    before all were tried.

    Nothing is written to: `init()` gives a state, a plain dict of tensors, numbers and strings, which `torch.load(...,
    weights_only=True)` reads; `ask` and `tell` return the next one. From one state the same proposals follow.

    A proposal costs 84 Cholesky factors of at most 30 (1 + d) rows, for d hyperparameters. It finds a local optimum:
    the region looks nowhere else. Hypergradients that are wrong mislead it more than none.
    Source of derivative observations: Wu et al. 2017 (arXiv 1703.04389); of the trust region: Eriksson et al. 2019
    (arXiv 1910.01739).

    Args:
        space: Name -> `Log`, `Unit` or `Interval`, of one number each, or `Choice`. `Log` is searched by its logarithm.
        evaluations: How many are planned: by then the region has its last size.
        radius: First and last half-width of the trust region, in shares of each range.
        cap: A loss above it, where a landscape is a plateau or a wall, counts as this one without its slope.
        slope_cap: The largest norm of a slope, in losses per range; a longer one is shortened. Default: none.
        additive: Shares of the kernel's additive part that the likelihood chooses from. `(0.0,)` is a product alone.

    Raises:
        TypeError: For something that is neither one of these ranges nor a choice.
        ValueError: For an empty space, settings out of their bounds, or the state of a search over another space.

    Examples:
        >>> from bilevel.constraints import Log
        >>> search = GradientSearch({"rate": Log(1e-4, 1.0)})
        >>> points, state = search.ask(search.init())
        >>> points
        [{'rate': 0.01}]
        >>> state = search.tell(state, points[0], 0.7, {"rate": -3.0})
        >>> points, state = search.ask(state)
        >>> points[0]["rate"] > 0.01
        True
    """

    space: Mapping[str, Coordinate | Choice]
    evaluations: int = field(default=20, kw_only=True)
    radius: tuple[float, float] = field(default=(0.3, 0.1), kw_only=True)
    cap: float | None = field(default=None, kw_only=True)
    slope_cap: float | None = field(default=None, kw_only=True)
    additive: tuple[float, ...] = field(default=ADDITIVE, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what cannot be searched."""
        Space(self.space)
        if self.evaluations < 1:
            raise ValueError(f"GradientSearch: evaluations={self.evaluations}; expected at least 1.")
        if not 0.0 < self.radius[1] <= self.radius[0] <= 1.0:
            raise ValueError(f"GradientSearch: radius={self.radius}; expected 0 < last <= first <= 1.")
        if self.cap is not None and not math.isfinite(self.cap):
            raise ValueError(f"GradientSearch: cap={self.cap}; expected a finite loss, or None.")
        if self.slope_cap is not None and not self.slope_cap > 0.0:
            raise ValueError(f"GradientSearch: slope_cap={self.slope_cap}; expected a number above 0, or None.")
        if not self.additive or not all(0.0 <= share <= 1.0 for share in self.additive):
            raise ValueError(f"GradientSearch: additive={self.additive}; expected one share or more, from 0 to 1.")

    @cached_property
    def _space(self) -> Space:
        return Space(self.space)

    def init(self, seed: int = 0) -> State:
        """The state before the first point; `seed` is of the random candidates."""
        none = torch.empty(0, len(self.space), dtype=torch.float64)
        empty = {"points": none, "values": none[:, 0], "slopes": none, "pending": none}
        return {**empty, "asked": 0, "seed": seed, "space": self._space.described}

    def ask(self, state: State, count: int = 1) -> tuple[list[dict[str, Any]], State]:
        """The next `count` points, to be tried side by side, and the next state.

        They keep away from each other, and from points that were asked for earlier and whose losses were not told yet.
        Tell `math.nan` for one whose training was lost. Raises `ValueError` for a count below 1.
        """
        if count < 1:
            raise ValueError(f"GradientSearch.ask: count={count}; expected at least 1.")
        self._require_own(state)
        generator = torch.Generator().manual_seed((1_000_003 * state["seed"] + state["asked"]) % 2**63)
        chosen: list[Tensor] = []
        if not bool(state["values"].isfinite().any()):
            if state["asked"] == 0:
                chosen.append(self._space.start)
            while len(chosen) < count:
                shares = torch.rand(SCATTERED, len(self.space), generator=generator, dtype=torch.float64)
                chosen.append(self._space.scattered(shares, [*state["pending"], *chosen]))
        else:
            process, region = self._model(state)
            for _ in range(count):
                taken = [*state["pending"], *chosen]
                chosen.append(least(process, region, list(state["points"]), taken, generator))
        return [self._space.values(place) for place in chosen], {
            **state,
            "pending": torch.cat([state["pending"], torch.stack(chosen)]),
            "asked": state["asked"] + count,
        }

    def tell(
        self, state: State, point: Mapping[str, Any], loss: float, gradient: Mapping[str, float] | None = None
    ) -> State:
        """The state that knows a loss, and its hypergradient in the natural values where there is one.

        A gradient may leave out names, whose slopes count as not seen: a learning rate beside decays. It must leave out
        categories; a number among several has a slope where the loss takes it as real. A loss that is NaN or infinite
        is one that failed: it counts as the worst that was seen, without a slope. Points that were not asked for may be
        told. Raises `ValueError` for other names, a point outside the ranges, a category's slope, or a
        gradient with NaN beside a finite loss.
        """
        self._require_own(state)
        place = self._space.place(point)
        slope = torch.full_like(place, math.nan)
        if gradient is not None and math.isfinite(loss):
            slope = self._space.slopes(point, gradient)  # in units of the box: dz/d(place)
            if not all(math.isfinite(value) for value in gradient.values()):
                raise ValueError(
                    f"GradientSearch.tell: the gradient is {dict(gradient)} beside a loss of {loss}; expected finite "
                    "numbers. Leave out the names of those that are not."
                )
        return {
            **state,
            "points": torch.cat([state["points"], place[None]]),
            "values": torch.cat([state["values"], torch.tensor([loss], dtype=torch.float64)]),
            "slopes": torch.cat([state["slopes"], slope[None]]),
            "pending": _without(state["pending"], place),
        }

    def expect(self, state: State, point: Mapping[str, Any]) -> State:
        """The state in which a point that was chosen elsewhere is waited for, as those are that were asked for."""
        self._require_own(state)
        return {**state, "pending": torch.cat([state["pending"], self._space.place(point)[None]])}

    def best(self, state: State) -> tuple[dict[str, Any], float]:
        """The point of the least loss, and that loss. Raises `ValueError` where no finite loss was told."""
        self._require_own(state)
        values = state["values"]
        if not bool(values.isfinite().any()):
            raise ValueError(f"GradientSearch.best: none of {len(values)} losses told is finite.")
        index = int(values.nan_to_num(math.inf, math.inf, math.inf).argmin())
        return self._space.values(state["points"][index]), float(values[index])

    # ------------------------------------------------------------------------------------------------------------------

    def _require_own(self, state: State) -> None:
        # A state has shares of the ranges: in another space the same shares are other values.
        if state["space"] != self._space.described:
            raise ValueError(
                f"GradientSearch: the state is of a search over {state['space']}, and this one is over "
                f"{self._space.described}. Begin anew by init(), and tell it the points of the old search that are "
                "in the new ranges."
            )

    def _model(self, state: State) -> tuple[Process, Region]:
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
        near = self._space.distances(points, centre).argsort()[:NEAREST]
        share = min(1.0, max(0.0, (len(values) - 1) / max(1, self.evaluations - 2)))
        width = self.radius[0] * (self.radius[1] / self.radius[0]) ** share
        process = fitted(points[near], values[near], slopes[near], self._space.categories, self.additive)
        return process, Region.around(self._space, centre, width)


def _without(pending: Tensor, place: Tensor) -> Tensor:
    """The points that are waited for without the first that is this one: a natural value and back, a rounding apart."""
    same = ((pending - place).abs().amax(1) <= 1e-9).nonzero()[:1, 0].tolist()
    return pending[[i for i in range(len(pending)) if i not in same]]


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Attributes:
        values: The hyperparameters of the least loss.
        loss: That loss.
        losses: Of every evaluation, in order; NaN where one failed.
        state: What a further search goes on from.
    """

    values: dict[str, Any]
    loss: float
    losses: list[float]
    state: State = field(repr=False)


def minimise(
    objective: Callable[..., Tensor],
    search: GradientSearch,
    *,
    state: State | None = None,
    seed: int = 0,
    jobs: int = 1,
    cluster: str | None = None,
) -> Found:
    """Evaluate `search.evaluations` points of an objective, each with its gradient.

    Args:
        objective: Has parameters named after the space, 0-d float64 tensors for ranges and the options themselves for
            choices, and returns a 0-d loss. Where that has a graph its gradient is taken by autograd, through a
            response for instance, which makes it a hypergradient; where it has none the search goes by losses alone. A
            parameter that the graph does not hold, as after `.item()`, and a slope that is not finite count as not
            seen. It may be a run of `bilevel.tune`: each trial is a piece of work.
        search: The space, and how many points.
        state: Goes on from an earlier end, whose evaluations count.
        seed: Of a search that begins.
        jobs: So many points are asked for at once and evaluated side by side, in processes of one thread (joblib).
            Which points are tried depends on it, and not on where, or which of them ends first.
        cluster: Evaluate on a Ray cluster, by its address ("host:6379", "ray://host:10001", "auto"), or "local": one
            on this machine.

    Raises:
        TypeError: For names that differ, a loss that is no number, or a `cluster` that is no address.
        ValueError: Where every loss failed, or for `jobs` below 1.
        ImportError: For packages that are missing.
        ConnectionError: Where nobody answers at a cluster's address.

    Examples:
        >>> from bilevel.constraints import Interval
        >>> space = {"x": Interval(-2.0, 2.0), "y": Interval(-2.0, 2.0)}
        >>> found = minimise(lambda x, y: (x - 1) ** 2 + (y + 0.5) ** 2, GradientSearch(space, evaluations=10))
        >>> round(found.values["x"], 2), round(found.values["y"], 2)
        (1.0, -0.5)
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ValueError(
            f"minimise: jobs={jobs!r}; expected a whole number from 1. So many points are asked for at once, and which "
            "ones they are depends on it."
        )
    require_workers("minimise", jobs, cluster)
    names = list(inspect.signature(objective).parameters)
    if set(names) != set(search.space):
        raise TypeError(
            f"minimise: the objective takes {names}; expected the names of the space, {list(search.space)}."
        )
    state = search.init(seed) if state is None else state
    with on_cluster(cluster, jobs):
        while (left := search.evaluations - len(state["values"])) > 0:
            points, state = search.ask(state, min(jobs, left))
            work = [partial(_evaluated, objective, search.space, point) for point in points]
            ends = dict(side_by_side(work, jobs=jobs, cluster=cluster))
            for index, point in enumerate(points):  # in this order, whichever ended first
                state = search.tell(state, point, *ends[index])
    values, least = search.best(state)
    return Found(values, least, state["values"].tolist(), state)


def _evaluated(
    objective: Callable[..., Tensor], space: Mapping[str, Coordinate | Choice], point: Mapping[str, Any]
) -> tuple[float, dict[str, float]]:
    """The loss at a point, and its slopes where they are known."""
    numbers = {
        name: torch.tensor(z, dtype=torch.float64, requires_grad=True)
        for name, z in point.items()
        if not isinstance(space[name], Choice)
    }
    loss = objective(**{**point, **numbers})
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"minimise: the objective returned {loss!r}; expected a tensor with one number, the loss.")
    gradient = {}
    if loss.requires_grad and numbers:
        # No zeros in the place of None: what the graph does not hold has an unknown slope, not a flat one.
        slopes = torch.autograd.grad(loss.sum(), list(numbers.values()), allow_unused=True)
        gradient = {
            name: float(slope)
            for name, slope in zip(numbers, slopes, strict=True)
            if slope is not None and bool(slope.isfinite())
        }
    return float(loss.detach()), gradient

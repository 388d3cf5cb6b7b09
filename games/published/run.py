"""Each published problem solved by the library, and its answer judged by SciPy alone."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import bilevel as bl
from games.published.everywhere import Everywhere
from games.published.judge import Verdict, judged
from games.published.problem import Problem

TIE = 1e-6
"""The share of the leader's loss in the loss of a follower with several optima."""

CLOSE = 1e-3
"""A leader value is that of the literature up to this, relative to its size where that is above 1."""

FEASIBLE = 1e-4
"""What an answer may break its functions by, and miss of the follower's optimum, relative to sizes above 1."""


RADII = (0.2, 0.05)
"""Where a leader of several variables stopped short: once more from points beside it, by parts of its box."""


SURE = 1e-8
"""What an answer that is better than the best known may miss of the follower's optimum."""


@dataclass(frozen=True)
class Result:
    """What came of one problem.

    Attributes:
        name: The problem's.
        dimensions: Variables of the leader and of the follower.
        status: "solved", "better" than the best known, "worse" than it, "not optimal" where the follower could do
            better, "infeasible", or "failed".
        value: The leader's, recomputed at the answer; None where all starts failed.
        published: The best known.
        violation: The largest of all functions at the answer.
        gap: How much lower the follower's loss could be there, by SciPy.
        evaluations: Of the leader's loss and hypergradient, over all starts.
        seconds: Of the search.
        told: What the run warned of, or why it failed.
    """

    name: str
    dimensions: tuple[int, int]
    status: str
    value: float | None
    published: float
    violation: float
    gap: float
    evaluations: int
    seconds: float
    told: tuple[str, ...]

    @property
    def solved(self) -> bool:
        """Whether it is as good as what is known."""
        return self.status in ("solved", "better")


def response_to(problem: Problem) -> bl.Response:
    """How the follower is solved: by a search of its whole box where it is not convex."""
    if not problem.convex:
        return bl.Implicit(Everywhere(*problem.y_box))
    return bl.Implicit(bl.inner.HiGHS() if problem.linear else bl.Scipy("SLSQP"))


def starts_of(problem: Problem, count: int, seed: int) -> list[dict[str, Tensor]]:
    """The middle of the leader's box, its corners, and points drawn in it; `count` where the follower has an answer.

    Of ten times as many points at most; where it has none at all of them, the first few.
    """
    game, response = problem.game(TIE), response_to(problem)
    state = response.init(game)
    found: list[dict[str, Tensor]] = []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", bl.BilevelWarning)
        for x in itertools.islice(_points(problem, seed), 10 * count):
            try:
                response(game, {"x": x}, state)
            except bl.BilevelError:
                continue
            found.append({"x": x})
            if len(found) == count:
                break
    return found or [{"x": x} for x in itertools.islice(_points(problem, seed), count)]


def around(problem: Problem, x: Tensor, radius: float, count: int, seed: int) -> list[dict[str, Tensor]]:
    """The point itself, and others of the leader's box that are no farther than a part of its width."""
    low, high = (torch.tensor(end, dtype=torch.float64) for end in problem.box)
    generator = torch.Generator().manual_seed(seed)
    drawn = 2.0 * torch.rand(count - 1, len(x), generator=generator, dtype=torch.float64) - 1.0
    return [{"x": x}, *({"x": (x + radius * (high - low) * row).clamp(low, high)} for row in drawn)]


def _stopped_short(found: bl.Solution) -> bool:
    return any(text.startswith("SciPy's") for text in found.warnings)


def _worth(found: bl.Solution) -> tuple[float, float]:
    return max(found.violations.get("x", 0.0) - 1e-6, 0.0), found.values["x"]


def _points(problem: Problem, seed: int) -> Iterator[Tensor]:
    low, high = (torch.tensor(end, dtype=torch.float64) for end in problem.box)
    yield 0.5 * (low + high)
    if len(low) <= 2:
        for corner in itertools.product((0.0, 1.0), repeat=len(low)):
            yield low + (high - low) * torch.tensor(corner, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield low + (high - low) * torch.rand(len(low), generator=generator, dtype=torch.float64)


def solved(problem: Problem, *, starts: int = 6, steps: int = 40, seed: int = 0) -> Result:
    """Solve a problem from many starts, and judge the answer."""
    began, seen = time.perf_counter(), 0

    def count(step: int, record: object, variables: object) -> None:
        nonlocal seen
        seen += 1

    def ended(status: str, told: tuple[str, ...], value: float | None = None, verdict: Verdict | None = None) -> Result:
        violation, gap = (verdict.violation, verdict.gap) if verdict else (float("nan"), float("nan"))
        seconds = time.perf_counter() - began
        return Result(
            problem.name, problem.dimensions, status, value, problem.best, violation, gap, seen, seconds, told
        )

    def best_from(points: list[dict[str, Tensor]]) -> bl.Solution:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bl.BilevelWarning)  # they are in the solution
            return bl.solve(
                problem.game(TIE),
                y=response_to(problem),
                optimizer=bl.Scipy("SLSQP"),
                starts=points,
                steps=steps,
                callbacks=[count],
            )

    try:
        found = best_from(starts_of(problem, starts, seed))
        for place, radius in enumerate(RADII):
            if len(problem.x) == 1 or not any(
                "had not finished" in text or "stopped" in text for text in found.warnings
            ):
                break
            # Stopped on an edge, perhaps: from beside it another place on the edge is reached.
            again = best_from(around(problem, found.variables["x"], radius, starts, seed + place))
            if _worth(again) < _worth(found):
                found = again
    except bl.BilevelError as error:
        return ended("failed", (str(error),))
    x, y = found.variables["x"], found.variables["y"]
    verdict, value = judged(problem, x, y), float(problem.F(x, y))
    size, lower = max(1.0, abs(problem.best)), max(1.0, abs(float(problem.f(x, y))))
    if verdict.violation > FEASIBLE:
        status = "infeasible"
    elif verdict.gap > FEASIBLE * lower:
        status = "not optimal"
    elif value > problem.best + CLOSE * size:
        status = "worse"
    else:
        status = "solved"
        if value < problem.best - CLOSE * size:  # so much lower by what a tie's weight leaves open is no better
            status = "better" if verdict.gap <= SURE * lower else "not optimal"
    return ended(status, (*found.warnings, str(found.starts)), value, verdict)

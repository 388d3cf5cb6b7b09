"""Each published problem solved by the library, and its answer judged by SciPy alone."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import bilevel as bl
from games.published.compass import Answers, Seen, apart
from games.published.everywhere import Everywhere
from games.published.judge import Verdict, judged
from games.published.problem import Problem

TIES = (1e-6, 1e-8, 1e-10)
"""The share of the leader's loss in the loss of a follower with several optima.

The next one where the follower loses more than `SURE` by the last. A linear programme's solver sees no share below
1e-7, and there the first one is all.
"""

SCANNED = 6
"""For each start so many points of the leader's box: there its follower is asked first, without derivatives."""

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
        answers: Of the follower without a derivative: of the scan, and of the search along coordinates.
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
    answers: int
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


def scanned(problem: Problem, answers: Answers, count: int, seed: int) -> list[Seen]:
    """Answers over the leader's box: evenly spaced for one variable, else its middle, its corners and random points."""
    low, high = answers.low, answers.high
    if len(low) == 1:
        return [answers.at(x) for x in torch.linspace(float(low), float(high), count, dtype=torch.float64)[:, None]]
    return [answers.at(x) for x in itertools.islice(_points(problem, seed), count)]


def around(problem: Problem, x: Tensor, radius: float, count: int, seed: int) -> list[dict[str, Tensor]]:
    """The point itself, and others of the leader's box that are no farther than a part of its width."""
    low, high = (torch.tensor(end, dtype=torch.float64) for end in problem.box)
    generator = torch.Generator().manual_seed(seed)
    drawn = 2.0 * torch.rand(count - 1, len(x), generator=generator, dtype=torch.float64) - 1.0
    return [{"x": x}, *({"x": (x + radius * (high - low) * row).clamp(low, high)} for row in drawn)]


def _worth(found: bl.Solution) -> tuple[float, float]:
    return max(found.violations.get("x", 0.0) - 1e-6, 0.0), found.values["x"]


def _counts(problem: Problem, found: bl.Solution) -> bool:
    return judgement_of(problem, found.variables["x"], found.variables["y"]).counts


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
    began, seen, asked = time.perf_counter(), 0, 0

    def count(step: int, record: object, variables: object) -> None:
        nonlocal seen
        seen += 1

    def best_from(points: list[dict[str, Tensor]]) -> bl.Solution:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bl.BilevelWarning)  # they are in the solution
            return bl.solve(
                problem.game(TIES[0]),
                y=response_to(problem),
                optimizer=bl.Scipy("SLSQP"),
                starts=points,
                steps=steps,
                callbacks=[count],
            )

    def ended(best: Judgement | None, told: tuple[str, ...]) -> Result:
        status, value, gone = "failed", None, Verdict(math.nan, math.nan, torch.empty(0))
        if best is not None:
            status, value, gone = best.status, best.value, best.verdict
        if status == "worse":
            told = (f"The best known is {problem.best:.6g}: perhaps a local optimum, which no warning tells.", *told)
        return Result(
            *(problem.name, problem.dimensions, status, value, problem.best, gone.violation, gone.gap),
            *(seen, asked, time.perf_counter() - began, told),
        )

    answers = Answers(problem, response_to(problem), TIES[0])
    scan = scanned(problem, answers, SCANNED * starts, seed)
    asked = answers.count
    chosen = apart(scan, starts, answers.width)
    points, left_out = [{"x": one.x} for one in chosen or scan[:starts]], 0
    try:
        found = best_from(points)
        while len(points) > 1 and not _counts(problem, found):
            # Low where the follower was not solved, which its warning tells, is not low.
            assert found.starts is not None
            del points[found.starts.best]
            left_out += 1
            found = best_from(points)
        for place, radius in enumerate(RADII):
            if len(problem.x) == 1 or not any(
                "had not finished" in text or "stopped" in text for text in found.warnings
            ):
                break
            # Stopped on an edge, perhaps: from beside it another place on the edge is reached.
            again = best_from(around(problem, found.variables["x"], radius, starts, seed + place))
            if _worth(again) < _worth(found) and _counts(problem, again):
                found = again
    except bl.BilevelError as error:
        return ended(None, (str(error),))
    told = [*found.warnings, str(found.starts)]
    if left_out:
        told.append(f"{left_out} more ended where the follower is not at its optimum, and were left out.")
    best = judgement_of(problem, found.variables["x"], found.variables["y"])
    for tie in TIES if problem.ties and not problem.linear else TIES[:1]:
        answers = replace(answers, tie=tie)
        # On from where the hypergradient led, and from the best of the scan where that is lower, or the tie another.
        ends = sorted((answers.at(x) for x in (best.x, *(one.x for one in chosen[:1]))), key=lambda one: one.value)
        ends = ends if tie != TIES[0] else ends[:1]
        there = min((answers.settled(end) for end in ends), key=lambda one: one.value)
        asked += answers.count
        if there.y is not None:
            after = judgement_of(problem, there.x, there.y)
            # What a larger tie had was owed to it.
            if after.counts and (not best.counts or after.value < best.value or tie != TIES[0]):
                told.append(f"A search along coordinates went on from {best.value:.8g} to {after.value:.8g}.")
                best = after
        if best.verdict.gap <= SURE * best.size:
            break
    return ended(best, tuple(told))


@dataclass(frozen=True, eq=False)
class Judgement:
    """An answer, the leader's value and the follower's, and what is said of it."""

    x: Tensor
    y: Tensor
    value: float
    lower: float
    verdict: Verdict
    status: str

    @property
    def size(self) -> float:
        """What the follower's gap is measured in."""
        return max(1.0, abs(self.lower))

    @property
    def counts(self) -> bool:
        """Whether it keeps the functions, and the follower is at its optimum."""
        return self.verdict.violation <= FEASIBLE and self.verdict.gap <= FEASIBLE * self.size


def judgement_of(problem: Problem, x: Tensor, y: Tensor) -> Judgement:
    """What SciPy says of an answer, beside the best known value."""
    verdict, value, lower = judged(problem, x, y), float(problem.F(x, y)), float(problem.f(x, y))
    size, follower = max(1.0, abs(problem.best)), max(1.0, abs(lower))
    if verdict.violation > FEASIBLE:
        status = "infeasible"
    elif verdict.gap > FEASIBLE * follower:
        status = "not optimal"
    elif value > problem.best + CLOSE * size:
        status = "worse"
    else:
        status = "solved"
        if value < problem.best - CLOSE * size:  # so much lower by what a tie's weight leaves open is no better
            status = "better" if verdict.gap <= SURE * follower else "not optimal"
    return Judgement(x, y, value, lower, verdict, status)

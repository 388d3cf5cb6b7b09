"""What is measured, as plain data: one row a run, one reference a game and seed, and medians over the seeds."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One hypergradient at the game's start, from a fresh state.

    Attributes:
        budget: What the response was given, in units of its own steps.
        gradients: Gradients that it cost.
        products: Hessian-vector products that it cost.
        seconds: Of the processor.
        error: |found - reference| / |reference|; None where there is no reference, or the call failed.
    """

    budget: float
    gradients: int
    products: int
    seconds: float
    error: float | None

    @property
    def work(self) -> int:
        """Gradients and Hessian-vector products together."""
        return self.gradients + self.products


@dataclass(frozen=True)
class Step:
    """The leader at a step of a run of `solve`.

    Attributes:
        step: The number of steps so far.
        work: Gradients and products so far.
        value: The leader's loss once the follower has converged there; None where that is not known.
        told: The loss that the run itself saw in that step, with the follower's answer as the response gave it.
    """

    step: int
    work: float
    value: float | None
    told: float


@dataclass(frozen=True)
class Row:
    """One game, response and seed.

    Attributes:
        game: Its name.
        response: Its name.
        seed: Of batches and randomness.
        errors: Hypergradients at the start, over a ladder of budgets.
        history: The leader's path by `solve`, at steps that grow geometrically.
        gradients: Gradients of the whole run of `solve`.
        products: Hessian-vector products of the whole run.
        seconds: Of the whole run.
        memory: Peak bytes of the tensors that one hypergradient at the response's own budget allocates.
        stationarity: What the response says at the end of |gradient of the follower|, in units of that at the start.
        residual: What it says at the end of the equation for its derivative.
        warnings: Each text once.
        failure: What it raised, after which nothing more was measured.
    """

    game: str
    response: str
    seed: int
    errors: tuple[Point, ...] = ()
    history: tuple[Step, ...] = ()
    gradients: int | None = None
    products: int | None = None
    seconds: float | None = None
    memory: int | None = None
    stationarity: float | None = None
    residual: float | None = None
    warnings: tuple[str, ...] = ()
    failure: str | None = None

    @property
    def own(self) -> Point | None:
        """The hypergradient at the response's own budget."""
        return next((point for point in self.errors if point.budget == 1.0), None)

    @property
    def value(self) -> float | None:
        """The leader's loss at the end of the run, once the follower has converged there."""
        return self.history[-1].value if self.history else None

    @property
    def work(self) -> int | None:
        """Gradients and products of the whole run together."""
        return None if self.gradients is None or self.products is None else self.gradients + self.products

    @staticmethod
    def load(content: dict[str, Any]) -> Row:
        """The row whose `dataclasses.asdict` went through JSON."""
        errors = tuple(Point(**point) for point in content["errors"])
        history = tuple(Step(**step) for step in content["history"])
        return Row(**{**content, "errors": errors, "history": history, "warnings": tuple(content["warnings"])})


@dataclass(frozen=True)
class Reference:
    """What the hypergradients of one game and seed are held against.

    Attributes:
        game: Its name.
        seed: Of batches and randomness.
        kind: "exact" for a `KnownGame`, else "converged".
        norm: |hypergradient|.
        stationarity: The converged reference's own |gradient of the follower|, in units of that at the start.
        residual: The relative residual of its linear solve.
        start: The leader's loss at the start once the follower has converged.
        least: The leader's loss at its optimum, of known games that have one.
        failure: What the reference raised.
    """

    game: str
    seed: int
    kind: str
    norm: float | None = None
    stationarity: float | None = None
    residual: float | None = None
    start: float | None = None
    least: float | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Spread:
    """Median, least and largest over the seeds."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float | None]) -> Spread | None:
        """Over the values that there are; None when there is none."""
        there = [value for value in values if value is not None and math.isfinite(value)]
        return Spread(statistics.median(there), min(there), max(there)) if there else None

    def show(self, form: Callable[[float], str]) -> str:
        """The median, with its range where that is another."""
        median, low, high = form(self.median), form(self.low), form(self.high)
        return median if low == high else f"{median} ({low} to {high})"


@dataclass(frozen=True)
class Summary:
    """One game and response over all seeds: medians and ranges; None where nothing was measured.

    Attributes:
        game: Its name.
        response: Its name.
        error: Of one hypergradient at the response's own budget.
        work: Of one hypergradient at the response's own budget.
        value: The leader's loss at the end of the run, the follower converged.
        excess: The same above the optimum, where that is known.
        gradients: Gradients of the whole run.
        products: Hessian-vector products of the whole run.
        total: Gradients and products of the whole run together.
        seconds: Of the whole run.
        memory: Peak bytes of the tensors of one hypergradient.
        warnings: How many, over the seeds.
        failures: How many seeds failed.
    """

    game: str
    response: str
    error: Spread | None
    work: Spread | None
    value: Spread | None
    excess: Spread | None
    gradients: Spread | None
    products: Spread | None
    total: Spread | None
    seconds: Spread | None
    memory: Spread | None
    warnings: int
    failures: int


def summarise(rows: Sequence[Row], references: Sequence[Reference]) -> list[Summary]:
    """One summary for each game and response, in the order of the rows."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.game, row.response), []).append(row)
    least = {(reference.game, reference.seed): reference.least for reference in references}

    def above(row: Row) -> float | None:
        bottom = least.get((row.game, row.seed))
        return None if bottom is None or row.value is None else row.value - bottom

    return [
        Summary(
            game=game,
            response=response,
            error=Spread.of([row.own.error if row.own else None for row in group]),
            work=Spread.of([row.own.work if row.own else None for row in group]),
            value=Spread.of([row.value for row in group]),
            excess=Spread.of([above(row) for row in group]),
            gradients=Spread.of([row.gradients for row in group]),
            products=Spread.of([row.products for row in group]),
            total=Spread.of([row.work for row in group]),
            seconds=Spread.of([row.seconds for row in group]),
            memory=Spread.of([row.memory for row in group]),
            warnings=sum(len(row.warnings) for row in group),
            failures=sum(row.failure is not None for row in group),
        )
        for (game, response), group in groups.items()
    ]


def plain(tree: Any) -> Any:
    """What JSON can hold: dataclasses as dicts, and a number that does not exist as null."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return plain(dataclasses.asdict(tree))
    if isinstance(tree, dict):
        return {str(key): plain(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [plain(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def number(value: float) -> str:
    """Three digits, as a person writes them: 0.0123, 1.2e-09, 1,530."""
    if value == 0.0:
        return "0"
    if abs(value) >= 1000.0:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.2e}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def size(value: float) -> str:
    """Bytes with their unit: 1.5 kB, 12 MB; powers of a thousand."""
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000.0
    return f"{value:,.3g} GB"

"""All families of games, and how often each is drawn."""

from __future__ import annotations

from benchmarks.attack import constrained, derivatives, estimates, levels, many, networks, optima, rules, steps
from benchmarks.attack.judge import Family

FAMILIES: dict[str, tuple[Family, float]] = {
    "unrolled": (steps.unrolled, 3.0),
    "last_step": (steps.last_step, 2.0),
    "implicit": (optima.implicit, 4.0),
    "batches": (optima.batches, 1.5),
    "damped": (optima.damped, 2.0),
    "nudged": (estimates.nudged, 1.5),
    "single_loop": (estimates.single_loop, 2.0),
    "learned": (estimates.learned, 2.0),
    "gauss_newton": (estimates.gauss_newton, 1.0),
    "value_function": (rules.value_function, 2.0),
    "projected": (constrained.projected, 2.5),
    "bounds_that_move": (constrained.bounds_that_move, 1.0),
    "functions": (constrained.functions, 2.0),
    "levels": (levels.levels, 1.0),
    "crowd": (levels.crowd, 1.5),
    "joined": (levels.joined, 2.0),
    "many": (many.many, 2.0),
    "tasks": (many.tasks, 2.0),
    "transformed": (derivatives.transformed, 2.5),
    "residuals": (derivatives.residuals, 1.5),
    "modules": (networks.modules, 2.0),
    "inner_options": (networks.inner_options, 1.5),
    "ranges": (networks.ranges, 1.0),
}

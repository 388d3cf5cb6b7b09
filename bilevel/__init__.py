"""Nested optimisation and differentiable games in PyTorch: one game, interchangeable responses.

A solution concept is what each player assumes about the others while it differentiates. A `Game` holds the players,
a response is a differentiable map from the others' variables to a follower's own, and `solve` plays. The names that
most programs need stand here; the rest in `bilevel.linear`, `bilevel.inner`, `bilevel.networks`, `bilevel.responses`,
`bilevel.dynamics`, `bilevel.hyper`, `bilevel.search`, `bilevel.errors`, `bilevel.testing`; what extends the library in
`bilevel.extend`.
"""

from bilevel import (
    certificates,
    constraints,
    dynamics,
    errors,
    extend,
    hyper,
    inner,
    linear,
    networks,
    responses,
    search,
    testing,
    tuning,
    variance,
)
from bilevel._root import root
from bilevel._version import __version__
from bilevel.certificates import certify, certify_nash, exploitability
from bilevel.comparison import compare
from bilevel.constraints import Box, Choice, Interval, Log, Positive, Simplex, Unit
from bilevel.dynamics import ValueFunction
from bilevel.errors import BilevelError, BilevelWarning
from bilevel.game import Game, Player
from bilevel.hyper import penalty
from bilevel.inner import ClosedForm, Scipy, ScipyRoot
from bilevel.linear import GMRES, ConjugateGradient, Neumann, Nystrom
from bilevel.many import Games, Tasks
from bilevel.parallel import DataParallel
from bilevel.responses import (
    ForwardMode,
    Hypernetwork,
    Implicit,
    Nudged,
    Response,
    ReverseMode,
    Segments,
    SingleLoop,
    Unrolled,
)
from bilevel.solving import Solution, solve
from bilevel.tuning import retrain, tune


def __getattr__(name: str) -> object:
    """Say where a name lives that is not at the top level."""
    rooms = (
        constraints,
        linear,
        inner,
        networks,
        responses,
        dynamics,
        variance,
        hyper,
        tuning,
        search,
        errors,
        certificates,
        extend,
    )
    for room in rooms:
        if name in getattr(room, "__all__", vars(room)):
            raise AttributeError(f"bilevel has no {name!r} at its top level; it is {room.__name__}.{name}.")
    raise AttributeError(f"module 'bilevel' has no attribute {name!r}")


__all__ = [
    "GMRES",
    "BilevelError",
    "BilevelWarning",
    "Box",
    "Choice",
    "ClosedForm",
    "ConjugateGradient",
    "DataParallel",
    "ForwardMode",
    "Game",
    "Games",
    "Hypernetwork",
    "Implicit",
    "Interval",
    "Log",
    "Neumann",
    "Nudged",
    "Nystrom",
    "Player",
    "Positive",
    "Response",
    "ReverseMode",
    "Scipy",
    "ScipyRoot",
    "Segments",
    "Simplex",
    "SingleLoop",
    "Solution",
    "Tasks",
    "Unit",
    "Unrolled",
    "ValueFunction",
    "__version__",
    "certify",
    "certify_nash",
    "compare",
    "constraints",
    "dynamics",
    "errors",
    "exploitability",
    "extend",
    "hyper",
    "inner",
    "linear",
    "networks",
    "penalty",
    "responses",
    "retrain",
    "root",
    "solve",
    "testing",
    "tune",
    "tuning",
    "variance",
]

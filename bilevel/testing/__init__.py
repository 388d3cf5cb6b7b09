"""Check any response: games with known answers, and the laws that every right hypergradient obeys."""

# bilevel.testing.strategies needs Hypothesis: it is imported by its own name, where it is used.
from bilevel.testing.changes import (
    LaidOut,
    LeaderMix,
    LeaderTermInFollower,
    Moved,
    NegatedFollower,
    Reflection,
    Reparametrised,
    ScaledFollower,
    Single,
    Started,
    Stretch,
)
from bilevel.testing.check import LawReport, check_hypergradient_function, check_response
from bilevel.testing.constrained import BoxQuadratic, ConstrainedGame, Lasso, NonNegativeLeastSquares, WaterFilling
from bilevel.testing.duopolies import Bertrand, Cournot
from bilevel.testing.evidence import Verdict
from bilevel.testing.families import Exponential, LogBarrier, Quadratic
from bilevel.testing.forms import Form, Nested, Scalar, Vector
from bilevel.testing.hypergradient import HypergradientCheck, check_hypergradient
from bilevel.testing.known import KnownGame
from bilevel.testing.linear_systems import check_linear_solver, check_preconditioner
from bilevel.testing.players import KnownPlayers, QuadraticPlayers, bertrand_players, cournot_players, saddle
from bilevel.testing.programmes import Programme
from bilevel.testing.regressions import Logistic, Ridge

__all__ = [
    "Bertrand",
    "BoxQuadratic",
    "ConstrainedGame",
    "Cournot",
    "Exponential",
    "Form",
    "HypergradientCheck",
    "KnownGame",
    "KnownPlayers",
    "LaidOut",
    "Lasso",
    "LawReport",
    "LeaderMix",
    "LeaderTermInFollower",
    "LogBarrier",
    "Logistic",
    "Moved",
    "NegatedFollower",
    "Nested",
    "NonNegativeLeastSquares",
    "Programme",
    "Quadratic",
    "QuadraticPlayers",
    "Reflection",
    "Reparametrised",
    "Ridge",
    "Scalar",
    "ScaledFollower",
    "Single",
    "Started",
    "Stretch",
    "Vector",
    "Verdict",
    "WaterFilling",
    "bertrand_players",
    "check_hypergradient",
    "check_hypergradient_function",
    "check_linear_solver",
    "check_preconditioner",
    "check_response",
    "cournot_players",
    "saddle",
]

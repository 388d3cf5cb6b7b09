"""Check any response: games with known answers, and the laws that every right hypergradient obeys."""

from bilevel.testing import strategies
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
from bilevel.testing.families import Bertrand, Cournot, Exponential, LogBarrier, Logistic, Quadratic, Ridge
from bilevel.testing.forms import Form, Nested, Scalar, Vector
from bilevel.testing.known import KnownGame
from bilevel.testing.players import KnownPlayers, QuadraticPlayers, bertrand_players, cournot_players, saddle

__all__ = [
    "Bertrand",
    "Cournot",
    "Exponential",
    "Form",
    "KnownGame",
    "KnownPlayers",
    "LaidOut",
    "LeaderMix",
    "LeaderTermInFollower",
    "LogBarrier",
    "Logistic",
    "Moved",
    "NegatedFollower",
    "Nested",
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
    "bertrand_players",
    "cournot_players",
    "saddle",
    "strategies",
]

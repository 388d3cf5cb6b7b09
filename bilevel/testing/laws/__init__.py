"""The laws that every right hypergradient obeys, each a function that asserts."""

from bilevel.testing.laws.alarms import ALARMS
from bilevel.testing.laws.answers import ANSWERS
from bilevel.testing.laws.base import Law, LawRow
from bilevel.testing.laws.calibration import CALIBRATION
from bilevel.testing.laws.invariance import INVARIANCE
from bilevel.testing.laws.optimizers import OPTIMIZERS
from bilevel.testing.laws.reading import READING
from bilevel.testing.laws.reports import REPORTS
from bilevel.testing.laws.resting import RESTING
from bilevel.testing.laws.settling import SETTLING
from bilevel.testing.laws.state import STATE
from bilevel.testing.laws.surroundings import SURROUNDINGS

_OF_ANSWERS = (*ANSWERS, *REPORTS, *INVARIANCE, *STATE)
_OF_USE = (*OPTIMIZERS, *READING, *SURROUNDINGS, *ALARMS, *SETTLING, *RESTING, *CALIBRATION)
LAWS = (*_OF_ANSWERS, *_OF_USE)

__all__ = [
    "ALARMS",
    "ANSWERS",
    "CALIBRATION",
    "INVARIANCE",
    "LAWS",
    "OPTIMIZERS",
    "READING",
    "REPORTS",
    "RESTING",
    "SETTLING",
    "STATE",
    "SURROUNDINGS",
    "Law",
    "LawRow",
]

"""The laws that every right hypergradient obeys, each a function that asserts."""

from bilevel.testing.laws.answers import ANSWERS
from bilevel.testing.laws.base import Law, LawRow
from bilevel.testing.laws.invariance import INVARIANCE
from bilevel.testing.laws.reports import REPORTS
from bilevel.testing.laws.state import STATE

LAWS = (*ANSWERS, *REPORTS, *INVARIANCE, *STATE)

__all__ = ["LAWS", "Law", "LawRow"]

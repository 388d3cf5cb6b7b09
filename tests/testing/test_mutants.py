"""The suite tests itself: every law catches a defect that was planted for it, within its default budget."""

import pytest

from bilevel.testing import check_response
from bilevel.testing.laws import LAWS

from .mutants import MUTANTS
from .surrounded import BROKEN, MET

BY_NAME = {law.name: law for law in LAWS}


# Caught late: the others take a second or two.
LATE = {"diagonal only", "first player only", "first chunk only", "no second derivative", "first leaf only"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LATE else ()) for name in MUTANTS]
)
def test_a_planted_defect_is_caught_by_its_law(name, record_property):
    law, mutant = MUTANTS[name]
    report = check_response(mutant, laws=[BY_NAME[law]], raises=False)
    record_property("planted defects and the laws that caught them", f"{name:28s} {'ESCAPED' if report else law}")
    assert not report, str(report)
    (row,) = report.rows
    assert "raised" not in row.note or name in {"detached path"}, str(report)  # by its answer, not by a crash
    assert row.game


def test_every_law_has_a_defect_of_its_own():
    assert {law for law, *_ in (*MUTANTS.values(), *MET.values(), *BROKEN.values())} == set(BY_NAME)
    assert len(MUTANTS) >= 20

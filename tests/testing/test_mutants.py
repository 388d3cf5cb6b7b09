"""The suite tests itself: every law catches a defect that was planted for it, within its default budget."""

import pytest

from bilevel.testing import check_response
from bilevel.testing.laws import LAWS

from .mutants import MUTANTS

BY_NAME = {law.name: law for law in LAWS}


@pytest.fixture(scope="module")
def caught(summaries):
    """Defect -> the law that caught it, or ESCAPED; told at the end of the run."""
    found = {}
    yield found
    if len(found) == len(MUTANTS):
        score = sum(law != "ESCAPED" for law in found.values())
        told = [f"  {name:28s} {law}" for name, law in found.items()]
        summaries["mutation score"] = [f"{score} of {len(MUTANTS)} planted defects caught", *told]


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_defect_is_caught_by_its_law(name, caught):
    law, mutant = MUTANTS[name]
    report = check_response(mutant, laws=[BY_NAME[law]], raises=False)
    caught[name] = "ESCAPED" if report else law
    assert not report, str(report)
    (row,) = report.rows
    assert "raised" not in row.note or name in {"detached path"}, str(report)  # by its answer, not by a crash
    assert row.game


def test_every_law_has_a_defect_of_its_own():
    assert {law for law, _ in MUTANTS.values()} == set(BY_NAME)
    assert len(MUTANTS) >= 20

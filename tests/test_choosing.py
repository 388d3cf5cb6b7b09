"""docs/choosing.md says what docs/choosing/comparison.json says, and that is of the present suite."""

import re
from pathlib import Path

import pytest

import bilevel as bl
from bilevel.comparison.identity import described
from games.compare.suite import cases, responses

ROOT = Path(__file__).resolve().parents[1]
BADLY = {"ill-conditioned", "digits", "mnist"}


@pytest.fixture(scope="module")
def found():
    return bl.comparison.Comparison.from_json(ROOT / "docs/choosing/comparison.json")


@pytest.fixture(scope="module")
def measured(found):
    return {(s.response, s.game): s for s in found.summaries}


def test_the_tables_are_the_files(page_script):
    page = (ROOT / "docs/choosing.md").read_text(encoding="utf-8")
    assert page_script("choosing").told(page) == page, "run python docs/figures/choosing.py"
    assert "| implicit CG |" in page
    for name in re.findall(r"\]\((choosing/[\w.]+)\)", page):
        assert (ROOT / "docs" / name).exists(), name


def test_the_file_is_of_the_present_suite(found):
    suite = cases()
    assert list(found.games) == list(suite)
    wanted = {
        name: {game: described(response) for game, response in given.items()}
        for name, given in responses(suite).items()
    }
    assert found.settings["responses"] == wanted, "run bilevel compare --output docs/choosing"
    assert found.settings["optimizer"] == {game: described(case.optimizer) for game, case in suite.items()}
    assert all(row.failure is None for row in found.rows)


# The page's words, one test each -------------------------------------------------------------------------------------


def test_conjugate_gradients_are_right_everywhere_for_the_least_work(found, measured):
    for game in found.games:
        best = measured["implicit CG", game]
        assert best.error.median < 1e-4
        for name in found.responses:
            if measured[name, game].error.median < 1e-4:
                assert best.work.median <= measured[name, game].work.median


def test_unrolling_takes_the_most_memory_and_truncation_less(found, measured):
    for game in found.games:
        most = max(found.responses, key=lambda name: measured[name, game].memory.median)
        assert most == "unrolled"
        assert measured["truncated", game].memory.median < 0.5 * measured["unrolled", game].memory.median
        assert measured["truncated", game].error.median > measured["unrolled", game].error.median


def test_neumann_is_close_where_conditioning_is_good_only(found, measured):
    for game in found.games:
        error = measured["implicit Neumann", game].error.median
        assert error > 0.5 if game in BADLY else error < 1e-3


def test_the_identity_is_cheap_and_rough(found, measured):
    for game in found.games:
        assert 0.1 <= measured["implicit identity", game].error.median <= 1.0
        least = min(found.responses, key=lambda name: measured[name, game].total.median)
        assert least == "implicit identity" or game in BADLY


def test_a_learned_map_is_the_dearest_from_scratch(found, measured):
    for game in found.games:
        assert max(found.responses, key=lambda name: measured[name, game].work.median) == "hypernetwork"


def test_values(found, measured):
    for game in found.games:
        best = measured["implicit CG", game].value.median
        if game not in BADLY:
            for name in ("unrolled", "implicit Neumann", "implicit Nyström"):
                assert measured[name, game].value.median == pytest.approx(best, rel=0.02)
        else:
            assert all(measured[name, game].value.median >= best for name in found.responses)


def test_where_bias_costs_the_value(measured):
    for name in ("hypernetwork", "implicit Neumann"):
        assert (
            measured[name, "ill-conditioned"].value.median > 5 * measured["implicit CG", "ill-conditioned"].value.median
        )


def test_unrolling_is_exact_where_conditioning_is_good_at_a_price(found, measured):
    for game in found.games:
        if game not in BADLY:
            assert measured["unrolled", game].error.median < 1e-3
            assert measured["unrolled", game].work.median >= 2.5 * measured["implicit CG", game].work.median
        else:
            assert measured["unrolled", game].error.median > 0.1

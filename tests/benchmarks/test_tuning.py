"""docs/search.md says what its files say, the files are of these settings, and what is tuned is what is trained."""

import json
import math
import statistics
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

import bilevel as bl
from benchmarks.tuning.__main__ import (
    CHOOSING,
    CHOSEN,
    FORGETS,
    METHODS,
    OWN,
    PROBLEMS,
    SEEDS,
    SHARE,
    STARTS,
    best,
    started,
)
from benchmarks.tuning.ours import settings
from benchmarks.tuning.problems import many, ten
from benchmarks.tuning.search import TRIALS

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def script(page_script):
    return page_script("tuning")


@pytest.fixture(scope="module")
def found(script):
    return script.read("results")


def test_the_tables_are_the_files(script):
    page = (DOCS / "search.md").read_text(encoding="utf-8")
    assert script.told(page) == page, "run python docs/figures/tuning.py"
    assert "](search/curves.png)" in page
    assert (DOCS / "search/curves.png").exists()


def test_the_file_is_whole_and_of_these_settings(script, found):
    assert found["trials"] == TRIALS
    assert found["settings"] == {" ".join(key): asdict(setting) for key, setting in CHOSEN.items()}
    methods = (*script.LOOKS, script.OWN, "start")
    for problem in PROBLEMS:
        runs = script.by_method(found, problem, methods)
        assert set(runs) == set(methods) - (set() if problem == "ten" else {FORGETS})
        assert {len(results) for results in runs.values()} == {len(SEEDS)}
    assert {result["failure"] for result in found["results"].values()} == {None}


def test_what_was_chosen_is_what_other_seeds_found_best():
    choice = json.loads((DOCS / "search/choice.json").read_text(encoding="utf-8"))["results"]
    assert not {*CHOOSING, *STARTS["ten"]} & set(SEEDS)
    assert best(choice) == CHOSEN
    for problem in PROBLEMS:
        for method in METHODS:
            for i, setting in enumerate(settings(problem, method)):
                tries = [choice[f"{problem} {method} {i} {s} {s}"] for s in CHOOSING]
                if problem == "ten":
                    tries = [choice[f"ten {method} {i} {start} {s}"] for s in CHOOSING for start in STARTS["ten"]]
                assert all(found["setting"] == asdict(setting) for found in tries)


def test_ours_spend_a_twentieth_and_all_start_alike(script, found):
    for problem in PROBLEMS:
        runs = script.by_method(found, problem)
        for seed in range(len(runs["TPE"])):
            whole = runs["TPE"][seed]["curve"][-1][0]
            assert whole == 200 * TRIALS
            firsts = {runs[method][seed]["curve"][0][2] for method in (*METHODS, "TPE", "random")}
            assert len(firsts) == 1, (problem, seed)
            # A linear solver that stalls measures its residual once more than was planned for.
            assert all(runs[method][seed]["curve"][-1][0] <= 1.03 * whole / SHARE for method in METHODS)


# The page's words ----------------------------------------------------------------------------------------------------


def middle(results, *path):
    """The median over the seeds of what is under these keys."""
    values = results
    for key in path:
        values = [value[key] for value in values]
    return statistics.median(values)


def test_ten_are_no_win(script, found):
    runs = script.by_method(found, "ten")
    assert script.beaten(runs["unrolled"], runs["TPE"]) == script.beaten(runs["unrolled, longer"], runs["TPE"]) == 1
    assert statistics.median(script.saved(runs["unrolled"], runs["TPE"])) < 2
    assert script.beaten(runs["implicit"], runs["TPE"]) == script.beaten(runs["hypernetwork"], runs["TPE"]) == 0
    for method in ("TPE", "Hyperband", "grid"):
        assert middle(runs[method], "standard", "test") < middle(runs["unrolled"], "standard", "test")
    assert middle(runs["grid"], "standard", "valid") < 1.03 * middle(runs["TPE"], "standard", "valid")


def test_a_leader_that_forgets_fails_less(script, found):
    runs = script.by_method(found, "ten")
    ours, usual = runs[FORGETS], runs["unrolled"]
    assert script.beaten(ours, runs["TPE"]) == 1
    assert statistics.median(script.saved(ours, runs["TPE"])) > 2
    assert middle(ours, "standard", "valid") < middle(usual, "standard", "valid") - 0.035
    assert abs(middle(ours, "standard", "test") - middle(usual, "standard", "test")) < 0.005
    worst, before = (max(run["standard"]["valid"] for run in of) for of in (ours, usual))
    assert worst < 0.615
    assert before > 0.685
    assert sum(a["standard"]["valid"] > b["standard"]["valid"] for a, b in zip(ours, usual)) == 1


def test_own_weights_beside_trainings_as_long(script, found):
    runs = script.by_method(found, "ten", ("TPE", OWN, "start"))
    assert all(run["work"] <= 200 * TRIALS / SHARE for run in runs[OWN])

    def ahead(key, part):
        return sum(ours["own"][key] < theirs[part][key] for ours, theirs in zip(runs[OWN], runs["TPE"]))

    assert (ahead("valid", "converged"), ahead("test", "converged")) == (5, 4)
    assert ahead("valid", "standard") == ahead("test", "standard") == 1
    for method, worse in (("TPE", 5), ("start", 4)):
        for key in ("valid", "test"):
            assert sum(run["converged"][key] > run["standard"][key] for run in runs[method]) == worse
    runs = script.by_method(found, "many", ("TPE", OWN))
    for part in ("standard", "converged"):
        assert middle(runs[OWN], "own", "test") < middle(runs["TPE"], part, "test")
    assert middle(runs[OWN], "own", "test") > middle(runs[OWN], "standard", "test") + 0.02


EDGE = 3
"""The seed whose decays start at the edge of the box."""


def test_many_are_a_win_on_what_is_minimised_but_from_the_edge(script, found):
    runs = script.by_method(found, "many")
    for method in METHODS:
        for search in script.SEARCHES:
            saved = script.saved(runs[method], runs[search])
            assert {ratio for seed, ratio in enumerate(saved) if seed != EDGE} == {math.inf}
        for seed, (ours, theirs) in enumerate(zip(runs[method], runs["TPE"])):
            assert seed == EDGE or ours["standard"]["valid"] < 0.55 * theirs["standard"]["valid"]
        lowest = min(middle(runs[search], "standard", "test") for search in script.SEARCHES)
        assert middle(runs[method], "standard", "test") < lowest
    valid = {method: results[EDGE]["standard"]["valid"] for method, results in runs.items()}
    assert min(valid["unrolled"], valid["implicit"]) > valid["TPE"] > valid["hypernetwork"] > valid["unrolled, longer"]


def test_many_overfit_the_validation_digits(script, found):
    runs = script.by_method(found, "many")
    for method, results in runs.items():
        gap = middle(results, "standard", "test") - middle(results, "standard", "valid")
        assert gap < 0.03 if method in script.SEARCHES else gap > 0.15, method
    brief, longer = runs["unrolled"], runs["unrolled, longer"]
    assert middle(longer, "standard", "valid") < middle(brief, "standard", "valid") - 0.03
    assert middle(longer, "standard", "test") > middle(brief, "standard", "test") - 0.01
    alone = middle(runs["grid"], "converged", "test")
    assert all(middle(runs[method], "converged", "test") > alone - 0.03 for method in METHODS)
    assert sum(middle(runs[method], "converged", "test") > alone for method in METHODS) >= 2
    for results in runs.values():
        for ours, both in zip(results, runs["grid"]):
            assert both["both"]["test"] < ours["standard"]["test"]
            assert both["both"]["accuracy"] > ours["standard"]["accuracy"]


def test_in_seconds_the_factor_is_smaller(script, found):
    for problem in PROBLEMS:
        runs = script.by_method(found, problem)
        ends = {method: [run["curve"][-1] for run in runs[method]] for method in ("unrolled", "TPE")}
        dearer = middle(ends["unrolled"], 1) / middle(ends["unrolled"], 0)
        assert 1.5 < dearer / (middle(ends["TPE"], 1) / middle(ends["TPE"], 0)) < 3.0


@pytest.mark.parametrize("made", [ten, many])
def test_the_game_is_the_training(made):
    """The hypergradient of steps of the game is the slope of the trials' own training, in every hyperparameter."""
    sgd = partial(torch.optim.SGD, lr=0.05)
    problem = replace(made(0, dtype=torch.float64), optimizer=sgd)
    start = started(problem, 0).double().requires_grad_()
    game, response = problem.game(start.detach()), bl.Unrolled(sgd, steps=4)
    weights, _ = response(game, {"hyper": start}, response.init(game))
    (slope,) = torch.autograd.grad(problem.loss(weights, problem.digits.valid), start)

    def value(coordinates):
        return problem.valid_loss(problem.values(coordinates), steps=4)

    directions = torch.eye(10).double() if made is ten else torch.randn(3, problem.size, dtype=torch.float64)
    for direction in directions:
        # Central differences: an error of eps^2 times the third derivative, and of rounding 1e-16 / eps.
        wanted = (value(start.detach() + 1e-4 * direction) - value(start.detach() - 1e-4 * direction)) / 2e-4
        assert wanted != 0.0
        assert float(slope @ direction) == pytest.approx(wanted, rel=1e-4, abs=1e-10)


def test_nothing_leaves_its_box():
    problem = ten(0)
    far = torch.tensor([-100.0, 100.0]).repeat(5)
    torch.testing.assert_close(problem.values(far), torch.where(far < 0, problem.low, problem.high))
    inside = problem.low + 0.3
    torch.testing.assert_close(problem.values(problem.coordinates(inside)), inside)

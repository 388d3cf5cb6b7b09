"""docs/search.md says what its files say, the files are of these settings, and what is tuned is what is trained."""

import importlib.util
import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch

import bilevel as bl
from benchmarks.tuning.__main__ import CHOOSING, CHOSEN, METHODS, PROBLEMS, SEEDS, SHARE, best, started
from benchmarks.tuning.ours import settings
from benchmarks.tuning.problems import many, ten
from benchmarks.tuning.search import TRIALS

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("tuning_figures", DOCS / "figures/tuning.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    for problem in PROBLEMS:
        for method, results in script.by_method(found, problem).items():
            assert len(results) == len(SEEDS), (problem, method)
            assert [result["failure"] for result in results] == [None] * len(SEEDS), (problem, method)


def test_what_was_chosen_is_what_other_seeds_found_best():
    choice = json.loads((DOCS / "search/choice.json").read_text(encoding="utf-8"))["results"]
    assert not set(CHOOSING) & set(SEEDS)
    assert best(choice) == CHOSEN
    for problem in PROBLEMS:
        for method in METHODS:
            for i, setting in enumerate(settings(method)):
                assert choice[f"{problem} {method} {i} {CHOOSING[0]}"]["setting"] == asdict(setting)


def test_ours_spend_a_twentieth_and_all_start_alike(script, found):
    for problem in PROBLEMS:
        runs = script.by_method(found, problem)
        for seed in SEEDS:
            whole = runs["TPE"][seed]["curve"][-1][0]
            assert whole == 200 * TRIALS
            firsts = {runs[method][seed]["curve"][0][2] for method in (*METHODS, "TPE", "random")}
            assert len(firsts) == 1, (problem, seed)
            assert all(runs[method][seed]["curve"][-1][0] <= whole / SHARE for method in METHODS)


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

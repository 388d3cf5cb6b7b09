"""Implicit, unrolled and learned responses at equal work: the truth they are held against, and the figure."""

from __future__ import annotations

import pytest
import torch

import bilevel as bl
from games.experiments.data import DigitSource
from games.experiments.experiment import Result
from games.paper.exact import best_response
from games.paper.implicit import (
    CLASSES,
    EXPERIMENT,
    METHODS,
    SIZES,
    at_kink,
    constant_penalties,
    draw,
    excess,
    from_scratch,
    hypergradient,
    last_within,
    responses,
    run_name,
    slopes,
    summarize,
    tuned,
)
from games.paper.seed_game import seed_game, valid_loss
from games.paper.truth import best_on_grid, float64_digits, of_class, true_loss, true_slope

DECAYS = {1: torch.tensor(0.5, dtype=torch.float64), CLASSES: torch.linspace(-1.0, 1.5, 10, dtype=torch.float64)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("response", "rtol"),
    [
        # Curvatures of .5 and more make a gradient of 1e-8 (of 30 at the start) an answer right to 1e-6; the truth's
        # own central difference, of step 1e-4 on numbers of size 2, leaves 1e-8 + 1e-16 / 1e-4 on slopes over .01.
        (bl.Implicit(bl.Scipy("L-BFGS-B"), 5000, 1e-8, bl.ConjugateGradient(rtol=1e-9)), 1e-5),
        (from_scratch("unrolled", 1, 1500), 1e-5),
    ],
)
def test_hypergradients_are_those_of_retraining(size: int, response: bl.Response, rtol: float) -> None:
    digits, train, valid = float64_digits(DigitSource(), 0)
    game = seed_game(digits.train, digits.valid, start=DECAYS[size])
    slope, work = hypergradient(response, game, DECAYS[size])
    truth = true_slope(DECAYS[size], train, valid)
    assert slope.dtype == torch.float64 and work > 0
    assert float((slope - truth).norm() / truth.norm()) < rtol


def test_at_the_kink_the_truth_is_flat_and_the_theorem_does_not_apply() -> None:
    digits, train, valid = float64_digits(DigitSource(), 0)
    decay = torch.full((CLASSES,), 3.5, dtype=torch.float64)
    assert all(not bool(weight.any()) for weight in best_response(decay, train).values())
    assert not bool(true_slope(decay, train, valid).any())
    game = seed_game(digits.train, digits.valid, start=decay)
    with pytest.warns(bl.errors.NonConvergenceWarning, match="wanted 0.001"):
        slope, _ = hypergradient(responses(CLASSES)["implicit"], game, decay)
    assert float(slope.norm()) > 0.1
    told = at_kink(DigitSource(), penalty=3.5, seed=0)
    assert told["truth"] == 0.0 and "NonConvergenceWarning" in told["told"]["implicit"]


def test_the_classes_are_problems_of_their_own() -> None:
    _, train, valid = float64_digits(DigitSource(), 0)
    weights = best_response(DECAYS[CLASSES], train)
    each = [valid_loss(of_class(weights, c), (valid[0], valid[1][:, [c]])) for c in range(CLASSES)]
    assert float(torch.stack(each).mean()) == pytest.approx(float(valid_loss(weights, valid)), rel=1e-12)
    alone = DECAYS[CLASSES].clone()
    alone[3] += 1.0
    moved = best_response(alone, train)
    torch.testing.assert_close(of_class(moved, 4)["weight"], of_class(weights, 4)["weight"])


def test_the_least_is_below_its_neighbours() -> None:
    _, train, valid = float64_digits(DigitSource(), 0)
    found = best_on_grid(DigitSource(), size=CLASSES, seed=0, count=23)
    best = found["decay"]
    for index in (1, 5):
        for step in (-0.5, 0.5):
            other = best.clone()
            other[index] += step
            assert true_loss(other, train, valid) > found["valid"]


def test_starts_have_the_size_that_is_asked_for() -> None:
    assert constant_penalties(1, 0.5).shape == () and constant_penalties(CLASSES, 0.5).tolist() == [0.5] * CLASSES
    assert last_within([1.0, 2.0, 3.0], [9.0, 8.0, 7.0], 2.5) == 8.0


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """One short run of each method, in the place of every start and seed."""
    found: dict[str, Result] = {}
    for size in SIZES:
        found["kink"] = {"truth": 0.0, "told": dict.fromkeys(METHODS, "nothing")}
        bests = best_on_grid(DigitSource(), size=size, seed=0, count=12)
        curves = {
            method: tuned(DigitSource(), size=size, method=method, steps=2, start=0.0, seed=0) for method in METHODS
        }
        for part in EXPERIMENT.parts:
            if part.run is best_on_grid and part.settings["size"] == size:
                found[part.name] = bests
            elif part.run is tuned and part.settings["size"] == size:
                found[part.name] = curves[part.settings["method"]]
    for part in EXPERIMENT.parts:
        if part.run is slopes:
            curve = {"work": [10, 20], "error": [0.5, 0.25], "cosine": [1.0, 1.0]}
            found[part.name] = {"curves": [curve]}
    return found


def test_a_run_tells_work_and_true_loss(results: dict[str, Result]) -> None:
    for method in METHODS:
        run = results[run_name(1, method, -1.0, 0)]
        assert run["work"] == sorted(run["work"]) and len(run["work"]) == len(run["valid"]) == 3
        assert run["valid"][-1] == pytest.approx(true_loss(run["end"], *float64_digits(DigitSource(), 0)[1:]))
        work, above = excess(results, 1, method, -1.0, 0)
        assert work == run["work"] and all(value > 0 for value in above)


def test_the_figure_and_its_line(results: dict[str, Result]) -> None:
    figure = draw(results)
    panels = figure.axes
    assert len(panels) == 4 and {axes.get_xlabel() for axes in panels} == {"gradients + Hessian-vector products"}
    assert [text.get_text() for text in figure.legends[0].texts] == list(METHODS)
    line = summarize(results)
    assert "\n" not in line and "1 penalty" in line and "hypergradient's error 0.25" in line

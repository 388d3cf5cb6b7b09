"""Figure 3: slopes against closed forms, and what is drawn and said of a short run."""

import copy
import math
from dataclasses import replace

import pytest
import torch

import bilevel as bl
from games.experiments.data import DigitSource
from games.experiments.store import as_json
from games.paper import figure3, figure3_games


@pytest.fixture(scope="module")
def results():
    settings = {"scale": 0.1, "fits": 300, "points": 29}
    return {
        "synthetic": figure3.synthetic(DigitSource(), centre=0.0, **settings),
        "real": figure3.real(DigitSource(), centre=-2.0, seed=0, **settings),
    }


@pytest.fixture(scope="module")
def written(results):
    """As a file holds them: lists, of seven digits."""
    return as_json(results)


def test_the_fitted_line_minimises_the_expected_loss_it_was_fitted_to():
    """Under lambda ~ N(0, s^2) the least-squares slope is E[cos(lambda + pi)] = -exp(-s^2/2)."""
    scale = 0.8
    game = figure3_games.sine_game(0.0)
    # The fit is a mean over 2 x 64 draws a step, its rate falling to 0: the slope's own noise is below .01.
    response = bl.Hypernetwork(
        figure3.linear_response(0.0, scale, 600).optimizer,
        scale=scale,
        warmup=600,
        steps=0,
        sampler=replace(figure3.linear_response(0.0, scale, 600).sampler, count=64),
        scheduler=figure3.linear_response(0.0, scale, 600).scheduler,
        tolerance=None,
    )
    hyper = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    weights, _ = response(game, {"hyper": hyper}, response.init(game))
    (slope,) = torch.autograd.grad(weights, hyper)
    assert slope.item() == pytest.approx(-math.exp(-(scale**2) / 2), abs=0.02)


def test_exact_response_of_the_sine_game_is_the_sine(results):
    sine = results["synthetic"]
    hypers, weights = sine["hypers"], sine["exact"]["weights"][:, 0]
    # The game is stationary to 1e-8 of its gradient at the start, and the loss's second derivative is 2.
    assert torch.allclose(weights, torch.sin(hypers + torch.pi), rtol=0, atol=1e-7)
    assert sine["exact"]["slope"].item() == pytest.approx(-1.0, abs=1e-7)
    assert sine["exact"]["end"]["hyper"].item() == pytest.approx(math.pi / 2, abs=1e-3)
    assert sine["exact"]["end"]["valid"].item() == pytest.approx(math.sin(-1.0), abs=1e-6)


def test_learned_line_has_the_slope_and_the_optimum_that_it_must_have(results):
    learned = results["synthetic"]["learned"]
    slope = learned["slope"][0]
    assert abs(slope + 1.0) <= 0.05
    # sin(slope * lambda) is least where the line reaches -pi/2.
    intercept = learned["end"]["weights"][0] - slope * learned["end"]["hyper"]
    assert learned["end"]["hyper"].item() == pytest.approx(float((-math.pi / 2 - intercept) / slope), abs=2e-3)
    assert learned["residual"] < 0.05


def test_ridge_response_and_its_slope_against_the_normal_equations(results):
    real = results["real"]
    (inputs, targets), _, _ = figure3_games.patients(seed=0)
    gram, pull = inputs.T @ inputs / len(targets), inputs.T @ targets / len(targets)

    def solved(hyper):
        return torch.linalg.solve(gram + hyper.exp() * torch.eye(2, dtype=torch.float64), pull)

    hypers = real["hypers"]
    exact = torch.stack([solved(hyper) for hyper in hypers])
    assert torch.allclose(real["exact"]["weights"], exact, rtol=0, atol=1e-6)
    slope = torch.func.jacrev(solved)(torch.tensor(-2.0, dtype=torch.float64))
    assert torch.allclose(real["exact"]["slope"], slope, rtol=0, atol=1e-6)
    assert figure3.slope_error(as_json(real)) < 0.1
    # The leader's end is the least point of the curve, to the grid's spacing.
    best = hypers[real["exact"]["valid"].argmin()]
    assert abs(real["exact"]["end"]["hyper"] - best) <= hypers[1] - hypers[0]


def test_second_weight_is_where_its_own_gradient_vanishes():
    train, _, _ = figure3_games.patients(seed=0)
    hyper, first = torch.tensor([-1.0, 0.5], dtype=torch.float64), torch.tensor([0.3, -0.2], dtype=torch.float64)
    second = figure3.second_weight(hyper, first, train).requires_grad_()
    for row in range(2):
        loss = figure3_games.train_loss(hyper[row], torch.stack([first[row], second[row]]), train)
        assert torch.autograd.grad(loss, second)[0][row].abs() < 1e-12


def test_patients_are_split_once():
    parts = figure3_games.patients(seed=1)
    assert [len(part[1]) for part in parts] == [12, 200, 230]
    rows = torch.cat([torch.column_stack(part) for part in parts])
    assert torch.allclose(rows.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-12)


def test_the_line_says_when_the_slope_is_missed(written):
    assert ", within .05 of -1" in figure3.summarize(written)
    wrong = copy.deepcopy(written)
    wrong["synthetic"]["learned"]["slope"] = [-1.2]
    assert "NOT within .05 of -1" in figure3.summarize(wrong)


def test_figure_has_four_surfaces_and_two_profiles(written):
    axes = figure3.draw(written).axes
    assert [a.name for a in axes] == ["3d", "3d", "rectilinear"] * 2
    assert all(a.get_xlabel() and a.get_ylabel() for a in axes)

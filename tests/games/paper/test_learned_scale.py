"""The learned scale of p(lambda): what its game's gradients are, and the figure."""

from __future__ import annotations

import math

import pytest
import torch

import bilevel as bl
from games.experiments.data import DigitSource
from games.experiments.experiment import Result
from games.paper.converged import cross_validated, evenly_spaced
from games.paper.exact import best_response
from games.paper.learned_scale import (
    CASES,
    DRAWS,
    EXPERIMENT,
    Leader,
    Map,
    Noisy,
    case_name,
    draw,
    leader_loss,
    noisy_game,
    response_loss,
    scale_of,
    summarize,
    tuned,
)
from games.paper.seed_game import train_loss, valid_loss
from games.paper.truth import float64_digits, true_slope

PAIR = torch.tensor([1.0, -1.0], dtype=torch.float64)  # its mean square is 1, as the normal's


def leader(mean: float, scale: float) -> Leader:
    rho = math.log(math.expm1(scale))
    return {key: torch.tensor(v, dtype=torch.float64, requires_grad=True) for key, v in (("mean", mean), ("rho", rho))}


def exact_map(mean: float, step: float = 1e-4) -> Map:
    """The best response at `mean` and its slope, by retraining on both sides."""
    _, train, _ = float64_digits(DigitSource(), 0)
    points = (torch.tensor(mean + move, dtype=torch.float64) for move in (-step, 0.0, step))
    low, here, high = (best_response(point, train) for point in points)
    return {"value": here, "slope": {name: (high[name] - low[name]) / (2 * step) for name in here}}


def test_the_leaders_gradient_is_that_of_retraining_when_the_map_is_right() -> None:
    _, train, valid = float64_digits(DigitSource(), 0)
    player = leader(0.5, 1e-4)
    loss = leader_loss(player, exact_map(0.5), (PAIR, valid), 0.0)
    (slope,) = torch.autograd.grad(loss, player["mean"])
    truth = true_slope(torch.tensor(0.5, dtype=torch.float64), train, valid)
    # Both slopes are central differences of step 1e-4 in float64: errors of 1e-8 on .026, and sigma^2 of 1e-8.
    assert float(slope) == pytest.approx(float(truth), rel=1e-5)


def test_the_scale_settles_at_the_root_of_temperature_over_curvature() -> None:
    _, _, valid = float64_digits(DigitSource(), 0)
    response, temperature = exact_map(0.5), 1e-3

    def along(move: torch.Tensor) -> torch.Tensor:
        return valid_loss({n: response["value"][n] + move * response["slope"][n] for n in response["value"]}, valid)

    curvature = float(torch.func.grad(torch.func.grad(along))(torch.tensor(0.0, dtype=torch.float64)))
    for scale, sign in ((0.9, -1.0), (1.0, 0.0), (1.1, 1.0)):
        player = leader(0.5, scale * math.sqrt(temperature / curvature))
        loss = leader_loss(player, response, (PAIR, valid), temperature)
        (slope,) = torch.autograd.grad(loss, player["rho"])
        # The loss is quadratic along the map, so that the formula is exact up to rounding.
        assert float(slope) == pytest.approx(0.0, abs=1e-10) if sign == 0.0 else float(slope) * sign > 1e-6


def test_the_response_is_fitted_where_the_leader_draws() -> None:
    _, train, _ = float64_digits(DigitSource(), 0)
    response, player = exact_map(0.5), leader(0.5, 0.3)
    each = [
        train_loss(
            torch.tensor(0.5 + move, dtype=torch.float64),
            {name: response["value"][name] + move * response["slope"][name] for name in response["value"]},
            train,
        )
        for move in (0.3, -0.3)
    ]
    assert float(response_loss(player, response, (PAIR, train)).detach()) == pytest.approx(
        float(sum(each)) / 2, rel=1e-12
    )


def test_noise_is_paired_and_repeats_with_the_seed() -> None:
    digits, train, _ = float64_digits(DigitSource(), 0)
    game = noisy_game(digits, mean=1.0, scale=0.5, temperature=0.0, seed=0)
    (noise, _), position = game.draw("leader", game.start("leader", 3))
    (again, _), _ = game.draw("leader", game.start("leader", 3))
    (later, _), _ = game.draw("leader", position)
    assert noise.shape == (DRAWS,) and abs(float(noise.sum())) < 1e-5
    assert torch.equal(noise, again) and not torch.equal(noise, later)
    assert float(scale_of(game.initial("leader"))) == pytest.approx(0.5)
    rows = torch.stack([row for row, _ in Noisy((train,), 4)])
    assert rows.shape == (100, 4) and bool((rows.sum(dim=1).abs() < 1e-12).all())


@pytest.mark.parametrize(("scale", "temperature"), [(0.0, 0.0), (-1.0, 0.0), (0.5, -1.0), (float("nan"), 0.0)])
def test_bad_settings_are_refused(scale: float, temperature: float) -> None:
    digits, _, _ = float64_digits(DigitSource(), 0)
    with pytest.raises(ValueError, match="expected above 0"):
        noisy_game(digits, mean=1.0, scale=scale, temperature=temperature, seed=0)


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """Short runs: one held, one learned, in the place of every start."""
    runs = {
        learned: tuned(DigitSource(), start=1.0, scale=0.5, temperature=0.01 * learned, warmup=5, steps=20, seed=0)
        for learned in (False, True)
    }
    truth = cross_validated(DigitSource(), values=evenly_spaced(5), seed=0)
    found: dict[str, Result] = {"cross-validation": {**truth, "valid": truth["valid"].tolist()}}
    return found | {case_name(*case): runs[case[1] > 0.0] for case in CASES}


def test_temperature_zero_holds_the_scale(results: dict[str, Result]) -> None:
    held, learned = results[case_name(0.5, 0.0, -1.0)], results[case_name(0.5, 1e-3, -1.0)]
    assert held["scales"][-1] == pytest.approx(0.5) and held["end"] != 1.0
    assert learned["scale"] != pytest.approx(0.5, abs=1e-3)
    assert held["gradients"] == 2 * (5 + 20)


def test_the_figure_and_its_line(results: dict[str, Result]) -> None:
    assert set(results) == {part.name for part in EXPERIMENT.parts}
    figure = draw(results)
    assert [axes.get_xlabel() for axes in figure.axes] == ["step of the leader"] * 2 + ["initial scale σ"]
    line = summarize(results)
    assert "\n" not in line and "held at 0.06" in line and "learned at τ=0.01" in line
    assert isinstance(
        noisy_game(float64_digits(DigitSource(), 0)[0], mean=0.0, scale=1.0, temperature=0.0, seed=0), bl.Game
    )

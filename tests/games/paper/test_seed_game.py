"""The paper's game and its exact best response."""

import math

import pytest
import torch

import bilevel as bl
from games.experiments.data import Split
from games.paper.exact import best_response, stationarity
from games.paper.seed_game import batch_of, likelihood_loss, penalty, seed_game, train_loss

D = torch.float64


@pytest.fixture(scope="module")
def splits():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 20, generator=generator, dtype=D)
    labels = torch.arange(40) % 10
    return Split(images[:10], labels[:10]), Split(images[10:], labels[10:])


def test_the_loss_is_a_gaussian_likelihood(splits):
    train, _ = splits
    batch = batch_of(train)
    weights = {"weight": torch.randn(20, 10, dtype=D), "bias": torch.randn(10, dtype=D)}
    normal = torch.distributions.Normal(train.images @ weights["weight"] + weights["bias"], 0.1)
    torch.testing.assert_close(likelihood_loss(weights, batch), -normal.log_prob(batch[1]).mean())


def test_the_penalty_is_a_norm_biases_included():
    weights = {"weight": torch.full((2, 3), 1.0, dtype=D), "bias": torch.full((3,), 2.0, dtype=D)}
    torch.testing.assert_close(penalty(torch.tensor(0.0, dtype=D), weights), torch.tensor(18.0, dtype=D).sqrt())
    ones = torch.full((3,), math.log(2.0), dtype=D)
    torch.testing.assert_close(penalty(ones, weights), torch.tensor(6 * math.sqrt(6), dtype=D))


@pytest.mark.parametrize("decay", [torch.tensor(0.0), torch.tensor(1.5), torch.linspace(-3, 1.5, 10), torch.zeros(10)])
def test_the_exact_response_is_stationary_and_no_neighbour_is_better(splits, decay):
    batch = batch_of(splits[0])
    weights = best_response(decay, batch)
    assert stationarity(decay, weights, batch).max() < 1e-10
    least = train_loss(decay, weights, batch)
    generator = torch.Generator().manual_seed(1)
    for size in (1e-3, 1e-1):
        near = {k: w + size * torch.randn(w.shape, generator=generator, dtype=D) for k, w in weights.items()}
        assert train_loss(decay, near, batch) > least


def test_a_heavy_penalty_leaves_nothing_and_a_minimiser_agrees(splits):
    train, valid = splits
    heavy = best_response(torch.tensor(9.0), batch_of(train))
    assert not heavy["weight"].any() and not heavy["bias"].any()
    game = seed_game(train, valid, start=0.5)
    response = bl.Implicit(bl.Scipy("L-BFGS-B"), steps=5000, tolerance=1e-6)
    found, _ = response(game, {"decay": torch.tensor(0.5, dtype=D)}, response.init(game))
    exact = best_response(torch.tensor(0.5), batch_of(train))
    torch.testing.assert_close(found["weight"], exact["weight"], atol=1e-4, rtol=0)


def test_the_hypergradient_is_that_of_exact_responses(splits):
    train, valid = splits
    game = seed_game(train, valid, start=0.5)
    decay = torch.tensor(0.5, dtype=D, requires_grad=True)
    response = bl.Implicit(bl.ClosedForm(best_response), linear_solver=bl.linear.Dense())
    weights, _ = response(game, {"decay": decay}, response.init(game))
    (found,) = torch.autograd.grad(likelihood_loss(weights, batch_of(valid)), decay)
    above, below = (
        likelihood_loss(best_response(torch.tensor(0.5 + e, dtype=D), batch_of(train)), batch_of(valid))
        for e in (1e-5, -1e-5)
    )
    # The difference quotient is right to 1e-10 from its step and 1e-16/1e-5 from rounding.
    torch.testing.assert_close(found, (above - below) / 2e-5, rtol=1e-6, atol=1e-9)

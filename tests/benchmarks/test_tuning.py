"""What is tuned is what is trained, and hyperparameters stay in their box."""

from dataclasses import replace
from functools import partial

import pytest
import torch

import bilevel as bl
from benchmarks.tuning.__main__ import started
from benchmarks.tuning.evaluations import Evaluations, compressed, evaluated, quicker
from benchmarks.tuning.problems import many, ten


@pytest.mark.slow
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


@pytest.mark.slow
def test_nothing_leaves_its_box():
    problem = ten(0)
    far = torch.tensor([-100.0, 100.0]).repeat(5)
    torch.testing.assert_close(problem.values(far), torch.where(far < 0, problem.low, problem.high))
    inside = problem.low + 0.3
    torch.testing.assert_close(problem.values(problem.coordinates(inside)), inside)


@pytest.mark.slow
def test_an_evaluation_has_the_slope_of_its_compressed_training():
    problem = replace(ten(0, dtype=torch.float64), optimizer=partial(torch.optim.SGD, lr=0.02))
    setting = Evaluations(3, steps=4, speed=3.0, backprop=4)
    values = 0.5 * (problem.low + problem.high)
    loss, slope = compressed(problem, values, setting)
    fast = quicker(problem, setting)
    assert loss == pytest.approx(fast.valid_loss(values), rel=1e-12)
    for direction in torch.eye(10, dtype=torch.float64):
        # As above.
        wanted = (fast.valid_loss(values + 1e-4 * direction) - fast.valid_loss(values - 1e-4 * direction)) / 2e-4
        assert float(slope @ direction) == pytest.approx(wanted, rel=1e-4, abs=1e-10)


@pytest.mark.slow
def test_the_search_by_slopes_counts_its_steps_and_stays_in_the_box():
    problem = ten(0)
    curve, values, losses = evaluated(problem, started(problem, 0), Evaluations(2, steps=3, speed=2.0, backprop=2), 0)
    # 3 steps, a product for each of the last 2, and a gradient of the validation loss, twice; and the real training.
    assert curve[-1][0] == 2 * 6 + 200
    assert curve[-1][2] == problem.valid_loss(values)
    assert len(losses) == 2
    assert bool(((values >= problem.low) & (values <= problem.high)).all())

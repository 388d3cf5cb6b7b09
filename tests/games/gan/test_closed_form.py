"""Adversarial games with known answers: the discriminator's exact response, learned; the Dirac-GAN's rotation."""

import math
from functools import partial

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import bilevel as bl
from bilevel.dynamics import Field
from games.gan.closed_form import dirac_game, exact_discriminator, gaussian_game

D = torch.float64


@pytest.mark.parametrize("shift", [-1.5, 0.0, 0.3, 2.0])
def test_the_discriminators_best_response_is_the_log_ratio(shift):
    game, t = gaussian_game(shift), torch.tensor(shift, dtype=D)
    # A zero of the gradient, which is known to rounding; a search by the loss ends at its square root.
    response = bl.Implicit(bl.inner.ScipyRoot(), steps=200, tolerance=1e-8)
    answer, _ = response(game, {"t": t}, response.init(game))
    assert torch.allclose(answer, exact_discriminator(t), atol=1e-6)


def test_the_generator_that_anticipates_descends_the_jensen_shannon_divergence():
    game, t = gaussian_game(), torch.tensor(0.8, dtype=D, requires_grad=True)
    response = bl.Implicit(bl.inner.ScipyRoot(), steps=200, tolerance=1e-9)
    answer, _ = response(game, {"t": t}, response.init(game))
    (found,) = torch.autograd.grad(game.loss("t", {"t": t, "discriminator": answer}), t)

    def divergence(t):
        return game.loss("t", {"t": t, "discriminator": exact_discriminator(t)})

    (wanted,) = torch.autograd.grad(divergence(t), t)
    assert float(found) == pytest.approx(float(wanted), abs=1e-8)
    solution = bl.solve(game, discriminator=response, optimizer=partial(torch.optim.SGD, lr=2.0), steps=30)
    assert abs(float(solution.variables["t"])) < 1e-6


@pytest.mark.slow
def test_the_learned_discriminator_is_the_exact_one_to_one_per_cent():
    """One map for all generators between -1.5 and 1.5, from draws of t and the discriminator's own loss."""
    game = gaussian_game()
    steps = 3000

    def draw(present, generator):
        return {"t": 3.0 * torch.rand((), generator=generator, dtype=D) - 1.5}

    learned = bl.Hypernetwork(
        partial(torch.optim.Adam, lr=1e-2),
        network=bl.networks.Uncentred(bl.networks.MLP((32,))),
        scale=1.0,
        sampler=bl.responses.Draws(draw, count=16),
        warmup=steps,
        steps=1,
        tolerance=None,
        scheduler=partial(CosineAnnealingLR, T_max=steps + 1),
    )
    state = learned.init(game)
    _, state = learned(game, {"t": torch.tensor(0.5, dtype=D)}, state)
    grid = torch.linspace(-1.5, 1.5, 31, dtype=D)
    # Inside a torch.func transform a response is a pure function of the others at its state: nothing is fitted.
    found = torch.func.vmap(lambda t: learned(game, {"t": t}, state)[0])(grid)
    wanted = torch.stack([exact_discriminator(t) for t in grid])
    assert float((found - wanted).norm() / wanted.norm()) <= 0.01


@pytest.mark.parametrize("penalty", [0.0, 0.5, 1.5])
def test_the_dirac_gan_rotates_until_it_is_penalised_enough(penalty):
    game = dirac_game(penalty)
    zero = torch.zeros((), dtype=D)

    def evaluate(point, wanted, differentiable):
        values = {name: leaves[0] for name, leaves in point.items()}
        return {
            name: list(torch.autograd.grad(game.loss(name, values), point[name], create_graph=True)) for name in wanted
        }

    jacobian = Field(evaluate, {"theta": [zero], "psi": [zero]}).linearised()
    dense = torch.stack([jacobian.matvec(unit) for unit in torch.eye(2, dtype=D)], dim=1)
    g = 2.0 * penalty
    root = complex(g * g / 4 - 1) ** 0.5
    wanted = sorted((0.5 * (g / 2 + s * root) for s in (1, -1)), key=lambda z: (z.real, z.imag))
    found = sorted((complex(z) for z in torch.linalg.eigvals(dense)), key=lambda z: (z.real, z.imag))
    for one, other in zip(found, wanted):
        assert abs(one - other) < 1e-9 + (1e-7 if g == 2.0 else 0.0)


def test_plain_play_circles_and_the_penalty_or_another_rule_ends_it():
    def distance(penalty, rule=None):
        sgd = partial(torch.optim.SGD, lr=0.2)
        ended = bl.solve(dirac_game(penalty), optimizer=sgd, steps=300, dynamics=rule).variables
        return math.hypot(*(float(v) for v in ended.values()))

    assert distance(0.0) > 0.5
    assert distance(0.0, bl.dynamics.Extragradient(0.2)) < 0.5
    assert distance(0.5) < 1e-3
    with pytest.raises(ValueError, match="penalty=-1"):
        dirac_game(-1)

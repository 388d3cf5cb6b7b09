"""Games with known answers: their answers are answers."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import bilevel as bl
import bilevel.testing as bt
from bilevel.testing import Bertrand, Cournot, strategies

D = torch.float64
QUICK = settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def repeatable(known):
    """A game's `repr` is code that makes it again."""
    return eval(repr(known), vars(bt) | {"torch": torch})


@QUICK
@given(strategies.leader_follower())
def test_best_responses_hypergradients_and_conditioning(known):
    x = known.x0
    y = known.best_response(x)
    slope = torch.func.grad(known.follower, argnums=1)(x, y)
    least, largest = known.curvature(x)
    assert slope.norm() < 1e-13
    assert 0.1 < least <= largest < 1.1
    assert known.conditioning == pytest.approx(largest / least)
    # dy/dx = -H^-1 f_yx, by another way than differentiating the closed form.
    torch.testing.assert_close(known.jacobian(x), -torch.linalg.solve(known.hessian(x), known.mixed(x)))
    h, direction = 1e-5, torch.linspace(1, -0.5, x.numel(), dtype=D)
    difference = (known.value(x + h * direction) - known.value(x - h * direction)) / (2 * h)
    slope_along = known.hypergradient(x) @ direction
    assert abs(difference - slope_along) < 1e-6 * (1 + abs(slope_along))
    second = (known.hypergradient(x + h * direction) - known.hypergradient(x - h * direction)) / (2 * h)
    torch.testing.assert_close(known.second_derivative(x) @ direction, second, rtol=1e-5, atol=1e-6)
    assert repeatable(known) == known


@QUICK
@given(strategies.laid_out(strategies.leader_follower()))
def test_layouts_play_the_same_game(known):
    game = known.game()
    x = known.leader_form.build(known.x0)
    y = known.follower_form.build(known.best_response(known.x0))
    assert game.loss("x", {"x": x, "y": y}).item() == pytest.approx(known.value(known.x0).item(), rel=1e-12)
    assert repeatable(known) == known


@QUICK
@given(strategies.quadratics() | strategies.exponentials() | strategies.cournots() | strategies.bertrands())
def test_the_leaders_equilibrium_is_stationary_and_a_minimum(known):
    x = known.equilibrium()
    assert known.hypergradient(x).norm() < 1e-9
    assert torch.linalg.eigvalsh(known.second_derivative(x))[0] > 0


@QUICK
@given(strategies.quadratics(symmetric=True))
def test_symmetric_quadratics_are_potential_games(known):
    x, y = known.x0, known.best_response(known.x0)
    ours = torch.func.jacrev(torch.func.grad(known.leader, argnums=0), argnums=1)(x, y)
    theirs = torch.func.jacrev(torch.func.grad(known.follower, argnums=1), argnums=0)(x, y)
    torch.testing.assert_close(ours, theirs.T)


@QUICK
@given(strategies.players() | strategies.saddles() | strategies.oligopolies() | strategies.trilevels())
def test_nash_is_stationary_for_everybody(known):
    game, nash = known.game(), known.nash()
    point = {name: z.clone().requires_grad_() for name, z in nash.items()}
    for name in known.names:
        (slope,) = torch.autograd.grad(game.loss(name, point), point[name])
        assert abs(slope) < 1e-12
    assert repeatable(known) == known


@pytest.mark.slow
@QUICK
@given(strategies.trilevels())
def test_trilevel_stackelberg_is_where_the_first_player_stands_still(known):
    """Solved by the library's own nesting, with exact steps: the first player's total gradient vanishes there."""
    solution = known.stackelberg()
    game = known.game()
    (first,) = [bl.Player(game.players["a"].objective, solution["a"])]
    there = bl.Game(a=first, b=game.players["b"], c=game.players["c"])
    answer = bl.Implicit(torch.optim.LBFGS, steps=20, tolerance=1e-6)
    found = bl.solve(there, b=answer, c=answer, optimizer=lambda p: torch.optim.SGD(p, lr=1e-3), steps=1)
    assert found.history[0]["gradient_norm"] < 1e-5


@QUICK
@given(strategies.saddles())
def test_saddles_are_zero_sum(known):
    game = known.game()
    point = {"a": torch.tensor(0.3, dtype=D), "b": torch.tensor(-0.7, dtype=D)}
    shift = known.shift
    linear = shift[0] * 0.3 + shift[1] * -0.7  # each player's own linear term is its own
    total = game.loss("a", point) + game.loss("b", point) - linear
    assert abs(total) < 1e-12


def test_duopolies_against_the_textbook():
    cournot = Cournot(10.0, 0.5, (1.0, 2.0))
    assert cournot.equilibrium().item() == pytest.approx((10 - 2 * 1 + 2) / 1.0)
    assert cournot.best_response(cournot.equilibrium()).item() == pytest.approx((10 + 2 * 1 - 3 * 2) / 2.0)
    first, second = cournot.nash()
    assert (first.item(), second.item()) == pytest.approx(((10 - 2 + 2) / 1.5, (10 - 4 + 1) / 1.5))
    price, same = Bertrand(2.0, 0.5, 0.25, 1.0).nash()
    assert price.item() == same.item() == pytest.approx((2.0 + 0.5) / (1.0 - 0.25))


def test_a_follower_that_curves_nowhere_is_refused():
    with pytest.raises(ValueError, match="diagonal"):
        bt.QuadraticPlayers(((0.0, 1.0), (1.0, 1.0)), (0.0, 0.0))

"""Solvers of quadratic and of linear programmes behind a constrained follower."""

import importlib.util

import pytest
import torch

import bilevel as bl

D = torch.float64
needs_proxsuite = pytest.mark.skipif(importlib.util.find_spec("proxsuite") is None, reason="proxsuite is not installed")
QP = pytest.param(bl.inner.ProxQP(), marks=needs_proxsuite, id="ProxQP")
LP = pytest.param(bl.inner.HiGHS(), id="HiGHS")


def tensor(*values):
    return torch.tensor(values, dtype=D)


def game_of(loss, start=(0.0, 0.0), lead=None, x=(2.0, 1.0), **constraints):
    lead = lead or (lambda x, y: (y * y).sum())
    return bl.Game(x=bl.Player(lead, tensor(*x)), y=bl.Player(loss, tensor(*start), **constraints))


def answer(game, inner):
    response = bl.Implicit(inner)
    x = game.initial("x").requires_grad_()
    y, state = response(game, {"x": x}, response.init(game))
    (slope,) = torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)
    return y.detach(), state, slope


def square(x, y):
    return ((y - x) ** 2).sum()


def simplex_game(*x):
    return game_of(
        square, x=x, lead=lambda x, y: tensor(2, 5) @ y, inequality=lambda y: -y, equality=lambda y: y.sum() - 1.0
    )


@pytest.mark.parametrize("inner", [QP, pytest.param(bl.Scipy("SLSQP"), id="SLSQP")])
def test_a_projection_onto_a_simplex(inner):
    """y = x - t on the entries that stay above 0, with t such that they add up to 1."""
    y, state, slope = answer(simplex_game(2.0, 1.4), inner)
    torch.testing.assert_close(y, tensor(0.8, 0.2), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(slope, tensor(-1.5, 1.5), atol=1e-12, rtol=0.0)  # (1 - 1/2 11') (2, 5)
    torch.testing.assert_close(state["multipliers"]["equality"], torch.tensor(2.4, dtype=D))  # 2 t
    with pytest.warns(bl.errors.KinkWarning, match=r"inequality\[1\]"):  # t = 1, and the second entry just at 0
        y, _, _ = answer(simplex_game(2.0, 1.0), inner)
    torch.testing.assert_close(y, tensor(1.0, 0.0), atol=1e-12, rtol=0.0)


@needs_proxsuite
def test_values_that_cancel_are_no_sign_of_a_bend():
    """At a start that keeps a balance its value and its change are rounding, as they are at the answer."""
    thirds = tensor(1 / 3, 1 / 3, 1 / 3)
    for balance in (lambda y: y.sum() - 1.0, lambda x, y: y @ tensor(0.1, 0.7, 0.2) - thirds @ tensor(0.1, 0.7, 0.2)):
        game = game_of(square, start=(1 / 3,) * 3, x=(0.9, 0.5, 0.1), equality=balance, inequality=lambda y: -y)
        y, _, _ = answer(game, bl.inner.ProxQP())
        wanted, _, _ = answer(game, bl.Scipy("SLSQP"))
        torch.testing.assert_close(y, wanted, atol=1e-12, rtol=0.0)
    with pytest.raises(TypeError, match="its equality is not affine"):
        game = game_of(square, start=(0.6, 0.8), equality=lambda y: (y * y).sum() - 1.0)
        answer(game, bl.inner.ProxQP())


@needs_proxsuite
def test_what_a_quadratic_solver_cannot_solve_is_told():
    inner = bl.inner.ProxQP()
    with pytest.raises(bl.errors.InfeasibleError, match=r"inequality\[[01]\] is .*wanted <= 0"):
        answer(game_of(square, inequality=lambda y: torch.stack([y[0] - 1.0, 2.0 - y[0]])), inner)
    with pytest.raises(bl.errors.UnboundedError, match="falls without bound"):
        answer(game_of(lambda x, y: y[0] ** 2 - (x * y).sum(), inequality=lambda y: y[0] - 1.0), inner)
    with pytest.raises(bl.errors.CurvatureError, match=r"not convex \(smallest eigenvalue -2\).*SLSQP"):
        answer(game_of(lambda x, y: (y[0] - x[0]) ** 2 - y[1] ** 2, inequality=lambda y: y.abs() - 1.0), inner)
    with pytest.raises(TypeError, match=r"its loss is not a quadratic function.*SLSQP"):
        answer(game_of(lambda x, y: ((y - x) ** 4).sum(), inequality=lambda y: y - 1.0), inner)
    with pytest.raises(TypeError, match="its inequality is not affine"):
        answer(game_of(square, inequality=lambda y: (y * y).sum() - 1.0, start=(1.0, 0.0)), inner)
    with pytest.raises(TypeError, match="has no constraints"):
        answer(game_of(square), inner)


def transport(x, y):
    return (tensor(1.0, 3.0) * y).sum() + 0.0 * x.sum()


def test_a_linear_follower_rests_at_a_vertex_and_moves_with_its_constraints():
    """Cheapest first: all of the cheap one up to its capacity x0, the rest of the demand x0 + x1 from the dear one."""
    game = game_of(
        transport,
        inequality=lambda x, y: torch.cat([-y, y[:1] - x[0]]),
        equality=lambda x, y: y.sum() - x[0] - x[1],
        lead=lambda x, y: tensor(1.0, 3.0) @ y,
    )
    y, state, slope = answer(game, bl.inner.HiGHS())
    torch.testing.assert_close(y, tensor(2.0, 1.0), atol=1e-12, rtol=0.0)
    torch.testing.assert_close(state["multipliers"]["inequality"], tensor(0.0, 0.0, 2.0))
    torch.testing.assert_close(state["multipliers"]["equality"], torch.tensor(-3.0, dtype=D))
    torch.testing.assert_close(slope, tensor(1.0, 3.0))


def test_what_a_linear_solver_cannot_solve_is_told():
    inner = bl.inner.HiGHS()
    with pytest.raises(bl.errors.InfeasibleError, match=r"equality\[[01]\] is .*wanted = 0"):
        balances = lambda y: torch.stack([y.sum() - 1.0, y.sum() - 2.0])
        answer(game_of(transport, inequality=lambda y: -y, equality=balances), inner)
    with pytest.raises(bl.errors.UnboundedError, match="falls without bound"):
        answer(game_of(transport, inequality=lambda y: y - 1.0), inner)
    with pytest.raises(TypeError, match=r"its loss is not a linear function.*ProxQP"):
        answer(game_of(square, inequality=lambda y: y - 1.0), inner)
    # Both cost the same: many optima, and a vertex that would jump.
    with pytest.raises(bl.errors.CurvatureError, match="flat along the constraints"):
        answer(
            game_of(lambda x, y: y.sum() * x[0], inequality=lambda y: -y, equality=lambda y: y.sum() - 1.0),
            inner,
        )


@pytest.mark.parametrize("inner", [QP])
def test_many_programmes_are_solved_each_by_itself(inner):
    game = simplex_game(2.0, 1.4)
    starts = torch.tensor([[2.0, 1.4], [0.0, 3.0], [1.0, 0.9]], dtype=D)
    games = bl.Games(game, 3, init={"x": starts})
    response = bl.Implicit(inner)
    x = games.initial("x").requires_grad_()
    y, _ = response(games, {"x": x}, response.init(games))
    games.loss("x", {"x": x, "y": y}).sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor([[0.8, 0.2], [0.0, 1.0], [0.55, 0.45]], dtype=D))
    torch.testing.assert_close(x.grad, torch.tensor([[-1.5, 1.5], [0.0, 0.0], [-1.5, 1.5]], dtype=D))

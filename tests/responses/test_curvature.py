"""The Gauss-Newton matrix in an implicit derivative: exact where outputs are linear, definite everywhere."""

import warnings

import pytest
import torch
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.errors import IndefiniteSystemError, SecondDerivativeError, UnreliableResponseWarning
from bilevel.responses import AllBatches, FreshBatches, GaussNewton

D = torch.float64
CG = bl.ConjugateGradient(rtol=1e-12, damping=0.0)


def data(count=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 3, generator=generator, dtype=D)
    return inputs, torch.randint(2, (count,), generator=generator)


TRAIN, VALID = data(), data(20, 1)
X = torch.tensor([-2.0], dtype=D)


# A linear model, with a penalty --------------------------------------------------------------------------------------


def linear(weights, batch):
    return batch[0] @ weights


def penalty(weights, x):
    return 0.5 * x.exp().sum() * weights.square().sum()


def loss(outputs, batch):
    return cross_entropy(outputs, batch[1])


def follow_linear(x, weights, batch):
    return loss(linear(weights, batch), batch) + penalty(weights, x)


def lead_linear(weights):
    return loss(linear(weights, VALID), VALID)


LINEAR = GaussNewton(linear, loss, penalty, bias=0.0, measure=True)


def linear_game(source):
    start = torch.zeros(3, 2, dtype=D)
    return bl.Game(x=bl.Player(lead_linear, X), weights=bl.Player(follow_linear, start, data=source))


def slope(game, response):
    state = response.init(game)
    x = X.clone().requires_grad_()
    y, after = response(game, {"x": x}, state)
    (found,) = torch.autograd.grad(game.loss("x", {"x": x, game.names[1]: y}), x)
    return found, response.report(response.after_backward(after, y)), y


def test_exact_where_outputs_are_linear():
    game = linear_game([TRAIN])
    solver = bl.Scipy("L-BFGS-B")
    exact, _, _ = slope(game, bl.Implicit(solver, tolerance=1e-6, linear_solver=CG))
    response = bl.Implicit(solver, tolerance=1e-6, linear_solver=CG, curvature=LINEAR)
    found, report, _ = slope(game, response)
    # The same matrix at the same point, solved to 1e-12; the penalty of exp(-2) bounds its inverse by 8.
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=0.0)
    assert report.error < 1e-9
    assert (response.promise.stated_bias, response.promise.of_steps) == (0.0, False)


def test_with_all_batches_and_with_fresh_ones():
    halves = [tuple(part[:6] for part in TRAIN), tuple(part[6:] for part in TRAIN)]
    whole = linear_game([TRAIN])
    weights = slope(whole, bl.Implicit(bl.Scipy("L-BFGS-B"), tolerance=1e-6))[2].detach()
    given = bl.ClosedForm(lambda x: weights + 0.0 * x)
    options = {"tolerance": None, "curvature": LINEAR}
    exact = slope(whole, bl.Implicit(given, tolerance=None, linear_solver=CG))[0]
    game = linear_game(halves)
    by_all = bl.Implicit(given, linear_solver=CG, batches=AllBatches(), **options)
    torch.testing.assert_close(slope(game, by_all)[0], exact, rtol=1e-9, atol=0.0)
    # Two halves by turns: a fixed-point iteration with a step below 1 / 2 of the curvature is near for small steps.
    solver = bl.linear.StochasticGradient(step_size=0.3, max_steps=400)
    by_turns = slope(game, bl.Implicit(given, linear_solver=solver, batches=FreshBatches(), **options))[0]
    assert float((by_turns - exact).norm()) < 0.2 * float(exact.norm())


# A network -----------------------------------------------------------------------------------------------------------

SHAPES = [(3, 4), (4, 2)]


def network(weights, batch):
    return torch.tanh(batch[0] @ weights[0]) @ weights[1]


def follow(x, weights, batch):
    return loss(network(weights, batch), batch) + penalty_of_both(weights, x)


def penalty_of_both(weights, x):
    return 0.5 * x.exp().sum() * sum(part.square().sum() for part in weights)


def lead(weights):
    return loss(network(weights, VALID), VALID)


NETWORK = GaussNewton(network, loss, penalty_of_both, measure=True)


def start():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=D) for shape in SHAPES]


def network_game():
    return bl.Game(x=bl.Player(lead, X), weights=bl.Player(follow, start(), data=[TRAIN]))


def parts(flat):
    return [flat[:12].reshape(3, 4), flat[12:].reshape(4, 2)]


def dense(flat):
    """G by its definition, and the whole Hessian."""
    outputs = network(parts(flat), TRAIN).reshape(-1)
    jacobian = torch.func.jacrev(lambda flat: network(parts(flat), TRAIN).reshape(-1))(flat)
    inner = torch.func.hessian(lambda z: loss(z.reshape(-1, 2), TRAIN))(outputs)
    return (
        jacobian.T @ inner @ jacobian + X.exp() * torch.eye(20, dtype=D),
        torch.func.hessian(lambda flat: follow(X, parts(flat), TRAIN))(flat),
    )


def test_its_products_are_those_of_its_definition():
    game = network_game()
    weights = start()
    given = bl.ClosedForm(lambda x: [part + 0.0 * x for part in weights])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableResponseWarning)  # these weights are not trained
        found, report, _ = slope(game, bl.Implicit(given, tolerance=None, linear_solver=CG, curvature=NETWORK))
    flat = torch.cat([part.reshape(-1) for part in weights])
    matrix, hessian = dense(flat)
    c = torch.func.grad(lambda flat: lead(parts(flat)))(flat)
    u = torch.linalg.solve(matrix, c)
    wanted = -X.exp() * (flat @ u)  # the mixed derivative of the penalty is exp(x) y
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    corrected = -X.exp() * (flat @ (u + torch.linalg.solve(matrix, c - hessian @ u)))
    assert report.error == pytest.approx(float(((corrected - wanted) / corrected).abs()), rel=1e-6)


def test_it_is_definite_where_the_hessian_is_not():
    game, weights = network_game(), start()
    flat = torch.cat([part.reshape(-1) for part in weights])
    matrix, hessian = dense(flat)
    assert float(torch.linalg.eigvalsh(hessian).min()) < 0.0 < float(torch.linalg.eigvalsh(matrix).min())
    given = bl.ClosedForm(lambda x: [part + 0.0 * x for part in weights])
    with pytest.raises(IndefiniteSystemError):
        slope(game, bl.Implicit(given, tolerance=None, linear_solver=CG))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreliableResponseWarning)  # far from an optimum it says so
        slope(game, bl.Implicit(given, tolerance=None, linear_solver=CG, curvature=NETWORK))


def test_a_stated_bias_holds_at_the_optimum():
    """The whole Jacobian, against the exact one at the same trained point, is off by no more than was stated."""
    game = network_game()
    optimizer = bl.Scipy("L-BFGS-B")
    _, _, weights = slope(game, bl.Implicit(optimizer, steps=2000, tolerance=1e-6, linear_solver=bl.GMRES()))
    flat = torch.cat([part.detach().reshape(-1) for part in weights])
    matrix, hessian = dense(flat)
    assert float(torch.linalg.eigvalsh(hessian).min()) > 0.0
    mixed = X.exp() * flat
    exact, estimate = torch.linalg.solve(hessian, mixed), torch.linalg.solve(matrix, mixed)
    bias = float((estimate - exact).norm() / exact.norm())
    stated = GaussNewton(network, loss, penalty_of_both, bias=1.01 * bias)
    response = bl.Implicit(optimizer, steps=2000, tolerance=1e-6, linear_solver=CG, curvature=stated)
    state = response.init(game)
    x = X.clone().requires_grad_()
    y, _ = response(game, {"x": x}, state)
    answer = torch.cat([part.reshape(-1) for part in y])
    rows = [torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in answer]
    jacobian = torch.cat(rows)
    assert float((jacobian + exact).norm()) <= response.promise.stated_bias * float(exact.norm())


def test_what_it_refuses():
    game = linear_game([TRAIN])
    solver = bl.Scipy("L-BFGS-B")
    without = GaussNewton(linear, loss)  # the penalty is missing: at weights of 0 nothing shows it, after steps it does
    with pytest.raises(ValueError, match="the loss of player 'weights'"):
        slope(game, bl.Implicit(solver, tolerance=1e-6, curvature=without))
    twice = GaussNewton(linear, lambda outputs, batch: 2.0 * loss(outputs, batch), penalty)
    with pytest.raises(ValueError, match="the loss of player 'weights'"):
        bl.Implicit(solver, curvature=twice).init(game)
    response = bl.Implicit(solver, tolerance=1e-6, curvature=LINEAR)
    state = response.init(game)
    x = X.clone().requires_grad_()
    y, _ = response(game, {"x": x}, state)
    with pytest.raises(SecondDerivativeError, match="curvature="):
        torch.autograd.grad(lead_linear(y), x, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="curvature="):
        torch.func.grad(lambda x: lead_linear(response(game, {"x": x}, state)[0]))(X)
    with pytest.raises(ValueError, match="bias"):
        GaussNewton(linear, loss, bias=-1.0)
    with pytest.raises(TypeError, match="rest"):
        GaussNewton(linear, loss, 0.1)
    with pytest.raises(TypeError, match="expected Hessian"):
        bl.Implicit(solver, curvature="gauss-newton")
    domain = bl.Game(
        x=bl.Player(lead_linear, X),
        weights=bl.Player(follow_linear, torch.zeros(3, 2, dtype=D), domain=bl.Box(-1.0, 1.0), data=[TRAIN]),
    )
    with pytest.raises(TypeError, match="GaussNewton"):
        bl.Implicit(bl.inner.ProjectedGradient(), curvature=LINEAR).init(domain)

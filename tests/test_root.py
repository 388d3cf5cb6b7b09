"""Derivatives of any order through F(y, x) = 0."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import grad, jacrev, vmap

import bilevel as bl

D = torch.float64
A = torch.tensor([[2.0, 0.3, -0.2], [-0.1, 1.8, 0.4], [0.2, -0.3, 2.2]], dtype=D)  # not symmetric
SOLVERS = [bl.linear.Dense(rtol=1e-10), bl.GMRES(rtol=1e-12)]


def residual(y, x):
    return A @ y + 0.1 * y**3 - x["b"] * x["c"].sin()


def solution(x):
    x = {name: value.detach() for name, value in x.items()}
    y = torch.zeros(3, dtype=D)
    for _ in range(40):  # Newton: the Jacobian is diagonally dominant everywhere
        y = y - torch.linalg.solve(A + torch.diag_embed(0.3 * y**2), residual(y, x))
    return y


def answer(solver, b, c):
    x = {"b": b, "c": c}
    return bl.root(residual, solution(x), x, linear_solver=solver)


B, C = torch.tensor([0.5, -1.0, 0.8], dtype=D), torch.tensor(0.7, dtype=D)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_first_second_and_third_derivatives(solver):
    b, c = B.clone().requires_grad_(), C.clone().requires_grad_()

    def first(b, c):
        return torch.autograd.grad((answer(solver, b, c) ** 3).sum(), (b, c), create_graph=True)

    def second(b, c):
        return torch.autograd.grad(sum((v**2).sum() for v in first(b, c)), (b, c), create_graph=True)

    assert torch.autograd.gradcheck(lambda b, c: answer(solver, b, c), (b, c))
    assert torch.autograd.gradgradcheck(lambda b, c: answer(solver, b, c), (b, c))
    assert torch.autograd.gradcheck(second, (b, c))


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_torch_func_agrees_with_autograd(solver):
    def value(b):
        return (answer(solver, b, C) ** 3).sum()

    b = B.clone().requires_grad_()
    (plain,) = torch.autograd.grad(value(b), b)
    torch.testing.assert_close(grad(value)(B), plain)
    jacobian = torch.autograd.functional.jacobian(lambda b: answer(solver, b, C), B)
    torch.testing.assert_close(jacrev(lambda b: answer(solver, b, C))(B), jacobian)
    torch.testing.assert_close(jacrev(jacrev(value))(B), torch.autograd.functional.hessian(value, B))
    rows = torch.stack([B, B + 0.3, -B])
    torch.testing.assert_close(vmap(grad(value))(rows), torch.stack([grad(value)(row) for row in rows]))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_linear_systems_of_any_form(n, seed):
    generator = torch.Generator().manual_seed(seed)
    # |N| <= 0.5 in the Frobenius norm: the matrix I + N has condition number at most 3.
    noise = torch.randn(n, n, generator=generator, dtype=D)
    matrix = torch.eye(n, dtype=D) + 0.5 * noise / noise.norm()
    x = torch.randn(n, generator=generator, dtype=D)
    jacobian = jacrev(lambda x: bl.root(lambda y, x: matrix @ y - x, torch.linalg.solve(matrix, x), x))(x)
    # GMRES stops at 1e-10 of each unit cotangent; times the condition number, 3e-10 an entry.
    torch.testing.assert_close(jacobian, torch.linalg.inv(matrix), atol=1e-9, rtol=0)


def test_a_scalar_equals_a_vector_of_one():
    x = torch.tensor(2.0, dtype=D, requires_grad=True)
    (scalar,) = torch.autograd.grad(bl.root(lambda y, x: y**2 - x, x.sqrt(), x), x)
    one = torch.tensor([2.0], dtype=D, requires_grad=True)
    (vector,) = torch.autograd.grad(bl.root(lambda y, x: y**2 - x, one.sqrt(), one).sum(), one)
    assert scalar.shape == () and scalar.item() == pytest.approx(8**-0.5, rel=1e-10)
    assert vector.item() == scalar.item()


def test_pytrees_and_float32():
    x = torch.tensor([1.0, 4.0], requires_grad=True)
    y = bl.root(lambda y, x: {"r": y["r"] ** 2 - x, "s": [y["s"][0] - 2 * x]}, {"r": x.sqrt(), "s": [2 * x]}, x)
    (slope,) = torch.autograd.grad(y["r"].sum() + y["s"][0].sum(), x)
    assert slope.dtype == torch.float32
    torch.testing.assert_close(slope, torch.tensor([2.5, 2.25]))


def test_captured_tensors_are_refused():
    captured = torch.ones(3, dtype=D, requires_grad=True)

    def value(b):
        return bl.root(lambda y, b: y - b * captured, b.detach(), b).sum()

    with pytest.raises(
        bl.errors.CapturedTensorError, match=r"shape \(3,\) that requires grad.*Pass it among the inputs"
    ):
        value(B)
    with pytest.raises(bl.errors.CapturedTensorError, match="Pass it among the inputs"):
        grad(value)(B)
    with pytest.raises(bl.errors.CapturedTensorError):  # captured from an outer transform
        grad(lambda c: bl.root(lambda y, b: y - b * c, B, B).sum())(B)
    constant = captured.detach()
    bl.root(lambda y, b: y - b * constant, B, B.clone().requires_grad_())


def test_conjugate_gradient_asks_for_the_promise():
    x = B.clone().requires_grad_()
    y = bl.root(lambda y, x: A @ y - x, torch.linalg.solve(A, B), x, linear_solver=bl.ConjugateGradient())
    with pytest.raises(bl.errors.NotSymmetricError, match=r"symmetric=False. Use GMRES\(\)"):
        y.sum().backward()


def test_a_residual_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shapes \[\(2,\)\]; expected those of the solution, \[\(3,\)\]"):
        bl.root(lambda y, x: x, B, torch.zeros(2, dtype=D))


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20])
@pytest.mark.parametrize(
    "solver", [bl.ConjugateGradient(), bl.GMRES(), bl.linear.Dense()], ids=["cg", "gmres", "dense"]
)
def test_a_losss_units_do_not_matter_in_float32(scale, solver):
    # The adjoint is in units of 1 / scale: below 1e-19 the squares in its norm overflow float32, and it does not.
    curvature = torch.tensor([1.0, 2.0, 4.0])
    lead = lambda x, y: y.square().sum() + 0.0 * x.sum()
    follow = lambda x, y: scale * (0.5 * curvature * y * y - x * y).sum()
    game = bl.Game(x=bl.Player(lead, torch.ones(3)), y=bl.Player(follow, torch.zeros(3)))
    response = bl.Implicit(bl.ClosedForm(lambda x: x / curvature), linear_solver=solver)
    x = game.initial("x").requires_grad_()
    y, _ = response(game, {"x": x}, response.init(game))
    (found,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(found, 2.0 / curvature**2, rtol=1e-5, atol=0.0)

"""HypergradientTolerance: stops by what a solution is needed for, and says how wrong it is."""

import pytest
import torch

import bilevel as bl
from bilevel.linear import ConjugateGradient, HypergradientTolerance, LinearOperator

D = torch.float64


def ridge(seed, decades):
    """A ridge regression with a penalty for each weight, over some decades: everything in closed form."""
    generator = torch.Generator().manual_seed(seed)
    n, m = 120, 80
    rows = torch.randn(m, n, generator=generator, dtype=D) * torch.logspace(0, -1, n, dtype=D)
    other = torch.randn(m, n, generator=generator, dtype=D)
    aims, others = (torch.randn(m, generator=generator, dtype=D) for _ in range(2))
    x = -2.3 * decades * torch.rand(n, generator=generator, dtype=D)
    hessian = 2.0 * rows.mT @ rows / m + 2.0 * torch.diag(x.exp())
    y = torch.linalg.solve(hessian, 2.0 * rows.mT @ aims / m)

    def lead(y):
        return (other @ y - others).square().mean()

    def follow(x, y):
        return (rows @ y - aims).square().mean() + (x.exp() * y.square()).sum()

    slope = 2.0 * other.mT @ (other @ y - others) / m
    exact = -2.0 * x.exp() * y * torch.linalg.solve(hessian, slope)
    return bl.Game(x=bl.Player(lead, x), y=bl.Player(follow, y)), x, y, exact


def taken(game, x, y, solver):
    response = bl.Implicit(bl.ClosedForm(lambda x: y), tolerance=None, linear_solver=solver)
    x = x.clone().requires_grad_()
    answer, state = response(game, {"x": x}, response.init(game))
    (slope,) = torch.autograd.grad(game.loss("x", {"x": x, "y": answer}), x)
    return slope, response.after_backward(state, answer)["linear"]


@pytest.mark.parametrize("rtol", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("decades", [2, 5])
def test_the_hypergradient_is_as_right_as_was_asked_and_the_estimate_is_above_its_error(rtol, decades):
    for seed in range(4):
        game, x, y, exact = ridge(seed, decades)
        slope, receipt = taken(
            game, x, y, ConjugateGradient(rtol=1e-12, max_steps=2000, stopping=HypergradientTolerance(rtol))
        )
        _, all_of_it = taken(game, x, y, ConjugateGradient(rtol=1e-12, max_steps=2000))
        error = float((slope - exact).norm() / exact.norm())
        assert error <= min(rtol, float(receipt["error"]))
        assert float(receipt["error"]) <= rtol or float(receipt["residual"]) <= 1e-12  # the residual was there first
        # So small a system is solved whole soon after 1e-4: the looks are then all that is to be seen.
        assert int(receipt["products"]) < (0.9 if rtol == 1e-2 else 1.2) * int(all_of_it["products"])
        assert torch.isnan(all_of_it["error"])


def test_what_has_not_settled_warns_with_the_error():
    game, x, y, _ = ridge(0, 5)
    few = ConjugateGradient(rtol=None, max_steps=12, stopping=HypergradientTolerance(1e-6))
    with pytest.warns(bl.errors.LinearNonConvergenceWarning, match=r"error was about .* wanted 1e-06"):
        _, receipt = taken(game, x, y, few)
    assert float(receipt["error"]) > 1e-6
    strict = ConjugateGradient(rtol=None, max_steps=12, strict=True, stopping=HypergradientTolerance(1e-6))
    with pytest.raises(bl.errors.ConvergenceError, match="settled"):
        taken(game, x, y, strict)


def test_a_small_residual_ends_it_as_well(spd, normal):
    matrix = spd(1, 10, 10.0)
    system = LinearOperator(matrix.mv, symmetric=True)
    found = ConjugateGradient(rtol=1e-3, stopping=HypergradientTolerance(1e-12)).solve(system, normal(0, 10))
    assert found.converged and float(found.residual_norm) <= 1e-3 * float(normal(0, 10).norm())


def test_a_solve_down_to_rounding_is_enough_however_few_its_looks():
    curvature = torch.tensor([1.0, 2.0, 4.0], dtype=D)
    system, b = LinearOperator(lambda v: curvature * v, symmetric=True), torch.ones(3, dtype=D)
    solver = ConjugateGradient(rtol=None, strict=True, stopping=HypergradientTolerance(1e-3))
    for start in (None, b / curvature):
        found = solver.solve(system, b, start)
        assert found.converged and found.error == float("inf")
        assert torch.allclose(found.solution, b / curvature, rtol=1e-14)


def test_the_looks_are_counted_and_the_answer_is_the_same_as_without_them(spd, normal):
    matrix, b = spd(2, 40, 1e6), normal(1, 40)

    def solved(stopping):
        looks, steps = [], []
        system = LinearOperator(
            lambda v: steps.append(v.clone()) or matrix @ v, symmetric=True, interest=lambda u: looks.append(u) or u[:3]
        )
        found = ConjugateGradient(rtol=1e-10, max_steps=400, stopping=stopping).solve(system, b)
        assert found.products == len(steps) + len(looks)
        return found, steps, len(looks)

    # One arithmetic, also where a system so ill-conditioned restarts from the true residual: the same bits.
    plain, steps, none = solved(None)
    watched, same, looks = solved(HypergradientTolerance(1e-300))
    assert none == 0 and looks > 5
    assert torch.equal(watched.solution, plain.solution)
    assert len(same) == len(steps) and all(map(torch.equal, same, steps))
    # One that settles takes the first of those steps, and then a product for its residual.
    settled, first, _ = solved(HypergradientTolerance(1e-1))
    assert settled.converged and len(first) < len(steps)
    assert all(map(torch.equal, first[:-1], steps))


@pytest.mark.parametrize(("dtype", "condition"), [(D, 1e6), (torch.float32, 30.0)])
def test_a_solve_down_to_what_products_resolve_is_enough(spd, normal, dtype, condition):
    """|A| |u| is far above |b| here, and so is the rounding of a product: a residual of eps |b| cannot be had."""
    matrix, exact = spd(3, 8, condition).to(dtype), normal(1, 8).to(dtype)
    system, b = LinearOperator(matrix.mv, symmetric=True), matrix @ exact
    # Eight unknowns are found in a dozen steps or so; the third look, the first to judge by, would come at the 36th.
    found = ConjugateGradient(
        rtol=None, strict=True, max_steps=100, stopping=HypergradientTolerance(1e-3, spacing=3.0)
    ).solve(system, b)
    assert found.converged
    assert float((found.solution - exact).norm()) <= 1e-3 * float(exact.norm())


def test_a_solve_down_to_rounding_that_leaves_too_large_an_error_warns(spd, normal):
    """Rounding of 1e-7 times a condition number of 1e6 is far above 1e-3."""
    matrix, b = spd(3, 12, 1e6).float(), normal(1, 12).float()
    solver = ConjugateGradient(rtol=None, max_steps=400, stopping=HypergradientTolerance(1e-3, first=300))
    with pytest.warns(bl.errors.LinearNonConvergenceWarning, match="before its answer settled"):
        found = solver.solve(LinearOperator(matrix.mv, symmetric=True), b)
    assert not found.converged


def test_it_settles_from_a_warm_start_at_once(spd, normal):
    matrix, b = spd(3, 40, 1e4), normal(1, 40)
    system = LinearOperator(matrix.mv, symmetric=True)
    exact = torch.linalg.solve(matrix, b)
    solver = ConjugateGradient(rtol=1e-13, max_steps=400, stopping=HypergradientTolerance(1e-3))
    cold = solver.solve(system, b)
    warm = solver.solve(system, b, exact + 1e-6 * normal(2, 40))
    assert warm.products < 0.5 * cold.products
    assert float((warm.solution - exact).norm()) <= 1e-3 * float(exact.norm())


def test_under_vmap_the_slowest_system_is_waited_for(spd, normal):
    matrices = torch.stack([spd(seed, 20, 10.0**seed) for seed in (1, 4)])
    bs = torch.stack([normal(seed, 20) for seed in range(2)])

    def solve(matrix, b):
        system = LinearOperator(matrix.mv, symmetric=True)
        return (
            ConjugateGradient(rtol=1e-13, max_steps=200, stopping=HypergradientTolerance(1e-4))
            .solve(system, b)
            .solution
        )

    found = torch.func.vmap(solve)(matrices, bs)
    exact = torch.linalg.solve(matrices, bs)
    assert bool(((found - exact).norm(dim=1) <= 1e-4 * exact.norm(dim=1)).all())


@pytest.mark.parametrize("settings", [{"rtol": 0.0}, {"rtol": 1.0}, {"first": 0}, {"spacing": 1.0}])
def test_settings_that_cannot_work_are_refused(settings):
    with pytest.raises(ValueError, match="HypergradientTolerance"):
        HypergradientTolerance(**settings)


@pytest.mark.parametrize(
    "options",
    [
        {"stopping": 1e-3},
        {"stopping": HypergradientTolerance},
        {"preconditioner": bl.linear.Diagonal},
        {"preconditioner": "jacobi"},
    ],
)
def test_what_is_no_object_of_the_kind_is_refused(options):
    with pytest.raises(TypeError, match=f"ConjugateGradient was given {next(iter(options))}="):
        ConjugateGradient(**options)


@pytest.mark.parametrize("solver", [bl.GMRES, bl.Neumann, bl.linear.Dense, bl.Nystrom, bl.linear.Identity])
def test_who_ends_by_the_residual_says_who_looks_at_more(solver):
    with pytest.raises(TypeError, match=rf"{solver.__name__} was given stopping=.*ConjugateGradient\(stopping="):
        solver(stopping=HypergradientTolerance(1e-3))


def test_a_run_tells_the_estimate():
    game, *_ = ridge(0, 2)
    solver = ConjugateGradient(rtol=1e-12, max_steps=2000, stopping=HypergradientTolerance(1e-2))
    response = bl.Implicit(bl.Scipy("L-BFGS-B"), steps=500, tolerance=None, linear_solver=solver)
    solution = bl.solve(game, y=response, steps=2)
    assert 0.0 < solution.errors["y"] <= 1e-2
    assert "hypergradient error" in str(solution)

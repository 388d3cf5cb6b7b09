"""What holds for a solver that somebody else writes: public names, one method, a memory in and a memory out."""

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel.errors import ConvergenceError, LinearNonConvergenceWarning, NonFiniteError, NotSymmetricError
from bilevel.extend import LinearOperator, LinearSolver, Preconditioner, concrete, norm
from bilevel.linear import (
    AdamPreconditioner,
    BlockDiagonal,
    ConjugateGradient,
    Diagonal,
    Extrapolated,
    HypergradientTolerance,
    LBFGSPreconditioner,
    Neumann,
    Nystrom,
    NystromPreconditioner,
    Recycled,
)

D = torch.float64
CONTRIBUTING = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


@dataclass(frozen=True, kw_only=True)
class Steepest(LinearSolver):
    """Steepest descent, which remembers how many systems it has seen."""

    max_steps: int = 500

    @property
    def remedy(self) -> str:
        return "another solver"

    def init(self, like, shapes=None):
        return {"seen": like.new_zeros(())}

    def iterate(self, system):
        start = system.start()
        u, r = start.solution, start.residual
        for _ in range(self.max_steps):
            if not concrete(norm(r) > system.tolerance):
                break
            product = system.matvec(r)
            curvature = torch.dot(r, product)
            u = u + torch.dot(r, r) / torch.where(curvature > 0.0, curvature, 1.0) * r
            r = system.residual(u)
        return replace(system.measure(u), memory={"seen": system.memory["seen"] + 1})


@pytest.fixture(scope="session")
def minres() -> type[LinearSolver]:
    """The example that CONTRIBUTING shows."""
    blocks = re.findall(r"^```python\n(.*?)^```", CONTRIBUTING.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    (block,) = [block for block in blocks if "class MINRES" in block]
    namespace: dict[str, object] = {"__name__": "contributing"}
    exec(compile(block, str(CONTRIBUTING), "exec"), namespace)
    return namespace["MINRES"]


# What the base does for it -------------------------------------------------------------------------------------------


def test_it_solves_counts_and_starts(spd, normal, counted):
    system, b = counted(spd(1, 6, 3.0), symmetric=False), normal(2, 6)
    exact = torch.linalg.solve(system.matrix, b)
    for start in (None, exact + 1e-3 * normal(3, 6)):
        before = system.calls
        found = Steepest(rtol=1e-9).solve(system.operator, b, start)
        assert found.converged and found.products == system.calls - before
        # The smallest eigenvalue is 1/3.
        assert float((found.solution - exact).norm()) <= 3.0 * 1e-9 * float(b.norm())
        assert torch.equal(found.residual_norm, norm(b - system.matrix @ found.solution))


def test_it_is_damped(spd, normal):
    matrix, b = spd(1, 6, 3.0), normal(2, 6)
    found = Steepest(rtol=1e-9, damping=0.5).solve(LinearOperator(matrix.mv), b)
    wanted = torch.linalg.solve(matrix + 0.5 * torch.eye(6, dtype=D), b)
    assert float((found.solution - wanted).norm()) <= 2.0 * 1e-9 * float(b.norm())


def test_it_is_judged_by_the_true_residual(spd, normal):
    operator, b = LinearOperator(spd(1, 6, 100.0).mv), normal(2, 6)
    with pytest.warns(
        LinearNonConvergenceWarning, match=r"Steepest stopped after \d+ products .* Give it another solver,"
    ):
        assert not Steepest(max_steps=3).solve(operator, b).converged
    with pytest.raises(ConvergenceError, match="Steepest stopped"):
        Steepest(max_steps=3, strict=True).solve(operator, b)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Steepest(max_steps=3, rtol=None).solve(operator, b).converged


def test_what_cannot_be_solved_never_reaches_it(spd):
    class Unreached(Steepest):
        def iterate(self, system):
            raise AssertionError("not for a method to see")

    solver, operator = Unreached(), LinearOperator(spd(1, 3, 2.0).mv)
    zero = torch.zeros(3, dtype=D)
    found = solver.solve(operator, zero, torch.ones(3, dtype=D))
    assert torch.equal(found.solution, zero) and found.converged and found.products == 0
    with pytest.raises(NonFiniteError, match="Unreached was given a right-hand side"):
        solver.solve(operator, zero * torch.nan)
    with pytest.raises(ValueError, match="Give one like it"):
        solver.solve(operator, zero + 1.0, torch.ones(4, dtype=D))
    with pytest.raises(ValueError, match=r"shapes=\[\(2, 2\)\], which have 4 entries; the right-hand side has 3"):
        solver.solve(LinearOperator(lambda v: v, shapes=[(2, 2)]), zero + 1.0)


def test_products_that_are_not_finite_are_named():
    with pytest.raises(NonFiniteError, match="Steepest met NaN"):
        Steepest(max_steps=2).solve(LinearOperator(lambda v: v * torch.nan), torch.ones(3, dtype=D))


def test_a_start_that_is_good_enough_is_a_vector_of_its_own():
    """Nothing is as good as 0 where the tolerance is as large as b, and may be written to."""
    b = torch.ones(3, dtype=D)
    for solver in (Steepest(rtol=1.0), ConjugateGradient(rtol=1.0), Neumann(rtol=1.0)):
        found = solver.solve(LinearOperator(lambda v: v, symmetric=True), b)
        assert found.products <= 1 and not found.solution.any()
        found.solution.add_(1.0)


CURVATURE = torch.linspace(1.0, 4.0, 8, dtype=D)
SLOPE = torch.linspace(-1.0, 2.0, 8, dtype=D)


@dataclass(frozen=True, kw_only=True)
class Scaled(LinearSolver):
    """A user's own: a number in place of the inverse."""

    rtol: float | None = None
    scale: float = 1.0

    def iterate(self, system):
        return system.measure(self.scale * system.rhs)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("solver", [Nystrom(rank=3, damping=1e-4), bl.linear.Identity(scale=5.0), Scaled(scale=-0.1)])
def test_an_answer_that_is_worse_than_0_warns_whatever_was_asked_for(solver, symmetric):
    system = LinearOperator(lambda v: CURVATURE * v, symmetric or solver.needs_symmetry)
    with pytest.warns(
        LinearNonConvergenceWarning, match=r"a residual of [\d.e+]+ \|b\|.*no better than none"
    ) as caught:
        found = solver.solve(system, SLOPE)
    assert len(caught) == 1 and not found.beats_zero
    right = SLOPE / CURVATURE
    assert float((found.solution - right).norm()) > float(right.norm())
    with pytest.raises(ConvergenceError, match="no better than none"):
        replace(solver, strict=True).solve(system, SLOPE)
    # The right-hand side's scale does not matter, and an absolute tolerance accepts it.
    assert not replace(solver, strict=True, atol=1e6).solve(system, SLOPE).converged


@pytest.mark.parametrize("scale", [0.05, 0.25, 0.5])
def test_a_deliberate_estimate_that_is_better_than_0_does_not_warn(scale):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = Scaled(scale=scale).solve(LinearOperator(lambda v: CURVATURE * v), SLOPE)
    assert found.beats_zero and float(found.residual_norm) < float(SLOPE.norm())


def test_few_steps_of_conjugate_gradients_are_better_than_none_while_their_residual_grows():
    """Both norms of their error fall at every step (Hestenes & Stiefel 1952), and so nothing is to be told."""
    curvature = torch.logspace(-4.0, 0.0, 40, dtype=D)
    right = torch.ones(40, dtype=D) / curvature
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = ConjugateGradient(max_steps=3, rtol=None).solve(
            LinearOperator(lambda v: curvature * v, symmetric=True), torch.ones(40, dtype=D)
        )
    assert float(found.residual_norm) > 40**0.5 and found.beats_zero
    assert float((found.solution - right).norm()) < float(right.norm())


def test_a_negative_curvature_is_not_taken_for_an_error_that_falls():
    """A = -I: the residual of u = b is 2 |b|, and u points away from the solution, although its energy is below 0."""
    b = torch.ones(3, dtype=D)
    with pytest.warns(LinearNonConvergenceWarning, match=r"a residual of 2 \|b\|"):
        bl.linear.Identity().solve(LinearOperator(lambda v: -v, symmetric=True), b)


def test_an_option_of_another_solver_is_refused_by_who_takes_it():
    with pytest.raises(TypeError, match=r"GMRES was given rank=3, which it does not take; Nystrom\(rank=\.\.\.\) does"):
        bl.GMRES(rank=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        Steepest(steps=3)


def test_what_comes_along_with_the_product_at_the_answer_comes_back(spd, normal):
    matrix, b, taken = spd(1, 6, 10.0), normal(2, 6), []

    def both(v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        taken.append(v)
        return matrix @ v, (3.0 * v, v[:2])

    operator = LinearOperator(matrix.mv, symmetric=True, matvec_and_mixed=both)
    some = {"damping": 0.5}
    for solver in (
        Steepest(**some),
        ConjugateGradient(**some),
        bl.GMRES(**some),
        bl.linear.Dense(**some),
        Extrapolated(ConjugateGradient(**some)),
    ):
        taken.clear()
        found = solver.solve(operator, b)
        assert found.mixed is not None
        assert torch.equal(found.mixed[0], 3.0 * found.solution) and torch.equal(found.mixed[1], found.solution[:2])
        assert len(taken) == 1, "only for what may be the answer"
    assert bl.GMRES().solve(LinearOperator(matrix.mv), b).mixed is None


# Memory --------------------------------------------------------------------------------------------------------------

LEARNING = [
    Steepest(),
    Neumann(max_steps=40, rtol=None),
    Extrapolated(ConjugateGradient()),
    Extrapolated(Neumann(max_steps=40, rtol=None)),
    Extrapolated(ConjugateGradient(preconditioner=Recycled(size=3, base=Diagonal()))),
    *(
        ConjugateGradient(preconditioner=kind)
        for kind in (
            Diagonal(),
            BlockDiagonal(),
            NystromPreconditioner(rank=3, every=2),
            Recycled(size=3, base=Diagonal()),
            AdamPreconditioner(),
            LBFGSPreconditioner(size=3),
        )
    ),
]


@pytest.mark.parametrize("solver", LEARNING, ids=repr)
def test_a_memory_is_not_written_to_and_the_next_one_comes_back(solver, spd, normal):
    shapes = [(3, 2), (2,)]
    memory, last = solver.init(normal(0, 8), shapes), None
    for number in range(3):
        operator = LinearOperator(spd(number, 8, 5.0).mv, True, shapes=shapes)
        b, before = normal(number + 1, 8), {name: value.clone() for name, value in memory.items()}
        versions = {name: value._version for name, value in memory.items()}
        found = solver.solve(operator, b, last, memory=memory)
        again = solver.solve(operator, b, last, memory=memory)
        assert torch.equal(found.solution, again.solution) and found.products == again.products
        for name, value in before.items():
            assert torch.equal(memory[name], value) and memory[name]._version == versions[name]
            assert torch.equal(found.memory[name], again.memory[name])
        assert found.memory.keys() == before.keys()
        memory, last = found.memory, found.solution


@pytest.mark.parametrize("solver", LEARNING, ids=repr)
def test_without_a_memory_nothing_is_kept_and_the_first_system_is_the_same(solver, spd, normal):
    shapes = [(3, 2), (2,)]
    operator, b = LinearOperator(spd(1, 8, 5.0).mv, True, shapes=shapes), normal(2, 8)
    alone, first = solver.solve(operator, b), solver.solve(operator, b, memory=solver.init(b, shapes))
    assert alone.memory == {} and first.memory
    assert torch.equal(alone.solution, first.solution) and alone.products == first.products


def test_a_right_hand_side_of_zeros_teaches_nothing(spd):
    solver, zero = ConjugateGradient(preconditioner=Diagonal()), torch.zeros(4, dtype=D)
    memory = solver.init(zero)
    found = solver.solve(LinearOperator(spd(1, 4, 3.0).mv, True), zero, memory=memory)
    assert found.memory == memory


def quadratic(spd, normal):
    matrix, aim = spd(1, 6, 3.0), normal(2, 6)
    follow = lambda x, y: 0.5 * y @ matrix @ y - (x + aim) @ y
    return bl.Game(
        x=bl.Player(lambda y: ((y - 0.3) ** 2).sum(), torch.zeros(6, dtype=D)),
        y=bl.Player(follow, torch.zeros(6, dtype=D)),
    )


def test_its_memory_goes_from_leader_step_to_leader_step(spd, normal, tmp_path):
    game = quadratic(spd, normal)
    response = bl.Implicit(bl.Scipy("L-BFGS-B"), steps=200, tolerance=1e-6, linear_solver=Steepest(rtol=1e-9))
    state = response.init(game)
    for number in range(3):
        assert float(state["linear"]["memory"]["seen"]) == number
        x = game.initial("x").clone().requires_grad_()
        y, state = response(game, {"x": x}, state)
        game.loss("x", {"x": x, "y": y}).backward()
        assert float(state["linear"]["memory"]["seen"]) == number, "a state never changes after it was returned"
        state = response.after_backward(state, y)
    game, file = quadratic(spd, normal), tmp_path / "run.pt"
    whole = bl.solve(game, y=response, steps=4)
    bl.solve(game, y=response, steps=2, checkpoint=file)
    resumed = bl.solve(game, y=response, steps=4, checkpoint=file)
    assert torch.equal(whole.variables["x"], resumed.variables["x"]) and whole.products == resumed.products


# Layout --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Spy(Preconditioner):
    """Sees what it is told of the layout."""

    told: list

    def init(self, like, shapes=None):
        self.told.append(shapes)
        return {}

    def prepare(self, operator, memory):
        self.told.append(operator.shapes)
        return lambda r: r, memory


LEAVES = {"weight": torch.zeros(3, 2, dtype=D), "bias": torch.zeros(2, dtype=D), "scale": torch.zeros((), dtype=D)}
SHAPES = [(3, 2), (2,), ()]


def layered():
    def follow(x, y):
        return sum(((1.0 + x.square()) * (leaf - x).square()).sum() for leaf in y.values())

    lead = lambda y: sum((leaf - 1.0).square().sum() for leaf in y.values())
    return bl.Game(x=bl.Player(lead, torch.tensor(0.5, dtype=D)), y=bl.Player(follow, LEAVES))


def seen(told):
    return [None if shapes is None else [tuple(shape) for shape in shapes] for shapes in told]


def test_the_layout_of_the_unknowns_reaches_whoever_asks():
    told: list = []
    solver = ConjugateGradient(preconditioner=Spy(told))
    response = bl.Implicit(
        bl.ClosedForm(lambda x: {k: x.expand_as(v) for k, v in LEAVES.items()}), linear_solver=solver
    )
    game = layered()
    x = torch.tensor(0.5, dtype=D, requires_grad=True)
    y, _ = response(game, {"x": x}, response.init(game))
    game.loss("x", {"x": x, "y": y}).backward()
    assert seen(told) and all(shapes == SHAPES for shapes in seen(told))

    told.clear()
    y = bl.root(lambda y, x: {k: v - x for k, v in y.items()}, y, x, linear_solver=solver, symmetric=True)
    torch.autograd.grad(sum(leaf.sum() for leaf in y.values()), x, create_graph=True)
    assert seen(told) and all(shapes == SHAPES for shapes in seen(told))

    told.clear()
    games = bl.Games(layered(), 2, init={"x": torch.tensor([0.5, 0.7], dtype=D)})
    response = replace(response, optimizer=bl.Scipy("L-BFGS-B"), tolerance=1e-6)
    bl.solve(games, y=response, steps=1)
    assert seen(told) and all(shapes == SHAPES for shapes in seen(told)), "of one game"


# CONTRIBUTING's example -----------------------------------------------------------------------------------------------


def test_minres_agrees_with_the_dense_solution_on_indefinite_systems(minres, normal):
    for seed in range(10):
        basis = torch.linalg.qr(normal(seed, 9, 9)).Q
        values = torch.linspace(-1.0, 2.0, 9, dtype=D) + 0.1
        matrix, b = basis * values @ basis.mT, normal(seed + 1, 9)
        matrix = 0.5 * (matrix + matrix.mT)
        found = minres(rtol=1e-10).solve(LinearOperator(matrix.mv, symmetric=True), b)
        # |u - u*| <= |residual| / smallest.
        smallest = float(values.abs().min())
        assert found.converged
        assert float((found.solution - torch.linalg.solve(matrix, b)).norm()) <= 1e-10 / smallest * float(b.norm())


def test_minres_keeps_the_laws(minres, spd, normal, counted):
    system, b = counted(spd(1, 8, 20.0), symmetric=True), normal(2, 8)
    exact = torch.linalg.solve(system.matrix, b)
    found = minres().solve(system.operator, b)
    assert found.converged and found.products == system.calls
    assert minres().solve(system.operator, b, exact).products == 2, "to see how good it is, and to measure the answer"
    with pytest.raises(NotSymmetricError, match="MINRES needs a symmetric system"):
        minres().solve(LinearOperator(system.matrix.mv), b)
    with pytest.warns(LinearNonConvergenceWarning, match="MINRES stopped after 3 products .* Give it more max_steps"):
        minres(max_steps=2).solve(system.operator, b)
    rows = torch.stack([b, 0.0 * b, 1e-8 * b])
    together = torch.func.vmap(lambda b: minres(rtol=1e-9).solve(system.operator, b).solution)(rows)
    for row, solution in zip(rows, together, strict=True):
        # The smallest eigenvalue is 1/20.
        error = float((solution - torch.linalg.solve(system.matrix, row)).norm())
        assert error <= 20.0 * 1e-9 * float(row.norm()) + 1e-15


def test_minres_serves_within_a_response_and_within_extrapolated(minres, ridge):
    inner, x = bl.Scipy("L-BFGS-B"), ridge().initial("x")
    found = {}
    for solver in (ConjugateGradient(rtol=1e-10), minres(rtol=1e-10), Extrapolated(minres(rtol=1e-10))):
        game = ridge()
        response = bl.Implicit(inner, steps=500, tolerance=1e-7, linear_solver=solver)
        leader = x.clone().requires_grad_()
        y, _ = response(game, {"x": leader}, response.init(game))
        (found[solver],) = torch.autograd.grad(game.loss("x", {"x": leader, "y": y}), leader)
    plain, *others = found.values()
    # Curvatures are above exp(-9): adjoints are within 2e-10 exp(9) = 2e-6 of each other, relatively.
    assert all(torch.allclose(other, plain, rtol=0.0, atol=1e-5 * float(plain.norm())) for other in others)


def test_a_stopping_rule_is_an_option_of_who_takes_it():
    assert ConjugateGradient(stopping=HypergradientTolerance(1e-2)).stopping is not None
    with pytest.raises(TypeError, match=r"Steepest was given stopping=.*ConjugateGradient\(stopping=\.\.\.\) does"):
        Steepest(stopping=HypergradientTolerance(1e-2))

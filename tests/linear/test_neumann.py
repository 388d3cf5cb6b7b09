"""The Neumann series against the sum written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel as bl
from bilevel.errors import ConvergenceError
from bilevel.linear import LinearOperator, Neumann


def _series(matrix, b, step_size, terms):
    term, total = b, torch.zeros_like(b)
    for _ in range(terms + 1):
        total = total + step_size * term
        term = term - step_size * (matrix @ term)
    return total


@given(seed=st.integers(0, 10_000), n=st.integers(1, 8), terms=st.integers(0, 30), step_size=st.floats(0.01, 1.9))
@settings(max_examples=40, deadline=None)
def test_is_the_series(spd, normal, seed, n, terms, step_size):
    matrix, b = spd(seed, n, 10.0), normal(seed + 1, n)
    found = Neumann(max_steps=terms, step_size=step_size, rtol=None).solve(LinearOperator(matrix.mv, symmetric=True), b)
    # Contractions of norm < 1, so rounding adds up to at most terms * eps * |u|, |u| <= 10 |b|: 1e-13.
    assert torch.allclose(found.solution, _series(matrix, b, step_size, terms), rtol=0.0, atol=1e-12)


def test_no_terms_is_the_scaled_right_hand_side(spd, normal, counted):
    system, b = counted(spd(1, 4, 10.0), symmetric=True), normal(2, 4)
    found = Neumann(max_steps=0, step_size=0.3, rtol=None, power_steps=0).solve(system.operator, b)
    assert torch.equal(found.solution, 0.3 * b)
    assert system.calls == found.products == 1


def test_products_are_terms_checks_and_one_for_the_residual(spd, normal, counted):
    b = normal(2, 4)
    for symmetric, settings_, expected in (
        (True, {"step_size": 0.3, "power_steps": 0}, 7 + 1),
        (True, {"step_size": 0.3}, 7 + 1 + 10),
        (True, {}, 7 + 1 + 10),
        (False, {"step_size": 0.3}, 7 + 1),  # there is no bound to check
    ):
        system = counted(spd(1, 4, 10.0), symmetric)
        found = Neumann(max_steps=7, rtol=None, **settings_).solve(system.operator, b)
        assert system.calls == found.products == expected


def test_is_k_plus_one_gradient_steps_unrolled(spd, normal):
    # Of 1/2 u'Au - b'u, from 0.
    matrix, b = spd(3, 5, 10.0), normal(4, 5)
    u = torch.zeros_like(b)
    for _ in range(8):
        u = u - 0.5 * (matrix @ u - b)
    found = Neumann(max_steps=7, step_size=0.5, rtol=None).solve(LinearOperator(matrix.mv, symmetric=True), b)
    assert torch.allclose(found.solution, u, rtol=0.0, atol=1e-14)


def test_error_falls_with_every_term(spd, normal):
    matrix, b = spd(5, 10, 50.0), normal(6, 10)
    exact = torch.linalg.solve(matrix, b)
    operator = LinearOperator(matrix.mv, symmetric=True)
    errors = [
        float((Neumann(max_steps=k, rtol=None).solve(operator, b).solution - exact).norm())
        for k in (0, 1, 2, 5, 10, 50, 200)
    ]
    assert errors == sorted(errors, reverse=True)
    # |I - aA|^(K+1) <= (1 - 1/50)^201 of what it was.
    assert errors[-1] <= (1 - 1 / 50) ** 201 * float(exact.norm()) * 1.001


def test_a_start_continues_the_series(spd, normal):
    matrix, b = spd(5, 6, 20.0), normal(6, 6)
    operator = LinearOperator(matrix.mv, symmetric=True)
    half = Neumann(max_steps=4, step_size=0.5, rtol=None).solve(operator, b)
    whole = Neumann(max_steps=4, step_size=0.5, rtol=None).solve(operator, b, half.solution)
    assert torch.allclose(whole.solution, _series(matrix, b, 0.5, 9), rtol=0.0, atol=1e-13)


@given(seed=st.integers(0, 10_000), n=st.integers(2, 8))
@settings(max_examples=20, deadline=None)
def test_converges_for_an_operator_that_is_not_symmetric(general, normal, seed, n):
    # |I - A| <= 0.7: the residual falls below 1e-10 in 65 terms; |A^-1| <= 1/0.3.
    matrix, b = torch.eye(n, dtype=torch.float64) + 0.7 * general(seed, n, 2.0), normal(seed + 2, n)
    found = Neumann(step_size=1.0, rtol=1e-10).solve(LinearOperator(matrix.mv), b)
    assert found.converged
    assert torch.allclose(found.solution, torch.linalg.solve(matrix, b), rtol=0.0, atol=4e-10 * float(b.norm()))


def test_growth_in_passing_is_not_divergence():
    # Defective: (I - A)^j b grows to 30 |b| before it vanishes at the second term.
    matrix = torch.tensor([[1.0, 30.0], [0.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([0.0, 1.0], dtype=torch.float64)
    found = Neumann(step_size=1.0).solve(LinearOperator(matrix.mv), b)
    assert torch.equal(found.solution, torch.tensor([-30.0, 1.0], dtype=torch.float64))


def test_a_step_size_beyond_the_bound_is_refused(spd, normal, counted):
    system, b = counted(4.0 * spd(1, 6, 3.0), symmetric=True), normal(2, 6)
    with pytest.raises(ConvergenceError, match=r"step_size=0.7\) diverges: .* bounds it by 0\.5"):
        Neumann(step_size=0.7).solve(system.operator, b)
    assert system.calls == 10


@pytest.mark.parametrize(
    ("matrix", "symmetric"),
    [
        ([[3.0, 0.0], [0.0, 1.0]], True),
        ([[3.0, 0.0], [0.0, 1.0]], False),
        ([[-0.5, 0.0], [0.0, 1.0]], True),
        ([[0.0, 3.0], [-3.0, 0.0]], False),
    ],
)
def test_divergence_underway_raises(matrix, symmetric):
    matrix = torch.tensor(matrix, dtype=torch.float64)
    solver = Neumann(step_size=1.0, power_steps=0, rtol=None)
    with pytest.raises(ConvergenceError, match="Neumann diverges"):
        solver.solve(LinearOperator(matrix.mv, symmetric), torch.ones(2, dtype=torch.float64))


def test_the_zero_operator_has_no_step_size():
    operator = LinearOperator(torch.zeros_like, symmetric=True)
    with pytest.raises(ConvergenceError, match="vanish"):
        Neumann().solve(operator, torch.ones(3))
    assert Neumann(damping=2.0).solve(operator, torch.ones(3)).converged


def test_the_seed_fixes_the_estimate_and_the_global_state_is_left_alone(spd, normal):
    operator, b = LinearOperator(spd(1, 6, 5.0).mv, symmetric=True), normal(2, 6)
    state = torch.get_rng_state()
    first, again = (Neumann(max_steps=3, rtol=None, seed=4).solve(operator, b).solution for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    other = Neumann(max_steps=3, rtol=None, seed=5, power_steps=2).solve(operator, b).solution
    assert not torch.equal(first, other)


# The eigenvalue that is kept from system to system ------------------------------------------------------------------


def test_the_eigenvalue_is_found_once_and_anew_after_as_many_systems_as_asked(spd, normal, counted):
    solver = Neumann(max_steps=7, rtol=None, every=3)
    system, taken = counted(spd(1, 4, 10.0), symmetric=True), []
    memory = solver.init(normal(0, 4))
    for number in range(5):
        before = system.calls
        found = solver.solve(system.operator, normal(number, 4), memory=memory)
        memory = found.memory
        taken.append(system.calls - before)
        assert found.products == taken[-1]
        assert torch.equal(found.solution, solver.solve(system.operator, normal(number, 4)).solution)
    # Seven terms and the residual, and ten power iterations at each third system.
    assert taken == [8 + 10, 8, 8, 8 + 10, 8]


def test_an_eigenvalue_that_is_kept_gives_the_series_of_its_step(spd, normal):
    """Of a system whose own is up to twice as large, its series contracts, and nothing is found anew."""
    solver, matrix = Neumann(max_steps=9, rtol=None), spd(2, 6, 5.0)
    memory = solver.solve(LinearOperator(matrix.mv, True), normal(1, 6), memory=solver.init(matrix[0])).memory
    b = normal(2, 6)
    found = solver.solve(LinearOperator((1.5 * matrix).mv, True), b, memory=memory)
    assert found.products == 9 + 1
    wanted = _series(1.5 * matrix, b, 1.0 / float(memory["largest"]), 9)
    assert torch.allclose(found.solution, wanted, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("rtol", [None, 1e-8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("start", [False, True])
def test_where_the_residual_grows_the_answer_is_that_of_a_new_eigenvalue(spd, normal, counted, rtol, symmetric, start):
    solver = Neumann(max_steps=400, rtol=rtol)
    memory = solver.solve(
        LinearOperator(spd(2, 6, 5.0).mv, True), normal(1, 6), memory=solver.init(normal(1, 6))
    ).memory
    # The largest eigenvalue is four times what it was: (1 - 4)^k within a few terms.
    system, b = counted(4.0 * spd(2, 6, 5.0), symmetric), normal(2, 6)
    initial = normal(3, 6) if start else None
    found, alone = solver.solve(system.operator, b, initial, memory=memory), solver.solve(system.operator, b, initial)
    assert torch.equal(found.solution, alone.solution)
    assert found.products + alone.products == system.calls
    assert found.products <= alone.products + (12 if symmetric else 20)
    assert float(found.memory["largest"]) > 3.0 * float(memory["largest"]) and int(found.memory["served"]) == 1


def test_a_residual_down_to_rounding_is_not_one_that_grows(spd, normal, counted):
    for dtype in (torch.float32, torch.float64):
        solver, system = Neumann(max_steps=300, rtol=None), counted(spd(1, 6, 5.0).to(dtype), symmetric=True)
        memory, last = solver.init(normal(0, 6).to(dtype)), None
        for number in range(3):
            found = solver.solve(system.operator, normal(1, 6).to(dtype), last, memory=memory)
            memory, last = found.memory, found.solution
            assert found.products == 300 + 1 + (10 if number == 0 else 1)


def test_a_step_size_is_checked_once_and_still_refused(spd, normal, counted):
    solver = Neumann(max_steps=3, step_size=0.5, rtol=None)
    system = counted(spd(1, 6, 3.0), symmetric=True)
    first = solver.solve(system.operator, normal(1, 6), memory=solver.init(normal(1, 6)))
    later = solver.solve(system.operator, normal(2, 6), memory=first.memory)
    assert (first.products, later.products) == (4 + 10, 4)
    with pytest.raises(ConvergenceError, match=r"step_size=0.5\) diverges: .* bounds it by 0\.2"):
        solver.solve(LinearOperator((10.0 * system.matrix).mv, True), normal(2, 6), memory=later.memory)


def test_a_run_costs_what_a_fixed_step_costs_after_its_first_system(ridge, ends_where_it_did_without):
    def implicit(solver):
        return bl.Implicit(bl.Scipy("L-BFGS-B"), steps=500, tolerance=1e-6, linear_solver=solver)

    solver = Neumann(max_steps=10, rtol=None)
    run = bl.solve(ridge(), y=implicit(solver), steps=5)
    # Ten terms, the residual and, but in the first step, the start: five times, and ten power iterations once.
    # Where the follower started far from its answer, that is examined, for one more a step at most.
    assert 0 <= run.products - (5 * 11 + 4 + 10) <= 5
    ends_where_it_did_without(ridge, implicit(solver), implicit(solver), steps=6, atol=0.0)


def test_settings_of_the_kept_eigenvalue_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="every=0"):
        Neumann(every=0)

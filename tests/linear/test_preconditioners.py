"""Preconditioners: what they are, what they save, and that what they keep is resumed bit for bit."""

import io

import pytest
import torch
from torch.func import vmap

import bilevel as bl
from bilevel.linear import ConjugateGradient, Diagonal, LinearOperator, Nystrom, NystromPreconditioner, Recycled
from bilevel.testing import check_response
from bilevel.tree import map_leaves

D = torch.float64
KINDS = [Diagonal(), NystromPreconditioner(rank=5), Recycled(size=6), Recycled(size=6, base=Diagonal())]


@pytest.fixture
def scaled(normal):
    """Rows and columns of scales from 1e-6 to 1, over a well-conditioned matrix."""
    scales = torch.logspace(-3, 0, 60, dtype=D)
    noise = normal(1, 60, 60) / 60
    return scales[:, None] * (torch.eye(60, dtype=D) + noise @ noise.mT) * scales


def symmetric(matrix):
    return LinearOperator(matrix.mv, symmetric=True)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_what_is_applied_is_symmetric_and_positive_definite(kind, spd, normal):
    matrix = spd(3, 12, 1e3)
    memory = kind.init(matrix[0])
    for number in range(3):
        solver = ConjugateGradient(preconditioner=kind)
        memory = solver.solve(symmetric(matrix), normal(number, 12), memory=memory).memory
    apply, _ = kind.prepare(symmetric(matrix), memory)
    inverse = torch.stack([apply(row) for row in torch.eye(12, dtype=D)])
    assert torch.allclose(inverse, inverse.mT, rtol=1e-8, atol=1e-10 * float(inverse.abs().max()))
    assert float(torch.linalg.eigvalsh(0.5 * (inverse + inverse.mT))[0]) > 0.0


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_the_answer_is_the_same(kind, spd, normal):
    matrix = spd(4, 20, 1e4)
    memory = kind.init(matrix[0])
    for number in range(4):
        b = normal(number, 20)
        solver = ConjugateGradient(rtol=1e-11, max_steps=400, preconditioner=kind)
        found = solver.solve(symmetric(matrix), b, memory=memory)
        memory = found.memory
        assert found.converged
        # The smallest eigenvalue is 1e-4.
        assert float((found.solution - torch.linalg.solve(matrix, b)).norm()) <= 1e-11 * 1e4 * float(b.norm())


def test_the_products_that_a_preconditioner_takes_are_counted(counted, scaled, normal):
    seen = counted(scaled, symmetric=True)
    kind = Diagonal(probes=7, refresh=3)
    memory = kind.init(scaled[0])
    for number in range(2):
        before = seen.calls
        found = ConjugateGradient(preconditioner=kind).solve(seen.operator, normal(number, 60), memory=memory)
        memory = found.memory
        assert found.products == seen.calls - before


def test_the_diagonal_is_unbiased_and_never_below_its_own_error(scaled):
    whole = []
    for seed in range(200):
        kind = Diagonal(probes=4, seed=1000 * seed)
        apply, _ = kind.prepare(symmetric(scaled), kind.init(scaled[0]))
        found = 1.0 / apply(torch.ones(60, dtype=D))
        assert float(found.min()) > 0.0
        whole.append(found)
    mean, error = torch.stack(whole).mean(0), torch.stack(whole).std(0) / 200**0.5
    # Raising it to its standard error biases it upwards, but never down.
    assert bool((mean - scaled.diagonal() >= -5.0 * error).all())
    assert bool((mean <= 2.0 * scaled.diagonal() + 5.0 * error).all())


def test_the_diagonal_saves_where_scales_differ(scaled, normal):
    b = normal(2, 60)
    plain = ConjugateGradient(max_steps=5000).solve(symmetric(scaled), b)
    quick = ConjugateGradient(preconditioner=Diagonal()).solve(symmetric(scaled), b)
    assert quick.converged
    assert quick.products < plain.products / 2


def test_nystroem_is_that_of_the_solver_and_is_made_anew_at_times(counted, spd, normal):
    matrix = spd(5, 30, 1e6)
    wanted = Nystrom(rank=8, damping=1e-300).preconditioner(symmetric(matrix), matrix[0])
    kind, seen = NystromPreconditioner(rank=8, every=3), counted(matrix, symmetric=True)
    memory = kind.init(matrix[0])
    calls = []
    for number in range(7):
        r = normal(number, 30)
        apply, memory = kind.prepare(seen.operator, memory)
        assert torch.allclose(apply(r), wanted(r), rtol=1e-8)
        calls.append(seen.calls)
    assert calls == [8, 8, 8, 16, 16, 16, 24]


def test_nystroem_saves_where_few_eigenvalues_are_large(normal):
    basis = torch.linalg.qr(normal(1, 80, 80)).Q
    values = torch.cat([torch.logspace(6, 1, 30, dtype=D), torch.ones(50, dtype=D)])
    matrix = basis * values @ basis.mT
    plain = ConjugateGradient().solve(symmetric(0.5 * (matrix + matrix.mT)), normal(2, 80))
    kind = NystromPreconditioner(rank=35)
    solver = ConjugateGradient(preconditioner=kind)
    first = solver.solve(symmetric(matrix), normal(3, 80), memory=kind.init(matrix[0]))
    later = solver.solve(symmetric(matrix), normal(3, 80), memory=first.memory)
    assert later.products == first.products - 35
    assert later.products < plain.products / 2


def test_recycled_directions_save_on_the_next_system(normal):
    basis = torch.linalg.qr(normal(1, 80, 80)).Q
    values = torch.cat([torch.logspace(4, 1, 10, dtype=D), torch.ones(70, dtype=D)])
    matrix = basis * values @ basis.mT
    solver = ConjugateGradient(preconditioner=Recycled(size=20))
    plain = ConjugateGradient().solve(symmetric(matrix), normal(3, 80))
    first = solver.solve(symmetric(matrix), normal(3, 80), memory=solver.init(matrix[0]))
    assert first.products == plain.products
    moved = matrix + 1e-3 * torch.diag(normal(4, 80).abs())
    later = solver.solve(symmetric(moved), normal(5, 80), memory=first.memory)
    assert later.products <= 0.6 * ConjugateGradient().solve(symmetric(moved), normal(5, 80)).products


def test_what_is_recycled_maps_its_products_back(spd, normal):
    """The secant condition, H y = p for the newest pair; and pairs evenly spaced, however many there were."""
    matrix = spd(6, 40, 1e3)
    kind = Recycled(size=4)
    solver = ConjugateGradient(preconditioner=kind)
    memory = solver.solve(symmetric(matrix), normal(1, 40), memory=kind.init(matrix[0])).memory
    assert 2 <= int(memory["filled"]) <= 4
    apply, _ = kind.prepare(symmetric(matrix), memory)
    p, product = memory["directions"][-1], memory["products"][-1]
    assert torch.allclose(apply(product), p, atol=1e-10)
    assert torch.allclose(memory["products"], memory["directions"] @ matrix, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_several_systems_at_once(kind, spd, normal):
    matrix, rhs = spd(7, 10, 50.0), normal(1, 3, 10)
    solver = ConjugateGradient(rtol=1e-10, preconditioner=kind)
    found = vmap(lambda b: solver.solve(symmetric(matrix), b).solution)(rhs)
    assert torch.allclose(found, torch.linalg.solve(matrix, rhs.mT).mT, atol=1e-7)


@pytest.mark.parametrize(
    "made",
    [
        lambda: Diagonal(probes=1),
        lambda: Diagonal(forgetting=2.0),
        lambda: NystromPreconditioner(rank=0),
        lambda: Recycled(size=0),
    ],
)
def test_settings_that_cannot_work_are_refused(made):
    with pytest.raises(ValueError, match="expected"):
        made()


# Within a response --------------------------------------------------------------------------------------------------


def implicit(kind, rtol=1e-8):
    return bl.Implicit(
        bl.Scipy("L-BFGS-B"), steps=500, tolerance=1e-6, linear_solver=ConjugateGradient(rtol=rtol, preconditioner=kind)
    )


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_run_ends_where_the_plain_one_ends_and_resumes_bit_for_bit(ridge, ends_where_it_did_without, kind):
    ends_where_it_did_without(ridge, implicit(None), implicit(kind), steps=6, atol=1e-4)


def test_the_memory_is_a_part_of_the_state_that_a_call_does_not_write_to(ridge):
    game, response = ridge(), implicit(Recycled(size=5, base=Diagonal()))
    state = response.init(game)
    frozen = map_leaves(torch.clone, state["linear"])
    x = game.initial("x").clone().requires_grad_()
    y, after = response(game, {"x": x}, state)
    game.loss("x", {"x": x, "y": y}).backward()
    assert int(after["linear"]["memory"]["filled"]) == 0, "a state never changes after it was returned"
    after = response.after_backward(after, y)
    assert int(after["linear"]["memory"]["filled"]) > 0
    same = map_leaves(
        lambda a, b: torch.equal(a, b) or bool(a.isnan().all() and b.isnan().all()), frozen, state["linear"]
    )
    assert all(leaf for leaf in torch.utils._pytree.tree_leaves(same))
    written = io.BytesIO()
    torch.save(after, written)
    written.seek(0)
    torch.load(written, weights_only=True)


@pytest.mark.parametrize("kind", [Diagonal(), Recycled(base=Diagonal())], ids=repr)
@pytest.mark.slow
def test_the_laws_hold(kind):
    check_response(
        bl.Implicit(
            bl.Scipy("L-BFGS-B"), steps=500, tolerance=1e-10, linear_solver=ConjugateGradient(preconditioner=kind)
        ),
        examples=3,
    )

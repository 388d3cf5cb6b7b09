"""Blocks that a layer's units share: what they converge to, that they are positive definite, and what they save."""

from functools import partial

import pytest
import torch
from torch import optim
from torch.func import vmap
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.linear import BlockDiagonal, ConjugateGradient, LinearOperator

D = torch.float64
SHAPES = [(6, 3), (4,), (2, 5), ()]


def symmetric(matrix):
    return LinearOperator(matrix.mv, symmetric=True)


def inverse_of(kind, operator, n, memory=None):
    apply, _ = kind.prepare(operator, kind.init(torch.zeros(n, dtype=D)) if memory is None else memory)
    return torch.stack([apply(row) for row in torch.eye(n, dtype=D)])


@pytest.mark.parametrize("dtype", [D, torch.float32])
@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_what_is_applied_is_symmetric_and_positive_definite(shift, dtype, spd):
    """Also of a matrix that is not."""
    matrix = (spd(3, 33, 1e3) - shift * torch.eye(33, dtype=D)).to(dtype)
    kind = BlockDiagonal(shapes=SHAPES)
    memory = kind.init(matrix[0])
    for _ in range(4):
        apply, memory = kind.prepare(symmetric(matrix), memory)
        inverse = torch.stack([apply(row) for row in torch.eye(33, dtype=dtype)])
        assert inverse.dtype == dtype
        # A sum of 33 terms at most, which cancel up to a factor of the block's condition, below 1e3.
        assert float((inverse - inverse.mT).abs().max()) <= 33e3 * torch.finfo(dtype).eps * float(inverse.abs().max())
        assert float(torch.linalg.eigvalsh(0.5 * (inverse + inverse.mT).to(D))[0]) > 0.0


@pytest.mark.parametrize("shape", [(6, 5), (5, 6)])
def test_blocks_that_are_alike_are_found(shape, spd):
    block = spd(1, 6, 100.0)
    tall = shape == (6, 5)

    def matvec(v):
        return (block @ v.view(shape) if tall else v.view(shape) @ block).reshape(-1)

    kind = BlockDiagonal(shapes=[shape], probes=2000)
    inverse = inverse_of(kind, LinearOperator(matvec, symmetric=True), 30).view(*shape, *shape)
    # N = 10,000 columns y = C v put the eigenvalues of C^-1 S C^-1, S the mean of y y', within (1 +- e)^2 with
    # e = (sqrt(6) + t) / sqrt(N), all but for a chance of 2 exp(-t^2 / 2); the root is monotone, so that those of
    # M^-1 C are within 1 / (1 +- e).
    e = (6**0.5 + 5.0) / 100.0
    values, vectors = torch.linalg.eigh(block)
    root = vectors * values.sqrt() @ vectors.mT
    for unit in range(5):
        own = inverse[:, unit, :, unit] if tall else inverse[unit, :, unit]
        seen = torch.linalg.eigvalsh(root @ own @ root)
        assert 1.0 / (1.0 + e) <= float(seen[0]) <= float(seen[-1]) <= 1.0 / (1.0 - e)
        other = inverse[:, unit, :, unit - 1] if tall else inverse[unit, :, unit - 1]
        assert not other.any()


def test_a_bias_has_its_diagonal(normal):
    scales = normal(1, 7).exp()
    inverse = inverse_of(BlockDiagonal(shapes=[(7,)], probes=1), LinearOperator(lambda v: scales * v, True), 7)
    assert torch.allclose(inverse, torch.diag(1.0 / scales))


def test_what_is_kept_is_the_weighted_second_moment_of_all_products(normal):
    """Where nothing has to be cut off: three rows."""
    matrix, seen = torch.zeros(9, 9, dtype=D), []

    def matvec(v):
        seen.append((matrix @ v).view(3, 3))
        return matrix @ v

    kind = BlockDiagonal(shapes=[(3, 3)], probes=3, refresh=2, forgetting=0.5)
    memory = kind.init(matrix[0])
    for number in range(3):
        draft = normal(number, 9, 9)
        matrix = draft @ draft.mT
        _, memory = kind.prepare(LinearOperator(matvec, symmetric=True), memory)
    weights = torch.tensor([0.25] * 3 + [0.5] * 2 + [1.0] * 2, dtype=D)
    moments = torch.stack([y @ y.mT / 3.0 for y in seen])
    wanted = (weights[:, None, None] * moments).sum(0) / weights.sum()
    assert torch.allclose(memory["0"] @ memory["0"].mT, wanted, rtol=1e-10)
    assert float(memory["weight"]) == float(weights.sum())


def test_many_columns_are_summed_to_fewer_of_the_same_second_moment(normal):
    """13 columns of 12 rows to 8 by random signs: over many products their mean is what it was, I here."""
    kind = BlockDiagonal(shapes=[(13, 12)], rank=2, probes=1, refresh=1, forgetting=1.0)
    _, memory = kind.prepare(LinearOperator(lambda v: v, symmetric=True), kind.init(torch.zeros(156, dtype=D)))
    assert memory["0"].shape == (13, 8)
    # |Y|^2 is that of the columns but for the products of columns that share a sum: of signs, 13 rows each.
    assert abs(float(memory["0"].square().sum()) - 13.0) <= 5.0 * (2 * 4 * 13) ** 0.5 / 12.0


def test_products_are_counted_and_spent_anew_only_as_asked(counted, spd, normal):
    seen = counted(spd(1, 33, 10.0), symmetric=True)
    kind = BlockDiagonal(shapes=SHAPES, probes=5, refresh=0)
    memory, calls = kind.init(seen.matrix[0]), []
    for number in range(3):
        before = seen.calls
        found = ConjugateGradient(preconditioner=kind).solve(seen.operator, normal(number, 33), memory=memory)
        memory = found.memory
        calls.append(seen.calls - before)
        assert found.products == calls[-1]
    kind.prepare(seen.operator, memory)
    assert seen.calls == sum(calls)


def layer(normal, inputs=60, units=10):
    """The Gauss-Newton matrix of a layer: correlated inputs, a weight for each example and unit, a small penalty."""
    x = normal(1, 400, inputs) * torch.logspace(0, -6, inputs, dtype=D)
    weights = 0.5 + normal(2, 400, units).square()

    def matvec(v):
        return (x.mT @ (weights * (x @ v.view(inputs, units))) / 400 + 1e-4 * v.view(inputs, units)).reshape(-1)

    return LinearOperator(matvec, symmetric=True), normal(3, inputs * units)


@pytest.mark.parametrize("rank", [12, 32])
def test_they_save_where_units_share_their_inputs(normal, rank):
    """Also when a product's 80 columns are summed to 48."""
    operator, b = layer(normal)
    plain = ConjugateGradient(max_steps=2000).solve(operator, b)
    kind = BlockDiagonal(shapes=[(60, 10)], rank=rank, probes=8)
    quick = ConjugateGradient(max_steps=2000, preconditioner=kind).solve(operator, b)
    assert quick.converged
    assert quick.products < 0.5 * plain.products
    # Both are within 1e-6 |b| over the smallest eigenvalue, 1e-4.
    assert float((quick.solution - plain.solution).norm()) <= 2e-6 / 1e-4 * float(b.norm())


def test_a_system_of_zeros_is_left_alone():
    inverse = inverse_of(BlockDiagonal(shapes=SHAPES), LinearOperator(torch.zeros_like, symmetric=True), 33)
    assert torch.equal(inverse, torch.eye(33, dtype=D))


def test_several_systems_at_once(spd, normal):
    matrix, rhs = spd(7, 10, 50.0), normal(1, 3, 10)
    solver = ConjugateGradient(rtol=1e-10, preconditioner=BlockDiagonal(shapes=[(4, 2), (2,)]))
    found = vmap(lambda b: solver.solve(symmetric(matrix), b).solution)(rhs)
    # 1e-10 |b| over a smallest eigenvalue of 1/50.
    assert torch.allclose(found, torch.linalg.solve(matrix, rhs.mT).mT, atol=1e-7)


def test_shapes_of_another_follower_are_refused():
    with pytest.raises(ValueError, match=r"shapes=\[\(2, 3\)\], which have 6 entries; the system has 7 unknowns"):
        BlockDiagonal(shapes=[(2, 3)]).init(torch.zeros(7))


def test_products_that_are_not_finite_are_refused():
    kind = BlockDiagonal(shapes=[(2, 3)])
    with pytest.raises(bl.errors.NonFiniteError, match="in 4 products"):
        kind.prepare(LinearOperator(lambda v: v * torch.inf, symmetric=True), kind.init(torch.zeros(6)))


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"probes": 0}, {"refresh": -1}, {"forgetting": 2.0}, {"shapes": []}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        BlockDiagonal(**{"shapes": [(2, 3)]} | wrong)


def test_the_layout_is_the_systems_own_where_none_is_given(spd, normal):
    matrix, b = spd(1, 33, 1e3), normal(2, 33)
    own, known = BlockDiagonal(shapes=SHAPES), LinearOperator(matrix.mv, symmetric=True, shapes=SHAPES)
    told = ConjugateGradient(preconditioner=own).solve(symmetric(matrix), b)
    asked = ConjugateGradient(preconditioner=BlockDiagonal()).solve(known, b)
    assert torch.equal(told.solution, asked.solution) and told.products == asked.products
    with pytest.raises(ValueError, match=r"does not know the layout .* LinearOperator\(\.\.\., shapes="):
        ConjugateGradient(preconditioner=BlockDiagonal()).solve(symmetric(matrix), b)


# Within a response --------------------------------------------------------------------------------------------------

IMAGES = torch.randn(40, 6, generator=torch.Generator().manual_seed(2), dtype=D)
LABELS = torch.arange(40) % 3


def softmax():
    """A decay for each leaf of a softmax regression."""

    def fit(x, y):
        loss = cross_entropy(IMAGES @ y["weight"] + y["bias"], LABELS)
        return loss + sum((x[i].exp() * leaf.square()).sum() for i, leaf in enumerate(y.values()))

    follower = {"weight": torch.zeros(6, 3, dtype=D), "bias": torch.zeros(3, dtype=D)}

    def lead(y):
        return cross_entropy(IMAGES.flip(1) @ y["weight"] + y["bias"], LABELS)

    return bl.Game(x=bl.Player(lead, torch.full((2,), -4.0, dtype=D)), y=bl.Player(fit, follower))


def implicit(kind):
    solver = ConjugateGradient(rtol=1e-8, preconditioner=kind)
    return bl.Implicit(bl.Scipy("L-BFGS-B"), steps=500, tolerance=1e-6, linear_solver=solver)


@pytest.mark.parametrize("kind", [BlockDiagonal(shapes=[(6, 3), (3,)]), BlockDiagonal()], ids=repr)
def test_a_run_ends_where_the_plain_one_ends_and_resumes_bit_for_bit(ends_where_it_did_without, kind):
    ends_where_it_did_without(softmax, implicit(None), implicit(kind), steps=6, atol=1e-4)


@pytest.mark.parametrize("kind", [BlockDiagonal(shapes=[(6, 3), (3,)]), BlockDiagonal()], ids=repr)
def test_many_games_are_each_solved_as_alone(kind):
    starts = torch.tensor([[-4.0, -3.0], [-2.0, -5.0]], dtype=D)
    games, adam = bl.Games(softmax(), 2, init={"x": starts}), partial(optim.Adam, lr=0.1)
    together = bl.solve(games, y=implicit(kind), optimizer=adam, steps=2)
    for index in range(2):
        alone = bl.solve(games.game(index), y=implicit(None), optimizer=adam, steps=2)
        # Two steps of Adam, along gradients that are right to 1e-6 of the follower's and 1e-8 of the adjoint's.
        assert torch.allclose(together[index].variables["x"], alone.variables["x"], atol=1e-5)

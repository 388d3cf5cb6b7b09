"""Exact contraction factors on the bilinear game, and where each rule ends on games with known ends."""

import math
from functools import partial

import pytest
import torch
from torch import optim

import bilevel as bl
from bilevel.dynamics import (
    Alternating,
    Competitive,
    Consensus,
    Extragradient,
    Field,
    LookAhead,
    NegativeMomentum,
    Optimistic,
    Simultaneous,
    SymplecticAdjustment,
)

D = torch.float64
LR, SIGMA = 0.2, 1.5
A = LR * SIGMA


def two(value, x=1.0, y=0.5):
    """x minimises, y maximises."""
    start = lambda number: torch.tensor(number, dtype=D)
    return bl.Game(x=bl.Player(value, start(x)), y=bl.Player(lambda x, y: -value(x, y), start(y)))


def path(game, dynamics, steps, lr=LR):
    """Everybody's variables after each step of plain SGD."""
    points = []
    bl.solve(
        game,
        dynamics=dynamics,
        steps=steps,
        optimizer=partial(optim.SGD, lr=lr),
        callbacks=[lambda step, record, variables: points.append(torch.stack([variables["x"], variables["y"]]))],
    )
    return torch.stack(points)


def bilinear(x, y):
    return SIGMA * x * y


RATES = {
    "simultaneous": (Simultaneous(), math.sqrt(1 + A**2)),
    "extragradient": (Extragradient(LR), math.sqrt(1 - A**2 + A**4)),
    "competitive": (Competitive(LR, bl.GMRES(rtol=1e-12)), 1 / math.sqrt(1 + A**2)),
}


@pytest.mark.parametrize("name", RATES)
def test_every_step_has_the_exact_factor(name):
    dynamics, factor = RATES[name]
    sizes = path(two(bilinear), dynamics, 20).norm(dim=1)
    torch.testing.assert_close(sizes[1:] / sizes[:-1], torch.full((19,), factor, dtype=D), rtol=1e-9, atol=0.0)


@pytest.mark.parametrize(
    ("dynamics", "factor"),
    [(Alternating(), 1.0), (Optimistic(), math.sqrt((1 + math.sqrt(1 - 4 * A**2)) / 2))],
    ids=["alternating", "optimistic"],
)
def test_the_asymptotic_factor(dynamics, factor):
    """Their iterates turn, so that single steps differ: the factor is the spectral radius of the linear map of a step.

    It is fitted on the iterates themselves: z and the one before determine the next, and so a 4 x 4 matrix.
    """
    torch.manual_seed(0)
    columns, images = [], []
    for x, y in torch.randn(6, 2, dtype=D).tolist():
        points = path(two(bilinear, x, y), dynamics, 6)
        for before, now, after in zip(points, points[1:], points[2:]):
            columns.append(torch.cat([now, before]))
            images.append(torch.cat([after, now]))
    step = torch.linalg.lstsq(torch.stack(columns), torch.stack(images), driver="gelsd").solution.T
    reached = torch.linalg.eigvals(step).abs().max().item()
    assert reached == pytest.approx(factor, abs=1e-6)


@pytest.mark.parametrize(
    "dynamics",
    [LookAhead(0.5), Consensus(0.5), SymplecticAdjustment(1.0), NegativeMomentum(-0.5)],
    ids=lambda rule: type(rule).__name__,
)
def test_others_converge_on_the_bilinear_game(dynamics):
    points = path(two(bilinear), dynamics, 900)
    assert points[-1].norm() < 1e-3 * points[0].norm()


def test_the_traps_end_where_the_table_says():
    """Gradient play converges to a Stackelberg point that is no Nash equilibrium, and to a point that is neither."""
    first = lambda x, y: -0.5 * x**2 + 2 * x * y - 0.75 * y**2
    second = lambda x, y: 0.75 * x**2 + 2 * x * y + 0.5 * y**2 - 0.25 * y**4
    for value in (first, second):
        end = path(two(value, 0.1, 0.1), Simultaneous(), 800, lr=0.05)[-1]
        assert end.norm() < 1e-3


def test_alternating_sees_the_moves_before_its_own():
    points = path(two(bilinear, 1.0, 1.0), Alternating(), 1)
    x = 1.0 - LR * SIGMA
    torch.testing.assert_close(points[0], torch.tensor([x, 1.0 + LR * SIGMA * x], dtype=D))


def dense(game, point):
    """The Jacobian of the stacked own-gradients, by rows."""
    leaves = [point[name].clone().requires_grad_() for name in game.names]
    variables = dict(zip(game.names, leaves))
    rows = []
    for name in game.names:
        (slope,) = torch.autograd.grad(game.loss(name, variables), variables[name], create_graph=True)
        for entry in slope.reshape(-1):
            parts = torch.autograd.grad(entry, leaves, retain_graph=True, materialize_grads=True)
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows)


def test_products_with_the_jacobian_against_the_dense_one():
    losses = {
        "a": lambda a, b, c: (a.sin() * b.sum()).sum() + (a * a).sum() * c.sum(),
        "b": lambda a, b, c: (b**3).sum() + a.sum() * (b * b).sum() - (b * c.sum()).sum(),
        "c": lambda a, c: (c.exp() * a.sum()).sum(),
    }
    torch.manual_seed(1)
    game = bl.Game(**{n: bl.Player(f, torch.randn(k, dtype=D)) for (n, f), k in zip(losses.items(), (2, 3, 1))})
    point = {name: game.initial(name) for name in game.names}

    def evaluate(at, wanted, differentiable):
        variables = {name: leaves[0] for name, leaves in at.items()}
        return {
            name: list(torch.autograd.grad(game.loss(name, variables), at[name], create_graph=True)) for name in wanted
        }

    jacobian = Field(evaluate, {name: [value] for name, value in point.items()}).linearised()
    matrix, v = dense(game, point), torch.randn(6, dtype=D)
    blocks = torch.block_diag(matrix[:2, :2], matrix[2:5, 2:5], matrix[5:, 5:])
    torch.testing.assert_close(jacobian.matvec(v), matrix @ v)
    torch.testing.assert_close(jacobian.transposed(v), matrix.T @ v)
    torch.testing.assert_close(jacobian.diagonal(v), blocks @ v)
    torch.testing.assert_close(jacobian.off_diagonal(v), (matrix - blocks) @ v)
    torch.testing.assert_close(jacobian.off_diagonal_transposed(v), (matrix - blocks).T @ v)
    torch.testing.assert_close(jacobian.symmetric(v), (matrix + matrix.T) @ v / 2)
    torch.testing.assert_close(jacobian.antisymmetric(v), (matrix - matrix.T) @ v / 2)


@pytest.mark.parametrize(
    "dynamics",
    [Optimistic(), NegativeMomentum(), Extragradient(0.1), Competitive(0.1), Alternating()],
    ids=lambda rule: type(rule).__name__,
)
def test_resumed_is_uninterrupted_bit_for_bit(dynamics, tmp_path):
    game, options = two(bilinear), {"dynamics": dynamics, "optimizer": partial(optim.Adam, lr=0.05)}
    whole = bl.solve(game, steps=9, **options)
    bl.solve(game, steps=4, checkpoint=tmp_path / "run", **options)
    resumed = bl.solve(game, steps=9, checkpoint=tmp_path / "run", **options)
    for name in game.names:
        assert torch.equal(whole.variables[name], resumed.variables[name])


def test_a_checkpoint_of_another_rule_is_refused(tmp_path):
    game = two(bilinear)
    bl.solve(game, steps=2, checkpoint=tmp_path / "run", dynamics=Optimistic())
    with pytest.raises(bl.errors.CheckpointError, match="dynamics"):
        bl.solve(game, steps=3, checkpoint=tmp_path / "run", dynamics=Alternating())


@pytest.mark.slow
def test_dynamics_among_leaders_who_share_a_follower():
    """Two firms lead and a third answers: extragradient ends where plain play does, at their Nash equilibrium."""
    profit = lambda own, total: -own * (6.0 - 0.5 * total)
    start = torch.tensor(0.5, dtype=D)
    game = bl.Game(
        a=bl.Player(lambda a, b, c: profit(a, a + b + c), start),
        b=bl.Player(lambda a, b, c: profit(b, a + b + c), start),
        c=bl.Player(lambda a, b, c: profit(c, a + b + c), start),
    )
    # The linear solve starts warm and stops at its tolerance, which is as near as the equilibrium then is.
    exact = bl.ConjugateGradient(rtol=1e-12)
    answer = bl.Implicit(bl.ClosedForm(lambda a, b: (12.0 - a - b) / 2.0), tolerance=1e-9, linear_solver=exact)
    # With c = (12 - a - b) / 2 the leaders face the price 3 - (a + b) / 4: a Cournot duopoly, a = 4. The field's
    # eigenvalues are 3/4 and 1/4; at a rate of .6 the slowest factor, .8725 by extragradient, leaves 3.5 x 1.4e-12.
    for dynamics in (Simultaneous(), Extragradient(0.6), Alternating(), Optimistic(), Competitive(0.6)):
        solution = bl.solve(game, c=answer, dynamics=dynamics, steps=200, optimizer=partial(optim.SGD, lr=0.6))
        assert solution.variables["a"].item() == pytest.approx(4.0, abs=1e-8), dynamics
        assert solution.variables["c"].item() == pytest.approx(2.0, abs=1e-8)


def test_bad_options_are_refused():
    for make in (lambda: Extragradient(0.0), lambda: Consensus(-1.0), lambda: NegativeMomentum(0.5)):
        with pytest.raises(ValueError, match="expected"):
            make()


def test_products_with_the_jacobian_are_counted_and_survive_a_checkpoint(tmp_path):
    """Two players, one product each a pass: J'v is 2, J_o v is J v and the diagonal, 4."""
    game = bl.Game(
        x=bl.Player(lambda x, y: x @ y, torch.ones(2, dtype=torch.float64)),
        y=bl.Player(lambda x, y: -(x @ y), torch.ones(2, dtype=torch.float64)),
    )
    options = {"optimizer": partial(torch.optim.SGD, lr=0.1)}
    for dynamics, a_step in (
        (bl.dynamics.Simultaneous(), 0),
        (bl.dynamics.LookAhead(0.1), 4),
        (bl.dynamics.SymplecticAdjustment(), 2),
    ):
        found = bl.solve(game, steps=3, dynamics=dynamics, **options)
        assert found.products >= 3 * a_step, dynamics
        assert (found.products == 0) == (a_step == 0)
        assert found.history[-1]["work"] == found.gradients + found.products
    file, dynamics = tmp_path / "run.pt", bl.dynamics.LookAhead(0.1)
    bl.solve(game, steps=2, dynamics=dynamics, checkpoint=file, **options)
    resumed = bl.solve(game, steps=5, dynamics=dynamics, checkpoint=file, **options)
    assert resumed.products == bl.solve(game, steps=5, dynamics=dynamics, **options).products

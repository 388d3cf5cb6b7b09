"""Preconditioners from what the follower's own optimiser remembers."""

from functools import partial

import pytest
import torch
from torch import optim

import bilevel as bl
from bilevel.linear import AdamPreconditioner, ConjugateGradient, LBFGSPreconditioner, LinearOperator, Recycled

D = torch.float64
SCALES = torch.logspace(-2.0, 2.0, 30, dtype=D)
SECOND = [
    partial(optim.Adam, lr=1e-2),
    partial(optim.AdamW, lr=1e-2),
    partial(optim.RMSprop, lr=1e-3),
    partial(optim.Adagrad, lr=1e-1),
    partial(optim.Adadelta, lr=1.0),
]


def noisy():
    """Curvatures over four decades, and minibatches whose gradients' noise has them as its variance."""
    generator = torch.Generator().manual_seed(0)
    data = [SCALES.sqrt() * torch.randn(30, generator=generator, dtype=D) for _ in range(50)]

    def follow(x, y, batch):
        return 0.5 * (SCALES * (y - x) ** 2).sum() + (batch * y).sum()

    return bl.Game(
        x=bl.Player(lambda y: ((y - 1.0) ** 2).sum(), torch.zeros(30, dtype=D)),
        y=bl.Player(follow, torch.zeros(30, dtype=D), data=data),
    )


def hypergradient(game, response):
    state = response.init(game)
    x = game.initial("x").requires_grad_()
    y, state = response(game, {"x": x}, state)
    (slope,) = torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)
    return slope, y, response.after_backward(state, y)["linear"]


def implicit(optimizer, preconditioner, steps=300):
    solver = ConjugateGradient(rtol=1e-8, max_steps=2000, preconditioner=preconditioner)
    return bl.Implicit(optimizer, steps=steps, tolerance=None, linear_solver=solver)


@pytest.mark.parametrize("optimizer", SECOND, ids=lambda o: o.func.__name__)
def test_second_moments_of_noisy_gradients_are_the_curvature(optimizer):
    game = noisy()
    plain, _, before = hypergradient(game, implicit(optimizer, None))
    slope, y, receipt = hypergradient(game, implicit(optimizer, AdamPreconditioner(power=1.0, floor=1e-3)))
    assert torch.allclose(slope, plain, rtol=1e-6)
    assert torch.allclose(slope, 2.0 * (y - 1.0), rtol=1e-6)  # the curvature cancels: dy/dx = 1
    assert int(receipt["products"]) < int(before["products"])


def test_pairs_of_lbfgs_are_its_own_inverse(spd, normal):
    matrix, aim = spd(3, 25, 1e4), normal(1, 25)
    game = bl.Game(
        x=bl.Player(lambda y: ((y - 0.3) ** 2).sum(), torch.zeros(25, dtype=D)),
        y=bl.Player(lambda x, y: 0.5 * y @ matrix @ y - (x + aim) @ y, torch.zeros(25, dtype=D)),
    )
    lbfgs = partial(optim.LBFGS, lr=1.0, max_iter=60, history_size=40, line_search_fn="strong_wolfe")
    plain, _, before = hypergradient(game, implicit(lbfgs, None, steps=3))
    slope, y, receipt = hypergradient(game, implicit(lbfgs, LBFGSPreconditioner(size=40), steps=3))
    assert torch.allclose(slope, torch.linalg.solve(matrix, 2.0 * (y.detach() - 0.3)), rtol=1e-4)
    assert torch.allclose(slope, plain, rtol=1e-4)
    assert int(receipt["products"]) < int(before["products"])
    memory = receipt["memory"]
    assert int(memory["filled"]) > 10
    # The quadratic's changes of gradient are products with its matrix.
    filled = int(memory["filled"])
    made = memory["directions"][-filled:] @ matrix
    assert torch.allclose(memory["products"][-filled:], made, atol=1e-4 * float(made.abs().max()))


def test_they_do_nothing_before_they_know_anything():
    like = torch.zeros(4, dtype=D)
    for kind in (AdamPreconditioner(), LBFGSPreconditioner()):
        memory = kind.init(like)
        memory = kind.inform(memory, [{}])
        apply, _ = kind.prepare(bl.linear.LinearOperator(lambda v: v), memory)
        assert torch.equal(apply(like + 2.0), like + 2.0)


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        (partial(optim.SGD, lr=1e-3, momentum=0.9), AdamPreconditioner()),
        (partial(optim.SGD, lr=1e-3), AdamPreconditioner()),
        (partial(optim.SGD, lr=1e-3), LBFGSPreconditioner()),
        (partial(optim.LBFGS, lr=1.0), AdamPreconditioner()),
        (partial(optim.Adam, lr=1e-3), LBFGSPreconditioner()),
        (bl.ClosedForm(lambda x: x.clone()), AdamPreconditioner()),
        (bl.ClosedForm(lambda x: x.clone()), LBFGSPreconditioner()),
    ],
)
def test_another_optimiser_is_refused(optimizer, kind):
    with pytest.raises(TypeError, match=f"{type(kind).__name__}: the inner optimiser remembers"):
        hypergradient(noisy(), implicit(optimizer, kind, steps=2))


@pytest.mark.parametrize(
    "made",
    [
        lambda: AdamPreconditioner(power=0.0),
        lambda: AdamPreconditioner(floor=-1.0),
        lambda: LBFGSPreconditioner(size=0),
    ],
)
def test_settings_that_cannot_work_are_refused(made):
    with pytest.raises(ValueError, match="expected"):
        made()


def test_pairs_of_earlier_solves_over_second_moments():
    base = AdamPreconditioner(power=1.0, floor=1e-3)
    kind = Recycled(size=5, base=base)
    moments = SCALES.square()
    memory = kind.inform(kind.init(SCALES), [{"exp_avg_sq": moments}])
    assert torch.equal(memory["base.moments"], moments)
    system = LinearOperator(lambda v: SCALES * v, symmetric=True)
    alone = base.inform(base.init(SCALES), [{"exp_avg_sq": moments}])
    (both, _), (plain, _) = kind.prepare(system, memory), base.prepare(system, alone)
    assert torch.equal(both(SCALES), plain(SCALES))

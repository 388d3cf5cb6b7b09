"""The implicit-function theorem, against closed forms, re-solved followers and the other strategies."""

import copy
import weakref
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import optim
from torch.func import grad, jacrev, vmap
from torch.nn.functional import cross_entropy, dropout

import bilevel as bl

D = torch.float64
INPUTS = torch.randn(20, 5, generator=torch.Generator().manual_seed(2), dtype=D)
TARGET = INPUTS @ torch.linspace(-1, 1, 5, dtype=D) + 0.3
X = torch.tensor([-1.0, -0.5, 0.0, 0.5, -2.0], dtype=D)


def ridge(x, y):
    return 0.5 * ((INPUTS @ y - TARGET) ** 2).mean() + 0.5 * (x.exp() * y * y).sum()


def lead(y):
    return ((y - 0.5) ** 2).sum()


def best(x):
    system = INPUTS.T @ INPUTS / 20 + torch.diag(x.exp())
    return torch.linalg.solve(system, INPUTS.T @ TARGET / 20)


def game():
    return bl.Game(x=bl.Player(lead, torch.zeros(5, dtype=D)), y=bl.Player(ridge, torch.zeros(5, dtype=D)))


def hypergradient(response, x=X, played=None):
    played = played or game()
    x = x.clone().requires_grad_()
    y, state = response(played, {"x": x}, response.init(played))
    slope = torch.autograd.grad(lead(y), x)[0]
    return slope, response.after_backward(state, y)


EXACT = jacrev(lambda x: lead(best(x)))(X)
LBFGS = partial(optim.LBFGS, lr=1, tolerance_grad=0, tolerance_change=0, line_search_fn="strong_wolfe")


@pytest.mark.parametrize(
    "solver",
    [bl.ConjugateGradient(rtol=1e-11), bl.GMRES(rtol=1e-11), bl.linear.Dense()],
    ids=lambda s: type(s).__name__,
)
@pytest.mark.parametrize(
    ("inner", "tolerance"),
    [
        (partial(optim.SGD, lr=0.3), 1e-10),
        # A line search compares losses, which rounding tells apart down to |gradient|^2 / 2L = eps |loss|: here at
        # some 2e-8 of the first gradient.
        (LBFGS, 1e-6),
        (bl.Scipy("BFGS"), 1e-6),
        (bl.Scipy("L-BFGS-B"), 1e-6),
        (bl.ClosedForm(lambda x: best(x)), 1e-10),
    ],
    ids=["SGD", "LBFGS", "BFGS", "L-BFGS-B", "closed form"],
)
def test_ridge_regression(inner, tolerance, solver):
    # What is left of the first gradient and 1e-11 of the cotangent, times a condition number below 30.
    slope, state = hypergradient(bl.Implicit(inner, steps=2000, tolerance=tolerance, linear_solver=solver))
    left = 30.0 * (state["stationarity"] + 1e-11)
    assert ((slope - EXACT).norm() / EXACT.norm()).item() <= min(left, 100 * tolerance)
    assert state["stationarity"] <= tolerance
    assert 0 <= state["linear"]["residual"].item() <= 1e-9


def test_an_answer_short_of_the_optimum_warns_by_how_much():
    short = bl.Implicit(partial(optim.SGD, lr=0.01), steps=2)
    with pytest.warns(
        bl.errors.FollowerNonConvergenceWarning, match=r"'y' is still 0\.9\d* of its value.*after 2 steps; wanted 0.001"
    ):
        hypergradient(short)
    with pytest.raises(bl.errors.ConvergenceError, match="wanted 0.001"):
        hypergradient(bl.Implicit(partial(optim.SGD, lr=0.01), steps=2, strict=True))
    hypergradient(bl.Implicit(partial(optim.SGD, lr=0.01), steps=2, tolerance=None))  # asks for no accuracy
    with pytest.warns(bl.errors.LinearNonConvergenceWarning, match="ConjugateGradient stopped after"):
        hypergradient(bl.Implicit(LBFGS, linear_solver=bl.ConjugateGradient(max_steps=1)))


def test_transforms_agree_with_the_loop():
    response = bl.Implicit(bl.ClosedForm(lambda x: best(x)), tolerance=1e-9, linear_solver=bl.linear.Dense())
    played = game()
    state = response.init(played)

    def value(x):
        return lead(response(played, {"x": x}, state)[0])

    rows = torch.stack([X, X + 0.5, -X])
    exact = torch.stack([jacrev(lambda x: lead(best(x)))(row) for row in rows])
    torch.testing.assert_close(torch.stack([grad(value)(row) for row in rows]), exact)
    torch.testing.assert_close(vmap(grad(value))(rows), exact)
    torch.testing.assert_close(jacrev(lambda x: response(played, {"x": x}, state)[0])(X), jacrev(best)(X))
    torch.testing.assert_close(jacrev(jacrev(value))(X), jacrev(jacrev(lambda x: lead(best(x))))(X))


def test_dropout_and_batch_are_held_through_the_backward_solve():
    def noisy(x, y, batch):
        return ((dropout(batch[0], 0.5) @ y - batch[1]) ** 2).mean() + (x.exp() * y * y).sum()

    played = bl.Game(
        x=bl.Player(lead, torch.zeros(5, dtype=D)),
        y=bl.Player(noisy, torch.zeros(5, dtype=D), [(INPUTS[:10], TARGET[:10]), (INPUTS[10:], TARGET[10:])]),
    )
    response = bl.Implicit(
        partial(optim.SGD, lr=0.05), steps=5, tolerance=None, linear_solver=bl.ConjugateGradient(rtol=1e-11)
    )
    x = X.clone().requires_grad_()
    y, _ = response(played, {"x": x}, response.init(played))
    first = torch.autograd.grad(lead(y), x, retain_graph=True)[0]
    torch.rand(7)
    assert torch.equal(first, torch.autograd.grad(lead(y), x)[0])


def test_scalars_and_pytrees():
    def follow(x, y):
        return (y["a"] - x["s"].exp()) ** 2 + (y["b"][0] - x["s"] * x["v"]).square().sum()

    played = bl.Game(
        x=bl.Player(lambda y: y["a"] + y["b"][0].sum(), {"s": torch.tensor(0.3, dtype=D), "v": torch.ones(2, dtype=D)}),
        y=bl.Player(follow, {"a": torch.tensor(0.0, dtype=D), "b": [torch.zeros(2, dtype=D)]}),
    )
    response = bl.Implicit(partial(optim.SGD, lr=0.5), steps=3, tolerance=1e-12)
    x = {
        "s": torch.tensor(0.3, dtype=D, requires_grad=True),
        "v": torch.tensor([2.0, 3.0], dtype=D, requires_grad=True),
    }
    y, _ = response(played, {"x": x}, response.init(played))
    slopes = torch.autograd.grad(y["a"] + y["b"][0].sum(), list(x.values()))
    assert slopes[0].shape == ()
    torch.testing.assert_close(slopes[0], x["s"].detach().exp() + 5)
    torch.testing.assert_close(slopes[1], torch.full((2,), 0.3, dtype=D))


@pytest.mark.parametrize("kind", [bl.Implicit, partial(bl.Hypernetwork, tolerance=None)])
def test_captured_tensors_are_refused(kind):
    captured = torch.ones(5, dtype=D, requires_grad=True)
    played = bl.Game(
        x=bl.Player(lead, torch.zeros(5, dtype=D)),
        y=bl.Player(lambda x, y: ridge(x, y) + (captured * y).sum(), torch.zeros(5, dtype=D)),
    )
    with pytest.raises(bl.errors.CapturedTensorError, match=r"shape \(5,\).*Pass it among the inputs"):
        kind(partial(optim.SGD, lr=0.1)).init(played)


def test_the_state_is_not_changed_and_warms_the_next_solve():
    response = bl.Implicit(
        partial(optim.SGD, lr=0.3), steps=2000, tolerance=1e-10, linear_solver=bl.ConjugateGradient(rtol=1e-9)
    )
    played = game()
    state = response.init(played)
    kept = copy.deepcopy(state)
    x = X.clone().requires_grad_()
    y, after = response(played, {"x": x}, state)
    returned = copy.deepcopy(after)
    lead(y).backward()
    assert str(state) == str(kept) and str(after) == str(returned)
    after = response.after_backward(after, y)
    cold = int(after["linear"]["products"])
    y, again = response(played, {"x": x}, after)
    lead(y).backward()
    again = response.after_backward(again, y)
    assert int(again["linear"]["products"]) <= 1 < cold


# 100 digits, one log decay a weight: 640 of them ------------------------------------------------------------------

PIXELS, LABELS = load_digits(return_X_y=True)
PIXELS, LABELS = torch.tensor(PIXELS / 16, dtype=D), torch.tensor(LABELS)
TRAIN, VALID = slice(0, 100), slice(100, 600)


def digits_train(decay, weights):
    return cross_entropy(PIXELS[TRAIN] @ weights, LABELS[TRAIN]) + (decay.exp() * weights.square()).sum()


def digits_valid(weights):
    return cross_entropy(PIXELS[VALID] @ weights, LABELS[VALID])


DECAY = -2.5 + 0.5 * torch.randn(64, 10, generator=torch.Generator().manual_seed(3), dtype=D)
DIGITS = bl.Game(decay=bl.Player(digits_valid, DECAY), weights=bl.Player(digits_train, torch.zeros(64, 10, dtype=D)))


def retrained(decay, start=None):
    """The optimum by Newton's method, its system solved by plain conjugate gradients to rounding."""
    weights = torch.zeros(64, 10, dtype=D) if start is None else start.clone()
    solver = bl.ConjugateGradient(rtol=1e-10, max_steps=3000)
    for _ in range(12):
        weights.requires_grad_()
        (slope,) = torch.autograd.grad(digits_train(decay, weights), weights, create_graph=True)
        if slope.norm().item() < 1e-13:
            break
        product = lambda v: torch.autograd.grad(slope, weights, v.view(64, 10), retain_graph=True)[0].reshape(-1)
        step = solver.solve(bl.linear.LinearOperator(product, symmetric=True), slope.detach().reshape(-1)).solution
        weights = weights.detach() - step.view(64, 10)
    return weights.detach()


@pytest.fixture(scope="module")
def optimum():
    return retrained(DECAY)


def digits_hypergradient(optimum, solver):
    response = bl.Implicit(bl.ClosedForm(lambda decay: optimum), tolerance=1e-11, linear_solver=solver)
    decay = DECAY.clone().requires_grad_()
    weights, _ = response(DIGITS, {"decay": decay}, response.init(DIGITS))
    return torch.autograd.grad(digits_valid(weights), decay)[0]


@pytest.fixture(scope="module")
def exact(optimum):
    return digits_hypergradient(optimum, bl.linear.Dense())


def test_digits_against_retraining(optimum, exact):
    h = 1e-3  # fourth order: truncation h^4 = 1e-12, rounding 1e-16 / h = 1e-13, against directional slopes of 1e-3
    for seed in range(3):
        way = torch.randn(64, 10, generator=torch.Generator().manual_seed(seed), dtype=D)
        f = {k: digits_valid(retrained(DECAY + k * h * way, optimum)).item() for k in (-2, -1, 1, 2)}
        difference = (f[-2] - 8 * f[-1] + 8 * f[1] - f[2]) / (12 * h)
        assert (exact * way).sum().item() == pytest.approx(difference, rel=1e-6)


def test_digits_forty_conjugate_gradients(optimum, exact):
    slope = digits_hypergradient(optimum, bl.ConjugateGradient(max_steps=40, rtol=None))
    assert ((slope - exact).norm() / exact.norm()).item() <= 1e-6


def test_digits_neumann_improves_with_every_term(optimum, exact):
    errors = [
        (digits_hypergradient(optimum, bl.Neumann(max_steps=k, rtol=None)) - exact).norm().item()
        for k in (0, 5, 20, 100, 300)
    ]
    assert all(later < earlier for earlier, later in zip(errors, errors[1:]))


def test_digits_unrolling_at_the_optimum_is_a_neumann_series(optimum):
    lr, steps = 0.5, 12
    series = digits_hypergradient(optimum, bl.Neumann(max_steps=steps - 1, step_size=lr, rtol=None))
    response = bl.Unrolled(partial(optim.SGD, lr=lr), steps=steps)
    decay = DECAY.clone().requires_grad_()
    state = response.init(DIGITS) | {"variables": optimum}
    weights, _ = response(DIGITS, {"decay": decay}, state)
    (unrolled,) = torch.autograd.grad(digits_valid(weights), decay)
    assert ((unrolled - series).norm() / series.norm()).item() <= 1e-10


def test_leaving_the_domain_of_the_loss_raises():
    """Beyond the barrier the loss is NaN, but its gradient is finite and even 0 at y = -1.618."""
    known = bl.testing.LogBarrier(coupling=((1.0,),), at=(0.0,), target=(0.0,))
    game, response = known.game(), bl.Implicit(bl.Scipy("L-BFGS-B"), steps=50, tolerance=1e-5)
    with pytest.raises(bl.errors.NonFiniteError, match="left its domain"):
        response(game, {"x": known.x0}, response.init(game))


def test_backward_lets_the_graph_go_and_can_be_repeated():
    alive = []

    def follow(x, y):
        between = y - x.exp()
        alive.append(weakref.ref(between))  # the square's graph saves it
        return (between**2).sum() + (between**4).sum()

    game = bl.Game(
        x=bl.Player(lambda y: (y**2).sum(), torch.zeros(3, dtype=D)), y=bl.Player(follow, torch.zeros(3, dtype=D))
    )
    response = bl.Implicit(bl.ClosedForm(lambda x: x.exp()))
    x = torch.tensor([0.1, -0.3, 0.2], dtype=D, requires_grad=True)
    answer, _ = response(game, {"x": x}, response.init(game))
    loss = (answer**2).sum()
    for again in (True, False):
        (slope,) = torch.autograd.grad(loss, x, retain_graph=again)
        assert torch.allclose(slope, 2.0 * (2.0 * x).exp(), rtol=1e-6)
    assert loss.requires_grad  # a user may keep it, as in a list of losses
    assert not any(reference() is not None for reference in alive)


def test_what_one_of_two_leaders_gets_does_not_depend_on_the_other_being_asked():
    def follow(a, b, y):
        return ((y - a.exp() * b) ** 2).sum()

    start = torch.full((2,), 0.5, dtype=D)
    game = bl.Game(
        a=bl.Player(lambda a, y: (y**2).sum() + a.sum(), start),
        b=bl.Player(lambda a, b, y: (y**2).sum() + (a * b).sum(), start),
        y=bl.Player(follow, start),
    )
    response = bl.Implicit(bl.ClosedForm(lambda a, b: a.exp() * b))
    for wanted, tracked in ([0], [0, 1]), ([1], [0, 1]), ([0], [0]), ([1], [1]), ([0, 1], [0, 1]):
        leaders = [torch.tensor([0.1, -0.3], dtype=D), torch.tensor([2.0, 1.5], dtype=D)]
        for index in tracked:
            leaders[index].requires_grad_()
        a, b = leaders
        answer, _ = response(game, {"b": b, "a": a}, response.init(game))
        slopes = torch.autograd.grad((answer**2).sum(), [leaders[index] for index in wanted])
        exact = [2.0 * (2.0 * a).exp() * b**2, 2.0 * (2.0 * a).exp() * b]
        for index, slope in zip(wanted, slopes, strict=True):
            assert torch.allclose(slope, exact[index].detach(), rtol=1e-6)

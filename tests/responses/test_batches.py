"""Which batches an implicit derivative is of: held, fresh for each product, or all of the data."""

import warnings

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import bilevel as bl
from bilevel.errors import SecondDerivativeError, UnreliableResponseWarning
from bilevel.linear import LinearOperator, StochasticGradient
from bilevel.responses import AllBatches, FreshBatches, HeldBatch

D = torch.float64
X = torch.tensor([-0.5, 0.3, 0.1], dtype=D)
TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=D)
STEP = 0.2


def rows(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 4, generator=generator, dtype=D)


def lead(x, y):
    return (y - TARGET).square().sum() + 0.1 * x.square().sum()


def follow(x, y, batch):
    inputs, outputs = batch[..., :3], batch[..., 3]
    return 0.5 * (inputs @ y - outputs).square().mean() + 0.5 * (x.exp() * y.square()).sum()


def curvature(x, data):
    return data[:, :3].T @ data[:, :3] / len(data) + torch.diag(x.exp())


def optimum(x, data):
    return torch.linalg.solve(curvature(x, data), data[:, :3].T @ data[:, 3] / len(data))


def loader(data, size, **options):
    return DataLoader(data, batch_size=size, **options)


def setting(data, batches, solver, source):
    """The game on a source of batches, whose follower is at the optimum of all of the data."""
    game = bl.Game(x=bl.Player(lead, X), y=bl.Player(follow, torch.zeros(3, dtype=D), data=source))
    closed = bl.ClosedForm(lambda x: optimum(x, data))
    return game, bl.Implicit(closed, tolerance=None, linear_solver=solver, batches=batches)


def value(game, response, state, x):
    y, _ = response(game, {"x": x}, state)
    return game.loss("x", {"x": x, "y": y})


def slope(game, response, state):
    x = X.clone().requires_grad_()
    y, after = response(game, {"x": x}, state)
    (found,) = torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)
    return found, response.after_backward(after, y)


def exact(data):
    return torch.func.grad(lambda x: lead(x, optimum(x, data)))(X)


CG = bl.ConjugateGradient(rtol=1e-14)


@pytest.mark.parametrize("size", [4, 7])  # of 14 rows: with a short last batch, and without
def test_all_batches_give_the_hypergradient_of_the_whole_data_set(size):
    data = rows(14)
    game, response = setting(data, AllBatches(), CG, loader(data, size, shuffle=True))
    state = response.init(game)
    found, after = slope(game, response, state)
    torch.testing.assert_close(found, exact(data), rtol=1e-12, atol=1e-12)
    assert float(after["stationarity"]) < 1e-12  # judged by all of the data, at whose optimum it is
    # And at whatever y: the last answer's derivative does not depend on how the data are cut.
    whole, same = setting(data, HeldBatch(), CG, [data])
    torch.testing.assert_close(found, slope(whole, same, same.init(whole))[0], rtol=1e-12, atol=1e-12)


def test_all_batches_inside_transforms_and_of_second_order():
    data = rows(14)
    game, response = setting(data, AllBatches(), CG, loader(data, 4))
    state = response.init(game)
    found = torch.func.grad(lambda x: value(game, response, state, x))(X)
    torch.testing.assert_close(found, exact(data), rtol=1e-11, atol=1e-11)
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(value(game, response, state, x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    wanted = torch.func.hessian(lambda x: lead(x, optimum(x, data)))(X).sum(0)
    torch.testing.assert_close(second, wanted, rtol=1e-10, atol=1e-10)


def test_all_batches_are_the_first_so_many_or_weighed_by_hand():
    data = rows(14)
    game, response = setting(data[:8], AllBatches(most=2), CG, loader(data, 4))
    found, _ = slope(game, response, response.init(game))
    torch.testing.assert_close(found, exact(data[:8]), rtol=1e-12, atol=1e-12)
    one_weight = AllBatches(size=lambda batch: 1.0)
    equal, same = setting(data, one_weight, CG, loader(data, 10))  # 10 rows and 4, alike
    doubled = torch.cat([data[:10].repeat(2, 1), data[10:].repeat(5, 1)])
    at_optimum = torch.linalg.solve(curvature(X, doubled), 2.0 * (optimum(X, data) - TARGET))
    wanted = 0.2 * X - X.exp() * optimum(X, data) * at_optimum
    torch.testing.assert_close(slope(equal, same, same.init(equal))[0], wanted, rtol=1e-12, atol=1e-12)


def test_batches_without_a_length_ask_for_a_size():
    data = rows(8)
    _, response = setting(data, AllBatches(), CG, [data])
    game = bl.Game(
        x=bl.Player(lead, X),
        y=bl.Player(
            lambda x, y, batch: follow(x, y, batch["rows"]),
            torch.zeros(3, dtype=D),
            data=[{"rows": data, "label": torch.zeros(3)}],
        ),
    )
    with pytest.raises(ValueError, match=r"AllBatches\(size=...\)"):
        response.init(game)


def draws(data, batches, solver, count, *, size=2):
    """Hypergradients `[count, 3]` at the optimum of the data, on batches drawn with replacement."""
    sampler = RandomSampler(range(len(data)), replacement=True, num_samples=64 * size)
    game, response = setting(data, batches, solver, loader(data, size, sampler=sampler))
    found = [slope(game, response, response.init(game, seed=seed))[0] for seed in range(count)]
    return torch.stack(found)


def off(sample, wanted):
    """How many standard errors a mean is from what is wanted, the largest over coordinates."""
    error = sample.std(0) / len(sample) ** 0.5
    return float(((sample.mean(0) - wanted) / error).abs().max())


NEUMANN = bl.Neumann(max_steps=6, step_size=STEP, power_steps=0, rtol=None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["neumann", "sgd"])
def test_fresh_batches_are_right_on_average(kind):
    """The mean over draws is the same steps with the mean matrix: within 4.5 standard errors in 3 coordinates,

    which a right estimate misses once in 50,000 times by the normal law. The held batch's mean, an inverse of single
    batches, is not the derivative on all of the data.
    """
    data = rows(12)
    y = optimum(X, data)
    mean, rhs = curvature(X, data), 2.0 * (y - TARGET)
    if kind == "neumann":
        solver, iterates = NEUMANN, []
    else:
        solver, iterates = StochasticGradient(step_size=STEP, max_steps=7, averaged=0.4), []
    u = torch.zeros(3, dtype=D)
    for _ in range(7):
        u = u + STEP * (rhs - mean @ u)
        iterates.append(u)
    u = u if kind == "neumann" else torch.stack(iterates[-3:]).mean(0)
    wanted = 0.2 * X - X.exp() * y * u
    assert off(draws(data, FreshBatches(), solver, 250), wanted) < 4.5
    if kind == "neumann":
        assert off(draws(data, HeldBatch(), CG, 250), exact(data)) > 6.0


def test_fresh_batches_are_read_on_and_not_again():
    data = rows(12)
    game, response = setting(data, FreshBatches(), NEUMANN, [data[:4], data[4:8], data[8:]])
    _, after = slope(game, response, response.init(game))
    # One batch of the call, and one for each of 6 products and the residual, which brings the mixed product.
    assert after["data"] == {"seed": 0, "epoch": 2, "index": 2}
    assert float(response.report(after).products) == 7


def test_fresh_batches_say_what_they_cannot_do():
    data = rows(12)
    source = [data[:6], data[6:]]
    for solver in (CG, bl.GMRES(), bl.linear.Dense(), bl.Nystrom(rank=2, damping=0.1)):
        game, response = setting(data, FreshBatches(), solver, source)
        with pytest.raises(ValueError, match=f"{type(solver).__name__} needs one matrix"):
            response.init(game)
    game, response = setting(data, FreshBatches(), bl.Neumann(max_steps=5), source)
    with pytest.raises(ValueError, match=r"rtol=1e-06.*noise"):
        response.init(game)
    game, response = setting(data, FreshBatches(), NEUMANN, source)
    state = response.init(game)
    with pytest.raises(SecondDerivativeError, match="HeldBatch"):
        torch.func.grad(lambda x: value(game, response, state, x))(X)
    x = X.clone().requires_grad_()
    with pytest.raises(SecondDerivativeError, match="HeldBatch"):
        torch.autograd.grad(value(game, response, state, x), x, create_graph=True)
    bounded = bl.Game(
        x=bl.Player(lead, X),
        y=bl.Player(follow, torch.zeros(3, dtype=D), domain=bl.Box(-1.0, 1.0), data=source),
    )
    with pytest.raises(TypeError, match="constrained"):
        bl.Implicit(bl.inner.ProjectedGradient(), batches=AllBatches()).init(bounded)
    with pytest.raises(TypeError, match="expected HeldBatch"):
        bl.Implicit(bl.ClosedForm(lambda x: x), batches="all")


def test_a_given_batch_is_all_there_is():
    data = rows(12)
    for batches in (AllBatches(), FreshBatches()):
        solver = CG if isinstance(batches, AllBatches) else StochasticGradient(step_size=0.3, max_steps=400)
        game, response = setting(data, batches, solver, [data[:6], data[6:]])
        x = X.clone().requires_grad_()
        y, _ = response(game, {"x": x}, response.init(game), data)
        (found,) = torch.autograd.grad(lead(x, y), x)
        torch.testing.assert_close(found, exact(data), rtol=1e-9, atol=1e-9)


def test_what_a_held_batch_leaves_out_is_told_when_asked():
    data = rows(240)
    cut = list(data.split(40))
    # The batches after the held one, all six of them: their mean is that of all of the data.
    game, response = setting(data, HeldBatch(against=6), CG, cut)
    found, after = slope(game, response, response.init(game))
    held = found - 0.2 * X
    truth = exact(data) - 0.2 * X
    error = float((held - truth).norm() / truth.norm())
    told = response.report(after).error
    # One step of refinement leaves the square of how far the held matrix is off, |I - H0^-1 H|.
    matrix = torch.eye(3, dtype=D) - torch.linalg.solve(curvature(X, cut[0]), curvature(X, data))
    left = float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    assert error > 2.0 * left  # so that the number says something
    assert abs(told - error) < 2.0 * left
    # Warned of above the tolerance alone; without being asked nothing is measured.
    small, strict = setting(data, HeldBatch(against=6, tolerance=error / 4.0), CG, cut)
    with pytest.warns(UnreliableResponseWarning, match="Player 'y': 6 other batches correct"):
        slope(small, strict, strict.init(small))
    plain, silent = setting(data, HeldBatch(), CG, cut)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, nothing = slope(plain, silent, silent.init(plain))
    assert response.report(after).products == 2 * silent.report(nothing).products + 12
    with pytest.raises(ValueError, match="against"):
        HeldBatch(against=-1)


@pytest.mark.slow
def test_a_run_with_fresh_batches_goes_where_all_of_the_data_lead():
    data = rows(64)
    source = loader(TensorDataset(data), 8, shuffle=True)

    def by_list(x, y, batch):
        return follow(x, y, batch[0])

    game = bl.Game(x=bl.Player(lead, X), y=bl.Player(by_list, torch.zeros(3, dtype=D), data=source))
    closed = bl.ClosedForm(lambda x: optimum(x, data))
    solver = StochasticGradient(step_size=0.1, max_steps=5, averaged=0.0)

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.05)

    def run(batches, solver):
        response = bl.Implicit(closed, tolerance=None, linear_solver=solver, batches=batches)
        return bl.solve(game, y=response, optimizer=sgd, steps=150).variables["x"]

    noisy, clean = run(FreshBatches(), solver), run(AllBatches(), CG)
    moved = float((clean - X).norm())
    assert float((noisy - clean).norm()) < 0.2 * moved


def test_stochastic_gradient_averages_random_products():
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=D)
    rhs = torch.tensor([1.0, -1.0], dtype=D)
    wanted = torch.linalg.solve(matrix, rhs)
    solver = StochasticGradient(step_size=0.3, max_steps=200)
    found = solver.solve(LinearOperator(matrix.mv, symmetric=True), rhs)
    torch.testing.assert_close(found.solution, wanted, rtol=1e-6, atol=1e-6)  # (1 - .3 * .79)^100
    generator = torch.Generator().manual_seed(0)

    def sampled(v):
        return matrix @ v + torch.randn(2, generator=generator, dtype=D) * v

    noisy = LinearOperator(sampled, symmetric=True, random=True)
    answers = torch.stack([solver.solve(noisy, rhs).solution for _ in range(60)])
    assert off(answers, wanted) < 4.5
    last = StochasticGradient(step_size=0.3, max_steps=200, averaged=0.0)
    one_by_one = torch.stack([last.solve(noisy, rhs).solution for _ in range(60)])
    assert float(answers.var(0).sum()) < 0.3 * float(one_by_one.var(0).sum())  # a mean of 100
    with pytest.raises(ValueError, match="averaged"):
        StochasticGradient(step_size=0.1, averaged=2.0)

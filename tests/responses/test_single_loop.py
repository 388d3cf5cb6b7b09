"""SingleLoop: follower, adjoint and leader move together, a step of each on one minibatch."""

import io
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

import bilevel as bl
from bilevel.errors import LinearNonConvergenceWarning, NonFiniteError, SecondDerivativeError
from bilevel.extend import Response
from bilevel.testing import check_response
from bilevel.testing.laws import LAWS
from bilevel.testing.laws.state import STATE
from bilevel.variance import SAGA, SARAH, digest

SGD = torch.optim.SGD
SIZE, BATCHES = 4, 6
REDUCTIONS = [None, SAGA(), SARAH(5)]
NAMES = ["SOBA", "SABA", "SRBA"]


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batches_of(seed=0, noise=0.3, count=BATCHES):
    """Quadratics whose curvatures lie within .5 and 1.5 on average, and differ from batch to batch."""
    spread = noise * drawn(seed, count, SIZE, SIZE) / SIZE**0.5
    hessians = torch.diag(torch.linspace(0.5, 1.5, SIZE, dtype=torch.float64)) + 0.25 * spread @ spread.mT
    couplings = torch.eye(SIZE, dtype=torch.float64) + noise * drawn(seed + 1, count, SIZE, SIZE)
    return list(zip(hessians, couplings, noise * drawn(seed + 2, count, SIZE) + 1.0, strict=True))


TARGET = torch.linspace(-1.0, 1.0, SIZE, dtype=torch.float64)


def lead(x, y):
    return 0.5 * (y - TARGET.to(y)).square().sum() + 0.5 * x.square().sum()


def follow(x, y, batch):
    hessian, coupling, offset = (part.to(y) for part in batch)
    return 0.5 * y @ hessian @ y - y @ (coupling @ x + offset)


def game_of(data, dtype=torch.float64):
    start = torch.zeros(SIZE, dtype=dtype)
    return bl.Game(x=bl.Player(lead, start), y=bl.Player(follow, start, data))


def means(data):
    return tuple(torch.stack(parts).mean(0) for parts in zip(*data, strict=True))


def answer(data, x):
    """y* and the exact hypergradient at x."""
    hessian, coupling, offset = means(data)
    y = torch.linalg.solve(hessian, coupling @ x + offset)
    return y, x + coupling.T @ torch.linalg.solve(hessian, y - TARGET)


def optimum(data):
    """Where the exact hypergradient, which is affine in x, vanishes."""
    zero = torch.zeros(SIZE, dtype=torch.float64)
    at_zero = answer(data, zero)[1]
    matrix = torch.stack([answer(data, unit)[1] - at_zero for unit in torch.eye(SIZE, dtype=torch.float64)], dim=1)
    return torch.linalg.solve(matrix, -at_zero)


def steps_at(response, game, x, count, state=None):
    """So many calls at one x: the last hypergradient, and the state."""
    state = response.init(game) if state is None else state
    for _ in range(count):
        x = x.detach().clone().requires_grad_()
        y, state = response(game, {"x": x}, state)
        (slope,) = torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)
        state = response.after_backward(state, y)
    return slope, state


# How right it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", REDUCTIONS, ids=NAMES)
def test_with_the_whole_batch_the_hypergradient_becomes_exact(variance):
    """Both equations contract by at least 1 - .5 * .5 a step: 200 steps leave .75^200 = 1e-25 of them."""
    data = [means(batches_of())]
    x, response = torch.ones(SIZE, dtype=torch.float64), bl.SingleLoop(partial(SGD, lr=0.5), variance=variance)
    slope, state = steps_at(response, game_of(data), x, 200)
    wanted_y, wanted = answer(data, x)
    torch.testing.assert_close(slope, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state["variables"], wanted_y, rtol=1e-12, atol=1e-12)
    report = response.report(state)
    assert report.residual < 1e-12
    assert report.stationarity < 1e-12
    assert (report.gradients, report.products) == (200, 200) if variance is None else report.products >= 200


def test_the_first_hypergradient_has_no_indirect_part_and_says_so():
    x, response = torch.ones(SIZE, dtype=torch.float64), bl.SingleLoop(partial(SGD, lr=0.5))
    slope, state = steps_at(response, game_of(batches_of()), x, 1)
    torch.testing.assert_close(slope, x)
    assert response.report(state).residual == 1.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_steps_are_those_of_the_paper(momentum):
    """Each step by hand, on minibatches; the leader's moving average is SGD's with as much dampening as momentum."""
    data, rho, rate = batches_of(), 0.3, 0.2
    x, y, v = (torch.zeros(SIZE, dtype=torch.float64) for _ in range(3))
    average = None
    for step in range(20):
        hessian, coupling, offset = data[step % BATCHES]
        slope_y, cotangent = hessian @ y - coupling @ x - offset, y - TARGET
        slope_x = x - coupling.T @ v
        # theta = 1 - momentum; it begins at the first direction, where torch's buffer does.
        average = slope_x if average is None else momentum * average + (1.0 - momentum) * slope_x
        x, y, v = x - rate * average, y - rho * slope_y, v - rho * (hessian @ v + cotangent)
    leader = partial(SGD, lr=rate, momentum=momentum, dampening=momentum)
    solution = bl.solve(game_of(data), y=bl.SingleLoop(partial(SGD, lr=rho)), optimizer=leader, steps=20)
    torch.testing.assert_close(solution.variables["x"], x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(solution.variables["y"], y, rtol=1e-12, atol=1e-12)


@dataclass(frozen=True)
class Repeated(Response):
    """So many calls at one point, each with the leader's backward pass: what a single loop settles at."""

    loop: bl.SingleLoop
    steps: int = 8

    @property
    def promise(self):
        return self.loop.promise

    @property
    def budget(self):
        return self.steps

    def with_budget(self, steps):
        return replace(self, steps=steps)

    @property
    def behaviour(self):
        return replace(self.loop.behaviour, steps_in_transforms=False)

    def init(self, game, *, follower=None, seed=0):
        return self.loop.init(game, follower=follower, seed=seed)

    def after_backward(self, state, answer):
        return self.loop.after_backward(state, answer)

    def report(self, state):
        return self.loop.report(state)

    def __call__(self, game, others, state, batch=None):
        for _ in range(0 if bl.extend.transforms_active() else self.steps):
            given = bl.extend.map_leaves(lambda t: t.detach().clone().requires_grad_(), dict(others))
            with torch.enable_grad():
                y, state = self.loop(game, given, state, batch)
                loss = game.loss(game.names[0], {**given, state["follower"]: y})
                torch.autograd.backward(loss, inputs=bl.extend.leaves(given))
            state = self.loop.after_backward(state, y)
        return self.loop(game, others, state, batch)


@pytest.mark.slow
def test_it_holds_the_laws_of_a_response():
    """One call alone answers where it is; what it settles at is held to the laws of an optimum's derivative."""
    loop = bl.SingleLoop(partial(SGD, lr=0.5))
    assert check_response(loop, laws=STATE, examples=3)
    # Under a transform a response answers by its state, which here is a step further than the plain call's answer. And
    # its own leader's loss is asked without a batch.
    settled = [law for law in LAWS if law.name not in ("vmap = loop", "batches", "workers")]
    report = check_response(Repeated(loop), laws=settled, examples=2)
    assert {row.law for row in report.rows if row.verdict == "holds"} >= {
        "exact",
        "exact, float32",
        "linear in the leader",
    }


@pytest.mark.slow
@pytest.mark.parametrize(("variance", "left"), [(SAGA(), 1e-9), (SARAH(6), 1e-9)], ids=NAMES[1:])
def test_variance_reduction_converges_with_constant_steps_where_plain_steps_stall(variance, left):
    """1,200 steps on six batches: plain steps end at the noise that is in a batch, times the step size."""
    data = batches_of()
    solve = partial(bl.solve, game_of(data), optimizer=partial(SGD, lr=0.05), steps=1200)
    wanted, off = optimum(data), {}
    for name, reduction in (("plain", None), ("reduced", variance)):
        x = solve(y=bl.SingleLoop(partial(SGD, lr=0.3), variance=reduction)).variables["x"]
        off[name] = float((x - wanted).norm() / wanted.norm())
    assert off["reduced"] <= left
    assert off["plain"] >= 1e-4


@pytest.mark.slow
def test_decaying_steps_go_by_a_scheduler():
    """With steps of t^-1/2 for all three, plain minibatches come nearer than with constant ones."""
    data, wanted = batches_of(noise=1.0), optimum(batches_of(noise=1.0))
    decay = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda t: (1.0 + t / 10.0) ** -0.5)

    def off(decaying):
        inner = bl.inner.TorchOptimizer(partial(SGD, lr=0.2), scheduler=decay if decaying else None)
        scheduler = decay if decaying else None
        leader = partial(SGD, lr=0.1)
        run = bl.solve(game_of(data), y=bl.SingleLoop(inner), optimizer=leader, scheduler=scheduler, steps=1500)
        return float((run.variables["x"] - wanted).norm())

    assert off(decaying=True) < 0.5 * off(decaying=False)


@pytest.mark.slow
@pytest.mark.parametrize("variance", REDUCTIONS, ids=NAMES)
def test_in_float32_nothing_drifts(variance):
    data = [tuple(part.float() for part in batch) for batch in batches_of(noise=0.0)]
    wanted = optimum(batches_of(noise=0.0))
    data = [(*batch[:2], batch[2] + 0.01 * i) for i, batch in enumerate(data)]  # batches that SAGA can tell apart
    wanted = optimum([tuple(part.double() for part in batch) for batch in data])
    inner = bl.SingleLoop(partial(SGD, lr=0.3), variance=variance)
    run = bl.solve(game_of(data, torch.float32), y=inner, optimizer=partial(SGD, lr=0.05), steps=600)
    assert run.variables["x"].dtype == torch.float32
    # Rounding of some 1e-7, times the conditioning of some 10; plain steps are left with .02 of the offsets.
    assert float((run.variables["x"].double() - wanted).norm()) <= (0.1 if variance is None else 1e-5)


# Its state -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", REDUCTIONS, ids=NAMES)
def test_it_resumes_bit_for_bit(variance, tmp_path):
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=40)
    inner = bl.inner.TorchOptimizer(partial(SGD, lr=0.2, momentum=0.5), scheduler=cosine)
    response = bl.SingleLoop(inner, adjoint=partial(SGD, lr=0.2), variance=variance)
    solve = partial(bl.solve, game_of(batches_of()), y=response, optimizer=partial(SGD, lr=0.05))
    whole = solve(steps=25)
    solve(steps=11, checkpoint=tmp_path / "run.pt")
    resumed = solve(steps=25, checkpoint=tmp_path / "run.pt")
    assert torch.equal(whole.variables["x"], resumed.variables["x"])
    assert torch.equal(whole.states["y"]["adjoint"]["v"], resumed.states["y"]["adjoint"]["v"])


@pytest.mark.parametrize("variance", REDUCTIONS, ids=NAMES)
def test_its_state_is_plain_and_stays_as_it_is(variance):
    game, response = game_of(batches_of()), bl.SingleLoop(partial(SGD, lr=0.3), variance=variance)
    _, state = steps_at(response, game, torch.ones(SIZE, dtype=torch.float64), 9)
    file = io.BytesIO()
    torch.save(state, file)
    before = file.getvalue()
    steps_at(response, game, torch.ones(SIZE, dtype=torch.float64), 3, state)
    again = io.BytesIO()
    torch.save(state, again)
    assert before == again.getvalue()
    file.seek(0)
    torch.load(file, weights_only=True)


def test_a_modules_buffers_advance_once_a_call():
    torch.manual_seed(0)
    inputs, targets = torch.randn(32, 4), torch.randn(32, 1)
    data = [(inputs[i : i + 8], targets[i : i + 8]) for i in range(0, 32, 8)]

    def train(decay, weights, batch):
        return (weights(batch[0]) - batch[1]).square().mean() + decay.exp() * weights["1.weight"].square().sum()

    def valid(weights):
        return (weights(inputs) - targets).square().mean()

    model = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1))
    game = bl.Game(decay=bl.Player(valid, torch.tensor(-3.0)), weights=bl.Player(train, model, data))
    for variance in REDUCTIONS:
        response = bl.SingleLoop(partial(SGD, lr=0.05), variance=variance)
        state, decay = response.init(game), torch.tensor(-3.0, requires_grad=True)
        for _ in range(3):
            weights, state = response(game, {"decay": decay}, state)
            everybody = {"decay": decay, "weights": weights}
            game.loss("decay", everybody, buffers=game.statistics(everybody, {"weights": state})).backward()
            state = response.after_backward(state, weights)
        assert int(state["buffers"]["0.num_batches_tracked"]) == 3


# What it refuses, and what it says -----------------------------------------------------------------------------------


def test_a_state_that_never_learned_is_refused():
    game, response = game_of(batches_of()), bl.SingleLoop(partial(SGD, lr=0.3))
    x, state = game.initial("x").requires_grad_(), response.init(game)
    y, state = response(game, {"x": x}, state)
    early = response.after_backward(state, y)  # before there was a backward pass
    lead(x, y).backward()
    for forgotten in (state, early):
        with pytest.raises(ValueError, match=r"state = response.after_backward\(state, answer\)"):
            response(game, {"x": x}, forgotten)
    _, after = response(game, {"x": x}, response.after_backward(state, y))
    assert after["adjoint"]["awaiting"]
    with torch.no_grad():  # a value alone asks for nothing
        _, state = response(game, {"x": x}, response.init(game))
        response(game, {"x": x}, state)


def test_two_cotangents_are_refused():
    game, response = game_of(batches_of()), bl.SingleLoop(partial(SGD, lr=0.3))
    x = game.initial("x").requires_grad_()
    y, _ = response(game, {"x": x}, response.init(game))
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    torch.autograd.grad(y.sum(), x, retain_graph=True)
    with pytest.raises(ValueError, match="one adjoint of player 'y'"):
        torch.autograd.grad(2.0 * y.sum(), x)


def test_a_second_derivative_is_refused():
    game, response = game_of(batches_of()), bl.SingleLoop(partial(SGD, lr=0.3))
    x = game.initial("x").requires_grad_()
    y, _ = response(game, {"x": x}, response.init(game))
    (slope,) = torch.autograd.grad(lead(x, y), x, create_graph=True)
    with pytest.raises(SecondDerivativeError, match="Use Implicit"):
        torch.autograd.grad(slope.sum(), x)


def test_a_loop_that_runs_away_is_told_before_a_hundred_steps():
    """A rate of 5 for curvatures of 1 multiplies what is left of both equations by 4 a step."""
    game = bl.Game(
        x=bl.Player(lambda y: (y - 1.0).square().sum(), torch.ones(2)),
        y=bl.Player(lambda x, y: 0.5 * (y - x).square().sum(), torch.zeros(2)),
    )
    response, x = bl.SingleLoop(partial(SGD, lr=5.0)), torch.ones(2, requires_grad=True)
    state = response.init(game)

    def step(state):
        y, after = response(game, {"x": x}, state)
        torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)
        return response.after_backward(after, y)

    for _ in range(10):
        state = step(state)
    with pytest.warns(LinearNonConvergenceWarning, match="on average over the last 10 steps the adjoint of player 'y'"):
        step(state)


def test_an_adjoint_that_learns_nothing_is_told():
    response = bl.SingleLoop(partial(SGD, lr=0.3), adjoint=partial(SGD, lr=1e-6))
    leader = partial(SGD, lr=0.01)
    with pytest.warns(LinearNonConvergenceWarning, match="the adjoint of player 'y' has left 1 "):
        bl.solve(game_of(batches_of()), y=response, optimizer=leader, steps=102)
    bl.solve(game_of(batches_of()), y=bl.SingleLoop(partial(SGD, lr=0.3)), optimizer=leader, steps=102)


def test_a_step_too_large_is_named():
    game, response = game_of(batches_of()), bl.SingleLoop(partial(SGD, lr=1e3))
    running_away = pytest.warns(LinearNonConvergenceWarning, match="the adjoint of player 'y' has left")
    with running_away, pytest.raises(NonFiniteError, match="below 2 over the largest curvature"):
        steps_at(response, game, torch.ones(SIZE, dtype=torch.float64), 200)


def test_a_table_needs_the_same_batches_in_each_pass():
    rows = drawn(5, 24, SIZE)
    shuffled = torch.utils.data.DataLoader(rows, batch_size=8, shuffle=True)

    def fit(x, y, batch):
        return 0.5 * (batch @ y - x.sum()).square().mean() + 0.5 * y.square().sum()

    def game(data):
        start = torch.zeros(SIZE, dtype=torch.float64)
        return bl.Game(x=bl.Player(lead, start), y=bl.Player(fit, start, data))

    x, response = torch.ones(SIZE, dtype=torch.float64), bl.SingleLoop(partial(SGD, lr=0.1), variance=SAGA())
    with pytest.raises(ValueError, match=r"data=list\(loader\)"):
        steps_at(response, game(shuffled), x, 8)
    made = list(shuffled)
    with pytest.raises(ValueError, match="the same one twice"):
        steps_at(response, game([made[0], made[0], made[1]]), x, 3)
    # In another order each time is no other batch.
    steps_at(response, game(lambda: (made[i] for i in torch.randperm(3))), x, 12)


def test_wrong_options_are_refused():
    with pytest.raises(ValueError, match="accumulate=2"):
        bl.SingleLoop(bl.inner.TorchOptimizer(partial(SGD, lr=0.1), accumulate=2))
    with pytest.raises(TypeError, match="variance='SAGA'"):
        bl.SingleLoop(partial(SGD, lr=0.1), variance="SAGA")
    with pytest.raises(ValueError, match="period=0"):
        SARAH(0)
    with pytest.raises(TypeError, match="LBFGS searches"):
        bl.SingleLoop(torch.optim.LBFGS).init(game_of(batches_of()))
    with pytest.raises(TypeError, match="SingleLoop cannot tune"):
        bl.SingleLoop(lambda p, x: SGD(p, lr=0.1)).init(game_of(batches_of()))


def test_a_domain_is_refused():
    boxed = bl.Player(lambda x, y: (y - x).square().sum(), torch.zeros(2), domain=bl.Box(0.0, 1.0))
    game = bl.Game(x=bl.Player(lambda y: y.sum(), torch.zeros(2)), y=boxed)
    with pytest.raises(TypeError, match="Use Implicit"):
        bl.SingleLoop(partial(torch.optim.SGD, lr=0.1)).init(game)


def test_under_vmap_each_task_sees_its_own_batch():
    def follow(x, y, batch):
        return 0.5 * (y - x * batch).square().sum() + 0.5 * y.square().sum() + 0.1 * y.pow(4).sum()

    def lead(y):
        return (y - 1.0).square().sum()

    start = torch.ones(2, dtype=torch.float64)
    batches = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64).view(3, 2)
    game = bl.Game(x=bl.Player(lead, start), y=bl.Player(follow, 0.3 * start, [batches[0]]))
    response = bl.SingleLoop(partial(torch.optim.SGD, lr=0.3))
    state = response.init(game)
    for _ in range(5):  # of an adjoint of 0 the derivative is 0, whatever the batch
        x = start.clone().requires_grad_()
        y, state = response(game, {"x": x}, state)
        torch.autograd.grad(lead(y), x)
        state = response.after_backward(state, y)

    def value(x, batch):
        return lead(response(game, {"x": x}, state, batch)[0])

    together = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(start, batches)
    # The mixed derivative times v is -batch v.
    torch.testing.assert_close(together, -batches * state["adjoint"]["v"], atol=1e-12, rtol=1e-12)
    assert float(together.norm()) > 0.1


def test_a_step_evaluates_each_loss_once_and_tells_it():
    calls, seen = {"x": 0, "y": 0}, []

    def counted(name, loss):
        calls[name] += 1
        return loss

    batch = batches_of()[0]
    game = bl.Game(
        x=bl.Player(lambda x, y: counted("x", lead(x, y)), torch.zeros(SIZE, dtype=torch.float64)),
        y=bl.Player(lambda x, y, batch: counted("y", follow(x, y, batch)), TARGET, [batch]),
    )
    taken = []

    def look(step, record, variables):
        taken.append(dict(calls))
        seen.append((record["y"], float(follow(variables["x"], variables["y"], batch))))

    sgd = partial(SGD, lr=0.1)
    bl.solve(game, y=bl.SingleLoop(sgd), optimizer=sgd, steps=4, callbacks=[look])
    assert [{name: after[name] - before[name] for name in calls} for before, after in pairwise(taken)] == [
        {"x": 1, "y": 1}
    ] * 3
    for (_, here), (told, _) in pairwise(seen):  # a step tells the loss where the last one has ended
        assert told == pytest.approx(here, rel=1e-12)


def test_a_batch_is_known_by_its_content():
    batch = {"inputs": drawn(0, 3, 2), "labels": torch.arange(3)}
    before = digest(batch)
    assert digest(batch) == before  # which is not read again
    assert digest({name: tensor.clone() for name, tensor in batch.items()}) == before
    batch["labels"][1] += 1
    assert digest(batch) != before
    batch["labels"][1] -= 1
    assert digest(batch) == before


def test_a_batch_that_is_written_to_through_numpy_is_another():
    memory = np.zeros((32, 5))
    batch = torch.from_numpy(memory)
    before = digest(batch)
    memory[...] = 1.0
    assert digest(batch) != before
    assert digest(batch) == digest(torch.ones(32, 5, dtype=torch.float64))

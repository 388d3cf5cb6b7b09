"""Both losses together: each method's limit in closed form, and no derivative of a derivative."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import bilevel as bl
from bilevel.dynamics import BOME, F2SA, F2SA2, VPBGD
from bilevel.variance import SAGA, SARAH

SGD = torch.optim.SGD
CURVATURES = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
MAP = torch.tensor([[1.0, 0.25], [0.0, -0.5], [0.5, 0.75]], dtype=torch.float64)
TARGET = torch.tensor([1.0, -0.5, 0.25], dtype=torch.float64)


def lead(x, y):
    return 0.5 * (y - TARGET.to(y)).square().sum() + 0.1 * x.square().sum()


def follow(x, y):
    return 0.5 * (CURVATURES.to(y) * (y - MAP.to(y) @ x).square()).sum()


def game_of(follow=follow):
    x = bl.Player(lead, torch.zeros(2, dtype=torch.float64))
    return bl.Game(x=x, y=bl.Player(follow, torch.zeros(3, dtype=torch.float64)))


def best():
    """Where |Mx - t|^2 / 2 + |x|^2 / 10 is least: the follower's optimum is Mx."""
    return torch.linalg.solve(MAP.T @ MAP + 0.2 * torch.eye(2, dtype=torch.float64), MAP.T @ TARGET)


def penalised(multiplier):
    """Where f + multiplier g is least in x and y together: the least of g is 0 for every x."""
    weight = multiplier * CURVATURES / (1.0 + multiplier * CURVATURES)  # y eliminated
    normal = MAP.T @ torch.diag(weight) @ MAP + 0.2 * torch.eye(2, dtype=torch.float64)
    return torch.linalg.solve(normal, MAP.T @ (weight * TARGET))


def played(method, rate=0.8, inner=0.6, steps=150, follow=follow, game=None):
    """The leader after so many steps."""
    optimizers = {"x": partial(SGD, lr=rate)}
    if not method.places_follower:
        optimizers["y"] = partial(SGD, lr=rate)
    rule = bl.ValueFunction(partial(SGD, lr=inner), method)
    return bl.solve(game or game_of(follow), dynamics=rule, optimizer=optimizers, steps=steps)


# Their limits --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "values", "order"),
    [
        (lambda nudge: F2SA2(nudge=nudge), (0.2, 0.1, 0.05), 2.0),
        (lambda inverse: F2SA(start=1.0 / inverse, growth=0.0), (0.05, 0.025, 0.0125), 1.0),
    ],
    ids=["F2SA-2", "F2SA"],
)
def test_the_bias_has_the_order_that_is_stated(method, values, order):
    """150 steps contract by 1 - .8 * .2 each: 1e-11 is left of the start, and less of the inner problems."""
    errors = [float((played(method(value)).variables["x"] - best()).norm()) for value in values]
    for larger, smaller in zip(errors, errors[1:], strict=False):
        assert math.log2(larger / smaller) == pytest.approx(order, abs=0.15)


@pytest.mark.slow
def test_the_follower_is_placed_near_its_optimum():
    x, y = (played(F2SA2(nudge=0.01)).variables[name] for name in "xy")
    torch.testing.assert_close(y, MAP @ x, atol=1e-3, rtol=0.0)  # nudge^2 times the curvatures' ratio
    x, y = (played(F2SA(start=100.0, growth=0.0)).variables[name] for name in "xy")
    torch.testing.assert_close(y, MAP @ x, atol=1e-9, rtol=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("multiplier", [2.0, 8.0])
def test_the_penalised_problem_is_solved(multiplier):
    """Exactly, at a rate below 1 over its curvature, and it nears the answer like 1 over the multiplier."""
    found = played(VPBGD(multiplier, ramp=0, steps=5), rate=0.05, steps=3000).variables["x"]
    torch.testing.assert_close(found, penalised(multiplier), atol=1e-6, rtol=0.0)


def test_the_multiplier_grows_along_its_ramp():
    history = played(VPBGD(0.2, ramp=4), rate=0.1, steps=6).history
    assert [record["dynamics.multiplier"] for record in history] == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2, 0.2])
    history = played(F2SA(), rate=0.1, steps=3).history
    assert [record["dynamics.multiplier"] for record in history] == pytest.approx([1.0, 1.1, 1.2])


@pytest.mark.slow
def test_bome_reaches_the_answer():
    """Its gap vanishes no faster than like 1/t: after 1,500 steps a few per cent are left."""
    solution = played(BOME(), rate=0.05, inner=0.6, steps=1500)
    assert float((solution.variables["x"] - best()).norm()) <= 0.05 * float(best().norm())
    torch.testing.assert_close(solution.variables["y"], MAP @ solution.variables["x"], atol=0.05, rtol=0.0)


# First derivatives alone, on minibatches -----------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """A square whose backward cannot be differentiated."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return 2.0 * y * grad


@pytest.mark.slow
def test_points_that_rejoin_end_where_the_others_do_if_they_settle():
    """Of curvatures .5 to 1.5, steps of .6 leave at most .7 of a distance: .7^60 is 5e-10."""
    apart, rejoined = (played(F2SA2(nudge=0.05, steps=60, rejoin=rejoin)).variables for rejoin in (False, True))
    for name in "xy":
        torch.testing.assert_close(rejoined[name], apart[name], atol=1e-7, rtol=0.0)


def test_points_that_rejoin_give_the_derivative_of_their_steps():
    """From one point K steps to either side are 2 nu sum_k (I - rho H)^k rho f_y apart: unrolling's derivative."""
    rate, inner, steps = 0.1, 0.6, 3
    moved = bl.solve(
        game_of(),
        dynamics=bl.ValueFunction(partial(SGD, lr=inner), F2SA2(nudge=1e-4, steps=steps, rejoin=True)),
        optimizer={"x": partial(SGD, lr=rate)},
        steps=1,
    )
    x, y = torch.zeros(2, dtype=torch.float64, requires_grad=True), torch.zeros(3, dtype=torch.float64)
    for _ in range(steps):
        y = y - inner * CURVATURES * (y - MAP @ x)
    (slope,) = torch.autograd.grad(lead(x, y), x)
    # f_y is taken along the way, at y_k, and not at the end: both are -TARGET where y stays at 0, as it does here.
    torch.testing.assert_close(moved.variables["x"], -rate * slope, atol=1e-6, rtol=0.0)


METHODS = [F2SA2(nudge=0.1), F2SA2(nudge=0.1, rejoin=True), F2SA(), BOME(), VPBGD(ramp=0)]
IDS = [type(method).__name__ for method in METHODS]


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_no_second_derivative_is_taken(method, monkeypatch):
    # Made before: a game looks once whether a function of the user's own has the derivatives that it says.
    game = game_of(lambda x, y: Once.apply(y - MAP @ x).sum())
    asked, plain = [], torch.autograd.grad

    def watched(*args, **kwargs):
        asked.append(kwargs.get("create_graph", False))
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    solution = played(method, steps=3, game=game, inner=0.1)
    assert asked
    assert not any(asked)
    assert solution.products == 0


def batches(seed, count, *shape):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def stochastic_game():
    def lead(x, y, batch):
        return 0.5 * (y - TARGET - 0.1 * batch).square().sum() + 0.1 * x.square().sum() + 0.01 * (x * batch[:2]).sum()

    def follow(x, y, batch):
        return 0.5 * (CURVATURES * (y - MAP @ x - 0.1 * batch).square()).sum()

    x = bl.Player(lead, torch.zeros(2, dtype=torch.float64), batches(0, 4, 3))
    return bl.Game(x=x, y=bl.Player(follow, torch.zeros(3, dtype=torch.float64), batches(1, 5, 3)))


@pytest.mark.parametrize("method", METHODS, ids=IDS)
def test_runs_resume_bit_for_bit(method, tmp_path):
    adam = partial(torch.optim.Adam, lr=0.05)
    optimizers = {"x": adam} if method.places_follower else {"x": adam, "y": adam}
    rule = bl.ValueFunction(partial(SGD, lr=0.2, momentum=0.5), method)
    solve = partial(bl.solve, stochastic_game(), dynamics=rule, optimizer=optimizers)
    whole = solve(steps=11)
    solve(steps=4, checkpoint=tmp_path / "run.pt")
    resumed = solve(steps=11, checkpoint=tmp_path / "run.pt")
    for name in "xy":
        assert torch.equal(whole.variables[name], resumed.variables[name])
    assert len(whole.history) == 11


@pytest.mark.slow
def test_the_sides_see_the_same_batches():
    """What is common to both sides' noise cancels: the leader's step is as quiet as without data."""
    optimizers = {"x": partial(SGD, lr=0.1)}
    rule = bl.ValueFunction(partial(SGD, lr=0.2), F2SA2(nudge=1e-3))
    solution = bl.solve(stochastic_game(), dynamics=rule, optimizer=optimizers, steps=300)
    # Differences of independent batches would be .1 / (2 * .001) = 50.
    assert max(record["gradient_norm"] for record in solution.history[-100:]) < 1.0


# What is refused -----------------------------------------------------------------------------------------------------


def test_what_it_cannot_play_is_refused():
    sgd = partial(SGD, lr=0.1)
    rule = bl.ValueFunction(sgd)
    with pytest.raises(ValueError, match="without a response; here .'x'. have none. Leave out the response"):
        bl.solve(game_of(), dynamics=rule, y=bl.Nudged(sgd), optimizer={"x": sgd}, steps=1)
    own = bl.Player(follow, torch.zeros(3, dtype=torch.float64), residual=lambda y, gradient: gradient)
    game = bl.Game(x=bl.Player(lead, torch.zeros(2, dtype=torch.float64)), y=own)
    with pytest.raises(ValueError, match="'y' has a residual of its own"):
        bl.solve(game, dynamics=rule, optimizer={"x": sgd}, steps=1)
    with pytest.raises(ValueError, match=r"\['y'\] are moved by the rule of play"):
        bl.solve(game_of(), dynamics=rule, optimizer={"x": sgd, "y": sgd}, steps=1)
    with pytest.raises(TypeError, match=r"method='F2SA'"):
        bl.ValueFunction(sgd, "F2SA")
    for wrong in (partial(F2SA2, nudge=0.0), partial(F2SA, start=0.0), partial(BOME, eta=0.0), partial(VPBGD, steps=0)):
        with pytest.raises(ValueError, match="expected"):
            wrong()
    with pytest.raises(bl.errors.NonFiniteError):
        played(F2SA2(), inner=1e6, steps=5)


# Many starts ---------------------------------------------------------------------------------------------------------


class Clamped(torch.optim.SGD):
    """Stays within [0, 3]."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.clamp_(0.0, 3.0)


def toy_lead(x: Tensor, y: Tensor) -> Tensor:
    value = torch.cos(4.0 * y + 2.0) / (1.0 + torch.exp(2.0 - 4.0 * x)) + 0.5 * torch.log((4.0 * x - 2.0) ** 2 + 1.0)
    return value.sum()


def toy_follow(x: Tensor, y: Tensor) -> Tensor:
    return ((x + y).square() + x * torch.sin(x + y).square()).sum()


def test_a_thousand_starts_reach_stationary_points_of_the_penalised_problem():
    """The follower's optimum is -x for every x; f is not convex in x, and has several local minima."""
    generator = torch.Generator().manual_seed(0)
    x = 3.0 * torch.rand(1000, generator=generator, dtype=torch.float64)
    y = 6.0 * torch.rand(1000, generator=generator, dtype=torch.float64) - 4.5
    game = bl.Game(x=bl.Player(toy_lead, x), y=bl.Player(toy_follow, y))
    rate, gamma = 0.01, 10.0  # curvature: at most 10 * (2 + 2 * 3) * 2 + 16
    rule = bl.ValueFunction(partial(SGD, lr=0.1), VPBGD(gamma, ramp=0))
    optimizers = {"x": partial(Clamped, lr=rate), "y": partial(SGD, lr=rate)}
    found = bl.solve(game, dynamics=rule, optimizer=optimizers, steps=800).variables
    x, y = (found[name].clone().requires_grad_() for name in "xy")
    slope_x, slope_y = torch.autograd.grad(toy_lead(x, y) + gamma * toy_follow(x, y), (x, y))
    x, y = x.detach(), y.detach()
    residual = torch.maximum(((x - slope_x).clamp(0.0, 3.0) - x).abs(), slope_y.abs())
    assert float(residual.max()) <= 0.03
    # |f_y| is at most 4, and the curvature of the follower's loss at least 2 there: 4 / (10 * 2).
    assert float((x + y).abs().max()) <= 0.25


# Leaders' own batches, corrected -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("reduction", "inner"), [(SAGA(), SAGA()), (SARAH(4), SARAH(5))], ids=["SABA", "SRBA"])
def test_with_both_players_corrected_constant_steps_reach_the_answer(reduction, inner, tmp_path):
    """Where without the leader's correction they stall; and a run resumes bit for bit."""
    game = stochastic_game()
    leads, follows = (torch.stack(batches(seed, count, 3)).mean(0) for seed, count in ((0, 4), (1, 5)))
    # y* = Mx + .1 mean, which the leader wants at t + .1 mean.
    wanted = torch.linalg.solve(
        MAP.T @ MAP + 0.2 * torch.eye(2, dtype=torch.float64),
        MAP.T @ (TARGET + 0.1 * leads - 0.1 * follows) - 0.01 * leads[:2],
    )
    response = bl.SingleLoop(partial(SGD, lr=0.3), variance=inner)
    solve = partial(bl.solve, game, y=response, optimizer=partial(SGD, lr=0.2))
    rule = bl.dynamics.VarianceReduced(reduction)
    assert float((solve(dynamics=rule, steps=700).variables["x"] - wanted).norm()) <= 1e-8
    assert float((solve(steps=700).variables["x"] - wanted).norm()) >= 1e-4
    whole = solve(dynamics=rule, steps=13)
    solve(dynamics=rule, steps=6, checkpoint=tmp_path / "run.pt")
    resumed = solve(dynamics=rule, steps=13, checkpoint=tmp_path / "run.pt")
    assert torch.equal(whole.variables["x"], resumed.variables["x"])


def test_on_one_batch_the_corrected_hypergradient_is_the_plain_one():
    """SAGA with a table of one entry, through any response."""
    sgd = partial(SGD, lr=0.3)
    for response in (bl.Unrolled(sgd, steps=5), bl.Implicit(sgd, steps=100, tolerance=1e-8)):
        plain = bl.solve(game_of(), y=response, optimizer=sgd, steps=4)
        rule = bl.dynamics.VarianceReduced(SAGA())
        reduced = bl.solve(game_of(), y=response, optimizer=sgd, steps=4, dynamics=rule)
        torch.testing.assert_close(reduced.variables["x"], plain.variables["x"], rtol=1e-12, atol=1e-12)


def test_a_leader_with_a_range_is_refused_by_name():
    game = bl.Game(
        x=bl.Player(lambda y: (y - 1.0).square().sum(), bl.Log(1e-3, 1.0)),
        y=bl.Player(lambda x, y: (y - x).square().sum(), torch.zeros(())),
    )
    rule = bl.ValueFunction(partial(torch.optim.SGD, lr=0.1))
    with pytest.raises(TypeError, match="'x' is moved in the free coordinates of its range"):
        bl.solve(game, dynamics=rule, steps=2)

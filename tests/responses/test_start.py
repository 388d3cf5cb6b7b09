"""A follower that begins at a function of the leader."""

from functools import partial

import pytest
import torch
from torch.nn.functional import mse_loss

import bilevel as bl

D = torch.float64
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
CURVATURE, CENTRE, TARGET = (torch.tensor(v, dtype=D) for v in ([0.5, 2.0], [1.0, -1.0], [0.3, 0.7]))


def follow(y):
    return 0.5 * (CURVATURE * (y - CENTRE) ** 2).sum()


def lead(y):
    return ((y - TARGET) ** 2).sum()


def quadratic(**options):
    x = torch.tensor([0.2, -0.4], dtype=D)
    start = options.pop("start", lambda x: 2 * x)
    return bl.Game(
        x=bl.Player(options.pop("lead", lead), x),
        y=bl.Player(options.pop("follow", follow), torch.zeros(2, dtype=D), start=start, **options),
    )


def hypergradient(game, response, x):
    x = x.clone().requires_grad_()
    y, _ = response(game, {"x": x}, response.init(game))
    return torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)[0]


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("differentiation", [bl.ReverseMode(), bl.Segments(count=3)])
def test_the_steps_begin_at_the_leader(differentiation, warm_start):
    # y_K - c = (1 - a h)^K (2 x - c), so that dy_K/dx = 2 (1 - a h)^K.
    game, x = quadratic(), torch.tensor([0.2, -0.4], dtype=D)
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=5, differentiation=differentiation, warm_start=warm_start)
    left = (1 - 0.1 * CURVATURE) ** 5
    expected = 2 * (CENTRE + left * (2 * x - CENTRE) - TARGET) * 2 * left
    # A dozen operations with numbers of order one.
    torch.testing.assert_close(hypergradient(game, response, x), expected, rtol=1e-13, atol=1e-13)


def test_no_call_goes_on_from_the_last_one():
    game, x = quadratic(), torch.tensor([0.2, -0.4], dtype=D)
    response = bl.Unrolled(partial(SGD, lr=0.1, momentum=0.9), steps=3)
    state = response.init(game)
    torch.testing.assert_close(state["variables"], 2 * x, rtol=0.0, atol=0.0)
    first, state = response(game, {"x": x}, state)
    second, _ = response(game, {"x": x}, state)
    assert torch.equal(first, second)


def test_adam_and_transforms_agree_with_steps_by_hand():
    game, x = quadratic(), torch.tensor([0.2, -0.4], dtype=D)

    def by_hand(x):
        y, mean, square = 2 * x, torch.zeros_like(x), torch.zeros_like(x)
        for step in range(1, 4):
            slope = CURVATURE * (y - CENTRE)
            mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
            y = y - 0.05 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        return lead(y)

    response = bl.Unrolled(partial(ADAM, lr=0.05), steps=3)
    expected = torch.func.grad(by_hand)(x)
    torch.testing.assert_close(hypergradient(game, response, x), expected, rtol=1e-10, atol=1e-12)
    state = response.init(game)

    def loss(x):
        y, _ = response(game, {"x": x}, state)
        return lead(y)

    torch.testing.assert_close(torch.func.grad(loss)(x), expected, rtol=1e-10, atol=1e-12)
    many = torch.func.vmap(torch.func.grad(loss))(torch.stack([x, 2 * x]))
    torch.testing.assert_close(many[0], expected, rtol=1e-10, atol=1e-12)


def test_the_second_derivative_goes_through_the_start():
    # The loss is a quadratic of x: its second derivative is 2 (dy_K/dx)^2, diagonal.
    game, x = quadratic(), torch.tensor([0.2, -0.4], dtype=D)
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=5)
    state = response.init(game)

    def loss(x):
        return lead(response(game, {"x": x}, state)[0])

    expected = torch.diag(2 * (2 * (1 - 0.1 * CURVATURE) ** 5) ** 2)
    torch.testing.assert_close(torch.autograd.functional.hessian(loss, x), expected, rtol=1e-12, atol=1e-12)


def test_the_start_may_take_the_batch():
    def loss(y, batch):
        return ((y - batch) ** 2).sum()

    batches = [torch.full((2,), value, dtype=D) for value in (1.0, 3.0)]
    game = quadratic(follow=loss, start=lambda x, batch: x * batch, data=batches)
    response = bl.Unrolled(partial(SGD, lr=0.25), steps=1)
    x = torch.tensor([0.2, -0.4], dtype=D)
    y, state = response(game, {"x": x}, response.init(game))
    torch.testing.assert_close(y, (x + 1.0) / 2)
    y, _ = response(game, {"x": x}, state)
    torch.testing.assert_close(y, (3.0 * x + 3.0) / 2)


def test_a_module_starts_at_a_module():
    torch.manual_seed(0)
    meta, task = (torch.nn.Linear(2, 1, dtype=D) for _ in range(2))
    inputs, targets = torch.randn(6, 2, dtype=D), torch.randn(6, 1, dtype=D)

    def fit(task, batch):
        return mse_loss(task(batch[0]), batch[1])

    def judge(task, batch):
        return mse_loss(task(batch[0]), batch[1])

    game = bl.Game(
        meta=bl.Player(judge, meta, data=[(inputs[3:], targets[3:])]),
        task=bl.Player(fit, task, data=[(inputs[:3], targets[:3])], start=lambda meta: meta),
    )
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=2)
    leader = {name: value.requires_grad_() for name, value in game.initial("meta").items()}
    y, _ = response(game, {"meta": leader}, response.init(game))
    loss = game.loss("meta", {"meta": leader, "task": y}, (inputs[3:], targets[3:]))
    found = torch.autograd.grad(loss, list(leader.values()))
    here = dict(leader)
    for _ in range(2):
        own = mse_loss(torch.func.functional_call(task, here, inputs[:3]), targets[:3])
        slopes = torch.autograd.grad(own, list(here.values()), create_graph=True)
        here = {name: value - 0.1 * slope for (name, value), slope in zip(here.items(), slopes, strict=True)}
    loss = mse_loss(torch.func.functional_call(task, here, inputs[3:]), targets[3:])
    for ours, theirs in zip(found, torch.autograd.grad(loss, list(leader.values())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_implicit_differentiates_a_proximal_term_and_not_the_start():
    # (H + lam) y = H c + lam x, so that dy/dx = lam / (H + lam).
    lam = 0.5
    game = quadratic(follow=lambda x, y: follow(y) + lam / 2 * ((y - x) ** 2).sum(), start=lambda x: x)
    x = torch.tensor([0.2, -0.4], dtype=D)
    response = bl.Implicit(
        partial(SGD, lr=0.3), steps=200, tolerance=1e-10, linear_solver=bl.ConjugateGradient(rtol=1e-12)
    )
    y = (CURVATURE * CENTRE + lam * x) / (CURVATURE + lam)
    expected = 2 * (y - TARGET) * lam / (CURVATURE + lam)
    # The follower stops at 1e-10 of its first gradient, which is below 3; its curvature is at least 1.
    torch.testing.assert_close(hypergradient(game, response, x), expected, rtol=1e-8, atol=1e-9)


def test_solve_learns_where_to_start_and_resumes_bit_for_bit(tmp_path):
    game = quadratic()
    response = bl.Unrolled(partial(ADAM, lr=0.1), steps=3)
    whole = bl.solve(game, y=response, steps=19)
    bl.solve(game, y=response, steps=8, checkpoint=tmp_path / "run.pt")
    resumed = bl.solve(game, y=response, steps=19, checkpoint=tmp_path / "run.pt")
    assert torch.equal(whole.variables["x"], resumed.variables["x"])
    assert whole.history[-1]["x"] < whole.history[0]["x"]


def test_many_games_start_each_at_its_own_leader():
    games = bl.Games(quadratic(), 2, init={"x": torch.tensor([[0.2, -0.4], [1.0, 2.0]], dtype=D)})
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=3)
    together = bl.solve(games, y=response, optimizer=partial(SGD, lr=0.1), steps=4)
    for index in range(2):
        alone = bl.solve(games.game(index), y=response, optimizer=partial(SGD, lr=0.1), steps=4)
        torch.testing.assert_close(together[index].variables["x"], alone.variables["x"], rtol=1e-12, atol=1e-12)


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "response",
    [
        bl.Implicit(partial(SGD, lr=0.1)),
        bl.Nudged(partial(SGD, lr=0.1)),
        bl.Hypernetwork(partial(SGD, lr=0.1), scale=0.1),
    ],
)
def test_an_optimum_does_not_depend_on_the_start(response):
    with pytest.raises(TypeError, match=r"x reaches it by its start= and no loss.*Use Unrolled"):
        response.init(quadratic())


def test_a_leaf_that_acts_by_the_start_alone_is_named():
    game = bl.Game(
        x=bl.Player(lead, {"start": torch.zeros(2, dtype=D), "lam": torch.ones((), dtype=D)}),
        y=bl.Player(
            lambda x, y: follow(y) + x["lam"] * (y**2).sum(), torch.zeros(2, dtype=D), start=lambda x: x["start"]
        ),
    )
    with pytest.raises(TypeError, match=r"x\['start'\] reaches it by its start="):
        bl.Implicit(partial(SGD, lr=0.1)).init(game)
    bl.Unrolled(partial(SGD, lr=0.1)).init(game)


def test_forward_mode_and_truncation_are_refused():
    game, x = quadratic(), torch.tensor([0.2, -0.4], dtype=D)
    with pytest.raises(ValueError, match="does not reach back to the start"):
        bl.Unrolled(partial(SGD, lr=0.1), steps=5, backprop_steps=2).init(game)
    with pytest.raises(TypeError, match=r"ForwardMode.*Use ReverseMode\(\) or Segments\(\)"):
        hypergradient(game, bl.Unrolled(partial(SGD, lr=0.1), steps=5, differentiation=bl.ForwardMode()), x)


def test_a_game_without_start_is_told_the_way_out():
    with pytest.raises(ValueError, match=r"start=lambda x: x"):
        bl.Game(x=bl.Player(lead, torch.zeros(2, dtype=D)), y=bl.Player(follow, torch.zeros(2, dtype=D)))


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (lambda z: z, "'z', which names no player who moves before it"),
        (lambda y: y, "'y', which names no player who moves before it"),
        (lambda: torch.zeros(2), "depends on nobody. Say init="),
        (lambda batch: batch, "takes `batch`, but the player has no data="),
        (lambda x: torch.cat([x, x]), r"returned \{'tensor': \(4,\)\}; expected the form of its init, .*\(2,\)"),
        (lambda x: x.detach(), "takes 'x' and does not depend on it"),
        (lambda x: x.float(), "torch.float32 with finite entries; expected finite numbers of torch.float64"),
        (lambda x: x / 0, "NaN or infinite"),
    ],
)
def test_a_wrong_start_is_refused(start, message):
    with pytest.raises(ValueError, match=message):
        quadratic(start=start)


def test_a_start_is_a_function_of_a_follower():
    with pytest.raises(TypeError, match=r"start is a tensor.*A fixed start is init="):
        bl.Player(follow, torch.zeros(2), start=torch.zeros(2))
    with pytest.raises(ValueError, match=r"it has no start="):
        bl.Player(follow, torch.zeros(2), start=lambda x: x, optimizer_hyper=True)
    with pytest.raises(ValueError, match=r"'y' has a start=.*and no response"):
        bl.solve(quadratic(lead=lambda x, y: lead(y) + (x**2).sum()), steps=1)


def test_joined_players_have_no_start():
    game = bl.Game(
        x=bl.Player(lambda x, y, z: (x + y + z) ** 2, torch.tensor(0.0)),
        y=bl.Player(lambda x, y, z: (y - x - z) ** 2, torch.tensor(0.0), start=lambda x: x),
        z=bl.Player(lambda x, y, z: (2 * z - x - y) ** 2, torch.tensor(0.0)),
    )
    with pytest.raises(ValueError, match=r"'y' has a start="):
        game.joined(both=("y", "z"))


def test_the_check_knows_what_it_cannot_see():
    with pytest.raises(ValueError, match="reaches 'y' by its start= and no loss.*gradcheck"):
        bl.testing.check_hypergradient(quadratic(), bl.Unrolled(partial(SGD, lr=0.1), steps=3))
    game = quadratic(follow=lambda x, y: follow(y) + 0.25 * ((y - x) ** 2).sum(), start=lambda x: x)
    response = bl.Implicit(
        partial(SGD, lr=0.3), steps=400, tolerance=1e-12, linear_solver=bl.ConjugateGradient(rtol=1e-12)
    )
    assert bl.testing.check_hypergradient(game, response)

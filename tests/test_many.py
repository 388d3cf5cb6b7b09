"""Many games at once are as many games alone."""

from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl

D = torch.float64
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
COUNT = 4


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def quadratic(count=COUNT):
    """The follower's optimum is y = B x + c, another B and c in each game; conditioned differently too."""

    def lead(x, y, batch):
        return ((y - batch["target"]) ** 2).sum() + 0.1 * (x**2).sum()

    def follow(x, y, batch):
        return 0.5 * (batch["curvature"] * (y - batch["slope"] @ x - batch["shift"]) ** 2).sum()

    curvature = torch.linspace(1.0, 2.0, count, dtype=D)[:, None] ** torch.arange(1.0, 4.0, dtype=D)
    batch = {"curvature": curvature, "slope": randn(count, 3, 2, seed=1), "shift": randn(count, 3, seed=2)}
    targets = {"target": randn(count, 3, seed=3)}
    game = bl.Game(
        x=bl.Player(lead, torch.zeros(2, dtype=D), [{"target": targets["target"][0]}]),
        y=bl.Player(follow, torch.zeros(3, dtype=D), [{k: v[0] for k, v in batch.items()}]),
    )
    init = {"x": randn(count, 2, seed=4), "y": randn(count, 3, seed=5)}
    return bl.Games(game, count, init=init, data={"x": [targets], "y": [batch]})


def ridge(count=COUNT):
    """Penalties of a ridge regression, data of its own for each game, the leader's the same for all."""

    def train(decay, weights, batch):
        inputs, targets = batch
        return ((inputs @ weights["w"] + weights["b"] - targets) ** 2).mean() + (decay.exp() * weights["w"] ** 2).sum()

    def valid(weights, batch):
        return ((batch[0] @ weights["w"] + weights["b"] - batch[1]) ** 2).mean()

    shared = (randn(10, 5, seed=1), randn(10, seed=2))
    own = (randn(count, 12, 5, seed=3), randn(count, 12, seed=4))
    start = {"w": torch.zeros(5, dtype=D), "b": torch.zeros((), dtype=D)}
    game = bl.Game(
        decay=bl.Player(valid, torch.full((5,), -2.0, dtype=D), [shared]),
        weights=bl.Player(train, start, [tuple(t[0] for t in own)]),
    )
    return bl.Games(game, count, data={"weights": [own]})


def three_levels(count=COUNT):
    game = bl.Game(
        a=bl.Player(lambda a, b, c: (a - 1) ** 2 + (b + c - 1) ** 2, torch.tensor(0.0, dtype=D)),
        b=bl.Player(lambda a, b, c: (b - a) ** 2 + (c - 0.5) ** 2 / 2, torch.tensor(0.0, dtype=D)),
        c=bl.Player(lambda b, c: (c - 2 * b) ** 2, torch.tensor(0.1, dtype=D)),
    )
    return bl.Games(game, count, init={"a": randn(count, seed=1), "b": randn(count, seed=2)})


def assert_as_alone(games, atol=1e-10, **options):
    """Every number of every game, against a solve of that game alone."""
    together = bl.solve(games, **options)
    for index in range(games.count):
        alone, found = bl.solve(games.game(index), **options), together[index]
        for name, variables in alone.variables.items():
            torch.testing.assert_close(found.variables[name], variables, rtol=0.0, atol=atol)
        for name, value in alone.values.items():
            assert found.values[name] == pytest.approx(value, abs=10 * atol)
        for name, stationarity in alone.stationarity.items():
            assert found.stationarity[name] == pytest.approx(stationarity, abs=atol)
        assert set(found.residuals) == set(alone.residuals)
    return together


CG = bl.ConjugateGradient(rtol=1e-12)
# Rounding, over a few dozen contracting steps; with a tolerance the loop and the stack stop at the same step.
RESPONSES = {
    "unrolled": bl.Unrolled(partial(SGD, lr=0.1, momentum=0.5), steps=8),
    "unrolled adam, truncated": bl.Unrolled(partial(ADAM, lr=0.05), steps=6, backprop_steps=3),
    "unrolled cold": bl.Unrolled(partial(SGD, lr=0.1), steps=8, warm_start=False),
    "implicit": bl.Implicit(partial(SGD, lr=0.1), steps=1000, tolerance=1e-4, linear_solver=CG),
    "implicit momentum": bl.Implicit(partial(SGD, lr=0.05, momentum=0.5), steps=1000, tolerance=1e-3, linear_solver=CG),
    "implicit adam": bl.Implicit(partial(ADAM, lr=0.01), steps=7, tolerance=None, linear_solver=bl.linear.Dense()),
    "implicit lbfgs": bl.Implicit(
        partial(torch.optim.LBFGS, line_search_fn="strong_wolfe"), 3, None, linear_solver=bl.GMRES(rtol=1e-12)
    ),
}


@pytest.mark.parametrize("make", [quadratic, ridge])
@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES)
def test_the_same_answers_as_the_loop(make, response):
    games = make()
    follower = games.names[-1]
    assert_as_alone(games, optimizer=partial(ADAM, lr=0.05), steps=4, **{follower: response})


@pytest.mark.parametrize("make", [quadratic, ridge])
def test_scipys_answers_are_the_loops_to_its_tolerance(make):
    """A line search amplifies rounding, and ends anywhere within the tolerance: what that allows is known here.

    The follower's loss is quadratic in y with a least curvature c: two answers whose gradients are at most r are at
    most 2 r / c apart. The implicit hypergradient h is at most quadratic in y, so that h(y) - h(z) = h'((y + z) / 2)
    (y - z), exactly. A linear solve to a relative residual e moves it by at most |f_yx| e |g_y| / c.
    """
    games = make()
    leader, follower = games.names
    response = bl.Implicit(bl.Scipy("L-BFGS-B"), tolerance=1e-6, linear_solver=CG)

    def answered(game):
        x = game.initial(leader).requires_grad_()
        y, state = response(game, {leader: x}, response.init(game))
        (slope,) = torch.autograd.grad(game.total(game.loss(leader, {leader: x, follower: y}, drawn(game, leader))), x)
        return y, slope, state

    def drawn(game, name):
        return game.draw(name, game.start(name))[0]

    answers, slopes, _ = answered(games)
    for index in range(COUNT):
        game = games.game(index)
        single, slope, state = answered(game)
        form, x = game.structure(follower), game.initial(leader)

        def loss(name, x, y, game=game, form=form):
            return game.loss(name, {leader: x, follower: form.unflatten(y)}, drawn(game, name))

        def hypergradient(y, x=x, loss=loss):
            g_x, g_y = torch.func.grad(partial(loss, leader), argnums=(0, 1))(x, y)
            slope = torch.func.grad(partial(loss, follower), argnums=1)
            hessian, mixed = torch.func.jacrev(slope, argnums=1)(x, y), torch.func.jacrev(slope)(x, y)
            return g_x - mixed.T @ torch.linalg.solve(hessian, g_y)

        one = bl.extend.flatten({k: v[index] for k, v in answers.items()} if make is ridge else answers[index]).detach()
        other = bl.extend.flatten(single).detach()
        middle = (one + other) / 2
        hessian = torch.func.hessian(partial(loss, follower), argnums=1)(x, middle)
        mixed = torch.func.jacrev(torch.func.grad(partial(loss, follower), argnums=1))(x, middle)
        least = torch.linalg.eigvalsh(hessian)[0]
        apart = 2 * response.tolerance * float(state["reference"]) / least
        assert (one - other).norm() <= apart
        steepness = torch.linalg.matrix_norm(torch.func.jacrev(hypergradient)(middle), 2)
        g_y = torch.func.grad(partial(loss, leader), argnums=1)(x, middle).norm()
        solved = CG.rtol * torch.linalg.matrix_norm(mixed, 2) * g_y / least
        assert (slopes[index] - slope).norm() <= steepness * apart + 2 * solved


def test_a_closed_form_is_the_answer_and_its_optimum():
    games = quadratic()
    by_torch = bl.ClosedForm(lambda x, batch: batch["slope"] @ x + batch["shift"])
    by_numpy = bl.ClosedForm(lambda x, batch: torch.tensor(batch["slope"].numpy() @ x.numpy()) + batch["shift"])
    for closed in (by_torch, by_numpy):
        y = bl.Implicit(closed, tolerance=1e-10, linear_solver=bl.linear.Dense(rtol=1e-10))
        found = assert_as_alone(games, y=y, optimizer=partial(SGD, lr=0.05), steps=5)
    # Gradient descent on |B x + c - target|^2 + 0.1 |x|^2, by hand.
    batch, _ = games.draw("y", games.start("y"))
    targets, _ = games.draw("x", games.start("x"))
    slope, x = batch["slope"], games.initial("x")
    for _ in range(5):
        left = (slope @ x[..., None])[..., 0] + batch["shift"] - targets["target"]
        x = x - 0.05 * (2 * (slope.mT @ left[..., None])[..., 0] + 0.2 * x)
    torch.testing.assert_close(found.variables["x"], x, rtol=1e-9, atol=1e-9)


def test_adams_counts_are_each_games_own():
    # Easy and hard games stop at different steps, and the next call goes on from there.
    def follow(x, y, batch):
        return (batch * (y - x) ** 2).sum()

    curvature = torch.tensor([[1.0, 1.0], [1.0, 4.0], [0.3, 2.0]], dtype=D)
    game = bl.Game(
        x=bl.Player(lambda y: ((y - 3) ** 2).sum(), torch.zeros(2, dtype=D)),
        y=bl.Player(follow, torch.ones(2, dtype=D), [curvature[0]]),
    )
    games = bl.Games(game, 3, init={"y": randn(3, 2, seed=1)}, data={"y": [curvature]})
    for optimizer in (partial(ADAM, lr=0.1), partial(torch.optim.AdamW, lr=0.1, amsgrad=True, weight_decay=0.0)):
        y = bl.Implicit(optimizer, steps=400, tolerance=0.1, linear_solver=CG)
        found = assert_as_alone(games, y=y, optimizer=partial(SGD, lr=0.1), steps=4)
        counts = found.states["y"]["optimizer"][0]["step"].flatten().tolist()
        assert len(set(counts)) == 3


def test_three_levels():
    exact = bl.linear.Dense(rtol=1e-10)
    b = bl.Implicit(partial(SGD, lr=1 / 6), steps=100, tolerance=1e-11, linear_solver=exact)
    c = bl.Implicit(partial(SGD, lr=0.5), steps=5, tolerance=1e-11, linear_solver=exact)
    found = assert_as_alone(three_levels(), b=b, c=c, optimizer=partial(SGD, lr=0.25), steps=3)
    # c = 2b, b = (a + 1/2) / 3, a = 3/4, as for one game.
    for name, value in {"a": 3 / 4, "b": 5 / 12, "c": 5 / 6}.items():
        torch.testing.assert_close(found.variables[name], torch.full((COUNT,), value, dtype=D))
    unrolled = bl.Unrolled(partial(SGD, lr=0.2), steps=3)
    assert_as_alone(three_levels(), b=unrolled, c=unrolled, optimizer=partial(SGD, lr=0.1), steps=3)
    with pytest.raises(TypeError, match=r"'c'.* answers for all at once"):
        bl.solve(three_levels(), b=bl.Implicit(bl.Scipy("BFGS")), c=c, steps=1)


DYNAMICS = [
    *(
        bl.dynamics.Simultaneous(),
        bl.dynamics.Alternating(),
        bl.dynamics.TwoTimescale({"x": 2.0}),
        bl.dynamics.Extragradient(0.1),
        bl.dynamics.Optimistic(),
    ),
    *(
        bl.dynamics.NegativeMomentum(-0.3),
        bl.dynamics.Consensus(0.2),
        bl.dynamics.SymplecticAdjustment(aligned=False),
        bl.dynamics.LookAhead(0.1),
    ),
    *(bl.dynamics.LOLA(0.1), bl.dynamics.ExactLOLA(0.1)),
]


@pytest.mark.parametrize("dynamics", DYNAMICS, ids=lambda d: type(d).__name__)
def test_simultaneous_play(dynamics):
    optimizer = {"x": partial(SGD, lr=0.05), "y": partial(ADAM, lr=0.05)}
    assert_as_alone(quadratic(), dynamics=dynamics, optimizer=optimizer, clip_norm=1.0, steps=5)


def test_players_who_answer_together():
    def own(mine, other, x, batch):
        return (batch * (mine + 0.3 * other - x) ** 2).sum()

    curvature = 1.0 + torch.arange(3.0, dtype=D)[:, None].expand(3, 2)
    game = bl.Game(
        x=bl.Player(lambda x, a, b: ((a - 1) ** 2 + (b + x) ** 2).sum(), torch.zeros(2, dtype=D)),
        a=bl.Player(lambda x, a, b, batch: own(a, b, x, batch), torch.zeros(2, dtype=D), [curvature[0]]),
        b=bl.Player(lambda x, a, b, batch: own(b, a, 2 * x, batch), torch.zeros(2, dtype=D), [curvature[0]]),
    )
    options = {"init": {"x": randn(3, 2)}, "data": {"a": [curvature], "b": [curvature]}}
    firms = bl.Implicit(partial(SGD, lr=0.1), steps=500, tolerance=1e-4, linear_solver=bl.GMRES(rtol=1e-12))
    for games in (
        bl.Games(game.joined(firms=("a", "b")), 3, **options),
        bl.Games(game, 3, **options).joined(firms=("a", "b")),
    ):
        assert_as_alone(games, firms=firms, optimizer=partial(SGD, lr=0.1), steps=2)


def test_modules_and_their_buffers_are_one_each():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).to(D)

    def train(decay, weights, batch):
        loss = cross_entropy(torch.func.functional_call(module, weights, (batch[0],)), batch[1])
        return loss + decay.exp() * sum(w.square().sum() for w in weights.values())

    inputs, labels = randn(3, 9, 3), torch.arange(27).reshape(3, 9) % 2
    game = bl.Game(
        decay=bl.Player(lambda weights: sum(w.square().sum() for w in weights.values()), torch.tensor(-2.0, dtype=D)),
        weights=bl.Player(train, module, [(inputs[0], labels[0])]),
    )
    games = bl.Games(game, 3, data={"weights": [(inputs, labels)]})
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=3)
    found = assert_as_alone(games, weights=response, optimizer=partial(SGD, lr=0.1), steps=3)
    alone = bl.solve(games.game(1), weights=response, optimizer=partial(SGD, lr=0.1), steps=3)
    for path, buffer in alone.buffers["weights"].items():
        torch.testing.assert_close(found.buffers["weights"][path][1], buffer)


def test_shared_minibatches_and_dims_of_a_batch():
    inputs, targets = randn(12, 3), randn(12, seed=1)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=5, shuffle=True)

    def train(decay, weights, batch):
        return ((batch[0] @ weights - batch[1]) ** 2).mean() + (decay.exp() * weights**2).sum()

    def valid(weights, batch):
        return ((batch["inputs"] @ weights - batch["targets"]) ** 2).mean()

    start = torch.zeros(3, dtype=D)
    own = {"inputs": inputs, "targets": randn(3, 12, seed=2), "name": "valid"}
    game = bl.Game(
        decay=bl.Player(valid, start, [own | {"targets": targets}]),
        weights=bl.Player(train, start, loader),
    )
    games = bl.Games(
        game,
        3,
        init={"decay": randn(3, 3, seed=3)},
        data={"decay": [own]},
        data_dims={"decay": {"inputs": None, "targets": 0, "name": None}},
    )
    assert_as_alone(games, weights=bl.Unrolled(partial(SGD, lr=0.1), steps=2), steps=4, seed=3)
    some = games.chosen([2, 0])
    for name in games.names:
        assert torch.equal(some.initial(name), games.initial(name)[[2, 0]])
    assert torch.equal(some.draw("decay", some.start("decay"))[0]["targets"], own["targets"][[2, 0]])


def test_half_and_half_equals_the_whole(tmp_path):
    options = {
        "optimizer": partial(ADAM, lr=0.05),
        "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.7),
    }
    for number, name in enumerate(("unrolled", "implicit momentum", "implicit adam")):
        options["weights"] = RESPONSES[name]
        path = tmp_path / f"{number}.pt"
        whole = bl.solve(ridge(), steps=8, **options)
        bl.solve(ridge(), steps=4, checkpoint=path, **options)
        rest = bl.solve(ridge(), steps=8, checkpoint=path, **options)
        assert torch.equal(whole.variables["decay"], rest.variables["decay"])
        for key in ("w", "b"):
            assert torch.equal(whole.variables["weights"][key], rest.variables["weights"][key])
        untimed = [[{k: v for k, v in r.items() if k != "seconds"} for r in s.history] for s in (whole, rest)]
        assert untimed[0] == untimed[1]
    with pytest.raises(bl.errors.CheckpointError, match="its players"):
        bl.solve(ridge(3), steps=9, checkpoint=path, **options)


def test_history_tells_the_median_and_the_worst():
    seen = []
    games = ridge()
    found = bl.solve(
        games,
        weights=RESPONSES["unrolled"],
        steps=2,
        callbacks=[lambda step, record, variables: seen.append(variables)],
    )
    assert seen[0]["decay"].shape == (COUNT, 5)
    record = found.history[-1]
    assert record["decay.worst"] >= record["decay"]
    assert record["weights.stationarity.worst"] >= record["weights.stationarity"]
    assert len(found) == COUNT == len(list(found))
    assert found.values["weights"].shape == (COUNT,)
    text = str(found)
    assert "Solutions of 4 games after 2 steps" in text
    assert "each of all games at once" in text
    assert "Solution after 2 steps" in str(found[-1])
    with pytest.raises(IndexError, match="no game 4 among 4"):
        found[4]
    with pytest.raises(IndexError, match="no game -5 among 4"):
        found[-5]


def test_one_of_many_is_certified_like_any_other():
    games = quadratic()
    y = bl.Implicit(
        bl.ClosedForm(lambda x, batch: batch["slope"] @ x + batch["shift"]), linear_solver=bl.linear.Dense()
    )
    found = bl.solve(games, y=y, optimizer=partial(SGD, lr=0.05), steps=2)
    together, alone = (
        bl.certify(games.game(2), found[2]),
        bl.certify(games.game(2), bl.solve(games.game(2), y=y, optimizer=partial(SGD, lr=0.05), steps=2)),
    )
    torch.testing.assert_close(together.hypergradient, alone.hypergradient)
    for ask in (
        lambda: bl.certify(games, found),
        lambda: bl.certify_nash(games, found.variables),
        lambda: bl.exploitability(games, found.variables),
        lambda: bl.testing.check_hypergradient(games, y),
    ):
        with pytest.raises(TypeError, match=r"looks at one game, not at 4: give it games\.game\(i\)"):
            ask()


def test_a_game_whose_leader_asks_nothing_of_its_follower():
    # Its linear system has the right-hand side 0, beside others that have not.
    def lead(x, y, batch):
        return (batch * (y - 1) ** 2).sum() + (x**2).sum()

    weights = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 1.0]], dtype=D)
    game = bl.Game(
        x=bl.Player(lead, torch.ones(2, dtype=D), [weights[0]]),
        y=bl.Player(lambda x, y: ((y - 2 * x) ** 2).sum() + (y[0] * y[1]) / 2, torch.zeros(2, dtype=D)),
    )
    games = bl.Games(game, 3, data={"x": [weights]})
    for solver in (CG, bl.GMRES(rtol=1e-12), bl.linear.Dense(), bl.Neumann(step_size=0.3, rtol=1e-10, max_steps=500)):
        y = bl.Implicit(partial(SGD, lr=0.3), steps=100, tolerance=1e-8, linear_solver=solver)
        assert_as_alone(games, y=y, optimizer=partial(SGD, lr=0.1), steps=2)


def test_it_composes_with_functorch_and_differentiates_twice():
    games = ridge()
    batch, _ = games.draw("decay", games.start("decay"))
    for name in ("unrolled", "implicit"):
        response = RESPONSES[name]

        def lead(played, decay, response=response):
            weights, _ = response(played, {"decay": decay}, response.init(played))
            return played.total(played.loss("decay", {"decay": decay, "weights": weights}, batch))

        def twice(played):
            decay = played.initial("decay").requires_grad_()
            (slope,) = torch.autograd.grad(lead(played, decay), decay, create_graph=True)
            return slope, torch.autograd.grad(slope, decay, torch.ones_like(decay))[0]

        slope, second = twice(games)
        torch.testing.assert_close(torch.func.grad(partial(lead, games))(games.initial("decay")), slope)
        for index in range(COUNT):
            torch.testing.assert_close(second[index], twice(games.game(index))[1], rtol=0.0, atol=1e-10)


def test_the_layer_has_one_hypergradient_a_game():
    games = ridge()
    response = RESPONSES["implicit"]
    decay = games.initial("decay").requires_grad_()
    weights, state = response(games, {"decay": decay}, response.init(games))
    batch, _ = games.draw("decay", games.start("decay"))
    losses = games.loss("decay", {"decay": decay, "weights": weights}, batch)
    assert losses.shape == (COUNT,)
    losses.sum().backward()
    state = response.after_backward(state, weights)
    assert state["linear"]["memory"]["residuals"].shape == (COUNT,)
    for index in range(COUNT):
        game, own = games.game(index), games.game(index).initial("decay").requires_grad_()
        alone, _ = response(game, {"decay": own}, response.init(game))
        game.loss("decay", {"decay": own, "weights": alone}, batch).backward()
        torch.testing.assert_close(decay.grad[index], own.grad, rtol=0.0, atol=1e-10)


# What goes wrong, and in which game ---------------------------------------------------------------------------------


def with_curvature(curvature, **options):
    """f = sum of curvature (y - x)^2 / 2, a curvature a game."""
    game = bl.Game(
        x=bl.Player(lambda y: ((y - 3) ** 2).sum(), torch.zeros(2, dtype=D)),
        y=bl.Player(lambda x, y, batch: (batch * (y - x) ** 2).sum() / 2, torch.ones(2, dtype=D), [curvature[0]]),
    )
    return bl.Games(game, len(curvature), data={"y": [curvature]}, **options)


def test_a_game_that_stops_short_is_named():
    curvature = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 0.01]], dtype=D)
    y = bl.Implicit(partial(SGD, lr=1.0), steps=3, tolerance=1e-3, linear_solver=CG)
    with pytest.warns(bl.errors.FollowerNonConvergenceWarning, match=r"in 1 of 3 games, the worst being game 2"):
        found = bl.solve(with_curvature(curvature), y=y, steps=2)
    assert "game 2" in str(found)
    assert [len(alone.warnings) for alone in found] == [0, 0, 1] and found[-1].warnings == found.warnings
    y = bl.Implicit(bl.ClosedForm(lambda x: x), linear_solver=bl.ConjugateGradient(max_steps=1))
    with pytest.warns(
        bl.errors.LinearNonConvergenceWarning, match=r"ConjugateGradient.*in 1 of 3 games, the worst being game 2"
    ):
        bl.solve(with_curvature(curvature), y=y, steps=1)


def test_a_game_whose_solve_is_worse_than_none_is_named():
    curvature = torch.tensor([[1.0, 1.0], [1.0, 1.0], [9.0, 9.0]], dtype=D)
    y = bl.Implicit(bl.ClosedForm(lambda x: x), linear_solver=bl.linear.Identity(scale=0.5))
    with pytest.warns(
        bl.errors.LinearNonConvergenceWarning, match=r"0 in 1 of 3 games, the worst being game 2.*3.5 \|b\|"
    ):
        found = bl.solve(with_curvature(curvature), y=y, steps=1)
    assert [len(alone.warnings) for alone in found] == [0, 0, 1]


@pytest.mark.parametrize(
    ("solver", "error"),
    [(CG, bl.errors.IndefiniteSystemError), (bl.linear.Dense(), bl.errors.SingularSystemError)],
    ids=["CG", "Dense"],
)
def test_a_game_that_cannot_be_solved_is_named(solver, error):
    curvature = torch.ones(7, 2, dtype=D)
    curvature[4, 1] = curvature[6, 0] = 0.0 if error is bl.errors.SingularSystemError else -1.0
    y = bl.Implicit(bl.ClosedForm(lambda x: x), linear_solver=solver)
    with pytest.raises(error, match=r"^Game 4: "):
        bl.solve(with_curvature(curvature), y=y, steps=1)
    whole = with_curvature(curvature)
    bl.solve(whole.chosen([0, 1, 2, 3, 5]), y=y, steps=1)


@pytest.mark.parametrize(
    "response", [bl.Unrolled(partial(SGD, lr=1.0), steps=300), bl.Implicit(partial(SGD, lr=1.0), 300)]
)
def test_a_game_that_diverges_is_named(response):
    curvature = torch.ones(4, 2, dtype=D)
    curvature[2] = 1e3
    with pytest.raises(bl.errors.NonFiniteError, match=r"in 1 of 4 games, the first being game 2"):
        bl.solve(with_curvature(curvature), y=response, steps=1)


def test_a_leader_without_a_finite_gradient_is_named():
    game = bl.Game(x=bl.Player(lambda x: (x.abs().sqrt() * (x + 1)).sum(), torch.ones(2, dtype=D)))
    games = bl.Games(game, 3, init={"x": torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, 1.0]], dtype=D)})
    with pytest.raises(bl.errors.NonFiniteError, match=r"no finite norm in 1 of 3 games, the first being game 1"):
        bl.solve(games, steps=1)


def test_what_would_mix_games_is_refused():
    games = ridge()
    with pytest.raises(TypeError, match=r"looks at one game, not at 4"):
        bl.solve(games, weights=bl.Hypernetwork(partial(ADAM, lr=1e-3)))
    unrolled = RESPONSES["unrolled"]
    for optimizer in (torch.optim.LBFGS, torch.optim.Adafactor):
        with pytest.raises(TypeError, match=r"solve: its optimiser does not move each entry by itself"):
            bl.solve(games, weights=unrolled, optimizer=optimizer)

    class Normalised(SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad /= parameter.grad.norm()
            return super().step(closure)

    with pytest.raises(TypeError, match="does not move each entry by itself"):
        bl.solve(games, weights=unrolled, optimizer=partial(Normalised, lr=0.1))

    def by_shape(parameters):
        return SGD([{"params": [p], "lr": 0.1 if p.ndim > 0 else 0.01} for p in parameters])

    with pytest.raises(TypeError, match="Unrolled: its optimiser does not move each entry by itself"):
        bl.solve(games, weights=bl.Unrolled(by_shape, steps=2))
    with pytest.raises(TypeError, match="takes the variables of 'decay'"):
        bl.solve(games, weights=bl.Unrolled(lambda parameters, decay: SGD(parameters, lr=0.1), steps=2))
    for dynamics in (bl.dynamics.SymplecticAdjustment(), bl.dynamics.Competitive(0.1), bl.dynamics.FollowTheRidge()):
        with pytest.raises(TypeError, match=r"would mix them"):
            bl.solve(quadratic(), dynamics=dynamics)


def one_player(loss, data=None):
    return bl.Game(x=bl.Player(loss, torch.ones(2, dtype=D), data))


def branching(x):
    return x.sum() if x.sum() > 0 else (x**2).sum()


SQUARES = one_player(lambda x, batch: ((x - batch) ** 2).sum(), [torch.ones(2, dtype=D)])


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: bl.Games(one_player(branching), 3), ValueError, r"'x'.*vmap cannot run.*(?s:.*)torch\.where"),
        (lambda: bl.Games(SQUARES, 0), ValueError, "count=0"),
        (lambda: bl.Games(bl.Games(SQUARES, 2), 2), TypeError, "expected one Game"),
        (lambda: bl.Games(SQUARES, 3, init={"z": 1}), ValueError, "init names 'z'"),
        (
            lambda: bl.Games(SQUARES, 3, init={"x": torch.ones(2, 2, dtype=D)}),
            ValueError,
            r"\[2, 2\].*expected \[3, 2\]",
        ),
        (lambda: bl.Games(SQUARES, 3, init={"x": torch.ones(3, 2)}), ValueError, r"float32.*expected.*float64"),
        (lambda: bl.Games(SQUARES, 3, init={"x": {"a": torch.ones(3, 2)}}), ValueError, "not nested"),
        (
            lambda: bl.Games(SQUARES, 2, init={"x": torch.tensor([[1.0, 1.0], [1.0, torch.nan]], dtype=D)}),
            ValueError,
            "in game 1",
        ),
        (lambda: bl.Games(SQUARES, 3, data={"x": [torch.ones(2, 2, dtype=D)]}), ValueError, r"leading dimension of 3"),
        (lambda: bl.Games(SQUARES, 3, data={"x": torch.ones(3, 2, dtype=D)}), TypeError, r"data=\[batch\]"),
        (lambda: bl.Games(SQUARES, 3, data={"y": []}), ValueError, "names 'y'"),
        (lambda: bl.Games(SQUARES, 3, data_dims={"x": 0}), ValueError, "give data="),
        (lambda: bl.Games(one_player(lambda x: (x**2).sum()), 3, data={"x": [1]}), ValueError, "takes no `batch`"),
        (
            lambda: bl.Games(SQUARES, 2, data={"x": [torch.tensor([[1.0, 1.0], [torch.inf, 1.0]], dtype=D)]}),
            ValueError,
            "inf in game 1",
        ),
        (lambda: bl.Games(SQUARES, 3).game(3), IndexError, "no game 3 among 3"),
    ],
)
def test_refusals(make, error, text):
    with pytest.raises(error, match=text):
        make()


def test_hyperparameters_of_the_optimiser_are_refused():
    game = bl.Game(
        rate=bl.Player(lambda y: (y**2).sum(), torch.tensor(0.1, dtype=D), optimizer_hyper=True),
        y=bl.Player(lambda y: ((y - 1) ** 2).sum(), torch.zeros(2, dtype=D)),
    )
    with pytest.raises(TypeError, match="'rate' tunes the inner optimiser"):
        bl.Games(game, 3)


def test_a_schedule_of_one_leader_is_refused():
    implicit = bl.Implicit(partial(SGD, lr=0.05), steps=10, inexactness=bl.responses.Geometric())
    with pytest.raises(TypeError, match="inexactness=Geometric"):
        implicit.init(quadratic())


def test_solves_that_stop_when_settled_are_as_right_as_asked():
    games = quadratic()
    tight = bl.Implicit(
        partial(SGD, lr=0.1), steps=2000, tolerance=1e-10, linear_solver=bl.ConjugateGradient(rtol=1e-12)
    )
    solver = bl.ConjugateGradient(rtol=1e-12, stopping=bl.linear.HypergradientTolerance(1e-6))
    settled = bl.Implicit(partial(SGD, lr=0.1), steps=2000, tolerance=1e-10, linear_solver=solver)
    run = partial(bl.solve, games, optimizer=partial(SGD, lr=0.1), steps=5)
    # The leader's loss is |B x + c - t|^2 + .1 |x|^2, and its step x - .1 (M x + ...) with M = 2 B'B + .2 brings points
    # no further apart. So an error of 1e-6 of each implicit term 2 B'(y - t), which is what was asked for, ends as at
    # most .1 * 1e-6 of their sum. A follower whose gradient is within 1e-10 of that at its start r, with curvatures of
    # at least 1, is within 1e-10 r of its optimum, in either run, which moves a term by 2 |B| of that.
    batch, _ = games.draw("y", games.start("y"))
    targets, _ = games.draw("x", games.start("x"))
    slope, x, terms = batch["slope"], games.initial("x"), torch.zeros(games.count, dtype=D)
    start = batch["curvature"] * (games.initial("y") - (slope @ x[..., None])[..., 0] - batch["shift"])
    rest = 2 * torch.linalg.matrix_norm(slope, 2) * 2 * 1e-10 * start.norm(dim=1)
    assert torch.linalg.eigvalsh(2 * slope.mT @ slope).max() + 0.2 <= 2 / 0.1
    for _ in range(5):
        left = (slope @ x[..., None])[..., 0] + batch["shift"] - targets["target"]
        term = 2 * (slope.mT @ left[..., None])[..., 0]
        terms += term.norm(dim=1)
        x = x - 0.1 * (term + 0.2 * x)
    apart = (run(y=settled).variables["x"] - run(y=tight).variables["x"]).norm(dim=1)
    assert (apart <= 0.1 * (1e-6 * terms + 5 * rest) + 1e-13).all()


def test_forward_mode_is_refused_and_second_moments_serve():
    with pytest.raises(TypeError, match="ForwardMode, which carries a derivative"):
        bl.Unrolled(partial(SGD, lr=0.05), steps=3, differentiation=bl.ForwardMode()).init(quadratic())
    solver = bl.ConjugateGradient(rtol=1e-10, preconditioner=bl.linear.AdamPreconditioner())
    adam = bl.Implicit(partial(ADAM, lr=0.05), steps=400, tolerance=None, linear_solver=solver)
    plain = bl.Implicit(
        partial(ADAM, lr=0.05), steps=400, tolerance=None, linear_solver=bl.ConjugateGradient(rtol=1e-10)
    )
    run = partial(bl.solve, quadratic(), optimizer=partial(SGD, lr=0.1), steps=3)
    torch.testing.assert_close(run(y=adam).variables["x"], run(y=plain).variables["x"], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("indices", "text"), [([0, 6], "no game 6"), ([], "no game chosen")])
def test_games_that_are_not_there_are_not_chosen(indices, text):
    with pytest.raises(IndexError, match=text):
        quadratic().chosen(indices)


def test_other_dimensions_are_refused():
    one = bl.Game(x=bl.Player(lambda x, batch: ((x - batch) ** 2).sum(), torch.zeros(4), data=[torch.ones(4)]))
    with pytest.raises(ValueError, match="data_dims of player 'x' holds 1"):
        bl.Games(one, 4, data={"x": [torch.ones(4, 4)]}, data_dims={"x": 1})


def test_a_runs_state_is_shared_out_among_ranks_and_put_together_again(tmp_path):
    from collections import OrderedDict

    from bilevel.many.shares import Shares
    from bilevel.solving import checkpoint

    torch.manual_seed(0)
    inputs, labels = torch.randn(7, 6, 3, dtype=D), torch.randn(7, 6, dtype=D)
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 1)).double()

    def fit(decay, weights, batch):
        return (weights(batch[0])[:, 0] - batch[1]).square().mean() + bl.penalty(weights, 0.1 * decay.exp())

    def judge(weights, batch):
        return (weights(batch[0])[:, 0] - batch[1]).square().mean()

    data = [(inputs[0], labels[0])]
    game = bl.Game(
        decay=bl.Player(judge, torch.tensor(-3.0, dtype=D), data=data), weights=bl.Player(fit, module, data=data)
    )
    games = bl.Games(game, 7, data={"decay": [(inputs, labels)], "weights": [(inputs, labels)]})
    inner = {"entrywise": partial(ADAM, lr=0.05), "in turn": partial(torch.optim.LBFGS, max_iter=3)}
    for name, optimizer in inner.items():
        path = tmp_path / f"{name}.pt"
        response = bl.Implicit(optimizer, steps=3, tolerance=None, linear_solver=bl.ConjugateGradient(damping=100.0))
        bl.solve(games, weights=response, steps=2, checkpoint=path)
        run = checkpoint.load(path)
        for ranks in (1, 2, 3, 7):
            shares = Shares.even(7, ranks)
            parts = [shares.own(run, rank) for rank in range(ranks)]
            assert [len(part["leaders"]["points"]["decay"][0]) for part in parts] == list(shares.counts)
            whole = shares.merged([shares.divided(part) for part in parts])
            for key in ("states", "buffers", "memory", "leaders"):
                assert torch.utils._pytree.tree_structure(whole[key]) == torch.utils._pytree.tree_structure(run[key])
                flat = torch.utils._pytree.tree_leaves
                pairs = zip(flat(whole[key]), flat(run[key]), strict=True)
                for a, b in pairs:
                    if isinstance(a, torch.Tensor):
                        torch.testing.assert_close(a, b, rtol=0.0, atol=0.0, equal_nan=True)
                    else:
                        assert a == b, key
    assert Shares.even(7, 3).counts == (2, 2, 3)
    tree = OrderedDict(a=torch.arange(7))
    assert type(Shares.even(7, 2).part(tree, 1)) is OrderedDict


def test_states_that_cannot_be_shared_out_are_refused_by_name():
    from bilevel.many.shares import Shares

    shares = Shares((1, 2))
    with pytest.raises(bl.errors.CheckpointError, match=r"differ at 'states.y.odd'"):
        shares.merged([{"states": {"y": {"odd": "a"}}}, {"states": {"y": {"odd": "b"}}}])
    with pytest.raises(bl.errors.CheckpointError, match=r"differ at 'states.y'"):
        shares.merged([{"states": {"y": {"odd": 1}}}, {"states": {"y": {"even": 1}}}])
    numbers = shares.merged([{"states": {"y": {"work": 3}}}, {"states": {"y": {"work": 5}}}])
    assert [shares.part(numbers["states"], rank)["y"]["work"] for rank in (0, 1, None)] == [3, 5, 5]
    assert Shares((3,)).part(numbers["states"], 0)["y"]["work"] == 5

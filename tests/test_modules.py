"""A module that is a player can be called, as torch would call it."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import bilevel as bl

D = torch.float64


def data(seed=0, rows=24):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(rows, 5, generator=generator, dtype=D)
    return inputs, (inputs[:, 0] > 0).long()


def network():
    torch.manual_seed(0)
    layers = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 2)
    return nn.Sequential(*layers).double()


def train(weights, decay, batch):
    inputs, labels = batch
    return cross_entropy(weights(inputs), labels) + decay.exp() * sum(w.square().sum() for w in weights.values())


def valid(weights, batch):
    inputs, labels = batch
    return cross_entropy(weights(inputs), labels)


def game(model, train=train, valid=valid):
    return bl.Game(
        decay=bl.Player(valid, torch.tensor(-3.0, dtype=D), [data(1)]), weights=bl.Player(train, model, [data(0)])
    )


def test_training_mode_in_its_own_loss_and_evaluation_mode_in_the_others():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(self.training)
            return x

    model = nn.Sequential(nn.Linear(5, 2), Spy()).double().eval()
    played = game(model)
    seen.clear()
    point = {"decay": torch.tensor(-3.0, dtype=D), "weights": played.initial("weights")}
    played.loss("weights", point, data(0))
    played.loss("decay", point, data(1))
    assert seen == [True, False] and not model.training and not model[1].training


def test_it_is_overridden_for_one_call():
    seen = []

    class Spy(nn.Module):
        def forward(self, x, scale=1.0):
            seen.append((self.training, scale))
            return scale * x

    model = nn.Sequential(nn.Linear(5, 2)).double()
    model.add_module("spy", Spy())
    game(
        model,
        train=lambda weights, decay, batch: weights(batch[0], training=False).sum() * decay.exp(),
        valid=lambda weights, batch: weights(batch[0], training=True).sum(),
    )
    assert seen == [(True, 1.0), (False, 1.0)]


def test_a_part_that_was_frozen_in_evaluation_mode_stays_frozen():
    model = network().train()
    model[1].eval()
    played = game(model)
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=3)
    _, state = response(played, {"decay": torch.tensor(-3.0, dtype=D)}, response.init(played))
    assert int(state["buffers"]["1.num_batches_tracked"]) == 0
    model[1].train()
    played = game(model)
    _, state = response(played, {"decay": torch.tensor(-3.0, dtype=D)}, response.init(played))
    assert int(state["buffers"]["1.num_batches_tracked"]) == 3 and int(model[1].num_batches_tracked) == 0


def test_calling_the_player_is_calling_the_module_functionally():
    model = network()
    del model[3]  # without noise both are one number

    def by_hand(weights, decay, batch):
        inputs, labels = batch
        model.train()
        loss = cross_entropy(functional_call(model, dict(weights), (inputs,)), labels)
        return loss + decay.exp() * sum(w.square().sum() for w in weights.values())

    def by_hand_valid(weights, batch):
        model.eval()
        loss = cross_entropy(functional_call(model, dict(weights), (batch[0],)), batch[1])
        model.train()
        return loss

    slopes = []
    for losses in ((train, valid), (by_hand, by_hand_valid)):
        played = game(model, *losses)
        for response in (
            bl.Unrolled(partial(SGD, lr=0.1), steps=5),
            bl.Implicit(partial(SGD, lr=0.1), steps=5, tolerance=None, linear_solver=bl.GMRES()),
        ):
            decay = torch.tensor(-3.0, dtype=D, requires_grad=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", bl.BilevelWarning)
                weights, state = response(played, {"decay": decay}, response.init(played))
                everybody = {"decay": decay, "weights": weights}
                buffers = played.statistics(everybody, {"weights": state})
                played.loss("decay", everybody, data(1), buffers).backward()
            slopes.append(decay.grad)
    assert torch.equal(slopes[0], slopes[2]) and torch.equal(slopes[1], slopes[3]) and slopes[0] != 0


def test_tied_frozen_and_parametrised_modules_behave_as_in_torch():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
            self.two.weight = self.one.weight
            self.head = nn.utils.parametrizations.weight_norm(nn.Linear(5, 2))
            self.frozen = nn.Linear(5, 5)
            self.frozen.requires_grad_(False)

        def forward(self, x):
            return self.head(self.frozen(self.two(self.one(x))))

    torch.manual_seed(0)
    model = Tied().double()
    played = game(model)
    names = set(played.initial("weights"))
    originals = {f"head.parametrizations.weight.original{i}" for i in (0, 1)}
    assert names == {"one.weight", "head.bias", *originals}
    weights = {name: 1.1 * value for name, value in played.initial("weights").items()}
    with torch.no_grad():
        moved = Tied().double()
        moved.load_state_dict(model.state_dict())
        for name, parameter in moved.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
        expected = cross_entropy(moved.eval()(data(1)[0]), data(1)[1])
    assert played.loss("decay", {"weights": weights}, data(1)).item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_lazy_module_is_refused_until_it_has_seen_a_batch():
    model = nn.Sequential(nn.LazyLinear(2)).double()
    with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet.*Call the module once"):
        bl.Player(train, model, [data(0)])
    model(data(0)[0])
    game(model)


def test_many_games_and_joined_players_call_their_modules():
    model = nn.Linear(5, 2).double()
    games = bl.Games(game(model), 3, init={"decay": torch.tensor([-1.0, -2.0, -3.0], dtype=D)})
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=3)
    weights, _ = response(games, {"decay": games.initial("decay")}, response.init(games))
    for index in range(3):
        one = games.game(index)
        alone, _ = response(one, {"decay": one.initial("decay")}, response.init(one))
        torch.testing.assert_close(weights["weight"][index], alone["weight"], rtol=0.0, atol=1e-12)

    def mine(x, a, b, batch):
        return (a(batch).sum() - x) ** 2 + 0.1 * (b(batch) ** 2).sum()

    inputs = data(0)[0]
    joint = bl.Game(
        x=bl.Player(lambda x, a: x**2 + a["weight"].sum(), torch.tensor(1.0, dtype=D)),
        a=bl.Player(mine, nn.Linear(5, 1).double(), [inputs]),
        b=bl.Player(lambda x, a, b, batch: ((b(batch) - x) ** 2).sum(), nn.Linear(5, 1).double(), [inputs]),
    ).joined(both=("a", "b"))
    answer, _ = bl.Unrolled(partial(SGD, lr=1e-3), steps=2)(
        joint, {"x": torch.tensor(1.0, dtype=D)}, bl.Unrolled(partial(SGD, lr=1e-3), steps=2).init(joint)
    )
    assert set(answer) == {"a", "b"}


def test_a_module_of_two_players_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def follow(one, two, batch):
        return cross_entropy(two(batch[0]), batch[1]) + sum((one[k] - w).square().sum() for k, w in two.items())

    played = bl.Game(
        one=bl.Player(lambda one, two, batch: cross_entropy(one(batch[0]), batch[1]), model, [data(1)]),
        two=bl.Player(follow, model, [data(0)]),
    )
    bl.solve(played, two=bl.Unrolled(partial(SGD, lr=0.05), steps=2), optimizer=partial(SGD, lr=0.05), steps=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


# A module that others hold too ----------------------------------------------------------------------------------


def test_threads_that_share_a_module_have_the_numbers_of_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    made = game(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    starts = [torch.tensor(start, dtype=D) for start in (-4.0, -3.0, -2.0, -1.0)]
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=30)

    def played(start):
        decay = start.clone().requires_grad_()
        weights, state = response(made, {"decay": decay}, response.init(made))
        everybody = {"decay": decay, "weights": weights}
        value = made.loss("decay", everybody, data(1), made.statistics(everybody, {"weights": state}))
        return value.detach(), torch.autograd.grad(value, decay)[0], state["buffers"]["1.running_mean"]

    wanted = [played(start) for start in starts]
    for _ in range(3):
        with ThreadPoolExecutor(len(starts)) as pool:
            found = list(pool.map(played, starts))
        # The same arithmetic on the same numbers, but for how many threads a sum is split over.
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


class Features(nn.Module):
    """Counts its calls in a buffer that is replaced, and normalises."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(5).double()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs):
        self.calls = self.calls + 1
        return self.norm(inputs)


def test_a_module_that_no_player_owns_keeps_its_buffers():
    features, inputs = Features(), data()[0]
    before = {name: value.clone() for name, value in features.state_dict().items()}
    own = dict(features.named_buffers())

    def follow(x, y):
        return (features(inputs) @ y - x).square().mean() + y.square().sum()

    def lead(x, y):
        return (features(inputs) @ y).square().mean() + (x - 1.0).square()

    made = bl.Game(x=bl.Player(lead, torch.tensor(0.5, dtype=D)), y=bl.Player(follow, torch.zeros(5, dtype=D)))
    step = partial(SGD, lr=0.1)
    bl.solve(made, y=bl.Unrolled(step, steps=3), optimizer=step, steps=3, progress=False)
    many = bl.Games(made, 2)
    bl.solve(many, y=bl.Unrolled(step, steps=2), optimizer=step, steps=2, progress=False)
    for name, value in features.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(value is own[name] for name, value in features.named_buffers())


class Recomputing(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = nn.Linear(5, 2).double(), reentrant

    def forward(self, inputs):
        if self.reentrant is None:
            return self.inner(inputs)
        return checkpoint(self.inner, inputs, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_module_that_is_computed_again_in_backward_is_refused(reentrant):
    # In backward the module's own parameters would stand in for the player's variables.
    with pytest.raises(ValueError, match="Player 'decay': it runs the module of a player under torch.utils.checkpoint"):
        game(Recomputing(reentrant))
    model = Recomputing(None)  # switched off, with the way out to save memory
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=4, differentiation=bl.Segments())
    made = game(model)
    response(made, {"decay": made.initial("decay").requires_grad_()}, response.init(made))
    # Where no module of a player's is run, what is computed again is what was computed.
    fit = lambda w: checkpoint(lambda w: (data()[0] @ w).square().mean(), w, use_reentrant=False)
    bl.Game(w=bl.Player(fit, torch.ones(5, dtype=D)))


# Back into the user's module -------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A frozen layer, a tied pair, a parametrised layer, statistics."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(5, 5).double().requires_grad_(False)
        self.first, self.second = nn.Linear(5, 5, bias=False).double(), nn.Linear(5, 5, bias=False).double()
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(5).double()
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(5, 2).double())

    def forward(self, inputs):
        return self.last(self.norm(self.second(torch.tanh(self.first(self.frozen(inputs))))))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_solution_goes_back_into_a_module(compiled):
    torch.manual_seed(0)
    model = Tied()
    init = torch.compile(model, backend="eager") if compiled else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.BilevelWarning)
        solution = bl.solve(game(init), weights=bl.Unrolled(partial(SGD, lr=0.1), steps=3), steps=3)
    before = model.frozen.weight.clone()
    solution.load_into(model, "weights")
    inputs = data(1)[0]
    model.eval()
    found = model(inputs)
    state = {name.removeprefix("_orig_mod."): value for name, value in solution.variables["weights"].items()}
    buffers = {name.removeprefix("_orig_mod."): value for name, value in solution.buffers["weights"].items()}
    torch.testing.assert_close(found, functional_call(model, {**state, **buffers}, (inputs,)))
    assert model.second.weight is model.first.weight
    assert torch.equal(model.frozen.weight, before)
    assert torch.equal(model.norm.running_mean, buffers["norm.running_mean"])
    assert not torch.equal(model.norm.running_mean, torch.zeros(5, dtype=D))
    with pytest.raises(ValueError, match="the module has none of that name"):
        solution.load_into(nn.Linear(5, 2), "weights")
    with pytest.raises(ValueError, match="players are"):
        solution.load_into(model, "nobody")
    with pytest.raises(TypeError, match="is no module"):
        solution.load_into(model, "decay")


def test_a_game_in_another_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))
    single = [(inputs.float(), labels) for inputs, labels in (data(1), data(0))]
    made = bl.Game(decay=bl.Player(valid, torch.tensor(-3.0), single[:1]), weights=bl.Player(train, model, single[1:]))
    double = made.to(dtype=D)
    wanted = game(model.double())
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=3)

    def slope(game):
        decay = game.initial("decay").requires_grad_()
        weights, state = response(game, {"decay": decay}, response.init(game))
        batch, _ = game.draw("decay", game.start("decay"))
        everybody = {"decay": decay, "weights": weights}
        loss = game.loss("decay", everybody, batch, game.statistics(everybody, {"weights": state}))
        return torch.autograd.grad(loss, decay)[0]

    assert {leaf.dtype for leaf in bl.tree.leaves([double.initial(n) for n in double.names])} == {D}
    assert double.draw("weights", double.start("weights"))[0][1].dtype == torch.int64
    # The inputs were rounded to float32, which moves the slope by some 1e-7 of it.
    torch.testing.assert_close(slope(double), slope(wanted), rtol=1e-5, atol=1e-8)
    assert slope(made.to("cpu")).dtype == torch.float32
    with pytest.raises(TypeError, match="Game.to"):
        bl.Games(made, 2).to(dtype=D)


def test_the_buffers_of_every_leader_advance_in_its_own_loss():
    inputs, labels = data()

    def own(first, second):
        return cross_entropy(first(inputs), labels) + second(inputs).square().mean()

    game = bl.Game(
        first=bl.Player(own, network()),
        second=bl.Player(lambda second: cross_entropy(second(inputs), labels), network()),
    )
    solution = bl.solve(game, optimizer=partial(SGD, lr=0.0), steps=3)
    for name in ("first", "second"):
        assert solution.buffers[name]["1.num_batches_tracked"] == 3
        alone = network()  # at a rate of 0 the same three passes in torch
        for _ in range(3):
            alone(inputs)
        assert torch.allclose(solution.buffers[name]["1.running_mean"], alone[1].running_mean)

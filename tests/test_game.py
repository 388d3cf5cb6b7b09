"""Everything wrong is refused before any work, by an error that says what to do."""

import cProfile
import gc
import pstats
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call

import bilevel as bl

ZERO = torch.zeros(3)


def lead(x, y):
    return (y**2).sum() + (x**2).sum()


def follow(x, y):
    return ((y - x) ** 2).sum()


def game(leader=None, follower=None, x=ZERO, y=ZERO, **options):
    return bl.Game(
        x=bl.Player(leader or lead, x, options.get("x_data")), y=bl.Player(follower or follow, y, options.get("y_data"))
    )


def generator():
    yield 1


REFUSED = {
    "unknown name": (
        lambda: game(follower=lambda x, z: x.sum()),
        ValueError,
        "'y'.*parameter 'z', which names no player",
    ),
    "not scalar": (lambda: game(follower=lambda x, y: y - x), ValueError, r"'y'.*shape \(3,\); expected a scalar"),
    "not a tensor": (
        lambda: game(leader=lambda x, y: 1.0),
        TypeError,
        "'x'.*returned a float; expected a scalar tensor",
    ),
    "detached": (lambda: game(leader=lambda x, y: (x * y).sum().detach()), ValueError, "'x'.*not differentiable"),
    "integer loss": (lambda: game(leader=lambda x, y: (x * y).sum().long()), ValueError, "'x'.*not differentiable"),
    "infinite loss": (lambda: game(leader=lambda x, y: (x * y).sum().log()), ValueError, "'x'.*loss at init is -inf"),
    "integers": (lambda: game(x=torch.zeros(3, dtype=torch.long)), TypeError, r"'x': init has dtype torch.int64"),
    "nested integers": (lambda: game(x={"a": torch.zeros(1, dtype=torch.int32)}), TypeError, r"init\['a'\] has dtype"),
    "number": (lambda: game(x=1.0), TypeError, "'x': init is a float; expected a tensor"),
    "empty tensor": (lambda: game(x=torch.zeros(0)), ValueError, r"'x': init is empty, shape \(0,\)"),
    "empty tree": (lambda: game(x={}), ValueError, "'x': init has no variables"),
    "nan": (lambda: game(x=torch.tensor([1.0, torch.nan])), ValueError, "'x': init holds NaN"),
    "dtypes": (
        lambda: game(x=torch.zeros(3, dtype=torch.float64)),
        ValueError,
        "'y'.*float32.*'x'.*float64.*share one",
    ),
    "devices": (lambda: game(x=torch.zeros(3, device="meta")), ValueError, "on cpu.*on meta.*one device"),
    "generator": (lambda: game(y_data=generator()), TypeError, "data is a generator.*only once"),
    "tensor as data": (lambda: game(y_data=torch.zeros(2)), TypeError, r"iterable of batches.*data=\[batch\]"),
    "empty data": (
        lambda: game(follower=lambda x, y, batch: follow(x, y), y_data=[]),
        bl.errors.ExhaustedDataError,
        "'y' gave no",
    ),
    "batch, no data": (lambda: game(follower=lambda x, y, batch: follow(x, y)), ValueError, "takes `batch`.*no data="),
    "data, no batch": (lambda: game(y_data=[1]), ValueError, "'y'.*takes no `batch`"),
    "raises": (
        lambda: game(follower=lambda x, y, batch: batch + "", y_data=[1]),
        ValueError,
        "'y'.*TypeError on its first",
    ),
    "reaches nothing": (
        lambda: game(leader=lambda y: y.square().sum(), follower=lambda y: y.square().sum()),
        ValueError,
        "'x': its variables reach no objective",
    ),
    "leader in no loss": (
        lambda: bl.Game(
            a=bl.Player(lambda b: (b**2).sum(), ZERO),
            b=bl.Player(lambda b, c: (b * c).sum(), ZERO + 1),
            c=bl.Player(lambda b, c: (b * c).sum(), ZERO + 1),
        ),
        ValueError,
        "'a': its variables reach no objective",
    ),
    "one leaf reaches nothing": (
        lambda: game(lambda y: y.sum(), lambda x, y: (x["used"] * y).sum(), {"used": ZERO, "typo": ZERO}),
        ValueError,
        r"init\['typo'\] reaches no objective",
    ),
    "follower ignores itself": (
        lambda: bl.Implicit(torch.optim.SGD).init(game(follower=lambda x, y: x.sum())),
        ValueError,
        "'y'.*its own variables",
    ),
    "star": (lambda: game(follower=lambda *players: 0), TypeError, "cannot be named"),
    "reserved": (lambda: bl.Game(steps=bl.Player(lambda steps: steps.sum(), ZERO)), ValueError, "'steps' cannot name"),
    "self": (lambda: bl.Game(self=bl.Player(lambda y: y.sum(), ZERO)), ValueError, "'self' cannot name"),
    "no players": (bl.Game, ValueError, "no players"),
    "not a player": (lambda: bl.Game(x=3), TypeError, "'x' is a int; expected a Player"),
}


@pytest.mark.parametrize(("make", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_refused_before_any_work(make, kind, text):
    with pytest.raises(kind, match=f"(?s){text}"):
        make()


def test_a_module_that_is_not_called_functionally_is_found():
    model = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="'weights'.*uses 'weight' of the module of player 'weights' itself"):
        bl.Game(
            decay=bl.Player(lambda weights: weights["weight"].sum(), torch.zeros(())),
            weights=bl.Player(lambda decay, weights: model(torch.ones(3)).sum() * decay.exp(), model),
        )


def writes(how):
    def loss(x, y):
        with torch.no_grad():
            how(x, y)
        return ((y - x) ** 2).sum()

    return loss


@pytest.mark.parametrize(
    ("how", "who"),
    [
        (lambda x, y: y.clamp_(0.0, 1.0), "y"),  # changes nothing at the start
        (lambda x, y: y.data.add_(1.0), "y"),  # leaves the tensor's version as it was
        (lambda x, y: x[:1].zero_(), "x"),
    ],
)
def test_a_loss_that_writes_into_variables_is_refused_by_name(how, who):
    inside = torch.full((3,), 0.5)
    with pytest.raises(ValueError, match=f"Player 'y': its objective writes into the variables of '{who}'.*clone"):
        game(follower=writes(how), x=inside, y=inside)
    game(follower=writes(lambda x, y: how(x.clone(), y.clone())), x=inside, y=inside)


def test_a_residual_that_writes_into_variables_is_refused_by_name():
    def residual(x, y):
        with torch.no_grad():
            y["a"].clamp_(min=0.0)
        return {"a": y["a"] - x}

    with pytest.raises(ValueError, match=r"Player 'y': its residual writes into the variables of 'y'\['a'\]"):
        bl.Game(
            x=bl.Player(lambda x, y: (y["a"] - 1.0).sum() * x.sum(), torch.ones(3)),
            y=bl.Player(lambda x, y: ((y["a"] - x) ** 2).sum(), {"a": torch.ones(3)}, residual=residual),
        )


def two_leaders():
    """Each leader is told of the follower alone, who is moved by both: y* = x1 + 2 x2."""
    return bl.Game(
        x1=bl.Player(lambda x1, y: (y - 1.0) ** 2 + x1**2, torch.tensor(0.5)),
        x2=bl.Player(lambda y: (y - 2.0) ** 2, torch.tensor(0.5)),
        y=bl.Player(lambda x1, x2, y: (y - x1 - 2.0 * x2) ** 2, torch.tensor(0.0)),
    )


def test_several_leaders_need_not_depend_on_each_other_or_on_themselves():
    respond = bl.Unrolled(partial(torch.optim.SGD, lr=0.5), steps=1)
    found = bl.solve(two_leaders(), y=respond, optimizer=partial(torch.optim.SGD, lr=0.05), steps=400)
    # x2 brings y to 2; x1 settles where 2 (y - 1) + 2 x1 = 0.
    assert found.variables["y"].item() == pytest.approx(2.0, abs=1e-5)
    assert found.variables["x1"].item() == pytest.approx(-1.0, abs=1e-5)


def test_a_player_whose_own_loss_it_cannot_move_is_legal_and_has_a_gradient_of_zero():
    """y's loss is x's to move. Alone it has nothing to gain; under LOLA it moves x, which moves its loss."""
    one = torch.tensor(1.0, dtype=torch.float64)
    x, y = bl.Player(lambda x, y: (x - y) ** 2, 0.5 * one), bl.Player(lambda x: x**2, one)
    descend = partial(torch.optim.SGD, lr=0.1)
    for game in (bl.Game(x=x, y=y), bl.Game(y=y, x=x)):
        found = bl.solve(game, optimizer=descend, steps=60)
        assert found.variables["y"] == 1.0 and found.variables["x"].item() == pytest.approx(1.0, abs=1e-5)
        # LOLA's loss to first order is x^2 - a 2x 2(x - y), whose slope in y is 4 a x = 1/5 at x = 1/2 and a = 1/10.
        found = bl.solve(game, optimizer=descend, steps=1, dynamics=bl.dynamics.LOLA(0.1))
        assert found.variables["y"].item() == pytest.approx(1.0 - 0.1 * 0.2, abs=1e-12)


def test_who_cannot_follow_is_refused_when_it_is_asked_to():
    game, respond = two_leaders(), bl.Unrolled(partial(torch.optim.SGD, lr=0.5), steps=1)
    with pytest.raises(ValueError, match=r"'x2'.*does not depend on its own variables"):
        respond.init(game, follower="x2")
    alone = bl.Game(
        x=bl.Player(lambda x, y: (x - y) ** 2, torch.tensor(0.5)), y=bl.Player(lambda y: y**2, torch.tensor(1.0))
    )
    assert abs(bl.solve(alone, optimizer=partial(torch.optim.SGD, lr=0.3), steps=60).variables["x"].item()) < 1e-4
    with pytest.raises(ValueError, match=r"'y'.*does not depend on 'x', who moves before it.*no response"):
        bl.solve(alone, y=respond, steps=1)


def test_a_gradient_that_is_no_number_at_the_start_is_named():
    with pytest.raises(ValueError, match=r"'y'.*finite, but its gradient in the variables of 'y'\['w'\] holds NaN"):
        bl.Game(
            x=bl.Player(lambda y: y["w"].sum(), torch.tensor(1.0)),
            y=bl.Player(
                lambda x, y: x * y["w"].norm().sqrt() + y["b"].sum(), {"w": torch.zeros(2), "b": torch.ones(2)}
            ),
        )


def test_variables_of_another_form_are_refused():
    played = game()
    response = bl.Unrolled(partial(torch.optim.SGD, lr=0.1), steps=1)
    state = response.init(played)
    with pytest.raises(ValueError, match=r"'x' are \{'tensor': \(2,\)\}; expected.*\(3,\)"):
        response(played, {"x": torch.zeros(2)}, state)
    with pytest.raises(ValueError, match=r"needs the variables of \['x'\]"):
        response(played, {}, state)
    with pytest.raises(ValueError, match=r"given variables of 'z'"):
        response(played, {"x": ZERO, "z": ZERO}, state)


def test_what_is_allowed():
    class Loss:
        def __call__(self, y, x, scale=2.0):
            return scale * follow(x, y["a"][0])

    played = game(leader=partial(lambda y, p: (y["a"][0] ** p).sum(), p=2), follower=Loss(), y={"a": [ZERO]})
    assert played.loss("y", {"x": ZERO + 1, "y": {"a": [ZERO]}}).item() == 6.0


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(3), nn.Linear(3, 1)
        self.out.bias.requires_grad_(False)

    def forward(self, inputs):
        return self.out(self.norm(inputs))


@pytest.mark.parametrize(
    "response",
    [
        bl.Unrolled(partial(torch.optim.SGD, lr=0.05), steps=3),
        bl.Implicit(partial(torch.optim.SGD, lr=0.05), steps=3, tolerance=None),
        bl.Hypernetwork(partial(torch.optim.Adam, lr=0.01), steps=3, tolerance=None),
    ],
    ids=lambda r: type(r).__name__,
)
def test_buffers_advance_in_the_state_and_the_module_never_changes(response):
    model = Normed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    inputs = torch.randn(8, 3) + 2

    def train(decay, weights, batch):
        fit = (functional_call(model, weights, (batch,)) ** 2).mean()
        return fit + decay.exp() * sum(w.square().sum() for w in weights.values())

    random = torch.random.get_rng_state()
    played = bl.Game(
        decay=bl.Player(
            lambda weights, batch: functional_call(model, weights, (batch,)).square().mean(), ZERO.sum(), [inputs]
        ),
        weights=bl.Player(train, model, [inputs]),
    )
    assert torch.equal(random, torch.random.get_rng_state())
    assert set(played.initial("weights")) == {"norm.weight", "norm.bias", "out.weight"}
    solution = bl.solve(played, weights=response, steps=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert solution.buffers["weights"]["norm.num_batches_tracked"] >= 6
    assert (solution.buffers["weights"]["norm.running_mean"] > 0.3).all()


def by_plain_steps(tensor):
    tensor.requires_grad_()
    tensor.sum().backward()
    optimizer = torch.optim.Adam([tensor], lr=0.5, fused=True)
    optimizer.step()


WRITES = {
    "without grad": lambda tensor: tensor.detach().add_(1.0),
    ".data": lambda tensor: tensor.data.add_(1.0),
    "NumPy": lambda tensor: tensor.detach().numpy().__iadd__(1.0),
    "an optimiser": by_plain_steps,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("form", ["tensor", "module", "handed out"])
def test_where_a_game_starts_is_out_of_reach(form, write):
    model, tensor = nn.Linear(3, 1, bias=False), torch.ones(3)
    init = {"tensor": tensor, "handed out": tensor.clone(), "module": model}[form]

    def own(y):
        return (y["weight"] if isinstance(y, dict) else y).reshape(3)

    played = game(leader=lambda x, y: lead(x, own(y)), follower=lambda x, y: follow(x, own(y)), y=init)
    before = own(played.initial("y")).clone()
    write({"tensor": tensor, "module": model.weight, "handed out": played.players["y"].init}[form])
    assert torch.equal(own(played.initial("y")), before)


def test_a_game_holds_one_copy_of_what_it_starts_from():
    tensor = torch.ones(3)
    kept = weakref.ref(tensor)
    played = game(y=tensor)
    del tensor
    gc.collect()
    assert kept() is None
    assert torch.equal(played.players["y"].init, torch.ones(3))


def test_a_module_may_leave_its_numbers_once_the_game_is_made():
    def solved(*, leave):
        torch.manual_seed(0)
        model, inputs = Normed(), torch.linspace(-1.0, 1.0, 24).reshape(8, 3) + 2

        def train(decay, weights):
            fit = (functional_call(model, weights, (inputs,)) ** 2).mean()
            return fit + decay.exp() * sum(w.square().sum() for w in weights.values())

        model.out.bias = None
        played = bl.Game(
            decay=bl.Player(lambda weights: functional_call(model, weights, (inputs,)).mean(), ZERO.sum()),
            weights=bl.Player(train, model),
        )
        if leave:
            model.to("meta")
        return bl.solve(played, weights=bl.Unrolled(partial(torch.optim.SGD, lr=0.05), steps=3), steps=2)

    stayed, left = solved(leave=False), solved(leave=True)
    assert torch.equal(stayed.variables["decay"], left.variables["decay"])
    for path, tensor in stayed.buffers["weights"].items():
        assert torch.equal(tensor, left.buffers["weights"][path])


def test_a_second_leader_may_tune_the_inner_optimiser():
    game = bl.Game(
        x=bl.Player(lambda x, y: (y - 1) ** 2 + x**2, torch.tensor(0.5)),
        rate=bl.Player(lambda y: (y - 1) ** 2, torch.tensor(0.1), optimizer_hyper=True),
        y=bl.Player(lambda x, y: (y - x) ** 2, torch.tensor(0.0)),
    )
    response = bl.Unrolled(lambda params, rate: torch.optim.SGD(params, lr=rate), steps=1, warm_start=False)
    solution = bl.solve(game, y=response, steps=1)
    assert float(solution.variables["rate"]) > 0.1  # y = 2 rate x, below its goal of 1


def test_a_game_and_a_step_of_it_grow_with_the_players_and_not_with_their_pairs():
    def loss_of(own, other):
        return eval(f"lambda {own}, {other}: ({own} - 0.5 * {other} - 1.0) ** 2")  # parameters are players' names

    def calls(count):
        """How many functions Python calls in making the game, and in a step of it."""
        names = [f"p{i}" for i in range(count)]
        losses = [loss_of(own, other) for own, other in zip(names, names[1:] + names[:1], strict=True)]
        players = {name: bl.Player(loss, ZERO.sum()) for name, loss in zip(names, losses, strict=True)}
        with cProfile.Profile() as making:
            game = bl.Game(**players)
        optimizer = partial(torch.optim.SGD, lr=0.1)
        bl.solve(game, optimizer=optimizer, steps=1)  # whatever is imported at first use
        with cProfile.Profile() as playing:
            bl.solve(game, optimizer=optimizer, steps=1)
        return pstats.Stats(making).total_calls, pstats.Stats(playing).total_calls

    few, many = calls(20), calls(80)
    # Four times as many: 4 where it is in proportion, 16 where it is by pairs; half-way between on a log scale is 8.
    assert all(large < 6 * small for small, large in zip(few, many, strict=True)), (few, many)


DEFAULTS = {
    "a leader": {"objective": lambda y, x=0.5: (y - 2 * x) ** 2},
    "a leader, by keyword alone": {"objective": lambda y, *, x=0.5: (y - 2 * x) ** 2},
    "itself": {"objective": lambda x, y=0.0: (y - 2 * x) ** 2},
    "residual": {"objective": lambda x, y: (y - x) ** 2, "residual": lambda y, x=1.0: y - x},
    "inequality": {"objective": lambda x, y: (y - x) ** 2, "inequality": lambda y, x=1.0: y - x},
    "start": {"objective": lambda x, y: (y - x) ** 2, "start": lambda x, y=1.0: x},
    "batch": {"objective": lambda x, y, batch=None: (y - x) ** 2, "data": [torch.ones(2)]},
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_default_that_has_a_players_name_is_refused(name):
    """A call would use the default, and the player would not be seen, in silence."""
    one = torch.tensor(1.0)
    with pytest.raises(ValueError, match="with a default value, which would be used in the place of"):
        bl.Game(x=bl.Player(lambda x, y: (y - 3 * x) ** 2, one), y=bl.Player(init=one, **DEFAULTS[name]))


def test_what_partial_binds_and_other_defaults_are_the_users():
    one = torch.tensor(1.0)
    fixed = partial(lambda y, z, x, rate=0.5: (y - rate * x) ** 2 + (y - z) ** 2, x=2.0)
    game = bl.Game(
        x=bl.Player(lambda x, y: (y - 3 * x) ** 2, one),
        z=bl.Player(lambda x, z, batch=None: (z - x) ** 2, one),
        y=bl.Player(fixed, one),
    )
    assert game.arguments("y") == ("y", "z")
    assert float(game.loss("y", {"y": one, "z": one})) == 0.0

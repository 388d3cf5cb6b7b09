"""Networks that know the layers: exact where a layer answers as they can; elsewhere the residual tells."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn, optim

import bilevel as bl
from bilevel.responses.learned.maps import LeafMap

D = torch.float64
NETWORKS = {
    "rows": bl.networks.RowScaled(),
    "rows and columns": bl.networks.RowColumnScaled(),
    "self-tuning": bl.networks.SelfTuning(),
    "low-rank layers": bl.networks.LowRankLayers(2),
}
SHAPES = [torch.Size(s) for s in ((3, 4), (3,), (2, 3, 2, 2), ())]


def drawn(network, inputs=2, seed=0):
    """A map with random numbers, its w0 and its weights."""
    torch.manual_seed(seed)
    started = network.parameters(inputs, SHAPES)
    weights = {name: torch.randn(p.shape, dtype=D) for name, p in started.items()}
    return LeafMap(network), [torch.randn(shape, dtype=D) for shape in SHAPES], weights


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
class TestTheMap:
    def test_it_is_w0_at_the_centre_and_before_any_fitting(self, network):
        move, w0, weights = drawn(network)
        fresh = {name: p.double() for name, p in network.parameters(2, SHAPES).items()}
        for answer in (move(w0, weights, torch.zeros(2, dtype=D)), move(w0, fresh, torch.ones(2, dtype=D))):
            assert all(torch.equal(leaf, start) for leaf, start in zip(answer, w0, strict=True))

    def test_its_derivatives_of_first_and_second_order(self, network):
        move, w0, weights = drawn(network)
        names = list(weights)

        def function(u, *numbers):
            return tuple(move(w0, dict(zip(names, numbers, strict=True)), u))

        points = [torch.randn(2, dtype=D), *weights.values()]
        points = [p.requires_grad_() for p in points]
        assert torch.autograd.gradcheck(function, points)
        assert torch.autograd.gradgradcheck(function, points)

    def test_w0_gets_the_gradient_at_the_answer(self, network):
        move, w0, weights = drawn(network)
        own = [leaf.clone().requires_grad_() for leaf in w0]
        answer = move(own, weights, torch.ones(2, dtype=D))
        slopes = torch.autograd.grad(sum((leaf**3).sum() for leaf in answer), own)
        for slope, leaf in zip(slopes, answer, strict=True):
            torch.testing.assert_close(slope, 3 * leaf.detach() ** 2)

    def test_vmap_is_a_loop_and_jacrev_is_autograd(self, network):
        move, w0, weights = drawn(network)
        points = torch.randn(3, 2, dtype=D)
        together = torch.func.vmap(lambda u: move(w0, weights, u))(points)
        for index, u in enumerate(points):
            for many, one in zip(together, move(w0, weights, u), strict=True):
                torch.testing.assert_close(many[index], one)
        slopes = torch.func.jacrev(lambda u: move(w0, weights, u))(points[0])
        plain = torch.autograd.functional.jacobian(lambda u: tuple(move(w0, weights, u)), points[0])
        for one, other in zip(slopes, plain, strict=True):
            torch.testing.assert_close(one, other)


# Games whose Jacobian is one of theirs, and one that is not -------------------------------------------------------

ROWS, COLUMNS = 3, 4
made = torch.Generator().manual_seed(2)
TARGET = torch.randn(ROWS, COLUMNS, generator=made, dtype=D)
TURN = torch.randn(ROWS, COLUMNS, generator=made, dtype=D)
LEFT, MIDDLE, RIGHT = (torch.randn(s, generator=made, dtype=D) for s in ((ROWS, 2), (2, 3), (COLUMNS, 2)))
X = torch.tensor([0.3, -0.2, 0.5], dtype=D)


def lead(weights):
    return ((weights["matrix"] - 1) ** 2).sum() + ((weights["bias"] - 1) ** 2).sum()


def best_rows(x):
    return TARGET / (1 + x.exp()[:, None])


def best_columns(x):
    return TARGET / (1 + torch.cat([x, x[:1]]).exp())


def best_turned(x):
    return TARGET + x[:, None] * TURN


def best_low_rank(x):
    return TARGET + LEFT * (MIDDLE @ x) @ RIGHT.T


def game(best):
    """The matrix follows `best(x)` and the bias x itself; curvatures of one."""

    def follow(x, weights):
        return 0.5 * ((weights["matrix"] - best(x)) ** 2).sum() + 0.5 * ((weights["bias"] - x) ** 2).sum()

    start = {"matrix": torch.zeros(ROWS, COLUMNS, dtype=D), "bias": torch.zeros(ROWS, dtype=D)}
    return bl.Game(x=bl.Player(lead, X), weights=bl.Player(follow, start))


def response(network, **options):
    options = {"warmup": 1200, "sampler": bl.responses.Perturbations(antithetic=False), "tolerance": None} | options
    schedule = partial(optim.lr_scheduler.CosineAnnealingLR, T_max=options["warmup"] + 1)
    return bl.Hypernetwork(partial(optim.Adam, lr=0.1), scale=0.05, network=network, scheduler=schedule, **options)


def learned(network, best, **options):
    """The matrix's and the bias's Jacobians, and the state."""
    fitting, played, x = response(network, **options), game(best), X.clone().requires_grad_()
    answer, state = fitting(played, {"x": x}, fitting.init(played))
    slopes = []
    for leaf in (answer["matrix"], answer["bias"]):
        rows = [torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in leaf.flatten()]
        slopes.append(torch.stack(rows).reshape(*leaf.shape, 3))
    return *slopes, state


def error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(
    ("network", "best", "within"),
    [
        # Adam's rate ends at 0; what is left is the curvature of `best` over the perturbations, of order scale^2.
        (bl.networks.RowScaled(), best_rows, 0.01),
        (bl.networks.RowColumnScaled(), best_rows, 0.01),
        (bl.networks.RowColumnScaled(), best_columns, 0.01),
        (bl.networks.SelfTuning(), best_turned, 0.05),
        (bl.networks.LowRankLayers(2), best_low_rank, 0.05),
    ],
    ids=["rows", "rows, by columns too", "columns", "turned rows", "low rank"],
)
def test_what_a_network_can_say_it_learns(network, best, within):
    matrix, bias, state = learned(network, best)
    assert error(matrix, torch.func.jacrev(best)(X)) <= within
    assert error(bias, torch.eye(3, dtype=D)) <= within
    assert state["residual"] <= within


def test_what_it_cannot_say_its_residual_tells():
    with pytest.warns(
        bl.errors.LinearNonConvergenceWarning, match="learned slope of player 'weights' leaves 0\\.[6-9]"
    ):
        matrix, bias, state = learned(bl.networks.RowScaled(), best_turned, tolerance=0.5)
    truth = torch.func.jacrev(best_turned)(X)
    # A row can only follow the part of its truth that is along the row itself.
    there = best_turned(X)
    along = (TURN * there).sum(1) / there.square().sum(1)
    nearest = torch.einsum("r,rc,rj->rcj", along, there, torch.eye(3, dtype=D))
    left = error(nearest, truth)
    assert left > 0.6 and error(matrix, nearest) < 0.2 and error(matrix, truth) == pytest.approx(left, abs=0.02)
    assert error(bias, torch.eye(3, dtype=D)) < 0.01
    # With a Hessian of one the residual is the error in the direction that was drawn, the bias's right part counted.
    assert state["residual"] == pytest.approx(left, abs=0.3)


@pytest.mark.parametrize("network", [bl.networks.Linear(), bl.networks.RowScaled()], ids=["dense", "rows"])
def test_scalars_answer_too(network):
    played = bl.Game(
        x=bl.Player(lambda y: y**2, torch.tensor(1.0, dtype=D)),
        y=bl.Player(lambda x, y: (y - 2 * x) ** 2, torch.tensor(0.0, dtype=D)),
    )
    fitting, x = response(network, warmup=400), torch.tensor(1.0, dtype=D, requires_grad=True)
    answer, _ = fitting(played, {"x": x}, fitting.init(played))
    assert answer.shape == () and abs(torch.autograd.grad(answer, x)[0].item() - 2) < 1e-3


def test_many_draws_are_the_mean_of_their_gradients():
    played = game(best_rows)
    fitting = bl.Hypernetwork(
        partial(optim.SGD, lr=1.0),
        scale=0.1,
        network=bl.networks.RowScaled(),
        sampler=bl.responses.Perturbations(count=3),
        tolerance=None,
    )
    x = {"x": X}
    state = fitting.init(played)
    _, after = fitting(played, x, state)
    noise = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=D)
    points = X + 0.1 * torch.cat([noise, -noise])
    wanted = torch.stack([best_rows(point) for point in points]).mean(0)  # from zero: the gradient is -best
    torch.testing.assert_close(after["w0"][0], wanted)
    assert after["gradients"] == 6 + 3


def test_modules_with_buffers_are_followed():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=D)

    def follow(decay, weights):
        fit = torch.func.functional_call(model, weights, (inputs,))
        return (fit - 1).square().mean() + sum(d * w.square().sum() for d, w in zip(decay.exp(), weights.values()))

    def judge(weights):
        return sum(w.square().sum() for w in weights.values())

    played = bl.Game(decay=bl.Player(judge, torch.full((6,), -2.0, dtype=D)), weights=bl.Player(follow, model))
    fitting = bl.Hypernetwork(
        partial(optim.Adam, lr=1e-2), network=bl.networks.RowColumnScaled(), steps=3, tolerance=None
    )
    solution = bl.solve(played, weights=fitting, steps=3)
    assert int(solution.states["weights"]["buffers"]["1.num_batches_tracked"]) == 4 * 3 * 2
    assert torch.isfinite(solution.variables["decay"]).all()


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_saved_and_loaded_it_goes_on_bit_for_bit(network, tmp_path):
    played, fitting, x = game(best_rows), response(network, warmup=5, steps=2), {"x": X}
    _, state = fitting(played, x, fitting.init(played))
    torch.save(state, tmp_path / "state.pt")
    ahead, _ = fitting(played, x, state)
    fresh = copy.deepcopy(fitting)  # knows nothing but the state
    again, _ = fresh(played, x, torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(torch.equal(ahead[name], again[name]) for name in ahead)


class Wrong(bl.networks.LeafNetwork):
    """Answers with something else."""

    def __init__(self, change):
        self.change = change

    def parameters(self, inputs, shapes):
        return {}

    def __call__(self, parameters, u, w0):
        return [self.change(leaf) for leaf in w0]


class Still(bl.networks.LeafNetwork):
    """One leaf moves; the others come back as they are."""

    def parameters(self, inputs, shapes):
        return {"slope": torch.zeros(inputs)}

    def __call__(self, parameters, u, w0):
        return [w0[0] + parameters["slope"] @ u, *w0[1:]]


def test_a_leaf_that_a_network_leaves_alone_is_no_part_of_the_state():
    played, fitting = game(best_rows), response(Still(), warmup=3)
    state = fitting.init(played)
    kept = copy.deepcopy(state)
    answer, after = fitting(played, {"x": X}, state)
    assert str(kept) == str(state)
    assert not torch.equal(answer["matrix"], state["variables"]["matrix"])
    assert all(torch.equal(leaf, w0) for leaf, w0 in zip(after["variables"].values(), after["w0"], strict=True))


def test_what_is_refused():
    played = game(best_rows)
    with pytest.raises(ValueError, match=r"answers with leaves \[\(3,\), \(\)\]; expected those of player 'weights'"):
        response(Wrong(lambda leaf: leaf.sum(-1))).init(played)
    with pytest.raises(ValueError, match="does not answer with w0 at a displacement of zero"):
        response(Wrong(lambda leaf: leaf + 1)).init(played)
    with pytest.raises(ValueError, match=r"raised RuntimeError on a displacement \[3\] and the leaves w0: .*'weights'"):
        response(Wrong(lambda leaf: leaf @ torch.zeros(7))).init(played)
    with pytest.raises(ValueError, match="LowRankLayers: rank=0; expected at least 1"):
        bl.networks.LowRankLayers(0)


def test_it_warns_of_nothing_when_it_fits():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learned(bl.networks.RowScaled(), best_rows, tolerance=0.1)


@pytest.mark.parametrize("wrong", [bl.networks.RowScaled, bl.networks.Linear, "rows"])
def test_what_makes_no_network_is_refused_where_it_is_given(wrong):
    with pytest.raises(TypeError, match="Hypernetwork: network="):
        bl.Hypernetwork(partial(torch.optim.Adam, lr=1e-3), network=wrong)

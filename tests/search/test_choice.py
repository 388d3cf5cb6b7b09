"""Integers, numbers with gaps and categories: their places, the kernel between them, and how they are searched."""

import itertools
import math

import pytest
import torch

import bilevel as bl
from bilevel.search import GradientSearch, minimise
from bilevel.search.process import Kernel, fitted


def test_numbers_are_placed_by_value_or_logarithm_and_rounded_to_the_nearest():
    widths = bl.Choice([64, 16, 32, 128], log=True)
    assert widths.ranked == [16, 32, 64, 128]
    assert [widths.place(rank) for rank in range(4)] == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
    assert [widths.ranked[widths.rank_at(place)] for place in (-1.0, 0.16, 0.17, 0.5, 0.8, 2.0)] == [
        16, 16, 32, 32, 64, 128,
    ]  # fmt: skip
    layers = bl.Choice(range(1, 9, 2))
    assert [layers.ranked[layers.rank_at(place)] for place in (0.0, 0.3, 0.5, 1.0)] == [1, 3, 3, 7]
    assert bl.Choice(range(8, 0, -1)).ranked == range(1, 9)
    # A million integers are not written down.
    many = bl.Choice(range(1, 10**6 + 1), log=True)
    assert many.first == 1000
    assert many.rank(999_999) == 999_998


def test_the_first_option_and_what_counts_as_a_category():
    assert bl.Choice(["sgd", "adam"]).first == "sgd"
    assert bl.Choice(["sgd", "adam"], start="adam").first == "adam"
    assert bl.Choice([1, 2, 3]).is_ordered
    assert not bl.Choice([1, 2, 3], ordered=False).is_ordered
    assert not bl.Choice([False, True]).is_ordered
    assert bl.Choice([torch.optim.Adam, torch.optim.SGD]).first is torch.optim.Adam


def test_what_is_no_choice_is_refused():
    for wrong, error, words in (
        ({"options": "adam"}, TypeError, "expected a list"),
        ({"options": {"a", "b"}}, TypeError, "expected a list"),
        ({"options": ["adam"]}, ValueError, "two or more"),
        ({"options": range(1)}, ValueError, "two or more"),
        ({"options": [1, 1.0]}, ValueError, "are equal"),
        ({"options": [[1], [2]]}, TypeError, "Choose among names"),
        ({"options": list(torch.rand(2))}, TypeError, "Choose among names"),
        ({"options": [1.0, math.inf]}, ValueError, "finite numbers"),
        ({"options": ["a", "b"], "ordered": True}, TypeError, "finite numbers"),
        ({"options": ["a", "b"], "log": True}, ValueError, "numbers above 0"),
        ({"options": [0, 1], "log": True}, ValueError, "numbers above 0"),
        ({"options": ["a", "b"], "start": "c"}, ValueError, "none of the options"),
        ({"options": ["a", "b"], "log": "yes"}, TypeError, "log='yes'"),
    ):
        with pytest.raises(error, match=words):
            bl.Choice(**wrong)


def test_a_player_and_a_tuning_run_refuse_it_by_name():
    with pytest.raises(TypeError, match=r"Player: init has Choice.*no derivative.*bilevel.search.minimise"):
        bl.Player(lambda a: a, init={"a": bl.Choice([1, 2])})

    def train(weights, width, batch):
        return weights(batch).square().mean()

    data = [torch.randn(4, 2)]
    with pytest.raises(TypeError, match=r"Tuning: hyper's 'width' has Choice.*no hypergradient.*Search it around"):
        bl.tune(
            torch.nn.Linear(2, 1), train, lambda weights, batch: weights(batch).mean(), data, data,
            hyper={"width": bl.Choice(range(1, 9))}, optimizer=torch.optim.Adam, steps=1,
        )  # fmt: skip


def test_the_kernel_of_categories_is_that_of_a_hamming_distance_and_its_blocks_are_derivatives():
    categories = torch.tensor([False, True, False, True])
    kernel = Kernel(0.4, 0.6, categories)
    a = torch.tensor([0.1, 2.0, 0.7, 0.0], dtype=torch.float64)
    b = torch.tensor([0.3, 2.0, 0.2, 1.0], dtype=torch.float64)

    def k(a, b):
        return kernel.blocks(a[None], b[None])[0, 0, 0, 0]

    smooth = [math.exp(-((0.2 / 0.4) ** 2) / 2), math.exp(-((0.5 / 0.4) ** 2) / 2)]
    product = math.exp(-(0.2**2 + 0.5**2) / (2 * 4 * 0.4**2) - 1 / 4)
    assert float(k(a, b)) == pytest.approx(100.0 + 0.6 / 4 * (sum(smooth) + 1.0) + 0.4 * product, rel=1e-12)
    found = kernel.blocks(a[None], b[None])[0, :, 0, :]
    grads = torch.func.grad(k, argnums=(0, 1))(a, b)
    cross = torch.func.jacrev(torch.func.grad(k, argnums=0), argnums=1)(a, b)
    at = ~categories
    torch.testing.assert_close(found[1:, 0][at], grads[0][at])
    torch.testing.assert_close(found[0, 1:][at], grads[1][at])
    torch.testing.assert_close(found[1:, 1:][at][:, at], cross[at][:, at])


def test_the_doubt_is_the_deviation_of_a_difference():
    points = torch.rand(5, 2, dtype=torch.float64)
    process = fitted(points, points.sin().sum(1), torch.full_like(points, math.nan))
    x, y = torch.rand(2, 3, 2, dtype=torch.float64).unbind(0)

    def prior(a, b):
        return process.variance * process.kernel.blocks(a, b)[:, 0, :, 0]

    seen = process.variance * process.factor @ process.factor.T
    joint = torch.cat([x, y])
    posterior = prior(joint, joint) - prior(joint, points) @ torch.linalg.solve(seen, prior(points, joint))
    difference = torch.cat([torch.eye(3), -torch.eye(3)], 1).double()
    wanted = (difference @ posterior @ difference.T).diagonal()
    # The prior's constant of 100 is subtracted twice: 1e-16 of it, times a condition of 1e10 at the least noise.
    torch.testing.assert_close(process.doubt(x, y).square(), wanted, rtol=1e-3, atol=1e-4 * process.variance)


OFFSETS = {"a": 0.4, "b": 0.0, "c": 0.9}
SPACE = {
    "x": bl.Interval(-2.0, 2.0, start=1.5),
    "rate": bl.Log(1e-4, 1.0, start=0.5),
    "layers": bl.Choice(range(1, 9)),
    "kind": bl.Choice(["a", "b", "c"]),
}


def mixed(x, rate, layers, kind):
    """Least, 0, at x = -1, a rate of 0.01, 3 layers, kind b."""
    return (x + 1) ** 2 + (rate.log() - math.log(0.01)) ** 2 / 10 + 0.05 * (layers - 3) ** 2 + OFFSETS[kind]


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_numbers_integers_and_categories_together(seed):
    # 8 x 3 = 24 combinations of the choices alone; a model of separate effects has 3 + 2 numbers for these.
    found = minimise(mixed, GradientSearch(SPACE, evaluations=18), seed=seed)
    assert (found.values["layers"], found.values["kind"]) == (3, "b")
    assert found.loss < 1e-2


def test_slopes_of_choices():
    search = GradientSearch(SPACE)
    (point,), state = search.ask(search.init())
    assert point == {"x": 1.5, "rate": pytest.approx(0.5), "layers": 4, "kind": "a"}
    with pytest.raises(ValueError, match="'kind', which is one of several categories"):
        search.tell(state, point, 1.0, {"kind": 0.1})
    with pytest.raises(ValueError, match=r"layers: 9 is none of the options, range\(1, 9\)"):
        search.tell(state, point | {"layers": 9}, 1.0)
    # Of a number among several the loss may have a slope: per range, from 1 to 8.
    state = search.tell(state, point, 1.0, {"layers": 0.5, "x": 1.0})
    assert state["slopes"][0, [0, 2]].tolist() == [4.0, 3.5]


def test_a_space_of_choices_alone_is_tried_out_without_a_repetition():
    space = {"a": bl.Choice(range(4)), "b": bl.Choice(["x", "y", "z"])}
    search = GradientSearch(space, evaluations=12)
    state, tried = search.init(), []
    for count in (3, 4, 5):
        points, state = search.ask(state, count)
        for point in points:
            tried.append((point["a"], point["b"]))
            state = search.tell(state, point, (point["a"] - 2) ** 2 + (point["b"] != "y"))
    assert sorted(tried) == sorted(itertools.product(range(4), "xyz"))
    assert search.best(state) == ({"a": 2, "b": "y"}, 0.0)
    # Then the best again.
    (point,), state = search.ask(state)
    assert point == {"a": 2, "b": "y"}


def test_losses_that_are_all_the_same_do_not_keep_it_from_other_options():
    space = {"width": bl.Choice(range(1, 10**6), log=True), "kind": bl.Choice(["a", "b", "c"])}
    found = minimise(lambda width, kind: torch.tensor(float(kind != "c")), GradientSearch(space, evaluations=6))
    assert found.values["kind"] == "c"


def test_one_is_told_of_two_workers_at_the_same_point():
    search = GradientSearch({"a": bl.Choice([0, 1])})
    state = search.init()
    state = search.expect(search.expect(state, {"a": 0}), {"a": 0})
    assert len(search.tell(state, {"a": 0}, 1.0)["pending"]) == 1


def test_a_choice_goes_on_from_a_saved_state(tmp_path):
    search = GradientSearch(SPACE, evaluations=8)
    whole = minimise(mixed, search, seed=1)
    half = minimise(mixed, GradientSearch(SPACE, evaluations=8), seed=1)
    assert whole.losses == half.losses
    state = search.init(1)
    for _ in range(3):
        (point,), state = search.ask(state)
        given = {n: torch.tensor(point[n], dtype=torch.float64, requires_grad=True) for n in ("x", "rate")}
        loss = mixed(**(point | given))
        slopes = torch.autograd.grad(loss, list(given.values()))
        told = {name: slope.item() for name, slope in zip(given, slopes, strict=True)}
        state = search.tell(state, point, loss.item(), told)
    torch.save(state, tmp_path / "state.pt")
    again = minimise(mixed, search, state=torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.losses == whole.losses

"""The search that takes hypergradients: the process in closed form, the laws of proposals, what slopes are worth."""

import math

import pytest
import torch

import bilevel as bl
from bilevel.search import GradientSearch, minimise
from bilevel.search.process import Kernel, fitted

D = 6
SPACE = {f"x{i}": bl.Interval(-2.0, 2.0) for i in range(D)}
GOAL = torch.linspace(-1.2, 1.4, D, dtype=torch.float64)


def bowl(x0, x1, x2, x3, x4, x5):
    """An additive quadratic, least 0 at GOAL."""
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.3, 1.5], dtype=torch.float64)
    return (weights * (torch.stack([x0, x1, x2, x3, x4, x5]) - GOAL).square()).sum()


def valley(a, b):
    """Rosenbrock's, least 0 at (1, 1)."""
    return (1 - a) ** 2 + 5 * (b - a**2) ** 2


def test_the_blocks_are_the_derivatives_of_the_kernel():
    kernel = Kernel(0.4, 0.6)
    a, b = torch.rand(2, 3, dtype=torch.float64).unbind(0)

    def k(a, b):
        return kernel.blocks(a[None], b[None])[0, 0, 0, 0]

    found = kernel.blocks(a[None], b[None])[0, :, 0, :]
    grads = torch.func.grad(k, argnums=(0, 1))(a, b)
    cross = torch.func.jacrev(torch.func.grad(k, argnums=0), argnums=1)(a, b)
    torch.testing.assert_close(found[1:, 0], grads[0])
    torch.testing.assert_close(found[0, 1:], grads[1])
    torch.testing.assert_close(found[1:, 1:], cross)


def test_the_mean_has_the_values_and_slopes_that_it_saw():
    points = torch.rand(6, 3, dtype=torch.float64)
    values, slopes = points.sin().sum(1), points.cos()
    mean, slope = fitted(points, values, slopes).mean(points)
    # The least noise is 1e-8 of the variance, its root 1e-4 of a deviation.
    torch.testing.assert_close(mean, values, rtol=0.0, atol=1e-3)
    torch.testing.assert_close(slope, slopes, rtol=0.0, atol=1e-3)


def needed(objective, space, goal, *, slopes, evaluations):
    """How many evaluations until the loss is at most `goal`."""
    shown = objective if slopes else (lambda **values: objective(**values).detach())
    if not slopes:
        shown.__signature__ = __import__("inspect").signature(objective)
    losses = minimise(shown, GradientSearch(space, evaluations=evaluations)).losses
    return next((i for i, loss in enumerate(losses, 1) if loss <= goal), math.inf)


@pytest.mark.parametrize(
    ("objective", "space", "goal"),
    [(bowl, SPACE, 1e-2), (valley, {"a": bl.Interval(-2.0, 2.0), "b": bl.Interval(-1.0, 3.0)}, 1e-2)],
    ids=["additive quadratic", "Rosenbrock"],
)
def test_with_slopes_it_takes_a_fraction_of_the_evaluations(objective, space, goal):
    with_slopes = needed(objective, space, goal, slopes=True, evaluations=30)
    assert with_slopes < math.inf
    # Without slopes: not there after one and a half times as many.
    assert needed(objective, space, goal, slopes=False, evaluations=int(1.5 * with_slopes)) == math.inf


def test_it_goes_on_from_a_saved_state_with_the_same_points(tmp_path):
    search = GradientSearch(SPACE, evaluations=6)
    whole = minimise(bowl, search)
    half = minimise(bowl, GradientSearch(SPACE, evaluations=3))
    # The region's size follows the evaluations that are planned: three asked by the plan of six.
    state = search.init()
    for _ in range(3):
        (point,), state = search.ask(state)
        given = {n: torch.tensor(z, dtype=torch.float64, requires_grad=True) for n, z in point.items()}
        loss = bowl(**given)
        slopes = torch.autograd.grad(loss, list(given.values()))
        state = search.tell(state, point, loss.item(), {n: s.item() for n, s in zip(given, slopes)})
    torch.save(state, tmp_path / "state.pt")
    again = minimise(bowl, search, state=torch.load(tmp_path / "state.pt", weights_only=True))
    assert again.losses == whole.losses
    assert half.losses[0] == whole.losses[0]


def test_it_stays_in_the_ranges_and_asks_for_several_points_that_differ():
    space = {"rate": bl.Log(1e-5, 1e-1, start=0.09), "share": bl.Unit(0.0, 0.9, start=0.01)}
    search = GradientSearch(space, evaluations=12)
    state = search.init()
    for _ in range(4):
        points, state = search.ask(state, 3)
        assert len({tuple(point.values()) for point in points}) == 3
        for point in points:
            assert 1e-5 <= point["rate"] <= 1e-1
            assert 0.0 <= point["share"] <= 0.9
            # Downhill leads out of the box.
            state = search.tell(
                state, point, point["share"] - math.log(point["rate"]), {"rate": -1 / point["rate"], "share": 1.0}
            )
    assert search.best(state)[0] == pytest.approx({"rate": 0.1, "share": 0.0}, rel=1e-6, abs=1e-9)


def test_a_logarithm_is_searched_by_its_slope():
    search = GradientSearch({"rate": bl.Log(1e-6, 1.0)}, evaluations=8)
    found = minimise(lambda rate: (rate.log() - math.log(3e-4)) ** 2, search)
    assert found.values["rate"] == pytest.approx(3e-4, rel=1e-2)


def test_losses_that_fail_are_left_behind():
    def broken(a, b):
        return torch.where(a > 0.3, math.nan, (a - 0.2) ** 2 + b**2)

    space = {"a": bl.Interval(-1.0, 1.0, start=0.9), "b": bl.Interval(-1.0, 1.0, start=0.5)}
    found = minimise(broken, GradientSearch(space, evaluations=25))
    assert math.isnan(found.losses[0])
    assert found.loss < 1e-2
    with pytest.raises(ValueError, match="none of 3 losses told is finite"):
        minimise(lambda a, b: a * math.nan, GradientSearch(space, evaluations=3))


def test_a_cap_hides_a_wall():
    search = GradientSearch({"a": bl.Unit()}, cap=1.0, slope_cap=2.0)
    state = search.init()
    for place, loss, slope in ((0.5, 0.9, 1.0), (0.9, 1e9, 1e12), (0.6, 1.0, 50.0)):
        state = search.tell(state, {"a": place}, loss, {"a": slope})
    (point,), _ = search.ask(state)
    assert point["a"] < 0.5


def test_what_is_wrong_is_refused():
    with pytest.raises(ValueError, match="space is empty"):
        GradientSearch({})
    with pytest.raises(TypeError, match="'a' is Positive.*two finite ends"):
        GradientSearch({"a": bl.Positive()})
    with pytest.raises(ValueError, match="one number"):
        GradientSearch({"a": bl.Unit(start=torch.full((3,), 0.5))})
    with pytest.raises(ValueError, match="expected 0 < last <= first"):
        GradientSearch({"a": bl.Unit()}, radius=(0.1, 0.3))
    search = GradientSearch({"a": bl.Unit()})
    with pytest.raises(ValueError, match="outside its range"):
        search.tell(search.init(), {"a": 2.0}, 1.0)
    with pytest.raises(ValueError, match=r"the point names \['b'\]; expected \['a'\]"):
        search.tell(search.init(), {"b": 0.5}, 1.0)
    with pytest.raises(ValueError, match="expected finite numbers"):
        search.tell(search.init(), {"a": 0.5}, 1.0, {"a": math.nan})
    with pytest.raises(ValueError, match="count=0"):
        search.ask(search.init(), 0)
    with pytest.raises(TypeError, match="objective takes"):
        minimise(lambda b: b, search)
    with pytest.raises(TypeError, match="a tensor with one number"):
        minimise(lambda a: 1.0, search)

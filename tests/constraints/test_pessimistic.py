"""solve_globally(optimistic=False): closed forms, and the worst answer over a grid of leaders, found by SciPy alone."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize

import bilevel as bl
from bilevel.certificates import solve_globally
from bilevel.errors import InfeasibleError
from games.published.catalogue import problems

KNOWN = problems()
ZERO = torch.zeros((), dtype=torch.float64)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def game(lead, follow, low, high, **functions):
    """A leader in a box, and a follower between 0 and 1 who begins in the middle."""
    middle = 0.5 * (low + high) * torch.ones((), dtype=torch.float64)
    return bl.Game(
        x=bl.Player(lead, middle, domain=bl.Box(low, high), **functions),
        y=bl.Player(follow, ZERO + 0.5, domain=bl.Box(0.0, 1.0)),
    )


def both(played, **options):
    return solve_globally(played, **options), solve_globally(played, optimistic=False, **options)


def test_between_two_corners():
    """The follower takes y = 0 for x > 0 and y = 1 for x < 0, and anything at 0.

    The leader's loss is (x - 1)^2 + 4 (1 - y): at least 4 for x > 0, and above 1 for x < 0, where y = 1. At 0 it is 1
    if the follower is kind, and 5 if not; then 1 is what the leader comes near to from below, and never has.
    """
    kind, sure = both(game(lambda x, y: (x - 1) ** 2 + 4 * (1 - y), lambda x, y: x * y, -1.0, 1.0))
    assert (kind.value, kind.worst) == (pytest.approx(1.0, abs=1e-6), pytest.approx(5.0, abs=1e-6))
    assert sure.proved and not sure.attained and not sure.optimistic
    assert sure.bound == pytest.approx(1.0, abs=1e-5)
    assert sure.bound <= sure.value <= sure.bound + 2.1e-6
    # Beside 0, on the side where the follower has no choice: (x - 1)^2 <= 1 + 2e-6 leaves x >= -1e-6.
    assert -1.1e-6 < float(sure.variables["x"]) < 0.0 and float(sure.variables["y"]) == pytest.approx(1.0)
    assert "turns against the leader" in str(sure)


def test_where_the_two_differ():
    """With x in [0, 1] the follower takes y = 0 for x > 0, and anything at 0.

    The leader's loss is (x - 1)^2 / 4 - y: -3/4 at x = 0 with a kind follower, and 0 at x = 1 with the other.
    """
    kind, sure = both(game(lambda x, y: 0.25 * (x - 1) ** 2 - y, lambda x, y: x * y, 0.0, 1.0))
    assert kind.value == pytest.approx(-0.75, abs=1e-6) and kind.worst == pytest.approx(0.25, abs=1e-6)
    assert sure.proved and sure.attained and sure.value == pytest.approx(0.0, abs=1e-6)
    # The loss is flat there: (x - 1)^2 / 4 <= 1e-6 leaves 2e-3.
    assert float(sure.variables["x"]) == pytest.approx(1.0, abs=2.1e-3)
    assert float(sure.variables["y"]) == pytest.approx(0.0, abs=1e-9)


def test_clark_and_westerbergs_follower_against_the_leader():
    """It makes y1 as large as it can, 4 for x >= 2, and does not care about y2 <= 3 + x / 2.

    The kind one leaves -13. The other takes y2 = 3 + x / 2, and -x - 3 y1 + 2 y2 is -6, whatever x >= 2.
    """
    kind, sure = both(KNOWN["Clark-Westerberg 1990b"].game(0.0))
    assert kind.value == pytest.approx(-13.0) and sure.value == pytest.approx(-6.0, abs=1e-6)
    assert sure.proved and sure.attained and sure.worst == sure.value


@pytest.mark.parametrize(
    ("name", "optimistic", "worst"),
    [
        # y1 + y2 >= x + 4 is bought at prices 2 and x: at x = 2 they are the same, beyond it y2 = 0.
        ("Bard 1991", 2.0, 8.0),
        # y = 1 for x < 0, y = -1 for x > 0, and the leader has -x - y.
        ("Morgan-Patrone 2006a", -1.0, 1.0),
    ],
)
def test_published_infima_that_no_point_has(name, optimistic, worst):
    kind, sure = both(KNOWN[name].game(0.0))
    assert (kind.value, kind.worst) == (pytest.approx(optimistic), pytest.approx(worst))
    assert sure.proved and not sure.attained and sure.bound == pytest.approx(optimistic, abs=1e-6)
    assert 0.0 < sure.gap <= 1e-6 * (1.0 + abs(optimistic)) + 1e-9  # the default tolerance


def test_a_follower_with_one_answer_gives_both():
    kind, sure = both(KNOWN["Falk-Liu 1995"].game(0.0))
    assert sure.value == pytest.approx(kind.value) and sure.proved and sure.attained and not sure.optimistic
    assert "no optimum there that the leader likes less" in sure.reason


def drawn(seed, quadratic):
    """A follower of three variables in the unit cube, whose loss sees one direction, or two, and x."""
    rng = np.random.default_rng(seed)
    root = rng.integers(-1, 2, size=(1, 3)).astype(float)
    return {
        "Q": root.T @ root if quadratic else np.zeros((3, 3)),
        "c": np.zeros(3) if quadratic else rng.integers(-1, 2, size=3).astype(float),
        # Integer slopes and one x: ties along whole edges.
        "D": root.T @ rng.integers(-2, 3, size=(1, 1)) if quadratic else rng.integers(-1, 2, size=(3, 1)).astype(float),
        "A": rng.integers(0, 2, size=(1, 3)).astype(float), "B": rng.integers(-1, 2, size=(1, 1)).astype(float),
        "b": np.array([1.5]), "f": rng.normal(size=1), "g": rng.normal(size=3),
    }  # fmt: skip


def game_of(data, square=0.0):
    Q, c, D, A, B, b, f, g = (tensor(data[name].tolist()) for name in "QcDABbfg")
    return bl.Game(
        x=bl.Player(
            lambda x, y: f @ x + g @ y + square * (y - 0.5).square().sum(),
            tensor([0.5]),
            domain=bl.Box(-1.0, 1.0),
        ),
        y=bl.Player(
            lambda x, y: 0.5 * y @ Q @ y + (c + D @ x) @ y,
            torch.zeros(3, dtype=torch.float64),
            domain=bl.Box(0.0, 1.0),
            inequality=lambda x, y: A @ y + B @ x - b,
        ),
    )


def worst_at(data, x, square=0.0):
    """The leader's loss where its follower is at its worst: the optimum by SciPy, then the highest loss among optima.

    Optima of a convex quadratic share Q y and the slope's product with y. A convex loss is highest at a corner, which
    is sought along many directions.
    """
    slope, right = data["c"] + data["D"] @ x, data["b"] - data["B"] @ x
    bounds = [(0.0, 1.0)] * 3
    if data["Q"].any():
        first = minimize(
            lambda y: 0.5 * y @ data["Q"] @ y + slope @ y,
            np.full(3, 0.1),
            jac=lambda y: data["Q"] @ y + slope,
            bounds=bounds,
            constraints={"type": "ineq", "fun": lambda y: right - data["A"] @ y},
            method="SLSQP",
            options={"ftol": 1e-15},
        )
        y = first.x
    else:
        y = linprog(slope, data["A"], right, bounds=bounds).x
    E = np.vstack([data["Q"], (data["Q"] @ y + slope)[None]])
    # An equality is kept to 1e-7 by HiGHS, and SLSQP's answer is as exact: two sides of it.
    rows = np.vstack([data["A"], E, -E])
    sides = np.concatenate([right, E @ y + 1e-7, -(E @ y) + 1e-7])
    rng, highest = np.random.default_rng(0), -np.inf
    directions = [data["g"]] if not square else [data["g"], *np.eye(3), *-np.eye(3), *rng.normal(size=(20, 3))]
    for direction in directions:
        end = linprog(-direction, rows, sides, bounds=bounds).x
        highest = max(highest, float(data["g"] @ end + square * ((end - 0.5) ** 2).sum()))
    return float(data["f"] @ x) + highest


@pytest.mark.parametrize(("quadratic", "square"), [(False, 0.0), (True, 0.0), (False, 0.5)])
@pytest.mark.parametrize("seed", range(4))
def test_nothing_surer_is_on_a_grid_and_the_answer_is_what_scipy_finds_there(seed, quadratic, square):
    data = drawn(seed, quadratic)
    sure = solve_globally(game_of(data, square), optimistic=False)
    assert sure.proved and sure.value <= sure.bound + 1e-5
    grid = np.linspace(-1.0, 1.0, 21 if square else 41)
    values = [worst_at(data, np.array([x]), square) for x in grid]
    # Optima within 2e-7 of the lowest loss: edges of integer slopes move by no more than 1e-5 of their length.
    assert min(values) >= sure.bound - 1e-4
    if sure.attained:
        assert worst_at(data, sure.variables["x"].numpy(), square) == pytest.approx(sure.value, abs=1e-4)
    else:
        # Inside the piece, a little farther than the answer, the value is near too.
        x = sure.variables["x"].numpy()
        near = [worst_at(data, x + s, square) for s in (-1e-4, 1e-4) if -1.0 <= float((x + s)[0]) <= 1.0]
        assert min(near) == pytest.approx(sure.value, abs=1e-2)


def test_the_worst_of_a_convex_loss_is_at_a_corner():
    """Follower indifferent in the unit interval, leader (y - x)^2: the worst end is 1 - x or x away, least at 1/2."""
    kind, sure = both(game(lambda x, y: (y - x) ** 2, lambda x, y: 0.0 * (x + y), 0.0, 1.0))
    assert kind.value == pytest.approx(0.0, abs=1e-6) and 0.25 <= kind.worst <= 1.0
    # Tangents come within the tolerance, 1e-6 times 1.25; the loss has slope 1 at the kink 1/2.
    assert sure.proved and sure.value == pytest.approx(0.25, abs=2e-6)
    assert float(sure.variables["x"]) == pytest.approx(0.5, abs=2e-6)


def test_what_is_short_of_a_proof_says_so():
    played = game(lambda x, y: (y - x) ** 2, lambda x, y: 0.0 * (x + y), 0.0, 1.0)
    found = solve_globally(played, optimistic=False, tolerance=1e-6, max_nodes=2)
    assert not found.proved and "max_nodes=2" in found.reason and found.bound < 0.25 <= found.value


def test_a_follower_that_can_cost_anything_is_told():
    played = bl.Game(
        x=bl.Player(lambda x, y: x + y, ZERO, domain=bl.Box(0.0, 1.0)),
        y=bl.Player(lambda x, y: 0.0 * x * y, ZERO, inequality=lambda x, y: x - y),
    )
    with pytest.raises(InfeasibleError, match="as high as one likes"):
        solve_globally(played, optimistic=False)


def test_functions_of_the_leader_that_see_the_follower_are_refused():
    played = game(lambda x, y: -y, lambda x, y: 0.0 * (x + y), 0.0, 1.0, inequality=lambda x, y: y - 0.5 - x)
    with pytest.raises(ValueError, match=r"inequality.* of 'x' sees 'y', which has several optima"):
        solve_globally(played, optimistic=False)

"""Many starts: where they are drawn, which end is kept, and what is told of the others."""

import warnings
from functools import partial

import pytest
import torch
from torch.optim import SGD

import bilevel as bl
from bilevel.solving.drawn import starts_of
from bilevel.tree import flatten

D = torch.float64
RESPONSE = bl.Implicit(bl.ClosedForm(lambda x: x), linear_solver=bl.linear.Dense())


def number(value):
    return torch.tensor(value, dtype=D)


BOX = bl.Box(-2.0, 2.0)


def wells(domain=BOX, init=None, **options):
    """Two wells of the leader: -1 at x = 1, and -1.2 or so near x = -1; from 1/2 on one falls into the wrong one."""
    return bl.Game(
        x=bl.Player(
            lambda y: ((y**2 - 1) ** 2 + 0.1 * y - 1.0).sum(),
            number(0.5) if init is None else init,
            domain=domain,
            **options,
        ),
        y=bl.Player(lambda x, y: (y - x).square().sum(), number(0.0)),
    )


@pytest.mark.filterwarnings("ignore:SciPy's .* had not finished")
@pytest.mark.parametrize("optimizer", [partial(SGD, lr=0.05), bl.Scipy("L-BFGS-B"), bl.Scipy("SLSQP")], ids=repr)
def test_the_best_end_is_kept_and_the_others_are_told(optimizer):
    alone = bl.solve(wells(), y=RESPONSE, optimizer=optimizer, steps=60)
    found = bl.solve(wells(), y=RESPONSE, optimizer=optimizer, steps=60, starts=8)
    assert alone.variables["x"] > 0.0 > found.variables["x"] and found.values["x"] < alone.values["x"]
    spread = found.starts
    assert len(spread.values) == 8 and spread.values[spread.best] == found.values["x"] == min(spread.values)
    # The first start is the game's own, and the wells are .2 apart.
    assert (
        abs(spread.values[0] - alone.values["x"]) < 1e-6 and abs(max(spread.values) - min(spread.values) - 0.2) < 1e-2
    )
    assert spread.together == (not isinstance(optimizer, bl.Scipy))
    assert f"Best of 8 starts: number {spread.best}. The loss of 'x' ends between" in str(found)
    again = bl.solve(wells(), y=RESPONSE, optimizer=optimizer, steps=60, starts=8)
    assert again.starts.values == spread.values
    other = bl.solve(wells(), y=RESPONSE, optimizer=optimizer, steps=1, starts=8, seed=1)
    assert (
        other.starts.values[1:]
        != bl.solve(wells(), y=RESPONSE, optimizer=optimizer, steps=1, starts=8).starts.values[1:]
    )


def test_an_end_that_breaks_the_leaders_functions_is_no_best_one():
    """In the deeper well y <= -.5 is forbidden."""
    played = wells(inequality=lambda y: -0.5 - y)
    found = bl.solve(
        played, y=RESPONSE, optimizer=bl.Scipy("SLSQP"), steps=60, starts=[{"x": number(v)} for v in (-2.0, 0.5)]
    )
    assert found.variables["x"] > 0.0 and found.starts.best == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        few = bl.solve(
            played, y=RESPONSE, optimizer=partial(SGD, lr=1e-3), steps=1, starts=[{"x": number(v)} for v in (-1.0, 2.0)]
        )
    # After one step the first still breaks it, although its loss is far lower.
    assert few.starts.best == 1 and few.starts.values[0] < few.starts.values[1] and few.starts.violations[0] > 0.4
    assert "1 broke its functions" in str(few)


def test_a_start_that_fails_is_told_and_all_of_them_raise():
    def root(x):
        return torch.where(x > 0.0, x, torch.nan)

    response = bl.Implicit(bl.ClosedForm(root), linear_solver=bl.linear.Dense())
    starts = [{"x": number(-1.0)}, {"x": number(0.5)}]
    found = bl.solve(wells(), y=response, optimizer=partial(SGD, lr=0.05), steps=5, starts=starts)
    assert found.starts.best == 1 and "NonFiniteError" in found.starts.failures[0] and not found.starts.together
    assert "1 failed, the first with: NonFiniteError" in str(found)
    with pytest.raises(bl.BilevelError, match="all of 1 starts failed, the first with: NonFiniteError"):
        bl.solve(wells(), y=response, steps=5, starts=starts[:1])


def test_only_the_best_ones_warnings_are_issued():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = bl.solve(wells(), y=RESPONSE, optimizer=bl.Scipy("SLSQP"), steps=2, starts=4)
    ours = [str(w.message) for w in told if issubclass(w.category, bl.BilevelWarning)]
    assert len(ours) == 1 and ours[0] in found.warnings


def slow_on_the_left(x, y):
    """Its optimum is 2 + x / 100; where x < 0 its curvature is a thousandth, so that from 0 it does not get there."""
    return (torch.where(x > 0.0, 1.0, 1e-3) * (y - 2.0 - 0.01 * x).square()).sum() / 2.0


@pytest.mark.parametrize(
    ("optimizer", "order"),
    [(partial(SGD, lr=0.0), (0, 1)), (partial(SGD, lr=0.0), (1, 0)), (bl.Scipy("L-BFGS-B"), (0, 1))],
    ids=str,
)
def test_an_end_whose_follower_stopped_short_is_passed_over(optimizer, order):
    """At the follower's optimum the leader has 4 + x; at the one that stopped short, near 0, far less: no answer."""
    game = bl.Game(
        x=bl.Player(lambda x, y: (y**2 + 0.01 * x).sum(), number(1.0), domain=BOX),
        y=bl.Player(slow_on_the_left, number(0.0)),
    )
    starts = [[{"x": number(1.5)}, {"x": number(-1.5)}][place] for place in order]
    response = bl.Implicit(partial(SGD, lr=1.0), steps=5)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = bl.solve(game, y=response, optimizer=optimizer, steps=2, starts=starts)
    spread = found.starts
    right, short = order.index(0), order.index(1)
    assert spread.best == right and found.variables["x"] > 0.0 and found.values["x"] > 3.9
    assert spread.values[short] < 0.1 and "follower" in spread.not_converged[short]
    assert "follower" not in spread.not_converged[right] and "follower" not in found.not_converged
    text = str(spread)
    assert "the follower of 1" in text
    assert "1 ended lower, the lowest at -0.0" in text and text.endswith("and is passed over.")
    # What is said of the other one's follower is not issued.
    assert not [w for w in told if issubclass(w.category, bl.errors.FollowerNonConvergenceWarning)]
    with pytest.warns(bl.errors.FollowerNonConvergenceWarning):
        alone = bl.solve(game.starting(**starts[short]), y=response, optimizer=partial(SGD, lr=0.0), steps=2)
    assert alone.not_converged == ("follower",)


def test_the_lowest_value_counts_where_no_follower_has_converged():
    game = bl.Game(
        x=bl.Player(lambda x, y: (y**2 + x).sum(), number(1.0)),
        y=bl.Player(lambda x, y: (y - 2.0).square().sum() + 0.0 * x, number(0.0)),
    )
    starts = [{"x": number(v)} for v in (1.0, -3.0, 2.0)]
    with pytest.warns(bl.errors.FollowerNonConvergenceWarning):
        found = bl.solve(
            game, y=bl.Implicit(partial(SGD, lr=1e-3), steps=2), optimizer=partial(SGD, lr=0.0), steps=2, starts=starts
        )
    assert found.starts.best == 1 and "Not converged: the follower of 3." in str(found)
    assert "ended lower" not in str(found) and found.not_converged == ("follower",)


def test_many_games_say_which_of_them_have_not_converged_at_the_end():
    """One that was short in the first steps alone is told of, and has converged."""
    rates = torch.tensor([1.0, 1e-3, 0.5], dtype=D)
    one = bl.Game(
        x=bl.Player(lambda x, y: (y**2).sum() + 0.0 * x.sum(), torch.zeros(1, dtype=D)),
        y=bl.Player(
            lambda x, y, batch: (batch * (y - 2.0 - 0.1 * x).square()).sum() / 2.0,
            torch.zeros(1, dtype=D),
            data=[rates[:1]],
        ),
    )
    games = bl.Games(one, 3, data={"y": [rates[:, None]]})
    # Curvatures of 1 and 1/2 leave 0 and a fourth a call of two steps, from call to call: 4^-6 after six.
    with pytest.warns(bl.errors.FollowerNonConvergenceWarning):
        found = bl.solve(games, y=bl.Implicit(partial(SGD, lr=1.0), steps=2), optimizer=partial(SGD, lr=0.0), steps=6)
    assert found.not_converged["follower"].tolist() == [False, True, False]
    assert [one.not_converged for one in found] == [(), ("follower",), ()]
    assert found.warned[0] == {1, 2}


def test_a_run_of_many_starts_resumes(tmp_path):
    options = {"y": RESPONSE, "optimizer": bl.Scipy("SLSQP"), "starts": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bl.solve(wells(), steps=2, checkpoint=tmp_path / "run.pt", **options)
        again = bl.solve(wells(), steps=40, checkpoint=tmp_path / "run.pt", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"run.0.pt", "run.1.pt", "run.2.pt"}
    assert again.starts.values == bl.solve(wells(), steps=40, **options).starts.values


SETS = [
    (bl.Box(-1.0, 3.0), torch.zeros(4000, dtype=D), 1.0),
    (bl.Simplex(2.0), torch.full((1000, 4), 0.5, dtype=D), 0.5),
    (bl.constraints.Ball(2.0), torch.zeros(3000, 1, dtype=D), 0.0),
    (bl.constraints.Ball(2.0, p=1), torch.zeros(3000, 1, dtype=D), 0.0),
    (
        bl.constraints.Product({"a": bl.Box(0.0, 1.0), "b": bl.Simplex()}),
        {"a": torch.zeros(3000, dtype=D), "b": torch.full((1500, 2), 0.5, dtype=D)},
        0.5,
    ),
]


@pytest.mark.parametrize(("domain", "init", "mean"), SETS, ids=lambda value: type(value).__name__)
def test_starts_are_drawn_uniformly_in_the_set(domain, init, mean):
    game = bl.Game(x=bl.Player(lambda x: flatten(x).square().sum(), init, domain=domain))
    first, second = starts_of(game, ["x"], 2, 0)
    drawn = flatten(second["x"])
    assert domain.contains(second["x"])
    # Some thousand numbers with a deviation of at most 1.2: five standard errors.
    assert abs(drawn.mean() - mean) < 5 * 1.2 / len(drawn) ** 0.5 and drawn.std() > 1e-4
    assert torch.equal(flatten(first["x"]), flatten(init))


def test_a_ball_of_two_dimensions_is_filled_evenly_and_ranges_in_their_own_scale():
    balls = [
        starts_of(
            bl.Game(
                x=bl.Player(lambda x: x.square().sum(), torch.zeros(2, dtype=D), domain=bl.constraints.Ball(1.0, p=p))
            ),
            ["x"],
            2000,
            0,
        )
        for p in (2, 1)
    ]
    for found, norm in zip(balls, (2, 1), strict=True):
        radii = torch.stack([torch.linalg.vector_norm(start["x"], norm) for start in found[1:]])
        # Uniform in the area: a quarter lies within half the radius; 2000 points, five deviations.
        assert abs(float((radii < 0.5).double().mean()) - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5
    game = bl.Game(x=bl.Player(lambda x: x.sum(), bl.Log(1e-4, 1.0, start=torch.full((2000,), 0.1, dtype=D))))
    (_, drawn) = starts_of(game, ["x"], 2, 0)
    assert abs(float((drawn["x"] < 1e-2).double().mean()) - 0.5) < 5 * 0.5 / 2000**0.5


@pytest.mark.parametrize(
    ("game", "options", "error", "text"),
    [
        (lambda: wells(), {"starts": 0}, ValueError, "starts=0; expected at least 1"),
        (lambda: wells(), {"starts": "many"}, TypeError, "expected a number, or a list of starts"),
        (lambda: wells(), {"starts": [{"z": number(0.0)}]}, ValueError, r"names \['z'\]; the leaders are \['x'\]"),
        (lambda: wells(), {"starts": [{"x": number(5.0)}]}, ValueError, "outside its domain"),
        (lambda: wells(), {"starts": [{"x": torch.zeros(2, dtype=D)}]}, ValueError, "expected the form of its init"),
        (lambda: wells(), {"starts": [{"x": number(float("nan"))}]}, ValueError, "holds NaN"),
        (lambda: wells(None), {"starts": 3}, ValueError, "'x' has no domain"),
        (lambda: wells(bl.constraints.NonNegative()), {"starts": 3}, ValueError, "with finite ends"),
        (lambda: wells(None, bl.Positive(0.5)), {"starts": 3}, ValueError, "Positive"),
        (lambda: bl.Games(wells(), 2), {"starts": 3}, TypeError, "looks at one game"),
    ],
)
def test_starts_that_cannot_be_meant_are_refused(game, options, error, text):
    with pytest.raises(error, match=text):
        bl.solve(game(), y=RESPONSE, steps=1, **options)


def test_starts_are_of_one_leader():
    with pytest.raises(ValueError, match=r"one leader, and \['x', 'y'\] lead"):
        bl.solve(wells(), starts=3)

"""Leaders whose functions see the follower: by the augmented Lagrangian, and by SciPy around the hypergradient.

The follower answers y = x + 1/2, or is a programme itself, so that the leader's programme is known in closed form.
"""

import math
import warnings
from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam

import bilevel as bl
from bilevel.constraints import AugmentedLagrangian
from bilevel.errors import InfeasibleWarning, LeaderNonConvergenceWarning

D = torch.float64
RESPONSE = bl.Implicit(bl.ClosedForm(lambda x: x + 0.5), linear_solver=bl.linear.Dense())
SLSQP = bl.Scipy("SLSQP")


def tensor(*values):
    return torch.tensor(values, dtype=D)


def game(domain=None, start=(0.0, 0.0), **functions):
    """min |y - (2, 1)|^2 / 2 with y = x + 1/2: free, the leader ends at x = (1.5, .5)."""
    return bl.Game(
        x=bl.Player(lambda y: 0.5 * (y - tensor(2.0, 1.0)).square().sum(), tensor(*start), domain=domain, **functions),
        y=bl.Player(lambda x, y: (y - x - 0.5).square().sum(), tensor(0.0, 0.0)),
    )


# y1 + y2 <= 2: the projection of (2, 1) is (1.5, .5), with a multiplier of 1/2. How near each way ends:
# * Multipliers of the augmented Lagrangian, with a penalty of 1 and a slope of squared norm 2, are off by a third of
#   what they were at each update: after 15 of them 1/2 has become 4e-8, after 10 of them 8e-6. Between two updates
#   SGD's steps shrink what is along the constraint by .8^10, and with momentum by less than .75^20.
# * The loss has the Hessian that SLSQP begins with, so that its first quadratic programme is the leader's own, solved
#   to the square root of rounding.
# * The barrier of trust-constr ends at 1e-8, and leaves a slack of that over the multiplier, 2e-8.
WAYS = {
    "SGD": (AugmentedLagrangian(partial(SGD, lr=0.2)), 150, 1e-6),
    "momentum": (AugmentedLagrangian(partial(SGD, lr=0.1, momentum=0.5), every=20), 200, 1e-4),
    "SLSQP": (SLSQP, 50, 1e-8),
    "trust-constr": (bl.Scipy("trust-constr"), 200, 1e-5),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_follower_is_kept_within_the_leaders_functions(way):
    optimizer, steps, atol = WAYS[way]
    found = bl.solve(game(inequality=lambda y: y.sum() - 2.0), y=RESPONSE, optimizer=optimizer, steps=steps)
    torch.testing.assert_close(found.variables["y"], tensor(1.5, 0.5), rtol=0.0, atol=atol)
    torch.testing.assert_close(found.multipliers["x"]["inequality"], tensor(0.5)[0], rtol=0.0, atol=10 * atol)
    assert found.violations["x"] <= atol and found.history[0]["x.violation"] == 0.0
    # From the start, y = (1/2, 1/2), the leader overshoots by nothing; the gradient is that of the Lagrangian.
    assert found.history[-1]["gradient_norm"] < 10 * atol and "Largest violation of x's" in str(found)
    assert "Multipliers of x's inequality (1 of 1 bind): 0.5" in str(found)


@pytest.mark.parametrize("way", WAYS)
def test_equalities_trees_and_functions_of_both(way):
    """x1 = 2 y2 = 2 x2 + 1 leaves y = (2 y2 + 1/2, y2); the nearest to (2, 1) has y2 = .8, with slope .1 / .5."""
    optimizer, steps, atol = WAYS[way]
    functions = {
        "equality": lambda x, y: {"ratio": (x[0] - 2.0 * y[1]).reshape(1)},
        "inequality": lambda x, y: [x - 10.0, -y],
    }
    found = bl.solve(game(start=(0.5, 0.5), **functions), y=RESPONSE, optimizer=optimizer, steps=2 * steps)
    # min (2 t + 1/2 - 2)^2 / 2 + (t - 1)^2 / 2: 2 (2 t - 1.5) + t - 1 = 0, t = .8; y = (2.1, .8).
    torch.testing.assert_close(found.variables["y"], tensor(2.1, 0.8), rtol=0.0, atol=10 * atol)
    # 2.1 - 2 + m = 0.
    torch.testing.assert_close(found.multipliers["x"]["equality"]["ratio"], tensor(-0.1), rtol=0.0, atol=1e2 * atol)
    assert [leaf.shape for leaf in found.multipliers["x"]["inequality"]] == [(2,), (2,)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("domain", "start"),
    [(bl.Box(0.0, 1.0), (0.5, 0.5)), (bl.Simplex(), (0.5, 0.5)), (bl.constraints.Ball(1.0), (0.5, 0.5))],
)
@pytest.mark.parametrize("way", ["SGD", "SLSQP"])
def test_a_leaders_set_and_its_functions_together(way, domain, start):
    """Within the set, and y1 <= 1.2, that is x1 <= .7: the point of {x in set, x1 <= .7} nearest to (1.5, .5)."""
    optimizer, steps, _ = WAYS[way]
    wanted = {"Box": (0.7, 0.5), "Simplex": (0.7, 0.3), "Ball": (0.7, 0.5)}[type(domain).__name__]
    found = bl.solve(
        game(domain, start, inequality=lambda y: y[0] - 1.2), y=RESPONSE, optimizer=optimizer, steps=2 * steps
    )
    torch.testing.assert_close(found.variables["x"], tensor(*wanted), rtol=0.0, atol=1e-6)
    assert domain.distance(found.variables["x"]) < 1e-9


@pytest.mark.parametrize("method", ["L-BFGS-B", "TNC", "BFGS", "CG", "SLSQP"])
def test_scipy_moves_a_leader_around_the_hypergradient(method):
    bounded = method in ("L-BFGS-B", "TNC", "SLSQP")
    found = bl.solve(game(bl.Box(0.0, 1.0) if bounded else None), y=RESPONSE, optimizer=bl.Scipy(method), steps=60)
    wanted = tensor(1.0, 0.5) if bounded else tensor(1.5, 0.5)
    torch.testing.assert_close(found.variables["x"], wanted, rtol=0.0, atol=1e-6)
    assert not found.warnings and len(found.history) <= 60 and found.violations.get("x", 0.0) == 0.0


def test_a_capacity_that_only_the_follower_fills_and_a_constrained_follower():
    """The follower makes y = min(x, 1.5) within its own capacity; the leader must keep y1 + y2 <= 2."""
    played = bl.Game(
        x=bl.Player(
            lambda y: -2.0 * y[0] - y[1] + 0.1 * y.square().sum(), tensor(0.3, 0.3), inequality=lambda y: y.sum() - 2.0
        ),
        y=bl.Player(lambda x, y: (y - x).square().sum(), tensor(0.0, 0.0), inequality=lambda y: y - 1.5),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.errors.KinkWarning)  # the optimum is where y1 has just filled its capacity
        found = bl.solve(played, y=bl.Implicit(SLSQP), optimizer=SLSQP)
    # On y1 + y2 = 2 the loss falls until y1 = 1.5, its capacity; x1 may be anything above.
    torch.testing.assert_close(found.variables["y"], tensor(1.5, 0.5), rtol=0.0, atol=1e-5)


@pytest.mark.slow
def test_two_leaders_with_functions_of_their_own():
    """Each sells up to what is left of 2 together, of which the first may take .5: x = .5, z = 1.5."""
    played = bl.Game(
        x=bl.Player(lambda x, z: -3.0 * x + x**2 + 0 * z, tensor(0.1)[0], inequality=lambda x: x - 0.5),
        z=bl.Player(lambda x, z: -9.0 * z + z**2, tensor(0.1)[0], inequality=lambda x, z: x + z - 2.0),
    )
    found = bl.solve(played, optimizer=partial(SGD, lr=0.1), steps=600)
    assert abs(found.variables["x"].item() - 0.5) < 1e-6 and abs(found.variables["z"].item() - 1.5) < 1e-6
    # Slopes there: 3 - 2 * .5 and 9 - 2 * 1.5.
    assert abs(float(found.multipliers["x"]["inequality"]) - 2.0) < 1e-5
    assert abs(float(found.multipliers["z"]["inequality"]) - 6.0) < 1e-5


def test_many_games_have_multipliers_each():
    one = game(inequality=lambda y: y.sum() - 2.0)
    starts = tensor(0.0, 0.0, 1.0, 1.0, -1.0, 2.0).reshape(3, 2)
    many = bl.solve(bl.Games(one, 3, init={"x": starts}), y=RESPONSE, optimizer=partial(SGD, lr=0.3), steps=120)
    torch.testing.assert_close(many.variables["y"], tensor(1.5, 0.5).expand(3, 2), rtol=0.0, atol=1e-5)
    torch.testing.assert_close(many.multipliers["x"]["inequality"], torch.full((3,), 0.5, dtype=D), rtol=0.0, atol=1e-4)
    assert many.violations["x"].shape == (3,) and "x.violation.worst" in many.history[0]
    assert many[1].violations["x"] < 1e-5


@pytest.mark.parametrize("way", ["SGD", "SLSQP", "L-BFGS-B"])
def test_a_run_resumes_bit_for_bit_and_knows_its_settings(way, tmp_path):
    optimizer = WAYS[way][0] if way in WAYS else bl.Scipy(way)
    functions = {} if way == "L-BFGS-B" else {"inequality": lambda y: 0.5 * (y**2).sum() - 1.0}

    def run(steps, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bl.solve(
                game(**functions), y=RESPONSE, optimizer=options.pop("optimizer", optimizer), steps=steps, **options
            )

    path = tmp_path / "run.pt"
    whole = run(40)
    run(3, checkpoint=path)
    again = run(40, checkpoint=path)
    assert torch.equal(whole.variables["x"], again.variables["x"])
    assert [{k: v for k, v in r.items() if k != "seconds"} for r in whole.history] == [
        {k: v for k, v in r.items() if k != "seconds"} for r in again.history
    ]
    for kind, tree in whole.multipliers.get("x", {}).items():
        assert torch.equal(tree, again.multipliers["x"][kind])
    other = bl.Scipy(way if way != "SGD" else "SLSQP", options={"ftol": 1e-3})
    with pytest.raises(bl.errors.CheckpointError, match="optimizer"):
        run(50, checkpoint=path, optimizer=other)


def test_a_changed_penalty_is_told_as_a_change(tmp_path):
    path = tmp_path / "run.pt"
    one = partial(SGD, lr=0.3)
    played = game(inequality=lambda y: y.sum() - 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bl.solve(played, y=RESPONSE, optimizer=AugmentedLagrangian(one), steps=3, checkpoint=path)
        with pytest.raises(bl.errors.CheckpointError, match=r"lagrangian\.x\.penalty"):
            bl.solve(played, y=RESPONSE, optimizer=AugmentedLagrangian(one, penalty=2.0), steps=5, checkpoint=path)


def test_a_broken_function_is_told_with_its_size_in_the_solution_and_by_a_warning():
    played = game(inequality=lambda y: {"sum": y.sum() - 2.0, "roof": y - 9.0})
    with pytest.warns(
        InfeasibleWarning, match=r"functions of 'x' are broken: inequality\['sum'\] is 0\.\d+, wanted <= 0"
    ):
        found = bl.solve(played, y=RESPONSE, optimizer=partial(SGD, lr=0.9), steps=3)
    assert found.violations["x"] == pytest.approx(float(found.variables["y"].sum()) - 2.0)
    assert "broken" in str(found)


def test_what_cannot_be_kept_is_told():
    played = game(inequality=lambda y: torch.stack([y[0] - 1.0, 2.0 - y[0]]))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = bl.solve(played, y=RESPONSE, optimizer=SLSQP)
    assert {InfeasibleWarning, LeaderNonConvergenceWarning} <= {w.category for w in told}
    assert found.violations["x"] >= 0.5


def test_too_few_evaluations_are_told():
    with pytest.warns(LeaderNonConvergenceWarning, match="had not finished after 2 evaluations"):
        found = bl.solve(game(inequality=lambda y: (y**4).sum() - 3.0), y=RESPONSE, optimizer=SLSQP, steps=2)
    assert len(found.history) == 2


def test_a_follower_too_loose_for_scipys_line_search_is_named_and_the_tolerance_that_is_told_is_enough():
    """A contract of three wages; the agent's effort is known to the response's default of 1e-3 at first."""
    low, high, output = tensor(0.6, 0.3, 0.1), tensor(0.1, 0.3, 0.6), tensor(0.0, 2.0, 5.0)

    def shares(effort):
        return low + (high - low) * (1.0 - torch.exp(-effort))

    def agent(wages, effort):
        return 0.5 * effort**2 - (shares(effort) * wages.sqrt()).sum()

    contract = bl.Game(
        wages=bl.Player(
            lambda wages, effort: -(shares(effort) * (output - wages)).sum(),
            tensor(0.8, 0.9, 1.0),
            domain=bl.Box(0.2, 9.0),
            inequality=lambda wages, effort: agent(wages, effort) + 0.75,
        ),
        effort=bl.Player(agent, tensor(0.3)[0]),
    )
    inner = bl.Scipy("BFGS")
    with pytest.warns(LeaderNonConvergenceWarning, match="answer of 'effort' is known to .* tolerance=9e-08"):
        bl.solve(contract, effort=bl.Implicit(inner), optimizer=SLSQP, steps=30)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = bl.solve(contract, effort=bl.Implicit(inner, tolerance=9e-8), optimizer=SLSQP, steps=60)
    # By SciPy alone, the effort solved for by Brent's method; 1e-3 is what its flat optimum leaves of the wages.
    torch.testing.assert_close(found.variables["wages"], tensor(0.22675, 0.65196, 2.03789), rtol=0.0, atol=1e-3)


def test_points_where_the_follower_has_no_answer_are_turned_back_from():
    """The follower needs x <= 1; the leader would like more. SLSQP's first full step goes to 3."""
    played = bl.Game(
        x=bl.Player(lambda x, y: 0.5 * (x - 3.0) ** 2 + 0 * y.sum(), tensor(0.0)[0], domain=bl.Box(-5.0, 5.0)),
        y=bl.Player(
            lambda y: y.square().sum(), tensor(0.5, 0.5), inequality=lambda x, y: torch.stack([x - y[0], y[0] - 1.0])
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = bl.solve(played, y=bl.Implicit(SLSQP), optimizer=SLSQP, steps=4)
    assert found.variables["x"].item() <= 1.0 + 1e-6 and found.values["x"] < found.history[0]["x"]
    assert any("got no answer, and turned back" in text for text in found.warnings)


ADAM = AugmentedLagrangian(partial(Adam, lr=0.02), penalty=10.0)


@pytest.mark.parametrize(("optimizer", "steps"), [pytest.param(ADAM, 1000, marks=pytest.mark.slow), (SLSQP, 60)])
def test_a_leader_in_a_range_has_functions_too(optimizer, steps):
    """Ridge regression of one weight, y = 1 / (1 + x): y >= .9 holds x below 1/9, where the loss would like x = 1/4."""
    played = bl.Game(
        x=bl.Player(lambda y: (y - 0.8) ** 2, bl.Log(1e-3, 1e1, start=1.0), inequality=lambda y: 0.9 - y),
        y=bl.Player(lambda x, y: (y - 1.0) ** 2 + x * y**2, tensor(0.0)[0]),
    )
    response = bl.Implicit(bl.ClosedForm(lambda x: 1.0 / (1.0 + x)))
    found = bl.solve(played, y=response, optimizer=optimizer, steps=steps)
    assert abs(found.variables["x"].item() - 1.0 / 9.0) < 1e-3
    # The slope of (y - .8)^2 at .9; Adam keeps moving by its rate.
    assert abs(float(found.multipliers["x"]["inequality"]) - 0.2) < 1e-2


def solved(functions=None, response=RESPONSE, **options):
    return bl.solve(game(**(functions or {"inequality": lambda y: y.sum() - 2.0})), y=response, **options)


REFUSED = {
    "of nobody": (lambda: game(inequality=lambda y: torch.ones(2, dtype=D)), ValueError, "depends on nobody's"),
    "NaN": (lambda: game(inequality=lambda y: (y - 5.0).log()), ValueError, "at init holds NaN"),
    "shape": (lambda: game(inequality=lambda y: y @ torch.ones(3, dtype=D)), ValueError, "raised RuntimeError"),
    "a rule": (lambda: solved(dynamics=bl.dynamics.Extragradient(0.1)), TypeError, "does not know"),
    "no functions": (
        lambda: bl.solve(game(), y=RESPONSE, optimizer=AugmentedLagrangian()),
        ValueError,
        "has no inequality= or equality=",
    ),
    "unseen": (lambda: solved(optimizer=bl.Scipy("L-BFGS-B")), TypeError, "does not see the inequality="),
    "bounds": (lambda: solved(optimizer=bl.Scipy("SLSQP", bounds=(0, 1))), ValueError, "Leave bounds= out"),
    "no gradients": (
        lambda: bl.solve(game(), y=RESPONSE, optimizer=bl.Scipy("Nelder-Mead")),
        ValueError,
        "a method that uses gradients",
    ),
    "clip": (lambda: solved(optimizer=SLSQP, clip_norm=1.0), TypeError, "neither scheduler= nor clip_norm="),
    "rule and SciPy": (
        lambda: solved(optimizer=SLSQP, dynamics=bl.dynamics.Optimistic()),
        TypeError,
        "Leave one of them out",
    ),
    "a simplex": (
        lambda: bl.solve(game(bl.Simplex(), (0.5, 0.5)), y=RESPONSE, optimizer=bl.Scipy("L-BFGS-B")),
        TypeError,
        'Use Scipy."SLSQP"',
    ),
    "many": (
        lambda: bl.solve(bl.Games(game(), 2), y=RESPONSE, optimizer=SLSQP),
        TypeError,
        "looks at one game, not at 2",
    ),
    "two leaders": (lambda: bl.solve(game(), optimizer=SLSQP), TypeError, r"\['x', 'y'\] lead"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_what_cannot_be_meant_is_refused_before_any_work(fault):
    make, error, text = REFUSED[fault]
    with pytest.raises(error, match=text):
        make()


def test_a_function_that_no_response_can_move_is_refused():
    played = bl.Game(
        x=bl.Player(lambda x, y: (y - 1) ** 2 + x**2, tensor(0.0)[0], inequality=lambda z: z - 1.0),
        y=bl.Player(lambda x, y: (y - x) ** 2, tensor(0.0)[0]),
        z=bl.Player(lambda x, z: (z - x) ** 2, tensor(0.0)[0]),
    )
    with pytest.raises(ValueError, match=r"inequality of 'x' depends on none of \['x', 'y'\]"):
        bl.solve(played, y=bl.Implicit(bl.Scipy("BFGS")))


def test_a_follower_that_leaves_what_is_defined_is_told():
    played = game(start=(0.5, 0.5), inequality=lambda y: -(y.min() + 1e-3).sqrt())
    with pytest.raises(bl.errors.NonFiniteError, match="its inequality is NaN or infinite in step"):
        bl.solve(played, y=bl.Implicit(bl.ClosedForm(lambda x: x - math.e), linear_solver=bl.linear.Dense()), steps=5)


@pytest.mark.parametrize(
    "options", [{"penalty": 0.0}, {"every": 0}, {"growth": 0.5}, {"decrease": 1.0}, {"tolerance": math.nan}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AugmentedLagrangian(**options)

"""solve_globally: against every active set of random programmes, and against the literature."""

from itertools import product

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import bilevel as bl
from bilevel.certificates import solve_globally
from bilevel.errors import InfeasibleError
from games.published.catalogue import problems

KNOWN = problems()


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def drawn(seed, quadratic):
    """A follower of two variables with three constraints and bounds, and a linear leader of two."""
    rng = np.random.default_rng(seed)
    Q = np.diag(rng.uniform(0.5, 2.0, 2)) if quadratic else np.zeros((2, 2))
    A, B = rng.normal(size=(3, 2)), rng.normal(size=(3, 2))
    return {
        "Q": Q, "c": rng.normal(size=2), "D": rng.normal(size=(2, 2)), "A": A, "B": B,
        "b": rng.uniform(0.5, 2.0, 3), "f": rng.normal(size=2), "g": rng.normal(size=2),
    }  # fmt: skip


def game_of(data):
    Q, c, D, A, B, b, f, g = (tensor(data[name].tolist()) for name in "QcDABbfg")
    return bl.Game(
        x=bl.Player(lambda x, y: f @ x + g @ y, torch.zeros(2, dtype=torch.float64), domain=bl.Box(0.0, 1.0)),
        y=bl.Player(
            lambda x, y: 0.5 * y @ Q @ y + (c + D @ x) @ y,
            torch.zeros(2, dtype=torch.float64),
            domain=bl.Box(-2.0, 2.0),
            inequality=lambda x, y: A @ y + B @ x - b,
        ),
    )


def by_enumeration(data):
    """The least leader's loss over every set of binding constraints, a linear programme each."""
    A = np.vstack([data["A"], np.eye(2), -np.eye(2)])
    B = np.vstack([data["B"], np.zeros((4, 2))])
    b = np.concatenate([data["b"], np.full(4, 2.0)])
    cost = np.concatenate([data["f"], data["g"], np.zeros(7)])
    stationary = np.hstack([data["D"], data["Q"], A.T])
    best = np.inf
    for binding in product([False, True], repeat=7):
        bind = np.array(binding)
        if bind.sum() > 2:
            continue  # a multiplier of two independent rows is enough (Caratheodory)
        rows = np.hstack([B, A, np.zeros((7, 7))])
        bounds = [(0, 1)] * 2 + [(None, None)] * 2 + [(0, None if on else 0) for on in bind]
        E = np.vstack([stationary, rows[bind]])
        found = linprog(cost, rows, b, E, np.concatenate([-data["c"], b[bind]]), bounds)
        best = min(best, found.fun if found.status == 0 else np.inf)
    return best


@pytest.mark.parametrize("quadratic", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_best_of_all_active_sets(seed, quadratic):
    data = drawn(seed, quadratic)
    wanted = by_enumeration(data)
    found = solve_globally(game_of(data))
    assert found.proved
    # HiGHS' linear programmes are exact to 1e-7 in their constraints, of numbers of size 1 to 10.
    assert found.value == pytest.approx(wanted, abs=1e-6)
    x, y = found.variables["x"], found.variables["y"]
    assert (
        float((tensor(data["A"].tolist()) @ y + tensor(data["B"].tolist()) @ x - tensor(data["b"].tolist())).max())
        < 1e-6
    )


LINEAR = [
    "Candler-Townsley 1982",
    "Bialas-Karwan 1984",
    "Anandalingam-White 1990",
    "Bard 1984a",
    "Bard 1984b",
    "Tuy et al. 1993",
]
QUADRATIC = [
    "Bard 1988, 1",
    "Bard 1988, 2",
    "Clark-Westerberg 1990a",
    "Falk-Liu 1995",
    "Savard-Gauvin 1994",
    "Muu-Quy 2003, 1",
]


@pytest.mark.parametrize("name", LINEAR + QUADRATIC)
def test_published_problems(name):
    found = solve_globally(KNOWN[name].game(0.0))
    assert found.proved and found.gap <= 1e-4 * (1.0 + abs(found.value))
    assert found.value == pytest.approx(KNOWN[name].best, rel=1e-4)  # published with four digits or more
    assert "global optimum" in str(found)


def test_ties_are_told():
    """Clark and Westerberg's follower is indifferent: -13 for a leader that it likes, -6 for one that it does not."""
    found = solve_globally(KNOWN["Clark-Westerberg 1990b"].game(0.0))
    assert (found.value, found.worst) == (pytest.approx(-13.0), pytest.approx(-6.0))


@pytest.mark.parametrize("name", ["Mirrlees 1999", "Dempe 1992b", "Bard 1988, 3"])
def test_what_is_not_of_this_kind_is_refused_by_name(name):
    with pytest.raises(ValueError, match="solve_globally: '[xy]': .*(linear|quadratic)"):
        solve_globally(KNOWN[name].game(0.0))


def test_nothing_feasible_is_told():
    zero = torch.zeros((), dtype=torch.float64)
    game = bl.Game(
        x=bl.Player(lambda x, y: x + y, zero, domain=bl.Box(0.0, 1.0), inequality=lambda x: 2.0 - x),
        y=bl.Player(lambda x, y: y - x, zero, domain=bl.Box(0.0, 1.0)),
    )
    with pytest.raises(InfeasibleError, match="no point keeps all the constraints"):
        solve_globally(game)


@pytest.mark.parametrize("options", [{"tolerance": 0.0}, {"max_nodes": -1}, {"seconds": float("inf")}, {"leader": "z"}])
def test_bad_arguments_are_refused(options):
    with pytest.raises(ValueError, match="solve_globally"):
        solve_globally(KNOWN["Bard 1984a"].game(0.0), **options)

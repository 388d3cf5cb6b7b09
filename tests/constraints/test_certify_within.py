"""certify within constraints: games in closed form, right points certified and wrong ones refuted, kinks and cones."""

from functools import partial

import pytest
import torch

import bilevel as bl
from bilevel.constraints import Ball, Box, NonNegative, SecondOrderCone
from bilevel.constraints.critical_cone import lowest_on_cone

D = torch.float64


def number(value):
    return torch.tensor(value, dtype=D)


ONE = number(1.0)


def standing(game, **point):
    return bl.certify(game, {name: number(value) for name, value in point.items()}).standing.value


def capacity(**options):
    """Price 9 - a - b and cost 1 of b, which makes one unit at most: a = 4, b = 1, and b's multiplier 8 - 4 - 2 = 2."""
    return bl.Game(
        a=bl.Player(lambda a, b: -a * (9.0 - a - b), ONE, domain=NonNegative()),
        b=bl.Player(lambda a, b: -b * (8.0 - a - b), ONE / 2, **options),
    )


@pytest.mark.parametrize("options", [{"domain": Box(0.0, 1.0)}, {"inequality": lambda b: torch.stack([b - 1.0, -b])}])
def test_a_follower_at_its_capacity(options):
    game = capacity(**options)
    found = bl.certify(game, {"a": number(4.0), "b": number(1.0)})
    assert found, str(found)
    assert not found.one_sided
    # -a (8 - a) within the capacity curves by 2.
    assert abs(found.by_name["leader's second order"].value - 2.0) < 1e-9
    assert standing(game, a=5.0, b=1.0) == "refuted"  # the leader's best without the capacity
    assert standing(game, a=4.0, b=0.9) == "refuted"
    assert standing(game, a=4.0, b=1.1) == "refuted"
    assert standing(game, a=6.5, b=0.75) == "refuted"  # beyond the capacity: -a (9 - a - (8 - a) / 2) falls to a = 5


def test_within_the_capacity_the_response_moves():
    game = capacity(domain=Box(0.0, 2.0))
    # b = (8 - a) / 2: -a (5 - a / 2) is least at 5, where b is 1.5.
    found = bl.certify(game, {"a": number(5.0), "b": number(1.5)}, response=bl.Implicit(bl.Scipy("L-BFGS-B")))
    assert found, str(found)
    assert abs(found.by_name["leader's second order"].value - 1.0) < 1e-9
    claimed = bl.certify(game, {"a": number(5.0), "b": number(1.5)}, hypergradient=number(0.5))
    assert claimed.by_name["hypergradient's error"].standing.value == "refuted"


def kinked(loss, **options):
    """y = min(x, 1)."""
    return bl.Game(
        x=bl.Player(loss, ONE / 2, **options),
        y=bl.Player(lambda x, y: (y - x) ** 2, ONE / 2, inequality={"top": lambda y: y - 1.0}),
    )


@pytest.mark.parametrize("away", [0.0, 1e-6, -1e-6, 1e-12])
def test_an_optimum_at_a_kink(away):
    game = kinked(lambda x, y: (y - 2.0) ** 2 + 0.1 * x)  # slopes -1.9 on the left and .1 on the right
    point = {"x": number(1.0 + away), "y": number(min(1.0, 1.0 + away))}
    found = bl.certify(game, point)
    assert found, str(found)
    sides = {name: float(slope) for name, slope in found.one_sided.items()}
    # The free side's slope is taken within 1e-6 of the kink, and moves by 2 of that.
    assert sides == pytest.approx({"inequality['top']": 0.1, "none of them": -1.9}, abs=3e-6)
    assert "top" in found.by_name["leader's first order"].remark


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: (y - 2.0) ** 2 - 0.1 * x,  # falls on the right
        lambda x, y: (y - 0.5) ** 2 + 0.1 * x,  # falls on the left
        lambda x, y: -((x - 1.0) ** 2) + 0.0 * y,  # a maximum, with a kink that does not matter
    ],
)
def test_a_kink_that_is_no_optimum(loss):
    assert standing(kinked(loss), x=1.0, y=1.0) == "refuted"


def test_a_response_on_either_side_of_a_kink_is_right():
    game = kinked(lambda x, y: (y - 2.0) ** 2 + 0.1 * x)
    at = {"x": ONE, "y": ONE}
    for claim, expected in ((0.1, "certified"), (-1.9, "certified"), (-0.9, "refuted")):
        found = bl.certify(game, at, hypergradient=number(claim))
        assert found.by_name["hypergradient's error"].standing.value == expected, claim


def mirror(loss, **options):
    """y = x."""
    start = options.pop("start", ONE / 2)
    return bl.Game(
        x=bl.Player(loss, start, **options), y=bl.Player(lambda x, y: (y - x).square().sum(), torch.zeros_like(start))
    )


def test_a_leaders_function_of_what_its_follower_answers():
    game = mirror(lambda x: (x - 3.0) ** 2, inequality=lambda y: y - 1.0)
    assert standing(game, x=1.0, y=1.0) == "certified"
    assert standing(game, x=0.9, y=0.9) == "refuted"
    assert standing(game, x=1.2, y=1.2) == "refuted"
    found = bl.certify(game, {"x": number(1.2), "y": number(1.2)})
    assert found.by_name["leader's feasibility"].standing.value == "refuted"
    # The other way round it holds the leader from nothing.
    assert standing(mirror(lambda x: (x - 3.0) ** 2, inequality=lambda y: 1.0 - y), x=1.0, y=1.0) == "refuted"


def test_curvature_of_an_equality():
    """On the unit circle y_0 is least at (-1, 0) and most at (1, 0), and the loss itself is linear."""
    game = mirror(lambda y: y[0], equality=lambda y: y @ y - 1.0, start=number([0.6, 0.8]))
    assert standing(game, x=[-1.0, 0.0], y=[-1.0, 0.0]) == "certified"
    found = bl.certify(game, {"x": number([1.0, 0.0]), "y": number([1.0, 0.0])})
    assert found.by_name["leader's first order"].standing.value == "certified"
    assert found.by_name["leader's second order"].standing.value == "refuted"
    assert abs(found.by_name["leader's second order"].value + 1.0) < 1e-9


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_corner_of_two_bounds_without_multipliers(sign):
    """2 s x_0 x_1 + .1 |x|^2 over x >= 0 at 0: along the cone it curves up for s = 1, and elsewhere down."""

    def loss(x, y):
        return 2.0 * sign * y[0] * x[1] + 0.1 * (x @ x)

    game = mirror(loss, start=number([0.5, 0.5]), domain=NonNegative())
    expected = "certified" if sign > 0.0 else "refuted"
    found = bl.certify(game, {"x": number([0.0, 0.0]), "y": number([0.0, 0.0])})
    assert found.standing.value == expected, str(found)
    alone = bl.Game(x=bl.Player(lambda x: loss(x, x), number([0.5, 0.5]), domain=NonNegative()))
    assert bl.certify_nash(alone, {"x": number([0.0, 0.0])}).standing.value == expected


def test_no_constraint_qualification_is_told_as_neither():
    # x = 1 is the one point allowed; the gradient of (x - 1)^2 vanishes there, and no multiplier exists.
    game = mirror(lambda x: (x - 3.0) ** 2, inequality=lambda x, y: (x - 1.0) * (y - 1.0))
    assert standing(game, x=1.0, y=1.0) == "inconclusive"


def test_many_optima_are_told_as_neither():
    # Only the difference of the prices moves the follower.
    game = bl.Game(
        x=bl.Player(lambda y: (y - 0.25) ** 2, number([0.0, 0.0]), domain=Box(-1.0, 1.0)),
        y=bl.Player(lambda x, y: (y - x[0] + x[1]) ** 2, ONE / 2, domain=Box(0.0, 1.0)),
    )
    found = bl.certify(game, {"x": number([0.5, 0.25]), "y": number(0.25)})
    assert found.standing.value == "inconclusive", str(found)
    assert found.by_name["leader's first order"].standing.value == "certified"


def test_a_ball_and_its_curvature():
    # The follower maximises x'y in the unit ball: y = x / |x|, and the leader wants y_0 least: -1.
    game = bl.Game(
        x=bl.Player(lambda x, y: y[0] + 0.5 * (x @ x - 1.0) ** 2, number([0.6, 0.8])),
        y=bl.Player(lambda x, y: -(x @ y), number([0.6, 0.6]), domain=Ball(1.0)),
    )
    assert standing(game, x=[-1.0, 0.0], y=[-1.0, 0.0]) == "certified"
    assert standing(game, x=[1.0, 0.0], y=[1.0, 0.0]) == "refuted"
    assert standing(game, x=[-0.8, 0.6], y=[-0.8, 0.6]) == "refuted"


def plant(b, c):
    return b + c - 4.0


def test_players_who_answer_together_and_share_a_plant():
    """b + c = 4 whatever a sells: -a (8 - a) is least at 4; b - c = 1 from the costs, and the multiplier is 1.5."""
    market = bl.Game(
        a=bl.Player(lambda a, b, c: -a * (12.0 - a - b - c), number(3.0)),
        b=bl.Player(lambda a, b, c: -b * (12.0 - a - b - c), ONE, inequality=plant),
        c=bl.Player(lambda a, b, c: -c * (11.0 - a - b - c), ONE, inequality=plant),
    ).joined(firms=("b", "c"))
    firms = {"b": number(2.5), "c": number(1.5)}
    found = bl.certify(market, {"a": number(4.0), "firms": firms})
    assert found, str(found)
    assert bl.certify(market, {"a": number(3.5), "firms": firms}).standing.value == "refuted"


def test_what_solve_ends_at_is_certified():
    """A toll on the first of three roads; without what the third may carry, a share of 1/3 would be best for the first.

    With f_2 - f_3 = 1/2 and the flows adding up to 1, f_3 = (1/2 - f_1) / 2: at .06 f_1 is .38, f_2 .56, and the toll
    f_2 + 1.5 - f_1 - 1 = .68.
    """
    free = number([1.0, 1.5, 2.0])
    game = bl.Game(
        toll=bl.Player(
            lambda flow: flow.square().sum(), number(0.8), domain=Box(0.0, 2.0), inequality=lambda flow: flow[2] - 0.06
        ),
        flow=bl.Player(
            lambda toll, flow: (0.5 * flow.square() + free * flow).sum() + toll * flow[0],
            torch.full((3,), 1 / 3, dtype=D),
            inequality=lambda flow: {"first road": flow[0] - 0.4, "no flow back": -flow},
            equality=lambda flow: flow.sum() - 1.0,
        ),
    )
    response = bl.Implicit(bl.Scipy("SLSQP"))
    found = bl.solve(game, flow=response, optimizer=bl.Scipy("SLSQP"), steps=50)
    told = bl.certify(game, found, response=response)
    assert told, str(told)
    exact = {"toll": number(0.68), "flow": number([0.38, 0.56, 0.06])}
    assert bl.certify(game, exact)
    # A toll of .66 leaves the constraint loose, where more of it would still gain.
    loose = {"toll": number(0.66), "flow": number([0.59 / 1.5, 0.83 / 1.5, 0.08 / 1.5])}
    told = bl.certify(game, loose)
    assert told.by_name["leader's feasibility"].standing.value == "certified"
    assert told.by_name["leader's first order"].standing.value == "refuted"


def test_what_has_no_answer_is_told():
    game = bl.Game(
        x=bl.Player(lambda x, y: y + x**2, ONE / 2),
        y=bl.Player(lambda x, y: -y * x, ONE / 2, inequality=lambda y: torch.stack([y - 1.0, 2.0 * y - 2.0])),
    )
    found = bl.certify(game, {"x": number(0.5), "y": number(1.0)})
    assert found.standing.value == "inconclusive"
    assert "linearly dependent" in found.by_name["leader's first order"].remark


def test_who_is_refused_by_name():
    cone = bl.Game(
        x=bl.Player(lambda y: y @ y, ONE),
        y=bl.Player(lambda x, y: (y - x) @ (y - x), number([0.0, 1.0]), domain=SecondOrderCone()),
    )
    with pytest.raises(ValueError, match="certify: 'y' has the domain SecondOrderCone.*no set of smooth functions"):
        bl.certify(cone, {"x": ONE, "y": number([0.0, 1.0])})
    large = bl.Game(
        x=bl.Player(lambda y: y @ y, ONE, domain=Box(0.0, 1.0)),
        y=bl.Player(lambda x, y: (y - x) @ (y - x), torch.zeros(2000, dtype=D)),
    )
    with pytest.raises(ValueError, match="2,001 unknowns.*up to 1,000"):
        bl.certify(large, {"x": ONE, "y": torch.zeros(2000, dtype=D)})


@pytest.mark.parametrize("seed", range(8))
def test_the_lowest_on_a_cone_against_many_directions(seed):
    """Directions of the cone are drawn; none curves less than the sign of what is found allows."""
    draw = torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=draw, dtype=D)
    held, weak, curved = normal(1, 5), normal(3, 5), normal(5, 5)
    curved = 0.5 * (curved + curved.T) + 0.6 * torch.eye(5, dtype=D)
    lowest, _ = lowest_on_cone(curved, held, weak)
    basis = torch.linalg.svd(held, full_matrices=True).Vh[1:]
    ways = normal(200_000, 4) @ basis
    ways = ways[((ways @ weak.T) <= 0.0).all(1)]
    values = ((ways @ curved) * ways).sum(1) / ways.square().sum(1)
    assert len(values) > 1000
    # Where some direction curves down there is one so far down that 1,000 draws meet it; a bound by sampling otherwise.
    if lowest > 0.0:
        assert float(values.min()) > 0.0
    else:
        assert float(values.min()) < 0.1

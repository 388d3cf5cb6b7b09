"""Followers who settle among themselves within constraints of their own and shared ones, against closed forms.

Answers are polished to rounding: with curvatures and gradients of size 1 to 10, 1e-10 is far above what it leaves.
"""

from functools import partial

import pytest
import torch
from torch.optim import SGD

import bilevel as bl
from bilevel.constraints import NonNegative, PositiveSemidefinite
from bilevel.game.situation import Situation

D = torch.float64
SETTLE = bl.Implicit(bl.ScipyRoot())


def tensor(*values):
    return torch.tensor(values if len(values) > 1 else values[0], dtype=D)


def answer(game, response=SETTLE, **others):
    """The answer, the state after it, and the hypergradient of the first player's loss in its own variables."""
    leader, follower = game.names[0], game.names[-1]
    given = {leader: others.get(leader, game.initial(leader)).clone().requires_grad_()}
    y, state = response(game, given, response.init(game))
    loss = game.loss(leader, {**given, follower: y})
    (slope,) = torch.autograd.grad(loss, given[leader], materialize_grads=True)
    return {name: value.detach() for name, value in y.items()}, state, slope


def close(found, wanted, atol=1e-10):
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=atol)


def plant(b, c):
    return b + c - 4.0


def line(b):
    return b - 2.0


def firms(of_b=plant, of_c=plant, **domains):
    """Price 13 - a - b - c, costs 1, 1 and 2; the followers have one plant, of 4 units, in common."""
    one = tensor(1.0)
    return bl.Game(
        a=bl.Player(lambda a, b, c: -a * (12.0 - a - b - c), 4.0 * one),
        b=bl.Player(lambda a, b, c: -b * (12.0 - a - b - c), one, inequality=of_b, domain=domains.get("b")),
        c=bl.Player(lambda a, b, c: -c * (11.0 - a - b - c), one, inequality=of_c, domain=domains.get("c")),
    ).joined(firms=("b", "c"))


# Closed forms ---------------------------------------------------------------------------------------------------------


def test_firms_that_share_a_plant_bear_one_price_of_it():
    """12 - a - 2 b - c = l = 11 - a - b - 2 c and b + c = 4: b = 2.5, c = 1.5 and l = 5.5 - a; a of 4 is then best."""
    y, state, slope = answer(firms())
    close(torch.stack([y["b"], y["c"]]), tensor(2.5, 1.5))
    close(state["multipliers"]["inequality"]["shared"], tensor(1.5))
    assert set(state["multipliers"]) == {"inequality"} and set(state["multipliers"]["inequality"]) == {"shared"}
    close(slope, tensor(0.0))
    solution = bl.solve(firms(), firms=SETTLE, optimizer=partial(SGD, lr=0.4), steps=40)
    close(solution.variables["a"], tensor(4.0))
    close(solution.multipliers["firms"]["inequality"]["shared"], tensor(1.5))
    assert "inequality['shared'] (1 of 1 bind)" in str(solution)
    # A leader who sells 8 leaves them room: b = (4 + 1) / 3, c = (4 - 2) / 3, and each yields a third of what it adds.
    y, state, slope = answer(firms(), a=tensor(8.0))
    close(torch.stack([y["b"], y["c"]]), tensor(5.0 / 3.0, 2.0 / 3.0))
    close(state["multipliers"]["inequality"]["shared"], tensor(0.0))
    close(slope, tensor(-(12.0 - 16.0 - 7.0 / 3.0) - 8.0 * 2.0 / 3.0))


@pytest.mark.parametrize("own", [{"line": line, "plant": plant}, [line, plant]], ids=["dict", "list"])
def test_an_own_constraint_beside_a_shared_one_has_a_multiplier_of_its_own(own):
    y, state, _ = answer(firms(own))
    close(torch.stack([y["b"], y["c"]]), tensor(2.0, 2.0))
    found = state["multipliers"]["inequality"]
    close(found["shared"], tensor(1.0))  # 11 - 4 - 2 - 2 * 2
    (mine,) = bl.tree.leaves(found["b"])
    close(mine, tensor(1.0))  # 12 - 4 - 2 * 2 - 2 - 1
    assert "c" not in found


def test_walls_of_domains_are_constraints_of_their_own():
    y, state, _ = answer(firms(b=bl.Box(0.0, 2.0), c=NonNegative()))
    close(torch.stack([y["b"], y["c"]]), tensor(2.0, 2.0))
    close(state["multipliers"]["domain"]["b"]["high"], tensor(1.0))
    y, _, _ = answer(firms(b=bl.Box(0.0, 1.5)))
    close(torch.stack([y["b"], y["c"]]), tensor(1.5, 2.5))


RIVER_COSTS = ((0.1, 0.01), (0.12, 0.05), (0.15, 0.01))
EMISSION, DECAY = (0.5, 0.25, 0.75), ((6.5, 5.0, 5.5), (4.583, 6.25, 3.75))


def stations(a, b, c):
    """What two monitoring stations may see at most, of three firms on a river."""
    seen = [sum(d * e * x for d, e, x in zip(row, EMISSION, (a, b, c), strict=True)) for row in DECAY]
    return torch.stack(seen) - 100.0


def river():
    def loss(index):
        first, second = RIVER_COSTS[index]

        def costs(tax, a, b, c):
            mine = (a, b, c)[index]
            return (first + second * mine + tax - (3.0 - 0.01 * (a + b + c))) * mine

        return costs

    firm = lambda index: bl.Player(loss(index), tensor(1.0), domain=NonNegative(), inequality=stations)
    return bl.Game(
        tax=bl.Player(lambda tax, a, b, c: (a + b + c - 30.0) ** 2 + 0.0 * tax, tensor(0.0)),
        a=firm(0),
        b=firm(1),
        c=firm(2),
    ).joined(firms=("a", "b", "c"))


def test_the_river_basin_game_has_its_published_equilibrium():
    """Krawczyk & Uryasev 2000, Environ. Model. Assess. 5: (21.14, 16.03, 2.73), the first station's limit binding.

    To all digits: with the first row w of what the stations see, 0.01 (Q + I + 2 diag(second)) q + l w = 2.9, 2.88,
    2.85 and w q = 100 are four linear equations.
    """
    y, state, slope = answer(river())
    found = torch.stack([y["a"], y["b"], y["c"]])
    close(found, tensor(21.14, 16.03, 2.73), atol=6e-3)
    w = tensor(*DECAY[0]) * tensor(*EMISSION)
    first, second = tensor(*RIVER_COSTS).unbind(1)
    K = torch.zeros(4, 4, dtype=D)
    K[:3, :3] = 0.01 * (torch.ones(3, 3, dtype=D) + torch.eye(3, dtype=D)) + 2.0 * torch.diag(second)
    K[:3, 3], K[3, :3] = w, w
    wanted = torch.linalg.solve(K, torch.cat([3.0 - first, tensor(100.0)[None]]))
    close(found, wanted[:3])
    close(state["multipliers"]["inequality"]["shared"], torch.stack([wanted[3], 0.0 * wanted[3]]))
    moved = torch.linalg.solve(K, tensor(-1.0, -1.0, -1.0, 0.0))[:3]
    close(slope, 2.0 * (found.sum() - 30.0) * moved.sum(), atol=1e-8)


WEIGHTS = (1.0, 2.0, 0.5)


def link(width, one, two, three):
    return one + two + three - width


def bandwidth(what="inequality"):
    def user(index):
        def loss(one, two, three):
            return -WEIGHTS[index] * (one, two, three)[index].log()

        return bl.Player(loss, tensor(0.5), **{what: link})

    def provider(width, one, two, three):
        return 0.7 * width - sum(w * x.log() for w, x in zip(WEIGHTS, (one, two, three), strict=True))

    return bl.Game(width=bl.Player(provider, tensor(2.0)), one=user(0), two=user(1), three=user(2)).joined(
        users=("one", "two", "three")
    )


@pytest.mark.parametrize("what", ["inequality", "equality"])
def test_users_of_a_link_share_it_by_their_weights(what):
    """-w log x under sum x <= C: each has C w / sum w, and pays sum w / C; a link of sum w / .7 is worth its cost."""
    y, state, slope = answer(bandwidth(what), width=tensor(3.0))
    close(torch.stack(list(y.values())), 3.0 * tensor(*WEIGHTS) / 3.5)
    close(state["multipliers"][what]["shared"], tensor(3.5 / 3.0))
    close(slope, tensor(0.7 - 3.5 / 3.0))
    solution = bl.solve(bandwidth(what), users=SETTLE, optimizer=partial(SGD, lr=4.0), steps=40)
    close(solution.variables["width"], tensor(5.0), atol=1e-8)


def test_a_constraint_that_one_of_them_bears_pushes_that_one_alone():
    """b stays within 2 - c and c does not care: c = x, b = 2 - x, and b's multiplier is 2 (3 - b)."""
    game = bl.Game(
        x=bl.Player(lambda x, b, c: b * b + 3.0 * c + 0.0 * x, tensor(0.8)),
        b=bl.Player(lambda b: (b - 3.0) ** 2, tensor(0.0), inequality=lambda b, c: b + c - 2.0),
        c=bl.Player(lambda x, b, c: (c - x) ** 2, tensor(0.0)),
    ).joined(pair=("b", "c"))
    y, state, slope = answer(game)
    close(torch.stack([y["b"], y["c"]]), tensor(1.2, 0.8))
    close(state["multipliers"]["inequality"]["b"], tensor(3.6))
    close(slope, tensor(-2.0 * 1.2 + 3.0))


# Derivatives ----------------------------------------------------------------------------------------------------------


def bent_limit(x, b, c):
    return {"ball": (b * b).sum() + (c * c).sum() - 1.0 - 0.1 * x[0], "far": b[0] + c[0] - 10.0}


def bent():
    m = torch.tensor([[1.0, 0.4], [-0.3, 0.8]], dtype=D)

    def first(x, b, c):
        return 0.5 * b.square().sum() + b @ m @ c - (x * b).sum() + 0.1 * b.pow(4).sum()

    def second(x, b, c):
        return c.square().sum() - b @ (0.5 * m.T) @ c + (x.flip(0) * c).sum()

    start = tensor(0.2, 0.1)
    return bl.Game(
        x=bl.Player(lambda x, b, c: (b - c + 1).square().sum() + 0.5 * x.square().sum(), tensor(2.0, -1.5)),
        b=bl.Player(first, start, inequality=bent_limit, equality=lambda x, b: b.sum() - 0.1 * x[1]),
        c=bl.Player(second, start, inequality=bent_limit),
    ).joined(pair=("b", "c"))


def test_first_and_second_derivatives_are_those_of_the_settled_pair_by_differences():
    game, h = bent(), 1e-4
    x = game.initial("x")
    _, state, slope = answer(game)
    assert float(state["multipliers"]["inequality"]["shared"]["ball"]) > 0.1

    def value(x):
        with torch.no_grad():
            pair, _ = SETTLE(game, {"x": x}, SETTLE.init(game))
        return game.loss("x", {"x": x, "pair": pair})

    units = torch.eye(2, dtype=D)
    # h^2 times third derivatives of size 10
    close(slope, torch.stack([(value(x + h * e) - value(x - h * e)) / (2 * h) for e in units]), atol=1e-6)
    point = x.clone().requires_grad_()
    pair, _ = SETTLE(game, {"x": point}, SETTLE.init(game))
    (first,) = torch.autograd.grad(game.loss("x", {"x": point, "pair": pair}), point, create_graph=True)
    second = torch.stack([torch.autograd.grad(entry, point, retain_graph=True)[0] for entry in first])
    rows = [(answer(game, x=x + h * e)[2] - answer(game, x=x - h * e)[2]) / (2 * h) for e in units]
    close(second, torch.stack(rows), atol=1e-5)
    close(second, second.T, atol=1e-8)


def test_at_a_kink_both_derivatives_are_told():
    """The plant is full, and its price 0, where 12 - a + 11 - a = 3 * 4: a = 5.5."""
    with pytest.warns(bl.errors.KinkWarning, match=r"inequality\['shared'\].*is about to bind or to let go"):
        answer(firms(), a=tensor(5.5))


@pytest.mark.parametrize("solver", [bl.ScipyRoot("lm"), bl.ClosedForm(lambda a: {"b": 2.4 + 0 * a, "c": 1.4 + 0 * a})])
def test_other_ways_to_come_near_end_at_the_same_point(solver):
    y, state, _ = answer(firms(), bl.Implicit(solver))
    close(torch.stack([y["b"], y["c"]]), tensor(2.5, 1.5))
    close(state["multipliers"]["inequality"]["shared"], tensor(1.5))


def test_many_games_at_once_settle_as_each_alone():
    a, one = tensor(4.0, 5.0, 8.0), tensor(1.0)
    alone = bl.Game(
        a=bl.Player(lambda a, b, c: -a * (12.0 - a - b - c), a[0]),
        b=bl.Player(lambda a, b, c: -b * (12.0 - a - b - c), one, inequality=plant),
        c=bl.Player(lambda a, b, c: -c * (11.0 - a - b - c), one, inequality=plant),
    )
    games = bl.Games(alone, 3, init={"a": a}).joined(firms=("b", "c"))
    x = a.clone().requires_grad_()
    y, state = SETTLE(games, {"a": x}, SETTLE.init(games))
    (slope,) = torch.autograd.grad(games.loss("a", {"a": x, "firms": y}).sum(), x)
    for index in range(3):
        alone, there, wanted = answer(firms(), a=a[index])
        close(torch.stack([y["b"][index], y["c"][index]]).detach(), torch.stack([alone["b"], alone["c"]]))
        close(state["multipliers"]["inequality"]["shared"][index], there["multipliers"]["inequality"]["shared"])
        close(slope[index], wanted, atol=1e-7)  # many games are solved by GMRES to 1e-8 or so


# Refusals -------------------------------------------------------------------------------------------------------------


def test_two_functions_that_say_one_thing_are_no_shared_constraint():
    with pytest.raises(bl.errors.DependentConstraintsError, match=r"'b'.*'c'.*give each of them the same function"):
        answer(firms(lambda b, c: b + c - 4.0, lambda b, c: b + c - 4.0))


def test_what_is_ambiguous_is_refused():
    with pytest.raises(ValueError, match="has the function of its inequality.* twice"):
        firms([plant, plant])
    one = tensor(1.0)
    with pytest.raises(ValueError, match="'c''s equality is inequality= of 'b'; a constraint that they share"):
        bl.Game(
            a=bl.Player(lambda a, b, c: a * b * c, one),
            b=bl.Player(lambda a, b: (b - a) ** 2, one, inequality=plant),
            c=bl.Player(lambda a, c: (c - a) ** 2, one, equality=plant),
        ).joined(pair=("b", "c"))
    with pytest.raises(ValueError, match="'c' has the domain Positive.* another of them has functions"):
        bl.Game(
            a=bl.Player(lambda a, b, c: a * b * c.sum(), one),
            b=bl.Player(lambda a, b: (b - a) ** 2, one, inequality=line),
            c=bl.Player(lambda a, c: (c - a).square().sum(), torch.eye(2, dtype=D), domain=PositiveSemidefinite()),
        ).joined(pair=("b", "c"))
    with pytest.raises(TypeError, match=r"inequality holds a float; expected a function .*or a dict or a list"):
        bl.Player(lambda b: b, one, inequality=[1.0])
    with pytest.raises(TypeError, match="inequality is an empty dict"):
        bl.Player(lambda b: b, one, inequality={})


def test_who_would_not_see_them_is_refused():
    for solver in (bl.Scipy("SLSQP"), bl.inner.HiGHS(), partial(SGD, lr=0.1)):
        with pytest.raises(TypeError, match=r"several players with a loss each, within constraints. Use ScipyRoot"):
            bl.Implicit(solver).init(firms())
    with pytest.raises(TypeError, match="would not see the functions"):
        bl.Unrolled(partial(SGD, lr=0.1), steps=3).init(firms())
    with pytest.raises(bl.errors.NotSymmetricError, match="GMRES"):
        bl.Implicit(bl.ScipyRoot(), linear_solver=bl.ConjugateGradient()).init(firms())


def test_a_player_at_a_maximum_of_its_own_is_refused():
    """b maximises (b - x)^2 among others: stationary at b = x, and at no minimum."""
    game = bl.Game(
        x=bl.Player(lambda x, b, c: b * c + x, tensor(0.3)),
        b=bl.Player(lambda x, b: -((b - x) ** 2), tensor(0.3), inequality=lambda b, c: b + c - 9.0),
        c=bl.Player(lambda x, c: (c - x) ** 2, tensor(0.0)),
    ).joined(pair=("b", "c"))
    with pytest.raises(bl.errors.CurvatureError, match="Player 'b' of 'pair'.*a maximum, of its own"):
        answer(game)


def test_contradicting_constraints_are_named():
    with pytest.raises(bl.errors.InfeasibleError, match="inequality"):
        answer(firms([plant, lambda b: 5.0 - b], [plant, lambda c: -c]))


def test_a_shared_function_of_a_batch_is_refused():
    """Each of them has batches of its own, and one constraint has one: that of the first would be taken in silence."""

    def room(b, c, batch):
        return b + c - batch

    one = tensor(1.0)
    game = bl.Game(
        a=bl.Player(lambda a, b, c: -a * (12.0 - a - b - c), 4.0 * one),
        b=bl.Player(lambda a, b, c: -b * (12.0 - a - b - c), one, inequality=room, data=[tensor(4.0)]),
        c=bl.Player(lambda a, b, c: -c * (11.0 - a - b - c), one, inequality=room, data=[tensor(3.0)]),
    )
    with pytest.raises(ValueError, match=r"\['b', 'c'\] share a function as inequality= that takes `batch`"):
        game.joined(firms=("b", "c"))


def test_each_loss_and_each_constraint_is_evaluated_once_for_the_gradients_of_all_members():
    seen = []

    def told(name, value):
        seen.append(name)
        return value

    def shared(b, c):
        return told("shared", b + c - 4.0)

    one = tensor(1.0)
    game = bl.Game(
        a=bl.Player(lambda a, b, c: -a * (12.0 - a - b - c), 4.0 * one),
        b=bl.Player(
            lambda a, b, c: told("b", -b * (12.0 - a - b - c)),
            one,
            inequality=[shared, lambda b: told("b's", b**2 - 9.0)],
        ),
        c=bl.Player(
            lambda a, b, c: told("c", -c * (11.0 - a - b - c)),
            2.0 * one,
            inequality=[shared, lambda a, c: told("c's", a * c - 90.0)],
        ),
    ).joined(firms=("b", "c"))
    joint, y = game.residual("firms"), tensor(1.0, 2.0)
    weights, given = tensor(0.5, 0.25, 2.0), {"a": 4.0 * one}
    seen.clear()
    here = Situation(game, "firms", given)
    _, slope = joint.pushed(here, y, weights)
    assert sorted(seen) == ["b", "b's", "c", "c's", "shared"]
    # Of its own: a + c + 2 b - 12 + 2 b / 2 + 2, and a + b + 2 c - 11 + a / 4 + 2.
    close(slope, tensor(-1.0, 1.0))
    # Second derivatives see what stands still in the first: [[2 + 1, 1], [1, 2]].
    moved = torch.autograd.functional.jacobian(lambda y: joint.pushed(here, y, weights)[1], y)
    close(moved, torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=D))

"""Finite games: exact payoffs, what keeps an equilibrium, the field's solvers against each other, conversions."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bilevel as bl
from games.matrix import named
from games.matrix.conversion import (
    from_nashpy,
    from_open_spiel,
    from_pygambit,
    to_nashpy,
    to_open_spiel,
    to_pygambit,
)
from games.matrix.finite import FiniteGame
from games.matrix.solvers import (
    Gambit,
    LemkeHowson,
    LinearProgramme,
    Solver,
    SupportEnumeration,
    VertexEnumeration,
    equilibria,
    optimal_commitment,
)

D = torch.float64


@st.composite
def finite_games(draw, players=None, zero_sum=False, least=1):
    actions = [draw(st.integers(least, 4)) for _ in range(players or draw(st.integers(2, 3)))]
    return named.random_game(actions, seed=draw(st.integers(0, 2**31)), correlation=-1.0 if zero_sum else 0.0)


@st.composite
def with_profiles(draw):
    game = draw(finite_games())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return game, [torch.randn(n, dtype=D, generator=generator).mul(3.0).softmax(0) for n in game.actions]


# What a profile pays ----------------------------------------------------------------------------------------------


@given(with_profiles())
@settings(max_examples=50, deadline=None)
def test_expected_payoffs_are_the_sum_over_all_actions(drawn):
    game, profile = drawn
    letters = "abc"[: len(profile)]
    for i, table in enumerate(game.payoffs):
        wanted = torch.einsum(f"{letters},{','.join(letters)}->", table, *profile)
        assert float(game.expected(profile)[i]) == pytest.approx(float(wanted), abs=1e-12)


@given(with_profiles())
@settings(max_examples=50, deadline=None)
def test_nash_conv_is_never_negative_and_is_the_best_pure_deviations(drawn):
    game, profile = drawn
    regrets = game.regrets(profile)
    assert float(regrets.min()) >= 0.0
    for i, strategy in enumerate(profile):
        gains = []
        for action in torch.eye(len(strategy), dtype=D):
            moved = [action if j == i else p for j, p in enumerate(profile)]
            gains.append(float(game.expected(moved)[i] - game.expected(profile)[i]))
        assert float(regrets[i]) == pytest.approx(max(gains), abs=1e-12)
    assert game.exploitability(profile) == pytest.approx(game.nash_conv(profile) / len(profile))


@given(with_profiles(), st.randoms(use_true_random=False), st.floats(0.1, 10.0), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_what_keeps_regrets(drawn, random, scale, seed):
    """Players in another order, one payoff scaled, and h(others) added: the same regrets, scaled."""
    game, profile = drawn
    before = game.regrets(profile)
    order = list(range(len(profile)))
    random.shuffle(order)
    turned = game.permuted(order).regrets([profile[i] for i in order])
    assert torch.allclose(turned, before[order], atol=1e-12)
    who = random.randrange(len(profile))
    changed = list(game.payoffs)
    others = [1 if i == who else n for i, n in enumerate(game.actions)]
    shift = torch.randn(others, dtype=D, generator=torch.Generator().manual_seed(seed))
    changed[who] = scale * changed[who] + shift
    after = FiniteGame(tuple(changed)).regrets(profile)
    factor = torch.ones(len(profile), dtype=D)
    factor[who] = scale
    assert torch.allclose(after, factor * before, atol=1e-11)


def test_a_shift_by_what_others_do_changes_what_commitment_is_best():
    """h(others) in the leader's payoff keeps Nash, not Stackelberg."""
    game = named.commitment()
    shifted = FiniteGame((game.payoffs[0] + torch.tensor([[5.0, 0.0]], dtype=D), game.payoffs[1]))
    [one], [other] = equilibria(game), equilibria(shifted)
    assert all(torch.equal(a, b) for a, b in zip(one.profile, other.profile))
    assert optimal_commitment(game).strategy.tolist() == pytest.approx([0.5, 0.5])
    assert optimal_commitment(shifted).strategy.tolist() == pytest.approx([1.0, 0.0])


# The field's solvers ----------------------------------------------------------------------------------------------


@given(finite_games(players=2, zero_sum=True, least=2))
@settings(max_examples=40, deadline=None)
def test_the_linear_programme_agrees_with_nashpy_and_gambit_on_the_value(game):
    assert game.is_zero_sum
    values = [
        float(equilibria(game, solver)[0].payoffs[0])
        for solver in (LinearProgramme(), VertexEnumeration(), LemkeHowson(), Gambit())
    ]
    assert values == pytest.approx([values[0]] * 4, abs=1e-7)


@given(finite_games(players=2, least=2))
@settings(max_examples=30, deadline=None)
def test_enumerations_find_the_same_equilibria(game):
    def found(solver):
        return sorted(torch.cat(e.profile).numpy().round(6).tolist() for e in equilibria(game, solver))

    exact = found(Gambit())
    assert np.allclose(exact, found(VertexEnumeration()), atol=1e-5)
    one = torch.cat(equilibria(game, LemkeHowson())[0].profile).numpy()
    assert min(np.abs(np.array(exact) - one).max(1)) < 1e-5


@given(finite_games(players=3))
@settings(max_examples=15, deadline=None)
def test_gambit_solves_games_of_three(game):
    for found in equilibria(game):
        assert found.nash_conv <= 1e-6 * 10


@given(finite_games(players=2), st.integers(0, 1))
@settings(max_examples=40, deadline=None)
def test_who_commits_never_does_worse_than_at_nash(game, leader):
    committed = optimal_commitment(game, leader=leader)
    for found in equilibria(game):
        assert float(committed.payoffs[leader]) >= float(found.payoffs[leader]) - 1e-8
    follower = 1 - leader
    profile = [torch.empty(0)] * 2
    profile[leader], profile[follower] = (
        committed.strategy,
        torch.eye(game.actions[follower], dtype=D)[committed.answer],
    )
    assert float(game.regrets(profile)[follower]) <= 1e-8
    # No pure strategy with its answer, ties for the leader, does better: what a commitment may always fall back on.
    turned = game if leader == 0 else game.permuted((1, 0))
    for mine, theirs in zip(*turned.payoffs):
        assert float(mine[theirs >= theirs.max()].max()) <= float(committed.payoffs[leader]) + 1e-8


@pytest.mark.parametrize(
    ("game", "profiles"),
    [
        (named.matching_pennies(), [[0.5, 0.5, 0.5, 0.5]]),
        (named.rock_paper_scissors(), [[1 / 3] * 6]),
        (named.biased_rock_paper_scissors(), [[1 / 16, 10 / 16, 5 / 16] * 2]),
        (named.prisoners_dilemma(), [[0.0, 1.0, 0.0, 1.0]]),
        (named.battle_of_the_sexes(), [[1.0, 0, 1, 0], [0.0, 1, 0, 1], [0.6, 0.4, 0.4, 0.6]]),
        (named.stag_hunt(), [[1.0, 0, 1, 0], [0.0, 1, 0, 1], [2 / 3, 1 / 3, 2 / 3, 1 / 3]]),
        (named.chicken(), [[1.0, 0, 0, 1], [0.0, 1, 1, 0], [1 / 3, 2 / 3, 1 / 3, 2 / 3]]),
        (named.shapley(), [[1 / 3] * 6]),
        (named.commitment(), [[1.0, 0.0, 1.0, 0.0]]),
        (named.jordan(), [[0.5] * 6]),
    ],
)
def test_named_games_have_their_equilibria(game, profiles):
    found = [torch.cat(e.profile).tolist() for e in equilibria(game)]
    assert len(found) == len(profiles)
    for wanted in profiles:
        assert any(one == pytest.approx(wanted, abs=1e-6) for one in found)


def test_what_a_solver_returns_is_checked():
    def wrong(game):
        result = __import__("pygambit").nash.lcp_solve(game)
        other = game.mixed_strategy_profile(rational=True)  # uniform
        return type("Result", (), {"equilibria": [other, *result.equilibria], "game": game})()

    with pytest.warns(bl.errors.NonConvergenceWarning, match=r"would gain .* left out"):
        found = equilibria(named.biased_rock_paper_scissors(), Gambit(wrong))
    assert len(found) == 1


def test_solvers_refuse_games_that_they_do_not_solve():
    with pytest.raises(ValueError, match="zero-sum games of two players, and this one is not"):
        equilibria(named.chicken(), LinearProgramme())
    with pytest.raises(ValueError, match="this one has 3"):
        equilibria(named.jordan(), SupportEnumeration())
    with pytest.raises(ValueError, match="3 players, leader=0"):
        optimal_commitment(named.jordan())
    with pytest.raises(ValueError, match="dropped_label=9"):
        equilibria(named.chicken(), LemkeHowson(9))
    with pytest.raises(ValueError, match="expected at least 2 each"):
        equilibria(named.random_game((1, 3)), LemkeHowson())


# To and from others' objects ----------------------------------------------------------------------------------------


@given(finite_games())
@settings(max_examples=25, deadline=None)
def test_conversions_come_back_exactly(game):
    for there, back in ((to_pygambit, from_pygambit), (to_open_spiel, from_open_spiel), (to_nashpy, from_nashpy)):
        if there is to_nashpy and len(game.actions) != 2:
            continue
        again = back(there(game))
        assert all(torch.equal(a, b) for a, b in zip(again.payoffs, game.payoffs)), there


def test_games_in_extensive_form_come_in_too():
    pygambit, pyspiel = pytest.importorskip("pygambit"), pytest.importorskip("pyspiel")
    tree = pygambit.Game.new_tree(players=["Ann", "Bob"])
    tree.append_move(tree.root, "Ann", ["L", "R"])
    left, right = tree.root.children
    tree.append_move(left, "Bob", ["l", "r"])
    for node, payoffs in zip((*left.children, right), ([1, 2], [0, 5], [3, 0])):
        tree.set_outcome(node, tree.add_outcome(str(payoffs), payoffs))
    game = from_pygambit(tree)
    assert game.names == ("Ann", "Bob")
    assert game.payoffs[0].tolist() == [[1.0, 0.0], [3.0, 3.0]]
    poker = from_open_spiel(pyspiel.extensive_to_matrix_game(pyspiel.load_game("kuhn_poker")))
    assert poker.is_zero_sum
    assert float(equilibria(poker, LinearProgramme())[0].payoffs[0]) == pytest.approx(-1 / 18)
    with pytest.raises(TypeError, match="extensive_to_tensor_game"):
        from_open_spiel(pyspiel.load_game("kuhn_poker"))


# As differentiable games ----------------------------------------------------------------------------------------------


@given(with_profiles())
@settings(max_examples=25, deadline=None)
def test_losses_are_minus_expected_payoffs(drawn):
    game, profile = drawn
    logits = {name: p.log() for name, p in zip(game.names, profile)}
    simplex = dict(zip(game.names, profile))
    expected = game.expected(profile)
    for made, point in ((game.over_logits, logits), (game.over_simplex, simplex)):
        # A player alone with one action reaches nobody's loss, which a Game refuses.
        try:
            played = made()
        except (TypeError, ValueError):
            assert 1 in game.actions
            continue
        for i, name in enumerate(game.names):
            assert float(played.loss(name, point)) == pytest.approx(-float(expected[i]), abs=1e-12)
    assert all(torch.allclose(a, b) for a, b in zip(game.profile(logits), profile))


def in_other_units(game, factors, offsets):
    return FiniteGame(tuple(f * t + o for f, t, o in zip(factors, game.payoffs, offsets)), game.names)


def enumerated(game):
    """Gambit's own enumeration of the game as it is."""
    pygambit = pytest.importorskip("pygambit")
    found = pygambit.nash.enummixed_solve(to_pygambit(game)).equilibria
    return [torch.tensor([float(e[s]) for p in e.game.players for s in p.strategies], dtype=D) for e in found]


def same_set(found, wanted, atol):
    rows = [torch.cat(e.profile) for e in found]
    return len(rows) == len(wanted) and all(any(torch.allclose(r, w, rtol=0, atol=atol) for r in rows) for w in wanted)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "degenerate"), [(200, False), (20, True)])
def test_the_equilibria_are_those_of_an_exact_enumeration_in_any_units(count, degenerate):
    """Payoffs in other units than 1 have been rounded: to 1e-4 beside an offset of 1e12, in units of 1e9 to 1e-13."""
    generator = np.random.default_rng(7)
    for _ in range(count):
        shape = tuple(generator.integers(2, 4, 2))
        drawn = generator.integers(0, 3, (2, *shape)) if degenerate else generator.integers(-99, 100, (2, *shape))
        game = FiniteGame.of(*drawn.astype(float))
        wanted = enumerated(game)
        assert same_set(equilibria(game), wanted, 1e-12)
        assert same_set(equilibria(in_other_units(game, (1e9, 2.0**-30), (1e12, 0.0))), wanted, 1e-9)
        if not degenerate and len(wanted) % 2:  # an even number: two actions tie by chance
            assert same_set(equilibria(game, VertexEnumeration()), wanted, 1e-9)


@pytest.mark.parametrize("factors", [(1e9, 1e9), (1e-9, 1e-9), (1.0, 1e9), (1e-30, 1e30)])
@pytest.mark.parametrize("solver", [Gambit(), VertexEnumeration(), SupportEnumeration(), LemkeHowson()], ids=repr)
def test_units_do_not_matter(solver, factors):
    game = FiniteGame.of([[3, 0], [0, 2]], [[2, 0], [0, 3]])
    wanted = len(equilibria(game, solver))
    for offsets in ((0.0, 0.0), (1e12 * factors[0], -1e12 * factors[1])):
        other = in_other_units(game, factors, offsets)
        assert len(equilibria(other, solver)) == wanted == (1 if isinstance(solver, LemkeHowson) else 3)


def test_a_gain_is_judged_in_each_players_own_units():
    """Row plays wrongly, and loses a third of what it can have: nothing beside column's payoffs."""
    game = FiniteGame.of([[3, 0], [0, 2]], [[2e12, 0], [0, 3e12]])
    wrong = [torch.tensor([0.0, 1.0], dtype=D), torch.tensor([1.0, 0.0], dtype=D)]
    assert game.regrets(wrong).tolist() == [3.0, 3e12]

    class Wrong(Solver):
        def profiles(self, game):
            return [[game.uniform()[0], game.pure(0, 1)[1]]]

    warned = pytest.warns(bl.errors.NonConvergenceWarning, match="a player would gain 3.3e-01 of its payoffs' range")
    with warned, pytest.raises(bl.BilevelError):
        equilibria(game, Wrong())


def test_the_game_with_nine_equilibria():
    """McKelvey and McLennan 1997: three players with two actions each, where the quantal-response path ends nowhere."""
    pays = {(0, 0, 0): (9, 8, 12), (1, 1, 0): (9, 8, 2), (1, 0, 1): (3, 4, 6), (0, 1, 1): (3, 4, 4)}
    tables = np.zeros((3, 2, 2, 2))
    for profile, paid in pays.items():
        tables[(slice(None), *profile)] = paid
    game = FiniteGame.of(*tables)
    found = equilibria(game)
    assert len(found) == 9 and all(float(game.regrets(e.profile).max()) < 1e-9 for e in found)
    rows = torch.stack([torch.cat(e.profile) for e in found])
    assert float((rows[:, None] - rows[None]).abs().amax(-1).add(torch.eye(9)).min()) > 0.05


@pytest.mark.parametrize("factor", [1e-9, 1e-30, 1e9])
def test_a_commitment_and_a_value_in_any_units(factor):
    game = in_other_units(named.commitment(), (factor, 3.0 * factor), (0.0, 7.0 * factor))
    found = optimal_commitment(game)
    assert torch.allclose(found.strategy, torch.tensor([0.5, 0.5], dtype=D), atol=1e-6) and found.answer == 1
    assert float(found.payoffs[0]) == pytest.approx(3.5 * factor, rel=1e-6)
    zero_sum = in_other_units(named.biased_rock_paper_scissors(), (factor, factor), (factor, -factor))
    [value] = equilibria(zero_sum, LinearProgramme())
    assert torch.allclose(value.profile[0], torch.tensor([1.0, 10.0, 5.0], dtype=D) / 16.0, atol=1e-7)


def test_a_large_offset_makes_no_game_zero_sum():
    assert not in_other_units(named.battle_of_the_sexes(), (1.0, 1.0), (1e12, 1e12)).is_zero_sum
    assert in_other_units(named.matching_pennies(), (1.0, 1.0), (1e3, 5.0)).is_zero_sum


@pytest.mark.parametrize("make", [named.matching_pennies, named.biased_rock_paper_scissors, named.battle_of_the_sexes])
def test_an_equilibrium_in_which_everybody_plays_everything_is_certified_over_the_simplex(make):
    game = make()
    [inside] = [e for e in equilibria(game) if all(float(p.min()) > 0.0 for p in e.profile)]
    played, point = game.over_simplex(), dict(zip(game.names, inside.profile))
    found = bl.certify_nash(played, point)
    assert found.standing.value == "certified", str(found)
    # Nothing is gained along the simplex, off which the loss goes on as a constant.
    assert bl.exploitability(played, point, bounds=dict.fromkeys(game.names, (0.0, 1.0))).nash_conv <= 1e-12
    moved = point | {game.names[0]: game.pure(0, 0)[0]}
    assert bl.certify_nash(played, moved).standing.value == "refuted"


def test_entropy_makes_the_best_response_a_quantal_one():
    """softmax(deviations / entropy), by the implicit response, whose derivative is then the softmax's."""
    game = named.random_game((3, 4), seed=5)
    played = game.over_logits(entropy=0.5)
    x = torch.tensor([0.3, -0.4, 0.9], dtype=D, requires_grad=True)
    # Plain descent, since a search by the loss ends where rounding hides what it gains: 1e-8 of the gradient.
    descent = partial(torch.optim.SGD, lr=1.0, momentum=0.9)
    response = bl.Implicit(descent, steps=5000, tolerance=1e-8, linear_solver=bl.ConjugateGradient(rtol=1e-12))
    logits, _ = response(played, {"row": x}, response.init(played))
    pays = game.deviations([x.softmax(0), game.uniform()[1]], 1)
    wanted = (pays / 0.5).softmax(0)
    assert torch.allclose(logits.softmax(0), wanted, atol=1e-7)
    for i in range(4):
        [found] = torch.autograd.grad(logits.softmax(0)[i], x, retain_graph=True)
        [exact] = torch.autograd.grad(wanted[i], x, retain_graph=True)
        assert torch.allclose(found, exact, atol=1e-6)


def test_a_leader_against_a_nearly_rational_follower_comes_near_the_best_commitment():
    game = named.commitment()
    # Between equal logits the follower's gradient, to which tolerances are relative, is rounding or nothing.
    played = game.over_logits([torch.zeros(2, dtype=D), torch.tensor([0.0, 0.5], dtype=D)], entropy=0.02)
    follow = bl.Implicit(bl.Scipy("BFGS"), steps=500, tolerance=1e-5)
    solution = bl.solve(played, column=follow, optimizer=partial(torch.optim.Adam, lr=0.05), steps=300)
    row, column = game.profile(solution.variables)
    value = float(game.expected([row, column])[0])
    assert 3.3 < value < 3.5  # 3.5 is what commitment is worth, 2 what Nash pays
    assert float(row[0]) == pytest.approx(0.5, abs=0.06)


def test_searched_exploitability_stays_below_the_exact_one():
    game = named.random_game((3, 3), seed=2)
    start = [torch.tensor([0.5, -1.0, 0.2], dtype=D), torch.tensor([0.0, 0.3, -0.3], dtype=D)]
    found = bl.exploitability(game.over_logits(start), dict(zip(game.names, start)))
    exact = game.nash_conv([s.softmax(0) for s in start])
    # A pure best response lies at infinite logits: the search finds less, and nearly all.
    assert 0.9 * exact <= found.nash_conv <= exact + 1e-12


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FiniteGame.of([[1, 2]], [[1], [2]]), "one shape for all"),
        (lambda: FiniteGame.of([1, 2], [1, 2]), "one dimension for each player"),
        (lambda: FiniteGame.of([[1, float("nan")]], [[1, 2]]), "NaN or infinite"),
        (lambda: FiniteGame.of([[1, 2]], [[1, 2]], names=("a", "a")), "different Python identifiers"),
        (lambda: FiniteGame.symmetric([[1, 2]]), r"expected \[n, n\]"),
        (lambda: named.chicken().permuted((0, 0)), "expected each of 0 to 1"),
        (lambda: named.chicken().pure(0, 2), "below"),
        (lambda: named.chicken().nash_conv([torch.ones(2) / 2]), "1 strategies for 2 players"),
        (lambda: named.chicken().nash_conv([torch.ones(3) / 3] * 2), r"shape \[3\]; expected \[2\]"),
        (lambda: named.chicken().nash_conv([torch.ones(2)] * 2), "that sum to one"),
        (lambda: named.random_game((2, 2), correlation=-1.1), "zero-sum"),
        (lambda: named.chicken().over_logits(entropy=-1.0), "entropy=-1"),
    ],
)
def test_refusals_name_what_came(make, said):
    with pytest.raises(ValueError, match=said):
        make()

"""Rules of play inside the simplex: their guarantees, where they go, where they do not, resume."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from games.matrix import named
from games.matrix.learning import EntropicMirrorDescent, FictitiousPlay, RegretMatching, Replicator, learn

D = torch.float64
TILTED = [torch.tensor([0.5, 0.25, 0.25], dtype=D), torch.tensor([0.3, 0.3, 0.4], dtype=D)]
RULES = [
    RegretMatching(),
    RegretMatching(plus=True),
    FictitiousPlay(),
    EntropicMirrorDescent(0.1),
    EntropicMirrorDescent(0.1, optimistic=True),
    Replicator(0.1),
]


def kl(p, q):
    return float((p * (p / q).log()).sum())


@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(2, 4), st.integers(20, 200))
@settings(max_examples=20, deadline=None)
def test_average_play_is_within_its_guarantee_in_zero_sum_games(seed, m, n, rounds):
    game = named.random_game((m, n), seed=seed, correlation=-1.0)
    spread = max(float(t.max() - t.min()) for t in game.payoffs)
    most = max(m, n)
    for rule in (RegretMatching(), RegretMatching(plus=True)):
        found = learn(game, rule, rounds=rounds, every=rounds)
        assert found.average_nash_conv[-1] <= 2 * spread * math.sqrt(most / rounds)
    step = 0.1
    found = learn(game, EntropicMirrorDescent(step), rounds=rounds, every=rounds)
    assert found.average_nash_conv[-1] <= 2 * (math.log(most) / (step * rounds) + step * spread**2 / 8)


@pytest.mark.slow
def test_averages_converge_and_last_profiles_do_not():
    game = named.biased_rock_paper_scissors()
    for rule in (RegretMatching(plus=True), FictitiousPlay(), EntropicMirrorDescent(0.5), Replicator(1.0)):
        found = learn(game, rule, rounds=20_000, start=TILTED, every=20_000)
        assert found.average_nash_conv[-1] < 0.01, rule
        for average in found.average:
            assert torch.allclose(16 * average, torch.tensor([1.0, 10.0, 5.0], dtype=D), atol=0.8), rule
        assert found.nash_conv[-1] > 0.01, rule


@pytest.mark.slow
def test_the_optimistic_one_ends_at_the_equilibrium_itself():
    found = learn(
        named.biased_rock_paper_scissors(), EntropicMirrorDescent(1.0, optimistic=True), rounds=10_000, start=TILTED
    )
    assert found.nash_conv[-1] < 1e-10
    assert (16 * found.last[0]).tolist() == pytest.approx([1.0, 10.0, 5.0], abs=1e-6)


def test_mirror_descent_runs_away_and_replicator_circles():
    """Relative entropy to the equilibrium, summed over players: grows, and is kept."""
    game, centre = named.rock_paper_scissors(), torch.full((3,), 1 / 3, dtype=D)

    def distance(profile):
        return sum(kl(centre, p) for p in profile)

    away = learn(game, EntropicMirrorDescent(0.1), rounds=400, start=TILTED, every=1)
    distances = [distance([play[i] for play in away.play]) for i in range(400)]
    assert all(after > before for before, after in zip(distances, distances[1:]))
    around = learn(game, Replicator(0.05), rounds=2000, start=TILTED, every=1)
    # Fourth order: each round drifts by some .05 ** 5, and there are 2000.
    assert distance([play[-1] for play in around.play]) == pytest.approx(distance(TILTED), rel=2000 * 0.05**5)
    assert max(float((play - TILTED[0]).abs().max()) for play in around.play[:1]) > 0.1


def test_fictitious_play_never_settles_in_shapleys_game_and_does_in_a_dilemma():
    start = named.shapley().pure(0, 1)
    circling = learn(named.shapley(), FictitiousPlay(), rounds=4000, start=start, every=1)
    assert min(circling.average_nash_conv[1000:]) > 0.1
    settled = learn(named.prisoners_dilemma(), FictitiousPlay(), rounds=50)
    assert settled.nash_conv[-1] == 0.0


def test_three_players_play_too():
    found = learn(named.jordan(), RegretMatching(), rounds=200, start=named.jordan().pure(0, 0, 0), every=50)
    assert found.rounds == [50, 100, 150, 200]
    assert [len(play) for play in found.play] == [4, 4, 4]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_resumed_play_is_the_same_play(rule):
    game = named.random_game((3, 3), seed=3)
    whole = learn(game, rule, rounds=40, start=TILTED, every=5)
    half = learn(game, rule, rounds=20, start=TILTED, every=5)
    again = learn(game, rule, rounds=20, every=5, resume=half)
    assert again.rounds == whole.rounds
    assert again.nash_conv == whole.nash_conv
    assert again.average_nash_conv == whole.average_nash_conv
    assert all(torch.equal(a, b) for a, b in zip(again.last + again.average, whole.last + whole.average))


def test_refusals():
    with pytest.raises(ValueError, match="step_size=0"):
        EntropicMirrorDescent(0.0)
    with pytest.raises(ValueError, match="time_step=-1"):
        Replicator(-1.0)
    with pytest.raises(ValueError, match="rounds=0"):
        learn(named.chicken(), RegretMatching(), rounds=0)
    with pytest.raises(ValueError, match="sum to one"):
        learn(named.chicken(), RegretMatching(), start=[torch.ones(2), torch.ones(2)])

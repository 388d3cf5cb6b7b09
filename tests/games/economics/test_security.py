"""Security games: the closed form against linear programmes and brute force, the smooth one against the closed form."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import optim

import bilevel as bl
from games.economics.security import Security
from games.matrix.solvers import optimal_commitment

D = torch.float64
THREE = Security(prize=(5.0, 3.0, 2.0), caught=(-1.0, 0.0, 0.5), lost=(-6.0, -2.0, -1.0), saved=(1.0, 0.5, 0.0))


@st.composite
def security_games(draw, resources=None):
    count = draw(st.integers(2, 6))
    numbers = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    one, other, this, that = torch.randn(4, count, dtype=D, generator=numbers)
    guards = resources or draw(st.floats(0.1, 0.95 * count))
    high, low = torch.maximum(one, other), torch.minimum(one, other)
    lost, saved = torch.minimum(this, that), torch.maximum(this, that)
    return Security(*(tuple(part.tolist()) for part in (high, low, lost, saved)), resources=guards)


@given(security_games(resources=1.0))
@settings(max_examples=60, deadline=None)
def test_one_guard_is_the_best_commitment_of_the_finite_game(game):
    found, wanted = game.stackelberg(), optimal_commitment(game.finite())
    assert found.defender == pytest.approx(float(wanted.payoffs[0]), abs=1e-8)


@given(security_games())
@settings(max_examples=60, deadline=None)
def test_any_number_of_guards_against_a_linear_programme_for_each_target(game):
    """For each target: the best coverage that makes it the attacker's choice (Conitzer and Sandholm's programmes)."""
    from scipy.optimize import linprog

    found = game.stackelberg()
    assert float(found.coverage.sum()) <= game.resources + 1e-9
    assert 0.0 <= float(found.coverage.min()) <= float(found.coverage.max()) <= 1.0
    count, best = len(game.prize), -float("inf")
    zero, eye = torch.zeros(count, dtype=D), torch.eye(count, dtype=D)
    base, slope = game.attacker(zero), game.attacker(zero + 1.0) - game.attacker(zero)
    for i in range(count):
        worse = (slope[:, None] * eye - slope[i] * eye[i]).numpy()
        gain = float(game.defender(eye[i])[i] - game.defender(zero)[i])
        told = linprog(
            -gain * eye[i].numpy(),
            A_ub=[*worse, [1.0] * count],
            b_ub=[*(base[i] - base).tolist(), game.resources],
            bounds=(0, 1),
        )
        if told.status == 0:
            best = max(best, float(game.defender(zero)[i]) - told.fun)
    assert found.defender == pytest.approx(best, abs=1e-7)


@given(security_games(), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_coverage_spends_what_there_is_and_is_differentiable(game, seed):
    logits = torch.randn(len(game.prize), dtype=D, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    assert float(game.coverage(logits).detach().sum()) == pytest.approx(game.resources, abs=1e-9)
    assert torch.autograd.gradcheck(game.coverage, (logits,), eps=1e-6, atol=1e-6)


@pytest.mark.slow
def test_a_nearly_rational_attacker_leads_nearly_to_the_closed_form():
    exact, gaps = THREE.stackelberg(), []
    for precision in (5.0, 50.0):
        game = THREE.game(precision=precision)
        exactly = bl.ClosedForm(lambda coverage, p=precision: p * THREE.attacker(THREE.coverage(coverage)))
        response = bl.Implicit(exactly, tolerance=1e-6, linear_solver=bl.GMRES(rtol=1e-8))
        solution = bl.solve(game, attack=response, optimizer=partial(optim.Adam, lr=0.05), steps=200)
        coverage = THREE.coverage(solution.variables["coverage"])
        answer = solution.variables["attack"].softmax(0)
        assert torch.allclose(answer, (precision * THREE.attacker(coverage)).softmax(0), atol=1e-4)
        value = float(answer @ THREE.defender(coverage))
        assert value <= exact.defender + 1e-6  # who errs does not break ties for the defender
        gaps.append(exact.defender - value)
    assert gaps[1] < 0.3 * gaps[0]
    assert torch.allclose(coverage, exact.coverage, atol=0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prize": (5.0, 3.0)}, "payoffs of \\[2, 3\\] targets"),
        ({"prize": (-2.0, 3.0, 2.0)}, "prize > caught"),
        ({"saved": (1.0, 0.5, -1.0)}, "saved > lost"),
        ({"resources": 3.0}, "all be guarded"),
    ],
)
def test_refusals(change, said):
    given_ = {name: getattr(THREE, name) for name in ("prize", "caught", "lost", "saved", "resources")}
    with pytest.raises(ValueError, match=said):
        Security(**(given_ | change))
    with pytest.raises(ValueError, match="precision=0"):
        THREE.game(precision=0.0)
    with pytest.raises(ValueError, match="1 guard"):
        Security(**(given_ | {"resources": 2.0})).finite()

"""An estimate is held to the bias that it states: one-step differentiation, and truncated steps, which state none."""

from functools import partial

import pytest
import torch

import bilevel as bl
from bilevel.testing import Quadratic, check_hypergradient, check_response
from bilevel.testing.laws import ANSWERS, INVARIANCE, LAWS, REPORTS, STATE

from .one_step import OneStep, contraction

# The curvatures that the laws' games have (check_response says so); a step of size 1 leaves at most 0.83 there.
LEAST, LARGEST = 0.17, 1.1
ON_STATED = [law for law in LAWS if law.name == "stated bias"]
KNOWN = Quadratic(curvatures=(0.5, 1.0), coupling=((1.0,), (0.5,)), at=(0.5,), axis=(1.0, 0.5), target=(1.0, -1.0))


def test_the_jacobian_of_one_step_is_the_steps_own():
    # d (y - lr grad f) / dx at y* = lr H dy*/dx.
    game, lr, x = KNOWN.game(), 0.5, KNOWN.x0.clone().requires_grad_()
    response = OneStep(lr, contraction(lr, 0.5, 1.0))
    y, _ = response(game, {"x": x}, response.init(game))
    jacobian = torch.stack([torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in y])
    exact = KNOWN.jacobian(KNOWN.x0)
    torch.testing.assert_close(jacobian, lr * KNOWN.hessian(KNOWN.x0) @ exact)
    off = torch.linalg.matrix_norm(jacobian - exact, 2) / torch.linalg.matrix_norm(exact, 2)
    assert off <= response.promise.stated_bias


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_the_laws_hold_one_step_to_the_bias_that_it_states(lr):
    report = check_response(OneStep(lr, contraction(lr, LEAST, LARGEST)), examples=6)
    verdicts = {row.law: row.verdict for row in report.rows}
    held = {"exact", "exact, nested variables", "exact, float32", "stated bias", "nothing silent", "work"}
    held |= {"nothing mutated", "resume", "warm start", "vmap = loop", "chunks", "order of players"}
    assert {law for law in held if verdicts[law] != "holds"} == set(), str(report)
    assert verdicts["second derivative"] == verdicts["budget"] == "does not apply"


def test_a_bias_stated_too_small_is_caught_on_a_game_that_shows_it():
    report = check_response(OneStep(1.0, contraction(1.0, 0.5, 1.0)), laws=ON_STATED, examples=20, raises=False)
    (row,) = report.rows
    assert row.verdict == "fails" and "it states a bias of 0.5;" in row.note
    known = eval(row.game, vars(bl.testing))
    assert known.curvature(known.x0)[0] < 0.5


def test_a_bias_of_one_states_nothing():
    report = check_response(OneStep(1.0, 1.0), laws=ON_STATED, examples=2, raises=False)
    assert report.rows[0].verdict == "fails" and "a derivative of zero would meet" in report.rows[0].note


@pytest.mark.slow
def test_who_states_no_bias_and_reports_no_residual_is_not_held_to_the_exact_answer():
    truncated = bl.Unrolled(partial(torch.optim.SGD, lr=0.5), steps=50, backprop_steps=4)
    report = check_response(truncated, laws=(*ANSWERS, *REPORTS, *INVARIANCE, *STATE), examples=2)
    rows = {row.law: row for row in report.rows}
    for law in ("exact", "turned follower", "linear in the leader"):
        assert rows[law].verdict == "does not apply" and "states no bias" in rows[law].note
    for law in ("nothing mutated", "resume", "warm start", "vmap = loop", "chunks", "maximize", "work"):
        assert rows[law].verdict == "holds", str(report)


def test_a_wrong_hypergradient_is_told_with_the_bias_that_was_stated():
    check = check_hypergradient(KNOWN.game(), OneStep(0.5, contraction(0.5, 0.5, 1.0)))
    assert not check and any("states a bias of 0.75" in finding for finding in check.findings), str(check)

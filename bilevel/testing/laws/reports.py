"""Laws of what a response says of itself: its warnings, its stationarity, its stated bias and its work are true."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from bilevel.game import Game, Player
from bilevel.testing import strategies
from bilevel.testing.changes import FollowerCoordinate
from bilevel.testing.known import KnownGame
from bilevel.testing.laws.answers import require_converging
from bilevel.testing.laws.base import Law
from bilevel.testing.subject import NotOffered, ResponseSubject, Subject
from bilevel.testing.tolerance import exact, stated_error, tolerance


def nothing_silent(subject: Subject, known: KnownGame) -> None:
    """An answer that is badly wrong comes with a warning, and the stationarity that it reports is not flattered."""
    if not isinstance(subject, ResponseSubject):
        raise NotOffered("Only a response reports.")
    if not subject.adjustable:
        raise NotOffered("Its budget cannot be made too small.")
    truth, reports, slope = exact(known), False, torch.func.grad(known.follower, argnums=1)
    for steps in (1, 2, subject.enough):
        found = subject.evaluate(known, steps)
        if not math.isnan(found.stationarity):
            left, start = (float(slope(known.x0, y).norm()) for y in (found.follower, known.y0))
            # In units of the gradient at the start, or absolute for a follower that starts at its optimum.
            reported = found.stationarity * (start if start > 0.0 else 1.0)
            assert left <= 1.5 * reported + 1e-9, (
                f"after {steps} steps it reports a gradient of {reported:.3g}; it is {left:.3g}"
            )
            reports = True
        wrong = float((found.gradient - truth.gradient).norm() - stated_error(subject, truth)) / truth.scale
        if subject.response.behaviour.warns and not subject.of_steps and wrong > 0.5:
            assert found.warnings, f"after {steps} steps the hypergradient is wrong by {wrong:.0%}, and nothing warns"
    if not reports:
        raise NotOffered("It reports no stationarity.")


def bias_is_as_stated(subject: Subject, known: KnownGame) -> None:
    """The whole Jacobian of an estimate is wrong by no more than it states, and what it states says something."""
    stated = subject.promise.stated_bias
    if not stated > 0.0:
        raise NotOffered("It is no estimate with a stated bias.")
    assert stated < 1.0, f"it states a bias of {stated:.3g}, which a derivative of zero would meet; state NaN for none"
    steps, wanted = require_converging(subject), exact(known).jacobian
    rows, slack = [], 0.0
    for index in range(len(wanted)):
        row = FollowerCoordinate(known, index)
        found = subject.evaluate(row, steps)
        rows.append(found.gradient)
        slack += tolerance(row, subject, found, steps) ** 2
    size = float(torch.linalg.matrix_norm(wanted, 2))
    off = float(torch.linalg.matrix_norm(torch.stack(rows) - wanted, 2))
    assert off <= stated * size + math.sqrt(slack), (
        f"it states a bias of {stated:.3g}; its Jacobian is wrong by {off / size:.3g} of its size"
    )


def work_is_counted(subject: Subject, known: KnownGame) -> None:
    """Whenever the follower's loss is evaluated, a gradient or a product is counted."""
    if not isinstance(subject, ResponseSubject):
        raise NotOffered("Only a response counts its work.")
    evaluations = 0

    def counted(x: Tensor, y: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return known.follower(x, y)

    response = subject.with_steps(8)
    game = Game(x=Player(known.leader, known.x0), y=Player(counted, known.y0))
    state, x = response.init(game), known.x0.clone().requires_grad_()
    before, evaluations = response.report(state), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, after = response(game, {"x": x}, state)
        torch.autograd.backward(known.leader(x, y), inputs=[x])
    told = response.report(response.after_backward(after, y))
    work = told.gradients - before.gradients + told.products - before.products
    assert evaluations <= work, (
        f"a call and its backward pass evaluate the follower's loss {evaluations} times, and count {work} gradients "
        "and products"
    )


REPORTS = (
    Law("nothing silent", "wrong answers warn; reports are true", strategies.leader_follower, nothing_silent, 2.0),
    Law("stated bias", "the Jacobian is as good as stated", strategies.leader_follower, bias_is_as_stated),
    Law("work", "every evaluation is counted", strategies.leader_follower, work_is_counted, 0.5),
)

"""The Gauss-Newton matrix under the laws: a follower's parts are made for whatever game is drawn."""

from dataclasses import dataclass, replace
from functools import partial
from inspect import Parameter, Signature

import pytest
import torch

import bilevel as bl
from bilevel.responses import GaussNewton, Response
from bilevel.testing import check_response
from bilevel.testing.laws import LAWS
from bilevel.tree import leaves, map_leaves


def named(function, *names):
    """The function with these parameters, by which a game calls it."""
    function.__signature__ = Signature([Parameter(name, Parameter.KEYWORD_ONLY) for name in names])
    return function


@dataclass(frozen=True)
class InParts(Response):
    """`Implicit` with Gauss-Newton's matrix, where the outputs are a function of the variables, and the loss undoes it.

    Outputs are linear, or sinh(`bent` y) / `bent`. The loss is the player's own less `pushed` times the sum of its
    variables, which are the rest: so much is its slope in the outputs where the player rests.
    """

    implicit: bl.Implicit
    bent: float = 0.0
    pushed: float = 0.0

    def made(self, game, name):
        player, bent, pushed = game.players[name], self.bent, self.pushed

        def outputs(**given):
            return map_leaves(lambda leaf: torch.sinh(bent * leaf) / bent if bent else 2.0 * leaf, given[name])

        def loss(outputs, **given):
            own = map_leaves(lambda leaf: torch.asinh(bent * leaf) / bent if bent else leaf / 2.0, outputs)
            return player.objective(**given, **{name: own}) - rest(**{name: own})

        def rest(**given):
            return pushed * sum(leaf.sum() for leaf in leaves(given[name]))

        others = [other for other in player.names if other != name]
        parts = named(outputs, name), named(loss, "outputs", *others), named(rest, name)
        return replace(self.implicit, curvature=GaussNewton(*parts, bias=0.0))

    @property
    def promise(self):
        return bl.responses.Estimate(bl.responses.Optimum(), 0.0, "Gauss-Newton in place of the Hessian")

    @property
    def behaviour(self):
        return self.implicit.behaviour

    @property
    def budget(self):
        return self.implicit.budget

    def with_budget(self, steps):
        return replace(self, implicit=self.implicit.with_budget(steps))

    @property
    def inner_optimizer(self):
        return self.implicit.inner_optimizer

    def with_inner_optimizer(self, optimizer):
        return replace(self, implicit=self.implicit.with_inner_optimizer(optimizer))

    def init(self, game, *, follower=None, seed=0):
        name = game.names[-1] if follower is None else follower
        return self.made(game, name).init(game, follower=name, seed=seed)

    def __call__(self, game, others, state, batch=None):
        return self.made(game, state["follower"])(game, others, state, batch)

    def after_backward(self, state, answer):
        return self.implicit.after_backward(state, answer)

    def report(self, state):
        return self.implicit.report(state)


SGD = partial(torch.optim.SGD, lr=0.5)
LINEAR = InParts(bl.Implicit(SGD, steps=50, tolerance=1e-8))


@pytest.mark.slow
@pytest.mark.parametrize("bent", [0.0, 0.5])
def test_it_obeys_the_laws_where_the_loss_has_no_slope_in_bent_outputs(bent):
    # It leaves out the outputs' own curvature, times the loss's slope in them: linear ones have none, and where the
    # loss is all there is, its slope vanishes where the player rests.
    # These parts take plain tensors, no module and no joint player, and undo bent outputs only near 0.
    left_out = {"modules", "threads", "far start", "members", "dead demand"}
    report = check_response(
        replace(LINEAR, bent=bent), laws=[law for law in LAWS if law.name not in left_out], examples=5
    )
    verdicts = {row.law: row.verdict for row in report.rows}
    held = {"exact", "exact, nested variables", "exact, float32", "budget", "nothing silent", "work", "chunks"}
    held |= {"nothing mutated", "resume", "warm start", "order of players", "scalar = vector"}
    assert {law for law in held if verdicts[law] != "holds"} == set(), str(report)


def test_a_gradient_that_is_rounding_is_not_held_against_its_parts():
    # At the optimum of a float32 game both gradients are the rounding of a sum, and their difference is of their size.
    chosen = [law for law in LAWS if law.name == "exact, float32"]
    assert check_response(replace(LINEAR, bent=0.5), laws=chosen, examples=5)


def test_a_bias_of_0_is_caught_where_bent_outputs_have_a_slope():
    chosen = [law for law in LAWS if law.name == "exact"]
    report = check_response(replace(LINEAR, bent=0.5, pushed=0.5), laws=chosen, examples=10, raises=False)
    assert report.failures, str(report)

"""What a response says of itself to who may not know its class."""

from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam

import bilevel as bl
from bilevel.responses import Behaviour, Steps


class Bare(bl.Response):
    """Only what must be there."""

    @property
    def promise(self):
        return Steps()

    def init(self, game, *, follower=None, seed=0):
        return bl.extend.fresh_state(game, follower, seed)

    def __call__(self, game, others, state, batch=None):
        return state["variables"], state


def test_the_strategies_say_how_they_behave():
    optimizer = partial(SGD, lr=0.1)
    assert bl.Unrolled(optimizer).behaviour == Behaviour(warm=True)
    assert bl.Unrolled(optimizer, warm_start=False).behaviour == Behaviour()
    tight = bl.ConjugateGradient(rtol=1e-9)
    assert bl.Implicit(optimizer, linear_solver=tight).behaviour == Behaviour(warm=True, rtol=1e-9)
    loose = bl.Implicit(optimizer, tolerance=None, warm_start=False, linear_solver=bl.linear.Identity())
    assert loose.behaviour == Behaviour(warns=False)
    learned = bl.Hypernetwork(partial(Adam, lr=0.1), tolerance=None).behaviour
    assert learned == Behaviour(warm=True, random=True, steps_in_transforms=False, warns=False)


def test_another_inner_optimizer():
    slow, fast = partial(SGD, lr=0.1), partial(SGD, lr=0.5)
    for response in (bl.Unrolled(slow, steps=3), bl.Implicit(slow, steps=3)):
        other = response.with_inner_optimizer(fast)
        assert response.inner_optimizer is slow and other.inner_optimizer is fast and other.budget == 3
    assert bl.Implicit(bl.Scipy("L-BFGS-B")).inner_optimizer is None
    assert bl.Hypernetwork(partial(Adam, lr=0.1)).inner_optimizer is None


def test_what_a_response_does_not_offer_it_refuses_in_words():
    bare = Bare()
    assert bare.budget is None and bare.inner_optimizer is None and bare.behaviour == Behaviour()
    with pytest.raises(TypeError, match="Bare has no budget of steps to set"):
        bare.with_budget(3)
    with pytest.raises(TypeError, match="Bare has no torch.optim optimiser to replace"):
        bare.with_inner_optimizer(torch.optim.SGD)

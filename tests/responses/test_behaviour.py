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


POINT = torch.tensor([0.3, 0.2], dtype=torch.float64)
GAME = bl.Game(
    x=bl.Player(lambda y: y.square().sum(), POINT), y=bl.Player(lambda x, y: (y - x.sin()).square().sum(), POINT)
)
DESCENT = partial(SGD, lr=0.4)


@pytest.mark.parametrize(
    "response",
    [
        *(
            bl.Unrolled(DESCENT, steps=4, differentiation=how)
            for how in (bl.ReverseMode(), bl.ForwardMode(), bl.Segments())
        ),
        bl.Implicit(DESCENT),
        bl.Nudged(DESCENT),
        bl.SingleLoop(DESCENT),
        bl.Hypernetwork(partial(Adam, lr=0.1), tolerance=None),
    ],
)
@pytest.mark.parametrize("vectorize", [False, True])
def test_dual_numbers_outside_torch_func_are_refused(response, vectorize):
    state = response.init(GAME)

    def answer(x):
        return response(GAME, {"x": x}, state)[0]

    with pytest.raises(RuntimeError, match=r"variables of 'x' with tangents of torch.autograd.forward_ad"):
        if vectorize:
            torch.autograd.functional.jacobian(answer, POINT, vectorize=True, strategy="forward-mode")
        else:
            with torch.autograd.forward_ad.dual_level():
                answer(torch.autograd.forward_ad.make_dual(POINT, torch.ones_like(POINT)))


def test_a_jacobian_by_batched_backward_passes():
    response = bl.Nudged(DESCENT, steps=200, tolerance=1e-9)
    x = POINT.clone().requires_grad_()
    y, _ = response(GAME, {"x": x}, response.init(GAME))
    rows = torch.eye(2, dtype=torch.float64)
    (found,) = torch.autograd.grad(y, x, rows, is_grads_batched=True)
    # The loss is quadratic in y, so that the nudge's own error is 0; solves stop at 1e-9 of it.
    torch.testing.assert_close(found, torch.diag(POINT.cos()), rtol=0.0, atol=1e-6)


def test_a_single_loop_has_one_adjoint_for_batched_cotangents_as_well():
    response = bl.SingleLoop(DESCENT)
    x = POINT.clone().requires_grad_()
    y, _ = response(GAME, {"x": x}, response.init(GAME))
    with pytest.raises(ValueError, match="differentiated twice, with different cotangents"):
        torch.autograd.grad(y, x, torch.eye(2, dtype=torch.float64), is_grads_batched=True)


@pytest.mark.parametrize("response", [bl.Nudged(DESCENT), bl.SingleLoop(DESCENT), bl.responses.LastStep(DESCENT)])
def test_what_has_a_backward_pass_alone_says_so_in_forward_mode(response):
    state = response.init(GAME)
    with pytest.raises(RuntimeError, match=rf"^{type(response).__name__} .*in forward mode.*torch.func.vjp or jacrev"):
        torch.func.jacfwd(lambda x: response(GAME, {"x": x}, state)[0])(POINT)

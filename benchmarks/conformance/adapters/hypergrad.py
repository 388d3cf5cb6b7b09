"""hypergrad: `diff_sgd` is a differentiable step; `conjugate_gradient` the implicit hypergradient at an answer."""

from __future__ import annotations

import torch
from hypergrad.approx_hypergrad import conjugate_gradient
from hypergrad.optimizers import diff_sgd
from pytrees import slope
from translate import sgd_options

from bilevel.tree import detached, leaves, structure_of


def unrolled(leader, follower, x, y, *, optimizer, steps):
    """Unrolled: `diff_sgd`."""
    options = sgd_options(optimizer, "momentum", "dampening", "weight_decay", "nesterov")
    of_y, state = structure_of(y), None
    values = [leaf.requires_grad_() for leaf in leaves(detached(y))]
    for _ in range(steps):
        slopes = torch.autograd.grad(follower(x, of_y.build(values)), values, create_graph=True)
        values, state = diff_sgd(list(values), list(slopes), state, **{"momentum": 0, "weight_decay": 0, **options})
    return slope(leader(x, of_y.build(values)), x)


def implicit(leader, follower, x, y, *, optimizer, steps):
    """Implicit: a plain torch.optim loop, then `conjugate_gradient`; its solver base class detaches the leader."""
    of_x, of_y, at = structure_of(x), structure_of(y), tuple(leaves(detached(x)))
    values = tuple(leaf.requires_grad_() for leaf in leaves(detached(y)))
    inner = optimizer(values)
    for _ in range(steps):
        inner.zero_grad()
        follower(of_x.build(at), of_y.build(values)).backward()
        inner.step()
    slopes = conjugate_gradient(
        lambda i, o: follower(of_x.build(o), of_y.build(i)),
        lambda i, o: leader(of_x.build(o), of_y.build(i)),
        tuple(leaf.detach() for leaf in values),
        at,
        num_iters=min(50, sum(leaf.numel() for leaf in values)),  # it has no tolerance; once solved it divides 0 by 0
        lr=1.0,
    )
    return of_x.build(slopes)

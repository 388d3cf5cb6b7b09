"""TorchOpt: `MetaSGD` differentiates through steps; `custom_root` and its module form, the optimum."""

from __future__ import annotations

import torch
import torchopt
from pytrees import Holder, slope
from translate import sgd_options

from bilevel.tree import leaves, structure_of

SOLVE = torchopt.linear_solve.solve_cg(rtol=1e-10)  # at most 10 steps an entry, its own default


def meta_sgd(leader, follower, x, y, *, optimizer, steps):
    """Unrolled: `torchopt.MetaSGD` on a module."""
    options = sgd_options(optimizer, "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    net = Holder(y)
    inner = torchopt.MetaSGD(net, **options)
    for _ in range(steps):
        inner.step(follower(x, net()))
    return slope(leader(x, net()), x)


def custom_root(leader, follower, x, y, *, optimizer, steps):
    """Implicit: `torchopt.diff.implicit.custom_root` around a plain torch.optim loop."""
    of_x, of_y = structure_of(x), structure_of(y)

    def objective(y, x):
        return follower(of_x.build(x), of_y.build(y))

    @torchopt.diff.implicit.custom_root(torch.func.grad(objective), argnums=1, solve=SOLVE)
    def solve(y, x):
        y = tuple(leaf.detach().clone().requires_grad_() for leaf in y)
        inner = optimizer(y)
        with torch.enable_grad():
            for _ in range(steps):
                inner.zero_grad()
                objective(y, x).backward(inputs=y)
                inner.step()
        return tuple(leaf.detach() for leaf in y)

    return slope(leader(x, of_y.build(solve(tuple(leaves(y)), tuple(leaves(x))))), x)


class Follower(torchopt.nn.ImplicitMetaGradientModule, linear_solve=SOLVE):
    """The follower as a module with the leader's variables as its meta-parameters."""

    def __init__(self, follower, x, y, *leader_leaves):
        super().__init__()
        self.follower, self.of_x, self.of_y = follower, structure_of(x), structure_of(y)
        for i, leaf in enumerate(leader_leaves):
            self.register_meta_parameter(f"x{i}", leaf)
        for i, leaf in enumerate(leaves(y)):
            self.register_parameter(f"y{i}", torch.nn.Parameter(leaf.detach().clone()))

    def variables(self):
        """The follower's pytree."""
        return self.of_y.build([getattr(self, f"y{i}") for i in range(len(self.of_y.shapes))])

    def objective(self, optimizer, steps):
        """The follower's loss."""
        x = self.of_x.build([getattr(self, f"x{i}") for i in range(len(self.of_x.shapes))])
        return self.follower(x, self.variables())

    def solve(self, optimizer, steps):
        """A plain torch.optim loop."""
        parameters = tuple(self.parameters())
        inner = optimizer(parameters)
        with torch.enable_grad():
            for _ in range(steps):
                inner.zero_grad()
                self.objective(optimizer, steps).backward(inputs=parameters)
                inner.step()
        return self


def implicit_module(leader, follower, x, y, *, optimizer, steps):
    """Implicit: a `torchopt.nn.ImplicitMetaGradientModule`."""
    net = Follower(follower, x, y, *leaves(x))
    net.solve(optimizer, steps)
    return slope(leader(x, net.variables()), x)

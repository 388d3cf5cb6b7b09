"""A response of one's own, an estimate with a stated bias: one-step differentiation."""

from dataclasses import dataclass, field, replace

import torch

import bilevel as bl
from bilevel.responses import Behaviour, Estimate, Optimum
from bilevel.tree import map_leaves

SOLVER = bl.Implicit(bl.Scipy("L-BFGS-B"), steps=50, tolerance=1e-5)


def contraction(lr: float, least: float, largest: float) -> float:
    """How far apart two points are after a gradient step, over before; curvatures lie from `least` to `largest`."""
    return max(abs(1.0 - lr * least), abs(1.0 - lr * largest))


@dataclass(frozen=True)
class OneStep(bl.Response):
    """The follower is solved without a graph; one gradient step from there, which goes nowhere, is differentiated.

        y = y* - lr grad_y f(x, y*),    J = -lr grad_yx f = lr H dy*/dx,    |J - dy*/dx| <= rho |dy*/dx|

    rho = |I - lr H| is the step's contraction, which the user knows and states.
    Source: Bolte, Pauwels, Vaiter 2023 (arXiv 2305.13768).
    """

    lr: float
    rho: float
    solver: bl.Response = field(default=SOLVER)

    @property
    def promise(self):
        return Estimate(Optimum(), bias=self.rho, reason="one step is differentiated, a contraction by rho")

    @property
    def behaviour(self):
        return Behaviour(warm=True)

    @property
    def budget(self):
        return self.solver.budget

    def with_budget(self, steps):
        return replace(self, solver=self.solver.with_budget(steps))

    def init(self, game, *, follower=None, seed=0):
        return self.solver.init(game, follower=follower, seed=seed)

    def __call__(self, game, others, state, batch=None):
        name = state["follower"]
        with torch.no_grad():
            y, after = self.solver(game, others, state, batch)
        y = map_leaves(torch.Tensor.detach, y)
        if batch is None:
            batch, _ = game.draw(name, state["data"])
        slope = torch.func.grad(lambda y: game.loss(name, {**others, name: y}, batch))(y)
        moved = map_leaves(lambda leaf, g: leaf - self.lr * g, y, slope)
        # Inside a transform the state comes back as it was, and stays so.
        return moved, after if after is state else after | {"gradients": after["gradients"] + 1}

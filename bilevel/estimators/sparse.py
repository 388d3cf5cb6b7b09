"""Elastic nets in many folds at once: Newton's method on the support, and a search for the signs where that fails."""

from __future__ import annotations

import torch
from torch import Tensor

from bilevel.errors import ConvergenceError
from bilevel.estimators.newton import Table


def fitted_sparse(
    table: Table, counts: Tensor, squares: Tensor, lasso: Tensor, start: Tensor, *, steps: int = 1000
) -> tuple[Tensor, Tensor]:
    """Where each block's squared error with both penalties is least, `[blocks, q, 1]`, and its Hessian.

    `counts: [blocks, n]` say how often a block counts each row; `squares` and `lasso: [blocks, q]` are the penalties of
    its weights. The Hessian `[blocks, q, q]` is that of the smooth part. Weights that are out are 0 exactly. Raises
    `ConvergenceError` where the optimum is not found to rounding.

    The support is guessed from where one step for each weight by itself would end, and the weights on it are solved
    for; where that does not lower the loss, a search for the signs (Lee et al. 2006) does. Coordinate descent would
    take very many steps where columns outnumber rows and penalties are small.
    """
    x = table.inputs
    matrices = (x.mT[None] * counts[:, None]) @ x
    matrices.diagonal(dim1=1, dim2=2).add_(squares)
    wanted = (x.mT @ (counts[..., None] * table.targets))[..., 0]
    found = start[..., 0].clone()
    open_ = torch.arange(len(found))
    for _ in range(steps):
        some = _Blocks(matrices[open_], wanted[open_], lasso[open_])
        w = found[open_]
        left = some.at_rest(w)
        going = left > 1e-11 * some.size
        if not bool(going.any()):
            return found[..., None], matrices
        open_, some, w = open_[going], some.of(going), w[going]
        ahead = some.solved(w)
        worse = ~(some.loss(ahead) < some.loss(w))  # NaN as well
        # At the end of the road rounding hides what a step gains; then what counts is how little is left.
        worse &= ~(some.at_rest(ahead) <= 1e-11 * some.size)
        if bool(worse.any()):
            ahead[worse] = some.of(worse).with_signs(w[worse])
        found[open_] = ahead
    raise ConvergenceError(
        f"An elastic net did not reach its optimum in {steps} steps: {float((left / some.size).max()):.2g} is left."
    )


class _Blocks:
    """min w' A w / 2 - b' w + sum_j l_j |w_j| for each block: `[blocks, q, q]`, `[blocks, q]`, `[blocks, q]`."""

    def __init__(self, a: Tensor, b: Tensor, l: Tensor) -> None:
        self.a, self.b, self.l = a, b, l
        self.d = a.diagonal(dim1=1, dim2=2)
        # In units of the slope at 0; a block without any is told in those of its penalties.
        self.size = (b.abs() + l).amax(1).clamp(min=torch.finfo(b.dtype).tiny)

    def of(self, some: Tensor) -> _Blocks:
        return _Blocks(self.a[some], self.b[some], self.l[some])

    def slope(self, w: Tensor) -> Tensor:
        return (self.a @ w[..., None])[..., 0] - self.b

    def loss(self, w: Tensor) -> Tensor:
        value: Tensor = (w * (0.5 * (self.slope(w) - self.b) + self.l * w.sign())).sum(1)
        return value

    def at_rest(self, w: Tensor) -> Tensor:
        """The largest slope that no subgradient of the absolute values meets, `[blocks]`."""
        slope = self.slope(w)
        out = (slope.abs() - self.l).clamp(min=0.0)
        return torch.where(w == 0.0, out, (slope + self.l * w.sign()).abs()).amax(1)

    def solved(self, w: Tensor) -> Tensor:
        z = self.d * w - self.slope(w)
        inside = z.abs() > self.l
        both = inside[:, :, None] & inside[:, None, :]
        system = torch.where(both, self.a, torch.diag_embed((~inside).to(w)))
        wanted = torch.where(inside, self.b - self.l * z.sign(), 0.0)
        found: Tensor = torch.linalg.solve(system, wanted)
        return found

    def with_signs(self, w: Tensor) -> Tensor:
        """One step for weights of given signs: to where the loss is least, or where the first gains by a change."""
        slope, sign = self.slope(w), w.sign()
        rest = torch.where(sign == 0.0, 0.0, (slope + self.l * sign).abs()).amax(1)
        outside, entering = torch.where(sign == 0.0, slope.abs() - self.l, -1.0).max(1)
        # One more weight, the one that gains most, once those that are in have come to rest.
        enters = (outside > 0.0) & (rest <= 1e-3 * outside)
        sign[enters, entering[enters]] = -slope[enters, entering[enters]].sign()
        inside = sign != 0.0
        both = inside[:, :, None] & inside[:, None, :]
        system = torch.where(both, self.a, torch.diag_embed((~inside).to(w)))
        goal = torch.linalg.solve(system, torch.where(inside, self.b - self.l * sign, 0.0))
        # Where a weight changes its sign on the way it is 0; the loss is compared at all these places and at the goal.
        crossed = (w * goal < 0.0) | ((w == 0.0) & (sign * goal < 0.0))
        share = torch.where(crossed, w / (w - goal), 1.0)
        shares = torch.cat([share, torch.ones_like(share[:, :1])], 1)
        places = w[:, None] + shares[..., None] * (goal - w)[:, None]
        places = torch.where(crossed[:, None] & (share[:, None] == shares[..., None]), 0.0, places)
        losses = torch.stack([self.loss(place) for place in places.unbind(1)], 1)
        return places[torch.arange(len(w)), losses.argmin(1)]

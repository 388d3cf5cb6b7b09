"""A follower at a kink: its derivative is one of two, and the backward pass says both."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from bilevel._root import attach
from bilevel.errors import BilevelError, KinkWarning
from bilevel.game import Follower
from bilevel.game.residual import Rest
from bilevel.linear import LinearSolver
from bilevel.responses.batches import FixedResidual
from bilevel.tree import named_leaves

_SHOWN = 6


def kink_of(follower: Follower, rest: Rest) -> str:
    """Where the kink is, in words."""
    return (
        f"Player {follower.name!r} is at a kink: {rest.kink} is about to bind or to let go, so that its optimum has "
        "two one-sided derivatives here."
    )


def tell_of_kink(
    attached: Tensor, rest: Rest, follower: Follower, residual: FixedResidual, linear_solver: LinearSolver
) -> None:
    """Let the backward pass through `attached: [n]` warn of the kink with both derivatives, where they differ."""
    other = rest.other_side
    assert other is not None
    xs = [x.detach() for x in follower.xs]
    moving = [index for index, x in enumerate(follower.xs) if x.requires_grad]
    paths = [f"{name}{path}" for name, tree in follower.inputs.items() for path, _ in named_leaves(tree)]

    def side(unknowns: Tensor, cotangent: Tensor) -> list[Tensor]:
        given = [x.clone().requires_grad_(index in moving) for index, x in enumerate(xs)]
        with torch.enable_grad():
            y = attach(
                residual,
                unknowns,
                given,
                linear_solver=follower.adapted_linear(linear_solver),
                symmetric=follower.symmetric,
                shapes=follower.unknowns.shapes,
            )
        return list(torch.autograd.grad(y, [given[i] for i in moving], cotangent))

    def tell(cotangent: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                sides = [side(unknowns, cotangent.detach()) for unknowns in (rest.unknowns, other)]
            except BilevelError as error:
                told = f"The derivative on the other side could not be had: {error}"
                sides = []
        if sides:
            gap = max(float((a - b).abs().max()) for a, b in zip(*sides, strict=True))
            size = max(float(t.abs().max()) for one in sides for t in one)
            if gap <= 1e-6 * size:
                return  # whoever asks does not see the kink
            here, there = ("; ".join(_shown(paths[i], t) for i, t in zip(moving, one, strict=True)) for one in sides)
            told = f"The gradient through it is {here} on the side that was taken, and {there} on the other."
        text = f"{kink_of(follower, rest)} {told} Move the leader off this point, or smooth the constraint."
        warnings.warn(KinkWarning(text, games=rest.games), stacklevel=2)

    attached.register_hook(tell)  # type: ignore[no-untyped-call]


def _shown(path: str, slope: Tensor) -> str:
    flat = slope.reshape(-1)
    if flat.numel() > _SHOWN:
        return f"d/d {path}: norm {float(flat.norm()):.4g}"
    values = ", ".join(f"{value:.4g}" for value in flat.tolist())
    return f"d/d {path} = {values if slope.ndim == 0 else f'[{values}]'}"

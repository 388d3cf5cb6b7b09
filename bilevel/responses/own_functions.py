"""What a response does where autograd functions of the user's give a gradient that is not the derivative of a value."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.autodiff import gradient, pullback, transforms_active
from bilevel.custom_functions import Slopes, judged
from bilevel.errors import NotSymmetricError, UnreliableResponseWarning
from bilevel.game import Follower
from bilevel.randomness import random_kept, random_state

_WIDTH = 1e-3  # of a difference, relative to an entry's size


def warn_of_second(start: Follower, y: Tensor) -> None:
    """Warn where PyTorch's derivative of a follower's own gradient F is not that of F.

    So it is behind a gradient reversal: a second derivative takes its backward pass for the derivative of its values
    once more. Costs nothing without such a function, else some 30 evaluations of F.
    """
    if not _reversed(start) or not start.rests.curves_loss:
        return
    residual, generator = start.held_residual(), torch.Generator().manual_seed(0)
    weights = _noise(y, generator)

    def number(point: Sequence[Tensor], along: Sequence[Tensor] | None) -> tuple[Tensor, float]:
        if along is None:
            with torch.no_grad():
                return weights @ residual(*point), 0.0
        value, products = pullback(residual, *point)
        with torch.no_grad():
            pulled = products(weights)
        return weights @ value.detach(), float(sum((p * d).sum() for p, d in zip(pulled, along, strict=True)))

    found = _measured(start, number, [y, *(x.detach() for x in start.xs)], generator)
    if found is not None:
        _warn(
            start,
            f"PyTorch's derivative of the player's gradient is then {found.claimed:.3g} along a direction, and "
            f"differences of that gradient say {found.differences:.3g}: hypergradients are wrong by as much.",
        )


def warn_of_first(asker: str, start: Follower, y: Tensor) -> None:
    """Warn where a follower's gradient in its own variables and in its leaders' are not those of one function.

    Who learns how the answer moves from the leaders' gradients goes by that. Costs nothing without such an autograd
    function, else some 60 gradients.
    """
    if not _reversed(start):
        return
    loss, generator = start.held_loss(), torch.Generator().manual_seed(0)
    point = [y, *(x.detach() for x in start.xs)]
    other = [_noise(t, generator) * _size(t) for t in point]

    def along(at: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        with torch.no_grad():
            _, slopes = gradient(loss, *at)
        return torch.stack([(s * w).sum() for s, w in zip(slopes, weights, strict=True)]).sum()

    def number(at: Sequence[Tensor], direction: Sequence[Tensor] | None) -> tuple[Tensor, float]:
        value = along(at, other)
        if direction is None:
            return value, 0.0
        ends = [
            float(along([t + sign * _WIDTH * o for t, o in zip(at, other, strict=True)], direction))
            for sign in (1.0, -1.0)
        ]
        return value, (ends[0] - ends[1]) / (2.0 * _WIDTH)

    found = _measured(start, number, point, generator)
    if found is not None:
        _warn(
            start,
            f"{asker} takes the player's gradient and its leaders' for those of one function, and they are not: how "
            f"the one moves with the other along two directions is {found.claimed:.3g} and {found.differences:.3g}. "
            "Hypergradients are wrong by as much.",
        )


def require_symmetric(asker: str, start: Follower, y: Tensor) -> None:
    """Raise `NotSymmetricError` where autograd functions of the user's make dF/dy unsymmetric.

    The gradient of a loss has a symmetric derivative; what a backward pass gives in its place need not have. Costs
    nothing without such functions, else an evaluation of F and two products.
    """
    names = start.game.own_functions(start.name).names
    if not names or transforms_active() or not start.rests.curves_loss:
        return
    residual, generator = start.held_residual(), torch.Generator().manual_seed(0)
    _, products = pullback(lambda y: residual(y, *(x.detach() for x in start.xs)), y)
    one, other = _noise(y, generator), _noise(y, generator)
    with torch.no_grad():
        first, second = products(one)[0], products(other)[0]
    there, back = float(first @ other), float(second @ one)
    size = float(first.norm() * other.norm() + second.norm() * one.norm())
    # Rounding of the products themselves, which are sums over a whole network.
    if abs(there - back) > 1e3 * torch.finfo(y.dtype).eps * size:
        raise NotSymmetricError(
            f"{asker}: the Jacobian of the gradient of player {start.name!r} is not symmetric: along two directions it "
            f"is {there:.4g}, and transposed {back:.4g}. The backward of an autograd function in its loss "
            f"({', '.join(names)}) is not the derivative of one function. Use linear_solver=GMRES(), or Dense() for a "
            "few hundred unknowns."
        )


def _reversed(start: Follower) -> bool:
    return bool(start.game.own_functions(start.name).first) and not transforms_active()


def _measured(start: Follower, number: object, point: list[Tensor], generator: torch.Generator) -> Slopes | None:
    """Two slopes that should be one and are not, at two points beside this one; None where they are, or may be."""
    wrong: list[Slopes] = []
    with random_kept(start.game.device, start=random_state(start.game.device)):
        for _ in range(2):
            beside = [t + 0.05 * _size(t) * _noise(t, generator) for t in point]
            along = [_size(t) * _noise(t, generator) for t in point]
            steps = (1e-2, 1e-3, 1e-4) if point[0].dtype == torch.float64 else (1e-1, 3e-2, 1e-2)
            verdict, slopes = judged(number, beside, along, steps)  # type: ignore[arg-type]
            if verdict == "wrong":
                wrong.append(slopes)
    return wrong[0] if len(wrong) == 2 else None


def _warn(start: Follower, what: str) -> None:
    found = start.game.own_functions(start.name).first
    name, slopes = next(iter(found.items()))
    warnings.warn(
        UnreliableResponseWarning(
            f"Player {start.name!r}: the backward of the autograd function {name} is not the derivative of its forward "
            f"({slopes}), as of a gradient reversal or a clipped gradient. {what} Without such a "
            "function: make two players of it, who answer together with a loss each, game.joined(...); a clip of the "
            "steps belongs to the optimiser, TorchOptimizer(..., clip_norm=)."
        ),
        stacklevel=4,
    )


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tuple(like.shape), generator=generator, dtype=torch.float64).to(like)


def _size(tensor: Tensor) -> Tensor:
    usual = float(tensor.detach().double().square().mean().sqrt()) or 1.0
    return tensor.abs().clamp(min=0.1 * usual)

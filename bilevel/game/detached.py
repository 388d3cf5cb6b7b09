"""Whether autograd sees all of a residual's derivative, or a part of it was detached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from bilevel.sharding.tensor import noise_like
from bilevel.tree import Variables, leaves, structure_of

Point = Mapping[str, Variables]


def refuse_detached(name: str, residual: Callable[[Point], Sequence[Tensor]], start: Point) -> None:
    r"""Raise `ValueError` where differences of a player's residual say otherwise than autograd.

    Compared are $\partial_d\, r^\top F$ along one random direction of the player's own variables, and along one of
    everybody else's, for a random r. It costs nine evaluations of F. A difference counts where two widths agree on it,
    as they do away from kinks and jumps; a derivative of less than a twentieth is not missed.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(leaf: Tensor) -> Tensor:
        return noise_like(leaf, generator)

    # A little way off: players like to start at a bound, where F has a kink.
    place = {n: [t.detach() + 1e-2 * (1.0 + t.detach().abs()) * drawn(t) for t in leaves(v)] for n, v in start.items()}
    forms = {n: structure_of(v) for n, v in start.items()}
    weights = [drawn(leaf) for leaf in place[name]]

    def weighed(point: Mapping[str, Sequence[Tensor]]) -> Tensor:
        found = residual({n: forms[n].build(point[n]) for n in forms})
        return torch.stack([torch.sum(w * value) for w, value in zip(weights, found, strict=True)]).sum()

    tracked = {n: [t.clone().requires_grad_() for t in v] for n, v in place.items()}
    value = weighed(tracked)
    size_of_value = abs(float(value.detach()))
    every = [t for v in tracked.values() for t in v]
    found = iter(torch.autograd.grad(value, every, allow_unused=True, materialize_grads=True))
    slopes = {n: [next(found) for _ in v] for n, v in tracked.items()}
    eps = torch.finfo(value.dtype).eps
    for movers in ([name], [n for n in start if n != name]):
        directions = {n: [drawn(t) for t in place[n]] for n in movers}
        if not directions:
            continue
        claimed = sum(float(torch.sum(s * d)) for n in movers for s, d in zip(slopes[n], directions[n], strict=True))

        def difference(width: float, directions: Mapping[str, Sequence[Tensor]] = directions) -> float:
            def at(step: float) -> float:
                moved = {n: [t + step * d for t, d in zip(place[n], ds, strict=True)] for n, ds in directions.items()}
                return float(weighed({**place, **moved}).detach())

            return (at(width) - at(-width)) / (2.0 * width)

        # Rounding leaves eps |r'F| / width of a difference, and curvature width^2: both eps^(2/3).
        width = eps ** (1 / 3)
        wide, narrow = difference(width), difference(width / 4)
        size = max(abs(narrow), abs(claimed))
        sure = abs(wide - narrow) <= eps**0.25 * size and size > 1e3 * eps * size_of_value / width
        if sure and abs(narrow - claimed) > 0.05 * size:
            whose = f"its own variables, {name!r}" if movers == [name] else f"the variables of {movers}"
            raise ValueError(
                f"Player {name!r}: along a direction of {whose}, its residual moves by {claimed:.3g} by autograd "
                f"and by {narrow:.3g} by differences: a part of its derivative is lost, and every hypergradient would "
                "be wrong. Use the arguments themselves, without .detach(), .data, torch.no_grad() or numbers made of "
                "them."
            )

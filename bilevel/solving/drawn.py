"""Where a leader may start: points drawn uniformly from its set or its range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bilevel.constraints import Ball, ConstraintSet, Coordinate, Log, Product, Simplex
from bilevel.game import Game
from bilevel.tree import Structure, Variables, flatten, leaves, structure_of

Start = Mapping[str, Variables]
"""Leader -> where it starts."""


def starts_of(
    game: Game, leading: Sequence[str], starts: int | Sequence[Start], seed: int
) -> list[dict[str, Variables]]:
    """Where the leaders start, each time: as given; or from where the game starts, and then as drawn.

    Raises `ValueError` or `TypeError` for starts that do not fit the game, and for leaders without a bounded set.
    """
    if isinstance(starts, int) and not isinstance(starts, bool):
        if starts < 1:
            raise ValueError(f"solve: starts={starts}; expected at least 1.")
        generator = torch.Generator().manual_seed(seed)
        own = {name: game.initial(name) for name in leading}
        return [own, *({n: _drawn(game, n, generator) for n in leading} for _ in range(starts - 1))]
    if not isinstance(starts, Sequence) or not starts or not all(isinstance(start, Mapping) for start in starts):
        raise TypeError(
            f'solve: starts={starts!r}; expected a number, or a list of starts, [{{"{leading[0]}": tensor}}, ...].'
        )
    for place, start in enumerate(starts):
        unknown = [name for name in start if name not in leading]
        if unknown:
            raise ValueError(f"solve: starts[{place}] names {unknown}; the leaders are {list(leading)}.")
    return [dict(start) for start in starts]


def _drawn(game: Game, name: str, generator: torch.Generator) -> Variables:
    """A leader's variables; drawn in float64 on the CPU, so that a seed is the same start everywhere."""
    like, ranges, domain = game.initial(name), game.coordinates(name), game.players[name].domain
    form = structure_of(like)
    if any(ranges):
        pairs = zip(leaves(like), ranges, strict=True)
        found = [_in_range(name, leaf, chosen, generator) for leaf, chosen in pairs]
        return form.build(found)
    if domain is None:
        raise ValueError(_unbounded(name, "no domain"))
    return _within(name, domain, like, form, generator)


def _within(
    name: str, domain: ConstraintSet, like: Variables, form: Structure, generator: torch.Generator
) -> Variables:
    if isinstance(domain, Product):
        found = {}
        for key, part in domain.items:
            if part is None:
                raise ValueError(_unbounded(name, f"no bound on {key!r}"))
            found[key] = _within(name, part, like[key], structure_of(like[key]), generator)
        return [found[key] for key in range(len(found))] if isinstance(like, list | tuple) else found
    limits = domain.limits(like)
    if limits is not None:
        parts = []
        for leaf, low, high in zip(leaves(like), *limits, strict=True):
            if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
                raise ValueError(_unbounded(name, repr(domain)))
            parts.append((low + (high - low) * _uniform(leaf, generator).to(leaf)).clamp(low, high))
        return form.build(parts)
    if isinstance(domain, Simplex) and not callable(domain.total):
        shares = [-_uniform(leaf, generator).log() for leaf in leaves(like)]
        pairs = zip(shares, leaves(like), strict=True)
        return domain.project(form.build([(s / s.sum(-1, keepdim=True) * domain.total).to(leaf) for s, leaf in pairs]))
    if isinstance(domain, Ball) and not callable(domain.radius):
        flat = flatten(like)
        size = len(flat)
        if domain.p == 2.0:
            way = torch.randn(size, generator=generator, dtype=torch.float64)
            far = way / way.norm() * _uniform(flat[:1], generator) ** (1.0 / size)
        else:  # the first n of n + 1 exponentials, as shares of their sum, with signs
            lengths = -_uniform(torch.empty(size + 1), generator).log()
            signs = torch.where(_uniform(flat, generator) < 0.5, -1.0, 1.0)
            far = signs * lengths[:size] / lengths.sum()
        return domain.project(form.unflatten((far * domain.radius).to(flat)))
    raise ValueError(_unbounded(name, repr(domain)))


def _in_range(name: str, leaf: Tensor, chosen: Coordinate | None, generator: torch.Generator) -> Tensor:
    if chosen is None or not math.isfinite(chosen.range[1]):
        raise ValueError(_unbounded(name, "no range of finite ends" if chosen is None else repr(chosen)))
    low, high = chosen.range
    share = _uniform(leaf, generator)
    if isinstance(chosen, Log):
        return (math.log(low) + share * (math.log(high) - math.log(low))).exp().to(leaf)
    return (low + share * (high - low)).to(leaf)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers above 0 and below 1, in float64."""
    return torch.rand(like.shape, generator=generator, dtype=torch.float64).clamp(1e-6, 1.0 - 1e-6)


def _unbounded(name: str, what: str) -> str:
    return (
        f"solve: starts are drawn uniformly from the leader's set, and {name!r} has {what}. Give it "
        f'bilevel.Box(low, high) with finite ends, or the starts themselves: starts=[{{"{name}": tensor}}, ...].'
    )

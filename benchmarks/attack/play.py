"""A drawn pair of losses as a game of the library, and hypergradients of it as users take them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.attack.draw import NAMES, Draw, Layout, named
from benchmarks.attack.truth import Pair


@dataclass
class Written:
    """A game, and how its variables are written."""

    pair: Pair
    game: Any
    leaders: list[str]
    follower: str
    leads: list[Layout]
    follows: Layout
    sizes: list[int]

    def x(self, values: Mapping[str, Any]) -> Tensor:
        """The leaders as `[nx]`."""
        return torch.cat([lay.flat(values[name]) for name, lay in zip(self.leaders, self.leads, strict=True)])

    def y(self, value: Any) -> Tensor:
        """The follower as `[m]`, float64."""
        return self.follows.flat(value).detach().double()

    def told(self) -> dict[str, Any]:
        """For the record."""
        forms = {"names": [*self.leaders, self.follower], "forms": [lay.kind for lay in (*self.leads, self.follows)]}
        return self.pair.told() | forms | {"dtype": str(self.pair.dtype)}


def write(
    draw: Draw, pair: Pair, *, data: Any = None, leaders: int = 1, batched: bool = False, forms: Sequence[str] = (),
    **follower: Any,
) -> Written:  # fmt: skip
    """One or more leaders over one follower, in some names and forms; `follower` are options of its `Player`."""
    first, last = draw.choice(NAMES) if draw.maybe(0.4) else ("x", "y")
    sizes = draw.parts(pair.nx, leaders)
    names = [first, *(f"{first}{i}" for i in range(1, len(sizes)))]
    leads = [Layout(draw, size, modules=False) for size in sizes]
    follows = Layout(draw, pair.m, kinds=forms)
    written = Written(pair, None, names, last, leads, follows, sizes)
    x0, y0 = pair.x0.to(pair.dtype), pair.y0.to(pair.dtype)
    players = {}
    for i, (name, lay, part) in enumerate(zip(names, leads, x0.split(sizes), strict=True)):

        def lead(values: dict[str, Any], _: Any, i: int = i) -> Tensor:
            return pair.F(written.x(values), follows.flat(values[last]), i)

        players[name] = bl.Player(named([*names, last], lead), init=lay.init(part))

    def follow(values: dict[str, Any], batch: Any) -> Tensor:
        return pair.f(written.x(values), follows.flat(values[last]), batch)

    loss = named([*names, last], follow, batch=batched)
    players[last] = bl.Player(loss, init=follows.init(y0), data=data, **follower)
    written.game = bl.Game(**players)
    return written


def called(
    written: Written, response: bl.Response, state: Any, who: int = 0, at: Tensor | None = None, batch: Any = None
) -> tuple[Tensor, Tensor, Any]:
    """One call in a loop of one's own: leader `who`'s hypergradient `[nx]`, the answer `[m]`, the next state."""
    pair, game = written.pair, written.game
    x = (pair.x0 if at is None else at).to(pair.dtype).clone().requires_grad_()
    parts = zip(written.leaders, written.leads, x.split(written.sizes), strict=True)
    others = {name: lay.tree(part, game.initial(name)) for name, lay, part in parts}
    answer, after = response(game, others, state) if batch is None else response(game, others, state, batch)
    loss = game.loss(written.leaders[who], {**others, written.follower: answer})
    (found,) = torch.autograd.grad(loss, x)
    return found.detach(), written.y(answer), response.after_backward(after, answer)


class Recorder(torch.optim.Optimizer):
    """Keeps the gradients that `solve` hands to a leader's optimiser, and moves nobody."""

    def __init__(self, parameters: Any, kept: dict[int, list[Tensor]], number: int) -> None:
        super().__init__(parameters, {})
        self.kept, self.number = kept, number

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Keep them."""
        every = [p for group in self.param_groups for p in group["params"]]
        self.kept[self.number] = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in every]


def solved(game: Any, *, steps: int = 1, leaders: int = 0, **options: Any) -> list[Tensor]:
    """What `solve` gives its leaders' optimisers, in order, in the last of `steps` steps, leaf by leaf.

    Many games try an optimiser out before: of those, `leaders` says how many are in use.
    """
    kept: dict[int, list[Tensor]] = {}
    numbers = itertools.count()
    bl.solve(game, optimizer=lambda parameters: Recorder(parameters, kept, next(numbers)), steps=steps, **options)
    return [leaf for number in sorted(kept)[-leaders:] for leaf in kept[number]]

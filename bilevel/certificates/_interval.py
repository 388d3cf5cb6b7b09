"""How far the noise of batches moves a hypergradient: a confidence interval from independent replications."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from bilevel._printed import printed
from bilevel.certificates.arguments import check_leaves
from bilevel.errors import BilevelWarning
from bilevel.game import Game
from bilevel.game.data import Position
from bilevel.randomness import random_kept
from bilevel.responses import Response
from bilevel.responses.base import State, answered
from bilevel.tree import Variables, flatten, leaves, map_leaves
from bilevel.variance import digest

if TYPE_CHECKING:
    from rich.table import Table

_SHOWN = 8
_SEEDS = 2**31 - 1


@final
@dataclass(frozen=True, eq=False)
class Interval:
    """A mean with its confidence interval, entry by entry.

    Attributes:
        mean: Over the replications, in the form of what was asked for.
        low: The lower end.
        high: The upper end.
        standard_error: Of the mean.
    """

    mean: Variables
    low: Variables
    high: Variables
    standard_error: Variables

    def covers(self, value: Variables) -> Tensor:
        """Whether each entry of `value` is inside, `[n]`."""
        flat = flatten(value)
        return (flatten(self.low) <= flat) & (flat <= flatten(self.high))


@final
@dataclass(frozen=True, eq=False)
class HypergradientInterval:
    """A leader's stochastic hypergradient, and how far its noise leaves it open.

    Attributes:
        hypergradient: Its mean over draws of batches and random numbers; where a direction was given, the derivative
            along it.
        bias: Mean of what it has less than `against`, which leaves out less; None where nothing was given.
        level: The share of all experiments in which an entry's interval holds its mean.
        replications: How many draws.
        samples: The draws `[replications, n]`.
        gradients: Gradients that it cost.
        products: Hessian-vector products that it cost.
    """

    hypergradient: Interval
    bias: Interval | None
    level: float
    replications: int
    samples: Tensor = field(repr=False)
    gradients: int = 0
    products: int = 0

    def __str__(self) -> str:
        """A table of the entries."""
        return printed(
            self._table(),
            f"{self.replications} replications, {self.gradients:,} gradients and {self.products:,} Hessian-vector "
            "products. The interval is of the noise alone.",
        )

    def _table(self) -> Table:
        from rich.table import Table  # noqa: PLC0415 - only where something is printed

        table = Table("entry", "hypergradient", f"{self.level:.0%} interval")
        if self.bias is not None:
            table.add_column("short of the reference by")
            table.add_column(f"{self.level:.0%} interval")
        rows = [_entries(self.hypergradient), *([] if self.bias is None else [_entries(self.bias)])]
        for index in range(min(_SHOWN, len(rows[0]))):
            cells = [text for row in rows for text in row[index]]
            table.add_row(str(index), *cells)
        if len(rows[0]) > _SHOWN:
            table.add_row(f"... {len(rows[0])} in all")
        return table


def _entries(interval: Interval) -> list[tuple[str, str]]:
    ends = (flatten(tree).tolist() for tree in (interval.mean, interval.low, interval.high))
    return [(f"{mean:.4g}", f"[{low:.4g}, {high:.4g}]") for mean, low, high in zip(*ends, strict=True)]


def hypergradient_interval(
    game: Game,
    response: Response,
    *,
    variables: Mapping[str, Variables] | None = None,
    state: State | None = None,
    leader: str | None = None,
    follower: str | None = None,
    direction: Variables = None,
    against: Response | None = None,
    replications: int = 16,
    level: float = 0.95,
    seed: int = 0,
) -> HypergradientInterval:
    r"""A confidence interval for a hypergradient that minibatches make noisy, by independent replications.

    Each replication answers the same leader from the same state, with batches of both players and random numbers of its
    own. With R hypergradients $h_r$, their mean $\bar h$ and their standard deviation s, entry by entry,

    $$
    \bar h \pm t_{(1 + \text{level}) / 2,\, R - 1}\; s / \sqrt{R}
    $$

    It covers the *noise*: the mean of the estimate over batches, dropout masks and fresh products, with all that the
    response does. It does not cover noise that the state came with, as that of `SingleLoop`'s adjoint, nor its *bias*:
    a follower short of its optimum, a truncated series, the inverse of a held batch. A response `against` it that
    leaves out less (more steps, more terms, `AllBatches()`) answers in each replication on the same seeds, and the mean
    difference is reported apart, with its own interval. The level is that of each entry by itself, and holds as far as
    the mean is normal; heavy tails ask for more replications.

    Data that give the same batches whatever the seed, such as a list, are entered at a random batch: then the draws are
    from their starts. Costs R calls and backward passes of each response.

    Args:
        game: A game with data, or losses that draw random numbers.
        response: Of the follower.
        variables: The players' variables, where they are not those of the start: `solution.variables`.
        state: From which the follower answers, such as `solution.states["y"]`; None: a fresh one.
        leader: Default: the first player.
        follower: Default: the last player.
        direction: In the form of the leader's variables: the derivative along it, in place of each entry.
        against: Another response, whose answers are less biased, of a fresh state.
        replications: R, at least 2; below about 8 the interval is wide.
        level: Between 0 and 1.
        seed: Of the replications.

    Raises:
        ValueError: For settings that cannot work, missing or misshapen variables, and where all draws are equal.

    Examples:
        >>> from bilevel.game import Player
        >>> from bilevel.responses import Implicit
        >>> from bilevel.inner import ClosedForm
        >>> data = [torch.tensor(float(entry), dtype=torch.float64) for entry in range(4)]
        >>> def lead(x, y, batch): return (y - batch) ** 2 / 2
        >>> zero = torch.tensor(0.0, dtype=torch.float64)
        >>> game = Game(x=Player(lead, zero, data=data), y=Player(lambda x, y: (y - x) ** 2, zero))
        >>> found = hypergradient_interval(game, Implicit(ClosedForm(lambda x: x)), replications=12)
        >>> bool(found.hypergradient.covers(-zero - 1.5))  # -(0 + 1 + 2 + 3) / 4
        True
    """
    game.require_one("hypergradient_interval")
    first = game.names[0] if leader is None else leader
    last = game.names[-1] if follower is None else follower
    _check(game, first, last, replications, level)
    given = {name: game.initial(name) for name in game.names} if variables is None else dict(variables)
    missing = [name for name in game.names if name not in given and name != last]
    if missing:
        raise ValueError(f"hypergradient_interval: variables lack those of {missing}; given are {sorted(given)}.")
    for name in game.names:
        if name != last:
            check_leaves(game, name, given[name], "the variables of", asker="hypergradient_interval")
    if direction is not None:
        check_leaves(game, first, direction, "the direction of", asker="hypergradient_interval")
    others = {name: map_leaves(lambda t: t.detach(), given[name]) for name in game.names if name != last}
    draws = _Draws(game, (first, last), replications, seed)
    along = None if direction is None else flatten(direction).detach()
    own = _Runs(game, first, others, draws)
    samples = own.hypergradients(response, response.init(game, follower=last) if state is None else state)
    if along is not None:
        samples = samples @ along[:, None]
    if not bool((samples != samples[0]).any()) and bool(samples.any()):
        raise ValueError(
            "hypergradient_interval: all replications gave the same hypergradient: no batch and no random number moves "
            "it. A game without noise has no interval; bilevel.certify bounds its error. Where a response's noise is "
            "in the state that it begins from, as that of SingleLoop's adjoint, one call does not show it."
        )
    form = game.structure(first)

    def shaped(flat: Tensor) -> Variables:
        return flat[0] if along is not None else form.unflatten(flat)

    def interval(values: Tensor) -> Interval:
        mean, spread = values.mean(0), values.std(0) / math.sqrt(replications)
        half = _quantile(level, replications - 1) * spread
        return Interval(*(shaped(entry) for entry in (mean, mean - half, mean + half, spread)))

    bias = None
    if against is not None:
        theirs = own.hypergradients(against, against.init(game, follower=last))
        bias = interval((theirs @ along[:, None] if along is not None else theirs) - samples)
    return HypergradientInterval(
        interval(samples), bias, level, replications, samples, gradients=own.gradients, products=own.products
    )


def _check(game: Game, leader: str, follower: str, replications: int, level: float) -> None:
    for name in (leader, follower):
        if name not in game.names:
            raise ValueError(f"hypergradient_interval: there is no player {name!r}; players are {list(game.names)}.")
    if game.names.index(leader) >= game.names.index(follower):
        raise ValueError(
            f"hypergradient_interval: leader {leader!r} does not move before follower {follower!r}; order of play: "
            f"{list(game.names)}."
        )
    if not isinstance(replications, int) or replications < 2:
        raise ValueError(f"hypergradient_interval: replications={replications!r}; expected a whole number, at least 2.")
    if not 0.0 < level < 1.0:
        raise ValueError(f"hypergradient_interval: level={level}; expected a number between 0 and 1.")


def _quantile(level: float, freedom: int) -> float:
    from scipy.special import stdtrit  # noqa: PLC0415 - SciPy only where it is used

    return float(stdtrit(freedom, 0.5 + level / 2.0))


class _Draws:
    """Where each replication reads its data, and the seed of its random numbers."""

    def __init__(self, game: Game, players: tuple[str, ...], replications: int, seed: int) -> None:
        self._game = game
        self._generator = torch.Generator().manual_seed(seed)
        self.seeds = [self._number(_SEEDS) for _ in range(replications)]
        self.places = [{name: self._place(name, one) for name in players} for one in self.seeds]

    def _place(self, name: str, seed: int) -> Position | None:
        game = self._game
        if game.members(name) != (name,):
            return {member: self._place(member, seed) for member in game.members(name)}
        # Two players who read the same data must not read the same batches.
        place = game.start(name, (seed + game.names.index(name) * 7919) % _SEEDS if name in game.names else seed)
        if place is None:
            return None
        count = self._same_each_time(name)
        return place if count is None else place | {"index": self._number(count)}

    def _same_each_time(self, name: str) -> int | None:
        """How many batches a pass has that does not depend on the seed; None where it does."""
        known = self.__dict__.setdefault("_counts", {})
        if name not in known:
            starts = [self._game.start(name, seed) for seed in (0, 1)]
            passes = [map(digest, self._game.whole_pass(name, at, "hypergradient_interval")) for at in starts]
            known[name] = _equal_length(*passes)
        return known[name]  # type: ignore[no-any-return]

    def _number(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self._generator))


def _equal_length(one: Iterator[str], other: Iterator[str]) -> int | None:
    """How many two passes have, where they are equal; they are read no further than to their first difference."""
    count = 0
    for mine, theirs in itertools.zip_longest(one, other):
        if mine != theirs:
            return None
        count += 1
    return count


class _Runs:
    """A response's hypergradients over the draws, and what they cost."""

    def __init__(self, game: Game, leader: str, others: Mapping[str, Variables], draws: _Draws) -> None:
        self.game, self.leader, self.others, self.draws = game, leader, others, draws
        self.gradients = self.products = 0

    def hypergradients(self, response: Response, state: State) -> Tensor:
        """`[replications, n]`; a warning of the response comes once."""
        found, caught = [], {}
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", BilevelWarning)
            for seed, places in zip(self.draws.seeds, self.draws.places, strict=True):
                with random_kept(self.game.device, start=seed):
                    found.append(self._one(response, state, places))
        for warning in told:
            caught[type(warning.message)] = warning.message
        for message in caught.values():
            warnings.warn(message, stacklevel=3)
        return torch.stack(found)

    def _one(self, response: Response, state: State, places: Mapping[str, Position | None]) -> Tensor:
        game, leader, follower = self.game, self.leader, str(state["follower"])
        others = {**self.others, leader: map_leaves(lambda t: t.clone().requires_grad_(), self.others[leader])}
        before = response.report(state)
        with torch.enable_grad():
            answer, after = answered(response, game, others, {**state, "data": places[follower]})
            batch, _ = game.draw(leader, places[leader])
            everybody = {**others, follower: answer}
            value = game.total(game.loss(leader, everybody, batch, game.statistics(everybody, {follower: after})))
        slopes: Any = torch.autograd.grad(value, leaves(others[leader]), allow_unused=True, materialize_grads=True)
        report = response.report(response.after_backward(after, answer))
        self.gradients += 1 + report.gradients - before.gradients
        self.products += report.products - before.products
        return flatten(game.structure(leader).build(slopes)).detach()


__all__ = ["HypergradientInterval", "Interval", "hypergradient_interval"]

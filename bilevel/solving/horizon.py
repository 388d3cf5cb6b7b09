"""Whether followers that look only so many steps ahead show their leaders the way that a longer look shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, distributed

from bilevel.errors import BilevelError, DataError, UnreliableResponseWarning
from bilevel.game import Buffers, Game
from bilevel.game.data import Batch
from bilevel.game.held import HeldBatches
from bilevel.many import Games, GamesOfRanks, Tasks, TasksOfRanks
from bilevel.randomness import random_kept, random_state
from bilevel.responses import Response
from bilevel.responses.base import FartherLook
from bilevel.solving.disagreement import LOOKS, SMALLEST, Disagreement, beyond_noise, disagreement
from bilevel.solving.followers import Followers, States
from bilevel.solving.warning_log import Log, caught, logged

FIRST, SPACING = 16, 4
"""Leader steps in which it is looked: 16, 64, 256, ..."""

EARLY = (2, 4)
"""Further ones of a leader that SciPy moves: its method may come to its end in fewer."""

HELD = 2**30
"""Bytes of batches that are held for a look, at most."""

SMALLEST_AT_END = 0.05
"""Where a run has ended its own hypergradient is about 0, and one by a longer horizon is its bias: so much of the first
step's is told, as a leader that it does not move far is not led astray."""

Looks = Mapping[str, list[Tensor]]
"""Hypergradients `[games, n]` of looks that have no verdict yet, "near" and "far"; empty where nobody looks."""

_KEY = f"{UnreliableResponseWarning.__name__} Short horizon:"
_GIVEN_UP = f"{UnreliableResponseWarning.__name__} Horizon not"


def due(step: int) -> bool:
    """Whether to begin to look in this step."""
    while step > FIRST and step % SPACING == 0:
        step //= SPACING
    return step == FIRST


@dataclass(frozen=True)
class Place:
    """Where a look starts: all that the leaders' gradients are functions of.

    Args:
        point: leader -> its variables, its own copies.
        states: follower -> its response's state.
        buffers: player -> its module's buffers.
        batches: leader -> its batch.
        random: the global random numbers' states.
    """

    point: Mapping[str, list[Tensor]]
    states: States
    buffers: Buffers
    batches: Mapping[str, Batch]
    random: Mapping[str, Tensor]


Slopes = Callable[[Game, Followers, Place], Tensor]
"""The leaders' own gradients `[games, n]` at a place, through the followers' answers; nothing is kept."""


@dataclass(frozen=True)
class _Window:
    """A look that waits for the run to read the batches that it needs."""

    begun: int
    place: Place
    batches: HeldBatches


class HorizonWatch:
    """Compares the followers' horizons with a longer one from the same place, now and then during a run.

    It reads no batch: a look keeps those that the run itself reads, until there are as many as the longer horizon
    takes, and then looks back from the place where it began. So whatever the data are, the run's batches and random
    numbers are what they are without it. What is noisy is looked at up to `LOOKS` times before it is told.
    """

    def __init__(self, game: Game, followers: Followers, *, driven: bool = False) -> None:
        self._game, self._driven = game, driven
        self._window: _Window | None = None
        self._same = game.batches_stand_still
        # Each call takes one batch of tasks, whatever the horizon: the one that the run itself takes next.
        self._at_once = self._same or isinstance(game, Tasks)
        # Where a leader acts by a follower's start alone, so many steps are meant: the start is forgotten in the end.
        farther = {name: own.farther for name, own in followers.responses.items() if not game.starts_alone(name)}
        looks = {name: look for name, look in farther.items() if look is not None}
        # Of ranks that play other games or tasks each would look as often as its own want.
        apart = isinstance(game, GamesOfRanks | TasksOfRanks)
        watched = _Watched(game, followers.responses, looks)
        self._watched: _Watched | None = watched if looks and not apart else None

    def watch(
        self, log: Log, looks: Looks, step: int, first: Tensor, here: Callable[[], Place], slopes: Slopes
    ) -> tuple[Log, Looks]:
        """The log and the looks under way, in a step in which nobody has moved yet.

        `first` are the norms of the leaders' gradient in the first step, `[games]`. `here` and `slopes` are the run's.
        They are not kept: the run keeps this, and in a circle would not be freed.
        """
        if self._watched is None or _GIVEN_UP in log:
            return log, {}
        if self._at_once:
            if not (looks or due(step) or (self._driven and step in EARLY)):
                return carried(log, step), {}
            return self._now(self._watched, log, looks, step, first, here(), slopes)
        window = self._window
        if window is not None and step < window.begun + self._watched.calls:
            return carried(log, step), looks
        if window is None:
            log = carried(log, step)
        else:
            log, looks = self._back(self._watched, window, log, looks, step, first, slopes)
        if (looks or due(step)) and _GIVEN_UP not in log:
            looks = looks or {"near": [], "far": []}
            self._window = _Window(step, here(), HeldBatches(HELD))
            for name in self._watched.own:
                self._game.hold(name, self._window.batches)
        return log, looks

    def ended(self, log: Log, step: int, first: Tensor, here: Callable[[], Place], slopes: Slopes) -> Log:
        """The log after a look where a run has ended, which had few steps: of a leader whose batches stand still."""
        watched = self._watched
        if watched is None or _GIVEN_UP in log or log.get(_KEY, {"last": -1})["last"] == step:
            return log
        return self._now(replace(watched, smallest=SMALLEST_AT_END), log, {}, step, first, here(), slopes)[0]

    def _now(
        self, watched: _Watched, log: Log, looks: Looks, step: int, first: Tensor, place: Place, how: Slopes
    ) -> tuple[Log, Looks]:
        """The log after looks on the same batches, of which there are none or one; random numbers are new each time.

        Of other tasks in each step one look, and those that have no verdict yet.
        """
        looks = looks or {"near": [], "far": []}
        while True:
            found = self._pair(watched, self._game, place, how)
            if not isinstance(found, _Pair):
                return logged(log, found, step), {}
            looks = {"near": [*looks["near"], found.near], "far": [*looks["far"], found.far]}
            noisy = not self._same
            noisy |= any(not torch.equal(state, place.random[key]) for key, state in found.random.items())
            told = watched.verdict(looks, first, noisy=noisy)
            if told is not None:
                return logged(log, told, step), {}
            if not self._same:
                return carried(log, step), looks
            place = replace(place, random=found.random)

    def _back(
        self, watched: _Watched, window: _Window, log: Log, looks: Looks, step: int, first: Tensor, how: Slopes
    ) -> tuple[Log, Looks]:
        """The log and the looks after a look from where the window began, on what was read since."""
        self._window = None
        game = self._game
        for name in watched.own:
            self._game.release(name, window.batches)
            game = game.replay(name, window.batches)
        if window.batches.full:
            return logged(log, [watched.unexamined(f"its batches take more than {HELD / 2**30:.3g} GiB")], step), {}
        found = self._pair(watched, game, window.place, how)
        if not isinstance(found, _Pair):
            return logged(log, found, step), {}
        looks = {"near": [*looks["near"], found.near], "far": [*looks["far"], found.far]}
        told = watched.verdict(looks, first, noisy=True)
        return (carried(log, step), looks) if told is None else (logged(log, told, step), {})

    def _pair(
        self, watched: _Watched, game: Game, place: Place, how: Slopes
    ) -> _Pair | list[UnreliableResponseWarning]:
        """The hypergradients by either horizon, from the same place and random numbers, or what is to be told."""
        slopes: list[Tensor] = []
        with caught():  # what the longer look says of itself is nobody's business
            try:
                for responses in (watched.own, watched.farther):
                    with random_kept(game.device, start=place.random):
                        slopes.append(how(game, Followers(game, responses), place))
                        random = random_state(game.device)
            except DataError:
                return [watched.unexamined("not all batches that it takes were held")]
            except (BilevelError, ValueError):  # it left what can be computed, or its rates end: it is no measure
                return []
            except torch.OutOfMemoryError:
                if distributed.is_available() and distributed.is_initialized():
                    raise  # the other ranks wait for this one
                return [watched.unexamined("the longer look does not fit into memory")]
        return _Pair(slopes[0], slopes[1], random)


@dataclass(frozen=True)
class _Pair:
    """The hypergradients `[games, n]` by either horizon, and the random numbers' states after the longer one."""

    near: Tensor
    far: Tensor
    random: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Watched:
    """All followers' responses, and what those of some are held against, all of these at once."""

    game: Game
    own: Mapping[str, Response]
    looks: Mapping[str, FartherLook]
    smallest: float = SMALLEST

    @property
    def farther(self) -> dict[str, Response]:
        """The responses of a longer look."""
        return {**self.own, **{name: look.response for name, look in self.looks.items()}}

    @property
    def calls(self) -> int:
        """How many calls of the responses read what one call of the longer ones reads."""
        found = 1
        for name, look in self.looks.items():
            own, far = self.own[name].steps_a_call, look.response.steps_a_call
            found = max(found, SPACING if own is None or far is None else math.ceil(far / own))
        return found

    @property
    def told(self) -> str:
        """How far each looks, and how far the longer look goes."""
        return ", and that ".join(f"of player {name!r} {look.told}" for name, look in self.looks.items())

    def verdict(self, looks: Looks, first: Tensor, *, noisy: bool) -> list[UnreliableResponseWarning] | None:
        """What these looks find, nothing or a warning; None where one look more is to decide."""
        near, far = looks["near"], looks["far"]
        tolerance = min(look.tolerance for look in self.looks.values())
        found: dict[int, Disagreement] = {}
        for game in range(len(near[0])):
            rows = [look[game] for look in near], [look[game] for look in far]
            told = disagreement(*rows, tolerance, float(first[game]), smallest=self.smallest)
            if told is not None:
                found[game] = told
        if found and noisy and len(near) < LOOKS:
            return None
        if noisy:
            count = len(near[0])
            pairs = {game: ([look[game] for look in near], [look[game] for look in far]) for game in found}
            found = {game: found[game] for game, rows in pairs.items() if beyond_noise(*rows, tolerance, count)}
        return [self._short(found, len(near), noisy=noisy)] if found else []

    def _short(self, of: Mapping[int, Disagreement], count: int, *, noisy: bool) -> UnreliableResponseWarning:
        worst = min(of, key=lambda game: of[game].cosine)
        found, games, where = of[worst], None, ""
        if isinstance(self.game, Games):
            games = [self.game.offset + game for game in of]
            where = f" in {len(of)} of {self.game.told}, the worst being game {self.game.offset + worst}"
        way = "points the other way" if found.cosine < 0.0 else f"has a cosine of {found.cosine:.2f} to it"
        # With noise its follower never comes to rest within a tolerance.
        implicit = "Implicit(..., tolerance=None)" if noisy else "Implicit"
        mean = f", in the mean of {count} looks and beyond their noise" if count > 1 else ""
        return UnreliableResponseWarning(
            f"Short horizon: the response {self.told} from the same place give another hypergradient{mean}{where}. Of "
            f"that, the one in use misses {found.missing:.0%}, and it {way}: norm "
            f"{found.near:.3g} for {found.far:.3g}. What only a few steps gain is not what the leader wants in the "
            "end: regularisation, for one, is driven to an edge. Give it more steps=, use "
            f"{implicit}, or accept it by tolerance=None.",
            games=games,
        )

    def unexamined(self, why: str) -> UnreliableResponseWarning:
        """That nobody knows whether the horizon is long enough."""
        return UnreliableResponseWarning(
            f"Horizon not examined: the response {self.told} would say whether that is enough, but {why}. "
            "Compare runs of other steps=, or accept it by tolerance=None."
        )


def carried(log: Log, step: int) -> Log:
    """The log in a step without a verdict: what the last one found still holds."""
    entry = log.get(_KEY)
    if entry is None or entry["last"] != step - 1:
        return log
    return {**log, _KEY: {**entry, "last": step}}

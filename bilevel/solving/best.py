"""One game from many starts: the best end that keeps the leader's functions, and how far the ends lie apart."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bilevel.errors import BilevelError, BilevelWarning, CheckpointError
from bilevel.game import Game
from bilevel.many import Games
from bilevel.solving.drawn import Start
from bilevel.solving.solution import Solution
from bilevel.solving.solutions import Solutions
from bilevel.solving.spread import Spread
from bilevel.solving.warning_log import caught
from bilevel.tree import map_leaves


def best_of(
    game: Game,
    leader: str,
    starts: Sequence[Start],
    solve_one: Callable[[Game, Path | None], Solution | Solutions],
    checkpoint: Path | None,
    tolerance: float,
    *,
    together: bool,
) -> Solution:
    """The best of the runs from all starts, its warnings issued; raises `BilevelError` where every one failed."""
    games = [game.starting(**start) for start in starts]
    found = _together(game, games, solve_one, checkpoint) if together and len(games) > 1 else None
    if found is not None:
        return _chosen(leader, dict(enumerate(found[0])), found[1], {}, tolerance, together=True)
    ends: dict[int, Solution] = {}
    told: dict[int, list[BilevelWarning]] = {}
    failures: dict[int, str] = {}
    for place, one in enumerate(games):
        path = None if checkpoint is None else checkpoint_of(checkpoint, place)
        with caught() as ours:
            try:
                end = solve_one(one, path)
            except CheckpointError:
                raise  # of the file, and not of the start
            except BilevelError as error:
                failures[place] = f"{type(error).__name__}: {error}"
                continue
        assert isinstance(end, Solution)
        ends[place], told[place] = end, ours
    if not ends:
        raise BilevelError(f"solve: all of {len(games)} starts failed, the first with: {failures[0]}")
    return _chosen(leader, ends, [w for place in told for w in told[place]], failures, tolerance, together=False)


def checkpoint_of(path: Path, place: int) -> Path:
    """The checkpoint of one start, where they are played one by one: "run.3.pt"."""
    return path.with_name(f"{path.stem}.{place}{path.suffix}")


def _together(
    game: Game, games: Sequence[Game], solve_one: Callable[[Game, Path | None], Solution | Solutions], path: Path | None
) -> tuple[list[Solution], list[BilevelWarning]] | None:
    """All of them at once; None where something of it is made for one game, or one of them fails."""
    stacked = {
        name: map_leaves(lambda *rows: torch.stack(rows), *(one.initial(name) for one in games)) for name in game.names
    }
    try:
        with caught() as ours:
            found = solve_one(Games(game, len(games), init=stacked), path)
    except CheckpointError:
        raise
    except (TypeError, ValueError, BilevelError):
        return None
    return list(found), ours  # type: ignore[arg-type]


def _chosen(
    leader: str,
    ends: Mapping[int, Solution],
    told: Sequence[BilevelWarning],
    failures: Mapping[int, str],
    tolerance: float,
    *,
    together: bool,
) -> Solution:
    count = len(ends) + len(failures)
    values = tuple(ends[place].values[leader] if place in ends else math.nan for place in range(count))
    violations = tuple(ends[place].violations.get(leader, 0.0) if place in ends else math.nan for place in range(count))

    left = tuple(ends[place].not_converged if place in ends else () for place in range(count))

    def worth(place: int) -> tuple[bool, float, bool, float]:
        off = max(violations[place] - tolerance, 0.0)
        # A value at a follower that stopped short is nobody's; that of a leader on its way is attained where it is.
        return math.isnan(values[place]), off, "follower" in left[place], values[place]

    best = min(ends, key=worth)
    for warning in told:
        if any(str(warning) == text for text in ends[best].warnings):
            warnings.warn(str(warning), type(warning), stacklevel=4)
    spread = Spread(leader, values, violations, left, best, tolerance, dict(failures), together)
    return replace(ends[best], starts=spread)

"""What `compare` refuses, before any work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bilevel.dynamics import Dynamics, ValueFunction
from bilevel.game import Game
from bilevel.responses import Response
from bilevel.workers import require_workers


def is_game(play: Any) -> bool:
    """Whether it can be played as it is; else it is a function of the seed."""
    if isinstance(play, Game):
        return True
    from bilevel.testing.known import KnownGame  # noqa: PLC0415 - it brings Hypothesis; who has one has imported it

    return isinstance(play, KnownGame)


def suited(given: Response | Dynamics | Mapping[str, Response | Dynamics], game: str) -> Response | Dynamics | None:
    """The response for a game, if there is one."""
    return given.get(game) if isinstance(given, Mapping) else given


def check(
    games: Mapping[str, Any],
    responses: Mapping[str, Any],
    follower: str | None,
    optimizer: Any,
    steps: int,
    seeds: Sequence[int],
    budgets: Sequence[float],
    jobs: int,
    cluster: str | None,
) -> None:
    """Raise `TypeError`, `ValueError` or `ImportError` that names the argument, what came and what was expected."""
    for word, given in (("games", games), ("responses", responses)):
        if not isinstance(given, Mapping) or not given:
            raise TypeError(f"compare: {word}={given!r}; expected a dict from name to one of them, and not empty.")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"compare: seeds={tuple(seeds)}; expected at least one, and none twice.")
    if steps < 1:
        raise ValueError(f"compare: steps={steps}; expected at least 1.")
    if 1.0 not in budgets or not all(budget > 0.0 for budget in budgets) or len(set(budgets)) < len(budgets):
        raise ValueError(f"compare: budgets={tuple(budgets)}; expected different numbers > 0 with 1 among them.")
    if isinstance(optimizer, Mapping):
        _known("optimizer", optimizer, games)
        if set(optimizer) != set(games):
            raise ValueError(f"compare: optimizer has {sorted(optimizer)}; expected one for each of {sorted(games)}.")
    for name, given in responses.items():
        if isinstance(given, Mapping):
            _known(f"response {name!r}", given, games)
        for one in given.values() if isinstance(given, Mapping) else (given,):
            if not isinstance(one, Response | ValueFunction):
                raise TypeError(
                    f"compare: {name}={one!r} is no response; expected Unrolled, Implicit, Hypernetwork, ..., or "
                    "ValueFunction."
                )
    for name, play in games.items():
        if not is_game(play):
            if not callable(play):
                raise TypeError(
                    f"compare: {name}={play!r}; expected a Game, a KnownGame of bilevel.testing, or a function from "
                    "a seed to one."
                )
            play = play(seeds[0])
            if not is_game(play):
                raise TypeError(f"compare: {name}({seeds[0]}) returned {play!r}; expected a Game or a KnownGame.")
        names = play.names if isinstance(play, Game) else ("x", "y")
        if len(names) < 2 or (follower is not None and follower not in names[1:]):
            raise ValueError(
                f"compare: follower={follower!r}, but the players of {name!r} are {list(names)}; expected one that "
                "moves after the first."
            )
    require_workers("compare", jobs, cluster)


def _known(what: str, given: Iterable[str], games: Mapping[str, Any]) -> None:
    for game in given:
        if game not in games:
            raise ValueError(f"compare: {what} names a game {game!r}; games are {sorted(games)}.")

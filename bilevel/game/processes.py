"""Several processes: what a game cannot differentiate across them is refused by name before it is played."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from bilevel.game.player import Player
from bilevel.sharding.modules import is_fully_sharded

_SEPARATE: ContextVar[bool] = ContextVar("separate_ranks", default=False)


@contextmanager
def separate_ranks() -> Iterator[None]:
    """Games that are made in here are played by each rank of a process group for itself.

    Nothing is averaged between them: as in a sweep, where each rank has a game of its own.

    >>> with separate_ranks():
    ...     pass  # game = bl.Game(...)
    """
    token = _SEPARATE.set(True)
    try:
        yield
    finally:
        _SEPARATE.reset(token)


def refuse_spread(players: Mapping[str, Player]) -> None:
    """Raise `ValueError` for a module that something else spreads over processes or devices."""
    for name, player in players.items():
        if isinstance(player.init, nn.Module):
            for path, part in player.init.named_modules():
                told = "" if is_fully_sharded(part) else told_of_spread(part)
                if told:
                    where = f"{path!r} in its module" if path else "its module"
                    raise ValueError(f"Player {name!r}: {where} is {told}")


def plays_alone() -> bool:
    """Whether each rank plays for itself the games that are made or played here."""
    return _SEPARATE.get()


def refuse_lone_rank(asker: str, *, alone: bool) -> None:
    """Raise `ValueError` where this process is one of several ranks, and the game averages nothing between them."""
    if alone or not (distributed.is_available() and distributed.is_initialized()):
        return
    ranks = distributed.get_world_size()
    if ranks > 1 and not _SEPARATE.get():
        raise ValueError(
            f"{asker}: this process is one of {ranks} ranks, and a game averages nothing between ranks: each would go "
            "its own way. To play it together pass solve(..., parallel=bilevel.DataParallel()), or play "
            "bilevel.DataParallel().game(game) in a loop of your own. If each rank is to play a game of its own, make "
            "it inside `with bilevel.extend.separate_ranks():`."
        )


def told_of_spread(module: nn.Module) -> str:
    """What a module spread over processes is, and the way out; empty for any other."""
    if isinstance(module, DistributedDataParallel):
        return (
            "wrapped by DistributedDataParallel, whose averaging over ranks is no part of the derivatives that a game "
            "takes: the ranks would drift apart in silence. Pass the module that it wraps, model.module."
        )
    if isinstance(module, nn.DataParallel):
        return (
            "wrapped by nn.DataParallel, which copies it to each GPU of this process, and runs its own parameters in "
            "place of the player's variables. Pass the module that it wraps, model.module, and start a process for "
            "each GPU: solve(..., parallel=bilevel.DataParallel())."
        )
    if isinstance(module, loaded("torch.distributed.fsdp", "FSDPModule")):
        return (
            "sharded by fully_shard, and no player's: its hooks have no second derivative. Make it the init= of a "
            "player, who is then spread over the ranks, or use the module as it was before fully_shard."
        )
    if isinstance(module, loaded("torch.distributed.fsdp", "FullyShardedDataParallel")):
        return (
            "wrapped by FullyShardedDataParallel, whose parameters have no second derivative and no gradient outside "
            "backward(). Use torch.distributed.fsdp.fully_shard(module), and parallel=bilevel.DataParallel()."
        )
    return ""


def loaded(module: str, *names: str) -> tuple[type, ...]:
    """Classes of a module of torch's, if somebody has imported it; nothing is of them otherwise."""
    return tuple(vars(sys.modules[module])[name] for name in names) if module in sys.modules else ()


__all__ = ["loaded", "plays_alone", "refuse_lone_rank", "refuse_spread", "separate_ranks", "told_of_spread"]

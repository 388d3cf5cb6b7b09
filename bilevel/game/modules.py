"""The players' modules during one evaluation: they hold clones of their buffers, and give the advanced ones back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.autodiff import transforms_active
from bilevel.game.player import Player
from bilevel.game.residual import Buffers
from bilevel.tree import leaves


@contextmanager
def lent(players: Mapping[str, Player], buffers: Buffers, arguments: Mapping[str, Any]) -> Iterator[Buffers]:
    """Lend the modules clones of `buffers`; yields the dict that holds the advanced ones afterwards."""
    advanced: Buffers = {}
    taken: list[tuple[str, str, nn.Module, str, Tensor]] = []
    lift: Callable[[Tensor], Tensor] = torch.clone
    if transforms_active() and any(buffers.values()):
        lift = _lifting(leaves(dict(arguments)))
    try:
        for player, tensors in buffers.items():
            advanced[player] = {}
            for path, tensor in tensors.items():
                prefix, _, name = path.rpartition(".")
                owner = players[player].init.get_submodule(prefix)
                taken.append((player, path, owner, name, owner._buffers[name]))
                owner._buffers[name] = lift(tensor)
        yield advanced
        for player, path, owner, name, _ in taken:
            after = owner._buffers[name]
            if after is not None:
                advanced[player][path] = after.detach()
    finally:
        # Backwards, so that a module that two players share ends with what it began with.
        for _, _, owner, name, original in reversed(taken):
            owner._buffers[name] = original


def _lifting(tensors: list[Any]) -> Callable[[Tensor], Tensor]:
    """Make a buffer a citizen of the running torch.func transforms, which refuse in-place writes to outsiders."""
    numbers = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]  # a batch may hold other things
    zero = sum((torch.zeros_like(t).sum() for t in numbers), torch.zeros(()))
    return lambda buffer: buffer + zero.to(buffer)

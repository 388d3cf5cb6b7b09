"""How a player's function is called: with whom it names, on modules that are lent, under kernels that are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.errors import BilevelError
from bilevel.game.checks import Runs
from bilevel.game.data import Batch
from bilevel.game.modules import CallableVariables, lent, replaced
from bilevel.game.parts import Parts
from bilevel.game.situation import Buffers
from bilevel.game.statistics import Seen, watching
from bilevel.randomness import random_state, set_random_state
from bilevel.second_order import told_of_loss
from bilevel.tree import Variables, leaves, map_leaves

FIRST = Runs()
"""What is known of a loss before its first call."""


def called(
    parts: Parts,
    player: str,
    function: Callable[..., Any],
    variables: Mapping[str, Variables],
    batch: Batch,
    buffers: Buffers | None,
    extra: Mapping[str, Variables],
    *,
    saving: AbstractContextManager[object],
    seen: Seen | None = None,
) -> tuple[Variables, Buffers]:
    """What a player's function returns, and everybody's buffers after it; the modules' own stay as they are.

    Args:
        parts: Of the game.
        player: Whose function it is: its module trains, those of the others evaluate.
        function: Of players' variables, by name, `batch`, and what is `extra`.
        variables: Everybody's that are known.
        batch: For a function with such a parameter.
        buffers: Of the players' modules; None for the initial ones.
        extra: Further arguments by name.
        saving: Under which autograd saves what several derivatives need.
        seen: Takes down what the normalising layers of the player's own module see.
    """
    given: dict[str, Any] = parts.given(player, function, variables)
    options: dict[str, Any] = {"saving": saving, "seen": seen}
    if torch.is_grad_enabled():
        return _called(parts, player, function, given, batch, buffers, extra, **options)
    device = next((leaf.device for value in given.values() for leaf in leaves(value)), torch.device("cpu"))
    before = random_state(device)
    try:
        return _called(parts, player, function, given, batch, buffers, extra, **options)
    except RuntimeError as error:
        if _UNTRACKED not in str(error):
            raise
    # It takes a gradient itself, as a gradient penalty does, and its value alone is wanted.
    set_random_state(before, device)
    tracked = {name: map_leaves(_leaf, value) for name, value in given.items()}
    with torch.enable_grad():
        found, after = _called(parts, player, function, tracked, batch, buffers, extra, **options)
    return map_leaves(_value, found), map_leaves(_value, after)


_UNTRACKED = "does not require grad"


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _value(tensor: Any) -> Any:
    return tensor.detach() if isinstance(tensor, Tensor) else tensor


def _called(
    parts: Parts,
    player: str,
    function: Callable[..., Any],
    given: Mapping[str, Any],
    batch: Batch,
    buffers: Buffers | None,
    extra: Mapping[str, Variables],
    *,
    saving: AbstractContextManager[object],
    seen: Seen | None,
) -> tuple[Variables, Buffers]:
    arguments = dict(given)
    if "batch" in parts.named(player, function):
        arguments["batch"] = batch
    current = parts.all_buffers(buffers)
    for name, value in given.items():
        module = parts.players[name].init if name in parts.players else None
        if isinstance(module, nn.Module) and isinstance(value, Mapping):
            arguments[name] = CallableVariables(value, module, training=name == player)
    runs = parts.runs.get(player, FIRST)
    lending = lent(parts.players, current, arguments, runs.strangers, alone=parts.modular or bool(runs.kernels))
    watched = _watched(parts, player, seen, current)
    with lending as advanced, runs.kernels.replaced(), saving, ExitStack() as stack:
        for module, forwards in watched:
            stack.enter_context(replaced(module, forwards))
        try:
            found = function(**arguments, **extra)
        except RuntimeError as error:
            told = told_of_loss(error)
            if told:
                raise BilevelError(f"Player {player!r}: {told}") from error
            raise
    # Variables that a function hands back are plain ones, which trees are walked faster of.
    plain = dict(found) if isinstance(found, CallableVariables) else found
    return plain, parts.groups.joined(advanced, parts.order)


def _watched(parts: Parts, player: str, seen: Seen | None, buffers: Buffers) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The modules whose normalising layers do more than usual while a player's function is called."""
    found: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
    for name, own in parts.players.items():  # of players who share a module the last one lends its buffers
        if isinstance(own.init, nn.Module) and buffers[name]:
            found[id(own.init)] = (own.init, watching(own.init, seen if name == player else None, buffers[name]))
    return [(module, forwards) for module, forwards in found.values() if forwards]

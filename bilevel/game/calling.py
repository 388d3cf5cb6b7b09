"""How a player's function is called: with whom it names, on modules that are lent, under kernels that are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

from bilevel.autodiff import transforms_active
from bilevel.errors import BilevelError
from bilevel.game.checks import Runs
from bilevel.game.data import Batch
from bilevel.game.hooks import GradientHooks, has_hooks, hooked_parts, hooks_of_every_module
from bilevel.game.modules import CallableVariables, lent, replaced
from bilevel.game.parts import Parts
from bilevel.game.situation import Buffers
from bilevel.game.statistics import Seen, watching
from bilevel.randomness import random_state, set_random_state
from bilevel.second_order import WITHIN_TRANSFORMS, told_of_loss
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
    """What a player's function returns, and the buffers after it of all that it can run; the modules' own stay.

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
    current = parts.lent_buffers(player, given, buffers)
    for name, value in given.items():
        module = parts.players[name].init if name in parts.players else None
        if isinstance(module, nn.Module) and isinstance(value, Mapping):
            arguments[name] = CallableVariables(value, module, training=name == player)
    runs = parts.runs.get(player, FIRST)
    lending = lent(parts.players, current, arguments, runs.strangers, alone=parts.modular or bool(runs.kernels))
    watched = _watched(parts, player, seen, current)
    hooks = _hooks(parts, player, given, runs)
    with lending as advanced, saving, hooks, _unhooked(), ExitStack() as stack:
        runs.kernels.replace_in(stack)
        for module, forwards in watched:
            stack.enter_context(replaced(module, forwards))
        try:
            found = function(**arguments, **extra)
        except RuntimeError as error:
            told = told_of_loss(error, transformed=transforms_active())
            if told:
                raise BilevelError(f"Player {player!r}: {told}") from error
            raise
    # Variables that a function hands back are plain ones, which trees are walked faster of.
    plain = dict(found) if isinstance(found, CallableVariables) else found
    return plain, parts.groups.joined(advanced)


def _unhooked() -> AbstractContextManager[object]:
    """Inside torch.func no tensors are saved by hooks, which outlive the transform: vmap itself lets them be set."""
    if not transforms_active() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return nullcontext()
    return disable_saved_tensors_hooks(WITHIN_TRANSFORMS)


def _hooks(parts: Parts, player: str, given: Mapping[str, Any], runs: Runs) -> AbstractContextManager[object]:
    """Guards the hooks on gradients of a function, or of the modules that it calls; some may have come since."""
    inside = transforms_active()
    if inside and runs.threads:
        raise BilevelError(
            f"Player {player!r}: its loss computes in threads of its own, into which torch.func, by which many games "
            "at once and Hypernetwork(...) are computed, does not follow: parts of the derivative would be lost in "
            "silence. Compute in the loss's own thread: PyTorch's operations use several cores by themselves."
        )
    if not (inside or torch.is_grad_enabled() or runs.sets_hooks):
        return nullcontext()
    modules = dict(runs.hooked)
    for name in given:
        if any(map(has_hooks, parts.submodules.get(name, ()))):
            modules |= hooked_parts(parts.players[name].init, name)
    modules = {what: module for what, module in modules.items() if has_hooks(module)}
    if not (modules or runs.sets_hooks or hooks_of_every_module()):
        return nullcontext()
    return GradientHooks(player, leaves(parts.initial[player])[0].dtype, modules).around()


def _watched(parts: Parts, player: str, seen: Seen | None, buffers: Buffers) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The modules whose normalising layers do more than usual while a player's function is called."""
    found: dict[int, tuple[nn.Module, dict[str, Any]]] = {}
    for name, tensors in buffers.items():  # of players who share a module the last one lends its buffers
        module = parts.players[name].init
        assert isinstance(module, nn.Module)
        found[id(module)] = (module, watching(module, seen if name == player else None, tensors))
    return [(module, forwards) for module, forwards in found.values() if forwards]

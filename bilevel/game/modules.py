"""The players' modules during one evaluation: they hold clones of their buffers, and give the advanced ones back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bilevel.autodiff import transforms_active
from bilevel.errors import BilevelError
from bilevel.game.player import Player
from bilevel.game.situation import Buffers
from bilevel.tree import leaves

# No state, and so no harm in a global: a module is lent to one thread at a time, and modules may share parts.
_LENT = RLock()
_PATIENCE = 600.0  # seconds; a backward pass on a GPU runs in a thread of its own, and may wait for its own caller


@contextmanager
def lent(
    players: Mapping[str, Player],
    buffers: Buffers,
    arguments: Mapping[str, Any],
    strangers: Sequence[tuple[nn.Module, str]] = (),
    *,
    alone: bool = False,
) -> Iterator[Buffers]:
    """Lend the modules clones of `buffers`; yields the dict that holds the advanced ones afterwards.

    `strangers` are buffers of modules that no player owns, which advance too: they end as they were. What is lent is
    one thread's at a time: the modules are the user's, and others may hold them too; `alone` says that some are run.
    """
    if not (alone or strangers):
        yield {name: {} for name in buffers}
        return
    if not _LENT.acquire(timeout=_PATIENCE):
        raise BilevelError(
            f"Another thread has been evaluating a loss that runs a module for {_PATIENCE:.0f} seconds, and losses "
            "that run modules are evaluated one at a time. Play games in processes, not in threads."
        )
    try:
        with _lent(players, buffers, arguments, strangers) as advanced:
            yield advanced
    finally:
        _LENT.release()


@contextmanager
def _lent(
    players: Mapping[str, Player],
    buffers: Buffers,
    arguments: Mapping[str, Any],
    strangers: Sequence[tuple[nn.Module, str]],
) -> Iterator[Buffers]:
    advanced: Buffers = {}
    taken: list[tuple[str, str, nn.Module, str, Tensor | None]] = []
    lift: Callable[[Tensor], Tensor] = torch.clone
    if transforms_active() and (strangers or any(buffers.values())):
        lift = _lifting(leaves(dict(arguments)))
    kept = [(module, name, module._buffers[name]) for module, name in strangers]
    try:
        for module, name, tensor in kept:
            module._buffers[name] = None if tensor is None else lift(tensor)
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
        for module, name, tensor in kept:
            module._buffers[name] = tensor


def _lifting(tensors: list[Any]) -> Callable[[Tensor], Tensor]:
    """Make a buffer a citizen of the running torch.func transforms, which refuse in-place writes to outsiders."""
    numbers = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]  # a batch may hold other things
    zero = sum((torch.zeros_like(t).sum() for t in numbers), torch.zeros(()))
    return lambda buffer: buffer + zero.to(buffer)


Forward = Callable[..., Any]
"""What a submodule does in place of its `forward`: called as `function(submodule, *inputs)`."""


class CallableVariables(dict[str, Tensor]):
    """A module's variables by name, as a loss receives them: a mapping that can be called as the module is.

    `weights(images)` runs the module with these variables in place of its own parameters: in training mode in the
    loss of the player itself, in evaluation mode in the losses of others, and as `training=` says where it is given.
    Submodules that are in evaluation mode while the module itself is in training mode stay so: somebody froze them.
    Buffers advance as the game says; the module's own are put back.
    """

    def __init__(
        self,
        variables: Mapping[str, Tensor],
        module: nn.Module,
        training: bool,
        forwards: Mapping[str, Forward] | None = None,
    ) -> None:
        super().__init__(variables)
        self._module, self._training, self._forwards = module, training, dict(forwards or {})
        self._thread = get_ident()

    def __call__(self, *inputs: Any, training: bool | None = None, **named: Any) -> Any:
        """What the module returns for these inputs."""
        if get_ident() != self._thread:
            # A module holds one set of parameters at a time; two threads would mix them, and leave them mixed.
            raise BilevelError(
                "A player's module was called in another thread than the one that evaluates the loss, where its "
                "variables and the module's own parameters would be mixed up. Call it in the loss's own thread, on the "
                "whole batch: PyTorch's operations use several cores by themselves."
            )
        mode = self._training if training is None else training
        parts = list(self._module.named_modules())
        slots = _slots(self._module, parts, self)
        with _mode(self._module, parts, mode), replaced(self._module, self._forwards):
            if slots is None:
                return torch.func.functional_call(self._module, dict(self), inputs, named)
            with _filled(slots, self):
                return self._module(*inputs, **named)

    @property
    def module(self) -> nn.Module:
        """The module, to look at: its own parameters are not those of the game."""
        return self._module

    def with_forwards(self, forwards: Mapping[str, Forward]) -> CallableVariables:
        """The same variables; where the module is called, submodules of these names do what the functions say.

        A function is called as `function(submodule, *inputs)`, in place of the submodule's `forward`; the module itself
        is left as it is.
        """
        return CallableVariables(self, self._module, self._training, {**self._forwards, **forwards})


# So that what walks over pytrees (torch.func, a penalty over all leaves) sees its tensors, as those of a dict.
pytree.register_pytree_node(
    CallableVariables,
    lambda variables: (list(variables.values()), list(variables)),
    lambda values, names: dict(zip(names, values, strict=True)),
    serialized_type_name="bilevel.game.modules.CallableVariables",
    flatten_with_keys_fn=lambda variables: (
        [(pytree.MappingKey(name), value) for name, value in variables.items()],
        list(variables),
    ),
)


Slots = list[tuple[dict[str, Any], str, str]]
"""Where a module holds each of its variables: a dict, the key there, and the variable's name."""


def _slots(module: nn.Module, parts: Sequence[tuple[str, nn.Module]], variables: Mapping[str, Tensor]) -> Slots | None:
    """The places of a module's parameters; None where it has others, or buffers, with which these may be tied.

    What PyTorch's `functional_call` looks for takes as long as to run a small network; it serves there.
    """
    if isinstance(module, nn.DataParallel):
        return None
    found: Slots = []
    for prefix, part in parts:
        if type(part._parameters) is not dict or part._buffers:
            return None
        for name, parameter in part._parameters.items():
            if parameter is not None:
                found.append((part._parameters, name, f"{prefix}.{name}" if prefix else name))
    return found if len(found) == len(variables) and all(slot[2] in variables for slot in found) else None


@contextmanager
def _filled(slots: Slots, variables: Mapping[str, Any]) -> Iterator[None]:
    """Put variables in the place of a module's parameters, and these back."""
    before = [held[key] for held, key, _ in slots]
    try:
        for held, key, name in slots:
            held[key] = variables[name]
        yield
    finally:
        for (held, key, _), parameter in zip(slots, before, strict=True):
            held[key] = parameter


@contextmanager
def _mode(module: nn.Module, parts: Sequence[tuple[str, nn.Module]], training: bool) -> Iterator[None]:
    """Set the modes of a module and its submodules, `parts` all together, and put them back."""
    if training and module.training:  # a part of it that evaluates was frozen by somebody
        yield
        return
    others = [part for _, part in parts if part.training != training]
    try:
        for part in others:
            _set_mode(part, training)
        yield
    finally:
        for part in others:
            _set_mode(part, not training)


def _set_mode(part: nn.Module, training: bool) -> None:
    """`part.training = training`, without the search for parameters of that name that PyTorch begins with."""
    if type(part).__setattr__ is nn.Module.__setattr__ and "training" in part.__dict__:
        part.__dict__["training"] = training
    else:
        part.training = training


@contextmanager
def replaced(module: nn.Module, forwards: Mapping[str, Forward]) -> Iterator[None]:
    """Let submodules run other forwards, and put back what they had."""
    taken: list[tuple[dict[str, Any], object]] = []
    try:
        for name, forward in forwards.items():
            part = module.get_submodule(name)
            own = vars(part)
            taken.append((own, own.get("forward", _NONE)))
            # Of the instance, before its class's: a submodule that is registered twice is met once.
            own["forward"] = partial(forward, part)
        yield
    finally:
        for own, before in reversed(taken):
            if before is _NONE:
                del own["forward"]
            else:
                own["forward"] = before


_NONE = object()

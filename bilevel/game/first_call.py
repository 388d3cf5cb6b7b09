"""What the first call of a loss shows of the modules that it runs: those that no player owns, and those refused."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

from bilevel.game.hooks import has_hooks
from bilevel.game.processes import told_of_spread

_HOOKED = "a player's module saves tensors by hooks"
_REENTRANT = "None of the inputs have requires_grad=True"


@dataclass
class FirstCall:
    """What was seen while a player's loss was called for the first time.

    Args:
        spread: What is told of modules that are spread over processes.
        strangers: Buffers that the call advanced, of modules that no player owns: the module, and the buffer's name.
        by_statistics: The identities of normalising layers that it ran in evaluation mode.
        owned: The identities of those parts of players' modules that it ran.
        hooked: Modules that it ran, with hooks on their gradients.
    """

    spread: list[str] = field(default_factory=list)
    strangers: list[tuple[nn.Module, str]] = field(default_factory=list)
    by_statistics: set[int] = field(default_factory=set)
    owned: set[int] = field(default_factory=set)
    hooked: list[nn.Module] = field(default_factory=list)

    @contextmanager
    def watched(self, owned: Collection[int], own_module: bool) -> Iterator[None]:
        """Watch the modules that are called; those that no player owns keep their buffers.

        `owned`: the ids of the modules that players own, with all their parts. `own_module`: whether the loss runs a
        module that is a player, which must not be checkpointed.
        """
        taken: dict[int, tuple[nn.Module, dict[str, tuple[Tensor, Tensor]]]] = {}

        def note(module: nn.Module, _: Any) -> None:
            told = told_of_spread(module)
            if told:
                self.spread.append(told)
            if has_hooks(module):
                self.hooked.append(module)
            if isinstance(module, _NormBase) and not module.training:
                self.by_statistics.add(id(module))
            if id(module) in owned:
                self.owned.add(id(module))
            if id(module) in owned or id(module) in taken:
                return
            lent = {}
            for name, tensor in module._buffers.items():
                if tensor is not None:
                    copied = tensor.clone()
                    lent[name] = (tensor, copied)
                    module._buffers[name] = copied
            taken[id(module)] = (module, lent)

        handle = register_module_forward_pre_hook(note)
        try:
            with ExitStack() as stack:
                stack.enter_context(warnings.catch_warnings())
                warnings.filterwarnings("ignore", message="Using `torch.compile")  # it is told of the hook
                if own_module:
                    stack.enter_context(disable_saved_tensors_hooks(_HOOKED))
                    warnings.filterwarnings("error", message=_REENTRANT)
                yield
        finally:
            handle.remove()
            for module, lent in taken.values():
                for name, (tensor, copied) in lent.items():
                    # By value: PyTorch's own kernels write into BatchNorm's statistics without counting a version.
                    if module._buffers.get(name) is not copied or not (copied.is_meta or torch.equal(copied, tensor)):
                        self.strangers.append((module, name))
                    module._buffers[name] = tensor


def told_of_recomputation(error: Exception) -> str:
    """Why a loss that recomputes its module in backward is refused; empty for any other error."""
    text = str(error)
    if "use_reentrant=True" in text:
        return (
            "it runs torch.utils.checkpoint(use_reentrant=True), through which PyTorch gives no gradient of chosen "
            "variables (torch.autograd.grad). Pass use_reentrant=False."
        )
    if _HOOKED not in text and _REENTRANT not in text:
        return ""
    return (
        "it runs the module of a player under torch.utils.checkpoint, or another hook on saved tensors. What is "
        "computed again in backward would use the module's own parameters in place of the player's variables: a wrong "
        "gradient, in silence. Switch it off (model.gradient_checkpointing_disable(), for one); to save memory use "
        "Unrolled(differentiation=Segments())."
    )

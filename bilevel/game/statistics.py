"""BatchNorm's running statistics as functions of the weights, which a leader's loss goes by."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from bilevel.autodiff import tracked_at_any_level
from bilevel.errors import UnreliableResponseWarning

Seen = dict[str, list[tuple[Tensor, Tensor]]]
"""A layer's name -> the mean and the variance of each batch that it normalised, in order."""

MEAN, VARIANCE = "running_mean", "running_var"


def moving_layers(module: nn.Module) -> dict[str, _NormBase]:
    """The layers whose running statistics move while the module is trained, by name.

    A layer that is in evaluation mode while the module is in training mode was frozen by somebody. One with a `forward`
    of its own may do anything with its statistics, and SyncBatchNorm's are those of all processes: they are left out.
    """
    return {name: part for name, part in _advancing(module).items() if _stock(part)}


def unfollowed_layers(module: nn.Module) -> dict[str, _NormBase]:
    """The layers whose running statistics move, and cannot be followed: `moving_layers` says which."""
    return {name: part for name, part in _advancing(module).items() if not _stock(part)}


def _advancing(module: nn.Module) -> dict[str, _NormBase]:
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _NormBase)
        and part.running_mean is not None
        and part.momentum != 0.0
        and (part.training or not module.training)
    }


def _stock(part: _NormBase) -> bool:
    return type(part).forward in (_BatchNorm.forward, _InstanceNorm.forward)


def watching(module: nn.Module, seen: Seen | None, buffers: Mapping[str, Tensor]) -> dict[str, Any]:
    """What these layers do in place of their `forward`; nothing where they may go on as they are.

    Where `seen` is given they write down the statistics of what they normalise. Where running statistics among
    `buffers` are on a graph, they are differentiable in them, which PyTorch's kernels are not.
    """
    if seen is None and not any(tracked_at_any_level(buffer) for buffer in buffers.values()):
        return {}
    found = {}
    for name in moving_layers(module):
        pairs = [] if seen is None else seen.setdefault(name, [])
        found[name] = partial(_watched, pairs, tracked_at_any_level(buffers[_path(name, VARIANCE)]))
    return found


def settled(module: nn.Module, seen: Seen) -> dict[str, Tensor]:
    """What the running statistics go to if the same batches come again and again, by the buffers' names."""
    found = {}
    for name, part in moving_layers(module).items():
        pairs = seen[name]
        if not pairs:
            continue
        # Of several batches in one pass each counts (1 - momentum) times the next one; momentum None is their mean.
        kept = 1.0 if part.momentum is None else 1.0 - part.momentum
        weights = [kept ** (len(pairs) - 1 - place) for place in range(len(pairs))]
        for which, kind in enumerate((MEAN, VARIANCE)):
            terms = [weight * pair[which] for weight, pair in zip(weights, pairs, strict=True)]
            found[_path(name, kind)] = sum(terms[1:], terms[0]) / sum(weights)
    return found


def warn_of_unfollowed(player: str, module: nn.Module) -> None:
    """Warn of the first layer that cannot be followed, where there is one."""
    for name, layer in unfollowed_layers(module).items():
        warnings.warn(
            f"The running statistics of {f'{player}.{name}'!r} ({type(layer).__name__}) move with the weights, and are "
            "held fixed where a leader's loss is differentiated, because the layer has a forward of its own: the "
            "hypergradient lacks that part, and may have the wrong sign. Use torch's BatchNorm as it is, GroupNorm or "
            "LayerNorm.",
            UnreliableResponseWarning,
            stacklevel=5,
        )
        return


def warn_of_standing(leader: str, player: str, module: nn.Module, *, given_none: bool) -> None:
    """Warn of running statistics that stand still in a leader's loss, though they could move."""
    layer = next(iter(moving_layers(module))) or type(module).__name__
    warnings.warn(
        f"Game.loss of {leader!r}: the running statistics of {player!r} (layer {layer!r}, and others) are "
        f"{'those that its module began with' if given_none else 'held fixed'}, and move with its weights: the "
        "hypergradient lacks that part, and may have the wrong sign. Pass buffers=game.statistics(variables, "
        f"{{{player!r}: state}}) with the state that the response returned.",
        UnreliableResponseWarning,
        stacklevel=4,
    )


def _path(layer: str, kind: str) -> str:
    return f"{layer}.{kind}" if layer else kind


def _watched(seen: list[tuple[Tensor, Tensor]], moving: bool, part: _NormBase, inputs: Tensor) -> Tensor:
    """The layer; in training mode the mean and the unbiased variance `[channels]` of its inputs are added to `seen`."""
    if moving and not part.training:
        return _normalised(part, inputs)
    if part.training:
        seen.append(_moments(part, inputs))
        for kind in (MEAN, VARIANCE) if moving else ():  # they only advance here, on no graph
            part._buffers[kind] = _present(part._buffers[kind]).detach()
    return type(part).forward(part, inputs)  # type: ignore[no-any-return]


def _moments(part: _NormBase, inputs: Tensor) -> tuple[Tensor, Tensor]:
    wide = inputs.to(_present(part.running_mean).dtype)
    if isinstance(part, _InstanceNorm):
        if _unbatched(part, wide):
            wide = wide.unsqueeze(0)
        flat = wide.flatten(2)
        return flat.mean(2).mean(0), flat.var(2).mean(0)
    flat = wide.transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1)


def _normalised(part: _NormBase, inputs: Tensor) -> Tensor:
    """The layer, differentiable in its running statistics."""
    mean, variance = _present(part.running_mean), _present(part.running_var)
    shape = (-1, *[1] * (inputs.ndim - (1 if _unbatched(part, inputs) else 2)))
    scale = torch.rsqrt(variance + part.eps)
    if part.weight is not None:
        scale = scale * part.weight
    shift = -mean * scale
    if part.bias is not None:
        shift = shift + part.bias
    return (inputs * scale.reshape(shape) + shift.reshape(shape)).to(inputs.dtype)


def _unbatched(part: _NormBase, inputs: Tensor) -> bool:
    """Whether the inputs of a layer are `[channels, ...]`, which InstanceNorm takes too."""
    return isinstance(part, _InstanceNorm) and inputs.ndim == part._get_no_batch_dim()  # type: ignore[no-untyped-call]


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None  # such layers were left out
    return tensor

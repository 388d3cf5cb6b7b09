"""The dropout layers of a module, by name, and the module called with strengths of one's own in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

from torch import Tensor, nn

from bilevel.game.modules import CallableVariables
from bilevel.game.player import kind
from bilevel.hyper.checks import Strength
from bilevel.hyper.noise import alpha_dropout, dropout, gaussian_dropout

_CHANNELS: Final[dict[type[nn.Module], int]] = {nn.Dropout1d: 1, nn.Dropout2d: 2, nn.Dropout3d: 3}
_KINDS: Final[tuple[type[nn.Module], ...]] = (nn.Dropout, *_CHANNELS, nn.AlphaDropout)


def dropout_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The dropout layers of a module by name: `nn.Dropout`, `Dropout1d` to `Dropout3d`, and `nn.AlphaDropout`.

    A subclass with a `forward` of its own is none. A dropout that is no layer, as in `nn.LSTM(dropout=0.1)`,
    `nn.MultiheadAttention(dropout=0.1)` or a call of `torch.nn.functional.dropout`, keeps its own rate.

    Examples:
        >>> list(dropout_layers(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.2))))
        ['1']
    """
    return {name: part for name, part in module.named_modules() if any(_is(part, kind) for kind in _KINDS)}


def _is(part: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(part, kind) and type(part).forward is kind.forward


def with_dropout(
    weights: CallableVariables, strength: Strength | Mapping[str, Strength], *, gaussian: bool = False
) -> CallableVariables:
    """A player that is a module, to be called with these dropout rates in place of its layers' own.

    Args:
        weights: What the loss received: `with_dropout(weights, rate)(images)`.
        strength: One rate for all dropout layers, or one by the layer's name. Layers that are not named keep their own.
        gaussian: Whether `gaussian_dropout` takes the place of `dropout` in `nn.Dropout` and its channelwise kinds.

    The module is left as it is. In evaluation mode, as in the others' losses, nothing is dropped.

    Raises:
        ValueError: For names that are no dropout layers, a module without any, and rates below 0 or at 1 or above.
        TypeError: For weights that cannot be called.
    """
    if not isinstance(weights, CallableVariables):
        raise TypeError(
            f"with_dropout: weights is {kind(weights)}; expected what a loss receives of a player whose init is an "
            "nn.Module."
        )
    layers = dropout_layers(weights.module)
    if not isinstance(strength, Mapping):
        if not layers:
            raise ValueError(f"with_dropout: {no_layers(weights.module)}")
        strength = dict.fromkeys(layers, strength)
    for name in strength:
        if name not in layers:
            raise ValueError(f"with_dropout: {name!r} is no dropout layer of the module; those are {list(layers)}.")
    return weights.with_forwards({name: _forward(name, layers[name], s, gaussian) for name, s in strength.items()})


def no_layers(module: nn.Module) -> str:
    """That a module has no dropout layers, in words."""
    return (
        f"{type(module).__name__} has no dropout layers (nn.Dropout, Dropout1d to Dropout3d, nn.AlphaDropout); its "
        f"layers are {[f'{name}: {type(part).__name__}' for name, part in module.named_modules() if name]}. Give it an "
        "nn.Dropout(0.0), or call bilevel.hyper.dropout(x, strength) in the loss."
    )


def matching(names: Iterable[str], patterns: tuple[str, ...] | None, what: str) -> list[str]:
    """Those of some names that a pattern matches, in their order; refuses a pattern that matches none."""
    known = list(names)
    if patterns is None:
        return known
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise ValueError(f"{what}: {pattern!r} matches none of {known}.")
    return [name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _forward(name: str, layer: nn.Module, strength: Strength, gaussian: bool) -> Callable[..., Any]:
    draw = gaussian_dropout if gaussian else dropout
    if _is(layer, nn.AlphaDropout):
        draw = alpha_dropout

    def forward(part: nn.Module, x: Tensor) -> Tensor:
        if not part.training:
            return x
        try:
            return draw(x, strength, mask_shape=_mask_shape(part, x))
        except ValueError as error:
            raise ValueError(f"The dropout layer {name!r}: {error}") from error

    return forward


def _mask_shape(layer: nn.Module, x: Tensor) -> list[int] | None:
    """Of the channelwise kinds, without or with a batch in front."""
    for channelwise, dims in _CHANNELS.items():
        if _is(layer, channelwise):
            return [*x.shape[: x.ndim - dims], *[1] * dims]
    return None

"""A player's end put back into a module of the user's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bilevel.tree import Variables

_COMPILED = "_orig_mod."
"""What torch.compile puts before a module's names."""


def load_into(model: nn.Module, player: str, variables: Variables, buffers: Mapping[str, Tensor]) -> None:
    """Write a player's variables and buffers into a module of the form of its init."""
    if not isinstance(variables, Mapping) or not all(isinstance(value, Tensor) for value in variables.values()):
        raise TypeError(f"load_into: player {player!r} is no module; its variables are solution.variables[{player!r}].")
    prefix = _COMPILED if any(name.startswith(_COMPILED) for name, _ in model.named_parameters()) else ""
    for what, given, own in (
        ("parameter", variables, dict(model.named_parameters())),
        ("buffer", buffers, dict(model.named_buffers())),
    ):
        wanted = {prefix + name.removeprefix(_COMPILED): value for name, value in given.items()}
        for name, value in wanted.items():
            if name not in own:
                raise ValueError(
                    f"load_into: player {player!r} has a {what} {name!r}, and the module has none of that name. Give a "
                    "module of the form that the player started from."
                )
            if own[name].shape != value.shape:
                raise ValueError(
                    f"load_into: the {what} {name!r} of player {player!r} is {list(value.shape)}, and the module's is "
                    f"{list(own[name].shape)}. Give a module of the form that the player started from."
                )
        if what == "parameter":
            left = [name for name, parameter in own.items() if parameter.requires_grad and name not in wanted]
            if left:
                raise ValueError(
                    f"load_into: the module's parameter {left[0]!r} requires grad, and player {player!r} has none of "
                    "that name. Give a module of the form that the player started from."
                )
        with torch.no_grad():
            for name, value in wanted.items():
                own[name].copy_(value)

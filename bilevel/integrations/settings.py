"""An optimiser that somebody has made, as a factory that makes it for other tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from bilevel.inner.torch_optim import OptimizerFactory


def factory_like(asker: str, optimizer: torch.optim.Optimizer) -> OptimizerFactory:
    """From tensors to an optimiser of this one's kind and options; refuses one with several groups of parameters."""
    if len(optimizer.param_groups) > 1:
        raise ValueError(
            f"{asker}: the optimiser has {len(optimizer.param_groups)} groups of parameters with options of their own, "
            "which cannot be told from tensors. Give tune an optimizer= of your own."
        )
    return made_by(type(optimizer), optimizer.param_groups[0])


def made_by(kind: type[torch.optim.Optimizer], options: Mapping[str, Any]) -> OptimizerFactory:
    """With those options that the kind is made with: what it adds to a group by itself it will add again."""
    known = inspect.signature(kind).parameters
    return partial(kind, **{name: value for name, value in options.items() if name in known and name != "params"})

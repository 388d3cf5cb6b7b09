"""Hyperparameters as numbers with a name, for a history, a table and a figure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.tree import named_leaves

_ENTRIES = 16
"""A tensor of so few entries is told entry by entry."""


def numbers(name: str, tree: Any) -> dict[str, float]:
    """Each number under its path, `hyper.decay` or `hyper.rates[2]`; of a large tensor its quartiles."""
    found: dict[str, float] = {}
    for path, leaf in named_leaves(tree):
        key = name + _dotted(path)
        if not isinstance(leaf, Tensor):
            continue
        flat = leaf.detach().double().reshape(-1)
        if leaf.ndim == 0:
            found[key] = float(flat)
        elif len(flat) <= _ENTRIES:
            found |= {f"{key}[{index}]": float(value) for index, value in enumerate(flat)}
        else:
            low, middle, high = torch.quantile(flat[:: -(-len(flat) // 2**20)], flat.new_tensor([0.25, 0.5, 0.75]))
            found |= {f"{key}.low": float(low), f"{key}.median": float(middle), f"{key}.high": float(high)}
    return found


def _dotted(path: str) -> str:
    """`['decay']` as `.decay`."""
    return path.replace("['", ".").replace("']", "")

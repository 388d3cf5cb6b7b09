"""Whether a loss computes in threads of its own, where what is set for one thread does not hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bilevel.second_order import nodes

_LEAF = 2**64 - 1  # what PyTorch gives the leaves of a graph


def next_number() -> int:
    """The number that this thread gives to the next node of a graph that it makes."""
    with torch.enable_grad():
        return int(torch.ones((), requires_grad=True).view(()).grad_fn._sequence_nr())  # type: ignore[union-attr]


def made_in_threads(loss: Tensor, began: int, evaluate: Callable[[], Tensor]) -> bool:
    """Whether a part of the graph of a loss is made by other threads than this one.

    Each thread numbers the nodes that it makes. One in the graph of `loss` that this thread has not made since `began`
    is another's, or was there before: then `evaluate`, which gives the loss once more, tells.
    """
    strange = _not_since(loss, began)
    if not strange:
        return False
    began = next_number()
    again = evaluate()
    return bool(_not_since(again, began) - strange)


def _not_since(loss: Tensor, began: int) -> set[Any]:
    ended = next_number()
    numbered = [(node, node._sequence_nr()) for node in nodes([loss])]
    return {node for node, number in numbered if number != _LEAF and not began < number < ended}

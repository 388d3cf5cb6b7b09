"""The derivative of some tensors along a direction of others, by backward passes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor


@final
class Pushforward:
    r"""From a direction v of `inputs` to (d outputs / d inputs) v, for as many directions as one likes.

    The backward pass u -> (d outputs / d inputs)^T u is linear in u: transposing it by a second one gives the product.
    The first is made once; each product costs a pass through it. Not torch's own forward mode, which custom functions
    and in-place updates do not all have.
    """

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self._outputs = [output.detach() for output in outputs]
        self._seeds = [torch.zeros_like(output).requires_grad_() for output in outputs]
        attached = [index for index, output in enumerate(outputs) if output.requires_grad]
        linear: Sequence[Tensor] = ()
        if attached:
            linear = torch.autograd.grad(
                [outputs[i] for i in attached],
                inputs,
                [self._seeds[i] for i in attached],
                create_graph=True,
                materialize_grads=True,
            )
        self._linear = [(index, value) for index, value in enumerate(linear) if value.requires_grad]

    def __call__(self, direction: Sequence[Tensor]) -> list[Tensor]:
        """The derivative of each output along `direction`, shaped like the inputs."""
        if not self._linear:
            return [torch.zeros_like(output) for output in self._outputs]
        return list(
            torch.autograd.grad(
                [value for _, value in self._linear],
                self._seeds,
                [direction[index] for index, _ in self._linear],
                retain_graph=True,
                materialize_grads=True,
            )
        )

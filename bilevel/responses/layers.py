"""Kronecker factors of a network's Gauss-Newton matrix, from the inputs and the slopes of its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from bilevel.autodiff import Pullback
from bilevel.errors import BilevelError
from bilevel.game.modules import replaced
from bilevel.linear import KroneckerFactors, gaussian


@dataclass
class _Use:
    """One call of a layer: its inputs as rows `[rows, inputs]`, and what came out, on the graph."""

    part: nn.Linear | nn.Conv2d
    inputs: Tensor
    output: Tensor

    def slopes(self, found: Tensor) -> Tensor:
        """The output's derivative as rows `[rows, outputs]`."""
        if isinstance(self.part, nn.Conv2d):
            found = found.movedim(-3, -1)
        return found.reshape(-1, found.shape[-1])


@dataclass
class Seen:
    """The calls of a module's layers, and which parameter of it is whose weight and bias."""

    names: dict[tuple[int, str], str] = field(default_factory=dict)
    uses: list[_Use] = field(default_factory=list)


@contextmanager
def layers_seen(module: nn.Module | None) -> Iterator[Seen]:
    """Write down what goes through a module's linear and convolutional layers while it is called."""
    if module is None:
        raise BilevelError("A follower that is no module has no layers, and its matrix no Kronecker factors.")
    seen, owners = Seen(), {id(p): name for name, p in module.named_parameters()}
    layers: dict[str, nn.Module] = {}
    for path, part in module.named_modules():
        if isinstance(part, nn.Linear) or _plain(part):
            layers[path] = part
            for name, p in part.named_parameters(recurse=False):
                seen.names[id(part), name] = owners[id(p)]  # of a parameter that is shared, the first name

    def forward(part: Any, inputs: Tensor) -> Tensor:
        output: Tensor = type(part).forward(part, inputs)
        seen.uses.append(_Use(part, _rows(part, inputs.detach()), output))
        return output

    with replaced(module, dict.fromkeys(layers, forward)):
        yield seen


def _plain(part: nn.Module) -> bool:
    """Whether it is a convolution whose inputs are patches with zeros around them."""
    if not isinstance(part, nn.Conv2d) or isinstance(part.padding, str):
        return False
    return part.groups == 1 and part.padding_mode == "zeros"


def _rows(part: nn.Module, inputs: Tensor) -> Tensor:
    if isinstance(part, nn.Conv2d):
        batched = inputs if inputs.ndim == 4 else inputs[None]
        patches = unfold(batched, part.kernel_size, part.dilation, part.padding, part.stride)  # type: ignore[arg-type]
        return patches.mT.reshape(-1, patches.shape[1])
    return inputs.reshape(-1, inputs.shape[-1])


def unsuited(outputs: Any) -> str:
    """What keeps these outputs from having Kronecker factors, in words; empty where nothing does."""
    if not isinstance(outputs, Tensor) or outputs.ndim == 0:
        came = f"a tensor {list(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        return f"the outputs are {came} and not one tensor with a row an example"
    return ""


def kronecker_factors(
    seen: Seen,
    rows: Tensor,
    curved: Pullback,
    product: Callable[[Tensor], Tensor],
    beside: Pullback | None,
    leaves: Mapping[str, Tensor],
) -> tuple[Sequence[KroneckerFactors], int]:
    """A block for each of the leaves, and the products that they took, from the outputs' `rows: [rows, columns]`.

    `curved` gives the products with the loss's own Hessian in the outputs, `[n]`, which is taken to be that of a sum
    over rows; `product` those with the whole matrix, and `beside` with what is none of the outputs'.
    """
    every = [use.output for use in seen.uses]
    slopes: list[list[Tensor]] = [[] for _ in every]
    for column in _roots(rows.detach(), curved):
        found = torch.autograd.grad(rows, every, column, retain_graph=True, allow_unused=True) if every else ()
        for mine, slope, use in zip(slopes, found, seen.uses, strict=True):
            if slope is not None:
                mine.append(use.slopes(slope))
    of_leaf: dict[str, list[int]] = {}
    for index, use in enumerate(seen.uses):
        for name, _ in use.part.named_parameters(recurse=False):
            of_leaf.setdefault(seen.names[id(use.part), name], []).append(index)
    taken = rows.shape[1]
    signs = torch.sign(gaussian((sum(leaf.numel() for leaf in leaves.values()),), rows, 0))
    with torch.no_grad():
        rest = _means(signs, None if beside is None else beside(signs)[0], leaves)
        if set(leaves) - set(of_leaf):
            whole, taken = _means(signs, product(signs), leaves), taken + 1
    blocks = []
    for name, leaf in leaves.items():
        uses = [index for index in of_leaf.get(name, []) if slopes[index]]
        slots = (leaf.shape[0], math.prod(leaf.shape[1:])) if leaf.ndim else (1, 1)
        if name not in of_leaf:
            blocks.append(KroneckerFactors(slots, whole[name].clamp(min=0.0)))
            continue
        across = sum((g.mT @ g for index in uses for g in slopes[index]), rows.new_zeros(slots[0], slots[0]))
        inputs = None
        if leaf.ndim > 1 and uses:
            stacked = torch.cat([seen.uses[index].inputs for index in uses])
            inputs = stacked.mT @ stacked / len(stacked)
        elif leaf.ndim > 1:
            inputs = torch.eye(slots[1], dtype=leaf.dtype, device=leaf.device)
        blocks.append(KroneckerFactors(slots, rest[name].clamp(min=0.0), across.detach(), inputs))
    return blocks, taken


def _roots(rows: Tensor, curved: Pullback) -> list[Tensor]:
    """Columns `[rows, outputs]` whose outer products add up to the loss's Hessian in each row."""
    count = rows.shape[1]
    unit = torch.eye(count, dtype=rows.dtype, device=rows.device)
    columns = [curved(unit[c].expand_as(rows).reshape(-1))[0].reshape(rows.shape) for c in range(count)]
    lengths, turned = torch.linalg.eigh(torch.stack(columns, dim=2).detach())
    return list((turned * lengths.clamp(min=0.0).sqrt().unsqueeze(1)).unbind(2))


def _means(signs: Tensor, product: Tensor | None, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each leaf's mean of a matrix's diagonal, from its product with random signs."""
    if product is None:
        return {name: leaf.new_zeros(()) for name, leaf in leaves.items()}
    seen = torch.split(signs * product, [leaf.numel() for leaf in leaves.values()])
    return {name: part.mean() for name, part in zip(leaves, seen, strict=True)}

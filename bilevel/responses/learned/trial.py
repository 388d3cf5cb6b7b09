"""A learned map's network is tried once before it is fitted: its answer must have the follower's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bilevel.networks.leafwise import LeafNetwork
from bilevel.tree import Structure


def shown(network: object) -> str:
    """A network as the user knows it: what makes one by its repr, a module by its kind, for its repr is a page."""
    return type(network).__name__ if isinstance(network, nn.Module) else repr(network)


def made(network: object, module: object) -> nn.Module:
    """The module that `network` made; raises `TypeError` when it is none."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"Hypernetwork: network {shown(network)} made a {type(module).__name__}; expected a module.")
    return module


def refuse_flat(
    network: object, module: nn.Module, numbers: Mapping[str, Tensor], follower: str, form: Structure, x: Tensor
) -> None:
    """Raise `ValueError` for a network that does not map rows of displacements to rows as long as the follower."""
    rows = torch.zeros_like(x).expand(2, -1)  # as it is called: never with less than a row and the origin
    wanted = (
        f"expected [2, {form.size}]: for each row of {x.numel()} entries one of the {form.size} of player {follower!r}"
    )
    try:
        answer = functional_call(module, dict(numbers), (rows,))
    except Exception as error:
        raise ValueError(
            f"Hypernetwork: network {shown(network)} raised {type(error).__name__} on {list(rows.shape)}: {error}; "
            f"{wanted}."
        ) from error
    came = list(answer.shape) if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
    if came != [2, form.size]:
        raise ValueError(f"Hypernetwork: network {shown(network)} maps {list(rows.shape)} to {came}; {wanted}.")


def refuse_leaves(
    network: LeafNetwork,
    module: nn.Module,
    numbers: Mapping[str, Tensor],
    follower: str,
    w0: Sequence[Tensor],
    x: Tensor,
) -> None:
    """Raise `ValueError` for a network of leaves that does not answer with w0 at a displacement of zero."""
    wanted = f"those of player {follower!r}, {[tuple(leaf.shape) for leaf in w0]}"
    try:
        answer = list(functional_call(module, dict(numbers), (torch.zeros_like(x), list(w0))))
    except Exception as error:
        raise ValueError(
            f"Hypernetwork: {network!r} raised {type(error).__name__} on a displacement [{x.numel()}] and the leaves "
            f"w0: {error}; expected an answer with leaves like {wanted}."
        ) from error
    came = [tuple(leaf.shape) for leaf in answer]
    if came != [tuple(leaf.shape) for leaf in w0]:
        raise ValueError(f"Hypernetwork: {network!r} answers with leaves {came}; expected {wanted}.")
    if not all(torch.equal(leaf, start) for leaf, start in zip(answer, w0, strict=True)):
        raise ValueError(
            f"Hypernetwork: {network!r} does not answer with w0 at a displacement of zero. A network of leaves is "
            "centred: return w0 plus something that vanishes with u."
        )

"""A learned map's network is tried once before it is fitted: its answer must have the follower's form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.networks.flat import Parameters
from bilevel.responses.learned.maps import FlatMap, LeafMap, LearnedMap, Network, shown
from bilevel.tree import Structure


def refuse_misfit(
    learned: LearnedMap, network: Network, parameters: Parameters, follower: str, w0: Sequence[Tensor], x: Tensor
) -> None:
    """Raise `ValueError` for a network, as it was given, whose answer does not have the form of the follower."""
    if isinstance(learned, FlatMap):
        _refuse_flat(learned, network, parameters, follower, learned.form, x)
    elif isinstance(learned, LeafMap):
        _refuse_leaves(learned, parameters, follower, w0, x)


def _refuse_flat(
    learned: FlatMap, network: Network, parameters: Parameters, follower: str, form: Structure, x: Tensor
) -> None:
    rows = torch.zeros_like(x).expand(2, -1)  # as it is called: never with less than a row and the origin
    wanted = (
        f"expected [2, {form.size}]: for each row of {x.numel()} entries one of the {form.size} of player {follower!r}"
    )
    try:
        answer = learned.network(parameters, rows)
    except Exception as error:
        raise ValueError(
            f"Hypernetwork: network {shown(network)} raised {type(error).__name__} on {list(rows.shape)}: {error}; "
            f"{wanted}."
        ) from error
    came = list(answer.shape) if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
    if came != [2, form.size]:
        raise ValueError(f"Hypernetwork: network {shown(network)} maps {list(rows.shape)} to {came}; {wanted}.")


def _refuse_leaves(learned: LeafMap, parameters: Parameters, follower: str, w0: Sequence[Tensor], x: Tensor) -> None:
    network, wanted = learned.network, f"those of player {follower!r}, {[tuple(leaf.shape) for leaf in w0]}"
    try:
        answer = list(network(parameters, torch.zeros_like(x), list(w0)))
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

"""Penalties on a player's variables: squares, absolute values, and both, with a strength for each part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.game.player import kind
from bilevel.hyper.checks import NONNEGATIVE, refuse_outside, refuse_shape
from bilevel.tree import Variables, named_leaves

Strengths = Any
"""A number or tensor for all; a mapping by parameter or layer; or a pytree in the form of the weights."""


def penalty(weights: Variables, decay: Strengths) -> Tensor:
    r"""Weight decay as a term of the loss, \(\tfrac12 \sum_i \lambda_i\, |w_i|^2\), a 0-d tensor.

    Its gradient is \(\lambda_i w_i\): the same number as in `torch.optim.SGD(weight_decay=...)`.

    Args:
        weights: A player's variables: a module's by name, a tensor, or any pytree.
        decay: At least 0. A number or 0-d tensor for all of them; a tensor where the weights are one tensor; a pytree
            in the form of the weights; or, of a module, a mapping by the names of parameters or of layers,
            `{"0": ..., "2.weight": ...}`: a layer's number holds for all of its parameters, and what is not named has
            no penalty. A tensor broadcasts to the weights that it belongs to.

    Raises:
        ValueError: For entries below 0, shapes that do not broadcast, names that are no parameter and no layer.
        TypeError: For a decay that is no tensor.

    Examples:
        >>> weights = {"fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}
        >>> penalty(weights, 0.5)
        tensor(2.)
        >>> penalty(weights, {"fc.weight": torch.tensor([1.0, 2.0, 3.0])})
        tensor(6.)
    """
    return 0.5 * _sum(weights, decay, "penalty: the decay", torch.square)


def l1_penalty(weights: Variables, strength: Strengths) -> Tensor:
    r"""The lasso's term \(\sum_i \lambda_i\, |w_i|_1\), a 0-d tensor; arguments and errors are those of `penalty`.

    It has a kink where a weight is 0. An optimiser that steps along its gradient never stays there, and `Implicit` has
    no derivative for weights that do; `Player(prox=...)` is made for sparse optima.

    Examples:
        >>> l1_penalty(torch.tensor([1.0, -2.0]), 0.5)
        tensor(1.5000)
    """
    return _sum(weights, strength, "l1_penalty: the strength", torch.abs)


def elastic_net(weights: Variables, l1: Strengths, l2: Strengths) -> Tensor:
    r"""Both, \(\sum_i \lambda^1_i |w_i|_1 + \tfrac12 \lambda^2_i |w_i|^2\), a 0-d tensor.

    Examples:
        >>> elastic_net(torch.tensor([1.0, -2.0]), 0.5, 1.0)
        tensor(4.)
    """
    absolute = _sum(weights, l1, "elastic_net: l1", torch.abs)
    return absolute + 0.5 * _sum(weights, l2, "elastic_net: l2", torch.square)


def by_parameter(weights: Mapping[str, Any], given: Mapping[str, Any], what: str) -> dict[str, Any]:
    """What is given by the names of parameters or layers, by parameter; refuses names of nobody, and two for one."""
    found: dict[str, tuple[str, Any]] = {}
    for name, value in given.items():
        mine = [name] if name in weights else [path for path in weights if path.startswith(f"{name}.")]
        if not mine:
            raise ValueError(
                f"{what} has a part for {name!r}, which is no parameter and no layer; those are {_names(weights)}."
            )
        for path in mine:
            if path in found:
                raise ValueError(f"{what} has two parts for {path!r}: {found[path][0]!r} and {name!r}. Leave one out.")
            found[path] = name, value
    return {path: value for path, (_, value) in found.items()}


def _names(weights: Mapping[str, Any]) -> list[str]:
    layers = dict.fromkeys(path.rpartition(".")[0] for path in weights if "." in path)
    return [*layers, *weights]


def _sum(weights: Variables, given: Strengths, what: str, term: Callable[[Tensor], Tensor]) -> Tensor:
    pairs = _pairs(weights, given, what)
    strengths: list[Tensor] = []
    numbers: dict[int, list[Tensor]] = {}  # leaves by the strength that they share
    terms: list[Tensor] = []
    for path, leaf, value in pairs:
        if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
            raise TypeError(f"{what}{path} is {kind(value)}; expected a number or a tensor.")
        strength = torch.as_tensor(value, dtype=leaf.dtype, device=None if isinstance(value, Tensor) else leaf.device)
        refuse_shape(strength.shape, f"{what}{path}", leaf.shape)
        if strengths and value is pairs[0][2]:
            strength = strengths[0]
        strengths.append(strength)
        if strength.ndim > 0:
            terms.append((strength * term(leaf)).sum())
        else:
            numbers.setdefault(id(strength), []).append(term(leaf).sum())
    different = {id(strength): strength for strength in strengths}
    refuse_outside(list(different.values()), what, NONNEGATIVE)
    # A number stands before the sum: a few operations for all of them, and no product as large as the weights.
    if numbers:
        sums = torch.stack([torch.stack(each).sum() if len(each) > 1 else each[0] for each in numbers.values()])
        terms.append((torch.stack([different[key] for key in numbers]) * sums).sum())
    return torch.stack(terms).sum() if len(terms) > 1 else terms[0]


def _pairs(weights: Variables, given: Strengths, what: str) -> list[tuple[str, Tensor, Any]]:
    """Each penalised leaf with its path and its strength."""
    if isinstance(weights, Mapping) and weights and all(isinstance(leaf, Tensor) for leaf in weights.values()):
        own: list[tuple[str, Any]] = [(f"[{name!r}]", leaf) for name, leaf in weights.items()]
    else:
        own = named_leaves(weights)
    if not own:
        raise ValueError(f"{what}: there are no weights.")
    for path, leaf in own:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{what}: weights{path} is {kind(leaf)}; expected a tensor.")
    if isinstance(given, int | float | Tensor):
        if isinstance(given, Tensor) and given.ndim > 0 and len(own) > 1:
            raise ValueError(
                f"{what} is one tensor of shape {tuple(given.shape)} for {len(own)} tensors of weights; expected one "
                "number, or a mapping by the names of parameters or layers."
            )
        return [(path, leaf, given) for path, leaf in own]
    if isinstance(weights, Mapping) and isinstance(given, Mapping) and all(isinstance(n, str) for n in given):
        if not given:
            raise ValueError(f"{what} is an empty mapping; expected a number for some of {_names(weights)}.")
        if all(isinstance(leaf, Tensor) for leaf in weights.values()):
            chosen = by_parameter(weights, given, what)
            return [(f"[{path!r}]", weights[path], value) for path, value in chosen.items()]
    others = named_leaves(given)
    if [path for path, _ in others] != [path for path, _ in own]:
        raise ValueError(
            f"{what} is {kind(given)} with the parts {[path for path, _ in others]}; expected one number, or the form "
            f"of the weights, {[path for path, _ in own]}."
        )
    return [(path, leaf, value) for (path, leaf), (_, value) in zip(own, others, strict=True)]

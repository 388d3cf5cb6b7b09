"""Layouts of a player's variables: the same numbers as a vector, a scalar or a nest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.tree import Variables


class Form(ABC):
    """How a flat vector is laid out as a player's variables."""

    @abstractmethod
    def build(self, vector: Tensor) -> Variables:
        """The variables with the entries of `vector: [n]`."""

    @abstractmethod
    def read(self, variables: Variables) -> Tensor:
        """The vector `[n]` of the entries, in the order of `build`."""


@dataclass(frozen=True)
class Vector(Form):
    """A tensor `[n]`."""

    def build(self, vector: Tensor) -> Variables:
        """The vector itself."""
        return vector

    def read(self, variables: Variables) -> Tensor:
        """The tensor itself."""
        return variables  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Scalar(Form):
    """A 0-d tensor, for games with one entry."""

    def build(self, vector: Tensor) -> Variables:
        """The only entry."""
        return vector.reshape(())

    def read(self, variables: Variables) -> Tensor:
        """The scalar as `[1]`."""
        return variables.reshape(1)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Nested(Form):
    """A dict of a dict with a 0-d tensor and a list of columns.

    Args:
        reverse: Insert the keys the other way round.

    Examples:
        >>> Nested().build(torch.tensor([1.0, 2.0, 3.0]))
        {'head': {'first': tensor(1.)}, 'tail': [tensor([[2.], [3.]])]}
    """

    reverse: bool = False

    def build(self, vector: Tensor) -> Variables:
        """The first entry apart, the others as a column."""
        tree = {"head": {"first": vector[0]}, "tail": [vector[1:].reshape(-1, 1)] if vector.numel() > 1 else []}
        return dict(reversed(tree.items())) if self.reverse else tree

    def read(self, variables: Variables) -> Tensor:
        """By name, whatever the order of the keys."""
        parts = [variables["head"]["first"], *variables["tail"]]
        return torch.cat([part.reshape(-1) for part in parts])

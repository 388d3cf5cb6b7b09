"""The same formulas for one system in plain memory, and for what is differentiated or batched."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import concrete, transforms_active
from bilevel.linear.norms import norm

Scalar = Any
"""A Python float of one system, or a 0-d tensor, one per system under vmap. `+ - * / <` work on both."""

Flag = Any
"""A bool of one system, or a boolean 0-d tensor, one per system under vmap. `& |` work on both."""


class Arithmetic(ABC):
    """What scalars are, and whether vectors are written over; a recurrence is then written once."""

    @abstractmethod
    def scalar(self, tensor: Tensor) -> Scalar:
        """A 0-d tensor as a scalar."""

    @abstractmethod
    def root(self, x: Scalar) -> Scalar:
        """The square root of x >= 0."""

    @abstractmethod
    def either(self, flag: Flag, yes: Any, no: Any) -> Any:
        """`yes` where the flag holds, else `no`: scalars, or flags."""

    @abstractmethod
    def highest(self, flag: Flag, x: Scalar) -> float:
        """The largest x of the systems with this flag; -inf where there is none."""

    @abstractmethod
    def some(self, flag: Flag) -> bool:
        """Whether any system has the flag."""

    @abstractmethod
    def add(self, x: Tensor, factor: Scalar, y: Tensor, *, into: Tensor | None = None) -> Tensor:
        """x + factor y `[n]`; `into` is a vector, x or y perhaps, that may be written over."""

    @abstractmethod
    def scaled(self, x: Tensor, factor: Scalar) -> Tensor:
        """factor x `[n]`, in which x may be written over."""

    def lowest(self, flag: Flag, x: Scalar) -> float:
        """The smallest x of the systems with this flag; inf where there is none."""
        return -self.highest(flag, -x)

    def dot(self, x: Tensor, y: Tensor) -> Scalar:
        """x'y."""
        return self.scalar(torch.dot(x, y))

    def norm(self, x: Tensor) -> Scalar:
        """|x|."""
        return self.scalar(norm(x))

    def larger(self, a: Scalar, b: Scalar) -> Scalar:
        """The larger of the two."""
        return self.either(a > b, a, b)

    def ratio(self, flag: Flag, above: Scalar, below: Scalar) -> Scalar:
        """above / below where the flag holds, and 0 elsewhere, where nothing is to move."""
        return self.either(flag, above / self.either(flag, below, 1.0), 0.0)


@final
class Plain(Arithmetic):
    """One system that nobody differentiates: scalars are Python's, and vectors are written over."""

    def scalar(self, tensor: Tensor) -> float:
        """Its number."""
        return float(tensor)

    def root(self, x: float) -> float:
        """By `math`."""
        return math.sqrt(x)

    def either(self, flag: bool, yes: Any, no: Any) -> Any:
        """One of them."""
        return yes if flag else no

    def highest(self, flag: bool, x: float) -> float:
        """x itself."""
        return x if flag else -math.inf

    def some(self, flag: bool) -> bool:
        """The flag itself."""
        return flag

    def add(self, x: Tensor, factor: float, y: Tensor, *, into: Tensor | None = None) -> Tensor:
        """In place if it may."""
        return torch.add(x, y, alpha=factor, out=into)

    def scaled(self, x: Tensor, factor: float) -> Tensor:
        """In place."""
        return x.mul_(factor)


@final
class Tracked(Arithmetic):
    """With grad, or inside a transform: everything is a tensor, and nothing is written over."""

    def scalar(self, tensor: Tensor) -> Tensor:
        """Itself."""
        return tensor

    def root(self, x: Tensor) -> Tensor:
        """By torch."""
        return x.sqrt()

    def either(self, flag: Tensor, yes: Any, no: Any) -> Tensor:
        """System by system."""
        return torch.where(flag, yes, no)

    def highest(self, flag: Tensor, x: Tensor) -> float:
        """Over the batch."""
        return concrete(torch.where(flag, x, -torch.inf))

    def some(self, flag: Tensor) -> bool:
        """Over the batch."""
        return bool(concrete(flag))

    def add(self, x: Tensor, factor: Tensor, y: Tensor, *, into: Tensor | None = None) -> Tensor:
        """A vector of its own."""
        return torch.addcmul(x, factor, y)

    def scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        """A vector of its own."""
        return factor * x


def arithmetic() -> Arithmetic:
    """That which suits where it is called."""
    return Tracked() if transforms_active() or torch.is_grad_enabled() else Plain()

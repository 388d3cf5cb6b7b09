"""Options of a torch optimiser that are tensors, kept differentiable where torch wants plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, optim
from torch.overrides import TorchFunctionMode

from bilevel.autodiff import concrete, tracked_at_any_level
from bilevel.inner.torch_optim import has_tensor


class TensorNumber(float):
    """A 0-d tensor that torch takes for a plain number, and arithmetic that is done on the tensor.

    It is never 0: `if weight_decay != 0` would leave out what has a derivative there too.
    """

    tensor: Tensor

    def __new__(cls, tensor: Tensor) -> TensorNumber:
        """With the tensor's present value."""
        number = super().__new__(cls, concrete(tensor))
        number.tensor = tensor.reshape(())
        return number

    def _by(self, function: Callable[[Any], Any], other: Any) -> Any:
        if isinstance(other, Tensor):
            return function(other)
        if isinstance(other, int | float):
            return TensorNumber(function(_plain(other)))
        return NotImplemented

    def __neg__(self) -> TensorNumber:
        return TensorNumber(-self.tensor)

    def __add__(self, other: Any) -> Any:
        return self._by(lambda o: self.tensor + o, other)

    def __radd__(self, other: Any) -> Any:
        return self._by(lambda o: o + self.tensor, other)

    def __sub__(self, other: Any) -> Any:
        return self._by(lambda o: self.tensor - o, other)

    def __rsub__(self, other: Any) -> Any:
        return self._by(lambda o: o - self.tensor, other)

    def __mul__(self, other: Any) -> Any:
        return self._by(lambda o: self.tensor * o, other)

    def __rmul__(self, other: Any) -> Any:
        return self._by(lambda o: o * self.tensor, other)

    def __truediv__(self, other: Any) -> Any:
        return self._by(lambda o: self.tensor / o, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self._by(lambda o: o / self.tensor, other)

    def __pow__(self, other: Any, modulus: None = None) -> Any:
        return self._by(lambda o: self.tensor**o, other)

    def __rpow__(self, other: Any, modulus: None = None) -> Any:
        return self._by(lambda o: o**self.tensor, other)

    def __ne__(self, other: object) -> bool:
        return other == 0 or float.__ne__(self, other)

    def __eq__(self, other: object) -> bool:
        return other != 0 and float.__eq__(self, other)

    def __gt__(self, other: float) -> bool:
        return other == 0 or float.__gt__(self, other)

    __hash__ = float.__hash__


class _Unpacked(TorchFunctionMode):
    """Hands torch's operations the tensors in place of the numbers that stand for them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        if func is Tensor.item and tracked_at_any_level(args[0]):  # ASGD keeps its rate in a tensor
            return TensorNumber(args[0].to(torch.float64, copy=True))  # torch writes over its own, and Python is exact
        args = list(args)
        for name in ("alpha", "value"):  # in x.add(y, alpha=a) and x.addcmul(y, z, value=a) nothing but a plain number
            if isinstance(given.get(name), TensorNumber):
                # A clone, since what it multiplies may be the parameter, which is written over in the same step.
                args[1] = args[1].clone() * given.pop(name).tensor
        like = args[0] if args and isinstance(args[0], Tensor) else None
        return func(*(_plain(a, like) for a in args), **{name: _plain(value, like) for name, value in given.items()})


@contextmanager
def tensor_options(optimizer: optim.Optimizer) -> Iterator[None]:
    """Let torch's own code step with options that are tensors, and lose no derivative of them."""
    given = [
        {name: value for name, value in group.items() if name != "params" and has_tensor(value)}
        for group in optimizer.param_groups
    ]
    if not any(given):
        yield
        return
    for group, options in zip(optimizer.param_groups, given, strict=True):
        group |= {name: _packed(value) for name, value in options.items()}
    try:
        with _Unpacked():
            yield
    finally:
        for group, options in zip(optimizer.param_groups, given, strict=True):
            group |= options


def _packed(option: Any) -> Any:
    if isinstance(option, tuple):
        return tuple(_packed(value) for value in option)
    return TensorNumber(option) if isinstance(option, Tensor) else option


def _plain(value: Any, like: Tensor | None = None) -> Any:
    """The tensor behind a number; of the dtype of what it meets, which `lerp` insists on."""
    if not isinstance(value, TensorNumber):
        return value
    tensor = value.tensor
    return tensor if like is None or not like.is_floating_point() else tensor.to(like)

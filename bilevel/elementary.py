"""Operations whose higher derivatives PyTorch has wrong, in silence, written with elementary ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Forms = Mapping[Callable[..., Any], Callable[..., Tensor]]
"""What is run in place of what, with the same arguments."""


class Elementary(TorchFunctionMode):
    """Inside of it other forms of some operations are run."""

    def __init__(self, forms: Forms) -> None:
        super().__init__()
        self._forms = forms

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The other form, or the operation itself."""
        return self._forms.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _whole_cross_entropy(*given: Any, options: Any = None, **named: Any) -> Tensor:
    """Of logits that are all there at once, whatever `options` say of chunks."""
    found: Tensor = vars(functional)["linear_cross_entropy"](*given, **named)
    return found


def _logcumsumexp(input: Tensor, dim: int) -> Tensor:
    """By doubling: each place holds the sum of the last k entries, and adds the k before them."""
    total, k = input, 1
    while input.ndim and k < input.shape[dim]:
        left = input.shape[dim] - k
        further = torch.logaddexp(total.narrow(dim, k, left), total.narrow(dim, 0, left))
        total = torch.cat([total.narrow(dim, 0, k), further], dim)
        k *= 2
    return total.clone() if total is input else total


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    dims = list(range(input.ndim - len(normalized_shape), input.ndim))
    wide = _wide(input)
    variance, mean = torch.var_mean(wide, dims, correction=0, keepdim=True)
    return _scaled((wide - mean) * (variance + eps).rsqrt(), weight, bias).to(input.dtype)


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    dims = list(range(input.ndim - len(normalized_shape), input.ndim))
    wide = _wide(input)
    eps = torch.finfo(wide.dtype).eps if eps is None else eps
    return _scaled(wide * (wide.square().mean(dims, keepdim=True) + eps).rsqrt(), weight, None).to(input.dtype)


def _batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    dims = [dim for dim in range(input.ndim) if dim != 1]
    return _by_channel(input, dims, weight, bias, running_mean, running_var, training, momentum, eps)


def _instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Tensor:
    dims = list(range(2, input.ndim))
    return _by_channel(input, dims, weight, bias, running_mean, running_var, use_input_stats, momentum, eps)


def _called_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    _require_values(input, [0, *range(2, input.ndim)], training)
    return _batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)


def _called_instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    _require_values(input, range(2, input.ndim), use_input_stats)
    return _instance_norm(input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps)


def _require_values(input: Tensor, dims: Iterable[int], own: bool) -> None:
    """What PyTorch's functions refuse: the moments of a single value."""
    if own and math.prod(input.shape[dim] for dim in dims) == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(input.shape)}.")


def _by_channel(
    input: Tensor,
    dims: Sequence[int],
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    own: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalised over `dims` of `[examples, channels, ...]`, by the input's own moments or by running ones."""
    wide, shape = _wide(input), [1, -1, *[1] * (input.ndim - 2)]
    if own or running_mean is None or running_var is None:
        variance, mean = torch.var_mean(wide, list(dims), correction=0, keepdim=True)
        if running_mean is not None and running_var is not None:
            count = math.prod(input.shape[dim] for dim in dims)
            with torch.no_grad():
                for running, present in ((running_mean, mean), (running_var, variance * (count / (count - 1)))):
                    # Of each example by itself, as instance norm has them, the mean over examples.
                    moved = present.detach().reshape(-1, input.shape[1]).mean(0)
                    running.lerp_(moved.to(running.dtype), momentum)
    else:
        mean, variance = running_mean.reshape(shape), running_var.reshape(shape)
    normal = (wide - mean) * (variance + eps).rsqrt()
    fit = [None if given is None else given.reshape(shape) for given in (weight, bias)]
    return _scaled(normal, *fit).to(input.dtype)


def _wide(input: Tensor) -> Tensor:
    """Moments of half precision are taken in single precision, as PyTorch does."""
    return input.float() if input.dtype in (torch.float16, torch.bfloat16) else input


def _scaled(normal: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    scaled = normal if weight is None else normal * weight
    return scaled if bias is None else scaled + bias


WEIGHT_NORM: Forms = MappingProxyType({torch._weight_norm: _weight_norm})
"""Of which the second derivative is wrong."""

CHUNKED: Forms = MappingProxyType(
    # New in PyTorch 2.13.
    {vars(functional)[name]: _whole_cross_entropy for name in ("linear_cross_entropy",) if name in vars(functional)}
)
"""Whose gradient comes in chunks, without a graph: the second derivative is 0."""

THIRD: Forms = MappingProxyType(
    {
        torch.layer_norm: _layer_norm,
        torch.rms_norm: _rms_norm,
        torch.batch_norm: _batch_norm,
        torch.instance_norm: _instance_norm,
        functional.layer_norm: _layer_norm,
        functional.rms_norm: _rms_norm,
        functional.batch_norm: _called_batch_norm,
        functional.instance_norm: _called_instance_norm,
        torch.logcumsumexp: _logcumsumexp,
        Tensor.logcumsumexp: _logcumsumexp,
    }
)
"""Of which the third derivative is wrong."""

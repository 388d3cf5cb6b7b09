"""torch functions inside JAX, and JAX's inside torch, with derivatives of any order in reverse mode."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import torch
from torch import Tensor


def to_jax(tensor: Tensor) -> jax.Array:
    """The same numbers."""
    return jax.numpy.asarray(tensor.detach().numpy())


def to_torch(array: jax.Array) -> Tensor:
    """The same numbers."""
    return torch.from_numpy(np.array(array))


def in_jax(function: Callable[..., Tensor]) -> Callable[..., jax.Array]:
    """A torch function of tensors as one of JAX's: a callback, whose vector-Jacobian product is one again."""

    def host(*arguments: np.ndarray) -> np.ndarray:
        with torch.enable_grad():
            return function(*[torch.from_numpy(np.array(a)) for a in arguments]).detach().numpy()

    @jax.custom_vjp
    def call(*arguments: jax.Array) -> jax.Array:
        # Evaluated once while JAX traces, to learn the shape of what comes.
        like = host(*[np.zeros(a.shape, a.dtype) for a in arguments])
        return jax.pure_callback(host, jax.ShapeDtypeStruct(like.shape, like.dtype), *arguments)

    def backward(arguments: tuple[jax.Array, ...], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(in_jax(_product(function, i))(*arguments, cotangent) for i in range(len(arguments)))

    call.defvjp(lambda *arguments: (call(*arguments), arguments), backward)
    return call


def _product(function: Callable[..., Tensor], index: int) -> Callable[..., Tensor]:
    """The function's derivative in one argument, transposed, times one more argument."""

    def product(*values: Tensor) -> Tensor:
        def of_one(value: Tensor) -> Tensor:
            return function(*values[:index], value, *values[index + 1 : -1])

        return torch.func.vjp(of_one, values[index])[1](values[-1])[0]

    return product


class InTorch(torch.autograd.Function):
    """A JAX function of one vector as one of torch's that can be differentiated once."""

    @staticmethod
    def forward(ctx, function, x):
        """The value."""
        ctx.function, ctx.x = function, to_jax(x)
        return to_torch(function(ctx.x))

    @staticmethod
    def backward(ctx, slope):
        """The vector-Jacobian product, by JAX."""
        return None, to_torch(jax.vjp(ctx.function, ctx.x)[1](to_jax(slope))[0])

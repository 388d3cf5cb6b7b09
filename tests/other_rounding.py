"""Another processor's rounding, on this one: `python -m pytest --ulp SEED`.

Processors, and the libraries that torch calls on them, sum products in different orders and have different tables of
exp and log. Results then differ by a unit in the last place (ulp) or a few, and a test that hangs on one of them passes
on some machines only. Here torch's CPU kernels of random numbers, sums, products of matrices, factorisations and
transcendental functions are replaced by ones that call the original and then move every number of the result by -1, 0
or 1 ulp. Everything below autograd and torch.func goes through them, so that derivatives are perturbed like values.

* The move is a function of the number itself and of SEED. So equal computations still have equal bits, and whoever
  promises that (resuming, replaying, copies) is held to it; different computations of one value no longer agree.
* A number whose last 20 of 52 bits (float64), or 8 of 23 (float32), are zero stays: 0, 1, 0.75, sums of small whole
  numbers, infinity and NaN are exact on every processor. A closed form in such numbers stays one.
* What IEEE 754 rounds alike everywhere (a single +, -, *, / or square root) stays, as do NumPy and SciPy, and
  processes that a test starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

KERNELS = (
    "normal_ uniform_ exponential_ log_normal_ linspace.out logspace.out "
    "mm mm.out mv addmv addmv_ addmv.out addmm addmm_ addmm.out bmm bmm.out baddbmm baddbmm_ baddbmm.out dot addr "
    "sum sum.dim_IntList sum.IntList_out mean mean.dim cumsum linalg_vector_norm var.correction "
    "linalg_qr _linalg_solve_ex linalg_cholesky_ex _linalg_eigh cholesky_solve linalg_lu_factor_ex linalg_lu_solve "
    "linalg_solve_triangular linalg_inv_ex _linalg_svd linalg_lstsq "
    "exp exp.out exp_ expm1 log log.out log_ log1p sin cos tan tanh tanh_ sigmoid sigmoid_ erf atan softplus gelu "
    "pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar logsumexp logaddexp "
    "_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data "
)

_INTEGERS = {torch.float64: (torch.int64, (1 << 20) - 1, 62), torch.float32: (torch.int32, (1 << 8) - 1, 30)}
_KEPT: list[Library] = []  # a kernel goes when its library does
_MIXES = {torch.int64: 0x5851F42D4C957F2D, torch.int32: 0x2C1B3C6D}


def nudge(result: Any, seed: int) -> Any:
    """Each inexact number of a fresh tensor, or of a tuple of them, by -1, 0 or 1 ulp, in place."""
    if isinstance(result, tuple | list):
        for part in result:
            nudge(part, seed)
    elif isinstance(result, Tensor) and result.dtype in _INTEGERS and not result._is_zerotensor():
        integer, exact, shift = _INTEGERS[result.dtype]
        bits = result.detach().view(integer)
        moves = bits.add(seed).mul_(_MIXES[integer]) >> shift  # -2, -1, 0 or 1, from all bits
        bits.add_(moves.clamp_(min=-1).mul_((bits & exact) != 0))
    return result


def install(seed: int) -> None:
    """Replace the kernels in this process, to its end."""
    from torch.library import get_kernel  # torch 2.6 has none: --ulp is for newer ones

    library = Library("aten", "IMPL")
    _KEPT.append(library)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in KERNELS.split():
            library.impl(name, _perturbed(name, get_kernel(f"aten::{name}", "CPU"), seed), "CPU", with_keyset=True)
    return library


def _perturbed(name: str, kernel: Any, seed: int) -> Callable[..., Any]:
    added = name.startswith(("add", "badd"))

    def call(keys: Any, *arguments: Any, **options: Any) -> Any:
        before = arguments[0].clone() if added and options.get("beta", 1) != 0 else None
        result = kernel.call_boxed(keys, *arguments, **options)
        if _rounded_alike(name, arguments, result):
            return result
        if before is None:
            return nudge(result, seed)
        kept = result.detach().clone()
        return result.copy_(torch.where(kept == before, kept, nudge(result, seed)))  # plus zero is exact

    return torch.compiler.disable(call)  # type: ignore[no-any-return]  # torch.compile would trace what it does


def _rounded_alike(name: str, arguments: tuple[Any, ...], result: Any) -> bool:
    """Whether it is a sum with one term, or a square: rounded alike everywhere."""
    if name.startswith(("sum", "mean", "linalg_vector_norm")):
        return bool(result.numel() == arguments[0].numel())
    if name.startswith(("mm", "mv", "bmm", "dot")):
        return bool(arguments[0].shape[-1] == 1)
    return name == "pow.Tensor_Scalar" and arguments[1] in (-1, 0.5, 1, 2)

"""What torch's optimisers remember before their first step, as tensors that can be differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, optim

Seed = Callable[[Tensor, Tensor, Mapping[str, Any]], dict[str, Any]]


def _in_use(option: Any) -> bool:
    # A tensor may be a player's: it has a derivative at 0 as well.
    return isinstance(option, Tensor) or option != 0


def _step(parameter: Tensor) -> Tensor:
    # torch makes it float32, in which 1 - beta ** step is off by 1e-8: the trajectory then differs from torch's own.
    return torch.zeros((), dtype=torch.float64)


def _sgd(parameter: Tensor, slope: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    if not _in_use(group["momentum"]):
        return {}
    if not _in_use(group["dampening"]):
        return {"momentum_buffer": torch.zeros_like(parameter)}
    # torch fills the first buffer with the undamped gradient, and detaches it. Start from what gives the same number:
    # momentum * buffer + (1 - dampening) * g = g.
    slope = -slope if group["maximize"] else slope
    first = slope + group["weight_decay"] * parameter
    return {"momentum_buffer": first * group["dampening"] / group["momentum"]}


def _adam(parameter: Tensor, slope: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    state = {"step": _step(parameter)}
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group.get("amsgrad") else [])]
    return state | {name: torch.zeros_like(parameter) for name in names}


def _rmsprop(parameter: Tensor, slope: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    names = [
        "square_avg",
        *(["momentum_buffer"] if _in_use(group["momentum"]) else []),
        *(["grad_avg"] * group["centered"]),
    ]
    return {"step": _step(parameter)} | {name: torch.zeros_like(parameter) for name in names}


def _adagrad(parameter: Tensor, slope: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": _step(parameter), "sum": torch.full_like(parameter, group["initial_accumulator_value"])}


def _nadam(parameter: Tensor, slope: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    return _adam(parameter, slope, group) | {"mu_product": torch.ones((), dtype=torch.float64)}


def _adamax(parameter: Tensor, slope: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": _step(parameter)} | {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_inf")}


def _adadelta(parameter: Tensor, slope: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": _step(parameter)} | {name: torch.zeros_like(parameter) for name in ("square_avg", "acc_delta")}


def _asgd(parameter: Tensor, slope: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    # torch's own rounding: it keeps ASGD's rate in a tensor of this dtype, and reads it from there.
    scalar = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    lr = torch.as_tensor(group["lr"], dtype=scalar).clone()
    return {
        "step": _step(parameter),
        "eta": lr,
        "mu": torch.ones((), dtype=scalar),
        "ax": torch.zeros_like(parameter),
    }


SEEDS: dict[type[optim.Optimizer], Seed] = {
    optim.SGD: _sgd,
    optim.Adam: _adam,
    optim.AdamW: _adam,
    optim.RMSprop: _rmsprop,
    optim.Adagrad: _adagrad,
    optim.NAdam: _nadam,
    optim.RAdam: _adam,
    optim.Adamax: _adamax,
    optim.Adadelta: _adadelta,
    optim.ASGD: _asgd,
}

"""Steps of unmodified torch.optim optimisers that autograd can differentiate.

The optimiser's own code runs. Before each step it is handed fresh clones of parameters and state, so that its
in-place updates write to tensors of this step alone, and the graph of all steps stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, optim
from torch.overrides import TorchFunctionMode

from bilevel.inner.torch_optim import Memory, OptimizerFactory, build
from bilevel.tree import Variables

Seed = Callable[[Tensor, Tensor, Mapping[str, Any]], dict[str, Any]]


def _step(parameter: Tensor) -> Tensor:
    # torch makes it float32, in which 1 - beta ** step is off by 1e-8: the trajectory then differs from torch's own.
    return torch.zeros((), dtype=torch.float64)


def _sgd(parameter: Tensor, slope: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
    if group["momentum"] == 0:
        return {}
    if group["dampening"] == 0:
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
    names = ["square_avg", *(["momentum_buffer"] if group["momentum"] > 0 else []), *(["grad_avg"] * group["centered"])]
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

_WITHOUT_ROOTS = (optim.SGD, optim.ASGD, optim.Adamax)

_WHY_NOT: dict[type[optim.Optimizer], str] = {
    optim.LBFGS: "its line search and its history are not differentiable in torch",
    optim.Adafactor: "it has no differentiable mode in torch",
    optim.Rprop: "it uses only the gradient's signs, so that its hypergradient is zero almost everywhere",
    optim.SparseAdam: "it has no differentiable mode in torch",
}


class DifferentiableOptimizer:
    """One optimiser over the leaves of a follower, stepped functionally: tensors in, tensors out."""

    def __init__(
        self,
        factory: OptimizerFactory,
        leaves: Sequence[Tensor],
        players: Mapping[str, Variables],
        memory: Memory | None,
    ) -> None:
        placeholders = [leaf.detach().clone() for leaf in leaves]
        self._optimizer = build(factory, placeholders, players)
        refuse_undifferentiable(self._optimizer)
        self._optimizer.defaults["differentiable"] = True
        places = {id(p): index for index, p in enumerate(placeholders)}
        self._groups: list[list[int]] = []
        for group in self._optimizer.param_groups:
            group["differentiable"] = True
            group["foreach"] = False
            if "fused" in group:
                group["fused"] = False
            self._groups.append([places[id(p)] for p in group["params"]])
        self.memory: Memory | None = memory

    @property
    def optimizer(self) -> optim.Optimizer:
        """The user's, as it was built."""
        return self._optimizer

    def step(self, leaves: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        """The leaves after one step along the gradients `slopes`; differentiable in both and in the memory."""
        self._seed(leaves, slopes)
        return self._moved([leaf.clone() for leaf in leaves], slopes, torch.clone)

    def step_in_place(self, leaves: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        """The same numbers, written over the leaves, the gradients and the memory, none of which has a graph."""
        self._seed(leaves, slopes)
        self._optimizer.defaults["differentiable"] = False  # which is where torch looks whether to build a graph
        try:
            return self._moved(list(leaves), list(slopes), lambda tensor: tensor)
        finally:
            self._optimizer.defaults["differentiable"] = True

    def own_memory(self) -> None:
        """Copy the memory, so that steps in place write to nobody else's."""
        if self.memory is not None:
            self.memory = [
                {key: value.clone() if isinstance(value, Tensor) else value for key, value in slot.items()}
                for slot in self.memory
            ]

    def _seed(self, leaves: Sequence[Tensor], slopes: Sequence[Tensor]) -> None:
        """What torch's optimiser would remember before its first step."""
        if self.memory is not None:
            return
        self.memory = [{} for _ in leaves]
        for group, indices in zip(self._optimizer.param_groups, self._groups, strict=True):
            for index in indices:
                self.memory[index] = SEEDS[type(self._optimizer)](leaves[index], slopes[index], group)

    def _moved(self, fresh: list[Tensor], slopes: Sequence[Tensor], kept: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Let the optimiser write to `fresh`, and to its memory as `kept` hands it over."""
        optimizer = self._optimizer
        optimizer.state.clear()
        for group, indices in zip(optimizer.param_groups, self._groups, strict=True):
            group["params"] = [fresh[index] for index in indices]
        for parameter, slope, remembered in zip(fresh, slopes, self.memory or (), strict=True):
            parameter.grad = slope
            optimizer.state[parameter] = {
                key: kept(value) if isinstance(value, Tensor) else value for key, value in remembered.items()
            }
        if isinstance(optimizer, optim.NAdam) and torch.get_default_dtype() != torch.float64:
            self._round_as_nadam(fresh)
        # Watching every operation costs as much as the step of a small network.
        with nullcontext() if type(optimizer) in _WITHOUT_ROOTS else _SquareRootsAtZero():
            optimizer.step()
        self.memory = [dict(optimizer.state[parameter]) for parameter in fresh]
        for parameter in fresh:
            parameter.grad = None
        return fresh

    def _round_as_nadam(self, fresh: Sequence[Tensor]) -> None:
        """Make NAdam's running product come out as torch rounds it, in float32, and its use exact in float64."""
        for group, indices in zip(self._optimizer.param_groups, self._groups, strict=True):
            for index in indices:
                state = self._optimizer.state[fresh[index]]
                decay = 0.96 ** ((float(state["step"]) + 1.0) * group["momentum_decay"])
                mu = group["betas"][0] * (1.0 - 0.5 * decay)
                state["mu_product"] = (state["mu_product"].float() * mu).double() / mu


class _SquareRootsAtZero(TorchFunctionMode):
    r"""Gives square roots a derivative of 0 at exactly 0, where torch's is infinite and makes 0 * inf = NaN.

    An entry whose gradient was 0 since the start (a dead ReLU, an unused class) has v = 0, and Adam's step
    c g / (c' sqrt(v) + eps), v ~ g^2, has the derivative c / eps at g = 0: that of its numerator alone.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in (torch.sqrt, Tensor.sqrt) and not kwargs and args[0].requires_grad:
            zero = args[0] == 0
            return torch.where(zero, 0.0, torch.where(zero, 1.0, args[0]).sqrt())
        if func is Tensor.sqrt_ and not kwargs and args[0].requires_grad:
            return args[0].copy_(self.__torch_function__(Tensor.sqrt, types, (args[0].clone(),)))
        return func(*args, **(kwargs or {}))


def refuse_undifferentiable(optimizer: optim.Optimizer) -> None:
    """Raise `TypeError` for an optimiser whose steps cannot be differentiated, and say which can."""
    kind = type(optimizer)
    if kind not in SEEDS:
        why = _WHY_NOT.get(kind, "it is not known to have a differentiable mode")
        can = ", ".join(known.__name__ for known in SEEDS)
        raise TypeError(
            f"Unrolled cannot differentiate through {kind.__name__}: {why}. Use one of {can}, or Implicit, which "
            "takes any optimiser."
        )

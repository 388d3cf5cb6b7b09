"""Making torch.optim optimisers over a follower's tensors, and what they remember as plain data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bilevel.tree import Variables, map_leaves

OptimizerFactory = Callable[..., torch.optim.Optimizer]
"""A callable from a list of tensors to a torch.optim optimiser, such as partial(torch.optim.SGD, lr=0.1).

Further parameters of its own that are named after players receive those players' variables. One whose first parameter
is called `named_parameters` or `named` receives a list of (name, tensor), as `model.named_parameters()` gives them.
"""

SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]
"""From an optimiser to a learning-rate scheduler over it, such as partial(CosineAnnealingLR, T_max=5000)."""

Memory = list[dict[str, Any]]
"""What an optimiser remembers of each parameter, in their order."""

_HOOKED = (
    "optimizer(parameters) registers hooks on the parameters. Gradients reach the optimiser without them, so that what "
    "they do would be left out. Clip by clip_norm= of solve, or bilevel.inner.TorchOptimizer(factory, clip_norm=...); "
    "put a mask or a scale into the loss."
)

_WANTS_NAMES = ("named_parameters", "named")


def build(
    factory: OptimizerFactory,
    parameters: Sequence[Tensor],
    players: Mapping[str, Variables] | None = None,
    names: Sequence[str] | None = None,
) -> torch.optim.Optimizer:
    """The optimiser over these parameters; refuses what is no optimiser or leaves a parameter out.

    `names` are those of the parameters, for a factory that wants them.
    """
    require_factory("optimizer", factory)
    given: list[Any] = list(parameters)
    if wants_names(factory):
        if names is None:
            raise TypeError(
                f"optimizer={factory!r} wants named parameters; only a follower's optimiser is given names. Call its "
                "first parameter `params`, and make groups by place or shape."
            )
        given = list(zip(names, parameters, strict=True))
    named = {name: (players or {})[name] for name in player_parameters(factory, players or {})}
    versions = _versions(parameters)
    try:
        optimizer = factory(given, **named)
    except RuntimeError as error:
        if "register a hook" in str(error):  # as torch says of tensors that do not require grad
            raise TypeError(_HOOKED) from error
        raise
    if any(parameter._backward_hooks or parameter._post_accumulate_grad_hooks for parameter in parameters):
        raise TypeError(_HOOKED)
    if _versions(parameters) != versions:
        raise ValueError(
            "optimizer(parameters) writes into the parameters. A factory only makes an optimiser, and is called as "
            "often as one is needed; where the variables begin is their player's init."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer(parameters) returned a {type(optimizer).__name__}; expected a torch.optim.Optimizer. Pass "
            "functools.partial(torch.optim.Adam, lr=1e-3), or wrap a closed form as bilevel.ClosedForm(function)."
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held - {id(p) for p in parameters}:
        raise ValueError(
            "optimizer(parameters) has groups with tensors that it was not given, such as a model's own parameters. "
            "Use those that it is called with, the follower's copies; for their names call the first parameter "
            "`named_parameters`."
        )
    left_out = [index if names is None else names[index] for index, p in enumerate(parameters) if id(p) not in held]
    if left_out:
        raise ValueError(
            f"optimizer(parameters) leaves out parameters {left_out} of {len(parameters)}; they would never move. "
            "Put every parameter in one of its groups."
        )
    for slot in optimizer.state.values():  # what a factory loads is not copied, and a step writes into it
        slot |= _copied(dict(slot))
    return optimizer


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each was written into; tensors of inference mode do not count it."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def require_factory(asker: str, factory: object) -> None:
    """Raise `TypeError` for what makes no optimiser; of an optimiser itself say what makes its like."""
    if isinstance(factory, torch.optim.Optimizer):
        raise TypeError(
            f"{asker} is an optimiser over tensors of its own, {type(factory).__name__}; expected a callable that "
            f"makes one over the follower's tensors: {_recipe(factory)}."
        )
    if not callable(factory):
        raise TypeError(
            f"{asker} is {factory!r}; expected a callable from parameters to a torch.optim optimiser, such as "
            "functools.partial(torch.optim.SGD, lr=0.1), or an inner solver such as bilevel.Scipy('L-BFGS-B')."
        )


def _recipe(optimizer: torch.optim.Optimizer) -> str:
    """Code that makes an optimiser like this one over other tensors."""
    kind = type(optimizer)
    where = "torch.optim." if kind.__module__.startswith("torch.optim") else ""
    accepted = list(inspect.signature(kind).parameters.values())[1:]
    defaults = {p.name: p.default for p in accepted}

    def told(options: Mapping[str, Any]) -> dict[str, Any]:
        return {n: v for n, v in options.items() if n in defaults and (isinstance(v, Tensor) or v != defaults[n])}

    groups = optimizer.param_groups
    if len(groups) == 1:
        options = "".join(f", {name}={value!r}" for name, value in told(groups[0]).items())
        return f"functools.partial({where}{kind.__name__}{options})"
    rows = []
    for group in groups:
        names = group.get("param_names")
        chosen = f"name in {names!r}" if names else "..."
        options = "".join(f", {name!r}: {value!r}" for name, value in told(group).items())
        rows.append(f"{{'params': [p for name, p in named_parameters if {chosen}]{options}}}")
    return f"lambda named_parameters: {where}{kind.__name__}([{', '.join(rows)}])"


def _written(factory: OptimizerFactory) -> Callable[..., Any]:
    """The function or class at the bottom of partials and decorators."""
    found: Any = factory
    while True:
        inside = found.func if isinstance(found, partial) else getattr(found, "__wrapped__", found)
        if inside is found:
            return found
        found = inside


def _parameters(factory: OptimizerFactory) -> list[inspect.Parameter]:
    """The parameters of a function of the user's own that can be given by name; none of a class or a builtin.

    A function that somebody wrote names players; an optimiser's class names its own options, whatever players are
    called: `weight_decay`, `momentum`.
    """
    if isinstance(_written(factory), type):
        return []
    try:
        return list(inspect.signature(factory).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        return []


def wants_names(factory: OptimizerFactory) -> bool:
    """Whether a factory's first parameter is called `named_parameters` or `named`."""
    return any(p.name in _WANTS_NAMES for p in _parameters(factory)[:1])


def player_parameters(factory: Callable[..., Any], players: Container[str], *, skip: int = 1) -> list[str]:
    """The parameters of a function that are named after players, with a default or without, and not bound already.

    The first `skip` are something else: an optimiser's parameters.
    """
    bound = factory.keywords if isinstance(factory, partial) else {}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    found = [p for p in _parameters(factory)[skip:] if p.kind in by_name]
    return [p.name for p in found if p.name in players and p.name not in bound]


def remember(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> Memory:
    """What the optimiser remembers of each parameter; its own tensors, so do not step it any more."""
    return [dict(optimizer.state.get(p, {})) for p in parameters]


def after_one_step(factory: OptimizerFactory, leaves: Sequence[Tensor], names: Sequence[str] | None = None) -> Memory:
    """What the factory's optimiser remembers of each leaf after a step that goes nowhere; [] when it is nothing."""
    parameters = [leaf.detach().clone() for leaf in leaves]
    optimizer = build(factory, parameters, names=names)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step((lambda: 0.0) if isinstance(optimizer, torch.optim.LBFGS) else None)
    remembered = remember(optimizer, parameters)
    return remembered if any(value is not None for slot in remembered for value in slot.values()) else []


def recall(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], memory: Memory | None, *, copy: bool = True
) -> None:
    """Give the optimiser what it remembered, or a copy of it; nothing when it is new."""
    for parameter, remembered in zip(parameters, memory or (), strict=False):
        if remembered:
            optimizer.state[parameter] = _copied(remembered) if copy else dict(remembered)


def kept_memory(
    factory: OptimizerFactory, leaves: Sequence[Tensor], memory: Memory | None, names: Sequence[str] | None = None
) -> Memory | None:
    """`memory` where it has the form of what the factory's optimiser remembers of these leaves; None where it has not.

    For a run that goes on with another optimiser: another learning rate keeps Adam's moments, SGD has no use for them.
    """
    try:
        wanted = after_one_step(factory, leaves, names) or [{} for _ in leaves]
    except TypeError:  # a factory that takes players as well
        return None
    return memory if memory is not None and list(map(_form, memory)) == list(map(_form, wanted)) else None


def _form(slot: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v.shape) if isinstance(v, Tensor) else () for key, v in slot.items() if v is not None}


# What schedulers set: the rate, and OneCycleLR and CyclicLR the momentum as well.
SCHEDULED = ("lr", "momentum", "betas")


def has_tensor(value: Any) -> bool:
    """Whether an option is a tensor, or a tuple with one, as betas are."""
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value))


def options_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The options of each of an optimiser's groups as they are now."""
    return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]


def scheduled(group: Mapping[str, Any], built: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that its scheduler sets, those that are no tensors.

    `built` has the options from before the scheduler: one of the user's own may set any of them, as a weight decay.
    """
    return {
        name: group[name]
        for name, was in built.items()
        if not has_tensor(group[name]) and (name in SCHEDULED or (group[name] is not was and group[name] != was))
    }


def build_scheduler(
    factory: SchedulerFactory, optimizer: torch.optim.Optimizer, memory: Mapping[str, Any] | None
) -> torch.optim.lr_scheduler.LRScheduler:
    """The scheduler over this optimiser, gone on from where `remember_scheduler` left it."""
    if not callable(factory):
        raise TypeError(
            f"scheduler is {factory!r}; expected a callable from an optimiser to a torch.optim.lr_scheduler."
            "LRScheduler, such as functools.partial(CosineAnnealingLR, T_max=5000)."
        )
    scheduler = factory(optimizer)
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        raise TypeError(
            f"scheduler(optimizer) returned a {type(scheduler).__name__}; expected a "
            "torch.optim.lr_scheduler.LRScheduler, as partial(CosineAnnealingLR, T_max=5000) makes one."
        )
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "scheduler(optimizer) returned a ReduceLROnPlateau, which wants a measured value at each step; expected a "
            "scheduler whose rate depends on the count of steps alone, such as CosineAnnealingLR or StepLR."
        )
    if memory is not None:
        scheduler.load_state_dict(_copied(memory["scheduler"]))
        for group, rate, others in zip(optimizer.param_groups, memory["rates"], memory["momenta"], strict=True):
            group |= {"lr": rate} | others
    return scheduler


def remember_scheduler(
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    optimizer: torch.optim.Optimizer,
    built: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Where the scheduler is, as plain data; `built` are `options_of` the optimiser before it had a scheduler."""
    # Most go on from the group's present values, which their own state leaves out.
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    pairs = zip(optimizer.param_groups, built, strict=True)
    momenta = [{n: value for n, value in scheduled(group, was).items() if n != "lr"} for group, was in pairs]
    return {"scheduler": scheduler.state_dict(), "rates": rates, "momenta": momenta}


def _copied(tree: Any) -> Any:
    return map_leaves(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)

"""Inner optimisers that would be differentiated wrongly, refused by name with the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import optim
from torch.optim import optimizer as torch_optimizer

from bilevel.game.residual import Residual
from bilevel.inner.own import DifferentiableOptimizer
from bilevel.inner.seeds import SEEDS

_WHY_NOT: dict[type[optim.Optimizer], str] = {
    optim.LBFGS: "its line search and its history are not differentiable in torch",
    optim.Adafactor: "it has no differentiable mode in torch",
    optim.Rprop: "it uses only the gradient's signs, so that its hypergradient is zero almost everywhere",
    optim.SparseAdam: "it has no differentiable mode in torch",
}
# What a subclass may define anew beside special methods: nothing of it is called in a step.
_FREE = frozenset(("zero_grad", "add_param_group", "state_dict", "load_state_dict"))


def known_base(optimizer: optim.Optimizer) -> type[optim.Optimizer] | None:
    """The optimiser of torch's whose steps this one takes: its own class, or one that it is derived from."""
    return next((kind for kind in type(optimizer).__mro__ if kind in SEEDS), None)


def refuse_undifferentiable(optimizer: optim.Optimizer) -> None:
    """Raise `TypeError` for an optimiser whose steps cannot be differentiated, and say which can."""
    kind, base = type(optimizer), known_base(optimizer)
    if isinstance(optimizer, DifferentiableOptimizer):
        if "step" in _overridden(kind, DifferentiableOptimizer):
            raise TypeError(f"{kind.__name__} overrides step(), which is made from its update(); write update() alone.")
        return
    if base is None:
        why = next(
            (_WHY_NOT[k] for k in kind.__mro__ if k in _WHY_NOT), "it is not known to have a differentiable mode"
        )
    elif overridden := list(dict.fromkeys(_overridden(kind, base))):
        why = f"it is a torch.optim.{base.__name__} that overrides {', '.join(overridden)}"
    else:
        return
    can = ", ".join(known.__name__ for known in SEEDS)
    raise TypeError(
        f"Unrolled and LastStep cannot differentiate through {kind.__name__}: {why}. Use one of {can}; write its "
        f"step as a function, class {kind.__name__}(bilevel.inner.DifferentiableOptimizer); or use Implicit, which "
        "takes any optimiser."
    )


def refuse_unprojected(asker: str, player: str, rests: Residual, optimizer: optim.Optimizer) -> None:
    """Raise `TypeError` for an optimiser whose steps, projected, would rest elsewhere than the player does.

    A step y - D grad, projected, rests where P(y - D grad) = y. For bounds that is the optimum with any positive
    diagonal D, for other sets with a multiple of the identity alone; for a non-smooth term D is its map's step as well.
    """
    if not rests.projects or rests.entrywise:
        return
    plain = type(optimizer) is optim.SGD
    rates = {float(group["lr"]) for group in optimizer.param_groups}
    momentum = any(float(group.get("momentum", 0.0)) != 0.0 for group in optimizer.param_groups)
    if plain and len(rates) == 1 and (rests.any_step or not momentum):
        return
    what = f"SGD with learning rates {sorted(rates)}" if plain and len(rates) > 1 else type(optimizer).__name__
    why = (
        "whose steps have no one length" if not plain or len(rates) > 1 else "whose momentum changes its steps' length"
    )
    raise TypeError(
        f"{asker}: the optimiser of player {player!r} is {what}, {why}; followed by a projection, with {rests.told}, "
        "it would rest elsewhere than at the optimum. Use torch.optim.SGD with one learning rate"
        f"{'' if rests.any_step else ' and without momentum'}"
        f"{'' if asker == 'solve' else ', or Implicit(bilevel.inner.ProjectedGradient())'}."
    )


def refuse_hooks(optimizer: optim.Optimizer) -> None:
    """Raise `TypeError` for an inner optimiser that does more in a step than its own step."""
    hooks: list[tuple[str, Any]] = [
        *(("a step pre-hook", hook) for hook in _hooks(optimizer, "pre")),
        *(("a step post-hook", hook) for hook in _hooks(optimizer, "post")),
    ]
    own = vars(optimizer).get("step")
    if own is not None:
        # torch wraps the step of an optimiser that a scheduler is made over.
        schedules = hasattr(own, "_wrapped_by_lr_sched")
        hooks.append(
            ("a scheduler that was made over it" if schedules else "a step() of its own", None if schedules else own)
        )
    if hooks:
        what, hook = hooks[0]
        name = "" if hook is None else f", {getattr(hook, '__qualname__', repr(hook))!r}"
        raise TypeError(
            f"The inner optimiser {type(optimizer).__name__} has {what}{name}: what it does would not be "
            "differentiated rightly, and where it is would be in no state. Say it as options, "
            "bilevel.inner.TorchOptimizer(factory, clip_norm=..., clip_value=..., scheduler=..., accumulate=...), or "
            "write the step as a function, bilevel.inner.DifferentiableOptimizer."
        )


def _hooks(optimizer: optim.Optimizer, when: str) -> list[Callable[..., Any]]:
    # There is no public way to see them.
    own = getattr(optimizer, f"_optimizer_step_{when}_hooks")
    everybody = getattr(torch_optimizer, f"_global_optimizer_{when}_hooks")
    found = [*own.values(), *everybody.values()]
    return [hook for hook in found if not str(getattr(hook, "__module__", "")).startswith("torch.profiler")]


def _overridden(kind: type[optim.Optimizer], base: type[optim.Optimizer]) -> Iterator[str]:
    """What classes between an optimiser's and torch's define anew of torch's."""
    for between in kind.__mro__[: kind.__mro__.index(base)]:
        for name, value in vars(between).items():
            special = name.startswith("__") and name != "__getattribute__"
            if special or name in _FREE or not hasattr(base, name):
                continue
            if name != "step" or _unpatched(value) is not _unpatched(base.step):
                yield name


_PATCH = optim.Optimizer.profile_hook_step(lambda optimizer: None).__code__


def _unpatched(step: Any) -> Any:
    """A step without the profiler's wrapper, which torch puts around it when an optimiser of a class is first made."""
    while getattr(step, "__code__", None) is _PATCH:
        step = step.__wrapped__
    return step

"""One player: a loss to minimise, the variables it chooses, the data it sees, and what vanishes where it rests."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from bilevel.game.passes import Source
from bilevel.game.residual import OwnGradient, Residual, UserResidual, required
from bilevel.tree import Variables, detached


@dataclass(frozen=True, kw_only=False)
class Player:
    r"""One player: a loss to minimise, the variables it chooses, and the data that it sees.

    Args:
        objective: called with keyword arguments named after the players that it depends on, and with `batch` when the
            player has data; returns a scalar loss, to minimise.
        init: a tensor, a pytree of tensors, or an `nn.Module`: then the variables are the module's parameters that
            require grad, as a mapping by name that a loss can call, `weights(images)`: in training mode in the player's
            own loss, in evaluation mode in the others', or as `weights(images, training=True)` says. Its buffers
            (BatchNorm's statistics, say) travel along as state that advances. The module itself is never changed.
        data: any iterable of batches that can be iterated more than once, or a function without arguments that makes
            one for each pass; it is re-iterated for ever. Each batch is read once for all who ask for it.
        optimizer_hyper: declares that the variables are hyperparameters of the *inner optimiser*, a learning rate say:
            they reach the follower through `Unrolled(lambda params, lr: SGD(params, lr=lr))` and no objective.
        residual: what vanishes where this player, as a follower, rests: F(y, others) = 0. The default is the gradient
            of its objective. A function of your own has parameters named after players, as the objective has, `batch`
            if it needs it, and `gradient`, which receives the objective's own gradient there; it returns a pytree in
            the form of `init`. `bl.extend.UserResidual(function, symmetric=True)` promises a symmetric dF/dy.
        start: where this player, as a follower, begins in every call, as a function of those who move before it (and of
            `batch`): `start=lambda meta: meta`. `Unrolled` differentiates it, so that an initialisation can lead.
            Nothing is kept from call to call then, whatever `warm_start` says; `init` gives the form.

    A projected follower, who stays within \([0, 5]\), rests where \(F(y) = y - P(y - s\,\nabla_y f) = 0\):

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Examples:
        >>> import torch
        >>> def loss(x, y): return ((y - x) ** 2).sum()
        >>> Player(loss, init=torch.zeros(3)).names
        ('x', 'y')
        >>> def projected(y, gradient): return y - (y - 0.5 * gradient).clamp(0.0, 5.0)
        >>> Player(loss, init=torch.zeros(3), residual=projected).follows_loss
        False
    """

    objective: Callable[..., Tensor]
    init: Any
    data: Source | None = None
    optimizer_hyper: bool = field(default=False, kw_only=True)
    residual: Callable[..., Variables] | UserResidual | None = field(default=None, kw_only=True)
    start: Callable[..., Variables] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.objective):
            raise TypeError(f"Player: objective is {kind(self.objective)}; expected a function that returns a loss.")
        refuse_unnamed("the objective", self.objective)
        if self.data is not None:
            check_data("Player: data", self.data)
        if isinstance(self.init, nn.Module):
            _refuse_uninitialised(self.init)
        if self.start is not None:
            require_start(self.start)
            if self.optimizer_hyper:
                raise ValueError("Player: a hyperparameter of the inner optimiser is no follower; it has no start=.")
        if self.residual is None:
            return
        if not (callable(self.residual) or isinstance(self.residual, UserResidual)):
            raise TypeError(
                f"Player: residual is {kind(self.residual)}; expected a function F(y, others) that vanishes where the "
                "player rests."
            )
        refuse_unnamed("the residual", self.own_residual.function)
        if self.optimizer_hyper:
            raise ValueError("Player: a hyperparameter of the inner optimiser is no follower; it has no residual.")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parameters that the objective must be called with."""
        return required(self.objective)

    @cached_property
    def start_names(self) -> tuple[str, ...]:
        """The parameters that `start` must be called with; none where there is no `start`."""
        return () if self.start is None else required(self.start)

    @property
    def follows_loss(self) -> bool:
        """Whether it rests where its loss's own gradient vanishes, and by no residual of the user's."""
        return self.residual is None

    @cached_property
    def own_residual(self) -> UserResidual:
        """The user's residual as an object; raises `ValueError` where there is none."""
        if self.residual is None:
            raise ValueError("Player: it has no residual of its own.")
        return self.residual if isinstance(self.residual, UserResidual) else UserResidual(self.residual)

    @property
    def rests(self) -> Residual:
        """What vanishes where it rests."""
        return OwnGradient() if self.residual is None else self.own_residual

    def variables(self) -> Variables:
        """A fresh copy of the initial variables."""
        if isinstance(self.init, nn.Module):
            return {name: p.detach().clone() for name, p in self.init.named_parameters() if p.requires_grad}
        return detached(self.init)

    def buffers(self) -> dict[str, Tensor]:
        """A fresh copy of the module's buffers; empty when `init` is no module."""
        if isinstance(self.init, nn.Module):
            return {name: b.detach().clone() for name, b in self.init.named_buffers()}
        return {}


def _refuse_uninitialised(module: nn.Module) -> None:
    for path, parameter in module.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"Player: the module's {path!r} has no shape yet; a lazy module gets it from its first batch. Call the "
                "module once, model(inputs), before it becomes a player."
            )


def refuse_unnamed(what: str, function: Callable[..., Any]) -> None:
    """Raise `TypeError` for a parameter that cannot be named in a call."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                f"Player: parameter {str(parameter)!r} of {what} cannot be named in a call. Name each parameter after "
                "a player (and `batch`), as in `def loss(decay, weights, batch)`."
            )


def require_start(start: object) -> None:
    """Raise `TypeError` for a start that is no function whose parameters can be named."""
    if not callable(start):
        raise TypeError(
            f"Player: start is {kind(start)}; expected a function of the players who move before this one, such as "
            "start=lambda meta: meta. A fixed start is init=."
        )
    refuse_unnamed("the start", start)


def check_data(told: str, data: object) -> None:
    """Raise `TypeError`, which begins with `told`, for what gives no batches again and again."""
    came = f"{told} is {kind(data)}"
    if isinstance(data, Iterator):
        raise TypeError(
            f"{came}, which can be iterated only once and would be exhausted after one pass. Pass something "
            "re-iterable, a list of batches or a DataLoader, or a function that makes it: data=lambda: make()."
        )
    if isinstance(data, Iterable) and not isinstance(data, Tensor | Mapping | str):
        return
    if isinstance(data, Iterable | nn.Module) or not callable(data):
        raise TypeError(
            f"{came}; expected an iterable of batches, such as a DataLoader or a list, or a function that makes one. "
            "A single batch is `data=[batch]`."
        )
    try:
        inspect.signature(data).bind()
    except ValueError:  # a few built-in functions have no signature
        return
    except TypeError as error:
        raise TypeError(
            f"{came}, {error}; a function that makes the batches of a pass is called without arguments: "
            "data=lambda: make(...)."
        ) from None


def kind(value: object) -> str:
    """What a value is, in words for an error."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r}" if value is None else f"a {type(value).__name__}"

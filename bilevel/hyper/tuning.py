"""One plain training loss and a list of hyperparameters, as a game."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from inspect import Parameter, Signature
from typing import Any

from torch import Tensor, nn

from bilevel.constraints import Choice, Coordinate
from bilevel.game import Game, Player
from bilevel.game.modules import CallableVariables
from bilevel.game.passes import Source
from bilevel.game.player import kind
from bilevel.game.residual import required
from bilevel.hyper.declared import Declaration, Loss
from bilevel.tree import Variables, leaves

Hyper = Sequence[Declaration] | Mapping[str, Any]
"""Declarations; or, by name, declarations and the parameters of the training loss with their ranges or tensors."""


_IDLE = re.compile(r"init\['(?P<name>\w+)'\]\['(?P<part>.+)'\] reaches no objective")
"""How a game refuses one of a declaration's strengths that acts on nothing."""


class Tuning:
    """A model's training and the hyperparameters to be tuned in it: makes the game.

    Args:
        model: An `nn.Module`; it is left as it is.
        train_loss: Called with the model's player, under any name, and `batch`: `train_loss(weights, batch)`, where
            `weights(images)` runs the model. What `hyper` names beside declarations are further parameters.
        valid_loss: Likewise; what the hyperparameters are to make small.
        train_data: Batches, as a `Player`'s data.
        valid_data: Likewise.
        hyper: A list of declarations, `[WeightDecay(), Dropout()]`, which change the training loss without a word in
            it; or a mapping by name, of declarations, and of ranges or tensors that are parameters of the loss:
            `dict(decay=bilevel.Log(1e-6, 1e-1), dropout=bilevel.hyper.Dropout())`.

    All of them are one leader, `hyper`, whose variables are a mapping by name: one hypergradient, whose cost does not
    grow with their number, serves all. Declarations act on inputs in the order in which they are listed.

    Raises:
        TypeError, ValueError: For what is none of these, names that clash or that no loss has, and, when the game is
            made, declarations that find nothing in the model or the loss to act on.

    Examples:
        >>> import torch
        >>> from bilevel.hyper import Dropout, WeightDecay
        >>> model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 2))
        >>> def loss(weights, batch): return nn.functional.cross_entropy(weights(batch[0]), batch[1])
        >>> data = [(torch.eye(3), torch.tensor([0, 1, 0]))]
        >>> tuning = Tuning(model, loss, loss, data, data, hyper=[WeightDecay(), Dropout()])
        >>> tuning.game().names
        ('hyper', 'weights')
    """

    leader = "hyper"
    """The name of the player that holds the hyperparameters."""

    def __init__(
        self,
        model: nn.Module,
        train_loss: Callable[..., Tensor],
        valid_loss: Callable[..., Tensor],
        train_data: Source | None,
        valid_data: Source | None,
        *,
        hyper: Hyper,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"Tuning: model is {kind(model)}; expected an nn.Module.")
        for what, loss in (("train_loss", train_loss), ("valid_loss", valid_loss)):
            if not callable(loss):
                raise TypeError(f"Tuning: {what} is {kind(loss)}; expected a function that returns a loss.")
        entries = _entries(hyper)
        declared = {name: entry for name, entry in entries.items() if isinstance(entry, Declaration)}
        self._plain = tuple(name for name in entries if name not in declared)
        self.follower = _follower(train_loss, valid_loss, self._plain, self.leader)
        """The name of the model's player: what the losses call it."""
        self.init: dict[str, Variables] = {
            name: entry.init(model) if isinstance(entry, Declaration) else entry for name, entry in entries.items()
        }
        """What the hyperparameters start as, by name: ranges and tensors."""
        self._model, self._valid_loss, self._data = model, valid_loss, (train_data, valid_data)
        self._training = _Objective(train_loss, self.follower, self.leader, self._plain, declared)

    @property
    def count(self) -> int:
        """How many numbers the hyperparameters are."""
        found = [leaf.tensor() if isinstance(leaf, Coordinate) else leaf for leaf in leaves(self.init)]
        return sum(leaf.numel() for leaf in found if isinstance(leaf, Tensor))

    def game(self) -> Game:
        """The game: the leader, who minimises the validation loss, and the model's player."""
        valid_loss, (train_data, valid_data) = self._valid_loss, self._data
        validation = valid_loss
        if any(name in required(valid_loss) for name in self._plain):
            validation = _Objective(valid_loss, self.follower, self.leader, self._plain, {})
        players = {
            self.leader: Player(validation, init=self.init, data=valid_data),
            self.follower: Player(self._training, init=self._model, data=train_data),
        }
        try:
            return Game(**players)
        except ValueError as error:
            idle = _IDLE.search(str(error))
            if idle is None or idle["name"] in self._plain:
                raise
            kind_ = type(self._training.declared[idle["name"]]).__name__
            raise ValueError(
                f"{error} The model does not run {idle['part']!r} in training mode (attention drops out by itself). "
                f"Name the layers that it runs so: {kind_}(of=[...])."
            ) from error

    def loss_at(self, values: Mapping[str, Variables]) -> Callable[[nn.Module, Any], Tensor]:
        """The training loss at fixed hyperparameters, `loss(model, batch)`, for a training loop of one's own.

        `values` are a solution's: `tuning.loss_at(solution.variables["hyper"])`. What is declared and not among them is
        left out: at {} the loss is as it was written. The model is any of the same form, and is in the mode that it is
        in.

        Raises `ValueError` for values of something else, and without those of the loss's own parameters.
        """
        if set(values) - set(self.init):
            raise ValueError(f"Tuning: the values are of {sorted(values)}; expected those of {sorted(self.init)}.")
        missing = [name for name in self._plain if name not in values]
        if missing:
            raise ValueError(
                f"Tuning: the values are of {sorted(values)}, and the training loss has the hyperparameters {missing} "
                "itself: it is not a loss without them. Only what is declared may be left out."
            )
        return _of_module(self._training.at(values))

    @property
    def all_declared(self) -> bool:
        """Whether the training loss has no hyperparameter of its own, so that it can be called without any."""
        return not self._plain

    def valid_loss_at(self, values: Mapping[str, Variables]) -> Callable[[nn.Module, Any], Tensor]:
        """The validation loss at fixed hyperparameters, likewise."""
        loss = _Objective(self._valid_loss, self.follower, self.leader, self._plain, {})
        return _of_module(loss.at(values))


def _of_module(loss: Loss) -> Callable[[nn.Module, Any], Tensor]:
    def at(model: nn.Module, batch: Any) -> Tensor:
        own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return loss(CallableVariables(own, model, model.training), batch)

    return at


def _entries(hyper: Hyper) -> dict[str, Any]:
    """What is tuned, by name."""
    if isinstance(hyper, Mapping):
        entries = dict(hyper)
    elif isinstance(hyper, Iterable) and not isinstance(hyper, str | Tensor):
        entries = {}
        for declaration in hyper:
            if isinstance(declaration, type):
                raise TypeError(f"Tuning: hyper has the class {declaration.__name__}; write {declaration.__name__}().")
            if not isinstance(declaration, Declaration):
                raise TypeError(
                    f"Tuning: hyper has {kind(declaration)} among its declarations; expected "
                    "bilevel.hyper.WeightDecay() and the like. A range has a name: "
                    "hyper=dict(decay=bilevel.Log(1e-6, 1e-1))."
                )
            if declaration.name in entries:
                raise ValueError(
                    f"Tuning: hyper has {declaration.name!r} twice. Give each a name of its own: "
                    f"hyper=dict(one={type(declaration).__name__}(...), two={type(declaration).__name__}(...))."
                )
            entries[declaration.name] = declaration
    else:
        raise TypeError(f"Tuning: hyper is {kind(hyper)}; expected a list of declarations, or a mapping by name.")
    if not entries:
        raise ValueError("Tuning: hyper is empty; there is nothing to tune.")
    for name, entry in entries.items():
        if isinstance(entry, type):
            raise TypeError(f"Tuning: hyper's {name!r} is the class {entry.__name__}; write {entry.__name__}().")
        if not isinstance(entry, Declaration):
            for leaf in leaves(entry) or [entry]:
                if isinstance(leaf, Choice):
                    raise TypeError(
                        f"Tuning: hyper's {name!r} has {leaf!r}; a choice has no hypergradient. Search it around the "
                        "run: each option is a trial with a bilevel.tune of its own, by bilevel.search.minimise or "
                        "Optuna."
                    )
                if not isinstance(leaf, Coordinate | Tensor):
                    what = f"is {kind(entry)}" + ("" if leaf is entry else f" that holds {kind(leaf)}")
                    raise TypeError(
                        f"Tuning: hyper's {name!r} {what}; expected a range such as bilevel.Log(1e-6, 1e-1), "
                        "a tensor, or a declaration such as bilevel.hyper.Dropout()."
                    )
    return entries


def _follower(train: Callable[..., Any], valid: Callable[..., Any], plain: Sequence[str], leader: str) -> str:
    """The parameter of the losses that is the model's player."""
    for name in plain:
        if name not in required(train):
            raise ValueError(
                f"Tuning: hyper has {name!r}, and the training loss no parameter of that name; its parameters are "
                f"{list(required(train))}. Use it there, or declare what needs no parameter: "
                "bilevel.hyper.WeightDecay(). An option of the optimiser, such as its learning rate, is in no loss: "
                "it is tuned through the steps, by bilevel.Unrolled and bilevel.inner.TorchOptimizer(rates=...)."
            )
    own = [name for name in required(train) if name not in (*plain, "batch")]
    if len(own) != 1:
        rename = "" if "batch" in required(train) else " Call the parameter that takes the batch `batch`."
        raise ValueError(
            f"Tuning: the training loss has the parameters {list(required(train))}; expected one for the model's "
            f"player, `batch`, and those of hyper, {list(plain)}. Give hyper a range for each of the others, or the "
            f"parameter a default value.{rename}"
        )
    (follower,) = own
    if follower == leader:
        raise ValueError(f"Tuning: {leader!r} names the hyperparameters; call the model's player something else.")
    strangers = [name for name in required(valid) if name not in (*plain, follower, "batch")]
    if strangers or follower not in required(valid):
        raise ValueError(
            f"Tuning: the validation loss has the parameters {list(required(valid))}; expected {follower!r}, as in the "
            f"training loss, and `batch`."
        )
    return follower


@dataclass(frozen=True)
class _Objective:
    """A loss as a function of the game's two players, with all that is declared around it.

    A dataclass, by whose fields a checkpoint of another run is told apart.
    """

    loss: Callable[..., Tensor]
    follower: str
    leader: str
    plain: tuple[str, ...]
    declared: Mapping[str, Declaration]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parameters of the loss, read once."""
        return required(self.loss)

    @property
    def __signature__(self) -> Signature:
        batch = ["batch"] if "batch" in self.names else []
        return Signature([Parameter(name, Parameter.KEYWORD_ONLY) for name in (self.follower, self.leader, *batch)])

    def __call__(self, **given: Any) -> Tensor:
        """The loss."""
        return self.at(given[self.leader])(given[self.follower], given.get("batch"))

    def at(self, values: Mapping[str, Variables]) -> Loss:
        """The loss at these hyperparameters."""
        chosen = {name: values[name] for name in self.plain if name in self.names}

        def innermost(weights: CallableVariables, batch: Any) -> Tensor:
            given = {self.follower: weights, **chosen}
            return self.loss(**given, batch=batch) if "batch" in self.names else self.loss(**given)

        composed: Loss = innermost
        # What is listed first is outermost, and sees the batch first.
        for name in reversed([name for name in self.declared if name in values]):
            composed = self.declared[name].changed(composed, values[name])
        return composed

"""The rates of a model's dropout layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from bilevel.constraints import Coordinate, Unit
from bilevel.game.modules import CallableVariables
from bilevel.hyper.declared.base import Declaration, Loss, check_patterns, check_range, started
from bilevel.hyper.layers import dropout_layers, matching, no_layers, with_dropout
from bilevel.tree import Variables


@final
@dataclass(frozen=True, kw_only=True)
class Dropout(Declaration):
    """The rates of a model's dropout layers, which are called with them as by `bilevel.hyper.with_dropout`.

    Args:
        per: One a "layer", or one for "all" of them.
        of: Names of the layers, with wildcards; default: all that `bilevel.hyper.dropout_layers` finds.
        gaussian: Whether noise of dropout's mean and variance takes the place of masks.
        within: The range; without a start of its own each layer starts at the rate that it has, or at .05 where that
            is 0: at 0 nothing is dropped, and a derivative cannot know what dropping would do.

    Examples:
        >>> Dropout().init(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3)))["1"].start
        tensor(0.3000)
    """

    name = "dropout"

    per: Literal["all", "layer"] = "layer"
    of: Sequence[str] | None = None
    gaussian: bool = False
    within: Coordinate = Unit(0.0, 0.9)  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        if self.per not in ("all", "layer"):
            raise ValueError(f"Dropout: per={self.per!r}; expected 'all' or 'layer'.")
        check_patterns(self.of, "Dropout")
        check_range(self.within, "Dropout")

    def init(self, model: nn.Module) -> Variables:
        """One rate a layer, or one."""
        layers, like = self._layers(model), next((p for p in model.parameters() if p.is_floating_point()), None)
        rates: dict[str, Coordinate] = {}
        for name, layer in layers.items():
            rate = self.within.tensor(like)
            if self.within.start is None:
                rate = torch.full_like(rate, float(layer.p) or _AT_LEAST)  # type: ignore[arg-type]
            rates[name] = self._started(name, rate)
        if self.per == "layer":
            return rates
        return self._started("all", torch.stack([range.tensor() for range in rates.values()]).mean(0))

    def _started(self, name: str, rate: Tensor) -> Coordinate:
        try:
            return started(self.within, rate)
        except ValueError as error:
            raise ValueError(f"Dropout: the rate of layer {name!r} has no place in its range. {error}") from error

    def _layers(self, model: nn.Module) -> dict[str, nn.Module]:
        layers = dropout_layers(model)
        if not layers:
            raise ValueError(f"Dropout: {no_layers(model)}")
        names = matching(layers, None if self.of is None else tuple(self.of), "Dropout, among the dropout layers")
        return {name: layers[name] for name in names}

    def changed(self, loss: Loss, strength: Variables) -> Loss:
        """The loss of a model that is called with these rates."""

        def dropped(weights: CallableVariables, batch: Any) -> Tensor:
            layers = self._layers(weights.module)
            rates = {name: strength[name] if self.per == "layer" else strength for name in layers}
            return loss(with_dropout(weights, rates, gaussian=self.gaussian), batch)

        return dropped


_AT_LEAST = 0.05

"""Penalties on a model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, final

from torch import nn

from bilevel.constraints import Coordinate, Log
from bilevel.game.modules import CallableVariables
from bilevel.hyper.declared.base import Declaration, Loss, check_patterns, check_range, started
from bilevel.hyper.layers import matching
from bilevel.hyper.penalties import l1_penalty, penalty
from bilevel.tree import Variables

Per = Literal["all", "layer", "parameter", "weight"]
_PER: Final = ("all", "layer", "parameter", "weight")


@dataclass(frozen=True, kw_only=True)
class _Penalty(Declaration):
    per: Per = "all"
    of: Sequence[str] | None = None
    within: Coordinate = Log(1e-8, 10.0, start=1e-4)  # noqa: RUF009  # frozen

    def __post_init__(self) -> None:
        if self.per not in _PER:
            raise ValueError(f"{self._who}: per={self.per!r}; expected one of {list(_PER)}.")
        check_patterns(self.of, self._who)
        check_range(self.within, self._who)

    @property
    def _who(self) -> str:
        return type(self).__name__

    def init(self, model: nn.Module) -> Variables:
        """One number, or one by layer or parameter, or a tensor by parameter."""
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        chosen = {name: parameters[name] for name in self._chosen(list(parameters))}
        first = next(iter(chosen.values()), None)
        if first is None:
            raise ValueError(f"{self._who}: the model has no parameter that requires grad.")
        one = started(self.within, self.within.tensor(first))
        if self.per == "all":
            return one
        if self.per == "layer":
            return dict.fromkeys((_layer(name) for name in chosen), one)
        if self.per == "parameter":
            return dict.fromkeys(chosen, one)
        return {n: started(self.within, self.within.tensor(p).expand(p.shape).clone()) for n, p in chosen.items()}

    def _chosen(self, names: list[str]) -> list[str]:
        return matching(names, None if self.of is None else tuple(self.of), self._who)

    def _by_parameter(self, weights: CallableVariables, strength: Variables) -> Any:
        if self.of is None and self.per == "all":
            return strength
        chosen = self._chosen(list(weights))
        if self.per == "all":
            return dict.fromkeys(chosen, strength)
        return {name: strength[_layer(name) if self.per == "layer" else name] for name in chosen}


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0] or parameter


@final
@dataclass(frozen=True, kw_only=True)
class WeightDecay(_Penalty):
    """A penalty on squared weights, `bilevel.penalty`: the same number as in `torch.optim.SGD(weight_decay=...)`.

    Args:
        per: How many: one for "all" weights, or one a "layer", "parameter" or "weight". Many fit the validation data.
        of: Names of the parameters that it holds for, with wildcards, `["*.weight"]`; default: all.
        within: Its range and start.

    Examples:
        >>> list(WeightDecay(per="parameter").init(nn.Linear(2, 1)))
        ['weight', 'bias']
    """

    name = "weight_decay"

    def changed(self, loss: Loss, strength: Variables) -> Loss:
        """The loss and the penalty."""
        return lambda weights, batch: loss(weights, batch) + penalty(weights, self._by_parameter(weights, strength))


@final
@dataclass(frozen=True, kw_only=True)
class L1Penalty(_Penalty):
    """A penalty on absolute weights, `bilevel.hyper.l1_penalty`; with `WeightDecay` beside it an elastic net.

    Args:
        per: As in `WeightDecay`.
        of: Likewise.
        within: Its range and start.

    Examples:
        >>> L1Penalty(of=["weight"]).init(nn.Linear(2, 1)).start
        tensor(1.0000e-04)
    """

    name = "l1_penalty"

    def changed(self, loss: Loss, strength: Variables) -> Loss:
        """The loss and the penalty."""
        return lambda weights, batch: loss(weights, batch) + l1_penalty(weights, self._by_parameter(weights, strength))

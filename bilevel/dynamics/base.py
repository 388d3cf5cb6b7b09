"""What a rule of play is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bilevel._returned import Lent, both, require_instance, require_leaves
from bilevel.dynamics.field import Field

State = dict[str, Any]
"""What a rule remembers from step to step: tensors by name, which a checkpoint holds."""

Point = Mapping[str, list[Tensor]]
"""The leaves of every moving player's variables."""


class Dynamics(ABC):
    r"""Turns the field of own gradients $\xi(z)$ into the direction that each player descends.

    A rule is configuration; its state is an argument and a return value. Directions go to the players' own
    optimisers; the formulas' exact rates are those of plain SGD with the rule's own step size.
    """

    @property
    def alternates(self) -> bool:
        """Whether players move one after the other within a step, each seeing the moves before its own."""
        return False

    @property
    def rests_with_bounds(self) -> bool:
        """Whether its steps, projected onto the players' domains, rest where projected gradients do.

        So they do where at rest a direction is a positive multiple of the player's own gradient there. A rule that
        looks ahead, or that corrects the gradient, is at rest where its direction vanishes, and not at a bound.
        """
        return False

    def placed(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the players whom the rule moves itself: their entry in `directions` is where they go.

        They have no optimiser in `solve`.
        """
        return ()

    def report(self, state: State) -> Mapping[str, float]:
        """Numbers of the rule's own that a run's history tells of each step, as `dynamics.name`."""
        return {}

    @abstractmethod
    def directions(self, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
        """What each player's optimiser receives as its gradient, leaf by leaf, and the next state: a tuple of two.

        A direction for each of `field.movers`, in the form of `field.here()`. Neither `field.point` nor tensors of the
        state are written to.

        Args:
            field: The players' own gradients on the present batches, and their Jacobian.
            state: What the last call returned; {} before the first step. With `alternates` that is the call of the
                player who moved before.
        """


def directed(rule: Dynamics, field: Field, state: State) -> tuple[dict[str, list[Tensor]], State]:
    """What `rule.directions` returns, held to its contract.

    Raises:
        TypeError, ValueError: For what is no tuple of directions like the movers' leaves and a dict, and for a rule
            that moved the players or wrote into its state.
    """
    name, lent = f"{type(rule).__name__}.directions", Lent()
    field.noting(lambda player, point: lent.note(f"field.point[{player!r}]", point))
    found, after = both(
        rule.directions(field, lent.out("a tensor of its state", state)), name, "the directions, and the next state"
    )
    lent.require_untouched(name)
    require_instance(found, dict, f"{name}: what it returned", f"a dict of directions for {list(field.movers)}")
    require_instance(after, dict, f"{name}: the state that it returned", "a dict, {} where it remembers nothing")
    wrong = [mover for mover in field.movers if mover not in found] or [n for n in found if n not in field.point]
    if wrong:
        raise ValueError(
            f"{name} returned directions for {list(found)}, {'without' if wrong[0] in field.movers else 'with'} "
            f"{wrong[0]!r}; expected those of {list(field.movers)}."
        )
    for player, direction in found.items():
        require_leaves(direction, field.point[player], f"{name}: the direction of player {player!r}")
    return {player: [leaf.detach() for leaf in direction] for player, direction in found.items()}, after


def require_positive(rule: Dynamics, option: str, value: float) -> None:
    """Raise `ValueError` where a rule's option is no positive finite number."""
    if not 0.0 < value < float("inf"):
        raise ValueError(f"{type(rule).__name__}: {option}={value}; expected a positive finite number.")


def require_rule(rule: object) -> None:
    """Raise `TypeError` for what is no rule of play."""
    if isinstance(rule, type) and issubclass(rule, Dynamics):
        raise TypeError(f"solve: dynamics is the class {rule.__name__} itself; expected one of it, {rule.__name__}().")
    wanted = "a rule of play such as Optimistic(), or ValueFunction(optimizer, F2SA2())"
    require_instance(rule, Dynamics, "solve: dynamics", wanted)

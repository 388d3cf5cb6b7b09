"""Which rules of play keep many games apart."""

from __future__ import annotations

from bilevel.dynamics import (
    LOLA,
    Alternating,
    Consensus,
    ExactLOLA,
    Extragradient,
    LookAhead,
    NegativeMomentum,
    Optimistic,
    Simultaneous,
    SymplecticAdjustment,
    TwoTimescale,
)

_SEPARABLE = (
    *(Simultaneous, Alternating, TwoTimescale, Extragradient, Optimistic, NegativeMomentum),
    *(Consensus, LookAhead, LOLA, ExactLOLA),
)


def refuse_mixing_dynamics(dynamics: object, count: int) -> None:
    """Refuse a rule with a number that is made of the whole field, such as a sign or a solver's step length."""
    fixed = isinstance(dynamics, SymplecticAdjustment) and not dynamics.aligned
    if not (isinstance(dynamics, _SEPARABLE) or fixed):
        raise TypeError(
            f"solve: {dynamics!r} follows the whole field of {count} games by common numbers, which would mix them. "
            f"Use {', '.join(rule.__name__ for rule in _SEPARABLE)} or SymplecticAdjustment(aligned=False), or solve "
            "them one by one: solve(games.game(i), ...)."
        )

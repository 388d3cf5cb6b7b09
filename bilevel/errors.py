"""What goes wrong while a game is played, as exceptions and warnings that carry numbers.

Bad input is refused by plain `ValueError` and `TypeError`. These are for what only running can show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar


class StopRun(Exception):  # noqa: N818 - no error: a callback of `solve` asks for it
    """Raised by a callback, it ends `solve` after the step: the solution is returned, and a checkpoint written."""


class CheckStopped(KeyboardInterrupt):
    """Ctrl-C in the check that follows a run of `tune`: the run had ended, and is this exception's `tuned`."""

    def __init__(self, tuned: Any) -> None:
        super().__init__(
            "tune: stopped in the check that follows the run. The run is `tuned` of this bilevel.errors.CheckStopped; "
            "where it has a checkpoint, the same call goes on with the check, and with check=False gives the run."
        )
        self.tuned = tuned


class BilevelError(RuntimeError):
    """Base of every error that bilevel raises while running."""


class ConvergenceError(BilevelError):
    """An iteration did not reach the tolerance that it was asked to reach, or diverged."""


class IndefiniteSystemError(BilevelError):
    """A solver for positive-definite systems met a direction of negative or zero curvature."""


class NotSymmetricError(BilevelError):
    """A solver for symmetric systems was handed an operator that is not symmetric."""


class SingularSystemError(BilevelError):
    """A linear system has no unique solution."""


class SecondDerivativeError(BilevelError):
    """A second derivative was needed of what has none: an operation in a loss, or the answer of `Nudged`."""


class CapturedTensorError(BilevelError):
    """A function captured a tensor that requires grad; its derivative would be lost in silence."""


class DataError(BilevelError):
    """A player's data raised, or gave other batches than before; the message says whose, and in which pass."""


class ExhaustedDataError(DataError):
    """A player's data gave batches once and then no more."""


class CheckpointError(BilevelError):
    """A checkpoint cannot be read, or belongs to another game."""


class ParallelError(BilevelError):
    """The processes that play one game do not agree, or one of them has ended or hangs; the message says which."""


class WorkerError(BilevelError):
    """A process that does work for this one was killed, or cannot read its work; the message says what it met."""


class NonFiniteError(BilevelError):
    """A loss, a gradient or a solution became NaN or infinite while running."""


class ConstraintError(BilevelError):
    """A constrained player's optimum has no derivative, or is none; the message names the constraint."""


class InfeasibleError(ConstraintError):
    """An answer breaks its player's constraints; the message says which, and by how much."""


class UnboundedError(ConstraintError):
    """A player's loss falls without bound within its constraints."""


class DependentConstraintsError(ConstraintError):
    """The gradients of the constraints that bind are linearly dependent: the multipliers are not unique."""


class CurvatureError(ConstraintError):
    """The Lagrangian has no positive curvature along the constraints that bind: no strict minimum."""


class BilevelWarning(UserWarning):
    """Base of every warning of bilevel.

    Args:
        message: What to know, with its numbers.
        repeated: Whether it says again what an earlier call measured.
        games: Those of many games that it speaks of, by number; None for all.
    """

    def __init__(self, message: str = "", *, repeated: bool = False, games: Sequence[int] | None = None) -> None:
        super().__init__(message)
        self.repeated, self.games = repeated, games


class NonConvergenceWarning(BilevelWarning):
    """Something stopped short of where it should end; the message says by how much, and `of` what it was.

    Its kinds are `FollowerNonConvergenceWarning`, `LeaderNonConvergenceWarning` and `LinearNonConvergenceWarning`.
    A filter for this class is one for all of them.
    """

    of: ClassVar[str] = ""


class FollowerNonConvergenceWarning(NonConvergenceWarning):
    """A follower is not at its optimum: the lower level was not solved to its tolerance."""

    of = "follower"


class LeaderNonConvergenceWarning(NonConvergenceWarning):
    """A run ended while its leader was on the way, ran away, or was stopped by SciPy's method: the upper level."""

    of = "leader"


class LinearNonConvergenceWarning(NonConvergenceWarning):
    """A linear system is not solved to its tolerance.

    It is that of a linear solver, as a rule for a hypergradient's adjoint; or the same equation where `SingleLoop`
    follows it, `Nudged` solves nudged problems in its place, and `Hypernetwork` fits a slope to it.
    """

    of = "linear system"


class UnreliableResponseWarning(BilevelWarning):
    """A response is known to give wrong derivatives as it is configured; the message says why."""


class ShortHorizonWarning(UnreliableResponseWarning):
    """A fresh training does better at the values that a run of tuning started from, or untuned, than at those found."""


class InfeasibleWarning(BilevelWarning):
    """A leader's functions are broken where a run ended; the message says which, and by how much."""


class OtherDataWarning(BilevelWarning):
    """A run goes on with other batches than it was saved with; the message says whose."""


class KinkWarning(UnreliableResponseWarning):
    """A follower's constraint is about to begin or to cease to hold: its answer has two one-sided derivatives."""


# What settings are of. Sizes are each class's own to check.

_KINDS: dict[str, tuple[type, str]] = {
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "bool": (bool, "True or False"),
}


def require_kinds(settings: Any, **kinds: type) -> None:
    """Raise `TypeError` where a field of a dataclass that says it is an int, a float or a bool is something else.

    NumPy's numbers are numbers; True is no count; a tensor is none of them, for the run would lose its derivative.
    `kinds` are those of further fields, by name.
    """
    own: Any = type(settings)
    who = own.__name__
    for name, kind in kinds.items():
        if not isinstance(getattr(settings, name), kind):
            raise TypeError(f"{who}: {name}={getattr(settings, name)!r}; expected a {kind.__name__}.")
    for name, wanted, optional in _numbers_of(own):
        value = getattr(settings, name)
        if value is None and optional:
            continue
        if not any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind, _ in wanted):
            told = " or ".join([text for _, text in wanted] + ["None"] * optional)
            raise TypeError(f"{who}: {name}={value!r}; expected {told}.")


@cache  # a response makes some of its settings anew in each call
def _numbers_of(settings: type) -> list[tuple[str, list[tuple[type, str]], bool]]:
    """The fields that say they are numbers: their names, of what kinds they may be, and whether None will do."""
    found = []
    for field in [field for field in fields(settings) if field.init]:
        parts = str(field.type).split(" | ")
        wanted = [_KINDS[part] for part in parts if part in _KINDS]
        if wanted and all(part in _KINDS or part == "None" for part in parts):
            found.append((field.name, wanted, "None" in parts))
    return found

"""One game's outcome, and what it counts as."""

from __future__ import annotations

import math
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.attack.draw import Draw
from bilevel.errors import BilevelError, BilevelWarning

VERDICTS = ("right", "refused", "warned", "told", "no truth", "slow", "raw", "silent")


@dataclass
class Outcome:
    """A claimed hypergradient beside the true one.

    `size` is what the error is measured by, `allowed` how much of it may be wrong, `doubt` how uncertain the truth is.
    `told`: the report says itself that the answer is worse than asked for.
    """

    found: Tensor
    truth: Tensor | None
    size: float
    allowed: float
    doubt: Tensor | None = None
    told: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)


Family = Callable[[Draw, "list[str]"], Outcome]
"""Draws a game; it may clear the list of warnings before the call that counts."""


class TooSlow(BaseException):
    """The time of one game is over; no library catches it."""


def judge(outcome: Outcome, warned: bool) -> tuple[str, float]:
    """The verdict, and the error in units of `size`."""
    found, truth = outcome.found.double(), outcome.truth
    if truth is None or not torch.isfinite(truth).all():
        return "no truth", math.nan
    if not torch.isfinite(found).all():
        return ("warned" if warned else "silent"), math.inf
    error = float((found - truth).norm()) / outcome.size
    doubt = 0.0 if outcome.doubt is None else float(outcome.doubt.norm()) / outcome.size
    if not doubt <= 0.2 * outcome.allowed + 0.1 * error:
        return "no truth", error
    if error <= outcome.allowed:
        return "right", error
    return ("warned" if warned else "told" if outcome.told else "silent"), error


def attack(name: str, family: Family, seed: int, seconds: int) -> dict[str, Any]:
    """Play one drawn game; its record."""
    caught: list[str] = []
    other: list[str] = []

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        (caught if issubclass(category, BilevelWarning) else other).append(str(message))

    def over(*_: Any) -> None:
        raise TooSlow

    record: dict[str, Any] = {"family": name, "seed": seed}
    begun = time.time()
    torch.manual_seed(seed)
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)  # again and again: where nothing can be raised, one is ignored
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = show
            outcome = family(Draw(f"{name}{seed}"), caught)
        verdict, error = judge(outcome, bool(caught))
        record |= {
            "verdict": verdict,
            "error": error,
            "allowed": outcome.allowed,
            "about": dict(outcome.about),
            "found": outcome.found.tolist(),
            "truth": None if outcome.truth is None else outcome.truth.tolist(),
        }
    except TooSlow as late:
        record |= {"verdict": "slow", "at": _places(late)}
    except BilevelError as refusal:
        record |= {"verdict": "refused", "says": f"{type(refusal).__name__}: {refusal}"}
    except (TypeError, ValueError, NotImplementedError, MemoryError) as refusal:
        ours = "/bilevel/" in traceback.extract_tb(refusal.__traceback__)[-1].filename
        record |= {"verdict": "refused" if ours else "raw", "says": f"{type(refusal).__name__}: {refusal}"}
        record |= {} if ours else {"at": _places(refusal)}
    except Exception as raw:
        record |= {"verdict": "raw", "says": f"{type(raw).__name__}: {raw}"[:500], "at": _places(raw)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    return record | {
        "warnings": list(dict.fromkeys(caught))[:5],
        "others": list(dict.fromkeys(other))[:3],
        "seconds": round(time.time() - begun, 2),
    }


def _places(error: BaseException) -> list[str]:
    return [f"{f.filename.split('/')[-1]}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)][-8:]

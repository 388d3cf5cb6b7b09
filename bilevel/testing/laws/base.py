"""What a law is, and how one is run: drawn games, a verdict, a shrunken counterexample."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bilevel.errors import BilevelError
from bilevel.testing.subject import NotOffered, Subject

_SHRINKING_SECONDS = 20.0


@dataclass(frozen=True)
class Law:
    """A statement that holds for every right hypergradient, as a function that asserts.

    Args:
        name: In two words.
        promise: The statement in one line.
        games: A Hypothesis strategy, made when it is called.
        check: `check(subject, drawn)` raises `AssertionError` when the law is broken on what was drawn, and
            `NotOffered` when it does not apply, with the reason.
        share: How many of the asked-for examples it is worth; costly laws take fewer.
    """

    name: str
    promise: str
    games: Callable[[], Any]
    check: Callable[[Subject, Any], None]
    share: float = 1.0


@dataclass(frozen=True)
class LawRow:
    """A law's verdict on one subject.

    Attributes:
        law: Its name.
        verdict: "holds", "fails" or "does not apply".
        note: Why.
        game: The game that shows a failure, as code.
        examples: How many games were tried.
    """

    law: str
    verdict: str
    note: str = ""
    game: str | None = None
    examples: int = 0


def run(law: Law, subject: Subject, examples: int) -> LawRow:
    """Draw games until the law fails or `examples` of them have passed; shrink a failure."""
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings  # noqa: PLC0415 - only where laws are run

    passed, deadline = 0, float("inf")
    reasons: list[str] = []
    failures: dict[str, AssertionError] = {}

    def once(drawn: Any) -> None:
        nonlocal passed, deadline
        code = repr(drawn)
        if code in failures:
            raise failures[code]
        if time.monotonic() > deadline:
            return  # shrunk for long enough: what has not failed yet is not tried any more
        try:
            law.check(subject, drawn)
            passed += 1
        except NotOffered as reason:
            reasons.append(str(reason))
        except BilevelError as refused:  # out loud, which is never a wrong answer
            reasons.append(f"raised {type(refused).__name__}: {_first_line(refused)}")
        except AssertionError as broken:
            failures[code] = broken
        except Exception as error:
            failures[code] = AssertionError(f"raised {type(error).__name__}: {_first_line(error)}")
        if code in failures:
            deadline = min(deadline, time.monotonic() + _SHRINKING_SECONDS)
            raise failures[code]

    wanted = settings(
        max_examples=max(1, round(examples * law.share)),
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,
        print_blob=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    try:
        wanted(given(law.games())(once))()  # type: ignore[no-untyped-call]
    except AssertionError as broken:
        smallest = min(failures, key=lambda code: (len(code), code))
        code = next((c for c, e in failures.items() if e is broken), smallest)
        return LawRow(law.name, "fails", _first_line(failures[code]), code, passed)
    if not passed:
        return LawRow(law.name, "does not apply", reasons[0] if reasons else "no game was drawn")
    return LawRow(law.name, "holds", law.promise, None, passed)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

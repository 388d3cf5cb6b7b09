"""Check any response, or anybody's hypergradient, against the laws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from bilevel._printed import printed
from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.responses import Response
from bilevel.testing.subject import FunctionSubject, ResponseSubject, Subject
from bilevel.tree import Variables

if TYPE_CHECKING:
    from bilevel.testing.laws import Law, LawRow


@dataclass(frozen=True)
class LawReport:
    """What the laws said of one subject; true when none fails.

    `str` is a table: law, verdict, what was tested or why it does not apply, and the game that breaks it, as code.

    Attributes:
        subject: What was tested.
        rows: One a law.
    """

    subject: str
    rows: tuple[LawRow, ...]

    @property
    def failures(self) -> tuple[LawRow, ...]:
        """The laws that are broken."""
        return tuple(row for row in self.rows if row.verdict == "fails")

    def __bool__(self) -> bool:
        return not self.failures

    def __str__(self) -> str:
        from rich.table import Table  # noqa: PLC0415

        table = Table(title=self.subject)
        for column in ("law", "verdict", "games", "what"):
            table.add_column(column, overflow="fold", justify="right" if column == "games" else "left")
        for row in self.rows:
            what = row.note if row.game is None else f"{row.note}\n{row.game}"
            table.add_row(row.law, row.verdict, str(row.examples or ""), what)
        return printed(table, width=120)


def check_response(
    response: Response,
    *,
    laws: Sequence[Law] | None = None,
    examples: int = 10,
    raises: bool = True,
) -> LawReport:
    """Draw games with known answers and assert the laws that every right response obeys.

    It is held to its own `promise`: the derivative of its steps, or of the follower's optimum, or an estimate. An
    estimate with a stated bias b may be wrong by b of the Jacobian's size once the follower has converged, and no more;
    one that states none is held to the residual that it reports. Budgets are set by `with_budget`: as many steps as
    bring its follower near the optimum of the slowest game drawn, with curvatures from 0.17 to 1, where any gradient
    method with a step size of up to 1 converges. Tolerances are derived from each game's conditioning, from how far the
    follower got, and from the residual that the response reports; see `bilevel.testing.tolerance`.

    It cannot see what only large or non-convex games show, and holds a response that promises no accuracy (`Identity`)
    to none. Laws that do not apply say why.

    Takes half a minute or so: `examples` times the time of `steps` steps on games of up to four unknowns, for each law.

    Args:
        response: What is tested.
        laws: Default: all of them.
        examples: Games that a law is tried on; costly laws take fewer.
        raises: Whether a broken law raises; else the report says so.

    Raises:
        AssertionError: If a law is broken; it holds the report, with the smallest game found, as code.
        TypeError: For what is no response.
        ImportError: Without Hypothesis.

    Examples:
        >>> from bilevel.responses import Implicit
        >>> from bilevel.testing.laws.state import STATE
        >>> response = Implicit(partial(torch.optim.SGD, lr=0.5), steps=50)
        >>> bool(check_response(response, laws=STATE[:1], examples=2))
        True
    """
    if not isinstance(response, Response):
        raise TypeError(f"check_response: response={response!r}; expected an instance of bilevel.Response.")
    return _check(ResponseSubject(response), str(response), laws, examples, raises)


def check_hypergradient_function(
    function: Callable[..., Variables],
    *,
    unrolled: bool,
    optimizer: OptimizerFactory | None = None,
    laws: Sequence[Law] | None = None,
    examples: int = 20,
    raises: bool = False,
) -> LawReport:
    """The same laws for any function that gives a hypergradient, another library's for example.

    The function is called as `function(leader, follower, x, y, *, optimizer, steps)`. It gets two losses of the pytrees
    x and y, whose leaves require grad (x) and are where the follower starts (y), a callable from tensors to a
    torch.optim optimiser, and how many steps to take. It returns a pytree like x, attached to x's graph if it can be
    differentiated again. What it does not offer it refuses by `NotImplementedError`. Laws about states do not apply.

    Args:
        function: What is tested.
        unrolled: Whether it promises the derivative of its steps, or of the follower's optimum.
        optimizer: The follower's; default: SGD with a rate of 0.5, which converges on every game drawn.
        laws: Default: all of them.
        examples: Games that a law is tried on; costly laws take fewer.
        raises: Whether a broken law raises an AssertionError; else the report says so.
    """
    inner = partial(torch.optim.SGD, lr=0.5) if optimizer is None else optimizer
    subject = FunctionSubject(function, inner, unrolled)
    return _check(subject, getattr(function, "__qualname__", repr(function)), laws, examples, raises)


def _check(subject: Subject, name: str, laws: Sequence[Law] | None, examples: int, raises: bool) -> LawReport:
    from bilevel.testing.laws import LAWS, Law  # noqa: PLC0415 - needs Hypothesis
    from bilevel.testing.laws.base import run  # noqa: PLC0415

    if examples < 1:
        raise ValueError(f"examples={examples}; expected at least 1.")
    for law in laws or ():
        if not isinstance(law, Law):
            raise TypeError(f"laws= holds {law!r}; expected members of bilevel.testing.laws.LAWS.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unconverged answers are asked for, and are held to their warnings by a law
        report = LawReport(name, tuple(run(law, subject, examples) for law in (LAWS if laws is None else laws)))
    if raises and not report:
        raise AssertionError(f"{len(report.failures)} of {len(report.rows)} laws broken.\n{report}")
    return report

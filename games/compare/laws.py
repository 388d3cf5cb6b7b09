"""Which laws each response of the suite obeys, on small games drawn for the purpose; kept, so that a rerun is quick."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch.optim import SGD, Adam

import bilevel as bl
from bilevel.testing import check_response
from games.errors import MissingExtraError
from games.experiments.data import DigitSource
from games.experiments.experiment import Part, Result
from games.experiments.runner import run_parts
from games.experiments.store import Store

LawVerdicts = list[tuple[str, str, str]]
"""Law, "passed", "failed" or "does not apply", and a note: the game that breaks it, or why it does not apply."""

_INNER = partial(SGD, lr=0.5)


def _implicit(linear_solver: bl.linear.LinearSolver) -> bl.Response:
    return bl.Implicit(_INNER, steps=100, tolerance=1e-8, linear_solver=linear_solver)


# The suite's responses, set for games of up to four unknowns with curvatures of up to 1.
SMALL: dict[str, Callable[[], bl.Response]] = {
    "unrolled": lambda: bl.Unrolled(_INNER, steps=100),
    "truncated": lambda: bl.Unrolled(_INNER, steps=100, backprop_steps=8),
    "implicit CG": lambda: _implicit(bl.ConjugateGradient(rtol=1e-6)),
    "implicit Neumann": lambda: _implicit(bl.Neumann(max_steps=20, rtol=None)),
    "implicit Nyström": lambda: _implicit(bl.Nystrom(rank=20, damping=1e-2)),
    "implicit identity": lambda: _implicit(bl.linear.Identity()),
    "nudged": lambda: bl.Nudged(_INNER, steps=100, tolerance=1e-8),
    "last step": lambda: bl.responses.LastStep(_INNER, steps=100),
    "single loop": lambda: bl.SingleLoop(_INNER),
    "hypernetwork": lambda: bl.Hypernetwork(partial(Adam, lr=1e-2), scale=0.1, warmup=200),
}
VERDICTS = {"holds": "passed", "fails": "failed"}


def check_laws(
    names: Sequence[str], *, examples: int, jobs: int, folder: Path, resume: bool, cluster: str | None = None
) -> dict[str, LawVerdicts]:
    """Each named response's laws, on `examples` games a law; in processes of their own, kept in `folder`/laws.

    A rule of play has none.

    Raises `MissingExtraError` without joblib or Hypothesis, `BilevelError` when a law could not be tried.
    """
    try:
        import hypothesis  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(f"{error}. pip install 'bilevel[data]', or pass --laws 0") from error
    store, verdicts = Store(folder / "laws"), {}
    parts = [
        Part(name, verdicts_of, {"name": name, "response": repr(SMALL[name]()), "examples": examples})
        for name in names
        if name in SMALL
    ]
    work = [(store, "laws", part) for part in parts]
    for done in run_parts(work, DigitSource(), jobs=jobs, resume=resume, cluster=cluster):
        if done.result is None:
            raise bl.BilevelError(f"The laws could not be tried: {done.failure}")
        verdicts[done.part.name] = [(law, verdict, note) for law, verdict, note in done.result["laws"]]
    return {name: verdicts[name] for name in names if name in verdicts}


def verdicts_of(source: DigitSource, *, name: str, response: str, examples: int) -> Result:
    """The verdicts on one response of `SMALL`; the text `response` is there for the store, to know it by."""
    report = check_response(SMALL[name](), examples=examples, raises=False)
    return {
        "laws": [
            (row.law, VERDICTS.get(row.verdict, row.verdict), _note(row.verdict, row.note, row.game))
            for row in report.rows
        ]
    }


def _note(verdict: str, note: str, game: str | None) -> str:
    return "" if verdict == "holds" else note if game is None else f"{note} {game}"

"""Which laws each response of the suite obeys, on small games drawn for the purpose; kept, so that a rerun is quick."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.optim import SGD, Adam

import bilevel as bl
from bilevel.testing import check_response
from games.errors import MissingExtraError

RunWarning = list[tuple[str, str, str]]
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
    "hypernetwork": lambda: bl.Hypernetwork(partial(Adam, lr=1e-2), scale=0.1, warmup=200),
}
VERDICTS = {"holds": "passed", "fails": "failed"}


def checked(names: Sequence[str], *, examples: int, jobs: int, folder: Path, resume: bool) -> dict[str, RunWarning]:
    """Each named response's laws, on `examples` games a law; in processes of their own, kept in `folder`/laws.

    Raises `MissingExtraError` without joblib or Hypothesis.
    """
    try:
        import hypothesis  # noqa: F401
        from joblib import Parallel, delayed  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"{error}. pip install 'bilevel[data]', or pass --laws 0") from error
    kept = folder / "laws"
    kept.mkdir(parents=True, exist_ok=True)
    told = Parallel(n_jobs=min(jobs, len(names)))(
        delayed(_one)(name, examples, kept / f"{name.replace(' ', '_')}.json", resume) for name in names
    )
    return dict(zip(names, told, strict=True))


def _one(name: str, examples: int, path: Path, resume: bool) -> RunWarning:
    torch.set_num_threads(1)
    response = SMALL[name]()
    identity = {"response": repr(response), "examples": examples}
    if resume and path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["identity"] == identity:
            return [(law, verdict, note) for law, verdict, note in content["laws"]]
    report = check_response(response, examples=examples, raises=False)
    told = [
        (row.law, VERDICTS.get(row.verdict, row.verdict), _note(row.verdict, row.note, row.game)) for row in report.rows
    ]
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"identity": identity, "laws": told}, indent=1), encoding="utf-8")
    os.replace(part, path)
    return told


def _note(verdict: str, note: str, game: str | None) -> str:
    return "" if verdict == "holds" else note if game is None else f"{note} {game}"

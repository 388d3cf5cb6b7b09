"""Does the parts of experiments, several at a time, keeps what is done, and draws the figures.

A folder holds it all: `parts/EXPERIMENT/PART.json` as each part ends, then `EXPERIMENT.png` and `EXPERIMENT.json`,
which is what the figure was drawn from. A run that was stopped loses no part that had ended.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bilevel import BilevelWarning
from games.errors import MissingExtraError
from games.paper.experiment import Experiment, Part, Result, Results, Source
from games.paper.style import DPI, blank

Ended = Callable[[Experiment, Part, float], object]
"""Told of each part as it ends, with its seconds; those that were there already have 0."""


@dataclass(frozen=True)
class Remade:
    """One experiment's end: the files written and what to see in the figure, or what went wrong in which part."""

    experiment: Experiment
    figure: Path | None
    line: str
    errors: tuple[str, ...] = ()
    results: Results = field(default_factory=dict, repr=False)


def remake(
    experiments: Sequence[Experiment],
    source: Source,
    output: Path,
    *,
    jobs: int,
    resume: bool,
    ended: Ended,
    drawn: Callable[[Remade], object],
) -> None:
    """Do every part of `experiments` in `jobs` processes; draw each figure as soon as its parts are done.

    With `resume` a part whose file is there, of the same settings, data and version of the code that it names, is
    not done again. A part that fails is told by `drawn` and does not stop the others.
    """
    try:
        from joblib import Parallel, delayed  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"Running in parallel needs joblib ({error}). pip install 'bilevel[data]'") from error
    blank()  # what would fail after minutes of work is tried before it
    results: dict[str, dict[str, Result]] = {experiment.name: {} for experiment in experiments}
    errors: dict[str, list[str]] = {experiment.name: [] for experiment in experiments}
    pending = []
    for experiment in experiments:
        folder = output / "parts" / experiment.name
        folder.mkdir(parents=True, exist_ok=True)
        for part in experiment.parts:
            file = _file(folder, part)
            kept = _kept(file, _identity(part, source)) if resume else None
            if kept is None:
                file.unlink(missing_ok=True)
                pending.append((experiment, part, file))
            else:
                results[experiment.name][part.name] = kept
                ended(experiment, part, 0.0)

    def draw_if_done(experiment: Experiment) -> None:
        if len(results[experiment.name]) + len(errors[experiment.name]) == len(experiment.parts):
            drawn(_draw(experiment, results[experiment.name], errors[experiment.name], source, output))

    for experiment in experiments:
        draw_if_done(experiment)
    # The longest first, or the last one would run alone.
    pending.sort(key=lambda item: -item[1].seconds)
    known = {(experiment.name, part.name): (experiment, part) for experiment, part, _ in pending}
    parallel = Parallel(n_jobs=min(jobs, max(1, len(pending))), return_as="generator_unordered", batch_size=1)
    for names, result, seconds, failed in parallel(
        delayed(_work)(experiment.name, part, source, file, _identity(part, source))
        for experiment, part, file in pending
    ):
        experiment, part = known[names]
        if failed is None:
            results[experiment.name][part.name] = result
        else:
            errors[experiment.name].append(failed)
        ended(experiment, part, seconds)
        draw_if_done(experiment)


def _work(
    experiment: str, part: Part, source: Source, file: Path, identity: Result
) -> tuple[tuple[str, str], Result | None, float, str | None]:
    """Do one part and write its file; in a process of its own."""
    torch.set_num_threads(1)  # the other cores have parts of their own
    torch.manual_seed(0)  # dropout masks come from torch's generator, whatever part this process did before
    began = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", BilevelWarning)
            result = plain(part.run(source, **part.settings))
    except Exception as failure:  # told with its part; the other parts go on
        where = traceback.extract_tb(failure.__traceback__)[-1]
        told = f"{part.name}: {type(failure).__name__}: {failure} ({Path(where.filename).name}, line {where.lineno})"
        return (experiment, part.name), None, time.perf_counter() - began, told
    told_once = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, BilevelWarning))
    result |= {"seconds": time.perf_counter() - began, "warnings": list(told_once)}
    _write(file, {"identity": identity, "result": result})
    return (experiment, part.name), result, result["seconds"], None


def _draw(
    experiment: Experiment, results: dict[str, Result], errors: list[str], source: Source, output: Path
) -> Remade:
    if errors:
        return Remade(experiment, None, "", tuple(errors))
    ordered = {part.name: results[part.name] for part in experiment.parts}
    line = experiment.see(ordered)
    figure = output / f"{experiment.name}.png"
    _write(
        output / f"{experiment.name}.json",
        {
            "title": experiment.title,
            "see": line,
            "data": str(source),
            "settings": {part.name: plain(dict(part.settings)) for part in experiment.parts},
            "versions": {"python": platform.python_version()} | {n: version(n) for n in ("torch", "numpy", "scipy")},
            "machine": platform.platform(),
            "results": ordered,
        },
    )
    experiment.draw(ordered).savefig(figure, dpi=DPI)
    for name, draw in experiment.more.items():
        draw(ordered).savefig(output / f"{experiment.name}-{name}.png", dpi=DPI)
    return Remade(experiment, figure, line, results=ordered)


def plain(tree: Any) -> Any:
    """Tensors and arrays as lists, seven digits, and what is no number as null: what JSON can hold."""
    if isinstance(tree, dict):
        return {str(key): plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [plain(value) for value in tree]
    if hasattr(tree, "tolist"):  # torch and numpy
        return plain(tree.tolist())
    if isinstance(tree, float):  # seven digits are what float32 has, and more than any figure shows
        return float(f"{tree:.7g}") if math.isfinite(tree) else None
    return tree


def _identity(part: Part, source: Source) -> Result:
    code = Path(part.run.__code__.co_filename).read_bytes()
    return {
        "run": f"{part.run.__module__}.{part.run.__name__}",
        "code": hashlib.sha256(code).hexdigest()[:16],
        "settings": plain(dict(part.settings)),
        "data": str(source),
    }


def _file(folder: Path, part: Part) -> Path:
    return folder / f"{''.join(c if c.isalnum() or c in '-_.=' else '_' for c in part.name)}.json"


def _kept(file: Path, identity: Result) -> Result | None:
    """The result in a part's file, unless it is of other settings or was never finished."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("identity") != identity:
        return None
    result: Result = content["result"]
    return result


def _write(file: Path, content: Result) -> None:
    """All of it or nothing: a run that is killed leaves no half a file."""
    half = file.with_suffix(".half")
    half.write_text(json.dumps(content, allow_nan=False) + "\n")
    os.replace(half, file)

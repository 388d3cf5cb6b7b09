"""Does the parts of experiments, several at a time, keeps what is finished, and draws the figures.

A folder holds it all: `parts/EXPERIMENT/PART.json` as each part ends, then `EXPERIMENT.png` and `EXPERIMENT.json`,
which is what the figure was drawn from. A run that was stopped loses no part that had ended.
"""

from __future__ import annotations

import hashlib
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bilevel import BilevelWarning
from bilevel.workers import require_workers, side_by_side
from games.errors import MissingExtraError
from games.experiments.data import DigitSource
from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.provenance import provenance
from games.experiments.store import Identity, Store, as_json, write_json
from games.experiments.style import empty_figure, save_figure


@dataclass(frozen=True)
class FinishedPart:
    """A part with its result, or with its failure in words; `seconds` is 0 when an earlier run had done it."""

    experiment: str
    part: Part
    result: Result | None
    seconds: float = 0.0
    failure: str | None = None


@dataclass(frozen=True)
class FinishedExperiment:
    """An experiment with its figure and summary, or with what went wrong in which part."""

    experiment: Experiment
    figure: Path | None
    summary: str
    failures: tuple[str, ...] = ()
    results: Results = field(default_factory=dict, repr=False)


def run_experiments(
    experiments: Sequence[Experiment],
    source: DigitSource,
    output: Path,
    *,
    jobs: int,
    resume: bool,
    cluster: str | None = None,
    on_part: Callable[[FinishedPart], object],
    on_experiment: Callable[[FinishedExperiment], object],
) -> None:
    """Do every part of `experiments` in `jobs` processes; draw each figure as soon as its parts are done.

    `resume` and `cluster` are as in `run_parts`. A part that fails is reported with its experiment and does not stop
    the others.
    """
    empty_figure()  # what would fail after minutes of work is tried before it
    known = {experiment.name: experiment for experiment in experiments}
    finished: dict[str, dict[str, FinishedPart]] = {name: {} for name in known}
    stores = {name: Store(output / "parts" / name) for name in known}
    work = [(stores[name], name, part) for name, experiment in known.items() for part in experiment.parts]
    for done in run_parts(work, source, jobs=jobs, resume=resume, cluster=cluster):
        experiment, parts = known[done.experiment], finished[done.experiment]
        parts[done.part.name] = done
        on_part(done)
        if len(parts) == len(experiment.parts):
            on_experiment(_draw(experiment, parts, source, output))


def run_parts(
    work: Sequence[tuple[Store, str, Part]],
    source: DigitSource,
    *,
    jobs: int,
    resume: bool,
    cluster: str | None = None,
) -> Iterator[FinishedPart]:
    """Each part with its store and its experiment's name, done in one of `jobs` processes (joblib), as it ends.

    With `resume` a part whose store has a result of the same settings, data, versions and code (of the module of its
    function) is not done again, and comes first. `cluster` is the address of a Ray cluster that does them, or "local".
    Raises `MissingExtraError` without joblib or Ray, before any work.
    """
    try:
        require_workers("run_parts", max(2, jobs), cluster)
    except ImportError as error:
        raise MissingExtraError(str(error)) from error
    versions, content, pending, kept = provenance("numpy", "scipy")["versions"], source.content, [], []
    for store, experiment, part in work:
        identity = _identity(part, content, versions)
        result = store.load(part.name, identity) if resume else None
        if not resume:
            store.discard(part.name)  # before any work: an interrupted run leaves no result of an older one
        if result is None:
            pending.append((store, experiment, part, identity))
        else:
            kept.append(FinishedPart(experiment, part, result))
    yield from kept
    # The longest first, or the last one would run alone.
    pending.sort(key=lambda item: -item[2].seconds)
    todo = [partial(_do_part, store, part, source, identity) for store, _, part, identity in pending]
    at_once = min(jobs, max(1, len(pending)))
    for index, (result, seconds, failure) in side_by_side(todo, jobs=at_once, cluster=cluster if todo else None):
        _, experiment, part, _ = pending[index]
        yield FinishedPart(experiment, part, result, seconds, failure)


def _do_part(
    store: Store, part: Part, source: DigitSource, identity: Identity
) -> tuple[Result | None, float, str | None]:
    """Do one part and write its file; in a process of its own."""
    began = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught, _one_thread_and_seed():
            warnings.simplefilter("always", BilevelWarning)
            result = part.run(source, **part.settings)
    except Exception as failure:  # reported with its part; the other parts go on
        where = traceback.extract_tb(failure.__traceback__)[-1]
        place = f"{Path(where.filename).name}, line {where.lineno}"
        return None, time.perf_counter() - began, f"{part.name}: {type(failure).__name__}: {failure} ({place})"
    seconds = time.perf_counter() - began
    unique = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, BilevelWarning))
    kept = store.save(part.name, identity, {**result, "seconds": seconds, "warnings": list(unique)})
    return kept, seconds, None


@contextmanager
def _one_thread_and_seed() -> Iterator[None]:
    """The same conditions for each part, whatever its process did before: sums depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the other cores have parts of their own
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # dropout masks come from torch's own generator
            yield
    finally:
        torch.set_num_threads(threads)


def _identity(part: Part, data: str, versions: dict[str, str]) -> dict[str, Any]:
    code = Path(part.run.__code__.co_filename).read_bytes()
    return {
        "run": f"{part.run.__module__}.{part.run.__name__}",
        "code": hashlib.sha256(code).hexdigest()[:16],
        "settings": dict(part.settings),
        "data": data,
        "versions": versions,
    }


def _draw(
    experiment: Experiment, finished: dict[str, FinishedPart], source: DigitSource, output: Path
) -> FinishedExperiment:
    failures = tuple(done.failure for done in finished.values() if done.failure is not None)
    if failures:
        return FinishedExperiment(experiment, None, "", failures)
    results = {part.name: finished[part.name].result or {} for part in experiment.parts}
    summary = experiment.summarize(results)
    figure = output / f"{experiment.name}.png"
    content = {
        "title": experiment.title,
        "summary": summary,
        "data": str(source),
        "settings": {part.name: as_json(part.settings) for part in experiment.parts},
        **provenance("numpy", "scipy"),
        "results": results,
    }
    write_json(output / f"{experiment.name}.json", content)
    save_figure(experiment.draw(results), figure)
    for name, draw in experiment.extra_figures.items():
        save_figure(draw(results), output / f"{experiment.name}-{name}.png")
    return FinishedExperiment(experiment, figure, summary, results=results)

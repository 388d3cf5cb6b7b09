"""The same work, side by side: games x responses x seeds, in parallel, resumable."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.comparison.arguments import check, is_game, suited
from bilevel.comparison.identity import configuration, described, digest, file_name, identity, versions
from bilevel.comparison.measure import Setting, in_own_randomness, measure, refer
from bilevel.comparison.measurements import Laws
from bilevel.comparison.result import Comparison
from bilevel.comparison.rows import Reference, Row, plain
from bilevel.dynamics import Dynamics
from bilevel.files import remove_abandoned, write_whole
from bilevel.game import Game
from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.responses import Response
from bilevel.workers import on_cluster, side_by_side

if TYPE_CHECKING:
    from bilevel.testing.known import KnownGame

Answer = Response | Dynamics
"""How the follower is answered for: by a response, or by a rule of play that sees both losses, `ValueFunction`."""

BUDGETS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0, 4.0)
"""Of a response's own steps, what the ladder of hypergradients is given."""


def compare(
    games: Mapping[str, Game | KnownGame | Callable[[int], Game | KnownGame]],
    responses: Mapping[str, Answer | Mapping[str, Answer]],
    *,
    follower: str | None = None,
    optimizer: OptimizerFactory | Mapping[str, OptimizerFactory] | None = None,
    steps: int = 50,
    seeds: Sequence[int] = (0, 1, 2),
    budgets: Sequence[float] = BUDGETS,
    reference: Response | None = None,
    laws: Laws | None = None,
    jobs: int = 1,
    cluster: str | None = None,
    folder: str | Path | None = None,
    resume: bool = True,
    progress: bool = False,
) -> Comparison:
    """Measure every response on every game: error, value, work, seconds, memory, and all warnings.

    Of each game, response and seed it measures the **hypergradient** at the start, over a ladder of budgets, against
    the exact answer of a `KnownGame`, else against `reference`; the **peak memory** of one hypergradient; and a run of
    `solve` with the leader's loss at the follower's converged answer along it.

    Costs of one run: the sum of `budgets` and some more hypergradients, and `steps` leader steps.

    Args:
        games: By name; a function of the seed gives data or starts that differ between seeds.
        responses: By name; a mapping from game to response gives each game its own. `ValueFunction` may stand for one:
            it has no hypergradient of its own, and its row has the run alone.
        follower: Who responds; default: the last player. The first leads.
        optimizer: The leader's, or one by game.
        steps: Of each run.
        seeds: Three show the spread.
        budgets: The ladder, in units of the response's own steps.
        reference: Default: L-BFGS and conjugate gradients to 1e-10 (1e-5 in float32).
        laws: What each response obeys, to be shown.
        jobs: Processes of one thread, side by side; -1: as many as there are cores.
        cluster: Do it on a Ray cluster, by its address ("host:6379", "ray://host:10001", "auto"), or "local": one on
            this machine, started and stopped; `jobs` runs at once, or with 1 as many as it has cores. `folder` must be
            seen by all of its machines.
        folder: Keeps each finished run.
        resume: Do not repeat runs that are in `folder`.
        progress: Show a bar on stderr.

    Raises:
        ValueError: For wrong arguments, before any work.
        ImportError: For `jobs` > 1 without joblib, for `cluster` without Ray.
        ConnectionError: Where nobody answers at a cluster's address.

    Examples:
        >>> import torch
        >>> from bilevel import Implicit
        >>> from bilevel.testing import Cournot
        >>> implicit = Implicit(partial(torch.optim.SGD, lr=0.5), steps=50)
        >>> duopoly = Cournot(6.0, 0.5, (1.0, 1.0))
        >>> found = compare({"duopoly": duopoly}, {"implicit": implicit}, steps=2, seeds=(0,))
        >>> found.rows[0].own.error < 1e-3
        True
    """
    check(games, responses, follower, optimizer, steps, seeds, budgets, jobs, cluster)
    where = None if folder is None else Path(folder)
    parts = [
        _Part(
            game=game,
            play=play,
            seed=seed,
            responses={name: one for name, given in responses.items() if (one := suited(given, game)) is not None},
            follower=follower,
            optimizer=optimizer[game] if isinstance(optimizer, Mapping) else optimizer,
            steps=steps,
            budgets=tuple(budgets),
            reference=reference,
            folder=where,
            resume=resume,
        )
        for game, play in games.items()
        for seed in seeds
    ]
    rows: dict[tuple[str, str, int], Row] = {}
    references: dict[tuple[str, int], Reference] = {}
    vectors: dict[tuple[str, int], list[float] | None] = {}
    total = len(parts) + sum(len(part.responses) for part in parts)
    with on_cluster(cluster, jobs if jobs > 1 else None), _bar(progress, total) as ended:
        for part, (found, vector) in _each([(part, partial(_refer, part)) for part in parts], jobs, cluster):
            references[part.game, part.seed], vectors[part.game, part.seed] = found, vector
            ended(f"{part.game}: reference")
        work = [
            (part, partial(_measure, part, name, vectors[part.game, part.seed]))
            for part in parts
            for name in part.responses
        ]
        for part, row in _each(work, jobs, cluster):
            rows[row.game, row.response, row.seed] = row
            ended(f"{part.game}: {row.response}")
    ordered = [(game, name, seed) for game in games for name in responses for seed in seeds]
    return Comparison(
        rows=tuple(rows[key] for key in ordered if key in rows),
        references=tuple(references[part.game, part.seed] for part in parts),
        settings={
            "steps": steps,
            "seeds": list(seeds),
            "budgets": list(budgets),
            "jobs": jobs,
            "optimizer": {part.game: described(part.optimizer) for part in parts},
            "responses": {
                name: (
                    described(given)
                    if not isinstance(given, Mapping)
                    else {game: described(given[game]) for game in games if game in given}
                )
                for name, given in responses.items()
            },
        },
        versions=versions(),
        machine=f"{platform.platform()}, {os.cpu_count()} cores",
        laws=dict(laws or {}),
    )


@dataclass(frozen=True)
class _Part:
    """One game at one seed, and all that its runs share."""

    game: str
    play: Any
    seed: int
    responses: Mapping[str, Answer]
    follower: str | None
    optimizer: OptimizerFactory | None
    steps: int
    budgets: tuple[float, ...]
    reference: Response | None
    folder: Path | None
    resume: bool

    def setting(self) -> Setting:
        """The game, made for its seed."""
        play = self.play if is_game(self.play) else self.play(self.seed)
        known = None if isinstance(play, Game) else play
        game = play if isinstance(play, Game) else play.game()
        return Setting(self.game, game, known, self.follower or game.names[-1], self.seed)

    def kept(self, name: str, known_by: Mapping[str, Any]) -> Any:
        """What the file of a finished run holds, unless it is of other settings or was never finished."""
        if self.folder is None or not self.resume:
            return None
        try:
            content = json.loads(self.file(self.folder, name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content["result"] if isinstance(content, dict) and content.get("identity") == known_by else None

    def keep(self, name: str, known_by: Mapping[str, Any], result: Any) -> None:
        """Write the file of a finished run: all of it or nothing."""
        if self.folder is None:
            return
        file = self.file(self.folder, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"identity": known_by, "result": plain(result)}, allow_nan=False)
        remove_abandoned(file)
        write_whole(file, f"{content}\n".encode())

    def file(self, folder: Path, name: str) -> Path:
        """Where the run of a response, or the reference, is kept."""
        return folder / "parts" / file_name(self.game) / f"{file_name(name)}-seed{self.seed}.json"


def _refer(part: _Part) -> tuple[Reference, list[float] | None]:
    setting = part.setting()
    known_by = {"reference": configuration(part.reference, setting.game, setting.follower), **identity(setting)}
    kept = part.kept("reference of all", known_by)
    if kept is None:
        kept = in_own_randomness(part.seed, setting.game.device, lambda: refer(setting, part.reference))
        part.keep("reference of all", known_by, kept)
        return kept  # type: ignore[no-any-return]
    return Reference(**kept[0]), kept[1]


def _measure(part: _Part, name: str, vector: Sequence[float] | None) -> Row:
    setting, response = part.setting(), part.responses[name]
    game = setting.game
    leading = [leader for leader in game.names if leader != setting.follower]
    known_by = {
        "response": configuration(response, game, setting.follower),
        "optimizer": {leader: configuration(part.optimizer, game, leader) for leader in leading},
        "steps": part.steps,
        "budgets": list(part.budgets),
        "reference": configuration(part.reference, game, setting.follower),
        "direction": digest(json.dumps(vector).encode()),
        **identity(setting),
    }
    kept = part.kept(name, known_by)
    if kept is not None:
        return Row.load(kept)
    row = in_own_randomness(
        part.seed,
        setting.game.device,
        lambda: measure(
            setting,
            name,
            response,
            optimizer=part.optimizer,
            steps=part.steps,
            budgets=part.budgets,
            reference=part.reference,
            exact=vector,
        ),
    )
    part.keep(name, known_by, row)
    return row  # type: ignore[no-any-return]


# Doing it ------------------------------------------------------------------------------------------------------------


def _each(
    work: Sequence[tuple[_Part, Callable[[], Any]]], jobs: int, cluster: str | None
) -> Iterator[tuple[_Part, Any]]:
    """Each part with its result as it ends: here one by one, or in processes."""
    for index, result in side_by_side([one for _, one in work], jobs=jobs, cluster=cluster):
        yield work[index][0], result


@contextmanager
def _bar(wanted: bool, total: int) -> Iterator[Callable[[str], None]]:
    if not wanted:
        yield lambda name: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda name: bar.update(task, advance=1, description=name)

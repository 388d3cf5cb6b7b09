"""A run in one process or in several: who agrees with whom, and who writes files."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bilevel.errors import ParallelError
from bilevel.game import Game
from bilevel.many import GamesOfRanks
from bilevel.many.shares import alone
from bilevel.parallel import DataParallel, ParallelGame
from bilevel.parallel.agreement import fingerprint, require_agreement
from bilevel.sharding.storing import has_parts, parted, whole
from bilevel.solving import checkpoint as checkpoints
from bilevel.solving.description import Description
from bilevel.solving.history import Observe
from bilevel.tree import Variables


class Alone:
    """A run in one process."""

    def __init__(self, game: Game) -> None:
        self.game: Game = game

    @property
    def writes(self) -> bool:
        """Whether this process writes files and shows progress."""
        return True

    @contextmanager
    def playing(self) -> Iterator[None]:
        """While the run goes on."""
        yield

    def agree(self, settings: Callable[[], Mapping[str, Description]]) -> None:
        """Refuse runs of other settings elsewhere."""

    def observed(self, record: Observe | None) -> Observe | None:
        """What else a step's record tells."""
        return record

    def read(self, path: Path) -> dict[str, Any] | None:
        """The checkpoint at a path; None where there is none."""
        found = checkpoints.load(path) if path.exists() else None
        return None if found is None else alone(parted(found, None, self.game.device))

    def stored(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A run as it is written; all processes must ask."""
        return state

    def can_save(self, state: Mapping[str, Any]) -> bool:
        """Whether this process can save a run by itself."""
        return True

    def write(self, save: Callable[[], None]) -> None:
        """Write a file, once."""
        save()

    def stopped(self, wanted: bool, parts: Mapping[str, Any]) -> bool:
        """Whether somebody wants the run to end; `parts` are the run, which is everywhere the same."""
        return wanted


class Together(Alone):
    """A run in several processes."""

    game: ParallelGame

    def __init__(self, game: Game, parallel: DataParallel) -> None:
        if not isinstance(parallel, DataParallel):
            raise TypeError(f"solve: parallel={parallel!r}; expected bilevel.DataParallel(), or None for one process.")
        super().__init__(parallel.game(game))
        self._ranks = self.game.ranks

    @property
    def writes(self) -> bool:
        """The first rank does."""
        return self._ranks.first

    @contextmanager
    def playing(self) -> Iterator[None]:
        """Tells the others when this rank ends before its time."""
        try:
            yield
        except BaseException as error:
            self._ranks.leave(error)
            raise
        self._ranks.leave()

    def agree(self, settings: Callable[[], Mapping[str, Description]]) -> None:
        """Refuse, on all ranks, a run whose settings are others on one of them."""
        require_agreement(self._ranks, _flat(self._ranks.together(settings)), "solve")

    def observed(self, record: Observe | None) -> Observe | None:
        """With what the step's derivatives have sent: bytes, and in how many sums over ranks."""
        ranks = self._ranks
        before = [ranks.bytes, ranks.reductions]

        def counted(variables: Mapping[str, Variables]) -> Mapping[str, float]:
            found = {"communicated": ranks.bytes - before[0], "reductions": ranks.reductions - before[1]}
            own = {} if record is None else record(variables)
            before[:] = [ranks.bytes, ranks.reductions]
            return {**found, **own}

        return counted

    def read(self, path: Path) -> dict[str, Any] | None:
        """As the first rank reads it."""

        def data() -> bytes | None:
            found = checkpoints.load(path) if path.exists() else None
            if found is None:
                return None
            buffer = io.BytesIO()
            torch.save(found, buffer)
            return buffer.getvalue()

        sent = self._ranks.from_first(data)
        if sent is None:
            return None
        content = torch.load(io.BytesIO(sent), weights_only=True)
        return dict(parted(content, self._ranks, self.game.device))

    def stored(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """With spread tensors whole, on the first rank."""
        return whole(state, keep=self.writes) if has_parts(state) else state

    def can_save(self, state: Mapping[str, Any]) -> bool:
        """Whether this is the first rank, and all of the run is here."""
        return self.writes and not has_parts(state)

    def write(self, save: Callable[[], None]) -> None:
        """The first rank writes; what it could not do, all raise."""
        self._ranks.together(save if self.writes else lambda: None)

    def stopped(self, wanted: bool, parts: Mapping[str, Any]) -> bool:
        """Raises `ParallelError` where the ranks have drifted apart."""
        rows = self._ranks.rows([int(wanted), self._ranks.read, *(fingerprint(part) for part in parts.values())])
        other = next((rank for rank, row in enumerate(rows) if row[1] != rows[0][1]), None)
        if other is not None:
            raise ParallelError(
                f"solve: rank {other} has read other batches than rank 0 in this step. A batch is whole on each rank, "
                "which takes its share of the rows: data that the program shuffles itself need the same seed on each. "
                "Where each rank reads a part of its own, use a DistributedSampler, or DataParallel(sharded=True)."
            )
        for place, name in enumerate(parts, start=2):
            other = next((rank for rank, row in enumerate(rows) if row[place] != rows[0][place]), None)
            if other is not None:
                raise ParallelError(
                    f"solve: after this step {name} of rank {other} differs from that of rank 0: from here each would "
                    "go its own way. Something in the program is not the same on all ranks: a random number that is "
                    "not torch's, a clock, data whose passes differ in length, SAGA's table of batches with sharded "
                    "data, a callback that writes into the game, or kernels that are not deterministic "
                    "(torch.use_deterministic_algorithms)."
                )
        return any(row[0] for row in rows)


class SharedOut(Together):
    """A run of many games in several processes, each of which plays some of them."""

    game: GamesOfRanks  # type: ignore[assignment]

    @classmethod
    def of(cls, company: Together) -> SharedOut:
        """The same ranks."""
        found = cls.__new__(cls)
        vars(found).update(vars(company))
        return found

    def read(self, path: Path) -> dict[str, Any] | None:
        """The part of it that is this rank's."""
        found = super().read(path)
        return None if found is None else self.game.own(found)

    def stored(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """With all games', on the first rank."""
        return self.game.stored(state)

    def can_save(self, state: Mapping[str, Any]) -> bool:
        """Whether all games are here."""
        return False


def company_of(game: Game, parallel: DataParallel | None) -> Alone:
    """Who plays a game."""
    if parallel is None:
        return Alone(game)
    found = Together(game, parallel)
    return SharedOut.of(found) if isinstance(found.game, GamesOfRanks) else found


def _flat(tree: Description, path: str = "") -> dict[str, str]:
    """A description as text by path."""
    if isinstance(tree, Mapping) and tree:
        pairs = [(f"{path}.{key}" if path else str(key), part) for key, part in tree.items()]
    elif isinstance(tree, list) and tree:
        pairs = [(f"{path}[{index}]", part) for index, part in enumerate(tree)]
    else:
        return {path: str(tree)}
    return {key: text for inner, part in pairs for key, text in _flat(part, inner).items()}

"""Batches for ever, from any data, with the place in it as plain numbers.

A position is `{"seed": s, "epoch": e, "index": i}`: the next batch is number i of pass e. It has "kept" as well where
data keep something in themselves from pass to pass: what it was as the pass began. (A joint player's is a dict of its
members'.) Two draws at the same position give the same batch, so that a saved position resumes bit for bit.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bilevel.errors import DataError, ExhaustedDataError
from bilevel.game.ends import length_of, most_of, never_ends
from bilevel.game.held import HeldBatches
from bilevel.game.own_state import Kept
from bilevel.game.passes import END, Place, Reader, Source

Batch = Any
Position = dict[str, Any]

_CPU = torch.device("cpu")
_READERS = 4  # a few consumers may go their own ways through one stream
_FEW, _MANY = 4, 64  # batches that are kept: as a rule, and where somebody comes back for more
_REMEMBERED = 1024  # places, of which nothing but the numbers is kept
_WAY_OUT = "Pass a list of batches, a DataLoader, or a function that makes the iterator of a pass: data=lambda: make()."


class Stream:
    """The batches of one player, re-iterated for ever.

    Each batch is a function of its position: the order within a pass, and what data draw from PyTorch's generators,
    come from the seed and the pass (see `Reader`); drawing leaves the global generators as they were. What data draw
    from Python's or NumPy's global numbers is theirs, except in a DataLoader's workers, which are seeded.

    A batch is read once for all who ask for it soon: the last few are kept, and as many more, up to 64, as it takes
    once somebody has come back for one that was gone. A position further away (a resumed run) is reached from the
    start of its pass. A list is read by number, and nothing of it is kept.
    """

    def __init__(self, owner: str, data: Source, device: torch.device = _CPU) -> None:
        self.owner = owner
        self.data = data
        self.device = device
        self._functions: tuple[Callable[[Batch], Batch], ...] = ()
        self._readers: list[Reader] = []
        self._recent = _RecentBatches()
        self._holders: list[HeldBatches] = []
        self._replayed: HeldBatches | None = None
        self._kept: OrderedDict[tuple[int, int], Kept] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: the data. Readers cannot travel, and are made again."""
        return vars(self) | {"_readers": [], "_recent": _RecentBatches(), "_holders": []}

    @staticmethod
    def start(seed: int = 0) -> Position:
        """The position of the first batch."""
        return {"seed": seed, "epoch": 0, "index": 0}

    def mapped(self, function: Callable[[Batch], Batch]) -> Stream:
        """The same stream with a function of each batch; the two read together."""
        other = self._copied()
        other._functions = (*self._functions, function)
        return other

    def held(self, batches: HeldBatches) -> None:
        """Let somebody keep all that is drawn from now on, until `released`; a list is read again and not kept."""
        self._holders.append(batches)

    def released(self, batches: HeldBatches) -> None:
        """Keep nothing more for him."""
        self._holders[:] = [holder for holder in self._holders if holder is not batches]

    def replayed(self, batches: HeldBatches) -> Stream:
        """The same stream of the batches that were held: it reads nothing, and raises `DataError` where one is gone."""
        other = self._copied()
        other._replayed = batches
        return other

    def draw(self, position: Position) -> tuple[Batch, Position]:
        """The batch at a position, and the position after it.

        Raises `ExhaustedDataError` when a pass over the data gives nothing at all, and `DataError` from what the data
        raise, or when a pass is too short for the position.
        """
        place = (position["seed"], position["epoch"], position["index"])
        if "kept" in position:
            self._keep(place, position["kept"])
        if isinstance(self.data, list | tuple):
            batch, (seed, epoch, index) = self._listed(self.data, place)
        else:
            found = self._drawn(place) if self._replayed is None else self._held(self._replayed, place)
            batch, (seed, epoch, index) = found
        for function in self._functions:
            batch = function(batch)
        kept = self._kept.get((seed, epoch))
        return batch, {"seed": seed, "epoch": epoch, "index": index} | ({"kept": kept} if kept else {})

    def remembered(self, position: Position) -> Batch | None:
        """The batch before a position in its pass, as the data gave it; None where there is none, or it is gone."""
        place = (position["seed"], position["epoch"], position["index"] - 1)
        if isinstance(self.data, list | tuple):
            return self.data[place[2]] if 0 <= place[2] < len(self.data) else None
        found = self._recent.find(place)
        return None if found is None else found[0]

    @property
    def length(self) -> int | None:
        """How many batches a pass has, as far as the data say."""
        return length_of(self.data)

    def whole_pass(self, position: Position, asker: str, way_out: str = "") -> Iterator[Batch]:
        """All the batches of the pass that a position is in, from its first.

        Raises `DataError`, in which `asker` reads them, after 10,000 batches of data without a length, and after twice
        as many as a length says.
        """
        seed, epoch, place = position["seed"], position["epoch"], {**position, "index": 0}
        for count in itertools.count():
            batch, place = self.draw(place)
            if place["epoch"] != epoch:
                return
            if count == most_of(self.data):
                self.close()  # the workers of a pass that nobody goes on with
                raise DataError(
                    self._endless(asker, f"they have given {count:,} in pass {epoch + 1} (seed {seed})", way_out)
                )
            yield batch

    def require_end(self, asker: str, way_out: str = "", *, read: bool = False) -> None:
        """Raise `ValueError` where a pass is known to have no end: by what the data say, or with `read` by reading one.

        With `read` one pass over data without a length is read, and nothing of others.
        """
        if read and self.length is None:
            try:
                for _ in self.whole_pass(self.start(), asker, way_out):
                    pass
            except ExhaustedDataError:
                raise
            except DataError as error:
                raise ValueError(str(error)) from error
            return
        why = never_ends(self.data, (reader.iterator for reader in self._readers))
        if why:
            raise ValueError(self._endless(asker, why, way_out))

    def _endless(self, asker: str, why: str, way_out: str) -> str:
        return (
            f"{asker} reads all batches of a pass, and the data of player {self.owner!r} do not end: {why}. Give data "
            "that end, such as a list or a DataLoader whose data set has a length (where a pass is longer than 10,000 "
            f"batches, len(data) must say so){way_out}."
        )

    def close(self) -> None:
        """Stop what reads, with its workers, and let go of the batches; the next draw begins its pass anew."""
        self._readers.clear()
        self._recent.clear()
        self._holders.clear()

    def _copied(self) -> Stream:
        other = Stream(self.owner, self.data, self.device)
        other._readers, other._recent, other._holders = self._readers, self._recent, self._holders
        other._functions, other._replayed, other._kept = self._functions, self._replayed, self._kept
        return other

    def _keep(self, place: Place, kept: Kept) -> None:
        """What the data had kept in themselves as a pass began, for the positions in it."""
        self._kept[place[:2]] = kept
        self._kept.move_to_end(place[:2])
        while len(self._kept) > _MANY:
            self._kept.popitem(last=False)

    def _drawn(self, place: Place) -> tuple[Batch, Place]:
        found = self._recent.find(place)
        if found is None:
            found = self._read(place)
            self._recent.keep(place, found)
        for holder in self._holders:
            holder.keep(self.owner, place, found)
        return found

    def _held(self, batches: HeldBatches, place: Place) -> tuple[Batch, Place]:
        found = batches.find(self.owner, place)
        if found is None:
            seed, epoch, index = place
            raise DataError(
                f"Batch {index + 1} of pass {epoch + 1} of player {self.owner!r} (seed {seed}) is not held."
            )
        return found

    def _listed(self, batches: list[Batch] | tuple[Batch, ...], place: Place) -> tuple[Batch, Place]:
        seed, epoch, index = place
        if index == len(batches) > 0:
            epoch, index = epoch + 1, 0
        if not batches:
            raise self._exhausted(epoch)
        if index > len(batches):
            raise self._shrunk(place, len(batches))
        return batches[index], (seed, epoch, index + 1)

    def _read(self, place: Place) -> tuple[Batch, Place]:
        reader: Reader | None = None
        at = place
        try:
            # Out of the list while it reads: one that fails is not used again.
            reader = next((r for r in self._readers if r.place == place), None)
            if reader is None:
                self._recent.missed(place)
                reader = self._begin(Reader(self.data, self.device), *place[:2])
                while reader.place != place:
                    at = reader.place
                    if reader.read() is END:
                        raise self._shrunk(place, at[2])
            else:
                self._readers.remove(reader)
            at = reader.place
            batch = reader.read()
            if batch is END:
                seed, epoch, index = at
                if index:
                    at = (seed, epoch + 1, 0)
                    self._begin(reader, seed, epoch + 1)
                    batch = reader.read()
                if batch is END:
                    raise self._exhausted(at[1])
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"The data of player {self.owner!r} raised {type(error).__name__} at batch {at[2] + 1} of pass "
                f"{at[1] + 1}: {error}"
            ) from error
        self._resting(reader)
        return batch, reader.place

    def _begin(self, reader: Reader, seed: int, epoch: int) -> Reader:
        before = [reader.iterator, *(other.iterator for other in self._readers)]
        reader.begin(seed, epoch, self._kept.get((seed, epoch), {}))
        if reader.kept:
            self._keep(reader.place, reader.kept)
        if not reader.resumes and any(reader.iterator is other for other in before):
            raise ExhaustedDataError(
                f"The data of player {self.owner!r} gave, for pass {epoch + 1}, the iterator that it had given before: "
                f"it can be iterated once only. {_WAY_OUT}"
            )
        return reader

    def _resting(self, reader: Reader) -> None:
        """Keep a reader for the next draw, and few in all."""
        if self._recent.enough:  # one reads for all who come here
            self._readers[:] = [other for other in self._readers if other.place != reader.place]
        self._readers.append(reader)
        del self._readers[:-_READERS]

    def _exhausted(self, epoch: int) -> ExhaustedDataError:
        return ExhaustedDataError(
            f"The data of player {self.owner!r} gave no batch in pass {epoch + 1}. Data must be an iterable that can "
            f"be iterated again and again. {_WAY_OUT}"
        )

    def _shrunk(self, place: Place, length: int) -> DataError:
        _, epoch, index = place
        return DataError(
            f"The data of player {self.owner!r} ended after {length} batches of pass {epoch + 1}, but its position is "
            f"at batch {index + 1}: they were more before. Data must give the same batches whenever a pass is iterated "
            "again; a run is resumed with the data that it was saved with."
        )


class _RecentBatches:
    """The batches that were read last, each with the place after it, by their places."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Place, tuple[Batch, Place]] = OrderedDict()
        self._order: OrderedDict[Place, int] = OrderedDict()
        self._count, self._most = 0, _FEW
        self.enough = True
        """Whether nobody comes back for more than can be kept."""

    def find(self, place: Place) -> tuple[Batch, Place] | None:
        """What was read at a place, if it is still there."""
        return self._kept.get(place)

    def keep(self, place: Place, found: tuple[Batch, Place]) -> None:
        """Keep what was read, in place of what was read long ago."""
        self._count += 1
        self._kept[place], self._order[place] = found, self._count
        for entries, most in ((self._kept, self._most), (self._order, _REMEMBERED)):
            entries.move_to_end(place)
            while len(entries) > most:
                entries.popitem(last=False)

    def missed(self, place: Place) -> None:
        """From now on keep so many that this one would still be here."""
        if place not in self._order:
            return
        needed = self._count - self._order[place] + 1
        self.enough = self.enough and needed <= _MANY
        self._most = max(self._most, min(needed, _MANY))

    def clear(self) -> None:
        """Forget all of it."""
        self._kept.clear()
        self._order.clear()
        self._count, self._most, self.enough = 0, _FEW, True

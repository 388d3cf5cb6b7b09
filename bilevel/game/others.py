"""The others' variables as a run hands them to a follower, at a cost that does not depend on how many there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import final

from bilevel.tree import Variables


@final
class Others(Mapping[str, Variables]):
    """A view of players' variables: nothing is copied, and nobody is looked at who is not asked for.

    Args:
        variables: Those of players of one game, by name.
        among: Whether a player's are in the view.
        noted: Told of each player whose variables are looked up, and of these, once.
    """

    def __init__(
        self,
        variables: Mapping[str, Variables],
        among: Callable[[str], bool],
        noted: Callable[[str, Variables], object] = lambda name, variables: None,
    ) -> None:
        self._variables, self._among, self._noted = variables, among, noted
        self._seen: set[str] = set()

    def noting(self, noted: Callable[[str, Variables], object]) -> Others:
        """The same view, that tells of who is looked up."""
        return Others(self._variables, self._among, noted)

    def __getitem__(self, name: str) -> Variables:
        if name not in self:
            raise KeyError(name)
        found = self._variables[name]
        if name not in self._seen:
            self._seen.add(name)
            self._noted(name, found)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._variables and self._among(str(name))

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._variables if self._among(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

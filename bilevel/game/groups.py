"""Joint players: who plays together, and what the others see of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from bilevel.game.situation import Buffers


@dataclass(frozen=True)
class Groups:
    """The joint players of a game: name -> members, in order of play."""

    members: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, player: str) -> tuple[str, ...]:
        """Those who make up a player; of one who plays alone itself."""
        return self.members.get(player, (player,))

    def owner(self, name: str) -> str:
        """The joint player that a member belongs to; of one who plays alone itself."""
        return self._owners.get(name, name)

    @cached_property
    def _owners(self) -> dict[str, str]:
        return {member: group for group, members in self.members.items() for member in members}

    def joined(self, buffers: Buffers) -> Buffers:
        """Buffers of members by who plays; a joint player's under its own name, `member.path`."""
        if not self.members:
            return dict(buffers)
        found: Buffers = {}
        for name, tensors in buffers.items():
            owner = self.owner(name)
            if owner == name:
                found[name] = tensors
            else:
                found.setdefault(owner, {}).update({f"{name}.{path}": t for path, t in tensors.items()})
        return found

    def part(self, member: str, buffers: Buffers) -> dict[str, Tensor] | None:
        """The other way round: a member's among buffers by who plays; None where they say nothing of it."""
        if member in buffers:
            return buffers[member]
        prefix, together = f"{member}.", buffers.get(self.owner(member), {})
        return {path.removeprefix(prefix): t for path, t in together.items() if path.startswith(prefix)} or None

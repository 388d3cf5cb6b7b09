"""Joint players: who plays together, and what the others see of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
        return next((group for group, members in self.members.items() if name in members), name)

    def joined(self, buffers: Buffers, order: Sequence[str]) -> Buffers:
        """Buffers by player in the order of play; a joint player's under its own name, `member.path`."""
        if not self.members:
            return dict(buffers)
        playing = set(order)
        found = {name: tensors for name, tensors in buffers.items() if name in playing}
        for group, members in self.members.items():
            found[group] = {f"{m}.{path}": t for m in members for path, t in buffers.get(m, {}).items()}
        return found

    def parted(self, buffers: Buffers) -> Buffers:
        """The other way round: buffers by member."""
        if not self.members:
            return buffers
        found: Buffers = {}
        for name, tensors in buffers.items():
            if name not in self.members:
                found[name] = tensors
                continue
            for path, tensor in tensors.items():
                member, _, rest = path.partition(".")
                found.setdefault(member, {})[rest] = tensor
        return found

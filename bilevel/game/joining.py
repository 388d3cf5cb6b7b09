"""Players who become one joint player: what they must be, and what it changes in a game."""

from __future__ import annotations

from typing import Any

from bilevel.game.checks import RESERVED
from bilevel.game.groups import Groups
from bilevel.game.joint import JointKKT
from bilevel.game.parts import Parts
from bilevel.tree import structure_of


def joining(parts: Parts, name: str, members: tuple[str, ...]) -> dict[str, Any]:
    """What changes in the `Parts` when these players become one."""
    told = f"joined({name}={members})"
    if name in RESERVED or name in parts.order or name in parts.players:
        raise ValueError(f"{told}: the name {name!r} is taken; players are {list(parts.order)}. Choose another.")
    if len(set(members)) != len(members) or len(members) < 2:
        raise ValueError(f"{told}: expected at least two different players.")
    for member in members:
        if member not in parts.order or parts.groups.of(member) != (member,) or member in parts.anticipated:
            raise ValueError(f"{told}: {member!r} is no player that can be joined; those are {list(parts.order)}.")
    first = min(parts.order.index(member) for member in members)
    if first == 0:
        raise ValueError(
            f"{told}: {parts.order[0]!r} moves first and has nobody to answer to. Players who lead together need "
            "no joining: leave them without a response."
        )
    together = parts.order[first : first + len(members)]
    if set(together) != set(members):
        raise ValueError(
            f"{told}: in the order of play, {list(parts.order)}, others move between them. Declare them together."
        )
    if any(parts.players[member].constraints for member in members):
        JointKKT.of({member: parts.players[member].rests for member in together}, told)
    if any(parts.players[member].optimizer_hyper for member in members):
        raise ValueError(f"{told}: a hyperparameter of the inner optimiser is no follower.")
    starting = [member for member in members if parts.players[member].start is not None]
    if starting:
        raise ValueError(
            f"{told}: {starting[0]!r} has a start=, and who settle among themselves start where they were. Leave "
            "it out, or give each a response of its own."
        )
    initial = {member: parts.initial[member] for member in together}
    return {
        "groups": Groups({**parts.groups.members, name: together}),
        "order": (*parts.order[:first], name, *parts.order[first + len(members) :]),
        "initial": {**parts.initial, name: initial},
        "structures": {**parts.structures, name: structure_of(initial)},
    }

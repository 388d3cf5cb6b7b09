"""What a run is known by, and what a checkpoint of another run is told apart by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bilevel.constraints import Coordinate
from bilevel.dynamics import Dynamics
from bilevel.errors import CheckpointError
from bilevel.game import Game, Player
from bilevel.responses import Response
from bilevel.sharding.tensor import shape_of
from bilevel.solving.description import Describer, Description, differences
from bilevel.solving.leaders import Leaders
from bilevel.tree import leaf_names, leaves, map_leaves, named_leaves

Change = tuple[str, str, str]
"""A path in an identity, what is saved there, and what is present, in words."""


def identity(
    game: Game, responses: Mapping[str, Response], leaders: Leaders, dynamics: Dynamics, seed: int
) -> dict[str, Description]:
    """A run, as plain data.

    `form` is what a state is a state of: who plays, in which order and in which shapes, and how it all began. It cannot
    change within a run. `settings` may: objectives, responses, optimisers and rules.
    """
    # Ones, and not where they start: a run that goes on does not start there.
    players = {name: map_leaves(lambda leaf: leaf.new_ones(leaf.shape), game.initial(name)) for name in game.names}
    describer = Describer()
    over = {name: Describer(leaves(players[name]), players) for name in game.names}
    members = [(member, game.players[member]) for name in game.names for member in game.members(name)]
    settings: dict[str, Description] = {
        "players": {member: described(describer, player) for member, player in members},
        "responses": {name: over[name].describe(response) for name, response in responses.items()},
        "optimizer": {name: over[name].optimizer(factory) for name, factory in leaders.factories.items()},
        "dynamics": describer.describe(dynamics),
        "clip_norm": leaders.clip_norm,
    }
    settings["optimizer"] |= {name: describer.describe(method) for name, method in leaders.driven.items()}
    if leaders.lagrangians:  # whose optimisers stand above
        alone = {name: replace(found, optimizer=None) for name, found in leaders.lagrangians.items()}
        settings["lagrangian"] = {name: describer.describe(found) for name, found in alone.items()}
    if leaders.scheduler is not None:
        scheduler = leaders.scheduler
        settings["scheduler"] = {n: over[n].scheduler(scheduler, made) for n, made in leaders.factories.items()}
    form = {
        "order": list(game.names),
        "leaders": list(leaders.names),
        "games": game.count,
        "players": {name: _form(game, name) for name in game.names},
        "seed": seed,
    }
    return {"form": form, "settings": settings}


def described(describer: Describer, player: Player) -> dict[str, Description]:
    """What a player wants and may do."""
    named = zip(leaf_names(player.init, "variable"), leaves(player.init), strict=True)
    ranges = {name: leaf for name, leaf in named if isinstance(leaf, Coordinate)}
    return {
        **{what: describer.describe(getattr(player, what)) for what in _OPTIONS},
        "range": describer.describe(ranges),
        **{what: describer.describe(function) for what, function in player.constraints.items()},
    }


def differ(saved: Mapping[str, Any], present: Mapping[str, Any]) -> bool:
    """Whether two runs differ in anything that they are known by."""
    return any(differences(saved[part], present[part]) for part in ("form", "settings"))


def accepted(saved: Mapping[str, Any], present: Mapping[str, Any], path: Path, *, accept_changes: bool) -> list[Change]:
    """The settings in which the run that a checkpoint is of was another.

    Raises:
        CheckpointError: when its form was another, or its settings and that is not accepted.
    """
    form = differences(saved["form"], present["form"])
    if form:
        raise CheckpointError(
            f"{path} is a checkpoint of another run: {in_words(form)}. A run cannot change that. Pass another "
            "checkpoint=, or resume=False to overwrite it."
        )
    settings = differences(saved["settings"], present["settings"])
    if settings and not accept_changes:
        raise CheckpointError(
            f"{path} is a checkpoint of another run: {in_words(settings)}. Pass accept_changes=True to go on with "
            "what is now, another checkpoint=, or resume=False to overwrite it."
        )
    return settings


def in_words(changes: list[Change]) -> str:
    """Some of the changes, in one line."""
    told = []
    for path, saved, present in changes[:_TOLD]:
        if path.endswith(".code"):
            told.append(f"its {path.removesuffix('.code')} has other code now")
        else:
            told.append(f"its {path} was {saved} and is now {present}")
    more = len(changes) - _TOLD
    return ", ".join(told) + (f", and {more} more" if more > 0 else "")


def touches(paths: list[str], part: str, name: str) -> bool:
    """Whether a change is in this part of this player's settings."""
    whole = f"{part}.{name}"
    return any(path in (part, whole) or path.startswith((f"{whole}.", f"{whole}[")) for path in paths)


_TOLD = 5
_OPTIONS = ("objective", "residual", "start", "domain", "prox")


def _form(game: Game, name: str) -> dict[str, Description]:
    variables = {path or "tensor": _shape(leaf) for path, leaf in named_leaves(game.initial(name))}
    members = game.members(name)
    buffers = {path: _shape(buffer) for path, buffer in game.buffers().get(name, {}).items()}
    data = [member for member in members if game.start(member) is not None]
    return {"variables": variables, "members": list(members), "buffers": buffers, "data": data}


def _shape(tensor: Any) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape_of(tensor)}"

"""A player who moves alone, all others standing still: whether it is at a strict minimum of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bilevel.certificates.certificate import Finding
from bilevel.certificates.constrained import Borne, within_constraints, within_set
from bilevel.certificates.point import own_gradient
from bilevel.certificates.verdicts import definite, linear, small
from bilevel.game import Buffers, Game
from bilevel.game.data import Batch
from bilevel.tree import Variables, flatten


@dataclass(frozen=True)
class Settings:
    """The options of a certificate."""

    tolerance: float
    lanczos_steps: int
    seed: int


@dataclass(frozen=True, eq=False)
class Alone:
    """A player's findings, what it bears of its constraints if it has any, and what they cost."""

    name: str
    findings: list[Finding]
    borne: Borne | None
    gradients: int
    products: int


def members_alone(
    game: Game,
    name: str,
    variables: Mapping[str, Variables],
    start: Mapping[str, Variables],
    batch: Batch,
    buffers: Buffers,
    settings: Settings,
) -> list[Alone]:
    """A player's findings at `variables`, in units of its gradient at `start`; of a joint one each member's."""
    joint, found = game.members(name) != (name,), []
    for member in game.members(name):
        part = batch[member] if joint and batch is not None else batch
        here, there = ({**at, member: at[name][member]} if joint else at for at in (variables, start))
        found.append(_alone(game, member, here, there, part, buffers, settings))
    return found


def _alone(
    game: Game,
    name: str,
    here: Mapping[str, Variables],
    there: Mapping[str, Variables],
    batch: Batch,
    buffers: Buffers,
    settings: Settings,
) -> Alone:
    own = own_gradient(game, name, here, batch, buffers)
    reference, tolerance = own_gradient(game, name, there, batch, game.buffers()).norm, settings.tolerance
    by_walls = game.by_walls(name)
    if game.players[name].constraints or by_walls is not game:
        findings, borne = within_constraints(by_walls, name, here, batch, buffers, reference, tolerance)
        return Alone(name, findings, borne, 2, 0)
    if game.residual(name).projects:
        return Alone(name, within_set(game, name, here, batch, buffers, reference, tolerance), None, 2, 0)
    found, y = own.spectrum(settings.lanczos_steps, settings.seed), flatten(here[name])
    rounding = 100.0 * torch.finfo(y.dtype).eps * found.largest * float(y.norm())
    first = small(f"{name}: first order", own.norm, reference, rounding, tolerance)
    second = f"{name}: second order"
    last = linear(second) if own.linear else definite(second, found, "of its own Hessian")
    return Alone(name, [first, last], None, 2, found.products)

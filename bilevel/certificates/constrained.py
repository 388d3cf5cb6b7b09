"""A player with constraints at a point: whether it is feasible, a KKT point, and a strict minimum."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.certificates.certificate import Finding
from bilevel.certificates.verdicts import CERTIFIED, INCONCLUSIVE, REFUTED, small
from bilevel.constraints.active_set import KKTPoint, judged, lengths
from bilevel.constraints.critical_cone import lowest_on_cone
from bilevel.constraints.regularity import weak
from bilevel.game import Buffers, Follower, Game
from bilevel.game.data import Batch
from bilevel.game.joint import same
from bilevel.game.newton import curvatures as curvatures_in_set
from bilevel.tree import Variables, flatten


def held_alone(game: Game, name: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers) -> Follower:
    """A player as one who follows all others, who stand still; with what its residual needs to be known first."""
    others = {other: tree for other, tree in variables.items() if other != name}
    state = {"follower": name, "data": None, "buffers": buffers.get(name, {})}
    first = game.follower(others, state, batch)
    state |= first.first()
    if first.rests.needs_scale:
        state["scale"] = first.measured_scale(first.form.split(flatten(variables[name]).detach()))
    return game.follower(others, state, batch)


def within_constraints(
    game: Game,
    name: str,
    variables: Mapping[str, Variables],
    batch: Batch,
    buffers: Buffers,
    reference: float,
    tolerance: float,
) -> tuple[list[Finding], Borne]:
    """Its three findings, all else held, and its multipliers: those that leave least of the Lagrangian's gradient."""
    programme = held_alone(game, name, variables, batch, buffers).constraints
    assert programme is not None
    point = judged(programme, flatten(variables[name]).detach().to("cpu", torch.float64))
    broken = float(point.violations.max())
    worst = programme.labels.all[int(point.violations.argmax())]
    # Lengths, in units of the variables' size: what a solver of this tolerance leaves.
    feasible = Finding(
        f"{name}: feasible",
        CERTIFIED if broken <= tolerance else REFUTED,
        broken,
        f"<= {tolerance:g}",
        f"the farthest outside is {worst}, in units of 1 + |y|",
    )
    left = float((point.slope + point.at.push_c.T @ point.l + point.at.push_e.T @ point.m).norm())
    rounding = 100.0 * programme.epsilon * point.scale
    first = small(f"{name}: first order", left, reference, rounding, tolerance)
    found = [feasible, first, _second_order(name, point, programme.epsilon)]
    pushes = torch.cat([point.l, point.m]) * torch.cat([lengths(point.at.A), lengths(point.at.E)]) / point.scale
    return found, Borne(dict(zip(programme.labels.all, torch.cat([point.l, point.m]).tolist(), strict=True)), pushes)


def _second_order(name: str, point: KKTPoint, epsilon: float) -> Finding:
    """Whether its Lagrangian curves upwards along its critical cone."""
    second = f"{name}: second order"
    if point.hessian is None:
        remark = "too many variables for their Hessian to be written down"
        return Finding(second, INCONCLUSIVE, math.nan, "> 0", remark)
    about = weak(point, epsilon)
    rows = torch.cat([point.at.A[point.binding & ~about], point.at.E])
    smallest, largest = lowest_on_cone(point.hessian, rows, point.at.A[about])
    uncertain = 100.0 * len(point.y) * epsilon * max(abs(smallest), abs(largest))
    standing = CERTIFIED if smallest > uncertain else REFUTED if smallest < -uncertain else INCONCLUSIVE
    remark = f"smallest eigenvalue of its Lagrangian's Hessian along the {len(rows)} that bind; largest {largest:.3g}"
    if bool(about.any()):
        remark += f"; {int(about.sum())} bind with a multiplier of 0, and halve the directions"
    return Finding(second, standing, smallest, "> 0", remark)


@dataclass(frozen=True, eq=False)
class Borne:
    """A player's multipliers by its constraints' names, and how hard each of them pushes, in units of its gradients."""

    multipliers: Mapping[str, float]
    pushes: Tensor

    def of(self, label: str) -> list[tuple[float, float]]:
        """(multiplier, push) of each entry of the function that is called so."""
        pairs = zip(self.multipliers.items(), self.pushes.tolist(), strict=True)
        return [(value, push) for (name, value), push in pairs if name == label or name.startswith(f"{label}[")]


def shared_multipliers(game: Game, borne: Mapping[str, Borne], tolerance: float) -> list[Finding]:
    """Whether all who share a constraint bear it by one multiplier: a finding for each function that several have."""
    seen: list[tuple[Any, list[tuple[str, str]]]] = []
    for name in borne:
        for label, function in game.players[name].constraints.items():
            known = next((who for other, who in seen if same(other, function)), None)
            if known is None:
                seen.append((function, [(name, label)]))
            else:
                known.append((name, label))
    found = []
    for _, who in seen:
        if len(who) < 2:
            continue
        entries = list(zip(*(borne[name].of(label) for name, label in who), strict=True))
        # Of each entry the multipliers' spread, as hard as it pushes the one who bears most.
        spreads = []
        for entry in entries:
            (low, _), (high, push) = min(entry), max(entry)
            spreads.append(abs(push) * (high - low) / (abs(high) or 1.0))
        worst = max(range(len(spreads)), key=spreads.__getitem__)
        told = ", ".join(f"{value:.4g} of {name}" for (value, _), (name, _) in zip(entries[worst], who, strict=True))
        found.append(
            Finding(
                f"shared {who[0][1]} of {', '.join(name for name, _ in who)}",
                CERTIFIED if spreads[worst] <= tolerance else REFUTED,
                spreads[worst],
                f"<= {tolerance:g}",
                f"one multiplier for all, as in a variational equilibrium; they are {told}",
            )
        )
    return found


def within_set(
    game: Game,
    name: str,
    variables: Mapping[str, Variables],
    batch: Batch,
    buffers: Buffers,
    reference: float,
    tolerance: float,
) -> list[Finding]:
    """The three findings of a player with a domain that is no smooth functions, or with a non-smooth term."""
    held, y = held_alone(game, name, variables, batch, buffers), flatten(variables[name]).detach()
    with torch.no_grad():
        _, slopes = held.field(held.form.split(y))
        left = float(held.norm(held.at_rest(held.form.split(y), slopes)))
        inside = held.rests.outside(game, name, held.form.split(y), held.others) / (1.0 + float(y.abs().max()))
    feasible = Finding(
        f"{name}: feasible",
        CERTIFIED if inside <= tolerance else REFUTED,
        inside,
        f"<= {tolerance:g}",
        "its distance from its domain, in units of 1 + |y|",
    )
    smallest, largest = curvatures_in_set(held, y)
    rounding = 100.0 * torch.finfo(y.dtype).eps * (float(flatten(slopes).norm()) + abs(largest) * float(y.norm()))
    first_order = small(f"{name}: first order", left, reference, rounding, tolerance)
    second = f"{name}: second order"
    if math.isnan(smallest):
        remark = "too many variables for the Jacobian of its residual to be written down"
        return [feasible, first_order, Finding(second, INCONCLUSIVE, smallest, "> 0", remark)]
    uncertain = 100.0 * len(y) * torch.finfo(y.dtype).eps * max(abs(smallest), abs(largest))
    standing = CERTIFIED if smallest > uncertain else REFUTED if smallest < -uncertain else INCONCLUSIVE
    remark = f"smallest eigenvalue of its residual's Jacobian; largest {largest:.3g}"
    kinks = held.held_residual().kinks(y, *held.xs)
    if kinks and standing is CERTIFIED:
        standing, remark = INCONCLUSIVE, f"at a kink, so that one side alone was seen; {remark}"
    return [feasible, first_order, Finding(second, standing, smallest, "> 0", remark)]

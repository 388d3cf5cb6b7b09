"""A player with constraints at a point: whether it is feasible, a KKT point, and a strict minimum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.certificates.certificate import Finding
from bilevel.certificates.verdicts import CERTIFIED, INCONCLUSIVE, REFUTED, small
from bilevel.constraints.active_set import KKTPoint, judged, lengths, recovered
from bilevel.constraints.critical_cone import lowest_on_cone
from bilevel.constraints.functions import Linearised
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
    return found, Borne(programme.labels.all, point)


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
    """A player's constraints by name, first the inequalities, and its point with the multipliers that suit it best."""

    labels: tuple[str, ...]
    point: KKTPoint

    def places(self, label: str) -> list[int]:
        """Where the entries of the function that is called so stand among all."""
        return [i for i, name in enumerate(self.labels) if name == label or name.startswith(f"{label}[")]

    def of(self, label: str) -> list[tuple[float, float]]:
        """(multiplier, push) of each entry of that function; how hard it pushes is in units of its gradients."""
        multipliers = torch.cat([self.point.l, self.point.m])
        pushes = multipliers * torch.cat([lengths(self.point.at.A), lengths(self.point.at.E)]) / self.point.scale
        return [(float(multipliers[i]), float(pushes[i])) for i in self.places(label)]


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
    shared, found = [who for _, who in seen if len(who) > 1], []
    one = _OneForAll.of(borne, shared) if shared else None
    for who in shared:
        entries = list(zip(*(borne[name].of(label) for name, label in who), strict=True))
        # Of each entry the multipliers' spread, as hard as it pushes the one who bears most.
        spreads = []
        for entry in entries:
            (low, _), (high, push) = min(entry), max(entry)
            spreads.append(abs(push) * (high - low) / (abs(high) or 1.0))
        worst = max(range(len(spreads)), key=spreads.__getitem__)
        spread = spreads[worst]
        told = ", ".join(f"{value:.4g} of {name}" for (value, _), (name, _) in zip(entries[worst], who, strict=True))
        told = f"they are {told}"
        # A player may have as good multipliers of its own constraints at another one of the shared ones.
        assert one is not None
        if spread > tolerance and (left := max(one.left[name] for name, _ in who)) <= tolerance:
            name, label = who[0]
            spread, told = left, f"it is {one.multipliers[name, borne[name].places(label)[worst]]:.4g}"
        found.append(
            Finding(
                f"shared {who[0][1]} of {', '.join(name for name, _ in who)}",
                CERTIFIED if spread <= tolerance else REFUTED,
                spread,
                f"<= {tolerance:g}",
                f"one multiplier for all, as in a variational equilibrium; {told}",
            )
        )
    return found


@dataclass(frozen=True, eq=False)
class _OneForAll:
    """The multipliers that suit all players best together, with one for each entry of what they share.

    Attributes:
        multipliers: By player and place among its constraints.
        left: What they leave of each player's Lagrangian's gradient, in units of its terms.
    """

    multipliers: Mapping[tuple[str, int], float]
    left: Mapping[str, float]

    @staticmethod
    def of(borne: Mapping[str, Borne], shared: Sequence[Sequence[tuple[str, str]]]) -> _OneForAll:
        """By non-negative least squares on the players' gradients, stacked, each in units of its terms."""
        begins, n = {}, 0
        for name, part in borne.items():
            begins[name], n = n, n + len(part.point.y)
        # Each constraint of the stacked players by who bears it, and where it stands among that player's own.
        tied = [
            list(zip((name for name, _ in who), places, strict=True))
            for who in shared
            for places in zip(*(borne[name].places(label) for name, label in who), strict=True)
        ]
        known = {bearer for bearers in tied for bearer in bearers}
        own = [[(name, i)] for name, part in borne.items() for i in range(len(part.labels)) if (name, i) not in known]
        above = [bearers for bearers in tied + own if bearers[0][1] < len(borne[bearers[0][0]].point.at.c)]
        level = [bearers for bearers in tied + own if bearers not in above]
        like = next(iter(borne.values())).point.y
        weights = torch.cat([torch.full_like(part.point.y, 1.0 / part.point.scale) for part in borne.values()])

        def stacked(constraints: list[list[tuple[str, int]]]) -> tuple[Tensor, Tensor]:
            values, rows = like.new_zeros(len(constraints)), like.new_zeros(len(constraints), n)
            for row, bearers in enumerate(constraints):
                for name, i in bearers:
                    at, begin = borne[name].point.at, begins[name]
                    values[row] = torch.cat([at.c, at.e])[i]
                    rows[row, begin : begin + at.A.shape[1]] = torch.cat([at.A, at.E])[i]
            return values, rows

        (c, rows), (e, levels) = stacked(above), stacked(level)
        slope = torch.cat([part.point.slope for part in borne.values()]) * weights
        at = Linearised(c, e, rows, levels, weights.expand(len(above) + len(level), n))
        l, m = recovered(torch.cat([part.point.y for part in borne.values()]), slope, at)
        left = slope + at.push_c.T @ l + at.push_e.T @ m
        every = zip(above + level, torch.cat([l, m]).tolist(), strict=True)
        return _OneForAll(
            {bearer: value for bearers, value in every for bearer in bearers},
            {name: float(left[begins[name] : begins[name] + len(part.point.y)].norm()) for name, part in borne.items()},
        )


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
        inside = held.rests.outside(held.situation(), held.form.split(y)) / (1.0 + float(y.abs().max()))
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

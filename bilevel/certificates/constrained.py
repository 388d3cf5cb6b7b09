"""A player with functions as constraints at a point: whether it is feasible, a KKT point, and a strict minimum."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from bilevel.certificates.certificate import Finding
from bilevel.certificates.verdicts import CERTIFIED, INCONCLUSIVE, REFUTED, small
from bilevel.constraints.active_set import judged
from bilevel.constraints.regularity import curvatures
from bilevel.game import Buffers, Game
from bilevel.game.data import Batch
from bilevel.tree import Variables, flatten


def within_constraints(
    game: Game,
    name: str,
    variables: Mapping[str, Variables],
    batch: Batch,
    buffers: Buffers,
    reference: float,
    tolerance: float,
) -> list[Finding]:
    """Its three findings, all else held; multipliers are those that leave least of the Lagrangian's gradient."""
    others = {other: tree for other, tree in variables.items() if other != name}
    state = {"follower": name, "data": None, "buffers": buffers.get(name, {})}
    state |= game.follower(others, state, batch).first()
    programme = game.follower(others, state, batch).constraints
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
    left = float((point.slope + point.at.A.T @ point.l + point.at.E.T @ point.m).norm())
    rounding = 100.0 * programme.epsilon * point.scale
    first = small(f"{name}: first order", left, reference, rounding, tolerance)
    smallest, largest = curvatures(point)
    if math.isnan(smallest):
        standing, remark = INCONCLUSIVE, "too many variables for their Hessian to be written down"
    else:
        uncertain = 100.0 * len(point.y) * programme.epsilon * max(abs(smallest), abs(largest))
        standing = CERTIFIED if smallest > uncertain else REFUTED if smallest < -uncertain else INCONCLUSIVE
        bind = int(point.binding.sum()) + len(point.m)
        remark = f"smallest eigenvalue of its Lagrangian's Hessian along the {bind} that bind; largest {largest:.3g}"
    return [feasible, first, Finding(f"{name}: second order", standing, smallest, "> 0", remark)]

r"""The leader's conditions within constraints, on each smooth piece of its follower's answer.

Where constraints of the follower bind with a multiplier of 0 its answer has a kink, and the leader's loss is pieced
together: on each piece some of them bind, whose multipliers stay at least 0, and the others keep their sign. The point
is a strict local minimum where it is one of the leader's programme on every piece, and none where it is not on one of
them. Source: Luo, Pang and Ralph 1996, "Mathematical programs with equilibrium constraints", for pieces; Fiacco and
McCormick 1968 for second order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.certificates.certificate import Finding, Standing
from bilevel.certificates.constrained_point import ConstrainedPoint, Piece
from bilevel.certificates.verdicts import CERTIFIED, INCONCLUSIVE, REFUTED
from bilevel.constraints.active_set import lengths
from bilevel.constraints.critical_cone import lowest_on_cone

FEASIBLE, FIRST, SECOND = "leader's feasibility", "leader's first order", "leader's second order"


@dataclass(frozen=True)
class Verdict:
    """What one piece says: first and second order, each with its number, and the multipliers of what is near."""

    first: Standing
    left: float
    second: Standing
    curvature: float
    largest: float
    bind: int


def feasible(held: ConstrainedPoint, piece: Piece, tolerance: float) -> Finding:
    """Whether the leader keeps its functions and its domain; a kink moves nobody, so that any piece serves."""
    own = piece.rows[: len(piece.c)]
    size = 1.0 + float(held.x.abs().max())
    broken = torch.cat([piece.c / lengths(own), piece.e.abs() / lengths(piece.level)]).clamp(min=0.0) / size
    worst = int(broken.argmax())
    name, value = (held.inequalities + held.equalities)[worst], float(broken[worst])
    remark = f"the farthest outside is {name}, in units of 1 + |{held.leader}|, as it moves with the follower's answer"
    return Finding(FEASIBLE, CERTIFIED if value <= tolerance else REFUTED, value, f"<= {tolerance:g}", remark)


def judged_piece(held: ConstrainedPoint, piece: Piece, scale: float, tolerance: float) -> Verdict:
    """The leader's conditions on one piece.

    Inequalities within `tolerance` of binding may push, in units of the variables' size.
    """
    size = 1.0 + float(held.x.abs().max())
    values = torch.cat([piece.c, torch.zeros(len(piece.rows) - len(piece.c), dtype=piece.c.dtype)])
    norms = piece.rows.norm(dim=1)
    binds = values.abs() <= tolerance * size * lengths(piece.rows)
    turns = norms > 1e-12 * (1.0 + float(norms.max())) if len(norms) else norms > 0.0
    near, stuck = binds & turns, bool((binds & ~turns).any())
    rows = piece.rows[near] / norms[near][:, None]
    l, m, left = _pushes(piece.gradient, rows, piece.level / lengths(piece.level)[:, None])
    miss = float(left.norm())
    if miss <= tolerance * scale:
        first = CERTIFIED
    else:
        first = REFUTED if not stuck and _may_move(rows, piece.level) else INCONCLUSIVE
    if first is not CERTIFIED:
        return Verdict(first, miss, INCONCLUSIVE, math.nan, math.nan, 0)
    above = torch.zeros(len(piece.rows), dtype=l.dtype)
    above[near] = l / norms[near]
    hessian, noise = piece.curved(above, m / lengths(piece.level))
    strong, zero = l > tolerance * scale, l > held.programme.epsilon**0.45 * scale
    lowest, largest = lowest_on_cone(hessian, torch.cat([piece.level, rows[strong]]), rows[~strong])
    bind = int(strong.sum()) + len(piece.level)
    if lowest > noise:
        return Verdict(first, miss, CERTIFIED, lowest, largest, bind)
    # A multiplier too small to tell from 0 may hold the direction in which it falls; several choices of multipliers
    # may as well, where what binds is dependent.
    firmly, _ = lowest_on_cone(hessian, torch.cat([piece.level, rows[zero]]), rows[~zero])
    told = firmly < -noise and _independent(torch.cat([piece.level, rows]))
    return Verdict(first, miss, REFUTED if told else INCONCLUSIVE, lowest, largest, bind)


def _pushes(slope: Tensor, rows: Tensor, level: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """l >= 0 and m that leave least of slope + rows'l + level'm, and what they leave; rows have length 1."""
    from scipy.optimize import nnls  # noqa: PLC0415 - importing bilevel stays light

    left, across = slope, rows
    if len(level):
        _, sizes, right = torch.linalg.svd(level, full_matrices=False)
        basis = right[sizes > 1e-10].T
        left, across = slope - basis @ (basis.T @ slope), rows - (rows @ basis) @ basis.T
    l = torch.zeros(len(rows), dtype=slope.dtype)
    if len(rows):
        l = torch.as_tensor(nnls(across.T.numpy(), -left.numpy(), maxiter=30 * max(10, len(rows)))[0])
    m = torch.zeros(len(level), dtype=slope.dtype)
    if len(level):
        m = torch.linalg.lstsq(level.T, -(slope + rows.T @ l)[:, None], driver="gelsd").solution[:, 0]
    return l, m, slope + rows.T @ l + level.T @ m


def _may_move(rows: Tensor, level: Tensor) -> bool:
    """Whether some direction leaves all that binds, so that first-order moves are moves (Mangasarian-Fromovitz)."""
    from scipy.optimize import linprog  # noqa: PLC0415

    if not _independent(level):
        return False
    if not len(rows):
        return True
    k, n = rows.shape
    A = torch.cat([rows, torch.ones(k, 1, dtype=rows.dtype)], 1).numpy()
    E = torch.cat([level, torch.zeros(len(level), 1, dtype=rows.dtype)], 1).numpy() if len(level) else None
    cost = [0.0] * n + [-1.0]
    right = None if E is None else [0.0] * len(level)
    bounds = [(-1.0, 1.0)] * n + [(None, 1.0)]
    found = linprog(cost, A_ub=A, b_ub=[0.0] * k, A_eq=E, b_eq=right, bounds=bounds)
    return bool(found.status == 0 and -found.fun > 1e-6)


def _independent(rows: Tensor) -> bool:
    if not len(rows):
        return True
    sizes = torch.linalg.svdvals(rows / lengths(rows)[:, None])
    return len(rows) <= rows.shape[1] and float(sizes[-1]) > 1e-8


def leaders_findings(
    held: ConstrainedPoint, pieces: list[Piece], scale: float, tolerance: float, story: str
) -> list[Finding]:
    """The leader's two conditions over all pieces: certified where all are, refuted where one is."""
    verdicts = [judged_piece(held, piece, scale, tolerance) for piece in pieces]
    worst = max(verdicts, key=lambda verdict: verdict.left)
    remark = "what multipliers leave of the hypergradient, over |g_x| + |f_yx| |u|, or |g_x| at the start"
    if len(pieces) > 1:
        remark = f"{remark}; the worst of {len(pieces)} sides of {story}"
    first = Finding(
        FIRST, _together([v.first for v in verdicts]), worst.left / max(scale, 1e-300), f"<= {tolerance:g}", remark
    )
    known = [verdict for verdict in verdicts if not math.isnan(verdict.curvature)] or verdicts
    lowest = min(known, key=lambda verdict: verdict.curvature)
    told = (
        f"smallest eigenvalue of its Lagrangian's total second derivative where the {lowest.bind} that bind leave it "
        f"free; largest {lowest.largest:.3g}"
    )
    if first.standing is not CERTIFIED:
        told = "the first-order condition does not hold"
    return [first, Finding(SECOND, _together([v.second for v in verdicts]), lowest.curvature, "> 0", told)]


def _together(standings: list[Standing]) -> Standing:
    if REFUTED in standings:
        return REFUTED
    return INCONCLUSIVE if INCONCLUSIVE in standings else CERTIFIED

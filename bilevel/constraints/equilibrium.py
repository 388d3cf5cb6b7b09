"""Whether an equilibrium of players within constraints moves smoothly with the leader.

It does where the gradients of the constraints that bind are independent, as are the directions that their multipliers
push along, and where the KKT system is regular; each player is at a minimum of its own where its own Lagrangian curves
upwards, or is flat, along its own constraints that bind.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bilevel.constraints.active_set import KKTPoint, kkt_matrix, lengths
from bilevel.constraints.functions import Labels
from bilevel.constraints.regularity import weak
from bilevel.errors import CurvatureError, DependentConstraintsError


def require_regular_equilibrium(point: KKTPoint, labels: Labels, places: Mapping[str, Tensor], epsilon: float) -> None:
    """Raise where the equilibrium has no derivative, or where a player is at no minimum of its own.

    Args:
        point: One that was reached; its `hessian` is the derivative of the stacked gradients.
        labels: What the constraints are called.
        places: Where each player's entries lie in y.
        epsilon: The rounding of the players' dtype.
    """
    near = point.binding | weak(point, epsilon)
    rows, columns = torch.cat([point.at.A[near], point.at.E]), torch.cat([point.at.push_c[near], point.at.push_e])
    rows, columns = rows / lengths(rows)[:, None], columns / lengths(columns)[:, None]
    names = [labels.inequality[i] for i in near.nonzero().flatten().tolist()] + list(labels.equality)
    for matrix in (rows, columns):
        _require_independent(matrix, names, labels.player, epsilon)
    if point.hessian is None:
        return
    largest = float(point.hessian.abs().max())
    rounding = 100.0 * len(point.y) * epsilon * largest
    for player, mine in places.items():
        lowest = own_curvature(point, mine)
        if lowest < -rounding:
            raise CurvatureError(
                f"Player {player!r} of {labels.player!r}: where they settled its own Lagrangian curves downwards along "
                f"its constraints that bind (smallest eigenvalue {lowest:.3g}): it is at a saddle, or a maximum, of "
                "its own. Start from another init, or use another method."
            )
    values = torch.linalg.svdvals(kkt_matrix(point.hessian / (largest or 1.0), rows, columns))
    if float(values[-1]) <= 100.0 * len(values) * epsilon * float(values[0]):
        raise CurvatureError(
            f"Players {list(places)} of {labels.player!r}: their equilibrium is one of many, or jumps with the leader: "
            f"the system of their conditions is singular (smallest singular value {float(values[-1]):.1g}), and has no "
            "derivative. Add a small strictly convex term to each one's loss, such as 1e-3 * y.square().sum(). Where "
            "they have one constraint in common, give each of them the same function, so that they share its "
            "multiplier."
        )


def own_curvature(point: KKTPoint, mine: Tensor) -> float:
    """The smallest eigenvalue of a player's own Hessian along its own constraints that bind; 0 where none is free."""
    assert point.hessian is not None
    rows = torch.cat([point.at.push_c[point.binding], point.at.push_e])[:, mine]
    rows = rows[rows.norm(dim=1) > 0.0]
    free = torch.eye(len(mine), dtype=rows.dtype)
    if len(rows):
        _, values, right = torch.linalg.svd(rows / lengths(rows)[:, None], full_matrices=True)
        free = right[int((values > 1e-10).sum()) :].T
    if not free.shape[1]:
        return 0.0
    own = point.hessian[mine][:, mine]
    return float(torch.linalg.eigvalsh(free.T @ (0.5 * (own + own.T)) @ free)[0])


def _require_independent(rows: Tensor, names: list[str], player: str, epsilon: float) -> None:
    if not len(rows):
        return
    left, values, _ = torch.linalg.svd(rows, full_matrices=True)
    smallest = 0.0 if len(values) < len(rows) else float(values[-1])
    if smallest > 10.0 * epsilon**0.5:
        return
    shares = left[:, -1].abs()
    guilty = [name for name, share in zip(names, shares.tolist(), strict=True) if share > 0.05 * float(shares.max())]
    raise DependentConstraintsError(
        f"Players of {player!r}: where they settled {', '.join(guilty[:8])} bind and their gradients are linearly "
        "dependent, so that no multipliers can be told from them, nor any one equilibrium. If they are one constraint "
        "that several have in common, give each of them the same function: they share its multiplier then. Drop what "
        "the others imply."
    )

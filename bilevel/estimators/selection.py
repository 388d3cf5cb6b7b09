"""How far penalties may differ: tuned at several spreads at once, and judged on rows that no tuning saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.estimators.newton import Table
from bilevel.estimators.tuned import HIGHEST, LOWEST, Stack, best_level

_GRID = 23
_FEWEST_ROWS = 20
"""Below so many, rows that are held out twice say nothing."""


@dataclass(frozen=True, eq=False)
class Selected:
    """What was chosen: `weights: [q, m]`, `penalties: [groups]`, and how it was judged.

    `losses: [spreads]` are means over rows that neither weights nor penalties were fitted to, that of the single
    penalty first; `errors: [spreads]` are standard errors of their differences from the best.
    """

    weights: Tensor
    penalties: Tensor
    single: float
    spread: float
    spreads: tuple[float, ...]
    losses: Tensor
    errors: Tensor


def folds_of(labels: Any, rows: Any, count: int, seed: int) -> Any:
    """Each row's fold, an array `[rows]`: shuffled, and each label in equal parts where there are `labels: [n]`."""
    order = np.random.default_rng(seed).permutation(len(rows))
    if labels is not None:
        order = order[np.argsort(labels[rows][order], kind="stable")]
    found = np.empty(len(rows), dtype=int)
    found[order] = np.arange(len(rows)) % count
    return found


def selected(table: Table, labels: Any, *, folds: int, spreads: Sequence[float], seed: int, steps: int) -> Selected:
    """The weights at the penalties of the least spread that is within one standard error of the best."""
    n, groups = len(table.inputs), int(table.groups.max()) + 1
    everything = np.arange(n)
    outer = folds_of(labels, everything, min(folds, n), seed)
    judged = bool(spreads) and groups > 1 and n >= _FEWEST_ROWS
    parts = [everything]
    if judged:
        parts += [everything[outer != k] for k in range(outer.max() + 1)]
    inner = min(folds, *(len(rows) for rows in parts))  # of the whole as well, so that all are one stack
    counts = [_counts(n, rows, folds_of(labels, rows, inner, seed + 1)) for rows in parts]
    train, valid = (torch.stack([pair[side] for pair in counts]).to(table.inputs) for side in (0, 1))
    nothing, one = train.new_zeros(len(parts)), train.new_ones(len(parts))
    stack = Stack(table, train, valid, nothing, one)

    grid = torch.linspace(np.log(LOWEST * n), np.log(HIGHEST * n), _GRID).to(train)
    level, least = best_level(stack, grid)
    # A loss that is no likelihood is taken as the squares of errors of a variance that is what is left of them.
    unit = one if table.loss.likelihood else 2.0 * least / valid.sum((1, 2))
    judged = judged and bool((unit > 1e-12).all())
    flat = train.new_zeros(len(parts), groups)
    stack = replace(stack, unit=unit.clamp(min=1e-12))
    level, _ = stack.descended(level, flat, steps=steps)
    logs = [level + flat]
    used = tuple(sorted(float(s) for s in spreads)) if judged else ()
    if used:
        many = len(used)
        spread = torch.tensor(used).to(train).repeat_interleave(len(parts))
        wide = Stack(table, train.repeat(many, 1, 1), valid.repeat(many, 1, 1), spread, stack.unit.repeat(many))
        moved, deviation = wide.descended(level.repeat(many, 1), flat.repeat(many, 1), steps=steps)
        logs += list((moved + deviation).view(many, len(parts), groups))

    whole = train.new_zeros(len(parts), 1, n)
    for row, rows in enumerate(parts):
        whole[row, 0, rows] = 1.0
    refitted = Stack(table, whole, whole, nothing, one)
    weights = torch.stack([refitted.optimum(each)[0][:, 0] for each in logs])  # [spreads, parts, q, m]
    choice, losses, errors = 0, train.new_full((1,), torch.nan), train.new_zeros(1)
    if used:
        lost = train.new_empty(len(logs), n)
        for k in range(len(parts) - 1):
            out = torch.from_numpy(everything[outer == k])
            lost[:, out] = table.loss.rows(table.inputs[out] @ weights[:, k + 1], table.targets[out])
        losses = lost.mean(1)
        behind = lost - lost[losses.argmin()]
        errors = behind.std(1) / n**0.5
        choice = int((behind.mean(1) <= errors).nonzero()[0])
    return Selected(
        weights=weights[choice, 0],
        penalties=logs[choice][0].exp(),
        single=float(level[0].exp()),
        spread=(0.0, *used)[choice],
        spreads=(0.0, *used),
        losses=losses,
        errors=errors,
    )


def _counts(n: int, rows: Any, fold: Any) -> tuple[Tensor, Tensor]:
    """How often each fold counts each row while it is fitted and while it is judged, `[folds, n]` both."""
    train, valid = np.zeros((fold.max() + 1, n)), np.zeros((fold.max() + 1, n))
    train[:, rows] = 1.0
    train[fold, rows], valid[fold, rows] = 0.0, 1.0
    return torch.from_numpy(train), torch.from_numpy(valid)

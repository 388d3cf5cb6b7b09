"""How far penalties may differ: tuned at several spreads at once, and judged on rows that no tuning saw."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bilevel.estimators.newton import Table, logs_of
from bilevel.estimators.tuned import HIGHEST, LOWEST, Stack, best_level

_GRID = 23
_SIZES = 21
_SHARES = (0.02, 0.1, 0.5, 0.9, 1.0)
"""Of the absolute values in a penalty, those of the grid of an elastic net."""
_FEWEST_ROWS = 20
"""Below so many, rows that are held out twice say nothing."""
_NOTHING_LEFT = 1e-12
"""A mean square of errors, of targets of variance 1, below which there is nothing to tune."""
_DEALS = 5
"""How often all rows are dealt into folds anew. One deal's best single penalty is luck, and often far too weak."""


@dataclass(frozen=True, eq=False)
class Selected:
    """What was chosen: `weights: [q, m]`, and how it was judged.

    `weights` are `share` of those at `penalties: [kinds, groups]`, and the rest of those at `single: [kinds]`. `losses:
    [spreads]` are means over rows that neither weights nor penalties were fitted to, that of the single penalty first;
    `errors: [spreads]` are standard errors of their differences from it.
    """

    weights: Tensor
    penalties: Tensor
    single: Tensor
    spread: float
    share: float
    spreads: tuple[float, ...]
    losses: Tensor
    errors: Tensor


def folds_of(labels: Any, rows: Any, count: int, seed: Sequence[int]) -> Any:
    """Each row's fold, an array `[rows]`: shuffled, and each label in equal parts where there are `labels: [n]`."""
    order = np.random.default_rng(seed).permutation(len(rows))
    if labels is not None:
        order = order[np.argsort(labels[rows][order], kind="stable")]
    found = np.empty(len(rows), dtype=int)
    found[order] = np.arange(len(rows)) % count
    return found


def gained(differences: Tensor, folds: int) -> tuple[float, float]:
    r"""The mean of what is gained on outer folds, `differences: [repeats * folds]`, and its standard error.

    Folds share most of their training rows, so that their differences are not independent: for J of them with sample
    variance v, each holding out 1 / K of the rows, the variance of the mean is taken as v (1 / J + 1 / (K - 1)).
    Source: Nadeau & Bengio 2003, "Inference for the generalization error" (Machine Learning 52).
    """
    variance = float(differences.var()) * (1.0 / len(differences) + 1.0 / (folds - 1))
    return float(differences.mean()), variance**0.5


def selected(
    table: Table, labels: Any, *, folds: int, repeats: int, spreads: Sequence[float], seed: int, steps: int
) -> Selected:
    r"""The weights at the best spread, averaged with those of the single penalty as far as the evidence is weak.

    A spread that gains m over the single penalty on rows held out, with a standard error of s, is given a share of 1 -
    s^2 / m^2 of the weights, none where m is below s: James and Stein's shrinkage towards the single penalty, which
    wins back m - s^2 / m. The spread of the largest is chosen. Losses are convex in the weights, so that the average
    loses at most what its parts lose in the mean.
    """
    n, groups = len(table.inputs), int(table.groups.max()) + 1
    everything = np.arange(n)
    judged = bool(spreads) and groups > 1 and n >= _FEWEST_ROWS
    count = min(folds, n)
    outer = [folds_of(labels, everything, count, (seed, r)) for r in range(repeats if judged else 0)]
    parts = [everything] + [everything[fold != k] for fold in outer for k in range(count)]
    inner = min(folds, *(len(rows) for rows in parts))

    def single(some: list[Any], deals: int) -> tuple[Stack, Tensor]:
        return _single(table, [_dealt(n, rows, labels, inner, (seed, repeats), deals) for rows in some], steps)

    # What is kept is tuned on several deals of its rows, what only judges the spreads on one.
    tuned = [single(parts[:1], _DEALS)] + ([single(parts[1:], 1)] if parts[1:] else [])
    level = tuned[0][1]
    judged = judged and all(bool((stack.unit > _NOTHING_LEFT).all()) for stack, _ in tuned)
    used = tuple(sorted(float(s) for s in spreads)) if judged else ()
    logs = [torch.cat(some) for some in zip(*(_apart(*each, used, steps) for each in tuned), strict=True)]
    train = tuned[0][0].train
    nothing, one = train.new_zeros(len(parts)), train.new_ones(len(parts))

    whole = train.new_zeros(len(parts), 1, n)
    for row, rows in enumerate(parts):
        whole[row, 0, rows] = 1.0
    refitted = Stack(table, whole, whole, nothing, one)
    weights = torch.stack([refitted.optimum(each)[0][:, 0] for each in logs])  # [spreads, parts, q, m]
    choice, share = 0, 1.0
    losses, errors = train.new_full((1,), torch.nan), train.new_zeros(1)
    if used:
        lost = train.new_empty(len(logs), len(parts) - 1)
        sizes = train.new_empty(len(parts) - 1)
        for place, (fold, k) in enumerate(itertools.product(outer, range(count))):
            out = torch.from_numpy(everything[fold == k])
            rows = table.loss.rows(table.inputs[out] @ weights[:, place + 1], table.targets[out])
            lost[:, place], sizes[place] = rows.mean(1), len(out)
        losses = (lost * sizes).sum(1) / sizes.sum()
        judgements = [gained(lost[0] - each, count) for each in lost[1:]]
        errors = train.new_tensor([0.0, *(error for _, error in judgements)])
        kept = [gain - error**2 / gain if gain > error else 0.0 for gain, error in judgements]
        if max(kept) > 0.0:
            choice = 1 + kept.index(max(kept))
            gain, error = judgements[choice - 1]
            share = 1.0 - (error / gain) ** 2
    return Selected(
        weights=share * weights[choice, 0] + (1.0 - share) * weights[0, 0],
        penalties=logs[choice][0].exp().view(table.kinds, groups),
        single=level[0].exp(),
        spread=(0.0, *used)[choice],
        share=share if choice else 0.0,
        spreads=(0.0, *used),
        losses=losses,
        errors=errors,
    )


def _single(table: Table, counts: list[tuple[Tensor, Tensor]], steps: int) -> tuple[Stack, Tensor]:
    """The game of these parts, and the best penalties that all features could share, `[parts, kinds]` logarithms."""
    train, valid = (torch.stack([pair[side] for pair in counts]).to(table.inputs) for side in (0, 1))
    nothing, one = train.new_zeros(len(counts)), train.new_ones(len(counts))
    stack = Stack(table, train, valid, nothing, one)
    level, least = best_level(stack, _grid(table, train.shape[-1]))
    # A loss that is no likelihood is taken as the squares of errors of a variance that is what is left of them.
    unit = one if table.loss.likelihood else 2.0 * least / valid.sum((1, 2))
    stack = replace(stack, unit=unit.clamp(min=_NOTHING_LEFT))
    return stack, stack.descended(level, _flat(stack), steps=steps)[0]


def _apart(stack: Stack, level: Tensor, spreads: Sequence[float], steps: int) -> list[Tensor]:
    """The logarithms `[parts, kinds * groups]` at the single penalty, and at each of these spreads."""
    flat, parts, many = _flat(stack), len(level), len(spreads)
    found = [logs_of({"level": level, "deviation": flat})]
    if spreads:
        wide = Stack(
            stack.table,
            stack.train.repeat(many, 1, 1),
            stack.valid.repeat(many, 1, 1),
            torch.tensor(spreads).to(level).repeat_interleave(parts),
            stack.unit.repeat(many),
        )
        moved, deviation = wide.descended(level.repeat(many, 1), flat.repeat(many, 1), steps=steps)
        found += list(logs_of({"level": moved, "deviation": deviation}).view(many, parts, -1))
    return found


def _flat(stack: Stack) -> Tensor:
    """No deviations, `[parts, kinds * groups]`."""
    table = stack.table
    return stack.train.new_zeros(len(stack.train), table.kinds * (int(table.groups.max()) + 1))


def _grid(table: Table, n: int) -> Tensor:
    """Single penalties to begin with, `[points, kinds]`, strong ones first."""
    if not table.sparse:
        return torch.linspace(np.log(HIGHEST * n), np.log(LOWEST * n), _GRID).to(table.inputs)[:, None]
    # In units of the rows' count no weight is left at 1, where targets have variance 1.
    sizes = np.logspace(0.0, -4.0, _SIZES)
    pairs = [(size * (1.0 - share) + LOWEST, size * share) for share in _SHARES for size in sizes]
    return torch.tensor(np.log(n * np.array(pairs))).to(table.inputs)


def _dealt(n: int, rows: Any, labels: Any, folds: int, seed: Sequence[int], deals: int) -> tuple[Tensor, Tensor]:
    """How often each fold of each deal counts each row while it is fitted and while it is judged, `[deals * folds, n]`.

    A row is judged once in all: in each deal in one fold, as its part of the deals.
    """
    train, valid = np.zeros((deals, folds, n)), np.zeros((deals, folds, n))
    train[:, :, rows] = 1.0
    for deal in range(deals):
        fold = folds_of(labels, rows, folds, (*seed, deal) if deal else seed)
        train[deal, fold, rows], valid[deal, fold, rows] = 0.0, 1.0 / deals
    return torch.from_numpy(train.reshape(-1, n)), torch.from_numpy(valid.reshape(-1, n))

"""What a schedule makes of an optimiser's options, step by step, from any place in it on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.inner.torch_optim import (
    SchedulerFactory,
    build_scheduler,
    has_tensor,
    options_of,
    remember_scheduler,
    scheduled,
)

Changes = list[dict[str, Any]]
"""For each group of an optimiser, the options that a schedule sets for one step."""

# A rate that is a tensor is no number to schedule. Every schedule of torch is affine in the rate that it starts from:
# two runs give the two coefficients, and the third shows that a schedule of the user's own is affine as well.
_BASES = (1.0, 2.0, 3.0)


@dataclass(frozen=True)
class Affine:
    """A scheduled rate as a function of the rate that the schedule starts from."""

    constant: float
    factor: float

    def __call__(self, base: Any) -> Any:
        """The rate for this start."""
        return self.constant + self.factor * base


def applied(changes: Changes | None, originals: Sequence[Mapping[str, Any]]) -> Changes:
    """The options of each group for one step; `originals` are the groups as they were built."""
    if changes is None:
        return [{} for _ in originals]
    return [
        {name: value(original[name]) if isinstance(value, Affine) else value for name, value in change.items()}
        for change, original in zip(changes, originals, strict=True)
    ]


def tabulated(
    scheduler: SchedulerFactory,
    make: Callable[[], torch.optim.Optimizer],
    memory: Mapping[str, Any] | None,
    count: int,
) -> tuple[list[Changes], dict[str, Any]]:
    """What a torch scheduler sets in the next `count` steps from where `memory` left it, and the memory after them.

    `make` gives the optimiser anew. A memory of the count of steps alone, which other settings left, is stepped to. A
    rate that is a tensor (a player's, say) comes out as an `Affine` function of it, so that the rate may move between
    calls and has its derivative.
    """
    symbolic = [isinstance(group["lr"], Tensor) for group in make().param_groups]
    bases = _BASES if any(symbolic) else _BASES[:1]
    runs, after = [], []
    taken, before = (0, None) if memory is None else (memory["taken"], memory.get("runs"))
    known = before is not None and len(before) == len(bases)
    for index, base in enumerate(bases):
        optimizer = make()
        for group, tensor in zip(optimizer.param_groups, symbolic, strict=True):
            if tensor:
                group["lr"] = base
        built = options_of(optimizer)
        tensors = [{name: value for name, value in group.items() if has_tensor(value)} for group in built]
        run = build_scheduler(scheduler, optimizer, before[index] if before is not None and known else None)
        optimizer.step()  # without gradients it moves nothing; torch warns of schedulers that step before it
        for _ in range(0 if known else taken):
            run.step()
        rows = []
        for _ in range(count):
            for group, kept in zip(optimizer.param_groups, tensors, strict=True):
                _refuse_overwritten(run, group, kept)
            rows.append(options_of(optimizer))
            run.step()
        runs.append(_set_in_any(rows, built))
        after.append(remember_scheduler(run, optimizer, built))
    table = [[dict(change) for change in changes] for changes in runs[0]]
    for place, tensor in enumerate(symbolic):
        if tensor:
            _make_affine(table, [[changes[place]["lr"] for changes in rows] for rows in runs], place)
            if not any(changes[place]["lr"].factor for changes in table):
                raise TypeError(
                    f"TorchOptimizer: {type(run).__name__} sets the learning rate itself, so that the tensor given for "
                    "it would get no derivative. Give a plain number, or the rates themselves, rates=function of the "
                    "players."
                )
    return table, {"taken": taken + count, "runs": after}


def place_alone(memory: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How many steps a schedule has taken, for one with other settings to go on from."""
    return None if memory is None else {"taken": memory["taken"]}


def listed(rates: Sequence[float] | Tensor, groups: int, taken: int, count: int) -> list[Changes]:
    """A plain list of rates as a table, `taken` of them being used already; refuses to run out of them."""
    if taken + count > len(rates):
        raise ValueError(
            f"TorchOptimizer: rates has {len(rates)} learning rates, and step {len(rates) + 1} has none; "
            f"{taken} steps were taken in earlier calls, and {count} come in this one. Give a rate for each, start "
            "every call anew by Unrolled(warm_start=False), or use scheduler=, which goes on for ever."
        )
    return [[{"lr": rates[taken + step]} for _ in range(groups)] for step in range(count)]


def _set_in_any(rows: list[Changes], built: Sequence[Mapping[str, Any]]) -> list[Changes]:
    """Of each group's options those that the schedule sets in one of the steps, for every step."""
    names = [set().union(*(scheduled(row[place], was) for row in rows)) for place, was in enumerate(built)]
    return [[{n: group[n] for n in group if n in own} for group, own in zip(row, names, strict=True)] for row in rows]


def _make_affine(table: list[Changes], runs: list[list[float]], group: int) -> None:
    for step, (one, two, three) in enumerate(zip(*runs, strict=True)):
        if abs((three - two) - (two - one)) > 1e-9 * max(abs(one), abs(two), abs(three)):
            raise TypeError(
                f"TorchOptimizer: at step {step + 1} the scheduler gives rates {one:g}, {two:g} and {three:g} for "
                "learning rates 1, 2 and 3; a learning rate that is a tensor needs a schedule that is affine in it, as "
                "torch's are. Write the rates themselves: rates=function of the players."
            )
        table[step][group]["lr"] = Affine(2.0 * one - two, two - one)


def _refuse_overwritten(run: object, group: Mapping[str, Any], kept: Mapping[str, Any]) -> None:
    for name, value in kept.items():
        if group[name] is not value:
            raise TypeError(
                f"TorchOptimizer: {type(run).__name__} sets {name} itself, so that the tensor given for it would get "
                "no derivative. Use cycle_momentum=False, or give a plain number."
            )

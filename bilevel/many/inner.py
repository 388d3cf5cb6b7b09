"""Inner solvers for many games at once: each game stops where it would stop alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import Tensor

from bilevel.inner.base import InnerSolver, Problem, minimised
from bilevel.inner.closed_form import ClosedForm
from bilevel.inner.optimizer import TorchOptimizer
from bilevel.inner.projected import ProjectedGradient, Rows, descend
from bilevel.inner.refusals import refuse_unprojected
from bilevel.inner.torch_optim import Memory, OptimizerFactory, build, recall, remember
from bilevel.many.shares import EACH
from bilevel.tree import Variables, leaf_names, leaves


class ManyProblems(Problem, Protocol):
    """The follower's problem in `count` games; leaves are `[count, ...]`."""

    def norm(self, slopes: Sequence[Tensor]) -> Tensor:
        """|gradient| in each game, `[count]`."""

    def single(self, index: int) -> Problem:
        """One game's problem."""

    def keep_pace(self, evaluations: int) -> None:
        """Read on, after so many evaluations, as far as the slowest games do that other processes play."""


@final
@dataclass(frozen=True)
class BatchedInnerSolver(InnerSolver):
    """`solver` for each of many games: at once where it can, else one after the other.

    At once go `ProjectedGradient`, `torch.optim` optimisers that move each entry by itself (SGD, Adam, ...; it is
    tried out on two small games) and closed forms that `torch.func.vmap` can run. A game whose gradient is below
    its threshold stands still, its memory and its count of steps too, while others go on. LBFGS, SciPy, optimisers
    that are not of torch or whose rate depends on the count of steps in ways of its own (NAdam, RAdam, Adamax,
    ASGD) take the games in turn, each on the present batch.
    """

    solver: InnerSolver

    def minimise(
        self, problem: Any, y: list[Tensor], memory: Any, *, steps: int, threshold: Any
    ) -> tuple[list[Tensor], Any]:
        """Leaves `[count, ...]`; `threshold` is `[count]`."""
        if isinstance(self.solver, ClosedForm):
            found = _answered(self.solver, problem, y)
            if found is not None:
                return found, None
        if isinstance(self.solver, ProjectedGradient):
            rows = Rows(problem, problem.field, problem.at_rest, problem.settled)
            return descend(rows, y, memory, steps, torch.as_tensor(threshold), self.solver.accelerate)
        if isinstance(self.solver, TorchOptimizer) and self.solver.plain:
            names = leaf_names(problem.form.build(y), problem.name)
            if _at_once(self.solver.factory, y, names):
                return _stepped(self.solver, names, problem, y, memory, steps, threshold)
        singles = [problem.single(index) for index in range(len(y[0]))]
        remembered = None if memory is None else memory[0][EACH]
        ends = [
            minimised(
                self.solver,
                single,
                [leaf[index] for leaf in y],
                None if remembered is None else remembered[index],
                steps=steps,
                threshold=float(threshold[index]),
            )
            for index, single in enumerate(singles)
        ]
        problem.gradient_count += max(single.gradient_count for single in singles)
        stacked = [torch.stack(parts) for parts in zip(*(found for found, _ in ends), strict=True)]
        return stacked, [{EACH: [after for _, after in ends]}]


def entrywise(
    factory: OptimizerFactory,
    y: Sequence[Tensor],
    names: Sequence[str],
    players: Mapping[str, Variables] | None = None,
) -> bool:
    """Whether an optimiser moves stacked games `y: [count, ...]` as it moves each alone: tried out on two, a few steps.

    Not so LBFGS, Adafactor and whatever looks at a norm, and groups made by the leaves' shapes. `players` are the
    players whom the factory takes, one for all games.
    """
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn((2, *leaf.shape[1:]), generator=generator, dtype=torch.float64).to(leaf) for leaf in y]
    slopes = [
        # Of different size, so that a norm over both would show.
        [torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf) for leaf in start]
        for _ in range(3)
    ]
    for rows in slopes:
        for leaf in rows:
            leaf[1] *= 30.0

    def end(part: Callable[[Tensor], Tensor]) -> list[Tensor]:
        parameters = [part(leaf).clone() for leaf in start]
        optimizer = build(factory, parameters, players, names)
        for rows in slopes:
            for parameter, slope in zip(parameters, rows, strict=True):
                parameter.grad = part(slope).clone()
            optimizer.step()
        return parameters

    # What is wrong with the factory itself is told as ever.
    build(factory, [leaf.clone() for leaf in start], players, names)
    try:
        together, *alone = (end(part) for part in (lambda t: t, lambda t: t[0], lambda t: t[1]))
    except Exception:  # LBFGS wants a closure, Muon matrices: whatever it is, it is not taken at once
        return False
    for index, single in enumerate(alone):
        for leaf, whole in zip(single, together, strict=True):
            # Vectorised code rounds the last entries of an array differently.
            rounding = 1e3 * torch.finfo(leaf.dtype).eps
            if not torch.allclose(leaf, whole[index], rtol=rounding, atol=rounding):
                return False
    return True


# What each game's memory of the first holds is shaped like its leaves; the second remember a count of steps besides.
_UNCOUNTED = (torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adadelta, torch.optim.Adagrad)
_COUNTED = (torch.optim.Adam, torch.optim.AdamW)


def _at_once(factory: OptimizerFactory, y: Sequence[Tensor], names: Sequence[str]) -> bool:
    optimizer = build(factory, [leaf.detach().clone() for leaf in y], names=names)
    decays = any(group.get("lr_decay", 0.0) != 0.0 for group in optimizer.param_groups)  # Adagrad's, by its count
    return type(optimizer) in (*_UNCOUNTED, *_COUNTED) and not decays and entrywise(factory, y, names)


def _stepped(
    solver: TorchOptimizer,
    names: Sequence[str],
    problem: ManyProblems,
    y: Sequence[Tensor],
    memory: Memory | None,
    steps: int,
    threshold: Tensor,
) -> tuple[list[Tensor], Memory]:
    parameters = [leaf.detach().clone() for leaf in y]
    optimizer = solver.build(parameters, names)
    refuse_unprojected("TorchOptimizer", problem.name, problem.rests, optimizer)
    recall(optimizer, parameters, memory)
    counts = _Counts(optimizer, parameters)
    moving: Tensor | None = None
    evaluations = 0
    for step in range(steps):
        if step:
            problem.advance()
        evaluations += 1
        _, slopes = problem.field(parameters)
        left = problem.at_rest(parameters, slopes)
        beyond = ~(problem.norm(left) <= threshold)  # so that NaN goes on, to be found at the end
        moving = beyond if moving is None else moving & beyond
        if not bool(moving.any()):
            break
        for parameter, slope in zip(parameters, slopes, strict=True):
            parameter.grad = slope
        if bool(moving.all()):
            before = None
        else:
            before = [(p.clone(), {k: _copy(v) for k, v in optimizer.state.get(p, {}).items()}) for p in parameters]
        optimizer.step()
        if problem.rests.projects:
            ends = problem.settled([p.detach() for p in parameters], optimizer.param_groups[0]["lr"])
            for parameter, end in zip(parameters, ends, strict=True):
                parameter.copy_(end)
        counts.add(moving)
        for parameter, (old, remembered) in zip(parameters, before or (), strict=before is not None):
            parameter.copy_(_where(moving, parameter, old))
            state = optimizer.state[parameter]
            for key, value in state.items():
                if key != "step" and isinstance(value, Tensor) and value.shape == parameter.shape:
                    # Memory that a first step made is none yet for who did not take it.
                    state[key] = _where(moving, value, remembered.get(key, torch.zeros_like(value)))
    counts.leave()
    problem.keep_pace(evaluations)
    return [p.detach() for p in parameters], remember(optimizer, parameters)


class _Counts:
    """How many steps each game has taken, which Adam divides by: one number where all have taken as many.

    Else `[count, 1, ...]`, shaped to go with a leaf: torch's own code then runs in its differentiable mode, which takes
    tensors for counts.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
        self.optimizer, self.parameters = optimizer, parameters
        self.active = isinstance(optimizer, _COUNTED)
        remembered = optimizer.state[parameters[0]].get("step") if self.active and optimizer.state else None
        count = len(parameters[0])
        # In float32, in which torch counts, a power of beta would be off by 1e-8.
        like = torch.zeros(count, dtype=torch.float64, device=parameters[0].device)
        self.taken = like if remembered is None else like + remembered.to(like).reshape(-1)
        self.equal = remembered is None or remembered.ndim == 0
        if not self.equal:
            self._spread()
            optimizer.defaults["differentiable"] = True
            for group in optimizer.param_groups:
                group["differentiable"], group["foreach"], group["fused"] = True, False, False

    def add(self, moving: Tensor) -> None:
        """One more step for these games."""
        self.taken = self.taken + moving
        if self.active and not self.equal:
            self._spread()

    def leave(self) -> None:
        """Put the counts where the memory of the optimiser is read."""
        if self.active and self.optimizer.state and not bool((self.taken == self.taken[0]).all()):
            self._spread()
        elif self.active and self.optimizer.state:
            for parameter in self.parameters:
                self.optimizer.state[parameter]["step"] = self.taken[0].to(torch.get_default_dtype()).cpu()

    def _spread(self) -> None:
        for parameter in self.parameters:
            shape = (-1, *[1] * (parameter.ndim - 1))
            self.optimizer.state[parameter]["step"] = self.taken.reshape(shape).clone()


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _where(moving: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(moving.reshape(-1, *[1] * (new.ndim - 1)), new, old)


def _answered(solver: ClosedForm, problem: Any, y: Sequence[Tensor]) -> list[Tensor] | None:
    """The function's answers for all games, or None where vmap cannot run it (it may be NumPy's)."""
    given = {**problem.others, "batch": problem.batch}
    arguments = {name: given[name] for name in solver.names if name in given}
    dims = {name: problem.batch_dims if name == "batch" else problem.dims[name] for name in arguments}
    try:
        with torch.no_grad():
            found = torch.func.vmap(lambda given: leaves(solver.function(**given)), in_dims=(dims,))(arguments)
    except Exception:  # vmap raises what it likes; one by one the function itself says what is wrong
        return None
    if [t.shape for t in found] != [leaf.shape for leaf in y]:
        return None
    return [t.detach().to(old).clone() for t, old in zip(found, y, strict=True)]

"""How a model is tuned where nothing is said: which response, and how many steps of each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import final

import torch

from bilevel.inner import TorchOptimizer
from bilevel.inner.torch_optim import OptimizerFactory, SchedulerFactory, require_factory
from bilevel.networks import RowScaled
from bilevel.responses import Hypernetwork, Perturbations, Response, Unrolled

SCALE = 0.5
"""Of the perturbations, in free coordinates, in which a range is some 8 wide."""

RATE = 0.1
"""Of the hyperparameters' Adam, in free coordinates."""

MANY = 200
"""Beyond so many numbers the answer is not learned: it has a slope for each, all of which move the weights while they
are learned from one draw a step. With 342 decays runs were good, with 1,022 their weights ran away."""

_EXAMINED = 25  # calls from one measurement of the learned answer to the next: three gradients each


@final
@dataclass(frozen=True)
class Plan:
    """What a run of `tune` does.

    Attributes:
        response: How the trained weights answer to the hyperparameters.
        leader: From tensors to the hyperparameters' optimiser.
        leader_scheduler: Of its rate, over the steps of the hyperparameters.
        every: Training steps for each step of the hyperparameters.
        warmup: Training steps before the first.
        leader_steps: Steps of the hyperparameters.
        steps: Training steps in all.
    """

    response: Response
    leader: OptimizerFactory
    leader_scheduler: SchedulerFactory | None
    every: int
    warmup: int
    leader_steps: int
    steps: int

    def __str__(self) -> str:
        """In a sentence."""
        return (
            f"{self.steps:,} training steps, {self.warmup:,} of them before the hyperparameters move, and one step of "
            f"these after every {self.every}; the weights' answer by {type(self.response).__name__}."
        )


def share(option: str, value: object, *, whole: bool = False) -> None:
    """Refuse what is no share of the training steps; all of them are one if `whole`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0.0 <= float(value) < 1.0 or (whole and value == 1.0)):  # type: ignore[arg-type]
        raise ValueError(
            f"tune: {option}={value!r}; expected a share of the training steps, 0 <= {option} <{'=' * whole} 1."
        )


def plan(
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory | None,
    response: Response | None,
    leader: OptimizerFactory | None,
    every: int,
    steps: int,
    *,
    count: int,
    clip_norm: float | None = None,
    warmup: float,
) -> Plan:
    """The plan of a run of so many training steps for `count` numbers; refuses what cannot be one, before any work."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"tune: every={every!r}; expected a whole number of training steps from 1.")
    share("warmup", warmup)
    if leader is not None:
        require_factory("tune: leader", leader)
    chosen: Response
    if response is None and count > MANY:
        inner = TorchOptimizer(optimizer, scheduler=scheduler, clip_norm=clip_norm)
        chosen, before = Unrolled(inner, steps=every), 0
    elif response is None:
        # Half of the steps, at half the rate, found better augmentation than a tenth, and worse values for a recurrent
        # network and a table: a later start costs the steps that are not taken.
        later = max(1, int(steps * (1.0 - warmup)) // every)
        before = max(steps - later * every, 0)  # with what is left over, so that all of the steps are taken
        chosen = Hypernetwork(
            optimizer,
            network=RowScaled(),
            scale=SCALE,
            steps=every,
            warmup=before,
            scheduler=scheduler,
            clip_norm=clip_norm,
            examine_every=_EXAMINED,
            sampler=Perturbations(antithetic=False),
            tolerance=None,
        )
    elif isinstance(response, Response):
        for option, given in (("scheduler", scheduler), ("clip_norm", clip_norm)):
            if given is not None:
                raise ValueError(
                    f"tune: {option}= goes with the default response. Give it to your own: "
                    f"Unrolled(bilevel.inner.TorchOptimizer(optimizer, {option}=...), ...)."
                )
        chosen = response
        every = every if response.steps_a_call is None else response.steps_a_call
        before = 0 if response.budget is None else response.budget - every
    else:
        raise TypeError(f"tune: response is a {type(response).__name__}; expected one such as bilevel.Unrolled(...).")
    leader_steps = max(1, (steps - before) // max(every, 1))
    default: OptimizerFactory = partial(torch.optim.Adam, lr=RATE)
    falling: SchedulerFactory | None = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=leader_steps)
    falling = falling if leader is None else None
    return Plan(chosen, leader or default, falling, every, before, leader_steps, before + leader_steps * every)

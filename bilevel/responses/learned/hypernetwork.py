"""The follower follows a learned map, and the leader differentiates the map."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn

from bilevel.autodiff import transforms_active
from bilevel.errors import (
    FollowerNonConvergenceWarning,
    LinearNonConvergenceWarning,
    NonConvergenceWarning,
    UnreliableResponseWarning,
    require_kinds,
)
from bilevel.game import Follower, Game
from bilevel.game.data import Batch
from bilevel.game.rounding import rounding
from bilevel.inner.torch_optim import (
    OptimizerFactory,
    SchedulerFactory,
    build,
    build_scheduler,
    kept_memory,
    options_of,
    recall,
    remember,
    remember_scheduler,
)
from bilevel.networks.flat import FlatNetwork, Linear, Uncentred
from bilevel.networks.leafwise import LeafNetwork
from bilevel.randomness import random_kept
from bilevel.responses.base import Response, State, at_start, fresh_state, refuse_captured, refuse_optimizer_hyper
from bilevel.responses.learned.fitting import Fitting
from bilevel.responses.learned.footprint import Memory, require_room
from bilevel.responses.learned.maps import LearnedMap, Network, learned_map, shown, start, start_on_meta
from bilevel.responses.learned.ranges import Ranges
from bilevel.responses.learned.sampling import Perturbations, Sampler
from bilevel.responses.learned.trial import refuse_misfit
from bilevel.responses.promise import Behaviour, Estimate, Optimum, Promise, Report
from bilevel.tree import Variables, flatten, leaves

SIGN_HOLDS = 5.0
"""The residual of a learned slope up to which its hypergradient's sign mostly holds (docs/decisions-derivatives.md)."""


@final
@dataclass(frozen=True)
class Hypernetwork(Response):
    r"""A learned best response, centred at the leader's present value $x_0$ and fitted under perturbations of it.

    $$
    y(x) = w_0 + \operatorname{net}\big((x - x_0) / s\big) - \operatorname{net}(0), \qquad
    \min_{w_0,\,\operatorname{net}} \mathbb{E}_x\, f(x, y(x)), \qquad s = \text{scale} \cdot \sqrt n
    $$

    for n entries of those whom the follower's functions name. The slope is as good as the fit: zero at first, its
    residual reported. A call costs `steps * sampler.rows` gradients, 3 more when examined, no Hessian-vector product.
    Source: arXiv 1802.09419.

    Args:
        optimizer: from tensors to a torch.optim optimiser, for w0 and the network together.
        network: of `bilevel.networks`, a module, or a function of (inputs, outputs) that makes one; a matrix is exact
            for quadratic games.
        scale: the perturbations' standard deviation, in the leader's units; 0.1 to 0.5 on log or logit scales.
        steps: of fitting a call; one keeps up with a slow leader.
        warmup: more of them in the first call; none by default.
        scheduler: from the optimiser to a learning-rate scheduler, stepped with it; else the rate is constant.
        clip_norm: clips the gradient in w0 to this norm, as `clip_grad_norm_` does; the network's is left as it is.
        tolerance: residual, and share of the first gradient, above which a call warns (None: never); 1 is worthless.
        examine_every: calls from one measurement to the next; 1 keeps the report fresh.
        sampler: draws the leader's values for the fit; one antithetic pair around $x_0$ is the cheapest.
        memory: its limit, and whether states are written over; by default not.

    Raises:
        MemoryError: in `init`, where fitting would take more bytes than there are.

    Examples:
        >>> from functools import partial
        >>> Hypernetwork(partial(torch.optim.Adam, lr=1e-2)).network
        Linear()
    """

    optimizer: OptimizerFactory
    _: KW_ONLY
    network: Network = field(default_factory=Linear)
    scale: float = 0.1
    steps: int = 1
    warmup: int = 0
    scheduler: SchedulerFactory | None = None
    clip_norm: float | None = None
    tolerance: float | None = 0.5
    examine_every: int = 1
    sampler: Sampler = field(default_factory=Perturbations)
    # The numbers are the same with any: a run is known by its repr, and may go on with another.
    memory: Memory = field(default_factory=Memory, repr=False)

    def __post_init__(self) -> None:
        require_kinds(self)
        if not self.scale >= 0.0:
            raise ValueError(f"Hypernetwork: scale={self.scale}; expected a standard deviation >= 0.")
        if self.steps < 0 or self.warmup < 0 or self.steps + self.warmup == 0:
            raise ValueError(f"Hypernetwork: steps={self.steps}, warmup={self.warmup}; together at least 1.")
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            raise ValueError(f"Hypernetwork: clip_norm={self.clip_norm}; expected a number above 0, or None.")
        if self.tolerance is not None and not self.tolerance >= 0.0:
            raise ValueError(f"Hypernetwork: tolerance={self.tolerance}; expected a number >= 0, or None.")
        if self.examine_every < 1:
            raise ValueError(f"Hypernetwork: examine_every={self.examine_every}; expected at least 1.")
        given = self.network
        if isinstance(given, type):
            fits = issubclass(given, nn.Module)
        else:
            fits = isinstance(given, FlatNetwork | LeafNetwork | Uncentred) or callable(given)
        if not fits:
            raise TypeError(
                f"Hypernetwork: network={given!r}; expected one such as RowScaled() or LowRank(10), a module, "
                "or a function of (inputs, outputs) that makes one."
            )
        if not isinstance(self.sampler, Sampler):
            raise TypeError(
                f"Hypernetwork: sampler={self.sampler!r}; expected Perturbations(count=...) or Draws(function)."
            )
        if not isinstance(self.memory, Memory):
            raise TypeError(f"Hypernetwork: memory={self.memory!r}; expected one such as Memory(in_place=True).")
        if not self.scale > 0.0:
            warnings.warn(
                "Hypernetwork(scale=0) is fitted without perturbations: it sees one value of the leader, which says "
                "nothing about a slope. Expect a hypergradient of the wrong size or sign; use scale=0.1 to 0.5.",
                UnreliableResponseWarning,
                stacklevel=3,
            )
        if isinstance(given, Uncentred) and self.sampler.local:
            warnings.warn(
                "Hypernetwork(network=Uncentred(...)) fits its value and its slope together, away from the leader's "
                "present value. Fitted locally its slope is unreliable; for a map over a fixed range give "
                "sampler=Draws(...) or Perturbations(around=...).",
                UnreliableResponseWarning,
                stacklevel=3,
            )

    @property
    def in_place(self) -> bool:
        """As its memory says."""
        return self.memory.in_place

    @property
    def promise(self) -> Promise:
        """An estimate of the optimum's derivative; how good it is, its residual tells."""
        return Estimate(Optimum(), reason="the best response's slope is learned; its residual is measured and reported")

    @property
    def budget(self) -> int:
        """Fitting steps in the first call."""
        return self.warmup + self.steps

    @property
    def steps_a_call(self) -> int:
        """Fitting steps without the warm-up."""
        return self.steps

    def with_budget(self, steps: int) -> Hypernetwork:
        """The same with so many fitting steps in the first call; no more than before in the following ones."""
        later = min(self.steps, steps)
        return replace(self, warmup=steps - later, steps=later)

    @property
    def behaviour(self) -> Behaviour:
        """It draws perturbations, and inside a transform the map is not fitted; it warns unless `tolerance` is None."""
        return Behaviour(warm=True, random=True, steps_in_transforms=False, warns=self.tolerance is not None)

    def report(self, state: State) -> Report:
        """With the slope's residual, as it was measured last.

        When the leader moves on a fresh draw, how much of the change of the follower's gradient does the learned slope
        leave standing? 0 is exact, 1 no better than no response. It weighs directions by their curvature, as a linear
        solve's residual does: where the follower is stiff it is stricter than the hypergradient's own error.
        """
        return Report(int(state["gradients"]), int(state["products"]), state["stationarity"], float(state["residual"]))

    def init(self, game: Game, *, follower: str | None = None, seed: int = 0) -> State:
        """The state before the first call: the follower's init as w0, and the network's own init from `seed`."""
        state = fresh_state(game, follower, seed)
        game.require_whole("Hypernetwork", [state["follower"], *game.arguments(state["follower"])])
        refuse_optimizer_hyper(self, game, state["follower"], self.optimizer)
        begins = at_start(game, state)
        refuse_captured(begins, state)
        begins.require_loss("Hypernetwork")
        x, w0 = Ranges.of(begins).free(flatten(begins.inputs)), leaves(state["variables"])
        form = game.structure(state["follower"])
        shapes = [p.shape for p in start_on_meta(self.network, x.numel(), form).values()]
        about = f"{shown(self.network)} from {x.numel():,} entries to the {form.size:,} of player {state['follower']!r}"
        require_room(self.optimizer, shapes, w0, self.memory, about)
        with random_kept(start=seed):
            begun = start(self.network, x.numel(), form)
        parameters, constants = ({name: _like(t, w0[0]) for name, t in part.items()} for part in begun)
        learned = learned_map(self.network, x.numel(), form)
        refuse_misfit(learned, self.network, parameters | constants, state["follower"], w0, x)
        generator = torch.Generator(device=x.device).manual_seed(seed)
        return state | {
            "players": list(begins.inputs),
            "centre": x.clone(),
            "w0": w0,
            "network": parameters,
            "constants": constants,
            "optimizer": None,
            "scheduler": None,
            "generator": generator.get_state(),
            "fits": 0,
            "calls": 0,
            "residual": math.nan,
        }

    def adopt(self, saved: State, start: State) -> State:
        """With the fit where its network has this one's form, else with a new warm-up; the schedule begins anew."""
        after = super().adopt(saved, start)
        if "w0" not in saved:
            after["w0"] = leaves(after["variables"])
        fitted = saved.get("network", {}), start["network"]
        if [(n, p.shape) for n, p in fitted[0].items()] != [(n, p.shape) for n, p in fitted[1].items()]:
            return after | {"network": start["network"], "constants": start["constants"], "fits": 0}
        parameters = [*after["w0"], *after["network"].values()]
        return after | {"optimizer": kept_memory(self.optimizer, parameters, saved.get("optimizer"))}

    def __call__(
        self, game: Game, others: Mapping[str, Variables], state: State, batch: Batch = None
    ) -> tuple[Variables, State]:
        """The learned response at `others`, differentiable in them, and the state to continue from.

        A `LinearNonConvergenceWarning` says that the slope's residual is above `tolerance` as it was measured last, a
        `FollowerNonConvergenceWarning` that the follower's own gradient is. Inside a `torch.func` transform nothing is
        fitted.
        """
        given = {name: others[name] for name in state["players"] if name in others}
        follower = game.follower(given, state, batch, further=given)
        x = Ranges.of(follower).free(flatten(given))
        learned = learned_map(self.network, x.numel(), follower.form)
        if transforms_active():
            return follower.form.build(self._answer(follower, learned, x, state)), state
        after = self._fit(follower, learned, x.detach(), state)
        answer = self._answer(follower, learned, x, after)
        follower.require_finite(answer, "Lower the learning rate of Hypernetwork(optimizer), or its scale.")
        # At its centre the map is w0, which the state holds anyway.
        held = after["w0"] if self._follows(learned) else [leaf.detach().clone() for leaf in answer]
        after["variables"] = follower.form.build(held)
        if self.in_place:
            state.update(after)
            after = state
        return follower.form.build(answer), after

    def _answer(self, follower: Follower, learned: LearnedMap, x: Tensor, state: State) -> list[Tensor]:
        """The follower's leaves at x `[n]`, by the map as a state holds it."""
        fitting = self._around(follower, learned, state["centre"])
        return fitting.answer(state["w0"], state["network"] | state["constants"], x)

    def _around(self, follower: Follower, learned: LearnedMap, centre: Tensor) -> Fitting:
        """The map around a centre `[n]`, as this follower answers by it."""
        # Inputs in units of a perturbation's length: the network's rate of learning is then w0's.
        unit = (self.scale if self.scale > 0.0 else 1.0) * centre.numel() ** 0.5
        ranges = Ranges.of(follower)
        return Fitting(follower, ranges, learned, centre if learned.centred else torch.zeros_like(centre), unit)

    def _follows(self, learned: LearnedMap) -> bool:
        """Whether the centre moves along with the leader."""
        return learned.centred and self.sampler.local

    def _begin(
        self, follower: Follower, learned: LearnedMap, x: Tensor, state: State
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The centre, w0's leaves and the network's parameters that a call goes on from: copies, or the state's own."""
        network = list(state["network"].values())
        network = network if self.in_place else _clones(network)
        own: list[Tensor] = state["w0"]
        if not self._follows(learned):
            return state["centre"], own if self.in_place else _clones(own), network
        with torch.no_grad():  # the same map, written around the new centre
            there = self._answer(follower, learned, x, state)
            there = [_apart(moved, leaf) for moved, leaf in zip(there, own, strict=True)]
        if self.in_place:  # the old leaves go now, before a gradient is made
            state.update(centre=x.clone(), w0=there, variables=follower.form.build(there))
        return x.clone(), there, network

    def _fit(self, follower: Follower, learned: LearnedMap, x: Tensor, state: State) -> State:
        """The state after fitting the map around the leader's present value x `[n]`."""
        centre, own, numbers = self._begin(follower, learned, x, state)
        parameters = [p.detach() for p in (*own, *numbers)]
        w0, network = parameters[: len(own)], dict(zip(state["network"], parameters[len(own) :], strict=True))
        fitting = self._around(follower, learned, centre)
        optimizer = build(self.optimizer, parameters)
        recall(optimizer, parameters, state["optimizer"], copy=not self.in_place)
        built = options_of(optimizer)
        scheduler = self.scheduler and build_scheduler(self.scheduler, optimizer, state["scheduler"])
        generator = torch.Generator(device=x.device)
        generator.set_state(state["generator"])
        fits = self.steps + (self.warmup if state["fits"] == 0 else 0)
        for step in range(fits):
            if step:
                follower.advance()
            points = self.sampler.points(follower, x, self.scale, generator)
            loss, slopes = fitting.gradients(w0, network, state["constants"], points)
            if step == fits - 1 or self.in_place:  # in place, what comes from NaN could not be taken back
                follower.require_finite([], "Lower the learning rate of Hypernetwork, or its scale.", float(loss))
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope
            del slopes
            if self.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters[: len(own)], self.clip_norm)
            optimizer.step()
            for parameter in parameters:
                parameter.grad = None
            if scheduler is not None:
                scheduler.step()
        after = state | {
            "centre": centre,
            "w0": w0,
            "network": network,
            "optimizer": remember(optimizer, parameters),
            "scheduler": scheduler and remember_scheduler(scheduler, optimizer, built),
            "fits": state["fits"] + fits,
            "calls": state["calls"] + 1,
            "gradients": state["gradients"] + fits * self.sampler.rows,
        }
        age = state["calls"] % self.examine_every
        if age == 0:
            direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) * self.scale
            norm, left, change = fitting.examine(w0, network | state["constants"], x, direction)
            # Who starts at an optimum has no gradient to measure by: then the one that the leader makes counts.
            scale = follower.measure(state)
            scale = scale if scale.tells else scale.begun(change)
            after["stationarity"] = norm / scale.shown
            after |= {"reference": scale.reference, "terms": scale.terms}
            if change > scale.rounding:
                after["residual"] = left / change
            elif bool(direction.any()):  # the leader makes none: only rounding may be left
                after["residual"] = 0.0 if left <= rounding(scale.terms, x.dtype) else math.inf
            else:
                after["residual"] = math.nan
            after["gradients"] += 3
        if self.tolerance is not None and self.scale > 0.0:
            self._warn(follower, after, age)
        return after | {
            "generator": generator.get_state(),
            "data": follower.position,
            "buffers": follower.buffers.get(follower.name, {}),
        }

    def _warn(self, follower: Follower, state: State, age: int) -> None:
        """Say what the fit leaves, of the slope's equation and of the follower's own gradient."""
        residual, stationarity, allowed = state["residual"], state["stationarity"], float(self.tolerance or 0.0)
        worth = (
            "The hypergradient's size is not to be relied on; its sign mostly is, while residuals stay around this, "
            "unless the leader's direct gradient points the other way: a slope that is not learned yet leaves 1."
            if residual <= SIGN_HOLDS
            else "Do not trust the hypergradient on its word, its sign included, if residuals stay like this."
        )
        advice = (
            f"{worth} Give it warmup=, another learning rate, more steps or perturbations, or a network that suits the "
            "game; compare with Implicit, and accept it by tolerance=None."
        )
        name, wanted = f"player {follower.name!r}", f"after {state['fits']} steps of fitting; wanted {allowed:g}"
        kind: type[NonConvergenceWarning]
        if not residual <= allowed:
            kind = LinearNonConvergenceWarning
            told = f"the learned slope of {name} leaves {residual:.3g} of the change that it should answer {wanted}"
        elif not stationarity <= allowed:
            kind = FollowerNonConvergenceWarning
            told = f"the gradient of {name} is still {stationarity:.3g} of its value at the start {wanted}"
        else:
            return
        told += f" (measured {age} calls ago)" if age else ""
        warnings.warn(kind(f"Hypernetwork: {told}. {advice}", repeated=age > 0), stacklevel=5)


def _like(tensor: Tensor, leaf: Tensor) -> Tensor:
    """A copy on the leaf's device, and in its precision; whole numbers stay whole."""
    dtype = leaf.dtype if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(leaf.device, dtype, copy=True)


def _clones(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _apart(moved: Tensor, leaf: Tensor) -> Tensor:
    """A tensor that shares nothing with a leaf of the state: a network may return a leaf as it came."""
    return moved.clone() if moved.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr() else moved

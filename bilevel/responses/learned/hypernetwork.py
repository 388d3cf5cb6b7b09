"""The follower follows a learned map, and the leader differentiates the map."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor, nn

from bilevel.autodiff import transforms_active
from bilevel.errors import NonConvergenceWarning, UnreliableResponseWarning
from bilevel.game import Follower, Game
from bilevel.game.data import Batch
from bilevel.inner.torch_optim import (
    OptimizerFactory,
    SchedulerFactory,
    build,
    build_scheduler,
    kept_memory,
    recall,
    remember,
    remember_scheduler,
)
from bilevel.networks.flat import Linear
from bilevel.networks.leafwise import LeafNetwork
from bilevel.randomness import random_kept
from bilevel.responses.base import Response, State, at_start, fresh_state, refuse_captured, refuse_optimizer_hyper
from bilevel.responses.learned.fitting import Fitting
from bilevel.responses.learned.footprint import available, footprint, told
from bilevel.responses.learned.maps import FlatMap, LeafMap, LearnedMap
from bilevel.responses.learned.trial import made, refuse_flat, refuse_leaves, shown
from bilevel.responses.promise import Behaviour, Estimate, Optimum, Promise, Report
from bilevel.tree import Structure, Variables, flatten, leaves

Sampler = Callable[[Mapping[str, Variables], torch.Generator], Mapping[str, Variables]]
"""p(x): from the others' present variables and a generator to one draw of their variables."""

Network = Callable[[int, int], nn.Module] | nn.Module | LeafNetwork


@final
@dataclass(frozen=True)
class Hypernetwork(Response):
    r"""A learned best response, centred at the leader's present value and fitted under Gaussian perturbations.

        y(x) = w0 + net((x - x_now) / s) - net(0)
        min over w0, net of  E f(x, y(x)),    x = x_now + scale * eps,  eps ~ N(0, I)

    `optimizer` is a callable from tensors to any torch.optim optimiser, for w0 and the network's parameters together.
    `scale` is the perturbations' standard deviation, in the leader's own units (.1 to .5 on log or logit scales);
    s = scale * sqrt(n) for n others' entries, so that a network sees inputs of norm one and learns as fast as w0.
    `network` is `Linear()`, `LowRank(rank)`, `MLP(hidden)`, `Elementwise()`, any callable `(inputs, outputs) ->
    nn.Module`, or a module from `[..., inputs]` to `[..., outputs]` (deep-copied; its buffers are constants). For
    large followers it is a `LeafNetwork`, which moves each layer by itself and is centred: `RowScaled()`,
    `RowColumnScaled()`, `SelfTuning()`, `LowRankLayers(rank)`, or your own.

    Each call takes `steps` steps of fitting at the present leader, `warmup` more before the first answer. Together
    they are the paper's algorithms: `Hypernetwork(opt, scale=1.5, network=MLP((50,)), warmup=5000, steps=0,
    around={"decay": mean})` learns one map for a whole range and then leaves it (Algorithm 2); `steps=1` fits
    jointly with the leader, locally and linearly (Algorithms 3 and 4). `scheduler` makes a learning-rate scheduler
    over the optimiser, stepped once a step of fitting: a slope is only as steady as the last steps are small. Each
    step uses `perturbations` draws in one vmapped pass (of a `LeafNetwork` one after the other), each with both signs
    when `antithetic`, which takes the gradient at the centre out of the slope's noise, for twice the gradients.

    `sampler(others, generator)` draws x from any p(x) instead, one draw a call: uniform over a box, a fixed set, a
    distribution that the leaders themselves hold. `scale` is then only the unit s; `around` and `antithetic` do not
    apply, and the centre stays where the game starts.

    It gives an estimate: the slope is as good as the fit, and before any warm-up it is zero. The first call, and every
    `examine_every`-th from there on, measures it on a fresh draw: when the leader moves, how much of the change of the
    follower's gradient does the slope leave standing? 0 is exact, 1 no better than no response; above `tolerance` a
    `NonConvergenceWarning` says so, as it does when the follower's own gradient is above that share of its value at the
    start (`tolerance=None` asks for no accuracy). The calls between report, and warn of, what was measured last, and
    say how many calls ago; `solve` counts the examinations alone. It weighs directions by their curvature, as a
    residual does: where the follower is stiff it is stricter than the hypergradient's own error. Without centring or
    without noise the slope is not identified and its sign may be wrong: such settings warn
    (`UnreliableResponseWarning`).

    `in_place=True` saves the copies of w0, network and optimiser that each call makes: it fits in the tensors of the
    state that it is passed, and returns that very state. Earlier answers keep their values; to differentiate one after
    the next call raises torch's `RuntimeError`. A call that raises leaves in that state what was fitted until then,
    around the present leader, with counts, batches and generator as before the call; a loss of NaN is refused before
    it is written. `solve` then saves no checkpoint of an interrupted step: the file keeps the last one written. Where
    states are asked more than once a step (several followers, extragradient) `solve` raises `ValueError`.

    Costs `steps` * `perturbations` gradients a call, twice that when antithetic, 3 more when it is examined, and no
    Hessian-vector product. Memory: of w0 and network, once for themselves, once for their gradients, the optimiser's
    for them (twice for Adam), and once more for the copies of all but gradients. `init` raises `MemoryError` with
    these bytes, before it takes any, when they are more than `memory_limit` (default: what is available now).
    Source: Lorraine and Duvenaud 2018 (arXiv 1802.09419); centring: Bae and Grosse 2020 (arXiv 2010.13514).

    >>> from functools import partial
    >>> Hypernetwork(partial(torch.optim.Adam, lr=1e-3), scale=0.1).network
    Linear()
    """

    optimizer: OptimizerFactory
    scale: float = 0.1
    network: Network = field(default_factory=Linear)
    steps: int = 1
    warmup: int = 0
    perturbations: int = 1
    antithetic: bool = True
    centred: bool = True
    around: Mapping[str, Variables] | None = None
    sampler: Sampler | None = None
    scheduler: SchedulerFactory | None = None
    tolerance: float | None = 0.5
    examine_every: int = 1
    # The numbers are the same with either: a run is known by its repr, and may go on with another of these.
    in_place: bool = field(default=False, repr=False)
    memory_limit: int | None = field(default=None, repr=False)
    # The network's form without its numbers, by its sizes: only a memo, the numbers are in the state.
    _skeletons: dict[tuple[int, tuple[torch.Size, ...]], nn.Module] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if not self.scale >= 0.0:
            raise ValueError(f"Hypernetwork: scale={self.scale}; expected a standard deviation >= 0.")
        if self.steps < 0 or self.warmup < 0 or self.steps + self.warmup == 0:
            raise ValueError(f"Hypernetwork: steps={self.steps}, warmup={self.warmup}; together at least 1.")
        given = self.network
        module_class = isinstance(given, type) and issubclass(given, nn.Module)
        if (isinstance(given, type) and not module_class) or not (callable(given) or isinstance(given, LeafNetwork)):
            raise TypeError(
                f"Hypernetwork: network={given!r}; expected one such as RowScaled() or LowRank(10), a module, "
                "or a function of (inputs, outputs) that makes one."
            )
        if self.perturbations < 1:
            raise ValueError(f"Hypernetwork: perturbations={self.perturbations}; expected at least 1.")
        if self.examine_every < 1:
            raise ValueError(f"Hypernetwork: examine_every={self.examine_every}; expected at least 1.")
        if self.sampler is not None and self.around is not None:
            raise ValueError("Hypernetwork: both sampler= and around= are given, and both say where it is fitted.")
        if not self.scale > 0.0:
            warnings.warn(
                "Hypernetwork(scale=0) is fitted without perturbations: it sees one value of the leader, which says "
                "nothing about a slope. Expect a hypergradient of the wrong size or sign; use scale=0.1 to 0.5.",
                UnreliableResponseWarning,
                stacklevel=3,
            )
        if not self.centred and self._local:
            warnings.warn(
                "Hypernetwork(centred=False) fits its value and its slope together, away from the leader's present "
                "value. Fitted locally its slope is unreliable; give around= or sampler= for a map over a fixed range.",
                UnreliableResponseWarning,
                stacklevel=3,
            )

    @property
    def promise(self) -> Promise:
        """An estimate of the optimum's derivative; how good it is, its residual tells."""
        return Estimate(Optimum(), reason="the best response's slope is learned; its residual is measured and reported")

    @property
    def budget(self) -> int:
        """Fitting steps in the first call."""
        return self.warmup + self.steps

    def with_budget(self, steps: int) -> Hypernetwork:
        """The same with so many fitting steps in the first call; no more than before in the following ones."""
        later = min(self.steps, steps)
        return replace(self, warmup=steps - later, steps=later)

    @property
    def behaviour(self) -> Behaviour:
        """It draws perturbations, and inside a transform the map is not fitted; it warns unless `tolerance` is None."""
        return Behaviour(warm=True, random=True, steps_in_transforms=False, warns=self.tolerance is not None)

    def report(self, state: State) -> Report:
        """With the learned slope's residual, measured on a fresh draw."""
        return Report(int(state["gradients"]), int(state["products"]), state["stationarity"], float(state["residual"]))

    def init(self, game: Game, *, follower: str | None = None, seed: int = 0) -> State:
        """The state before the first call: the follower's init as w0, and the network's own init from `seed`."""
        state = fresh_state(game, follower, seed)
        refuse_optimizer_hyper(self, game, state["follower"], self.optimizer)
        refuse_captured(game, state)
        at_start(game, state).require_loss("Hypernetwork")
        others = {n: game.initial(n) for n in game.names if n != state["follower"] and n not in game.anticipated}
        x, w0 = flatten(others), leaves(state["variables"])
        form = game.structure(state["follower"])
        self._require_room(state["follower"], x.numel(), form, w0)
        with random_kept(start=seed):
            network = self._module(x.numel(), form).to(w0[0])
        weights = {name: p.detach().clone() for name, p in network.named_parameters()}
        constants = {name: b.detach().clone() for name, b in network.named_buffers()}
        self._skeletons[(x.numel(), form.shapes)] = network.to("meta")
        skeleton, numbers = self._skeleton(x.numel(), form), weights | constants
        if isinstance(self.network, LeafNetwork):
            refuse_leaves(self.network, skeleton, numbers, state["follower"], w0, x)
        else:
            refuse_flat(self.network, skeleton, numbers, state["follower"], form, x)
        generator = torch.Generator(device=x.device).manual_seed(seed)
        return state | {
            "players": list(others),
            "centre": x.clone(),
            "w0": w0,
            "network": weights,
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
        """The learned response at `others`, differentiable in them, and the state to continue from."""
        given = {name: others[name] for name in state["players"] if name in others}
        follower = game.follower(given, state, batch)
        x = flatten(given)
        weights = state["network"] | state["constants"]
        if transforms_active():
            answer = self._around(follower, state["centre"]).answer(state["w0"], weights, x)
            return follower.form.build(answer), state
        after = self._fit(follower, x.detach(), state)
        weights = after["network"] | after["constants"]
        answer = self._around(follower, after["centre"]).answer(after["w0"], weights, x)
        follower.require_finite(answer, "Lower the learning rate of Hypernetwork(optimizer), or its scale.")
        # At its centre the map is w0, which the state holds anyway.
        held = after["w0"] if self._follows else [leaf.detach().clone() for leaf in answer]
        after["variables"] = follower.form.build(held)
        if self.in_place:
            state.update(after)
            after = state
        return follower.form.build(answer), after

    @property
    def _local(self) -> bool:
        """Whether it is fitted around wherever the leader is."""
        return self.around is None and self.sampler is None

    def _points(self, follower: Follower, x: Tensor, state: State, generator: torch.Generator) -> Tensor:
        """The leader's values `[rows, n]` to fit at in one step."""
        if self.sampler is not None:
            present = follower.input_form.unflatten(x)
            rows = [self.sampler(present, generator) for _ in range(self.perturbations)]
            for row in rows:
                if set(row) != set(present):
                    raise ValueError(f"Hypernetwork: sampler drew players {sorted(row)}; expected {sorted(present)}.")
                for name, variables in row.items():
                    follower.game.check(name, variables)
            return torch.stack([flatten({name: row[name] for name in present}) for row in rows]).to(x)
        noise = torch.randn(self.perturbations, x.numel(), generator=generator, dtype=x.dtype, device=x.device)
        noise = torch.cat([noise, -noise]) if self.antithetic else noise
        anchor = x if self.around is None else flatten({name: self.around[name] for name in state["players"]}).to(x)
        return anchor + self.scale * noise

    def _module(self, inputs: int, form: Structure) -> nn.Module:
        if isinstance(self.network, LeafNetwork):
            return made(self.network, self.network.build(inputs, form.shapes))
        if isinstance(self.network, nn.Module):
            return copy.deepcopy(self.network)
        return made(self.network, self.network(inputs, form.size))

    def _require_room(self, follower: str, inputs: int, form: Structure, w0: list[Tensor]) -> None:
        """Raise `MemoryError` when fitting would take more than there is, before any of it is taken."""
        if isinstance(self.network, nn.Module):
            module: nn.Module = self.network
        else:
            module = self._without_numbers(inputs, form)
        parameters = [torch.empty(p.shape, dtype=w0[0].dtype, device="meta") for p in module.parameters()]
        needed = footprint(self.optimizer, [*w0, *parameters], in_place=self.in_place)
        limit = available(w0[0].device) if self.memory_limit is None else self.memory_limit
        if limit is not None and needed.total > limit:
            size = sum(p.numel() for p in parameters)
            allowed = "available are" if self.memory_limit is None else "memory_limit is"
            raise MemoryError(
                f"Hypernetwork: {shown(self.network)} from {inputs:,} entries to the {form.size:,} of player "
                f"{follower!r} has {size:,} parameters; with w0 its fit takes {needed}; {allowed} "
                f"{told(limit)}. Use a network that knows the layers: RowScaled(), RowColumnScaled() or "
                "LowRankLayers(rank), or one with fewer numbers, LowRank(rank); in_place=True saves the copies, and "
                "memory_limit= (in bytes) allows more."
            )

    @property
    def _follows(self) -> bool:
        """Whether the centre moves along with the leader."""
        return self.centred and self._local

    def _around(self, follower: Follower, centre: Tensor) -> Fitting:
        """The map around a centre `[n]`, as this follower answers by it."""
        skeleton = self._skeleton(centre.numel(), follower.form)
        learned: LearnedMap = (
            LeafMap(skeleton)
            if isinstance(self.network, LeafNetwork)
            else FlatMap(skeleton, follower.form, self.centred)
        )
        # Inputs in units of a perturbation's length: the network's rate of learning is then w0's.
        unit = (self.scale if self.scale > 0.0 else 1.0) * centre.numel() ** 0.5
        return Fitting(follower, learned, centre if self.centred else torch.zeros_like(centre), unit)

    def _skeleton(self, inputs: int, form: Structure) -> nn.Module:
        key = (inputs, form.shapes)
        if key not in self._skeletons:
            self._skeletons[key] = self._without_numbers(inputs, form)  # they come from the state
        return self._skeletons[key]

    def _without_numbers(self, inputs: int, form: Structure) -> nn.Module:
        """The network's form on the meta device, which takes no memory."""
        try:
            with torch.device("meta"):
                return self._module(inputs, form)
        except RuntimeError:
            # Who computes with numbers of its own while it is made can only be made whole.
            with random_kept():
                return self._module(inputs, form).to("meta")

    def _start(self, follower: Follower, x: Tensor, state: State) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The centre, w0's leaves and the network's parameters that a call goes on from: copies, or the state's own."""
        network = list(state["network"].values())
        network = network if self.in_place else _clones(network)
        own: list[Tensor] = state["w0"]
        if not self._follows:
            return state["centre"], own if self.in_place else _clones(own), network
        with torch.no_grad():  # the same map, written around the new centre
            weights = state["network"] | state["constants"]
            there = self._around(follower, state["centre"]).answer(own, weights, x)
            there = [_apart(moved, leaf) for moved, leaf in zip(there, own, strict=True)]
        if self.in_place:  # the old leaves go now, before a gradient is made
            state.update(centre=x.clone(), w0=there, variables=follower.form.build(there))
        return x.clone(), there, network

    def _fit(self, follower: Follower, x: Tensor, state: State) -> State:
        """The state after fitting the map around the leader's present value x `[n]`."""
        centre, own, learned = self._start(follower, x, state)
        parameters = [p.detach() for p in (*own, *learned)]
        w0, network = parameters[: len(own)], dict(zip(state["network"], parameters[len(own) :], strict=True))
        fitting = self._around(follower, centre)
        optimizer = build(self.optimizer, parameters)
        recall(optimizer, parameters, state["optimizer"], copy=not self.in_place)
        scheduler = self.scheduler and build_scheduler(self.scheduler, optimizer, state["scheduler"])
        generator = torch.Generator(device=x.device)
        generator.set_state(state["generator"])
        fits = self.steps + (self.warmup if state["fits"] == 0 else 0)
        rows = self.perturbations * (2 if self.antithetic and self.sampler is None else 1)
        for step in range(fits):
            if step:
                follower.advance()
            points = self._points(follower, x, state, generator)
            loss, slopes = fitting.gradients(w0, network, state["constants"], points)
            if step == fits - 1 or self.in_place:  # in place, what comes from NaN could not be taken back
                follower.require_finite([], "Lower the learning rate of Hypernetwork, or its scale.", float(loss))
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope
            del slopes
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
            "scheduler": scheduler and remember_scheduler(scheduler, optimizer),
            "fits": state["fits"] + fits,
            "calls": state["calls"] + 1,
            "gradients": state["gradients"] + fits * rows,
        }
        age = state["calls"] % self.examine_every
        if age == 0:
            direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) * self.scale
            norm, after["residual"] = fitting.examine(w0, network | state["constants"], x, direction)
            after["stationarity"] = follower.relative(norm, state)
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
        advice = (
            "Do not trust the hypergradient on its word. Give it warmup=, another learning rate, more steps or "
            "perturbations, or a network that suits the game; compare with Implicit, and accept it by tolerance=None."
        )
        residual, stationarity, allowed = state["residual"], state["stationarity"], float(self.tolerance or 0.0)
        name, wanted = f"player {follower.name!r}", f"after {state['fits']} steps of fitting; wanted {allowed:g}"
        if not residual <= allowed:
            told = f"the learned slope of {name} leaves {residual:.3g} of the change that it should answer {wanted}"
        elif not stationarity <= allowed:
            told = f"the gradient of {name} is still {stationarity:.3g} of its value at the start {wanted}"
        else:
            return
        told += f" (measured {age} calls ago)" if age else ""
        warnings.warn(NonConvergenceWarning(f"Hypernetwork: {told}. {advice}", repeated=age > 0), stacklevel=5)


def _clones(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _apart(moved: Tensor, leaf: Tensor) -> Tensor:
    """A tensor that shares nothing with a leaf of the state: a network may return a leaf as it came."""
    return moved.clone() if moved.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr() else moved

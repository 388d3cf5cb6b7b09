"""The follower follows a learned map, and the leader differentiates the map."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bilevel.autodiff import transforms_active
from bilevel.data import Batch
from bilevel.errors import NonConvergenceWarning, UnreliableResponseWarning
from bilevel.game import Game
from bilevel.inner.torch_optim import (
    OptimizerFactory,
    SchedulerFactory,
    build,
    build_scheduler,
    recall,
    remember,
    remember_scheduler,
)
from bilevel.randomness import random_kept
from bilevel.responses.base import Follower, Response, State, fresh_state, refuse_captured, refuse_optimizer_hyper
from bilevel.responses.networks import Linear
from bilevel.tree import Variables, flatten

Sampler = Callable[[Mapping[str, Variables], torch.Generator], Mapping[str, Variables]]
"""p(x): from the others' present variables and a generator to one draw of their variables."""


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
    nn.Module`, or a module from `[..., inputs]` to `[..., outputs]` (deep-copied; its buffers are constants).

    Each call takes `steps` steps of fitting at the present leader, `warmup` more before the first answer. Together
    they are the paper's algorithms: `Hypernetwork(opt, scale=1.5, network=MLP((50,)), warmup=5000, steps=0,
    around={"decay": mean})` learns one map for a whole range and then leaves it (Algorithm 2); `steps=1` fits
    jointly with the leader, locally and linearly (Algorithms 3 and 4). `scheduler` makes a learning-rate scheduler
    over the optimiser, stepped once a step of fitting: a slope is only as steady as the last steps are small. Each
    step uses `perturbations` draws in one vmapped pass, each with both signs when `antithetic`, which takes the
    gradient at the centre out of the slope's noise.

    `sampler(others, generator)` draws x from any p(x) instead, one draw a call: uniform over a box, a fixed set, a
    distribution that the leaders themselves hold. `scale` is then only the unit s; `around` and `antithetic` do not
    apply, and the centre stays where the game starts.

    It gives an estimate: the slope is as good as the fit, and before any warm-up it is zero. Each call measures it
    on a fresh draw: when the leader moves, how much of the change of the follower's gradient does the slope leave
    standing? 0 is exact, 1 no better than no response; above `tolerance` a `NonConvergenceWarning` says so, as it
    does when the follower's own gradient is above that share of its value at the start (`tolerance=None` asks for
    no accuracy). It weighs directions by their curvature, as a residual does: where the follower is stiff it is
    stricter than the hypergradient's own error. Without centring or without noise the slope is not identified and
    its sign may be wrong: such settings warn (`UnreliableResponseWarning`).
    Costs `steps` * `perturbations` (twice that when antithetic) + 3 gradients a call and no Hessian-vector product;
    memory of the network and its optimiser.
    Source: Lorraine and Duvenaud 2018 (arXiv 1802.09419); centring: Bae and Grosse 2020 (arXiv 2010.13514).

    >>> from functools import partial
    >>> Hypernetwork(partial(torch.optim.Adam, lr=1e-3), scale=0.1).network
    Linear()
    """

    optimizer: OptimizerFactory
    scale: float = 0.1
    network: Callable[[int, int], nn.Module] | nn.Module = field(default_factory=Linear)
    steps: int = 1
    warmup: int = 0
    perturbations: int = 1
    antithetic: bool = True
    centred: bool = True
    around: Mapping[str, Variables] | None = None
    sampler: Sampler | None = None
    scheduler: SchedulerFactory | None = None
    tolerance: float | None = 0.5
    # The network's form without its numbers, by its sizes: only a memo, the numbers are in the state.
    _skeletons: dict[tuple[int, int], nn.Module] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.scale >= 0.0:
            raise ValueError(f"Hypernetwork: scale={self.scale}; expected a standard deviation >= 0.")
        if self.steps < 0 or self.warmup < 0 or self.steps + self.warmup == 0:
            raise ValueError(f"Hypernetwork: steps={self.steps}, warmup={self.warmup}; together at least 1.")
        if self.perturbations < 1:
            raise ValueError(f"Hypernetwork: perturbations={self.perturbations}; expected at least 1.")
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

    def init(self, game: Game, *, follower: str | None = None, seed: int = 0) -> State:
        """The state before the first call: the follower's init as w0, and the network's own init from `seed`."""
        state = fresh_state(game, follower, seed)
        refuse_optimizer_hyper(self, game, state["follower"], self.optimizer)
        refuse_captured(game, state)
        others = {n: game.initial(n) for n in game.names if n != state["follower"] and n not in game.anticipated}
        x, w0 = flatten(others), flatten(state["variables"])
        with random_kept(start=seed):
            network = self._module(x.numel(), w0.numel()).to(w0)
        weights = {name: p.detach().clone() for name, p in network.named_parameters()}
        constants = {name: b.detach().clone() for name, b in network.named_buffers()}
        self._skeletons[(x.numel(), w0.numel())] = network.to("meta")
        probe = functional_call(network, weights | constants, (torch.zeros_like(x),))
        if probe.shape != w0.shape:
            raise ValueError(
                f"Hypernetwork: the network maps [{x.numel()}] to {list(probe.shape)}; expected [{w0.numel()}], the "
                f"size of player {state['follower']!r}."
            )
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
            "residual": math.nan,
        }

    def __call__(
        self, game: Game, others: Mapping[str, Variables], state: State, batch: Batch = None
    ) -> tuple[Variables, State]:
        """The learned response at `others`, differentiable in them, and the state to continue from."""
        given = {name: others[name] for name in state["players"] if name in others}
        follower = Follower(game, given, state, batch)
        if transforms_active():
            answer = self._map(state, flatten(given), state["centre"])
            return follower.form.unflatten(answer), state
        x = flatten(given)
        after = self._fit(game, follower, x.detach(), state)
        answer = self._map(after, x, after["centre"])
        follower.require_finite([answer], "Lower the learning rate of Hypernetwork(optimizer), or its scale.")
        after["variables"] = follower.form.unflatten(answer.detach().clone())
        return follower.form.unflatten(answer), after

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

    def _module(self, inputs: int, outputs: int) -> nn.Module:
        return copy.deepcopy(self.network) if isinstance(self.network, nn.Module) else self.network(inputs, outputs)

    def _map(self, state: State, x: Tensor, centre: Tensor) -> Tensor:
        """y `[..., outputs]` at x `[..., inputs]`."""
        network = self._skeleton(state, x.shape[-1])
        # Inputs in units of a perturbation's length: the network's rate of learning is then w0's.
        unit = (self.scale if self.scale > 0.0 else 1.0) * x.shape[-1] ** 0.5
        weights = state["network"] | state["constants"]
        if not self.centred:
            return state["w0"] + functional_call(network, weights, (x / unit,))  # type: ignore[no-any-return]
        # The origin rides along as one more row: a second pass would cost a second gradient of every weight.
        moves = torch.cat([(x - centre).reshape(-1, centre.numel()) / unit, torch.zeros_like(centre)[None]])
        moved = functional_call(network, weights, (moves,))
        return state["w0"] + (moved[:-1] - moved[-1]).reshape(*x.shape[:-1], -1)  # type: ignore[no-any-return]

    def _skeleton(self, state: State, inputs: int) -> nn.Module:
        sizes = (inputs, state["w0"].shape[-1])
        if sizes not in self._skeletons:
            with torch.device("meta"):  # its parameters come from the state
                self._skeletons[sizes] = self._module(*sizes)
        return self._skeletons[sizes]

    def _fit(self, game: Game, follower: Follower, x: Tensor, state: State) -> State:
        """The state after fitting the map around the leader's present value x `[n]`."""
        start = state["centre"]
        if self.centred and self._local:
            with torch.no_grad():  # the same map, written around the new centre
                start, w0 = x.clone(), self._map(state, x, state["centre"])
        else:
            w0 = state["w0"].clone()
        parameters = [w0, *(p.clone() for p in state["network"].values())]
        names = list(state["network"])
        optimizer = build(self.optimizer, parameters)
        recall(optimizer, parameters, state["optimizer"])
        scheduler = self.scheduler and build_scheduler(self.scheduler, optimizer, state["scheduler"])
        generator = torch.Generator(device=x.device)
        generator.set_state(state["generator"])

        def expected_loss(w0: Tensor, *network: Tensor) -> Tensor:
            points = self._points(follower, x, state, generator)
            fitted = {"w0": w0, "network": dict(zip(names, network, strict=True)), "constants": state["constants"]}
            return self._losses(follower, points, self._map(fitted, points, start)).mean()

        fits = self.steps + (self.warmup if state["fits"] == 0 else 0)
        rows = self.perturbations * (2 if self.antithetic and self.sampler is None else 1)
        for step in range(fits):
            if step:
                follower.advance()
            leaves = [p.detach().requires_grad_() for p in parameters]
            with torch.enable_grad():
                loss = expected_loss(*leaves)
                slopes = torch.autograd.grad(loss, leaves, materialize_grads=True)
            if step == fits - 1:
                follower.require_finite(
                    [w0], "Lower the learning rate of Hypernetwork, or its scale.", float(loss.detach())
                )
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        network = dict(zip(names, parameters[1:], strict=True))
        fitted = {"w0": parameters[0], "network": network, "constants": state["constants"]}
        stationarity, residual = self._examine(follower, fitted, x, start, generator)
        if self.tolerance is not None and self.scale > 0.0:
            self._warn(follower, state["fits"] + fits, residual, follower.relative(stationarity, state))
        return state | {
            "centre": start,
            "w0": parameters[0].detach(),
            "network": {name: p.detach() for name, p in zip(names, parameters[1:], strict=True)},
            "optimizer": remember(optimizer, parameters),
            "scheduler": scheduler and remember_scheduler(scheduler, optimizer),
            "generator": generator.get_state(),
            "fits": state["fits"] + fits,
            "data": follower.position,
            "buffers": follower.buffers.get(follower.name, {}),
            "gradients": state["gradients"] + 3 + fits * rows,
            "stationarity": follower.relative(stationarity, state),
            "residual": residual,
        }

    def _warn(self, follower: Follower, fits: int, residual: float, stationarity: float) -> None:
        """Say what the fit leaves, of the slope's equation and of the follower's own gradient."""
        advice = (
            "Do not trust the hypergradient on its word. Give it warmup=, another learning rate, more steps or "
            "perturbations, or a network that suits the game; compare with Implicit, and accept it by tolerance=None."
        )
        name, wanted = f"player {follower.name!r}", f"after {fits} steps of fitting; wanted {self.tolerance:g}"
        if not residual <= float(self.tolerance or 0.0):
            told = f"the learned slope of {name} leaves {residual:.2g} of the change that it should answer {wanted}"
        elif not stationarity <= float(self.tolerance or 0.0):
            told = f"the gradient of {name} is still {stationarity:.2g} of its value at the start {wanted}"
        else:
            return
        warnings.warn(f"Hypernetwork: {told}. {advice}", NonConvergenceWarning, stacklevel=5)

    def _examine(
        self, follower: Follower, fitted: State, x: Tensor, start: Tensor, generator: torch.Generator
    ) -> tuple[float, float]:
        """|grad_y f| at the centre, and how much of the slope's equation H J + f_yx = 0 is left, on a fresh draw.

        When the leader moves by e, the follower's gradient changes by f_yx e; a right slope undoes that change.
        """
        gradient = follower.held_residual()
        step = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) * self.scale
        there = follower.input_form.split(x + step)
        with torch.no_grad():
            y = self._map(fitted, x, start)
            here = gradient(y, *follower.input_form.split(x))
            unanswered = torch.linalg.vector_norm(gradient(y, *there) - here)
            answered = torch.linalg.vector_norm(gradient(self._map(fitted, x + step, start), *there) - here)
        left = float(answered / unanswered) if float(unanswered) > 0.0 else math.nan if self.scale == 0.0 else 0.0
        return float(torch.linalg.vector_norm(here)), left

    def _losses(self, follower: Follower, points: Tensor, answers: Tensor) -> Tensor:
        """The follower's loss `[rows]` at each perturbed x `[rows, inputs]` and its y `[rows, outputs]`."""

        def one(x: Tensor, y: Tensor) -> Tensor:
            return follower.loss(follower.form.unflatten(y), follower.input_form.unflatten(x))

        if follower.buffers:
            # BatchNorm's statistics advance in place, which vmap refuses: one row after the other.
            rows = zip(points, answers, strict=True)
            losses = [
                follower.loss(follower.form.unflatten(y), follower.input_form.unflatten(x), advance_buffers=True)
                for x, y in rows
            ]
            return torch.stack(losses)
        return torch.func.vmap(one, randomness="different")(points, answers)

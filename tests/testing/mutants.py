"""Responses with one planted defect each, and the law that must catch it."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from bilevel.autodiff import transforms_active
from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.responses import Steps
from bilevel.tree import leaves, map_leaves

from .one_step import OneStep

SGD = partial(torch.optim.SGD, lr=0.5)
MOMENTUM = partial(torch.optim.SGD, lr=0.3, momentum=0.5)


# Where a defect is planted ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mutant(bl.Response):
    """A right response, and a place to break it."""

    optimizer: OptimizerFactory = SGD
    steps: int = 50
    tolerance: float | None = 1e-8
    warm_start: bool = True
    unrolled: bool = False
    linear_solver: Any = field(default_factory=bl.ConjugateGradient)

    @property
    def inner(self) -> bl.Response:
        if self.unrolled:
            return bl.Unrolled(self.optimizer, steps=self.steps)
        return bl.Implicit(self.optimizer, steps=self.steps, tolerance=self.tolerance, linear_solver=self.linear_solver)

    @property
    def promise(self):
        return self.inner.promise

    @property
    def budget(self):
        return self.steps

    def with_budget(self, steps):
        return replace(self, steps=steps)

    @property
    def behaviour(self):
        return replace(self.inner.behaviour, warm=self.warm_start)

    @property
    def inner_optimizer(self):
        return self.optimizer

    def with_inner_optimizer(self, optimizer):
        return replace(self, optimizer=optimizer)

    def after_backward(self, state, answer):
        return self.inner.after_backward(state, answer)

    def report(self, state):
        return self.inner.report(state)

    def init(self, game, *, follower=None, seed=0):
        return self.inner.init(game, follower=follower, seed=seed)

    def __call__(self, game, others, state, batch=None):
        return self.inner(game, others, state, batch)


class _Change(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, change):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.change = inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return ctx.change(grad), None


@dataclass(frozen=True)
class Tampered(Mutant):
    """The derivative comes back changed."""

    change: Callable[[Tensor], Tensor] = torch.neg

    def __call__(self, game, others, state, batch=None):
        changed = map_leaves(lambda x: _Change.apply(x, self.change), dict(others))
        return self.inner(game, changed, state, batch)


class Solver(bl.linear.LinearSolver):
    """A solver that says that all is well."""

    def answer(self, operator, rhs):
        raise NotImplementedError

    def iterate(self, system):
        rhs = system.rhs
        # A candidate made by hand would be measured.
        return system.with_residual(self.answer(system.operator, rhs), torch.zeros_like(rhs), torch.zeros_like(rhs[0]))


class MixedResidual(Solver):
    """Conjugate gradients that put the old residual into the new direction."""

    def answer(self, operator, rhs):
        u, r = torch.zeros_like(rhs), rhs.clone()
        p = r.clone()
        for _ in range(2 * rhs.numel()):
            product = operator.matvec(p)
            step = (r @ r) / (p @ product).clamp_min(1e-300)
            u, after = u + step * p, r - step * product
            if after.norm() < 1e-14:
                break
            p, r = r + (after @ after) / (r @ r) * p, after
        return u


class StaleIterate(Solver):
    """Conjugate gradients that stop before they store the last iterate."""

    def answer(self, operator, rhs):
        u, r = torch.zeros_like(rhs), rhs.clone()
        p = r.clone()
        for _ in range(rhs.numel()):
            product = operator.matvec(p)
            step = (r @ r) / (p @ product)
            after = r - step * product
            if after.norm() < 1e-8 * rhs.norm():
                return u
            u, p, r = u + step * p, after + (after @ after) / (r @ r) * p, after
        return u


class WrongScale(Solver):
    """A Neumann series whose step scales the iterate and not the residual."""

    def answer(self, operator, rhs):
        u, r = torch.zeros_like(rhs), rhs.clone()
        for _ in range(200):
            u = u + 0.5 * r
            r = r - 0.4 * operator.matvec(r)
        return u


class Dampened(Solver):
    """Damping that nobody asked for."""

    def answer(self, operator, rhs):
        matrix = torch.func.vmap(operator.matvec)(torch.eye(rhs.numel()).to(rhs))
        return torch.linalg.solve(matrix + 0.05 * torch.eye(rhs.numel()).to(rhs), rhs)


class DiagonalOnly(Solver):
    """The inverse of the Hessian's diagonal."""

    def answer(self, operator, rhs):
        units = torch.eye(rhs.numel()).to(rhs)
        return rhs / torch.stack([unit @ operator.matvec(unit) for unit in units])


class NoInverse(Solver):
    """The right-hand side itself, and no residual to show for it."""

    def answer(self, operator, rhs):
        return rhs.clone()


# Defects of the derivative ----------------------------------------------------------------------------------


class Detached(Mutant):
    """The follower's path to the leader is cut."""

    def __call__(self, game, others, state, batch=None):
        y, after = self.inner(game, others, state, batch)
        return map_leaves(lambda t: t.detach().requires_grad_(), y), after


class FirstLeafOnly(Mutant):
    """Only the first leaf of each leader gets its derivative."""

    def __call__(self, game, others, state, batch=None):
        first = {id(leaves(tree)[0]) for tree in others.values()}
        cut = map_leaves(lambda x: x if id(x) in first else x.detach(), dict(others))
        return self.inner(game, cut, state, batch)


class ScalarsCut(Mutant):
    """0-d tensors get no derivative."""

    def __call__(self, game, others, state, batch=None):
        cut = map_leaves(lambda x: x.detach() if x.ndim == 0 else x, dict(others))
        return self.inner(game, cut, state, batch)


class OffTarget(Mutant):
    """The follower ends a hundredth beside its optimum, whatever it reports."""

    def __call__(self, game, others, state, batch=None):
        y, after = self.inner(game, others, state, batch)
        return map_leaves(lambda t: t + 1e-2, y), after


def _halved(gradient: Tensor) -> Tensor:
    return gradient.bfloat16().to(gradient) if gradient.dtype == torch.float32 else gradient


@dataclass(frozen=True)
class Truncated(Mutant):
    """The last so many steps alone are differentiated, and nobody is told."""

    unrolled: bool = True
    left_out: Callable[[int], int] = lambda steps: 1

    @property
    def promise(self):
        return Steps()

    @property
    def inner(self):
        kept = max(1, self.steps - self.left_out(self.steps))
        return bl.Unrolled(self.optimizer, steps=self.steps, backprop_steps=kept)


class FirstOrder(Mutant):
    """The answer is right and its derivative is a constant: there is no second one."""

    def __call__(self, game, others, state, batch=None):
        _, after = self.inner(game, others, state, batch)
        given = leaves(dict(others))
        with torch.enable_grad():
            tracked = {n: map_leaves(lambda t: t.detach().requires_grad_(), v) for n, v in others.items()}
            again, _ = self.inner(game, tracked, state, batch)
        out = []
        for copy in leaves(again):
            moved = copy.detach()
            if torch.is_grad_enabled():
                for entry in range(copy.numel()):
                    slopes = torch.autograd.grad(
                        copy.reshape(-1)[entry], leaves(tracked), retain_graph=True, materialize_grads=True
                    )
                    change = sum(((x - x.detach()) * s).sum() for x, s in zip(given, slopes, strict=True))
                    unit = torch.zeros_like(moved).reshape(-1)
                    unit[entry] = 1.0
                    moved = moved + unit.reshape(moved.shape) * change
            out.append(moved)
        return game.structure(state["follower"]).build(out), after


class Descends(Mutant):
    """`maximize` is not heard."""

    @property
    def inner(self):
        def deaf(parameters):
            optimizer = self.optimizer(parameters)
            for group in optimizer.param_groups:
                group["maximize"] = False
            return optimizer

        return bl.Unrolled(deaf, steps=self.steps)


class LeaksLeaderTerm(Mutant):
    """A tenth of the follower's own slope in x is added to the derivative."""

    def __call__(self, game, others, state, batch=None):
        y, after = self.inner(game, others, state, batch)
        held = map_leaves(lambda t: t.detach(), y)
        leak = 0.1 * game.loss("y", {**others, "y": held}, batch)
        return map_leaves(lambda t: t + (leak - leak.detach()), y), after


class SortsLeaves(Mutant):
    """The keys of a dict are taken in alphabetical order."""

    def __call__(self, game, others, state, batch=None):
        def turned(x):
            if isinstance(x, dict) and list(x) != sorted(x):
                return map_leaves(lambda t: _Change.apply(t, lambda g: 1.1 * g), x)
            return x

        return self.inner(game, {name: turned(x) for name, x in others.items()}, state, batch)


# Defects of state and reports -------------------------------------------------------------------------------


class Flattering(Mutant):
    """Whatever is left of the gradient, a thousandth is reported."""

    def __call__(self, game, others, state, batch=None):
        y, after = self.inner(game, others, state, batch)
        return y, after | {"stationarity": after["stationarity"] / 1000}


class Muffled(Mutant):
    """Nobody hears a warning."""

    def __call__(self, game, others, state, batch=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.inner(game, others, state, batch)


class InPlace(Mutant):
    """The state that is passed is overwritten."""

    def __call__(self, game, others, state, batch=None):
        y, after = self.inner(game, others, state, batch)
        for old, new in zip(leaves(state["variables"]), leaves(after["variables"]), strict=True):
            if not transforms_active():
                old.copy_(new)
        return y, after


@dataclass(frozen=True)
class Remembers(Mutant):
    """How often it was called is kept in the object."""

    calls: Any = field(default_factory=lambda: itertools.count(1), compare=False, repr=False)

    def __call__(self, game, others, state, batch=None):
        return self.inner.with_budget(self.steps + next(self.calls) % 2)(game, others, state, batch)


class GlobalNoise(Mutant):
    """The start is perturbed by numbers from the global generator."""

    def __call__(self, game, others, state, batch=None):
        noisy = map_leaves(lambda t: t + 1e-3 * torch.randn(t.shape).to(t), state["variables"])
        return self.inner(game, others, state | {"variables": noisy}, batch)


_SEEN: dict[int, Any] = {}


class HiddenMemory(Mutant):
    """The optimiser's memory lies outside the state, by the state's identity."""

    def __call__(self, game, others, state, batch=None):
        memory = _SEEN.get(id(state["variables"]), 0.0)
        y, after = self.inner(game, map_leaves(lambda x: x * (1.0 + memory), dict(others)), state, batch)
        _SEEN[id(after["variables"])] = 1e-3
        return y, after


class WritesAfterwards(Mutant):
    """What backward learns is written into the state that the call has returned."""

    def __call__(self, game, others, state, batch=None):
        y, after = self.inner(game, others, state, batch)
        if not transforms_active():
            count = torch.zeros(())
            leaves(y)[0].register_hook(lambda gradient: count.add_(1.0) and None)
            after = after | {"backward passes": count}
        return y, after


class Uncounted(Mutant):
    """The steps' gradients are not counted."""

    def __call__(self, game, others, state, batch=None):
        y, after = self.inner(game, others, state, batch)
        return y, after | {"gradients": state["gradients"]}


class StartsOver(Mutant):
    """The state that it returns lies far off."""

    def __call__(self, game, others, state, batch=None):
        y, after = self.inner(game, others, state, batch)
        return y, after | {"variables": map_leaves(lambda t: t + 3.0, after["variables"])}


class LostInTransforms(Mutant):
    """Under torch.func the answer is a twentieth off."""

    def __call__(self, game, others, state, batch=None):
        if transforms_active():
            others = map_leaves(lambda x: _Change.apply(x, lambda g: 1.05 * g), dict(others))
        return self.inner(game, others, state, batch)


class FirstChunk(Mutant):
    """Only the first chunk of a batch is looked at."""

    def __call__(self, game, others, state, batch=None):
        if batch is None:
            batch, _ = game.draw(state["follower"], state["data"])
        return self.inner(game, others, state, batch[:1] if isinstance(batch, list) else batch)


class FirstPlayer(Mutant):
    """Only the first of the others is answered."""

    def __call__(self, game, others, state, batch=None):
        first = next(iter(others))
        cut = {name: v if name == first else map_leaves(Tensor.detach, v) for name, v in others.items()}
        return self.inner(game, cut, state, batch)


@dataclass(frozen=True)
class FunctionsUnseen(Mutant):
    """The answer is the optimum within functions, and its derivative that of a follower whom none constrains."""

    @property
    def inner(self):
        return bl.Implicit(bl.Scipy("SLSQP"), steps=200)

    @property
    def budget(self):
        return 100

    def with_budget(self, steps):
        return self

    @property
    def inner_optimizer(self):
        return None

    def __call__(self, game, others, state, batch=None):
        with torch.no_grad():
            y, after = self.inner(game, others, state, batch)

        def residual(y, x):
            return bl.extend.gradient(lambda y: game.loss("y", {"x": x, "y": y}), y)[1][0]

        return bl.root(residual, y, others["x"], symmetric=True), after


class BoundsUnseen(Mutant):
    """The answer is the constrained optimum, and its derivative that of a follower whom nothing holds."""

    def __call__(self, game, others, state, batch=None):
        if not game.residual("y").projects:
            return self.inner(game, others, state, batch)
        with torch.no_grad():
            y, after = self.inner(game, others, state, batch)

        def slope(y, x):
            return torch.func.grad(lambda y: game.loss("y", {"x": x, "y": y}))(y) + 0.0 * x.sum()

        return bl.root(slope, y, others["x"]), after


def _clipped(gradient: Tensor) -> Tensor:
    return gradient / torch.clamp(torch.linalg.vector_norm(gradient) / 0.1, min=1.0)


MUTANTS: dict[str, tuple[str, bl.Response]] = {
    "sign": ("exact", Tampered()),
    "scale 1.02": ("exact", Tampered(change=lambda g: 1.02 * g)),
    "residual mix-up": ("exact", Mutant(linear_solver=MixedResidual())),
    "stale iterate": ("exact", Mutant(linear_solver=StaleIterate())),
    "wrong scale": ("exact", Mutant(linear_solver=WrongScale())),
    "detached path": ("exact", Detached()),
    "first leaf only": ("exact, nested variables", FirstLeafOnly()),
    "half precision inside": ("exact, float32", Tampered(change=_halved)),
    "functions unseen": ("within functions", FunctionsUnseen()),
    "bounds unseen": ("within sets", BoundsUnseen(linear_solver=None)),
    "half the steps": ("budget", Truncated(left_out=lambda steps: steps // 2)),
    "one step too few": ("own values", Truncated()),
    "one Neumann term too few": ("unrolled = Neumann", Truncated()),
    "no second derivative": ("second derivative", FirstOrder()),
    "maximize ignored": ("maximize", Descends(unrolled=True)),
    "flattering report": ("nothing silent", Flattering()),
    "beside the optimum": ("nothing silent", OffTarget()),
    "muffled warnings": ("nothing silent", Muffled()),
    "bias understated": ("stated bias", OneStep(lr=1.0, rho=0.5)),
    "work not counted": ("work", Uncounted()),
    "damping left in": ("scaled follower", Mutant(linear_solver=Dampened())),
    "leader's term leaks": ("leader's term", LeaksLeaderTerm()),
    "diagonal only": ("turned follower", Mutant(linear_solver=DiagonalOnly())),
    "no inverse": ("stretched follower", Mutant(linear_solver=NoInverse())),
    "entries clipped": ("turned leader", Tampered(change=lambda g: g.clamp(-0.1, 0.02))),
    "norm clipped": ("stretched leader", Tampered(change=_clipped)),
    "leaves sorted": ("order of leaves", SortsLeaves()),
    "scalars cut": ("scalar = vector", ScalarsCut()),
    "not linear": ("linear in the leader", Tampered(change=_clipped)),
    "state overwritten": ("nothing mutated", InPlace()),
    "state written afterwards": ("nothing mutated", WritesAfterwards()),
    "memory in the object": ("nothing mutated", Remembers(unrolled=True)),
    "global randomness": ("nothing mutated", GlobalNoise()),
    "memory outside the state": ("resume", HiddenMemory()),
    "warm start lost": ("warm start", StartsOver()),
    "lost in transforms": ("vmap = loop", LostInTransforms()),
    "first chunk only": ("chunks", FirstChunk()),
    "first player only": ("order of players", FirstPlayer()),
}

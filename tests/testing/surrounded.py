"""Defects that users met, planted in a response or in the library, each with the law that must catch it."""

import inspect
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

import bilevel as bl
from bilevel.autodiff import transforms_active
from bilevel.certificates import Standing
from bilevel.certificates.certificate import Finding
from bilevel.custom_functions import OwnFunctions
from bilevel.inner import TorchOptimizer
from bilevel.randomness import random_state
from bilevel.responses.examination import Examination
from bilevel.responses.unrolled.differentiation import Steps
from bilevel.solving.horizon import _Watched
from bilevel.solving.run import Run
from bilevel.tree import leaves, map_leaves

from .mutants import Mutant

# The follower's optimiser ------------------------------------------------------------------------------------


def plain(optimizer: Any) -> Any:
    """An optimiser without what stands around it."""
    return optimizer.factory if isinstance(optimizer, TorchOptimizer) else optimizer


@dataclass(frozen=True)
class ClipNotDifferentiated(Mutant):
    """The steps are clipped, and their derivative is that of steps that are not."""

    unrolled: bool = True

    def __call__(self, game, others, state, batch=None):
        with torch.no_grad():
            y, after = self.inner(game, others, state, batch)
        free, _ = bl.Unrolled(plain(self.optimizer), steps=self.steps)(game, others, state, batch)
        return map_leaves(lambda here, there: here + (there - there.detach()), y, free), after


@dataclass(frozen=True)
class ClipIgnored(Mutant):
    """The steps are not clipped."""

    @property
    def inner(self):
        return bl.Unrolled(plain(self.optimizer), steps=self.steps)


class ScheduleRestarted(Mutant):
    """Every call begins the schedule anew."""

    def __call__(self, game, others, state, batch=None):
        return self.inner(game, others, {**state, "schedule": None}, batch)


class HooksDropped(Mutant):
    """An optimiser's hooks are forgotten."""

    @property
    def inner(self):
        def bare(parameters):
            optimizer = self.optimizer(parameters)
            optimizer._optimizer_step_pre_hooks.clear()
            optimizer._optimizer_step_post_hooks.clear()
            return optimizer

        factory = self.optimizer if isinstance(self.optimizer, TorchOptimizer) else bare
        return bl.Unrolled(factory, steps=self.steps)


# Names, data, modules ----------------------------------------------------------------------------------------


class OptionsByName(Mutant):
    """A player whose name is an option of the optimiser is handed to it."""

    def __call__(self, game, others, state, batch=None):
        options = inspect.signature(torch.optim.SGD).parameters
        named = {name: float(leaves(v)[0].sum().detach()) for name, v in others.items() if name in options}
        if not named or transforms_active():
            return self.inner(game, others, state, batch)
        with_options = partial(torch.optim.SGD, **{"lr": 0.5, **{n: abs(v) for n, v in named.items()}})
        return bl.Unrolled(with_options, steps=self.steps)(game, others, state, batch)


class SkipsBatches(Mutant):
    """A batch is drawn to look at, and the next one is used."""

    def __call__(self, game, others, state, batch=None):
        if batch is None and state["data"] is not None:
            _, further = game.draw(state["follower"], state["data"])
            state = {**state, "data": further}
        return self.inner(game, others, state, batch)


@dataclass(frozen=True)
class OneIterator(Mutant):
    """Whoever plays reads on in one iterator, which is kept in the object."""

    kept: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, game, others, state, batch=None):
        data = game.players[state["follower"]].data
        if batch is None and data is not None:
            batch = next(self.kept.setdefault("iterator", iter(data)))
        return self.inner(game, others, state, batch)


class TrainsTheModule(Mutant):
    """The answer is loaded into the user's own module."""

    def __call__(self, game, others, state, batch=None):
        y, after = self.inner(game, others, state, batch)
        module = game.players[state["follower"]].init
        if isinstance(module, torch.nn.Module) and not transforms_active():
            module.load_state_dict(map_leaves(lambda t: t.detach(), dict(y)), strict=False)
        return y, after


class ReadsTheModule(Mutant):
    """The steps start from the module itself, and not from where the game's player is."""

    def __call__(self, game, others, state, batch=None):
        module = game.players[state["follower"]].init
        if isinstance(module, torch.nn.Module):
            own = {name: p.detach().clone() for name, p in module.named_parameters()}
            state = {**state, "variables": own}
        return self.inner(game, others, state, batch)


@dataclass(frozen=True)
class SharedScratch(Mutant):
    """What is being answered stands in the object for a while."""

    scratch: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __call__(self, game, others, state, batch=None):
        self.scratch["state"] = state
        time.sleep(0.2)  # long enough for the other thread on a busy machine
        return self.inner(game, others, self.scratch["state"], batch)


# Interrupts, settings, memory --------------------------------------------------------------------------------


class HalfWritten(Mutant):
    """The state serves as scratch, and is put back at the end of the call."""

    def __call__(self, game, others, state, batch=None):
        if transforms_active():
            return self.inner(game, others, state, batch)
        before = map_leaves(lambda t: t.clone(), state["variables"])
        given = {**state, "variables": map_leaves(lambda t: t.clone(), before)}
        for leaf in leaves(state["variables"]):
            leaf.mul_(0.5)
        answer = self.inner(game, others, given, batch)
        for leaf, kept in zip(leaves(state["variables"]), leaves(before), strict=True):
            leaf.copy_(kept)
        return answer


@dataclass(frozen=True)
class Unsaid(Mutant):
    """How many steps it takes is not among what it tells of itself."""

    steps: int = field(default=50, repr=False)


@dataclass(frozen=True)
class KeepsGraphs(Mutant):
    """Every answer is kept, with its graph."""

    kept: list[Any] = field(default_factory=list, compare=False, repr=False)

    def __call__(self, game, others, state, batch=None):
        y, after = self.inner(game, others, state, batch)
        self.kept.append(y)
        return y, after


# Alarms ------------------------------------------------------------------------------------------------------


class OnlyTheEnd(Mutant):
    """A NaN on the way is nobody's business."""

    def __call__(self, game, others, state, batch=None):
        y = state["variables"]
        name = state["follower"]
        for _ in range(self.steps):

            def loss(y):
                return game.loss(name, {**others, name: y}, batch)

            slope = torch.func.grad(loss)(y)
            y = map_leaves(lambda leaf, g: leaf - 0.5 * g, y, slope)
        return y, {**state, "variables": map_leaves(lambda t: t.detach(), y), "stationarity": 0.0}


class TooLarge(bl.linear.LinearSolver):
    """The right-hand side itself, five times; it says that it is as good as was asked for."""

    def iterate(self, system):
        return system.with_residual(5.0 * system.rhs, torch.zeros_like(system.rhs), torch.zeros_like(system.rhs[0]))


class Unexamined(Mutant):
    """Whoever meets the tolerance is not looked at again."""

    def __call__(self, game, others, state, batch=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y, after = self.inner(game, others, state, batch)

        def held(y, x):
            return bl.extend.gradient(lambda y: game.loss("y", {"x": x, "y": y}), y)[1][0]

        answer = map_leaves(lambda t: t.detach(), y)
        return bl.root(held, answer, others["x"], symmetric=True, linear_solver=bl.linear.Dense()), after


@dataclass(frozen=True)
class LooksNoFarther(Mutant):
    """It unrolls from its start in every call, and holds itself against no longer horizon."""

    @property
    def inner(self):
        return bl.Unrolled(self.optimizer, steps=self.steps, warm_start=False)


class MembersUnexamined(Mutant):
    """Followers who answer together are taken for one, whose equation has a solution."""

    def __call__(self, game, others, state, batch=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y, after = self.inner(game, others, state, batch)
        name, (leader,) = state["follower"], others

        def slope(player, held, mine):
            return bl.extend.gradient(lambda mine: game.loss(player, held(mine)), mine)[1][0]

        def stacked(y, x):
            if name in game.players:
                return slope(name, lambda mine: {leader: x, name: mine}, y)
            return {m: slope(m, lambda mine, m=m: {leader: x, name: {**y, m: mine}}, y[m]) for m in y}

        answer = map_leaves(lambda t: t.detach(), y)
        return bl.root(stacked, answer, others[leader], symmetric=False, linear_solver=bl.linear.Dense()), after


MET: dict[str, tuple[str, bl.Response]] = {
    "clip not differentiated": ("clipping", ClipNotDifferentiated()),
    "clip ignored": ("clipping", ClipIgnored(unrolled=True)),
    "schedule restarted": ("schedule", ScheduleRestarted(unrolled=True)),
    "hooks dropped": ("hooks", HooksDropped(unrolled=True)),
    "options by name": ("names", OptionsByName(unrolled=True)),
    "batches skipped": ("batches", SkipsBatches(unrolled=True)),
    "one iterator for all": ("batches", OneIterator()),
    "trains the user's module": ("modules", TrainsTheModule(unrolled=True)),
    "reads the user's module": ("modules", ReadsTheModule(unrolled=True)),
    "scratch in the object": ("threads", SharedScratch(unrolled=True)),
    "state as scratch": ("interrupts", HalfWritten(unrolled=True)),
    "steps not told": ("settings", Unsaid(unrolled=True)),
    "graphs kept": ("memory", KeepsGraphs(unrolled=True)),
    "NaN on the way": ("NaN in the middle", OnlyTheEnd(unrolled=True)),
    "silent residual": ("worse than nothing", Mutant(linear_solver=TooLarge())),
    "not examined": ("far start", Unexamined(tolerance=1e-3)),
    "saddle not examined": ("no minimum", Unexamined(tolerance=1e-3)),
    "no farther look": ("short horizon", LooksNoFarther(unrolled=True)),
    "members not examined": ("members", MembersUnexamined(linear_solver=bl.GMRES())),
}


# In the library ----------------------------------------------------------------------------------------------


def _no_lock(patch: Any) -> None:
    class NoLock:
        def acquire(self, timeout: float = 0.0) -> bool:
            return True

        def release(self) -> None:
            pass

    patch.setattr("bilevel.game.modules._LENT", NoLock())


def _wrong_order(patch: Any) -> None:
    patch.setattr("bilevel.game.modules.reversed", list, raising=False)


def _module_for_player(patch: Any) -> None:
    patch.setattr("bilevel.game.checks._refuse_own_parameters", lambda *given: None)


def _writes_pass(patch: Any) -> None:
    patch.setattr("bilevel.game.checks._refuse_written", lambda *given, **named: None)
    # PyTorch itself refuses to write into the views at which the size of a gradient's terms is measured.
    patch.setattr(
        "bilevel.game.follower.measured_terms", lambda follower, *_: [torch.zeros(()) for _ in follower.owners]
    )


def _bends_pass(patch: Any) -> None:
    patch.setattr("bilevel.game.hooks.GradientHooks.guarded", lambda self, hook, what, place, *given: hook(*given))


def _saved_pass(patch: Any) -> None:
    patch.setattr("bilevel.game.checks.examined", lambda calls: OwnFunctions())


def _reads_again(patch: Any) -> None:
    patch.setattr("bilevel.game.data._RecentBatches.find", lambda self, place: None)


def _keys_collide(patch: Any) -> None:
    patch.setattr("bilevel.solving.run.loss_key", lambda player: player)
    patch.setattr("bilevel.solving.run.refuse_ambiguous", lambda *given, **named: None)


def _late_numbers(patch: Any) -> None:
    whole = Run.state
    patch.setattr(Run, "state", lambda self: {**whole(self), "random": random_state()})


def _hooks_accepted(patch: Any) -> None:
    for module in ("optimizer", "differentiable"):
        patch.setattr(f"bilevel.inner.{module}.refuse_hooks", lambda optimizer: None)


def _graphs_held(patch: Any) -> None:
    note, kept = Steps.note, []

    def held(self: Steps, losses: Any, slopes: Any) -> None:
        kept.append(losses[0])
        note(self, losses, slopes)

    patch.setattr(Steps, "note", held)


def _any_residual(patch: Any) -> None:
    patch.setattr("bilevel.linear.base.LinearSolver._beats_zero", lambda self, system, found: torch.tensor(True))


def _no_examination(patch: Any) -> None:
    patch.setattr(Examination, "at_once", lambda self, xs, products: None)
    patch.setattr(Examination, "__call__", lambda self, *given: [])


def _no_member(patch: Any) -> None:
    patch.setattr(Examination, "_member", lambda self, *given: None)


def _one_direction(patch: Any) -> None:
    patch.setattr("bilevel.responses.examination._lowest", lambda inner, u, product, once=None: torch.zeros(()))


def _first_order_alone(patch: Any) -> None:
    def found(name: str, *given: Any, **named: Any) -> Finding:
        return Finding(name, Standing.CERTIFIED, 1.0, "> 0")

    for module in ("_certify", "alone"):
        patch.setattr(f"bilevel.certificates.{module}.definite", found)


def _never_warns(patch: Any) -> None:
    patch.setattr(bl.Hypernetwork, "_warn", lambda self, *given: None)


def _always_warns(patch: Any) -> None:
    patch.setattr(bl.Hypernetwork, "_warn", lambda self, *given: warnings.warn(bl.errors.NonConvergenceWarning("?")))


def _one_iterator(patch: Any) -> None:
    class UsersOwn:
        def __init__(self, loader: Any) -> None:
            self.loader = loader

        def __iter__(self) -> Any:
            return iter(self.loader)  # which begins the one iterator of its workers again

    patch.setattr("bilevel.game.passes.PersistentLoader", UsersOwn)


def _no_fault_seen(patch: Any) -> None:
    patch.setattr("bilevel.responses.unrolled.first_fault.FirstFault.found", lambda self: None)


def _no_look(patch: Any) -> None:
    patch.setattr("bilevel.solving.horizon.due", lambda step: False)


def _no_look_back(patch: Any) -> None:
    patch.setattr("bilevel.solving.horizon.HorizonWatch._back", lambda self, watched, window, log, *given: (log, {}))


def _start_is_the_scale(patch: Any) -> None:
    patch.setattr("bilevel.game.follower.measured_terms", lambda follower, residual, y: [0.0])


def _one_game_looked_at(patch: Any) -> None:
    whole = _Watched.verdict

    def first_alone(self: Any, looks: Any, first: Any, *, noisy: bool) -> Any:
        return whole(self, {key: [look[:1] for look in rows] for key, rows in looks.items()}, first, noisy=noisy)

    patch.setattr(_Watched, "verdict", first_alone)


def _tasks_not_looked_at(patch: Any) -> None:
    patch.setattr("bilevel.many.each_task.EachTask.farther", None)


def _ends_not_looked_at(patch: Any) -> None:
    patch.setattr("bilevel.solving.horizon.HorizonWatch.ended", lambda self, log, *given: log)
    patch.setattr("bilevel.solving.horizon.EARLY", ())


def _settings_pass(patch: Any) -> None:
    patch.setattr("bilevel.solving.run.accepted", lambda *given, **named: [])


SGD = partial(torch.optim.SGD, lr=0.5)
UNROLLED = bl.Unrolled(SGD, steps=50)
COLD = replace(UNROLLED, warm_start=False)
IMPLICIT = bl.Implicit(SGD, steps=50)
DENSE = bl.Implicit(SGD, steps=50, linear_solver=bl.linear.Dense())
LEARNED = bl.Hypernetwork(partial(torch.optim.Adam, lr=1e-2), scale=0.1)
ROOT = bl.Implicit(bl.ScipyRoot(), linear_solver=bl.GMRES())
BROKEN: dict[str, tuple[str, bl.Response, Callable[[Any], None]]] = {
    "hooks accepted": ("hooks", UNROLLED, _hooks_accepted),
    "records collide": ("names", UNROLLED, _keys_collide),
    "batches read again": ("batches", IMPLICIT, _reads_again),
    "buffers put back in the wrong order": ("modules", UNROLLED, _wrong_order),
    "a module for a player": ("losses", UNROLLED, _module_for_player),
    "losses that write": ("losses", UNROLLED, _writes_pass),
    "hooks that bend": ("losses", UNROLLED, _bends_pass),
    "slopes that are saved": ("functions", UNROLLED, _saved_pass),
    "modules without a lock": ("threads", UNROLLED, _no_lock),
    "random numbers saved after the lost draws": ("interrupts", UNROLLED, _late_numbers),
    "changed settings pass": ("settings", UNROLLED, _settings_pass),
    "graphs held by the steps": ("memory", replace(UNROLLED, differentiation=bl.Segments(count=2)), _graphs_held),
    "NaN not seen": ("NaN in the middle", UNROLLED, _no_fault_seen),
    "any residual will do": ("worse than nothing", bl.Implicit(SGD, linear_solver=bl.linear.Identity()), _any_residual),
    "far start not examined": ("far start", IMPLICIT, _no_examination),
    "curvature not examined": ("no minimum", DENSE, _no_examination),
    "no member examined": ("members", DENSE, _no_member),
    "a member examined along one direction": ("members", IMPLICIT, _one_direction),
    "a root's curvature not examined": ("dead demand", ROOT, _no_examination),
    "certified by first order alone": ("certificates", IMPLICIT, _first_order_alone),
    "a warning that never speaks": ("learned slopes", LEARNED, _never_warns),
    "a warning that always speaks": ("learned slopes", LEARNED, _always_warns),
    "one iterator of persistent workers": ("workers", UNROLLED, _one_iterator),
    "horizon not looked at": ("short horizon", COLD, _no_look),
    "horizon not looked at with data": ("short horizon, data", COLD, _no_look_back),
    "rounding for a scale": ("at rest", IMPLICIT, _start_is_the_scale),
    "horizon of one game looked at": ("short horizon, games", COLD, _one_game_looked_at),
    "horizon of tasks not looked at": ("short horizon, tasks", COLD, _tasks_not_looked_at),
    "horizon not looked at where SciPy ends": ("short horizon, SciPy", COLD, _ends_not_looked_at),
}

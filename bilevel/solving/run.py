"""One run of solve: where it is after each whole step, how one step moves it, and how it is saved."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bilevel.autodiff import gradients_of
from bilevel.dynamics import Dynamics, Field, Simultaneous
from bilevel.dynamics.base import directed, require_rule
from bilevel.errors import (
    CheckpointError,
    ConstraintError,
    NonFiniteError,
    OtherDataWarning,
    SingularSystemError,
)
from bilevel.game import Buffers, Game
from bilevel.game.data import Batch, Position
from bilevel.inner.torch_optim import SchedulerFactory
from bilevel.randomness import random_kept, random_state, set_random_state
from bilevel.responses import Response, State
from bilevel.sharding.storing import has_parts
from bilevel.solving.driven import (
    Driven,
    EnoughError,
    Entry,
    Search,
    bounds_of,
    drive,
    fitted,
    flat,
    plain,
    require_finite,
)
from bilevel.solving.evaluation import StepEvaluator
from bilevel.solving.followers import Followers, States, with_followers
from bilevel.solving.history import History, Observe, Record, loss_key, refuse_ambiguous, summary
from bilevel.solving.horizon import HorizonWatch, Looks, Place
from bilevel.solving.identity import accepted, differ, identity, in_words, touches
from bilevel.solving.leader_functions import Values, functions_of
from bilevel.solving.leaders import LeaderOptimizer, Leaders
from bilevel.solving.moment import Moment
from bilevel.solving.warning_log import Log, caught, logged
from bilevel.tree import Variables, map_leaves
from bilevel.variance import digest


class Run:
    """A game being played: `now`, the leaders, and the history of how it came there.

    `whole` is false from the moment at which something begins to move in place until the next step is whole. An
    exception in between leaves a state that is of neither step, and that nobody must save.
    """

    def __init__(
        self,
        game: Game,
        responses: Mapping[str, Response],
        optimizer: LeaderOptimizer | Mapping[str, LeaderOptimizer] | None,
        scheduler: SchedulerFactory | None,
        dynamics: Dynamics,
        clip_norm: float | None,
        seed: int,
        observe: Observe | None = None,
    ) -> None:
        require_rule(dynamics)
        game.require_ranks("solve")
        self.game, self.dynamics, self.seed, self._observe = game, dynamics, seed, observe
        self.followers = Followers(game, responses)
        states = self.followers.init(seed)
        game.require_separable(dynamics)
        leading = [name for name in game.names if name not in responses]
        self.leaders = Leaders(game, leading, optimizer, scheduler, clip_norm, dynamics.placed(leading))
        if self.leaders.projects and not dynamics.rests_with_bounds:
            raise TypeError(
                f"solve: {dynamics!r} looks ahead or corrects the gradient, and at a bound of "
                f"{self.leaders.projects[0]!r} it would rest elsewhere than at an equilibrium. Use Simultaneous(), "
                "Alternating(), TwoTimescale(), Optimistic() or NegativeMomentum(), or a coordinate, "
                "init=bilevel.Interval(low, high)."
            )
        members = [member for name in game.names for member in game.members(name)]
        if self.leaders.driven and not isinstance(dynamics, Simultaneous):
            raise TypeError(
                f"solve: {dynamics!r} says where leaders go, and SciPy's method as well. Leave one of them out."
            )
        self.functions = functions_of(game, leading, list(self.followers.responses), self.leaders.driven, dynamics)
        refuse_ambiguous(members, responses, game.record_keys, self.functions)
        start = {name: game.start(name, seed) for name in leading}
        # The leaders' own modules advance too when there is no follower to carry them.
        buffers = {name: b for name, b in game.buffers().items() if b}
        lagrangians = {
            name: lagrangian.first(*self.functions[name].rows(self.functions[name].first()))
            for name, lagrangian in self.leaders.lagrangians.items()
        }
        first = torch.zeros(game.count, dtype=torch.float64)
        self.now = Moment(
            states, start, start, buffers, random_state(game.device), lagrangians=lagrangians, first=first
        )
        self.driven: Driven | None = None
        self.history = History()
        self.whole = True
        self._watch = HorizonWatch(game, self.followers, driven=bool(self.leaders.driven))
        self._batches: dict[str, Batch] = {}  # the leaders' last
        in_place = self.followers.in_place
        told = (
            f"solve: {self.dynamics!r} evaluates the players more than once a step, and each time {in_place} would "
            "move on the states that they write into. Use Hypernetwork(memory=Memory(in_place=False))."
        )
        self._only_once = told if in_place else ""

    @property
    def variables(self) -> dict[str, Variables]:
        """Everybody's present variables, detached; the followers' as they last answered."""
        return self._variables(self.now.states)

    @property
    def shared(self) -> dict[str, Any]:
        """What is the same in all processes that play together, by what it is called."""
        points = self.leaders.points if self.game.leads_alike else {}
        leaders = {f"the leader {name!r}": point for name, point in points.items()}
        alike = self.game.alike
        states = {f"the state of follower {name!r}": alike(state) for name, state in self.now.states.items()}
        places = {"the place in the data": dict(self.now.positions), "the random numbers": dict(self.now.random)}
        return {**leaders, **states, **places}

    def _variables(self, states: States) -> dict[str, Variables]:
        leading = self.leaders.trees(self.leaders.points)
        given = {n: states[n]["variables"] if n in states else leading[n] for n in self.game.names}
        copied = {name: map_leaves(lambda t: t.detach().clone(), tree) for name, tree in given.items()}
        return self.game.given_back(copied)

    # A step ----------------------------------------------------------------------------------------------------------

    def step(self) -> Record:
        """One step of every leader; what it finds takes its place in `now` at once, when all of it is there."""
        with self.game.stepping():
            after, losses, norms, functions = self._moved()
        return self._went(replace(after, random=random_state(self.game.device)), losses, norms, functions)

    def _moved(self) -> tuple[Moment, dict[str, Tensor], list[Tensor], Mapping[str, Values]]:
        """Where the run is after a step, but for `now`; the losses before it, and the leaders' gradients."""
        began, now, leading = time.perf_counter(), self.now, self.leaders.names
        # A response that writes into its state moves it from its call on.
        self.whole = not self._only_once
        drawn = {name: self.game.draw(name, now.positions[name]) for name in leading}
        self._batches = {name: batch for name, (batch, _) in drawn.items()}
        played = self._evaluator(drawn)
        memory, warned, products = now.memory, now.warned, now.products
        looked = time.perf_counter()
        warned, looks = self._watched(warned)
        began += time.perf_counter() - looked  # to look takes no part in the method's time, nor in its work
        losses: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        for movers in [(name,) for name in leading] if self.dynamics.alternates else [tuple(leading)]:
            with caught() as new:
                look: Any = played if not self.leaders.ranged else _NoLook(self.leaders.ranged[0])
                field = Field(played.slopes, self.leaders.points, movers, played.losses, look)
                directions, memory = directed(self.dynamics, field, memory)
            warned = logged(warned, new, now.step + 1)
            products += field.products
            looked = time.perf_counter()
            losses = losses or self._losses(played)  # before anybody moves
            began += time.perf_counter() - looked  # to look takes no part in the method's time
            self.whole = False
            for name in movers:
                if name in self.leaders.placed:
                    self.leaders.place(name, directions[name], now.step + 1)
                else:
                    norms[name] = self.leaders.apply(name, directions[name], now.step + 1)
        after = Moment(
            states=self.followers.after_backward(played.first.states, played.first.variables),
            positions=dict(played.positions),
            drawn=now.positions,
            buffers=played.first.buffers,
            random=random_state(self.game.device),
            step=now.step + 1,
            memory=memory,
            gradients=now.gradients + played.gradients,
            products=products,
            seconds=now.seconds + time.perf_counter() - began,
            warned=warned,
            looks=looks,
            first=now.first if now.step else self._norms(list(norms.values())),
            changes=now.changes,
            lagrangians={n: self._learned(n, played.first.functions[n], norms[n]) for n in now.lagrangians},
        )
        return after, losses, list(norms.values()), played.first.functions

    def _went(
        self, after: Moment, losses: Mapping[str, Tensor], norms: list[Tensor], functions: Mapping[str, Values]
    ) -> Record:
        """The record of a step that is whole, and takes its place in `now`."""
        violations = {name: self.functions[name].violation(values) for name, values in functions.items()}
        record = self._record(after, losses, norms, violations)
        if self._observe is not None:
            with random_kept(self.game.device):
                record |= _observed(self._observe, self._variables(after.states), record)
        self.history.append(record)
        self.now = after
        self.whole = True
        return record

    def _evaluator(self, drawn: Mapping[str, tuple[Batch, Position | None]]) -> StepEvaluator:
        """A step's evaluations, from the followers' present states."""
        now = self.now
        return StepEvaluator(
            self.game,
            self.leaders,
            lambda point: self.followers.respond(point, now.states, now.buffers),
            drawn,
            now.buffers,
            self._only_once,
            self.functions,
            self._term,
        )

    # Leaders' functions ----------------------------------------------------------------------------------------------

    def _term(self, name: str, values: Values) -> Tensor:
        """What a leader's loss gets in place of its functions, summed over games."""
        functions = self.functions[name]
        functions.require_finite(values, self.now.step + 1)
        return self.leaders.lagrangians[name].term(dict(self.now.lagrangians[name]), *functions.rows(values)).sum()

    def _learned(self, name: str, values: Values, norm: Tensor) -> Mapping[str, Tensor]:
        """A leader's multipliers after a step in which its Lagrangian's gradient had this norm."""
        rows, state = self.functions[name].rows(values), dict(self.now.lagrangians[name])
        return self.leaders.lagrangians[name].updated(state, *rows, norm.detach().reshape(-1).to(rows[0]))

    # A leader that SciPy moves ---------------------------------------------------------------------------------------

    def drive(self, steps: int, after: Callable[[Record], bool]) -> None:
        """Let SciPy's method move the leader, an evaluation a step; `after` each, and whether that ends the run.

        What an interrupted run has evaluated is known, and not evaluated again.
        """
        ((name, method),) = self.leaders.driven.items()
        if self.driven is not None:
            return
        known = list(self.now.memory.get("evaluations", []))

        def evaluate(x: Tensor) -> Entry:
            # Points without an answer are no steps, and may be as many.
            if self.now.step >= steps or len(self.now.memory.get("evaluations", [])) >= 2 * steps:
                raise EnoughError
            entry = self._look(name, x)
            if "failed" not in entry and after(self.history.last):
                raise EnoughError
            return entry

        epsilon = torch.finfo(self.game.like.dtype).eps
        search = Search(flat(self.leaders.start(name)), bounds_of(self.game, name), self.functions[name].walls())
        self.driven = drive(method, search, evaluate, known, epsilon)
        self.leaders.place(name, self.leaders.split(name, self.driven.best["x"]), self.now.step)
        self.last_batch(name)
        now = self.now
        warned = self._watch.ended(now.warned, now.step, now.first, self._here, self._slopes)
        self.now = replace(now, warned=warned)

    def _look(self, name: str, x: Tensor) -> Entry:
        """One evaluation of a leader's programme at `x: [n]`, which is a step; where a follower has no answer, none."""
        began, now = time.perf_counter(), self.now
        self.whole = not self._only_once
        self.leaders.place(name, self.leaders.split(name, x), now.step + 1)
        drawn = {name: self.game.draw(name, now.positions[name])}
        self._batches = {name: drawn[name][0]}
        looked = time.perf_counter()
        warned, looks = self._watched(now.warned)
        began += time.perf_counter() - looked
        played = self._evaluator(drawn)
        known = list(now.memory.get("evaluations", []))
        with caught() as new:
            try:
                entry = {"x": x, **plain(played.programme(name))}
                require_finite(entry, name, now.step + 1)
            except (ConstraintError, NonFiniteError, SingularSystemError) as error:
                if not known:
                    raise
                entry = {"x": x, "failed": str(error)}
        if "failed" in entry:
            self.now = replace(now, memory={"evaluations": [*known, entry]}, random=random_state(self.game.device))
            self.whole = True
            return entry
        self.whole = True
        after = replace(
            now,
            states=self.followers.after_backward(played.first.states, played.first.variables),
            positions=dict(played.positions),
            drawn=now.positions,
            buffers={**now.buffers, **played.first.buffers},
            random=random_state(self.game.device),
            step=now.step + 1,
            memory={"evaluations": [*known, entry]},
            gradients=now.gradients + played.gradients,
            seconds=now.seconds + time.perf_counter() - began,
            warned=logged(warned, new, now.step + 1),
            looks=looks,
            first=now.first if now.step else entry["slope"].norm().reshape(1),
        )
        norm = torch.tensor(fitted(entry)[2], dtype=torch.float64)
        self._went(after, self._losses(played), [norm], played.first.functions)
        return entry

    def _watched(self, log: Log) -> tuple[Log, Looks]:
        """The log with whether the follower's horizon is too short, and the looks that have no verdict yet."""
        now = self.now
        return self._watch.watch(log, now.looks, now.step + 1, now.first, self._here, self._slopes)

    def _norms(self, norms: list[Tensor]) -> Tensor:
        """The leaders' norms, of all of them together, `[games]`."""
        if not norms:
            return self.now.first
        found: Tensor = torch.linalg.vector_norm(torch.stack(norms).detach().double().cpu(), dim=0)
        return found.reshape(-1)

    def _here(self) -> Place:
        """Where the leaders' gradients are taken in this step."""
        point = {name: [t.detach().clone() for t in leaf] for name, leaf in self.leaders.points.items()}
        return Place(point, self.now.states, self.now.buffers, self._batches, random_state(self.game.device))

    def _slopes(self, game: Game, followers: Followers, place: Place) -> Tensor:
        """The leaders' own gradients `[games, n]` at a place, through these responses' answers; nothing is kept."""
        with torch.enable_grad():
            point = {n: [t.clone().requires_grad_() for t in p] for n, p in place.point.items()}
            variables, states, buffers = followers.respond(self.leaders.trees(point), place.states, place.buffers)
            buffers = {**buffers, **game.statistics(variables, states)}
            slopes: list[Tensor] = []
            for name in self.leaders.names:
                loss, _ = game.evaluate(name, variables, place.batches[name], buffers)
                slopes += gradients_of(game.total(loss), point[name], retain_graph=True)
        return torch.cat([slope.detach().reshape(game.count, -1) for slope in slopes], 1)

    def _losses(self, played: StepEvaluator) -> dict[str, Tensor]:
        """Everybody's loss where the players are, the followers' on the batch that comes next.

        A response whose state tells the loss that its last step saw is believed: one evaluation less.
        """
        first, found = played.first, dict(played.first.losses)
        here = map_leaves(lambda t: t.detach(), dict(first.variables))
        buffers = with_followers(first.buffers, first.states)
        for name in self.followers.responses:
            seen = first.states[name].get("loss")
            found |= {name: seen} if isinstance(seen, Tensor) else self.shown(name, here, first.states, buffers)
        return found

    def _record(
        self,
        after: Moment,
        losses: Mapping[str, Tensor],
        norms: list[Tensor],
        violations: Mapping[str, Tensor],
    ) -> Record:
        record: Record = {"step": after.step}
        norm = torch.linalg.vector_norm(torch.stack(norms).double(), dim=0)
        numbers = {"gradient_norm": norm, **{loss_key(name): loss for name, loss in losses.items()}}
        numbers |= {f"{name}.stationarity": state["stationarity"] for name, state in after.states.items()}
        numbers, violations = self.game.gathered((numbers, dict(violations)))
        for name, number in numbers.items():
            record |= summary(name, number)
        for name, number in self.dynamics.report(after.memory).items():
            record |= {f"dynamics.{name}": float(number)}
        gradients, products = self.work(after, after.states)
        record |= {"gradients": gradients, "products": products, "seconds": after.seconds}
        record |= {"work": gradients + products}
        for name, violation in violations.items():
            record |= summary(f"{name}.violation", violation)
        return record

    def shown(
        self, name: str, variables: Mapping[str, Variables], states: Mapping[str, State], buffers: Buffers
    ) -> dict[str, Tensor]:
        """A leader's own loss on its last batch, or a follower's on the one that comes next: shown, not used.

        At detached variables, with everybody's buffers. Of a joint player, its members'.
        """
        with torch.no_grad(), random_kept(self.game.device):
            if name in states:
                batch, _ = self.game.draw(name, states[name]["data"])
            else:
                place = self.game.position_of_answer(name, states)
                batch = self.last_batch(name) if place is None else self.game.draw(name, place)[0]
            members = self.game.members(name)
            if members == (name,):
                return {name: self.game.loss(name, variables, batch, buffers)}
            return {m: self.game.loss(m, variables, None if batch is None else batch[m], buffers) for m in members}

    def last_batch(self, leader: str) -> Batch:
        """A leader's last batch, drawn again where another process made the last step."""
        if leader not in self._batches:
            self._batches[leader], _ = self.game.draw(leader, self.now.drawn[leader])
        return self._batches[leader]

    def work(self, moment: Moment, states: States) -> tuple[int, int]:
        """Gradients and Hessian-vector products so far, the followers' as these states report them."""
        reports = self.followers.reports(states).values()
        gradients = moment.gradients + sum(report.gradients for report in reports)
        products = moment.products + sum(report.products for report in reports)
        gradients, products = self.game.most([gradients, products])
        return gradients, products

    # A checkpoint ----------------------------------------------------------------------------------------------------

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the run is known by."""
        return identity(self.game.undivided, self.followers.responses, self.leaders, self.dynamics, self.seed)

    def state(self) -> dict[str, Any]:
        """All of it, as tensors, numbers and strings."""
        moment = {name: getattr(self.now, name) for name in Moment.__dataclass_fields__}
        return {
            "identity": self.identity,
            **moment,
            "leaders": self.leaders.state(),
            "history": self.history.state(),
            "batches": self._last_batches(),
        }

    def _places(self) -> dict[str, Position | None]:
        """Where everybody's data are."""
        followers = {name: state.get("data") for name, state in self.now.states.items()}
        return {**followers, **self.now.positions}

    def _last_batches(self) -> dict[str, str]:
        """What the last batches are known by, of those who have them still."""
        found: dict[str, str] = {}
        for name, place in self._places().items():
            found |= {member: known_by(batch) for member, batch in self.game.remembered(name, place).items()}
        return found

    def require_batches(self, saved: Mapping[str, Any], path: Path) -> None:
        """Warn where the data give other batches than they gave when the run was saved: it goes on, not bit for bit."""
        before = saved.get("batches", {})
        for name, place in self._places().items():
            for member in self.game.members(name):
                at = place if place is None or "epoch" in place else place.get(member)
                if member not in before or at is None or at["index"] < 1:
                    continue
                self.game.draw(member, {**at, "index": at["index"] - 1})
                now = {who: known_by(batch) for who, batch in self.game.remembered(member, at).items()}
                if now.get(member) != before[member]:
                    told = (
                        f"solve: the data of player {member!r} give another batch {at['index']} of pass "
                        f"{at['epoch'] + 1} than when {path} was saved: the run goes on, but not bit for bit. They "
                        "are other data, or draw what a position does not hold, such as random numbers of Python's or "
                        "NumPy's global generators. Draw from torch's, or from a generator that the data set or the "
                        "sampler holds as an attribute."
                    )
                    warnings.warn(OtherDataWarning(told), stacklevel=3)
                    self.now = replace(self.now, changes=(*self.now.changes, told))

    def restore(self, saved: Mapping[str, Any], path: Path, *, accept_changes: bool) -> None:
        """Go on from what `state` gave.

        Raises:
            CheckpointError: when it is no run, one of another game or seed, or one with other settings and these are
                not accepted.
        """
        missing = [key for key in self.state() if key not in saved and key != "batches"]
        if missing:
            raise CheckpointError(
                f"{path} is no checkpoint of solve: it has no {missing[0]!r}. Pass another checkpoint=, or "
                "resume=False to overwrite it."
            )
        if saved["step"] == 0 and differ(saved["identity"], self.identity):
            return  # nothing was done yet
        settings = accepted(saved["identity"], self.identity, path, accept_changes=accept_changes)
        self._require_spread(saved, path)
        self.history, self._batches = History(saved["history"]), {}
        moment = Moment(**{name: saved[name] for name in Moment.__dataclass_fields__})
        # Of a leader who has got functions since, or has none any more.
        kept = {n: moment.lagrangians.get(n, first) for n, first in self.now.lagrangians.items()}
        moment = replace(moment, lagrangians=kept)
        paths = [path for path, *_ in settings]
        changed = [n for n in self.leaders.names if touches(paths, "optimizer", n) or touches(paths, "scheduler", n)]
        self.leaders.restore(saved["leaders"], moment.step, changed)
        set_random_state(moment.random, self.game.device)
        self.now = self._with_present_settings(moment, paths, in_words(settings)) if settings else moment

    def _require_spread(self, saved: Mapping[str, Any], path: Path) -> None:
        """Refuse what was saved with variables held whole where they are spread now."""
        present = {**{n: state["variables"] for n, state in self.now.states.items()}, **self.leaders.points}
        before = {**{n: state["variables"] for n, state in saved["states"].items()}, **saved["leaders"]["points"]}
        for name, tree in present.items():
            if has_parts(tree) and not has_parts(before[name]):
                raise CheckpointError(
                    f"{path} was saved while each rank held the variables of {name!r} whole; now they are spread over "
                    "the ranks. Go on with the module as it was before fully_shard."
                )

    def _with_present_settings(self, moment: Moment, paths: list[str], changes: str) -> Moment:
        """A moment of a run with other settings, as one of this run; no work that was done is forgotten."""
        states = dict(moment.states)
        for name, response in self.followers.responses.items():
            if touches(paths, "responses", name):
                states[name] = response.adopt(states[name], self.now.states[name])
        last, (gradients, products) = self.history.records()[-1], self.work(moment, states)
        return replace(
            moment,
            states=states,
            memory={} if "dynamics" in paths else moment.memory,  # another rule's says nothing
            gradients=moment.gradients + int(last["gradients"]) - gradients,
            products=moment.products + int(last["products"]) - products,
            changes=(*moment.changes, f"Resumed at step {moment.step} with other settings: {changes}."),
        )


def known_by(batch: Batch) -> str:
    """A digest of the beginning of each of a batch's tensors, and of its numbers and strings."""

    def told(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.detach().reshape(-1)[:4096] if leaf.layout == torch.strided else str(leaf.shape)
        return leaf if isinstance(leaf, int | float | str | bytes | type(None)) else type(leaf).__name__

    return digest(map_leaves(told, batch))


class _NoLook:
    """What a rule of play that evaluates losses by itself gets where somebody has a range: a refusal."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, what: str) -> Any:
        raise TypeError(
            f"solve: {self._name!r} is moved in the free coordinates of its range, which a rule of play that evaluates "
            "the players' losses by itself does not know. Give it a tensor as init, and map it to the range in the "
            "losses, or use a response."
        )


def _observed(observe: Observe, variables: Mapping[str, Variables], record: Record) -> Record:
    """Further numbers of a record, by `solve(record=)`."""
    found = observe(variables)
    if not isinstance(found, Mapping):
        raise TypeError(f"solve: record= returned a {type(found).__name__}; expected numbers by name.")
    for name, number in found.items():
        if not isinstance(name, str) or name in record:
            what = "which the history holds already" if name in record else "which is no name"
            raise ValueError(f"solve: record= returned a number {name!r}, {what}. Call it something else.")
        if isinstance(number, bool) or not (
            isinstance(number, int | float) or (isinstance(number, Tensor) and number.numel() == 1)
        ):
            raise TypeError(f"solve: record= returned {name!r} as a {type(number).__name__}; expected a number.")
    return {name: float(number) for name, number in found.items()}

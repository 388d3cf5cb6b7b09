"""A follower during one call of its response: what vanishes where it rests, its batches, its module's buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bilevel._returned import described
from bilevel.autodiff import concrete, has_tangent, pullback, transforms_active
from bilevel.constraints.functions import Constrained
from bilevel.errors import BilevelError, NonFiniteError
from bilevel.game.constrained import spread
from bilevel.game.data import Batch
from bilevel.game.others import Others
from bilevel.game.residual import Kinks, PlayedGame, Rest
from bilevel.game.rounding import (
    GradientScale,
    ResidualWithLoss,
    Size,
    beyond_rounding,
    least_terms,
    measured_terms,
    rounding,
)
from bilevel.game.situation import Buffers, Situation
from bilevel.randomness import random_kept, random_state
from bilevel.sharding.tensor import noise_like
from bilevel.tree import Structure, Variables, flatten, join, leaves, map_leaves, structure_of

Solver = TypeVar("Solver")


class Follower:
    """One follower during one call: F and its loss as functions of its leaves, its batches, its module's buffers.

    Lives as long as the call; what should outlast it (`position`, `buffers`, `gradient_count`) goes into the next
    state. What many games at once need instead is the business of a subclass that their game hands out.
    """

    def __init__(
        self,
        game: PlayedGame,
        others: Mapping[str, Variables],
        state: Mapping[str, Any],
        batch: Batch,
        further: Iterable[str] = (),
    ) -> None:
        self.game, self.name = game, str(state["follower"])
        # In each call: a process group may have come after the game and the state.
        game.require_ranks(f"The response of player {self.name!r}")
        if not isinstance(others, Others):
            self._refuse_strangers(others)
        self.inputs = {name: others[name] for name in game.reads(self.name, further) if name in others}
        """The variables of those whom it reads."""
        for name in self.inputs:
            game.check(name, others[name])
            # Steps and backward passes of the library's own would lose them, and a state would keep them.
            if any(has_tangent(leaf) for leaf in leaves(others[name])):
                raise BilevelError(
                    f"The response of player {self.name!r} was given variables of {name!r} with tangents of "
                    "torch.autograd.forward_ad, as torch.autograd.functional.jacobian(strategy='forward-mode') makes "
                    "them. For derivatives in forward mode call it inside torch.func.jvp or torch.func.jacfwd."
                )
        missing = [n for n in game.arguments(self.name) if n != self.name and n not in self.inputs]
        missing = [n for n in missing if n not in game.anticipated] if missing else missing
        if missing:
            raise ValueError(
                f"The response of player {self.name!r} needs the variables of {missing}; given are {sorted(others)}."
            )
        self.rests = game.residual(self.name).scaled(state.get("scale", 1.0))
        """F: what vanishes where it rests."""
        self.xs: list[Tensor] = leaves(self.inputs)
        """The leaves of those."""
        self.form: Structure = game.structure(self.name)
        """The layout of y, its variables."""
        self.multipliers: dict[str, Variables] = dict(state.get("multipliers") or {})
        """The last ones, of a follower with constraints, by what these are called."""
        self.unknowns: Structure = self.form if not self.multipliers else self._with_multipliers()
        """The layout of what F is a function of: y, and the multipliers after it."""
        self.position = state["data"]
        self.buffers: Buffers = {self.name: state["buffers"]} if state["buffers"] else {}
        self.rests.require_valid(Situation(game, self.name, self.others))
        self.gradient_count = 0
        self.fixed = batch is not None
        self.batch = batch
        if batch is None:
            self.advance()

    @property
    def others(self) -> dict[str, Variables]:
        """The variables of the players whom it reads, detached."""
        return map_leaves(Tensor.detach, self.inputs)  # type: ignore[no-any-return]

    @cached_property
    def input_form(self) -> Structure:
        """The layout of the variables of those whom it reads."""
        return structure_of(self.inputs)

    def situation(self, others: Mapping[str, Variables] | None = None) -> Situation:
        """Where it is on the present batch; `others` in place of their own variables, detached."""
        seen = self.others if others is None else {name: others[name] for name in self.inputs if name in others}
        return Situation(self.game, self.name, seen, self.batch, self.buffers)

    def _refuse_strangers(self, others: Mapping[str, Variables]) -> None:
        known = set(self.game.names)
        for name in others:
            if name not in known or name == self.name:
                raise ValueError(
                    f"The response of player {self.name!r} was given variables of {name!r}; expected those of the "
                    f"other players, {[n for n in self.game.names if n != self.name]}."
                )

    @property
    def symmetric(self) -> bool:
        """Whether dF/dy is symmetric, as the Hessian of a loss is."""
        return self.rests.symmetric

    @property
    def definite(self) -> bool:
        """Whether a symmetric dF/dy is positive definite at a strict minimum, as conjugate gradients need."""
        return self.rests.definite

    @property
    def minimises(self) -> bool:
        """Whether it rests at a minimum of its loss, so that a solver may go by the loss."""
        return self.rests.minimises

    @property
    def tells_its_loss(self) -> bool:
        """Whether the loss that comes with its gradient is one player's, in one game, and all of it."""
        rests = self.rests
        return rests.minimises and rests.differentiates_loss and not rests.projects and self.game.record_keys == ("",)

    def begins(self, state: Mapping[str, Any], *, warm: bool) -> tuple[list[Tensor], bool]:
        """The leaves that a call begins from, and whether it goes on with what the last call remembered.

        With `start=` they are functions of the others' variables, attached to them, and nothing goes on.
        """
        start = self.game.starting_point(self.name, self.inputs, self.batch, self.buffers)
        if start is not None:
            return leaves(start), False
        here = state["variables"] if warm else self.game.initial(self.name)
        return [leaf.detach() for leaf in leaves(here)], warm

    @property
    def constraints(self) -> Constrained | None:
        """Its programme, where functions constrain it; None where they do not."""
        return self.rests.programme(self)

    def advance(self) -> None:
        """Move on to the next batch, unless one batch was given for the whole call."""
        if not self.fixed:
            self.batch, self.position = self.game.draw(self.name, self.position)

    def loss(self, y: Variables, others: Mapping[str, Variables], *, advance_buffers: bool = False) -> Tensor:
        """The follower's loss on the present batch."""
        variables = {**others, self.name: y}
        loss, buffers = self.game.evaluate(self.name, variables, self.batch, self.buffers)
        if advance_buffers and self.buffers:
            self.buffers = {self.name: buffers.get(self.name, self.buffers[self.name])}
        return loss

    def gradients(self, y: list[Tensor], others: Mapping[str, Variables] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Loss and F in the follower's leaves on the present batch; its module's buffers advance.

        F is the gradient of the loss, unless the follower says otherwise.
        """
        if not isinstance(y, (list, tuple)) or [leaf.shape for leaf in y] != list(self.form.shapes):
            self._refuse_leaves(y)
        loss, slopes, self.buffers = self.rests(self.situation(others), y)
        self.gradient_count += 1
        return loss, slopes

    def _refuse_leaves(self, y: object) -> None:
        wanted = [list(shape) for shape in self.form.shapes]
        came = [described(leaf) for leaf in y] if isinstance(y, (list, tuple)) else described(y)
        raise ValueError(
            f"The gradients of player {self.name!r} were asked for at {came}; expected a list of its leaves, of shapes "
            f"{wanted}. form.split(vector) makes them of one vector, and leaves(variables) of its variables."
        )

    def count(self, gradients: int) -> None:
        """So many more gradients were taken."""
        self.gradient_count += gradients

    # What F is a function of --------------------------------------------------------------------------------------

    def first(self) -> dict[str, Any]:
        """What a fresh state holds of the unknowns besides the variables."""
        return self.rests.first(self)

    def brought_to_rest(self, y: Sequence[Tensor]) -> Rest:
        """All unknowns where an inner solver ended at the leaves y."""
        return self.rests.brought_to_rest(self, y)

    def as_unknowns(self, state: Mapping[str, Any]) -> Tensor:
        """A state's variables and multipliers as one vector."""
        return flatten((state["variables"], self.multipliers))

    def answer(self, unknowns: Tensor) -> Variables:
        """The variables in a vector of all unknowns."""
        return self.form.unflatten(unknowns[: self.form.size])

    def kept(self, unknowns: Tensor) -> dict[str, Any]:
        """What a state keeps of a vector of all unknowns."""
        if not self.multipliers:
            return {"variables": self.answer(unknowns)}
        variables, multipliers = self.unknowns.unflatten(unknowns)
        return {"variables": variables, "multipliers": multipliers}

    def _with_multipliers(self) -> Structure:
        return structure_of((self.form.unflatten(torch.empty(self.form.size, device="meta")), self.multipliers))

    def field(self, y: list[Tensor], others: Mapping[str, Variables] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Loss and what a step goes along, F or the gradient whose step is projected; as `gradients` otherwise."""
        if not isinstance(y, (list, tuple)) or [leaf.shape for leaf in y] != list(self.form.shapes):
            self._refuse_leaves(y)
        loss, slopes, self.buffers = self.rests.field(self.situation(others), y)
        self.gradient_count += 1
        return loss, slopes

    def at_rest(
        self, y: Sequence[Tensor], slopes: Sequence[Tensor], others: Mapping[str, Variables] | None = None
    ) -> list[Tensor]:
        """F, from what a step goes along."""
        return self.rests.at_rest(self.situation(others), y, slopes)

    def settled(self, z: Sequence[Tensor], step: Any = 1.0) -> list[Tensor]:
        """Where a step that led to z ends: z projected, where the follower has a domain or a proximal map."""
        return self.rests.settled(self.situation(), z, step)

    @property
    def bounds(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """The bounds of each entry, where it minimises its loss within bounds alone."""
        return self.rests.bounds(self.situation())

    def next_state(
        self,
        state: Mapping[str, Any],
        y: Sequence[Tensor],
        residual: Sequence[Tensor],
        *,
        gradients: int = 0,
        products: int = 0,
    ) -> dict[str, Any]:
        """The state after a call: a new dict, with whatever else the old one held.

        Args:
            state: the state that the call was given, which stays as it is.
            y: the follower's leaves in answer; they are copied.
            residual: F there, in the same leaves.
            gradients: gradients of the call beyond those that `gradients` counted.
            products: Hessian-vector products of the call, those of one backward pass included.

        Inside a `torch.func` transform it is `state` itself: new tensors would leak out of the transform.
        """
        if transforms_active():
            return dict(state)
        return {
            **state,
            "variables": self.form.build([leaf.detach().clone() for leaf in y]),
            "data": self.position,
            "buffers": self.buffers.get(self.name, {}),
            "gradients": state["gradients"] + self.gradient_count + gradients,
            "products": state["products"] + products,
            "stationarity": self.relative(self.norm(residual), state),
        }

    def measured_scale(self, y: Sequence[Tensor], products: int = 12) -> Any:
        """1 / L for the largest curvature L at y, by power iteration: a float, or of many games a tensor `[count]`.

        It underestimates L by little: what depends on it needs its size and not its digits.
        """
        game, field, here = self.game, self.rests.field, self.situation()
        generator = torch.Generator().manual_seed(0)

        def slope(flat: Tensor) -> Tensor:
            with random_kept(game.device):
                return field.flat(here, flat)[1]

        with torch.no_grad():
            flat = join([leaf.detach() for leaf in y])
            value, pulled = pullback(slope, flat)
            steep, length = self.norm(self.form.split(value.detach())), self.norm(list(y))
            v = self.probe(flat, generator)
            norms = game.norms(self.form.split(v)) * float(value.requires_grad)  # a linear loss has no curvature
            for _ in range(products if value.requires_grad else 0):
                unit = [leaf / spread(torch.where(norms > 0.0, norms, 1.0), leaf) for leaf in self.form.split(v)]
                v = pulled(join(unit))[0]
                norms = game.norms(self.form.split(v))
        # A loss without curvature: a step of the size of y itself, or of 1.
        flatter = torch.as_tensor(steep).to(norms) / torch.as_tensor(length).to(norms).clamp(min=1.0)
        curvature = torch.where(norms > 1e-6 * flatter, norms, flatter)
        usable = torch.isfinite(curvature) & (curvature > 0.0)
        found = 1.0 / torch.where(usable, curvature, 1.0)
        return found if found.ndim else float(found)

    def probe(self, flat: Tensor, generator: torch.Generator) -> Tensor:
        """Noise in the form of its variables as one vector."""
        return noise_like(flat, generator)

    def held_residual(self) -> HeldResidual:
        """F(y, *xs), for ever on the present batch, buffers and random numbers."""
        return HeldResidual(self)

    def held_loss(self) -> HeldLoss:
        """f(y, *xs), for ever on the present batch, buffers and random numbers."""
        return HeldLoss(self)

    # What differs where a follower stands for many games ---------------------------------------------------------

    def norm(self, slopes: Sequence[Tensor]) -> Size:
        """The norm of F."""
        return concrete(self.game.norms(slopes))

    def sizes(self, slopes: Sequence[Tensor]) -> list[Tensor]:
        """The largest entry of each leaf of F, or what else is finite where all entries are: 0-d tensors."""
        return [torch.linalg.vector_norm(slope, ord=torch.inf) for slope in slopes]

    def inner(self, first: Tensor, second: Tensor) -> Tensor:
        """The dot product of two vectors `[n]` that are laid out as its variables, a 0-d tensor."""
        return torch.dot(first, second)

    # What F is measured by ---------------------------------------------------------------------------------------

    def measured(self, slopes: Sequence[Tensor], unknowns: Tensor) -> dict[str, Size]:
        """What a fresh state holds of the size of F: its norm at the start, and that of its terms.

        Costs three evaluations of F; none inside a `torch.func` transform, out of which new tensors would leak.
        """
        norm = self.norm(slopes)
        if transforms_active():
            return {"reference": norm, "terms": 0.0 * norm}
        with random_kept(self.game.device):
            found = measured_terms(self, self.held_residual(), unknowns)
        return {"reference": norm, "terms": least_terms(found)}

    def measure(self, state: Mapping[str, Any], begins: Sequence[Tensor] | None = None) -> GradientScale:
        """What F is measured by: its norm at the start of the game, and above its rounding in any case.

        A follower that starts at its optimum has nothing but rounding there. Then it is the largest norm with which a
        call began; `begins` are the leaves where this one does, and F there costs a gradient, of such a follower alone.
        """
        found = GradientScale(state["reference"], state["terms"], _dtype(state))
        if begins is None or bool(torch.as_tensor(found.tells).all()):
            return found
        return found.begun(self._norm_at(begins))

    def _norm_at(self, begins: Sequence[Tensor]) -> Size:
        """The norm of F at some leaves; neither buffers nor random numbers go on."""
        buffers = self.buffers
        with torch.no_grad(), random_kept(self.game.device):
            _, slopes = self.gradients(list(begins))
        self.buffers = buffers
        return self.norm(slopes)

    @property
    def owners(self) -> list[list[int]]:
        """The places among the unknowns' leaves of each player who makes it up; all of them, of one player."""
        members = self.game.members(self.name)
        if self.multipliers or members == (self.name,):
            return [list(range(len(self.unknowns.shapes)))]
        places = self.form.build(range(len(self.form.shapes)))  # type: ignore[arg-type]
        return [leaves(places[member]) for member in members]

    def noise(self, unknowns: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal numbers in the form of its unknowns."""
        return noise_like(unknowns, generator) if self.multipliers else self.probe(unknowns, generator)

    def relative(self, slopes_norm: Size, state: Mapping[str, Any]) -> Size:
        """A norm of F in units of the one at the start of the game."""
        return slopes_norm / self.measure(state).shown

    def missed(
        self, scale: GradientScale, tolerance: float, slope: Tensor, residual: ResidualWithLoss, unknowns: Tensor
    ) -> tuple[tuple[str, list[int] | None] | None, GradientScale]:
        """How far F `[n]` at its unknowns is above a tolerance, as `shortfall` says it, and what it is measured by now.

        What is no more than rounding is not above it: where that may be so, it costs three evaluations of F.
        """
        norm = self.norm(self.unknowns.split(slope))
        threshold = scale.threshold(tolerance)
        if bool(torch.as_tensor(norm <= threshold).all()):
            return None, scale
        # Farther from 0 than where they were measured, the terms may have grown by what F was there.
        likely = 10.0 * rounding(scale.terms + scale.unit, slope.dtype)
        if len(self.owners) > 1 or bool(torch.as_tensor(norm <= likely).any()):
            found = measured_terms(self, residual, unknowns)
            scale = GradientScale(scale.reference, least_terms(found), slope.dtype)
            norm = beyond_rounding(self, slope, found)
            threshold = scale.threshold(tolerance)
        return self.shortfall(norm, threshold, norm / scale.unit), scale

    def shortfall(self, norm: Size, threshold: Size, relative: Size) -> tuple[str, list[int] | None] | None:
        """How far a norm of F is above a threshold, in words, and in which games; None where it is not."""
        return None if norm <= threshold else (f"{relative:.3g} of its value at the start", None)

    def adapted_inner(self, solver: Solver) -> Solver:
        """The inner solver that finds where it rests."""
        return solver

    def adapted_linear(self, solver: Solver) -> Solver:
        """The linear solver for systems with dF/dy."""
        return solver

    @property
    def size(self) -> int:
        """How many unknowns F has; of many games, in one."""
        return self.unknowns.size

    def refuse_mixing(self, asker: str, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        """Raise `TypeError` for an optimiser that would mix what must stay apart."""
        self.game.refuse_mixing(asker, self.name, optimizer)

    def where_not_finite(self, values: Tensor) -> str:
        """In which games values are not finite, in words; nothing where there is one game."""
        return ""

    def where_loss_not_finite(self, y: Sequence[Tensor]) -> str:
        """In which games the loss at y is not finite, in words; nothing where there is one game."""
        return ""

    def told_kinks(self, kinks: Kinks) -> str:
        """Where a constraint is about to begin or to cease to hold, in words."""
        named = [
            f"{self._entry(path, place)} at its {wall} (taken {'to be held' if held else 'to be free'})"
            for path, wall, place, held in kinks
        ]
        more = f", and {len(named) - 3} more" if len(named) > 3 else ""
        return (
            f"{self.name!r} is at a kink, or too near to tell: {', '.join(named[:3])}{more}. It has two one-sided "
            "derivatives there, one with the constraint held, its multiplier being about 0, and one without it; the "
            "derivative is that of the side named. Nearby a more exact inner solve tells; a leader that comes to rest "
            "here may have its optimum at the kink, where neither derivative vanishes."
        )

    def games_of(self, kinks: Kinks) -> list[int] | None:
        """In which of many games they are; None where there is one."""
        return None

    def _entry(self, path: str, place: list[int]) -> str:
        """An entry as a user would write it."""
        return f"{self.name}{path}{place or ''}"

    # Its checks --------------------------------------------------------------------------------------------------

    def require_loss(self, asker: str) -> None:
        """Raise `TypeError` when F is no first derivative of its loss, for who goes by the loss."""
        if self.rests.projects:
            raise TypeError(
                f"{asker} goes by the loss of player {self.name!r}, who has {self.rests.told}, which the loss does not "
                "show. Use Implicit(bilevel.inner.ProjectedGradient()), or Unrolled, whose steps are projected."
            )
        if not self.rests.differentiates_loss:
            raise TypeError(
                f"{asker} goes by the loss of player {self.name!r}, who rests where a residual of its own vanishes. "
                "Use Implicit(ScipyRoot(), linear_solver=GMRES()) or Unrolled, which follow the residual."
            )

    def require_finite(self, y: list[Tensor], advice: str, loss: float = 0.0) -> None:
        """Raise `NonFiniteError` when a solution holds NaN or infinity, or the loss at it is neither.

        Outside a loss's domain, beyond a logarithmic barrier say, the loss is NaN and its gradient may still be 0.
        """
        if not math.isfinite(loss):
            where = self.where_loss_not_finite(y)
            raise NonFiniteError(
                f"Player {self.name!r}: its loss became {loss} in its inner steps{where}: they left its "
                f"domain. {advice}"
            )
        if not math.isfinite(sum(concrete(torch.linalg.vector_norm(leaf)) for leaf in y)):
            where = self.where_not_finite(self.game.norms(y))
            raise NonFiniteError(
                f"Player {self.name!r}: its variables became NaN or infinite in its inner steps{where}. {advice}"
            )


class HeldResidual:
    """F(y, *xs), what vanishes where a follower rests, for ever on one batch, buffers and random numbers.

    Maps `y: [n]` and the leaves of the others' variables to `[n]`; differentiable. `loss` is the loss at the last call.
    """

    def __init__(self, follower: Follower) -> None:
        self._follower, self._batch, self._buffers = follower, follower.batch, follower.buffers
        self._random = random_state(follower.game.device)
        self.loss = math.nan

    def on(self, batch: Batch, turn: int) -> HeldResidual:
        """The same on another batch, with other random numbers for each `turn`."""
        other, device = copy(self), self._follower.game.device
        other._batch, other.loss = batch, math.nan
        with random_kept(device, start=self._random):
            for kind in {torch.device("cpu"), torch.device(device.type)} if turn else ():
                torch.rand(turn, device=kind)
            other._random = random_state(device)
        return other

    @property
    def name(self) -> str:
        """The follower's."""
        return self._follower.name

    @property
    def module(self) -> nn.Module | None:
        """The follower's module; None where it is bare tensors, or several players."""
        player = self._follower.game.players.get(self.name)
        return player.init if player is not None and isinstance(player.init, nn.Module) else None

    def split(self, y: Tensor) -> dict[str, Tensor]:
        """A module's parameters in `y: [n]`, by name."""
        return dict(self._follower.form.unflatten(y))

    def call(
        self, function: Callable[..., Any], y: Tensor, xs: Sequence[Tensor], extra: Mapping[str, Variables]
    ) -> Any:
        """A function of the players' variables at y `[n]`, called as the follower's loss is; with what is `extra`."""
        here = self._situation(self._follower.input_form.build(xs))
        with random_kept(here.game.device, start=self._random):
            return here.call(function, here.at_flat(y), extra)[0]

    def _situation(self, others: Mapping[str, Variables]) -> Situation:
        return Situation(self._follower.game, self._follower.name, others, self._batch, self._buffers)

    def kinks(self, y: Tensor, *xs: Tensor) -> Kinks:
        """Where F has no derivative at y `[n]`, as far as is known."""
        follower = self._follower
        if not follower.rests.projects:
            return []
        others, leaves_ = follower.input_form.build([x.detach() for x in xs]), follower.form.split(y.detach())
        with random_kept(follower.game.device, start=self._random):
            return follower.rests.kinks(self._situation(others), leaves_)

    def __call__(self, y: Tensor, *xs: Tensor) -> Tensor:
        """F there."""
        follower = self._follower
        here = self._situation(follower.input_form.build(xs))
        # Hold the dropout mask as well as the batch: a linear solver needs one fixed operator.
        with random_kept(follower.game.device, start=self._random):
            value, residual = follower.rests.flat(here, y)
        if not transforms_active():
            self.loss = float(value.detach())
        return residual


class HeldLoss:
    """f(y, *xs), a follower's loss, for ever on one batch, buffers and random numbers.

    Maps `y: [n]` and the leaves of the others' variables to a 0-d tensor; differentiable.
    """

    def __init__(self, follower: Follower) -> None:
        self._follower, self._batch, self._buffers = follower, follower.batch, follower.buffers
        self._random = random_state(follower.game.device)

    def on(self, batch: Batch) -> HeldLoss:
        """The same on another batch."""
        other = copy(self)
        other._batch = batch
        return other

    def __call__(self, y: Tensor, *xs: Tensor) -> Tensor:
        """The loss there."""
        follower = self._follower
        others = follower.input_form.build(xs)
        here = Situation(follower.game, follower.name, others, self._batch, self._buffers)
        with random_kept(follower.game.device, start=self._random):
            return here.loss(here.at_flat(y))[0]


def _dtype(state: Mapping[str, Any]) -> torch.dtype:
    found: torch.dtype = leaves(state["variables"])[0].dtype
    return found

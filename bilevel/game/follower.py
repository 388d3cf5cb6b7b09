"""A follower during one call of its response: what vanishes where it rests, its batches, its module's buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from bilevel.autodiff import concrete, transforms_active
from bilevel.errors import NonFiniteError
from bilevel.game.data import Batch
from bilevel.game.residual import Buffers, PlayedGame
from bilevel.randomness import random_kept, random_state
from bilevel.tree import Structure, Variables, leaves, structure_of

Size = Any
"""A float; of many games a tensor `[count]` with one for each."""

Solver = TypeVar("Solver")


class Follower:
    """One follower during one call: F and its loss as functions of its leaves, its batches, its module's buffers.

    Lives as long as the call; what should outlast it (`position`, `buffers`, `gradient_count`) goes into the next
    state. What many games at once need instead is the business of a subclass that their game hands out.
    """

    def __init__(
        self, game: PlayedGame, others: Mapping[str, Variables], state: Mapping[str, Any], batch: Batch
    ) -> None:
        self.game, self.name = game, str(state["follower"])
        for name in others:
            if name not in game.names or name == self.name:
                raise ValueError(
                    f"The response of player {self.name!r} was given variables of {name!r}; expected those of the "
                    f"other players, {[n for n in game.names if n != self.name]}."
                )
            game.check(name, others[name])
        missing = [n for n in game.arguments(self.name) if n != self.name and n not in others]
        missing = [n for n in missing if n not in game.anticipated]
        if missing:
            raise ValueError(
                f"The response of player {self.name!r} needs the variables of {missing}; given are {sorted(others)}."
            )
        self.rests = game.residual(self.name)
        """F: what vanishes where it rests."""
        self.inputs = dict(others)
        self.xs: list[Tensor] = leaves(self.inputs)
        """The leaves of the others' variables."""
        self.input_form = structure_of(self.inputs)
        self.form: Structure = game.structure(self.name)
        self.position = state["data"]
        self.buffers: Buffers = {self.name: state["buffers"]} if state["buffers"] else {}
        self.gradient_count = 0
        self.fixed = batch is not None
        self.batch = batch
        if batch is None:
            self.advance()

    @property
    def others(self) -> dict[str, Variables]:
        """The other players' variables, detached."""
        return self.input_form.build([x.detach() for x in self.xs])  # type: ignore[no-any-return]

    @property
    def symmetric(self) -> bool:
        """Whether dF/dy is symmetric, as the Hessian of a loss is."""
        return self.rests.symmetric

    @property
    def minimises(self) -> bool:
        """Whether it rests at a minimum of its loss, so that a solver may go by the loss."""
        return self.rests.minimises

    def begins(self, state: Mapping[str, Any], *, warm: bool) -> tuple[list[Tensor], bool]:
        """The leaves that a call begins from, and whether it goes on with what the last call remembered.

        With `start=` they are functions of the others' variables, attached to them, and nothing goes on.
        """
        start = self.game.starting_point(self.name, self.inputs, self.batch, self.buffers)
        if start is not None:
            return leaves(start), False
        here = state["variables"] if warm else self.game.initial(self.name)
        return [leaf.detach() for leaf in leaves(here)], warm

    def advance(self) -> None:
        """Move on to the next batch, unless one batch was given for the whole call."""
        if not self.fixed:
            self.batch, self.position = self.game.draw(self.name, self.position)

    def loss(self, y: Variables, others: Mapping[str, Variables], *, advance_buffers: bool = False) -> Tensor:
        """The follower's loss on the present batch."""
        variables = {**others, self.name: y}
        loss, buffers = self.game.evaluate(self.name, variables, self.batch, self.buffers)
        if advance_buffers and self.buffers:
            self.buffers = {self.name: buffers[self.name]}
        return loss

    def gradients(self, y: list[Tensor], others: Mapping[str, Variables] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Loss and F in the follower's leaves on the present batch; its module's buffers advance.

        F is the gradient of the loss, unless the follower says otherwise.
        """
        given = self.others if others is None else others
        loss, slopes, self.buffers = self.rests(self.game, self.name, y, given, self.batch, self.buffers)
        self.gradient_count += 1
        return loss, slopes

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

    def reference(self, slopes: Sequence[Tensor]) -> Size:
        """What stationarity is told in units of: the norm of F at the start, or 1 where that is 0."""
        norm = float(self.game.norms(slopes))
        return norm if norm > 0.0 else 1.0

    def relative(self, slopes_norm: Size, state: Mapping[str, Any]) -> Size:
        """A norm of F in units of the one at the start of the game."""
        return slopes_norm / self.unit(state)

    def unit(self, state: Mapping[str, Any]) -> Size:
        """What its stationarity is told in units of: the norm of F at the start of the game."""
        return state["reference"]

    def shortfall(self, norm: Size, threshold: Size, relative: Size) -> tuple[str, list[int] | None] | None:
        """How far a norm of F is above a threshold, in words, and in which games; None where it is not."""
        return None if norm <= threshold else (f"{relative:.3g} of its value at the start", None)

    def adapted_inner(self, solver: Solver) -> Solver:
        """The inner solver that finds where it rests."""
        return solver

    def adapted_linear(self, solver: Solver) -> Solver:
        """The linear solver for systems with dF/dy."""
        return solver

    def refuse_mixing(self, asker: str, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        """Raise `TypeError` for an optimiser that would mix what must stay apart."""
        self.game.refuse_mixing(asker, self.name, optimizer)

    def where_not_finite(self, values: Tensor) -> str:
        """In which games values are not finite, in words; nothing where there is one game."""
        return ""

    def where_loss_not_finite(self, y: Sequence[Tensor]) -> str:
        """In which games the loss at y is not finite, in words; nothing where there is one game."""
        return ""

    # Its checks --------------------------------------------------------------------------------------------------

    def require_loss(self, asker: str) -> None:
        """Raise `TypeError` when F is no first derivative of its loss, for who goes by the loss."""
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

    def __call__(self, y: Tensor, *xs: Tensor) -> Tensor:
        """F there."""
        follower = self._follower
        game, name = follower.game, follower.name
        others = follower.input_form.build(xs)
        # Hold the dropout mask as well as the batch: a linear solver needs one fixed operator.
        with random_kept(game.device, start=self._random):
            value, residual = follower.rests.flat(game, name, y, others, self._batch, self._buffers)
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

    def __call__(self, y: Tensor, *xs: Tensor) -> Tensor:
        """The loss there."""
        follower = self._follower
        game, name = follower.game, follower.name
        variables = {**follower.input_form.build(xs), name: follower.form.unflatten(y)}
        with random_kept(game.device, start=self._random):
            return game.total(game.evaluate(name, variables, self._batch, self._buffers)[0])

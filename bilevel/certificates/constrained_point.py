"""A leader and a follower within constraints, held at a point, and the smooth pieces of the follower's answer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bilevel.autodiff import gradient, jacobian
from bilevel.certificates.point import Answer, pushed_along
from bilevel.constraints.active_set import KKTPoint, judged, optimum, reached
from bilevel.constraints.equilibrium import require_regular_equilibrium
from bilevel.constraints.functions import EQUALITIES, INEQUALITIES, entry_names
from bilevel.constraints.regularity import require_feasible, require_regular
from bilevel.errors import ConvergenceError, CurvatureError
from bilevel.game import Buffers, Game
from bilevel.game.data import Batch
from bilevel.game.joint import JointProgramme
from bilevel.game.kkt import plain, stacked_values
from bilevel.game.running import moving_from
from bilevel.game.situation import Situation
from bilevel.randomness import random_kept, random_state
from bilevel.responses import Response
from bilevel.responses.base import State
from bilevel.second_order import differentiated_twice
from bilevel.tree import Variables, flatten, leaves, map_leaves

MOST_UNKNOWNS = 1000
"""So many unknowns, of both players and multipliers, or fewer have their second derivatives written down."""
MOST_KINKS = 8
"""So many constraints of the follower with a multiplier of 0 or fewer have their sides looked at, 256 pieces."""


@dataclass(frozen=True, eq=False)
class Piece:
    """The leader's programme where the follower keeps to one set of binding constraints; all float64 on the CPU.

    Attributes:
        held: Which of the constraints at a kink this piece takes to bind, by name.
        gradient: The hypergradient `[n]`.
        direct: Its part without the follower's moves `[n]`.
        c: The leader's inequalities `[k]`, and then, in `rows` alone, what keeps the piece.
        rows: The gradients in x of the inequalities `[k + w, n]`.
        e: The leader's equalities `[q]`.
        level: Their gradients `[q, n]`.
        moves: dz/dx `[N, n]` of the follower's unknowns.
        condition: The condition number of the follower's system.
        curved: For multipliers of `rows` and `level`, the total Hessian `[n, n]` of the leader's Lagrangian, and its
            noise.
    """

    held: tuple[str, ...]
    gradient: Tensor
    direct: Tensor
    c: Tensor
    rows: Tensor
    e: Tensor
    level: Tensor
    moves: Tensor
    condition: float
    curved: Callable[[Tensor, Tensor], tuple[Tensor, float]]


class ConstrainedPoint:
    """One batch of each of the two players, the modules' buffers and random numbers, for as long as this lives."""

    def __init__(
        self,
        game: Game,
        leader: str,
        follower: str,
        variables: Mapping[str, Variables],
        *,
        buffers: Buffers,
        batches: Mapping[str, Batch],
        seed: int,
    ) -> None:
        if game.members(leader) != (leader,):
            raise ValueError(
                f"certify: leader {leader!r} is {list(game.members(leader))} together, and somebody has constraints. "
                "Name one of them as leader=."
            )
        for name in (leader, follower):
            game.require_twice(name)
        self.original, self.leader, self.follower, self.seed = game, leader, follower, seed
        self.game = game.by_functions(leader, "certify").by_functions(follower, "certify")
        self.variables, self.buffers = dict(variables), buffers
        self.batches = {
            name: batches[name] if name in batches else game.draw(name, game.start(name, seed))[0]
            for name in (leader, follower)
        }
        self.others = {name: v for name, v in variables.items() if name != follower}
        state = {"follower": follower, "data": None, "buffers": buffers.get(follower, {})}
        state |= self.game.follower(self.others, state, self.batches[follower], further=self.others).first()
        self.held = self.game.follower(self.others, state, self.batches[follower], further=self.others)
        self.held.buffers = buffers
        self.residual, self.random = self.held.held_residual(), random_state(game.device)
        here = {name: map_leaves(Tensor.detach, v) for name, v in variables.items()}
        self._moved = moving_from(self.game, follower, here, self.held.batch, buffers)
        self.programme: Any = self.held.constraints
        self.form = self.game.structure(leader)
        self.x, self.y = flatten(variables[leader]).detach(), flatten(variables[follower]).detach()
        mine = {id(leaf) for leaf in leaves(self.others[leader])}
        self.mine = [index for index, leaf in enumerate(self.held.xs) if id(leaf) in mine]
        unknowns = self.held.unknowns.size + len(self.x)
        if unknowns > MOST_UNKNOWNS:
            raise ValueError(
                f"certify: {leader!r}, {follower!r} and the multipliers are {unknowns:,} unknowns, and within "
                f"constraints all second derivatives are written down, for up to {MOST_UNKNOWNS:,}. "
                "testing.check_hypergradient holds the hypergradient against re-solved followers; certify_nash looks "
                "at one player."
            )
        self.generator = torch.Generator().manual_seed(seed)
        self.count_gradients = self.count_products = 0
        with torch.no_grad():
            kinds = self._leaders_values(self.x, self.y)
        names = {kind: entry_names(kind, tree) for kind, tree in kinds.items()}
        self.inequalities = tuple(name for kind in INEQUALITIES for name in names.get(kind, ()))
        self.equalities = tuple(name for kind in EQUALITIES for name in names.get(kind, ()))
        self.reference = self._leader_at_start()

    # Functions of x and of the follower's unknowns z = (y, l, m) ------------------------------------------------------

    def _every(self, x: Tensor) -> list[Tensor]:
        every, mine = list(self.held.xs), self.form.split(x)
        for index, leaf in zip(self.mine, mine, strict=True):
            every[index] = leaf
        return every

    def _at(self, x: Tensor, y: Tensor) -> dict[str, Variables]:
        return {**self.held.input_form.build(self._every(x)), self.follower: self.held.form.unflatten(y)}

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        with random_kept(self.game.device, start=self.random):
            at = self._at(x, y)
            found = self.game.evaluate(self.leader, at, self.batches[self.leader], self._moved(at))[0]
        return found + 0.0 * (x.sum() + y.sum())  # it may depend on one of them alone

    def _leaders_values(self, x: Tensor, y: Tensor) -> dict[str, Variables]:
        rests: Any = self.game.residual(self.leader)
        with random_kept(self.game.device, start=self.random):
            at = self._at(x, y)
            here = Situation(self.game, self.leader, at, self.batches[self.leader], self._moved(at))
            found: dict[str, Variables] = rests.values(here, at)
        return found

    def _followers_values(self, x: Tensor, y: Tensor) -> Tensor:
        rests: Any = self.game.residual(self.follower)
        with random_kept(self.game.device, start=self.random):
            at = self._at(x, y)
            found = rests.values(Situation(self.game, self.follower, at, self.held.batch, self.buffers), at)
        inside: Tensor = stacked_values(found, y)
        return inside

    def _leader_at_start(self) -> float:
        start = {name: self.game.initial(name) for name in self.game.names}

        def loss(x: Tensor) -> Tensor:
            with random_kept(self.game.device, start=self.random):
                at = {**start, self.leader: self.form.unflatten(x)}
                found = self.game.loss(self.leader, at, self.batches[self.leader], self.game.buffers())
            return found + 0.0 * x.sum()

        with torch.no_grad():
            self.count_gradients += 1
            return float(gradient(loss, flatten(start[self.leader]))[1][0].norm())

    # The follower -----------------------------------------------------------------------------------------------------

    def settled(self) -> KKTPoint:
        """The follower's optimum near where it is; raises what makes it none, or one without a derivative, by name."""
        programme = self.programme
        point = optimum(programme, plain(self.y))
        require_feasible(point, programme.labels, programme.epsilon)
        if not reached(point, programme.epsilon):
            raise ConvergenceError(
                f"Newton's method does not reach an optimum of {self.follower!r} from here (error {point.error:.2g}): "
                "solve its problem further"
            )
        if isinstance(programme, JointProgramme):
            require_regular_equilibrium(point, programme.labels, programme.places, programme.epsilon)
        else:
            require_regular(programme, point)
        return point

    def given(self) -> KKTPoint:
        """The follower where it is, with the multipliers that suit best."""
        return judged(self.programme, plain(self.y))

    # Pieces -----------------------------------------------------------------------------------------------------------

    def pieces(self, point: KKTPoint, bent: Tensor) -> list[Piece]:
        """The leader's programme on every side of the constraints at a kink, `bent: [m]`."""
        places = bent.nonzero().flatten().tolist()
        return [
            self.piece(point, places, tuple(place for place, on in zip(places, sides, strict=True) if on))
            for sides in product((True, False), repeat=len(places))
        ]

    def piece(self, point: KKTPoint, bent: list[int], held: tuple[int, ...]) -> Piece:
        """That in which of the constraints `bent` those in `held` bind."""
        n, size = len(self.x), self.held.form.size
        l = point.l.clone()
        for place in bent:
            # Bound by the smallest number above 0: F reads off its multipliers which constraints bind.
            tiny = torch.finfo(torch.float32).tiny
            l[place] = max(float(l[place]), tiny) if place in held else 0.0
        z = torch.cat([point.y, l, point.m]).to(self.y)
        v = torch.cat([z, self.x])
        N = len(z)

        def follows(v: Tensor) -> Tensor:
            return self.residual(v[:N], *self._every(v[N:]))

        def leads(v: Tensor) -> Tensor:
            x, z, y = v[N:], v[:N], v[:size]
            found = [self._loss(x, y).reshape(1), stacked_values(self._leaders_values(x, y), y)]
            if bent:
                inside = self._followers_values(x, y)
                keeps = [-z[size + place] if place in held else inside[place] for place in bent]
                found.append(torch.stack(keeps))
            return torch.cat(found)

        with differentiated_twice():
            rows = plain(jacobian(follows, v)[1])
            values, wanted = (plain(part) for part in jacobian(leads, v))
        self.count_products += N
        self.count_gradients += len(values)
        system = rows[:, :N]
        factors = torch.linalg.svdvals(system)
        condition = float(factors[0] / factors[-1]) if len(factors) and float(factors[-1]) > 0.0 else float("inf")
        if not condition < 0.1 / self.programme.epsilon:
            raise CurvatureError(f"the system of {self.follower!r}'s conditions is singular to rounding")
        moves = -torch.linalg.solve(system, rows[:, N:])
        total = wanted[:, N:] + wanted[:, :N] @ moves
        k, q = len(self.inequalities), len(self.equalities)

        def curved(above: Tensor, level: Tensor) -> tuple[Tensor, float]:
            weights = torch.cat([torch.ones(1, dtype=above.dtype), above[:k], level, above[k:]])
            adjoint = torch.linalg.solve(system.T, -(weights @ wanted[:, :N]))

            def lagrangian(v: Tensor) -> Tensor:
                total: Tensor = leads(v) @ weights.to(v) + follows(v) @ adjoint.to(v)
                return total

            with torch.enable_grad(), differentiated_twice():
                _, second = jacobian(lambda v: gradient(lagrangian, v)[1][0], v)
            self.count_products += len(v)
            second = plain(0.5 * (second + second.T))
            along = torch.cat([moves, torch.eye(n, dtype=moves.dtype)])
            size_of = float(second.abs().max()) * float(torch.linalg.matrix_norm(along, 2)) ** 2
            return along.T @ second @ along, 100.0 * self.programme.epsilon * (n + condition) * size_of

        return Piece(
            held=tuple(self.programme.labels.inequality[place] for place in held),
            gradient=total[0],
            direct=wanted[0, N:],
            c=values[1 : 1 + k],
            rows=torch.cat([total[1 : 1 + k], total[1 + k + q :]]),
            e=values[1 + k : 1 + k + q],
            level=total[1 + k : 1 + k + q],
            moves=moves,
            condition=condition,
            curved=curved,
        )

    # A response's answer ----------------------------------------------------------------------------------------------

    def answer(self, response: Response, state: State | None) -> Answer:
        """What a response answers at the point, from a state of its own or a fresh one."""
        start = response.init(self.original, follower=self.follower, seed=self.seed) if state is None else state
        tracked = map_leaves(lambda t: t.detach().clone().requires_grad_(), self.others)
        with torch.enable_grad(), warnings.catch_warnings(), random_kept(self.game.device):
            warnings.simplefilter("ignore")  # what they would say is what is measured here
            answer, _ = response(self.original, tracked, start, self.held.batch)
            mine = leaves(tracked[self.leader])
            at = {**tracked, self.follower: answer}
            loss = self.original.evaluate(self.leader, at, self.batches[self.leader], self._moved(at))[0]
            slopes = torch.autograd.grad(loss, mine, retain_graph=True, materialize_grads=True)
        self.count_gradients += 1
        return Answer(flatten(answer), mine, flatten(list(slopes)).detach())

    def directional(self, answer: Answer, piece: Piece) -> tuple[Tensor, Tensor]:
        """J e by the response, and by a piece, `[m]` each, in a fresh Gaussian direction e."""
        direction = torch.randn(len(self.x), generator=self.generator, dtype=torch.float64)
        parts = self.form.split(direction.to(self.x))
        moved = pushed_along(
            lambda v: torch.autograd.grad(answer.y, answer.mine, v, create_graph=True, materialize_grads=True),
            answer.y,
            parts,
        )
        return plain(moved), piece.moves[: self.held.form.size] @ direction

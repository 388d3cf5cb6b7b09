"""A game's functions read off as the coefficients of a programme, and held against the functions themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bilevel.autodiff import gradient, jacobian
from bilevel.constraints.functions import EQUALITIES, INEQUALITIES, entry_names
from bilevel.game import Game
from bilevel.game.constrained import ConstrainedGradient
from bilevel.game.kkt import KKT
from bilevel.game.residual import OwnGradient
from bilevel.game.situation import Situation
from bilevel.tree import Variables, flatten, structure_of

Array = NDArray[np.float64]

ROUNDING = 1e-9
"""Of a value, in units of the sum of its terms' sizes: far above float64's rounding, far below any curvature."""


@dataclass(frozen=True, eq=False)
class Rows:
    """matrix z <= right, or = right: `[k, n + m]`, `[k]`."""

    matrix: Array
    right: Array
    names: tuple[str, ...]

    def joined(self, other: Rows) -> Rows:
        """Both."""
        return Rows(
            np.vstack([self.matrix, other.matrix]), np.append(self.right, other.right), (*self.names, *other.names)
        )


@dataclass(frozen=True, eq=False)
class Claim:
    """That a function of z is what was read off: `model`, whose terms have the sizes `size`."""

    told: str
    names: tuple[str, ...]
    exact: Callable[[Tensor], Tensor]
    model: Callable[[Array], Array]
    size: Callable[[Array], Array]

    def require(self, points: Sequence[Array]) -> None:
        """Raise `ValueError`, naming the entry and by how much it differs, where it is not."""
        for point in points:
            with torch.no_grad():
                came = self.exact(torch.as_tensor(point)).detach().numpy()
            expected = self.model(point)
            off = np.abs(came - expected)
            wrong = ~(off <= ROUNDING * (1.0 + self.size(point)))
            if wrong.any():
                i = int(np.argmax(np.where(np.isnan(off), np.inf, off) * wrong))
                raise ValueError(
                    f"solve_globally: {self.told}: {self.names[i]} is {came[i]:.8g} where the players' entries are "
                    f"{np.array2string(point, precision=4, threshold=8)}, and {expected[i]:.8g} by the coefficients "
                    "read off at the start. Play it by solve(...), which takes any smooth function."
                )


@dataclass(frozen=True, eq=False)
class Programme:
    """min F over z = (x, y), `[n + m]`, within rows of the leader's, where y minimises f within rows of its own.

    F = z'Hz / 2 + g'z + constant, and the gradient of f in y is `slope` z + `start`.
    """

    n: int
    m: int
    H: Array
    g: Array
    constant: float
    slope: Array
    start: Array
    upper: Rows
    upper_equal: Rows
    lower: Rows
    lower_equal: Rows
    claims: tuple[Claim, ...] = field(repr=False)
    form: Mapping[str, Variables] = field(repr=False)

    @property
    def quadratic(self) -> bool:
        """Whether the leader's loss is."""
        return bool(self.H.any())

    def loss(self, z: Array) -> float:
        """F."""
        return float(0.5 * z @ self.H @ z + self.g @ z + self.constant)

    def tangent(self, z: Array) -> tuple[Array, float]:
        """F at z to first order: (a, b) of a'z + b, which a convex F is nowhere below."""
        a = self.H @ z + self.g
        return a, self.loss(z) - float(a @ z)

    def require_read(self, points: Sequence[Array]) -> None:
        """Raise `ValueError` where a function is not what was read off."""
        for claim in self.claims:
            claim.require(points)


class Reader:
    """Reads the functions of two players at flat z = (x, y), while the others stand still."""

    def __init__(self, game: Game, leader: str, follower: str) -> None:
        self.game, self.leader, self.follower = game, leader, follower
        self.still = {name: game.initial(name) for name in game.names if name not in (leader, follower)}
        self.forms = {name: game.structure(name) for name in (leader, follower)}
        self.n, self.m = self.forms[leader].size, self.forms[follower].size
        self.batches = {name: game.draw(name, game.start(name))[0] for name in self.forms}
        self.buffers = game.buffers()
        self.z = torch.cat([flatten(game.initial(name)) for name in self.forms])
        self.constraints = {name: _kkt(game, name) for name in self.forms}

    def at(self, z: Tensor) -> dict[str, Variables]:
        """Everybody's variables."""
        x, y = self.forms[self.leader], self.forms[self.follower]
        return {**self.still, self.leader: x.unflatten(z[: self.n]), self.follower: y.unflatten(z[self.n :])}

    def loss(self, player: str, z: Tensor) -> Tensor:
        """A player's loss."""
        return self.game.loss(player, self.at(z), self.batches[player], self.buffers)

    def values(self, player: str, z: Tensor) -> dict[str, Variables]:
        """Its constraints, by kind, in the form in which its functions return them."""
        kkt = self.constraints[player]
        if kkt is None:
            return {}
        everybody = self.at(z)
        return kkt.values(Situation(self.game, player, everybody, self.batches[player], self.buffers), everybody)

    def rows(self, player: str, kinds: Sequence[str]) -> tuple[Rows, list[Claim]]:
        """Its constraints of some kinds as rows, with what is to be held against them."""

        def stacked(z: Tensor) -> Tensor:
            parts = [flatten(tree) for kind, tree in self.values(player, z).items() if kind in kinds]
            return torch.cat([part.reshape(-1) for part in parts]) if parts else z[:0]

        with torch.no_grad():
            found = self.values(player, self.z)
        names = tuple(name for kind, tree in found.items() if kind in kinds for name in entry_names(kind, tree))
        value, matrix = (part.detach().numpy() for part in jacobian(stacked, self.z))
        right = matrix @ self.z.numpy() - value
        told = f"{player!r}: a constraint is not linear in {self.leader!r} and {self.follower!r} together"
        claim = Claim(
            told, names, stacked, lambda z: matrix @ z - right, lambda z: np.abs(matrix) @ np.abs(z) + np.abs(right)
        )
        return Rows(matrix, right, names), [claim] if names else []

    def leading(self) -> tuple[Array, Array, float, Claim]:
        """H, g and the constant of the leader's loss."""

        def loss(z: Tensor) -> Tensor:
            return self.loss(self.leader, z)

        value, (slope,) = gradient(loss, self.z)
        _, second = jacobian(lambda z: gradient(loss, z)[1][0], self.z)
        z: Array = self.z.numpy()
        H: Array = 0.5 * (second + second.T).detach().numpy()
        H = np.where(np.abs(H) <= 1e-14 * np.abs(H).max(initial=0.0), 0.0, H)
        g = slope.detach().numpy() - H @ z
        constant = float(value.detach()) - float(0.5 * z @ H @ z + g @ z)

        def model(z: Array) -> Array:
            return np.array([0.5 * z @ H @ z + g @ z + constant])

        def size(z: Array) -> Array:
            p = np.abs(z)
            return np.array([0.5 * p @ np.abs(H) @ p + np.abs(g) @ p + abs(constant)])

        told = f"{self.leader!r}: its loss is neither linear nor quadratic"
        return H, g, constant, Claim(told, ("it",), lambda z: loss(z).reshape(1), model, size)

    def following(self) -> tuple[Array, Array, list[Claim]]:
        """The gradient of the follower's loss in its own variables, `slope` z + `start`."""

        def own(z: Tensor) -> Tensor:
            return gradient(lambda z: self.loss(self.follower, z), z)[1][0][self.n :]

        value, slope = (part.detach().numpy() for part in jacobian(own, self.z))
        z, n = self.z.numpy(), self.n
        start = value - slope @ z
        fixed = z[n:]

        def moved(z: Tensor) -> Tensor:
            there = torch.cat([z[:n], torch.as_tensor(fixed)])
            return (self.loss(self.follower, z) - self.loss(self.follower, there)).reshape(1)

        def model(z: Array) -> Array:
            y, x = z[n:], slope[:, :n] @ z[:n] + start
            S = slope[:, n:]
            return np.array([x @ (y - fixed) + 0.5 * (y @ S @ y - fixed @ S @ fixed)])

        def size(z: Array) -> Array:
            y, x = np.abs(z[n:]) + np.abs(fixed), np.abs(slope[:, :n]) @ np.abs(z[:n]) + np.abs(start)
            # A loss may have large terms of the leader's alone, which cancel here up to their rounding.
            offset = float(self.loss(self.follower, torch.as_tensor(z)).detach())
            return np.array([x @ y + y @ np.abs(slope[:, n:]) @ y + abs(offset)])

        told = f"{self.follower!r}: its loss is neither linear nor quadratic in its own variables"
        names = entry_names("its slope in ", self.game.initial(self.follower))
        affine = Claim(
            f"{told}, or its slope is not linear in {self.leader!r}",
            names,
            own,
            lambda z: slope @ z + start,
            lambda z: np.abs(slope) @ np.abs(z) + np.abs(start),
        )
        return slope, start, [affine, Claim(told, ("the change of its loss",), moved, model, size)]

    def programme(self, seed: int) -> Programme:
        """All coefficients, held against the functions at random points of four scales around the start.

        Raises `ValueError` for a function that is not linear or quadratic, or not convex, and says what differs.
        """
        H, g, constant, claim = self.leading()
        slope, start, claims = self.following()
        claims.append(claim)
        rows: list[Rows] = []
        for player in self.forms:
            for kinds in (INEQUALITIES, EQUALITIES):
                found, held = self.rows(player, kinds)
                rows.append(found)
                claims += held
        sides = (rows[0], rows[1], rows[2], rows[3])
        with torch.no_grad():
            form = self.values(self.follower, self.z)
        read = Programme(self.n, self.m, H, g, constant, slope, start, *sides, tuple(claims), form)
        random = np.random.default_rng(seed)
        around = [self.z.numpy() + s * random.standard_normal(len(self.z)) for s in (0.1, 1.0, 10.0, 1000.0) * 3]
        read.require_read(around)
        _require_convex(H, f"{self.leader!r}: its loss is not convex in {self.leader!r} and {self.follower!r} together")
        own = slope[:, self.n :]
        if np.abs(own - own.T).max(initial=0.0) > ROUNDING * (1.0 + np.abs(own).max(initial=0.0)):
            raise ValueError(f"solve_globally: {self.follower!r}: its slope is no gradient of a loss.")
        _require_convex(own, f"{self.follower!r}: its loss is not convex in its own variables")
        return read

    def multipliers(self, flat: Mapping[str, Array], form: Mapping[str, Variables]) -> dict[str, Variables]:
        """Multipliers of inequalities and of equalities in the form of what the functions return."""
        found: dict[str, Variables] = {}
        rest = {name: torch.as_tensor(values) for name, values in flat.items()}
        for kind, tree in form.items():
            side = "inequality" if kind in INEQUALITIES else "equality"
            size = structure_of(tree).size
            found[kind] = structure_of(tree).unflatten(rest[side][:size])
            rest[side] = rest[side][size:]
        return found


def _kkt(game: Game, player: str) -> KKT | None:
    """A player's constraints, its domain's walls among them; refuses what has none that could be said."""
    rests: Any = game.by_walls(player).residual(player)
    if isinstance(rests, KKT):
        return rests
    if isinstance(rests, OwnGradient):
        return None
    if isinstance(rests, ConstrainedGradient):
        raise ValueError(
            f"solve_globally: {player!r} has {rests.told}, which is no set of linear functions. Bounds, Simplex, "
            "Halfspace and Affine are."
        )
    raise ValueError(
        f"solve_globally: {player!r} rests where {type(rests).__name__} vanishes; expected a loss with linear "
        "functions and a domain."
    )


def _require_convex(H: Array, told: str) -> None:
    if not H.any():
        return
    lowest = float(np.linalg.eigvalsh(H)[0])
    if lowest < -1e-9 * float(np.abs(H).max()):
        raise ValueError(
            f"solve_globally: {told}: the smallest eigenvalue of its Hessian is {lowest:.4g}; expected none below 0. "
            "Play it from many starts: solve(..., starts=20)."
        )

"""A game held still as functions of two flat vectors, and its follower brought to rest by Newton's method."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.autodiff import gradient, pullback
from bilevel.game import Buffers, Game, Player
from bilevel.game.data import Batch
from bilevel.randomness import random_kept
from bilevel.tree import Variables

Product = Callable[[Tensor], Tensor]


def still(game: Game, batches: Mapping[str, Batch], random: Mapping[str, Tensor]) -> Game:
    """The same game with one batch a player for ever, whose losses draw the same random numbers at every evaluation."""

    def held(objective: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(objective)
        def loss(**arguments: object) -> Tensor:
            with random_kept(game.device, start=random):
                return objective(**arguments)

        return loss

    players = {
        name: Player(
            held(player.objective),
            player.init,
            data=None if player.data is None else [batches[name]],
            optimizer_hyper=player.optimizer_hyper,
        )
        for name, player in game.players.items()
    }
    return Game(**players)


@dataclass(frozen=True, eq=False)
class LeaderFollowerPoint:
    """Two players' losses as functions of x `[n]` of the leader and y `[m]` of the follower; all else stands still."""

    game: Game
    leader: str
    follower: str
    others: Mapping[str, Variables]
    batches: Mapping[str, Batch]
    buffers: Buffers

    def loss(self, player: str, x: Tensor, y: Tensor) -> Tensor:
        """A player's loss, a 0-d tensor."""
        moving = {
            self.leader: self.game.structure(self.leader).unflatten(x),
            self.follower: self.game.structure(self.follower).unflatten(y),
        }
        return self.game.loss(player, {**self.others, **moving}, self.batches.get(player), self.buffers)

    def value(self, x: Tensor, y: Tensor) -> float:
        """The leader's loss."""
        with torch.no_grad():
            return float(self.loss(self.leader, x, y))

    def slope(self, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
        """The follower's loss, and its gradient in y `[m]`."""
        with torch.no_grad():
            loss, (slope,) = gradient(lambda y: self.loss(self.follower, x, y), y)
        return float(loss), slope

    def residual(self, y: Tensor, x: Tensor) -> Tensor:
        """The follower's gradient `[m]`, differentiable in both."""
        # A loss that is linear in y has a gradient without y; its curvature is 0, not an error.
        return gradient(lambda y: self.loss(self.follower, x, y), y)[1][0] + 0.0 * y

    def hessian(self, x: Tensor, y: Tensor) -> Product:
        """v -> H v, one graph for all products."""
        _, products = pullback(lambda y: self.residual(y, x), y)

        def product(v: Tensor) -> Tensor:
            with torch.no_grad():
                return products(v)[0]

        return product


@dataclass(frozen=True, eq=False)
class Rest:
    """Where a follower came to rest: y `[m]`, the norm of its gradient there, and whether it shrinks no further."""

    y: Tensor
    gradient_norm: float
    products: int
    finite: bool = True


def bring_to_rest(
    held: LeaderFollowerPoint, x: Tensor, y: Tensor, *, target: float, most: int = 100, products: int = 20_000
) -> Rest:
    """A local minimum of the follower's loss near y `[m]`, by Newton's method in a trust region.

    Its steps are found by conjugate gradients. Goes on until the gradient's norm is at most `target` or rounding stops
    it from falling, for at most `most` steps and about `products` Hessian-vector products. Near the end steps are
    judged by the gradient, which rounding spoils later than the loss.
    Source: Steihaug 1983, SIAM J. Numer. Anal. 20(3).
    """
    loss, slope = held.slope(x, y)
    size = before = float(slope.norm())
    best = Rest(y, size, 0, math.isfinite(loss) and math.isfinite(size))
    if not best.finite:
        return best
    radius, used, stuck = max(1.0, float(y.norm())), 0, 0
    for step in range(most):
        if size <= target or used >= products:
            break
        # Loose while far, tight where Newton's method converges, never tighter than the target asks.
        forcing = min(0.1, max(1e-3, size / before if step else 1e-2, 0.3 * target / size))
        move, curved, count, inside = _trust_region_step(held.hessian(x, y), slope, radius, forcing * size)
        used += count
        predicted = -float(slope @ move + 0.5 * (move @ curved))
        new_loss, new_slope = held.slope(x, y + move)
        new_size = float(new_slope.norm())
        if not (math.isfinite(new_loss) and math.isfinite(new_size)):
            radius = float(move.norm()) / 4
            continue
        slack = 10 * torch.finfo(y.dtype).eps * max(abs(loss), abs(new_loss))
        if predicted <= 100 * slack and inside:
            stuck = stuck + 1 if new_size > 0.5 * size else 0
            if new_size < size:
                y, loss, slope, before, size = y + move, new_loss, new_slope, size, new_size
            else:
                radius = float(move.norm()) / 4
            if stuck == 3:
                break
            continue
        agreement = (loss - new_loss + slack) / (predicted + slack)
        if agreement < 0.25:
            radius = float(move.norm()) / 4
        elif agreement > 0.75 and not inside:
            radius *= 2
        if agreement > 1e-4:
            y, loss, slope, before, size = y + move, new_loss, new_slope, size, new_size
        elif radius < 1e-12 * (1.0 + float(y.norm())):
            break
    return Rest(y, size, used)


def _trust_region_step(
    product: Product, slope: Tensor, radius: float, goal: float, most: int = 400
) -> tuple[Tensor, Tensor, int, bool]:
    """The step p of about least g'p + p'Hp/2 with |p| <= radius, Hp, the products used, and whether |p| < radius."""
    p, hp = torch.zeros_like(slope), torch.zeros_like(slope)
    r = slope.clone()
    d = -r
    rho = float(r @ r)
    count = 0
    while count < min(most, 2 * slope.numel() + 2):
        hd = product(d)
        count += 1
        curvature = float(d @ hd)
        step = rho / curvature if curvature > 0.0 else math.inf
        if curvature <= 0.0 or float((p + step * d).norm()) >= radius:
            # To the border: the positive root of |p + t d| = radius.
            a, b, c = float(d @ d), float(p @ d), float(p @ p) - radius**2
            t = (-b + math.sqrt(max(b * b - a * c, 0.0))) / a
            return p + t * d, hp + t * hd, count, False
        p, hp, r = p + step * d, hp + step * hd, r + step * hd
        new_rho = float(r @ r)
        if math.sqrt(new_rho) <= goal:
            break
        d, rho = -r + (new_rho / rho) * d, new_rho
    return p, hp, count, True


def extreme_curvatures(product: Product, like: Tensor, *, steps: int = 30, seed: int = 0) -> tuple[float, float]:
    """The least and the largest curvature that `steps` of Lanczos' method see; the true ones lie outside or there."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(like.numel(), generator=generator, dtype=torch.float64).to(like)
    basis = [v / v.norm()]
    diagonal, off = [], []
    for _ in range(min(steps, like.numel())):
        w = product(basis[-1])
        diagonal.append(float(basis[-1] @ w))
        for _ in range(2):  # twice is enough
            for b in basis:
                w = w - (b @ w) * b
        beta = float(w.norm())
        if not beta > 1e-6 * max(abs(a) for a in diagonal) or len(basis) == like.numel():
            break
        off.append(beta)
        basis.append(w / beta)
    n = len(diagonal)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i in range(n - 1):
        matrix[i, i + 1] = matrix[i + 1, i] = off[i]
    if not bool(torch.isfinite(matrix).all()):
        return math.nan, math.nan
    values = torch.linalg.eigvalsh(matrix)
    return float(values[0]), float(values[-1])

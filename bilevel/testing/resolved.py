"""A follower solved anew, by Newton's method: brought to rest at one point, and beside it for differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bilevel.constraints.active_set import optimum, reached
from bilevel.constraints.regularity import curvatures
from bilevel.game import Follower, newton
from bilevel.game.rounding import least_telling, terms
from bilevel.inner import ProjectedGradient
from bilevel.testing.finite_differences import Slope, slope_at_zero
from bilevel.testing.losses import LeaderFollowerLosses, Product
from bilevel.tree import flatten, join


@dataclass(frozen=True, eq=False)
class Rest:
    """Where a follower came to rest: y `[m]`, the norm of its gradient there, and whether it shrinks no further."""

    y: Tensor
    gradient_norm: float
    products: int
    finite: bool = True


def bring_to_rest(
    held: LeaderFollowerLosses, x: Tensor, y: Tensor, *, target: float, most: int = 100, products: int = 20_000
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


def _projected_to_rest(follower: Follower, start: Tensor, target: float) -> Rest:
    """Where accelerated projected gradient steps, and Newton's where they help, bring a follower to rest."""
    y, memory, left = start, None, math.inf
    for _ in range(30):
        found, memory = ProjectedGradient().minimise(
            follower, follower.form.split(y), memory, steps=200, threshold=target
        )
        y = join(found)
        for _ in range(4):
            better = newton.newton_step(follower, y)
            if better is None:
                break
            y = better
        with torch.no_grad():
            size = float(follower.norm(follower.gradients(follower.form.split(y))[1]))
        if size <= target or size > 0.9 * left:
            left = min(size, left)
            break
        left = size
    return Rest(y, left, 0, math.isfinite(left))


class ResolvedFollower:
    """The follower re-solved at any x along a line, each solve started from what the earlier ones predict."""

    def __init__(self, held: LeaderFollowerLosses, x: Tensor, start: Tensor, *, rtol: float, seed: int) -> None:
        self.held, self.x = held, x
        eps = torch.finfo(x.dtype).eps
        self.constrained = held.programme(x) is not None or held.projected(x) is not None
        initial = flatten(held.game.initial(held.follower))
        first = [held.slope(x, y)[1] for y in (initial, start)]
        reference = max((float(s.norm()) for s in first if bool(torch.isfinite(s).all())), default=0.0)
        self.rest = self._rest(x, start, 30 * eps * reference, 300)
        self.curvature = self._curvature(seed)
        # Started at its optimum it has no gradient to measure by: then what counts is rounding's own scale, curvature
        # times size, and the gradient that the leader makes by moving as far as it does for the differences.
        largest = max(map(abs, self.curvature)) if all(map(math.isfinite, self.curvature)) else 0.0
        own = terms(largest, float(self.rest.y.norm()))
        self.reference = max(reference, least_telling(own, x.dtype))
        moved = self._moved()
        if reference <= least_telling(moved, x.dtype):
            self.reference = max(self.reference, moved)
        self.accepted = 1e-2 * rtol * self.reference
        self.target = 30 * eps * self.reference
        self.value = held.value(x, self.rest.y)
        self.noise, self.wander = self._noise(seed) if self.at_rest else (math.inf, 0.0)
        self.jumped = False

    def _moved(self) -> float:
        """The norm of the gradient where it rests, for a leader that has moved by a tenth of its size, or of 1."""
        away = 0.1 * (float(self.x.double().square().mean().sqrt()) or 1.0)
        size = float(self.held.slope(self.x + away, self.rest.y)[1].norm())
        return size if math.isfinite(size) else 0.0

    def _rest(self, x: Tensor, start: Tensor, target: float, most: int) -> Rest:
        """Where it comes to rest from `start`; with constraints its |gradient| is that of the Lagrangian, scaled."""
        programme, follower = self.held.programme(x), self.held.projected(x)
        if programme is None and follower is not None:
            return _projected_to_rest(follower, start, target)
        if programme is None:
            return bring_to_rest(self.held, x, start, target=target, most=most)
        point = optimum(programme, start.detach().to("cpu", torch.float64))
        if not reached(point, programme.epsilon):
            return Rest(point.y.to(start), math.inf, 0, bool(torch.isfinite(point.y).all()))
        return Rest(point.y.to(start), 0.0, 0)

    def _curvature(self, seed: int) -> tuple[float, float]:
        """The extreme curvatures of the loss, or of the Lagrangian along the constraints that bind."""
        programme, follower = self.held.programme(self.x), self.held.projected(self.x)
        if programme is None and follower is not None:
            return newton.curvatures(follower, self.rest.y)
        if programme is None:
            return extreme_curvatures(self.held.hessian(self.x, self.rest.y), self.rest.y, seed=seed)
        return curvatures(optimum(programme, self.rest.y.detach().to("cpu", torch.float64)))

    @property
    def stationarity(self) -> float:
        """The norm of the follower's gradient at rest, in units of the one at the start."""
        return self.rest.gradient_norm / self.reference if self.reference > 0.0 else 0.0

    @property
    def at_rest(self) -> bool:
        """Whether its gradient vanishes, for the purpose."""
        return self.rest.finite and self.rest.gradient_norm <= self.accepted

    @property
    def minimum(self) -> bool:
        """Whether no negative curvature was seen there."""
        least, largest = self.curvature
        return least >= -1e3 * torch.finfo(self.x.dtype).eps * abs(largest)

    @property
    def sound(self) -> bool:
        """Whether there is one answer to differentiate."""
        return self.at_rest and self.minimum and self.unique

    @property
    def unique(self) -> bool:
        """Whether other starts nearby end at the same answer, or at one that is worth the same to the leader."""
        return self.wander <= 1e-3 or self.noise <= 1e4 * torch.finfo(self.x.dtype).eps * abs(self.value)

    def _noise(self, seed: int) -> tuple[float, float]:
        """A bound for the error of a re-solved value, from other starts; and how far apart the answers lie."""
        y = self.rest.y
        generator = torch.Generator().manual_seed(seed)
        size = float(y.norm()) or 1.0
        values, apart = [self.value], 0.0
        for _ in range(2):
            away = torch.randn(y.numel(), generator=generator, dtype=torch.float64).to(y)
            other = self._rest(self.x, y + 1e-2 * size * away / away.norm(), self.target, 40)
            values.append(self.held.value(self.x, other.y))
            apart = max(apart, float((other.y - y).norm()) / size)
        rounding = 4 * torch.finfo(y.dtype).eps * max(map(abs, values))
        return max(2 * (max(values) - min(values)), rounding), apart

    def along(self, direction: Tensor, *, step: float, goal: float, relative: float) -> Slope:
        """The slope of the leader's re-solved loss along `direction: [n]`."""
        here = self.rest.y
        known: dict[float, Tensor] = {}

        def value(s: float) -> float:
            x = self.x + s * direction
            start = here
            if known:
                # The nearest on this side, or on the other one mirrored.
                nearest = min(known, key=lambda k: (k * s < 0, abs(math.log(abs(k / s)))))
                start = here + (s / nearest) * (known[nearest] - here)
            found = self._rest(x, start, self.target, 40)
            if not found.finite or found.gradient_norm > max(self.accepted, 3 * self.rest.gradient_norm):
                return math.nan
            known[s] = found.y
            return self.held.value(x, found.y)

        slope = slope_at_zero(value, self.value, step=step, noise=self.noise, goal=goal, relative=relative)
        speeds = {abs(s): float((y - here).norm()) / abs(s) for s, y in known.items()}
        if not slope.settled and speeds:
            # Another minimum is as far however short the step.
            self.jumped |= speeds[min(speeds)] > 8 * speeds[max(speeds)] > 0.0
        return slope

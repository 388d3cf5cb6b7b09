"""Random losses in plain torch, their optima by Newton's method, and slopes by central differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.attack.draw import F64, Draw

Loss = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]

SMOOTH = ("quad", "quad", "reg", "quartic", "logistic", "softmax", "relu2", "weighed")
ANY = (*SMOOTH, "kink")
STEEP = {"reg": 3.0, "quartic": 6.0, "logistic": 3.0, "softmax": 2.0, "relu2": 2.0, "weighed": 1.0}


class Pair:
    """A follower's loss f(x, y, batch) and leaders' losses F(x, y), for x: [nx] and y: [m].

    Curvatures of the quadratic part span `cond`. sf and sF scale the losses, sx and sy the units of x and y.
    """

    def __init__(
        self,
        draw: Draw,
        nx: int,
        m: int,
        *,
        kinds: Sequence[str] = ANY,
        conds: Sequence[float] = (1, 3, 10, 10, 100, 1e4),
        units: bool = True,
    ) -> None:
        self.nx, self.m, self.kind, self.cond = nx, m, draw.choice(list(kinds)), float(draw.choice(list(conds)))
        q = torch.linalg.qr(draw.normal(m, m))[0]
        curvatures = torch.logspace(0, -math.log10(self.cond), m, dtype=F64) if m > 1 else torch.ones(1, dtype=F64)
        self.A = q @ torch.diag(curvatures) @ q.T
        self.B, self.C, self.D = draw.normal(m, nx), draw.normal(3, m) * 0.7, draw.normal(3, nx) * 0.5
        self.shift, self.target = draw.normal(m) * 0.3, draw.normal(m)
        self.bend = draw.choice([torch.sin, lambda x: x, torch.tanh, lambda x: 0.3 * x.exp()])
        self.sf, self.sF = draw.odd(0.15, -20, 8), draw.odd(0.08, -20, 8)
        self.sx, self.sy = (draw.odd(0.08), draw.odd(0.08)) if units else (1.0, 1.0)
        self.x0, self.y0 = draw.normal(nx) * 0.5 * self.sx, draw.normal(m) * self.sy
        self.batches = [draw.normal(m) * 0.2 for _ in range(draw.choice([1, 2, 3, 5]))]
        self.dtype = F64
        self.steepness = 1.0 + STEEP.get(self.kind, 0.0)

    @property
    def rate(self) -> float:
        """A gradient step of this length descends."""
        return self.sy**2 / (self.steepness * self.sf)

    def told(self) -> dict[str, object]:
        """For the record."""
        return {key: getattr(self, key) for key in ("kind", "nx", "m", "cond", "sf", "sF", "sx", "sy")}

    def f(self, x: Tensor, y: Tensor, batch: Tensor | None = None) -> Tensor:
        """The follower's loss."""

        def like(t: Tensor) -> Tensor:
            return t.to(y.dtype)

        x, y = x / self.sx, y / self.sy
        shift = like(self.shift) if batch is None else like(self.shift) + batch
        value = 0.5 * y @ (like(self.A) @ y) - y @ (like(self.B) @ self.bend(x) + shift)
        if self.kind == "reg":
            value = value + 0.5 * (x.exp()[torch.arange(self.m) % self.nx] * y * y).sum()
        if self.kind == "quartic":
            value = value + 0.25 * (y**4).sum() * softplus(x[0])
        if self.kind == "logistic":
            value = value + softplus((like(self.C) @ y) * (1 + 0.3 * x[0].sin())).sum()
        if self.kind == "softmax":
            value = value + torch.logsumexp(like(self.C) @ y + like(self.D) @ x, 0)
        if self.kind == "relu2":
            value = value + torch.relu(y).square().sum() * (1 + x[0] ** 2)
        if self.kind == "weighed":  # the batch enters curvature and mixed derivative, too
            value = value + 0.5 * (softplus(like(self.shift) if batch is None else 5 * batch + x[0]) * y * y).sum()
        if self.kind == "kink":
            value = value + 0.3 * (y - 0.1).abs().sum()
        return value * self.sf

    def F(self, x: Tensor, y: Tensor, who: int = 0) -> Tensor:  # noqa: N802 - the field's symbol
        """The loss of leader `who`."""
        x, y = x / self.sx, y / self.sy
        value = 0.5 * (y - self.target.to(y.dtype) * (1 + who)).square().sum() + 0.1 * x.square().sum()
        return (value + 0.5 * x[who % self.nx] * y.sum()) * self.sF

    def mean(self, batches: Sequence[Tensor]) -> Loss:
        """The mean of f over batches."""
        return lambda x, y, _=None: torch.stack([self.f(x, y, b) for b in batches]).mean()

    def optimum(
        self, x: Tensor, y: Tensor | None = None, loss: Loss | None = None, batch: Tensor | None = None
    ) -> Tensor | None:
        """argmin f(x, .) by Newton's method with a line search; None where that does not settle."""
        return newton(lambda y: (loss or self.f)(x, y, batch), self.y0 if y is None else y, self.sy)

    def size(self, x: Tensor, y: Tensor, truth: Tensor, who: int = 0) -> float:
        """Of the direct and of the indirect part of a hypergradient: what its error is measured by."""
        x = x.detach().clone().requires_grad_()
        (direct,) = torch.autograd.grad(self.F(x, y.detach(), who), x)
        return float(direct.norm() + (truth - direct).norm()) + 1e-300


def newton(loss: Callable[[Tensor], Tensor], y: Tensor, unit: float = 1.0) -> Tensor | None:
    """The minimum from y on; None where steps do not become small."""
    y = y.detach().clone()
    for _ in range(200):
        at = y.clone().requires_grad_()
        value = loss(at)
        (slope,) = torch.autograd.grad(value, at, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(s, at, retain_graph=True)[0] for s in slope])
        slope = slope.detach()
        if not torch.isfinite(hessian).all() or torch.linalg.matrix_rank(hessian) < len(y):
            return None
        step = torch.linalg.solve(hessian, slope)
        if step.norm() <= 1e-13 * (y.norm() + unit):
            return y - step
        length, begun = 1.0, float(value)
        while float(loss(y - length * step)) > begun - 1e-4 * length * float(slope @ step) and length > 1e-10:
            length /= 2
        if length <= 1e-10:
            return y if float(step.norm()) < 1e-9 * float(y.norm() + unit) else None
        y = y - length * step
    return None


def differences(value: Callable[[Tensor], Tensor | None], x: Tensor, unit: float = 1.0) -> tuple[Tensor, Tensor]:
    """Slopes of value at x: [n] by Richardson's central differences, and their error by rounding and by two of them."""
    slopes, apart = [], []
    for i in range(len(x)):
        axis = torch.zeros_like(x)
        axis[i] = 1.0

        def central(h: float, axis: Tensor = axis) -> float:
            above, below = value(x + h * axis), value(x - h * axis)
            return math.nan if above is None or below is None else (float(above) - float(below)) / (2 * h)

        h = 1e-3 * unit
        wide, middle, near = central(h), central(h / 2), central(h / 4)
        coarse, fine = (4 * middle - wide) / 3, (4 * near - middle) / 3
        slopes.append(fine)
        here = value(x)
        rounding = math.nan if here is None else 8 * torch.finfo(F64).eps * abs(float(here)) / h
        apart.append(abs(fine - coarse) + rounding)
    return torch.tensor(slopes, dtype=F64), torch.tensor(apart, dtype=F64)

"""The KKT conditions of players within constraints as one system of smooth equations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bilevel.constraints.active_set import lengths, recovered
from bilevel.constraints.functions import Constrained, Linearised


class SmoothedConditions:
    r"""Stationarity, $l - c - \sqrt{l^2 + c^2 + 2 \mu} = 0$ in place of $\min(l, -c) = 0$, and $e = 0$.

    A function of z = (y, l, m) in NumPy's vectors, with its Jacobian. Multipliers and slopes are told in units of the
    slopes at the start, constraints in units of their own slopes there, so that all of them are of one size.

    Args:
        programme: Of the players who are to settle.
        y: Where they start `[n]`; the multipliers start at those that suit best there.
    """

    def __init__(self, programme: Constrained, y: Tensor) -> None:
        self.programme, self.smoothing = programme, 0.0
        self._seen: tuple[bytes, tuple[Tensor, Linearised]] | None = None
        slope, at = programme.loss_and_gradient(y)[1], programme.linearised(y)
        l, m = recovered(y, slope, at)
        self._n, self._m = len(y), len(l)
        curved = float(programme.hessian(y, l, m).abs().max())
        self._scale = max(float(slope.abs().max()), curved) or 1.0
        self._rows, self._levels = lengths(at.A), lengths(at.E)
        self.start = torch.cat([y, l * self._rows / self._scale, m * self._levels / self._scale]).numpy()

    def _parts(self, z: Any) -> tuple[Tensor, Tensor, Tensor]:
        z = torch.tensor(z, dtype=torch.float64)
        y, l, m = z[: self._n], z[self._n : self._n + self._m], z[self._n + self._m :]
        return y, l * self._scale / self._rows, m * self._scale / self._levels

    def _look(self, y: Tensor) -> tuple[Tensor, Linearised]:
        key = y.numpy().tobytes()
        if self._seen is None or self._seen[0] != key:
            self._seen = key, (self.programme.loss_and_gradient(y)[1], self.programme.linearised(y))
        return self._seen[1]

    def _both(self, l: Tensor, at: Linearised) -> tuple[Tensor, Tensor, Tensor]:
        """Multipliers and slacks in their units, and the root."""
        a, b = l * self._rows / self._scale, -at.c / self._rows
        return a, b, (a * a + b * b + 2.0 * self.smoothing).sqrt()

    def value(self, z: Any) -> Any:
        """The left-hand sides `[n + m + p]`."""
        y, l, m = self._parts(z)
        slope, at = self._look(y)
        a, b, size = self._both(l, at)
        rest = (slope + at.push_c.T @ l + at.push_e.T @ m) / self._scale
        return torch.cat([rest, a + b - size, at.e / self._levels]).numpy()

    def jacobian(self, z: Any) -> Any:
        """Their derivative in z `[n + m + p, n + m + p]`."""
        y, l, m = self._parts(z)
        _, at = self._look(y)
        a, b, size = self._both(l, at)
        n, rows = self._n, self._n + self._m
        found = torch.zeros(len(z), len(z), dtype=torch.float64)
        found[:n, :n] = self.programme.hessian(y, l, m) / self._scale
        found[:n, n:rows] = at.push_c.T / self._rows
        found[:n, rows:] = at.push_e.T / self._levels
        found[n:rows, :n] = -((1.0 - b / size) / self._rows)[:, None] * at.A
        found[n:rows, n:rows] = torch.diag(1.0 - a / size)
        found[rows:, :n] = at.E / self._levels[:, None]
        return found.numpy()

"""The derivative of a function that is known by noisy values, as value +- error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Slope:
    """A derivative by differences, and how far to trust it.

    `value` +- `error`; `noise` is the part of the error that the values' noise makes; `kink` is by how much the slopes
    from the right and from the left differ in the limit of small steps, 0 where that may be curvature or noise;
    `step` is the smallest step that was used; `settled` says whether the error met its goal.
    """

    value: float
    error: float
    noise: float
    kink: float
    step: float
    settled: bool


def slope_at_zero(
    function: Callable[[float], float],
    at_zero: float,
    *,
    step: float,
    noise: float,
    goal: float,
    relative: float = 0.0,
    levels: int = 9,
) -> Slope:
    r"""f'(0) by central differences at steps h, h/2, h/4, ..., extrapolated to h = 0 (Ridders' method).

        D(h) = (f(h) - f(-h)) / 2h,    f'(0) = sum_j w_j D(h_j),    w_j = prod_{k != j} h_k^2 / (h_k^2 - h_j^2)

    `noise` bounds the error of one value. Each run of neighbouring steps gives an estimate; its error is how much it
    moves when its largest or its smallest step is left out, plus sum |w_j| noise / h_j. The least of them is returned.
    Steps shrink while truncation is the larger part and grow while noise is, until the error is at most `goal` or
    `relative` |f'(0)|, or `levels` steps have been tried. `at_zero` is f(0), for the slopes from either side. Where
    f is NaN or infinite the step is taken to be too long.

    Costs two values of f a step: four at least. A feature much finer than the steps is not seen.
    Source: Ridders 1982, Advances in Engineering Software 4(2).

    >>> found = slope_at_zero(math.exp, 1.0, step=0.5, noise=1e-16, goal=1e-6)
    >>> abs(found.value - 1.0) <= found.error <= 1e-6
    True
    """
    known: dict[float, tuple[float, float]] = {}
    longest, next_step = math.inf, step
    best = Slope(math.nan, math.inf, math.inf, 0.0, step, settled=False)
    for _ in range(levels):
        right, left = function(next_step), function(-next_step)
        if math.isfinite(right) and math.isfinite(left):
            known[next_step] = right, left
        else:
            longest = next_step
        best = _extrapolated(known, at_zero, noise, step=next_step)
        if max(best.error, best.kink / 2) <= max(goal, relative * abs(best.value)):
            return Slope(best.value, max(best.error, best.kink / 2), best.noise, 0.0, best.step, settled=True)
        shorter, longer = min([longest, *known]) / 2, max(known, default=0.0) * 2
        if len(known) >= 2 and best.noise > best.error / 2:
            # Shorter steps would only show more of the noise.
            if longer >= longest:
                break
            next_step = longer
        else:
            next_step = shorter
    return Slope(best.value, max(best.error, best.kink / 2), best.noise, best.kink, best.step, settled=False)


def _extrapolated(known: dict[float, tuple[float, float]], at_zero: float, noise: float, *, step: float) -> Slope:
    """The best estimate from the values at these steps."""
    steps = sorted(known, reverse=True)
    found: dict[tuple[int, int], float] = {}
    best = Slope(math.nan, math.inf, math.inf, _kink(known, at_zero, noise), step, settled=False)
    for length in range(1, len(steps) + 1):
        for i in range(len(steps) - length + 1):
            window = steps[i : i + length]
            weights = [math.prod(k**2 / (k**2 - h**2) for k in window if k != h) for h in window]
            differences = [(known[h][0] - known[h][1]) / (2 * h) for h in window]
            found[i, length] = value = sum(w * d for w, d in zip(weights, differences, strict=True))
            if length == 1:
                continue
            spread = max(abs(value - found[i, length - 1]), abs(value - found[i + 1, length - 1]))
            noisy = sum(abs(w) * noise / h for w, h in zip(weights, window, strict=True))
            if spread + noisy < best.error:
                best = Slope(value, spread + noisy, noisy, best.kink, window[-1], settled=False)
    return best


def _kink(known: dict[float, tuple[float, float]], at_zero: float, noise: float) -> float:
    """The jump of the one-sided slopes, by the smallest steps; 0 where noise or curvature could make it.

    J(h) = (f(h) - 2 f(0) + f(-h)) / h is h f'' + O(h^3) where f is smooth: 2 J(h/2) - J(h) leaves the jump alone.
    """
    steps = sorted(known)
    if len(steps) < 2 or steps[1] != 2 * steps[0]:
        return 0.0
    sides = [(known[h][0] - 2 * at_zero + known[h][1]) / h for h in steps[:3]]
    jump = abs(2 * sides[0] - sides[1])
    if jump <= 20 * noise / steps[0]:
        return 0.0
    # What is left of a smooth function falls eightfold with half the step; a kink stays.
    falls = len(steps) > 2 and steps[2] == 2 * steps[1] and jump < abs(2 * sides[1] - sides[2]) / 3
    return 0.0 if falls else jump

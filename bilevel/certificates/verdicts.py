"""From numbers to findings: what certifies a condition, what refutes it, and what is too close to call."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from bilevel.certificates.certificate import Finding, Standing
from bilevel.certificates.point import Taken
from bilevel.errors import BilevelError
from bilevel.linear.lanczos import Spectrum

_T = TypeVar("_T")
CERTIFIED, REFUTED, INCONCLUSIVE = Standing.CERTIFIED, Standing.REFUTED, Standing.INCONCLUSIVE


def small(name: str, norm: float, reference: float, rounding: float, tolerance: float) -> Finding:
    """A verdict on a gradient's norm, relative to that at the start; `rounding` is what it cannot be told from 0 by."""
    relative = norm / reference if reference > 0.0 else norm
    remark = "|grad| over that at the start"
    if norm <= rounding and relative > tolerance:
        return Finding(name, CERTIFIED, relative, f"<= {tolerance:g}", f"{remark}; 0 up to rounding")
    standing = CERTIFIED if relative <= tolerance else REFUTED
    return Finding(name, standing, relative, f"<= {tolerance:g}", remark)


def definite(name: str, found: Spectrum, what: str, *, lowest: float = math.inf, noise: float | None = None) -> Finding:
    """A verdict on the smallest eigenvalue; `lowest` is a Rayleigh quotient from elsewhere, `noise` products' error."""
    uncertain = found.rounding if noise is None else noise
    smallest = min(found.smallest, lowest)
    if smallest < -uncertain:
        standing = REFUTED
    else:
        standing = CERTIFIED if found.lower > (0.0 if noise is None else noise) and smallest > 0.0 else INCONCLUSIVE
    how = "exact" if found.exact else f"at least {found.lower:.3g} with probability {1.0 - found.failure:g}"
    if standing is REFUTED:
        how = "a direction of negative curvature"
    return Finding(name, standing, smallest, "> 0", f"smallest eigenvalue {what}; {how}; largest {found.largest:.3g}")


def linear(name: str) -> Finding:
    """The verdict on the curvature of a loss that is linear in its player's own variables: it is flat everywhere."""
    how = "linear in its own variables: where its gradient vanishes, every move of its own leaves its loss as it is"
    return Finding(name, CERTIFIED, 0.0, ">= 0", how)


def bounded(bound: float, estimate: float, scale: float, tolerance: float, note: str) -> Finding:
    """A verdict on a hypergradient's error by its bound and its estimate."""
    if bound <= tolerance * scale:
        standing = CERTIFIED
    else:
        # What the bound adds to the estimate may hide a right answer, or a wrong one.
        wrong = math.isfinite(bound) and 2.0 * estimate - bound > tolerance * scale
        standing = REFUTED if wrong else INCONCLUSIVE
    remark = f"bound {bound:.3g}, estimate {estimate:.3g}, scale {scale:.3g}" + (f"; {note}" if note else "")
    return Finding("hypergradient's error", standing, bound / max(scale, 1e-300), f"<= {tolerance:g}", remark)


def vanishes(name: str, there: Taken, left: float, scale: float, tolerance: float) -> Finding:
    """A verdict on a hypergradient that is to vanish and is known but for `left`."""
    size, wanted = float(there.gradient.norm()), tolerance * scale
    standing = CERTIFIED if size + left <= wanted else REFUTED if size - left > wanted else INCONCLUSIVE
    relative = size / max(scale, 1e-300)
    return Finding(
        name, standing, relative, f"<= {tolerance:g}", "|hypergradient| over |g_x| + |f_yx| |u|, or |g_x| at the start"
    )


_COSINE, _RATIOS, _DRAWS = 0.95, (0.8, 1.25), 5


def faithful(directional: Callable[[], tuple[Tensor, Tensor]]) -> Finding:
    """The response's derivative against the optimum's in fresh directions of the leader, and their spread."""
    name, wanted_text = "response's derivative", f"cosine >= {_COSINE}, size {_RATIOS[0]} to {_RATIOS[1]}"
    cosines, ratios = [], []
    for _ in range(_DRAWS):
        pair = attempt(directional)
        if pair is None:
            reason = "the response's own answer is at no strict minimum"
            return Finding(name, INCONCLUSIVE, math.nan, wanted_text, reason)
        cosine, ratio = _agreement(*pair)
        cosines.append(cosine)
        ratios.append(ratio)
    good = [c >= _COSINE and _RATIOS[0] <= r <= _RATIOS[1] for c, r in zip(cosines, ratios, strict=True)]
    standing = CERTIFIED if all(good) else INCONCLUSIVE if any(good) else REFUTED
    remark = (
        f"mean cosine {sum(cosines) / _DRAWS:.3f} (from {min(cosines):.3f}), mean size {sum(ratios) / _DRAWS:.3g} "
        f"({min(ratios):.3g} to {max(ratios):.3g}), {_DRAWS} directions"
    )
    return Finding(name, standing, sum(cosines) / _DRAWS, wanted_text, remark)


def _agreement(moved: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Cosine and ratio of sizes."""
    came, expected = float(moved.norm()), float(wanted.norm())
    if expected == 0.0:  # the optimum stands still; then so must the answer
        return (1.0, 1.0) if came == 0.0 else (0.0, math.inf)
    return (float(moved @ wanted) / (came * expected) if came > 0.0 else 0.0), came / expected


def attempt(function: Callable[[], _T]) -> _T | None:
    """What it returns; None where the follower's losses or curvature do not allow it."""
    try:
        return function()
    except BilevelError:
        return None

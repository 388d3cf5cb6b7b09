"""SciPy's minimisers and its solvers of equations as inner solvers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel.constraints import Box, ConstraintSet
from bilevel.constraints.functions import Constrained
from bilevel.errors import require_kinds
from bilevel.inner.base import InnerSolver, Problem, require_minimum
from bilevel.inner.conditions import SmoothedConditions
from bilevel.tree import Structure, join


@dataclass(frozen=True)
class Scipy(InnerSolver):
    """The follower's optimum by `scipy.optimize.minimize`, on one held batch, in float64 on the CPU.

    Nothing is remembered between calls but the solution itself. The bounds of the player's domain, a `Box` say, are
    SciPy's. Functions that constrain it (`Player(inequality=..., equality=...)`) are met by "SLSQP" and by
    "trust-constr", which may need a thousand steps; multipliers and the last digits are the follower's own business.

    Args:
        method: SciPy's name of a method that uses gradients: "L-BFGS-B", "BFGS", "CG", "TNC", "SLSQP", "trust-constr".
        options: Go to SciPy as they are, and win over the response's `steps` and tolerance where they name `maxiter` or
            `gtol`.
        bounds: For a player without a domain: (low, high) for every entry, or in SciPy's own forms a pair for each
            entry, `[(0, 1), (0, None)]`, or a `scipy.optimize.Bounds`. `Implicit` differentiates the optimum within
            them, as if they were the player's domain.

    Raises:
        TypeError: When it is used for several players who answer together: they have no loss in common; for another
            domain than bounds; for bounds with a method that has none.

    Examples:
        >>> Scipy("L-BFGS-B", options={"ftol": 0.0})
        Scipy(method='L-BFGS-B', options={'ftol': 0.0}, bounds=None)
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bounds: Any = None

    def __post_init__(self) -> None:
        require_kinds(self, method=str, options=Mapping)
        if self.bounds is None:
            return
        _require_bounded(self.method, "bounds=")
        low, high = limits_of(self.bounds)
        lows, highs = torch.as_tensor(low, dtype=torch.float64), torch.as_tensor(high, dtype=torch.float64)
        if not bool((lows <= highs).all()):
            raise ValueError(f"Scipy: bounds={self.bounds!r}; expected low <= high, and no NaN.")

    def domain(self, form: Structure) -> ConstraintSet | None:
        """The box of `bounds`."""
        if self.bounds is None:
            return None
        low, high = limits_of(self.bounds)
        if isinstance(low, float):
            return Box(low, high)
        if len(low) != form.size:
            raise ValueError(
                f"Scipy: bounds= has {len(low)} pairs, and the player has {form.size} entries. Give one pair for all, "
                "(low, high), or one for each."
            )
        return Box(*(form.unflatten(torch.tensor(limit, dtype=torch.float64)) for limit in (low, high)))

    @property
    def takes_constraints(self) -> bool:
        """SLSQP and trust-constr do."""
        return self.method in ("SLSQP", "trust-constr")

    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """SciPy's answer after at most `steps` iterations."""
        import numpy as np  # noqa: PLC0415 - with SciPy's optimiser, only where it is used
        from scipy.optimize import Bounds, minimize  # noqa: PLC0415

        programme = problem.constraints
        if programme is not None and self.bounds is not None:
            raise TypeError(
                f"Scipy({self.method!r}, bounds={self.bounds}): the derivative of {problem.name!r} would not see these "
                "bounds. Say them as its constraints: inequality= of the player."
            )
        form, like = problem.form, y[0]
        box = self._box(problem) if programme is None else None

        def tensors(point: Any) -> list[Tensor]:
            # In torch's own memory: the last bits of MKL's sums depend on how a vector is aligned.
            return form.split(torch.tensor(point, dtype=torch.float64).to(like))

        def value_and_gradient(point: Any) -> tuple[float, Any]:
            loss, slopes = problem.field(tensors(point))
            return float(loss), np.asarray(join(slopes).detach().to("cpu", torch.float64))

        # The largest entry is at most the norm: this stops no later than |gradient| <= threshold asks. Near a bound
        # SciPy measures the distance to it, and the residual that distance over its step s.
        gtol = threshold * min(1.0, float(problem.rests.step)) / form.size**0.5
        tight = {"L-BFGS-B": {"gtol": gtol, "ftol": 0.0}, "BFGS": {"gtol": gtol}, "CG": {"gtol": gtol}}
        if programme is not None:
            # Half the digits are enough to see which constraints bind; Newton's method on the KKT system has the rest.
            tight = {"SLSQP": {"ftol": 1e-14}, "trust-constr": {"gtol": 1e-9, "xtol": 1e-10, "barrier_tol": 1e-9}}
        most = "maxfun" if self.method.upper() == "TNC" else "maxiter"  # TNC counts evaluations alone
        options = {most: steps, **tight.get(self.method, {}), **self.options}
        start = np.asarray(join(y).detach().to("cpu", torch.float64))
        bounds = None
        if box is not None:
            low, high = (np.broadcast_to(np.asarray(limit, dtype=float), start.shape) for limit in box)
            start, bounds = np.clip(start, low, high), Bounds(low, high)
        more: dict[str, Any] = {} if programme is None else {"constraints": _in_scipys_words(programme)}
        with warnings.catch_warnings():
            if programme is not None:  # trust-constr's, of its own approximations; the answer is judged by the caller
                warnings.simplefilter("ignore", UserWarning)
            found = minimize(
                value_and_gradient, start, jac=True, method=self.method, options=options, bounds=bounds, **more
            )
        return [t.clone() for t in tensors(found.x)], None

    def _box(self, problem: Problem) -> tuple[Any, Any] | None:
        """The bounds to keep, the player's own or those given."""
        known = problem.bounds
        if known is None:
            require_minimum(problem, f"Scipy({self.method!r})")
            if self.bounds is None:
                return None
            self.domain(problem.form)  # which refuses a wrong number of pairs
            return limits_of(self.bounds)
        if self.bounds is not None and not problem.rests.given_by_solver:
            raise ValueError(
                f"Scipy: bounds={self.bounds!r}, and {problem.name!r} has {problem.rests.told} besides. Leave bounds= "
                "out: the domain's are SciPy's."
            )
        _require_bounded(self.method, f"a follower with {problem.rests.told}")
        low, high = (join(limits).to("cpu", torch.float64).tolist() for limits in known)
        return low, high


def limits_of(bounds: Any) -> tuple[Any, Any]:
    """(low, high) of bounds in any of SciPy's forms: two numbers, or two lists with one for each entry."""
    from scipy.optimize import Bounds  # noqa: PLC0415

    if isinstance(bounds, Bounds):
        return [float(v) for v in bounds.lb], [float(v) for v in bounds.ub]
    pair = list(bounds) if isinstance(bounds, Sequence) else []
    if len(pair) == 2 and all(limit is None or isinstance(limit, int | float) for limit in pair):
        return -math.inf if pair[0] is None else float(pair[0]), math.inf if pair[1] is None else float(pair[1])
    if pair and all(isinstance(row, Sequence) and len(row) == 2 for row in pair):
        low = [-math.inf if row[0] is None else float(row[0]) for row in pair]
        return low, [math.inf if row[1] is None else float(row[1]) for row in pair]
    raise TypeError(
        f"Scipy: bounds={bounds!r}; expected (low, high) for every entry, a pair for each, [(0, 1), (0, None)], or a "
        "scipy.optimize.Bounds."
    )


_BOUNDED = ("L-BFGS-B", "TNC", "SLSQP", "trust-constr")


def _require_bounded(method: str, what: str) -> None:
    if method.upper() not in [known.upper() for known in _BOUNDED]:
        raise TypeError(f"Scipy({method!r}) was given {what}, and SciPy's method has no bounds. Use {_BOUNDED}.")


@dataclass(frozen=True)
class ScipyRoot(InnerSolver):
    """A zero of the follower's own gradient by `scipy.optimize.root`, in float64 on the CPU.

    Several players who answer together need it: their stacked own gradients are no loss's gradient, so that nothing can
    be minimised. It finds *any* zero, a maximum too: certify what it finds. Players with functions as constraints are
    settled by their KKT conditions, min(l, -c) = 0 being smoothed to l - c = sqrt(l^2 + c^2 + 2 mu) for a mu that is
    taken to 0. Source: Kanzow 1996, SIAM J. Matrix Anal. Appl. 17(4).

    Args:
        method: SciPy's name. "hybr" is Powell's, with differences for the Jacobian, for a hundred unknowns or so;
            "krylov" and "df-sane" are for more.
        options: Go to SciPy as they are, and win over the response's `steps` and tolerance.

    Examples:
        >>> ScipyRoot().method
        'hybr'
    """

    method: str = "hybr"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_kinds(self, method=str, options=Mapping)

    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """SciPy's answer; `steps` bounds its iterations, or its evaluations per unknown where it counts those."""
        if problem.constraints is not None:
            return self._settled(problem, problem.constraints, y, steps), None
        import numpy as np  # noqa: PLC0415
        from scipy.optimize import root  # noqa: PLC0415

        form, like = problem.form, y[0]

        def tensors(point: Any) -> list[Tensor]:
            return form.split(torch.tensor(point, dtype=torch.float64).to(like))

        unit = 1.0

        def residual(point: Any) -> Any:
            return np.asarray(join(problem.gradients(tensors(point))[1]).detach().to("cpu", torch.float64)) / unit

        start = np.asarray(join(y).detach().to("cpu", torch.float64))
        size = float(np.linalg.norm(residual(start)))
        if size <= threshold:  # SciPy's own methods divide by it
            return y, None
        # In units of its own, as Powell's first steps are at most 100 of them; a NaN is told by who called.
        unit = size if math.isfinite(size) else 1.0
        limits = {
            "hybr": {"maxfev": steps * (form.size + 1), "eps": torch.finfo(like.dtype).eps},
            "krylov": {"maxiter": steps, "fatol": threshold / unit / form.size**0.5},
            "df-sane": {"maxfev": steps, "fatol": threshold / unit},
        }
        found = root(residual, start, method=self.method, options={**limits.get(self.method, {}), **self.options})
        return [t.clone() for t in tensors(found.x)], None

    @property
    def takes_equilibria(self) -> bool:
        """Yes."""
        return True

    def _settled(self, problem: Problem, programme: Constrained, y: list[Tensor], steps: int) -> list[Tensor]:
        """Where the smoothed conditions of (y, l, m) vanish, near enough for the follower's own Newton steps."""
        from scipy.optimize import root  # noqa: PLC0415

        conditions = SmoothedConditions(programme, join(y).detach().to("cpu", torch.float64))
        z = conditions.start
        most = steps * (len(z) + 1)
        limits = {"hybr": {"maxfev": most}, "lm": {"maxiter": most}, "krylov": {"maxiter": steps}}
        options = {**limits.get(self.method, {"maxfev": steps}), **self.options}
        for smoothing in _SMOOTHINGS:
            conditions.smoothing = smoothing
            slopes = {"jac": conditions.jacobian} if self.method in ("hybr", "lm") else {}
            found = root(conditions.value, z, method=self.method, options=options, **slopes).x
            if not all(map(math.isfinite, found)):
                break
            z = found
        answer = torch.tensor(z[: problem.form.size], dtype=torch.float64).to(y[0])
        return [t.clone() for t in problem.form.split(answer)]


_SMOOTHINGS = (1e-2, 1e-5, 1e-10)
"""The values of mu, one after the other: the last leaves 1e-5 of a multiplier, and the follower does the rest."""


def _in_scipys_words(programme: Constrained) -> list[dict[str, Any]]:
    """The constraints as SciPy's dicts; its inequalities are >= 0. What was seen last at a point is kept."""
    seen: dict[bytes, Any] = {}

    def at(point: Any) -> Any:
        key = point.tobytes()
        if key not in seen:
            seen.clear()
            seen[key] = programme.linearised(torch.tensor(point, dtype=torch.float64))
        return seen[key]

    labels = programme.labels
    found: list[dict[str, Any]] = []
    if labels.inequality:
        found.append({"type": "ineq", "fun": lambda y: -at(y).c.numpy(), "jac": lambda y: -at(y).A.numpy()})
    if labels.equality:
        found.append({"type": "eq", "fun": lambda y: at(y).e.numpy(), "jac": lambda y: at(y).E.numpy()})
    return found

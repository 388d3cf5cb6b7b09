"""SciPy's minimisers and its solvers of equations as inner solvers."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bilevel.constraints.functions import Constrained
from bilevel.inner.base import InnerSolver, Problem, require_minimum
from bilevel.tree import join


@dataclass(frozen=True)
class Scipy(InnerSolver):
    """The follower's optimum by `scipy.optimize.minimize`, on one held batch, in float64 on the CPU.

    Nothing is remembered between calls but the solution itself. An optimum on the walls of `bounds` is not stationary,
    and `Implicit` then warns. A follower's constraints (`Player(inequality=..., equality=...)`) are met by "SLSQP" and
    "trust-constr"; the multipliers, and the last digits, are the follower's own business.

    Args:
        method: SciPy's name of a method that uses gradients: "L-BFGS-B", "BFGS", "CG", "TNC", "SLSQP", "trust-constr".
        options: Go to SciPy as they are, and win over the response's `steps` and tolerance where they name `maxiter` or
            `gtol`.
        bounds: (low, high), a box for every entry, where the method can (L-BFGS-B, TNC, SLSQP).

    Raises:
        TypeError: When it is used for several players who answer together: they have no loss in common.

    Examples:
        >>> Scipy("L-BFGS-B", options={"ftol": 0.0})
        Scipy(method='L-BFGS-B', options={'ftol': 0.0}, bounds=None)
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    bounds: tuple[float, float] | None = None

    @property
    def takes_constraints(self) -> bool:
        """SLSQP and trust-constr do."""
        return self.method in ("SLSQP", "trust-constr")

    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """SciPy's answer after at most `steps` iterations."""
        import numpy as np  # noqa: PLC0415 - with SciPy's optimiser, only where it is used
        from scipy.optimize import minimize  # noqa: PLC0415

        programme = problem.constraints
        if programme is None:
            require_minimum(problem, f"Scipy({self.method!r})")
        elif self.bounds is not None:
            raise TypeError(
                f"Scipy({self.method!r}, bounds={self.bounds}): the derivative of {problem.name!r} would not see these "
                "bounds. Say them as its constraints: inequality= of the player."
            )
        form, like = problem.form, y[0]

        def tensors(point: Any) -> list[Tensor]:
            # In torch's own memory: the last bits of MKL's sums depend on how a vector is aligned.
            return form.split(torch.tensor(point, dtype=torch.float64).to(like))

        def value_and_gradient(point: Any) -> tuple[float, Any]:
            loss, slopes = problem.gradients(tensors(point))
            return float(loss), np.asarray(join(slopes).detach().to("cpu", torch.float64))

        # The largest entry is at most the norm: this stops no later than |gradient| <= threshold asks.
        gtol = threshold / form.size**0.5
        tight = {"L-BFGS-B": {"gtol": gtol, "ftol": 0.0}, "BFGS": {"gtol": gtol}, "CG": {"gtol": gtol}}
        if programme is not None:
            # Half the digits are enough to see which constraints bind; Newton's method on the KKT system has the rest.
            tight = {"SLSQP": {"ftol": 1e-14}, "trust-constr": {"gtol": 1e-9, "xtol": 1e-10, "barrier_tol": 1e-9}}
        options = {"maxiter": steps, **tight.get(self.method, {}), **self.options}
        start = np.asarray(join(y).detach().to("cpu", torch.float64))
        box = None if self.bounds is None else [self.bounds] * form.size
        more: dict[str, Any] = {} if programme is None else {"constraints": _in_scipys_words(programme)}
        with warnings.catch_warnings():
            if programme is not None:  # trust-constr's, of its own approximations; the answer is judged by the caller
                warnings.simplefilter("ignore", UserWarning)
            found = minimize(
                value_and_gradient, start, jac=True, method=self.method, options=options, bounds=box, **more
            )
        return [t.clone() for t in tensors(found.x)], None


@dataclass(frozen=True)
class ScipyRoot(InnerSolver):
    """A zero of the follower's own gradient by `scipy.optimize.root`, in float64 on the CPU.

    Several players who answer together need it: their stacked own gradients are no loss's gradient, so that nothing can
    be minimised. It finds *any* zero, a maximum too: certify what it finds.

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

    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """SciPy's answer; `steps` bounds its iterations, or its evaluations per unknown where it counts those."""
        import numpy as np  # noqa: PLC0415
        from scipy.optimize import root  # noqa: PLC0415

        form, like = problem.form, y[0]

        def tensors(point: Any) -> list[Tensor]:
            return form.split(torch.tensor(point, dtype=torch.float64).to(like))

        def residual(point: Any) -> Any:
            return np.asarray(join(problem.gradients(tensors(point))[1]).detach().to("cpu", torch.float64))

        start = np.asarray(join(y).detach().to("cpu", torch.float64))
        if float(np.linalg.norm(residual(start))) <= threshold:  # SciPy's own methods divide by it
            return y, None
        limits = {
            "hybr": {"maxfev": steps * (form.size + 1)},
            "krylov": {"maxiter": steps, "fatol": threshold / form.size**0.5},
            "df-sane": {"maxfev": steps, "fatol": threshold},
        }
        found = root(residual, start, method=self.method, options={**limits.get(self.method, {}), **self.options})
        return [t.clone() for t in tensors(found.x)], None


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

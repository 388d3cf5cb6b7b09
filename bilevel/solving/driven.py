"""A leader that SciPy's minimisers move: they ask for evaluations, each of which is a step of the run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bilevel.constraints.active_set import recovered
from bilevel.constraints.functions import Linearised
from bilevel.constraints.walls import has_walls
from bilevel.errors import LeaderNonConvergenceWarning, NonFiniteError
from bilevel.game import Game
from bilevel.inner import Scipy
from bilevel.solving.warning_log import RunWarning
from bilevel.tree import join

Entry = dict[str, Any]
"""One evaluation: x `[n]`; f and its slope `[n]`; c `[m]`, e `[p]` and their Jacobians A and E; or what `failed`."""

_METHODS = ("L-BFGS-B", "TNC", "SLSQP", "trust-constr", "BFGS", "CG")
_BOUNDED = ("L-BFGS-B", "TNC", "SLSQP", "trust-constr")


class EnoughError(Exception):
    """Raised by an evaluation when the run has no more steps, or a callback has ended it."""


@dataclass(frozen=True, eq=False)
class Driven:
    """Where SciPy's method ended.

    Args:
        best: The entry of the best feasible evaluation, or of the least infeasible one.
        told: Why it is to be doubted, in words; None where SciPy's method has converged there.
        rejected: How many evaluations had no answer, and the last one's story.
        steepest: The largest norm of the loss's gradient on the way.
    """

    best: Entry
    told: str | None
    rejected: tuple[int, str]
    steepest: float


def require_driven(game: Game, names: Sequence[str], name: str, method: Scipy) -> None:
    """Raise `TypeError` or `ValueError` for a leader whom SciPy's method cannot move."""
    told = f"solve: optimizer={method!r}"
    game.require_one(told)
    if list(names) != [name]:
        raise TypeError(
            f"{told} minimises the loss of one leader, and {list(names)} lead. Give each a torch.optim optimiser."
        )
    if method.bounds is not None:
        raise ValueError(f"{told}: a leader says its bounds itself, domain=bilevel.Box(low, high). Leave bounds= out.")
    if method.method not in _METHODS:
        raise ValueError(f"{told}: expected a method that uses gradients, one of {_METHODS}.")
    player = game.players[name]
    for what in player.constraints:
        if not method.takes_constraints:
            raise TypeError(f'{told} does not see the {what}= of {name!r}. Use Scipy("SLSQP").')
    if player.domain is not None:
        if player.domain.entrywise:
            if method.method not in _BOUNDED:
                raise TypeError(
                    f"{told}: SciPy's method has no bounds, and {name!r} has {player.domain!r}. Use one of {_BOUNDED}."
                )
        elif not (method.takes_constraints and has_walls(player.domain)):
            raise TypeError(
                f"{told} does not keep {name!r} in {player.domain!r}. Use "
                + ('Scipy("SLSQP").' if has_walls(player.domain) else "torch.optim.SGD, whose steps are projected.")
            )
    for other, data in ((other, given.data) for other, given in game.players.items()):
        if data is not None and not (isinstance(data, list | tuple) and len(data) == 1):
            raise ValueError(
                f"{told} compares the loss from step to step, and the data of {other!r} may give other batches each "
                "time. Give it one batch, data=[batch], or use a torch.optim optimiser."
            )


@dataclass(frozen=True, eq=False)
class Search:
    """Where SciPy's method begins, and within what.

    Args:
        start: `[n]`.
        bounds: (low, high), each `[n]`.
        walls: Which rows of c and of e SciPy is to see; bounds are no rows there.
    """

    start: Tensor
    bounds: tuple[Tensor, Tensor] | None
    walls: tuple[Tensor, Tensor]


def bounds_of(game: Game, name: str) -> tuple[Tensor, Tensor] | None:
    """A leader's bounds, where its domain is nothing else."""
    domain = game.players[name].domain
    limits = None if domain is None else domain.limits(game.initial(name))
    return None if limits is None else (flat(limits[0]), flat(limits[1]))


def drive(
    method: Scipy, search: Search, evaluate: Callable[[Tensor], Entry], known: Sequence[Entry], epsilon: float
) -> Driven:
    """Where SciPy's method comes to.

    Args:
        method: SciPy's, with its options.
        search: Where it begins, and within what.
        evaluate: The next evaluation of the run; raises `EnoughError` when there is none.
        known: Those that were made already, by an interrupted run, and are not to be made again.
        epsilon: The rounding of an evaluation.
    """
    import numpy as np  # noqa: PLC0415
    from scipy.optimize import Bounds, minimize  # noqa: PLC0415

    seen: dict[bytes, Entry] = {entry["x"].numpy().tobytes(): entry for entry in known}
    entries = list(known)
    rejected: list[str] = [entry["failed"] for entry in known if "failed" in entry]

    def at(point: Any) -> Entry:
        x = torch.tensor(point, dtype=torch.float64)
        key = x.numpy().tobytes()
        if key not in seen:
            found = evaluate(x)
            entries.append(found)
            seen[key] = found
            if "failed" in found:
                rejected.append(found["failed"])
        found = seen[key]
        return _refused(entries, found) if "failed" in found else found

    def value_and_slope(point: Any) -> tuple[float, Any]:
        found = at(point)
        return float(found["f"]), found["slope"].numpy()

    above, level = search.walls
    constraints: list[dict[str, Any]] = []
    if bool(above.any()):
        constraints.append(
            {"type": "ineq", "fun": lambda x: -at(x)["c"][above].numpy(), "jac": lambda x: -at(x)["A"][above].numpy()}
        )
    if bool(level.any()):
        constraints.append(
            {"type": "eq", "fun": lambda x: at(x)["e"][level].numpy(), "jac": lambda x: at(x)["E"][level].numpy()}
        )
    tight: dict[str, dict[str, Any]] = {
        "SLSQP": {"ftol": epsilon**0.65, "maxiter": 10_000},
        "trust-constr": {"gtol": epsilon**0.5, "xtol": epsilon**0.65, "maxiter": 10_000},
        "L-BFGS-B": {"gtol": epsilon**0.5, "ftol": 10.0 * epsilon, "maxiter": 10_000, "maxfun": 100_000},
        "TNC": {"maxfun": 100_000},
    }
    more: dict[str, Any] = {"constraints": constraints} if constraints else {}
    start = search.start
    if search.bounds is not None:
        low, high = search.bounds
        more["bounds"] = Bounds(low.numpy(), high.numpy(), keep_feasible=method.method == "trust-constr")
        start = torch.minimum(torch.maximum(start, low), high)
    options = {**tight.get(method.method, {}), **method.options}
    told: str | None
    ended: Tensor | None = None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="scipy")  # of its own approximations; its answer is judged here
        try:
            found = minimize(
                value_and_slope, np.asarray(start), jac=True, method=method.method, options=options, **more
            )
            told = None if found.success else f"SciPy's {method.method} stopped: {str(found.message).rstrip(' .:')}"
            ended = torch.tensor(found.x, dtype=torch.float64)
        except EnoughError:
            told = f"SciPy's {method.method} had not finished after {len(entries)} evaluations"
    best = _best(entries, ended, feasibility(epsilon))
    steepest = max((float(entry["slope"].norm()) for entry in entries if "failed" not in entry), default=0.0)
    return Driven(best, told, (len(rejected), rejected[-1] if rejected else ""), steepest)


UNSETTLED = 0.01
"""A Lagrangian's gradient of such a part of the loss's largest says that an end is none, or its multipliers wrong."""


def doubts(
    name: str, driven: Driven, left: float, stationarity: Mapping[str, float], epsilon: float
) -> list[RunWarning]:
    """What to know of where SciPy's method ended.

    Args:
        name: The leader.
        driven: Where it ended.
        left: The norm of the Lagrangian's gradient there.
        stationarity: How far each follower that tells it is from its optimum, in units of its gradient at the start.
        epsilon: The rounding of an evaluation.
    """
    told = []
    worst = max(stationarity, key=lambda other: stationarity[other], default=None)
    story = driven.told
    if story is None and left > UNSETTLED * driven.steepest:
        story = "SciPy's method was content"  # trust-constr is, while its barrier keeps it away from a wall
    if story is not None:
        text = (
            f"{story}. At the answer, the gradient of the Lagrangian of {name!r} has norm {left:.3g}, that of "
            f"its loss {float(driven.best['slope'].norm()):.3g}. "
        )
        # It compares losses from step to step, and what a follower stops short of its optimum by is noise in them.
        # Inner solvers that compare losses themselves come no nearer than about the root of epsilon.
        smooth = epsilon**0.45
        if worst is not None and stationarity[worst] > smooth:
            text += (
                f"The answer of {worst!r} is known to {stationarity[worst]:.1g} of its gradient at the start, and the "
                "loss is as rough as that, too rough for SciPy's line search: give its response "
                f"tolerance={smooth:.0e}, and the steps that takes. Else give SciPy more steps=, or another start; "
            )
        else:
            text += "Give it more steps=, or another start; "
        text += "where a follower's constraint begins or ceases to bind the loss has a kink, which may be the optimum."
        told.append(RunWarning(text, category=LeaderNonConvergenceWarning))
    count, story = driven.rejected
    if count:
        told.append(RunWarning(f"At {count} points of the search {name!r} got no answer, and turned back: {story}"))
    return told


def feasibility(epsilon: float) -> float:
    """The violation that SciPy's methods leave at most, in the functions' own units."""
    return max(1e-6, 10.0 * float(epsilon**0.5))


def violation(entry: Entry) -> float:
    """The largest entry of max(c, 0) and |e|."""
    off: Tensor = torch.cat([entry["c"].clamp(min=0.0), entry["e"].abs()])
    return float(off.max()) if len(off) else 0.0


def fitted(entry: Entry) -> tuple[Tensor, Tensor, float]:
    """The multipliers of c `[m]` and e `[p]` that leave least of the Lagrangian's gradient, and what they leave."""
    at = Linearised(entry["c"], entry["e"], entry["A"], entry["E"])
    l, m = recovered(entry["x"], entry["slope"], at)
    left: Tensor = entry["slope"] + at.A.T @ l + at.E.T @ m
    return l, m, float(left.norm())


def _best(entries: Sequence[Entry], ended: Tensor | None, tolerance: float) -> Entry:
    """SciPy's own end where it is feasible and as low as any, else the lowest feasible, else the least infeasible."""
    answered = [entry for entry in entries if "failed" not in entry]
    feasible = [entry for entry in answered if violation(entry) <= tolerance]
    if not feasible:
        nearest: Entry = min(answered, key=violation)
        return nearest
    lowest = min(feasible, key=_value)
    for entry in feasible:
        if ended is not None and torch.equal(entry["x"], ended):
            close = _value(entry) - _value(lowest) <= 1e-7 * (1.0 + abs(_value(lowest)))
            return entry if close else lowest
    return lowest


def _value(entry: Entry) -> float:
    found: Tensor = entry["f"]
    return float(found)


def _refused(entries: Sequence[Entry], entry: Entry) -> Entry:
    """What SciPy is told of a point where a follower has no answer: so dear that its line search comes nearer."""
    answered = [known for known in entries if "failed" not in known]
    last, dearest = answered[-1], max(float(known["f"]) for known in answered)
    spread = dearest - min(float(known["f"]) for known in answered)
    wall = dearest + 1e3 * (1.0 + spread + abs(dearest))
    return {**last, "x": entry["x"], "f": torch.tensor(wall, dtype=torch.float64)}


def flat(leaves: Sequence[Tensor]) -> Tensor:
    """Leaves as a vector `[n]` of float64 on the CPU."""
    return join([leaf.detach() for leaf in leaves]).to("cpu", torch.float64)


def plain(entry: Mapping[str, Any]) -> Entry:
    """An evaluation's tensors in float64 on the CPU, as a checkpoint holds them."""
    return {name: value.detach().to("cpu", torch.float64) for name, value in entry.items()}


def require_finite(entry: Entry, name: str, step: int) -> None:
    """Raise `NonFiniteError` for an evaluation that is no number."""
    words = {"f": "loss", "slope": "hypergradient", "c": "inequality", "e": "equality", "A": "inequality's derivative"}
    for what, told in (words | {"E": "equality's derivative"}).items():
        if not bool(torch.isfinite(entry[what]).all()):
            raise NonFiniteError(
                f"Player {name!r}: its {told} is NaN or infinite in step {step}. Keep the leader where everything is "
                "defined by a domain=, or start elsewhere."
            )

"""How a run ends: the leaders where they are, the followers' answer to them, and what is to be said of both."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.errors import FollowerNonConvergenceWarning
from bilevel.game import Buffers, Size
from bilevel.randomness import random_kept
from bilevel.solving.driven import doubts, fitted
from bilevel.solving.leader_functions import broken
from bilevel.solving.leaders import tolerated
from bilevel.solving.progress_left import hardly_begun
from bilevel.solving.ran_away import ran_away
from bilevel.solving.run import Run
from bilevel.solving.solution import End, ended
from bilevel.solving.warning_log import RunWarning, as_run_warnings, caught, logged
from bilevel.tree import Variables, join, leaves, map_leaves


def solution(run: Run) -> End[Any]:
    """The leaders where they are and the followers' answer to them; warns of what still holds."""
    if run.leaders.driven:
        run.drive(0, lambda record: True)  # where it was not driven to its end: from what is known
    now = run.now
    # The last derivative belongs to the last step, the answer here needs none; a learned slope is judged here too.
    steps = run.followers.reports(now.states)
    _, products = run.work(now, now.states)
    with torch.no_grad(), random_kept(run.game.device), caught() as new:
        point = run.leaders.trees(run.leaders.points)
        variables, states, buffers = run.followers.respond(point, now.states, now.buffers)
    ends = run.followers.reports(states)
    variables = map_leaves(lambda t: t.detach(), dict(variables))
    values: dict[str, Tensor] = {}
    for name in run.game.names:
        values |= run.shown(name, variables, states, buffers)
    told = [RunWarning(text) for text in now.changes]
    told += as_run_warnings(logged(now.warned, new, now.step + 1, counted=False), now.step)
    told += [_still_loose(name, report.loosened) for name, report in steps.items() if report.loosened > 1.0]
    if far := _hardly_begun(run):
        told.append(far)
    if away := _ran_away(run):
        told.append(away)
    multipliers, violations, broken = _kept(run, variables, buffers, ends)
    told += broken
    told = list(dict.fromkeys(warning for each in run.game.everybodys(told) for warning in each))
    for warning in told:
        if warning.category is not None:
            warnings.warn(warning.text, warning.category, stacklevel=3)
    residuals = {n: steps[n].residual if _unknown(ends[n].residual) else ends[n].residual for n in ends}
    (gradients,) = run.game.most([now.gradients + sum(report.gradients for report in ends.values())])
    found = {
        "values": values,
        "stationarity": {name: report.stationarity for name, report in ends.items()},
        "residuals": {n: residual for n, residual in residuals.items() if residual is not None},
        "buffers": buffers,
        "multipliers": {n: state["multipliers"] for n, state in states.items() if state.get("multipliers")}
        | multipliers,
        "violations": violations,
    }
    return ended(
        run.game,
        errors={n: report.error for n, report in steps.items() if not math.isnan(report.error)},
        warned=told,
        variables=run.game.given_back(
            map_leaves(lambda t: t.detach().clone(), {name: variables[name] for name in run.game.names})
        ),
        history=run.history.records(),
        gradients=gradients,
        products=products,
        seconds=now.seconds,
        states=run.game.whole_states(states),
        **run.game.gathered(found),
    )


def _kept(
    run: Run, variables: Mapping[str, Variables], buffers: Buffers, ends: Mapping[str, Any]
) -> tuple[dict[str, Mapping[str, Variables]], dict[str, Any], list[RunWarning]]:
    """The leaders' multipliers and violations where they ended, and warnings of those that are broken."""
    found: dict[str, Mapping[str, Variables]] = {}
    off: dict[str, Any] = {}
    told: list[RunWarning] = []
    epsilon = torch.finfo(run.game.like.dtype).eps
    for name, functions in run.functions.items():
        with torch.no_grad(), random_kept(run.game.device):
            values = functions.values(variables, run.last_batch(name), buffers)
        if name in run.leaders.driven:
            assert run.driven is not None
            l, m, left = fitted(run.driven.best)
            l, m, tolerance = l[None], m[None], tolerated(run.leaders.driven[name], epsilon)
            loose = {other: report.stationarity for other, report in ends.items() if report.stationarity >= 0.0}
            told += doubts(name, run.driven, left, loose, epsilon)
        else:
            lagrangian = run.leaders.lagrangians[name]
            l, m = lagrangian.multipliers(dict(run.now.lagrangians[name]), *functions.rows(values))
            tolerance = tolerated(lagrangian, epsilon)
        if not values:
            continue
        found[name] = functions.formed(values, l, m)
        violation = functions.violation(values)
        off[name] = violation if violation.ndim else float(violation)
        if bool((violation > tolerance).any()):
            told.append(broken(functions, values, violation, tolerance))
    return found, off, told


def _hardly_begun(run: Run) -> RunWarning | None:
    """A single leader who is as far from an end as at the start; of several, a loss need not fall."""
    if len(run.leaders.names) != 1 or run.game.record_keys != ("",) or run.functions:
        return None
    (leader,) = run.leaders.names
    noisy = any(player.data is not None for player in run.game.players.values())
    return None if noisy else hardly_begun(leader, run.history.records())


def _ran_away(run: Run) -> RunWarning | None:
    """Leaders whose gradients grew all along; who is moved by SciPy looks at its loss."""
    if run.leaders.driven or run.game.record_keys != ("",):
        return None
    ends = run.leaders.trees(run.leaders.points)
    pairs = [(leaves(ends[name]), leaves(run.game.initial(name))) for name in run.leaders.names]
    start, end = join([leaf for _, begun in pairs for leaf in begun]), join([leaf for at, _ in pairs for leaf in at])
    apart = [float(torch.linalg.vector_norm(vector.detach().double())) for vector in (start, end - start)]
    return ran_away(run.leaders.names, run.history.records(), *apart)


def _still_loose(name: str, looser: float) -> RunWarning:
    """A follower whose last tolerances were not yet those that were asked for."""
    text = (
        f"The run ended while the inexactness= of {name!r} was still {looser:.3g} times looser than its tolerances: "
        "the leader's last step was taken with that. Give it more steps, or a faster schedule."
    )
    return RunWarning(text, category=FollowerNonConvergenceWarning)


def _unknown(residual: Size | None) -> bool:
    return isinstance(residual, float) and math.isnan(residual)

"""The certificate of a leader and a follower of whom at least one has constraints."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor

from bilevel.certificates.alone import Settings, members_alone
from bilevel.certificates.certificate import Certificate, Finding
from bilevel.certificates.constrained_point import MOST_KINKS, ConstrainedPoint, Piece
from bilevel.certificates.pieces import FEASIBLE, FIRST, SECOND, feasible, leaders_findings
from bilevel.certificates.verdicts import CERTIFIED, INCONCLUSIVE, attempt, bounded, faithful
from bilevel.constraints.active_set import KKTPoint
from bilevel.constraints.functions import Labels
from bilevel.constraints.regularity import weak
from bilevel.errors import BilevelError
from bilevel.game import Game
from bilevel.game.kkt import plain
from bilevel.responses import Response
from bilevel.responses.base import State

CONCEPT = "differential Stackelberg"


def has_constraints(game: Game, names: tuple[str, ...]) -> bool:
    """Whether one of these players, or of their members, has functions as constraints, a domain or a term."""
    members = [member for name in names for member in game.members(name)]
    return any(game.players[member].constraints or game.residual(member).projects for member in members)


@dataclass(frozen=True, eq=False)
class _Sides:
    """The pieces at a point, which constraints have a kink there, and the leader's findings on them."""

    pieces: list[Piece]
    story: str
    findings: list[Finding]
    scale: float


def certified_within(
    held: ConstrainedPoint, claim: Tensor | None, response: Response | None, state: State | None, settings: Settings
) -> Certificate:
    """What the conditions within constraints say; `claim` `[n]` is a hypergradient to judge, by default the point's."""
    findings = _followers_findings(held, settings)
    try:
        optimum = held.settled()
        exact = weak(optimum, held.programme.epsilon)
        sides = _sides(held, optimum, exact, settings.tolerance)
    except BilevelError as error:
        return _unknown(held, findings, settings.tolerance, f"the follower has no answer to differentiate: {error}")
    # A leader that has come near a kink, and a point that is near binding, are at it within the tolerance.
    loose = (optimum.distances.abs() <= settings.tolerance) & (optimum.pushes <= settings.tolerance)
    if any(part.standing is not CERTIFIED for part in sides.findings) and bool((loose ^ exact).any()):
        wider = attempt(lambda: _sides(held, optimum, loose, settings.tolerance))
        if wider is not None and all(part.standing is CERTIFIED for part in wider.findings):
            sides = wider
    answer = None if response is None else held.answer(response, state)
    if answer is not None and claim is None:
        claim = answer.gradient
    h = _claimed(held, sides.pieces) if claim is None else plain(claim)
    nearest = min(sides.pieces, key=lambda piece: float((piece.gradient - h).norm()))
    estimate = float((nearest.gradient - h).norm())
    # What rounding leaves of the follower's optimum and of its linear system.
    left = 100.0 * held.programme.epsilon * nearest.condition * sides.scale
    note = f"the nearest of {len(sides.pieces)} one-sided ones" if len(sides.pieces) > 1 else ""
    findings.append(bounded(estimate + left, estimate, sides.scale, settings.tolerance, note))
    if answer is not None:
        findings.append(faithful(lambda: held.directional(answer, nearest)))
    findings += sides.findings
    form = held.form
    one_sided = {
        ", ".join(piece.held) or "none of them": form.unflatten(piece.gradient.to(held.x)) for piece in sides.pieces
    }
    return Certificate(
        CONCEPT,
        tuple(findings),
        hypergradient=form.unflatten(h.to(held.x)),
        corrected=form.unflatten(nearest.gradient.to(held.x)),
        hypergradient_norm=float(h.norm()),
        error_estimate=estimate,
        error_bound=estimate + left,
        corrected_bound=left,
        gradients=held.count_gradients,
        products=held.count_products,
        one_sided=one_sided if len(sides.pieces) > 1 else {},
    )


def _sides(held: ConstrainedPoint, optimum: KKTPoint, bent: Tensor, tolerance: float) -> _Sides:
    count, labels = int(bent.sum()), held.programme.labels
    if count > MOST_KINKS:
        raise BilevelError(
            f"{count} of its constraints bind with a multiplier of 0; at most {MOST_KINKS} are looked at"
        )
    pieces = held.pieces(optimum, bent)
    scales = [float(piece.direct.norm()) + float((piece.gradient - piece.direct).norm()) for piece in pieces]
    scale = max(held.reference, *scales)
    story = _story(labels, bent, pieces)
    findings = leaders_findings(held, pieces, scale, tolerance, story)
    if held.inequalities or held.equalities:
        findings.insert(0, feasible(held, pieces[0], tolerance))
    return _Sides(pieces, story, findings, scale)


def _story(labels: Labels, bent: Tensor, pieces: list[Piece]) -> str:
    """The kink in words: who binds with a multiplier of 0, and the hypergradients with and without."""
    if len(pieces) < 2:
        return ""
    names = [labels.inequality[place] for place in bent.nonzero().flatten().tolist()]

    def told(piece: Piece) -> str:
        entries = ", ".join(f"{entry:.4g}" for entry in piece.gradient[:3].tolist())
        return f"[{entries}{', ...' if len(piece.gradient) > 3 else ''}]"

    return (
        f"a kink of {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}: the hypergradient is "
        f"{told(pieces[0])} where they bind and {told(pieces[-1])} where they do not"
    )


def _followers_findings(held: ConstrainedPoint, settings: Settings) -> list[Finding]:
    """Those of each member, at the point as it is; of one who follows alone they are called the follower's."""
    game, start = held.original, {name: held.original.initial(name) for name in held.original.names}
    batch = held.batches[held.follower]
    alone = members_alone(game, held.follower, held.variables, start, batch, held.buffers, settings)
    held.count_gradients += sum(part.gradients for part in alone)
    held.count_products += sum(part.products for part in alone)
    findings = [finding for part in alone for finding in part.findings]
    if game.members(held.follower) != (held.follower,):
        return findings
    called = {"feasible": "follower's feasibility"}
    kinds = [finding.name.removeprefix(f"{held.follower}: ") for finding in findings]
    return [
        replace(finding, name=called.get(kind, f"follower's {kind}"))
        for finding, kind in zip(findings, kinds, strict=True)
    ]


def _claimed(held: ConstrainedPoint, pieces: list[Piece]) -> Tensor:
    """The hypergradient where the follower is; at its optimum's own where it has none."""
    found = attempt(lambda: held.piece(held.given(), [], ()))
    return pieces[0].gradient if found is None else found.gradient


def _unknown(held: ConstrainedPoint, findings: list[Finding], tolerance: float, reason: str) -> Certificate:
    names = ["hypergradient's error", *([FEASIBLE] if held.inequalities or held.equalities else []), FIRST, SECOND]
    wanted = {SECOND: "> 0"}
    findings += [Finding(name, INCONCLUSIVE, math.nan, wanted.get(name, f"<= {tolerance:g}"), reason) for name in names]
    return Certificate(CONCEPT, tuple(findings), gradients=held.count_gradients, products=held.count_products)

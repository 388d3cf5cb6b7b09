"""Laws of invariance: changes of the game that the hypergradient follows exactly, or does not notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.testing import strategies
from bilevel.testing.changes import (
    LaidOut,
    LeaderMix,
    LeaderTermInFollower,
    LinearMap,
    Reparametrised,
    ScaledFollower,
)
from bilevel.testing.forms import Nested, Scalar
from bilevel.testing.known import KnownGame
from bilevel.testing.laws.answers import informative, require_close, require_converging
from bilevel.testing.laws.base import Law
from bilevel.testing.subject import NotOffered, Subject
from bilevel.testing.tolerance import exact, stated_error, tolerance

Pair = tuple[KnownGame, KnownGame]


def _answer(subject: Subject, known: KnownGame) -> tuple[Tensor, float, float]:
    """Hypergradient, how far it may be off, and its scale."""
    steps, truth = require_converging(subject), exact(known)
    found = subject.evaluate(known, steps)
    allowed = tolerance(known, subject, found, steps, truth) + stated_error(subject, truth)
    return found.gradient, allowed, truth.scale


def _agree(subject: Subject, first: KnownGame, second: KnownGame, back: Tensor | None, what: str) -> None:
    """The two games' hypergradients are the same, the second carried back by `back` `[n, n]`."""
    one, allowed, scale = _answer(subject, first)
    other, also, _ = _answer(subject, second)
    if back is not None:
        other, also = back @ other, also * float(torch.linalg.matrix_norm(back, 2))
    informative(allowed + also, scale)
    require_close(other, one, allowed + also, what)


def _changed(change: Callable[[st.DrawFn, KnownGame], KnownGame]) -> Callable[[], Any]:
    """A strategy of games with something changed."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> KnownGame:
        return change(draw, draw(strategies.leader_follower()))

    return draw_one


def scaling(subject: Subject, changed: ScaledFollower) -> None:
    """A positive factor of the follower's loss changes nothing."""
    _agree(subject, changed.inner, changed, None, f"with {changed.factor} times the follower's loss")


def leader_term(subject: Subject, changed: LeaderTermInFollower) -> None:
    """A term of the leader alone in the follower's loss changes nothing."""
    _agree(subject, changed.inner, changed, None, "with a term of the leader alone in the follower's loss")


def follower_coordinates(subject: Subject, changed: Reparametrised) -> None:
    """The hypergradient does not notice the follower's coordinates."""
    _agree(subject, changed.inner, changed, None, "in other coordinates of the follower")


def leader_coordinates(subject: Subject, changed: Reparametrised) -> None:
    """The hypergradient turns with the leader's coordinates."""
    assert changed.leader_map is not None
    back = torch.linalg.inv(changed.leader_map.matrix(changed.inner.x0)).T
    _agree(subject, changed.inner, changed, back, "in other coordinates of the leader")


def leaf_order(subject: Subject, known: KnownGame) -> None:
    """Neither the nest of the variables nor the order of its keys matters."""
    _agree(subject, known, LaidOut(known, Nested(), Nested()), None, "as nests")
    _agree(subject, known, LaidOut(known, Nested(reverse=True), Nested(reverse=True)), None, "as reversed nests")


def scalars(subject: Subject, known: KnownGame) -> None:
    """A 0-d tensor is a vector of one entry, bit for bit up to rounding."""
    if known.x0.numel() > 1 or known.y0.numel() > 1:
        raise NotOffered("More than one entry.")
    _agree(subject, known, LaidOut(known, Scalar(), Scalar()), None, "as scalars")


def linear_in_leader(subject: Subject, mixed: LeaderMix) -> None:
    """The hypergradient is linear in the leader's loss."""
    parts = [replace(mixed, first=1.0, second=0.0), replace(mixed, first=0.0, second=1.0)]
    (one, e1, scale), (two, e2, other), (both, e3, _) = (_answer(subject, game) for game in (*parts, mixed))
    allowed = abs(mixed.first) * e1 + abs(mixed.second) * e2 + e3
    informative(allowed, scale + other)
    require_close(both, mixed.first * one + mixed.second * two, allowed, "of a sum of leaders' losses")


def _mapped(side: str, maps: Callable[[int], st.SearchStrategy[Any]]) -> Callable[[], Any]:
    def change(draw: st.DrawFn, known: KnownGame) -> KnownGame:
        size = known.x0.numel() if side == "leader" else known.y0.numel()
        mapping: LinearMap = draw(maps(size))
        if side == "leader":
            return Reparametrised(known, leader_map=mapping)
        return Reparametrised(known, follower_map=mapping)

    return _changed(change)


def _one_entry() -> st.SearchStrategy[KnownGame]:
    return st.one_of(
        strategies.quadratics(1, 1), strategies.ridges(1), strategies.exponentials(1, 1), strategies.cournots()
    )


_factor = st.sampled_from((0.5, 0.75, 0.25))
_scaled = _changed(lambda draw, known: ScaledFollower(known, draw(_factor)))
_with_term = _changed(lambda draw, known: LeaderTermInFollower(known, draw(st.sampled_from((1.0, -2.0, 8.0)))))
_mixtures = _changed(
    lambda draw, known: LeaderMix(known, draw(st.sampled_from((1.0, 2.0, -0.5))), draw(st.sampled_from((1.0, -3.0))))
)

INVARIANCE = (
    Law("scaled follower", "a factor of the follower's loss", _scaled, scaling, 0.5),
    Law("leader's term", "a term of the leader alone in the follower's loss", _with_term, leader_term, 0.5),
    Law("turned follower", "orthogonal", _mapped("follower", strategies.reflections), follower_coordinates),
    Law("stretched follower", "diagonal", _mapped("follower", strategies.stretches), follower_coordinates),
    Law("turned leader", "orthogonal", _mapped("leader", strategies.reflections), leader_coordinates),
    Law("stretched leader", "diagonal", _mapped("leader", strategies.stretches), leader_coordinates),
    Law("order of leaves", "nests and their order", strategies.leader_follower, leaf_order, 0.3),
    Law("scalar = vector", "0-d tensors are vectors of one entry", _one_entry, scalars, 0.5),
    Law("linear in the leader", "sums of leaders' losses", _mixtures, linear_in_leader, 0.4),
)

"""`gradcheck` for a hypergradient: what autograd gives, against finite differences of re-solved followers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch

from bilevel.game import Game
from bilevel.game.data import Batch
from bilevel.randomness import random_kept, random_state
from bilevel.responses import Response, State
from bilevel.testing.diagnosis import diagnosis
from bilevel.testing.evidence import Verdict, claimed, gathered
from bilevel.testing.losses import LeaderFollowerLosses, still
from bilevel.tree import Variables, detached, flatten, leaves


@final
@dataclass(frozen=True)
class Row:
    """One direction of unit length.

    Attributes:
        direction: Which one.
        claimed: The derivative along it by autograd.
        difference: The derivative along it by finite differences.
        error: What the difference may be wrong by.
    """

    direction: str
    claimed: float
    difference: float
    error: float


@final
@dataclass(frozen=True)
class HypergradientCheck:
    """The answer of `check_hypergradient`; true only when the hypergradient is right.

    `print(check)` shows all of it; `assert check, str(check)` shows it in a failing test.

    Attributes:
        verdict: Right when error + uncertainty <= tolerance, wrong when error - uncertainty > tolerance.
        error: |claimed - true| / |true|, as far as the directions show it.
        uncertainty: What finite differences may be wrong by, in the same units.
        tolerance: `rtol`, plus `atol` over the gradient's size.
        rows: The directions.
        findings: What is wrong or in the way, in words, the gravest first.
        leader: Whose hypergradient it is.
        follower: Through whose response.
        seconds: That it took.
    """

    verdict: Verdict
    error: float
    uncertainty: float
    tolerance: float
    rows: tuple[Row, ...]
    findings: tuple[str, ...]
    leader: str
    follower: str
    seconds: float = field(compare=False)

    def __bool__(self) -> bool:
        """Whether the hypergradient is right."""
        return self.verdict is Verdict.RIGHT

    @property
    def summary(self) -> str:
        """The verdict with its numbers, in a line."""
        who = f"hypergradient of {self.leader!r} through {self.follower!r}"
        if not self.rows:
            return f"{who}: {self.verdict.value}"
        told = f"{who}: {self.verdict.value}, off by {self.error:.2g} +- {self.uncertainty:.1g} of its size"
        return f"{told} (tolerance {self.tolerance:.2g})"

    def __repr__(self) -> str:
        """A line that pytest does not cut."""
        first = f"; {self.findings[0]}" if self.findings else ""
        line = f"<{self.summary}{first}>"
        return line if len(line) <= 230 else line[:226] + "...>"

    def __str__(self) -> str:
        """The summary, a table of the directions, and the findings."""
        lines = [self.summary]
        if self.rows:
            width = max(len(row.direction) for row in self.rows)
            lines.append(f"  {'direction':<{width}}  {'claimed':>12}  {'differences':>12}     error")
            for row in self.rows:
                lines.append(
                    f"  {row.direction:<{width}}  {row.claimed:>12.5g}  {row.difference:>12.5g}  +- {row.error:.1g}"
                )
        return "\n".join([*lines, *(f"* {finding}" for finding in self.findings)])


def check_hypergradient(
    game: Game,
    response: Response,
    *,
    leader: str | None = None,
    follower: str | None = None,
    at: Mapping[str, Variables] | None = None,
    state: State | None = None,
    batches: Mapping[str, Batch] | None = None,
    settle: int = 0,
    directions: int = 3,
    rtol: float = 1e-2,
    atol: float | None = None,
    seed: int = 0,
) -> HypergradientCheck:
    r"""Is the hypergradient through `response` right? Finite differences of re-solved followers, at your own game.

    $$
    \text{claimed: } \tfrac{d}{dx}\, g(x, \text{response}(x)) \text{ by autograd}, \qquad
    \text{true: } \tfrac{d}{dx}\, g(x, \operatorname{argmin}_y f(x, y))
    $$

    The follower is solved anew, within its constraints, at $x \pm h d$ for directions $d$: the claimed gradient's own,
    and random ones at right angles. The answer is right, wrong beyond doubt, or cannot be told; its `findings` say why,
    and the way out. A right answer at one point and batch is no proof for others.

    Costs about six re-solved followers a direction.

    Args:
        game: Your own; batches and random numbers stand still, and running statistics move with the weights.
        response: The follower's.
        leader: Default: the first player.
        follower: Default: the last player.
        at: Others' variables where they are not their init.
        state: The response's, from a run of yours; default: a fresh one.
        batches: Default: the first of each player's data.
        settle: Calls at the same point that come first, for a response that warms up.
        directions: With three an error of five times `rtol` is missed once in 25 checks, with six once in a thousand.
        rtol: Relative error that is accepted.
        atol: Absolute error; default 1e-8, in float32 1e-5.
        seed: Of directions and batches.

    Raises:
        ValueError: For wrong arguments; TypeError for what is no response.

    Examples:
        >>> from bilevel import Implicit, Scipy, testing
        >>> known = testing.Quadratic((0.5, 1.0), coupling=((1.0,), (0.5,)), at=(2.0,))
        >>> response = Implicit(Scipy("L-BFGS-B"), tolerance=1e-6)
        >>> bool(check_hypergradient(known.game(), response))
        True
    """
    game.require_one("check_hypergradient")
    began = time.perf_counter()
    leader, follower = _named(game, leader, follower)
    if not isinstance(response, Response):
        raise TypeError(f"check_hypergradient: response={response!r}; expected an instance of bilevel.Response.")
    if directions < 1 or settle < 0 or not rtol > 0.0 or (atol is not None and not atol >= 0.0):
        raise ValueError(
            f"check_hypergradient: directions={directions}, settle={settle}, rtol={rtol}, atol={atol}; expected "
            "directions >= 1, settle >= 0, rtol > 0 and atol >= 0."
        )
    point = _point(game, follower, at)
    x = flatten(point.pop(leader))
    if atol is None:
        atol = 1e-8 if x.dtype == torch.float64 else 1e-5
    with random_kept(game.device, start=seed), torch.enable_grad():
        given = _batches(game, batches, seed)
        quiet = still(game, given, random_state(game.device))
        if state is None:
            state = response.init(quiet, follower=follower, seed=seed)
        buffers = {follower: state["buffers"]} if state.get("buffers") else {}
        held = LeaderFollowerLosses(quiet, leader, follower, point, given, buffers)
        claim = claimed(held, response, x, state, settle)
        evidence = gathered(claim, count=directions, rtol=rtol, atol=atol, seed=seed)
        verdict, error, uncertainty, tolerance = evidence.judged()
        findings = diagnosis(evidence, verdict)
    rows = [
        Row(name, float(slope), found.value, found.error)
        for name, slope, found in zip(evidence.names, evidence.claimed, evidence.slopes, strict=True)
    ]
    seconds = time.perf_counter() - began
    return HypergradientCheck(verdict, error, uncertainty, tolerance, tuple(rows), findings, leader, follower, seconds)


def _named(game: Game, leader: str | None, follower: str | None) -> tuple[str, str]:
    """The pair of players, the leader before the follower."""
    if not isinstance(game, Game):
        raise TypeError(f"check_hypergradient: game is a {type(game).__name__}; expected a bilevel.Game.")
    names = list(game.names)
    game.require_minima("check_hypergradient", constrained=True)
    if game.anticipated:
        raise ValueError(
            f"check_hypergradient: {sorted(game.anticipated)} of this game answer by functions of their own; expected "
            "a game as it was declared. Pass that, and their variables in at=."
        )
    if len(names) < 2:
        raise ValueError(f"check_hypergradient: the game has only {names}; a leader needs a follower after it.")
    leader, follower = leader or names[0], follower or names[-1]
    for role, name in (("leader", leader), ("follower", follower)):
        if name not in names:
            raise ValueError(f"check_hypergradient: {role}={name!r} is no player; players are {names}.")
    if names.index(leader) >= names.index(follower):
        raise ValueError(
            f"check_hypergradient: {leader!r} does not move before {follower!r} in {names}, so that it anticipates "
            "nothing. Name leader= and follower= in their order of play."
        )
    alone = game.starts_alone(follower)
    if alone:
        raise ValueError(
            f"check_hypergradient: {alone[0]} reaches {follower!r} by its start= and no loss, and the follower is "
            "solved anew here until it rests, where its start is forgotten. Hold such steps against differences of the "
            "steps themselves: torch.autograd.gradcheck of the leader's loss."
        )
    return leader, follower


def _point(game: Game, follower: str, at: Mapping[str, Variables] | None) -> dict[str, Variables]:
    """The variables of everybody but the follower, detached."""
    point = {name: game.initial(name) for name in game.names if name != follower}
    for name, variables in (at or {}).items():
        if name not in point:
            raise ValueError(
                f"check_hypergradient: at= holds variables of {name!r}; expected those of {list(point)}. The follower "
                f"{follower!r} answers: where it starts is in state=."
            )
        game.check(name, variables)
        wanted = leaves(point[name])[0]
        for leaf in leaves(variables):
            if leaf.dtype != wanted.dtype or leaf.device != wanted.device or not bool(torch.isfinite(leaf).all()):
                raise ValueError(
                    f"check_hypergradient: at[{name!r}] holds {leaf.dtype} on {leaf.device}, or is not finite; "
                    f"expected finite numbers like its init's, {wanted.dtype} on {wanted.device}."
                )
        point[name] = detached(variables)
    return point


def _batches(game: Game, given: Mapping[str, Batch] | None, seed: int) -> dict[str, Batch]:
    """The batch that each player with data keeps."""
    with_data = [name for name, player in game.players.items() if player.data is not None]
    for name in given or {}:
        if name not in with_data:
            raise ValueError(f"check_hypergradient: batches= has one for {name!r}; players with data are {with_data}.")
    return {n: (given or {})[n] if n in (given or {}) else game.draw(n, game.start(n, seed))[0] for n in with_data}

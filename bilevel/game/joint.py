r"""Several followers who answer together within constraints of their own, and within some that they share.

Each solves its own programme, all others standing still. What one constraint's multiplier pushes is whoever bears it:
one player, or for a shared constraint all who share it, by the same multiplier. With one multiplier for all of them it
is a *variational* equilibrium, the one among the generalised Nash equilibria at which nobody bears more of a shared
constraint than another. Source: Rosen 1965, Econometrica 33(3); Facchinei & Kanzow 2007, 4OR 5.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, final

import torch
from torch import Tensor

from bilevel.autodiff import gradient, jacobian
from bilevel.constraints.active_set import optimum, reached
from bilevel.constraints.equilibrium import require_regular_equilibrium
from bilevel.constraints.functions import (
    DOMAIN,
    DOMAIN_EQUALITY,
    EQUALITY,
    INEQUALITIES,
    INEQUALITY,
    Linearised,
    named_functions,
)
from bilevel.constraints.regularity import require_feasible
from bilevel.constraints.walls import has_walls
from bilevel.game.constrained import ConstrainedGradient
from bilevel.game.kkt import KKT, FollowerProgramme, in_order, plain, rest_of, stacked_values, unknowns_of, walls_of
from bilevel.game.residual import Found, MembersGradients, OwnGradient, Residual, Rest, required
from bilevel.game.situation import Present, Situation
from bilevel.randomness import random_kept
from bilevel.tree import Variables, flatten, join, leaves, map_leaves

SHARED = "shared"
"""Under this name stand the shared constraints, among the members' own."""


@final
@dataclass(frozen=True, eq=False)
class SharedFunction:
    """A function that constrains several players who answer together, by one multiplier."""

    kind: str
    function: Callable[..., Variables]
    bearers: tuple[str, ...]


@final
@dataclass(frozen=True, eq=False)
class JointKKT(Residual):
    r"""The stacked Karush-Kuhn-Tucker conditions of players who answer together, a function of z = (y, l, m).

    $$
    F = \big((\nabla_{y_i} [f_i + l_i^\top c_i + m_i^\top e_i])_i,\; c \text{ where it binds, else } l,\; e\big)
    $$

    The constraints of player i are its own and those that it shares. Which bind is told by z itself, l > 0, as in
    `KKT`. dF/dz is not symmetric.

    Args:
        members: The members' own constraints, without those that they share, by name.
        shared: Those that they share.
    """

    members: Mapping[str, KKT]
    shared: tuple[SharedFunction, ...] = ()
    symmetric = False
    definite = False
    minimises = False
    differentiates_loss = False

    @staticmethod
    def of(rests: Mapping[str, Residual], told: str) -> JointKKT:
        """That of members with these residuals; raises `ValueError`, beginning with `told`, where they have none."""
        plain_members = {name: _as_kkt(name, rests[name], told) for name in rests}
        shared = _shared(plain_members, told)
        if shared and SHARED in rests:
            raise ValueError(f"{told}: they share a constraint, and {SHARED!r} names one of them. Rename the player.")
        taken = [part.function for part in shared]
        members = {
            name: KKT(_without(own.inequality, taken), _without(own.equality, taken), own.domain)
            for name, own in plain_members.items()
        }
        return JointKKT(members, shared)

    def values(self, at: Situation, variables: Mapping[str, Variables]) -> dict[str, Variables]:
        """What the constraints are, by kind and then by member; those that are shared under "shared".

        Several shared ones of a kind are a list, in the order in which the players first name them.
        """
        return self._values(at, lambda bearers: variables)

    def _values(
        self, at: Situation, seen: Callable[[tuple[str, ...]], Mapping[str, Variables]]
    ) -> dict[str, Variables]:
        """The constraints, each at the variables that those who bear it are `seen` to have."""
        found: dict[str, dict[str, Variables]] = {}

        def called(member: str, function: Callable[..., Variables], bearers: tuple[str, ...]) -> Variables:
            return at.of(member, at.others).call(function, seen(bearers))[0]

        for member, own in self.members.items():
            for kind, functions in ((INEQUALITY, own.inequality), (EQUALITY, own.equality)):
                if functions is not None:
                    built = map_leaves(lambda f, m=member: called(m, f, (m,)), functions)
                    found.setdefault(kind, {})[member] = built
            if own.domain is not None:
                both = walls_of(at.game, member, own.domain, seen((member,)))
                for kind, built in zip((DOMAIN, DOMAIN_EQUALITY), both, strict=True):
                    found.setdefault(kind, {})[member] = built
        for kind in (INEQUALITY, EQUALITY):
            # A shared function takes no batch, so that it is the same whoever of its bearers is said to call it.
            together = [called(s.bearers[0], s.function, s.bearers) for s in self.shared if s.kind == kind]
            if together:
                found.setdefault(kind, {})[SHARED] = together[0] if len(together) == 1 else together
        return in_order(found)

    def bearers(self, values: Mapping[str, Any]) -> list[tuple[int, tuple[str, ...]]]:
        """For each run of entries of the values, as they lie in a flat vector: how many, and who bears them."""
        found: list[tuple[int, tuple[str, ...]]] = []
        for kind, by_member in values.items():
            for name, tree in by_member.items():
                together = [part for part in self.shared if part.kind == kind]
                if name != SHARED or not together:
                    found.append((sum(leaf.numel() for leaf in leaves(tree)), (name,)))
                    continue
                parts = [tree] if len(together) == 1 else tree
                for part, value in zip(together, parts, strict=True):
                    found.append((sum(leaf.numel() for leaf in leaves(value)), part.bearers))
        return found

    def require_valid(self, at: Situation) -> None:
        """Raise `ValueError` where the players have made a member's domain empty."""
        for member, own in self.members.items():
            if own.domain is not None and not set(own.domain.players) & set(self.members):
                own.require_valid(at.of(member, at.others))

    def __call__(self, at: Situation, y: Sequence[Tensor]) -> Found:
        """The members' own gradients; the constraints come by `programme`."""
        return MembersGradients(dict.fromkeys(self.members, OwnGradient()))(at, y)

    def flat(self, at: Situation, y: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the members' losses, and F at `z: [n + m + p]`."""
        form = at.form
        values = self.values(at, at.at_flat(y[: form.size]))
        flat = stacked_values(values, y)
        above = sum(leaf.numel() for kind, tree in values.items() if kind in INEQUALITIES for leaf in leaves(tree))
        l, m = y[form.size : form.size + above], y[form.size + above :]
        binds = l > 0.0
        weights = torch.cat([torch.where(binds, l, 0.0), m])
        total, slope = self.pushed(at, y[: form.size], weights)
        return total, torch.cat([slope, torch.where(binds, flat[:above], l), flat[above:]])

    def pushed(self, at: Situation, y: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of losses and weighted constraints, and each member's gradient of its Lagrangian, stacked `[n]`.

        `weights` is `[m + p]`. At a solution the sum is that of the losses. Each loss is evaluated once, and so is each
        constraint: what does not bear it stands still there, and one gradient of the sum is the stack of them.
        """
        size, places = at.form.size, places_of(at.form, y)

        def lagrangians(live: Tensor) -> Tensor:
            def seen(bearers: tuple[str, ...]) -> Mapping[str, Variables]:
                moving = torch.zeros(size, dtype=torch.bool, device=y.device)
                for name in bearers:
                    moving[places[name]] = True
                # `y` itself is no constant: second derivatives go through it.
                return at.at_flat(torch.where(moving, live, y))

            losses = [at.of(member, at.others).loss(seen((member,)))[0] for member in self.members]
            values = self._values(at, seen)
            borne = (weights * flatten(list(values.values()))).sum() if values else 0.0
            return torch.stack(losses).sum() + borne

        total, (slope,) = gradient(lagrangians, y)
        return total, slope

    def first(self, follower: Present) -> dict[str, Any]:
        """Multipliers of 0, in the form of what the constraints return."""
        return {"multipliers": JointProgramme(follower, self).no_multipliers()}

    def programme(self, follower: Present) -> JointProgramme:
        """Their programmes together, on the present batches."""
        return JointProgramme(follower, self)

    def brought_to_rest(self, follower: Present, y: Sequence[Tensor]) -> Rest:
        """The equilibrium near y with its multipliers; see `bilevel.constraints.active_set`.

        Raises `InfeasibleError`, `DependentConstraintsError` or `CurvatureError` by name.
        """
        programme, like = JointProgramme(follower, self), join(list(y))
        point = optimum(programme, like.detach().to("cpu", torch.float64))
        require_feasible(point, programme.labels, programme.epsilon)
        if not reached(point, programme.epsilon):
            return Rest(unknowns_of(point, point.l, like))  # how far it is from rest is measured, and told
        require_regular_equilibrium(point, programme.labels, programme.places, programme.epsilon)
        return rest_of(programme, point, like)


def places_of(form: Any, like: Tensor) -> dict[str, Tensor]:
    """Where each member's entries lie in a flat vector laid out as `form`."""
    tree = form.unflatten(torch.arange(form.size, device=like.device))
    return {member: flatten(own) for member, own in tree.items()}


class JointProgramme(FollowerProgramme):
    """The programmes of players who answer together, in flat float64 vectors on the CPU."""

    minimises = False

    def __init__(self, follower: Present, rests: JointKKT) -> None:
        super().__init__(follower, rests)
        self._joint = rests

    @property
    def places(self) -> dict[str, Tensor]:
        """Where each member's entries lie in a flat y."""
        return places_of(self.follower.form, torch.empty(0))

    def loss_and_gradient(self, y: Tensor) -> tuple[float, Tensor]:
        """The sum of the losses, and the stacked own gradients `[n]`."""
        follower = self.follower
        with torch.no_grad(), random_kept(follower.game.device, start=self.random):
            loss, slopes, _ = self._joint(self.situation, follower.form.split(self.own(y)))
        follower.count(1)
        return float(loss), plain(join(slopes))

    def linearised(self, y: Tensor) -> Linearised:
        """The constraints, their Jacobians, and who bears them."""
        at = super().linearised(y)
        with torch.no_grad():
            values = self.values(self.own(y))
        rows = []
        for count, who in self._joint.bearers(values):
            row = torch.zeros(count, len(y), dtype=at.A.dtype)
            for member in who:
                row[:, self.places[member]] = 1.0
            rows.append(row)
        return at._replace(bearers=torch.cat(rows) if rows else torch.zeros(0, len(y), dtype=at.A.dtype))

    def hessian(self, y: Tensor, inequality: Tensor, equality: Tensor) -> Tensor:
        """The derivative `[n, n]` of the members' gradients of their Lagrangians, stacked; it is not symmetric."""
        weights = torch.cat([inequality, equality])

        def stacked(y: Tensor) -> Tensor:
            with random_kept(self.follower.game.device, start=self.random), torch.enable_grad():
                return self._joint.pushed(self.situation, y, weights.to(y))[1]

        return plain(jacobian(stacked, self.own(y))[1])


def _as_kkt(name: str, rests: Residual, told: str) -> KKT:
    """A member's residual as one with walls and functions alone."""
    if isinstance(rests, KKT):
        return rests
    if isinstance(rests, OwnGradient):
        return KKT(None, None)
    if isinstance(rests, ConstrainedGradient) and rests.prox is None and rests.domain is not None:
        if has_walls(rests.domain):
            return KKT(None, None, rests.domain)
        raise ValueError(
            f"{told}: {name!r} has the domain {rests.domain!r}, which is no set of smooth functions, and another of "
            "them has functions as constraints. Bounds, Simplex, Halfspace, Affine, Ball(p=2) and products of them "
            "can stand beside functions; or say it as inequality=."
        )
    what = "prox=" if isinstance(rests, ConstrainedGradient) else "a residual of its own"
    raise ValueError(
        f"{told}: {name!r} has {what}, and another of them has functions as constraints; these need smooth losses. "
        "Give each of them a response of its own, or write all of it as functions."
    )


def _shared(members: Mapping[str, KKT], told: str) -> tuple[SharedFunction, ...]:
    """What several members have in common, which is known by its being the same function."""
    seen: list[tuple[str, Callable[..., Variables], list[str]]] = []
    for name, own in members.items():
        mine: list[Callable[..., Variables]] = []
        for kind, functions in ((INEQUALITY, own.inequality), (EQUALITY, own.equality)):
            for label, function in named_functions(kind, functions).items():
                if any(same(function, other) for other in mine):
                    raise ValueError(
                        f"{told}: {name!r} has the function of its {label} twice; its multipliers could not be told "
                        "apart. Give it once."
                    )
                mine.append(function)
                known = next((entry for entry in seen if same(entry[1], function)), None)
                if known is None:
                    seen.append((kind, function, [name]))
                elif known[0] != kind:
                    raise ValueError(
                        f"{told}: the function of {name!r}'s {label} is {known[0]}= of {known[2][0]!r}; a constraint "
                        "that they share is of one kind. Say which."
                    )
                else:
                    known[2].append(name)
    found = tuple(SharedFunction(kind, f, tuple(names)) for kind, f, names in seen if len(names) > 1)
    for part in found:
        if "batch" in required(part.function):
            raise ValueError(
                f"{told}: {list(part.bearers)} share a function as {part.kind}= that takes `batch`, and each of them "
                "has batches of its own: for one constraint there is none. Leave batch out, as by a player's "
                "variables or numbers that it captures; or give each of them a function of its own."
            )
    return found


def same(first: Callable[..., Any], second: Callable[..., Any]) -> bool:
    """Whether two functions are one; a bound method is made anew each time that it is looked up."""
    return first is second or (isinstance(first, MethodType) and first == second)


def _without(functions: Any, taken: Sequence[Callable[..., Any]]) -> Any:
    """Functions without some; None where none is left."""
    if functions is None:
        return None

    def left(function: Callable[..., Any]) -> bool:
        return not any(same(function, other) for other in taken)

    if isinstance(functions, Mapping):
        return {key: f for key, f in functions.items() if left(f)} or None
    if isinstance(functions, list | tuple):
        return [f for f in functions if left(f)] or None
    return functions if left(functions) else None


__all__ = ["SHARED", "JointKKT", "JointProgramme", "SharedFunction", "same"]

"""What a point is worth: how far its hypergradient can be wrong, and whether it is an equilibrium."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bilevel.autodiff import Pullback, gradient, pullback
from bilevel.certificate import Certificate, Finding, Standing
from bilevel.data import Batch
from bilevel.errors import NonConvergenceWarning
from bilevel.game import Game
from bilevel.linear import ConjugateGradient, LinearOperator
from bilevel.linear.lanczos import Spectrum, extreme_eigenvalues
from bilevel.randomness import random_kept, random_state
from bilevel.responses import Response
from bilevel.responses.base import Follower, State, fresh_state
from bilevel.root import attach
from bilevel.solution import Solution
from bilevel.tree import Variables, flatten, leaves, map_leaves, named_leaves


def certify(
    game: Game,
    point: Solution | Mapping[str, Variables],
    *,
    leader: str | None = None,
    follower: str | None = None,
    response: Response | None = None,
    hypergradient: Variables = None,
    batches: Mapping[str, Batch] | None = None,
    tolerance: float = 1e-3,
    lanczos_steps: int = 30,
    seed: int = 0,
) -> Certificate:
    r"""Whether a point is a differential Stackelberg equilibrium, and how far its hypergradient can be wrong.

        |h - h*| <= |h - h1| + S |grad_y f(y1)| / mu + |f_yx| |r| / mu,    y1 = y - H^-1 grad_y f(y)

    h is the hypergradient at the point: `hypergradient` if given, else the one that `response` gives at its state in
    the solution, else the implicit one. h* is the exact one at the follower's optimum. h1, the `corrected`
    hypergradient, is taken after one Newton step of the follower, whose error is second order; r is the residual of
    its linear solve, mu the smallest eigenvalue of H = grad_yy f, S how fast the hypergradient changes with y. `point`
    is a `Solution` or all players' variables; `batches` are held (default: each player's first), as are buffers and
    random numbers.

    The conditions: the follower is stationary (relative to the game's start) and its Hessian positive definite; the
    hypergradient's error is below `tolerance` times |g_x| + |f_yx| |u|; with a `response`, its derivative agrees with
    the implicit one in fresh directions (cosine >= 0.95, size 0.8 to 1.25); the corrected hypergradient vanishes
    within `tolerance`; the total second derivative is positive definite. Each is certified, refuted or inconclusive.

    What is assumed: f is twice differentiable with a positive-definite Hessian between y and its optimum, and the
    constants, estimated at the point (mu by Lanczos, S and |f_yx| by random directions), hold there. A negative
    Rayleigh quotient refutes rigorously; a positive-definite verdict from fewer products than unknowns holds with
    probability 0.999 over the random start. With minibatches it speaks of the held batch.

    Costs 2 `lanczos_steps` products (each of the leader's second derivative takes two linear solves) and five linear
    solves by conjugate gradients. Raises `ValueError` for missing players and wrong shapes, `TypeError` for no player.
    Source: a-posteriori bounds: Pedregosa 2016 (arXiv 1602.02355); conditions: Fiez et al. 2020 (arXiv 1906.01217).

    >>> def lead(x, y): return (y - 1) ** 2 + x ** 2
    >>> def follow(x, y): return (y - 2 * x) ** 2
    >>> from bilevel.game import Player
    >>> zero = torch.tensor(0.0, dtype=torch.float64)
    >>> game = Game(x=Player(lead, zero), y=Player(follow, zero))
    >>> certify(game, {"x": zero + 0.4, "y": zero + 0.8}).standing.value
    'certified'
    """
    first = game.names[0] if leader is None else leader
    last = game.names[-1] if follower is None else follower
    variables = _variables(game, point, (first, last))
    state = fresh_state(game, last, seed)
    state |= {"variables": variables[last]}
    work = _Work(game, first, last, variables, state, dict(batches or {}), seed)
    findings = [work.stationary(tolerance)]
    curvature = work.spectrum(lanczos_steps)
    findings.append(_definite("follower's second order", curvature, f"of {last}'s own Hessian"))
    if curvature.smallest <= 0.0:
        reason = "the follower is at no strict minimum: there is no response to differentiate"
        findings.append(Finding("hypergradient", Standing.INCONCLUSIVE, math.nan, "", reason))
        return Certificate("differential Stackelberg", tuple(findings), products=work.products)
    claim, answer = work.claimed(response, point, hypergradient)
    here, there = work.implicit(work.y), work.corrected()
    h = here.gradient if claim is None else claim
    mu = curvature.lower if curvature.lower > 0.0 else 0.5 * curvature.smallest
    estimate = float((h - there.gradient).norm())
    rounding = 100.0 * torch.finfo(h.dtype).eps * (curvature.largest / mu) * there.scale
    left = work.sensitivity(there) * there.slope / mu + there.mixed * there.residual / mu + rounding
    bound = (1.0 + 1e-6) * estimate + left if there.slope <= 0.5 * here.slope or there.slope <= rounding else math.inf
    findings.append(_bounded(bound, estimate, there.scale, tolerance))
    if answer is not None:
        findings.append(work.fidelity(answer))
    findings.append(_vanishes("leader's first order", there, left, tolerance))
    findings.append(_definite("leader's second order", work.total_spectrum(there.y, lanczos_steps), "total"))
    form = game.structure(first)
    return Certificate(
        "differential Stackelberg",
        tuple(findings),
        hypergradient=form.unflatten(h),
        corrected=form.unflatten(there.gradient),
        hypergradient_norm=float(h.norm()),
        error_estimate=estimate,
        error_bound=bound,
        gradients=work.gradients,
        products=work.products,
    )


def certify_nash(
    game: Game,
    point: Solution | Mapping[str, Variables],
    *,
    batches: Mapping[str, Batch] | None = None,
    tolerance: float = 1e-3,
    lanczos_steps: int = 30,
    seed: int = 0,
) -> Certificate:
    """Whether a point is a differential Nash equilibrium: nobody gains to second order by moving alone.

    For every player: its own gradient is below `tolerance` times that at the game's start, and its own Hessian is
    positive definite. Each is certified, refuted or inconclusive, as in `certify`. Costs 2 gradients and
    `lanczos_steps` Hessian-vector products a player. Source: Ratliff et al. 2016 (arXiv 1411.2168).
    """
    variables = _variables(game, point, game.names)
    findings, products = [], 0
    for name in game.names:
        batch = (batches or {}).get(name) if batches and name in batches else game.draw(name, game.start(name, seed))[0]
        start = {other: game.initial(other) for other in game.names}
        norm = float(_own_gradient(game, name, variables, batch)(flatten(variables[name])).detach().norm())
        reference = float(_own_gradient(game, name, start, batch)(flatten(start[name])).detach().norm()) or 1.0
        standing = Standing.CERTIFIED if norm <= tolerance * reference else Standing.REFUTED
        wanted = f"<= {tolerance:g}"
        findings.append(Finding(f"{name}: first order", standing, norm / reference, wanted, "of that at the start"))
        y = flatten(variables[name])
        _, pulled = pullback(_own_gradient(game, name, variables, batch), y)
        with torch.no_grad():
            operator = _operator(pulled)
            found = extreme_eigenvalues(operator, y, steps=lanczos_steps, seed=seed)
        products += found.products
        findings.append(_definite(f"{name}: second order", found, "of its own Hessian"))
    return Certificate("differential Nash", tuple(findings), gradients=2 * len(game.names), products=products)


class _Taken:
    """An implicit hypergradient, where it was taken and what is left of its equations."""

    def __init__(self, y: Tensor, gradient: Tensor, slope: float, residual: float, mixed: float, scale: float) -> None:
        self.y, self.gradient, self.slope = y, gradient, slope
        self.residual, self.mixed, self.scale = residual, mixed, scale


class _Work:
    """One certification: held batches, the follower's residual, and how much was spent."""

    def __init__(
        self,
        game: Game,
        leader: str,
        follower: str,
        variables: Mapping[str, Variables],
        state: State,
        batches: Mapping[str, Batch],
        seed: int,
    ) -> None:
        self.game, self.leader, self.follower, self.state, self.seed = game, leader, follower, state, seed
        self.others = {name: v for name, v in variables.items() if name != follower}
        self.held = Follower(game, self.others, state, batches.get(follower))
        self.batch = batches[leader] if leader in batches else game.draw(leader, game.start(leader, seed))[0]
        self.residual = self.held.held_residual()
        self.random = random_state(game.device)
        self.xs = [x.detach() for x in self.held.xs]
        # The leader's own leaves among those of all the others, in the order of the flat vector.
        mine = {id(leaf) for leaf in leaves(self.others[leader])}
        self.mine = [index for index, leaf in enumerate(self.held.xs) if id(leaf) in mine]
        self.y = flatten(variables[follower]).detach()
        self.solver = ConjugateGradient(rtol=1e-10 if self.y.dtype == torch.float64 else 1e-5)
        self.gradients = self.products = 0
        self.generator = torch.Generator(device=self.y.device).manual_seed(seed)

    def _leader_loss(self, y: Tensor, *mine: Tensor) -> Tensor:
        every = list(self.xs)
        for index, x in zip(self.mine, mine, strict=True):
            every[index] = x
        variables = {**self.held.input_form.build(every), self.follower: self.held.form.unflatten(y)}
        with random_kept(self.game.device, start=self.random):
            return self.game.loss(self.leader, variables, self.batch, self.held.buffers or None)

    def _partial(self, y: Tensor, *mine: Tensor) -> Tensor:
        every = list(self.xs)
        for index, x in zip(self.mine, mine, strict=True):
            every[index] = x
        return self.residual(y, *every)

    @property
    def own(self) -> list[Tensor]:
        """The leader's leaves."""
        return [self.xs[index] for index in self.mine]

    def _random(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)

    def stationary(self, tolerance: float) -> Finding:
        """|grad_y f| relative to the game's start."""
        relative = float(self.residual(self.y, *self.xs).detach().norm()) / float(self.state["reference"])
        self.gradients += 1
        standing = Standing.CERTIFIED if relative <= tolerance else Standing.REFUTED
        return Finding(
            "follower's first order", standing, relative, f"<= {tolerance:g}", "|grad| over that at the start"
        )

    def spectrum(self, steps: int) -> Spectrum:
        """Of the follower's Hessian at the point."""
        with torch.no_grad():
            _, products = pullback(lambda y: self.residual(y, *self.xs), self.y)
            operator = _operator(products)
            found = extreme_eigenvalues(operator, self.y, steps=steps, seed=self.seed)
        self.products += found.products
        return found

    def _solve(self, operator: LinearOperator, rhs: Tensor) -> tuple[Tensor, float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NonConvergenceWarning)  # the residual enters the bound
            found = self.solver.solve(operator, rhs)
        self.products += found.products
        return found.solution, float(found.residual_norm)

    def implicit(self, y: Tensor) -> _Taken:
        """The implicit hypergradient at y `[m]`."""
        with torch.no_grad():
            slope, products = pullback(self._partial, y, *self.own)
            _, parts = gradient(self._leader_loss, y, *self.own)
            adjoint, left = self._solve(_operator(products), parts[0])
            mixed_term = flatten(list(products(adjoint)[1:]))
            direct = flatten(list(parts[1:]))
            # E |f_xy z|^2 over Gaussian z is the squared Frobenius norm, an upper bound of the spectral one.
            sizes = [float(flatten(list(products(self._random(y))[1:])).square().sum()) for _ in range(4)]
        self.gradients, self.products = self.gradients + 2, self.products + 5
        mixed = math.sqrt(sum(sizes) / len(sizes))
        scale = float(direct.norm()) + mixed * float(adjoint.norm())
        return _Taken(y, direct - mixed_term, float(slope.detach().norm()), left, mixed, scale)

    def corrected(self) -> _Taken:
        """The hypergradient after one Newton step of the follower."""
        with torch.no_grad():
            slope, products = pullback(lambda y: self.residual(y, *self.xs), self.y)
            step, _ = self._solve(_operator(products), slope.detach())
        return self.implicit(self.y - step)

    def sensitivity(self, taken: _Taken) -> float:
        """How fast the implicit hypergradient changes with y: a Frobenius norm, from two random directions."""
        size = max(1.0, float(taken.y.norm()) / math.sqrt(taken.y.numel()))
        h = torch.finfo(taken.y.dtype).eps ** (1.0 / 3.0) * size
        changes = []
        for _ in range(2):
            there = self.implicit(taken.y + h * self._random(taken.y))
            changes.append(float((there.gradient - taken.gradient).square().sum()) / h**2)
        # Two draws may both fall short; they are within a factor of three of their mean but for a few in a hundred.
        return 3.0 * math.sqrt(sum(changes) / len(changes))

    def claimed(
        self, response: Response | None, point: object, hypergradient: Variables
    ) -> tuple[Tensor | None, tuple[Tensor, list[Tensor]] | None]:
        """The hypergradient `[n]` that is to be judged, and a response's answer with the leaves it depends on."""
        if hypergradient is not None:
            self.game.check(self.leader, hypergradient)
        if response is None:
            return (None if hypergradient is None else flatten(hypergradient).detach()), None
        kept = point.states if isinstance(point, Solution) else {}
        state = kept[self.follower] if self.follower in kept else response.init(self.game, follower=self.follower)
        tracked = map_leaves(lambda t: t.detach().clone().requires_grad_(), self.others)
        with torch.enable_grad(), warnings.catch_warnings(), random_kept(self.game.device):
            warnings.simplefilter("ignore")  # what they would say is what is measured here
            answer, _ = response(self.game, tracked, state, self.held.batch)
            y = flatten(answer)
            mine = leaves(tracked[self.leader])
            loss = self.game.loss(
                self.leader, {**tracked, self.follower: answer}, self.batch, self.held.buffers or None
            )
            slopes = torch.autograd.grad(loss, mine, retain_graph=True, materialize_grads=True)
        claim = flatten(list(slopes)).detach() if hypergradient is None else flatten(hypergradient).detach()
        return claim, (y, mine)

    def fidelity(self, answer: tuple[Tensor, list[Tensor]], draws: int = 5) -> Finding:
        """The response's derivative against -H^-1 f_yx in fresh directions of the leader."""
        y, mine = answer
        cosines, ratios = [], []
        for _ in range(draws):
            directions = [self._random(x) for x in mine]
            moved = _along(
                lambda v: torch.autograd.grad(y, mine, v, create_graph=True, materialize_grads=True), y, directions
            )
            at = y.detach()
            with torch.enable_grad():
                aliases = [x.detach().requires_grad_() for x in self.own]
                slope = self._partial(at, *aliases)
            mixed = _along(
                lambda v, slope=slope, aliases=aliases: torch.autograd.grad(
                    slope, aliases, v, create_graph=True, materialize_grads=True
                ),
                slope,
                directions,
            )
            with torch.no_grad():
                _, products = pullback(lambda y: self.residual(y, *self.xs), at)
                wanted, _ = self._solve(_operator(products), -mixed)
            sizes = float(moved.norm()), float(wanted.norm())
            cosines.append(float(moved @ wanted) / max(sizes[0] * sizes[1], 1e-300))
            ratios.append(sizes[0] / max(sizes[1], 1e-300))
        good = [c >= _COSINE and _RATIOS[0] <= r <= _RATIOS[1] for c, r in zip(cosines, ratios, strict=True)]
        standing = Standing.CERTIFIED if all(good) else Standing.INCONCLUSIVE if any(good) else Standing.REFUTED
        remark = f"cosine from {min(cosines):.3f}, size {min(ratios):.2f} to {max(ratios):.2f}, {draws} directions"
        wanted_text = f"cosine >= {_COSINE}, size {_RATIOS[0]} to {_RATIOS[1]}"
        return Finding("response's derivative", standing, sum(cosines) / draws, wanted_text, remark)

    def total_spectrum(self, y: Tensor, steps: int) -> Spectrum:
        """Of the leader's total second derivative, through the follower's optimum."""
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NonConvergenceWarning)
            mine = [x.detach().clone().requires_grad_() for x in self.own]
            answer = attach(self._partial, y, mine, linear_solver=self.solver, symmetric=True)
            slopes = torch.autograd.grad(
                self._leader_loss(answer, *mine), mine, create_graph=True, materialize_grads=True
            )
            total = flatten(list(slopes))

            def product(v: Tensor) -> Tensor:
                rows = torch.autograd.grad(total, mine, v, retain_graph=True, materialize_grads=True)
                self.products += 1
                return flatten(list(rows))

            return extreme_eigenvalues(
                LinearOperator(product, symmetric=True), flatten(mine), steps=steps, seed=self.seed
            )


_COSINE = 0.95
_RATIOS = (0.8, 1.25)


def _along(pulled: Any, like: Tensor, directions: list[Tensor]) -> Tensor:
    """The derivative along `directions`, by differentiating the pullback v -> J'v, which is linear in v."""
    with torch.enable_grad():
        v = torch.zeros_like(like).requires_grad_()
        rows = pulled(v)
        total = sum((row * d).sum() for row, d in zip(rows, directions, strict=True))
        (moved,) = torch.autograd.grad(total, v, retain_graph=True, materialize_grads=True)
    return moved.detach()


def _operator(products: Pullback) -> LinearOperator:
    """The Hessian, from the pullback of a gradient."""
    return LinearOperator(lambda v: products(v)[0], symmetric=True)


def _own_gradient(game: Game, name: str, variables: Mapping[str, Variables], batch: Batch) -> Any:
    """A player's gradient `[n]` in its own variables `[n]`, all else held."""
    form, random = game.structure(name), random_state(game.device)

    def slope(y: Tensor) -> Tensor:
        with random_kept(game.device, start=random):
            return gradient(lambda y: game.loss(name, {**variables, name: form.unflatten(y)}, batch), y)[1][0]

    return slope


def _variables(game: Game, point: Solution | Mapping[str, Variables], needed: tuple[str, ...]) -> dict[str, Variables]:
    given = dict(point.variables) if isinstance(point, Solution) else dict(point)
    for name in needed:
        if name not in game.names:
            raise ValueError(f"certify: there is no player {name!r}; players are {list(game.names)}.")
    missing = [name for name in game.names if name not in given]
    if missing:
        raise ValueError(f"certify: the point lacks the variables of {missing}; given are {sorted(given)}.")
    for name in game.names:
        game.check(name, given[name])
        for path, leaf in named_leaves(given[name]):
            if not bool(torch.isfinite(leaf).all()):
                raise ValueError(f"certify: player {name!r}: {path or 'its tensor'} holds NaN or infinity.")
    return {name: map_leaves(lambda t: t.detach(), given[name]) for name in game.names}


def _definite(name: str, found: Spectrum, what: str) -> Finding:
    noise = 1e-7 * max(abs(found.smallest), abs(found.largest))
    if found.smallest < -noise:
        standing = Standing.REFUTED
    else:
        standing = Standing.CERTIFIED if found.lower > 0.0 else Standing.INCONCLUSIVE
    how = "exact" if found.exact else f"at least {found.lower:.3g} with probability {1.0 - found.failure:g}"
    return Finding(
        name, standing, found.smallest, "> 0", f"smallest eigenvalue {what}; {how}; largest {found.largest:.3g}"
    )


def _bounded(bound: float, estimate: float, scale: float, tolerance: float) -> Finding:
    if bound <= tolerance * scale:
        standing = Standing.CERTIFIED
    else:
        # What the bound adds to the estimate may hide a right answer, or a wrong one.
        wrong = math.isfinite(bound) and 2.0 * estimate - bound > tolerance * scale
        standing = Standing.REFUTED if wrong else Standing.INCONCLUSIVE
    remark = f"bound {bound:.3g}, estimate {estimate:.3g}, scale {scale:.3g}"
    return Finding("hypergradient's error", standing, bound / max(scale, 1e-300), f"<= {tolerance:g}", remark)


def _vanishes(name: str, there: _Taken, left: float, tolerance: float) -> Finding:
    size, wanted = float(there.gradient.norm()), tolerance * there.scale
    if size + left <= wanted:
        standing = Standing.CERTIFIED
    else:
        standing = Standing.REFUTED if size - left > wanted else Standing.INCONCLUSIVE
    relative = size / max(there.scale, 1e-300)
    return Finding(name, standing, relative, f"<= {tolerance:g}", "|hypergradient| over |g_x| + |f_yx| |u|")

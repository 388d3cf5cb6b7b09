"""Laws of the answer itself: exact at convergence, with an error that falls as predicted."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from bilevel.testing import strategies
from bilevel.testing.changes import NegatedFollower, Started
from bilevel.testing.known import KnownGame
from bilevel.testing.laws.base import Law
from bilevel.testing.subject import (
    FunctionSubject,
    NotOffered,
    ResponseSubject,
    Subject,
    trajectory_end,
    with_momentum,
)
from bilevel.testing.tolerance import exact, stated_error, tolerance


def require_close(found: Tensor, wanted: Tensor, allowed: float, what: str) -> None:
    """Assert |found - wanted| <= allowed, saying by how much it is missed."""
    assert found.shape == wanted.shape, f"{what}: shape {list(found.shape)}; expected {list(wanted.shape)}"
    assert bool(torch.isfinite(found).all()), f"{what}: not finite: {_told(found)}"
    off = float((found - wanted).norm())
    assert off <= allowed, f"{what}: {_told(found)}; expected {_told(wanted)} within {allowed:.2g}, off by {off:.2g}"


def _told(tensor: Tensor) -> str:
    return "[" + ", ".join(f"{v:.6g}" for v in tensor.reshape(-1).tolist()[:6]) + "]"


def require_converging(subject: Subject) -> int:
    """The steps that are enough; refuses a subject that does not come near the optimum however many it takes."""
    steps = subject.enough
    if steps >= 2048:
        raise NotOffered("After 2,048 steps its follower is still far from the optimum; give it a larger step size.")
    return steps


def exact_at_convergence(subject: Subject, known: KnownGame) -> None:
    """At its optimum the follower's answer gives the exact hypergradient, within tolerance and stated bias."""
    steps = require_converging(subject)
    found, truth = subject.evaluate(known, steps), exact(known)
    assert found.dtype == known.dtype, f"the hypergradient is {found.dtype}; the game is {known.dtype}"
    allowed = tolerance(known, subject, found, steps, truth)
    stated = stated_error(subject, truth)
    require_close(found.gradient, truth.gradient, allowed + stated, "hypergradient at convergence")
    informative(allowed, truth.scale)


def informative(
    allowed: float, scale: float, cause: str = "Its own residual or stated bias, or its distance from the optimum,"
) -> None:
    """Refuse a tolerance so wide that nothing was tested, because the subject itself states or reports so much."""
    if not math.isfinite(allowed):
        raise NotOffered("It states no bias and reports no residual: there is nothing to hold it to.")
    if not allowed <= 0.25 * scale:
        raise NotOffered(f"{cause} allows an error of {allowed / scale:.0%}: there is no accuracy to test.")


def error_follows_budget(subject: Subject, known: KnownGame) -> None:
    """At a quarter, half and all of the steps the error is below what those steps predict, and falls."""
    if subject.estimates:
        raise NotOffered("How an estimate's error falls with the steps is not promised.")
    if subject.of_steps and not subject.linear_iteration:
        raise NotOffered("How fast its derivative converges is known for gradient descent with momentum alone.")
    steps, truth = require_converging(subject), exact(known)
    errors, bounds = [], []
    for budget in sorted({max(1, steps // 4), max(1, steps // 2), steps}):
        found = subject.evaluate(known, budget)
        errors.append(float((found.gradient - truth.gradient).norm()))
        bounds.append(tolerance(known, subject, found, budget, truth))
        assert errors[-1] <= bounds[-1], (
            f"error after {budget} steps: {errors[-1]:.2g}; at |y - y*| = "
            f"{float((found.follower - truth.best_response).norm()):.2g} it is at most {bounds[-1]:.2g}"
        )
    informative(bounds[-1], truth.scale)
    assert errors[-1] <= errors[0] + bounds[-1], f"the error grew with the steps: {errors}"


def second_derivative(subject: Subject, known: KnownGame) -> None:
    """The hypergradient's own derivative is symmetric, and the exact one at convergence."""
    if subject.estimates:
        raise NotOffered("Of an estimate no second derivative is promised.")
    steps, truth = require_converging(subject), exact(known)
    found = subject.evaluate(known, steps, second=True)
    assert found.second is not None
    wanted = known.second_derivative(known.x0)
    first = tolerance(known, subject, found, steps, truth)
    # Once more differentiated, an error at the optimum is multiplied by the conditioning and by the lag of the steps;
    # there are four places where an adjoint, solved for again, enters.
    size = float(wanted.norm()) + truth.scale * (1.0 + float(truth.jacobian.norm())) * (1.0 + truth.sensitivity)
    growth = (1.0 + steps if subject.of_steps else 1.0) * (truth.largest / truth.least) ** 2
    allowed = 4.0 * (first / truth.scale + found.residual) * growth * size
    informative(allowed, size)
    asymmetry = float((found.second - found.second.T).norm())
    assert asymmetry <= allowed, f"second derivative is not symmetric: off by {asymmetry:.2g}, allowed {allowed:.2g}"
    require_close(found.second, wanted, allowed, "second derivative")


def derivative_of_its_values(subject: Subject, known: KnownGame) -> None:
    """The derivative is that of the very map from x to y: central differences of its own values say so."""
    if isinstance(subject, FunctionSubject):
        derivative_of_torchs_steps(subject, known)
        return
    assert isinstance(subject, ResponseSubject)
    if math.isnan(subject.promise.stated_bias):
        raise NotOffered("An estimate without a stated bias need not be the difference of its values.")
    steps = 3 if subject.of_steps else require_converging(subject)
    response, game = subject.with_steps(steps), known.game()
    state = response.init(game)
    h = 1e-5

    left = 0.0

    def value(x: Tensor) -> Tensor:
        """The leader's loss and the answer `[1 + m]`."""
        nonlocal left
        tree = known.leader_form.build(x)
        with torch.no_grad():
            y, _ = response(game, {"x": tree}, state)
            answer, loss = known.follower_form.read(y), game.loss("x", {"x": tree, "y": y})
        left = max(left, float((answer - known.best_response(x)).norm()))
        return torch.cat([loss.reshape(1), answer])

    units = torch.eye(known.x0.numel(), dtype=torch.float64)
    differences = torch.stack([(value(known.x0 + h * u) - value(known.x0 - h * u)) / (2.0 * h) for u in units], 1)
    found, truth = subject.evaluate(known, steps), exact(known)
    # Values that are off their optimum by e make a difference of noise |g_y| e / h; the truncation is h^2.
    noise = 0.0 if subject.of_steps else 2.0 * (truth.leader_slope + truth.curvature * left) * left / h
    allowed = noise + 1e-5 * truth.scale + truth.mixed * found.residual * truth.leader_slope / truth.least
    informative(allowed, truth.scale, "How far its values stop from the optimum")
    slope, jacobian = torch.func.grad(known.leader, argnums=1)(known.x0, found.follower), differences[1:]
    stated = subject.promise.stated_bias * float(torch.linalg.matrix_norm(jacobian, 2)) * float(slope.norm())
    require_close(found.gradient, differences[0], allowed + stated, f"derivative after {steps} steps")


def derivative_of_torchs_steps(subject: FunctionSubject, known: KnownGame) -> None:
    """What a function unrolls is torch's own optimiser: plain, and with momentum."""
    if not subject.of_steps:
        raise NotOffered("A hypergradient at the optimum alone has no values to difference.")
    steps, h, scale = 4, 1e-5, exact(known).scale
    for momentum in (0.0, 0.5):
        played = replace(subject, inner=with_momentum(subject.inner, momentum))

        def value(x: Tensor, played: FunctionSubject = played) -> Tensor:
            return known.leader(x, trajectory_end(known, played.inner, steps, x))

        units = torch.eye(known.x0.numel(), dtype=torch.float64)
        differences = [(value(known.x0 + h * unit) - value(known.x0 - h * unit)) / (2.0 * h) for unit in units]
        found = played.evaluate(known, steps)
        what = f"derivative after {steps} steps with momentum {momentum:g}"
        require_close(found.gradient, torch.stack(differences), 1e-5 * scale, what)


def unrolled_is_neumann(subject: Subject, known: KnownGame) -> None:
    """From the optimum, K steps of gradient descent differentiate to K - 1 Neumann terms beyond the first, exactly."""
    step = subject.plain_step
    if not subject.of_steps or subject.estimates or step is None:
        raise NotOffered("It does not unroll plain gradient descent.")
    started = Started(known)
    x, y = known.x0, known.best_response(known.x0).detach()
    g_x, g_y = torch.func.grad(known.leader, argnums=(0, 1))(x, y)
    hessian, mixed = known.hessian(x), known.mixed(x)
    for steps in (1, 4):
        term, total = g_y, torch.zeros_like(g_y)
        for _ in range(steps):
            total = total + term
            term = term - step * (hessian @ term)
        wanted = g_x - step * mixed.T @ total
        found = subject.evaluate(started, steps)
        allowed = 1e-9 * steps * (float(g_x.norm()) + float(mixed.norm()) * float(g_y.norm()) + 1.0)
        require_close(found.gradient, wanted, allowed, f"{steps} steps from the optimum")


def climbing_is_descending(subject: Subject, known: KnownGame) -> None:
    """A follower that maximises the negated loss is the follower that minimises it."""
    if not subject.of_steps:
        raise NotOffered("A follower that maximises has no positive-definite Hessian; only steps can climb.")
    steps = min(8, subject.enough)
    plain = subject.evaluate(known, steps)
    climbing = subject.evaluate(NegatedFollower(known), steps, maximize=True)
    scale = exact(known).scale
    require_close(climbing.gradient, plain.gradient, 1e-9 * scale * steps, "hypergradient of a climbing follower")


def exact_within_sets(subject: Subject, known: KnownGame) -> None:
    """At an optimum that a set holds, or that a term has made 0 in part, the answer gives the exact hypergradient.

    On each piece y is as smooth as without constraints. So an error e of y, and what is left of the derivative's
    equation, move the derivative by at most a multiple of the conditioning squared of themselves, like K e for the
    derivative of K steps; the families' own derivatives are of order 1.
    """
    if isinstance(subject, FunctionSubject):
        raise NotOffered("A function of two losses cannot be told of constraints.")
    steps = require_converging(subject)
    try:
        found = subject.evaluate(known, steps)
    except TypeError as refused:  # by name, which is never a wrong answer
        raise NotOffered(str(refused)) from refused
    wanted = known.hypergradient(known.x0)
    least, largest = known.curvature(known.x0)
    scale = float(wanted.norm()) + float(known.leader(known.x0, found.follower)) + 1e-3
    e = float((found.follower - known.best_response(known.x0)).norm())
    rounding = 1000.0 * torch.finfo(known.dtype).eps
    left = 10.0 * (1.0 + steps if subject.of_steps else 1.0) * e + 10.0 * found.residual + rounding
    allowed = scale * (largest / least) ** 2 * left + stated_error(subject, exact(known)) * subject.estimates
    informative(allowed, scale)
    require_close(found.gradient, wanted, allowed, "hypergradient within constraints")


ANSWERS = (
    Law(
        "exact", "exact at convergence, within the derived tolerance", strategies.leader_follower, exact_at_convergence
    ),
    Law("exact, nested variables", "the same in scalars and nests", strategies.laid_out, exact_at_convergence),
    Law("exact, float32", "the same in float32", strategies.single_precision, exact_at_convergence),
    Law("within sets", "exact where a domain or a term holds the follower", strategies.constrained, exact_within_sets),
    Law("within functions", "exact where constraints bind", strategies.programmes, exact_within_sets, 0.5),
    Law("budget", "the error falls with the steps as predicted", strategies.leader_follower, error_follows_budget),
    Law("own values", "the derivative of its own values", strategies.leader_follower, derivative_of_its_values, 0.5),
    Law("second derivative", "symmetric, and exact", strategies.leader_follower, second_derivative, 0.5),
    Law("unrolled = Neumann", "K steps are K - 1 Neumann terms", strategies.leader_follower, unrolled_is_neumann),
    Law("maximize", "climbing -f is descending f", strategies.leader_follower, climbing_is_descending, 0.5),
)

"""Games with known answers: what every family of them offers, and what follows from it exactly."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from bilevel.autodiff import transforms_active
from bilevel.constraints import ConstraintSet, Penalty
from bilevel.game import Game, Player
from bilevel.testing.forms import Form, Vector

Numbers = tuple[float, ...]
Matrix = tuple[Numbers, ...]

DOUBLE = torch.empty(0, dtype=torch.float64)
"""What `constant` makes float64 tensors like."""


class KnownGame(ABC):
    """A leader x `[n]` and a follower y `[m]` whose best response is known in closed form, or to rounding.

    A family is a frozen dataclass of plain numbers, so that a game's `repr` is the code that makes it again. The
    formulas are on flat vectors; `game()` is the `Game` that a response sees, with players "x" and "y" in the layout
    of `leader_form` and `follower_form`. Everything else here is exact in float64, and follows from `best_response`.

    Examples:
        >>> from bilevel.testing import Quadratic
        >>> known = Quadratic(curvatures=(0.5, 1.0), coupling=((1.0,), (0.0,)), at=(2.0,))
        >>> known.best_response(known.x0)
        tensor([4., 0.], dtype=torch.float64)
    """

    # What a family gives ---------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def x0(self) -> Tensor:
        """The point `[n]` at which the leader stands, float64."""

    @abstractmethod
    def leader(self, x: Tensor, y: Tensor) -> Tensor:
        """The leader's loss, a 0-d tensor, in the dtype of `x: [n]` and `y: [m]`."""

    @abstractmethod
    def follower(self, x: Tensor, y: Tensor) -> Tensor:
        """The follower's loss, a 0-d tensor."""

    @abstractmethod
    def best_response(self, x: Tensor) -> Tensor:
        """argmin over y of the follower's loss, `[m]`, differentiable twice in `x: [n]`."""

    radius: float
    """How far from the best response, in every curved direction, the follower starts."""

    # What follows ----------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Of the game that is played; the answers here are float64 whatever it is."""
        return torch.float64

    @property
    def quadratic(self) -> bool:
        """Whether the follower's loss is quadratic in both players' variables together."""
        return False

    def inequality(self, x: Tensor, y: Tensor) -> Tensor | None:
        """What is at most 0 for the follower, in every entry; None without inequalities."""
        return None

    def equality(self, x: Tensor, y: Tensor) -> Tensor | None:
        """What is 0 for the follower, in every entry; None without equalities."""
        return None

    @property
    def domain(self) -> ConstraintSet | None:
        """The set that the follower stays in; None where it may be anywhere."""
        return None

    @property
    def prox(self) -> Penalty | None:
        """The term that the follower's loss has besides; None without one."""
        return None

    @property
    def leader_form(self) -> Form:
        """The layout of the leader's variables."""
        return Vector()

    @property
    def follower_form(self) -> Form:
        """The layout of the follower's variables."""
        return Vector()

    @property
    def y0(self) -> Tensor:
        """Where the follower starts, `[m]`: off its best response by `radius` along each eigenvector of its Hessian.

        Every mode of an iteration is then excited alike, so that the distance that is left bounds the slowest one.
        """
        _, vectors = torch.linalg.eigh(self.hessian(self.x0))
        # An eigenvector's sign is arbitrary: all to one side, so that a barrier's domain is not left.
        vectors = vectors * torch.where(vectors.sum(0) < 0.0, -1.0, 1.0)
        start: Tensor = self.best_response(self.x0).detach() + self.radius * vectors.sum(1)
        return start

    def value(self, x: Tensor) -> Tensor:
        """The leader's loss at the follower's best response, a 0-d tensor."""
        return self.leader(x, self.best_response(x))

    def jacobian(self, x: Tensor) -> Tensor:
        """dy*/dx `[m, n]`."""
        return torch.func.jacrev(self.best_response)(x)  # type: ignore[no-any-return]

    def hypergradient(self, x: Tensor) -> Tensor:
        """d value / dx `[n]`."""
        return torch.func.grad(self.value)(x)  # type: ignore[no-any-return]

    def second_derivative(self, x: Tensor) -> Tensor:
        """d^2 value / dx^2 `[n, n]`."""
        return torch.func.jacrev(torch.func.grad(self.value))(x)  # type: ignore[no-any-return]

    def hessian(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The follower's Hessian `[m, m]` at y (default: its best response)."""
        at = self.best_response(x).detach() if y is None else y
        return _hessian(self.follower)(x, at)

    def mixed(self, x: Tensor) -> Tensor:
        """d^2 follower / dy dx `[m, n]` at the best response."""
        slope = torch.func.grad(self.follower, argnums=1)
        return torch.func.jacrev(slope, argnums=0)(x, self.best_response(x).detach())  # type: ignore[no-any-return]

    def curvature(self, x: Tensor) -> tuple[float, float]:
        """The least and the largest eigenvalue of the follower's Hessian at its best response."""
        values = torch.linalg.eigvalsh(self.hessian(x))
        return float(values[0]), float(values[-1])

    @property
    def conditioning(self) -> float:
        """The ratio of those two at `x0`."""
        least, largest = self.curvature(self.x0)
        return largest / least

    def equilibrium(self) -> Tensor:
        """The leader's optimum x `[n]` when it anticipates the follower (Stackelberg), by Newton's method.

        Raises:
            ArithmeticError: If the total second derivative is not positive definite there.
        """
        x = self.x0.clone()
        for _ in range(100):
            slope, curvature = self.hypergradient(x), self.second_derivative(x)
            values, vectors = torch.linalg.eigh(curvature)
            # Away from the optimum the value may be concave; then a step goes down its slope all the same.
            step = vectors @ ((vectors.T @ slope) / values.abs().clamp_min(1e-3))
            length, here = 1.0, self.value(x)
            while length > 1e-8 and not float(self.value(x - length * step)) <= float(here) + 1e-14 * abs(float(here)):
                length /= 2
            x = x - length * step
            if float(step.norm()) <= 1e-13 * (1.0 + float(x.norm())):
                break
        if not float(torch.linalg.eigvalsh(self.second_derivative(x))[0]) > 0.0:
            raise ArithmeticError(f"The leader's value has no strict minimum near {x.tolist()}.")
        return x

    def game(self) -> Game:
        """The game that is played, from `x0` and `y0`, in `dtype`."""

        def leader(x: object, y: object) -> Tensor:
            return self.leader(self.leader_form.read(x), self.follower_form.read(y))

        def follower(x: object, y: object) -> Tensor:
            return self.follower(self.leader_form.read(x), self.follower_form.read(y))

        def constraint(function: Callable[[Tensor, Tensor], Tensor | None]) -> Callable[..., Tensor]:
            def value(x: object, y: object) -> Tensor:
                found = function(self.leader_form.read(x), self.follower_form.read(y))
                assert found is not None
                return found

            return value

        x0, y0 = self.x0.to(self.dtype), self.y0.to(self.dtype)
        functions = {"inequality": self.inequality, "equality": self.equality}
        within: dict[str, Any] = {n: constraint(f) for n, f in functions.items() if f(self.x0, self.y0) is not None}
        return Game(
            x=Player(leader, self.leader_form.build(x0)),
            y=Player(follower, self.follower_form.build(y0), domain=self.domain, prox=self.prox, **within),
        )


@lru_cache(maxsize=4096)
def _plain(values: tuple[object, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)


def constant(values: tuple[object, ...], like: Tensor) -> Tensor:
    """Plain numbers as a tensor in the dtype and on the device of another."""
    if transforms_active():  # a tensor made inside a transform dies with it, and must not be kept
        return torch.tensor(values, dtype=like.dtype, device=like.device)
    return _plain(values, like.dtype, like.device)


def reflection(axis: Numbers, like: Tensor) -> Tensor:
    """The orthogonal matrix `[n, n]` that reflects along `axis`; the identity for an axis of zeros."""
    v = constant(axis, like)
    size = v @ v
    eye = torch.eye(len(axis), dtype=like.dtype, device=like.device)
    return eye if float(size) == 0.0 else eye - 2.0 * torch.outer(v, v) / size


def _hessian(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Its second derivative `[m, m]` in the second argument."""
    return torch.func.jacrev(torch.func.grad(loss, argnums=1), argnums=1)


def polished(
    x: Tensor, y: Tensor, slope: Callable[[Tensor, Tensor], Tensor], hessian: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """y `[m]` after Newton's method to rounding, with derivatives in x up to the third.

    Each full Newton step squares the error of y as a function of x as well, so that the last two, which are
    differentiated, turn a constant into a function that is right to third order.
    """
    fixed = x.detach()
    for _ in range(50):
        before = slope(fixed, y)
        step = torch.linalg.solve(hessian(fixed, y), before)
        length = 1.0
        while length > 1e-6 and not float(slope(fixed, y - length * step).norm()) <= float(before.norm()):
            length /= 2
        y = y - length * step
        if float(before.norm()) <= 1e-15 or float(step.norm()) <= 1e-15 * (1.0 + math.sqrt(y.numel())):
            break
    for _ in range(2):
        y = y - torch.linalg.solve(hessian(x, y), slope(x, y))
    return y

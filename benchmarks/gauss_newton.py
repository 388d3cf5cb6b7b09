"""The error of a network's hypergradient by the Gauss-Newton matrix, beside damping and GMRES, as training goes on.

A network 64-16-10 on 300 of scikit-learn's digits, one penalty for each of its four tensors, float64. The truth is the
implicit derivative at the minimum that L-BFGS reaches from the trained weights, by the dense Hessian. Each method
differentiates where Adam has stopped. Writes JSON.

    python -m benchmarks.gauss_newton --output gauss_newton.json
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
from benchmarks.head import head
from bilevel.responses import GaussNewton
from games.experiments.data import scikit_digits

D = torch.float64
HIDDEN, TRAIN, VALID = 16, 300, 600
STOPS = (30, 100, 300, 1000)
Weights = Mapping[str, Tensor]
NET = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10)).to(D)


def outputs(weights: Weights, batch: Sequence[Tensor]) -> Tensor:
    """Scores `[examples, 10]`."""
    found: Tensor = functional_call(NET, dict(weights), (batch[0],))
    return found


def loss(outputs: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """Of the scores."""
    return cross_entropy(outputs, batch[1])


def rest(weights: Weights, penalty: Tensor) -> Tensor:
    """A penalty for each tensor, on a logarithmic scale."""
    return 0.5 * sum(
        (p.exp() * w.square().sum() for p, w in zip(penalty, weights.values(), strict=True)), penalty[:0].sum()
    )


def follow(weights: Weights, penalty: Tensor, batch: Sequence[Tensor]) -> Tensor:
    """The whole."""
    return loss(outputs(weights, batch), batch) + rest(weights, penalty)


def lead(weights: Weights, batch: Sequence[Tensor]) -> Tensor:
    """On examples that are held out."""
    return loss(outputs(weights, batch), batch)


def started(seed: int) -> dict[str, Tensor]:
    """Initial weights."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=D)
    first, second = normal(64, HIDDEN).mT.contiguous() / 8.0, normal(HIDDEN, 10).mT.contiguous() / 4.0
    biases = torch.zeros(HIDDEN, dtype=D), torch.zeros(10, dtype=D)
    return {"0.weight": first, "0.bias": biases[0], "2.weight": second, "2.bias": biases[1]}


@dataclass(frozen=True, kw_only=True)
class Factored(bl.linear.LinearSolver):
    """The inverse of the Kronecker factors and of the penalty, in place of the matrix's."""

    @property
    def needs_factors(self) -> bool:
        """Yes."""
        return True

    def iterate(self, system: bl.linear.LinearSystem) -> bl.linear.Candidate:
        """At no product but the factors' and the one that measures the residual."""
        inverse, _ = bl.linear.KroneckerPreconditioner().prepare(system.operator, {})
        return system.measure(inverse(system.rhs))


def methods() -> dict[str, dict[str, Any]]:
    """Options of `Implicit` by name."""
    cg, whole = partial(bl.ConjugateGradient, rtol=1e-6), GaussNewton(outputs, loss, rest, measure=True)
    few, plain = partial(bl.ConjugateGradient, rtol=None), GaussNewton(outputs, loss, rest)
    layers = bl.linear.KroneckerPreconditioner()
    return {
        "CG, Hessian": {"linear_solver": cg()},
        "CG, Hessian, damping .01": {"linear_solver": cg(damping=0.01)},
        "CG, Hessian, damping .1": {"linear_solver": cg(damping=0.1)},
        "GMRES, Hessian": {"linear_solver": bl.GMRES(rtol=1e-6, restart=100, max_steps=600)},
        "CG, Gauss-Newton": {"linear_solver": cg(), "curvature": whole},
        "CG, Gauss-Newton, damping .01": {"linear_solver": cg(damping=0.01), "curvature": whole},
        "CG, Gauss-Newton, 1 step": {"linear_solver": few(max_steps=1), "curvature": plain},
        "CG, Gauss-Newton, 5 steps": {"linear_solver": few(max_steps=5), "curvature": plain},
        "K-FAC alone": {"linear_solver": Factored(rtol=None), "curvature": plain},
        "CG, Gauss-Newton, K-FAC, 1 step": {
            "linear_solver": few(max_steps=1, preconditioner=layers),
            "curvature": plain,
        },
        "CG, Gauss-Newton, K-FAC, 5 steps": {
            "linear_solver": few(max_steps=5, preconditioner=layers),
            "curvature": plain,
        },
    }


def measured(game: bl.Game, weights: Weights, penalty: Tensor, options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's hypergradient at these weights, with what it took."""
    given = bl.ClosedForm(lambda penalty: {name: w + 0.0 * penalty.sum() for name, w in weights.items()})
    response = bl.Implicit(given, tolerance=None, **options)
    state = response.init(game)
    x = penalty.clone().requires_grad_()
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            y, after = response(game, {"penalty": x}, state)
            (slope,) = torch.autograd.grad(game.loss("penalty", {"penalty": x, "weights": y}, held_out(game)), x)
        except bl.BilevelError as error:
            return {"failed": type(error).__name__}
    report = response.report(response.after_backward(after, y))
    return {
        "slope": slope.tolist(),
        "products": report.products,
        "seconds": time.perf_counter() - began,
        "told": report.error if math.isfinite(report.error) else None,
        "warnings": sorted({type(w.message).__name__ for w in caught}),
    }


def held_out(game: bl.Game) -> Any:
    """The leader's only batch."""
    return game.draw("penalty", game.start("penalty"))[0]


def one_seed(seed: int) -> list[dict[str, Any]]:
    """All methods at all stops."""
    digits = scikit_digits(train=TRAIN, valid=VALID, test=100, seed=seed, dtype=D)
    train, valid = ((part.images.reshape(len(part.images), -1), part.labels) for part in (digits.train, digits.valid))
    penalty = torch.full((4,), -5.0, dtype=D)
    weights = {name: w.requires_grad_() for name, w in started(seed).items()}
    game = bl.Game(penalty=bl.Player(lead, penalty, data=[valid]), weights=bl.Player(follow, NET, data=[train]))
    adam, rows, taken = torch.optim.Adam(weights.values(), lr=1e-2), [], 0
    for stop in STOPS:
        while taken < stop:
            adam.zero_grad()
            follow(weights, penalty, train).backward()  # type: ignore[no-untyped-call]
            adam.step()
            taken += 1
        here = {name: w.detach().clone() for name, w in weights.items()}
        minimum = converged(here, penalty, train)
        truth = torch.tensor(measured(game, minimum, penalty, {"linear_solver": bl.linear.Dense()})["slope"], dtype=D)
        for name, options in methods().items():
            row = measured(game, here, penalty, options)
            if "slope" in row:
                slope = torch.tensor(row["slope"], dtype=D)
                row["error"] = float((slope - truth).norm() / truth.norm())
                row["cosine"] = float(slope @ truth / slope.norm() / truth.norm())
            rows.append({"seed": seed, "steps": stop, "method": name, **row})
            print(seed, stop, name, row.get("error", row.get("failed")), row.get("products"), flush=True)
    return rows


def converged(weights: Weights, penalty: Tensor, train: Sequence[Tensor]) -> dict[str, Tensor]:
    """The minimum that L-BFGS reaches."""
    found = {name: w.clone().requires_grad_() for name, w in weights.items()}
    optimizer = torch.optim.LBFGS(
        found.values(), max_iter=5000, tolerance_grad=1e-11, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = follow(found, penalty, train)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return {name: w.detach() for name, w in found.items()}


def main() -> None:
    """All seeds."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--output", type=Path, default=Path("gauss_newton.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    rows = [row for seed in range(chosen.seeds) for row in one_seed(seed)]
    chosen.output.write_text(json.dumps({**head("scikit-learn"), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

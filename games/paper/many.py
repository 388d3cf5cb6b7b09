"""Many hyperparameters: one penalty for each weight, by each response, against the best single penalty."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

import bilevel as bl
from games.cross_validation import CrossValidation, grid
from games.experiments.data import DigitSource, scikit_digits
from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLACK, COLOURS, LARGE, LINES, SMALL, empty_figure, label_axes
from games.paper.converged import evenly_spaced
from games.problems.decay import decay_game, score, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

START = -8.0
"""The log penalty of every weight before tuning: near the best single one, so that all start from what it gives."""

BEST_SCALAR = "best single penalty"


def responses() -> dict[str, tuple[bl.Response, Callable[..., torch.optim.Optimizer]]]:
    """Name -> the response, and the leader's optimiser.

    A map through a bottleneck gives a hypergradient of a few directions. Adam would blow up the entries that are only
    noise, so that the leader descends plainly there.
    """
    adam = partial(torch.optim.Adam, lr=0.1)
    plainly = partial(torch.optim.SGD, lr=10.0, momentum=0.9)

    def hypernetwork(rank: int) -> bl.Hypernetwork:
        return bl.Hypernetwork(
            partial(torch.optim.Adam, lr=3e-3),
            scale=1.0,
            network=bl.networks.LowRank(rank),
            warmup=2000,
            steps=10,
            sampler=bl.responses.Perturbations(count=4),
            tolerance=None,  # the table says what residual it has
        )

    return {
        "implicit": (
            bl.Implicit(bl.Scipy("L-BFGS-B"), steps=500, linear_solver=bl.ConjugateGradient(rtol=1e-3)),
            adam,
        ),
        "unrolled": (bl.Unrolled(partial(torch.optim.SGD, lr=0.2, momentum=0.9), steps=100), adam),
        "hypernetwork, bottleneck 10": (hypernetwork(10), plainly),
        "hypernetwork, bottleneck 100": (hypernetwork(100), plainly),
    }


def best_single_penalty(source: DigitSource, *, low: float, high: float, count: int) -> Result:
    """The best of `count` single penalties by validation loss, each retrained to convergence."""
    digits = scikit_digits(dtype=torch.float64)
    game = decay_game(digits)
    found = CrossValidation()(game, grid(game, {"decay": evenly_spaced(count, low, high)}))
    return {
        "decay": found.best["decay"]["bias"][0],
        "valid": found.leader_losses.min(),
        "test": score(found.answer, digits.test).loss,
        "accuracy": score(found.answer, digits.test).accuracy,
        "work": found.gradients,
        "stationarity": found.stationarity.max(),
    }


def tuned(source: DigitSource, *, response: str, steps: int, seed: int) -> Result:
    """640 + 10 penalties by one response, then a classifier retrained to convergence at them."""
    digits = scikit_digits()
    answer, optimizer = responses()[response]
    solution = bl.solve(
        decay_game(digits, start=START, seed=seed), weights=answer, optimizer=optimizer, steps=steps, seed=seed
    )
    fit = train(digits, solution.variables["decay"], seed=seed)
    test = score(fit.weights, digits.test)
    return {
        "path": [[record["work"], record["decay"]] for record in solution.history],
        "valid": score(fit.weights, digits.valid).loss,
        "test": test.loss,
        "accuracy": test.accuracy,
        "work": solution.gradients + solution.products,
        "residual": solution.residuals.get("weights"),
        "stationarity": fit.gradient_norm,
    }


def draw(results: Results) -> Figure:
    """Validation loss over work on the left; after retraining, validation and test on the right."""
    figure = empty_figure(14.0, 6.0)
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    scalar = results[BEST_SCALAR]["valid"]
    names = [name for name in results if name != BEST_SCALAR]
    for name, colour, line in zip(names, COLOURS, LINES, strict=False):
        work, loss = zip(*results[name]["path"], strict=True)
        left.plot(work, loss, color=colour, linestyle=line, linewidth=2.4, label=name)
    left.axhline(scalar, color=BLACK, linewidth=1.8, label=BEST_SCALAR)
    left.axhline(scalar / 2, color=BLACK, linewidth=1.5, linestyle=":", label="half of that")
    left.set(xscale="log", yscale="log")
    left.set_yticks([0.03, 0.05, 0.1, 0.2, 0.4], ["0.03", "0.05", "0.1", "0.2", "0.4"])
    left.minorticks_off()
    label_axes(left, x="work (gradients + Hessian-vector products)", y="validation loss (nats)")
    left.legend(fontsize=SMALL, frameon=False, loc="lower left")
    for row, name in enumerate([BEST_SCALAR, *names]):
        for key, marker, colour in (("valid", "o", COLOURS[0]), ("test", "D", COLOURS[1])):
            right.plot(results[name][key], row, marker, color=colour, markersize=11, label=key if row == 0 else None)
    right.axvline(scalar / 2, color=BLACK, linewidth=1.5, linestyle=":")
    right.set_yticks(range(len(results)), [BEST_SCALAR, *names])
    right.invert_yaxis()
    right.set_xlim(left=0.0)
    label_axes(right, x="loss after retraining to convergence (nats)", y="")
    right.legend(["validation", "test"], fontsize=LARGE, frameon=False, loc="upper center", ncols=2,
                 bbox_to_anchor=(0.4, 1.12))  # fmt: skip
    return figure


def summarize(results: Results) -> str:
    """Validation and test loss of each, after retraining, and who halves the scalar's."""
    scalar = results[BEST_SCALAR]
    phrases = [f"{BEST_SCALAR} {scalar['valid']:.3f} / {scalar['test']:.3f}"]
    for name, result in results.items():
        if name != BEST_SCALAR:
            share = result["valid"] / scalar["valid"]
            phrases.append(f"{name} {result['valid']:.3f} ({share:.2f} x) / {result['test']:.3f}")
    return "Validation / test loss, retrained: " + "; ".join(phrases) + "."


EXPERIMENT = Experiment(
    name="many",
    title="Many hyperparameters: one penalty a weight",
    parts=(
        Part(BEST_SCALAR, best_single_penalty, {"low": -12.0, "high": -2.0, "count": 41}, 6.0),
        *(
            Part(name, tuned, {"response": name, "steps": steps, "seed": 0}, 13.0)
            for name, steps in zip(responses(), (60, 100, 200, 200), strict=True)
        ),
    ),
    draw=draw,
    summarize=summarize,
)

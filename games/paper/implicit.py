"""The implicit-function theorem instead of a learned map, at equal work: tune the penalties by three responses."""

from __future__ import annotations

import statistics
import warnings
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

import bilevel as bl
from games.experiments.data import DigitSource
from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLUE, GREEN, LARGE, RED, empty_figure, label_axes
from games.paper.converged import TRAIN, VALID
from games.paper.exact import best_response
from games.paper.seed_game import CLASSES, batch_of, seed_game, valid_loss
from games.paper.truth import best_on_grid, float64_digits, true_loss, true_slope

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METHODS = ("hypernetwork", "implicit", "unrolled")
STARTS = (-1.0, 1.5)
SEEDS = (0, 1)
SIZES = (1, CLASSES)
# Leader steps, for about the same work.
STEPS = {
    1: {"hypernetwork": 280, "implicit": 120, "unrolled": 48},
    CLASSES: {"hypernetwork": 150, "implicit": 120, "unrolled": 75},
}
FLOOR = 1e-5
POINTS = (-0.5, 0.5, 1.5)
AMOUNTS = {
    "hypernetwork": (25, 50, 100, 200, 400, 800),
    "implicit": (2, 4, 8, 16, 32, 64),
    "unrolled": (12, 25, 50, 100, 200, 400),
}
"""Inner steps from the follower's init, where the leader is held."""


def responses(size: int) -> dict[str, bl.Response]:
    """What the leader of `size` penalties may assume; each with settings chosen on seed 0's validation loss."""
    return {
        "hypernetwork": bl.Hypernetwork(
            partial(torch.optim.Adam, lr=1e-4),
            scale=0.5,
            warmup=100,
            sampler=bl.responses.Perturbations(count=1 if size == 1 else 5),
            tolerance=None,  # the figure says how well
        ),
        # In float32, as the others; a quasi-Newton solver, for the curvature runs from about 1 to 500.
        "implicit": bl.Implicit(bl.Scipy("L-BFGS-B"), linear_solver=bl.ConjugateGradient(rtol=1e-2)),
        "unrolled": bl.Unrolled(partial(torch.optim.SGD, lr=1e-3, momentum=0.9), steps=20),
    }


def from_scratch(method: str, size: int, steps: int) -> bl.Response:
    """The same from the follower's init at one held leader, as good as it can be after `steps` inner steps."""
    if method == "hypernetwork":
        fits = steps if size == 1 else steps // 5  # of five times the draws
        return bl.Hypernetwork(
            partial(torch.optim.Adam, lr=1e-3),
            scale=0.2,
            warmup=fits,
            steps=0,
            sampler=bl.responses.Perturbations(count=1 if size == 1 else 5),
            scheduler=partial(CosineAnnealingLR, T_max=fits),
            tolerance=None,
        )
    if method == "implicit":
        return bl.Implicit(
            bl.Scipy("L-BFGS-B"), steps=steps, tolerance=None, linear_solver=bl.ConjugateGradient(rtol=1e-2)
        )
    return bl.Unrolled(partial(torch.optim.SGD, lr=1e-3, momentum=0.9), steps=steps)


def constant_penalties(size: int, value: float) -> Tensor:
    """One penalty, or one a class."""
    return torch.tensor(value) if size == 1 else torch.full((size,), value)


def tuned(source: DigitSource, *, size: int, method: str, steps: int, start: float, seed: int) -> Result:
    """One run: the true validation loss along the leader's path, over the work that it took to get there."""
    digits = source.digits(train=TRAIN, valid=VALID, seed=seed)
    exact, train, valid = float64_digits(source, seed)
    path: list[tuple[float, Tensor]] = []
    bl.solve(
        seed_game(digits.train, digits.valid, start=constant_penalties(size, start), seed=seed),
        weights=responses(size)[method],
        optimizer=partial(torch.optim.Adam, lr=0.05),
        steps=steps,
        seed=seed,
        callbacks=[lambda step, record, variables: path.append((record["work"], variables["decay"]))],
    )
    kept = [(0.0, constant_penalties(size, start)), *path[: -1 : max(1, steps // 40)], path[-1]]
    return {
        "work": [work for work, _ in kept],
        "valid": [true_loss(decay, train, valid) for _, decay in kept],
        "end": path[-1][1],
        "test": float(valid_loss(best_response(path[-1][1], train), batch_of(exact.test))),
    }


def slopes(source: DigitSource, *, size: int, method: str, seed: int) -> Result:
    """Where the leader is held: the error of one hypergradient over the work put into it, from the follower's init."""
    digits = source.digits(train=TRAIN, valid=VALID, seed=seed)
    _, train, valid = float64_digits(source, seed)
    curves = []
    for number, point in enumerate(POINTS):
        decay = constant_penalties(size, point)
        if size > 1:  # unequal, or ten equal errors would look like one
            decay = decay + 0.5 * torch.randn(size, generator=torch.Generator().manual_seed(number))
        game = seed_game(digits.train, digits.valid, start=decay, seed=seed)
        truth = true_slope(decay, train, valid)
        found = [hypergradient(from_scratch(method, size, steps), game, decay, seed) for steps in AMOUNTS[method]]
        curves.append(
            {
                "decay": decay,
                "work": [work for _, work in found],
                "error": [float((slope - truth).norm() / truth.norm()) for slope, _ in found],
                "cosine": [float(torch.cosine_similarity(s.flatten(), truth.flatten(), dim=0)) for s, _ in found],
            }
        )
    return {"curves": curves}


def hypergradient(response: bl.Response, game: bl.Game, decay: Tensor, seed: int = 0) -> tuple[Tensor, int]:
    """One hypergradient, in float64, and its gradients and Hessian-vector products together."""
    leader = decay.clone().requires_grad_()
    weights, state = response(game, {"decay": leader}, response.init(game, seed=seed))
    batch, _ = game.draw("decay", game.start("decay"))
    (slope,) = torch.autograd.grad(game.loss("decay", {"decay": leader, "weights": weights}, batch), leader)
    report = response.report(response.after_backward(state, weights))
    return slope.double(), 1 + report.gradients + report.products


def at_kink(source: DigitSource, *, penalty: float, seed: int) -> Result:
    """Where every weight is zero no theorem and no slope holds: the hypergradient is 0, and what each method says."""
    digits = source.digits(train=TRAIN, valid=VALID, seed=seed)
    _, train, valid = float64_digits(source, seed)
    decay = constant_penalties(CLASSES, penalty)
    game = seed_game(digits.train, digits.valid, start=decay, seed=seed)
    answers = {}
    for method, response in responses(CLASSES).items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", bl.BilevelWarning)
            try:
                slope, _ = hypergradient(response, game, decay, seed)
                answers[method] = f"{float(slope.norm()):.2f}"
            except bl.BilevelError as error:
                answers[method] = type(error).__name__
        answers[method] += "".join(f" and {warning.category.__name__}" for warning in caught)
    return {"truth": float(true_slope(decay, train, valid).norm()), "told": answers}


def excess(results: Results, size: int, method: str, start: float, seed: int) -> tuple[list[float], list[float]]:
    """Work, and the true validation loss above the least on the grid; never below a line that a log axis can show."""
    found, best = results[run_name(size, method, start, seed)], results[f"least, {size} penalties, seed {seed}"]
    return found["work"], [max(value - best["valid"], FLOOR) for value in found["valid"]]


def run_name(size: int, method: str, start: float, seed: int) -> str:
    """A part's name."""
    return f"{method}, {size} penalties, from {start:g}, seed {seed}"


def draw(results: Results) -> Figure:
    """A row for each number of penalties: tuning, and the error of a hypergradient."""
    figure = empty_figure(14.0, 9.5)
    for row, size in zip(figure.subplots(2, 2), SIZES, strict=True):
        _tuning(row[0], results, size)
        _errors(row[1], results, size)
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=LARGE, frameon=False)
    return figure


LOOKS = {"hypernetwork": (BLUE, "-"), "implicit": (RED, "--"), "unrolled": (GREEN, "-.")}


def _tuning(axes: Axes, results: Results, size: int) -> None:
    runs = [(start, seed) for start in STARTS for seed in SEEDS]
    for method, (colour, line) in LOOKS.items():
        curves = [excess(results, size, method, *run) for run in runs]
        for work, above in curves:
            axes.plot(work[1:], above[1:], color=colour, linestyle=line, linewidth=0.9, alpha=0.5)
        low, high = max(work[1] for work, _ in curves), min(work[-1] for work, _ in curves)
        spent = [low * (high / low) ** (index / 40) for index in range(41)]
        median = [statistics.median(last_within(*curve, limit) for curve in curves) for limit in spent]
        axes.plot(spent, median, color=colour, linestyle=line, linewidth=3.4, label=method)
    axes.set_xscale("log")
    axes.set_yscale("log")
    title = "one penalty" if size == 1 else f"{size} penalties, one a class"
    x = "gradients + Hessian-vector products"
    label_axes(axes, x=x, y="true validation loss\nabove the least (nats)", title=f"{title}: tuning")


def _errors(axes: Axes, results: Results, size: int) -> None:
    for (method, (colour, line)), marker in zip(LOOKS.items(), "os^", strict=True):
        for curve in results[f"slopes, {method}, {size} penalties"]["curves"]:
            axes.plot(curve["work"], curve["error"], color=colour, linestyle=line, marker=marker, linewidth=2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(1.0, color="0.5", linewidth=1.5)
    x = "gradients + Hessian-vector products"
    label_axes(axes, x=x, y="relative error", title="one hypergradient, from scratch")


def summarize(results: Results) -> str:
    """Where each ends at the work that all have had, and how good its hypergradients are at their best."""
    lines = []
    for size in SIZES:
        runs = [(start, seed) for start in STARTS for seed in SEEDS]
        common = min(excess(results, size, m, *run)[0][-1] for m in METHODS for run in runs)
        phrases = []
        for method in METHODS:
            ends = [last_within(*excess(results, size, method, *run), common) for run in runs]
            curves = results[f"slopes, {method}, {size} penalties"]["curves"]
            errors = ", ".join(format(curve["error"][-1], ".2g") for curve in curves)
            tests = [results[run_name(size, method, *run)]["test"] for run in runs]
            phrases.append(
                f"{method} {statistics.median(ends):.4f} (worst {max(ends):.4f}; test at its end "
                f"{statistics.median(tests):.3f}; hypergradient's error {errors})"
            )
        lines.append(f"{size} {'penalty' if size == 1 else 'penalties'}, after {common:,.0f}: {'; '.join(phrases)}")
    kink = results["kink"]
    said = ", ".join(f"{method} {text}" for method, text in kink["told"].items())
    return (
        f"Median validation loss above the least, at equal gradients and products: {'. '.join(lines)}. Where the "
        f"penalty holds all weights at zero the hypergradient's norm is {kink['truth']:.2f}: {said}."
    )


def last_within(work: list[float], values: list[float], limit: float) -> float:
    """The last value that was there within the work."""
    return [value for spent, value in zip(work, values, strict=True) if spent <= limit * (1 + 1e-9)][-1]


EXPERIMENT = Experiment(
    name="implicit",
    title="The implicit-function theorem and unrolling instead of a hypernetwork, at equal work",
    parts=(
        *(
            Part(f"least, {size} penalties, seed {seed}", best_on_grid, {"size": size, "seed": seed, "count": 111}, 2.0)
            for size in SIZES
            for seed in SEEDS
        ),
        *(
            Part(
                run_name(size, method, start, seed),
                tuned,
                {"size": size, "method": method, "steps": STEPS[size][method], "start": start, "seed": seed},
                4.0,
            )
            for size in SIZES
            for method in METHODS
            for start in STARTS
            for seed in SEEDS
        ),
        *(
            Part(f"slopes, {method}, {size} penalties", slopes, {"size": size, "method": method, "seed": 0}, 5.0)
            for size in SIZES
            for method in METHODS
        ),
        Part("kink", at_kink, {"penalty": 2.9, "seed": 0}, 2.0),
    ),
    draw=draw,
    summarize=summarize,
)

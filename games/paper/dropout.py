"""Dropout rates on MNIST: a rate a layer and a rate a pixel, learned in one run, against a grid of fixed rates."""

from __future__ import annotations

import statistics
from functools import partial
from typing import TYPE_CHECKING

import torch

import bilevel as bl
from games.experiments.data import Digits, DigitSource
from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLACK, BLUE, GREEN, LARGE, PURPLE, RED, SMALL, empty_figure, label_axes
from games.problems.dropout import PerPixel, bernoulli, dropout_game, loss_on, rates_of, relaxed, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (1, 2, 3, 4, 5)
"""The settings were chosen on seeds 0 and 6 to 8."""
INPUTS, HIDDENS = (0.0, 0.4, 0.6, 0.8, 0.9), (0.0, 0.3, 0.6)
WARMUP, FITS, STEPS = 100, 4, 200
TRAINING = WARMUP + FITS * STEPS
"""Steps of training from scratch: as many as the weights see in a joint run."""
NONE, BEST = "no dropout", "best of the grid"
LEARNED = ("a rate a layer, Bernoulli masks", "a rate a layer, relaxed masks", "a rate a pixel, Bernoulli masks")


def digits_of(source: DigitSource, seed: int) -> Digits:
    """150 digits to train on, so that dropout matters."""
    return source.digits(train=150, valid=1000, test=2000, seed=seed)


def grid(source: DigitSource, *, seed: int, inputs: tuple[float, ...], hiddens: tuple[float, ...]) -> Result:
    """Every pair of fixed rates, trained from scratch; the best by validation."""
    digits, rows = digits_of(source, seed), []
    for first in inputs:
        for second in hiddens:
            rates = {"input": torch.tensor(first), "hidden": torch.tensor(second)}
            weights = train(digits, rates, steps=TRAINING, seed=seed)
            rows.append([first, second, loss_on(weights, digits.valid), loss_on(weights, digits.test)])
    best = min(rows, key=lambda row: row[2])
    return {"rows": rows, "best": best, "test": best[3], "none": rows[0][3]}


def learned(source: DigitSource, *, seed: int, soft: bool, per_pixel: bool, steps: int) -> Result:
    """The rates' schedule in one joint run from .3, and what a network trained from scratch at their end is worth."""
    digits = digits_of(source, seed)
    game = dropout_game(digits, mask=relaxed if soft else bernoulli, per_pixel=per_pixel, start=0.3, seed=seed)
    path: list[list[float]] = []

    def note(step: int, record: object, variables: dict[str, dict[str, torch.Tensor]]) -> None:
        rates = rates_of(variables["rates"])
        path.append([float(rates["input"].mean()), float(rates["hidden"])])

    def per_pixel_network(inputs: int, outputs: int) -> torch.nn.Module:
        return PerPixel(pixels=inputs - 2, hidden=64, classes=10)

    response = bl.Hypernetwork(
        partial(torch.optim.Adam, lr=1e-3),
        network=per_pixel_network if per_pixel else bl.networks.Linear(),
        scale=2.0,  # of a logit: over a narrower range the slope is lost in the masks' own noise
        warmup=WARMUP,
        steps=FITS,
        tolerance=None,
    )
    solution = bl.solve(
        game,
        weights=response,
        optimizer=partial(torch.optim.Adam, lr=0.05),
        steps=steps,
        seed=seed,
        callbacks=[note],  # type: ignore[list-item]
    )
    rates = rates_of(solution.variables["rates"])
    weights = train(digits, rates, steps=TRAINING, seed=seed)
    return {
        "path": path,
        "standing": loss_on(solution.variables["weights"], digits.test),
        "input": rates["input"],
        "hidden": rates["hidden"],
        "valid": loss_on(weights, digits.valid),
        "test": loss_on(weights, digits.test),
        "residual": solution.residuals["weights"],
        "gradients": solution.gradients,
    }


def draw(results: Results) -> Figure:
    """Test losses on the left, the schedules in the middle, the rates of the pixels on the right."""
    figure = empty_figure(13.5, 5.4)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.25, 1.1, 1))
    columns = _tests(results)
    for place, (losses, colour) in enumerate(zip(columns.values(), (BLACK, GREEN, BLUE, RED, PURPLE), strict=True)):
        left.plot(losses, [place] * len(losses), "o", color=colour, markersize=8, alpha=0.6)
        left.plot([statistics.median(losses)] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=3.5)
    for place, name in enumerate(LEARNED, start=2):
        standing = statistics.median(results[f"{name}, seed {seed}"]["standing"] for seed in SEEDS)
        left.plot(standing, place, "d", color=BLACK, markersize=10, fillstyle="none", markeredgewidth=2)
    left.axvline(1.1 * statistics.median(columns[BEST]), color=GREEN, linestyle=":", linewidth=2)
    left.set_yticks(range(len(columns)), [name.replace(", ", ",\n") for name in columns])
    left.invert_yaxis()
    label_axes(left, x="test loss (nats)", y="", title="bar: median; ◇: the joint run itself")
    for number, name in enumerate(LEARNED[:2]):
        for seed in SEEDS:
            inputs, hiddens = zip(*results[f"{name}, seed {seed}"]["path"], strict=True)
            colour = (BLUE, RED)[number]
            middle.plot(inputs, color=colour, linewidth=1.8, alpha=0.8,
                        label=f"input, {name.split(', ')[1]}" if seed == SEEDS[0] else None)  # fmt: skip
            middle.plot(hiddens, color=colour, linewidth=1.8, alpha=0.8, linestyle="--",
                        label=f"hidden, {name.split(', ')[1]}" if seed == SEEDS[0] else None)  # fmt: skip
    label_axes(middle, x="step of the leader", y="dropout rate", title="the schedules found")
    middle.set_ylim(0, 1.6)
    middle.set_yticks([0.0, 0.25, 0.5, 0.75, 1.0])
    middle.legend(fontsize=SMALL - 1, frameon=False, loc="upper center")
    rates = torch.tensor([results[f"{LEARNED[2]}, seed {seed}"]["input"] for seed in SEEDS]).mean(0)
    side = round(len(rates) ** 0.5)
    shown = right.imshow(rates.reshape(side, side).tolist(), cmap="cividis", interpolation="nearest")
    right.set(xticks=[], yticks=[])
    right.set_title("a rate for each pixel\n(mean of the seeds)", fontsize=LARGE)
    bar = figure.colorbar(shown, ax=right, shrink=0.85)
    bar.set_label("dropout rate", fontsize=LARGE)
    bar.ax.tick_params(labelsize=SMALL)
    return figure


def summarize(results: Results) -> str:
    """The medians, and how many seeds are below no dropout."""
    columns = _tests(results)
    best = statistics.median(columns[BEST])
    phrases = []
    for name in LEARNED:
        median = statistics.median(columns[name])
        below = sum(mine < none for mine, none in zip(columns[name], columns[NONE], strict=True))
        standing = statistics.median(results[f"{name}, seed {seed}"]["standing"] for seed in SEEDS)
        share = f"{100 * (median / best - 1):+.1f} %, {below} of {len(SEEDS)} seeds below none"
        phrases.append(f"{name} {median:.3f} ({share}; as the joint run left it {standing:.3f})")
    return (
        f"Median test loss over {len(SEEDS)} seeds, retrained: no dropout {statistics.median(columns[NONE]):.3f}, best "
        f"of {len(INPUTS) * len(HIDDENS)} fixed pairs {best:.3f}; " + "; ".join(phrases) + "."
    )


def _tests(results: Results) -> dict[str, list[float]]:
    grids = [results[f"grid, seed {seed}"] for seed in SEEDS]
    return {NONE: [g["none"] for g in grids], BEST: [g["test"] for g in grids]} | {
        name: [results[f"{name}, seed {seed}"]["test"] for seed in SEEDS] for name in LEARNED
    }


EXPERIMENT = Experiment(
    name="dropout",
    title="Dropout rates, a layer and a pixel",
    parts=tuple(
        part
        for seed in SEEDS
        for part in (
            Part(f"grid, seed {seed}", grid, {"seed": seed, "inputs": INPUTS, "hiddens": HIDDENS}, 24.0),
            *(
                Part(
                    f"{name}, seed {seed}",
                    learned,
                    {"seed": seed, "soft": "relaxed" in name, "per_pixel": "pixel" in name, "steps": STEPS},
                    10.0,
                )
                for name in LEARNED
            ),
        )
    ),
    draw=draw,
    summarize=summarize,
)

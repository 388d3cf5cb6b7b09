"""Training data as hyperparameters: a data set distilled into ten images, and the derivative by every example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLACK, BLUE, GREEN, LARGE, RED, SMALL, empty_figure, label_axes
from games.paper.distillation_runs import GOAL, RESPONSES, SEEDS, SETS, baselines, distilled, exactness

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OTHERS = ("class means", "ten real images", "all real images")


def accuracies(results: Results, data: str, name: str) -> list[float]:
    """Test accuracies by one method, a number a split; `name` is one of `RESPONSES` or of `OTHERS`."""
    if name in RESPONSES:
        return [results[f"{data}, {name}, seed {seed}"]["test"] for seed in SEEDS[data]]
    return [results[f"{data}, baselines, seed {seed}"][name]["test"] for seed in SEEDS[data]]


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _rows(figure: Any, results: Results) -> None:
    """Class means, distilled images, and what sets each of these apart from the others, for both data sets."""
    axes = figure.subplots(6, 10, gridspec_kw={"wspace": 0.04, "hspace": 0.04})
    for index, data in enumerate(SETS):
        means, drawn = (
            torch.tensor(results[f"{data}, {name}, seed 0"]["images"]) for name in ("baselines", "conjugate gradients")
        )
        shape = results[f"{data}, baselines, seed 0"]["shape"]
        # A softmax classifier sees differences between classes alone: what they share is most of the ink.
        apart = drawn - drawn.mean(0)
        for row, (images, name) in enumerate(
            ((means, "class means"), (drawn, "distilled"), (apart, "distilled,\nless their mean"))
        ):
            line, largest = axes[3 * index + row], float(images.abs().max())
            low, high = (-largest, largest) if row == 2 else (float(images.min()), float(images.max()))
            for image, panel in zip(images, line, strict=True):
                panel.imshow(image.reshape(shape).numpy(), cmap="PuOr" if row == 2 else "Greys", vmin=low, vmax=high)
                panel.set(xticks=[], yticks=[])
            label = f"{data}\n{name}\n({low:.1f} to {high:.1f})"
            line[0].set_ylabel(label, fontsize=SMALL, rotation=0, ha="right", va="center")


def _accuracies(axes: Axes, results: Results) -> None:
    names = (*RESPONSES, *OTHERS)
    for data, colour, marker, shift in zip(SETS, (BLUE, RED), "os", (0.14, -0.14), strict=True):
        places = [len(names) - 1 - index + shift for index in range(len(names))]
        for place, name in zip(places, names, strict=True):
            every = accuracies(results, data, name)
            if name == "ten real images":
                every = [t for s in SEEDS[data] for t in results[f"{data}, baselines, seed {s}"][name]["tests"]]
            axes.plot(every, [place] * len(every), "|", color=colour, alpha=0.5, markersize=11)
        means = [_mean(accuracies(results, data, name)) for name in names]
        axes.plot(means, places, marker, color=colour, markersize=9, label=f"{data} (splits: {len(SEEDS[data])})")
    axes.axvline(GOAL, color="0.4", linestyle=":", linewidth=2, label="goal for 8 x 8 digits")
    labels = [f"distilled:\n{n}" if n in RESPONSES else n for n in names]
    axes.set_yticks(range(len(names)), list(reversed(labels)))
    label_axes(axes, x="test accuracy, retrained from scratch", y="")
    axes.legend(fontsize=SMALL, loc="upper left", frameon=True)


def _agreement(axes: Axes, result: Result) -> None:
    finite, implicit, split = result["finite"], result["implicit"], result["entries"]
    ends = [min(finite), max(finite)]
    axes.plot(ends, ends, color=BLACK, linewidth=1)
    axes.plot(
        finite[:split], implicit[:split], "o", color=BLUE, fillstyle="none", markersize=9, mew=1.6, label="one λᵢ"
    )
    axes.plot(finite[split:], implicit[split:], "^", color=GREEN, markersize=7, label="random direction")
    label_axes(axes, x="finite difference (nats a unit of λ)", y="hypergradient (nats a unit of λ)")
    axes.set_title(f"largest relative error {max(result['error']):.1e}", fontsize=LARGE)
    axes.legend(fontsize=SMALL, frameon=False)


def draw(results: Results) -> Figure:
    """Images above; accuracies and exactness below."""
    figure = empty_figure(15.0, 16.0)
    halves: Any = figure.subfigures(2, 1, height_ratios=(1.75, 1.0))
    _rows(halves[0], results)
    left, right = halves[1].subplots(1, 2, width_ratios=(1.2, 1.0))
    _accuracies(left, results)
    _agreement(right, results["exactness"])
    return figure


def summarize(results: Results) -> str:
    """Accuracies of both data sets, and the hypergradient's error."""

    def describe(data: str) -> str:
        drawn = ", ".join(f"{_mean(accuracies(results, data, name)):.3f} by {name}" for name in RESPONSES)
        others = ", ".join(f"{_mean(accuracies(results, data, name)):.3f} from {name}" for name in OTHERS)
        return f"{data} distilled into ten images: test accuracy {drawn}; {others}"

    reached = min(accuracies(results, SETS[0], "conjugate gradients"))
    found = results["exactness"]
    worst = max(found["error"])
    return (
        f"{describe(SETS[0])} (goal {GOAL:.2f}: the worst of {len(SEEDS[SETS[0]])} splits has {reached:.3f}, "
        f"{'reached' if reached >= GOAL else 'MISSED'}). {describe(SETS[1])}. Hypergradient against finite "
        f"differences of re-solved followers, {found['entries']} entries and {len(found['finite']) - found['entries']} "
        f"random directions: largest relative error {worst:.1e} ({'at most' if worst <= 1e-6 else 'MORE than'} 1e-6)."
    )


def _parts() -> list[Part]:
    parts = []
    for data, seeds in SEEDS.items():
        for seed in seeds:
            drawing = {"data": data, "seed": seed, "steps": 150, "rate": 0.02}
            seconds = 15.0 if data == "MNIST" else 8.0
            parts += [
                Part(f"{data}, {n}, seed {seed}", distilled, {"response": n} | drawing, seconds) for n in RESPONSES
            ]
            parts.append(
                Part(f"{data}, baselines, seed {seed}", baselines, {"data": data, "seed": seed, "draws": 10}, 4.0)
            )
    exact = {"train": 100, "penalty": 0.01, "directions": 20, "step": 3e-5}
    return [*parts, Part("exactness", exactness, exact, 6.0)]


EXPERIMENT = Experiment(
    name="distillation",
    title="Training data as hyperparameters: ten distilled images",
    parts=tuple(_parts()),
    draw=draw,
    summarize=summarize,
)

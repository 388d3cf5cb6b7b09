"""Figure 4: a local, linear response learned jointly with the leader is right where the leader is, and only there."""

from __future__ import annotations

import warnings
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import bilevel as bl
from games.experiments.data import DigitSource
from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLACK, BLUE, LARGE, RED, SKY, SMALL, empty_figure, label_axes
from games.paper.converged import TRAIN, VALID, cross_validated, evenly_spaced
from games.paper.seed_game import batch_of, seed_game, train_loss, valid_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STARTS = (-1.0, 2.9)
VALUES = evenly_spaced(41)
SCALE = 0.5


def ours() -> bl.Hypernetwork:
    """Algorithms 3 and 4: one step of Adam on the linear map for each of the leader's, under perturbations."""
    return bl.Hypernetwork(partial(torch.optim.Adam, lr=1e-4), scale=SCALE, warmup=500, tolerance=None)


def noiseless() -> bl.Hypernetwork:
    """The same without noise or centring, w0 + J lambda, as in the authors' local variant: nothing fixes its slope."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.errors.UnreliableResponseWarning)  # what it says is what the figure shows
        return bl.Hypernetwork(
            partial(torch.optim.Adam, lr=1e-4),
            scale=0.0,
            network=bl.networks.Uncentred(bl.networks.Linear()),
            warmup=500,
            tolerance=None,
        )


def joint(source: DigitSource, *, start: float, noisy: bool, steps: int, seed: int) -> Result:
    """Leader and response together from one start; then the response's curves over the whole range."""
    digits = source.digits(train=TRAIN, valid=VALID, seed=seed)
    game = seed_game(digits.train, digits.valid, start=start, seed=seed)
    response = ours() if noisy else noiseless()
    path: list[float] = []
    solution = bl.solve(
        game,
        weights=response,
        optimizer=partial(torch.optim.Adam, lr=0.01),
        steps=steps,
        seed=seed,
        callbacks=[lambda step, record, variables: path.append(float(variables["decay"]))],
    )
    state = solution.states["weights"]

    def losses(decay: Tensor) -> tuple[Tensor, Tensor]:
        weights, _ = response(game, {"decay": decay}, state)
        return valid_loss(weights, batch_of(digits.valid)), train_loss(decay, weights, batch_of(digits.train))

    end = path[-1]
    valid, train = torch.func.vmap(losses)(torch.tensor(VALUES))
    here, _ = losses(torch.tensor(end))
    return {"values": VALUES, "valid": valid, "train": train, "end": end, "here": here, "path": path[::10]}


def errors(truth: Result, found: Result) -> tuple[float, float]:
    """Of the learned validation loss: at the grid value nearest the leader's end, and at the far end of the range."""
    gaps = [abs(a - b) for a, b in zip(truth["valid"], found["valid"], strict=True)]
    values = truth["values"]
    near = min(range(len(values)), key=lambda index: abs(values[index] - found["end"]))
    far = 0 if found["end"] - values[0] > values[-1] - found["end"] else len(values) - 1
    return gaps[near], gaps[far]


def draw(results: Results) -> Figure:
    """Training loss with its penalty above, validation loss below; a column for each start, with and without noise."""
    figure = empty_figure(14.0, 8.0)
    truth = results["cross-validation"]
    cases = [(f"{name} from {start:g}", name) for name in ("perturbed", "noiseless") for start in STARTS]
    grid = figure.subplots(2, len(cases), sharex=True, sharey="row")
    names = {"train": "training loss (nats)", "valid": "validation loss (nats)"}
    for column, (case, name) in enumerate(cases):
        for row, key in enumerate(names):
            _panel(grid[row][column], truth, results[case], key)
            label_axes(
                grid[row][column],
                x="log penalty λ" if row else "",
                y="" if column else names[key],
                title=case if row == 0 else "",
            )
            if name == "perturbed":
                _density(grid[row][column], results[case]["end"])
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=LARGE, frameon=False)
    return figure


def _panel(axes: Axes, truth: Result, found: Result, key: str) -> None:
    axes.plot(truth["values"], truth[key], color=BLACK, linewidth=2.6, label="retrained (exact)")
    axes.plot(found["values"], found[key], color=BLUE, linestyle="--", linewidth=2.4, label="learned response")
    axes.axvline(found["end"], color=RED, linewidth=2, linestyle="-.", label="leader's end")
    axes.axvline(truth["best"], color=BLACK, linewidth=1.5, linestyle=":", label="cross-validation's optimum")
    low, high = min(truth[key]), max(truth[key])
    axes.set_xlim(-1.2, 3.2)
    if not -1.2 <= found["end"] <= 3.2:
        axes.text(
            0.97, 0.05, f"ends at {found['end']:.1f} →", color=RED, fontsize=SMALL, ha="right", transform=axes.transAxes
        )
    axes.set_ylim(low - 0.25 * (high - low), high + 0.1 * (high - low))


def _density(axes: Axes, mean: float) -> None:
    """p(lambda) at the end of the run, along the lower edge and in no units of the axis."""
    values = torch.linspace(-1.0, 3.0, 200)
    height = 0.18 * torch.exp(-0.5 * ((values - mean) / SCALE) ** 2)
    axes.fill_between(
        values.tolist(), 0, height.tolist(), transform=axes.get_xaxis_transform(), color=SKY, alpha=0.6, linewidth=0,
        label="p(λ), where it is fitted",
    )  # fmt: skip


def summarize(results: Results) -> str:
    """Where the leader ends, and how wrong the learned curve is near and far."""
    truth, phrases = results["cross-validation"], []
    for name in ("perturbed", "noiseless"):
        for start in STARTS:
            found = results[f"{name} from {start:g}"]
            near, far = errors(truth, found)
            wrong = f"error {near:.3f} there, {far:.2f} far away"
            phrases.append(f"{name} from {start:g} ends at {found['end']:.2f} ({wrong})")
    return f"The optimum is {truth['best']:.1f}; " + "; ".join(phrases) + "."


EXPERIMENT = Experiment(
    name="fig4",
    title="Figure 4: a local response, learned jointly with the leader",
    parts=(
        Part("cross-validation", cross_validated, {"values": VALUES, "seed": 0}, 6.0),
        *(
            Part(
                f"{name} from {start:g}",
                joint,
                {"start": start, "noisy": name == "perturbed", "steps": 1000, "seed": 0},
                20.0,
            )
            for name in ("perturbed", "noiseless")
            for start in STARTS
        ),
    ),
    draw=draw,
    summarize=summarize,
)

"""Figure 2: one network learns the best response to every penalty, and the leader then descends on the learned map."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

import bilevel as bl
from games.experiments.data import DigitSource
from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLACK, BLUE, LARGE, RED, SMALL, empty_figure, label_axes
from games.paper.converged import TRAIN, VALID, cross_validated, evenly_spaced
from games.paper.seed_game import batch_of, seed_game, valid_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2)
CROSSES = evenly_spaced(11)


def everywhere(others: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """p(lambda) is uniform on [-2, 4]: the range of interest and a margin, where a map is worst."""
    return {"decay": 6.0 * torch.rand((), generator=generator) - 2.0}


def global_response(fits: int) -> bl.Hypernetwork:
    """Algorithm 2: a 1-50-7850 network, `fits` steps of Adam on 10 draws each, and none after that."""
    return bl.Hypernetwork(
        partial(torch.optim.Adam, lr=3e-4),
        network=bl.networks.MLP((50,)),
        sampler=bl.responses.Draws(everywhere, count=10),
        scale=1.5,
        warmup=fits,
        steps=0,
        scheduler=partial(CosineAnnealingLR, T_max=fits),
        tolerance=None,  # it answers for a range; the curve below says how well
    )


def learned(source: DigitSource, *, seed: int, fits: int, steps: int) -> Result:
    """The map's validation loss over the range, and where the leader ends on it from the middle of the range."""
    digits = source.digits(train=TRAIN, valid=VALID, seed=seed)
    game = seed_game(digits.train, digits.valid, start=1.0, seed=seed)
    response = global_response(fits)
    solution = bl.solve(game, weights=response, optimizer=partial(torch.optim.Adam, lr=0.05), steps=steps, seed=seed)
    state = solution.states["weights"]

    def loss(decay: Tensor) -> Tensor:
        weights, _ = response(game, {"decay": decay}, state)
        return valid_loss(weights, batch_of(digits.valid))

    curve, crosses = evenly_spaced(81), CROSSES
    return {
        "curve": {"values": curve, "valid": torch.func.vmap(loss)(torch.tensor(curve))},
        "crosses": torch.func.vmap(loss)(torch.tensor(crosses)),
        "end": solution.variables["decay"],
        "path": [record["decay"] for record in solution.history],
        "gradients": solution.gradients,
    }


def agreement(truth: Result, found: Result) -> Result:
    """How the learned curve compares with cross-validation at its crosses."""
    from scipy.stats import spearmanr

    exact, guess = torch.tensor(truth["valid"]), torch.tensor(found["crosses"])
    return {
        "rank": float(spearmanr(exact, guess).statistic),
        "steps_off": abs(int(exact.argmin()) - int(guess.argmin())),
        "gap": float((exact - guess).abs().max()),
        "span": float(exact.max() - exact.min()),
    }


def draw(results: Results) -> Figure:
    """One panel a seed: the learned curve, the crosses, and where the leader ended."""
    figure = empty_figure(13.5, 5.0)
    for axes, seed in zip(figure.subplots(1, len(SEEDS), squeeze=False)[0], SEEDS, strict=True):
        truth, found = results[f"cross-validation, seed {seed}"], results[f"hypernetwork, seed {seed}"]
        axes.plot(found["curve"]["values"], found["curve"]["valid"], color=BLUE, linewidth=2.6, label="learned map")
        axes.plot(truth["values"], truth["valid"], "x", color=BLACK, markersize=10, mew=2.2, label="cross-validation")
        end = found["end"]
        axes.axvline(end, color=RED, linestyle="--", linewidth=2, label="leader's end on the map")
        label_axes(axes, x="log penalty λ", y="validation loss (nats an output)" if seed == SEEDS[0] else "")
        numbers = agreement(truth, found)
        title = f"seed {seed}: rank {numbers['rank']:.3f}, worst gap {numbers['gap']:.3f}"
        axes.set_title(title, fontsize=SMALL + 1)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=LARGE, frameon=False)
    return figure


def summarize(results: Results) -> str:
    """The three numbers, over the seeds."""
    found = [agreement(results[f"cross-validation, seed {s}"], results[f"hypernetwork, seed {s}"]) for s in SEEDS]
    ends = [results[f"hypernetwork, seed {s}"]["end"] for s in SEEDS]
    best = [results[f"cross-validation, seed {s}"]["best"] for s in SEEDS]
    return (
        f"The learned curve passes through the crosses: rank correlation {min(f['rank'] for f in found):.3f} or more, "
        f"least loss within {max(f['steps_off'] for f in found)} grid step(s), worst gap "
        f"{max(f['gap'] for f in found):.3f} on curves that span {min(f['span'] for f in found):.2f} or more; the "
        f"leader ends at {', '.join(f'{e:.2f}' for e in ends)}, cross-validation's best cross is at "
        f"{', '.join(f'{b:.1f}' for b in best)}."
    )


EXPERIMENT = Experiment(
    name="fig2",
    title="Figure 2: a global best response, and cross-validation",
    parts=(
        *(Part(f"cross-validation, seed {s}", cross_validated, {"values": CROSSES, "seed": s}, 2.0) for s in SEEDS),
        *(Part(f"hypernetwork, seed {s}", learned, {"seed": s, "fits": 5000, "steps": 100}, 40.0) for s in SEEDS),
    ),
    draw=draw,
    summarize=summarize,
)

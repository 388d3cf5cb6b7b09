"""A limit: a discrete hyperparameter, the number of hidden units, by a floored loss and by a score function."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from games.cross_validation import CrossValidation
from games.experiments.data import DigitSource
from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLACK, BLUE, GREEN, LARGE, RED, empty_figure, label_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST = 64
SEEDS = (0, 1, 2)
STARTS = (6.0, 48.0)
DECAY, NOISE = 1e-4, 0.3
FLOORED, SCORE = "floored in the loss", "score function"
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Units:
    """What the hidden units make of the images of three splits: batches of activations `[n, 64]` and labels."""

    train: Batch
    valid: Batch
    test: Batch

    @staticmethod
    def of(source: DigitSource, seed: int, dtype: torch.dtype = torch.float32) -> Units:
        """64 random tanh units; 30 % of the 300 training labels are drawn anew, so that many units fit noise."""
        digits = source.digits(train=300, valid=1000, test=2000, seed=seed, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        pixels = digits.train.images.shape[1]
        layer = torch.randn(pixels, MOST, generator=generator, dtype=dtype) / 9
        drawn_anew = torch.rand(len(digits.train), generator=generator) < NOISE
        labels = digits.train.labels.clone()
        labels[drawn_anew] = torch.randint(10, (int(drawn_anew.sum()),), generator=generator)

        def active(images: Tensor) -> Tensor:
            return torch.tanh((images - 0.13) @ layer)

        return Units(
            (active(digits.train.images), labels),
            (active(digits.valid.images), digits.valid.labels),
            (active(digits.test.images), digits.test.labels),
        )


def loss(weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """Cross-entropy in nats of the readout."""
    active, labels = batch
    return cross_entropy(active @ weights["weight"] + weights["bias"], labels)


def train_loss(units: Tensor, weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """The loss with the first floor(units) alone, a small decay on them, and what keeps the others at zero.

    The floor has no slope: a hypergradient can only come through the response, as in arXiv 1903.03088. A unit that is
    not used has weight 0 at the best response, so that the leader's loss needs no mask and sees it come into use.
    """
    used = (units.floor() - torch.arange(MOST, dtype=units.dtype)).clamp(0.0, 1.0)[:, None]
    masked = {"weight": weights["weight"] * used, "bias": weights["bias"]}
    unused = (weights["weight"] * (1 - used)).square().sum()
    return loss(masked, batch) + DECAY * masked["weight"].square().sum() + unused


def units_game(data: Units, start: float) -> bl.Game:
    """`units`, a real number, and the readout's `weights`."""
    dtype = data.train[0].dtype
    init = {"weight": torch.zeros(MOST, 10, dtype=dtype), "bias": torch.zeros(10, dtype=dtype)}
    return bl.Game(
        units=bl.Player(loss, torch.tensor(start, dtype=dtype), [data.valid]),
        weights=bl.Player(train_loss, init, [data.train]),
    )


def every_number(source: DigitSource, *, seed: int) -> Result:
    """The truth: each number of units retrained to convergence."""
    data = Units.of(source, seed, torch.float64)
    game = units_game(data, 20.0)
    candidates = [{"units": torch.tensor(float(n), dtype=torch.float64)} for n in range(1, MOST + 1)]
    found = CrossValidation(tolerance=1e-5)(game, candidates, seed=seed)
    return {
        "valid": found.leader_losses,
        "best": found.best_index + 1,
        "test": loss(found.answer, data.test),
        "gradients": found.gradients,
    }


def floored(source: DigitSource, *, seed: int, start: float, steps: int) -> Result:
    """A local linear response to the unfloored number, fitted over a few units to either side."""
    path: list[float] = []
    solution = bl.solve(
        units_game(Units.of(source, seed), start),
        weights=bl.Hypernetwork(
            partial(torch.optim.Adam, lr=1e-2),
            scale=4.0,
            warmup=500,
            steps=10,
            sampler=bl.responses.Perturbations(count=4),
            tolerance=None,
        ),
        optimizer=partial(torch.optim.Adam, lr=0.5),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        steps=steps,
        seed=seed,
        callbacks=[lambda step, record, variables: path.append(float(variables["units"]))],
    )
    return {"path": path, "end": int(path[-1]), "gradients": solution.gradients}


def log_belief(belief: Mapping[str, Tensor]) -> Tensor:
    """log p over the numbers 1 to 64: a normal's density there, normalised; `mean` in units, `spread` its logarithm."""
    numbers = torch.arange(1.0, MOST + 1)
    return (-0.5 * ((numbers - belief["mean"]) / belief["spread"].exp()).square()).log_softmax(0)


def scored(source: DigitSource, *, seed: int, start: float, samples: int, steps: int) -> Result:
    r"""A belief over the number follows its score; each number that it draws is retrained to convergence, once.

    grad E_p[F(n)] = E_p[(F(n) - b) grad log p(n)],  b the mean of F over the step's other draws
    """
    game = units_game(Units.of(source, seed, torch.float64), 20.0)
    search, gradients = CrossValidation(tolerance=1e-5), 0
    known: dict[int, float] = {}
    belief = {"mean": torch.tensor(start, requires_grad=True), "spread": torch.tensor(2.0, requires_grad=True)}
    optimizer = torch.optim.Adam([{"params": [belief["mean"]], "lr": 1.0}, {"params": [belief["spread"]], "lr": 0.05}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    generator, path = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        log_p = log_belief(belief)
        drawn = torch.multinomial(log_p.detach().exp(), samples, replacement=True, generator=generator)
        fresh = [n for n in dict.fromkeys(drawn.tolist()) if n not in known]
        if fresh:
            candidates = [{"units": torch.tensor(n + 1.0, dtype=torch.float64)} for n in fresh]
            found = search(game, candidates, seed=seed)
            known |= dict(zip(fresh, found.leader_losses.tolist(), strict=True))
            gradients += found.gradients
        values = torch.tensor([known[n] for n in drawn.tolist()])
        others = (values.sum() - values) / (samples - 1)
        optimizer.zero_grad()
        ((values - others) * log_p[drawn]).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        path.append(float(belief["mean"].detach()))
    end = int(log_belief(belief).argmax()) + 1
    return {"path": path, "end": end, "retrained": len(known), "gradients": gradients}


def draw(results: Results) -> Figure:
    """The truth with every end on it, a panel a seed; below, the way there."""
    figure = empty_figure(14.0, 9.0)
    grid = figure.subplots(2, len(SEEDS))
    for column, seed in enumerate(SEEDS):
        above, below = grid[0][column], grid[1][column]
        truth = results[f"every number, seed {seed}"]
        above.plot(range(1, MOST + 1), truth["valid"], color=BLACK, linewidth=2.2, label="retrained (exact)")
        for start, line in zip(STARTS, ("-", "--"), strict=True):
            for name, marker, colour in ((FLOORED, "o", BLUE), (SCORE, "D", RED)):
                found = results[f"{name} from {start:g}, seed {seed}"]
                above.plot(found["end"], truth["valid"][found["end"] - 1], marker, color=colour, markersize=12,
                           fillstyle="full" if line == "-" else "none", markeredgewidth=2.2,
                           label=f"{name}, from {start:g}", linestyle="")  # fmt: skip
                share = [step / len(found["path"]) for step in range(len(found["path"]))]
                below.plot(share, found["path"], color=colour, linewidth=2.4, linestyle=line)
        below.axhline(truth["best"], color=GREEN, linewidth=1.8, linestyle=":", label="the best number")
        label_axes(above, x="hidden units", y="" if column else "validation loss (nats)", title=f"seed {seed}")
        label_axes(below, x="share of the run", y="" if column else "hidden units")
        below.set_ylim(0, MOST)
    handles, labels = grid[0][0].get_legend_handles_labels()
    more, named = grid[1][0].get_legend_handles_labels()
    figure.legend(handles + more, labels + named, loc="outside upper center", ncols=3, fontsize=LARGE, frameon=False)
    return figure


def summarize(results: Results) -> str:
    """Where each ends, what that costs in loss, and the gradients taken."""
    phrases = []
    for name in (f"{method} from {start:g}" for method in (FLOORED, SCORE) for start in STARTS):
        ends, above = [], []
        for seed in SEEDS:
            truth, found = results[f"every number, seed {seed}"], results[f"{name}, seed {seed}"]
            ends.append(str(found["end"]))
            above.append(truth["valid"][found["end"] - 1] - truth["valid"][truth["best"] - 1])
        work = max(results[f"{name}, seed {seed}"]["gradients"] for seed in SEEDS)
        phrases.append(
            f"{name}: {', '.join(ends)} units, at most {max(above):.3f} nats above (up to {work:,} gradients)"
        )
    best = ", ".join(str(results[f"every number, seed {s}"]["best"]) for s in SEEDS)
    work = results[f"every number, seed {SEEDS[0]}"]["gradients"]
    return f"Best of all {MOST} numbers, seed by seed: {best} ({work:,} gradients). " + "; ".join(phrases) + "."


EXPERIMENT = Experiment(
    name="discrete",
    title="Limit: a discrete hyperparameter",
    parts=tuple(
        part
        for seed in SEEDS
        for part in (
            Part(f"every number, seed {seed}", every_number, {"seed": seed}, 8.0),
            *(
                Part(f"{FLOORED} from {s:g}, seed {seed}", floored, {"seed": seed, "start": s, "steps": 150}, 6.0)
                for s in STARTS
            ),
            *(
                Part(
                    f"{SCORE} from {s:g}, seed {seed}",
                    scored,
                    {"seed": seed, "start": s, "samples": 4, "steps": 150},
                    8.0,
                )
                for s in STARTS
            ),
        )
    ),
    draw=draw,
    summarize=summarize,
)

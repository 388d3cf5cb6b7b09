"""Figures 5 and 6: learn the weights, not the losses. A hypernetwork against a Gaussian process, on ten penalties."""

from __future__ import annotations

import math
import statistics
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

import bilevel as bl
from games.cross_validation import Candidate, CrossValidation, random
from games.errors import MissingExtraError
from games.experiments.data import DigitSource
from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLACK, BLUE, COLOURS, LARGE, empty_figure, label_axes
from games.paper.converged import TRAIN, VALID
from games.paper.exact import best_response, stationarity
from games.paper.seed_game import CLASSES, seed_game, valid_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = (0, 1, 2)
BOUNDS = {"decay": (-3.0, 3.0)}
METHODS = ("Gaussian process on 25 losses", "hypernetwork on 25 fixed λ", "hypernetwork on fresh λ")


def game_of(source: DigitSource, seed: int, dtype: torch.dtype) -> bl.Game:
    """The paper's game with one log penalty a class, from 0."""
    digits = source.digits(train=TRAIN, valid=VALID, seed=seed, dtype=dtype)
    return seed_game(digits.train, digits.valid, start=torch.zeros(CLASSES), seed=seed)


def truth(source: DigitSource, *, seed: int, known: int, held: int) -> Result:
    """`known` pairs of penalties and validation loss to learn from, `held` others to predict; weights are exact."""
    game = game_of(source, seed, torch.float64)
    # No tolerance: a class whose weights are all zero sits on the penalty's kink, where no gradient vanishes.
    search = CrossValidation(bl.ClosedForm(best_response), tolerance=math.inf)
    answer: Result = {}
    for name, count, draw in (("known", known, 2 * seed), ("held", held, 2 * seed + 1)):
        candidates = random(game, BOUNDS, count=count, seed=draw)
        answer[name] = {
            "decay": [candidate["decay"] for candidate in candidates],
            "valid": search(game, candidates, seed=seed).leader_losses,
            "stationarity": max(_left(game, candidate) for candidate in candidates),
        }
    return answer


def _left(game: bl.Game, candidate: Candidate) -> float:
    batch, _ = game.draw("weights", game.start("weights"))
    return float(stationarity(candidate["decay"], best_response(candidate["decay"], batch), batch).max())


def gaussian_process(source: DigitSource, *, seed: int, known: int, held: int) -> Result:
    """A Matern process of one length scale: of four usual kernels the one with the least error here, in its favour."""
    try:
        from sklearn.gaussian_process import GaussianProcessRegressor  # type: ignore[import-untyped]
        from sklearn.gaussian_process.kernels import (  # type: ignore[import-untyped]
            ConstantKernel,
            Matern,
            WhiteKernel,
        )
    except ImportError as error:
        raise MissingExtraError(f"The process is scikit-learn's ({error}). pip install 'bilevel[data]'") from error
    data = truth(source, seed=seed, known=known, held=held)
    kernel = ConstantKernel() * Matern(3.0, (0.1, 1e3), nu=2.5) + WhiteKernel(1e-4, (1e-8, 10.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=5, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a noise level at its bound: these losses have none
        process.fit(torch.tensor([d.tolist() for d in data["known"]["decay"]]), data["known"]["valid"])
    predicted = process.predict(torch.tensor([d.tolist() for d in data["held"]["decay"]]))
    return {"predicted": predicted, "true": data["held"]["valid"], "stationarity": data["held"]["stationarity"]}


def hypernetwork(source: DigitSource, *, seed: int, known: int, held: int, fits: int, fresh: bool) -> Result:
    """A linear map from ten penalties to 7,850 weights, on penalties drawn anew or on the `known` ones for ever."""
    data = truth(source, seed=seed, known=known, held=held)
    game = game_of(source, seed, torch.float32)
    points = torch.stack(list(data["known"]["decay"])).float()

    def anywhere(others: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {"decay": 6.0 * torch.rand(CLASSES, generator=generator) - 3.0}

    def one_of_the_known(others: Any, generator: torch.Generator) -> dict[str, Tensor]:
        return {"decay": points[torch.randint(len(points), (), generator=generator)]}

    response = bl.Hypernetwork(
        partial(torch.optim.Adam, lr=1e-3),
        sampler=bl.responses.Draws(anywhere if fresh else one_of_the_known, count=10),
        scale=math.sqrt(3.0),  # the standard deviation of U[-3, 3]
        warmup=fits,
        steps=0,
        scheduler=partial(CosineAnnealingLR, T_max=fits),
        tolerance=None,
    )
    _, state = response(game, {"decay": torch.zeros(CLASSES)}, response.init(game, seed=seed))
    batch, _ = game.draw("decay", game.start("decay"))

    def loss(decay: Tensor) -> Tensor:
        weights, _ = response(game, {"decay": decay}, state)
        return valid_loss(weights, batch)

    decays = torch.stack(list(data["held"]["decay"])).float()
    return {"predicted": torch.func.vmap(loss, chunk_size=50)(decays), "true": data["held"]["valid"]}


def errors(result: Result) -> list[float]:
    """Predicted less true validation loss, for each held-out penalty."""
    return [p - t for p, t in zip(result["predicted"], result["true"], strict=True)]


def median_error(results: Results, method: str, seed: int) -> float:
    """The median of the absolute errors."""
    return statistics.median(abs(e) for e in errors(results[f"{method}, seed {seed}"]))


def draw(results: Results) -> Figure:
    """Predicted against true loss above, the errors' histogram below; a column a method, all seeds together."""
    figure = empty_figure(15.0, 9.0)
    grid = figure.subplots(2, len(METHODS), sharey="row")
    together = {m: [results[f"{m}, seed {s}"] for s in SEEDS] for m in METHODS}
    every = [v for rs in together.values() for r in rs for v in (*r["true"], *r["predicted"])]
    ends = (min(every), max(every))
    widest = max(abs(e) for rs in together.values() for r in rs for e in errors(r))
    bins = torch.linspace(-widest, widest, 41).tolist()
    for column, method in enumerate(METHODS):
        above, below = grid[0][column], grid[1][column]
        for seed, result, colour, marker in zip(SEEDS, together[method], COLOURS, "o^s", strict=False):
            above.plot(result["true"], result["predicted"], marker, color=colour, markersize=4, alpha=0.6,
                       label=f"seed {seed}")  # fmt: skip
        above.plot(ends, ends, color=BLACK, linewidth=1.5, label="right")
        below.hist([e for r in together[method] for e in errors(r)], bins=bins, color=BLUE)
        below.axvline(0.0, color=BLACK, linewidth=1.5)
        median = statistics.median(abs(e) for r in together[method] for e in errors(r))
        label_axes(above, x="true validation loss (nats an output)", y="" if column else "predicted", title=method)
        label_axes(
            below,
            x="predicted - true (nats an output)",
            y="" if column else "held-out λ",
            title=f"median error {median:.3f}",
        )
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=LARGE, frameon=False, markerscale=2)
    return figure


def summarize(results: Results) -> str:
    """The median errors of each method, seed by seed."""
    medians = {m: [median_error(results, m, s) for s in SEEDS] for m in METHODS}
    phrases = "; ".join(f"{m} {', '.join(f'{v:.3f}' for v in values)}" for m, values in medians.items())
    *others, ours = METHODS
    wins = sum(all(medians[ours][i] < medians[m][i] for m in others) for i in range(len(SEEDS)))
    count = len(results[f"{ours}, seed {SEEDS[0]}"]["true"])
    return (
        f"Median error of the predicted validation loss on {count} held-out settings of ten penalties, seed by seed: "
        f"{phrases}. The hypernetwork that sees fresh ones is the best of the three on {wins} of {len(SEEDS)} seeds."
    )


def _parts(seed: int) -> tuple[Part, ...]:
    settings: dict[str, Any] = {"seed": seed, "known": 25, "held": 300}
    process, fixed, fresh = (f"{method}, seed {seed}" for method in METHODS)
    return (
        Part(process, gaussian_process, settings, 12.0),
        Part(fixed, hypernetwork, settings | {"fits": 3000, "fresh": False}, 30.0),
        Part(fresh, hypernetwork, settings | {"fits": 3000, "fresh": True}, 30.0),
    )


EXPERIMENT = Experiment(
    name="fig5",
    title="Figures 5 and 6: predicted against true validation loss",
    parts=tuple(part for seed in SEEDS for part in _parts(seed)),
    draw=draw,
    summarize=summarize,
)

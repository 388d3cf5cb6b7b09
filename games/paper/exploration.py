"""Where to fit the response next? A Gaussian process on its own predictions, against uniform picks, at equal work."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import bilevel as bl
from games.experiments.data import DigitSource
from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLUE, GREEN, LARGE, RED, empty_figure, label_axes
from games.paper.converged import TRAIN, VALID
from games.paper.exact import best_response
from games.paper.implicit import responses
from games.paper.seed_game import CLASSES, batch_of, seed_game, valid_loss
from games.paper.truth import best_on_grid, float64_digits, true_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOW, HIGH = -3.0, 3.0
FIRST, EACH, ROUNDS = 10, 3, 20
"""Picks before the first round, in each round, and the rounds."""
FITS, DRAWS, WIDTH = 40, 10, 0.3
"""Steps of fitting a round, draws a step, and their standard deviation around a pick."""
SEEDS = (2, 3, 4, 5, 6)
"""The settings were chosen on seeds 0 and 1."""

Chooser = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""From picks `[n, classes]`, their predicted losses `[n]` and a generator to the next picks `[EACH, classes]`."""


def uniform(picks: Tensor, losses: Tensor, generator: torch.Generator) -> Tensor:
    """Anywhere in the box."""
    return LOW + (HIGH - LOW) * torch.rand(EACH, picks.shape[1], generator=generator)


def exploring(picks: Tensor, losses: Tensor, generator: torch.Generator) -> Tensor:
    """Largest expected improvement under a Gaussian process, one pick after the other.

    EI = (best - m) Phi(z) + s phi(z), z = (best - m)/s. Each chosen pick enters the data with its predicted mean, so
    that the next one lies elsewhere. Candidates are uniform, and normal around the best five picks.
    Source: Jones et al. 1998; the batch by Ginsbourger et al. 2010.
    """
    from scipy.stats import norm
    from sklearn.gaussian_process import GaussianProcessRegressor  # type: ignore[import-untyped]
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel  # type: ignore[import-untyped]

    size = picks.shape[1]
    kernel = ConstantKernel(1.0) * RBF([3.0] * size, (0.3, 100.0)) + WhiteKernel(1e-3, (1e-6, 1.0))
    model = GaussianProcessRegressor(kernel, normalize_y=True)
    known, values = picks.double(), losses.double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a length that is at its bound: a class that does not matter
        model.fit(known.numpy(), values.numpy())
    held = GaussianProcessRegressor(model.kernel_, optimizer=None, normalize_y=True)
    near = picks[losses.argsort()[:5]].repeat_interleave(100, dim=0)
    near = near + 0.5 * torch.randn(near.shape, generator=generator)
    candidates = torch.cat([LOW + (HIGH - LOW) * torch.rand(500, size, generator=generator), near]).clamp(LOW, HIGH)
    chosen: list[Tensor] = []
    for _ in range(EACH):
        held.fit(known.numpy(), values.numpy())
        mean, spread = (torch.from_numpy(part) for part in held.predict(candidates.double().numpy(), return_std=True))
        gain = (values.min() - mean) / spread.clamp_min(1e-12)
        improvement = spread * (gain * torch.from_numpy(norm.cdf(gain)) + torch.from_numpy(norm.pdf(gain)))
        index = int(improvement.argmax())
        chosen.append(candidates[index])
        known, values = torch.cat([known, candidates[index][None].double()]), torch.cat([values, mean[index][None]])
    return torch.stack(chosen)


def around(picks: Tensor, latest: int) -> Callable[[Mapping[str, Any], torch.Generator], dict[str, Tensor]]:
    """p(lambda): normal around one of the `latest` picks, one time in ten around any."""

    def draw(others: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        rows = picks[-latest:] if float(torch.rand((), generator=generator)) < 0.9 else picks
        row = rows[torch.randint(len(rows), (), generator=generator)]
        return {"decay": row + WIDTH * torch.randn(row.shape, generator=generator)}

    return draw


def fitting(picks: Tensor, latest: int) -> bl.Hypernetwork:
    """A round's fitting of the linear response, where the picks are."""
    return bl.Hypernetwork(
        partial(torch.optim.Adam, lr=3e-4),
        scale=1.0,
        sampler=bl.responses.Draws(around(picks, latest), count=DRAWS),
        steps=FITS,
        tolerance=None,
    )


def predict(response: bl.Response, game: bl.Game, state: Any, picks: Tensor) -> Tensor:
    """The validation loss of the learned response at each pick, `[n]`."""
    batch, _ = game.draw("decay", game.start("decay"))
    with torch.no_grad():
        answers = torch.func.vmap(lambda pick: response(game, {"decay": pick}, state)[0])(picks)
        rows = [{name: weights[row] for name, weights in answers.items()} for row in range(len(picks))]
        return torch.stack([game.loss("decay", {"weights": weights}, batch) for weights in rows])


def searched(source: DigitSource, *, explore: bool, rounds: int, seed: int) -> Result:
    """Rounds of picking, fitting the linear response around the picks, and predicting the loss at the latest ones.

    Work: the gradients of fitting and one for each prediction, the same for both ways of picking. The best so far is
    the pick of least prediction; what it is really worth, by retraining, is for the figure alone.
    """
    digits = source.digits(train=TRAIN, valid=VALID, seed=seed)
    exact, train, valid = float64_digits(source, seed)
    game = seed_game(digits.train, digits.valid, start=torch.zeros(CLASSES), seed=seed)
    choose = exploring if explore else uniform
    generator = torch.Generator().manual_seed(seed)
    picks = LOW + (HIGH - LOW) * torch.rand(FIRST, CLASSES, generator=generator)
    losses, state, curve = torch.zeros(0), None, []
    for number in range(rounds):
        latest = EACH if number else FIRST
        response = fitting(picks, latest)
        state = response.init(game, seed=seed) if state is None else state
        with torch.no_grad():
            _, state = response(game, {"decay": game.initial("decay")}, state)
        losses = torch.cat([losses, predict(response, game, state, picks[-latest:])])
        truths = torch.tensor([true_loss(pick, train, valid) for pick in picks[-latest:]])
        curve.append(
            {
                "work": response.report(state).gradients + len(picks),
                "valid": true_loss(picks[int(losses.argmin())], train, valid),
                "mistake": float((losses[-latest:] - truths).abs().median()),
            }
        )
        best = picks[int(losses.argmin())]
        picks = torch.cat([picks, choose(picks, losses, generator)])
    test = valid_loss(best_response(best, train), batch_of(exact.test))
    return {key: [record[key] for record in curve] for key in curve[0]} | {"end": best, "test": test}


def descended(source: DigitSource, *, steps: int, seed: int) -> Result:
    """No picks at all: the leader descends on a local response from the middle of the box (Algorithm 3)."""
    digits = source.digits(train=TRAIN, valid=VALID, seed=seed)
    exact, train, valid = float64_digits(source, seed)
    path: list[tuple[float, Tensor]] = []
    bl.solve(
        seed_game(digits.train, digits.valid, start=torch.zeros(CLASSES), seed=seed),
        weights=responses(CLASSES)["hypernetwork"],
        optimizer=partial(torch.optim.Adam, lr=0.05),
        steps=steps,
        seed=seed,
        callbacks=[lambda step, record, variables: path.append((record["work"], variables["decay"]))],
    )
    kept = [*path[: -1 : max(1, steps // 20)], path[-1]]
    end = path[-1][1]
    return {
        "work": [work for work, _ in kept],
        "valid": [true_loss(decay, train, valid) for _, decay in kept],
        "end": end,
        "test": valid_loss(best_response(end, train), batch_of(exact.test)),
    }


LOOKS = {"uniform": (RED, "--"), "exploring": (BLUE, "-"), "descent": (GREEN, "-.")}


def excess(results: Results, name: str, seed: int) -> list[float]:
    """True validation loss of the best so far, above the least that any penalties reach on these digits."""
    best: float = results[f"least, seed {seed}"]["valid"]
    return [value - best for value in results[f"{name}, seed {seed}"]["valid"]]


def draw(results: Results) -> Figure:
    """What the best so far is worth over work; thin lines are seeds, thick ones their median."""
    figure = empty_figure(13.0, 5.8)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, (colour, line) in LOOKS.items():
        curves = [excess(results, name, seed) for seed in SEEDS]
        work = results[f"{name}, seed {SEEDS[0]}"]["work"]
        for curve in curves:
            left.plot(work, curve, color=colour, linestyle=line, linewidth=0.9, alpha=0.6)
        left.plot(work, _median(curves), color=colour, linestyle=line, linewidth=3.4, label=name)
    for name in ("uniform", "exploring"):
        colour, line = LOOKS[name]
        mistakes = [results[f"{name}, seed {seed}"]["mistake"] for seed in SEEDS]
        work = results[f"{name}, seed {SEEDS[0]}"]["work"]
        right.plot(work, _median(mistakes), color=colour, linestyle=line, linewidth=3)
    left.set_ylim(bottom=0.0)
    right.set_ylim(bottom=0.0)
    y = "true validation loss\nabove the least (nats)"
    label_axes(left, x="gradients and predictions", y=y, title="best so far, retrained")
    label_axes(
        right, x="gradients and predictions", y="|predicted - true| (nats)", title="at the latest picks, medians"
    )
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=LARGE, frameon=False)
    return figure


def _median(curves: list[list[float]]) -> list[float]:
    return [statistics.median(values) for values in zip(*curves, strict=True)]


def summarize(results: Results) -> str:
    """The medians at the end, in how many seeds exploring won, and the test losses."""
    ends = {name: [excess(results, name, seed)[-1] for seed in SEEDS] for name in LOOKS}
    tests = {name: [float(results[f"{name}, seed {seed}"]["test"]) for seed in SEEDS] for name in LOOKS}
    wins = sum(a < b for a, b in zip(ends["exploring"], ends["uniform"], strict=True))
    phrases = "; ".join(
        f"{name} {statistics.median(ends[name]):.3f} ({min(ends[name]):.3f} to {max(ends[name]):.3f}; "
        f"test loss {statistics.median(tests[name]):.3f})"
        for name in LOOKS
    )
    work = results[f"exploring, seed {SEEDS[0]}"]["work"][-1]
    return (
        f"True validation loss above the least after {work:,} gradients and predictions, median over {len(SEEDS)} "
        f"seeds (range): {phrases}. Exploring ends below uniform picks in {wins} of {len(SEEDS)} seeds; descent is the "
        f"leader's gradient alone, for {results[f'descent, seed {SEEDS[0]}']['work'][-1]:,.0f}."
    )


EXPERIMENT = Experiment(
    name="exploration",
    title="Uncertainty chooses where the response is fitted next, against uniform picks",
    parts=(
        *(
            Part(
                f"{name}, seed {seed}", searched, {"explore": name == "exploring", "rounds": ROUNDS, "seed": seed}, 5.0
            )
            for seed in SEEDS
            for name in ("uniform", "exploring")
        ),
        *(
            Part(f"least, seed {seed}", best_on_grid, {"size": CLASSES, "seed": seed, "count": 111}, 2.5)
            for seed in SEEDS
        ),
        *(Part(f"descent, seed {seed}", descended, {"steps": 500, "seed": seed}, 6.0) for seed in SEEDS),
    ),
    draw=draw,
    summarize=summarize,
)

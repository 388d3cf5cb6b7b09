"""How wide should p(lambda) be? Its scale as the leader's own variable, with an entropy term that keeps it open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import softplus

import bilevel as bl
from games.cross_validation import CrossValidation
from games.experiments.data import Digits, DigitSource
from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLACK, BLUE, COLOURS, LINES, RED, SMALL, empty_figure, label_axes
from games.paper.converged import TRAIN, VALID, cross_validated, evenly_spaced
from games.paper.seed_game import Batch, Weights, batch_of, seed_game, train_loss, valid_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Leader = dict[str, Tensor]
"""p(lambda): its "mean", and "rho" with standard deviation softplus(rho)."""

Map = dict[str, Weights]
"""The linear response: "value" at the present mean, and "slope" a unit of log penalty."""

DRAWS, IMAGES = 2, 250
SCALES = (0.06, 0.5, 2.0)
STARTS = (-1.0, 2.9)
TEMPERATURES = (1e-3, 1e-2)
"""Of the entropy: 0 stands for a scale that is held."""
CASES = [(scale, temperature, start) for scale in SCALES for temperature in (0.0, *TEMPERATURES) for start in STARTS]


@dataclass(frozen=True)
class Noisy:
    """Each batch with its own standard normal draws `[draws]`, in pairs of both signs."""

    batches: tuple[Batch, ...]
    draws: int

    def __iter__(self) -> Iterator[tuple[Tensor, Batch]]:
        """One pass of 100 batches; all of its noise is drawn as the pass begins, under the seed of that pass."""
        half = torch.randn(100, self.draws // 2, dtype=self.batches[0][0].dtype)
        noise = torch.cat([half, -half], dim=1)
        return iter([(row, self.batches[index % len(self.batches)]) for index, row in enumerate(noise)])


def weights_at(response: Map, move: Tensor) -> Weights:
    """The map's weights where the log penalty has moved by `move` from the present mean."""
    return {name: value + move * response["slope"][name] for name, value in response["value"].items()}


def scale_of(leader: Leader) -> Tensor:
    """The standard deviation of p(lambda)."""
    return softplus(leader["rho"])


def response_loss(leader: Leader, response: Map, batch: tuple[Tensor, Batch]) -> Tensor:
    """The response's loss: E_eps f(lambda', w(lambda')), lambda' = mean + scale eps."""
    noise, data = batch
    moves = scale_of(leader) * noise
    return torch.stack([train_loss(leader["mean"] + move, weights_at(response, move), data) for move in moves]).mean()


def leader_loss(leader: Leader, response: Map, batch: tuple[Tensor, Batch], temperature: float) -> Tensor:
    """The leader's loss: E_eps F(w(lambda')) - temperature * entropy of p, which is log(scale) and a constant.

    Where the curvature of F along the map is c, the expectation grows by c scale^2 / 2, so that the least is at
    scale = sqrt(temperature / c): a temperature is in the units of the leader's loss.
    """
    noise, data = batch
    # The map is written around the present mean; what the leader's own move does to it is the slope.
    moves = leader["mean"] - leader["mean"].detach() + scale_of(leader) * noise
    losses = torch.stack([valid_loss(weights_at(response, move), data) for move in moves])
    return losses.mean() - temperature * scale_of(leader).log()


def noisy_game(
    digits: Digits, *, mean: float, scale: float, temperature: float, seed: int, response: Map | None = None
) -> bl.Game:
    """Self-Tuning Networks as two players who move at once: p(lambda), and the parameters of the map.

    `response` starts at the seed game's weights with slope zero, or where it is given.
    Source: MacKay et al. 2019 (arXiv 1903.03088), section 3.
    """
    if not scale > 0.0 or not temperature >= 0.0:
        raise ValueError(f"noisy_game: scale={scale}, temperature={temperature}; expected above 0, and at least 0.")
    dtype = digits.train.images.dtype
    weights = seed_game(digits.train, digits.valid, start=mean, seed=seed).initial("weights")
    train, valid = batch_of(digits.train), batch_of(digits.valid)
    pieces = tuple(zip(*(torch.split(tensor, IMAGES) for tensor in valid), strict=True))

    def objective(leader: Leader, response: Map, batch: tuple[Tensor, Batch]) -> Tensor:
        return leader_loss(leader, response, batch, temperature)

    # softplus inverted
    rho = torch.tensor(scale, dtype=torch.float64).expm1().log()
    start = {"mean": torch.tensor(mean, dtype=dtype), "rho": rho.to(dtype)}
    slope = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    return bl.Game(
        leader=bl.Player(objective, init=start, data=Noisy(pieces, DRAWS)),
        response=bl.Player(
            response_loss, init=response or {"value": weights, "slope": slope}, data=Noisy((train,), DRAWS)
        ),
    )


def paced(mean: float, rho: float) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    """Adam with a learning rate for each of the leader's two variables; a rate of 0 holds one."""
    return lambda parameters: torch.optim.Adam(
        [{"params": [parameter], "lr": rate} for parameter, rate in zip(parameters, (mean, rho), strict=True)]
    )


def tuned(
    source: DigitSource, *, start: float, scale: float, temperature: float, warmup: int, steps: int, seed: int
) -> Result:
    """Algorithm 3 from one start with a learned scale, held at temperature 0; then it retrains where the mean ends."""
    digits = source.digits(train=TRAIN, valid=VALID, seed=seed)
    game = partial(noisy_game, digits, mean=start, scale=scale, temperature=temperature, seed=seed)
    follow = partial(torch.optim.Adam, lr=3e-4)
    # The map is fitted for a while before anybody trusts its slope.
    warm = bl.solve(game(), optimizer={"leader": paced(0.0, 0.0), "response": follow}, steps=warmup, seed=seed)
    path: list[tuple[float, float]] = [(start, scale)]
    solution = bl.solve(
        game(response=warm.variables["response"]),
        optimizer={"leader": paced(0.01, 0.03 if temperature > 0.0 else 0.0), "response": follow},
        steps=steps,
        seed=seed + 1,
        callbacks=[
            lambda step, record, variables: path.append(
                (float(variables["leader"]["mean"]), float(scale_of(variables["leader"])))
            )
        ],
    )
    exact = source.digits(train=TRAIN, valid=VALID, seed=seed, dtype=torch.float64)
    retraining = seed_game(exact.train, exact.valid, start=0.0, seed=seed)
    end = CrossValidation()(retraining, [{"decay": torch.tensor(path[-1][0], dtype=torch.float64)}])
    return {
        "means": [mean for mean, _ in path[::10]],
        "scales": [spread for _, spread in path[::10]],
        "end": path[-1][0],
        "scale": path[-1][1],
        "valid": float(end.leader_losses[0]),
        "test": float(valid_loss(end.answer, batch_of(exact.test))),
        "gradients": warm.gradients + solution.gradients,
    }


def case_name(scale: float, temperature: float, start: float) -> str:
    """A part's name."""
    return f"scale {scale:g}, {describe_temperature(temperature)}, from {start:g}"


def describe_temperature(temperature: float) -> str:
    """What is done with the scale."""
    return f"learned, τ={temperature:g}" if temperature else "held"


def excess(results: Results, name: str) -> float:
    """Validation loss after retraining, above the least on cross-validation's grid; below 0 between its values."""
    least: float = min(results["cross-validation"]["valid"])
    return float(results[name]["valid"]) - least


def draw(results: Results) -> Figure:
    """The scale's path and the mean's, and what the mean in the end is worth."""
    figure = empty_figure(13.5, 5.4)
    scales, means, ends = figure.subplots(1, 3)
    for colour, line, scale in zip(COLOURS, LINES, SCALES, strict=False):
        for start in STARTS:
            found = results[case_name(scale, TEMPERATURES[0], start)]
            steps = [10 * index for index in range(len(found["scales"]))]
            label = f"learned from σ={scale:g}" if start == STARTS[0] else None
            scales.plot(steps, found["scales"], color=colour, linestyle=line, linewidth=2.2, label=label)
            means.plot(steps, found["means"], color=colour, linestyle=line, linewidth=2.2)
    widest = SCALES[-1]
    for start in STARTS:
        found = results[case_name(widest, 0.0, start)]
        steps = [10 * index for index in range(len(found["means"]))]
        label = f"held at σ={widest:g}" if start == STARTS[0] else None
        means.plot(steps, found["means"], color=BLACK, linestyle=(0, (1, 1)), linewidth=2.2, label=label)
    means.axhline(results["cross-validation"]["best"], color="0.5", linewidth=1.5, label="cross-validation's optimum")
    scales.set_yscale("log")
    label_axes(scales, x="step of the leader", y="scale σ of p(λ)", title=f"scale, τ={TEMPERATURES[0]:g}")
    label_axes(means, x="step of the leader", y="log penalty λ (mean of p)", title="mean")
    _ends(ends, results)
    for axes in (scales, means, ends):
        axes.legend(fontsize=SMALL - 1, frameon=False, loc="best")
    return figure


def _ends(axes: Axes, results: Results) -> None:
    """Excess validation loss by initial scale; a marker for each start."""
    for column, (temperature, colour, marker) in enumerate(
        zip((0.0, *TEMPERATURES), (BLACK, BLUE, RED), "sov", strict=True)
    ):
        for row, scale in enumerate(SCALES):
            values = [excess(results, case_name(scale, temperature, start)) for start in STARTS]
            place = [row + 0.22 * (column - 1)] * len(values)
            label = describe_temperature(temperature) if row == 0 else None
            axes.plot(place, values, marker, color=colour, markersize=11, linestyle="", alpha=0.8, label=label)
    axes.axhline(0.0, color="0.5", linewidth=1.5)
    axes.set_xticks(range(len(SCALES)), [f"{scale:g}" for scale in SCALES])
    label_axes(axes, x="initial scale σ", y="validation loss above the best (nats)", title="retrained at the end")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_ylim(-5e-4, 0.2)


def summarize(results: Results) -> str:
    """Where scale and mean end, with the loss of weights retrained there."""
    lines = []
    for temperature in TEMPERATURES:
        names = [case_name(scale, temperature, start) for scale in SCALES for start in STARTS]
        lines.append(
            f"learned at τ={temperature:g}, σ ends in {_range(results, names, 'scale')}, {_worth(results, names)}"
        )
    for scale in SCALES:
        lines.append(f"held at {scale:g}, {_worth(results, [case_name(scale, 0.0, start) for start in STARTS])}")
    return (
        f"Initial scales {', '.join(format(scale, 'g') for scale in SCALES)}, λ from "
        f"{' and '.join(format(start, 'g') for start in STARTS)}: {'; '.join(lines)}. Cross-validation's optimum is "
        f"λ={results['cross-validation']['best']:.2f}."
    )


def _worth(results: Results, names: list[str]) -> str:
    above, test = max(excess(results, name) for name in names), max(float(results[name]["test"]) for name in names)
    return f"λ in {_range(results, names, 'end')}, loss up to {above:.4f} above the best (test up to {test:.3f})"


def _range(results: Results, names: list[str], key: str) -> str:
    values = [float(results[name][key]) for name in names]
    return f"[{min(values):.2f}, {max(values):.2f}]"


EXPERIMENT = Experiment(
    name="learned-scale",
    title="How wide should p(λ) be? The scale learned with an entropy term",
    parts=(
        Part("cross-validation", cross_validated, {"values": evenly_spaced(41), "seed": 0}, 6.0),
        *(
            Part(
                case_name(scale, temperature, start),
                tuned,
                {"start": start, "scale": scale, "temperature": temperature, "warmup": 400, "steps": 800, "seed": 0},
                4.5,
            )
            for scale, temperature, start in CASES
        ),
    ),
    draw=draw,
    summarize=summarize,
)

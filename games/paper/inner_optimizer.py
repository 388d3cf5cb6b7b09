"""A limit of learned responses: the inner optimiser's own learning rate and momentum, tuned by unrolling it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
from games.experiments.data import Digits, DigitSource
from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLACK, COLOURS, LARGE, LINES, empty_figure, label_axes
from games.paper.converged import evenly_spaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = 20
"""Steps of training, from one init and on one batch: what the leader's loss is taken after."""
RATES, MOMENTA = evenly_spaced(21, -4.0, 1.0), evenly_spaced(15, -3.0, 4.0)
STARTS = ((-3.5, -2.0), (-2.5, 3.5), (-1.0, -2.5))
"""log learning rate, and the logit of momentum."""


def model_of(digits: Digits, seed: int) -> nn.Module:
    """784-20-10 with tanh."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pixels = digits.train.images.shape[1]
        return nn.Sequential(nn.Linear(pixels, 20), nn.Tanh(), nn.Linear(20, 10)).to(digits.train.images.dtype)


def sgd(parameters: list[Tensor], pace: Mapping[str, Tensor]) -> torch.optim.Optimizer:
    """torch's own SGD; its learning rate and momentum are the leader's variables."""
    # torch takes a tensor for momentum as it does for lr, though its annotation says float.
    return torch.optim.SGD(parameters, lr=pace["rate"].exp(), momentum=pace["momentum"].sigmoid())  # type: ignore[arg-type]


def pace_game(digits: Digits, *, start: tuple[float, float], seed: int = 0) -> bl.Game:
    """`pace` chooses log learning rate and logit momentum for the training of `weights`."""
    model = model_of(digits, seed)

    def loss(weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return cross_entropy(functional_call(model, weights, (images,)), labels)

    rate, momentum = (torch.tensor(value, dtype=digits.train.images.dtype) for value in start)
    return bl.Game(
        pace=bl.Player(
            loss,
            init={"rate": rate, "momentum": momentum},
            data=[(digits.valid.images, digits.valid.labels)],
            optimizer_hyper=True,
        ),
        weights=bl.Player(loss, init=model, data=[(digits.train.images, digits.train.labels)]),
    )


def plain_loss(digits: Digits, rate: float, momentum: float, *, seed: int = 0) -> float:
    """The validation loss after plain torch training; nothing of this library takes part."""
    model = model_of(digits, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=math.exp(rate), momentum=1 / (1 + math.exp(-momentum)))
    for _ in range(STEPS):
        optimizer.zero_grad()
        cross_entropy(model(digits.train.images), digits.train.labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        return float(cross_entropy(model(digits.valid.images), digits.valid.labels))


def _digits(source: DigitSource) -> Digits:
    return source.digits(train=500, valid=1000, test=2000)


def grid(source: DigitSource, *, rates: list[float]) -> Result:
    """Some rows of the fine grid."""
    digits = _digits(source)
    return {"rates": rates, "loss": [[plain_loss(digits, rate, m) for m in MOMENTA] for rate in rates]}


def tuned(source: DigitSource, *, rate: float, momentum: float, steps: int) -> Result:
    """The leader's path from one start, and plain torch's loss at its end."""
    digits, path = _digits(source), [[rate, momentum]]
    solution = bl.solve(
        pace_game(digits, start=(rate, momentum)),
        weights=bl.Unrolled(sgd, steps=STEPS, warm_start=False),
        optimizer=partial(torch.optim.Adam, lr=0.2),
        scheduler=partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps),
        clip_norm=1.0,
        steps=steps,
        callbacks=[lambda step, record, v: path.append([float(v["pace"]["rate"]), float(v["pace"]["momentum"])])],
    )
    return {
        "path": path,
        "losses": [record["pace"] for record in solution.history],
        "plain": plain_loss(digits, *path[-1]),
        "runs": 2 * steps,  # of training: forward, and backward through it
    }


def refusals(source: DigitSource) -> Result:
    """What the other responses say of this game: a follower's optimum does not depend on its optimiser."""
    game = pace_game(_digits(source), start=STARTS[0])
    messages = {}
    for response in (bl.Implicit(sgd), bl.Hypernetwork(partial(torch.optim.SGD, lr=0.1))):
        try:
            response.init(game)
        except TypeError as error:
            messages[type(response).__name__] = str(error)
        else:
            raise AssertionError(f"{response} took a game that it cannot answer")
    return messages


def draw(results: Results) -> Figure:
    """The grid's validation loss as contours, with the paths over it."""
    figure = empty_figure(9.5, 7.0)
    axes = figure.subplots()
    loss = torch.tensor(_table(results)).T
    filled = axes.contourf(RATES, MOMENTA, loss.clamp(max=2.5).tolist(), levels=24, cmap="Greys")
    bar = figure.colorbar(filled, ax=axes)
    bar.set_label(f"validation loss after {STEPS} steps (nats), cut at 2.5", fontsize=LARGE)
    best = divmod(int(loss.argmin()), len(RATES))
    axes.plot(RATES[best[1]], MOMENTA[best[0]], "*", color=BLACK, markeredgecolor="white", markersize=24,
              label=f"grid's best: {float(loss.min()):.3f}", linestyle="")  # fmt: skip
    for number, start in enumerate(STARTS):
        found = results[_name(start)]
        rate, momentum = zip(*found["path"], strict=True)
        axes.plot(rate, momentum, color=COLOURS[number], linestyle=LINES[number], linewidth=2.6)
        axes.plot(rate[:1], momentum[:1], "o", color=COLOURS[number], markeredgecolor="white", markersize=11)
        axes.plot(rate[-1:], momentum[-1:], "D", color=COLOURS[number], markeredgecolor="white", markersize=12,
                  label=f"from {start[0]:g}, {start[1]:g}: {found['plain']:.3f}", linestyle="")  # fmt: skip
    label_axes(axes, x="log learning rate", y="logit of momentum", grid=False)
    figure.legend(loc="outside upper center", ncols=2, fontsize=LARGE, frameon=False)
    return figure


def summarize(results: Results) -> str:
    """Each end against the grid's best, and what the others say."""
    table = _table(results)
    best = min(value for row in table for value in row)
    shares = [results[_name(start)]["plain"] / best - 1 for start in STARTS]
    runs = results[_name(STARTS[0])]["runs"]
    refusal = results["refusals"]["Implicit"].split(".")[0]
    return (
        f"Unrolling ends at {', '.join(f'{100 * share:+.1f} %' for share in shares)} of the best of a grid of "
        f"{len(table) * len(table[0])} trainings ({best:.3f} nats), each for the work of {runs}; "
        f'the others refuse: "{refusal}".'
    )


def _table(results: Results) -> list[list[float]]:
    """The grid's losses, a row a learning rate."""
    return [row for name in results if name.startswith("grid") for row in results[name]["loss"]]


def _name(start: tuple[float, float]) -> str:
    return f"from {start[0]:g}, {start[1]:g}"


EXPERIMENT = Experiment(
    name="inner-optimizer",
    title="Limit: the inner optimiser's learning rate and momentum",
    parts=(
        *(Part(f"grid {i + 1} of 3", grid, {"rates": RATES[7 * i : 7 * i + 7]}, 9.0) for i in range(3)),
        *(Part(_name(s), tuned, {"rate": s[0], "momentum": s[1], "steps": 60}, 20.0) for s in STARTS),
        Part("refusals", refusals, {}, 1.0),
    ),
    draw=draw,
    summarize=summarize,
)

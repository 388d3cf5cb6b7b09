"""Figure 3: the exact best response and a line learned from it, lifted onto the two players' losses."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import jacrev, vmap
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

import bilevel as bl
from games.experiments.data import DigitSource
from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLUE, LARGE, RED, SMALL, empty_figure, label_axes
from games.paper.figure3_games import (
    PATIENTS,
    Batch,
    patients,
    ridge_game,
    sine_game,
    sine_train_loss,
    sine_valid_loss,
    train_loss,
    valid_loss,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What is compared ----------------------------------------------------------------------------------------------------

EXACT = bl.Implicit(bl.Scipy("L-BFGS-B"), steps=1000, tolerance=1e-8, linear_solver=bl.linear.Dense())
"""The follower re-solved to convergence, with the implicit-function theorem's derivative."""


def linear_response(centre: float, scale: float, fits: int) -> bl.Hypernetwork:
    """A linear best response learned around `centre` in `fits` steps, before the leader's first, and then left."""
    return bl.Hypernetwork(
        partial(torch.optim.Adam, lr=0.02),
        network=bl.networks.Linear(),
        sampler=bl.responses.Perturbations(around={"hyper": torch.tensor(centre, dtype=torch.float64)}),
        scale=scale,
        warmup=fits,
        steps=0,
        scheduler=partial(CosineAnnealingLR, T_max=fits),
        tolerance=None,  # far from the centre a line must fail: that is the figure; the residual at it is reported
    )


def along_response(game: bl.Game, response: bl.Response, hypers: Tensor) -> Result:
    """Weights, slope and both losses along a response, and where the leader that trusts it ends.

    `hypers: [n]`. The weights are `[n, weights]`; the slope, dw/dlambda where the game starts, is `[weights]`.
    """
    solution = bl.solve(
        game,
        weights=response,
        optimizer=partial(torch.optim.Adam, lr=0.1),
        scheduler=partial(ExponentialLR, gamma=0.98),
        steps=300,
    )
    state = solution.states["weights"]
    start = game.initial("hyper")
    batches = {name: game.draw(name, game.start(name))[0] for name in game.names}

    def answer(hyper: Tensor) -> Tensor:
        weights: Tensor = response(game, {"hyper": hyper}, state)[0]
        return weights

    def losses(hyper: Tensor, weights: Tensor) -> dict[str, Tensor]:
        point = {"hyper": hyper, "weights": weights}
        return {name: game.loss(name, point, batches[name]) for name in game.names}

    end = solution.variables["hyper"]
    weights = vmap(answer)(hypers)
    along, there = vmap(losses)(hypers, weights), losses(end, answer(end))
    return {
        "weights": weights.reshape(len(hypers), -1),
        "slope": jacrev(answer)(start).reshape(-1),
        "train": along["weights"],
        "valid": along["hyper"],
        "end": {
            "hyper": end,
            "weights": answer(end).reshape(-1),
            "train": there["weights"],
            "valid": there["hyper"],
            # What a leader pays for its trust: the loss once the follower is truly at its optimum.
            "true": losses(end, EXACT(game, {"hyper": end}, EXACT.init(game))[0])["hyper"],
        },
        # How much of the slope's equation is left where it was learned or solved.
        "residual": response.report(response(game, {"hyper": start}, state)[1]).residual,
        "gradients": solution.gradients,
    }


def synthetic(source: DigitSource, *, centre: float, scale: float, fits: int, points: int) -> Result:
    """The sine game: both responses, and both losses over (lambda, w)."""
    game = sine_game(centre)
    hypers = torch.linspace(-torch.pi, torch.pi, points, dtype=torch.float64)
    first = torch.linspace(-3.2, 3.2, 65, dtype=torch.float64)
    across, up = torch.meshgrid(hypers[:: max(1, points // 64)], first, indexing="ij")
    return {
        "hypers": hypers,
        "centre": centre,
        "exact": along_response(game, EXACT, hypers),
        "learned": along_response(game, linear_response(centre, scale, fits), hypers),
        "surfaces": [
            {"x": across, "y": up, "loss": sine_train_loss(across, up)},
            {"x": across, "y": up, "loss": sine_valid_loss(up)},
        ],
    }


def second_weight(hyper: Tensor, first: Tensor, batch: Batch) -> Tensor:
    """The second weight's optimum when the first is held: b'(y - w1 a) / (b'b + n exp(lambda)), elementwise."""
    (a, b), targets = batch[0].T, batch[1]
    second: Tensor = (b @ targets - first * (a @ b)) / (b @ b + len(b) * hyper.exp())
    return second


def real(source: DigitSource, *, centre: float, scale: float, fits: int, points: int, seed: int) -> Result:
    """The ridge game: both responses, the training loss over (lambda, w1), the validation loss over (w1, w2)."""
    train, valid, test = patients(seed)
    game = ridge_game(centre, train, valid)
    hypers = torch.linspace(-5.0, 2.0, points, dtype=torch.float64)
    exact, learned = (
        along_response(game, EXACT, hypers),
        along_response(game, linear_response(centre, scale, fits), hypers),
    )
    for found in (exact, learned):
        found["end"]["test"] = valid_loss(found["end"]["weights"], test)
    both = torch.cat([exact["weights"], learned["weights"]])
    low, high = both.amin(0) - 0.05, both.amax(0) + 0.05
    first, second = (
        torch.linspace(float(a), float(b), 49, dtype=torch.float64) for a, b in zip(low, high, strict=True)
    )
    hyper, held = torch.meshgrid(hypers[:: max(1, points // 48)], first, indexing="ij")
    best = torch.stack([held, second_weight(hyper, held, train)], dim=-1)
    one, two = torch.meshgrid(first, second, indexing="ij")
    over = torch.stack([one, two], dim=-1)
    trained = vmap(vmap(partial(train_loss, batch=train)))(hyper, best)
    return {
        "hypers": hypers,
        "centre": centre,
        "exact": exact,
        "learned": learned,
        "surfaces": [
            {"x": hyper, "y": held, "loss": trained},
            {"x": one, "y": two, "loss": vmap(vmap(partial(valid_loss, batch=valid)))(over)},
        ],
    }


# The picture ---------------------------------------------------------------------------------------------------------

LOOKS = {"exact": (BLUE, "-", "o", "exact"), "learned": (RED, "--", "s", "learned line")}


def _draw_surface(axes: Any, surface: Result, curves: dict[str, tuple[Any, Any, Any]], ends: dict[str, Any]) -> None:
    """A loss as a surface, with the two responses and their optima on it."""
    import numpy as np

    axes.computed_zorder = False  # curves in front of the surface that they lie on
    x, y, loss = (np.asarray(surface[key]) for key in ("x", "y", "loss"))
    axes.plot_surface(x, y, loss, cmap="Greys", alpha=0.55, linewidth=0.2, edgecolor="0.6", rcount=24, ccount=24)
    low = axes.get_zlim()
    for name, (colour, dashes, marker, label) in LOOKS.items():
        axes.plot(*curves[name], dashes, color=colour, linewidth=2.8, label=label)
        where = [[value] for value in ends[name]]
        axes.plot(*where, marker, color=colour, markersize=10, markeredgecolor="white", label=f"its optimum ({label})")
    axes.set_zlim(low)
    axes.tick_params(labelsize=SMALL - 1, pad=0)
    axes.locator_params(nbins=4)
    axes.set_box_aspect(None, zoom=0.9)


def _name_axes(axes: Any, x: str, y: str, z: str, title: str) -> None:
    axes.set_xlabel(x, fontsize=SMALL, labelpad=4)
    axes.set_ylabel(y, fontsize=SMALL, labelpad=4)
    axes.set_zlabel(z, fontsize=SMALL, labelpad=4)
    axes.set_title(title, fontsize=LARGE)


def _draw_profile(axes: Axes, result: Result, title: str) -> None:
    """Validation loss against the hyperparameter along both responses."""
    for name, (colour, dashes, marker, _) in LOOKS.items():
        end = result[name]["end"]
        axes.plot(result["hypers"], result[name]["valid"], dashes, color=colour, linewidth=2.8)
        axes.plot(end["hyper"], end["valid"], marker, color=colour, markersize=10, markeredgecolor="white", zorder=4)
    axes.axvline(result["centre"], color="0.5", linestyle=":", linewidth=2)
    axes.annotate(
        "fitted here", (result["centre"], 0.97), (6, 0), xycoords=("data", "axes fraction"),
        textcoords="offset points", fontsize=SMALL, va="top", color="0.3",
    )  # fmt: skip
    label_axes(axes, x="hyperparameter λ", y="validation loss", title=title)


def draw(results: Results) -> Figure:
    """A row a game: training surface, validation surface, and the validation loss along both responses."""
    figure = empty_figure(14.5, 10.5)
    for row, (name, result) in enumerate(results.items()):
        panels = [figure.add_subplot(2, 3, 3 * row + column + 1, projection="3d") for column in (0, 1)]
        for column, key in enumerate(("train", "valid")):
            curves, ends = {}, {}
            for response in LOOKS:
                found = result[response]
                weights, end = list(zip(*found["weights"], strict=True)), found["end"]
                in_weights = column == 1 and len(weights) == 2
                flat = weights if in_weights else (result["hypers"], weights[0])
                curves[response] = (*flat, found[key])
                flat_end = end["weights"] if in_weights else (end["hyper"], end["weights"][0])
                ends[response] = (*flat_end, end[key])
            _draw_surface(panels[column], result["surfaces"][column], curves, ends)
        if name == "synthetic":
            _name_axes(panels[0], "λ", "weight w", "loss", "training loss (w − sin(λ+π))²")
            _name_axes(panels[1], "λ", "weight w", "loss", "validation loss sin(w)")
            panels[0].view_init(elev=38, azim=-58)
            panels[1].view_init(elev=38, azim=-58)
        else:
            _name_axes(panels[0], "log penalty λ", "w₁ (BMI)", "loss", "ridge: training loss, w₂ at its best")
            _name_axes(panels[1], "w₁ (BMI)", "w₂ (blood pressure)", "loss", "ridge: validation loss")
            panels[0].view_init(elev=30, azim=-130)
            panels[1].view_init(elev=40, azim=-60)
        slopes = ", ".join(f"{s:.3f}" for s in result["learned"]["slope"])
        truths = ", ".join(f"{s:.3f}" for s in result["exact"]["slope"])
        _draw_profile(figure.add_subplot(2, 3, 3 * row + 3), result, f"learned slope {slopes}\n(exact {truths})")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=LARGE, frameon=False)
    return figure


def slope_error(result: Result) -> float:
    """|learned slope - exact slope| / |exact slope|."""
    learned, exact = (torch.tensor(result[name]["slope"]) for name in ("learned", "exact"))
    return float(torch.linalg.vector_norm(learned - exact) / torch.linalg.vector_norm(exact))


def summarize(results: Results) -> str:
    """Slopes, and both optima of both games."""
    sine, ridge = results["synthetic"], results["real"]
    slope = sine["learned"]["slope"][0]
    verdict = "within" if abs(slope + 1.0) <= 0.05 else "NOT within"
    pairs = ", ".join(
        f"{a:.4f} (exact {b:.4f})" for a, b in zip(ridge["learned"]["slope"], ridge["exact"]["slope"], strict=True)
    )

    def optima(result: Result) -> str:
        exact, guess = result["exact"]["end"], result["learned"]["end"]
        return (
            f"lambda* {exact['hyper']:.3f} with loss {exact['valid']:.3f}, estimated {guess['hyper']:.3f} where the "
            f"line promises {guess['valid']:.3f} and retraining gives {guess['true']:.3f}"
        )

    return (
        f"The line learned at lambda = {sine['centre']:g} has slope {slope:.4f}, {verdict} .05 of -1; {optima(sine)}. "
        f"Ridge on {PATIENTS} diabetes patients, fitted at {ridge['centre']:g}: slopes {pairs}, off by "
        f"{100 * slope_error(ridge):.1f} %; {optima(ridge)}; test loss {ridge['exact']['end']['test']:.3f}, "
        f"and {ridge['learned']['end']['test']:.3f} with the weights that the line itself gives."
    )


EXPERIMENT = Experiment(
    name="fig3",
    title="Figure 3: exact and learned best response on both losses",
    parts=(
        Part("synthetic", synthetic, {"centre": 0.0, "scale": 0.1, "fits": 2000, "points": 129}, 8.0),
        Part("real", real, {"centre": -2.0, "scale": 0.1, "fits": 2000, "points": 99, "seed": 0}, 8.0),
    ),
    draw=draw,
    summarize=summarize,
)

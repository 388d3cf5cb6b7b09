"""Training data as hyperparameters: a data set distilled into ten images, and the derivative by every example."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.func import grad, jacrev
from torch.optim.lr_scheduler import CosineAnnealingLR

import bilevel as bl
from games.experiments.data import Digits, DigitSource, scikit_digits
from games.experiments.experiment import Experiment, Part, Result, Results
from games.experiments.style import BLACK, BLUE, GREEN, LARGE, RED, SMALL, empty_figure, label_axes
from games.problems.distillation import (
    accuracy,
    class_means,
    converged,
    distillation_game,
    importance_game,
    one_each,
    real_loss,
    retrained,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESPONSES: dict[str, bl.Response] = {
    "conjugate gradients": converged(bl.ConjugateGradient(rtol=1e-4), tolerance=1e-4),
    "identity": converged(bl.linear.Identity(), tolerance=1e-4),
    "unrolled": bl.Unrolled(partial(torch.optim.SGD, lr=0.1, momentum=0.9), steps=30),
}
"""How the leader sees the follower. The identity's scale does not matter: Adam divides it out."""

PENALTIES = (1e-3, 1e-2)
SETS = ("8 x 8 digits", "MNIST")
GOAL = 0.85
"""Test accuracy asked of the classifier that is learned from ten distilled 8 x 8 digits."""


SEEDS = {"8 x 8 digits": (0, 1, 2), "MNIST": (0,)}
TRAIN = {"8 x 8 digits": 900, "MNIST": 2000}


def _digits(source: DigitSource, name: str, seed: int) -> Digits:
    """Real images to distil, others for choosing a penalty, others for the test."""
    if name == "MNIST":
        return source.digits(train=TRAIN[name], valid=1000, test=2000, seed=seed, dtype=torch.float64)
    return scikit_digits(train=TRAIN[name], valid=297, test=600, seed=seed, dtype=torch.float64)


# The parts -----------------------------------------------------------------------------------------------------------


def distilled(source: DigitSource, *, data: str, response: str, seed: int, steps: int, rate: float) -> Result:
    """Ten images, drawn from the class means by `steps` steps of Adam; the penalty is chosen on validation images."""
    digits = _digits(source, data, seed)
    tried: list[Result] = []
    for penalty in PENALTIES:
        solution = bl.solve(
            distillation_game(digits, class_means(digits.train), penalty=penalty),
            weights=RESPONSES[response],
            optimizer=partial(torch.optim.Adam, lr=rate),
            scheduler=partial(CosineAnnealingLR, T_max=steps),
            steps=steps,
        )
        images = solution.variables["images"]
        weights = retrained(digits, images, penalty=penalty)
        tried.append(
            {
                "penalty": penalty,
                "images": images,
                "valid": accuracy(weights, digits.valid),
                "test": accuracy(weights, digits.test),
                "losses": [record["images"] for record in solution.history],
                "gradients": solution.gradients,
                "products": solution.products,
            }
        )
    return max(tried, key=_valid) | {"shape": digits.image_shape, "all_valid": [_valid(entry) for entry in tried]}


def baselines(source: DigitSource, *, data: str, seed: int, draws: int) -> Result:
    """The same classifier from class means, from ten real images, from all; each at its best penalty of four."""
    digits = _digits(source, data, seed)
    means = class_means(digits.train)
    generator = torch.Generator().manual_seed(seed)
    tens = [one_each(digits.train, generator) for _ in range(draws)]

    def scored(penalty: float, pictures: Sequence[Tensor]) -> Result:
        found = [retrained(digits, images, penalty=penalty) for images in pictures]
        tests = [accuracy(weights, digits.test) for weights in found]
        return {
            "penalty": penalty,
            "valid": sum(accuracy(weights, digits.valid) for weights in found) / len(found),
            "test": sum(tests) / len(tests),
            "tests": tests,
        }

    def everything(penalty: float) -> Result:
        game = importance_game(digits, penalty=penalty)
        response = converged(bl.ConjugateGradient())
        weights, _ = response(game, {"importance": game.initial("importance")}, response.init(game))
        return {
            "penalty": penalty,
            "valid": accuracy(weights, digits.valid),
            "test": accuracy(weights, digits.test),
        }

    penalties = (*PENALTIES, 1e-1, 1.0)
    return {
        "images": means,
        "shape": digits.image_shape,
        "class means": max((scored(p, [means]) for p in penalties), key=_valid),
        "ten real images": max((scored(p, tens) for p in penalties), key=_valid),
        "all real images": max((everything(p) for p in penalties), key=_valid),
    }


def held_newton(game: bl.Game, importance: Tensor, weights: dict[str, Tensor], batch: Any) -> bl.ClosedForm:
    """The follower's optimum by Newton's steps whose Hessian is held at `importance` and `weights`.

    For small moves of the leader, of which it takes each to the last digits in a few gradients. A line search cannot:
    it compares losses, and stalls where they agree to rounding, at gradients of 1e-8.
    """
    form = game.structure("weights")
    start = torch.cat([weights[name].detach().flatten() for name in ("weight", "bias")])

    def loss(flat: Tensor, importance: Tensor) -> Tensor:
        return game.loss("weights", {"importance": importance, "weights": form.unflatten(flat)}, batch)

    factor = torch.linalg.cholesky(jacrev(grad(loss))(start, importance))

    def minimum(importance: Tensor) -> Any:
        flat = start
        for _ in range(10):
            slope = grad(loss)(flat, importance)
            if float(slope.norm()) <= 1e-15:
                break
            flat = flat - torch.cholesky_solve(slope[:, None], factor)[:, 0]
        return form.unflatten(flat)

    return bl.ClosedForm(minimum)


def exactness(source: DigitSource, *, train: int, penalty: float, directions: int, step: float) -> Result:
    r"""dF/dlambda by the implicit-function theorem against followers re-solved at lambda +- h and +- h/2, in float64.

    F(lambda) is the validation loss of w*(lambda), lambda uniform on [0, 2/n]. d is a unit vector: each entry of
    lambda, and `directions` at random. Central differences D(h) are extrapolated, (4 D(h/2) - D(h)) / 3, error O(h^4).
    """
    digits = scikit_digits(train=train, valid=500, test=500, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(train, generator=generator, dtype=torch.float64) * 2 / train
    game = importance_game(digits, penalty=penalty, importance=present)
    batch, validation = (digits.train.images, digits.train.labels), (digits.valid.images, digits.valid.labels)

    rough = converged(bl.ConjugateGradient())
    near, _ = rough(game, {"importance": present}, rough.init(game))
    response = bl.Implicit(
        held_newton(game, present, near, batch),
        tolerance=1e-12,
        linear_solver=bl.ConjugateGradient(rtol=1e-12),
        strict=True,  # a follower that is not re-solved would make the comparison void
    )
    importance = present.clone().requires_grad_()
    weights, state = response(game, {"importance": importance}, response.init(game))
    (hypergradient,) = torch.autograd.grad(real_loss(weights, validation), importance)
    state = response.after_backward(state, weights)
    report = response.report(state)
    stationarity = [report.stationarity]

    def moved(by: Tensor) -> float:
        with torch.no_grad():
            answer, after = response(game, {"importance": present + by}, state)
            stationarity.append(response.report(after).stationarity)
            return float(real_loss(answer, validation))

    def difference(along: Tensor, h: float) -> float:
        return (moved(h * along) - moved(-h * along)) / (2 * h)

    random = torch.randn(directions, train, generator=generator, dtype=torch.float64)
    units = torch.cat([torch.eye(train, dtype=torch.float64), random / random.norm(dim=1, keepdim=True)])
    implicit = (units @ hypergradient).tolist()
    finite = [(4 * difference(d, step / 2) - difference(d, step)) / 3 for d in units]
    return {
        "implicit": implicit,
        "finite": finite,
        "entries": train,
        "error": [abs(a - b) / abs(b) for a, b in zip(implicit, finite, strict=True)],
        "stationarity": max(stationarity),
        "linear": report.residual,
    }


def _valid(entry: Result) -> float:
    return float(entry["valid"])


# The picture ---------------------------------------------------------------------------------------------------------

OTHERS = ("class means", "ten real images", "all real images")


def tests(results: Results, data: str, name: str) -> list[float]:
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
            told = f"{data}\n{name}\n({low:.1f} to {high:.1f})"
            line[0].set_ylabel(told, fontsize=SMALL, rotation=0, ha="right", va="center")


def _accuracies(axes: Axes, results: Results) -> None:
    names = (*RESPONSES, *OTHERS)
    for data, colour, marker, shift in zip(SETS, (BLUE, RED), "os", (0.14, -0.14), strict=True):
        places = [len(names) - 1 - index + shift for index in range(len(names))]
        for place, name in zip(places, names, strict=True):
            every = tests(results, data, name)
            if name == "ten real images":
                every = [t for s in SEEDS[data] for t in results[f"{data}, baselines, seed {s}"][name]["tests"]]
            axes.plot(every, [place] * len(every), "|", color=colour, alpha=0.5, markersize=11)
        means = [_mean(tests(results, data, name)) for name in names]
        axes.plot(means, places, marker, color=colour, markersize=9, label=f"{data} (splits: {len(SEEDS[data])})")
    axes.axvline(GOAL, color="0.4", linestyle=":", linewidth=2, label="goal for 8 x 8 digits")
    told = [f"distilled:\n{n}" if n in RESPONSES else n for n in names]
    axes.set_yticks(range(len(names)), list(reversed(told)))
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

    def told(data: str) -> str:
        drawn = ", ".join(f"{_mean(tests(results, data, name)):.3f} by {name}" for name in RESPONSES)
        others = ", ".join(f"{_mean(tests(results, data, name)):.3f} from {name}" for name in OTHERS)
        return f"{data} distilled into ten images: test accuracy {drawn}; {others}"

    reached = min(tests(results, SETS[0], "conjugate gradients"))
    found = results["exactness"]
    worst = max(found["error"])
    return (
        f"{told(SETS[0])} (goal {GOAL:.2f}: the worst of {len(SEEDS[SETS[0]])} splits has {reached:.3f}, "
        f"{'reached' if reached >= GOAL else 'MISSED'}). {told(SETS[1])}. Hypergradient against finite differences of "
        f"re-solved followers, {found['entries']} entries and {len(found['finite']) - found['entries']} random "
        f"directions: largest relative error {worst:.1e} ({'at most' if worst <= 1e-6 else 'MORE than'} 1e-6)."
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

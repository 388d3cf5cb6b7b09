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
from games.experiments.experiment import Result
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
    pass

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

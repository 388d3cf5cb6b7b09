r"""Training data as hyperparameters of a softmax classifier: its images, or how much each of them counts.

    w*(images) = argmin over w of  mean_c L(images_c, c; w) + penalty/2 |w|^2
    w*(lambda) = argmin over w of  sum_i lambda_i L(image_i, label_i; w) + penalty/2 |w|^2

L is the cross-entropy in nats. Both are strictly convex in w, biases included, so that w* is one point and smooth.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import bilevel as bl
from games.errors import DataError
from games.experiments.data import Digits, Split

Weights = Mapping[str, Tensor]
Batch = tuple[Tensor, Tensor]


def logits(weights: Weights, images: Tensor) -> Tensor:
    """The classifier's: `images: [n, pixels]` to `[n, classes]`."""
    return linear(images, weights["weight"], weights["bias"])


def zeros(digits: Digits) -> dict[str, Tensor]:
    """The weights that every training starts from."""
    images, classes = digits.train.images, len(digits.classes)
    return {"weight": images.new_zeros(classes, images.shape[1]), "bias": images.new_zeros(classes)}


def real_loss(weights: dict[str, Tensor], batch: Batch) -> Tensor:
    """The leader's: mean cross-entropy on real images."""
    images, labels = batch
    return cross_entropy(logits(weights, images), labels)


def shrinkage(penalty: float, weights: Weights) -> Tensor:
    """penalty/2 |w|^2."""
    return 0.5 * penalty * torch.stack([w.square().sum() for w in weights.values()]).sum()


def distillation_game(digits: Digits, images: Tensor, *, penalty: float) -> bl.Game:
    """The leader draws one image a class, from `images: [classes, pixels]`; the follower learns from these alone.

    The leader's loss is that of the follower on all real training images.

    Raises `DataError` when `images` has another shape or `penalty` is not positive.

    >>> from games.experiments.data import scikit_digits
    >>> digits = scikit_digits()
    >>> distillation_game(digits, class_means(digits.train), penalty=0.01).structure("images").size
    640
    """
    expected = (len(digits.classes), digits.train.images.shape[1])
    if tuple(images.shape) != expected:
        raise DataError(f"images has shape {tuple(images.shape)}; expected one image a class, {expected}.")
    _check_penalty(penalty)
    labels = torch.arange(len(digits.classes))

    def distilled_loss(images: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return cross_entropy(logits(weights, images), labels) + shrinkage(penalty, weights)

    return bl.Game(
        images=bl.Player(real_loss, init=images, data=[(digits.train.images, digits.train.labels)]),
        weights=bl.Player(distilled_loss, init=zeros(digits)),
    )


def importance_game(digits: Digits, *, penalty: float, importance: Tensor | None = None) -> bl.Game:
    """The leader says how much each training example counts: `importance: [n]`, from 1/n each.

    The leader's loss is that of the follower on the validation images. With negative entries the follower's loss may
    have no minimum.

    Raises `DataError` when there is not one number an example, one is negative, or `penalty` is not positive.

    >>> from games.experiments.data import scikit_digits
    >>> importance_game(scikit_digits(train=50), penalty=0.01).structure("importance").size
    50
    """
    count = len(digits.train)
    given = digits.train.images.new_full((count,), 1.0 / count) if importance is None else importance
    if tuple(given.shape) != (count,):
        raise DataError(f"importance has shape {tuple(given.shape)}; expected one number an example, ({count},).")
    if bool((given < 0).any()):
        raise DataError(f"importance has {int((given < 0).sum())} negative numbers; expected 0 or more.")
    _check_penalty(penalty)

    def weighted_loss(importance: Tensor, weights: dict[str, Tensor], batch: Batch) -> Tensor:
        images, labels = batch
        losses = cross_entropy(logits(weights, images), labels, reduction="none")
        return importance @ losses + shrinkage(penalty, weights)

    return bl.Game(
        importance=bl.Player(real_loss, init=given, data=[(digits.valid.images, digits.valid.labels)]),
        weights=bl.Player(weighted_loss, init=zeros(digits), data=[(digits.train.images, digits.train.labels)]),
    )


def class_means(split: Split) -> Tensor:
    """The mean image of each class: `[classes, pixels]`."""
    return torch.stack([split.images[split.labels == label].mean(0) for label in range(int(split.labels.max()) + 1)])


def one_each(split: Split, generator: torch.Generator) -> Tensor:
    """A real image of each class, at random: `[classes, pixels]`."""
    chosen = []
    for label in range(int(split.labels.max()) + 1):
        members = split.images[split.labels == label]
        chosen.append(members[int(torch.randint(len(members), (), generator=generator))])
    return torch.stack(chosen)


def accuracy(weights: Weights, split: Split) -> float:
    """Share of images named right, 0 to 1."""
    return float((logits(weights, split.images).argmax(1) == split.labels).double().mean())


def converged(
    linear_solver: bl.linear.LinearSolver, *, tolerance: float = 1e-6, warm_start: bool = True
) -> bl.Implicit:
    """The follower at its optimum by L-BFGS, to `tolerance` times the gradient at zero weights."""
    return bl.Implicit(
        bl.Scipy("L-BFGS-B"), steps=2000, tolerance=tolerance, linear_solver=linear_solver, warm_start=warm_start
    )


def retrained(digits: Digits, images: Tensor, *, penalty: float) -> Weights:
    """The classifier learned from `images: [classes, pixels]` alone: from zero weights, to convergence, in float64."""
    game = distillation_game(digits, images, penalty=penalty)
    response = converged(bl.ConjugateGradient())
    weights, _ = response(game, {"images": images}, response.init(game))
    return {name: w.detach() for name, w in weights.items()}


def _check_penalty(penalty: float) -> None:
    if not penalty > 0.0:
        raise DataError(f"penalty={penalty}; expected a positive number, or the follower has no unique optimum.")

"""Two games of one hyperparameter: the paper's synthetic one, and ridge regression on two measurements of patients."""

from __future__ import annotations

import torch
from torch import Tensor

import bilevel as bl
from games.errors import MissingExtraError

Batch = tuple[Tensor, Tensor]
PATIENTS, VALID = 12, 200
"""Few patients to learn from, so that a penalty is worth having; 230 are left to test on."""

# The paper's synthetic game ------------------------------------------------------------------------------------------


def sine_train_loss(hyper: Tensor, weights: Tensor) -> Tensor:
    """(w - sin(lambda + pi))^2: its best response is w*(lambda) = sin(lambda + pi), about -lambda near 0."""
    return (weights - torch.sin(hyper + torch.pi)).square()


def sine_valid_loss(weights: Tensor) -> Tensor:
    """sin(w)."""
    return torch.sin(weights)


def sine_game(start: float) -> bl.Game:
    """One hyperparameter, which starts at `start`, and one weight; no data."""
    hyper = torch.tensor(start, dtype=torch.float64)
    return bl.Game(
        hyper=bl.Player(sine_valid_loss, init=hyper),
        weights=bl.Player(sine_train_loss, init=torch.zeros_like(hyper)),
    )


# The real one: ridge regression on two measurements ------------------------------------------------------------------


def valid_loss(weights: Tensor, batch: Batch) -> Tensor:
    """Mean squared error of `inputs @ weights`, in variances of the target."""
    inputs, targets = batch
    return (inputs @ weights - targets).square().mean()


def train_loss(hyper: Tensor, weights: Tensor, batch: Batch) -> Tensor:
    """The same, with the penalty exp(hyper) |w|^2."""
    return valid_loss(weights, batch) + hyper.exp() * weights.square().sum()


def patients(seed: int) -> tuple[Batch, Batch, Batch]:
    """Scikit-learn's 442 diabetes patients, split: body mass index and blood pressure `[n, 2]`, progression `[n]`.

    Each in units of its standard deviation over all patients, from its mean.
    """
    try:
        from sklearn.datasets import load_diabetes  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"The patients are in scikit-learn ({error}). pip install 'bilevel[data]'") from error
    table, progression = (torch.as_tensor(part) for part in load_diabetes(return_X_y=True, scaled=False))
    columns = torch.column_stack([table[:, 2], table[:, 3], progression])
    columns = (columns - columns.mean(0)) / columns.std(0)
    order = torch.randperm(len(columns), generator=torch.Generator().manual_seed(seed))
    train, valid, test = (columns[rows] for rows in order.tensor_split((PATIENTS, PATIENTS + VALID)))
    return (train[:, :2], train[:, 2]), (valid[:, :2], valid[:, 2]), (test[:, :2], test[:, 2])


def ridge_game(start: float, train: Batch, valid: Batch) -> bl.Game:
    """One log penalty, from `start`, and the two weights."""
    hyper = torch.tensor(start, dtype=torch.float64)
    return bl.Game(
        hyper=bl.Player(valid_loss, init=hyper, data=[valid]),
        weights=bl.Player(train_loss, init=torch.zeros(2, dtype=torch.float64), data=[train]),
    )

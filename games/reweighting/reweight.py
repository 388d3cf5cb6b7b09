"""Weigh training examples so that what is learned from them does well on a small clean set."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.tree import Variables
from games.reweighting.reweighted import Reweighted
from games.reweighting.weighting import LabelNetwork, Weighting

Callback = Any
FEW = 5
"""Clean examples of a class, below which its weights cannot be trusted."""


def reweight(
    model: nn.Module,
    train_set: Any,
    clean_set: Any,
    *,
    weighting: Weighting | None = None,
    response: bl.Response | None = None,
    steps: int = 30,
    weight_decay: float = 1e-2,
    batch_size: int | None = None,
    checkpoint: str | Path | None = None,
    resume: bool | None = None,
    progress: bool = False,
    callbacks: Sequence[Callback] = (),
    seed: int = 0,
) -> Reweighted:
    r"""Weights of training examples, such that the model trained at them does well on a small clean set.

        min over x of  mean of CE on the clean set at z(x), and the weighting's own penalty,
        z(x) = argmin of  sum_i w_i(x) CE_i / sum_i w_i(x) + weight_decay |z|^2  over the model's parameters z

    `train_set` and `clean_set`: datasets of (input, label), any `torch.utils.data.Dataset` or a sequence of pairs, or a
    pair of tensors `inputs: [n, ...]`, `labels: [n]`; held in memory. `weighting`: `LabelNetwork()` (the default) sees
    an example and its label and weighs others as well; `PerExample()` gives each its own number. `response`: how the
    model follows the weights; by default its optimum by L-BFGS and conjugate gradients, which wants a convex loss (a
    linear model). A network wants `bl.Unrolled(partial(torch.optim.SGD, lr=0.1, momentum=0.9), steps=20)`. `batch_size`
    draws training batches; None takes all at once. With `checkpoint` an interrupted run resumes, bit for bit.

    The clean set decides: what is rare in it is weighed down, and with too few clean examples the weights overfit them.
    Costs `steps` responses of the model. Raises `ValueError`/`TypeError` for empty sets, images of integers, NaN,
    labels that are no integers, and a clean label that the training set has not; warns of training labels that the
    clean set lacks, and of fewer than five clean examples a class.
    Source: Ren et al. 2018 (arXiv 1803.09050); Shu et al. 2019 (arXiv 1902.07379).

    >>> inputs = torch.tensor([[1.0], [-1.0], [1.0], [-1.0], [1.0], [-1.0], [2.0]])
    >>> labels = torch.tensor([0, 1, 0, 1, 0, 1, 1])  # the last one is wrong
    >>> clean = (torch.tensor([[1.0], [-1.0]]).repeat(5, 1), torch.tensor([0, 1]).repeat(5))
    >>> reweight(nn.Linear(1, 2), (inputs, labels), clean, steps=10).worst(1)
    tensor([6])
    """
    inputs, labels = _pair(train_set, "train_set")
    clean_inputs, clean_labels = _pair(clean_set, "clean_set")
    classes = int(torch.cat([labels, clean_labels]).max()) + 1
    _check(inputs, labels, clean_inputs, clean_labels)
    if steps < 1 or not weight_decay >= 0.0 or (batch_size is not None and not 1 <= batch_size <= len(labels)):
        raise ValueError(
            f"reweight: steps={steps}, weight_decay={weight_decay}, batch_size={batch_size}; expected at least 1, at "
            f"least 0, and None or 1 to {len(labels)}."
        )
    chosen = LabelNetwork() if weighting is None else weighting
    everybody, begin = torch.arange(len(labels)), chosen.init(inputs, labels, classes, seed=seed)
    chosen_response = _converged() if response is None else response

    def clean_loss(example_weights: Variables, model_: Variables, batch: Any) -> Tensor:
        loss = cross_entropy(functional_call(model, model_, (batch[0],)), batch[1])
        return loss + chosen.penalty(example_weights)

    def train_loss(example_weights: Variables, model_: Variables, batch: Any) -> Tensor:
        index, x, y = batch
        weights = chosen.weights(example_weights, index, x, y)
        losses = cross_entropy(functional_call(model, model_, (x,)), y, reduction="none")
        penalty = torch.stack([p.square().sum() for p in model_.values()]).sum()
        return (weights * losses).sum() / weights.sum() + weight_decay * penalty

    game = bl.Game(
        example_weights=bl.Player(clean_loss, begin, data=[(clean_inputs, clean_labels)]),
        model_=bl.Player(train_loss, model, data=_Batches(inputs, labels, batch_size)),
    )
    solution = bl.solve(
        game,
        model_=chosen_response,
        optimizer=chosen.optimizer,
        steps=steps,
        checkpoint=checkpoint,
        resume=resume,
        progress=progress,
        callbacks=callbacks,
        seed=seed,
    )
    leader, trained = solution.variables["example_weights"], copy.deepcopy(model).eval()
    trained.load_state_dict({**solution.variables["model_"], **solution.buffers.get("model_", {})}, strict=False)
    with torch.no_grad():
        weights, started = (chosen.weights(x, everybody, inputs, labels) for x in (leader, begin))
        losses = cross_entropy(trained(inputs), labels, reduction="none")
    return Reweighted(weights, labels, losses, trained, chosen, leader, solution, started, inputs)


def _converged() -> bl.Response:
    return bl.Implicit(bl.Scipy("L-BFGS-B"), steps=300, tolerance=1e-2, linear_solver=bl.ConjugateGradient(rtol=1e-2))


@dataclass(frozen=True, eq=False)
class _Batches:
    """Batches (index, inputs, labels) of a set, in a new order each pass; the whole set when there is no size."""

    inputs: Tensor
    labels: Tensor
    size: int | None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        count = len(self.labels)
        if self.size is None:
            yield torch.arange(count), self.inputs, self.labels
            return
        order = torch.randperm(count)  # torch's own generator, which the player's place in its data seeds
        for rows in torch.split(order[: count - count % self.size], self.size):
            yield rows, self.inputs[rows], self.labels[rows]


def _pair(given: Any, what: str) -> tuple[Tensor, Tensor]:
    """Inputs and labels as tensors."""
    if isinstance(given, tuple) and len(given) == 2 and all(isinstance(part, Tensor) for part in given):
        inputs, labels = given
    else:
        try:
            pairs = [given[index] for index in range(len(given))]
            inputs = torch.stack([torch.as_tensor(x) for x, _ in pairs]) if pairs else torch.empty(0, 1)
            labels = torch.as_tensor([int(y) for _, y in pairs])
        except (TypeError, ValueError, KeyError) as error:
            raise TypeError(
                f"reweight: {what} is a {type(given).__name__} ({error}); expected a dataset of (input, label) with "
                "inputs of one shape, or a pair of tensors."
            ) from error
    if len(inputs) != len(labels) or len(labels) == 0 or labels.ndim != 1:
        raise ValueError(
            f"reweight: {what} has inputs of shape {tuple(inputs.shape)} and labels of shape {tuple(labels.shape)}; "
            "expected [n, ...] and [n] with n of at least 1."
        )
    return inputs, labels


def _check(inputs: Tensor, labels: Tensor, clean_inputs: Tensor, clean_labels: Tensor) -> None:
    for what, x, y in (("train_set", inputs, labels), ("clean_set", clean_inputs, clean_labels)):
        if not x.is_floating_point():
            raise TypeError(f"reweight: {what} has inputs of {x.dtype}; expected floats: x.float() / 255, say.")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"reweight: {what} has inputs with NaN or infinity.")
        if y.dtype != torch.int64 or int(y.min()) < 0:
            raise TypeError(f"reweight: {what} has labels of {y.dtype} from {y.min()}; expected int64 from 0.")
    if inputs.shape[1:] != clean_inputs.shape[1:] or inputs.dtype != clean_inputs.dtype:
        raise ValueError(
            f"reweight: train_set has inputs of shape {list(inputs.shape[1:])} and {inputs.dtype}, clean_set "
            f"{list(clean_inputs.shape[1:])} and {clean_inputs.dtype}; expected the same."
        )
    counts = torch.bincount(clean_labels, minlength=int(labels.max()) + 1)
    present = torch.bincount(labels, minlength=len(counts)) > 0
    unknown = [label for label in range(len(counts)) if counts[label] and not present[label]]
    if unknown:
        raise ValueError(f"reweight: clean_set has labels {unknown}, which train_set has not; they cannot be learned.")
    lacking = [label for label in range(len(counts)) if present[label] and counts[label] < FEW]
    if lacking:
        warnings.warn(
            f"reweight: clean_set has fewer than {FEW} examples of the labels {lacking}. What it lacks is weighed "
            "down, right or wrong: add clean examples of them.",
            bl.errors.UnreliableResponseWarning,
            stacklevel=3,
        )

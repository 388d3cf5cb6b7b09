"""Runs of reweighting on digits with labels made wrong on purpose, beside what it has to beat."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from games.errors import MissingExtraError
from games.experiments.data import Digits, Split
from games.experiments.store import Store
from games.reweighting.learners import Learner, Softmax
from games.reweighting.noise import class_dependent, long_tailed, symmetric
from games.reweighting.reweight import Callback, reweight
from games.reweighting.reweighted import Reweighted
from games.reweighting.weighting import LabelNetwork, PerExample, Weighting

_NEW = 1000  # added to a seed, for the wrong labels of test examples
KINDS = ("symmetric", "class-dependent", "long-tailed")


@dataclass(frozen=True)
class Case:
    """What is wrong with the training labels: `kind`, at `rate` (for a long tail, largest over smallest class)."""

    kind: str
    rate: float

    @property
    def name(self) -> str:
        """Such as "symmetric .4"."""
        return f"{self.kind} {self.rate:g}"


CASES = (
    *(Case("symmetric", rate) for rate in (0.2, 0.4, 0.6)),
    *(Case("class-dependent", rate) for rate in (0.2, 0.4)),
    Case("long-tailed", 50.0),
)


@dataclass(frozen=True)
class Row:
    """One way of training: its test accuracy, and `recovered`, the share of the gap from plain training to the oracle.

    How well wrong labels are told from right ones, as areas under the ROC curve: `auc` by the weights, `auc_of_losses`
    by the trained model's own losses, `auc_of_new` by the weights of test examples whose labels were made wrong in the
    same way. `work` is in gradients and products, `seconds` are the processor's.
    """

    case: str
    method: str
    seed: int
    accuracy: float
    auc: float | None = None
    auc_of_losses: float | None = None
    auc_of_new: float | None = None
    recovered: float | None = None
    work: int = 0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


def weightings() -> dict[str, Weighting]:
    """By name."""
    return {"per example": PerExample(), "network": LabelNetwork()}


def with_wrong_labels(split: Split, case: Case, seed: int, *, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images `[n, pixels]`, labels `[n]` as they are seen, and which of them are wrong `[n]`, bool."""
    images, labels = split.images, split.labels
    if case.kind == "long-tailed":
        kept = long_tailed(labels, case.rate, classes=classes, seed=seed)
        return images[kept], labels[kept], torch.zeros(len(kept), dtype=torch.bool)
    made = symmetric if case.kind == "symmetric" else class_dependent
    noisy, wrong = made(labels, case.rate, classes=classes, seed=seed)
    return images, noisy, wrong


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, balanced: bool = False) -> float:
    """Share of right answers; `balanced`: the mean over the classes."""
    with torch.no_grad():
        right = (model(images.to(_dtype(model))).argmax(1) == labels).double()
    if not balanced:
        return float(right.mean())
    return float(torch.stack([right[labels == label].mean() for label in torch.unique(labels)]).mean())


def row_of(content: Mapping[str, Any]) -> Row:
    """A row from what a file has of it."""
    return Row(**{**content, "warnings": tuple(content["warnings"])})


def identity(digits: Digits, case: Case, seed: int, learner: Learner) -> dict[str, Any]:
    """What makes the runs of a case these runs and no others; their number of steps does not."""
    return {"data": digits.fingerprint, "case": case.name, "seed": seed, "learner": repr(learner)}


def checkpoints_of(
    store: Store, digits: Digits, case: Case, seed: int, learner: Learner, *, steps: int, resume: bool
) -> dict[str, Path]:
    """A file for each weighting's run of `run_case`; raises `CheckpointError` as `Store.checkpoint` does."""
    return {
        name: store.checkpoint(
            run_name(case, name, seed),
            {**identity(digits, case, seed, learner), "weighting": repr(weighting)},
            steps=steps,
            resume=resume,
        )
        for name, weighting in weightings().items()
    }


def run_name(case: Case, weighting: str, seed: int) -> str:
    """Of one run's files."""
    return f"{case.name}-{weighting}-{seed}".replace(" ", "-")


def run_case(
    digits: Digits,
    case: Case,
    seed: int,
    *,
    learner: Learner | None = None,
    steps: int = 30,
    checkpoints: Mapping[str, Path] | None = None,
    callbacks: Sequence[Callback] = (),
    on_weighted: Callable[[str, Reweighted], object] = lambda name, found: None,
) -> list[Row]:
    """All ways of training `learner` (by default `Softmax()`) on one case and seed.

    `checkpoints` are those of `checkpoints_of`, for runs that may go on; `on_weighted` is called with the name of each
    weighting's run and what it found.
    """
    learner = Softmax() if learner is None else learner
    classes, tail = len(digits.classes), case.kind == "long-tailed"
    inputs, labels, wrong = with_wrong_labels(digits.train, case, seed, classes=classes)
    clean, test = digits.valid, digits.test
    new_inputs, new_labels, new_wrong = with_wrong_labels(test, case, _NEW + seed, classes=classes)
    ones = torch.ones(len(labels), dtype=inputs.dtype)

    def trained(weights: Tensor) -> nn.Module:
        return learner.trained(inputs, labels, weights, classes)

    def row(method: str, model: nn.Module, gap: tuple[float, float] | None = None) -> Row:
        reached = accuracy(model, test.images, test.labels, balanced=tail)
        with torch.no_grad():
            losses = cross_entropy(model(inputs.to(_dtype(model))), labels, reduction="none")
        share = (reached - gap[0]) / (gap[1] - gap[0]) if gap and gap[1] > gap[0] else None
        return Row(case.name, method, seed, reached, auc_of_losses=_auc(-losses, wrong), recovered=share)

    rows = [
        row("plain", trained(ones)),
        row(
            "clean set alone", learner.trained(clean.images, clean.labels, torch.ones_like(clean.images[:, 0]), classes)
        ),
        row("inverse frequency", trained(1.0 / torch.bincount(labels, minlength=classes).to(inputs)[labels]))
        if tail
        else row("oracle", trained((~wrong).to(inputs))),
    ]
    gap = rows[0].accuracy, rows[2].accuracy
    for name, weighting in weightings().items():
        began = time.process_time()
        found = reweight(
            learner.model(inputs.shape[1], classes, inputs.dtype),
            (inputs, labels),
            (clean.images, clean.labels),
            weighting=weighting,
            response=learner.response(),
            steps=steps,
            weight_decay=learner.decay,
            batch_size=learner.batch_size,
            checkpoint=None if checkpoints is None else checkpoints[name],
            callbacks=callbacks,
            seed=seed,
        )
        generalises = isinstance(weighting, LabelNetwork)
        rows.append(
            replace(
                row(name, found.model, gap),
                auc=_auc(found.weights, wrong),
                auc_of_new=_auc(found.weigh(new_inputs, new_labels), new_wrong) if generalises else None,
                work=found.solution.gradients + found.solution.products,
                seconds=time.process_time() - began,
                warnings=found.solution.warnings,
            )
        )
        if not tail:
            for way, weights in (("pruned", found.kept().to(inputs)), ("capped", found.capped())):
                rows.append(row(f"{name}, {way}", trained(weights), gap))
        on_weighted(run_name(case, name, seed), found)
    return rows


def _auc(scores: Tensor, wrong: Tensor) -> float | None:
    """The chance that a right label scores higher than a wrong one; None where there are none of one of them."""
    try:
        from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"reweighting needs scikit-learn ({error}). pip install 'bilevel[data]'") from error
    return float(roc_auc_score((~wrong).numpy(), scores.numpy())) if 0 < int(wrong.sum()) < len(wrong) else None


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype

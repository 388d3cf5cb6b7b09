"""Runs of reweighting on digits with labels made wrong on purpose, beside what it has to beat."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from games.errors import MissingExtraError
from games.reweighting.learners import Learner, Softmax
from games.reweighting.noise import class_dependent, long_tailed, symmetric
from games.reweighting.reweight import Callback, Reweighted, reweight
from games.reweighting.weighting import LabelNetwork, PerExample, Weighting
from games.tuning.data import Digits, Split

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

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


def spoiled(split: Split, case: Case, seed: int, *, classes: int) -> tuple[Tensor, Tensor, Tensor]:
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


def run_case(
    digits: Digits,
    case: Case,
    seed: int,
    *,
    learner: Learner | None = None,
    steps: int = 30,
    checkpoint: Path | None = None,
    callbacks: Sequence[Callback] = (),
    done: Callable[[str, Reweighted], object] = lambda name, found: None,
) -> list[Row]:
    """All ways of training `learner` (by default `Softmax()`) on one case and seed.

    `checkpoint` is a folder, one file a weighting; `done` is told of each weighting's name and what it found.
    """
    learn = Softmax() if learner is None else learner
    classes, tail = len(digits.classes), case.kind == "long-tailed"
    inputs, labels, wrong = spoiled(digits.train, case, seed, classes=classes)
    clean, test = digits.valid, digits.test
    new_inputs, new_labels, new_wrong = spoiled(test, case, _NEW + seed, classes=classes)
    ones = torch.ones(len(labels), dtype=inputs.dtype)

    def trained(weights: Tensor) -> nn.Module:
        return learn.trained(inputs, labels, weights, classes)

    def row(method: str, model: nn.Module, gap: tuple[float, float] | None = None) -> Row:
        reached = accuracy(model, test.images, test.labels, balanced=tail)
        with torch.no_grad():
            losses = cross_entropy(model(inputs.to(_dtype(model))), labels, reduction="none")
        share = (reached - gap[0]) / (gap[1] - gap[0]) if gap and gap[1] > gap[0] else None
        return Row(case.name, method, seed, reached, auc_of_losses=_auc(-losses, wrong), recovered=share)

    rows = [
        row("plain", trained(ones)),
        row("clean set alone", learn.trained(clean.images, clean.labels, torch.ones_like(clean.images[:, 0]), classes)),
        row("inverse frequency", trained(1.0 / torch.bincount(labels, minlength=classes).to(inputs)[labels]))
        if tail
        else row("oracle", trained((~wrong).to(inputs))),
    ]
    gap = rows[0].accuracy, rows[2].accuracy
    for name, weighting in weightings().items():
        began = time.process_time()
        file = None if checkpoint is None else checkpoint / f"{case.name}-{name}-{seed}.pt".replace(" ", "-")
        found = reweight(
            learn.model(inputs.shape[1], classes, inputs.dtype),
            (inputs, labels),
            (clean.images, clean.labels),
            weighting=weighting,
            response=learn.response(),
            steps=steps,
            weight_decay=learn.decay,
            batch_size=learn.batch_size,
            checkpoint=file,
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
        done(f"{case.name}-{name}-{seed}".replace(" ", "-"), found)
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


def write(rows: Sequence[Row], path: Path, settings: dict[str, Any]) -> None:
    """All rows and what they were made with, as JSON."""
    where = {
        "machine": platform.platform(),
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("torch", "scipy", "scikit-learn")},
    }
    whole = {"settings": settings, **where, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(whole, indent=1) + "\n")


def read(path: Path) -> list[Row]:
    """What `write` wrote."""
    return [Row(**{**row, "warnings": tuple(row["warnings"])}) for row in json.loads(path.read_text())["rows"]]


def medians(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, float | None]]]:
    """case -> method -> the medians over the seeds, None where a number does not apply."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for case in dict.fromkeys(row.case for row in rows):
        found[case] = {}
        for method in dict.fromkeys(row.method for row in rows if row.case == case):
            chosen = [row for row in rows if (row.case, row.method) == (case, method)]
            found[case][method] = {
                key: _median([getattr(row, key) for row in chosen])
                for key in ("accuracy", "auc", "auc_of_losses", "auc_of_new", "recovered", "seconds")
            }
    return found


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def table(rows: Sequence[Row]) -> Table:
    """Case by method, medians over the seeds."""
    from rich.box import SIMPLE
    from rich.table import Table

    seeds = len({row.seed for row in rows})
    shown = Table(
        title=f"Test accuracy, medians over {seeds} {'seed' if seeds == 1 else 'seeds'}",
        caption="AUC: how well wrong labels are told from right ones, by the weights, by the trained model's losses, "
        "and by the weights of new examples. Of gap: of that from plain training to the oracle, who trains without the "
        "wrong labels (for a long tail: at inverse frequencies, accuracy being the mean over classes). s: seconds.",
        box=SIMPLE,
    )
    for column in ("labels", "accuracy", "of gap", "AUC", "losses", "new", "s"):
        shown.add_column(column, justify="left" if column == "labels" else "right", no_wrap=True)
    for case, methods in medians(rows).items():
        shown.add_section()
        shown.add_row(f"[bold]{case}")
        for method, numbers in methods.items():
            cells = [
                "" if numbers[k] is None else form.format(numbers[k])
                for k, form in (
                    ("accuracy", "{:.3f}"),
                    ("recovered", "{:.0%}"),
                    ("auc", "{:.3f}"),
                    ("auc_of_losses", "{:.3f}"),
                    ("auc_of_new", "{:.3f}"),
                )
            ]
            seconds = f"{numbers['seconds']:.0f}" if numbers["seconds"] else ""
            shown.add_row(f"  {method}", *cells, seconds)
    return shown


def figure(rows: Sequence[Row]) -> Figure:
    """Test accuracy in every case, a dot a seed; without those trained anew by example, which change little."""
    from games.paper.style import COLOURS, SMALL, blank, tidy

    drawn = blank(11.0, 5.0)
    axes = drawn.add_subplot()
    cases, methods = list(dict.fromkeys(r.case for r in rows)), list(dict.fromkeys(r.method for r in rows))
    methods = [method for method in methods if not method.startswith("per example,")]
    marks = ("o", "s", "^", "D", "v", "P")
    for at, method in enumerate(methods):
        chosen = [row for row in rows if row.method == method]
        places = [cases.index(row.case) + 0.1 * (at - (len(methods) - 1) / 2) for row in chosen]
        heights = [row.accuracy for row in chosen]
        axes.plot(places, heights, marks[at % 6], color=COLOURS[at % 7], markersize=7, label=method)
    axes.set_xticks(range(len(cases)), [case.replace(" ", "\n") for case in cases])
    tidy(axes, x="what is wrong with the training labels", y="test accuracy")
    drawn.legend(loc="outside upper center", ncols=4, fontsize=SMALL, frameon=False)
    return drawn

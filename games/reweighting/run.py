"""Runs of reweighting on digits with labels made wrong on purpose, beside what it has to beat."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from games.errors import MissingExtraError
from games.reweighting.noise import class_dependent, long_tailed, symmetric
from games.reweighting.reweight import Callback, Reweighted, reweight
from games.reweighting.weighting import LabelNetwork, PerExample, Weighting
from games.tuning.data import Digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

DECAY = 1e-2
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
    """One way of training: its test accuracy; for weights, how well they tell wrong labels (AUC), the share of the gap

    from plain training to the oracle that they recover, work in gradients and products, seconds.
    """

    case: str
    method: str
    seed: int
    accuracy: float
    auc: float | None = None
    recovered: float | None = None
    work: int = 0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()


def weightings() -> dict[str, Weighting]:
    """By name."""
    return {"per example": PerExample(), "network": LabelNetwork()}


def spoiled(digits: Digits, case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training images `[n, pixels]`, labels `[n]` as they are seen, and which of them are wrong `[n]`, bool."""
    images, labels, classes = digits.train.images, digits.train.labels, len(digits.classes)
    if case.kind == "long-tailed":
        kept = long_tailed(labels, case.rate, classes=classes, seed=seed)
        return images[kept], labels[kept], torch.zeros(len(kept), dtype=torch.bool)
    made = symmetric if case.kind == "symmetric" else class_dependent
    noisy, wrong = made(labels, case.rate, classes=classes, seed=seed)
    return images, noisy, wrong


def trained(inputs: Tensor, labels: Tensor, weights: Tensor, classes: int) -> dict[str, Tensor]:
    """A softmax classifier trained to its optimum at fixed weights `[n]`, in float64: in less, L-BFGS stalls."""
    inputs, weights = inputs.double(), weights.double()
    blank = torch.zeros((), dtype=inputs.dtype)

    def loss(hold: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        losses = cross_entropy(inputs @ weight.T + bias, labels, reduction="none")
        return (weights * losses).sum() / weights.sum() + DECAY * (weight.square().sum() + bias.square().sum())

    game = bl.Game(
        hold=bl.Player(lambda hold: hold**2, blank),
        model=bl.Player(
            lambda hold, model: loss(hold, **model) + 0.0 * hold,
            {"weight": inputs.new_zeros(classes, inputs.shape[1]), "bias": inputs.new_zeros(classes)},
        ),
    )
    follow = bl.Implicit(bl.Scipy("L-BFGS-B"), steps=500, tolerance=1e-3)
    answer, _ = follow(game, {"hold": blank}, follow.init(game))
    return {name: tensor.detach() for name, tensor in answer.items()}


def accuracy(model: dict[str, Tensor], images: Tensor, labels: Tensor, *, balanced: bool = False) -> float:
    """Share of right answers; `balanced`: the mean over the classes."""
    right = ((images.to(model["bias"]) @ model["weight"].T + model["bias"]).argmax(1) == labels).double()
    if not balanced:
        return float(right.mean())
    return float(torch.stack([right[labels == label].mean() for label in torch.unique(labels)]).mean())


def run_case(
    digits: Digits,
    case: Case,
    seed: int,
    *,
    steps: int = 30,
    checkpoint: Path | None = None,
    callbacks: Sequence[Callback] = (),
    done: Callable[[str, Reweighted], object] = lambda name, found: None,
) -> list[Row]:
    """All ways of training on one case and seed; `checkpoint` is a folder, one file a weighting."""
    try:
        from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError(f"reweighting needs scikit-learn ({error}). pip install 'bilevel[data]'") from error

    inputs, labels, wrong = spoiled(digits, case, seed)
    clean, classes, tail = digits.valid, len(digits.classes), case.kind == "long-tailed"
    ones = torch.ones(len(labels), dtype=inputs.dtype)

    def scored(model: dict[str, Tensor]) -> float:
        return accuracy(model, digits.test.images, digits.test.labels, balanced=tail)

    plain = scored(trained(inputs, labels, ones, classes))
    rows = [
        Row(case.name, "plain", seed, plain),
        Row(case.name, "clean set alone", seed, scored(trained(clean.images, clean.labels, ones[:1], classes))),
    ]
    if tail:
        rarity = 1.0 / torch.bincount(labels, minlength=classes).to(inputs)[labels]
        best = scored(trained(inputs, labels, rarity, classes))
        rows.append(Row(case.name, "inverse frequency", seed, best))
    else:
        best = scored(trained(inputs, labels, (~wrong).to(inputs), classes))
        rows.append(Row(case.name, "oracle", seed, best))
    for name, weighting in weightings().items():
        model = nn.Linear(inputs.shape[1], classes)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        began = time.perf_counter()
        file = None if checkpoint is None else checkpoint / f"{case.name}-{name}-{seed}.pt".replace(" ", "-")
        found = reweight(
            model.to(inputs.dtype),
            (inputs, labels),
            (clean.images, clean.labels),
            weighting=weighting,
            steps=steps,
            weight_decay=DECAY,
            checkpoint=file,
            callbacks=callbacks,
            seed=seed,
        )
        reached = scored({name: p.detach() for name, p in found.model.named_parameters()})
        rows.append(
            Row(
                case.name,
                name,
                seed,
                reached,
                auc=None if tail else float(roc_auc_score((~wrong).numpy(), found.weights.numpy())),
                recovered=(reached - plain) / (best - plain) if best > plain else None,
                work=found.solution.gradients + found.solution.products,
                seconds=time.perf_counter() - began,
                warnings=found.solution.warnings,
            )
        )
        if not tail:
            score = scored(trained(inputs, labels, found.kept().to(inputs), classes))
            share = (score - plain) / (best - plain) if best > plain else None
            rows.append(replace(rows[-1], method=f"{name}, pruned", accuracy=score, auc=None, recovered=share))
        done(f"{case.name}-{name}-{seed}".replace(" ", "-"), found)
    return rows


def write(rows: Sequence[Row], path: Path, settings: dict[str, Any]) -> None:
    """All rows and what they were made with, as JSON."""
    path.write_text(json.dumps({"settings": settings, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


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
                for key in ("accuracy", "auc", "recovered", "seconds")
            }
    return found


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def table(rows: Sequence[Row]) -> Table:
    """Case by method, medians over the seeds."""
    from rich.table import Table

    seeds = len({row.seed for row in rows})
    shown = Table(
        title=f"Test accuracy, medians over {seeds} {'seed' if seeds == 1 else 'seeds'}",
        caption="AUC: how well the weights tell right labels from wrong ones. recovered: of the gap from plain "
        "training to the oracle, who trains without the wrong labels (for a long tail: to inverse frequencies, and "
        "accuracy is the mean over the classes).",
    )
    for column in ("case", "method", "accuracy", "AUC", "recovered", "seconds"):
        shown.add_column(column, justify="left" if column in ("case", "method") else "right")
    for case, methods in medians(rows).items():
        for method, numbers in methods.items():
            cells = [
                "" if numbers[k] is None else form.format(numbers[k])
                for k, form in (("accuracy", "{:.3f}"), ("auc", "{:.3f}"), ("recovered", "{:.0%}"))
            ]
            seconds = f"{numbers['seconds']:.0f}" if numbers["seconds"] else ""
            shown.add_row(case if method == "plain" else "", method, *cells, seconds)
    return shown


def figure(rows: Sequence[Row]) -> Figure:
    """Test accuracy of every method in every case, a dot a seed."""
    from games.paper.style import COLOURS, SMALL, blank, tidy

    drawn = blank(11.0, 5.0)
    axes = drawn.add_subplot()
    cases, methods = list(dict.fromkeys(r.case for r in rows)), list(dict.fromkeys(r.method for r in rows))
    marks = ("o", "s", "^", "D", "v", "P")
    for at, method in enumerate(methods):
        chosen = [row for row in rows if row.method == method]
        places = [cases.index(row.case) + 0.12 * (at - len(methods) / 2) for row in chosen]
        heights = [row.accuracy for row in chosen]
        axes.plot(places, heights, marks[at % 6], color=COLOURS[at % 7], markersize=7, label=method)
    axes.set_xticks(range(len(cases)), [case.replace(" ", "\n") for case in cases])
    tidy(axes, x="what is wrong with the training labels", y="test accuracy")
    drawn.legend(loc="outside upper center", ncols=len(methods), fontsize=SMALL, frameon=False)
    return drawn

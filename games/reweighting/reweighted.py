"""What reweighting learned: a weight for each training example, and what to do with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import bilevel as bl
from bilevel.tree import Variables
from games.errors import MissingExtraError
from games.experiments.style import SMALL, empty_figure, save_figure
from games.reweighting.weighting import LabelNetwork, Weighting

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True, eq=False)
class Reweighted:
    """What `reweight` learned.

    `weights` `[n]` in (0, 1), in the order of the training set; `labels` `[n]` as they came; `model`, a copy of the one
    given, trained at these weights, in eval mode; `losses` `[n]` its own on the training set, which tell wrong labels
    from right ones often better than the weights do. `weighting` and `leader` weigh other examples: `weigh(inputs,
    labels)`. `solution` is the run: its history, residuals, work, seconds and warnings. `started` `[n]` are the weights
    before the first step.
    """

    weights: Tensor
    labels: Tensor
    losses: Tensor
    model: nn.Module
    weighting: Weighting
    leader: Variables
    solution: bl.Solution
    started: Tensor
    inputs: Tensor = field(repr=False)

    def __str__(self) -> str:
        """How weights and losses are spread, and what can be asked for."""
        shares = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
        rows = [
            f"{name}: "
            + ", ".join(f"{value:.3g}" for value in torch.quantile(values.float(), shares.to(values.device)))
            for name, values in (("weights", self.weights), ("losses", self.losses))
        ]
        return (
            f"{len(self.weights)} examples after {len(self.solution.history)} steps; least, quartiles, largest:\n  "
            + "\n  ".join(rows)
            + f"\nkept(): {int(self.kept().sum())}; mean of capped(): {float(self.capped().mean()):.3g}"
        )

    def worst(self, count: int = 25) -> Tensor:
        """The places `[count]` in the training set of the examples that weigh least, least first."""
        return torch.argsort(self.weights)[:count]

    def kept(self, share: float = 0.2) -> Tensor:
        """Which examples to keep `[n]`, bool: those that still weigh `share` of what they weighed at the start.

        To train anew on them, all alike, is often better than to train at the weights: what is hard but right weighs
        little, and is not to be lost with what is wrong. With `LabelNetwork` the default throws out an example whose
        label the network finds five times less likely than a guess. Raises `ValueError` for a share outside 0 to 1.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"Reweighted.kept: share={share}; expected a number from 0 to 1.")
        return self.weights > share * self.started

    def capped(self, share: float = 1.0) -> Tensor:
        """Weights `[n]` in (0, 1] to train anew at: min(1, weights / (share * what they began with)).

        What weighs no less than it did at the start counts fully, so that hard but right examples are not lost, and
        the rest in proportion. It needs no threshold, which `kept` does: the right one depends on how many labels are
        wrong. Raises `ValueError` for a share that is not positive.
        """
        if not share > 0.0:
            raise ValueError(f"Reweighted.capped: share={share}; expected a positive number.")
        return (self.weights / (share * self.started)).clamp(max=1.0)

    def weigh(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """Weights `[m]` of other examples; raises `TypeError` when weights belong to the training set's alone."""
        if not isinstance(self.weighting, LabelNetwork):
            raise TypeError(
                f"{type(self.weighting).__name__} has a number for each training example and none for others. Use "
                "reweight(weighting=LabelNetwork())."
            )
        with torch.no_grad():
            return self.weighting.weights(self.leader, torch.arange(len(labels)), inputs, labels)

    def to_frame(self) -> DataFrame:
        """One row an example: index, label, weight, rank from the least (0), the trained model's loss."""
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError(f"to_frame needs pandas ({error}). pip install 'bilevel[data]'") from error
        rank = torch.argsort(torch.argsort(self.weights))
        columns = {"label": self.labels, "weight": self.weights, "rank": rank, "loss": self.losses}
        return pandas.DataFrame({name: values.cpu().numpy() for name, values in columns.items()}).rename_axis("index")

    def contact_sheet(
        self,
        path: str | Path,
        *,
        count: int = 40,
        columns: int = 10,
        shape: tuple[int, int] | None = None,
        classes: Sequence[str] = (),
    ) -> Path:
        """Write an image of the examples that weigh least, each with the label that it came with and its weight.

        `shape` is that of an image (rows, columns); by default square. Raises `ValueError` when they are no images.
        """
        pixels = self.inputs[0].numel()
        side = round(pixels**0.5)
        rows, across = shape or (side, side)
        if rows * across != pixels:
            raise ValueError(
                f"contact_sheet: an example has {pixels} numbers, which is no image of {rows} x {across}. Give shape=."
            )
        chosen = self.worst(count)
        lines = -(-len(chosen) // columns)
        figure = empty_figure(1.15 * columns, 1.5 * lines)
        for place, index in enumerate(chosen.tolist()):
            axes = figure.add_subplot(lines, columns, place + 1)
            axes.imshow(self.inputs[index].reshape(rows, across).cpu().numpy(), cmap="gray_r")
            label = int(self.labels[index])
            axes.set_title(f"{classes[label] if classes else label}  {float(self.weights[index]):.1g}", fontsize=SMALL)
            axes.axis("off")
        target = Path(path)
        save_figure(figure, target, dpi=110)
        return target

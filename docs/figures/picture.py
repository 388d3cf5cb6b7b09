"""README's first picture: the two programs of docs/tuning, before and after, run and drawn over each other.

`python docs/figures/picture.py` writes docs/tuning/picture.png and prints the test losses; a minute or two on one core.
"""

import statistics
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import bilevel as bl

FOLDER = Path(__file__).resolve().parents[1] / "tuning"


def program(name: str) -> dict[str, Any]:
    """Run one of the two; gives its variables."""
    names: dict[str, Any] = {}
    exec((FOLDER / name).read_text(encoding="utf-8"), names)
    return names


@torch.no_grad()
def accuracy(model: torch.nn.Module, loader: Any) -> tuple[float, float]:
    """Mean loss and share of right answers."""
    model.eval()
    found = [(model(x), y) for x, y in loader]
    logits, labels = torch.cat([a for a, _ in found]), torch.cat([b for _, b in found])
    return float(cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


def main() -> None:
    """Run both, and fresh trainings at fixed values."""
    before, after = program("before.py"), program("after.py")
    tuned = after["tuned"]
    figure = tuned.plot()
    above = figure.axes[0]
    steps = len(before["train_loader"])
    epochs, losses = zip(*before["history"], strict=True)
    above.plot([steps * (epoch + 1) for epoch in epochs], losses, color="0.35", linestyle="--", linewidth=1.8)
    above.annotate("validation, before", (steps * 62, losses[61]), (0, 7), textcoords="offset points", color="0.35")
    above.set_ylim(0.0, 1.5)
    figure.savefig(FOLDER / "picture.png", dpi=100)
    start = bl.retrain(tuned, seeds=2, values=tuned.start)
    found = bl.retrain(tuned, seeds=2)
    rows = {"before": [before["model"]], "the tuned run": [tuned.model]}
    rows |= {"fresh, at the start's values": start.models, "fresh, at the values found": found.models}
    for name, models in rows.items():
        told = [accuracy(model, after["test_loader"]) for model in models]
        mean = [statistics.fmean(column) for column in zip(*told, strict=True)]
        print(f"{name}: test loss {mean[0]:.3f}, accuracy {100 * mean[1]:.1f} %")


if __name__ == "__main__":
    main()

"""The picture of the one idea: one follower, one leader, and what the leader assumes. Writes one_idea.svg beside it.

The follower minimises (y - sin 2x)^2 + 0.1 y^4, whose optimum curves. At x = -0.3 each assumption is a line: the
leader's guess of where the follower would be if the leader moved. The library computes the lines.
"""

from functools import partial
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

import bilevel as bl

HERE = -0.3
OLD = -0.75  # where the follower happens to be: it has not yet caught up


def follow(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (y - torch.sin(2 * x)) ** 2 + 0.1 * y**4


def lead(y: torch.Tensor) -> torch.Tensor:
    return (y - 1) ** 2


def optimum(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    for _ in range(50):  # Newton
        slope = 2 * (y - torch.sin(2 * x)) + 0.4 * y**3
        y = y - slope / (2 + 1.2 * y**2)
    return y


def answer(response: bl.Response) -> tuple[float, float]:
    """Where the follower is at HERE, and its slope, as this response sees them."""
    x = torch.tensor(HERE, dtype=torch.float64)
    start = torch.tensor(OLD, dtype=torch.float64)
    game = bl.Game(x=bl.Player(lead, init=x), y=bl.Player(follow, init=start))
    x = x.requires_grad_()
    y, _ = response(game, {"x": x}, response.init(game))
    (slope,) = torch.autograd.grad(y, x)
    return y.item(), slope.item()


def main() -> None:
    sgd = partial(torch.optim.SGD, lr=0.1)
    adam = partial(torch.optim.Adam, lr=0.01)
    # Okabe and Ito's colours, told apart also by dashes and by their labels.
    views = [
        ("they stand still", (OLD, 0.0), "#000000", (0, (1, 1.5)), (6, -14)),
        ("they take 2 steps\nUnrolled(steps=2)", answer(bl.Unrolled(sgd, steps=2)), "#D55E00", (0, (6, 2)), (8, -22)),
        (
            "they stay at their optimum\nImplicit()",
            answer(bl.Implicit(partial(torch.optim.SGD, lr=0.3), steps=200, tolerance=1e-8)),
            "#0072B2",
            "solid",
            (8, 10),
        ),
        (
            "they follow a learned map\nHypernetwork(scale=0.5)",
            answer(bl.Hypernetwork(adam, scale=0.5, warmup=2000, sampler=bl.responses.Perturbations(count=16))),
            "#009E73",
            (0, (6, 2, 1, 2)),
            (8, -16),
        ),
    ]
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    xs = torch.linspace(-1.3, 1.1, 200, dtype=torch.float64)
    axes.plot(xs, optimum(xs), color="#999999", linewidth=7, alpha=0.55, zorder=1)
    axes.annotate("best response y*(x)", (-1.25, float(optimum(xs[:1]))), (0, 14), textcoords="offset points",
                  fontsize=15, color="#555555")  # fmt: skip
    ends = torch.tensor([HERE, 0.42], dtype=torch.float64)
    for text, (value, slope), colour, dashes, offset in views:
        line = value + slope * (ends - HERE)
        axes.plot(ends, line, color=colour, linestyle=dashes, linewidth=3.2, zorder=3)
        axes.plot([HERE], [value], marker="o", markersize=9, color=colour, zorder=4)
        axes.annotate(text, (float(ends[1]), float(line[1])), offset, textcoords="offset points", fontsize=15,
                      color=colour, va="center")  # fmt: skip
    axes.axvline(HERE, color="#BBBBBB", linewidth=1, zorder=0)
    axes.set_xlim(-1.3, 1.35)
    axes.set_xlabel("the leader's variable x", fontsize=16)
    axes.set_ylabel("the follower's variable y", fontsize=16)
    axes.set_xticks([HERE], ["x now"], fontsize=15)
    axes.set_yticks([])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("If I move, where will you be?", fontsize=18, loc="left")
    with mpl.rc_context({"svg.hashsalt": "one idea", "svg.fonttype": "path"}):
        figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()

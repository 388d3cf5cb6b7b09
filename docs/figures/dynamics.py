"""The paths of several rules on three small games: docs/games/dynamics.png."""

from functools import partial
from pathlib import Path

import torch

import bilevel as bl
from games.experiments.style import SMALL, empty_figure, label_axes

START = torch.tensor(0.5, dtype=torch.float64)
GAMES = {
    "x y": lambda x, y: x * y,
    "-x²/2 + 2xy - 3y²/4": lambda x, y: -0.5 * x**2 + 2 * x * y - 0.75 * y**2,
    "3x²/4 + 2xy + y²/2 - y⁴/4": lambda x, y: 0.75 * x**2 + 2 * x * y + 0.5 * y**2 - 0.25 * y**4,
}
RULES = {
    "simultaneous": (bl.dynamics.Simultaneous(), "-"),
    "alternating": (bl.dynamics.Alternating(), "--"),
    "extragradient": (bl.dynamics.Extragradient(0.1), "-."),
    "symplectic": (bl.dynamics.SymplecticAdjustment(1.0), ":"),
    "competitive": (bl.dynamics.Competitive(0.1), (0, (5, 1, 1, 1, 1, 1))),
}


def path(value, rule, steps=250):
    """Where the players have been `[steps + 1, 2]`, as far as 3 from the origin."""
    game = bl.Game(x=bl.Player(value, START), y=bl.Player(lambda x, y: -value(x, y), START))
    been = [(0.5, 0.5)]

    def note(step, record, variables):
        been.append((float(variables["x"]), float(variables["y"])))

    bl.solve(game, optimizer=partial(torch.optim.SGD, lr=0.1), steps=steps, dynamics=rule, callbacks=(note,))
    return torch.tensor([p for p in been if max(map(abs, p)) < 3.0])


def main():
    figure = empty_figure(13.0, 5.0)
    for index, (title, value) in enumerate(GAMES.items()):
        axes = figure.add_subplot(1, 3, index + 1)
        for name, (rule, line) in RULES.items():
            been = path(value, rule)
            (drawn,) = axes.plot(been[:, 0], been[:, 1], linestyle=line, linewidth=1.3, label=name)
            axes.plot(*been[-1], marker="o", color=drawn.get_color(), markersize=6, fillstyle="none")
        axes.plot(0.5, 0.5, marker="s", color="black", markersize=5)
        axes.plot(0.0, 0.0, marker="+", color="black", markersize=10)
        label_axes(axes, x="x, who minimises", y="y, who maximises" if index == 0 else "", title=title)
        axes.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), aspect="equal")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(RULES), frameon=False, fontsize=SMALL)
    target = Path(__file__).resolve().parents[1] / "games" / "dynamics.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=120)


if __name__ == "__main__":
    main()

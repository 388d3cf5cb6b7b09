"""The paths of several rules on three small games: docs/games/dynamics.png."""

import itertools
from functools import partial
from pathlib import Path

import torch

import bilevel as bl
from games.experiments.style import BLACK, BLUE, DPI, GREEN, PURPLE, RED, SMALL, empty_figure, label_axes

START = torch.tensor(0.5, dtype=torch.float64)
GAMES = {
    "x y": lambda x, y: x * y,
    "-x²/2 + 2xy - 3y²/4": lambda x, y: -0.5 * x**2 + 2 * x * y - 0.75 * y**2,
    "3x²/4 + 2xy + y²/2 - y⁴/4": lambda x, y: 0.75 * x**2 + 2 * x * y + 0.5 * y**2 - 0.25 * y**4,
}
RULES = {
    "simultaneous": (bl.dynamics.Simultaneous(), "-", BLUE),
    "alternating": (bl.dynamics.Alternating(), "--", RED),
    "extragradient": (bl.dynamics.Extragradient(0.1), "-.", GREEN),
    "symplectic": (bl.dynamics.SymplecticAdjustment(1.0), "-", PURPLE),
    "competitive": (bl.dynamics.Competitive(0.1), (0, (4, 1, 1, 1, 1, 1)), BLACK),
}
DRAWN = 70  # steps of a path; the distances show all of them


def path(value, rule, steps=250):
    """Where the players have been `[steps + 1, 2]`, as far as 3 from the origin."""
    game = bl.Game(x=bl.Player(value, START), y=bl.Player(lambda x, y: -value(x, y), START))
    been = [(0.5, 0.5)]

    def note(step, record, variables):
        been.append((float(variables["x"]), float(variables["y"])))

    bl.solve(game, optimizer=partial(torch.optim.SGD, lr=0.1), steps=steps, dynamics=rule, callbacks=(note,))
    return torch.tensor([p for p in been if max(map(abs, p)) < 3.0])


def apart(heights, gap):
    """These heights, moved down to be `gap` apart at least."""
    order = sorted(range(len(heights)), key=lambda i: -heights[i])
    placed = list(heights)
    for above, below in itertools.pairwise(order):
        placed[below] = min(placed[below], placed[above] - gap)
    return placed


def main():
    figure = empty_figure(10.5, 7.4)
    panels = figure.subplots(2, 3)
    for index, (title, value) in enumerate(GAMES.items()):
        above, below = panels[0][index], panels[1][index]
        ends = []
        for rule, line, colour in RULES.values():
            been = path(value, rule)
            some = been[: DRAWN + 1]
            above.plot(some[:, 0], some[:, 1], linestyle=line, linewidth=1.6, color=colour)
            distance = been.norm(dim=1).clamp(min=1e-6).log10()
            below.plot(distance, linestyle=line, linewidth=1.8, color=colour)
            ends.append(float(distance[-1]))
        above.plot(0.5, 0.5, marker="s", color="black", markersize=6)
        above.plot(0.0, 0.0, marker="+", color="black", markersize=12, markeredgewidth=2)
        reach = 1.6 if index == 0 else 0.9
        above.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        label_axes(above, x="x, who minimises", y="y, who maximises" if index == 0 else "", title=title)
        label_axes(below, x="steps", y="distance to the cross" if index == 0 else "")
        below.set_yticks(range(0, -7, -2), ["1", "$10^{-2}$", "$10^{-4}$", "$10^{-6}$"])
        below.set(xlim=(0, 250), ylim=(-6.9, 0.9))
        if index == len(GAMES) - 1:
            for (name, rule), height in zip(RULES.items(), apart(ends, 0.5), strict=True):
                below.text(258, height, name, color=rule[2], fontsize=SMALL, va="center", clip_on=False)
        for axes in (above, below):
            axes.xaxis.label.set_fontsize(SMALL)
            axes.yaxis.label.set_fontsize(SMALL)
            axes.title.set_fontsize(SMALL)
    target = Path(__file__).resolve().parents[1] / "games" / "dynamics.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=DPI)


if __name__ == "__main__":
    main()

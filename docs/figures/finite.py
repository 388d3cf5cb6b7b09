"""Rules of play on a zero-sum game with one mixed equilibrium: docs/games/learning.png."""

from pathlib import Path

import torch

from games.experiments.style import BLACK, COLOURS, LINES, SMALL, empty_figure, label_axes
from games.matrix.learning import EntropicMirrorDescent, FictitiousPlay, RegretMatching, Replicator, learn
from games.matrix.named import biased_rock_paper_scissors
from games.matrix.solvers import LinearProgramme, equilibria

RULES = {
    "fictitious play": FictitiousPlay(),
    "regret matching": RegretMatching(),
    "regret matching +": RegretMatching(plus=True),
    "mirror descent": EntropicMirrorDescent(1.0),
    "optimistic mirror descent": EntropicMirrorDescent(1.0, optimistic=True),
    "replicator": Replicator(1.0),
}
SEEN = sorted({round(10 ** (i / 12)) for i in range(44)})
"""The rounds that are drawn, evenly on a logarithmic axis: 4,000 points of one who circles are a solid block."""


def flat(play):
    """Points of the simplex `[n, 3]` as points of a triangle in the plane."""
    corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]], dtype=torch.float64)
    return (play @ corners).T


def main():
    game = biased_rock_paper_scissors()
    [best] = equilibria(game, LinearProgramme())
    start = [torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.2, 0.2, 0.6]).double()]
    figure = empty_figure(11.5, 4.8)
    simplex, last, average = figure.subplots(1, 3)
    simplex.plot(*flat(torch.eye(3).double()[[0, 1, 2, 0]]), color="0.6", linewidth=1.0)
    for (name, rule), colour, line in zip(RULES.items(), COLOURS, LINES, strict=False):
        found = learn(game, rule, rounds=SEEN[-1], start=start)
        for axes, values in ((last, found.nash_conv), (average, found.average_nash_conv)):
            axes.loglog(SEEN, [values[number - 1] for number in SEEN], line, color=colour, linewidth=1.6, label=name)
        if name in ("mirror descent", "optimistic mirror descent", "replicator"):
            simplex.plot(*flat(found.play[0][:600]), line, color=colour, linewidth=1.2)
    simplex.plot(*flat(best.profile[0][None]), "o", color=BLACK, markersize=11, fillstyle="none")
    for corner, name in zip(flat(torch.eye(3).double()).T, ("rock", "paper", "scissors"), strict=True):
        above = corner[1] > 0.5
        simplex.annotate(
            name, corner, (0, 6 if above else -18), textcoords="offset points", ha="center", fontsize=SMALL
        )
    simplex.set(aspect="equal", xticks=[], yticks=[], xlim=(-0.15, 1.15), ylim=(-0.15, 1.0))
    simplex.spines[:].set_visible(False)
    simplex.set_title("The row player's path", fontsize=SMALL)
    label_axes(last, x="rounds", y="NashConv", title="Last profile")
    label_axes(average, x="rounds", y="", title="Average profile")
    handles, labels = last.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=SMALL)
    figure.savefig(Path(__file__).resolve().parents[1] / "games" / "learning.png", dpi=100)


if __name__ == "__main__":
    main()

"""Reaction curves with the path of play: curves from the games' own gradients, marks from the closed forms."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import bilevel as bl
from games.economics.oligopoly import Bertrand, Cournot
from games.economics.ordered import Contract, TwoRoads
from games.economics.security import Security
from games.experiments.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SMALL, empty_figure, label_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Box = tuple[float, float, float, float]
"""Lowest and highest of the first player's number, then of the second's."""

_sgd = partial(torch.optim.SGD, lr=0.1)
_answer = bl.Implicit(bl.Scipy("L-BFGS-B"), steps=50, tolerance=1e-7)


def path_of_play(
    game: bl.Game, steps: int, start: Mapping[str, float] | None = None, **options: Any
) -> dict[str, Tensor]:
    """Where each player was, `[steps, ...]` in `bl.solve(game, steps=steps, **options)`, from `start`.

    A follower's entries are its answers to its leaders' entries of the same number.
    """
    starts = {name: torch.tensor(value, dtype=torch.float64) for name, value in (start or {}).items()}
    game = bl.Game(**{n: bl.Player(player.objective, starts.get(n, player.init)) for n, player in game.players.items()})
    path: dict[str, list[Any]] = {name: [] if name in options else [game.initial(name)] for name in game.names}

    def note(number: int, record: Mapping[str, float], variables: Mapping[str, Any]) -> None:
        for name, value in variables.items():
            path[name].append(value.detach())

    bl.solve(game, steps=steps, callbacks=[note], **options)
    return {name: torch.stack(values[:steps]) for name, values in path.items()}


def surfaces(game: bl.Game, box: Box, count: int = 121) -> dict[str, tuple[Tensor, Tensor]]:
    """Each player's loss and own slope `[count, count]` over a box of the two players' numbers, rows the second's."""
    one, other = game.names
    x = torch.linspace(box[0], box[1], count, dtype=torch.float64)
    y = torch.linspace(box[2], box[3], count, dtype=torch.float64)
    grid = torch.meshgrid(x, y, indexing="xy")

    def loss_and_slope(player: str) -> tuple[Tensor, Tensor]:
        def loss(a: Tensor, b: Tensor) -> Tensor:
            return game.loss(player, {one: a, other: b})

        both = torch.func.grad_and_value(loss, argnums=0 if player == one else 1)
        slope, value = torch.func.vmap(torch.func.vmap(both))(*grid)
        return value, slope

    return {name: loss_and_slope(name) for name in game.names}


def draw_best_responses(
    axes: Axes, game: bl.Game, box: Box, named: Mapping[str, str], colours: Mapping[str, str]
) -> None:
    """The curve of each player's best responses, where its own slope is 0; `named` is how the legend calls them."""
    found = surfaces(game, box)
    for player, colour in colours.items():
        axes.contour(found[player][1], levels=[0.0], colors=colour, linewidths=2.0, extent=box, origin="lower")
        axes.plot([], [], color=colour, linewidth=2.0, label=f"{named[player]} best responses")


def draw_indifference(axes: Axes, game: bl.Game, box: Box, player: str, at: Tensor, label: str) -> None:
    """Curves along which a player's loss is the same, the thick one through `at` `[2]`."""
    loss = surfaces(game, box)[player][0]
    through = float(game.loss(player, dict(zip(game.names, at, strict=True))))
    spread = float(loss.std())
    levels = [through + spread * step for step in (-0.6, -0.3, 0.0, 0.3, 0.6)]
    widths = [0.6, 0.6, 1.4, 0.6, 0.6]
    axes.contour(loss, levels=levels, colors="0.55", linewidths=widths, linestyles="-", extent=box, origin="lower")
    axes.plot([], [], color="0.55", label=label)


def draw_path(axes: Axes, x: Tensor, y: Tensor, colour: str, label: str = "") -> None:
    """A path with a dot at each step and a square where it began."""
    axes.plot(x, y, "-o", color=colour, markersize=3.5, linewidth=1.0, label=label or None)
    axes.plot(x[:1], y[:1], "s", color=colour, markersize=7)


def mark_answer(axes: Axes, at: Tensor, shape: str, label: str) -> None:
    """A closed form's answer."""
    axes.plot(*at.tolist(), shape, color=BLACK, markersize=13, fillstyle="none", markeredgewidth=1.8, label=label)


def finish_axes(axes: Axes, box: Box, *, x: str, y: str, title: str) -> None:
    """Its names, its box, and its legend below it, where no line is."""
    label_axes(axes, x=x, y=y, title=title)
    axes.set(xlim=box[:2], ylim=box[2:])
    axes.legend(fontsize=SMALL - 2, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def oligopoly_figure(firms: Cournot | Bertrand, box: Box, starts: list[tuple[float, float]], what: str) -> Figure:
    """Two firms: at once on the left, one before the other on the right."""
    game, nash, led = firms.game(), firms.nash(), firms.stackelberg()
    figure = empty_figure(10.5, 5.9)
    left, right = figure.subplots(1, 2)
    named = {"firm1": "firm 1's", "firm2": "firm 2's"}
    draw_best_responses(left, game, box, named, {"firm1": BLUE, "firm2": RED})
    for start, colour in zip(starts, (GREEN, PURPLE, ORANGE), strict=False):
        path = path_of_play(game, 60, dict(zip(game.names, start, strict=True)), optimizer=_sgd)
        draw_path(
            left, path["firm1"], path["firm2"], colour, "both follow their gradients" if start is starts[0] else ""
        )
    mark_answer(left, nash, "o", "Nash")
    finish_axes(left, box, x=f"firm 1's {what}", y=f"firm 2's {what}", title="At once")
    draw_best_responses(right, game, box, named, {"firm2": RED})
    draw_indifference(right, game, box, "firm1", led, "iso-profit curves of firm 1")
    path = path_of_play(game, 60, {"firm1": starts[0][0]}, firm2=_answer, optimizer=_sgd)
    draw_path(right, path["firm1"], path["firm2"], GREEN, "firm 1 leads, firm 2 answers")
    mark_answer(right, nash, "o", "Nash")
    mark_answer(right, led, "D", "Stackelberg")
    finish_axes(right, box, x=f"firm 1's {what}", y="", title="Firm 1 first")
    return figure


def toll_figure(free: tuple[float, float], congestion: tuple[float, float]) -> Figure:
    """Tolls for revenue on the left, for the least time on the right."""
    figure = empty_figure(10.5, 5.9)
    for axes, social in zip(figure.subplots(1, 2), (False, True), strict=True):
        roads = TwoRoads(free, congestion, social)
        game, best = roads.game(), torch.tensor(roads.best_toll(), dtype=torch.float64)
        box = (-0.1, 1.5, 0.0, 1.0)
        there = torch.stack([best, roads.share(best)])
        draw_best_responses(axes, game, box, {"share": "drivers'"}, {"share": RED})
        draw_indifference(axes, game, box, "toll", there, "equal time" if social else "equal revenue")
        for start, colour in ((0.05, GREEN), (1.4, PURPLE)):
            path = path_of_play(game, 60, {"toll": start}, share=_answer, optimizer=_sgd)
            draw_path(axes, path["toll"], path["share"], colour, "the toll leads" if start < 1.0 else "")
        mark_answer(axes, there, "D", "best toll")
        wanted = "Least total time" if social else "Most revenue"
        finish_axes(axes, box, x="toll, in time", y="" if social else "share of drivers on road 1", title=wanted)
    return figure


def contract_figure(contract: Contract, variances: Tensor) -> Figure:
    """The path to one contract, and how noise weakens incentives."""
    figure = empty_figure(10.5, 5.9)
    left, right = figure.subplots(1, 2)
    game, box = contract.game(), (0.0, 1.1, 0.0, 1.1 / contract.cost)
    there = torch.tensor([contract.share(), contract.effort()], dtype=torch.float64)
    draw_best_responses(left, game, box, {"effort": "the agent's"}, {"effort": RED})
    draw_indifference(left, game, box, "share", there, "iso-profit curves of the principal")
    for start, colour in ((0.02, GREEN), (1.05, PURPLE)):
        path = path_of_play(game, 60, {"share": start}, effort=_answer, optimizer=_sgd)
        draw_path(left, path["share"], path["effort"], colour, "the principal leads" if start < 1.0 else "")
    mark_answer(left, there, "D", "best contract")
    finish_axes(left, box, x="share of the output that the agent gets", y="effort", title="One contract")
    solved = []
    for variance in variances.tolist():
        noisy = Contract(contract.cost, contract.risk_aversion, variance)
        # A step of one over the curvature 1 / cost + risk_aversion variance, so that noise does not decide the pace.
        rate = 0.5 / (1.0 / contract.cost + contract.risk_aversion * variance)
        sgd = partial(torch.optim.SGD, lr=rate)
        solved.append(float(path_of_play(noisy.game(), 60, effort=_answer, optimizer=sgd)["share"][-1]))
    fine = torch.linspace(0.0, float(variances.max()), 200).tolist()
    known = [Contract(contract.cost, contract.risk_aversion, variance).share() for variance in fine]
    right.plot(fine, known, color=BLACK, linewidth=1.5, label="closed form")
    right.plot(variances, solved, "o", color=GREEN, markersize=8, fillstyle="none", label="solved")
    label_axes(right, x="variance of the noise", y="share in the best contract", title="More noise, weaker incentives")
    right.set_ylim(0.0, 1.05)
    right.legend(fontsize=SMALL, frameon=False)
    return figure


def security_figure(targets: Security, precisions: tuple[float, ...]) -> Figure:
    """Two targets: whom attackers of growing precision pick, and what each coverage is worth against them."""
    figure = empty_figure(10.5, 5.0)
    left, right = figure.subplots(1, 2)
    best = targets.stackelberg()
    covers = torch.linspace(0.0, 1.0, 401, dtype=torch.float64)
    both = torch.stack([covers, targets.resources - covers], dim=1)
    pays = torch.func.vmap(targets.attacker)(both)
    worth = torch.func.vmap(targets.defender)(both)
    for precision, colour in zip(precisions, (BLUE, GREEN, PURPLE), strict=True):
        attack = (precision * pays).softmax(1)
        left.plot(covers, attack[:, 0], color=colour, linewidth=2.0, label=f"precision {precision:g}")
        right.plot(covers, (attack * worth).sum(1), color=colour, linewidth=2.0)
        response = bl.Implicit(bl.ClosedForm(partial(_quantal, targets, precision)))
        adam = partial(torch.optim.Adam, lr=0.1)
        game = targets.game(precision=precision)
        path = path_of_play(game, 150, optimizer=adam, attack=response)
        cover = torch.stack([targets.coverage(logits) for logits in path["coverage"]])
        chosen = path["attack"].softmax(1)
        value = (chosen * torch.func.vmap(targets.defender)(cover)).sum(1)
        for axes, y in ((left, chosen[:, 0]), (right, value)):
            axes.plot(cover[::3, 0], y[::3], "o", color=colour, markersize=4, fillstyle="none")
            axes.plot(cover[-1:, 0], y[-1:], "o", color=colour, markersize=10)
    for axes in (left, right):
        axes.axvline(float(best.coverage[0]), color="0.5", linewidth=1.2, linestyle="--")
    mark_answer(right, torch.tensor([float(best.coverage[0]), best.defender]), "D", "rational attacker")
    label_axes(
        left,
        x="how often target 1 is guarded",
        y="how often it is attacked",
        title="The attacker's best responses",
    )
    label_axes(right, x="how often target 1 is guarded", y="the defender's payoff", title="What the defender expects")
    left.legend(fontsize=SMALL - 2, frameon=False)
    right.legend(fontsize=SMALL - 2, frameon=False, loc="lower right")
    return figure


def _quantal(targets: Security, precision: float, coverage: Tensor) -> Tensor:
    return precision * targets.attacker(targets.coverage(coverage))


def figures() -> dict[str, Figure]:
    """One for each kind of game, by name."""
    return {
        "cournot": oligopoly_figure(
            Cournot(10.0, 1.0, (1.0, 2.0)), (0.0, 7.0, 0.0, 7.0), [(0.5, 6.5), (6.5, 6.0), (0.5, 0.5)], "quantity"
        ),
        "bertrand": oligopoly_figure(
            Bertrand(10.0, 2.0, 1.5, (1.0, 2.0)), (2.0, 9.0, 2.0, 9.0), [(2.5, 8.5), (8.5, 8.0), (2.5, 2.5)], "price"
        ),
        "toll": toll_figure((0.0, 1.0), (1.0, 0.25)),
        "contract": contract_figure(
            Contract(1.0, 1.0, 1.0), torch.tensor([0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0])
        ),
        "security": security_figure(
            Security(prize=(5.0, 3.0), caught=(-1.0, 0.0), lost=(-5.0, -2.0), saved=(1.0, 0.5)), (0.5, 2.0, 8.0)
        ),
    }

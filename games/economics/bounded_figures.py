"""Figures of games in which bounds decide: curves by closed forms or the followers' answers, marks by `bl.solve`."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

import bilevel as bl
from games.economics.bounded import Budget, CapacityCournot, SignedContract
from games.economics.network import Network, braess, city
from games.economics.solved import CONTRACT, MARKET, TARGETS, answer, flows, solved_contract, solved_market
from games.economics.solved import solved_targets as solved_guards
from games.experiments.style import BLACK, BLUE, GREEN, PURPLE, RED, SMALL, empty_figure, label_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def capacity_figure(market: CapacityCournot) -> Figure:
    """The leader's profit, in pieces, for three capacities of its rival."""
    figure = empty_figure(8.5, 5.5)
    axes = figure.subplots()
    quantities = torch.linspace(0.0, 9.0, 361).tolist()
    for capacity, colour, place in ((1.0, BLUE, 5.3), (2.0, GREEN, 6.15), (4.0, RED, 3.2)):
        limited = replace(market, capacity=capacity)
        profits = [limited.profit(q) for q in quantities]
        axes.plot(quantities, profits, color=colour, linewidth=2.0)
        best = float(solved_market(limited).variables["firm1"])
        axes.plot([best], [limited.profit(best)], "o", color=colour, markersize=11)
        known = limited.stackelberg()[0]
        axes.plot([known], [limited.profit(known)], "D", color=BLACK, markersize=15, fillstyle="none")
        label = f"rival makes at most {capacity:g}"
        above = 0.35 if capacity < 3.0 else -1.6
        axes.text(place, limited.profit(place) + above, label, color=colour, fontsize=SMALL)
    axes.set_ylim(0.0, 18.0)
    label_axes(axes, x="the leader's quantity", y="the leader's profit", title="A rival at its capacity stays there")
    axes.text(2.2, 0.6, "dots: solved; diamonds: closed form", fontsize=SMALL)
    return figure


def braess_figure(roads: Network) -> Figure:
    """Path flows and total time against the toll, with the corner at which nobody takes the short cut."""
    figure = empty_figure(10.5, 4.9)
    left, right = figure.subplots(1, 2)
    tolls = torch.linspace(0.0, roads.highest, 41, dtype=torch.float64)
    found = torch.stack([flows(roads, toll[None]) for toll in tolls])
    cut = next(number for number, (_, path) in enumerate(roads.paths) if len(path) == 3)
    other = next(number for number in range(3) if number != cut)
    left.plot(tolls, found[:, cut], color=RED, linewidth=2.2)
    left.plot(tolls, found[:, other], color=BLUE, linewidth=2.2)
    left.text(7.6, 1.15, "the short cut", color=RED, fontsize=SMALL)
    left.text(0.2, 2.85, "each other path", color=BLUE, fontsize=SMALL)
    label_axes(left, x="toll on the short cut, in minutes", y="drivers on a path", title="Who drives where")
    right.plot(tolls, [float(roads.total_time(flow)) / 6.0 for flow in found], color=BLUE, linewidth=2.2)
    best = bl.solve(roads.game(), flow=answer, optimizer=bl.Scipy("SLSQP"), steps=30)
    end = [float(best.variables["toll"]), best.values["toll"] / 6.0]
    right.plot(end[:1], end[1:], "o", color=GREEN, markersize=11)
    right.text(end[0] + 0.3, end[1] + 0.5, "solved", color=GREEN, fontsize=SMALL)
    right.text(13.3, 84.9, "from 13 on nobody\ntakes the short cut", fontsize=SMALL)
    right.set_ylim(82.0, 93.0)
    label_axes(right, x="toll on the short cut, in minutes", y="minutes for each driver", title="Time of a trip")
    for axes in (left, right):
        axes.axvline(13.0, color="0.5", linewidth=1.2, linestyle="--")
    return figure


def city_figure(roads: Network) -> Figure:
    """How full each road is, without tolls and with the best ones."""
    figure = empty_figure(10.5, 5.4)
    best = bl.solve(roads.game(), flow=answer, optimizer=bl.Scipy("SLSQP"), steps=25)
    known = [(link.start, link.end) for link in roads.links]
    for axes, toll in zip(
        figure.subplots(1, 2), (torch.zeros(3, dtype=torch.float64), best.variables["toll"]), strict=True
    ):
        flow = flows(roads, toll)
        on_roads = (roads.incidence @ flow).tolist()
        for (start, end), load in zip(known, on_roads, strict=True):
            x, y = (int(start[0]), int(end[0])), (int(start[1]), int(end[1]))
            tolled = (start, end) in roads.tolled
            axes.plot(x, y, color=RED if tolled else BLUE, linewidth=0.8 + 2.2 * load, solid_capstyle="butt")
            middle = (0.5 * sum(x), 0.5 * sum(y))
            side = (0.0, 0.13) if y[0] == y[1] else (0.17, 0.0)
            axes.text(
                middle[0] + side[0], middle[1] + side[1], f"{load:.1f}", fontsize=SMALL - 2, ha="center", va="center"
            )
        for place, (start, end) in enumerate(roads.tolled):
            across, up = 0.5 * (int(start[0]) + int(end[0])), 0.5 * (int(start[1]) + int(end[1]))
            side = (0.0, -0.16) if start[1] == end[1] else (-0.3, 0.0)
            axes.text(
                across + side[0], up + side[1], f"toll {float(toll[place]):.2f}", color=RED, fontsize=SMALL, ha="center"
            )
        axes.set(xlim=(-0.35, 3.45), ylim=(-0.35, 3.35), xticks=[], yticks=[])
        total = float(roads.total_time(flow))
        title = f"{'Without tolls' if not bool(toll.any()) else 'The best tolls'}: total time {total:.2f}"
        label_axes(axes, x="numbers: drivers on each road", y="", title=title, grid=False)
    return figure


def signed_figure(contract: SignedContract) -> Figure:
    """Share, sum and the price of participation against what the agent gets elsewhere, through three regimes."""
    figure = empty_figure(8.5, 5.5)
    axes = figure.subplots()
    outside = torch.linspace(0.0, 0.2, 201).tolist()
    known = torch.tensor([replace(contract, outside=value).best() for value in outside])
    for column, (colour, told) in enumerate(((BLUE, "share"), (GREEN, "fixed sum"), (RED, "price of participation"))):
        axes.plot(outside, known[:, column], color=colour, linewidth=2.2)
        axes.text(
            0.203,
            float(known[-1, column]) + (0.02 if column == 2 else 0.0),
            told,
            color=colour,
            fontsize=SMALL,
            va="center",
        )
    solved = torch.linspace(0.01, 0.19, 10).tolist()
    points = torch.stack([solved_contract(replace(contract, outside=value)) for value in solved])
    for column, colour in ((0, BLUE), (1, GREEN)):
        axes.plot(solved, points[:, column], "o", color=colour, markersize=8, fillstyle="none")
    for x, told in ((0.012, "a rent is left"), (0.068, "both\nbind"), (0.14, "the sum is free")):
        axes.text(x, 1.08, told, fontsize=SMALL, va="center")
    for edge in (0.0625, 1.0 / 9.0):
        axes.axvline(edge, color="0.6", linewidth=1.0, linestyle="--")
    axes.set(xlim=(0.0, 0.27), ylim=(-0.05, 1.18))
    label_axes(axes, x="what the agent gets elsewhere", y="", title="Lines: closed form. Dots: solved")
    return figure


def budget_figure(targets: Budget) -> Figure:
    """Coverage and attack as the budget grows."""
    figure = empty_figure(10.5, 4.9)
    left, right = figure.subplots(1, 2)
    budgets = torch.linspace(0.1, 1.8, 18).tolist()
    ends = [solved_guards(replace(targets, budget=value)) for value in budgets]
    colours, marks = (BLUE, RED, PURPLE), ("o", "s", "^")
    for axes, who in ((left, "coverage"), (right, "attack")):
        values = torch.stack([end.variables[who] for end in ends])
        for target, (colour, mark) in enumerate(zip(colours, marks, strict=True)):
            axes.plot(budgets, values[:, target], f"-{mark}", color=colour, markersize=5, linewidth=1.8)
            axes.text(
                1.84, float(values[-1, target]), f"target {target + 1}", color=colour, fontsize=SMALL, va="center"
            )
        axes.set(xlim=(0.0, 2.2), ylim=(-0.03, 1.03))
    label_axes(left, x="budget", y="how often a target is guarded", title="The defender's best coverage")
    label_axes(right, x="budget", y="the attacker's effort", title="The attacker's response")
    return figure


def bounded_figures() -> dict[str, Figure]:
    """One for each kind of game, by name."""
    with warnings.catch_warnings():
        # Corners: SLSQP may try steps to the end where it is at its optimum, and kinks are what is shown.
        warnings.simplefilter("ignore", bl.errors.BilevelWarning)
        return {
            "capacity": capacity_figure(MARKET),
            "braess": braess_figure(braess()),
            "city": city_figure(city()),
            "signed": signed_figure(CONTRACT),
            "budget": budget_figure(TARGETS),
        }

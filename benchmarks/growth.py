"""How the cost of one hypergradient grows with the follower's weights, the leader's entries, and the inner steps.

Tanh networks on 128 random examples; one log decay for each group of weights. CPU seconds are the least of some rounds,
peak memory is counted (see equal_work/run.py). Slopes are those of log cost on log size over the upper half of each
range: 1 is proportional. Float32, one thread.

    python benchmarks/growth.py --output docs/performance/growth.json

`--players` measures a step of `solve` with 10 to 1,000 players instead, each with two numbers: CPU seconds, the least
of two, and how much more memory the process holds at its most than before it, each game in a process of its own.

    python -m benchmarks.growth --players --output docs/performance/players.json
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from benchmarks.head import head
from benchmarks.long_runs import apart
from bilevel.comparison.memory import peak_bytes

LR = 0.05


def game_of(weights: int, leaders: int) -> tuple[bl.Game, dict[str, Tensor]]:
    """A network of about so many weights (64 inputs, two hidden layers alike, 10 outputs), so many log decays."""
    torch.manual_seed(0)
    width = max(4, round((-74 + math.sqrt(74**2 + 4 * weights)) / 2))
    widths = (64, width, width, 10)
    start = [a**-0.5 * torch.randn(b, a) for a, b in itertools.pairwise(widths)]
    images, labels = torch.randn(256, 64), torch.randint(10, (256,))
    count = sum(w.numel() for w in start)
    leaders = min(leaders, count)
    groups = torch.arange(count) * leaders // count

    def fit(weights: tuple[Tensor, ...], rows: slice) -> Tensor:
        hidden = images[rows]
        for weight in weights[:-1]:
            hidden = torch.tanh(hidden @ weight.T)
        return cross_entropy(hidden @ weights[-1].T, labels[rows])

    def follow(decay: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        every = torch.cat([w.reshape(-1) for w in weights])
        strengths = decay.exp() if leaders == 1 else decay.exp()[groups]
        return fit(weights, slice(0, 128)) + (strengths * every.square()).sum()

    game = bl.Game(
        decay=bl.Player(lambda weights: fit(weights, slice(128, 256)), torch.zeros(leaders)),
        weights=bl.Player(follow, tuple(start)),
    )
    return game, {"weights": count, "leaders": leaders}


def responses(game: bl.Game, steps: int) -> dict[str, bl.Response]:
    """Each kind with so many steps, iterations or terms."""
    still = bl.ClosedForm(lambda: game.initial("weights"))
    return {
        "unrolled": bl.Unrolled(partial(torch.optim.SGD, lr=LR, momentum=0.9), steps=steps),
        "conjugate gradients": bl.Implicit(
            still, tolerance=None, linear_solver=bl.ConjugateGradient(rtol=None, max_steps=steps)
        ),
        "Neumann": bl.Implicit(
            still,
            tolerance=None,
            linear_solver=bl.Neumann(rtol=None, max_steps=steps, step_size=0.05, power_steps=0),
        ),
        "learned, low rank": bl.Hypernetwork(
            partial(torch.optim.Adam, lr=1e-3), network=bl.networks.LowRank(10), tolerance=None
        ),
    }


def cost(game: bl.Game, response: bl.Response, rounds: int) -> dict[str, float]:
    """CPU seconds and peak bytes of one hypergradient."""
    state = response.init(game)

    def run() -> None:
        decay = game.initial("decay").requires_grad_()
        weights, _ = response(game, {"decay": decay}, state)
        torch.autograd.grad(game.loss("decay", {"decay": decay, "weights": weights}), decay)

    run()
    taken = []
    for _ in range(rounds):
        began = time.process_time()
        run()
        taken.append(time.process_time() - began)
    return {"seconds": min(taken), "bytes": peak_bytes(run, torch.device("cpu"))}


def slope(rows: list[dict], key: str, axis: str) -> float:
    """Of log cost on log size, over the upper half."""
    upper = rows[len(rows) // 2 :]
    xs, ys = ([math.log(row[name]) for row in upper] for name in (axis, key))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum((a - x) ** 2 for a in xs)


# Many players ------------------------------------------------------------------------------------------------------

PLAYERS = (10, 50, 200, 1000)
FEW = {"seconds": 50, "bytes": 200}
SGD = partial(torch.optim.SGD, lr=LR)


def named(names: Sequence[str], function: Callable[[Mapping[str, Any]], Tensor]) -> Callable[..., Tensor]:
    """A function of variables by name as one with parameters of these names, as a player's functions are."""

    def loss(**given: Any) -> Tensor:
        return function(given)

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    loss.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return loss


def crowd(kind: str, count: int) -> tuple[bl.Game, list[str]]:
    """A game of one leader and so many followers, and who follows; or of so many leaders, or pairs."""
    ones, zero = torch.ones(2), torch.zeros(2)
    mine, theirs = ([f"{letter}{index}" for index in range(count)] for letter in "yx")

    def numbers(variables: Any) -> Tensor:
        return variables(ones) if kind == "modules" else variables

    def pull(own: str, towards: str, also: str | None, given: Mapping[str, Any]) -> Tensor:
        gap = numbers(given[own]) - given[towards]
        return (gap if also is None else gap - 0.1 * given[also]).square().sum()

    def follower(own: str, towards: str, also: str | None = None) -> bl.Player:
        reads = [own, towards, *filter(None, [also])]
        return bl.Player(
            named(reads, partial(pull, own, towards, also)), nn.Linear(2, 2) if kind == "modules" else zero
        )

    if kind == "leaders":
        neighbours = zip(mine, mine[1:] + mine[:1], strict=True)
        return bl.Game(**{own: follower(own, other) for own, other in neighbours}), []
    if kind == "pairs":
        leads = {
            x: bl.Player(
                named([x, y], lambda given, x=x, y=y: (given[y] - 1).square().sum() + given[x].square().sum()), zero
            )
            for x, y in zip(theirs, mine, strict=True)
        }
        return bl.Game(**leads, **{y: follower(y, x) for x, y in zip(theirs, mine, strict=True)}), mine
    width = max(1, count // 4)
    also: dict[str, str] = {}
    if kind == "chained":  # in four levels
        also = {own: mine[index - width] for index, own in enumerate(mine) if index >= width}
    elif kind == "joined":
        also = dict(zip(mine, mine[1:] + mine[:1], strict=True))
    lead = named(mine, lambda given: torch.stack([(numbers(y) - 1).square().sum() for y in given.values()]).sum())
    game = bl.Game(x=bl.Player(lead, zero), **{own: follower(own, "x", also.get(own)) for own in mine})
    return (game.joined(all=mine), ["all"]) if kind == "joined" else (game, mine)


def crowds() -> list[tuple[str, str, dict[str, Any]]]:
    """What is measured: the kind of game, what the players do, and the options of `solve`."""
    implicit = partial(bl.Implicit, SGD, steps=2, tolerance=None)
    unrolled, conjugate = bl.Unrolled(SGD, steps=2), implicit(linear_solver=bl.ConjugateGradient())
    every: dict[str, bl.Response] = {
        "Unrolled": unrolled,
        "conjugate gradients": conjugate,
        "Neumann": implicit(linear_solver=bl.Neumann(rtol=None, max_steps=5, step_size=0.1, power_steps=0)),
        "GMRES": implicit(linear_solver=bl.GMRES()),
        "Dense": implicit(linear_solver=bl.linear.Dense()),
        "Nudged": bl.Nudged(SGD, steps=2, tolerance=None),
        "learned": bl.Hypernetwork(SGD, tolerance=None),
        "SingleLoop": bl.SingleLoop(SGD),
    }
    rules: dict[str, bl.dynamics.Dynamics] = {
        "Simultaneous": bl.dynamics.Simultaneous(),
        "Alternating": bl.dynamics.Alternating(),
        "LOLA": bl.dynamics.LOLA(0.1),
    }
    found: list[tuple[str, str, dict[str, Any]]] = [("independent", name, {"each": own}) for name, own in every.items()]
    found += [(kind, "Unrolled", {"each": unrolled}) for kind in ("chained", "modules", "joined", "pairs")]
    found += [(kind, "conjugate gradients", {"each": conjugate}) for kind in ("chained", "modules", "pairs")]
    return found + [("leaders", name, {"dynamics": rule}) for name, rule in rules.items()]


def step_of(kind: str, count: int, options: dict[str, Any]) -> dict[str, float]:
    """CPU seconds of a step, and bytes that the run took at its most."""
    torch.manual_seed(0)
    given = {name: option for name, option in options.items() if name != "each"}

    def play(game: bl.Game, followers: list[str]) -> dict[str, float]:
        responses = dict.fromkeys(followers, options["each"]) if followers else {}
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
        before, ends = memory("VmRSS"), [0.0]

        def look(*_: Any) -> None:
            ends.append(time.process_time())

        bl.solve(game, optimizer=SGD, steps=3, callbacks=[look], **given, **responses)
        return {"seconds": min(ends[2] - ends[1], ends[3] - ends[2]), "bytes": memory("VmHWM") - before}

    play(*crowd(kind, 5))  # what is imported at first use
    return play(*crowd(kind, count))


def memory(key: str) -> int:
    """The process's memory in bytes, now (VmRSS) or at its most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


def players() -> list[dict[str, Any]]:
    """A sweep for each of the `crowds`."""
    found = []
    for kind, name, options in crowds():
        rows = [{"players": count, **apart(partial(step_of, kind, count, options))} for count in PLAYERS]
        by = {row["players"]: row for row in rows}
        # How many times a player of 1,000 costs what one of 50 does; memory of 50 is lost in what the process has free.
        grown = {f"{key} a player": by[1000][key] / by[few][key] * few / 1000 for key, few in FEW.items()}
        found.append({"game": kind, "response": name, **grown, "rows": rows})
        print(found[-1], flush=True)
    return found


def main() -> None:
    """Three sweeps, or those of players."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--quick", action="store_true", help="up to a hundred thousand weights")
    options.add_argument("--players", action="store_true", help="a step of solve with 10 to 1,000 players instead")
    options.add_argument("--output", type=Path, default=Path("growth.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if chosen.players:
        chosen.output.write_text(json.dumps({**head(), "sweeps": players()}, indent=1) + "\n")
        return
    most = 5 if chosen.quick else 7
    sweeps = {
        "weights": [(10**k, 10, 5) for k in range(3, most + 1)],
        "leaders": [(10 ** (most - 1), 10**k, 5) for k in range(most)],
        "steps": [(10 ** (most - 2), 10, steps) for steps in (5, 10, 20, 50, 100, 200)],
    }
    found = []
    for axis, points in sweeps.items():
        rows: dict[str, list[dict]] = {}
        for weights, leaders, steps in points:
            game, sizes = game_of(weights, leaders)
            for name, response in responses(game, steps).items():
                if axis == "steps" and name not in ("unrolled", "Neumann"):
                    continue  # the one takes none, the other stops when it is done
                told = {"axis": axis, "response": name, **sizes, "steps": steps, **cost(game, response, chosen.rounds)}
                rows.setdefault(name, []).append(told)
                print(told, flush=True)
        for name, some in rows.items():
            slopes = {f"{key} slope": slope(some, key, axis) for key in ("seconds", "bytes")}
            found.append({"axis": axis, "response": name, **slopes, "rows": some})
    chosen.output.write_text(json.dumps({**head(), "sweeps": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

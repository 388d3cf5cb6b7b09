"""What every response keeps of a call that it should not: live tensors and the process's memory over many calls.

A follower of 100,000 numbers; each call is a hypergradient and an `after_backward`. `tensors` and `bytes` are what
Python can reach after each tenth of the calls, and `resident` what the process holds: a graph that leads back to what
holds it is seen in the last alone. A response that leaks nothing has the same numbers in the last nine rows. Writes
JSON.

    python benchmarks/leaks.py --output leaks.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bilevel as bl
from benchmarks.head import head
from bilevel.inner import ClosedForm, TorchOptimizer
from bilevel.responses import GaussNewton

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.5)
OPTIONS = TorchOptimizer(
    SGD, clip_norm=1e3, accumulate=2, scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.999)
)


def follow(x: Tensor, y: Tensor) -> Tensor:
    """Ten leaders move 100,000 numbers."""
    return 0.5 * (y - x.repeat(len(y) // len(x))).square().sum() + 0.01 * y.pow(4).sum()


def outputs(x: Tensor, y: Tensor) -> Tensor:
    """What the first part of `follow` is a half square of."""
    return y - x.repeat(len(y) // len(x))


def half_square(outputs: Tensor) -> Tensor:
    """Of them."""
    return 0.5 * outputs.square().sum()


def rest(y: Tensor) -> Tensor:
    """The second part."""
    return 0.01 * y.pow(4).sum()


def lead(y: Tensor) -> Tensor:
    """Anything of y."""
    return (y - 3.0).square().mean()


def game_of(size: int) -> bl.Game:
    """Ten entries lead, `size` follow."""
    return bl.Game(x=bl.Player(lead, torch.ones(10)), y=bl.Player(follow, torch.zeros(size)))


def tasks_of(size: int) -> bl.Game:
    """Two such followers at once, each with a number of its own."""

    def fit(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        return follow(x, y) + (batch * y).sum()

    def judge(y: Tensor, batch: Tensor) -> Tensor:
        return lead(y) + batch.square().sum()

    batch = {part: torch.tensor([[0.1], [0.2]]) for part in ("support", "query")}
    players = {"x": bl.Player(judge, torch.ones(10)), "y": bl.Player(fit, torch.zeros(size))}
    return bl.Tasks(**players, data=[batch]).together(batch)


def cases(size: int) -> dict[str, tuple[Callable[[int], bl.Game], bl.Response]]:
    """What makes the game, and the response."""
    return {n: (tasks_of if n.startswith("Tasks") else game_of, response) for n, response in responses(size).items()}


def responses(size: int) -> dict[str, bl.Response]:
    """Every response, and every way of differentiating, for a follower of `size`."""
    exact = partial(bl.Implicit, tolerance=None, steps=4)
    return {
        "Unrolled, ReverseMode": bl.Unrolled(SGD, steps=4),
        "Unrolled, Segments": bl.Unrolled(SGD, steps=4, differentiation=bl.Segments(count=2)),
        "Unrolled, ForwardMode": bl.Unrolled(SGD, steps=4, differentiation=bl.ForwardMode()),
        "Unrolled, options": bl.Unrolled(OPTIONS, steps=4),
        "Unrolled, options, Segments": bl.Unrolled(OPTIONS, steps=4, differentiation=bl.Segments(count=2)),
        "Unrolled, options, ForwardMode": bl.Unrolled(OPTIONS, steps=4, differentiation=bl.ForwardMode()),
        "Implicit, ConjugateGradient": exact(SGD),
        "Implicit, GMRES": exact(SGD, linear_solver=bl.GMRES()),
        "Implicit, Neumann": exact(SGD, linear_solver=bl.Neumann()),
        "Implicit, AdamPreconditioner": exact(
            partial(torch.optim.Adam, lr=0.1),
            linear_solver=bl.ConjugateGradient(preconditioner=bl.linear.AdamPreconditioner()),
        ),
        "Implicit, ClosedForm": exact(ClosedForm(lambda x: x.repeat(size // 10))),
        "Implicit, options": exact(OPTIONS),
        "Implicit, GaussNewton": exact(SGD, curvature=GaussNewton(outputs, half_square, rest, measure=True)),
        "Hypernetwork": bl.Hypernetwork(SGD, tolerance=None, network=bl.networks.LowRank(2)),
        "Nudged": bl.Nudged(SGD, steps=4, tolerance=None),
        "SingleLoop": bl.SingleLoop(partial(torch.optim.SGD, lr=0.1)),
        "Tasks, Unrolled": bl.Unrolled(SGD, steps=4),
        "Tasks, Implicit": exact(SGD),
    }


def calls(response: bl.Response, game: bl.Game, count: int) -> Iterator[int]:
    """After each call its number; the state goes on."""
    state = response.init(game)
    for call in range(count):
        x = torch.ones(10, requires_grad=True)
        y, state = response(game, {"x": x}, state)
        lead(y).backward()  # type: ignore[no-untyped-call]
        state = response.after_backward(state, y)
        del x, y
        yield call


def live() -> tuple[int, int]:
    """How many tensors Python can reach, and their bytes."""
    gc.collect()
    tensors = [found for found in gc.get_objects() if type(found) is Tensor]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(tensors), sum(storages.values())


def resident() -> int:
    """What the process holds, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measured(response: bl.Response, game: bl.Game, count: int) -> list[dict[str, Any]]:
    """A row for each tenth of the calls."""
    rows = []
    for call in calls(response, game, count):
        if (call + 1) % (count // 10) == 0:
            tensors, held = live()
            rows.append({"calls": call + 1, "tensors": tensors, "bytes": held, "resident": resident()})
    return rows


def main() -> None:
    """Run every response and write what it keeps."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, default=Path("leaks.json"))
    options.add_argument("--calls", type=int, default=1000)
    options.add_argument("--size", type=int, default=100_000)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, (made, response) in cases(chosen.size).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", bl.BilevelWarning)
            found[name] = measured(response, made(chosen.size), chosen.calls)
        first, last = found[name][1], found[name][-1]
        grown = (last["resident"] - first["resident"]) / (last["calls"] - first["calls"])
        told = f"tensors {first['tensors']} -> {last['tensors']}, resident {grown:+.0f} bytes a call"
        print(f"{name:32} {told}", flush=True)
        chosen.output.write_text(json.dumps({**head(), "size": chosen.size, "rows": found}, indent=1))


if __name__ == "__main__":
    main()

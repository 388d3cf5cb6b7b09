"""What grows over 10,000 steps of a tiny game: the process's memory, the time of a step, the checkpoint.

Every response, every way of differentiating, every linear solver and every rule of play, each in a process of its own.
Three numbers lead, three follow. Slopes are medians of those between any two of the last eight of ten rows: bytes of
resident memory a step, the checkpoint's bytes a step, and how much longer, relatively, a step at the end takes than one
after a fifth of the run. The history takes eight bytes a number, in memory and in the checkpoint. Also `Game(...)` of
up to 1,000 players, and a step in which all lead.

    python -m benchmarks.long_runs --output docs/resuming/long_runs.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bilevel as bl
from benchmarks.head import head
from bilevel import dynamics, linear, responses
from bilevel.variance import SAGA, SARAH

SGD, ADAM = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.Adam, lr=0.05)
D = torch.float64
BATCHES = 4
ROWS = torch.randn(BATCHES, 2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=D)


def outputs(y: Tensor, batch: Tensor) -> Tensor:
    return batch[:, :3] @ y


def fit(outputs: Tensor, batch: Tensor) -> Tensor:
    return 0.5 * (outputs - batch[:, 3]).square().mean()


def penalty(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x.exp() * y.square()).sum()


def follow(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
    return fit(outputs(y, batch), batch) + penalty(x, y)


def lead(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
    return fit(outputs(y, batch), batch) + 0.05 * x.square().sum()


def ridge(batches: int = 1) -> bl.Game:
    """Three log penalties lead a regression."""
    return bl.Game(
        x=bl.Player(lead, torch.zeros(3, dtype=D), data=list(ROWS[:batches, 0])),
        y=bl.Player(follow, torch.zeros(3, dtype=D), data=list(ROWS[:batches, 1])),
    )


def duel() -> bl.Game:
    """Two who lead, each with a curvature of its own and a product between them."""

    def own(a: Tensor, b: Tensor, sign: float) -> Tensor:
        return 0.5 * a.square().sum() + sign * (a * b).sum() + 0.1 * a.sum()

    return bl.Game(
        x=bl.Player(lambda x, y: own(x, y, 1.0), torch.ones(3, dtype=D)),
        y=bl.Player(lambda x, y: own(y, x, -1.0), torch.ones(3, dtype=D)),
    )


def tasks() -> bl.Tasks:
    """A start for three small tasks."""
    batch = {"support": list(ROWS[:3, 0]), "query": list(ROWS[:3, 1])}
    batch = {part: torch.stack(rows) for part, rows in batch.items()}

    def judge(task: nn.Module, batch: Tensor) -> Tensor:
        return fit(task(batch[:, :3]).squeeze(-1), batch)

    torch.manual_seed(0)
    net, start = nn.Linear(3, 1).to(D), nn.Linear(3, 1).to(D)
    return bl.Tasks(meta=bl.Player(judge, net), task=bl.Player(judge, start, start=lambda meta: meta), data=[batch])


def variants() -> dict[str, Callable[[], tuple[bl.Game, dict[str, Any]]]]:
    """What is run, by name: a game and the options of `solve`."""

    def answered(response: bl.Response, batches: int = 1, **options: Any) -> Callable[[], Any]:
        return lambda: (ridge(batches), {"y": response, **options})

    implicit = partial(bl.Implicit, tolerance=None, steps=2)
    conjugate = bl.ConjugateGradient
    solvers: dict[str, linear.LinearSolver] = {
        "ConjugateGradient": conjugate(),
        "Diagonal": conjugate(preconditioner=linear.Diagonal()),
        "BlockDiagonal": conjugate(preconditioner=linear.BlockDiagonal()),
        "NystromPreconditioner": conjugate(preconditioner=linear.NystromPreconditioner(rank=2)),
        "Recycled": conjugate(preconditioner=linear.Recycled(size=2)),
        "HypergradientTolerance": conjugate(stopping=linear.HypergradientTolerance(1e-3)),
        "Extrapolated": linear.Extrapolated(conjugate()),
        "GMRES": bl.GMRES(),
        "Neumann": bl.Neumann(),
        "Nystrom": bl.Nystrom(rank=2, damping=1e-2),
        "Dense": linear.Dense(),
        "Identity": linear.Identity(),
    }
    rules: dict[str, bl.dynamics.Dynamics] = {
        "Simultaneous": dynamics.Simultaneous(),
        "Alternating": dynamics.Alternating(),
        "TwoTimescale": dynamics.TwoTimescale({"y": 5.0}),
        "Extragradient": dynamics.Extragradient(0.1),
        "Optimistic": dynamics.Optimistic(),
        "NegativeMomentum": dynamics.NegativeMomentum(),
        "Consensus": dynamics.Consensus(),
        "SymplecticAdjustment": dynamics.SymplecticAdjustment(),
        "LookAhead": dynamics.LookAhead(0.1),
        "Competitive": dynamics.Competitive(0.1),
        "LOLA": dynamics.LOLA(0.1),
        "ExactLOLA": dynamics.ExactLOLA(0.1),
        "FollowTheRidge": dynamics.FollowTheRidge(),
        "TotalGradient": dynamics.TotalGradient(),
    }
    methods: dict[str, dynamics.ValueFunctionMethod] = {
        "F2SA2": dynamics.F2SA2(steps=2),
        "F2SA": dynamics.F2SA(steps=2),
        "BOME": dynamics.BOME(steps=2),
        "VPBGD": dynamics.VPBGD(steps=2),
    }
    gauss_newton = responses.GaussNewton(outputs, fit, penalty)
    return {
        "Unrolled, ReverseMode": answered(bl.Unrolled(ADAM, steps=2)),
        "Unrolled, Segments": answered(bl.Unrolled(ADAM, steps=2, differentiation=bl.Segments(count=2))),
        "Unrolled, ForwardMode": answered(bl.Unrolled(ADAM, steps=2, differentiation=bl.ForwardMode())),
        "Unrolled, minibatches": answered(bl.Unrolled(SGD, steps=2), BATCHES),
        **{f"Implicit, {name}": answered(implicit(SGD, linear_solver=solver)) for name, solver in solvers.items()},
        "Implicit, AdamPreconditioner": answered(
            implicit(ADAM, linear_solver=conjugate(preconditioner=linear.AdamPreconditioner()))
        ),
        "Implicit, LBFGSPreconditioner": answered(
            implicit(torch.optim.LBFGS, linear_solver=conjugate(preconditioner=linear.LBFGSPreconditioner()))
        ),
        "Implicit, StochasticGradient": answered(
            implicit(SGD, linear_solver=linear.StochasticGradient(step_size=0.1, max_steps=2)), BATCHES
        ),
        "Implicit, GaussNewton": answered(implicit(SGD, curvature=gauss_newton)),
        "Implicit, Geometric": answered(bl.Implicit(SGD, steps=4, tolerance=1e-3, inexactness=responses.Geometric())),
        "Hypernetwork": answered(bl.Hypernetwork(SGD, tolerance=None)),
        "Hypernetwork, in place": answered(
            bl.Hypernetwork(SGD, tolerance=None, memory=responses.Memory(in_place=True))
        ),
        "Nudged": answered(bl.Nudged(SGD, steps=2, tolerance=None)),
        "SingleLoop": answered(bl.SingleLoop(SGD)),
        "SingleLoop, SAGA": answered(
            bl.SingleLoop(SGD, variance=SAGA()), BATCHES, dynamics=dynamics.VarianceReduced(SAGA())
        ),
        "SingleLoop, SARAH": answered(
            bl.SingleLoop(SGD, variance=SARAH(period=10)), BATCHES, dynamics=dynamics.VarianceReduced(SARAH(period=10))
        ),
        "Tasks, Unrolled": lambda: (tasks(), {"task": bl.Unrolled(SGD, steps=2)}),
        **{
            f"ValueFunction, {name}": lambda method=method: (
                ridge(), {"dynamics": bl.ValueFunction(SGD, method=method)},
            )
            for name, method in methods.items()
        },
        **{name: lambda rule=rule: (duel(), {"dynamics": rule}) for name, rule in rules.items()},
    }  # fmt: skip


def resident() -> int:
    """What the process holds, in bytes, once the allocator has given back what is free."""
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rows_of(game: bl.Game, options: dict[str, Any], steps: int, path: Path) -> list[dict[str, float]]:
    """Ten rows: memory, processor's seconds since the last row, and the checkpoint's size, a tenth of the run apart."""
    found: list[dict[str, float]] = []
    every, since = steps // 10, [0.0]

    def look(step: int, record: Mapping[str, float], variables: Mapping[str, Any]) -> None:
        if step % every == 1:  # after the save of the step before
            size = path.stat().st_size
            if step > 1:
                found[-1] |= {"checkpoint": size, "numbers": len(record)}
            since[0] = time.process_time()
        if step % every == 0:
            found.append({"step": step, "seconds": time.process_time() - since[0], "resident": resident()})

    optimizer = {} if "optimizer" in options else {"optimizer": partial(torch.optim.SGD, lr=1e-3)}
    bl.solve(game, steps=steps, checkpoint=path, checkpoint_every=every, callbacks=[look], **optimizer, **options)
    found[-1] |= {"checkpoint": path.stat().st_size, "numbers": found[-2]["numbers"]}
    return found


def slope(rows: list[dict[str, float]], key: str) -> float:
    """The median of the slopes between any two of the last eight, a step: one row that is off moves it little."""
    pairs = itertools.combinations(rows[-8:], 2)
    return statistics.median((b[key] - a[key]) / (b["step"] - a["step"]) for a, b in pairs)


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """The three slopes."""
    mean = sum(row["seconds"] for row in rows[-8:]) / 8
    return {
        "milliseconds a step": 1e3 * mean / (rows[1]["step"] - rows[0]["step"]),
        "longer": slope(rows, "seconds") * (rows[-1]["step"] - rows[2]["step"]) / mean,
        "history bytes a step": 8 * rows[-1]["numbers"],
        "resident bytes a step": slope(rows, "resident"),
        "checkpoint bytes a step": slope(rows, "checkpoint"),
    }


def apart(work: Callable[[], Any]) -> Any:
    """What `work` returns, in a process of its own."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        told: dict[str, Any] = {"failed": "ended without a word"}
        try:
            told = {"found": work()}
        except BaseException as error:
            told = {"failed": f"{type(error).__name__}: {error}"}
        finally:
            with os.fdopen(writing, "w") as stream:
                json.dump(told, stream)
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        told = json.load(stream)
    os.waitpid(pid, 0)
    if "failed" in told:
        raise RuntimeError(told["failed"])
    return told["found"]


def players(count: int, modules: bool) -> dict[str, float]:
    """Seconds to make a game of so many, each with a neighbour, and for a step in which all lead."""

    def loss_of(own: str, other: str) -> Callable[..., Tensor]:
        inputs = "(ones)" if modules else ""
        code = f"lambda {own}, {other}: ({own}{inputs} - 0.5 * {other}{inputs} - 1.0).square().sum()"
        loss: Callable[..., Tensor] = eval(code, {"ones": torch.ones(2)})  # parameters are players' names
        return loss

    names = [f"p{index}" for index in range(count)]
    made = {
        own: bl.Player(loss_of(own, other), nn.Linear(2, 1) if modules else torch.zeros(2))
        for own, other in zip(names, names[1:] + names[:1], strict=True)
    }
    began = time.process_time()
    game = bl.Game(**made)
    making = time.process_time() - began
    bl.solve(game, optimizer=SGD, steps=1)  # whatever is imported at first use
    took = []
    for steps in (1, 3):
        began = time.process_time()
        bl.solve(game, optimizer=SGD, steps=steps)
        took.append(time.process_time() - began)
    return {"players": count, "modules": modules, "making": making, "a step": (took[1] - took[0]) / 2}


def main() -> None:
    """Every variant, and games of many players."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--only", action="append", help="variants; repeat it for several")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file; what it has is not measured again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    done: dict[str, Any] = {}
    if options.output is not None and options.output.exists():
        done = json.loads(options.output.read_text(encoding="utf-8"))
        done = done if done["steps"] == options.steps and done["versions"] == head()["versions"] else {}
    found: dict[str, Any] = done.get("variants", {})
    many: list[dict[str, float]] = done.get("players", [])
    failed: list[str] = []
    for count, modules in itertools.product((125, 250, 500, 1000), (False, True)):
        if not options.only and (count, modules) not in {(one["players"], one["modules"]) for one in many}:
            many.append(apart(partial(players, count, modules)))
            print(many[-1], flush=True)
    for name, make in variants().items():
        if name in found or (options.only and name not in options.only):
            continue

        def work(make: Callable[[], Any] = make) -> list[dict[str, float]]:
            with tempfile.TemporaryDirectory() as folder:
                return rows_of(*make(), options.steps, Path(folder) / "run.pt")

        try:
            rows = apart(work)
        except RuntimeError as error:  # told, and the others are measured
            failed.append(name)
            print(f"{name:<32}{error}", flush=True)
            continue
        found[name] = {**summary(rows), "rows": rows}
        told = "".join(f"{key} {value:+.4g}  " for key, value in summary(rows).items())
        print(f"{name:<32}{told}", flush=True)
        if options.output is not None:
            options.output.parent.mkdir(exist_ok=True)
            content = {**head(), "steps": options.steps, "variants": found, "players": many}
            options.output.write_text(json.dumps(content, indent=1) + "\n")
    if failed:
        raise SystemExit(f"These did not run to their end: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""Hypergradients on a device: whether they are those of the CPU, and what they cost beside a plain training step.

Right: every response and linear solver on a small classifier in float64, on the device and on the CPU; the difference
in units of the hypergradient. Times: tanh networks of 7,850 to 100 million weights on 128 random examples, ten log
decays, float32; a plain training step (gradient, SGD with momentum) and one hypergradient of each response, the least
seconds of some rounds, on CUDA until the device has finished, else of the processor; and peak memory in copies of the
weights. What does not fit into the memory says so. Half precision: the same under autocast, and the cosine with
float32's hypergradient. Writes JSON with the device's name, after each row.

    python -m benchmarks.device --device cuda --output docs/performance/device.json
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy

import bilevel as bl
from benchmarks.growth import LR, game_of
from benchmarks.head import head
from bilevel import linear
from bilevel.comparison.memory import peak_bytes
from bilevel.files import write_whole

SGD = torch.optim.SGD
STEPS, LEADERS = 10, 10
SIZES = {"cpu": [7_850, 1_000_000], "cuda": [7_850, 1_000_000, 10_000_000, 100_000_000]}
LOOP, CALLS = "single loop", 3
"""Before a hypergradient is held against another: `SingleLoop` has none to speak of at its first call."""
Row = dict[str, Any]


def small(device: torch.device) -> bl.Game:
    """A softmax classifier of 24 weights with a penalty for each class, the same numbers on each device."""
    drawn = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 8, generator=drawn, dtype=torch.float64).to(device)
    labels = torch.randint(3, (60,), generator=drawn).to(device)

    def fit(weights: Tensor, batch: Any) -> Tensor:
        return cross_entropy(batch[0] @ weights, batch[1])

    def follow(decay: Tensor, weights: Tensor, batch: Any) -> Tensor:
        return fit(weights, batch) + (decay.exp() * weights.square()).sum()

    like = {"dtype": torch.float64, "device": device}
    return bl.Game(
        decay=bl.Player(fit, torch.full((3,), -2.0, **like), [(inputs[30:], labels[30:])]),
        weights=bl.Player(follow, torch.zeros(8, 3, **like), [(inputs[:30], labels[:30])]),
    )


def everyone() -> dict[str, bl.Response]:
    """Every response that draws nothing, and the implicit one with every linear solver and preconditioner."""
    inner = partial(SGD, lr=0.5, momentum=0.5)
    implicit = partial(bl.Implicit, inner, steps=300, tolerance=None)
    solvers = {
        "conjugate gradients": linear.ConjugateGradient(rtol=1e-10),
        "GMRES": linear.GMRES(rtol=1e-10),
        "Neumann": linear.Neumann(rtol=1e-10, max_steps=500),
        "identity": linear.Identity(),
        "dense": linear.Dense(),
        "diagonal": linear.ConjugateGradient(rtol=1e-10, preconditioner=linear.Diagonal()),
        "blocks": linear.ConjugateGradient(rtol=1e-10, preconditioner=linear.BlockDiagonal()),
        "recycled": linear.ConjugateGradient(rtol=1e-10, preconditioner=linear.Recycled()),
    }
    return {
        "unrolled": bl.Unrolled(inner, steps=30),
        "unrolled, segments": bl.Unrolled(inner, steps=30, differentiation=bl.Segments()),
        "unrolled, forward": bl.Unrolled(inner, steps=30, differentiation=bl.ForwardMode()),
        "last step": bl.responses.LastStep(inner, steps=30),
        "nudged": bl.Nudged(inner, steps=300),
        "single loop": bl.SingleLoop(partial(SGD, lr=0.5)),
        "implicit, pairs of L-BFGS": bl.Implicit(
            partial(torch.optim.LBFGS, line_search_fn="strong_wolfe"),
            steps=300,
            tolerance=None,
            linear_solver=linear.ConjugateGradient(rtol=1e-10, preconditioner=linear.LBFGSPreconditioner()),
        ),
        **{f"implicit, {name}": implicit(linear_solver=solver) for name, solver in solvers.items()},
    }


def hypergradient(game: bl.Game, response: bl.Response) -> Tensor:
    """The last of a few, at one leader."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.BilevelWarning)
        call = calls(game, response, anew=False)
        return [call() for _ in range(CALLS)][-1].cpu()


def right(device: torch.device) -> list[Row]:
    """The largest difference from the CPU's, beside the largest entry of the CPU's."""
    rows = []
    for name, response in everyone().items():
        here, there = (hypergradient(small(where), response) for where in (torch.device("cpu"), device))
        rows.append({"response": name, "difference": float((there - here).abs().max() / here.abs().max())})
    return rows


def timed() -> dict[str, Callable[[bl.Game], bl.Response]]:
    """Each kind with ten steps, products or terms."""
    inner = partial(SGD, lr=LR, momentum=0.9)

    def still(game: bl.Game, solver: linear.LinearSolver) -> bl.Response:
        return bl.Implicit(bl.ClosedForm(lambda: game.initial("weights")), tolerance=None, linear_solver=solver)

    few = {"rtol": None, "max_steps": STEPS}
    return {
        "unrolled": lambda _: bl.Unrolled(inner, steps=STEPS),
        "unrolled, segments": lambda _: bl.Unrolled(inner, steps=STEPS, differentiation=bl.Segments()),
        "last step": lambda _: bl.responses.LastStep(inner, steps=STEPS),
        "nudged": lambda _: bl.Nudged(inner, steps=STEPS),
        LOOP: lambda _: bl.SingleLoop(partial(SGD, lr=LR)),
        "implicit, conjugate gradients": lambda game: still(game, linear.ConjugateGradient(damping=1.0, **few)),
        "implicit, Neumann": lambda game: still(game, linear.Neumann(step_size=0.05, power_steps=0, **few)),
        "implicit, identity": lambda game: still(game, linear.Identity()),
        "learned, low rank": lambda _: bl.Hypernetwork(
            partial(torch.optim.Adam, lr=1e-3), network=bl.networks.LowRank(10), tolerance=None
        ),
    }


def training_step(game: bl.Game) -> Callable[[], object]:
    """What a person's own loop does once."""
    decay, weights = game.initial("decay"), [w.requires_grad_() for w in game.initial("weights")]
    optimizer = SGD(weights, lr=LR, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        game.loss("weights", {"decay": decay, "weights": tuple(weights)}).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def calls(game: bl.Game, response: bl.Response, *, anew: bool) -> Callable[[], Tensor]:
    """A call and its hypergradient, from the state that the one before has left or, if `anew`, all from one state.

    A linear solve that goes on from its last answer, at the same leader, would have nothing to do.
    """
    state = response.init(game)
    batch = game.draw("decay", game.start("decay", 0))[0]

    def call() -> Tensor:
        nonlocal state
        decay = game.initial("decay").requires_grad_()
        weights, after = response(game, {"decay": decay}, state)
        loss = game.loss("decay", {"decay": decay, "weights": weights}, batch)
        (found,) = torch.autograd.grad(loss, decay)
        after = response.after_backward(after, weights)
        state = state if anew else after
        return found.detach()

    return call


def called(game: bl.Game, make: Callable[[bl.Game], bl.Response], anew: bool) -> Callable[[], Tensor]:
    """`calls` of the response that `make` makes for the game."""
    return calls(game, make(game), anew=anew)


def seconds(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """The least of some rounds, after one that is not counted: the processor's own, or on CUDA those of the wall."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    taken = []
    for _ in range(rounds + 1):
        finished(device)
        began = clock()
        work()
        finished(device)
        taken.append(clock() - began)
    return min(taken[1:])


def finished(device: torch.device) -> None:
    """Wait for what the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def times(size: int, device: torch.device, rounds: int, report: Callable[[Row], None]) -> None:
    """Rows of one size."""
    with device:
        game, counts = game_of(size, LEADERS)
    copy = 4 * counts["weights"]
    kinds: dict[str, Callable[[bl.Game], Callable[[], Any]]] = {"a training step": training_step}
    for name, response in timed().items():
        kinds[name] = partial(called, make=response, anew=name != LOOP)
    for name, make in kinds.items():
        row: Row = {"weights": counts["weights"], "row": name}
        found: Tensor | None = None
        for kind, around in (("float32", nullcontext()), ("bfloat16", torch.autocast(device.type, torch.bfloat16))):
            try:
                with warnings.catch_warnings(), around:
                    warnings.simplefilter("ignore", bl.BilevelWarning)
                    work = make(game)
                    took = seconds(work, device, rounds)
                    held = peak_bytes(work, device) / copy
                    value = work()
            except torch.OutOfMemoryError as error:
                row[kind] = {"failed": str(error).split("\n")[0][:200]}
                continue
            row[kind] = {"seconds": took, "copies": held}
            if kind == "float32":
                found = value
            elif found is not None:
                row[kind]["cosine"] = float(cosine_similarity(found.double(), value.double(), dim=0))
        report(row)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", type=int, nargs="+", help="weights; on the CPU up to a million by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.device.type == "cpu":
        torch.set_num_threads(1)
    name = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else "CPU, one thread"
    result: Row = {**head(), "device": name, "rounds": options.rounds, "right": right(options.device), "times": []}

    def report(row: Row) -> None:
        result["times"].append(row)
        write_whole(options.output, (json.dumps(result, indent=1) + "\n").encode())
        print(row, flush=True)

    for size in options.sizes or SIZES[options.device.type]:
        times(size, options.device, options.rounds, report)


if __name__ == "__main__":
    main()

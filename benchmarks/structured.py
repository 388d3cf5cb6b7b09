"""Learned responses of 10 million weights to 10 hyperparameters: seconds, memory, and how right the slope is.

One step of plain Adam, and one step of fitting a learned response, on the same MLP, loss and batch of 128 (eight log
decays, and the sizes of two noises), float32. Calls of ten fitting steps are interleaved with plain steps in one
process; a ratio is the median of a call's CPU seconds a step, its recentring and its answer to the leader included,
over those of the plain steps beside it. A round adds the leader's own gradient to both. Memory is the peak of the bytes
that the tensors of weights, fit and leader hold, counted; and the peak of a process of its own for each case, less what
it held after its imports, in which is one more copy of the weights, where the game starts.

Then three games whose Jacobian is known: ridge regression on whitened digits, which rows can follow exactly; on digits
as they are, which they cannot; and an MLP. For each network the cosine and the relative error of the learned Jacobian,
the residual that the response reports of itself, and the best that rows, or rows and columns, could do.

    python benchmarks/structured.py --output structured.json      # about eight minutes; --quick takes one
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy, linear, one_hot

import bilevel as bl
from benchmarks.head import head
from bilevel.comparison.memory import peak_bytes
from bilevel.responses import Memory, Perturbations
from bilevel.tree import Variables, flatten, leaves, structure_of

WIDTHS = {"whole": (784, 2240, 2240, 1400, 10), "quick": (784, 700, 500, 200, 10)}
ADAM = partial(optim.Adam, lr=1e-4, fused=True)
STEPS = 10  # of fitting, in one call
SHARED: dict[str, Any] = {"scale": 0.1, "steps": STEPS, "tolerance": None, "examine_every": 10_000}
LEAN = SHARED | {"memory": Memory(in_place=True), "sampler": Perturbations(antithetic=False)}
CASES = {
    "rows": bl.Hypernetwork(ADAM, network=bl.networks.RowScaled(), **LEAN),
    "rows, examined at every call": bl.Hypernetwork(
        ADAM, network=bl.networks.RowScaled(), **(LEAN | {"examine_every": 1})
    ),
    "rows, one step a call": bl.Hypernetwork(ADAM, network=bl.networks.RowScaled(), **(LEAN | {"steps": 1})),
    "rows, copies": bl.Hypernetwork(ADAM, network=bl.networks.RowScaled(), **(LEAN | {"memory": Memory()})),
    "rows, antithetic": bl.Hypernetwork(ADAM, network=bl.networks.RowScaled(), **(LEAN | {"sampler": Perturbations()})),
    "rows and columns": bl.Hypernetwork(ADAM, network=bl.networks.RowColumnScaled(), **LEAN),
    "low-rank layers, 4": bl.Hypernetwork(ADAM, network=bl.networks.LowRankLayers(4), **LEAN),
    "low-rank layers, 10": bl.Hypernetwork(ADAM, network=bl.networks.LowRankLayers(10), **LEAN),
    "low-rank layers, 20": bl.Hypernetwork(ADAM, network=bl.networks.LowRankLayers(20), **LEAN),
    "self-tuning": bl.Hypernetwork(ADAM, network=bl.networks.SelfTuning(), **LEAN),
    "low rank, 2": bl.Hypernetwork(ADAM, network=bl.networks.LowRank(2), **LEAN),
    "dense": bl.Hypernetwork(ADAM, network=bl.networks.Linear(), **LEAN),
}
EXACT = torch.float64


def main() -> None:
    """Measure and write what came out; in a child process, one case's memory."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, default=Path("structured.json"))
    options.add_argument("--quick", action="store_true", help="a smaller network, fewer rounds")
    options.add_argument("--memory-of", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    widths = WIDTHS["quick" if chosen.quick else "whole"]
    if chosen.memory_of:
        print(json.dumps(memory(chosen.memory_of, widths)))
        return
    fits = 150 if chosen.quick else 6000
    results = {
        "weights": sum(p.numel() for p in mlp(widths).parameters()),
        "steps_a_call": STEPS,
        "steps": seconds(widths, rounds=3 if chosen.quick else 5),
        "memory": {name: in_a_process(name, quick=chosen.quick) for name in ("plain", *CASES)},
        "jacobians": {name: fidelity(made(), fits) for name, made in KNOWN.items()},
    }
    content = {**head(), "quick": chosen.quick, "fits": fits, **results}
    chosen.output.parent.mkdir(parents=True, exist_ok=True)
    chosen.output.write_text(json.dumps(content, indent=2) + "\n")
    show(content)


# The large network -------------------------------------------------------------------------------------------------


def mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def predicted(weights: dict[str, Tensor], images: Tensor, noises: Sequence[Tensor]) -> Tensor:
    """Logits; multiplicative noise on the images and on the first hidden layer, of these sizes."""
    tensors = list(weights.values())
    values = images
    for index in range(0, len(tensors), 2):
        if index < 2 * len(noises):
            values = values * (1 + noises[index // 2] * torch.randn_like(values))
        values = linear(values, tensors[index], tensors[index + 1])
        values = values.relu() if index < len(tensors) - 2 else values
    return values


def train_loss(hyper: Tensor, weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = cross_entropy(predicted(weights, batch[0], hyper[8:].exp().unbind()), batch[1])
    return loss + sum(h.exp() * w.square().sum() for h, w in zip(hyper[:8], weights.values(), strict=True))


def valid_loss(weights: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(predicted(weights, batch[0], ()), batch[1])


HYPER = torch.tensor([-9.0] * 8 + [-2.0] * 2)


def batch_of(inputs: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(128, inputs, generator=generator), torch.randint(10, (128,), generator=generator)


def plain(widths: Sequence[int]) -> tuple[Callable[[], None], Callable[[], None]]:
    """A step of plain Adam, and a gradient of the validation loss."""
    weights = dict(mlp(widths).named_parameters())
    optimizer, batch = ADAM(list(weights.values())), batch_of(widths[0])

    def step() -> None:
        optimizer.zero_grad()
        train_loss(HYPER, weights, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def validate() -> None:
        torch.autograd.grad(valid_loss(weights, batch), list(weights.values()))

    return step, validate


def learned(response: bl.Hypernetwork, game: bl.Game, widths: Sequence[int]) -> Callable[[], Callable[[], None]]:
    """A call, which returns the leader's gradient as a second one."""
    states, batch = [response.init(game)], batch_of(widths[0])

    def call() -> Callable[[], None]:
        hyper = (HYPER + 0.01 * torch.randn(10)).requires_grad_()
        answer = [None]
        answer[0], states[0] = response(game, {"hyper": hyper}, states[0])

        def lead() -> None:
            torch.autograd.grad(valid_loss(answer.pop(), batch), hyper)  # type: ignore[arg-type]

        return lead

    return call


def large_game(widths: Sequence[int]) -> bl.Game:
    weights = {name: p.detach() for name, p in mlp(widths).named_parameters()}
    batch = batch_of(widths[0])
    return bl.Game(hyper=bl.Player(valid_loss, HYPER, [batch]), weights=bl.Player(train_loss, weights, [batch]))


def seconds(widths: Sequence[int], rounds: int) -> dict[str, dict[str, float]]:
    """CPU seconds a step, a case at a time so that only one holds its memory, each interleaved with plain Adam."""
    step, validate = plain(widths)
    found = {}
    for name, response in CASES.items():
        call = learned(response, large_game(widths), widths)
        call()()
        rows = []
        for _ in range(rounds):
            alone = timed(step, response.steps)
            valid = timed(validate, 1)
            began = time.process_time()
            lead = call()
            fitted = time.process_time() - began
            led = timed(lead, 1)
            each = (alone / response.steps, fitted / response.steps)
            rows.append((*each, fitted / alone, (fitted + led) / (alone + valid), led / valid))
        plain_s, step_s, ratio, whole, leader = (statistics.median(column) for column in zip(*rows, strict=True))
        found[name] = {
            "plain_seconds": plain_s, "step_seconds": step_s, "step_ratio": ratio,
            "round_ratio": whole, "leader_ratio": leader,
        }  # fmt: skip
        print(f"{name}: {step_s:.3f} s a step, plain {plain_s:.3f} s, ratio {ratio:.2f}", flush=True)
    return found


def timed(work: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        work()
    return time.process_time() - began


# Memory ------------------------------------------------------------------------------------------------------------


def in_a_process(name: str, *, quick: bool) -> dict[str, int]:
    """The memory of one case, in bytes; freed memory goes back to the system at once."""
    command = [sys.executable, __file__, "--memory-of", name, *(["--quick"] if quick else [])]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def memory(name: str, widths: Sequence[int]) -> dict[str, int]:
    """Peaks of two calls with the leader's gradient, or of as many plain steps."""
    small = nn.Linear(4, 4)  # what torch itself takes at its first backward and step is nobody's
    small(torch.zeros(1, 4)).sum().backward()
    ADAM(list(small.parameters())).step()

    def work(game: bl.Game | None) -> None:
        if game is None:
            step, validate = plain(widths)
            for _ in range(2):
                step()
                validate()
        else:
            call = learned(CASES[name], game, widths)
            for _ in range(2):
                call()()

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: the imports' is not the case's
    game = None if name == "plain" else large_game(widths)
    work(game)
    whole = resident("VmHWM") - before
    return {"process": whole, "tensors": peak_bytes(partial(work, game), torch.device("cpu"))}


def resident(which: str) -> int:
    """Bytes that Linux says this process holds, or held at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


# Known Jacobians ---------------------------------------------------------------------------------------------------

Known = tuple[bl.Game, Tensor, list[Tensor], list[Tensor]]
"""A game of "decay" and "weights", the decay `[m]`, the optimum's leaves and the Jacobian's, `[*shape, m]`."""


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.data[:500], dtype=EXACT) / 16, torch.tensor(data.target[:500])


def ridge(*, white: bool) -> Known:
    """Ten outputs, each with its own decay: W_r = (G + e^x_r)^-1 b_r, where G = 1 on whitened pixels."""
    images, labels = digits()
    if white:
        images = images[:, images.std(0) > 0.05]
        images = torch.linalg.svd(images - images.mean(0), full_matrices=False).U * len(images) ** 0.5
    size, columns = images.shape
    gram, targets = images.T @ images / size, (one_hot(labels).to(EXACT) - 0.1).T @ images / size

    def follow(decay: Tensor, weights: Tensor) -> Tensor:
        fit = 0.5 * (weights @ gram * weights).sum() - (weights * targets).sum()
        return fit + 0.5 * (decay.exp() * weights.square().sum(1)).sum()

    def best(decay: Tensor) -> Tensor:
        eye = torch.eye(columns, dtype=EXACT)
        return torch.stack([torch.linalg.solve(gram + d.exp() * eye, row) for d, row in zip(decay, targets)])  # noqa: B905 - tensors of ten

    decay = torch.full((10,), 0.0 if white else -1.5, dtype=EXACT)
    jacobian = torch.func.jacrev(best)(decay)
    start = torch.zeros(10, columns, dtype=EXACT)
    game = bl.Game(decay=bl.Player(nothing_else, decay), weights=bl.Player(follow, start))
    return game, decay, [best(decay)], [jacobian]


def nothing_else(weights: Variables) -> Tensor:
    return sum((w.square().sum() for w in leaves(weights)), torch.zeros((), dtype=EXACT))


def small_mlp(hidden: int = 8) -> Known:
    """64-8-10 with tanh: a decay for each hidden unit, one for the second layer, one for the biases; -H^-1 f_yx."""
    images, labels = digits()

    def follow(decay: Tensor, weights: dict[str, Tensor]) -> Tensor:
        a, b, c, d = weights.values()
        loss = cross_entropy(torch.tanh(images @ a.T + b) @ c.T + d, labels)
        first = (decay[:hidden].exp() * a.square().sum(1)).sum()
        biases = b.square().sum() + d.square().sum()
        return loss + 0.5 * (first + decay[-2].exp() * c.square().sum() + decay[-1].exp() * biases)

    decay, generator = torch.full((hidden + 2,), -4.5, dtype=EXACT), torch.Generator().manual_seed(0)
    shapes = {"a": (hidden, 64), "b": (hidden,), "c": (10, hidden), "d": (10,)}
    start = {k: torch.randn(s, generator=generator, dtype=EXACT) / s[-1] ** 0.5 for k, s in shapes.items()}
    optimum = {k: v.clone().requires_grad_() for k, v in start.items()}
    lbfgs = optim.LBFGS(
        list(optimum.values()), max_iter=5000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        lbfgs.zero_grad()
        loss = follow(decay, optimum)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    lbfgs.step(closure)
    form, y = structure_of(start), flatten(optimum).detach()
    slope = torch.func.grad(lambda y, x: follow(x, form.unflatten(y)))
    hessian, mixed = torch.func.jacrev(slope)(y, decay), torch.func.jacrev(slope, argnums=1)(y, decay)
    jacobian = -torch.linalg.solve(hessian, mixed)
    parts = [torch.stack(column, -1) for column in zip(*(form.split(j) for j in jacobian.T), strict=True)]
    # From near the optimum: another basin would have another Jacobian.
    near = {k: v.detach() + 0.05 * torch.randn(v.shape, generator=generator, dtype=EXACT) for k, v in optimum.items()}
    game = bl.Game(decay=bl.Player(nothing_else, decay), weights=bl.Player(follow, near))
    return game, decay, form.split(y), parts


KNOWN: dict[str, Callable[[], Known]] = {
    "ridge, whitened": lambda: ridge(white=True),
    "ridge, digits": lambda: ridge(white=False),
    "mlp, digits": small_mlp,
}
NETWORKS = {
    "dense": bl.networks.Linear(),
    "low rank, 2": bl.networks.LowRank(2),
    "rows": bl.networks.RowScaled(),
    "rows and columns": bl.networks.RowColumnScaled(),
    "self-tuning": bl.networks.SelfTuning(),
    "low-rank layers, 4": bl.networks.LowRankLayers(4),
    "low-rank layers, 10": bl.networks.LowRankLayers(10),
    "low-rank layers, 20": bl.networks.LowRankLayers(20),
}


def fidelity(known: Known, fits: int) -> dict[str, dict[str, float]]:
    """What each network learned of a known Jacobian, by one gradient a step as in the large game."""
    game, decay, optimum, truth = known
    found = {}
    for name, network in NETWORKS.items():
        response = bl.Hypernetwork(
            partial(optim.Adam, lr=0.01), scale=0.3, network=network, warmup=fits, steps=1, tolerance=None,
            sampler=Perturbations(antithetic=False),
            scheduler=partial(optim.lr_scheduler.CosineAnnealingLR, T_max=fits + 1),
        )  # fmt: skip
        x = decay.clone().requires_grad_()
        answer, state = response(game, {"decay": x}, response.init(game))
        report = response.report(state)
        jacobian = [slope_of(leaf, x) for leaf in leaves(answer)]
        found[name] = {
            "cosine": cosine(jacobian, truth),
            "error": norm([a - b for a, b in zip(jacobian, truth, strict=True)]) / norm(truth),
            "residual": report.residual,
            "stationarity": report.stationarity,
        }
        print(f"  {name}: cosine {found[name]['cosine']:.3f}, residual {report.residual:.2f}", flush=True)
    for name, columns in (("rows", False), ("rows and columns", True)):
        nearest = [projected(w, j, columns=columns) for w, j in zip(optimum, truth, strict=True)]
        found[name]["best_possible_cosine"] = cosine(nearest, truth)
    return found


def slope_of(leaf: Tensor, x: Tensor) -> Tensor:
    """d leaf / d x `[*shape, m]`, by a pullback of the pullback."""
    probe = torch.zeros_like(leaf).requires_grad_()
    (pulled,) = torch.autograd.grad(leaf, x, probe, create_graph=True, retain_graph=True)
    return torch.stack([torch.autograd.grad(entry, probe, retain_graph=True)[0] for entry in pulled], -1)


def projected(leaf: Tensor, jacobian: Tensor, *, columns: bool) -> Tensor:
    """The nearest Jacobian that scales rows, or rows and columns, of a leaf."""
    if leaf.ndim < 2:
        return jacobian
    basis = [mask[:, None] * leaf for mask in torch.eye(len(leaf), dtype=EXACT)]
    if columns:
        basis += [mask * leaf for mask in torch.eye(leaf.shape[1], dtype=EXACT)]
    span = torch.stack([matrix.flatten() for matrix in basis], 1)
    factors = torch.linalg.lstsq(span, jacobian.flatten(0, 1), driver="gelsd").solution
    return (span @ factors).reshape(jacobian.shape)


def norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).norm())


def cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    products = sum(float((a * b).sum()) for a, b in zip(one, other, strict=True))
    return products / (norm(one) * norm(other))


# Telling -----------------------------------------------------------------------------------------------------------


def show(content: dict[str, Any]) -> None:
    """The tables, as Markdown."""
    alone = content["memory"]["plain"]
    print(f"\n| {content['weights']:,} weights, 10 hyperparameters | step | round | leader | tensors | process |")
    print("|---|---:|---:|---:|---:|---:|")
    print(f"| plain Adam | 1 | 1 | 1 | {alone['tensors'] / 1e6:.0f} MB | {alone['process'] / 1e6:.0f} MB |")
    for name, row in content["steps"].items():
        held = content["memory"][name]
        shown = " | ".join(f"{row[key]:.2f}" for key in ("step_ratio", "round_ratio", "leader_ratio"))
        sizes = " | ".join(f"{held[key] / alone[key]:.2f}" for key in ("tensors", "process"))
        print(f"| {name} | {shown} | {sizes} |")
    for game, networks in content["jacobians"].items():
        print(f"\n| {game} | cosine | error | residual | best possible cosine |\n|---|---:|---:|---:|---:|")
        for name, row in networks.items():
            best = f"{row['best_possible_cosine']:.3f}" if "best_possible_cosine" in row else ""
            print(f"| {name} | {row['cosine']:.3f} | {row['error']:.2f} | {row['residual']:.2f} | {best} |")


if __name__ == "__main__":
    main()

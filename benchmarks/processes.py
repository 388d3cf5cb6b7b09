"""What a data-parallel hypergradient costs, counted on paper and measured on 1, 2 and 4 processes of this machine.

    python benchmarks/processes.py processes.json

A network of 64, 256 and 10 units on 4,096 examples, its weight decay tuned. For each response the model counts the
gradients and products of a call, and from them the sums over ranks and their bytes; a run on gloo counts what was sent.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import torch

import bilevel as bl

WIDTHS, EXAMPLES, STEPS = (64, 256, 10), 4096, 5
SIZES = (1, 2, 4)
RESPONSES = {
    "Unrolled": bl.Unrolled(partial(torch.optim.SGD, lr=0.1), steps=STEPS, tolerance=None),
    "Segments": bl.Unrolled(
        partial(torch.optim.SGD, lr=0.1), steps=STEPS, differentiation=bl.Segments(count=2), tolerance=None
    ),
    "Implicit": bl.Implicit(
        partial(torch.optim.SGD, lr=0.1), steps=STEPS, tolerance=None,
        linear_solver=bl.Neumann(max_steps=STEPS, step_size=0.05, rtol=0.0),
    ),
    "SingleLoop": bl.SingleLoop(partial(torch.optim.SGD, lr=0.1)),
    "Hypernetwork": bl.Hypernetwork(
        partial(torch.optim.SGD, lr=0.1), network=bl.networks.LowRank(2), steps=STEPS, tolerance=None
    ),
}  # fmt: skip


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    one, two, three = WIDTHS
    return torch.nn.Sequential(torch.nn.Linear(one, two), torch.nn.Tanh(), torch.nn.Linear(two, three))


def game() -> bl.Game:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(2):
        inputs = torch.randn(EXAMPLES, WIDTHS[0], generator=generator)
        batches.append([(inputs, torch.randint(WIDTHS[-1], (EXAMPLES,), generator=generator))])

    def judge(weights, batch):
        return torch.nn.functional.cross_entropy(weights(batch[0]), batch[1])

    def fit(decay, weights, batch):
        return judge(weights, batch) + bl.penalty(weights, decay.exp())

    return bl.Game(
        decay=bl.Player(judge, torch.tensor(-4.0), data=batches[0]),
        weights=bl.Player(fit, network(), data=batches[1]),
    )


def rank(meeting: str, number: int, size: int) -> None:
    """Measure each response as one of the ranks, and print what the first saw."""
    torch.set_num_threads(1)
    if size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=size)
    played, leader = bl.DataParallel(timeout=120.0).game(game()), torch.tensor(-4.0)
    found = {}
    warnings.simplefilter("ignore")
    for name, response in RESPONSES.items():
        state = response.init(played)
        for call in range(3):  # the first is not like those after it
            before = played.ranks.bytes, played.ranks.reductions, response.report(state)
            began = time.perf_counter()
            x = leader.clone().requires_grad_()
            answer, state = response(played, {"decay": x}, state)
            batch, _ = played.draw("decay", played.start("decay"))
            played.loss("decay", {"decay": x, "weights": answer}, batch).backward()
            state = response.after_backward(state, answer)
            seconds = time.perf_counter() - began
            after = response.report(state)
            if call:
                found[name] = {
                    "gradients": after.gradients - before[2].gradients,
                    "products": after.products - before[2].products,
                    "reductions": played.ranks.reductions - before[1],
                    "bytes": played.ranks.bytes - before[0],
                    "seconds": min(seconds, found.get(name, {}).get("seconds", seconds)),
                }
    if number == 0:
        print(json.dumps(found))


def modelled(gradients: int, products: int, unknowns: int, itemsize: int) -> dict[str, int]:
    """The sums over ranks and their bytes, of so many gradients and products of a follower with so many unknowns.

    A gradient sums its loss with its weight (2 numbers) and the vector; a product the vector. The leader's loss is one
    gradient more, in the follower's variables; its own entries, and mixed products, are few here and left out.
    """
    vectors = gradients + 1 + products
    return {"reductions": vectors + gradients + 1, "bytes": itemsize * (vectors * unknowns + 2 * (gradients + 1))}


def measured(size: int) -> dict[str, dict[str, float]]:
    """What the first of so many ranks saw."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "rank", f"{folder}/meeting"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen([*command, str(n), str(size)], stdout=subprocess.PIPE, text=True, env=environment)
            for n in range(size)
        ]
        try:
            outputs = [started.communicate(timeout=300)[0] for started in ranks]
        finally:
            for started in ranks:
                started.kill()
    return json.loads(outputs[0].splitlines()[-1])


def main(path: str) -> None:
    unknowns = sum(p.numel() for p in network().parameters())
    rows = []
    for size in SIZES:
        for name, row in measured(size).items():
            model = modelled(row["gradients"], row["products"], unknowns, 4)
            rows.append({"response": name, "ranks": size, **row, "model": model})
    content = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__},
        "seed": 0,
        "unknowns": unknowns,
        "examples": EXAMPLES,
        "rows": rows,
    }
    Path(path).write_text(json.dumps(content, indent=1) + "\n")
    for row in rows:
        print({**row, "model": row["model"]["bytes"], "seconds": round(row["seconds"], 3)})


if __name__ == "__main__":
    if sys.argv[1] == "rank":
        rank(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(sys.argv[1])

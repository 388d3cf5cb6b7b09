"""What sharded weights need on each rank: peak memory of a hypergradient on 1, 2 and 4 processes of this machine.

    python -m benchmarks.sharded_memory                                            # the resident set
    python -m benchmarks.sharded_memory --tensors --output docs/processes/memory.json

A network of 16 layers of 1,024 units (16.8 million weights, 64 MiB), each layer sharded by `fully_shard`, 16 examples
in all. One process has the plain module. `resident` is the most that a rank's resident set grew by, from before its
part of the module was made, over making the game, three calls of the response and their backward passes; the whole
module, of which a rank takes its part, is gone by then, and a small game was played, which imports what is needed.
Shares are of one process's. Every case is a set of processes of its own.

With `--tensors` the most that all tensors alive hold together is counted instead, operation by operation, in layers of
256 units and on 4 examples: the library's own part of the memory, without the buffers of gloo and of the allocator. It
does not depend on the machine.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import bilevel as bl
from benchmarks.forks import forked
from benchmarks.head import head
from bilevel.sharding import ShardedTensor

WIDTH, LAYERS, EXAMPLES, CALLS = 1024, 16, 16, 3
COUNTED_WIDTH, COUNTED_EXAMPLES = 256, 4
SIZES = (1, 2, 4)
SGD = partial(torch.optim.SGD, lr=0.01)
ADAM = partial(torch.optim.Adam, lr=1e-3)
RESPONSES: dict[str, bl.Response] = {
    "Nudged": bl.Nudged(SGD, steps=3, nudge=1e-2, tolerance=None),
    "SingleLoop": bl.SingleLoop(SGD),
    "Unrolled, 1 step": bl.Unrolled(SGD, steps=1),
    "Unrolled, 3 steps": bl.Unrolled(SGD, steps=3),
    "Unrolled, 3 steps of Adam": bl.Unrolled(ADAM, steps=3),
    "Unrolled, Segments": bl.Unrolled(SGD, steps=4, differentiation=bl.Segments(count=2)),
    "Implicit, ConjugateGradient": bl.Implicit(
        SGD, steps=3, tolerance=None, linear_solver=bl.ConjugateGradient(max_steps=3, damping=1.0, rtol=None)
    ),
    "Implicit, Neumann": bl.Implicit(
        SGD, steps=3, tolerance=None, linear_solver=bl.Neumann(max_steps=3, step_size=0.1, rtol=None)
    ),
}


def network(width: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        layers += [nn.Linear(width, width, bias=False), nn.Tanh()]
    return nn.Sequential(*layers)


def sharded(size: int, width: int) -> nn.Module:
    """On one process the plain module."""
    model = network(width)
    if size == 1:
        return model
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (size,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)  # type: ignore[operator]
    return model


def judge(weights: Any, batch: Tensor) -> Tensor:
    return (weights(batch[:, 0]) - batch[:, 1]).square().mean()


def fit(decay: Tensor, weights: Any, batch: Tensor) -> Tensor:
    return judge(weights, batch) + bl.penalty(weights, decay.exp())


def status(key: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages of all tensors that operations have made and that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, and count."""
        found = func(*args, **(kwargs or {}))
        self.add(pytree.tree_leaves(found))
        return found

    def add(self, values: Iterable[Any]) -> None:
        """Count these too."""
        for value in values:
            own = value.local if isinstance(value, ShardedTensor) else value
            if type(own) in (Tensor, nn.Parameter):
                storage = own.untyped_storage()
                self._seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())  # type: ignore[no-untyped-call]
        self._seen = {key: pair for key, pair in self._seen.items() if not pair[0].expired()}  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, sum(size for _, size in self._seen.values()))


def counted(size: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Count the tensors of each response as one of so many ranks."""
    warnings.simplefilter("ignore")
    found = []
    for name in names:
        model = sharded(size, COUNTED_WIDTH)
        own = [p.to_local() if size > 1 else p for p in model.parameters()]  # type: ignore[operator]
        alive = Alive()
        alive.add(own)
        with alive:
            play(model, RESPONSES[name], COUNTED_WIDTH, COUNTED_EXAMPLES)
        found.append({"weights": sum(p.numel() for p in own), "bytes": alive.peak})
        gc.collect()
    return found


def everything_counted(names: Sequence[str]) -> list[dict[str, Any]]:
    """The fullest rank's of each response, on each number of ranks."""
    rows = []
    for size in SIZES:
        ranks = forked(partial(counted, size, names), size)
        for name, *told in zip(names, *ranks, strict=True):
            rows.append({"response": name, "ranks": size, **{key: max(one[key] for one in told) for key in told[0]}})
    return rows


def rank(meeting: str, number: int, size: int, name: str) -> None:
    """Measure a response as one of the ranks, and print it."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if size > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=size)
    play(sharded(size, 8), RESPONSES[name], 8)
    model = sharded(size, WIDTH)
    gc.collect()
    own = sum(p.to_local().numel() if size > 1 else p.numel() for p in model.parameters())  # type: ignore[operator]
    before = status("VmRSS") - 4 * own
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here
    play(model, RESPONSES[name], WIDTH)
    print(json.dumps({"weights": own, "bytes": status("VmHWM") - before}))


def play(model: nn.Module, response: bl.Response, width: int, examples: int = EXAMPLES) -> None:
    """Some hypergradients, one after the other, as in a loop."""
    batches = [torch.randn(examples, 2, width, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    game = bl.Game(
        decay=bl.Player(judge, torch.tensor(-4.0), data=[batches[0]]),
        weights=bl.Player(fit, model, data=[batches[1]]),
    )
    game = bl.DataParallel(timeout=1200.0).game(game)
    state = response.init(game)
    for _ in range(CALLS):
        x = torch.tensor(-4.0, requires_grad=True)
        answer, state = response(game, {"decay": x}, state)
        batch, _ = game.draw("decay", game.start("decay"))
        game.loss("decay", {"decay": x, "weights": answer}, batch).backward()
        state = response.after_backward(state, answer)
        del answer


def measured(name: str, size: int) -> dict[str, Any]:
    """What the fullest of so many ranks needs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.sharded_memory", "--rank", f"{folder}/meeting"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
        ranks = [
            subprocess.Popen(
                [*command, str(n), str(size), name],
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for n in range(size)
        ]
        try:
            told = [json.loads(started.communicate(timeout=3600)[0].splitlines()[-1]) for started in ranks]
        finally:
            for started in ranks:
                started.kill()
    return {"response": name, "ranks": size, **{key: max(one[key] for one in told) for key in told[0]}}


def main() -> None:
    """All responses on all numbers of ranks, written as they come."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=Path("sharded_memory.json"))
    options.add_argument("--only", default="", help="responses whose name has this in it")
    options.add_argument("--tensors", action="store_true", help="count tensors, and not the resident set")
    options.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.rank:
        meeting, number, size, name = chosen.rank
        rank(meeting, int(number), int(size), name)
        return
    names = [name for name in RESPONSES if chosen.only in name]
    rows: list[dict[str, Any]] = []
    pairs = ((name, size) for name in names for size in SIZES)
    measuring = everything_counted(names) if chosen.tensors else (measured(*pair) for pair in pairs)
    for row in measuring:
        rows.append(row)
        alone = next(one for one in rows if (one["response"], one["ranks"]) == (row["response"], 1))
        row["share"] = row["bytes"] / alone["bytes"]
        print(f"{row['response']:30} {row['ranks']}  {row['bytes'] / 2**20:7.1f} MiB {row['share']:.2f}", flush=True)
        width = COUNTED_WIDTH if chosen.tensors else WIDTH
        content = {**head(), "counted": chosen.tensors, "weights": width * width * LAYERS, "rows": rows}
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

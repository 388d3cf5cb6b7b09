"""A decay for each weight of a network, 101,770 of them, in one run of `bl.tune`: beside one decay, and none.

1,000 digits and a network 784-128-10, 800 steps of Adam. Losses are of two fresh trainings each, and of the model that
the run itself ends with. Writes JSON after each part; the same command goes on with the parts that are missing.

    python -m benchmarks.many_decays --output docs/tuning/many_decays.json
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch import nn

import bilevel as bl
from benchmarks.head import head
from benchmarks.jobs.parts import Row, digits
from benchmarks.jobs.tuned import Training, default, found, start
from bilevel.files import write_whole


def network() -> nn.Module:
    """784-128-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def training(per: str) -> Training:
    """With one decay, or as many as `per` says."""
    hyper = [bl.hyper.WeightDecay(per=per)] if per else [bl.hyper.WeightDecay()]
    return Training(network, partial(digits, 1000), hyper, batch=50, steps=800)


WAYS = {"one decay": training(""), "a decay for each weight": training("weight")}


def main() -> None:
    """Measure, and write after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = json.loads(options.output.read_text(encoding="utf-8"))["rows"] if options.output.exists() else []
    for seed in range(options.seeds):
        for name, way in WAYS.items():
            row = next((row for row in rows if (row["seed"], row["way"]) == (seed, name)), None)
            if row is None:
                rows.append(row := {"seed": seed, "way": name})
            for key, part in (("default", default), ("start", start), ("found", found)):
                if key not in row:
                    row |= {k: v for k, v in part(way, seed).items() if k != "hyper"}
                    write_whole(options.output, (json.dumps({**head(), "rows": rows}, indent=1) + "\n").encode())
                    print(row, flush=True)


if __name__ == "__main__":
    main()

"""Eight jobs as people have them, by the library: beside nothing tuned, and beside the best of ten random trials.

Each row is the mean test loss of fresh trainings, and the model that the run itself ends with. Random trials draw
within the same ranges; the best on the validation data is kept. Writes JSON after each part of a job; the same command
goes on with the parts that are missing.

    python -m benchmarks.jobs --output docs/tuning/jobs.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.head import head
from benchmarks.jobs import loop, noisy, rates, tasks, tuned
from bilevel.files import write_whole

JOBS = [*tuned.JOBS, rates.JOB, noisy.JOB, tasks.JOB, loop.JOB]


def main() -> None:
    """Measure all, and write after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if options.output.exists():
        rows = json.loads(options.output.read_text(encoding="utf-8"))["rows"]
    for seed in range(options.seeds):
        for job in JOBS:
            if options.only and not any(part in job.name for part in options.only):
                continue
            row = next((row for row in rows if (row["job"], row["seed"]) == (job.name, seed)), None)
            if row is None:
                row = {"job": job.name, "seed": seed}
                rows.append(row)
            for name, part in job.parts.items():
                if name in row:
                    continue
                row |= part(seed)
                write_whole(options.output, (json.dumps({**head(), "rows": rows}, indent=1) + "\n").encode())
                print(job.name, seed, {k: v["test"] for k, v in row.items() if isinstance(v, dict) and "test" in v})
            print(row.get("hyper"), row.get("warnings"), flush=True)


if __name__ == "__main__":
    main()

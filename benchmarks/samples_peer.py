"""benchmark_bilevel's own solvers on the problems that `benchmarks/samples.py --rows FOLDER` wrote.

Runs in an environment of its own with jax and benchopt, and imports neither torch nor this library; `--repository` is a
checkout of https://github.com/benchopt/benchmark_bilevel. The losses are those of the library's run, in JAX, sample by
sample of rank one; the processor's clock is read when the numbers are there (`block_until_ready`), after compilation,
on one thread, in JAX's float32, in which it is faster than in float64 (the library's runs are float64). The target is
looked for every 16 steps.

    python benchmarks/samples_peer.py --repository benchmark_bilevel --rows rows --output peers.json
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

TARGET, EVERY, LIMIT, PERIOD = 1e-8, 16, 4000, 16
SOLVERS = [("SABA", 64, 0.1), ("SABA", 64, 0.2), ("SABA", 64, 0.3), ("SABA", 32, 0.2), ("SRBA", 64, 0.3)]


def exact(leader: Any, follower: Any) -> Callable[[Any], float]:
    """From x to |grad h|^2."""

    def means(rows: Any) -> list[Any]:
        a, b, c, e, linear_y, linear_x = (rows[:, k] for k in range(6))
        n = len(rows)
        return [a.T @ a / n, b.T @ b / n, c.T @ e / n, linear_y.mean(0), linear_x.mean(0)]

    (f_yy, f_xx, f_xy, f_y, f_x), (g_yy, _, g_xy, g_y, _) = means(leader), means(follower)
    moves = -np.linalg.solve(g_yy, g_xy.T)

    def value(x: Any) -> float:
        x = np.asarray(x, dtype=np.float64)
        y = -np.linalg.solve(g_yy, g_y + g_xy.T @ x)
        slope = f_xx @ x + f_xy @ y + f_x + moves.T @ (f_yy @ y + f_xy.T @ x + f_y)
        return float(slope @ slope)

    return value


def loss(rows: Any, jax: Any) -> Callable[..., Any]:
    """As benchmark_bilevel has them: f(inner, outer, start, batch_size)."""
    jnp = jax.numpy
    data = jnp.asarray(rows)

    @partial(jax.jit, static_argnames=("batch_size",))
    def mean(y: Any, x: Any, start: Any = 0, batch_size: int = 1) -> Any:
        batch = jax.lax.dynamic_slice(data, (start, 0, 0), (batch_size, *data.shape[1:]))
        a, b, c, e, linear_y, linear_x = (batch[:, k] for k in range(6))
        squares = 0.5 * ((a @ y) ** 2 + (b @ x) ** 2)
        return jnp.mean(squares + (c @ x) * (e @ y) + linear_y @ y + linear_x @ x)

    return mean


def run(jax: Any, rows: Any, name: str, batch: int, step: float, seed: int) -> dict[str, Any]:
    """One solver until the target."""
    kind = importlib.import_module(f"solvers.{name.lower()}").Solver
    leader, follower = rows["leader"], rows["follower"]
    value, kept = exact(leader, follower), {"steps": 0, "seconds": 0.0, "value": float("inf"), "began": 0.0}
    solver = kind.__new__(kind)
    for key, options in kind.parameters.items():
        setattr(solver, key, options[0])
    solver.step_size, solver.batch_size, solver.eval_freq, solver.random_state = step, batch, EVERY, seed
    solver.run_once = lambda *_: None  # its warm-up goes through benchopt's runner
    zero = jax.numpy.zeros(leader.shape[2])
    solver.set_objective(loss(follower, jax), loss(leader, jax), len(follower), len(leader), zero, zero)
    calls = iter((True, True, False))
    solver.run(lambda: next(calls))  # which compiles

    def look() -> bool:
        if kept["began"]:
            jax.block_until_ready((solver.inner_var, solver.outer_var))
            kept["seconds"] += time.process_time() - kept["began"]
            kept["steps"] += EVERY
            kept["value"] = value(solver.outer_var)
            if not TARGET < kept["value"] < 1e9 or kept["steps"] * batch >= LIMIT * 64:
                return False
        kept["began"] = time.process_time()
        return True

    solver.run(look)
    steps = int(kept["steps"])
    whole = -(-steps // PERIOD) if name == "SRBA" else 0
    passes = whole + (steps - whole) * batch / len(follower)
    failed = None if kept["value"] <= TARGET else "did not reach the target"
    found = {"seconds": kept["seconds"], "passes": passes, "value": kept["value"], "failed": failed}
    return {"by": "benchmark_bilevel", "method": name, "batch": batch, "step size": step, "seed": seed, **found}


def main() -> None:
    """All solvers on all problems."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--repository", type=Path, required=True)
    options.add_argument("--rows", type=Path, required=True)
    options.add_argument("--output", type=Path, default=Path("peers.json"))
    chosen = options.parse_args()
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    sys.path.insert(0, str(chosen.repository))
    import jax

    rows = []
    for file in sorted(chosen.rows.glob("*.npz"), key=lambda path: int(path.stem)):
        for name, batch, step in SOLVERS:
            given = {key: value.astype("float32") for key, value in np.load(file).items()}
            row = run(jax, given, name, batch, step, int(file.stem))
            rows.append(row)
            told = row["failed"] or f"{row['passes']:.1f} passes, {row['seconds']:.3f} s"
            print(f"seed {file.stem}  {name} {batch} {step}  {told}", flush=True)
            chosen.output.write_text(json.dumps({"versions": {"jax": jax.__version__}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

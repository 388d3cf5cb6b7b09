"""The tests under other processors' arithmetic: `python benchmarks/processors.py [--only WORD] [options of pytest]`.

One machine has one processor, but its libraries can be asked for the code of others: vector instructions (torch, MKL,
OpenBLAS), sums split over threads, and roundings of our own (`--ulp`, of which tests/other_rounding.py tells). A test
that fails in one row and passes in another hangs on rounding. Prints a row a setting and, at the end, who failed where.
Takes some five minutes a row on two cores, `--ulp` ten; `-m ""` adds the slow tests. Exits with 1 if anything failed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Environment and arguments by name. A capability or core type that this processor lacks is passed over by its library.
SETTINGS: dict[str, tuple[dict[str, str], list[str]]] = {
    "as it is": ({}, []),
    "torch without vectors": ({"ATEN_CPU_CAPABILITY": "default"}, []),
    "torch avx2": ({"ATEN_CPU_CAPABILITY": "avx2"}, []),
    "torch avx512": ({"ATEN_CPU_CAPABILITY": "avx512"}, []),
    "MKL compatible": ({"MKL_CBWR": "COMPATIBLE"}, []),
    "MKL avx2": ({"MKL_CBWR": "AVX2"}, []),
    "OpenBLAS Nehalem": ({"OPENBLAS_CORETYPE": "Nehalem"}, []),
    "OpenBLAS Haswell": ({"OPENBLAS_CORETYPE": "Haswell"}, []),
    "OpenBLAS SkylakeX": ({"OPENBLAS_CORETYPE": "SkylakeX"}, []),
    "two threads": ({"OMP_NUM_THREADS": "2"}, []),
    "ulp, seed 1": ({}, ["--ulp", "1"]),
    "ulp, seed 2": ({}, ["--ulp", "2"]),
    "ulp, seed 3": ({}, ["--ulp", "3"]),
    "other examples": ({}, ["--hypothesis-profile=default"]),
}


def run(environment: dict[str, str], arguments: list[str]) -> tuple[str, list[str]]:
    """What pytest says in its last line, and the tests that failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines() or [f"pytest exited with {done.returncode}: {done.stderr[-300:]}"]
    failed = [match[1] for line in lines if (match := re.match(r"(?:FAILED|ERROR) (.*?)(?: - |$)", line))]
    if done.returncode and not failed:
        failed = [f"pytest exited with {done.returncode}"]
    return lines[-1], failed


def main() -> int:
    """Run the chosen settings, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    options, arguments = parser.parse_known_args()
    where: dict[str, list[str]] = {}
    for name, (environment, own) in SETTINGS.items():
        if options.only not in name:
            continue
        began = time.monotonic()
        last, failed = run(environment, own + arguments)
        print(f"{name:24s} {last}  [{time.monotonic() - began:.0f} s]", flush=True)
        for test in failed:
            where.setdefault(test, []).append(name)
    for test, names in where.items():
        print(f"{test}\n    fails under: {', '.join(names)}")
    return int(bool(where))


if __name__ == "__main__":
    sys.exit(main())

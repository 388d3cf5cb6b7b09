"""Holds other libraries' hypergradients, and our own, to the laws of `bilevel.testing`, and writes JSON.

    python benchmarks/conformance/run.py --output docs/conformance/verdicts.json

Every adapter that can be imported is run; with --only just those named. A library that is not installed is told and
left out. What is in the file of adapters that are not run this time stays, so that one can be repeated alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.head import head
from bilevel.testing import LawReport, check_hypergradient_function

SGD = partial(torch.optim.SGD, lr=0.5)
# Heading: (distribution, module of adapters, function, whether it promises the derivative of its steps).
ADAPTERS = {
    "bilevel Unrolled": ("bilevel", "ours", "unrolled", True),
    "bilevel Implicit": ("bilevel", "ours", "implicit", False),
    "TorchOpt MetaSGD": ("torchopt", "torchopt", "meta_sgd", True),
    "TorchOpt custom_root": ("torchopt", "torchopt", "custom_root", False),
    "TorchOpt ImplicitMetaGradientModule": ("torchopt", "torchopt", "implicit_module", False),
    "higher innerloop_ctx": ("higher", "higher", "innerloop", True),
    "hypergrad diff_sgd": ("hypergrad", "hypergrad", "unrolled", True),
    "hypergrad conjugate_gradient": ("hypergrad", "hypergrad", "implicit", False),
    "BOAT NGD+RAD": ("boat-torch", "boat", "unrolled", True),
    "BOAT NGD+CG": ("boat-torch", "boat", "implicit", False),
    "jaxopt unrolled": ("jaxopt", "jaxopt", "unrolled", True),
    "jaxopt implicit": ("jaxopt", "jaxopt", "implicit", False),
}


def main() -> None:
    """Run the laws, print and write what they say."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", action="append", default=[], choices=list(ADAPTERS), metavar="NAME")
    options.add_argument("--examples", type=int, default=20, help="games a law is tried on")
    options.add_argument("--output", type=Path, default=Path("verdicts.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    console = Console()
    found: dict[str, Any] = json.loads(chosen.output.read_text()) if chosen.output.exists() else {}
    for name in chosen.only or ADAPTERS:
        package, module, function, unrolled = ADAPTERS[name]
        try:
            adapter = getattr(import_module(f"adapters.{module}"), function)
        except ImportError as missing:
            console.print(f"[dim]{name}: not installed ({missing})[/dim]")
            continue
        began = time.perf_counter()
        report = verdicts(adapter, unrolled, chosen.examples)
        found[name] = {
            "package": package,
            **head(package, "hypothesis"),
            "unrolled": unrolled,
            "examples": chosen.examples,
            "seconds": round(time.perf_counter() - began, 1),
            "laws": [asdict(row) for row in report.rows],
        }
        # Written after each: a run that is cut short loses one library, not all.
        found = {known: found[known] for known in ADAPTERS if known in found}
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(found, indent=1) + "\n")
        console.print(f"{name}: {len(report.failures)} laws fail, {found[name]['seconds']} s")
    for unrolled in (True, False):
        console.print(table({name: entry for name, entry in found.items() if entry["unrolled"] is unrolled}))
    for line in told(found):
        console.print(line, markup=False, highlight=False)


def verdicts(adapter: Callable[..., Any], unrolled: bool, examples: int) -> LawReport:
    """The laws' report on one adapter, its follower trained by plain gradient descent."""
    return check_hypergradient_function(adapter, unrolled=unrolled, optimizer=SGD, examples=examples)


def table(found: dict[str, Any]) -> Table:
    """Law by library; laws that apply to none of them are left out."""
    marks = {"holds": "[green]holds[/green]", "fails": "[bold red]FAILS[/bold red]", "does not apply": "[dim]-[/dim]"}
    shown = Table()
    shown.add_column("law", no_wrap=True)
    for name in found:
        shown.add_column(name, overflow="fold")
    by = {name: {row["law"]: row["verdict"] for row in entry["laws"]} for name, entry in found.items()}
    for law in dict.fromkeys(law for verdict in by.values() for law in verdict):
        cells = [by[name].get(law, "does not apply") for name in found]
        if set(cells) != {"does not apply"}:
            shown.add_row(law, *[marks[cell] for cell in cells])
    return shown


def told(found: dict[str, Any]) -> list[str]:
    """One line a failure with its game, and what is not offered with why."""
    lines = []
    for name, entry in found.items():
        for row in entry["laws"]:
            if row["verdict"] == "fails":
                lines.append(f"{name}, {row['law']}: FAILS: {row['note']}\n    {row['game']}")
            elif row["verdict"] == "does not apply":
                lines.append(f"{name}, {row['law']}: not offered: {row['note']}")
    return lines


if __name__ == "__main__":
    main()

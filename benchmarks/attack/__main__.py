"""Random games, each judged by a truth made in plain torch: how often is the library right, and what else does it do?

Nothing of `bilevel.testing` is used. A family draws a game from a seed: losses, scales, the forms of the players'
variables, data, a response and its options. The truth is the central difference (Richardson) of the leader's value with
the follower solved anew by Newton's method in float64, or with the same steps taken by torch.optim; where a method's
answer is a definition (a damped solve, a value function with a finite multiplier) it is that definition, dense.

* right: within what was asked of the response.
* refused: an error of the library's own, by name.
* warned: not right, and a `BilevelWarning` was issued.
* told: not right, and the response's report says so.
* no truth: the follower has no optimum to follow, or differences are too noisy to judge.
* slow: beyond `--seconds`.
* raw: an error that no place in the library has raised.
* silent: wrong, and nothing said it.

The same seed is the same game while its family stays as it is.

    python -m benchmarks.attack --first 0 --count 3000 --records attack.jsonl
    python -m benchmarks.attack --read attack.jsonl --output docs/attacked/verdicts.json
    python -m benchmarks.attack --again unrolled:17
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.attack.families import FAMILIES
from benchmarks.attack.judge import VERDICTS, attack
from benchmarks.head import head


def counted(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each family what it is, and how many games have each verdict."""
    counts = Counter((record["family"], record["verdict"]) for record in records)
    drawn = [name for name in FAMILIES if any(counts[name, verdict] for verdict in VERDICTS)]
    return {
        name: {"what": (FAMILIES[name][0].__doc__ or "").strip(), **{v: counts[name, v] for v in VERDICTS}}
        for name in drawn
    }


def shown(records: list[dict[str, Any]]) -> str:
    """Verdicts by family, and of all."""
    rows = [[name, *(str(found[verdict]) for verdict in VERDICTS)] for name, found in counted(records).items()]
    rows.append(["all", *(str(sum(record["verdict"] == verdict for record in records)) for verdict in VERDICTS)])
    return "\n".join("".join(f"{cell:>17}" for cell in row) for row in [["family", *VERDICTS], *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--seconds", type=int, default=20, help="the most that a game may take")
    parser.add_argument("--records", type=Path, help="where each game's record is added, as a line of JSON")
    parser.add_argument("--output", type=Path, help="where the counts are written")
    parser.add_argument("--read", type=Path, nargs="*", help="count these records, and play nothing")
    parser.add_argument("--again", nargs="*", help="play these games, family:seed, and print their records")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.again:
        for game in chosen.again:
            name, seed = game.split(":")
            print(json.dumps(attack(name, FAMILIES[name][0], int(seed), chosen.seconds), default=str, indent=1))
        return
    records = [json.loads(line) for path in chosen.read or () for line in path.read_text().splitlines()]
    weights = [FAMILIES[name][1] for name in chosen.families]
    for seed in () if chosen.read else range(chosen.first, chosen.first + chosen.count):
        (name,) = random.Random(seed * 7919).choices(chosen.families, weights)
        records.append(attack(name, FAMILIES[name][0], seed, chosen.seconds))
        if chosen.records:
            with chosen.records.open("a") as file:
                file.write(json.dumps(records[-1], default=str) + "\n")
    print(shown(records))
    if chosen.output:
        seeds = [record["seed"] for record in records]
        found = {**head(seed=min(seeds)), "games": len(seeds), "last_seed": max(seeds), "families": counted(records)}
        chosen.output.parent.mkdir(parents=True, exist_ok=True)
        chosen.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""The tables of docs/resuming.md: what `benchmarks/interrupted_commands.py` and `benchmarks/long_runs.py` measured."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "resuming"


def read(name: str) -> dict[str, Any]:
    """What was measured."""
    found: dict[str, Any] = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    return found


def commands() -> list[list[str]]:
    """One row a command, one column for each way in which it was stopped: how many trials ended how."""
    found = read("commands.json")["commands"]
    kinds = list(next(iter(found.values()))["trials"])
    rows = [["Command", *kinds]]
    for name, one in found.items():
        rows.append([f"`bilevel {name}`", *(_told(one["trials"][kind]) for kind in kinds)])
    return rows


def _told(verdicts: list[str]) -> str:
    """Such as "3 equal"."""
    ended = ["wrong" if v.startswith("WRONG") else "not tried" if v.startswith("not") else v for v in verdicts]
    return ", ".join(f"{ended.count(kind)} {kind}" for kind in dict.fromkeys(ended))


def long_runs() -> list[list[str]]:
    """One row a family of what was run; of each number the one that is farthest from none."""
    families: dict[str, list[dict[str, float]]] = {}
    for name, one in read("long_runs.json")["variants"].items():
        family, comma, _ = name.partition(",")
        alone = comma or family in ("Hypernetwork", "Nudged", "SingleLoop")
        families.setdefault(family if alone else "rules of play", []).append(one)
    rows = [["Kind", "how many", "ms a step", "longer at the end", "memory", "history", "checkpoint"]]
    for family, members in families.items():
        times, longer, memory, history, checkpoint = (
            [one[key] for one in members]
            for key in (
                "milliseconds a step",
                "longer",
                "resident bytes a step",
                "history bytes a step",
                "checkpoint bytes a step",
            )
        )
        between = f"{min(times):.1f} to {max(times):.1f}" if len(times) > 1 else f"{times[0]:.1f}"
        most = max(longer, key=abs)
        sizes = (f"{max(bytes_):.0f}" for bytes_ in (memory, history, checkpoint))
        rows.append([family, str(len(members)), between, f"{100 * most:+.0f} %", *sizes])
    return rows


def players() -> list[list[str]]:
    """One row a number of players: tensors, then modules."""
    found = read("long_runs.json")["players"]
    rows = [["Players", "tensors: the game, s", "a step, s", "modules: the game, s", "a step, s"]]
    for count in dict.fromkeys(one["players"] for one in found):
        of = {one["modules"]: one for one in found if one["players"] == count}
        cells = [f"{of[kind][key]:.2f}" for kind in (False, True) for key in ("making", "a step")]
        rows.append([f"{count:,}", *cells])
    return rows


PARTS = {part.__name__: part for part in (commands, long_runs, players)}

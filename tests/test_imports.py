"""Imports run downhill only."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bilevel

ROOT = Path(__file__).resolve().parents[1]
BASE = {"errors", "tree", "autodiff", "randomness", "data"}
GAME = BASE | {"game", "many"}
# A room -> the rooms it may import. A room that is not named here fails the test.
MAY = {
    "errors": set(),
    "tree": set(),
    "autodiff": {"errors"},
    "randomness": set(),
    "data": BASE,
    "game": BASE,
    "many": BASE | {"game"},
    "linear": BASE,
    "inner": GAME,
    "root": BASE | {"linear"},
    "responses": GAME | {"linear", "inner", "root"},
    "dynamics": BASE | {"linear"},
    "checkpoint": BASE,
    "solution": BASE,
    "solutions": BASE | {"solution"},
    "testing": GAME | {"linear", "inner", "responses", "solve"},
    "running": GAME | {"inner", "responses", "dynamics", "solution", "solutions"},
    "solve": GAME | {"inner", "responses", "dynamics", "running", "checkpoint", "solution", "solutions"},
    "comparison": GAME | {"linear", "inner", "responses", "solve", "testing"},
    "certificate": {"tree"},
    "held": GAME | {"linear", "responses", "root"},
    "certify": GAME | {"linear", "responses", "solution", "certificate", "held"},
    "exploitability": GAME | {"inner", "responses", "solution"},
    "compare": GAME | {"inner", "responses", "comparison", "testing"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module in ("bilevel", "games"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "bilevel").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downhill(path: Path) -> None:
    room = path.relative_to(ROOT / "bilevel").parts[0].removesuffix(".py")
    names = imported(path)
    assert not [name for name in names if name.split(".")[0] == "games"]
    if room == "__init__":
        return
    assert room in MAY, f"{room} is a new room: say in MAY what it may import"
    used = {name.split(".")[1] for name in names if name.startswith("bilevel.")}
    assert used <= MAY[room] | {room}


def test_importing_is_light() -> None:
    heavy = ["matplotlib", "joblib", "sklearn", "mlxtend", "pandas", "typer", "rich", "scipy"]
    code = f"import sys, bilevel; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_references_index_names_every_public_name():
    page = (ROOT / "docs/reference/index.md").read_text(encoding="utf-8")
    assert [name for name in bilevel.__all__ if not re.search(rf"\b{name}\b", page)] == []

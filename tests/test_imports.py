"""Imports run downhill only."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import bilevel

ROOT = Path(__file__).resolve().parents[1]
GROUND = {
    "errors",
    "files",
    "tree",
    "autodiff",
    "randomness",
    "second_order",
    "elementary",
    "custom_functions",
    "_returned",
    "_printed",
    "_drawn",
    "sharding",
}
GAME = GROUND | {"constraints", "game"}
SOLVERS = GAME | {"linear", "inner"}
RESPONSES = SOLVERS | {"_root", "networks", "variance", "responses"}
SOLVE = RESPONSES | {"dynamics", "many", "parallel", "solving"}
# A room -> the rooms it may import. A room that is not named here fails the test.
MAY = {
    "errors": set(),
    "files": set(),
    "_version": set(),
    "_returned": {"tree"},
    "_printed": set(),
    "_drawn": set(),
    "tree": set(),
    "sharding": {"errors"},
    "randomness": set(),
    "elementary": set(),
    "second_order": {"errors", "elementary"},
    "autodiff": {"errors", "second_order"},
    "custom_functions": {"errors", "randomness", "second_order"},
    "variance": {"errors", "tree"},
    "networks": {"errors", "tree"},
    "constraints": GROUND,
    "game": GROUND | {"constraints"},
    "hyper": GAME,
    "tuning": SOLVE | {"hyper", "workers"},
    "integrations": GAME | {"inner", "integrations"},
    "search": GROUND | {"constraints", "workers"},
    "linear": GROUND,
    "inner": GAME,
    "_root": GROUND | {"linear"},
    "parallel": GAME | {"_version"},
    "many": RESPONSES | {"dynamics", "many", "parallel"},
    "responses": RESPONSES,
    "dynamics": SOLVERS | {"variance"},
    "solving": SOLVE,
    "extend": RESPONSES | {"dynamics"},
    "certificates": SOLVE,
    "testing": SOLVE | {"certificates"},
    "workers": {"errors"},
    "comparison": SOLVE | {"testing", "workers"},
    "estimators": RESPONSES,
}
# The same for the applications: what lies below them, and then each of them, which imports no other.
BELOW = {"errors", "experiments", "matrix", "cross_validation", "problems"}
APPLICATIONS = {
    "tuning",
    "reweighting",
    "gan",
    "economics",
    "meta",
    "mixture",
    "paper",
    "compare",
    "published",
    "checking",
}
GAMES_MAY = {
    "errors": set(),
    "stopping": set(),
    "experiments": {"errors", "stopping"},
    "matrix": {"errors"},
    "cross_validation": {"errors"},
    "problems": {"errors", "experiments"},
    **dict.fromkeys(APPLICATIONS, BELOW),
    "tuning": BELOW | {"stopping"},
    "cli": APPLICATIONS | {"experiments", "stopping"},
    "__main__": {"cli", "stopping"},
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


def circle(folder: Path) -> list[str]:
    """The modules of a circle of imports inside a folder, the first one again at its end; [] when there is none.

    It counts imports inside functions and those for type checkers alone as well.
    """
    files = {}
    for path in folder.rglob("*.py"):
        dotted = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(dotted[:-1] if dotted[-1] == "__init__" else dotted)] = path
    graph = {}
    for name, path in files.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                inside = [f"{node.module}.{alias.name}" for alias in node.names]
                graph[name] |= {module if module in files else node.module for module in inside}
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names}
        graph[name] &= set(files)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as found:
        return list(found.args[1])
    return []


@pytest.mark.parametrize(
    "folder",
    sorted(p.parent for room in ("bilevel", "games") for p in (ROOT / room).glob("*/__init__.py")),
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_no_circle_inside_a_folder(folder: Path) -> None:
    assert circle(folder) == []


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


@pytest.mark.parametrize("path", sorted((ROOT / "games").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_application_imports_another(path: Path) -> None:
    room = path.relative_to(ROOT / "games").parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in GAMES_MAY, f"{room} is a new room: say in GAMES_MAY what it may import"
    used = {name.split(".")[1] for name in imported(path) if name.startswith("games.")}
    assert used <= GAMES_MAY[room] | {room}


def test_importing_is_light() -> None:
    heavy = ["matplotlib", "joblib", "sklearn", "mlxtend", "pandas", "typer", "rich", "scipy"]
    code = f"import sys, bilevel; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_references_index_names_every_public_name():
    page = (ROOT / "docs/reference/index.md").read_text(encoding="utf-8")
    names = [name for name in bilevel.__all__ if not name.startswith("_")]
    assert [name for name in names if not re.search(rf"\b{name}\b", page)] == []


def test_the_top_level_holds_the_names_that_most_programs_need():
    assert len(bilevel.__all__) <= 54


def test_a_module_is_never_shadowed_by_a_function_of_its_name():
    for path in (ROOT / "bilevel").iterdir():
        room = path.name.removesuffix(".py")
        if not room.startswith("_") and room != "py.typed":
            assert isinstance(sys.modules.get(f"bilevel.{room}", sys), type(sys)), room
            assert isinstance(getattr(bilevel, room, sys), type(sys)), f"bilevel.{room} is both a module and a name"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("Identity", "bilevel.linear.Identity"),
        ("MLP", "bilevel.networks.MLP"),
        ("NonFiniteError", "bilevel.errors.Non"),
    ],
)
def test_a_name_that_lives_elsewhere_says_where(name, place):
    with pytest.raises(AttributeError, match=f"no '{name}' at its top level; it is {place}"):
        getattr(bilevel, name)
    with pytest.raises(AttributeError, match="has no attribute 'nobody'"):
        bilevel.nobody  # noqa: B018

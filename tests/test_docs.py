"""Every python block of README.md and the docs runs as it stands, in order, page by page."""

import importlib.util
import re
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import bilevel as bl
from bilevel import solve

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# These have the full size of their problem, and are run shorter: they do not converge, and say so by their warnings.
SLOW_AND_WARNING = {"README.md", "docs/three-responses.md"}
LENGTH = ("epochs = 100", "epochs = 3")
# Three seconds and more.
SLOW = {
    *(
        f"docs/{name}.md"
        for name in ("nash", "functions", "reweighting", "paper", "tuning", "tutorial", "minibatches", "own-response")
    ),
    *SLOW_AND_WARNING,
}
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)
# Pages that show other libraries: a block whose imports are not all installed is passed over; `found` names the others.
SHOWS_OTHERS = {"coming-from.md", "integrations.md", "clusters.md"}
OTHERS = {
    "higher",
    "torchopt",
    "betty",
    "jax",
    "jaxopt",
    "optuna",
    "cvxpy",
    "cvxpylayers",
    "lightning",
    "transformers",
    "ray",
}
IMPORT = re.compile(r"^(?:import|from) (\w+)", re.MULTILINE)
# What is shown and not run. Anything else, such as `python notest` or `py`, is refused.
SHOWN = {"sh", "text"}


# Passed over without Ray.
RAY = "docs/clusters.md"


def _page(path: Path) -> object:
    name = path.relative_to(ROOT).as_posix()
    slow = [pytest.mark.slow] if name in {*SLOW, RAY} else []
    return pytest.param(path, id=name, marks=[*slow, pytest.mark.ray] if name == RAY else slow)


def blocks(path: Path) -> list[tuple[str, int, str]]:
    """Each fenced block as (info string, line of its first row, text without its indent)."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        body = re.sub(f"^{match['indent']}", "", match["body"], flags=re.MULTILINE)
        found.append((match["info"].strip(), text.count("\n", 0, match.start("body")) + 1, body))
    return found


@pytest.fixture
def _ray_stops() -> Iterator[None]:
    """Where a page starts one, and no test before it did; Ray Train leaves its handlers of signals behind."""
    ray = sys.modules.get("ray")
    ours = ray is None or not ray.is_initialized()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    if ours and "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.mark.usefixtures("_ray_stops")
@pytest.mark.parametrize("path", [_page(path) for path in PAGES])
def test_every_python_block_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {name for name in OTHERS if importlib.util.find_spec(name)}
    namespace: dict[str, object] = {"__name__": "__main__"}
    shortened = path.relative_to(ROOT).as_posix() in SLOW_AND_WARNING
    if path.name in SHOWS_OTHERS:
        namespace["found"] = found
    monkeypatch.chdir(tmp_path)
    if shortened:
        # 200 steps by three responses would be most of the suite's time.
        monkeypatch.setattr(bl, "solve", lambda game, *, steps, **options: solve(game, steps=min(steps, 2), **options))
    for info, line, body in blocks(path):
        assert info == "python" or info in SHOWN, f"{path.name}:{line}: a block marked {info!r} would not be run"
        if info != "python" or set(IMPORT.findall(body)) & OTHERS - found:
            continue
        if shortened:
            body = body.replace(*LENGTH)
        # Blank lines ahead make a traceback name the page's own line.
        code = compile("\n" * (line - 1) + body, str(path), "exec")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # torch's own forward mode, on its first use.
            warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
            if shortened:
                warnings.simplefilter("ignore", bl.BilevelWarning)
            if set(IMPORT.findall(body)) & OTHERS:  # their warnings are theirs to mend
                warnings.simplefilter("default")
            exec(code, namespace)


def test_the_fences_are_all_seen() -> None:
    for path in PAGES:
        fences = len(re.findall(r"^ *```", path.read_text(encoding="utf-8"), re.MULTILINE))
        assert fences == 2 * len(blocks(path)), f"{path.name}: a fence is open, or one that this test cannot read"


@pytest.mark.parametrize("path", [_page(path) for path in PAGES if path.is_relative_to(ROOT / "docs")])
def test_code_fits_beside_the_side_bars(path: Path) -> None:
    long = [
        (line + i, row) for _, line, body in blocks(path) for i, row in enumerate(body.splitlines()) if len(row) > 88
    ]
    assert long == []


def test_the_pages_have_something_to_run() -> None:
    run = {path.name for path in PAGES if any(info == "python" for info, *_ in blocks(path))}
    assert {"README.md", "index.md", "tutorial.md"} <= run


def test_every_exported_name_has_its_place_in_the_reference() -> None:
    told = {
        name
        for path in (ROOT / "docs" / "reference").glob("*.md")
        for name in re.findall(r"^::: bilevel\.([\w.]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    rooms = {name: value for name, value in vars(bl).items() if name in bl.__all__ and isinstance(value, ModuleType)}
    public = {name for name in bl.__all__ if not name.startswith("_") and name not in rooms}
    apart = ("errors", "testing")  # told on pages of their own
    public |= {name for room, module in rooms.items() if room not in apart for name in module.__all__}
    missing = sorted(public - {name.split(".")[-1] for name in told})
    assert not missing, f"missing in docs/reference: {missing}"


def test_a_part_that_no_program_makes_stops_the_build(numbers) -> None:
    with pytest.raises(KeyError, match="figures/performance.py makes .*growth"):
        numbers.filled("as fast as {{ performance.light }}")
    with pytest.raises(KeyError, match="there is no docs/figures/nobody.py"):
        numbers.filled("{{ nobody.knows }}")


def test_rows_become_a_table_and_words_stay_in_their_sentence(numbers, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "made_up.py").write_text(
        "rows = [['way', 's', 'note'], ['a|b', '.5', ''], ['c', '-2', 'late']]\n"
        "PARTS = {'rows': lambda: rows, 'word': lambda: 'ten'}\n"
    )
    monkeypatch.setattr(numbers, "FIGURES", tmp_path)
    table = "| way | s | note |\n| --- | ---: | --- |\n| a\\|b | .5 |  |\n| c | -2 | late |"
    assert numbers.filled("In {{ made_up.word }}:\n\n{{ made_up.rows }}\n") == f"In ten:\n\n{table}\n"


@pytest.fixture
def numbers():
    """The hook of mkdocs.yml that puts measured numbers into pages."""
    spec = importlib.util.spec_from_file_location("numbers_of_pages", ROOT / "docs/hooks/numbers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_source_holds_a_control_character() -> None:
    """A backslash that some program ate leaves a form feed where an equation has its fraction."""
    sources = [path for room in ("bilevel", "games", "docs", "tests") for path in (ROOT / room).rglob("*.py")]
    sources += [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert [str(path) for path in sources if re.search(r"[\x00-\x08\x0b-\x1f]", path.read_text(encoding="utf-8"))] == []

"""The wheel and the sdist: they build, hold what they should, and work where nothing else of the repository is."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
ROOT = Path(__file__).resolve().parents[1]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]

pytestmark = pytest.mark.slow


def run(*command, cwd):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of the repository, and the wheel that is built from the unpacked sdist, as an installer does."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=folder / f"bilevel-{VERSION}")
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_the_sdist_can_be_tested_and_documented(built):
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CITATION.cff", "constraints.txt", "mkdocs.yml", "tests/test_docs.py"} <= names
    assert {".ci/run", ".ci/matrix", ".ci/smoke.py", "constraints/torch-2.6.txt", "constraints/newest.txt"} <= names
    assert not [name for name in names if name.startswith((".venv", "site/", "runs/")) or name.endswith(".pyc")]
    assert built[0].stat().st_size < 20e6


def test_the_wheel_holds_the_packages_and_nothing_else(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
    assert {name.split("/")[0] for name in names} == {"bilevel", "games", f"bilevel-{VERSION}.dist-info"}
    assert {"bilevel/py.typed", "games/py.typed"} <= names
    sources = {p.relative_to(ROOT).as_posix() for room in ("bilevel", "games") for p in (ROOT / room).rglob("*.py")}
    assert sources <= names


def test_the_sdist_and_the_repository_build_the_same_wheel(built, tmp_path):
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path, cwd=ROOT)
    (wheel,) = tmp_path.glob("*.whl")
    contents = []
    for path in (built[1], wheel):
        with zipfile.ZipFile(path) as archive:
            contents.append({name: archive.read(name) for name in archive.namelist()})
    assert contents[0] == contents[1]


def test_the_wheel_works_by_itself(built, tmp_path, monkeypatch):
    """Elsewhere, first on the path; the packages that it needs are this environment's."""
    target = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, built[1], cwd=tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(target))
    assert run(sys.executable, ROOT / ".ci" / "smoke.py", cwd=tmp_path).startswith(f"works: bilevel {VERSION}, ")
    assert run(sys.executable, "-m", "games", "--version", cwd=tmp_path).strip() == VERSION

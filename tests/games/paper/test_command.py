"""`bilevel paper`: what it writes, what it keeps, and each of its refusals."""

import json

import pytest
from typer.testing import CliRunner

from games.cli import app
from games.experiments.experiment import Experiment, Part
from games.experiments.style import empty_figure
from games.paper import catalogue


def square(source, *, value):
    if value < 0:
        raise ValueError("below zero")
    return {"square": value**2, "data": str(source)}


@pytest.fixture
def two(monkeypatch):
    def known():
        made = {
            "one": Experiment(
                "one", "The first", (Part("a", square, {"value": 3}),), lambda r: empty_figure(), lambda r: "nine"
            ),
            "bad": Experiment("bad", "The second", (Part("b", square, {"value": -1}),), lambda r: empty_figure(), str),
        }
        return made

    monkeypatch.setattr(catalogue, "experiments", known)


def call(*arguments):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["paper", *map(str, arguments)])


def test_a_figure_and_its_line(two, tmp_path):
    result = call("one", "--output", tmp_path, "--jobs", 1)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{tmp_path / 'one.png'}: nine\n"
    assert json.loads((tmp_path / "one.json").read_text())["results"]["a"]["square"] == 9
    kept = (tmp_path / "parts/one/a.json").stat().st_mtime_ns
    assert call("one", "--output", tmp_path, "--jobs", 1, "--resume").exit_code == 0
    assert (tmp_path / "parts/one/a.json").stat().st_mtime_ns == kept


def test_a_failure_is_told_and_the_rest_is_kept(two, tmp_path):
    result = call("--output", tmp_path, "--jobs", 1)
    assert result.exit_code == 1 and (tmp_path / "one.png").exists()
    assert "bad: b: ValueError: below zero" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: bad failed; the other parts are kept")


def test_what_is_refused(two, tmp_path):
    for arguments, message in (
        (["three"], "three: there is no such experiment; expected one of one, bad."),
        (["one", "--jobs", 0], "--jobs 0: expected at least 1."),
        (["one", "--data", tmp_path / "none"], "There is no folder"),
    ):
        result = call(*arguments, "--output", tmp_path / "out")
        assert result.exit_code == 2 and message in result.stderr, result.output
        assert not (tmp_path / "out" / "parts").exists()


def test_the_list_names_every_experiment():
    result = call("--list")
    assert result.exit_code == 0 and result.stdout.count("\n") == len(catalogue.experiments())

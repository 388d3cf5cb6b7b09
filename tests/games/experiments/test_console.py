"""What every command does when it is stopped, or finds another at work in its folder."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import typer

from games.experiments.console import UsageError, errors_in_one_line, interrupt_after_step, output_folder

POSIX = pytest.mark.skipif(os.name != "posix", reason="signals and locks")


@POSIX
def test_two_commands_do_not_share_a_folder(tmp_path):
    with output_folder(tmp_path / "runs"):
        second = output_folder(tmp_path / "runs")
        with pytest.raises(UsageError, match=r"runs: another process is at work there. Wait for its end"), second:
            pass
        with output_folder(tmp_path / "others"):
            pass
    assert not list((tmp_path / "runs").iterdir())
    (tmp_path / "runs" / ".lock").touch()  # of a process that was killed
    with output_folder(tmp_path / "runs"):
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
def test_a_signal_ends_a_command_in_one_line(number, code, waits, capsys):
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    went_on = []
    with pytest.raises(typer.Exit) as ended:
        if waits:
            with errors_in_one_line(), interrupt_after_step() as stop_if_asked:
                os.kill(os.getpid(), number)
                went_on.append("the step")
                stop_if_asked()
                went_on.append("the next")
        else:
            with errors_in_one_line("what is finished"):
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
    with pytest.raises(typer.Exit) as ended, errors_in_one_line(""), interrupt_after_step():
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

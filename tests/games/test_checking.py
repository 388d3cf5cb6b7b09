"""`bilevel check` and `bilevel certify`: verdicts, exit codes, JSON, and each refusal."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from games.cli import app

FILE = """
from functools import partial
import torch, bilevel as bl

zero = torch.tensor(0.0, dtype=torch.float64)
sgd = partial(torch.optim.SGD, lr=0.25)

def lead(x, y):
    return (y - 3) ** 2 + x**2

def follow(x, y):
    return (y - 2 * x) ** 2

game = bl.Game(x=bl.Player(lead, zero), y=bl.Player(follow, zero))
good = bl.Implicit(sgd, steps=100, tolerance=1e-8)
short = bl.Unrolled(sgd, steps=1)

def problem():
    return game, dict(y=good, optimizer=partial(torch.optim.SGD, lr=0.05), steps=200)

def plain():
    return game

def needs(size):
    return game

def breaks():
    raise RuntimeError("no data")

number = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "mine.py"
    path.write_text(FILE)
    return path


def call(*arguments):
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [*map(str, arguments)])


def refused(*arguments):
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


def test_a_right_hypergradient(file):
    result = call("check", f"{file}:game", "--response", "good")
    assert result.exit_code == 0, result.output
    assert "hypergradient of 'x' through 'y': right" in result.stdout


def test_a_wrong_one_as_json(file):
    result = call("check", f"{file}:plain", "--response", "short", "--json", "--directions", 1)
    assert result.exit_code == 3, result.output
    found = json.loads(result.stdout)
    # One step of rate 1/4 on a curvature of 2 goes half the way: half of the true slope, so that half is missing.
    # d/dx = 2 (y - 3) dy/dx + 2 x at x = y = 0 is -12, and -6 as claimed.
    assert found["verdict"] == "wrong"
    assert found["error"] == pytest.approx(0.5, abs=0.02)
    assert found["leader"] == "x" and found["rows"]


def test_the_options_say_which_response(file):
    assert call("check", f"{file}:problem").exit_code == 0
    assert call("check", f"{file}:problem", "--follower", "y").exit_code == 0


def test_a_solved_game_is_certified(file):
    result = call("certify", f"{file}:problem", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["standing"] == "certified" and {"name", "standing", "value"} <= set(found["findings"][0])


def test_a_start_is_refuted(file):
    """At 0 the leader's slope is -12."""
    result = call("certify", f"{file}:game")
    assert result.exit_code == 3, result.output
    assert "refuted" in result.stdout


def test_too_few_steps_are_refuted(file):
    assert call("certify", f"{file}:problem", "--steps", 1).exit_code == 3


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("{file}", "expected FILE:NAME"),
        ("nowhere.py:game", "there is no file nowhere.py"),
        ("{file}:gone", "has no gone; its games are game; its functions without arguments "),
        ("{file}:number", "is a int; expected a bilevel.Game"),
        ("{file}:needs", "needs size; expected one without arguments"),
        ("{file}:breaks", "mine.py:28: RuntimeError: no data"),
    ],
)
def test_what_is_no_game_is_refused(file, target, says):
    assert says in refused("check", target.format(file=file))


def test_a_response_must_be_named_once(file):
    assert "Which response? The file has good, short" in refused("check", f"{file}:game")
    assert "expected the name of a bilevel.Response" in refused("check", f"{file}:game", "--response", "sgd")
    assert "no player" in refused("check", f"{file}:problem", "--leader", "z")
    assert "gives no options" in refused("certify", f"{file}:game", "--steps", 3)


@pytest.mark.parametrize("option", [("--directions", 0), ("--rtol", -1), ("--settle", -1), ("--seed", -1)])
def test_a_number_out_of_range(file, option):
    result = call("check", f"{file}:problem", *option)
    assert result.exit_code == 2 and f"Invalid value for '{option[0]}'" in result.stderr


def test_the_page_of_commands_has_them_all():
    """Each command, and each exit code of `bilevel check` and `certify`."""
    page = (Path(__file__).resolve().parents[2] / "docs/commands.md").read_text(encoding="utf-8")
    missing = [name for name in typer.main.get_command(app).commands if f"| `bilevel {name}" not in page]
    assert missing == []

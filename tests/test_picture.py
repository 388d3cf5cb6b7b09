"""README's first picture: what is added to a training loop is ten lines at most, is what README shows, and runs."""

import difflib
import warnings
from pathlib import Path

import pytest
import torch

from bilevel.errors import ShortHorizonWarning

ROOT = Path(__file__).resolve().parents[1]
BEFORE, AFTER = ((ROOT / "docs/tuning" / name).read_text(encoding="utf-8") for name in ("before.py", "after.py"))


def added() -> list[str]:
    """The lines of the second program that the first has not."""
    lines = difflib.ndiff(BEFORE.splitlines(), AFTER.splitlines())
    return [line[2:] for line in lines if line.startswith("+ ") and line[2:].strip()]


def test_ten_lines_at_most_are_added_to_a_loop_of_forty():
    assert 30 <= len(BEFORE.splitlines()) <= 45
    assert 0 < len(added()) <= 10


def test_readme_shows_the_two_programs():
    shown = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"```python\n{BEFORE}```" in shown
    second = shown.split(BEFORE)[1].split("```python\n")[1].split("```")[0]
    assert [line for line in second.splitlines() if line.strip()] == added()


@pytest.mark.slow  # the digits are read from a text file
def test_the_second_program_runs_and_tunes(capsys):
    # Its length alone is changed: 30 training steps for 1,000.
    short = AFTER.replace("epochs = 100", "epochs = 3")
    assert short != AFTER
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", ShortHorizonWarning)  # in 30 steps nothing pays that pays late
        names: dict = {}
        exec(short, names)
    tuned = names["tuned"]
    assert tuned.plan.steps == 30
    assert {"weight_decay", "dropout", "label_smoothing", "shift", "rotation"} == set(tuned.hyper)
    assert float(tuned.hyper["shift"]) != float(tuned.start["shift"])
    assert "test " in capsys.readouterr().out

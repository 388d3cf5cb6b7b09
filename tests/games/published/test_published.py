"""Published problems: restated rightly, by SciPy alone; solved, and what is not solved says so."""

import json

import pytest
import torch
from typer.testing import CliRunner

from games.cli import app
from games.published import run
from games.published.catalogue import problems
from games.published.compass import Answers
from games.published.judge import judged
from games.published.problem import Problem

KNOWN = problems()


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("name", KNOWN)
def test_the_published_point_is_feasible_optimal_for_the_follower_and_has_the_published_value(name):
    problem = KNOWN[name]
    x, y = tensor(problem.x), tensor(problem.y)
    size = max(1.0, abs(problem.best))
    assert abs(float(problem.F(x, y)) - problem.best) <= 1e-3 * size
    found = judged(problem, x, y)
    # Published points have four digits.
    assert found.violation <= 1e-3
    assert found.gap <= 1e-3 * max(1.0, abs(float(problem.f(x, y))))
    if not problem.ties:
        assert abs(float(problem.F(x, found.y)) - problem.best) <= 1e-3 * size


def test_there_are_forty_and_more():
    assert len(KNOWN) >= 40 and len({problem.source for problem in KNOWN.values()}) >= 25


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Lucchetti et al. 1987", "Yezza 1996, 4.1", "Clark-Westerberg 1990a", "Dempe et al. 2012"]
)
def test_some_are_solved(name):
    found = run.solved(KNOWN[name], starts=6, steps=40)
    assert found.status == "solved", found
    assert found.violation < 1e-4 and found.evaluations <= 6 * 40


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "Colson 2002, BIPA5",  # two local optima: 3.25 and 2.75
        "Mirrlees 1999",  # the best is where the follower jumps to another optimum
        "Mitsos-Barton 2006, 3.13",  # the best is at one point, where the follower is indifferent
    ],
)
def test_what_derivatives_do_not_lead_to_is_found(name):
    found = run.solved(KNOWN[name])
    assert found.solved, found


def quadratic(**changes):
    given = {
        "F": lambda x, y: (x[0] - 1) ** 2 + y[0] ** 2,
        "f": lambda x, y: (y[0] - x[0]) ** 2,
        "box": ((-1.0,), (1.0,)),
        "y_box": ((-2.0,), (2.0,)),
        "best": 0.5,
        "x": (0.5,),
        "y": (0.5,),
    }
    return Problem(name="test", source="here", **(given | changes))


def test_a_better_value_and_a_worse_one_are_told():
    assert run.solved(quadratic(best=0.7), starts=2, steps=20).status == "better"
    assert run.solved(quadratic(best=0.3), starts=2, steps=20).status == "worse"
    assert run.solved(quadratic(), starts=2, steps=20).status == "solved"


def test_a_jump_is_found_to_the_digits_of_the_search():
    """The follower is at x below 1/2 and at -1 above, so that the leader's loss, 1 - y, falls to 1/2 and jumps to 2."""
    problem = quadratic(
        F=lambda x, y: 1.0 - y[0] + 0 * x[0],
        f=lambda x, y: torch.where(x[0] <= 0.5, (y[0] - x[0]) ** 2, (y[0] + 1.0) ** 2),
    )
    answers = Answers(problem, run.response_to(problem), 0.0)
    found = answers.settled(answers.at(tensor([0.1])))
    # The box is 2 wide and the search ends at a millionth of it.
    assert 0.5 - 4e-6 <= float(found.x) <= 0.5 and found.value == pytest.approx(1.0 - float(found.x), abs=1e-9)


def test_an_answer_is_judged_without_the_library():
    found = judged(quadratic(), tensor([0.5]), tensor([1.5]))
    assert abs(found.gap - 1.0) < 1e-9 and abs(float(found.y) - 0.5) < 1e-6 and found.violation == -0.5
    assert judged(quadratic(G=lambda x, y: y - 1.0), tensor([0.5]), tensor([1.5])).violation == 0.5


def test_a_problem_without_an_answer_has_failed():
    found = run.solved(quadratic(g=lambda x, y: y * 0 + x.square() + 1.0), starts=2, steps=5)
    assert found.status == "failed" and "all of 2 starts failed" in found.told[0] and found.value is None


def call(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["problems", *arguments])


def test_the_command_prints_a_table_and_writes_json(tmp_path):
    done = call("yezza 1996, 4", "--starts", "2", "--json", str(tmp_path / "found.json"))
    assert done.exit_code == 0 and "Solved 1 of 1 within 0.1 %" in done.stdout and "Yezza 1996, 4.1" in done.stdout
    written = json.loads((tmp_path / "found.json").read_text())
    assert written["results"][0]["status"] == "solved" and written["starts"] == 2 and "torch" in written["versions"]


def test_the_table_says_by_how_much_a_value_is_worse(monkeypatch):
    monkeypatch.setattr("games.published.catalogue.problems", lambda: {"test": quadratic(best=0.3)})
    done = call("--starts", "2", "--steps", "20").stdout
    assert "worse, by 0.2" in done and "Solved 0 of 1" in done
    assert "test: worse. The best known is 0.3: perhaps a local optimum" in done


def test_the_command_lists_and_refuses():
    assert "1 + 1 variables; Bard" in call("bard 1988, 1", "--list").stdout
    refused = call("nobody")
    assert refused.exit_code == 2 and "there is no such problem" in refused.stderr

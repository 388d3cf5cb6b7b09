"""Every response in several processes answers as in one, and every rank holds the same bits."""

import pytest

FEW = ["ReverseMode", "Segments", "ConjugateGradient", "SingleLoop", "LastStep", "LastStep, fitted", "LastStep, Adam"]
# What one process sums over seven examples, ranks sum in parts: some eps of 2e-16 apart. Linear solves of condition
# numbers below 100 magnify that to 1e-14; a sketch's factor and a nudge of 1e-2 by 100 times more.
TOLERANCE = 1e-12


def check(lines):
    assert len({str(rank) for rank in lines}) == 1  # the same numbers on all ranks
    for told in lines[0]:
        assert told["error"] <= TOLERANCE, told
        assert told["same"], told
        assert told["sent"] > 0, told
    return [told["response"] for told in lines[0]]


def test_two_ranks_answer_as_one_process(played):
    assert check(played("answers", 2, *FEW)) == FEW


@pytest.mark.slow
def test_every_response_and_solver_answers_as_in_one_process(played):
    assert len(check(played("answers", 4, limit=240.0))) > 20


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_games_are_solved_as_by_one_process(played, size):
    lines = played("solves", size, limit=240.0)
    assert len({str(rank) for rank in lines}) == 1
    for told in lines[0]:
        # Adam's first steps divide a gradient by its own size, which leaves its rounding as it is; six of them add up.
        assert told["error"] <= TOLERANCE, told
        assert told["values"] <= TOLERANCE, told
        assert told["steps"] == 6
        assert told["communicated"] >= 8 * told["reductions"] > 0


@pytest.mark.slow
def test_ranks_drop_out_each_for_itself_and_stay_alike(played):
    (one,), (other,) = played("drops", 2)
    assert one["decay"] == other["decay"]
    assert one["masks"] != other["masks"]

"""Many games on several processes, each with some of them: the numbers of one process."""

import re

import pytest
import torch

pytestmark = pytest.mark.slow

# Rows of a batched product in stacks of another height: a few eps of 2e-16, and linear solves of condition numbers
# below 100 magnify that to 1e-14; Adam's first steps divide a gradient by its own size, four of them add up.
TOLERANCE = 1e-12
CASES = ["ReverseMode", "Segments", "Implicit", "Adam", "in turn", "look-ahead", "clipped"]


@pytest.mark.parametrize("size", [2, 4])
def test_games_are_solved_as_in_one_process(played, size):
    lines = played("games_alike", size, limit=240.0)
    assert len({str(rank) for rank in lines}) == 1
    assert [told["case"] for told in lines[0]] == CASES
    for told in lines[0]:
        for error in told["errors"].values():
            assert error <= TOLERANCE, told
        assert (told["length"], told["seen"], told["same"]) == (7, 4, True)


@pytest.mark.parametrize("size", [2, 3])
def test_a_loop_of_ones_own_gathers_all(played, size):
    lines = played("games_in_a_loop", size)
    assert len({str(rank) for rank in lines}) == 1
    (told,) = lines[0]
    assert max(told["errors"]) <= TOLERANCE
    counts = [count for _, count in told["counts"]]
    assert sum(counts) == told["total"] == 7
    assert [first for first, _ in told["counts"]] == [sum(counts[:rank]) for rank in range(size)]
    assert max(counts) - min(counts) <= 1


def test_a_run_goes_on_bit_for_bit_on_as_many_ranks(played, tmp_path):
    played("games_resume", 3, str(tmp_path), "2")
    assert played("games_resume", 3, str(tmp_path), "4") == played("games_resume", 3, "", "4")


def test_a_run_goes_on_with_another_number_of_ranks(played, tmp_path):
    for steps, size in (("1", 1), ("2", 4), ("3", 2)):
        played("games_resume", size, str(tmp_path), steps)
    (ends,) = played("games_resume", 1, str(tmp_path), "4")
    (whole,) = played("games_resume", 1, "", "4")
    for one, other in zip(whole, ends, strict=True):
        a, b = (torch.tensor(told["variables"], dtype=torch.float64) for told in (one, other))
        assert (a - b).norm() <= TOLERANCE * a.norm(), one["case"]
        assert len(other["history"]) == 4


WORDS = {
    "fewer": r"there are 1 games for 2 ranks; expected one for each at least",
    "other count": r"the form of 'decay' is .*7, 4.* on rank 0 and .*6, 4.* on rank 1",
    "other data": r"the first batch of 'weights' is",
    "other start": r"the start of 'decay' is",
    "response": r"responses\.weights\.steps is 3 on rank 0 and 4 on rank 1",
    "Hypernetwork": r"looks at one game, not at",
    "sharded": r"many games are shared out in whole",
    "twice": r"the game is GamesOfRanks; expected Games",
    "alone": r"this process is one of 2 ranks",
    "fails": r"in 1 of games 3 to 6, the first being game 5",
}


def test_what_cannot_be_shared_out_is_refused_in_words_on_all(played):
    for lines in played("games_refused", 2):
        found = {told["case"]: told for told in lines}
        assert list(found) == list(WORDS)
        for case, words in WORDS.items():
            assert re.search(words, found[case]["text"]), found[case]


def test_games_draw_random_numbers_each_for_itself(played):
    (one,), (other,) = played("games_drop", 2)
    assert one == other
    assert one["steps"] == 3

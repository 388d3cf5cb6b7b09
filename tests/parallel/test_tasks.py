"""Tasks of several processes, each with a share of every batch of them: the numbers of one process."""

import pytest

pytestmark = pytest.mark.slow

# Means over five tasks in another order: a few eps of 2e-16, and Adam's first steps divide a gradient by its own size.
TOLERANCE = 1e-12


@pytest.mark.parametrize("size", [2, 4])
def test_tasks_are_solved_as_in_one_process(played, size):
    lines = played("tasks", size)
    assert len({str(rank) for rank in lines}) == 1
    assert [told["case"] for told in lines[0]] == ["maml", "imaml", "clients"]
    for told in lines[0]:
        for what in ("error", "values", "history", "worst"):
            assert told[what] <= TOLERANCE, told
        assert told["sent"] > 0


def test_a_batch_of_fewer_tasks_than_ranks_is_refused(played):
    for ((told,),) in zip(played("few_tasks", 2), strict=True):
        assert "A batch of tasks holds 1, and there are 2 ranks" in told["text"]

"""A command takes the threads that its problem is worth."""

import pytest
import torch

from games.experiments import threads


@pytest.mark.parametrize(
    ("environment", "multiplications", "taken"), [(None, 1e6, 1), (None, 1e9, 3), ("2", 1e6, 3), ("2", 1e9, 3)]
)
def test_threads_follow_the_size(environment, multiplications, taken, monkeypatch):
    if environment is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        threads.choose_threads(multiplications)
        assert torch.get_num_threads() == taken
    finally:
        torch.set_num_threads(before)

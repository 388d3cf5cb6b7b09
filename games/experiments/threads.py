"""How many threads PyTorch takes in a command: as many as the problem is large."""

from __future__ import annotations

import os

import torch

LARGE = 1e8
"""Multiplications of a pass over the data from which a second thread saves time: a tenth of a second on one core."""


def choose_threads(multiplications: float) -> None:
    """Take one thread for a small problem, unless the environment says how many.

    PyTorch's threads wait for each other at the end of each operation, and burn their core while they do. Where another
    program keeps a core busy, an operation of a millisecond takes as long as that program's slice of time.
    """
    if "OMP_NUM_THREADS" not in os.environ and multiplications < LARGE:
        torch.set_num_threads(1)

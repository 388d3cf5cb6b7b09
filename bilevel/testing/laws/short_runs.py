"""Short and quiet runs: what surrounds a response does not depend on how far it gets."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bilevel.randomness import random_kept
from bilevel.responses import Response
from bilevel.testing.subject import NotOffered, ResponseSubject, Subject

FEW = 2
"""Steps of the follower a call."""


def few_steps(subject: Subject) -> Response:
    """The response with few steps; raises `NotOffered` for a function."""
    if not isinstance(subject, ResponseSubject):
        raise NotOffered("Only a response has surroundings.")
    return subject.with_steps(FEW)


@contextmanager
def quiet(seed: int = 0) -> Iterator[None]:
    """Without warnings, and with torch's random numbers from a seed, which are put back."""
    with random_kept(start=seed), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The leader's optimiser."""
    return torch.optim.SGD(parameters, lr=0.0625)

"""What runs through joblib runs on whatever backend is active, a cluster's too, which gives its results at the end."""

from functools import partial

import pytest
import torch

import bilevel as bl

joblib = pytest.importorskip("joblib")


def lead(x, y):
    return (y - 1.0).square().sum() + x.square().sum()


def follow(x, y):
    return (y - 2.0 * x).square().sum()


def compared(jobs):
    game = bl.Game(x=bl.Player(lead, torch.zeros(2)), y=bl.Player(follow, torch.zeros(2)))
    responses = {"unrolled": bl.Unrolled(partial(torch.optim.SGD, lr=0.2), steps=5, tolerance=None)}
    return bl.compare({"known": game}, responses, steps=3, jobs=jobs).rows


def test_a_backend_without_generators_serves():
    from joblib._parallel_backends import SequentialBackend

    class Cluster(SequentialBackend):
        supports_return_generator = False

    joblib.register_parallel_backend("cluster", Cluster)
    with joblib.parallel_config("cluster"):
        assert len(compared(2)) == len(compared(1)) > 0


@pytest.mark.slow
def test_ray_serves():
    pytest.importorskip("ray")
    from ray.util.joblib import register_ray

    register_ray()
    with joblib.parallel_config("ray"):
        assert len(compared(2)) == len(compared(1)) > 0

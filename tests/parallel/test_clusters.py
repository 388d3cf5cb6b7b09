"""What runs through joblib runs on whatever backend is active, a cluster's too, which gives its results at the end."""

import dataclasses
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


@pytest.fixture
def ray():
    found = pytest.importorskip("ray")
    yield found
    found.shutdown()


@pytest.mark.slow
def test_ray_serves(ray):
    from ray.util.joblib import register_ray

    register_ray()
    with joblib.parallel_config("ray"):
        assert len(compared(2)) == len(compared(1)) > 0


@pytest.mark.slow
def test_a_local_ray_is_started_and_stopped_and_gives_the_same_numbers(ray, tmp_path):
    from games.cross_validation import CrossValidation

    game = bl.Game(x=bl.Player(lead, torch.zeros(2)), y=bl.Player(follow, torch.zeros(2)))
    responses = {"unrolled": bl.Unrolled(partial(torch.optim.SGD, lr=0.2), steps=5, tolerance=None)}
    alone = bl.compare({"known": game}, responses, steps=3)
    spread = bl.compare({"known": game}, responses, steps=3, cluster="local", jobs=2, folder=tmp_path)
    assert not ray.is_initialized()
    assert [without_times(row) for row in spread.rows] == [without_times(row) for row in alone.rows]
    candidates = [{"x": torch.zeros(2)}, {"x": torch.ones(2)}]
    one, many = (
        CrossValidation(cluster=cluster, jobs=jobs)(game, candidates) for cluster, jobs in ((None, 1), ("local", 2))
    )
    assert torch.equal(one.leader_losses, many.leader_losses)
    assert not ray.is_initialized()


def without_times(row):
    """What was found, but for how long it took and the memory of a process that had done other things."""

    def kept(tree):
        if isinstance(tree, dict):
            return {key: kept(value) for key, value in tree.items() if "second" not in key and "memory" not in key}
        return [kept(value) for value in tree] if isinstance(tree, list | tuple) else tree

    return repr(kept(dataclasses.asdict(row)))


@pytest.mark.slow
def test_an_error_stops_the_workers(ray):
    from bilevel.workers import side_by_side

    with pytest.raises(ZeroDivisionError):
        list(side_by_side([partial(divmod, 1, 0), partial(divmod, 1, 1)], jobs=2, cluster="local"))
    assert not ray.is_initialized()


def test_a_cluster_that_is_not_there_is_told_at_once():
    pytest.importorskip("ray")
    game = bl.Game(x=bl.Player(lead, torch.zeros(2)), y=bl.Player(follow, torch.zeros(2)))
    responses = {"unrolled": bl.Unrolled(partial(torch.optim.SGD, lr=0.2), steps=5, tolerance=None)}
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1"):
        with pytest.raises(ConnectionError, match=r"Nobody answers at the Ray cluster .*127\.0\.0\.1:1"):
            bl.compare({"known": game}, responses, steps=3, cluster=address)
    with pytest.raises(TypeError, match="cluster=7; expected the address"):
        bl.compare({"known": game}, responses, steps=3, cluster=7)


def test_without_ray_a_cluster_is_refused_before_any_work(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    game = bl.Game(x=bl.Player(lead, torch.zeros(2)), y=bl.Player(follow, torch.zeros(2)))
    responses = {"unrolled": bl.Unrolled(partial(torch.optim.SGD, lr=0.2), steps=5, tolerance=None)}
    with pytest.raises(ImportError, match=r"pip install 'bilevel\[cluster\]'"):
        bl.compare({"known": game}, responses, steps=3, cluster="local")

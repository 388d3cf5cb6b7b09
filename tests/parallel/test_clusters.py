"""What runs through joblib runs on whatever backend is active, a cluster's too, which gives its results at the end."""

import dataclasses
import json
import signal
import time
from contextlib import suppress
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

import bilevel as bl
from bilevel.search import GradientSearch, minimise
from bilevel.workers import on_cluster, side_by_side
from games.cli import app
from games.experiments.experiment import Experiment, Part
from games.experiments.style import empty_figure
from games.paper import catalogue
from games.paper.implicit import at_kink

joblib = pytest.importorskip("joblib")
# Ray leaves its processes to be ended by themselves.
pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::FutureWarning"
)


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
    """Not started."""
    found = pytest.importorskip("ray")
    found.shutdown()
    yield found
    found.shutdown()


@pytest.fixture(scope="session")
def _stopped():
    yield
    pytest.importorskip("ray").shutdown()


@pytest.fixture
def up(_stopped):
    """One on this machine, which the tests share: `local` is this one while it is up."""
    found = pytest.importorskip("ray")
    if not found.is_initialized():
        found.init(num_cpus=2, include_dashboard=False, log_to_driver=False)


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


def bowl(x, kind):
    return (x - 0.3) ** 2 + (0.1 if kind == "wide" else 0.0)


def searched(**options):
    space = {"x": bl.Interval(-1.0, 1.0), "kind": bl.Choice(["wide", "narrow"])}
    return minimise(bowl, GradientSearch(space, evaluations=7), **options)


@pytest.mark.slow
def test_trials_side_by_side_are_those_of_one_process():
    pairs = searched(jobs=2)
    with joblib.parallel_config("sequential"):
        assert searched(jobs=2).losses == pairs.losses
    assert len(pairs.losses) == 7
    assert pairs.loss == pytest.approx(0.0, abs=1e-2)
    assert searched().losses[0] == pairs.losses[0]
    for jobs in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="minimise: jobs=.* which ones they are depends on it"):
            searched(jobs=jobs)


def miss(weights, batch):
    return (weights(batch[0])[:, 0] - batch[1]).square().mean()


def decayed(weights, decay, batch):
    return miss(weights, batch) + bl.penalty(weights, decay)


def tuned():
    inputs = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    data = [[(part, part.sum(1))] for part in inputs.split(6)]
    torch.manual_seed(0)
    model, hyper = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout(0.1)), {"decay": bl.Log(1e-4, 1.0)}
    adam = partial(torch.optim.Adam, lr=0.05)
    return bl.tune(model, decayed, miss, *data, hyper=hyper, optimizer=adam, steps=10, check=0.0)


def same(one, other):
    # One thread or two: sums of a few products in another order, through ten steps.
    assert one.found == pytest.approx(other.found, rel=1e-5)
    assert one.start == pytest.approx(other.start, rel=1e-5)
    for a, b in zip(one.models, other.models, strict=True):
        assert not b.training
        for key, value in a.state_dict().items():
            assert torch.allclose(value, b.state_dict()[key], rtol=1e-4, atol=1e-6)


def test_seeds_side_by_side_are_those_of_one_process(tmp_path):
    found = tuned()
    alone = bl.retrain(found, seeds=2)
    with joblib.parallel_config("sequential"):
        same(alone, bl.retrain(found, seeds=2, jobs=2, checkpoint=tmp_path / "kept.pt"))
    same(alone, bl.retrain(found, seeds=2, checkpoint=tmp_path / "kept.pt"))  # which has them all
    with pytest.raises(ValueError, match="retrain: jobs=0"):
        bl.retrain(found, jobs=0)


@pytest.mark.slow
@pytest.mark.usefixtures("up")
def test_trials_and_seeds_go_to_ray(tmp_path):
    assert searched(jobs=2, cluster="local").losses == searched(jobs=2).losses
    found = tuned()
    same(bl.retrain(found, seeds=2), bl.retrain(found, seeds=2, cluster="local", checkpoint=tmp_path / "kept.pt"))
    same(bl.retrain(found, seeds=2), bl.retrain(found, seeds=2, checkpoint=tmp_path / "kept.pt"))


def kink():
    part = Part("kink", at_kink, {"penalty": 2.9, "seed": 0}, 2.0)
    return {"kink": Experiment("kink", "The kink", (part,), lambda _: empty_figure(), lambda _: "there")}


COMMANDS = {
    "paper": ["kink"],
    "gan": ["ring", "--seeds", "1", "--evaluations", "60", "--method", "alternating", "--method", "learned"],
    "meta": ["sinusoid", "--shots", "5", "--steps", "3", "--tasks", "2", "--held-out", "4"],
}


@pytest.mark.slow
@pytest.mark.usefixtures("up")
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_go_to_ray(command, tmp_path, monkeypatch):
    monkeypatch.setattr(catalogue, "experiments", kink)
    results = []
    for name, where in (("here", ["--jobs", "1"]), ("there", ["--ray", "local"])):
        arguments = [command, *COMMANDS[command], *where, "--output", str(tmp_path / name)]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 0, done.output
        (file,) = (tmp_path / name).glob("*.json")
        results.append(numbers(json.loads(file.read_text())["results"]))
    assert results[1] == pytest.approx(results[0], rel=1e-6)


def numbers(tree, path=""):
    """Those that a run has found, but for how long it took."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    found = {key: value for name, part in pairs for key, value in numbers(part, f"{path}/{name}").items()}
    return found | ({path: tree} if isinstance(tree, int | float) and "second" not in path else {})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_ray_starts_is_not_lost(ray, monkeypatch, number):
    """As where it comes in a callback, whose errors Python prints and forgets; Ray's handler of SIGTERM goes, too."""
    done = []

    def init(**_):
        with suppress(BaseException):
            signal.raise_signal(number)
            time.sleep(0.0)
        signal.signal(signal.SIGTERM, lambda *_: None)

    def terminated(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        with pytest.raises(KeyboardInterrupt), on_cluster("local"):
            done.append("work")
        assert signal.getsignal(signal.SIGTERM) is terminated
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not done


@pytest.mark.slow
def test_an_error_stops_the_workers(ray):
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

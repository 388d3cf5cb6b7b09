"""Work side by side: through joblib on whatever backend is active, or on a Ray cluster, one of this machine here."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import suppress
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

import bilevel as bl
from bilevel.errors import WorkerError
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


def compared(**options):
    game = bl.Game(x=bl.Player(lead, torch.zeros(2)), y=bl.Player(follow, torch.zeros(2)))
    responses = {"unrolled": bl.Unrolled(partial(torch.optim.SGD, lr=0.2), steps=5, tolerance=None)}
    return bl.compare({"known": game}, responses, steps=3, **options).rows


def test_a_backend_without_generators_serves():
    from joblib._parallel_backends import SequentialBackend

    class Cluster(SequentialBackend):
        supports_return_generator = False

    joblib.register_parallel_backend("cluster", Cluster)
    with joblib.parallel_config("cluster"):
        assert len(compared(jobs=2)) == len(compared(jobs=1)) > 0


def needs_ray(test):
    """Run by CI where Ray is installed, in one process: those that ask for `up` share one Ray."""
    return pytest.mark.ray(pytest.mark.slow(test))


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
    """One on this machine: `local` is this one while it is up."""
    found = pytest.importorskip("ray")
    if not found.is_initialized():
        found.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    return found


@needs_ray
def test_a_local_ray_is_started_and_stopped_and_gives_the_same_numbers(ray, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of a cluster that the machine is part of
    alone = compared(jobs=1)
    spread = compared(jobs=2, cluster="local", folder=tmp_path)
    assert not ray.is_initialized()
    assert [without_times(row) for row in spread] == [without_times(row) for row in alone]


@needs_ray
def test_an_error_stops_the_workers(ray):
    with pytest.raises(ZeroDivisionError):
        list(side_by_side([partial(divmod, 1, 0), partial(time.sleep, 600)], jobs=2, cluster="local"))
    assert not ray.is_initialized()


@needs_ray
def test_an_address_is_joined(up):
    """By another process: this one has joined already."""
    address = up.get_runtime_context().gcs_address
    program = (
        "from functools import partial\n"
        "from bilevel.workers import side_by_side\n"
        f"print(dict(side_by_side([partial(int, 3)], jobs=1, cluster={address!r})))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert "{0: 3}" in done.stdout, done.stderr


@needs_ray
def test_candidates_go_to_ray(up):
    from games.cross_validation import CrossValidation

    game = bl.Game(x=bl.Player(lead, torch.zeros(2)), y=bl.Player(follow, torch.zeros(2)))
    candidates = [{"x": torch.zeros(2)}, {"x": torch.ones(2)}]
    one, many = (
        CrossValidation(cluster=cluster, jobs=jobs)(game, candidates) for cluster, jobs in ((None, 1), ("local", 2))
    )
    assert torch.equal(one.leader_losses, many.leader_losses)


@needs_ray
def test_ray_serves_as_a_backend_of_joblib(up):
    from ray.util.joblib import register_ray

    register_ray()
    with joblib.parallel_config("ray"):
        assert dict(side_by_side([partial(int, 3), partial(int, 4)], jobs=2)) == {0: 3, 1: 4}


def killed_at_first(folder):
    began = folder / "began"
    if not began.exists():
        began.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"


class OddError(Exception):
    """Pickle asks for it with one argument."""

    def __init__(self, words, number):
        super().__init__(words)


def odd():
    raise OddError("too dark", 3)


@needs_ray
def test_a_killed_worker_is_another_and_more_jobs_than_cores_wait(up, tmp_path):
    work = [partial(int, number) for number in range(5)]
    work[3] = partial(killed_at_first, tmp_path)
    assert dict(side_by_side(work, jobs=5, cluster="local")) == {0: 0, 1: 1, 2: 2, 3: "done", 4: 4}
    assert (tmp_path / "began").exists()


@pytest.mark.parametrize("cluster", [None, pytest.param("local", marks=[pytest.mark.slow, pytest.mark.ray])])
def test_what_cannot_be_sent_ends_in_words(request, cluster):
    if cluster is not None:
        request.getfixturevalue("up")
    # The last of many: a backend of joblib's pickles it in a thread, whose errors nobody sees.
    work = [partial(int, 1)] * 9 + [partial(print, threading.Lock())]
    with joblib.parallel_config("threading"):
        with pytest.raises(TypeError, match=r"cannot be sent to another process: .*'_thread.lock'.* jobs=1"):
            list(side_by_side(work, jobs=2, cluster=cluster))
        with pytest.raises(WorkerError, match="^OddError: too dark"):
            list(side_by_side([odd, odd], jobs=2, cluster=cluster))


@pytest.mark.slow
def test_a_killed_process_ends_in_words(tmp_path):
    with pytest.raises(WorkerError, match=r"ended before its work was done.* fewer jobs"):
        list(side_by_side([partial(killed_at_first, tmp_path)] * 2, jobs=2))


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


@needs_ray
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
    "compare": ["--game", "cournot", "--response", "unrolled", "--steps", "2", "--seeds", "1", "--laws", "0"],
    "meta": ["sinusoid", "--shots", "5", "--steps", "3", "--tasks", "2", "--held-out", "4"],
}


@needs_ray
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
        content = json.loads(file.read_text())
        results.append(numbers(content["rows"] if command == "compare" else content["results"]))
    assert results[1] == pytest.approx(results[0], rel=1e-6)


def numbers(tree, path=""):
    """Those that a run has found, but for its seconds and bytes."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else []
    found = {key: value for name, part in pairs for key, value in numbers(part, f"{path}/{name}").items()}
    return found | (
        {path: tree} if isinstance(tree, int | float) and "second" not in path and "memory" not in path else {}
    )


NET = """
    import torch
    from torch import nn

    def build(): return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.1), nn.Linear(4, 2))

    def batches():
        x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
        return [(part, (part.sum(1) > 0).long()) for part in x.split(12)]

    def loaders(): return batches(), batches()
"""


@needs_ray
@pytest.mark.usefixtures("up")
def test_fresh_trainings_of_a_command_go_to_ray(tmp_path):
    net = tmp_path / "net_of_a_command.py"  # which no worker finds
    net.write_text(textwrap.dedent(NET))
    given = ["tune", "--model", f"{net}:build", "--data", f"{net}:loaders", "--steps", "10"]
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        for name, where in (("here", []), ("there", ["--ray", "local"])):
            options = ["--retrain", "2", *where, "--output", str(tmp_path / name)]
            done = CliRunner().invoke(app, [*given, *options])
            assert done.exit_code == 0, done.output
            found[name] = numbers(json.loads((tmp_path / name / "results.json").read_text())["retrained"])
    assert len(found["here"]) == 4
    assert found["there"] == pytest.approx(found["here"], rel=1e-5)


@pytest.mark.ray
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


@pytest.mark.ray
def test_a_cluster_that_is_not_there_is_told_at_once():
    pytest.importorskip("ray")
    for address in ("127.0.0.1:1", "ray://127.0.0.1:1", "nowhere"):
        with pytest.raises(ConnectionError, match=f"Ray cluster .*{address}"):
            compared(cluster=address)
    with socket.create_server(("127.0.0.1", 0)) as other:
        answer = threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.1 400 Bad Request"))
        answer.start()
        with pytest.raises(ConnectionError, match="what answers there is no Ray"):
            compared(cluster=f"127.0.0.1:{other.getsockname()[1]}")
        answer.join()
    with pytest.raises(TypeError, match="cluster=7; expected the address"):
        compared(cluster=7)
    for jobs in (0, -2, 1.5, "2", True):
        with pytest.raises(ValueError, match=f"compare: jobs={jobs!r}; expected a whole number from 1, or -1"):
            compared(jobs=jobs)


def test_without_ray_a_cluster_is_refused_before_any_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'bilevel\[cluster\]'"):
        compared(cluster="local")

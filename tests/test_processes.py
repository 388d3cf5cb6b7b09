"""Two processes: what would drift apart in silence is refused by name, and each way out works."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import sys, torch
from torch import distributed as dist, nn
import bilevel as bl

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
one = torch.ones(())
early = bl.Game(x=bl.Player(lambda y: y.square(), one), y=bl.Player(lambda x, y: (y - x).square(), one))
settle = bl.Unrolled(torch.optim.SGD, steps=1)
begun, shared = settle.init(early), bl.DataParallel().game(early)
tasks = bl.Tasks(
    x=bl.Player(lambda y, batch: (y - batch).square().sum(), torch.ones(2)),
    y=bl.Player(lambda x, y, batch: (y - x * batch).square().sum(), torch.ones(2)),
    data=[{"support": torch.ones(4, 2), "query": torch.ones(4, 2)}],
)
dealt = bl.DataParallel().game(tasks)
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
torch.manual_seed(0)
inner, inputs = nn.Linear(4, 1), torch.randn(6, 4)
wrapped = nn.parallel.DistributedDataParallel(inner)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

older = FullyShardedDataParallel(nn.Linear(4, 1), device_id=torch.device("cpu"))
mesh = init_device_mesh("cpu", (2,))
sharded = fully_shard(nn.Linear(4, 1), mesh=mesh)
fit = lambda y: y(inputs).square().mean()

def told(make):
    try:
        make()
    except ValueError as error:
        return str(error)
    return "made"

with bl.extend.separate_ranks():
    print("init:", told(lambda: bl.Game(y=bl.Player(fit, wrapped))))
    print("init:", told(lambda: bl.Game(y=bl.Player(fit, wrapped.module))))
    print("within:", told(lambda: bl.Game(y=bl.Player(fit, nn.Sequential(wrapped)))))
    print("called:", told(lambda: bl.Game(y=bl.Player(lambda y: (y * wrapped(inputs)).square().mean(), torch.ones(1)))))
    print("called:", told(lambda: bl.Game(y=bl.Player(lambda y: (y * inner(inputs)).square().mean(), torch.ones(1)))))
    print("older fsdp:", told(lambda: bl.Game(y=bl.Player(fit, older))))
    print("older fsdp:", told(lambda: bl.Game(y=bl.Player(fit, nn.Sequential(older)))))
    print("older fsdp:", told(lambda: bl.Game(y=bl.Player(lambda y: y.sum() * older(inputs).mean(), torch.ones(1)))))
    print("inside it:", told(lambda: bl.Game(y=bl.Player(fit, older.module))))
    print("fsdp:", told(lambda: bl.Game(y=bl.Player(lambda y: (y * sharded(inputs)).square().mean(), torch.ones(1)))))
game = bl.Game(x=bl.Player(lambda y: y(inputs).mean(), torch.ones(())), y=bl.Player(lambda x, y: fit(y) * x, inner))
print("early:", told(lambda: settle(early, {"x": one}, begun)))
print("early:", told(lambda: settle(shared, {"x": one}, begun)))
print("early:", told(lambda: bl.solve(shared, steps=1)))
print("tasks:", told(lambda: bl.solve(dealt, y=settle, steps=1)))
print("ranks:", told(lambda: bl.solve(game, steps=1)))
print("ranks:", told(lambda: bl.Implicit(torch.optim.SGD).init(game)))
fitted = bl.Unrolled(lambda parameters: torch.optim.SGD(parameters, lr=0.1), steps=1, tolerance=None)
print("older:", told(lambda: bl.solve(early, y=fitted, steps=1)))
print("older:", told(lambda: bl.solve(early, y=fitted, steps=1, parallel=bl.DataParallel(timeout=60.0))))
dist.destroy_process_group()
print("alone:", told(lambda: bl.solve(game, steps=1)))
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    # A file to meet at needs no free port.
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(meeting)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    return [line.split(": ", 1) for line in outputs[0][0].splitlines()]


def of(lines, name):
    return [told for found, told in lines if found == name]


def test_a_wrapped_module_is_refused_and_its_inside_serves(lines):
    refused, served = of(lines, "init")
    assert refused.startswith("Player 'y': its module is wrapped by DistributedDataParallel")
    assert refused.endswith("Pass the module that it wraps, model.module.")
    assert served == "made"
    assert of(lines, "within")[0].startswith("Player 'y': '0' in its module is wrapped by DistributedDataParallel")


def test_a_wrapped_module_in_a_loss_is_refused(lines):
    refused, served = of(lines, "called")
    assert refused.startswith("Player 'y': a module that its objective calls is wrapped by DistributedDataParallel")
    assert served == "made"


def test_a_sharded_module_that_is_no_player_is_refused(lines):
    assert "is sharded by fully_shard, and no player's" in of(lines, "fsdp")[0]


def test_the_older_wrapper_is_refused_wherever_it_is_with_the_way_out(lines):
    places = ["its module is", "'0' in its module is", "a module that its objective calls is"]
    for refused, place in zip(of(lines, "older fsdp"), places, strict=True):
        assert refused.startswith(f"Player 'y': {place} wrapped by FullyShardedDataParallel")
        assert "Use torch.distributed.fsdp.fully_shard(module), and parallel=bilevel.DataParallel()." in refused
    # What it wraps is no way out, as with DistributedDataParallel: this rank's part of one flat vector.
    assert of(lines, "inside it") != ["made"]


def test_a_game_that_is_older_than_the_process_group_is_refused_when_it_is_solved(lines):
    refused, served = of(lines, "older")
    assert refused.startswith("solve: this process is one of 2 ranks")
    assert served == "made"


def test_tasks_that_are_older_than_the_process_group_are_refused(lines):
    assert of(lines, "tasks")[0].startswith("solve: this process is one of 2 ranks")


def test_several_ranks_are_refused_unless_each_plays_alone(lines):
    solved, answered = of(lines, "ranks")
    assert solved.startswith("solve: this process is one of 2 ranks")
    assert "parallel=bilevel.DataParallel()" in solved
    assert answered.startswith("The response of player 'y': this process is one of 2 ranks")
    assert of(lines, "alone") == ["made"]


def test_a_process_group_that_comes_after_the_game_is_noticed_in_the_next_call(lines):
    called, shared, solved = of(lines, "early")
    for told in (called, shared):
        assert told.startswith("The response of player 'y': this process is one of 2 ranks")
    assert solved.startswith("solve: this process is one of 2 ranks")

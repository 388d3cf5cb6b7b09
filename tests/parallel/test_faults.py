"""Ranks that differ are refused in words on all; one that ends or hangs ends the others; a run goes on from disk."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from bilevel.solving import checkpoint

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow

WORDS = {
    "response": r"responses\.weights\.steps is 2 on rank 0 and 3 on rank 1",
    "steps": r"options\.steps is 2 on rank 0 and 3 on rank 1",
    "start": r"the start of 'weights' is .* Call torch.manual_seed\(0\) before the model is made",
    "length": r"the number of batches of 'weights' is 2 on rank 0 and 1 on rank 1",
    "batch": r"the first batch of 'weights' is .* DataParallel\(sharded=True\)",
    "players": r"players, in order of play is decay on rank 0 and other on rank 1",
    "loss": r"the loss of player 'weights' is .* as the mean of its halves",
    "data": r"The data of player 'weights' raised OSError at batch 2 of pass 1: the disk has gone",
    "numbers": r"torch's random numbers is",
    "version": r"the version of bilevel is .* on rank 0 and 0\.0\.0 on rank 1",
}


def test_ranks_that_differ_are_refused_in_words_on_all(played):
    first, odd = played("disagree", 2, limit=60.0)
    for lines in (first, odd):
        found = {told["case"]: told for told in lines}
        assert list(found) == list(WORDS)
        for case, words in WORDS.items():
            assert re.search(words, found[case]["text"]), found[case]
    # Where one rank alone knows, the others say what it said.
    by_case = {told["case"]: told["kind"] for told in first}
    assert set(by_case.values()) == {"ParallelError"}
    assert {told["case"]: told["kind"] for told in odd} | {"loss": "", "data": ""} == by_case | {"loss": "", "data": ""}


FURTHER = {
    "rate": r"responses\.weights.*lr.* is 0\.5 on rank 0 and 0\.4 on rank 1",
    "kind": r"responses\.weights",
    "captured": r"players\.weights\.objective\.captured\.factor is 1\.0 on rank 0 and 2\.0 on rank 1",
    "leader": r"optimizer\.keywords\.lr is 0\.1 on rank 0 and 1\.1 on rank 1",
    "dynamics": r"dynamics\.class is Alternating on rank 0 and Extragradient on rank 1",
    "seed": r"options\.seed is 0 on rank 0 and 1 on rank 1",
    "clipped": r"clip_norm is 1\.0 on rank 0 and 2\.0 on rank 1",
    "dtype": r"the form of 'decay' is \[2\] torch.float64 on rank 0 and \[2\] torch.float32 on rank 1",
    "frozen": r"the form of 'weights'",
    "dropout": r"drop of 'weights' is Dropout\(p=0\.1.*\) in training on rank 0 and Dropout\(p=0\.5",
    "coupled": r"DataParallel's coupled= is False on rank 0 and True on rank 1",
    "sharded": r"DataParallel's sharded= is False on rank 0 and True on rank 1",
    "examples": r"DataParallel's examples= is None on rank 0 and a function on rank 1",
    "limit": r"DataParallel's timeout= is 20\.0 on rank 0 and 21\.0 on rank 1",
    "checkpoint": r"options\.checkpoint is False on rank 0 and True on rank 1",
    "second batch": r"rank 1 has read other batches than rank 0",
    "second length": r"rank 1 has read other batches than rank 0",
    "Games": r"the kind of game is Game on rank 0 and Games on rank 1",
    "Tasks": r"the kind of game is Game on rank 0 and Tasks on rank 1",
    "deterministic": r"are_deterministic_algorithms_enabled\(\) is False on rank 0 and True on rank 1",
    "threads": r"the number of threads is 1 on rank 0 and 2 on rank 1. Set the same OMP_NUM_THREADS",
    "domain": r"domain= of 'y' is Box\(0\.0, 1\.0\) on rank 0 and Box\(0\.0, 2\.0\) on rank 1",
    "no domain": r"domain= of 'y' is Simplex\(2\.0\) on rank 0 and None on rank 1",
    "walls": r"domain= of 'y' is Box\(0\.0, tensor \[2\] #.* on rank 0 and Box\(0\.0, tensor \[2\] #.* on rank 1",
    "prox": r"prox= of 'y' is L1\(0\.1\) on rank 0 and L1\(1\.1\) on rank 1",
    "range": r"the ranges of 'x' is \[Log\(0\.1, 2\.0, .*\)\] on rank 0 and \[Log\(0\.1, 3\.0, .*\)\] on rank 1",
    "inequality": r"players\.y\.inequality\.captured\.limit is 1\.0 on rank 0 and 2\.0 on rank 1",
}


def test_ranks_that_differ_in_what_a_start_does_not_show_are_refused_in_words_on_all(played, tmp_path):
    for lines in played("disagree_further", 2, str(tmp_path), limit=100.0):
        found = {told["case"]: told for told in lines}
        assert list(found) == list(FURTHER)
        for case, words in FURTHER.items():
            assert re.search(words, found[case]["text"]), found[case]


@pytest.mark.parametrize("size", [2, 3])
def test_a_rank_that_is_killed_ends_the_others_at_once(ranks, tmp_path, size):
    path = tmp_path / "run.pt"
    with ranks("runs", size, str(path), "60") as started:
        for rank in range(size):
            assert started.said(rank)[0] == {"step": 5}
        started.kill(size - 1)
        began = time.monotonic()
        for rank in range(size - 1):
            _, lines, _ = started.outcome(rank, limit=30.0)
            assert f"rank {rank} of {size} waited for the others" in lines[0]["error"]
        assert time.monotonic() - began < 20.0
    assert checkpoint.load(path)["step"] >= 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.pt"]


def test_a_rank_that_hangs_ends_the_others_after_the_time_limit(ranks, tmp_path):
    path = tmp_path / "run.pt"
    with ranks("runs", 2, str(path), "3") as started:
        for rank in range(2):
            assert started.said(rank)[0] == {"step": 5}
        started.stop(1)
        began = time.monotonic()
        _, lines, _ = started.outcome(0, limit=60.0)
        assert "they did not all come within 3 s" in lines[0]["error"]
        assert time.monotonic() - began > 2.0
    assert checkpoint.load(path)["step"] >= 4


def test_a_run_goes_on_with_another_number_of_ranks(played, tmp_path):
    path = tmp_path / "run.pt"
    played("resumes", 3, str(path), "3")
    played("resumes", 2, str(path), "6")
    ((ends,),) = played("resumes", 1, str(path), "9")
    ((whole,),) = played("resumes", 1, "", "9")
    assert ends["steps"] == whole["steps"] == 9
    error = (torch.tensor(ends["decay"]) - torch.tensor(whole["decay"])).norm()
    assert error <= 1e-6 * torch.tensor(whole["decay"]).norm()  # the lists were rounded to float32 to compare


PROGRAM = """
import os, pathlib, sys, torch
os.environ["RANK_OF_TEST"] = os.environ["RANK"] + "/" + os.environ["WORLD_SIZE"]
sys.path.insert(0, sys.argv[1])
import programs

torch.manual_seed(0)
folder = pathlib.Path(sys.argv[2])
first = not (folder / "died").exists()

def dies(step, record, variables):
    if first and step == 5 and os.environ["RANK"] == "1":
        (folder / "died").touch()
        os._exit(3)

solution = programs.PLAY(
    programs.make(), steps=8, checkpoint=folder / "run.pt", checkpoint_every=2,
    parallel=programs.bl.DataParallel(timeout=60.0), callbacks=[dies],
)
(folder / ("end" + os.environ["RANK"])).write_text(str(solution.variables["decay"].tolist()))
"""


def test_torchrun_starts_again_what_has_ended_and_it_goes_on(played, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(program), str(Path(__file__).parent), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # A session of its own: what torchrun has started ends with it.
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as started:
        try:
            _, errors = started.communicate(timeout=120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
    assert started.returncode == 0, errors[-2000:]
    assert (tmp_path / "died").exists()
    assert (tmp_path / "end0").read_text() == (tmp_path / "end1").read_text()
    assert checkpoint.load(tmp_path / "run.pt")["step"] == 8

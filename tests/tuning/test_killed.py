"""A run of tune whose loaders have workers and samplers a state, killed at random moments, ends where one ends that was
left alone."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from functools import partial
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Sampler
import bilevel as bl

class Noisy(Dataset):
    def __init__(self, seed):
        self.x = torch.randn(60, 6, generator=torch.Generator().manual_seed(seed))
    def __len__(self):
        return len(self.x)
    def __getitem__(self, row):
        x = self.x[row]
        return x + 0.1 * torch.randn(6), x[:3].argmax()  # a worker's own random numbers

class Keeping(Sampler):
    # It counts its passes, goes on where it was stopped, and shuffles by a generator of its own.
    def __init__(self):
        self.passes, self.order, self.place, self.own = 0, None, 0, np.random.default_rng(7)
    def __iter__(self):
        if self.order is None:
            self.order = np.roll(self.own.permutation(60), self.passes)
        while self.place < 60:
            self.place += 1
            yield int(self.order[self.place - 1])
        self.passes, self.order, self.place = self.passes + 1, None, 0
    def __len__(self):
        return 60

def loader(seed, workers):
    return DataLoader(Noisy(seed), batch_size=20, sampler=Keeping(), num_workers=workers)

def loss(weights, batch):
    return cross_entropy(weights(batch[0]), batch[1])

def told(step, record, variables):
    print(step, flush=True)

if __name__ == "__main__":
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
    tuned = bl.tune(
        model, loss, loss, loader(0, 2), loader(1, 0), steps=60, every=2, checkpoint=sys.argv[1], checkpoint_every=3,
        hyper=[bl.hyper.WeightDecay(per="layer"), bl.hyper.Dropout(), bl.hyper.Noise()],
        optimizer=partial(torch.optim.Adam, lr=1e-2), callbacks=[told], check=0.0,
    )
    history = [{k: v for k, v in record.items() if k != "seconds"} for record in tuned.history]
    torch.save({"model": tuned.model.state_dict(), "hyper": tuned.hyper, "history": history}, sys.argv[2])
"""


def play(program, checkpoint, end, kill_after=None, wait=0.0):
    """Run it; or kill it, and its workers, some moment after so many of its own steps. Gives the steps it told."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(program), str(checkpoint), str(end)]
    steps = []
    # A session of its own: what it has started ends with it.
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as started:
        try:
            for line in started.stdout:
                steps.append(int(line))
                if len(steps) == kill_after:
                    time.sleep(wait)
                    break
            else:
                assert started.wait(timeout=60) == 0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
    return steps


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return a == b


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals and sessions")
def test_killed_three_times_it_ends_bit_for_bit_where_it_would_have(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    whole = play(program, tmp_path / "whole.pt", tmp_path / "whole.end")
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)  # shown where the test fails
    moments = random.Random(seed)
    for _ in range(3):
        # A quarter of the run each at most, so that the third kill finds it running; within a step, or a save.
        steps = play(
            program, tmp_path / "run.pt", tmp_path / "run.end",
            kill_after=moments.randint(1, len(whole) // 4), wait=moments.uniform(0.0, 0.05),
        )  # fmt: skip
        assert steps[0] <= len(whole)
        assert not (tmp_path / "run.end").exists()
    rest = play(program, tmp_path / "run.pt", tmp_path / "run.end")
    assert rest[0] > 1 or steps[0] == 1, "it went on, and did not begin anew"
    ends = [torch.load(tmp_path / f"{name}.end", weights_only=True) for name in ("whole", "run")]
    assert equal(*ends)

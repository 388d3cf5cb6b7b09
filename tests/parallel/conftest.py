"""Starts the ranks of a test, waits for them no longer than it may, and ends them whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).parent / "programs.py"


class Played:
    """Ranks that play a program of programs.py; each prints lines of JSON."""

    def __init__(self, folder, program, size, *arguments):
        # A file to meet at needs no free port.
        meeting = Path(folder) / f"meeting-{time.monotonic_ns()}"
        shared = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", PROGRAMS, program, str(meeting), *arguments],
                cwd=ROOT, env=shared | {"RANK_OF_TEST": f"{rank}/{size}"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(size)
        ]  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in self.ranks:
            if rank.poll() is None:
                rank.kill()
            rank.communicate()

    def kill(self, rank):
        self.ranks[rank].send_signal(signal.SIGKILL)

    def stop(self, rank):
        self.ranks[rank].send_signal(signal.SIGSTOP)

    def said(self, rank):
        """The next line that a rank prints."""
        return json.loads(self.ranks[rank].stdout.readline())

    def outcome(self, rank, limit=120.0):
        """The exit code, and all lines that it has printed since."""
        out, err = self.ranks[rank].communicate(timeout=limit)
        return self.ranks[rank].returncode, [json.loads(line) for line in out.splitlines()], err


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """`with ranks(program, size, *arguments) as started:` starts them."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    return lambda program, size, *arguments: Played(tmp_path_factory.mktemp("ranks"), program, size, *arguments)


@pytest.fixture(scope="session")
def played(ranks):
    """What each rank of a program printed, once all have ended well."""

    def play(program, size, *arguments, limit=120.0):
        with ranks(program, size, *arguments) as started:
            ends = [started.outcome(rank, limit) for rank in range(size)]
        assert [code for code, _, _ in ends] == [0] * size, [err[-2000:] for _, _, err in ends]
        return [lines for _, lines, _ in ends]

    return play

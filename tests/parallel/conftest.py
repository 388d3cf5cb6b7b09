"""Starts the ranks of a test, waits for them no longer than it may, and ends them whatever happens."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Played:
    """Ranks that play a program of programs.py; each prints lines of JSON."""

    def __init__(self, forked, folder, program, size, arguments):
        self.folder, self.read = folder, [0] * size  # a file to meet at needs no free port
        play = sys.modules["programs"].play
        self.ranks = [
            forked.Process(target=play, args=(rank, size, str(folder), program, *arguments)) for rank in range(size)
        ]
        for rank in self.ranks:
            rank.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def kill(self, rank):
        self.ranks[rank].kill()

    def stop(self, rank):
        os.kill(self.ranks[rank].pid, signal.SIGSTOP)

    def lines(self, rank):
        """Those that it has printed since the last call, whole ones."""
        try:
            text = (self.folder / f"out{rank}").read_text()[self.read[rank] :]
        except FileNotFoundError:
            return []
        text = text[: text.rfind("\n") + 1]
        self.read[rank] += len(text)
        return [json.loads(line) for line in text.splitlines()]

    def said(self, rank, limit=60.0):
        """The next lines that a rank prints."""
        end = time.monotonic() + limit
        while not (lines := self.lines(rank)):
            assert time.monotonic() < end and self.ranks[rank].is_alive(), self.errors(rank)
            time.sleep(0.01)
        return lines

    def errors(self, rank):
        file = self.folder / f"err{rank}"
        return file.read_text() if file.exists() else ""

    def outcome(self, rank, limit=120.0):
        """The exit code, and all lines that it has printed since."""
        self.ranks[rank].join(limit)
        assert not self.ranks[rank].is_alive(), f"rank {rank} did not end within {limit} s: {self.errors(rank)[-2000:]}"
        return self.ranks[rank].exitcode, self.lines(rank), self.errors(rank)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """`with ranks(program, size, *arguments) as started:` starts them.

    Ranks are forked from one process that has imported everything: an import takes longer than most programs.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        pytest.skip("ranks are forked here")
    forked = multiprocessing.get_context("forkserver")
    forked.set_forkserver_preload(["programs"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{ROOT}")
        patch.setenv("PYTHONWARNINGS", "ignore")
        patch.syspath_prepend(HERE)
        __import__("programs")
        multiprocessing.forkserver.ensure_running()
    return lambda program, size, *arguments: Played(forked, tmp_path_factory.mktemp("ranks"), program, size, arguments)


@pytest.fixture(scope="session")
def played(ranks):
    """What each rank of a program printed, once all have ended well."""

    def play(program, size, *arguments, limit=120.0):
        with ranks(program, size, *arguments) as started:
            ends = [started.outcome(rank, limit) for rank in range(size)]
        assert [code for code, _, _ in ends] == [0] * size, [error[-2000:] for _, _, error in ends]
        return [lines for _, lines, _ in ends]

    return play

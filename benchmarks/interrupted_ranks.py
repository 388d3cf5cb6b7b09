"""What runs on several ranks survive: one rank is killed, or hangs, or the disk is full; then the run goes on.

Two ranks play a small game on parts of batches, on sharded variables, on many tasks, or many games at once. At a
random moment one of them is killed by `kill -9` or stopped by SIGSTOP, or the disk of the checkpoint is filled. All
others must end within the time limit, with an error that says so. Resumed on 2, 1 or 3 ranks, the run must end where
one that nobody stopped ends: on as many ranks bit for bit, history too; on others to 1e-9, since a step sums in another
order (a few eps of 2e-16), linear solves of condition numbers below 1e3 magnify that, and twenty steps add up. Needs
POSIX.

    python -m benchmarks.interrupted_ranks --trials 10 --output docs/processes/interrupted.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

import bilevel as bl
from benchmarks.head import head
from benchmarks.interrupted_commands import fill, small_disk
from bilevel.extend import leaves

STEPS, EVERY, TIMEOUT = 20, 2, 4.0
PAUSE = 0.02
"""Seconds that a step takes at least, so that faults come within steps and between them."""
MEETS = 15.0
"""The time limit of the process group that the program makes, in which busy ranks must still meet."""
ENDS = MEETS + 15.0
"""Seconds within which the other ranks must have ended: the limit, and what a busy machine needs."""
TOLERANCE = 1e-9
TOLD = 3
"""The exit code of a rank that ended by an error of ours."""


def drawn(rows: int, width: int, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Games ---------------------------------------------------------------------------------------------------------------

RATE = partial(SGD, lr=0.1, momentum=0.5)
UNROLLED = bl.Unrolled(RATE, steps=3, tolerance=None)


def miss(weights: Any, batch: Any) -> Tensor:
    inputs, targets = batch
    return ((inputs @ weights - targets) ** 2).mean()


def fit(decay: Any, weights: Any, batch: Any) -> Tensor:
    return miss(weights, batch) + (decay.exp() * weights.square()).sum()


def batches() -> tuple[bl.Game, dict[str, Any]]:
    data = TensorDataset(drawn(17, 6, 1), drawn(17, 1, 2)[:, 0])
    game = bl.Game(
        decay=bl.Player(miss, drawn(1, 6, 3)[0] - 1.0, data=[(drawn(9, 6, 4), drawn(9, 1, 5)[:, 0])]),
        weights=bl.Player(fit, torch.zeros(6, dtype=torch.float64), data=DataLoader(data, 5, shuffle=True)),
    )
    return game, {"weights": UNROLLED}


def judge_net(weights: Any, batch: Any) -> Tensor:
    inputs, labels = batch
    return torch.nn.functional.cross_entropy(weights(inputs), labels)


def fit_net(decay: Any, weights: Any, batch: Any) -> Tensor:
    return judge_net(weights, batch) + bl.penalty(weights, 2.0 * decay.exp())


def sharded() -> tuple[bl.Game, dict[str, Any]]:
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 6)).double()
    if distributed.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    game = bl.Game(
        decay=bl.Player(
            judge_net, torch.tensor(-3.0, dtype=torch.float64), data=[(drawn(7, 5, 6), torch.arange(7) % 6)]
        ),
        weights=bl.Player(fit_net, module, data=[(drawn(9, 5, 5), torch.arange(9) % 6)]),
    )
    return game, {"weights": UNROLLED}


def fit_task(meta: Any, task: Any, batch: Any) -> Tensor:
    return miss(task, batch) + 5.0 * (task - meta).square().sum()


def tasks() -> tuple[bl.Game, dict[str, Any]]:
    start = drawn(1, 3, 50)[0]
    data = [
        {
            "support": (drawn(n * 6, 3, 10 + n).reshape(n, 6, 3), drawn(n, 6, 20)),
            "query": (drawn(n * 4, 3, 30).reshape(n, 4, 3), drawn(n, 4, 40)),
        }
        for n in (5, 4)
    ]
    meta, task = bl.Player(miss_of_task, start), bl.Player(fit_task, start, start=lambda meta: meta)
    return bl.Tasks(meta=meta, task=task, data=data), {"task": UNROLLED}


def miss_of_task(task: Any, batch: Any) -> Tensor:
    return miss(task, batch)


def games() -> tuple[bl.Game, dict[str, Any]]:
    train = [(drawn(7 * 6, 4, seed).reshape(7, 6, 4), drawn(7, 6, seed + 1)) for seed in (70, 72)]
    valid = [(drawn(7 * 5, 4, 74).reshape(7, 5, 4), drawn(7, 5, 75))]
    game = bl.Game(
        decay=bl.Player(miss, drawn(1, 4, 76)[0] - 1.0, data=[tuple(part[0] for part in valid[0])]),
        weights=bl.Player(
            fit, torch.zeros(4, dtype=torch.float64), data=[tuple(part[0] for part in batch) for batch in train]
        ),
    )
    response = bl.Implicit(RATE, steps=100, tolerance=1e-3)
    return bl.Games(game, 7, data={"decay": valid, "weights": train}), {"weights": response}


GAMES: dict[str, Callable[[], tuple[bl.Game, dict[str, Any]]]] = {
    "parts of batches": batches,
    "sharded variables": sharded,
    "Tasks": tasks,
    "Games": games,
}


def play(make: Callable[[], tuple[bl.Game, dict[str, Any]]], checkpoint: Path | None, size: int) -> dict[str, Any]:
    """A run, and where it ended."""
    torch.manual_seed(0)
    game, responses = make()
    parallel = bl.DataParallel(timeout=TIMEOUT) if size > 1 else None
    found: Any = bl.solve(
        game,
        steps=STEPS,
        optimizer=partial(SGD, lr=0.1),
        checkpoint=checkpoint,
        checkpoint_every=EVERY,
        parallel=parallel,
        callbacks=[lambda *_: time.sleep(PAUSE)],
        **responses,
    )
    whole = [leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf for leaf in leaves(dict(found.variables))]
    untimed = ("seconds", "communicated", "reductions")
    history = [{key: value for key, value in record.items() if key not in untimed} for record in found.history]
    return {"variables": torch.cat([leaf.detach().reshape(-1) for leaf in whole]).tolist(), "history": history}


# Ranks ---------------------------------------------------------------------------------------------------------------


class Ranks:
    """Forks that play one game together; each writes where it ended, or what it raised."""

    def __init__(self, make: Callable[[], Any], folder: Path, checkpoint: Path | None, size: int) -> None:
        self.folder = folder / f"ranks-{time.monotonic_ns()}"
        self.folder.mkdir()
        self.pids = [self._fork(make, checkpoint, rank, size) for rank in range(size)]
        self.codes: dict[int, int] = {}

    def _fork(self, make: Callable[[], Any], checkpoint: Path | None, rank: int, size: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            stream = os.open(self.folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT, 0o666)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            warnings.simplefilter("ignore")
            if size > 1:
                meeting, within = f"file://{self.folder}/meeting", timedelta(seconds=MEETS)
                # The limit holds for games of sharded variables too, while they are made.
                distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size, timeout=within)
            found = play(make, checkpoint, size)
            (self.folder / f"{rank}.json").write_text(json.dumps(found))
            code = 0
        except bl.BilevelError as error:
            os.write(2, f"{type(error).__name__}: {error}".encode())
            code = TOLD
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def wait(self, ranks: list[int], limit: float) -> bool:
        """Whether these have ended within so many seconds."""
        until = time.monotonic() + limit
        while True:
            for rank in ranks:
                if rank not in self.codes:
                    pid, status = os.waitpid(self.pids[rank], os.WNOHANG)
                    if pid:
                        self.codes[rank] = os.waitstatus_to_exitcode(status)
            if all(rank in self.codes for rank in ranks):
                return True
            if time.monotonic() > until:
                return False
            time.sleep(0.02)

    def send(self, rank: int, number: int) -> None:
        """Send a signal to one that has not ended."""
        if rank not in self.codes:
            with suppress(ProcessLookupError):
                os.kill(self.pids[rank], number)

    def end(self) -> None:
        """Kill whoever is left."""
        for rank in range(len(self.pids)):
            self.send(rank, signal.SIGKILL)
        self.wait(list(range(len(self.pids))), 10.0)

    def told(self, rank: int) -> str:
        """What one has written to stderr."""
        log = self.folder / f"{rank}.log"
        return log.read_text(errors="replace") if log.exists() else ""

    def found(self, rank: int) -> Any:
        """Where one ended."""
        return json.loads((self.folder / f"{rank}.json").read_text())


@dataclass(frozen=True)
class Trial:
    """One game's folder, where a run on two ranks ends that nobody stops, and how long it takes."""

    make: Callable[[], Any]
    folder: Path
    whole: Any
    seconds: float
    chance: random.Random
    size: int

    @property
    def checkpoint(self) -> Path:
        """In a folder of its own, whose disk may fill up."""
        return self.folder / "out" / "run.pt"

    def start(self) -> Ranks:
        """Two ranks."""
        return Ranks(self.make, self.folder, self.checkpoint, 2)

    def pause(self) -> None:
        """Until some moment of the run."""
        time.sleep(self.chance.uniform(0.0, 1.05 * self.seconds))

    def judged(self, ranks: Ranks, others: list[int], words: str) -> str:
        """The verdict on what the other ranks told, and on how the run goes on."""
        ended = ranks.wait(others, ENDS)
        late = [rank for rank in others if rank not in ranks.codes]
        ranks.end()
        if not ended:
            return f"WRONG: ranks {late} did not end"
        for rank in others:
            code, told = ranks.codes[rank], ranks.told(rank)
            # Killed before it met the others, a rank leaves PyTorch's own rendezvous waiting: not ours to tell.
            if code not in (0, TOLD) or (code == TOLD and words not in told and "Rank" not in told):
                return f"WRONG: rank {rank} ended by {code}: {told[-600:]}"
        return self.resumed()

    def resumed(self) -> str:
        """The verdict on where the run ends when it goes on."""
        again = Ranks(self.make, self.folder, self.checkpoint, self.size)
        ended = again.wait(list(range(self.size)), 10.0 * self.seconds + 60.0)
        again.end()
        if not ended or any(again.codes[rank] for rank in range(self.size)):
            return f"WRONG, resumed on {self.size}: {again.codes} {again.told(0)[-600:]}"
        found = again.found(0)
        if self.size == 2:
            return "bit for bit" if found == self.whole else f"WRONG: {_apart(found, self.whole):.1e} apart on 2"
        apart = _apart(found, self.whole)
        close = apart <= TOLERANCE and len(found["history"]) == STEPS
        return f"within {TOLERANCE:g}" if close else f"WRONG: {apart:.1e} apart on {self.size}"


def _apart(found: Mapping[str, Any], whole: Mapping[str, Any]) -> float:
    a, b = (torch.tensor(each["variables"], dtype=torch.float64) for each in (found, whole))
    return float((a - b).norm() / b.norm())


def killed(trial: Trial) -> str:
    ranks, victim = trial.start(), trial.chance.randrange(2)
    trial.pause()
    ranks.wait([], 0.0)
    ranks.send(victim, signal.SIGKILL)
    return trial.judged(ranks, [1 - victim], "waited for the others")


def hanging(trial: Trial) -> str:
    ranks, victim = trial.start(), trial.chance.randrange(2)
    trial.pause()
    ranks.send(victim, signal.SIGSTOP)
    return trial.judged(ranks, [1 - victim], "waited for the others")


def disk_full(trial: Trial) -> str:
    out = trial.checkpoint.parent
    out.rmdir()
    with small_disk(out) as mounted:
        ranks = trial.start()
        trial.pause()
        if mounted:
            fill(out / "filler")
        else:
            for pid in ranks.pids:
                with suppress(ProcessLookupError):
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        ended = ranks.wait([0, 1], ENDS)
        (out / "filler").unlink(missing_ok=True)
        return trial.judged(ranks, [0, 1], "Cannot write the checkpoint") if ended else "WRONG: the ranks did not end"


FAULTS: dict[str, Callable[[Trial], str]] = {"kill -9": killed, "SIGSTOP": hanging, "disk full": disk_full}


def main() -> None:
    """Every game, stopped in every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10, help="rounds: of each game, stopped in each way")
    parser.add_argument("--only", action="append", help="games; repeat it for several")
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="repeat it for several; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    found: dict[str, dict[str, list[str]]] = {}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        trials: dict[str, Trial] = {}
        for title, make in GAMES.items():
            if options.only and title not in options.only:
                continue
            began = time.perf_counter()
            ranks = Ranks(make, place, None, 2)
            ranks.wait([0, 1], 120.0)
            ranks.end()
            if ranks.codes.get(0):
                raise SystemExit(f"{title} does not run by itself: {ranks.told(0)}")
            seconds = time.perf_counter() - began
            trials[title] = Trial(make, place, ranks.found(0), seconds, chance, 2)
            found[title] = {fault: [] for fault in options.fault or FAULTS}
            print(f"{title:<20}{seconds:5.1f} s", flush=True)
        for number in range(options.trials):  # in rounds: whoever ends it early has some of each
            for title, trial in trials.items():
                for fault in found[title]:
                    folder = place / f"{title} {fault} {number}"
                    (folder / "out").mkdir(parents=True)
                    verdict = FAULTS[fault](replace(trial, folder=folder, size=(2, 1, 3)[number % 3]))
                    shutil.rmtree(folder, ignore_errors=True)
                    found[title][fault].append(verdict)
                    print(f"{number + 1}  {title:<20}{fault:<12}{verdict}", flush=True)
            if options.output is not None:
                options.output.parent.mkdir(exist_ok=True)
                content = {**head(seed=options.seed), "steps": STEPS, "timeout": TIMEOUT, "games": found}
                options.output.write_text(json.dumps(content, indent=1) + "\n")
    if any(verdict.startswith("WRONG") for one in found.values() for each in one.values() for verdict in each):
        raise SystemExit("Some runs did not end where they should.")


if __name__ == "__main__":
    main()

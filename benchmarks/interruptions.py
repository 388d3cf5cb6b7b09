"""What a checkpoint survives: runs are killed, interrupted, starved of disk, doubled and damaged, and then resumed.

A small run with dropout, shuffled and augmented minibatches from a DataLoader, and an optimiser with memory is stopped
at random moments. Resumed, it must end where an uninterrupted one ends, bit for bit, or say in one line why not. With
`--output` also the size and the time of a save, at 100, 1,000 and 10,000 steps. Needs POSIX; a disk that is full or
read-only is a small tmpfs where mounting is permitted, else a limit on the size of files and a folder's mode.

    python benchmarks/interruptions.py --trials 20 --output /tmp/interruptions.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout
from torch.utils.data import DataLoader, Dataset

import bilevel as bl
from bilevel.errors import CheckpointError
from bilevel.solving import checkpoint as checkpoints

STEPS, EVERY = 24, 3
Callback = Callable[[int, Any, Any], object]


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Examples with noise from the global random numbers, as an augmentation draws it."""

    def __init__(self) -> None:
        self.inputs = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        row = self.inputs[index] + 0.1 * torch.randn(8)
        return row, row.sum()


def game() -> bl.Game:
    loader = DataLoader(Noisy(), batch_size=7, shuffle=True)

    def valid(weights: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (batch[0] @ weights - batch[1]).square().mean()

    def train(decay: Tensor, weights: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        fit = (dropout(batch[0], 0.2) @ weights - batch[1]).square().mean()
        return fit + (decay.exp() * weights.square()).sum()

    return bl.Game(
        decay=bl.Player(valid, torch.zeros(8), loader), weights=bl.Player(train, torch.zeros(8), data=loader)
    )


def play(path: Path | None, callback: Callback | None = None, steps: int = STEPS) -> str:
    """A digest of where the run ends, and of everything that it tells."""
    if path is None or not path.exists():
        torch.manual_seed(3)
    solution = bl.solve(
        game(),
        weights=bl.Unrolled(partial(torch.optim.Adam, lr=0.05), steps=3),
        optimizer=partial(torch.optim.Adam, lr=0.02),
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=10, gamma=0.5),
        steps=steps,
        checkpoint=path,
        checkpoint_every=EVERY,
        callbacks=[] if callback is None else [callback],
    )
    numbers = [[v for k, v in record.items() if k != "seconds"] for record in solution.history]
    told = [[t.tolist() for t in solution.variables.values()], dict(solution.values), numbers, solution.products]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


def child(work: Callable[[], str], answer: Path) -> int:
    """A process that writes what `work` returns, or `error: ...`, into a file; its id."""
    answer.unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        try:
            told = work()
        except CheckpointError as error:
            told = f"error: {error}"
        except KeyboardInterrupt:
            told = "interrupted"
        except BaseException:
            told = f"traceback: {traceback.format_exc()}"
        answer.write_text(told)
        code = 0
    finally:
        os._exit(code)


def ended(pid: int, answer: Path) -> str:
    """What the process wrote; nothing when it was killed before."""
    os.waitpid(pid, 0)
    return answer.read_text() if answer.exists() else ""


def judged(found: str, whole: str) -> str:
    """One trial's verdict."""
    if found == whole:
        return "equal"
    if found.startswith("error: ") and "\n" not in found:
        return "one line"
    return f"WRONG: {found[:2000] or 'nothing at all'}"


def stopped_by(number: int, folder: Path, whole: str, seconds: float, chance: random.Random) -> str:
    """A run that receives a signal at a random moment, and is then resumed."""
    path, answer = folder / "run.pt", folder / "answer"
    pid = child(partial(play, path), answer)
    time.sleep(chance.uniform(0.0, 1.1 * seconds))
    os.kill(pid, number)
    ended(pid, answer)
    return judged(ended(child(partial(play, path), answer), answer), whole)


def starved(folder: Path, whole: str, take: Callable[[], object], give: Callable[[], object]) -> str:
    """A run whose disk is taken away after some steps, and given back for the next process."""
    path, answer = folder / "run.pt", folder.parent / "answer"
    moment = random.Random(str(folder)).randrange(5, STEPS - 5)
    first = ended(child(partial(play, path, lambda step, *_: take() if step == moment else None), answer), answer)
    give()
    left = [name for name in os.listdir(folder) if name.endswith(".part")]
    if judged(first, whole) != "one line" or left:
        return f"WRONG: {first[:2000]} {left}"
    return judged(ended(child(partial(play, path), answer), answer), whole)


def doubled(folder: Path, whole: str) -> str:
    """Two processes on one checkpoint at once, and a third that resumes what they left."""
    path, answers = folder / "run.pt", [folder / "one", folder / "other"]
    processes = [child(partial(play, path), answer) for answer in answers]
    found = [judged(ended(pid, answer), whole) for pid, answer in zip(processes, answers, strict=True)]
    found.append(judged(ended(child(partial(play, path), answers[0]), answers[0]), whole))
    return next((verdict for verdict in found if verdict != "equal"), "equal")


def flipped(folder: Path, whole: str, chance: random.Random) -> str:
    """A checkpoint with one wrong bit."""
    path, answer = folder / "run.pt", folder / "answer"
    ended(child(partial(play, path, steps=STEPS // 2), answer), answer)
    data = bytearray(path.read_bytes())
    place = chance.randrange(8 * len(data))
    data[place // 8] ^= 1 << place % 8
    path.write_bytes(data)
    return judged(ended(child(partial(play, path), answer), answer), whole)


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs of 256 KiB over the folder, where that is permitted."""
    tried = shutil.which("mount") and os.geteuid() == 0
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = bool(tried) and subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def full_disk(folder: Path, whole: str) -> str:
    with small_disk(folder) as mounted:
        filler = folder / "filler"

        def fill() -> None:
            if mounted:
                with filler.open("wb") as file:
                    try:
                        for _ in range(10_000):
                            os.write(file.fileno(), bytes(100))
                    except OSError:
                        return
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

        return starved(folder, whole, fill, lambda: filler.unlink(missing_ok=True))


def read_only_folder(folder: Path, whole: str) -> str:
    with small_disk(folder) as mounted:
        if not mounted and os.geteuid() == 0:
            return "not tried: a mode does not stop root, and nothing can be mounted"

        def close(mode: str) -> None:
            if mounted:
                subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], check=True)
            else:
                folder.chmod(0o555 if mode == "ro" else 0o755)

        return starved(folder, whole, partial(close, "ro"), partial(close, "rw"))


def saves(folder: Path) -> list[dict[str, float]]:
    """The size of a checkpoint and the time of a save, after so many steps."""
    rows = []
    for steps in (100, 1_000, 10_000):
        path = folder / f"{steps}.pt"
        x = bl.Player(lambda x: x.square().sum(), torch.zeros(8))
        bl.solve(bl.Game(x=x), steps=steps, checkpoint=path, checkpoint_every=steps)
        content, times = checkpoints.load(path), []
        for _ in range(10):
            began = time.perf_counter()
            checkpoints.save(path, content)
            times.append(time.perf_counter() - began)
        rows.append(
            {
                "steps": steps,
                "bytes": path.stat().st_size,
                "milliseconds": 1e3 * statistics.median(times),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20, help="of each kind; flipped bits: three times as many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="a JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        began = time.perf_counter()
        whole = ended(child(partial(play, None), top / "answer"), top / "answer")
        seconds = time.perf_counter() - began
        kinds: dict[str, tuple[int, Callable[[Path], str]]] = {
            "kill -9": (1, lambda f: stopped_by(signal.SIGKILL, f, whole, seconds, chance)),
            "SIGINT": (1, lambda f: stopped_by(signal.SIGINT, f, whole, seconds, chance)),
            "SIGTERM": (1, lambda f: stopped_by(signal.SIGTERM, f, whole, seconds, chance)),
            "disk full": (1, lambda f: full_disk(f, whole)),
            "folder read-only": (1, lambda f: read_only_folder(f, whole)),
            "two processes": (1, lambda f: doubled(f, whole)),
            "flipped bit": (3, lambda f: flipped(f, whole, chance)),
        }
        found: dict[str, list[str]] = {}
        print(f"{'stopped by':<18}{'trials':>8}{'equal':>8}{'one line':>10}{'wrong':>8}")
        for kind, (times, trial) in kinds.items():
            found[kind] = []
            for number in range(times * options.trials):
                folder = top / f"{kind} {number}"
                folder.mkdir()
                found[kind].append(trial(folder))
            counts = {verdict: found[kind].count(verdict) for verdict in ("equal", "one line")}
            wrong = [verdict for verdict in found[kind] if verdict.startswith("WRONG")]
            print(
                f"{kind:<18}{len(found[kind]):>8}{counts['equal']:>8}{counts['one line']:>10}{len(wrong):>8}",
                flush=True,
            )
            for verdict in wrong[:1]:
                print(verdict)
        sizes = [] if options.output is None else saves(top)
        if sizes:
            print(f"\n{'steps':>8}{'bytes':>12}{'ms a save':>12}")
        for row in sizes:
            print(f"{row['steps']:>8}{row['bytes']:>12,}{row['milliseconds']:>12.2f}")
    if options.output is not None:
        machine = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
        content = {**machine, "seed": options.seed, "trials": found, "saves": sizes}
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    if any(verdict.startswith("WRONG") for verdicts in found.values() for verdict in verdicts):
        raise SystemExit("Some runs did not end where they should.")


if __name__ == "__main__":
    main()

"""What the commands survive: each is killed, interrupted, starved of disk and doubled, and then run with --resume.

Every command at a small setting is stopped at random moments. Resumed, it must write the results of a run that nobody
stopped, without its times, or end in one line with a code that is not 0. Needs POSIX. Commands are run in forks, so
that PyTorch is loaded once; figure 2 of the paper has fewer fits than in the paper.

    python -m benchmarks.interrupted_commands --trials 3 --kills 20 --output docs/resuming/commands.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing.util
import os
import random
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.head import head
from games.__main__ import main as bilevel
from games.cli import app
from games.paper import catalogue

TIMES = {"seconds", "training_seconds", "machine", "jobs"}
NET = """
    from torch import nn

    def build():
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
"""


@dataclass(frozen=True)
class Command:
    """Its words, without --output, and the file in which its results are."""

    words: str
    results: str = "results.json"


def commands(place: Path) -> dict[str, Command]:
    """By name; `place` has a folder of digits, a model and its data."""
    digits, net = f"--data {place}/digits", f"--model {place}/net.py:build --data {place}/classes.npz"
    followers = "--method simultaneous --method 'unrolled 1' --seeds 1 --evaluations 400 --jobs 1"
    small = "--characters 20000 --length 8 --each 2 --steps 60"
    answers = "--response unrolled --response 'implicit CG' --steps 5 --seeds 1 --laws 0 --jobs 1"
    return {
        "tune": Command(f"tune {digits} --train 30 --valid 40 --steps 12"),
        "tune --model": Command(f"tune {net} --steps 200 --retrain 2 --plot"),
        "reweight": Command(f"reweight {digits} --case 'symmetric 0.2' --train 50 --clean 20 --steps 6"),
        "mixture": Command(f"mixture --method Nudged --method uniform {small}"),
        "gan ring": Command(f"gan ring {followers}", "ring.json"),
        "meta sinusoid": Command(
            "meta sinusoid --shots 5 --steps 50 --tasks 4 --held-out 20 --jobs 1", "sinusoid.json"
        ),
        "paper fig2": Command("paper fig2 --jobs 1", "fig2.json"),
        "compare": Command(f"compare --game cournot --game ridge {answers}", "comparison.json"),
        "paper fig2 --jobs 2": Command("paper fig2 --jobs 2", "fig2.json"),
    }


def prepare(place: Path) -> None:
    """Digits of 8 x 8 with a bright row for each class, a model, and data for it."""
    import numpy as np

    folder = place / "digits"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 100), ("t10k", 50)):
        labels = torch.arange(count) % 10
        images = torch.randint(0, 150, (count, 8, 8), generator=generator)
        images[torch.arange(count), labels % 8] += 40 * (1 + labels // 8)[:, None]
        for values, name in ((images, "images-idx3"), (labels, "labels-idx1")):
            header = struct.pack(f">BBBB{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
            (folder / f"{part}-{name}-ubyte").write_bytes(header + values.to(torch.uint8).numpy().tobytes())
    (place / "net.py").write_text(textwrap.dedent(NET))
    x = np.random.default_rng(0).normal(size=(90, 6))
    np.savez(place / "classes.npz", x=x, y=x[:, :3].argmax(1))


def small_figure_2() -> None:
    """Figure 2 with few of its fits."""
    known = catalogue.experiments()
    quick = {"fits": 20, "steps": 5}
    parts = tuple(
        replace(part, settings={**part.settings, **{k: v for k, v in quick.items() if k in part.settings}})
        for part in known["fig2"].parts
    )
    catalogue.experiments = lambda: {"fig2": replace(known["fig2"], parts=parts)}


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code, negative for a signal, and what it wrote to stderr."""

    code: int
    told: str

    @property
    def fault(self) -> str:
        """What is wrong with how it ended; empty where it did its work, was killed, or told why not in one line."""
        if "Traceback" in self.told or (self.code > 0 and not self.told.strip()):
            return f"code {self.code}: {self.told[-1500:]}"
        last = self.told.strip().splitlines()[-1:] or [""]
        if self.code > 0 and not last[0].startswith(("Error: ", "Interrupted", "Aborted")):
            return f"code {self.code}: {self.told[-1500:]}"
        return ""


class Process:
    """A command in a fork, in a session of its own."""

    def __init__(self, command: Command, output: Path, log: Path, *, resume: bool) -> None:
        self.log = log
        words = ["bilevel", *shlex.split(command.words), "--output", str(output), *(["--resume"] if resume else [])]
        signals = {signal.SIGINT}  # held back until the command is there to get them
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        self.pid = os.fork()
        if self.pid:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
            return
        code = 1
        try:
            os.setsid()
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            sys.argv = words
            try:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
                bilevel()
                code = 0
            except SystemExit as ended:
                code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
            except BaseException:
                traceback.print_exc()
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        finally:
            with suppress(Exception):
                # As a process of its own would: joblib's workers give back what they hold.
                multiprocessing.util._run_finalizers()  # type: ignore[attr-defined]
            for written in (sys.stdout, sys.stderr):
                written.flush()
            os._exit(code)

    def ended(self) -> Ended:
        """Wait for it."""
        _, status = os.waitpid(self.pid, 0)
        told = self.log.read_text(errors="replace") if self.log.exists() else ""  # killed before it could open it
        return Ended(os.waitstatus_to_exitcode(status), told)


def without_times(tree: Any) -> Any:
    """Results as a run that takes longer has them too."""
    if isinstance(tree, Mapping):
        return {key: without_times(value) for key, value in tree.items() if key not in TIMES}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


def difference(found: Any, whole: Any, path: str = "") -> str:
    """The first place where two results differ, and what stands there."""
    if isinstance(found, dict) and isinstance(whole, dict) and found.keys() == whole.keys():
        return next((told for key in found if (told := difference(found[key], whole[key], f"{path}.{key}"))), "")
    if isinstance(found, list) and isinstance(whole, list) and len(found) == len(whole):
        pairs = enumerate(zip(found, whole, strict=True))
        return next((told for i, (a, b) in pairs if (told := difference(a, b, f"{path}[{i}]"))), "")
    return "" if found == whole else f"{path} is {found!r}, and was {whole!r}"


@dataclass(frozen=True)
class Trial:
    """One command's folder, what an uninterrupted run of it wrote, and how many seconds that took."""

    command: Command
    folder: Path
    whole: Any
    seconds: float
    chance: random.Random

    @property
    def output(self) -> Path:
        """The folder that the command writes to."""
        return self.folder / "out"

    def start(self, *, resume: bool = False, log: str = "log") -> Process:
        """The command."""
        return Process(self.command, self.output, self.folder / log, resume=resume)

    def wait(self) -> None:
        """Until some moment of the run."""
        time.sleep(self.chance.uniform(0.0, 1.1 * self.seconds))

    def judged(self, *before: Ended) -> str:
        """The verdict on a command that was stopped: what it does with --resume."""
        for ended in before:
            if ended.fault:
                return f"WRONG, stopped: {ended.fault}"
        again = self.start(resume=True, log="again").ended()
        if again.fault:
            return f"WRONG, resumed: {again.fault}"
        if again.code > 0:
            return "one line"
        found = without_times(json.loads((self.output / self.command.results).read_text()))
        left = [str(path) for path in self.output.rglob("*.part")] if all(e.code >= 0 for e in before) else []
        if left:
            return f"WRONG: left behind {left}"
        return "equal" if found == self.whole else f"WRONG: {difference(found, self.whole)}"


def stopped_by(number: int, trial: Trial) -> str:
    process = trial.start()
    trial.wait()
    os.kill(process.pid, number)
    return trial.judged(process.ended())


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A tmpfs of 4 MiB over the folder, where that is permitted."""
    folder.mkdir()
    tried = shutil.which("mount") and os.geteuid() == 0
    options = ["-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    mounted = bool(tried) and subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Write a file up to the last byte of its disk."""
    with path.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass


def disk_full(trial: Trial) -> str:
    with small_disk(trial.output) as mounted:
        process = trial.start()
        trial.wait()
        if mounted:
            fill(trial.output / "filler")
        else:
            with suppress(ProcessLookupError):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        ended = process.ended()
        (trial.output / "filler").unlink(missing_ok=True)
        return trial.judged(ended)


def read_only(trial: Trial) -> str:
    trial.output.mkdir()
    if os.geteuid() == 0 and not shutil.which("mount"):
        return "not tried: a mode does not stop root, and nothing can be mounted"
    process = trial.start()
    trial.wait()
    folders = [trial.output, *(path for path in trial.output.rglob("*") if path.is_dir())]
    if os.geteuid() == 0:  # whom a mode does not stop: the folder is mounted over itself
        subprocess.run(["mount", "--bind", trial.output, trial.output], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", trial.output], check=True)
    else:
        for folder in folders:
            folder.chmod(0o555)
    ended = process.ended()
    if os.geteuid() == 0:
        subprocess.run(["umount", trial.output], check=True)
    else:
        for folder in folders:
            folder.chmod(0o755)
    return trial.judged(ended)


def two_processes(trial: Trial) -> str:
    processes = [trial.start(log=name) for name in ("one", "other")]
    return trial.judged(*[process.ended() for process in processes])


KINDS: dict[str, Callable[[Trial], str]] = {
    "kill -9": lambda trial: stopped_by(signal.SIGKILL, trial),
    "SIGINT": lambda trial: stopped_by(signal.SIGINT, trial),
    "SIGTERM": lambda trial: stopped_by(signal.SIGTERM, trial),
    "disk full": disk_full,
    "folder read-only": read_only,
    "two processes": two_processes,
}


def main() -> None:
    """Every command, stopped in every way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5, help="rounds: of each command, stopped in each way")
    parser.add_argument("--kills", type=int, default=0, help="rounds of kill -9, those of --trials among them")
    parser.add_argument("--only", action="append", help="commands; repeat it for several")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="a JSON file; what it has of this version is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    assert app is not None  # it is loaded before the first fork
    chance = random.Random(options.seed)
    found: dict[str, dict[str, Any]] = {}
    seeds = [options.seed]
    if options.output is not None and options.output.exists():
        before = json.loads(options.output.read_text(encoding="utf-8"))
        if before["versions"] == head()["versions"]:
            found, seeds = before["commands"], [*before["seeds"], options.seed]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o755)
        prepare(place)
        small_figure_2()
        wholes: dict[str, Trial] = {}
        for title, command in commands(place).items():
            if options.only and title not in options.only:
                continue
            first = Trial(command, place / f"{title} whole", None, 0.0, chance)
            first.folder.mkdir()
            began = time.perf_counter()
            ended = first.start().ended()
            seconds = time.perf_counter() - began
            if ended.code:
                raise SystemExit(f"{title} does not run by itself: {ended.told}")
            whole = without_times(json.loads((first.output / command.results).read_text()))
            wholes[title] = replace(first, whole=whole, seconds=seconds)
            found.setdefault(title, {"seconds": seconds, "trials": {kind: [] for kind in KINDS}})
            print(f"{title:<22}{seconds:5.1f} s", flush=True)
        for number in range(max(options.trials, options.kills)):  # in rounds: whoever ends it early has some of each
            kinds = KINDS if number < options.trials else {"kill -9": KINDS["kill -9"]}
            for title, trial in wholes.items():
                for kind, stopped in kinds.items():
                    folder = place / f"{title} {kind} {number}"
                    folder.mkdir()
                    verdict = stopped(replace(trial, folder=folder))
                    shutil.rmtree(folder, ignore_errors=True)
                    found[title]["trials"][kind].append(verdict)
                    print(f"{number + 1}  {title:<22}{kind:<18}{verdict}", flush=True)
                if options.output is not None:
                    options.output.parent.mkdir(exist_ok=True)
                    content = {**head(seed=seeds[0]), "seeds": seeds, "commands": found}
                    options.output.write_text(json.dumps(content, indent=1) + "\n")
    if any(v.startswith("WRONG") for one in found.values() for verdicts in one["trials"].values() for v in verdicts):
        raise SystemExit("Some commands did not end where they should.")


if __name__ == "__main__":
    main()

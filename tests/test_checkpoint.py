"""A run on disk: whose it is, that it goes on bit for bit from wherever it stopped, and what the file survives."""

import errno
import os
import random
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import optim
from torch.nn.functional import dropout
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset

import bilevel as bl
from bilevel.solving import checkpoint as checkpoints
from bilevel.solving.description import Describer, differences
from bilevel.solving.history import History, refuse_ambiguous

D = torch.float64
SGD, ADAM = optim.SGD, optim.Adam


class Interrupts:
    """Raises in its `at`-th call, and in no other."""

    def __init__(self):
        self.calls, self.at = 0, -1

    def __call__(self):
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt


class Augmented(Dataset):
    """Examples with noise from the global random numbers, as augmentations draw it."""

    def __init__(self, interrupts):
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(12, 4, generator=generator, dtype=D)
        self.interrupts = interrupts

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, index):
        self.interrupts()
        row = self.inputs[index] + 0.1 * torch.randn(4, dtype=D)
        return row, row @ torch.arange(4.0, dtype=D)


def noisy_game(interrupts=None):
    """Shuffled minibatches, augmentation and dropout, all interrupted where it is asked for."""
    interrupts = interrupts or Interrupts()
    loader = DataLoader(Augmented(interrupts), batch_size=5, shuffle=True)

    def valid(weights, batch):
        interrupts()
        return ((batch[0] @ weights - batch[1]) ** 2).mean()

    def train(decay, weights, batch):
        interrupts()
        return ((dropout(batch[0], 0.2) @ weights - batch[1]) ** 2).mean() + (decay.exp() * weights**2).sum()

    start = torch.zeros(4, dtype=D)
    return bl.Game(decay=bl.Player(valid, start, loader), weights=bl.Player(train, start, loader))


RESPONSES = {
    "unrolled": bl.Unrolled(partial(ADAM, lr=0.05), steps=2),
    "implicit": bl.Implicit(
        partial(SGD, lr=0.05, momentum=0.5),
        steps=2,
        tolerance=None,
        linear_solver=bl.ConjugateGradient(preconditioner=bl.linear.Diagonal()),
    ),
    "hypernetwork": bl.Hypernetwork(
        partial(ADAM, lr=0.02),
        scale=0.2,
        warmup=2,
        tolerance=None,
        scheduler=partial(lr_scheduler.StepLR, step_size=2),
    ),
    "in place": bl.Hypernetwork(
        partial(ADAM, lr=0.02), scale=0.2, tolerance=None, memory=bl.responses.Memory(in_place=True)
    ),
}
LEADER = {"optimizer": partial(ADAM, lr=0.05), "scheduler": partial(lr_scheduler.StepLR, step_size=3, gamma=0.7)}


def told(solution):
    """All that a solution says, without the time it took."""
    history = [{k: v for k, v in record.items() if k != "seconds"} for record in solution.history]
    values = (solution.values, solution.stationarity, repr(solution.residuals), solution.warnings)
    return history, values, solution.gradients, solution.products


def assert_same(found, wanted):
    for name, variables in wanted.variables.items():
        assert torch.equal(found.variables[name], variables)
    assert told(found) == told(wanted)


# A run that is stopped ------------------------------------------------------------------------------------------------

FAST = ("unrolled", "implicit")


@pytest.mark.parametrize(
    "response", [pytest.param(r, id=n, marks=() if n in FAST else pytest.mark.slow) for n, r in RESPONSES.items()]
)
def test_a_run_that_was_stopped_anywhere_ends_where_it_would_have_ended(response, tmp_path):
    interrupts = Interrupts()

    def draw(step, record, variables):
        interrupts()
        torch.rand(step)  # a callback's random numbers are its own
        interrupts()

    options = {"weights": response, "steps": 5, "checkpoint_every": 2, **LEADER}

    def run(**more):
        torch.manual_seed(7)
        return bl.solve(noisy_game(interrupts), **options, **more)

    whole = run(callbacks=[draw])
    with_all = interrupts.calls
    torch.manual_seed(7)
    quiet = bl.solve(noisy_game(), **options)
    assert_same(quiet, whole)  # callbacks and counting change nothing
    interrupts.calls = 0
    noisy_game(interrupts)
    before = interrupts.calls  # the game's own checks
    stopped = 0
    for at in range(before + 1, with_all, max(1, (with_all - before) // 25)):
        path = tmp_path / f"{at}.pt"
        interrupts.calls, interrupts.at = 0, at
        try:
            run(checkpoint=path, callbacks=[draw])
        except KeyboardInterrupt:
            stopped += 1
        interrupts.at = -1
        # The checkpoint brings its own random numbers; there is none before the first step begins.
        torch.manual_seed(99 if path.exists() else 7)
        assert_same(bl.solve(noisy_game(interrupts), checkpoint=path, callbacks=[draw], **options), whole)
    assert stopped >= 20


@pytest.mark.parametrize("response", RESPONSES.values(), ids=RESPONSES)
def test_a_run_that_is_done_tells_again_what_it_told(response, tmp_path):
    path = tmp_path / "run.pt"
    options = {"weights": response, "steps": 7, "checkpoint": path, **LEADER}
    torch.manual_seed(7)
    first = bl.solve(noisy_game(), **options)
    written = path.stat().st_mtime_ns
    torch.manual_seed(99)
    again = bl.solve(noisy_game(), **options)
    assert_same(again, first)
    assert again.seconds == first.seconds and path.stat().st_mtime_ns == written


SCHEDULERS = {
    "multistep": partial(lr_scheduler.MultiStepLR, milestones=[2, 4]),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=6),
    "warm restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=2),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=8),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.9**step),
    "in turn": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # torch's own SequentialLR
@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_go_on(scheduler, tmp_path):
    options = {"optimizer": partial(SGD, lr=0.1, momentum=0.9), "scheduler": scheduler}
    bl.solve(line(), steps=3, checkpoint=tmp_path / "run", **options)
    resumed = bl.solve(line(), steps=7, checkpoint=tmp_path / "run", **options)
    assert torch.equal(resumed.variables["x"], bl.solve(line(), steps=7, **options).variables["x"])


# Whose it is ----------------------------------------------------------------------------------------------------------


def line(slope=1.0, start=0.0):
    """One player who descends a line: every gradient is the slope."""
    return bl.Game(x=bl.Player(lambda x: slope * x, torch.tensor(start, dtype=D)))


def quadratic(x0=0.0, weight=1.0, shape=(), dtype=D, **players):
    def lead(x, y):
        return ((y - 3) ** 2).sum() + weight * (x**2).sum()

    def follow(x, y, rate=2.0):
        return ((y - rate * x) ** 2).sum()

    made = {
        "x": bl.Player(lead, torch.full(shape, x0, dtype=dtype)),
        "y": bl.Player(follow, torch.zeros(shape, dtype=dtype)),
    }
    return bl.Game(**{**made, **players})


def follow_otherwise(x, y):
    return ((y - 2 * x) ** 2).sum() + 0.1 * (y**2).sum()


UNROLLED = bl.Unrolled(partial(SGD, lr=0.25), steps=5)
BASE = {"game": quadratic(), "y": UNROLLED, "optimizer": partial(SGD, lr=0.1), "steps": 4}
CHANGED = {
    "a leader's rate in a lambda": (
        {"optimizer": lambda p: SGD(p, lr=0.2)},
        r"its optimizer.x.lr was 0.1 and is now 0.2",
    ),
    "another optimiser": ({"optimizer": partial(ADAM, lr=0.1)}, r"its optimizer.x was SGD and is now Adam"),
    "a scheduler": ({"scheduler": partial(lr_scheduler.StepLR, step_size=3)}, r"its scheduler was nothing and is now"),
    "clipping": ({"clip_norm": 1.0}, r"its clip_norm was None and is now 1.0"),
    "a rule": ({"dynamics": bl.dynamics.Optimistic()}, r"its dynamics was Simultaneous and is now Optimistic"),
    "the follower's rate": (
        {"y": bl.Unrolled(lambda p: SGD(p, lr=0.3), steps=5)},
        r"its responses.y.optimizer.lr was 0.25",
    ),
    "the follower's steps": (
        {"y": bl.Unrolled(partial(SGD, lr=0.25), steps=6)},
        r"its responses.y.steps was 5 and is now 6",
    ),
    "a response": ({"y": bl.Implicit(partial(SGD, lr=0.25))}, r"its responses.y was Unrolled and is now Implicit"),
    "a captured number": (
        {"game": quadratic(weight=2.0)},
        r"its players.x.objective.captured.weight was 1.0 and is now 2.0",
    ),
    "an objective": (
        {"game": quadratic(y=bl.Player(follow_otherwise, torch.zeros((), dtype=D)))},
        r"its players.y.objective was",
    ),
}
OTHERS = {
    "a seed": ({"seed": 1}, r"its seed was 0 and is now 1.*cannot change"),
    "a shape": (
        {"game": quadratic(shape=(2,))},
        r"players.x.variables.tensor was float64 \[\] and is now float64 \[2\]",
    ),
    "a dtype": ({"game": quadratic(dtype=torch.float32)}, r"float64 \[\] and is now float32 \[\]"),
    "who leads": ({"y": None}, "its leaders was"),
}


def solve(**options):
    options = {**BASE, **options}
    if options["y"] is None:
        del options["y"]
    return bl.solve(options.pop("game"), **options)


@pytest.mark.parametrize(("changed", "message"), CHANGED.values(), ids=CHANGED)
def test_what_has_changed_is_named_and_taken_on_request(changed, message, tmp_path):
    path = tmp_path / "run.pt"
    solve(checkpoint=path)
    with pytest.raises(bl.errors.CheckpointError, match=message) as caught:
        solve(checkpoint=path, **{"steps": 8, **changed})
    assert "\n" not in str(caught.value) and "accept_changes=True" in str(caught.value)
    went_on = solve(checkpoint=path, accept_changes=True, **{"steps": 8, **changed})
    assert len(went_on.history) == 8 and "Resumed at step 4 with other settings: its " in went_on.warnings[0]
    assert went_on.variables["x"].isfinite()
    again = solve(checkpoint=path, **{"steps": 9, **changed})  # it is that run now
    assert len(again.history) == 9 and again.warnings[0] == went_on.warnings[0]


@pytest.mark.parametrize(("changed", "message"), OTHERS.values(), ids=OTHERS)
def test_another_game_is_refused_whatever_is_accepted(changed, message, tmp_path):
    path = tmp_path / "run.pt"
    solve(checkpoint=path)
    with pytest.raises(bl.errors.CheckpointError, match=message):
        solve(checkpoint=path, accept_changes=True, **changed)


def test_what_builds_the_same_is_the_same(tmp_path):
    path = tmp_path / "run.pt"
    solve(checkpoint=path)
    same = {
        "game": quadratic(x0=1.0),  # where it starts is behind it
        "y": bl.Unrolled(lambda p: SGD(p, lr=0.25), steps=5),
        "optimizer": lambda p: SGD([{"params": p, "lr": 0.1}], lr=0.7),
        "checkpoint_every": 3,
        "callbacks": [print],
    }
    assert len(solve(checkpoint=path, **{"steps": 5, **same}).history) == 5


def test_a_file_without_a_step_binds_nobody(tmp_path):
    class Stop(SGD):
        def step(self, closure=None):
            raise KeyboardInterrupt

    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        solve(checkpoint=path, optimizer=partial(Stop, lr=0.1))
    assert torch.load(path, weights_only=True)["step"] == 0
    assert len(solve(checkpoint=path).history) == 4


def test_new_settings_hold_and_the_optimisers_memory_is_kept(tmp_path):
    path = tmp_path / "run.pt"
    run = partial(bl.solve, checkpoint=path)
    before = run(line(), steps=3, optimizer=partial(SGD, lr=0.1, momentum=0.5)).variables["x"]
    after = run(line(), steps=4, optimizer=partial(SGD, lr=0.01, momentum=0.5), accept_changes=True).variables["x"]
    velocity = 1 + 0.5 + 0.25 + 0.125
    torch.testing.assert_close(after, before - 0.01 * velocity, rtol=1e-12, atol=0.0)
    # Adam has no use for a velocity: its first step on a line is its rate.
    last = run(line(), steps=5, optimizer=partial(ADAM, lr=0.3, eps=0.0), accept_changes=True).variables["x"]
    torch.testing.assert_close(last, after - 0.3, rtol=1e-12, atol=0.0)


def test_a_new_schedule_stands_where_it_would_stand(tmp_path):
    sgd, halves = partial(SGD, lr=1.0), partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)
    before = bl.solve(line(), steps=3, optimizer=sgd, checkpoint=tmp_path / "run").variables["x"]
    options = {"optimizer": sgd, "scheduler": halves, "checkpoint": tmp_path / "run", "accept_changes": True}
    after = bl.solve(line(), steps=4, **options).variables["x"]
    assert (before - after).item() == 0.5**3


@pytest.mark.parametrize("last", RESPONSES.values(), ids=RESPONSES)
@pytest.mark.parametrize("first", RESPONSES.values(), ids=RESPONSES)
def test_a_run_may_change_its_response(first, last, tmp_path):
    path = tmp_path / "run.pt"
    before = bl.solve(noisy_game(), weights=first, steps=4, checkpoint=path, **LEADER)
    after = bl.solve(noisy_game(), weights=last, steps=6, checkpoint=path, accept_changes=True, **LEADER)
    assert [r["step"] for r in after.history] == [1, 2, 3, 4, 5, 6]
    assert after.gradients > before.gradients and after.products >= before.products
    saved, start = before.states["weights"], last.init(noisy_game())
    adopted = last.adopt(saved, start)
    assert torch.equal(adopted["variables"], saved["variables"]) and adopted["data"] == saved["data"]
    assert set(adopted) == set(start)


RATE = 0.5


def test_what_a_function_captures_is_compared():
    def named(one, other):
        return [path for path, *_ in differences(Describer().describe(one), Describer().describe(other))]

    def make(rate, weights, log):
        def loss(x, y):
            log.append(x)
            return rate * x + weights @ y + RATE

        return loss

    base = make(0.1, torch.ones(9), [])
    assert named(base, make(0.1, torch.ones(9), [1])) == []  # a list is as often a record of calls
    assert named(base, make(0.2, torch.ones(9), [])) == ["captured.rate"]
    assert named(base, make(0.1, torch.zeros(9), [])) == ["captured.weights"]
    globals()["RATE"] = 0.7
    try:
        changed = Describer().describe(base)
    finally:
        globals()["RATE"] = 0.5
    assert [p for p, *_ in differences(changed, Describer().describe(base))] == ["captured.RATE"]
    assert named(partial(base, y=1), partial(base, y=2)) == ["keywords.y"]
    assert named(lambda x: x + 1, lambda x: x + 2) == ["code"]
    assert named(lambda x: x.sum(), lambda x: x.mean()) == ["code"]
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))
    other = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.2))
    assert named(make(0.1, model, []), make(0.1, other, [])) == ["captured.weights.1"]


# The records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["step", "gradient_norm", "gradients", "products", "seconds", "work"])
def test_no_players_name_takes_the_runs_own_numbers(name):
    scope = {}
    exec(f"def lead({name}, y): return (y - 3) ** 2\ndef follow({name}, y): return (y - 2 * {name}) ** 2", scope)
    start = torch.tensor(0.0, dtype=D)
    game = bl.Game(**{name: bl.Player(scope["lead"], start), "y": bl.Player(scope["follow"], start)})
    options = {"y": UNROLLED, "optimizer": partial(SGD, lr=0.1), "steps": 3}
    found = bl.solve(game, **options)
    plain = bl.solve(quadratic(weight=0.0), **options)
    for own, other in zip(found.history, plain.history, strict=True):
        assert own.pop(f"{name}.loss") == other.pop("x")
        assert {k: v for k, v in own.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    assert f"{plain.history[0]['y']:.4g}" in str(found)


def test_two_numbers_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two numbers under 'y.stationarity'"):
        refuse_ambiguous(["x", "y", "y.stationarity"], ["y"])


def test_the_history_is_kept_to_the_last_bit():
    history = History()
    records = [{"step": n, "x": 0.1 * n, "work": n * 10**9} for n in range(1, 5)]
    records += [{"step": n, "x": float("inf"), "y": 1.0} for n in range(5, 7)]
    for record in records:
        history.append(record)
    again = History(history.state())
    assert again.records() == history.records() == records
    assert all(isinstance(r["step"], int) and isinstance(r["x"], float) for r in again.records())


# The file -------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "run.pt"
    solve(checkpoint=path)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(whole) * 8, (60,), generator=generator).tolist()
    places += [8 * (len(whole) - back) for back in (1, 20, 40, 47)]  # the checksum itself
    for place in places:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(bl.errors.CheckpointError) as caught:
            solve(checkpoint=path, steps=6)
        assert "\n" not in str(caught.value)
    for length in (0, 1, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(bl.errors.CheckpointError, match="Delete it to start anew"):
            solve(checkpoint=path, steps=6)


def test_a_range_that_has_changed_is_named_as_it_was_written(tmp_path):
    def run(high):
        def loss(rates):
            return (rates["decay"][1].log() + rates["decay"][0].log()).square()

        init = {"decay": [bl.Log(1e-4, 1e-2), bl.Log(1e-4, high)]}
        game = bl.Game(rates=bl.Player(loss, init=init))
        return bl.solve(game, optimizer=partial(SGD, lr=0.1), steps=1, checkpoint=tmp_path / "run.pt")

    run(0.1)
    with pytest.raises(
        bl.errors.CheckpointError, match=r"its players\.rates\.range\.decay\.1\.high was 0\.1 and is now 0\.2"
    ):
        run(0.2)


def test_files_of_others_are_refused_in_words(tmp_path):
    path = tmp_path / "run.pt"
    torch.save({"format": 2, "step": 3, "states": {}}, path)
    with pytest.raises(bl.errors.CheckpointError, match="of format 2, and this version of bilevel reads format 3"):
        solve(checkpoint=path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(bl.errors.CheckpointError, match="of something else"):
        solve(checkpoint=path)
    checkpoints.save(path, {"weights": torch.zeros(3)})
    with pytest.raises(bl.errors.CheckpointError, match="no checkpoint of solve: it has no"):
        solve(checkpoint=path)
    with pytest.raises(bl.errors.CheckpointError, match="Cannot read"):
        solve(checkpoint=tmp_path)


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(fails, tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    solve(checkpoint=path)
    before = path.read_bytes()

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "write":
        monkeypatch.setattr(os, "fdopen", full)
        monkeypatch.setattr("builtins.open", full)
    else:
        monkeypatch.setattr(os, fails, full)
    with pytest.raises(bl.errors.CheckpointError, match=r"Cannot write.*No space left on device") as caught:
        checkpoints.save(path, {"step": 9})
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["run.pt"]


def test_a_link_is_followed_and_a_mode_is_kept(tmp_path):
    (tmp_path / "disk").mkdir()
    link, target = tmp_path / "run.pt", tmp_path / "disk" / "target.pt"
    link.symlink_to(target)
    solve(checkpoint=link)
    assert link.is_symlink() and target.exists()
    target.chmod(0o600)
    solve(checkpoint=link, steps=6)
    assert link.is_symlink() and target.stat().st_mode & 0o777 == 0o600
    assert torch.load(target, weights_only=True)["step"] == 6
    assert os.listdir(tmp_path / "disk") == ["target.pt"]


def test_several_writers_leave_one_whole_file(tmp_path):
    path = tmp_path / "run.pt"

    def write(number):
        for step in range(20):
            checkpoints.save(path, {"step": step, "number": torch.full((1000,), float(number))})

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert checkpoints.load(path)["step"] == 19 and os.listdir(tmp_path) == ["run.pt"]


def test_what_a_killed_process_left_is_removed_once_it_is_old(tmp_path):
    old, new = tmp_path / "run.pt.0123abcd.part", tmp_path / "run.pt.4567abcd.part"
    for part in (old, new):
        part.write_bytes(b"half a file")
    os.utime(old, (0, 0))
    solve(checkpoint=tmp_path / "run.pt")
    assert not old.exists() and new.exists()


def test_what_could_not_be_read_back_is_not_written(tmp_path):
    class Odd:
        pass

    class Schedule(lr_scheduler.StepLR):
        def state_dict(self):
            return super().state_dict() | {"odd": Odd}

    path = tmp_path / "run.pt"
    with pytest.raises(bl.errors.CheckpointError, match="could not read it back") as caught:
        bl.solve(line(), steps=3, scheduler=partial(Schedule, step_size=2), checkpoint=path)
    assert "\n" not in str(caught.value) and not path.exists()


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals and forks")
def test_runs_that_are_killed_starved_doubled_and_damaged():
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "interruptions.py"
    done = subprocess.run([sys.executable, script, "--trials", "1"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kinds = ("kill -9", "SIGINT", "SIGTERM", "disk full", "folder read-only", "two processes", "flipped bit")
    assert all(kind in done.stdout for kind in kinds)


def test_resuming_a_run_that_is_not_there_is_refused_with_the_path(tmp_path):
    path, sgd = tmp_path / "run.pt", partial(SGD, lr=0.1)
    with pytest.raises(ValueError, match="resume=True goes on from a checkpoint; say which"):
        bl.solve(line(), optimizer=sgd, steps=3, resume=True)
    with pytest.raises(TypeError, match=r"resume='yes'; expected True, False, or None"):
        bl.solve(line(), optimizer=sgd, steps=3, resume="yes")
    for options in ({}, {"starts": [{"x": torch.zeros((), dtype=D)}, {"x": torch.ones((), dtype=D)}]}):
        with pytest.raises(bl.errors.CheckpointError, match=r"there is no checkpoint .*run.pt. .* leave resume= out"):
            bl.solve(line(), optimizer=sgd, steps=3, checkpoint=path, resume=True, **options)
    assert not list(tmp_path.iterdir())
    bl.solve(line(), optimizer=sgd, steps=3, checkpoint=path)
    again = bl.solve(line(), optimizer=sgd, steps=5, checkpoint=path, resume=True)
    assert [record["step"] for record in again.history] == [1, 2, 3, 4, 5]


class Shaken(Dataset):
    """Rows with random numbers from somewhere."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __len__(self):
        return 6

    def __getitem__(self, row):
        return torch.tensor([row, self.numbers.random()], dtype=D)


@pytest.mark.parametrize("asked", ["solve", "tune"])
def test_data_that_give_other_batches_are_told_when_a_run_goes_on(asked, tmp_path, recwarn):
    def loss(y, batch):
        return (y - batch.mean(0)).square().sum()

    def run(numbers, steps, rows=None):
        data = DataLoader(Shaken(numbers) if rows is None else rows, batch_size=2)
        options = {"checkpoint": tmp_path / f"{asked}.pt", "checkpoint_every": 1}
        if asked == "solve":
            player = bl.Player(loss, torch.zeros(2, dtype=D), data=data)
            return bl.solve(bl.Game(y=player), optimizer=partial(SGD, lr=0.1), steps=steps, **options)

        def fit(weights, decay, batch):
            return (weights(batch) - 1.0).square().mean() + bl.penalty(weights, decay)

        def judge(weights, batch):
            return (weights(batch) - 1.0).square().mean()

        def stop(step, *_):
            if step == steps:
                raise bl.errors.StopRun

        torch.manual_seed(0)
        return bl.tune(
            torch.nn.Linear(2, 1, dtype=D), fit, judge, data, [torch.ones(2, 2, dtype=D)], steps=7, every=1,
            callbacks=[stop],
            hyper={"decay": bl.Log(1e-4, 1e-2)}, optimizer=partial(SGD, lr=1e-3), check=0, warmup=0, **options
        ).solution  # fmt: skip

    random.seed(0)
    run(random, 5)  # Python's global generator: in another process it would stand elsewhere
    random.seed(1)
    found = run(random, 7)
    told = [str(w.message) for w in recwarn if issubclass(w.category, bl.errors.OtherDataWarning)]
    assert len(told) == 1 and re.search(r"give another batch \d of pass \d than when", told[0])
    assert told[0] in found.warnings
    # The way out: a generator that the data hold.
    (tmp_path / f"{asked}.pt").unlink()
    recwarn.clear()
    run(random.Random(0), 5)
    run(random.Random(1), 7)
    assert not [w for w in recwarn if issubclass(w.category, bl.errors.OtherDataWarning)]

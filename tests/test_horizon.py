"""A short horizon is told, on data as on none; and to look changes nothing of the run."""

import math
import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import bilevel as bl
from bilevel.game.held import HeldBatches
from bilevel.solving.disagreement import beyond_noise, disagreement

ROWS = torch.randn(160, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SGD = partial(torch.optim.SGD, lr=0.5)


class Endless(IterableDataset):
    """Examples that come once in a pass."""

    def __iter__(self):
        yield from ROWS


class Reads:
    """A loader that notes what it gave; with noise of NumPy's and Python's own numbers."""

    def __init__(self, loader):
        self.loader, self.given = loader, []
        np.random.seed(0)  # noqa: NPY002
        random.seed(0)

    def __iter__(self):
        for batch in self.loader:
            told = batch * (1.0 + 0.1 * np.random.rand() + 0.1 * random.random())  # noqa: NPY002 - as users do
            self.given.append(told.clone())
            yield told


def two_speeds(slow, data, spread=0.3):
    """The leader pulls y0 down, which follows x at once, and pushes y1 up, which follows slowly; both with noise."""
    speeds = torch.tensor([1.0, slow], dtype=torch.float64)

    def follow(x, y, batch):
        return 0.5 * (speeds * (y - x * (1.0 + spread * batch.mean(0))) ** 2).sum()

    return bl.Game(
        x=bl.Player(lambda y: y[0] - 4.0 * y[1], torch.tensor(1.0, dtype=torch.float64)),
        y=bl.Player(follow, torch.zeros(2, dtype=torch.float64), data=data),
    )


def played(game, leads=40, seed=0, **options):
    torch.manual_seed(0)
    response = bl.Unrolled(SGD, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = bl.solve(game, y=response, optimizer=partial(torch.optim.SGD, lr=1e-3), steps=leads, seed=seed)
    return found, [str(warning.message) for warning in caught]


def shuffled(size=8):
    return DataLoader(ROWS, batch_size=size, shuffle=True)


LOADERS = {
    "shuffled": shuffled,
    "workers": lambda: DataLoader(ROWS, batch_size=8, shuffle=True, num_workers=1, persistent_workers=True),
    "iterable": lambda: DataLoader(Endless(), batch_size=8),
    "list": lambda: list(ROWS.split(8)),
}


@pytest.mark.parametrize("kind", ["shuffled", pytest.param("workers", marks=pytest.mark.slow), "iterable", "list"])
def test_with_data_a_short_horizon_is_told_and_the_run_is_as_without_the_look(kind):
    """As without data the hypergradient is .616 for 5 steps, and -.330 for 20, in the mean: the other way."""
    ways = []
    for options in ({}, {"tolerance": None}):
        data = LOADERS[kind]() if kind == "list" else Reads(LOADERS[kind]())
        found, told = played(two_speeds(0.04, data), steps=5, **options)
        ways.append((found, told, [] if kind == "list" else data.given))
    (looked, told, read), (silent, nothing, read_alone) = ways
    assert not nothing and len(told) == 1
    assert "Short horizon" in told[0] and "points the other way" in told[0] and "mean of 5 looks" in told[0]
    assert torch.equal(looked.variables["x"], silent.variables["x"]) and looked.gradients == silent.gradients
    # With NumPy's and Python's numbers in them batches agree only if each was read once, and in the same order.
    assert len(read) == len(read_alone) and all(torch.equal(a, b) for a, b in zip(read, read_alone, strict=True))
    for records in zip(looked.history, silent.history, strict=True):
        assert records[0] | {"seconds": 0} == records[1] | {"seconds": 0}


def in_two(slow, data, spread=0.3):
    """The same with a follower for each speed, who have data of their own."""

    def follow(x, own, batch, speed):
        return 0.5 * (speed * (own - x * (1.0 + spread * batch.mean())) ** 2).sum()

    def start():
        return torch.zeros(1, dtype=torch.float64)

    return bl.Game(
        x=bl.Player(lambda y, z: (y - 4.0 * z).sum(), torch.tensor(1.0, dtype=torch.float64)),
        y=bl.Player(lambda x, y, batch=None: follow(x, y, ROWS if batch is None else batch, 1.0), start()),
        z=bl.Player(lambda x, z, batch: follow(x, z, batch, slow), start(), data=data),
    )


@pytest.mark.parametrize("first", [bl.Unrolled(SGD, steps=5), bl.Implicit(SGD)], ids=["unrolled", "implicit"])
@pytest.mark.parametrize("kind", ["one batch", "shuffled"])
def test_among_several_followers_a_short_horizon_is_told_and_the_run_is_as_without_the_look(kind, first):
    """The slow one's 5 steps hide from the leader what 20 show, whatever the other one does."""
    ways = []
    for tolerance in (0.9, None):
        data = [ROWS] if kind == "one batch" else Reads(shuffled())
        answers = {"y": first, "z": bl.Unrolled(SGD, steps=5, tolerance=tolerance)}
        torch.manual_seed(0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            rate = partial(torch.optim.SGD, lr=1e-3)
            found = bl.solve(in_two(0.04, data), **answers, optimizer=rate, steps=40)
        ways.append((found, [str(w.message) for w in caught], [] if kind == "one batch" else data.given))
    (looked, told, read), (silent, nothing, read_alone) = ways
    assert len(told) == 1 and "Short horizon" in told[0] and "of player 'z' looks 5 steps ahead" in told[0]
    assert ("player 'y'" in told[0]) == isinstance(first, bl.Unrolled) and "points the other way" in told[0]
    assert torch.equal(looked.variables["x"], silent.variables["x"]) and looked.gradients == silent.gradients
    assert len(read) == len(read_alone) and all(torch.equal(a, b) for a, b in zip(read, read_alone, strict=True))
    assert all("Short horizon" not in text or "'z'" not in text for text in nothing)


def test_several_followers_whose_horizons_are_long_enough_are_not_told():
    answers = {"y": bl.Unrolled(SGD, steps=5), "z": bl.Unrolled(SGD, steps=100)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bl.solve(in_two(0.04, shuffled()), **answers, optimizer=partial(torch.optim.SGD, lr=1e-3), steps=24)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("slow", "steps"), [(1.0, 5), (1.0, 10), (0.04, 100)])
def test_with_data_a_horizon_that_is_long_enough_is_not(slow, steps, seed):
    """Of one speed a short horizon sees the same direction, and in 100 slow steps all but .13 of the way is gone."""
    assert not played(two_speeds(slow, shuffled()), 37 if steps < 100 else 21, seed, steps=steps)[1]


@pytest.mark.parametrize("seed", range(8))
def test_noise_is_no_short_horizon(seed):
    """At its optimum the leader sees the noise of two runs that end on other batches: one look differs by 100 %."""

    def follow(x, y, batch):
        return 0.5 * (y - x - batch[:, 0].mean()) ** 2

    middle = ROWS[:, 0].mean()
    game = bl.Game(
        x=bl.Player(lambda y: 0.5 * (y - middle) ** 2, torch.zeros((), dtype=torch.float64)),
        y=bl.Player(follow, middle.clone(), data=shuffled(2)),
    )
    assert not played(game, seed=seed, steps=20, warm_start=False)[1]


def test_what_is_beyond_noise():
    """Gaussian looks, n = 3: of differences that are noise alone at most one series of a hundred is told of."""
    generator = torch.Generator().manual_seed(0)

    def looks(mean, size):
        return [mean + size * torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(5)]

    def told(near, far, size):
        way = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        pairs = [(looks(near * way, size), looks(far * way, size)) for _ in range(300)]
        return sum(disagreement(a, b, 0.9, 1.0) is not None and beyond_noise(a, b, 0.9) for a, b in pairs)

    assert told(0.0, 0.0, 1.0) <= 3 and told(1.0, 1.0, 1.0) <= 3
    assert told(-0.2, 1.0, 0.1) == 300 and told(1.0, 1.0, 0.1) == 0
    same = [torch.ones(3)] * 5
    assert beyond_noise([-look for look in same], same, 0.9)  # no noise at all


def test_noise_of_the_loss_alone_is_averaged_too():
    def follow(x, y):
        noise = 1.0 + torch.randn((), dtype=torch.float64)
        return 0.5 * (torch.tensor([1.0, 0.04], dtype=torch.float64) * (y - x * noise) ** 2).sum()

    game = bl.Game(
        x=bl.Player(lambda y: y[0] - 4.0 * y[1], torch.tensor(1.0, dtype=torch.float64)),
        y=bl.Player(follow, torch.zeros(2, dtype=torch.float64)),
    )
    looked, told = played(game, 17, steps=5)
    silent, _ = played(game, 17, steps=5, tolerance=None)
    assert torch.equal(looked.variables["x"], silent.variables["x"])
    assert all("mean of 5 looks" in text for text in told)  # whether it is told depends on the noise


def test_a_run_that_is_interrupted_between_looks_goes_on_looking(tmp_path):
    whole, told = played(two_speeds(0.04, shuffled()), 50, steps=5)
    path = tmp_path / "run.pt"
    for steps in (18, 22, 50):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            half = bl.solve(
                two_speeds(0.04, shuffled()),
                y=bl.Unrolled(SGD, steps=5),
                optimizer=partial(torch.optim.SGD, lr=1e-3),
                steps=steps,
                checkpoint=path,
            )
    assert torch.equal(half.variables["x"], whole.variables["x"])
    assert len(told) == 1 and any("Short horizon" in str(warning.message) for warning in caught)


def test_batches_that_are_too_large_to_hold_are_told_once(monkeypatch):
    monkeypatch.setattr("bilevel.solving.horizon.HELD", 10 * 8 * 2 * 8)  # ten batches of 20
    found, told = played(two_speeds(0.04, shuffled()), 70, steps=5)
    assert not told and [text for text in found.warnings if "Horizon not examined" in text]
    assert "in 1 of 70 steps" in found.warnings[0] and "GiB" in found.warnings[0]


def test_a_look_that_does_not_fit_into_memory_ends_no_run(monkeypatch):
    def full(*given):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("bilevel.solving.horizon.Followers", full)
    found, told = played(two_speeds(0.04, [ROWS]), 20, steps=5)
    assert not told and "does not fit into memory" in found.warnings[0]


def test_held_batches_are_given_again_and_not_read():
    data = Reads(shuffled())
    game = two_speeds(1.0, data)
    held, start, given = HeldBatches(2**20), game.start("y"), []
    game.hold("y", held)
    place = start
    for _ in range(25):  # over the end of a pass of 20
        batch, place = game.draw("y", place)
        given.append(batch)
    game.release("y", held)
    game.draw("y", place)
    again, count, place = game.replay("y", held), len(data.given), start
    for batch in given:
        found, place = again.draw("y", place)
        assert found is batch
    with pytest.raises(bl.errors.DataError, match="is not held"):
        again.draw("y", place)
    assert len(data.given) == count


# Many games, tasks, and leaders that SciPy moves ----------------------------------------------------------------------


def decayed(y, x, curvature, target=1.0):
    """From y = 0: at its optimum y is above 1/2, so that more decay is right; after few steps it is below."""
    return 0.5 * curvature * (y - target) ** 2 + 0.5 * x.exp() * y**2


def lead_half(y):
    return 0.5 * (y - 0.5) ** 2


def decays(curvatures, spread=0.0, size=4):
    """A game for each curvature, with noise in what the follower is fitted to, or none."""
    zero = torch.zeros((), dtype=torch.float64)
    rows = torch.tensor(curvatures, dtype=torch.float64)

    def follow(x, y, batch):
        return decayed(y, x, batch[0], 1.0 + batch[1])

    def batches():
        noise = torch.Generator().manual_seed(0)
        while True:
            drawn = torch.randn(len(rows), size, generator=noise, dtype=torch.float64).mean(1)
            yield torch.stack([rows, spread * drawn], 1)

    data = [torch.stack([rows, 0.0 * rows], 1)] if spread == 0.0 else [b for b, _ in zip(batches(), range(64))]
    one = bl.Game(x=bl.Player(lead_half, zero - 5.0), y=bl.Player(follow, zero, data=[data[0][0]]))
    return bl.Games(one, len(rows), data={"y": data})


def solved(game, optimizer=None, steps=40, **response):
    chosen = optimizer or partial(torch.optim.SGD, lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = bl.solve(game, **response, optimizer=chosen, steps=steps)
    return found, [str(warning.message) for warning in caught if "Short horizon" in str(warning.message)]


def ahead(steps, **options):
    return bl.Unrolled(SGD, steps=steps, warm_start=False, **options)


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_of_many_games_those_that_look_too_short_ahead_are_told(spread):
    """Four steps of .5 bring y to 1 - (1 - h / 2)^4 of the way: .94 for h = 1, and .23 for h = 1/8."""
    found, told = solved(decays([1.0, 0.125, 0.125], spread), y=ahead(4))
    (text,) = told
    assert "looks 4 steps ahead; 16" in text and "in 2 of 3 games" in text and "points the other way" in text
    assert ["Short horizon" in " ".join(one.warnings) for one in found] == [False, True, True]
    silent, told = solved(decays([1.0, 0.125, 0.125], spread), y=ahead(4, tolerance=None))
    assert not told
    for one, other in zip(found.variables.values(), silent.variables.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_many_games_whose_horizon_is_long_enough_are_not_told(spread):
    _, told = solved(decays([1.0, 0.5, 0.8], spread), y=ahead(16))
    assert not told


def test_noise_in_a_hundred_games_is_no_short_horizon():
    """The noise is thirty times the pull, and no batch comes twice."""
    zero = torch.zeros((), dtype=torch.float64)
    noise = torch.randn(900, 100, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def follow(x, y, batch):
        return 0.5 * (y - x - batch) ** 2 * 0.1

    one = bl.Game(x=bl.Player(lambda x, y: y * y + x * x, zero + 0.1), y=bl.Player(follow, zero, data=[zero]))
    games = bl.Games(one, 100, data={"y": list(3.0 * noise)})
    _, told = solved(games, optimizer=partial(torch.optim.SGD, lr=1e-4), y=ahead(20))
    assert not told


def tasks_of(curvature, count):
    zero = torch.zeros((), dtype=torch.float64)
    noise = torch.Generator().manual_seed(0)
    batches = [1.0 + 0.1 * torch.randn(3, generator=noise, dtype=torch.float64) for _ in range(count)]
    return bl.Tasks(
        x=bl.Player(lambda y, batch: lead_half(y) + 0.0 * batch, zero - 5.0),
        y=bl.Player(lambda x, y, batch: decayed(y, x, curvature, batch), zero),
        data=[{"support": batch, "query": batch} for batch in batches],
    )


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize(("curvature", "short"), [(0.125, True), (1.0, False)])
def test_tasks_that_look_too_short_ahead_are_told_and_others_are_not(curvature, short, count):
    found, told = solved(tasks_of(curvature, count), y=ahead(4))
    assert bool(told) == short
    if short:
        assert "looks 4 steps ahead; 16" in told[0] and "points the other way" in told[0]
        assert ("in the mean of 5 looks" in told[0]) == (count > 1)
    silent, told = solved(tasks_of(curvature, count), y=ahead(4, tolerance=None))
    assert not told and torch.equal(found.variables["x"], silent.variables["x"])


@pytest.mark.parametrize("method", ["L-BFGS-B", "SLSQP", "trust-constr"])
@pytest.mark.parametrize(("steps", "short"), [(4, True), pytest.param(200, False, marks=pytest.mark.slow)])
def test_a_leader_that_scipy_moves_is_told_of_a_short_horizon(method, steps, short):
    """As an end too: L-BFGS-B takes a handful of evaluations to the edge, fewer than the sixteen of a first look."""
    zero = torch.zeros((), dtype=torch.float64)
    game = bl.Game(
        x=bl.Player(lead_half, zero - 3.0, domain=bl.Box(-5.0, 2.0)),
        y=bl.Player(lambda x, y: decayed(y, x, 0.125), zero),
    )
    found, told = solved(game, optimizer=bl.Scipy(method), y=ahead(steps))
    assert bool(told) == short
    if short:
        assert f"looks {steps} steps ahead; {4 * steps}" in told[0] and "norm" in told[0]
        assert found.variables["x"] <= -2.9  # led to the edge, where h / (h + e^x) = 1/2 is at x = log h
    else:
        # 200 steps of 1/2 leave (1 - h)^200 = e^-26 of the way.
        assert abs(float(found.variables["x"]) - math.log(0.125)) <= 1e-2

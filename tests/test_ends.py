"""Data without an end, wherever all of a pass is read: told before any work, or after a limit, with the way out."""

import itertools
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader, IterableDataset

import bilevel as bl
from bilevel.errors import DataError
from bilevel.game import ends
from bilevel.responses import AllBatches
from bilevel.variance import SAGA, SARAH

D = torch.float64
ROWS = torch.arange(24.0, dtype=D).reshape(8, 3) / 24
LIMIT = 20


class Endless(IterableDataset):
    """Rows for ever, unless it is told how many; or random ones."""

    def __init__(self, count=None, *, random=False):
        self.count, self.random = count, random

    def __iter__(self):
        for i in itertools.count() if self.count is None else range(self.count):
            yield torch.rand(3, dtype=D) if self.random else ROWS[i % 8]


class Long(Endless):
    """As long as it says."""

    def __len__(self):
        return self.count


class Lies(Endless):
    def __len__(self):
        return sys.maxsize


@pytest.fixture(autouse=True)
def a_small_limit(monkeypatch):
    monkeypatch.setattr(ends, "MOST", LIMIT)
    monkeypatch.setattr("bilevel.variance._MOST", LIMIT)


def game(data, leaders=None):
    def lead(x, y):
        return (y - 1.0).square().sum() + 0.1 * x.square().sum()

    def follow(x, y, batch):
        return (batch @ y - 1.0).square().mean() + (x.exp() * y.square()).sum()

    x = torch.zeros(3, dtype=D)
    led = (lambda x, y, batch: lead(x, y) * batch.mean()) if leaders is not None else lead
    return bl.Game(x=bl.Player(led, x, data=leaders), y=bl.Player(follow, x.clone(), data=data))


def implicit(batches):
    return bl.Implicit(partial(SGD, lr=0.1), steps=3, tolerance=None, batches=batches)


def two(data):
    return DataLoader(data, batch_size=2)


@pytest.mark.parametrize("response", [implicit(AllBatches()), bl.SingleLoop(partial(SGD, lr=0.1), variance=SARAH(4))])
@pytest.mark.parametrize(
    "data", [partial(itertools.cycle, [ROWS]), partial(itertools.repeat, ROWS), Lies()], ids=["cycle", "repeat", "len"]
)
def test_what_is_known_to_have_no_end_is_refused_before_any_work(response, data):
    with pytest.raises(ValueError, match=r"reads all batches of a pass, and the data of player 'y' do not end: their"):
        response.init(game(data))


def test_a_repetition_that_ends_is_taken():
    response = implicit(AllBatches())
    bl.solve(game(partial(itertools.repeat, ROWS, 3)), y=response, steps=2)


@pytest.mark.parametrize("workers", [0, 2])
def test_all_batches_of_a_loader_that_does_not_end(workers):
    loader = DataLoader(Endless(), batch_size=2, num_workers=workers)
    with pytest.raises(DataError, match=r"given 20 in pass 1 .*AllBatches\(most=100\)"):
        bl.solve(game(loader), y=implicit(AllBatches()), steps=1)
    bl.solve(game(loader), y=implicit(AllBatches(most=4)), steps=2)  # the way out


def test_a_pass_without_a_length_that_ends_is_read_whole():
    found = list(game(two(Endless(2 * LIMIT))).whole_pass("y", {"seed": 0, "epoch": 0, "index": 3}, "a test"))
    assert len(found) == LIMIT


def test_a_pass_is_as_long_as_its_length_says():
    many = 4 * LIMIT
    assert len(list(game(two(Long(2 * many))).whole_pass("y", {"seed": 0, "epoch": 0, "index": 0}, "a test"))) == many
    assert len(list(game([ROWS] * many).whole_pass("y", {"seed": 0, "epoch": 0, "index": 0}, "a test"))) == many


def test_reductions_of_variance_on_data_that_do_not_end():
    endless = two(Endless(random=True))
    for reduction, error in ((SARAH(4), DataError), (SAGA(), ValueError)):
        with pytest.raises(error, match="not end"):
            bl.solve(game(endless), y=bl.SingleLoop(partial(SGD, lr=0.01), variance=reduction), steps=3 * LIMIT)
        with pytest.raises(error, match="not end"):
            rule = bl.dynamics.VarianceReduced(reduction)
            bl.solve(game([ROWS], endless), y=implicit(AllBatches()), dynamics=rule, steps=3 * LIMIT)


def test_an_interval_on_data_that_do_not_end():
    response = implicit(AllBatches(most=2))
    asked = partial(bl.certificates.hypergradient_interval, response=response, replications=3)
    with pytest.raises(DataError, match="hypergradient_interval reads all batches of a pass"):
        asked(game(two(Endless())))  # the same batches in each pass, one after the other
    found = asked(game(two(Endless(random=True)))).hypergradient
    assert bool((found.low < found.high).any())


def tuned(valid, **options):
    torch.manual_seed(0)

    def train(weights, decay, batch):
        return weights(batch).square().mean() + bl.penalty(weights, decay)

    def loss(weights, batch):
        return (weights(batch) - 1.0).square().mean()

    model, sgd = nn.Linear(3, 1, dtype=D), partial(SGD, lr=0.1)
    hyper = {"decay": bl.Log(1e-3, 1.0)}
    return bl.tune(model, train, loss, [ROWS], valid, hyper=hyper, optimizer=sgd, steps=10, **options)


def test_tuning_with_validation_data_that_do_not_end(tmp_path):
    begun = []
    for data in (two(Endless()), partial(itertools.cycle, [ROWS])):
        with pytest.raises(ValueError, match=r"tune\(check=...\) reads all .* or pass check=0"):
            tuned(data, callbacks=[lambda *told: begun.append(told)], checkpoint=tmp_path / "run.pt")
    assert not begun and not list(tmp_path.iterdir())
    found = tuned(two(Endless()), check=0)
    with pytest.raises(ValueError, match="retrain reads all"):
        bl.retrain(found)
    assert tuned(two(Endless(8))).retrained is not None

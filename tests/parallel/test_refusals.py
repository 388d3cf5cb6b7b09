"""What cannot be shared among ranks is refused by name, in one process as in many, and each way out works."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bilevel as bl

INPUTS, TARGETS = torch.linspace(-1.0, 2.0, 24).reshape(8, 3), torch.linspace(0.0, 1.0, 8)
DATA = [(INPUTS, TARGETS)]


def game(loss, data=None, start=None):
    """A leader whose loss is a mean, and a follower with this one."""
    start = torch.ones(3) if start is None else start
    lead = bl.Player(lambda y, x: (mean(y) if isinstance(y, torch.Tensor) else y(INPUTS).mean()) + x**2, torch.ones(()))
    return bl.Game(x=lead, y=bl.Player(loss, start, data=DATA if data is None else data))


def mean(y):
    return (INPUTS @ y - TARGETS).square().mean()


def shared(*arguments, parallel=None, **changed):
    return (parallel or bl.DataParallel()).game(game(*arguments, **changed))


def residuals(x, y, batch):
    inputs, targets = batch
    return x * (inputs @ y - targets).square()


def test_a_sum_over_examples_is_refused_and_their_mean_is_not():
    with pytest.raises(ValueError, match=r"loss of player 'y' is .* on a batch of 8 examples and .* of its halves"):
        shared(lambda x, y, batch: residuals(x, y, batch).sum())
    shared(lambda x, y, batch: residuals(x, y, batch).mean() + y.square().sum())
    shared(lambda x, y, batch: residuals(x, y, batch).sum(), parallel=bl.DataParallel(coupled=True))


def test_a_sum_under_dropout_is_refused():
    with pytest.raises(ValueError, match="is to be divided"):
        shared(lambda x, y, batch: nn.functional.dropout(residuals(x, y, batch) + 5.0, 0.1).sum())
    shared(lambda x, y, batch: nn.functional.dropout(residuals(x, y, batch) + 5.0, 0.1).mean())


def test_weights_that_are_divided_by_their_sum_are_refused_though_they_start_equal():
    def divided(x, y, batch):
        weights = (batch[0] @ y).exp()
        return x * (weights * batch[1]).sum() / weights.sum() + y.square().sum()

    with pytest.raises(ValueError, match="weights' sum"):
        shared(divided, start=torch.zeros(3))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_batch_norm_is_refused_and_layer_norm_is_not(dropout):
    def net(norm):
        return nn.Sequential(nn.Linear(3, 4), norm, nn.Dropout(dropout), nn.Linear(4, 1))

    def loss(x, y, batch):
        return x * (y(batch[0])[:, 0] - batch[1]).square().mean()

    with pytest.raises(ValueError, match=r"Its BatchNorm \('1'\)"):
        shared(loss, start=net(nn.BatchNorm1d(4)))
    shared(loss, start=net(nn.LayerNorm(4)))
    accepted = shared(loss, start=net(nn.BatchNorm1d(4)), parallel=bl.DataParallel(coupled=True))
    response = bl.Unrolled(partial(torch.optim.SGD, lr=0.1), steps=2, tolerance=None)
    _, state = response(accepted, {"x": torch.ones(())}, response.init(accepted))
    assert int(state["buffers"]["1.num_batches_tracked"]) > 0


def test_a_mean_over_tokens_says_how_many_count():
    labels = torch.tensor([0, 1, -100, 2, 1, 0, 2, 1])
    data = [(INPUTS, labels)]

    def loss(x, y, batch):
        inputs, labels = batch
        return x * nn.functional.cross_entropy(inputs * y, labels, ignore_index=-100)

    with pytest.raises(ValueError, match="says how many count"):
        shared(loss, data)
    shared(loss, data, parallel=bl.DataParallel(examples=lambda batch: (batch[1] != -100).sum()))


def test_a_captured_tensor_is_refused():
    captured = torch.ones(3, requires_grad=True)
    with pytest.raises(bl.errors.CapturedTensorError, match="captures a tensor of shape \\(3,\\)"):
        shared(lambda x, y, batch: residuals(x, y * captured, batch).mean())
    shared(lambda x, y, batch: residuals(x, y * captured.detach(), batch).mean())


def test_a_batch_without_a_leading_dimension_is_refused():
    with pytest.raises(ValueError, match=r"hold tensors with leading dimensions \[8, 3\]"):
        shared(lambda x, y, batch: x * (batch[0] @ y * batch[1].sum()).mean(), [(INPUTS, torch.ones(3))])
    parallel = bl.DataParallel(sharded=True, examples=lambda batch: len(batch[0]), coupled=True)
    shared(lambda x, y, batch: x * (batch[0] @ y * batch[1].sum()).mean(), [(INPUTS, torch.ones(3))], parallel=parallel)


def test_functions_of_the_batch_other_than_losses_are_refused():
    lead = bl.Player(lambda y: mean(y), torch.ones(3))
    follow = bl.Player(
        lambda x, y, batch: residuals(1.0, y - x, batch).mean(), torch.ones(3), data=DATA,
        residual=lambda x, y, batch: y - x * batch[1].mean(),
    )  # fmt: skip
    with pytest.raises(TypeError, match="the residual= of player 'y' takes the batch"):
        bl.DataParallel().game(bl.Game(x=lead, y=follow))


def test_a_sampler_for_other_ranks_is_refused():
    data = TensorDataset(INPUTS, TARGETS)
    loader = DataLoader(data, 2, sampler=DistributedSampler(data, num_replicas=4, rank=3))
    with pytest.raises(ValueError, match="has rank=3 of num_replicas=4; this is rank 0 of 1"):
        shared(lambda x, y, batch: residuals(x, y, batch).mean(), loader)


def test_many_games_take_no_parts_of_batches_and_one_process_plays_them_as_without():
    games = bl.Games(game(lambda x, y, batch: residuals(x, y, batch).mean()), 3)
    data = TensorDataset(INPUTS, TARGETS)
    loader = DataLoader(data, 2, sampler=DistributedSampler(data, num_replicas=1, rank=0))
    dealt = bl.Games(game(lambda x, y, batch: residuals(x, y, batch).mean(), loader), 3)
    for refused, parallel in [
        (games, bl.DataParallel(sharded=True)),
        (games, bl.DataParallel(coupled=True)),
        (dealt, bl.DataParallel()),
    ]:
        with pytest.raises(ValueError, match="many games are shared out in whole"):
            parallel.game(refused)
    shared = bl.DataParallel().game(games)
    assert shared.count == shared.undivided.count == 3
    for refused in (
        lambda: bl.DataParallel().game(shared),
        lambda: shared.chosen([0]),
        lambda: shared.joined(z=("x",)),
    ):
        with pytest.raises(TypeError, match="expected Games|before they are shared out"):
            refused()
    response = bl.Unrolled(partial(torch.optim.SGD, lr=0.01), steps=2, tolerance=None)
    alone, together = (bl.solve(games, y=response, steps=2, parallel=p) for p in (None, bl.DataParallel()))
    assert torch.equal(alone.variables["x"], together.variables["x"])
    assert together.history[-1]["communicated"] == 0


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="timeout=0"):
        bl.DataParallel(timeout=0)
    with pytest.raises(TypeError, match="examples=3; expected a function"):
        bl.DataParallel(examples=3)
    with pytest.raises(TypeError, match=r"parallel=True; expected bilevel.DataParallel\(\)"):
        bl.solve(game(lambda x, y, batch: residuals(x, y, batch).mean()), steps=1, parallel=True)


def test_one_process_plays_as_without():
    response = bl.Unrolled(partial(torch.optim.SGD, lr=0.01), steps=2, tolerance=None)
    play = partial(bl.solve, game(lambda x, y, batch: residuals(x, y, batch).mean()), y=response, steps=2)
    alone, together = play(), play(parallel=bl.DataParallel())
    # One product and one division by the eight examples lie between them.
    assert torch.allclose(alone.variables["x"], together.variables["x"], rtol=1e-6, atol=0.0)
    assert together.history[-1]["communicated"] == 0


def test_a_rank_that_goes_while_a_game_of_sharded_variables_is_made_is_told(monkeypatch):
    from bilevel.game.shards import MeshPeers

    def closed(*_, **__):
        raise RuntimeError("Connection closed by peer")

    for name in ("all_reduce", "all_gather"):
        monkeypatch.setattr(torch.distributed, name, closed)
    peers = MeshPeers(None)
    for ask in (peers.total, peers.greatest, lambda tensor: peers.parts(tensor, [3, 3])):
        with pytest.raises(bl.errors.ParallelError, match="waited for the others.*Connection closed by peer"):
            ask(torch.zeros(3))

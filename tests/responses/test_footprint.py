"""The memory of a learned response is said in bytes before it is taken."""

from functools import partial

import pytest
import torch
from torch import nn, optim

import bilevel as bl
from bilevel.responses.learned.footprint import Footprint, Memory, available, footprint, told

SIZE = 1000


def follow(x, y):
    return ((y - x.sum()) ** 2).sum()


def lead(y):
    return y.sum()


GAME = bl.Game(x=bl.Player(lead, torch.zeros(10)), y=bl.Player(follow, torch.zeros(SIZE)))
MATRIX = [torch.empty(SIZE, 10, device="meta")]
BYTES = 4 * SIZE * 10


@pytest.mark.parametrize(
    ("factory", "slots"),
    [
        (partial(optim.SGD, lr=0.1), 0.0),
        (partial(optim.SGD, lr=0.1, momentum=0.9), 1.0),
        (partial(optim.Adam, lr=0.1), 2.0),
        (partial(optim.Adam, lr=0.1, fused=True), 2.0),
        (partial(optim.Adam, lr=0.1, amsgrad=True), 3.0),
        # A row and a column for each matrix, seen on one of 16 x 10.
        (partial(optim.Adafactor, lr=0.1), 26 / 160),
    ],
)
def test_an_optimiser_is_asked_what_it_remembers(factory, slots):
    found = footprint(factory, MATRIX, in_place=True)
    assert found == Footprint(BYTES, BYTES, round(BYTES * slots), 0)
    assert footprint(factory, MATRIX, in_place=False).copies == BYTES + round(BYTES * slots)


def only_form(inputs, outputs):
    """A network that would tell if it were made for real."""
    assert torch.empty(0).device.type == "meta", "allocated"
    return nn.Linear(inputs, outputs, bias=False)


def test_it_is_refused_before_it_is_allocated():
    response = bl.Hypernetwork(partial(optim.Adam, lr=1e-3), network=only_form, memory=Memory(limit=300_000))
    with pytest.raises(MemoryError) as caught:
        response.init(GAME)
    text = str(caught.value)
    # w0 and the matrix, once for themselves, once for their gradients, twice for Adam; and copies of all but gradients.
    own = BYTES + 4 * SIZE
    assert f"{told(own)} of parameters, {told(own)} of gradients, {told(2 * own)} of the optimiser's memory" in text
    assert f"{told(7 * own)} (" in text and f"{told(3 * own)} of copies" in text
    assert "from 10 entries to the 1,000 of player 'y' has 10,000 parameters" in text
    assert "memory's limit is 300 kB" in text and "RowScaled()" in text and "in_place=True" in text


def test_there_is_room_for_less():
    for network in (bl.networks.LowRank(1), bl.networks.Linear()):
        bl.Hypernetwork(partial(optim.Adam, lr=1e-3), network=network, memory=Memory(limit=308_000)).init(GAME)
    in_place = bl.Hypernetwork(partial(optim.Adam, lr=1e-3), memory=Memory(in_place=True, limit=176_000))
    in_place.init(GAME)


def test_what_the_machine_has_is_the_limit(monkeypatch):
    monkeypatch.setattr("bilevel.responses.learned.footprint.available", lambda device: 1000)
    with pytest.raises(MemoryError, match="available are 1 kB"):
        bl.Hypernetwork(partial(optim.Adam, lr=1e-3)).init(GAME)
    monkeypatch.setattr("bilevel.responses.learned.footprint.available", lambda device: None)
    bl.Hypernetwork(partial(optim.Adam, lr=1e-3)).init(GAME)


def test_a_module_is_counted_as_it_is():
    with pytest.raises(MemoryError, match="Linear from 10 entries"):
        bl.Hypernetwork(partial(optim.SGD, lr=1e-3), network=nn.Linear(10, SIZE), memory=Memory(limit=1000)).init(GAME)


def test_an_optimiser_that_searches_is_refused():
    with pytest.raises(TypeError, match="LBFGS searches along one"):
        bl.Hypernetwork(optim.LBFGS).init(GAME)


def test_bytes_are_told():
    assert [told(size) for size in (12, 1500, 2_640_000_000)] == ["12 bytes", "1.5 kB", "2.64 GB"]
    found = available(torch.device("cpu"))
    assert found is None or found > 0


def test_a_network_that_computes_while_it_is_made_is_made_whole_and_draws_no_numbers():
    def zeroed(inputs, outputs):
        layer = nn.Linear(inputs, outputs, bias=False)
        layer.weight.data = 0.0 * (torch.ones(outputs, inputs, device="cpu") + layer.weight)
        return layer

    before = torch.random.get_rng_state()
    response = bl.Hypernetwork(partial(optim.Adam, lr=1e-3), network=zeroed, tolerance=None)
    state = response.init(GAME)
    assert torch.equal(torch.random.get_rng_state(), before)
    x = torch.zeros(10, requires_grad=True)
    y, _ = response(GAME, {"x": x}, state)
    assert torch.isfinite(torch.autograd.grad(lead(y), x)[0]).all()
    with pytest.raises(MemoryError, match="10,000 parameters"):
        bl.Hypernetwork(partial(optim.Adam, lr=1e-3), network=zeroed, memory=Memory(limit=1000)).init(GAME)

"""No response keeps anything of a call but its state."""

import gc

import pytest
import torch
from torch import Tensor

import bilevel as bl
from benchmarks.leaks import calls, cases, game_of, live

SIZE = 20


@pytest.mark.filterwarnings("ignore::bilevel.errors.BilevelWarning")
@pytest.mark.parametrize(("made", "response"), cases(SIZE).values(), ids=cases(SIZE))
def test_live_tensors_do_not_grow_with_the_calls(made, response):
    found = {call: live() for call in calls(response, made(SIZE), 30) if call in (9, 29)}
    assert found[9] == found[29]


@pytest.mark.parametrize("how", [bl.ReverseMode(), bl.Segments(count=3), bl.ForwardMode()])
def test_an_answer_goes_with_its_last_reference(how):
    """By reference counts alone: a cycle through a graph is seen by no collector."""
    game = game_of(SIZE)
    response = bl.Unrolled(torch.optim.Adam, steps=6, differentiation=how)
    x = torch.ones(10, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        y, _ = response(game, {"x": x}, response.init(game))
        before = sum(type(t) is Tensor for t in gc.get_objects())
        del y
        assert sum(type(t) is Tensor for t in gc.get_objects()) < before
    finally:
        gc.enable()

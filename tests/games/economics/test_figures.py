"""The figures of economic games: paths end at the closed forms, curves are where best responses are."""

from functools import partial

import pytest
import torch
from torch import optim

import bilevel as bl
from games.economics.bounded_figures import bounded_figures
from games.economics.figures import figures, path_of_play, surfaces
from games.economics.oligopoly import Cournot

MARKET = Cournot(10.0, 1.0, (1.0, 2.0))
ANSWER = bl.Implicit(bl.Scipy("L-BFGS-B"), steps=50, tolerance=1e-7)


def test_a_followers_path_is_its_answers_to_the_leaders():
    path = path_of_play(MARKET.game(), 30, {"firm1": 0.5}, firm2=ANSWER, optimizer=partial(optim.SGD, lr=0.5))
    assert path["firm1"].shape == path["firm2"].shape == (30,)
    assert float(path["firm1"][0]) == 0.5
    assert torch.allclose(path["firm2"], (10.0 - path["firm1"] - 2.0) / 2.0, atol=1e-5)
    end = torch.stack([path["firm1"][-1], path["firm2"][-1]])
    assert torch.allclose(end, MARKET.stackelberg(), atol=1e-4)


def test_slopes_vanish_on_the_reaction_curves():
    box = (0.0, 6.0, 0.0, 6.0)
    value, slope = surfaces(MARKET.game(), box, count=7)["firm2"]
    assert value.shape == slope.shape == (7, 7)
    assert float(slope[3, 2]) == 0.0  # 3 is the answer to 2
    assert float(value[3, 2]) == -9.0  # and earns 3 (10 - 5 - 2)


@pytest.mark.slow
def test_every_kind_of_game_has_a_figure():
    assert set(figures()) == {"cournot", "bertrand", "toll", "contract", "security"}
    assert set(bounded_figures()) == {"capacity", "braess", "city", "signed", "budget"}

"""Algorithm 1: every candidate retrained to convergence, in any game, side by side, and never twice."""

import math

import pytest
import torch

import bilevel as bl
from games.tuning.cross_validation import CrossValidation, grid, random

D = torch.float64


def lead(weights):
    return (weights["w"] - 1.0).square().sum()


def follow(decay, weights):
    return (weights["w"] - 2.0).square().sum() + decay.exp() * weights["w"].square().sum()


def game():
    # w* = 2 / (1 + e^x), so that the best of all x is 0.
    return bl.Game(
        decay=bl.Player(lead, torch.tensor(0.5, dtype=D)),
        weights=bl.Player(follow, {"w": torch.zeros(3, dtype=D)}),
    )


def exact(x):
    return 3 * (2 / (1 + math.exp(x)) - 1) ** 2


@pytest.mark.parametrize("optimizer", [bl.Scipy("L-BFGS-B"), lambda p: torch.optim.SGD(p, lr=0.1)])
def test_losses_are_those_of_converged_followers(optimizer):
    played = game()
    found = CrossValidation(optimizer, tolerance=1e-8)(played, grid(played, {"decay": [-1.0, 0.0, 1.0]}))
    expected = torch.tensor([exact(-1.0), 0.0, exact(1.0)], dtype=D)
    # |w - w*| <= |gradient| / 2, the gradient being 1e-8 of 4 sqrt(3): the loss is off by 1e-7 at most.
    torch.testing.assert_close(found.leader_losses, expected, atol=1e-7, rtol=0)
    assert found.best["decay"].item() == 0.0 and found.best_index == 1
    torch.testing.assert_close(found.answer["w"], torch.ones(3, dtype=D), atol=1e-7, rtol=0)
    assert found.converged.all() and found.gradients > 0


def test_processes_find_what_one_finds():
    played = game()
    candidates = grid(played, {"decay": torch.linspace(-1, 1, 4)})
    alone, together = (CrossValidation(jobs=jobs)(played, candidates) for jobs in (1, 2))
    assert torch.equal(alone.leader_losses, together.leader_losses)


def test_a_second_run_does_only_what_is_missing(tmp_path):
    played = game()
    asked = []

    def counted(decay):
        asked.append(float(decay))
        return {"w": torch.full((3,), 2 / (1 + math.exp(decay)), dtype=D)}

    search = CrossValidation(bl.ClosedForm(counted))
    first = search(played, grid(played, {"decay": [0.0, 1.0]}), folder=tmp_path)
    assert asked == [0.0, 1.0]
    (tmp_path / "00001.pt").unlink()
    second = search(played, grid(played, {"decay": [0.0, 1.0]}), folder=tmp_path)
    assert asked == [0.0, 1.0, 1.0]
    assert torch.equal(first.leader_losses, second.leader_losses)
    with pytest.raises(bl.CheckpointError, match="another search"):
        search(played, grid(played, {"decay": [0.5, 1.0]}), folder=tmp_path)
    with pytest.raises(bl.CheckpointError, match="another search"):
        other = bl.Game(
            decay=bl.Player(lambda weights: 2 * lead(weights), torch.tensor(0.5, dtype=D)),
            weights=played.players["weights"],
        )
        search(other, grid(other, {"decay": [0.0, 1.0]}), folder=tmp_path)


def test_what_did_not_converge_is_told():
    played = game()
    search = CrossValidation(lambda p: torch.optim.SGD(p, lr=1e-4), steps=3)
    with pytest.warns(bl.NonConvergenceWarning, match="2 of 2 candidates did not converge in 3 steps"):
        found = search(played, grid(played, {"decay": [0.0, 1.0]}))
    assert not found.converged.any()


def test_the_leaders_loss_is_over_its_whole_data():
    played = bl.Game(
        x=bl.Player(
            lambda y, batch: (y - batch).square(), torch.tensor(0.0), data=[torch.tensor(1.0), torch.tensor(5.0)]
        ),
        y=bl.Player(lambda x, y: (y - x).square(), torch.tensor(1.0)),
    )
    found = CrossValidation()(played, grid(played, {"x": [2.0]}))
    torch.testing.assert_close(found.leader_losses, torch.tensor([5.0], dtype=D), atol=1e-4, rtol=0)


def test_candidates_fill_pytrees_and_stay_within_bounds():
    played = bl.Game(
        a=bl.Player(lambda y: y.square().sum(), {"p": torch.zeros(2), "q": torch.zeros(3)}),
        b=bl.Player(lambda a, b, y: (y - a["p"] - b).square().sum() + (a["q"] ** 2).sum(), torch.zeros(2)),
        y=bl.Player(lambda a, b, y: (y - a["p"] - a["q"].sum() - b).square().sum(), torch.zeros(2)),
    )
    both = grid(played, {"a": [1.0, 2.0], "b": [3.0, 4.0]})
    assert [(c["a"]["q"][0].item(), c["b"][0].item()) for c in both] == [(1, 3), (1, 4), (2, 3), (2, 4)]
    drawn = random(played, {"a": (-1.0, 1.0)}, count=50, seed=3)
    entries = torch.stack([torch.cat([c["a"]["p"], c["a"]["q"]]) for c in drawn])
    assert entries.shape == (50, 5) and entries.abs().max() <= 1 and entries.std() > 0.4
    again = random(played, {"a": (-1.0, 1.0)}, count=50, seed=3)
    assert all(torch.equal(x["a"]["p"], y["a"]["p"]) for x, y in zip(drawn, again))
    assert len(CrossValidation()(played, both).leader_losses) == 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: grid(g, {"weight": [1.0]}), "no player 'weight'"),
        (lambda g: grid(g, {"decay": []}), "is empty"),
        (lambda g: random(g, {"decay": (1.0, 1.0)}, count=2), "expected low < high"),
        (lambda g: random(g, {"decay": (0.0, 1.0)}, count=0), "count=0"),
        (lambda g: CrossValidation()(g, []), "no candidates"),
        (lambda g: CrossValidation()(g, [{"decay": torch.zeros(2, dtype=D)}]), "decay"),
        (lambda g: CrossValidation(tolerance=0.0), "tolerance=0.0"),
        (lambda g: CrossValidation(jobs=0), "jobs=0"),
        (lambda g: CrossValidation(steps=0), "steps=0"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(game())

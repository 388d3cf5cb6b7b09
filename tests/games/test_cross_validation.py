"""Algorithm 1: every candidate retrained to convergence, in any game, side by side, and never twice."""

import math

import pytest
import torch

import bilevel as bl
from games.cross_validation import CrossValidation, grid, random

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


@pytest.mark.slow
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
    with pytest.raises(bl.errors.CheckpointError, match="another search"):
        search(played, grid(played, {"decay": [0.5, 1.0]}), folder=tmp_path)
    with pytest.raises(bl.errors.CheckpointError, match="another search"):
        other = bl.Game(
            decay=bl.Player(lambda weights: 2 * lead(weights), torch.tensor(0.5, dtype=D)),
            weights=played.players["weights"],
        )
        search(other, grid(other, {"decay": [0.0, 1.0]}), folder=tmp_path)


def test_what_did_not_converge_is_told():
    played = game()
    search = CrossValidation(lambda p: torch.optim.SGD(p, lr=1e-4), steps=3)
    with pytest.warns(bl.errors.NonConvergenceWarning, match="2 of 2 candidates did not converge in 3 steps"):
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


def ridge(count):
    """A penalty for each weight; every fold has examples of its own, the leader's in two batches."""

    def train(decay, weights, batch):
        return ((batch[0] @ weights - batch[1]) ** 2).mean() + (decay.exp() * weights**2).sum()

    def valid(weights, batch):
        return ((batch[0] @ weights - batch[1]) ** 2).mean()

    generator = torch.Generator().manual_seed(0)
    shapes = ((count, 12, 4), (count, 12))
    to_fit, *to_judge = [tuple(torch.randn(s, generator=generator, dtype=D) for s in shapes) for _ in range(3)]

    def made(index):
        return bl.Game(
            decay=bl.Player(valid, torch.zeros(4, dtype=D), [tuple(t[index] for t in batch) for batch in to_judge]),
            weights=bl.Player(train, torch.zeros(4, dtype=D), [tuple(t[index] for t in to_fit)]),
        )

    return [made(i) for i in range(count)], bl.Games(made(0), count, data={"decay": to_judge, "weights": [to_fit]})


OPTIMIZERS = {"SGD": lambda p: torch.optim.SGD(p, lr=0.1), "Scipy": bl.Scipy("L-BFGS-B")}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_stack_finds_what_one_by_one_finds(optimizer, tmp_path):
    (alone,), _ = ridge(1)
    candidates = random(alone, {"decay": (-3.0, 1.0)}, count=5)
    apart = CrossValidation(optimizer, tolerance=1e-6)(alone, candidates, folder=tmp_path)
    (tmp_path / "00003.pt").unlink()
    for folder in (tmp_path, None):  # the files of one serve the other
        stacked = CrossValidation(optimizer, tolerance=1e-6, together=3)(alone, candidates, folder=folder)
        # SciPy's line search amplifies rounding, up to what its tolerance lets through.
        atol = 1e-12 if optimizer is OPTIMIZERS["SGD"] else 1e-6
        for name in ("leader_losses", "follower_losses", "stationarity", "answer"):
            torch.testing.assert_close(getattr(stacked, name), getattr(apart, name), rtol=0.0, atol=atol)
        assert stacked.best_index == apart.best_index
        assert stacked.fold_losses.shape == (5, 1)


def test_folds_are_judged_by_their_mean(tmp_path):
    games, folds = ridge(3)
    candidates = grid(games[0], {"decay": [-3.0, -1.0, 1.0]})
    each = [CrossValidation(OPTIMIZERS["SGD"], tolerance=1e-6)(one, candidates) for one in games]
    expected = torch.stack([one.leader_losses for one in each], dim=1)
    for together in (1, 2):
        search = CrossValidation(OPTIMIZERS["SGD"], tolerance=1e-6, together=together)
        found = search(folds, candidates, folder=tmp_path / str(together))
        torch.testing.assert_close(found.fold_losses, expected, rtol=0.0, atol=1e-12)
        torch.testing.assert_close(found.leader_losses, expected.mean(1), rtol=0.0, atol=1e-12)
        torch.testing.assert_close(found.stationarity, torch.stack([one.stationarity for one in each]).amax(0))
        assert found.answer.shape == (3, 4)
        again = search(folds, candidates, folder=tmp_path / str(together))
        assert torch.equal(again.leader_losses, found.leader_losses)
    with pytest.raises(ValueError, match="folds are retrained in one process"):
        CrossValidation(jobs=2)(folds, candidates)
    with pytest.raises(ValueError, match="together=2, jobs=2"):
        CrossValidation(jobs=2, together=2)

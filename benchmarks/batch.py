"""Many small games in one call of `solve`, against a loop over `solve`.

Quadratic games of 3 x 5 variables, ridge regressions of 20 examples x 8 features, logistic regressions of 50 x 10, each
game with data of its own; unrolled, implicit and simultaneous; 1 to 10,000 games. The loop is timed on a sample of the
same games and scaled to their number, as its games do not know of each other. Then cross-validation of the ridge
regression, 100 candidates in 5 folds. Loop and stack are interleaved on one thread; seconds are the processor's,
ratios are medians over the rounds. Every run also compares the answers of the sample. Writes JSON.

    python benchmarks/batch.py --output batch.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

import bilevel as bl
from benchmarks.head import head
from bilevel.tree import flatten
from games.cross_validation import CrossValidation, random

Make = Callable[[int, int], bl.Games]
Play = Callable[[Any], Any]

D = torch.float64
STEPS = 5
SGD = torch.optim.SGD


def main() -> None:
    """Run the rounds and write what they took."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--counts", type=int, nargs="+", default=[1, 10, 100, 1000, 10_000])
    options.add_argument("--sample", type=int, default=20, help="games that the loop is timed on")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--quick", action="store_true", help="one round, 1 to 1,000 games, a loop of 5")
    options.add_argument("--output", type=Path, default=Path("batch.json"))
    chosen = options.parse_args()
    if chosen.quick:
        chosen.counts, chosen.sample, chosen.rounds = [1, 100, 1000], 5, 1
    torch.set_num_threads(1)
    warnings.simplefilter("error", bl.BilevelWarning)  # who stops short of its tolerance has not done the same work
    rows = [
        row
        for problem, make in PROBLEMS.items()
        for way, play in WAYS.items()
        for row in measured(problem, way, make, play, chosen)
    ]
    rows += [cross_validated(solver, optimizer, chosen) for solver, optimizer in SOLVERS.items()]
    settings = {"leader steps": STEPS, "rounds": chosen.rounds, "loop's games": chosen.sample, "dtype": "float64"}
    chosen.output.write_text(json.dumps({**head(seed=chosen.seed), "settings": settings, "results": rows}, indent=2))


def measured(problem: str, way: str, make: Make, play: Play, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of games."""
    every = make(max(*chosen.counts, chosen.sample), chosen.seed)
    sample = [every.game(index) for index in range(chosen.sample)]
    stacks = {count: every.chosen(range(count)) for count in chosen.counts}
    play(stacks[min(stacks)])  # torch imports what vmap needs on its first use
    taken: dict[int, list[float]] = {count: [] for count in stacks}
    looped: list[float] = []
    for _ in range(chosen.rounds):
        seconds, alone = timed(lambda: [play(game) for game in sample])
        looped.append(seconds / len(sample))
        for count, games in stacks.items():
            seconds, together = timed(lambda games=games: play(games))
            taken[count].append(seconds)
            apart = [
                float((flatten(found.variables) - flatten(one.variables)).abs().max())
                for found, one in zip(together, alone, strict=False)
            ]
            if not max(apart) < 1e-8:
                raise SystemExit(f"{problem}, {way}, {count} games: the answers are {max(apart):.2g} apart")
    rows = []
    for count, seconds_each in taken.items():
        ratio = statistics.median(one * count / all_ for one, all_ in zip(looped, seconds_each, strict=True))
        rows.append(
            {
                "problem": problem,
                "way": way,
                "games": count,
                "loop seconds a game": statistics.median(looped),
                "stack seconds": statistics.median(seconds_each),
                "ratio": ratio,
            }
        )
        print(
            f"{problem:<20} {way:<14} {count:>6} games: {rows[-1]['stack seconds']:8.3f} s, "
            f"loop {rows[-1]['loop seconds a game'] * count:9.3f} s, ratio {ratio:7.1f}",
            flush=True,
        )
    return rows


def cross_validated(solver: str, optimizer: Any, chosen: argparse.Namespace) -> dict[str, Any]:
    """100 candidates in 5 folds: one after the other, and all 500 at once."""
    folds = ridge(5, chosen.seed)
    games = [folds.game(index) for index in range(folds.count)]
    candidates = random(games[0], {"x": (-4.0, 1.0)}, count=100, seed=chosen.seed)
    pairs = []
    for _ in range(chosen.rounds):
        one, apart = timed(lambda: [CrossValidation(optimizer)(game, candidates) for game in games])
        all_, together = timed(lambda: CrossValidation(optimizer, together=len(candidates))(folds, candidates))
        pairs.append((one, all_))
        difference = float((together.fold_losses - torch.stack([a.leader_losses for a in apart], 1)).abs().max())
        if not difference < 1e-8:
            raise SystemExit(f"cross-validation, {solver}: the losses are {difference:.2g} apart")
    ratio = statistics.median(one / all_ for one, all_ in pairs)
    looped, stacked = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"cross-validation, {solver:<17} 500 games: {stacked:8.3f} s, loop {looped:9.3f} s, ratio {ratio:7.1f}")
    return {
        "problem": "cross-validation",
        "way": solver,
        "games": folds.count * len(candidates),
        "loop seconds a game": looped / (folds.count * len(candidates)),
        "stack seconds": stacked,
        "ratio": ratio,
    }


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Processor seconds of a run, and what it returns."""
    began = time.process_time()
    found = run()
    return time.process_time() - began, found


# The games, each of a leader x and a follower y -----------------------------------------------------------------------


def quadratic(count: int, seed: int) -> bl.Games:
    """3 x 5: the follower's optimum is y = H^-1 (B x + c), its Hessian well conditioned."""
    randn = _draws(seed)

    def lead(x: Tensor, y: Tensor) -> Tensor:
        return ((y - 1.0) ** 2).sum() + 0.1 * (x**2).sum()

    def follow(x: Tensor, y: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        return 0.5 * y @ batch["hessian"] @ y - y @ (batch["slope"] @ x + batch["shift"])

    root = randn(count, 5, 5)
    hessian = root @ root.mT / 5 + torch.eye(5, dtype=D)
    batch = {"hessian": hessian, "slope": randn(count, 5, 3) / 2, "shift": randn(count, 5)}
    one = {name: value[0] for name, value in batch.items()}
    game = bl.Game(x=bl.Player(lead, torch.zeros(3, dtype=D)), y=bl.Player(follow, torch.zeros(5, dtype=D), [one]))
    return bl.Games(game, count, init={"x": randn(count, 3)}, data={"y": [batch]})


def ridge(count: int, seed: int) -> bl.Games:
    """A penalty for each of 8 weights, 20 examples to fit and 20 to judge by."""

    def error(inputs: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
        return (inputs @ weights - targets).square().mean()

    randn = _draws(seed)
    truth, inputs = randn(count, 8), randn(count, 40, 8)
    targets = (inputs @ truth[..., None])[..., 0] + randn(count, 40)
    return _regressions(count, 8, 20, error, inputs, targets)


def logistic(count: int, seed: int) -> bl.Games:
    """A penalty for each of 10 weights, 50 examples to fit and 50 to judge by."""

    def error(inputs: Tensor, weights: Tensor, targets: Tensor) -> Tensor:
        # vmap takes torch's fused binary_cross_entropy_with_logits to pieces, and gains less.
        logits = inputs @ weights
        return (softplus(logits) - targets * logits).mean()

    randn = _draws(seed)
    truth, inputs = randn(count, 10), randn(count, 100, 10)
    targets = ((inputs @ truth[..., None])[..., 0] + randn(count, 100) > 0.0).to(D)
    return _regressions(count, 10, 50, error, inputs, targets)


def _regressions(
    count: int,
    features: int,
    fitted: int,
    error: Callable[[Tensor, Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
) -> bl.Games:
    def valid(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        # A weak prior on the penalties, which is all of x that the leader sees in simultaneous play.
        return error(batch[0], y, batch[1]) + 1e-3 * (x + 2.0).square().sum()

    def train(x: Tensor, y: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return error(batch[0], y, batch[1]) + (x.exp() * y.square()).sum()

    to_fit = (inputs[:, :fitted].contiguous(), targets[:, :fitted].contiguous())
    to_judge = (inputs[:, fitted:].contiguous(), targets[:, fitted:].contiguous())
    game = bl.Game(
        x=bl.Player(valid, torch.full((features,), -2.0, dtype=D), [tuple(part[0] for part in to_judge)]),
        y=bl.Player(train, torch.zeros(features, dtype=D), [tuple(part[0] for part in to_fit)]),
    )
    return bl.Games(game, count, data={"x": [to_judge], "y": [to_fit]})


def _draws(seed: int) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=D)


PROBLEMS: dict[str, Make] = {"quadratic 3 x 5": quadratic, "ridge 20 x 8": ridge, "logistic 50 x 10": logistic}

# The ways to play them ------------------------------------------------------------------------------------------------

UNROLLED = bl.Unrolled(partial(SGD, lr=0.1), steps=20)
IMPLICIT = bl.Implicit(partial(SGD, lr=0.1, momentum=0.5), steps=2000, tolerance=1e-3)
LEADER = partial(SGD, lr=0.1)
WAYS: dict[str, Play] = {
    "unrolled 20": lambda game: bl.solve(game, y=UNROLLED, optimizer=LEADER, steps=STEPS),
    "implicit": lambda game: bl.solve(game, y=IMPLICIT, optimizer=LEADER, steps=STEPS),
    "simultaneous": lambda game: bl.solve(game, optimizer=LEADER, steps=20 * STEPS),
}
SOLVERS: dict[str, Any] = {"SGD": partial(SGD, lr=0.15, momentum=0.5), "L-BFGS-B": bl.Scipy("L-BFGS-B")}


if __name__ == "__main__":
    main()

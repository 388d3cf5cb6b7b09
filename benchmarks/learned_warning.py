"""How far a learned slope's warning is right: `python -m benchmarks.learned_warning` prints the counts, in two minutes.

Small games with known hypergradients, slopes learned well and badly. An answer counts as right where its cosine with
the true hypergradient is at least .5, which for one number is its sign.
"""

from __future__ import annotations

import warnings
from collections import Counter
from functools import partial

import torch
from torch import Tensor

import bilevel as bl
from bilevel.testing import Quadratic
from bilevel.testing.laws.calibration import Opposed

ALONG = {
    "one, stiff": Quadratic(curvatures=(1.0, 0.5), coupling=((1.0,), (0.5,)), at=(0.5,), target=(1.0, -1.0)),
    "one, slow": Quadratic(
        curvatures=(0.17, 1.0), coupling=((1.0,), (1.0,)), at=(0.5,), axis=(1.0, 0.5), target=(1.0, -1.0)
    ),
    "three": Quadratic(
        curvatures=(1.0, 0.3, 0.6),
        coupling=((1.0, 0.0, 0.5), (0.5, 1.0, 0.0), (0.0, -0.5, 1.0)),
        at=(0.5, -0.3, 0.2),
        target=(1.0, -1.0, 0.5),
    ),
}
AGAINST = {f"slope {slope}": Opposed(slope) for slope in (0.7, 1.0, 3.0)}


def counted(game: bl.Game, wanted: Tensor) -> Counter[tuple[str, bool]]:
    """How often it was said what, and whether the answer was right."""
    counts: Counter[tuple[str, bool]] = Counter()
    for rate in (1e-3, 3e-3, 1e-2):
        for warmup in (0, 3, 10, 30, 100, 300, 1000):
            response = bl.Hypernetwork(partial(torch.optim.Adam, lr=rate), scale=0.1, warmup=warmup)
            for seed in (0, 1):
                state = response.init(game, seed=seed)
                for _ in range(5):
                    x = game.initial("x").requires_grad_()
                    with warnings.catch_warnings(record=True) as caught:
                        warnings.simplefilter("always")
                        y, state = response(game, {"x": x}, state)
                    (found,) = torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)
                    cosine = float((found * wanted).sum() / (found.norm() * wanted.norm()))
                    told = " ".join(str(entry.message) for entry in caught)
                    said = "nothing" if not told else "not even its sign" if "Do not trust" in told else "not its size"
                    counts[said, cosine >= 0.5] += 1
    return counts


def main() -> None:
    """Print both tables."""
    along: Counter[tuple[str, bool]] = Counter()
    against: Counter[tuple[str, bool]] = Counter()
    for known in ALONG.values():
        along += counted(known.game(), known.hypergradient(known.x0))
    for opposed in AGAINST.values():
        against += counted(opposed.game(), torch.tensor(opposed.hypergradient(), dtype=torch.float64))
    for name, counts in (("along", along), ("against", against)):
        print(name, {f"{said}, {'right' if right else 'wrong'}": n for (said, right), n in sorted(counts.items())})


if __name__ == "__main__":
    main()

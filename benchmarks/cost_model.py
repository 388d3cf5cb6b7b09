"""What a step of the hyperparameters of a large network costs on many GPUs: counted here, computed for there.

    python -m benchmarks.cost_model --measure docs/processes/counts.json     # on 1, 2 and 4 processes: a minute
    python -m benchmarks.cost_model                                          # the tables, from that and other files

Counted, in a small network that is sharded by `fully_shard`, and independent of its size: gradients and products of a
call, and how often all weights are gathered and summed over ranks. Memory in vectors of the weights' size is what
`benchmarks.sharded_memory --tensors` counted. Neither has been seen on GPUs.

Computed: seconds and bytes for networks and machines that are not here, by `benchmarks.cost_formulas`.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import bilevel as bl
from benchmarks.cost_formulas import SIZES, advised, checked, extrapolated
from benchmarks.forks import forked
from benchmarks.head import head
from benchmarks.sharded_memory import EXAMPLES, RESPONSES, fit, judge, sharded

WIDTH = 32


def count(size: int) -> list[dict[str, Any]]:
    """What each response's last call of three took, as one of so many ranks."""
    warnings.simplefilter("ignore")
    batches = [torch.randn(EXAMPLES, 2, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    found = []
    for name, response in RESPONSES.items():
        model = sharded(size, WIDTH)
        weights = sum(p.numel() for p in model.parameters())
        game = bl.DataParallel(timeout=120.0).game(
            bl.Game(
                decay=bl.Player(judge, torch.tensor(-4.0), data=[batches[0]]),
                weights=bl.Player(fit, model, data=[batches[1]]),
            )
        )
        sent = {"gathered": 0, "summed": 0}
        game.ranks.parts = counted(game.ranks.parts, sent, "gathered", lambda one, sizes: sum(sizes))
        game.ranks.total = counted(game.ranks.total, sent, "summed", lambda one: one.numel())
        state = response.init(game)
        for _ in range(3):  # the first is not like those after it
            before, (sent["gathered"], sent["summed"]) = response.report(state), (0, 0)
            x = torch.tensor(-4.0, requires_grad=True)
            answer, state = response(game, {"decay": x}, state)
            batch, _ = game.draw("decay", game.start("decay"))
            game.loss("decay", {"decay": x, "weights": answer}, batch).backward()
            state = response.after_backward(state, answer)
            after = response.report(state)
        found.append(
            {
                "response": name,
                "ranks": size,
                "gradients": after.gradients - before.gradients,
                "products": after.products - before.products,
                **{what: count / weights for what, count in sent.items()},
            }
        )
        game.ranks.leave()
    return found


def counted(
    function: Callable[..., Any], into: dict[str, int], what: str, entries: Callable[..., int]
) -> Callable[..., Any]:
    """The same function, whose entries are counted."""

    def called(*given: Any) -> Any:
        into[what] += entries(*given)
        return function(*given)

    return called


def main() -> None:
    """Count, or print the tables."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--measure", type=Path, help="count anew, and write it to this file")
    options.add_argument("--weights", type=float, default=1e9)
    options.add_argument("--gpus", type=int, nargs="+", default=[8, 64])
    chosen = options.parse_args()
    if chosen.measure:
        rows = [row for size in SIZES for row in forked(partial(count, size), size)[0]]
        chosen.measure.write_text(json.dumps({**head(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    for title, table in (
        ("Memory of a rank, measured and by the formula", checked()),
        (f"{chosen.weights:g} weights, sharded, computed", extrapolated(chosen.weights, chosen.gpus)),
        ("What fits, the quickest first, computed", advised()),
    ):
        print(f"\n{title}")
        for line in table:
            print("  ".join(f"{text:<28}" if index == 0 else f"{text:>14}" for index, text in enumerate(line)))


if __name__ == "__main__":
    main()

"""Whether a run ended with its leaders running away, in numbers that are all finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import median

from bilevel.errors import LeaderNonConvergenceWarning
from bilevel.solving.history import loss_key
from bilevel.solving.progress_left import FEWEST
from bilevel.solving.warning_log import RunWarning

GROWN = 10.0
"""So many times as large the gradients are in the last quarter of a run as in the first, and the players' way as long
as they were from 0. A spiral that grows by less in a run may yet turn out to be a turn."""

RISEN = 1e3
"""So many times its size and spread in the first quarter the loss of a leader has risen by, who minimises it."""


def ran_away(
    leaders: Sequence[str], history: Sequence[Mapping[str, float]], size: float, moved: float
) -> RunWarning | None:
    """A warning where gradients grew from quarter to quarter of a run, and the players left where they were.

    Also where the loss of a leader who plays alone rose out of all proportion: its followers may run away, and not it.
    `size` is the leaders' norm at the start, and `moved` how far from there they ended, all together. Medians of
    quarters, so that the noise of single batches does not count. A run that converges, or circles, has no such growth.
    """
    if len(history) < FEWEST:
        return None
    bounds = [len(history) * quarter // 4 for quarter in range(5)]
    norms = [record["gradient_norm"] for record in history]
    quarters = [median(norms[low:high]) for low, high in pairwise(bounds)]
    rising = all(early < late for early, late in pairwise(quarters))
    if not (rising and quarters[-1] > GROWN * quarters[0] and moved > GROWN * size):
        return _risen(leaders[0], history, bounds) if len(leaders) == 1 else None
    several = len(leaders) > 1
    way_out = (
        "Lower the learning rates by optimizer=, or use a rule of play that converges where plain gradients turn in "
        "circles: dynamics=bilevel.dynamics.Extragradient(...) or Optimistic()."
        if several
        else "Lower the learning rate by optimizer=, or look whether its loss has a minimum."
    )
    text = (
        f"The run ended while {' and '.join(map(repr, leaders))} ran away: in {len(history)} steps the gradients grew "
        f"from {quarters[0]:.3g} to {quarters[-1]:.3g}, the medians of the first and the last quarter, and the "
        f"variables are {moved:.3g} from a start of norm {size:.3g}. They are at no equilibrium, and move on. {way_out}"
    )
    return RunWarning(text, category=LeaderNonConvergenceWarning)


def _risen(leader: str, history: Sequence[Mapping[str, float]], bounds: Sequence[int]) -> RunWarning | None:
    losses = [record[loss_key(leader)] for record in history]
    first, last = losses[: bounds[1]], median(losses[bounds[3] :])
    if not last - median(first) > RISEN * (abs(median(first)) + max(first) - min(first)):
        return None
    text = (
        f"The run ended with the loss of {leader!r} at {last:.3g}, the median of the last quarter of {len(losses)} "
        f"steps; that of the first is {median(first):.3g}. It is to fall: its followers ran away, or its own steps are "
        "too long. Lower the learning rates, or take another response; bilevel.testing.check_hypergradient tells "
        "whether the hypergradient is right."
    )
    return RunWarning(text, category=LeaderNonConvergenceWarning)

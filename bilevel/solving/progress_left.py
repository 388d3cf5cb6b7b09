"""Whether a run ended while its leader had hardly begun."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from bilevel.errors import LeaderNonConvergenceWarning
from bilevel.solving.history import loss_key
from bilevel.solving.warning_log import RunWarning

FEWEST = 20
"""Who asks for fewer steps asks for a look, and not for an end."""


def hardly_begun(leader: str, history: Sequence[Mapping[str, float]]) -> RunWarning | None:
    """A warning where a leader without noise ended as far from an end as it began.

    Its gradient has kept more than half of its norm, and its loss fell in the run's second half by more than half of
    what it fell in the first: nothing has levelled off yet. A run that converges, at whatever rate, fails one of the
    two; one that starts at its end has a loss that does not fall.
    """
    if len(history) < FEWEST:
        return None
    first, middle, last = history[0], history[len(history) // 2], history[-1]
    key = loss_key(leader)
    early, late = first[key] - middle[key], middle[key] - last[key]
    rounding = 1e3 * sys.float_info.epsilon * max(abs(first[key]), abs(last[key]))
    norms = first["gradient_norm"], last["gradient_norm"]
    if not (norms[1] > 0.5 * norms[0] and late > 0.5 * early > rounding):
        return None
    text = (
        f"The run ended while {leader!r} was far from an optimum: after {len(history)} steps its gradient has norm "
        f"{norms[1]:.5g}, {norms[1] / norms[0]:.0%} of that at the start, and its loss was still falling as fast as "
        f"before, from {first[key]:.5g} over {middle[key]:.5g} to {last[key]:.5g}. Give it more steps=, or a larger "
        "learning rate by optimizer=."
    )
    return RunWarning(text, category=LeaderNonConvergenceWarning)

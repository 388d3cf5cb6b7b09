"""higher: differentiates through the steps of a torch.optim optimiser that it is given."""

from __future__ import annotations

import higher
from pytrees import Holder, slope


def innerloop(leader, follower, x, y, *, optimizer, steps):
    """Unrolled: `higher.innerloop_ctx`."""
    net = Holder(y)
    with higher.innerloop_ctx(net, optimizer(list(net.parameters()))) as (patched, inner):
        for _ in range(steps):
            inner.step(follower(x, patched()))
        return slope(leader(x, patched()), x)

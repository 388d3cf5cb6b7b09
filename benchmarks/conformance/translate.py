"""The options of a torch.optim optimiser, for libraries that have optimisers of their own."""

from __future__ import annotations

from typing import Any

import torch

from bilevel.inner.torch_optim import OptimizerFactory

_HOW_NOT_WHAT = {"params", "lr", "foreach", "fused", "capturable", "differentiable"}


def sgd_options(optimizer: OptimizerFactory, *offered: str) -> dict[str, Any]:
    """`lr`, and those of the `offered` options that differ from SGD's defaults.

    Raises `NotImplementedError` for another optimiser than SGD and for an option in use that is not offered.
    """
    parameter = torch.zeros(1, requires_grad=True)
    built = optimizer([parameter])
    if type(built) is not torch.optim.SGD:
        raise NotImplementedError(f"This adapter translates the options of SGD; not those of {type(built).__name__}.")
    plain = torch.optim.SGD([parameter], lr=1.0).param_groups[0]
    (group,) = built.param_groups
    used = {name: value for name, value in group.items() if name not in _HOW_NOT_WHAT and value != plain[name]}
    missing = sorted(used.keys() - set(offered))
    if missing:
        raise NotImplementedError(f"Its gradient descent has no option {', '.join(missing)}.")
    return {"lr": group["lr"], **used}

"""Ways of learning where tasks start, as games, and one of them written by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import CosineAnnealingLR

import bilevel as bl
from bilevel.inner import EntrywiseSGD

Loss = Callable[[Tensor, Tensor], Tensor]
Method = tuple[bl.Tasks, bl.Response]
"""The game, and how its tasks answer."""

OUTER = partial(torch.optim.Adam, lr=3e-3)


def falling(steps: int) -> Callable[[torch.optim.Optimizer], CosineAnnealingLR]:
    """The leader's rate falls to zero over the run."""
    return partial(CosineAnnealingLR, T_max=steps)


def maml(net: nn.Module, loss: Loss, data: Any, *, rate: float, steps: int) -> Method:
    """MAML: every task starts at the leader and takes `steps` of gradient descent (arXiv 1703.03400)."""

    def judge(task: Any, batch: Any) -> Tensor:
        return loss(task(batch[0]), batch[1])

    game = bl.Tasks(meta=bl.Player(judge, net), task=bl.Player(judge, net, start=lambda meta: meta), data=data)
    return game, bl.Unrolled(partial(torch.optim.SGD, lr=rate), steps=steps)


def meta_sgd(net: nn.Module, loss: Loss, data: Any, *, rate: tuple[float, float], steps: int, seed: int = 0) -> Method:
    """Meta-SGD: the leader is also a learning rate for each weight, drawn from a range at first (arXiv 1707.09835)."""
    generator = torch.Generator().manual_seed(seed)
    start = {name: p.detach() for name, p in net.named_parameters()}
    low, high = rate
    rates = {n: low + (high - low) * torch.rand(p.shape, generator=generator).to(p) for n, p in start.items()}

    def judge(task: Any, batch: Any) -> Tensor:
        return loss(task(batch[0]), batch[1])

    def descent(params: Any, meta: Any) -> EntrywiseSGD:
        return EntrywiseSGD(params, meta["rates"])

    game = bl.Tasks(
        meta=bl.Player(judge, {"start": start, "rates": rates}, optimizer_hyper=True),
        task=bl.Player(judge, net, start=lambda meta: meta["start"]),
        data=data,
    )
    return game, bl.Unrolled(descent, steps=steps)


def maml_by_hand(net: nn.Module, loss: Loss, batch: Any, meta: dict[str, Tensor], *, rate: float, steps: int) -> Tensor:
    """The query loss of each task `[tasks]` after its steps, in plain torch, one task after the other."""
    losses = []
    for inputs, targets, query, wanted in zip(*batch["support"], *batch["query"], strict=True):
        here = dict(meta)
        for _ in range(steps):
            own = loss(functional_call(net, here, inputs), targets)
            slopes = torch.autograd.grad(own, list(here.values()), create_graph=torch.is_grad_enabled())
            here = {name: p - rate * slope for (name, p), slope in zip(here.items(), slopes, strict=True)}
        losses.append(loss(functional_call(net, here, query), wanted))
    return torch.stack(losses)

"""Players who are hyperparameters of the inner optimiser: each must have its derivative through a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bilevel.autodiff import transforms_active
from bilevel.game import Follower
from bilevel.inner.optimizer import TorchOptimizer
from bilevel.inner.torch_optim import has_tensor
from bilevel.responses.unrolled.recipe import Recipe
from bilevel.sharding.tensor import noise_like
from bilevel.tree import leaves, map_leaves


def refuse_lost(settings: TorchOptimizer, follower: Follower, start: Sequence[Tensor], steps: int) -> None:
    """Try the optimiser on made-up gradients; raise `TypeError` when a player that it takes does not reach the leaves.

    Raises as well for an optimiser that cannot be differentiated at all, and for functions that name nobody.
    """
    names = follower.game.names
    settings.require_players(names)
    recipe = Recipe.of(settings, follower, start, None, steps)
    tuned = list(dict.fromkeys(settings.players(follower.inputs)))
    if not tuned or transforms_active():
        recipe.stepper(start, None, 0, follower.inputs)
        return
    others = {
        name: map_leaves(lambda leaf: leaf.detach().clone().requires_grad_(), value)
        for name, value in follower.inputs.items()
    }
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        stepper = recipe.stepper(start, None, 0, others)
        y = [leaf.detach().clone() for leaf in start]
        for _ in range(min(steps, 2)):  # momentum shows in the second
            made_up = [noise_like(leaf, generator) for leaf in y]
            y = stepper.step(y, [1e3 * slope for slope in made_up])  # large, so that what clips does
        reached = [leaf.sum() for leaf in y if leaf.requires_grad]
    for name in tuned:
        slopes = (
            torch.autograd.grad(reached, leaves(others[name]), retain_graph=True, allow_unused=True) if reached else ()
        )
        if any(slope is not None for slope in slopes):
            continue
        optimizer = stepper.stepper.optimizer
        options = {n for group in optimizer.param_groups for n, v in group.items() if n != "params" and has_tensor(v)}
        read = ", ".join("learning rate" if option == "lr" else option for option in sorted(options)) or "option"
        raise TypeError(
            f"Unrolled: {type(optimizer).__name__} reads its {read} as a plain number, so that {name!r} would get no "
            "derivative. In a factory of your own use the tensor itself, without float() or .item(); or use SGD, Adam "
            "or another optimiser."
        )

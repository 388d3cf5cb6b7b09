"""A LightningModule as `bilevel.tune` takes a model: its training step is the loss, its optimiser the optimiser."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.game.modules import CallableVariables
from bilevel.inner.torch_optim import OptimizerFactory
from bilevel.integrations.settings import factory_like


def loss(weights: CallableVariables, batch: Any) -> Tensor:
    """What the module's `training_step(batch, 0)` returns, or its "loss", run with these weights.

    As the validation loss it runs the same step in evaluation mode: a `validation_step` logs, and returns nothing. What
    the step logs goes nowhere, for there is no trainer; the run's own loggers are callbacks of `tune`.

    Raises:
        TypeError: For a step that returns no loss, as with manual optimisation.
    """
    return weights.with_forwards({"": _step})(batch)  # type: ignore[no-any-return]


def optimizer(module: nn.Module) -> OptimizerFactory:
    """The optimiser that the module's `configure_optimizers()` returns, for `tune(optimizer=)`.

    Raises:
        ValueError: For several optimisers or groups of parameters, and for a scheduler, which would be lost: give both
            to `tune` by hand then.
    """
    configured: Any = module.configure_optimizers()  # type: ignore[operator]
    if isinstance(configured, Mapping):
        configured = (configured["optimizer"], configured.get("lr_scheduler"))
    elif isinstance(configured, torch.optim.Optimizer):
        configured = (configured, None)
    made, scheduler = configured if isinstance(configured, tuple) else (configured, None)
    made = made[0] if isinstance(made, list) and len(made) == 1 else made
    if scheduler or not isinstance(made, torch.optim.Optimizer):
        raise ValueError(
            f"{type(module).__name__}.configure_optimizers() returns {'a scheduler' if scheduler else repr(made)}; "
            "expected one optimiser. Give tune an optimizer= of your own, and scheduler= beside it."
        )
    return factory_like(f"{type(module).__name__}.configure_optimizers()", made)


def _step(module: nn.Module, batch: Any) -> Tensor:
    """The training step; inside it the module's forward is its own again."""
    own = vars(module)
    instead = own.pop("forward")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*self\.log\(\)` but the `self\.trainer`")
            found: Any = module.training_step(batch, 0)  # type: ignore[operator]
    finally:
        own["forward"] = instead
    found = found["loss"] if isinstance(found, Mapping) and "loss" in found else found
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{type(module).__name__}.training_step returned a {type(found).__name__}; expected a loss, or a dict with "
            'one under "loss". With manual optimisation write the loss as a function of (weights, batch).'
        )
    return found

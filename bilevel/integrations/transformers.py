"""A Hugging Face Trainer's model, data, optimiser and schedule, as `bilevel.tune` takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bilevel.game.modules import CallableVariables
from bilevel.inner.torch_optim import OptimizerFactory, SchedulerFactory
from bilevel.integrations.settings import made_by


def loss(weights: CallableVariables, batch: Mapping[str, Any]) -> Tensor:
    """The loss that the model itself computes, `model(**batch).loss`, run with these weights.

    Raises:
        TypeError: For a batch without labels, of which a model makes no loss.
    """
    found = weights(**batch).loss
    if not isinstance(found, Tensor):
        raise TypeError(
            f"The model returned no loss for a batch of {sorted(batch)}; expected labels in it. Write the loss as a "
            "function of (weights, batch)."
        )
    return found


def data(trainer: Any) -> tuple[Any, Any]:
    """The trainer's training and evaluation data: functions that make a loader, in plain dicts, for each pass.

    They have its datasets, collators and batch sizes; the training data is shuffled anew in each pass.

    Raises:
        ValueError: For a trainer without `eval_dataset`, by which the hyperparameters are tuned.
    """
    if trainer.eval_dataset is None:
        raise ValueError("The trainer has no eval_dataset; expected one: the hyperparameters are tuned by its loss.")
    settings = trainer.args
    loaders = (trainer.get_train_dataloader(), trainer.get_eval_dataloader())
    sizes = (settings.train_batch_size, settings.eval_batch_size)
    return tuple(
        DataLoader(
            loader.dataset,
            batch_size=size,
            shuffle=training,
            drop_last=training and settings.dataloader_drop_last,
            collate_fn=_Plain(loader.collate_fn),
        )
        for loader, size, training in zip(loaders, sizes, (True, False), strict=True)
    )  # type: ignore[return-value]


def optimizer(trainer: Any) -> OptimizerFactory:
    """The optimiser that the trainer's arguments name, with their learning rate.

    Raises:
        ValueError: For a `weight_decay` above 0, which the trainer gives to some of the parameters alone: declare
            `bilevel.hyper.WeightDecay()`, which tunes it, or give tune an optimizer= of your own.
    """
    settings = trainer.args
    if settings.weight_decay > 0.0:
        raise ValueError(
            f"TrainingArguments(weight_decay={settings.weight_decay}); expected 0: the trainer gives it to some of the "
            "parameters alone. Tune it by bilevel.hyper.WeightDecay(), or give tune an optimizer= of your own."
        )
    kind, options = type(trainer).get_optimizer_cls_and_kwargs(settings, trainer.model)
    return made_by(kind, {**options, "weight_decay": 0.0})


def scheduler(trainer: Any, steps: int) -> SchedulerFactory:
    """The schedule that the trainer's arguments name, over so many training steps."""
    from transformers import get_scheduler  # noqa: PLC0415 - an extra

    settings = trainer.args
    return partial(_scheduled, get_scheduler, settings.lr_scheduler_type, settings.get_warmup_steps(steps), steps)


def _scheduled(
    make: Callable[..., Any], name: str, warmup: int, steps: int, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler:
    return make(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)  # type: ignore[no-any-return]


class _Plain:
    """A collator whose batches are plain dicts, as losses and resumed runs take them."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, examples: Any) -> dict[str, Any]:
        """The batch of these examples."""
        return dict(self.collate(examples))

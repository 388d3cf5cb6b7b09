"""A model, two losses, two loaders and what is to be tuned, in one training run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bilevel.errors import CheckStopped, ShortHorizonWarning
from bilevel.game.passes import Source
from bilevel.hyper import Tuning
from bilevel.hyper.tuning import Hyper
from bilevel.inner.torch_optim import OptimizerFactory, SchedulerFactory, require_factory
from bilevel.responses import Response
from bilevel.solving import Solution, solve
from bilevel.solving.checkpoint import load, save
from bilevel.solving.history import Record
from bilevel.tuning.retraining import checked, require_rate
from bilevel.tuning.rule import Plan, plan, share
from bilevel.tuning.tuned import Tuned
from bilevel.tuning.values import numbers

Callback = Callable[[int, Record, Mapping[str, Any]], object]


def tune(
    model: nn.Module,
    train_loss: Callable[..., Tensor],
    valid_loss: Callable[..., Tensor],
    train_data: Source,
    valid_data: Source,
    *,
    hyper: Hyper,
    optimizer: OptimizerFactory,
    epochs: int | None = None,
    steps: int | None = None,
    scheduler: SchedulerFactory | None = None,
    clip_norm: float | None = None,
    response: Response | None = None,
    every: int = 5,
    warmup: float = 0.1,
    check: float = 0.5,
    leader: OptimizerFactory | None = None,
    callbacks: Sequence[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 10,
    resume: bool | None = None,
    accept_changes: bool = False,
    progress: bool = False,
    seed: int = 0,
) -> Tuned:
    r"""Train a model, and tune its hyperparameters by hypergradients of the validation loss in the same run.

    The model is trained with `optimizer` as in a loop of one's own. From a tenth of the run on, after every few of
    its steps, the hyperparameters take one, along the gradient of the validation loss through how the trained weights
    answer to them. By default the answer is learned beside the weights, each row of each layer growing or shrinking
    (`Hypernetwork(network=RowScaled())`, a self-tuning network): a training step costs about one gradient more than
    without tuning, and what it learns is not bound to a short horizon, as a few unrolled steps are. For more than 200
    numbers, such as a decay for each weight, it is `Unrolled` through the steps between two of the hyperparameters'.

    Hyperparameters move in the free coordinates of their ranges. What is found suits *this* run, in which they changed
    over time; for a fresh training take `tuned.advised`, by the check that follows the run, or `retrain(tuned)`.

    Args:
        model: Any `nn.Module`; it is copied, and left as it is.
        train_loss: `train_loss(weights, batch)` or, with parameters named after hyperparameters, `train_loss(weights,
            decay, batch)`; `weights(images)` runs the model, in training mode.
        valid_loss: Likewise; the model runs in evaluation mode.
        train_data: Batches: a `DataLoader`, a list, or any re-iterable.
        valid_data: Likewise.
        hyper: Ranges by name, `dict(decay=bilevel.Log(1e-6, 1e-1))`, for parameters of the loss; or declarations that
            need none, `[bilevel.hyper.WeightDecay(), bilevel.hyper.Dropout()]`; or both in one mapping.
        optimizer: From a list of tensors to the model's torch.optim optimiser.
        epochs: Passes over the training data, if it has a length.
        steps: Or the number of training steps. Either is needed.
        scheduler: From that optimiser to a torch scheduler, stepped with it.
        clip_norm: Clips the norm of the model's gradient in each step, as `clip_grad_norm_` does in a loop.
        response: How the trained weights answer; default: as above, which `tuned.plan` tells.
        every: Training steps for each of the hyperparameters.
        warmup: The share of the training steps before the first of these. Weights that have not settled yet say of
            whatever regularises that there should be less of it. Only the learned answer has it: `Unrolled`, for more
            than 200 numbers, begins at once, and `tuned.plan` says so.
        check: The length of the fresh trainings that follow the run, in its steps: one at the values found, one at the
            start's and, where all hyperparameters are declared, one with nothing tuned. They begin at the given model's
            weights; a shorter one has a rate that is as many times larger. `tuned.retrained` has their losses, and
            a `ShortHorizonWarning` says where the values found are not the best. 0.5 costs half a training for each,
            at most one and a half in all, and decides nearly as whole ones do, 1. 0 or False: none. It takes the whole
            of the validation data: of those without a length one pass is read before any training.
        leader: From tensors to the hyperparameters' optimiser; default: Adam in free coordinates, with a rate that
            falls from 0.1 to 0, so that they come to rest.
        callbacks: Called as `callback(step, record, variables)`; loggers, `EarlyStopping`.
        checkpoint: A file to write, and to go on from bit for bit.
        checkpoint_every: So many of the hyperparameters' steps.
        resume: Go on from the checkpoint: None where there is one; True, and it must be there; False begins again.
        accept_changes: Go on although losses or settings are others than the checkpoint's, with the present ones.
        progress: Show a bar.
        seed: Of data that is shuffled by the library and of the learned answer; dropout's is torch's own.

    Raises:
        TypeError, ValueError: Before any work, for what cannot be tuned, trained or iterated.
        CheckStopped: At Ctrl-C in the check, a `KeyboardInterrupt` with the run as its `tuned`. Where a fresh training
            fails, a `ShortHorizonWarning` and `Tuned.unchecked` tell how, and the run is returned.

    Source: MacKay et al. 2019 (arXiv 1903.03088), around the present value as in arXiv 2010.13514.

    Examples:
        >>> import torch, bilevel as bl
        >>> inputs = torch.randn(40, 3)
        >>> data = [(inputs[:20], inputs[:20].sum(1))], [(inputs[20:], inputs[20:].sum(1))]
        >>> def valid(weights, batch): return (weights(batch[0]).squeeze(1) - batch[1]).square().mean()
        >>> def train(weights, decay, batch): return valid(weights, batch) + bl.penalty(weights, decay)
        >>> adam = partial(torch.optim.Adam, lr=1e-2)
        >>> hyper = dict(decay=bl.Log(1e-6, 1.0))
        >>> tuned = tune(nn.Linear(3, 1), train, valid, *data, hyper=hyper, optimizer=adam, steps=20)
        >>> tuned.hyper["decay"].shape
        torch.Size([])
    """
    require_factory("tune: optimizer", optimizer)
    check = 0.0 if check is False else check
    share("check", check, whole=True)
    tuning = Tuning(model, train_loss, valid_loss, train_data, valid_data, hyper=hyper)
    chosen = plan(
        optimizer,
        scheduler,
        response,
        leader,
        every,
        _steps(epochs, steps, train_data),
        count=tuning.count,
        clip_norm=clip_norm,
        warmup=warmup,
    )
    game = tuning.game()
    after = None if checkpoint is None or not check else Path(f"{checkpoint}.check")
    if check:
        game.require_end(tuning.leader, "tune(check=...)", ", or pass check=0", read=True)
        if check < 1.0:
            require_rate(optimizer, model)
    if after is not None and isinstance(callbacks, Sequence):
        callbacks = [partial(_begun, after, model), *callbacks]
    # The start of a fresh run: a resumed one does not begin there.
    start = game.initial(tuning.leader)
    responses: Any = {tuning.follower: chosen.response}
    solution: Solution = solve(
        game,
        optimizer=chosen.leader,
        scheduler=chosen.leader_scheduler,
        steps=chosen.leader_steps,
        callbacks=callbacks,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        resume=resume,
        accept_changes=accept_changes,
        progress=progress,
        seed=seed,
        record=partial(_record, tuning.leader),
        **responses,
    )
    trained = copy.deepcopy(model)
    solution.load_into(trained, tuning.follower)
    found = solution.variables[tuning.leader]
    tuned = Tuned(trained, found, start, solution, chosen, tuning, optimizer, scheduler, clip_norm)
    if not check:
        return tuned
    # Of the learned answer alone: others do without it, or have one of their own.
    later = "; warmup=0.5 with a slower leader= may find better values" if response is None and chosen.warmup else ""
    return _checked(tuned, model, check, seed, after, later if warmup < 0.5 else "", progress=progress)


def _begun(after: Path, model: nn.Module, step: int, record: Record, variables: Mapping[str, Any]) -> None:
    """Keep the weights that the run begins with, which the process that goes on with it may not have."""
    if step == 1:
        save(after, {"initial": model.state_dict()})


def _checked(
    tuned: Tuned, model: nn.Module, share: float, seed: int, after: Path | None, hint: str, *, progress: bool
) -> Tuned:
    """The same with fresh trainings at its values, of which a warning tells where these are bad."""
    initial = copy.deepcopy(model)
    if after is not None and after.exists():
        initial.load_state_dict(load(after).get("initial", {}) or model.state_dict())
    unknown = "so that nothing tells what the values found are worth in a fresh training"
    try:
        seen = checked(tuned, initial, share, seed, after, progress=progress)
    except KeyboardInterrupt as pressed:
        raise CheckStopped(replace(tuned, unchecked=f"The check was stopped, {unknown}.")) from pressed
    except Exception as error:  # the run is good, and may have taken days
        told = f"The check failed, {unknown}: {type(error).__name__}: {error}"
        warnings.warn(ShortHorizonWarning(f"tune: {told}"), stacklevel=3)
        return replace(tuned, unchecked=told)
    if not seen.decided:
        way_out = "For one take check=1.0, whole trainings at the optimiser's own rate, or a larger share."
        warnings.warn(ShortHorizonWarning(f"tune: {seen.told()} {way_out}"), stacklevel=3)
    elif seen.best != "found":
        message = (
            f"tune: {seen.told()} What pays only after many steps looks in a run like what slows it: for a fresh "
            f"training take tuned.advised. retrain(tuned, seeds=3) compares whole trainings{hint}."
        )
        warnings.warn(ShortHorizonWarning(message), stacklevel=3)
    return replace(tuned, retrained=seen)


def _record(leader: str, variables: Mapping[str, Any]) -> dict[str, float]:
    return numbers(leader, variables[leader])


def _steps(epochs: int | None, steps: int | None, data: Any) -> int:
    """Training steps in all."""
    if (epochs is None) == (steps is None):
        raise ValueError(f"tune: epochs={epochs}, steps={steps}; expected one of the two.")
    given = epochs if steps is None else steps
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise ValueError(f"tune: {'epochs' if steps is None else 'steps'}={given!r}; expected a whole number from 1.")
    if steps is not None:
        return steps
    if isinstance(data, Sized):
        try:
            return given * len(data)
        except TypeError:  # a DataLoader over data without a length
            pass
    raise ValueError("tune: the training data have no length, so that epochs cannot be counted. Give steps= instead.")


__all__ = ["Plan", "tune"]

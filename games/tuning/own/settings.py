"""What the options of a run say: the hyperparameters, the loss and the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

import bilevel as bl
from bilevel.hyper import Declaration, dropout_layers
from games.experiments.console import UsageError
from games.tuning.own import named

HYPERS: Final[dict[str, type[Any]]] = {
    "decay": bl.hyper.WeightDecay,
    "l1": bl.hyper.L1Penalty,
    "dropout": bl.hyper.Dropout,
    "smoothing": bl.hyper.LabelSmoothing,
    "focusing": bl.hyper.Focusing,
    "temperature": bl.hyper.Temperature,
    "mixup": bl.hyper.Mixup,
    "cutout": bl.hyper.Cutout,
    "noise": bl.hyper.Noise,
    "shift": bl.hyper.Shift,
    "rotation": bl.hyper.Rotation,
    "zoom": bl.hyper.Zoom,
    "brightness": bl.hyper.Brightness,
}
_OPTIMIZERS: Final[dict[str, Any]] = {
    name.lower(): cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer) and name not in ("Optimizer", "LBFGS")
}


def device(name: str) -> torch.device:
    """Where the model is trained; refuses what this machine, or this build of PyTorch, does not have."""
    try:
        found = torch.device(name)
        torch.zeros(1, device=found).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        has = [kind for kind in ("cuda", "mps", "xpu") if getattr(torch, kind).is_available()]
        raise UsageError(
            f"--device {name} cannot be used; here are {', '.join(['cpu', *has])}. (PyTorch says: "
            f"{str(error).splitlines()[0][:120]})"
        ) from error
    return found


def placed(batch: Any, model: nn.Module) -> Any:
    """A batch where the model is."""
    like = next(model.parameters(), None)
    return batch if like is None else tree_map_only(Tensor, lambda tensor: tensor.to(like.device), batch)


def hyper(given: Sequence[str] | None, model: nn.Module, cross_entropy: bool) -> dict[str, Declaration]:
    """The declarations by name, of `decay`, `decay:layer`, `dropout=0.3` and the like.

    Without any: decay, dropout where the model has dropout layers, smoothing where the loss is cross entropy.
    """
    if not given:
        given = ["decay", *["dropout"] * bool(dropout_layers(model)), *["smoothing"] * cross_entropy]
    found: dict[str, Declaration] = {}
    for text in given:
        rest, equals, start = text.partition("=")
        name, colon, per = rest.partition(":")
        if name not in HYPERS:
            raise UsageError(f"--hyper {text}: there is no {name!r}; expected one of {', '.join(HYPERS)}.")
        if name in found:
            raise UsageError(f"--hyper {text}: {name!r} is there already.")
        try:
            declared = HYPERS[name](per=per) if colon else HYPERS[name]()
            found[name] = replace(declared, within=replace(declared.within, start=float(start))) if equals else declared
        except TypeError as error:
            raise UsageError(f"--hyper {text}: {name} is one number, and takes no :{per}.") from error
        except ValueError as error:
            raise UsageError(f"--hyper {text}: {error}") from error
    return found


def optimizer(name: str, rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    """A factory: one of torch.optim by name, or a user's function of the parameters."""
    if named.is_named(name):
        return named.function(name, "--optimizer")
    if name.lower() not in _OPTIMIZERS:
        known = ", ".join(sorted(cls.__name__ for cls in _OPTIMIZERS.values()))
        raise UsageError(f"--optimizer {name}: expected one of {known}, or path.py:function of the parameters.")
    if not rate > 0.0:
        raise UsageError(f"--lr {rate}: expected a rate above 0.")
    options = {"momentum": 0.9} if name.lower() == "sgd" else {}
    return partial(_OPTIMIZERS[name.lower()], lr=rate, **options)


def loss(name: str | None, first: Any) -> tuple[Callable[..., Tensor], bool]:
    """The loss of a model and a batch, and whether it is cross entropy; by the first batch where nothing is said."""
    if name is not None and named.is_named(name):
        return named.function(name, "--loss"), False
    if not isinstance(first, tuple | list) or len(first) != 2 or not all(isinstance(part, Tensor) for part in first):
        raise UsageError(
            f"A batch of the data is {form(first)}; expected two tensors, inputs and labels. For other batches give "
            "--loss path.py:function, called with the model and a batch."
        )
    if name is None:
        name = "mse" if first[1].is_floating_point() else "cross_entropy"
    if name not in ("mse", "cross_entropy"):
        raise UsageError(f"--loss {name}: expected cross_entropy, mse, or path.py:function of the model and a batch.")
    if name == "cross_entropy" and first[1].is_floating_point() and first[1].ndim == 1:
        raise UsageError(
            "--loss cross_entropy: the labels are floating-point numbers; expected classes, whole numbers."
        )
    return (_mse, False) if name == "mse" else (_cross_entropy, True)


def _cross_entropy(weights: Any, batch: Any) -> Tensor:
    inputs, labels = batch
    return functional.cross_entropy(weights(inputs), labels)


def _mse(weights: Any, batch: Any) -> Tensor:
    inputs, targets = batch
    outputs = weights(inputs)
    if outputs.shape == (*targets.shape, 1):
        outputs = outputs.squeeze(-1)
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs have shape {tuple(outputs.shape)}, and targets {tuple(targets.shape)}")
    return functional.mse_loss(outputs, targets.to(outputs.dtype))


def form(batch: Any) -> str:
    """A batch in words: the shapes of its tensors."""
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)} of {str(batch.dtype).removeprefix('torch.')}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {', '.join(form(part) for part in batch[:4]) or 'nothing'}"
    return f"a {type(batch).__name__}"

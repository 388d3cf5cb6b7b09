"""Cross entropy with strengths that are tensors, and how a loss that calls torch's is given them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function_variadic

from bilevel.hyper.checks import NONNEGATIVE, POSITIVE, SHARE, Strength, strength_of


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    smoothing: Strength | None = None,
    focusing: Strength | None = None,
    class_weights: Tensor | None = None,
    temperature: Strength | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    r"""`torch.nn.functional.cross_entropy`, differentiable in everything that shapes it.

    With \(p = \text{softmax}(z / T)\) and the targets \(q = (1 - s)\, \text{onehot}(y) + s / K\), an example's loss is

    \[ -\sum_k w_k\, q_k\, (1 - p_k)^\gamma \log p_k \]

    The mean is over examples; with class weights and labels it is weighted by \(w_y\), as torch's is. Where nothing
    is given it is torch's own number.

    Args:
        logits: [batch, classes], or [batch, classes, ...] with labels [batch, ...]; [classes] for one example.
        labels: Class indices, or probabilities in the shape of the logits.
        smoothing: Label smoothing s, 0 <= s <= 1.
        focusing: The focal loss's exponent gamma, at least 0.
        class_weights: [classes], at least 0.
        temperature: T, above 0.
        ignore_index: A label that counts for nothing.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError, TypeError: For strengths out of their range or of another shape.

    Costs a few tensors as large as the logits. Second derivatives exist.

    Source: Szegedy et al. 2016, arXiv 1512.00567 (smoothing); Lin et al. 2017, arXiv 1708.02002 (focal loss).

    Examples:
        >>> logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
        >>> cross_entropy(logits, labels, smoothing=0.2)
        tensor(0.7701)
    """
    if has_torch_function_variadic(logits, labels):
        return handle_torch_function(
            cross_entropy, (logits, labels), logits, labels, smoothing=smoothing, focusing=focusing,
            class_weights=class_weights, temperature=temperature, ignore_index=ignore_index, reduction=reduction,
        )  # fmt: skip
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"cross_entropy: reduction={reduction!r}; expected 'mean', 'sum' or 'none'.")
    dim = 0 if logits.ndim == 1 else 1
    classes = logits.shape[dim]
    by_class = [classes] + [1] * (logits.ndim - dim - 1)
    if temperature is not None:
        logits = logits / strength_of(temperature, "cross_entropy: the temperature", logits, POSITIVE)
    logp = logits.log_softmax(dim)
    indices = not labels.is_floating_point()
    if indices:
        counted = labels != ignore_index
        shown = torch.where(counted, labels, 0).unsqueeze(dim)
        places = torch.arange(classes, device=logits.device).reshape(by_class)
        q = torch.where(shown == places, 1.0, 0.0).to(logits.dtype)
    else:
        q = labels
    true = q
    if smoothing is not None:
        s = strength_of(smoothing, "cross_entropy: the smoothing", logits, SHARE)
        q = (1.0 - s) * q + s / classes
    if class_weights is not None:
        w = strength_of(class_weights, "cross_entropy: class_weights", logits, NONNEGATIVE, shape=[classes])
        w = w.expand(classes).reshape(by_class)
        q, true = w * q, w * true
    if focusing is not None:
        gamma = strength_of(focusing, "cross_entropy: focusing", logits, NONNEGATIVE)
        # As an exponential: 0 ** gamma has no derivative in gamma, and 1 - p is 0 where rounding makes p 1.
        least = torch.finfo(logits.dtype).eps
        rest = (-torch.expm1(logp)).clamp(min=least)
        q = q * (gamma * rest.log()).exp()
    # A class that is ruled out, by a logit of minus infinity, costs nothing where no target is there.
    loss = -(q * torch.where((q == 0.0) & logp.isinf(), 0.0, logp)).sum(dim)
    if indices:
        loss = torch.where(counted, loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if not indices:
        return loss.sum() / max(1, loss.numel())
    return loss.sum() / torch.where(counted, true.sum(dim), 0.0).sum()


class CriterionMode(TorchFunctionMode):
    """While it is entered, every call of `torch.nn.functional.cross_entropy` has the given options as well.

    `nn.CrossEntropyLoss` makes that call too. Modes nest: each adds its own options to those of the inner ones.
    """

    def __init__(self, who: str, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.who, self.options, self.calls = who, dict(options), 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Torch's hook: what is called in place of func."""
        if func is not functional.cross_entropy and func is not cross_entropy:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self.changed(func, args, kwargs or {})

    def changed(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """The criterion with more options."""
        if func is functional.cross_entropy:
            args, given = _translated(args, kwargs)
        else:
            given = dict(kwargs)
        for option, value in self.options.items():
            if given.get(option) is not None:
                raise ValueError(
                    f"{self.who} sets the {option.replace('_', ' ')} of the loss's cross entropy, which has one "
                    "already. Leave one of the two out."
                )
            given[option] = value
        return cross_entropy(*args, **given)

    def require_called(self) -> None:
        """Raise `ValueError` when the criterion was not called: its strength would do nothing."""
        if not self.calls:
            raise ValueError(
                f"{self.who} changes the cross entropy that the training loss calls, and the loss called none: it "
                "looks for torch.nn.functional.cross_entropy or nn.CrossEntropyLoss. Call one of them in place of "
                "nll_loss and the like, or use bilevel.hyper.cross_entropy(logits, labels, smoothing=...) with a "
                "parameter of the loss in place of the declaration."
            )


class MixedCriterion(CriterionMode):
    """While it is entered, cross entropies are taken of two labels each, as mixup asks: a share of the second."""

    def __init__(self, who: str, order: Tensor, share: Tensor) -> None:
        super().__init__(who, {})
        self.order, self.share = order, share

    def changed(self, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
        """Both labels' losses, mixed."""
        bound = inspect.signature(func).bind(*args, **kwargs)
        second = inspect.signature(func).bind(*args, **kwargs)
        name = "target" if func is functional.cross_entropy else "labels"
        second.arguments[name] = bound.arguments[name][self.order]
        one, two = func(*bound.args, **bound.kwargs), func(*second.args, **second.kwargs)
        return (1.0 - self.share) * one + self.share * two


def _translated(args: Any, kwargs: Mapping[str, Any]) -> tuple[tuple[Any, Any], dict[str, Any]]:
    """A call of torch's cross entropy as one of ours."""
    bound = inspect.signature(functional.cross_entropy).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if given["size_average"] is not None or given["reduce"] is not None:
        raise ValueError("The loss's cross entropy uses size_average= or reduce=, which torch dropped; say reduction=.")
    options = {
        "class_weights": given["weight"],
        "ignore_index": given["ignore_index"],
        "reduction": given["reduction"],
        "smoothing": given["label_smoothing"] or None,
    }
    return (given["input"], given["target"]), options

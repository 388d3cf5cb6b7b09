"""Leaves that a computation makes itself, and that are nobody's capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class NewLeafTracker(TorchFunctionMode):
    """Knows the leaves that came to require grad while it is entered: the computation's own, and nobody's capture."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves: list[Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        before = first is not None and first.requires_grad
        result = func(*args, **(kwargs or {}))
        made = first if result is None else result  # setting the attribute returns nothing
        if isinstance(made, Tensor) and made.requires_grad and made.is_leaf and not (made is first and before):
            self.leaves.append(made)
        return result

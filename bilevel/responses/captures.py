"""Tensors that a computation uses and was not handed: found in its graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class BornInside(TorchFunctionMode):
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


def captured_leaves(outputs: Iterable[Tensor], passed: Sequence[Tensor]) -> list[Tensor]:
    """The leaves that require grad and reach `outputs` otherwise than through `passed`, where the walk stops."""
    own = {id(tensor) for tensor in passed}
    borders = {tensor.grad_fn for tensor in passed if tensor.grad_fn is not None}
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen, found = {*pending, *borders}, []
    while pending:
        node = pending.pop()
        leaf = getattr(node, "variable", None)  # only AccumulateGrad nodes have it: the leaves of the graph
        if leaf is not None and id(leaf) not in own:
            found.append(leaf)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return found

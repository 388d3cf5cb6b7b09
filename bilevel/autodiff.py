"""The few things that PyTorch's two differentiation systems do differently.

Outside `torch.func`, a retained graph and `torch.autograd.grad` make the cheapest products, and user code with
in-place buffers or custom autograd functions works. Inside a `torch.func` transform only `torch.func` nests. Every
derivative that the library takes goes through `pullback` and `gradient`, which pick the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

EVERY = slice(None)


class Pullback(Protocol):
    """From `v` to `v^T d function / d primal`, for each primal or for some alone, which can cost less."""

    def __call__(self, vector: Tensor, /, part: slice = EVERY) -> tuple[Tensor, ...]:
        """The products, shaped like the primals."""


def transforms_active() -> bool:
    """Whether a `torch.func` transform (grad, vmap, jacrev, ...) is running."""
    # Private, but it is the test that autograd.Function.apply itself makes; there is no public one.
    return bool(torch._C._are_functorch_transforms_active())


@contextmanager
def transforms_left() -> Iterator[None]:
    """Work beside the running `torch.func` transforms, for what is no function of their inputs."""
    with torch._C._DisableFuncTorch():
        yield


def pullback(function: Callable[..., Tensor], *primals: Tensor) -> tuple[Tensor, Pullback]:
    r"""The value of a function, and the map from `v` to `v^T d function / d primal` for each primal.

    The graph is built once and kept, so that each product costs one backward pass. The products can be
    differentiated themselves when they are taken with grad enabled.
    """
    if transforms_active():
        value, pulled, *_ = torch.func.vjp(function, *primals)

        def pulled_back(vector: Tensor, /, part: slice = EVERY) -> tuple[Tensor, ...]:
            return pulled(vector)[part]  # type: ignore[no-any-return]

        return value, pulled_back

    # Aliases: partial derivatives stop here even when one primal depends on another through its own graph.
    with torch.enable_grad():
        aliases = [p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in primals]
        value = function(*aliases)
        # The place in the graph and not the value, which would be held as long as the products are.
        outcome = get_gradient_edge(value) if value.requires_grad else value

    def products(vector: Tensor, /, part: slice = EVERY) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            outcome,
            aliases[part],
            vector,
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            materialize_grads=True,
        )

    return value, products


def gradient(function: Callable[..., Tensor], *points: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Value and gradients of a scalar function of tensors; differentiable again when grad is enabled."""
    if transforms_active():
        slopes, value = torch.func.grad_and_value(function, argnums=tuple(range(len(points))))(*points)
        return value, slopes
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in points]
        value = function(*aliases)
        slopes = torch.autograd.grad(value, aliases, create_graph=again, materialize_grads=True)
    return (value if again else value.detach()), slopes


def jacobian(function: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Tensor, Tensor]:
    """A function's value `[m]` at a `point: [n]`, and its Jacobian `[m, n]`; plain numbers, outside any graph.

    All rows come by one batched backward pass, or one by one where an operation has no batching rule.
    """
    with torch.enable_grad():
        alias = point.detach().requires_grad_()
        value = function(alias)
        if not value.requires_grad or not value.numel():
            return value.detach(), point.new_zeros(value.numel(), point.numel())
        rows = torch.eye(value.numel(), dtype=value.dtype, device=value.device)
        once = {"retain_graph": True, "materialize_grads": True}
        try:
            (matrix,) = torch.autograd.grad(value, alias, rows, is_grads_batched=True, **once)
        except RuntimeError:
            matrix = torch.stack([torch.autograd.grad(value, alias, row, **once)[0] for row in rows])
    return value.detach(), matrix.detach()


class _Box:
    """Carries a number out of an autograd function; not a pytree, so that vmap hands over this very object."""

    value: float


class _Concrete(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, box: _Box) -> Tensor:
        box.value = float(tensor.max())
        return tensor.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, tensor: Tensor, box: _Box) -> tuple[Tensor, None]:
        return _Concrete.apply(tensor, box), None  # type: ignore[no-untyped-call]


def concrete(tensor: Tensor) -> float:
    """The number in a 0-d tensor, also under `torch.func`: under vmap the largest over the batch.

    A float. `Tensor.item()` and `if` raise inside vmap, and a solver that cannot see its residual can neither stop nor
    warn. Compare by a difference, `concrete(norm - tolerance) <= 0.0`: two largest numbers may be of two systems.
    """
    if not transforms_active():
        return float(tensor.detach())  # the same without a transform, and ten times cheaper
    box = _Box()
    _Concrete.apply(tensor.detach(), box)  # type: ignore[no-untyped-call]
    return box.value


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


def tracked_at_any_level(tensor: Tensor) -> bool:
    """Whether a tensor requires grad under plain autograd or under any of the running `torch.func` levels."""
    functorch = torch._C._functorch
    while not tensor.requires_grad:
        if not functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return True

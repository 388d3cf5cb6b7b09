"""The few things that PyTorch's two differentiation systems do differently.

Outside `torch.func`, a retained graph and `torch.autograd.grad` make the cheapest products, and user code with
in-place buffers or custom autograd functions works. Inside a `torch.func` transform only `torch.func` nests. Every
derivative that the library takes goes through `pullback` and `gradient`, which pick the right one.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch._functorch.vmap import lazy_load_decompositions  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from bilevel.errors import BilevelError, SecondDerivativeError
from bilevel.second_order import UNDIFFERENTIABLE, differentiated_thrice, differentiated_twice, explanation

Kind = TypeVar("Kind")
Function = TypeVar("Function", bound=torch.autograd.Function)

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


def in_all_rows(
    function: Callable[..., tuple[Tensor, ...]], count: int, tensors: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """`function(*rows)` for each of `count` rows of all `tensors: [count, ...]`, by one pass; random numbers differ.

    It is `torch.func.vmap(function, randomness="different")(*tensors)` by the calls that this makes itself, without
    its walks over nests and its checks: on small networks they took as long as what is computed.
    """
    functorch = torch._C._functorch
    if torch.compiler.is_compiling() or any(tensor.shape[:1] != (count,) for tensor in tensors):
        return torch.func.vmap(function, randomness="different")(*tensors)
    lazy_load_decompositions()
    level = functorch._vmap_increment_nesting(count, "different")
    try:
        found = function(*[functorch._add_batch_dim(tensor, 0, level) for tensor in tensors])
        if all(isinstance(tensor, Tensor) for tensor in found):
            return tuple(functorch._remove_batch_dim(tensor, level, count, 0) for tensor in found)
    finally:
        functorch._vmap_decrement_nesting()
    kinds = sorted({type(tensor).__name__ for tensor in found if not isinstance(tensor, Tensor)})
    raise ValueError(f"a function that is run for many games at once returned {kinds}; expected tensors")


def has_tangent(tensor: Tensor) -> bool:
    """Whether a tensor is a dual number of PyTorch's own forward mode, outside `torch.func`."""
    if transforms_active() or forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def pullback(function: Callable[..., Tensor], *primals: Tensor) -> tuple[Tensor, Pullback]:
    r"""The value of a function, and the map from `v` to `v^T d function / d primal` for each primal.

    The graph is built once and kept, so that each product costs one backward pass. The products can be
    differentiated themselves when they are taken with grad enabled. Of a function that does not depend on its primals,
    the gradient of a linear loss for example, they are zeros.
    """
    _refuse_inference()
    if transforms_active():
        value, pulled, *_ = torch.func.vjp(function, *primals)

        def pulled_back(vector: Tensor, /, part: slice = EVERY) -> tuple[Tensor, ...]:
            return pulled(vector)[part]  # type: ignore[no-any-return]

        return value, pulled_back

    # Aliases: partial derivatives stop here even when one primal depends on another through its own graph.
    with torch.enable_grad():
        aliases = [p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in primals]
        value = function(*aliases)
    if not value.requires_grad:

        def zeros(vector: Tensor, /, part: slice = EVERY) -> tuple[Tensor, ...]:
            return tuple(torch.zeros_like(alias) for alias in aliases[part])

        return value, zeros
    # The place in the graph and not the value, which would be held as long as the products are.
    outcome = get_gradient_edge(value)

    def products(vector: Tensor, /, part: slice = EVERY) -> tuple[Tensor, ...]:
        try:
            return torch.autograd.grad(
                outcome,
                aliases[part],
                vector,
                retain_graph=True,
                create_graph=torch.is_grad_enabled(),
                materialize_grads=True,
            )
        except RuntimeError as error:
            told = explanation(error)
            if told:
                raise SecondDerivativeError(f"The derivative of a player's gradient: {told}") from error
            raise

    return value, products


def pushforward(
    function: Callable[..., Tensor], *primals: Tensor, like: Tensor
) -> Callable[[Sequence[Tensor]], Tensor]:
    """The map from directions to the derivative of a function along them; its values are shaped like `like`.

    Outside `torch.func` by backward passes alone: the pullback is linear in what it is given, and to transpose it by a
    second one gives the product. PyTorch's forward mode, which custom functions and in-place updates do not all have,
    serves inside. Differentiable when grad is enabled.
    """
    if transforms_active():
        return lambda directions: torch.func.jvp(function, primals, tuple(directions))[1]
    with torch.enable_grad():
        _, products = pullback(function, *primals)
        _, transposed = pullback(lambda v: _joined(products(v)), torch.zeros_like(like))
    return lambda directions: transposed(_joined(directions))[0]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def gradient(function: Callable[..., Tensor], *points: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Value and gradients of a scalar function of tensors, zeros where it does not depend on them.

    They are differentiable again when grad is enabled.
    """
    _refuse_inference()
    if transforms_active():
        with differentiated_thrice():  # how many transforms there are, and so how many derivatives, nobody knows
            slopes, value = torch.func.grad_and_value(function, argnums=tuple(range(len(points))))(*points)
        return value, slopes
    again = torch.is_grad_enabled()
    with torch.enable_grad(), differentiated_twice(again):
        aliases = [p.view_as(p) if p.requires_grad else p.detach().requires_grad_() for p in points]
        value = function(*aliases)
        if value.requires_grad:
            slopes = torch.autograd.grad(value, aliases, create_graph=again, materialize_grads=True)
        else:
            slopes = tuple(torch.zeros_like(alias) for alias in aliases)
    return (value if again else value.detach()), slopes


def gradients_of(value: Tensor, points: Sequence[Tensor], vector: Tensor | None = None, **kept: bool) -> list[Tensor]:
    """`torch.autograd.grad` with zeros where a value does not depend on a point, or on nothing at all."""
    if not value.requires_grad:
        return [torch.zeros_like(point) for point in points]
    return list(torch.autograd.grad(value, points, vector, materialize_grads=True, **kept))


def _refuse_inference() -> None:
    if torch.is_inference_mode_enabled():
        raise BilevelError(
            "Nothing can be differentiated inside torch.inference_mode(), as a follower's own steps are. Use "
            "torch.no_grad() in its place."
        )


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


def with_signature(function: type[Function]) -> type[Function]:
    """An autograd function whose `forward` holds its signature, which PyTorch else reads anew in each call.

    That takes longer than the whole call does otherwise, and so does to bind arguments that all come by place.
    """
    forward: Any = function.forward
    forward.__signature__ = _ByPlace(list(inspect.signature(forward).parameters.values()))
    return function


class _ByPlace(inspect.Signature):
    """Of a function that is given all its arguments, each by its place."""

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments as they came; no search for those that have names."""
        return super().bind(*args, **kwargs) if kwargs else _Bound(args)


class _Bound:
    """What `Function.apply` asks of bound arguments."""

    kwargs: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args

    def apply_defaults(self) -> None:
        """There are none."""


class _Box:
    """Carries a number out of an autograd function; not a pytree, so that vmap hands over this very object."""

    value: float


@with_signature
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


def norm(vector: Tensor) -> Tensor:
    """|vector| of `[n]`, a 0-d tensor that is 0 only for the zero vector: squares of 1e-23 underflow in float32."""
    if not transforms_active():
        plain: Tensor = torch.linalg.vector_norm(vector)
        # Far from where squares underflow or overflow: a sixth of what the careful way below costs.
        limits = torch.finfo(vector.dtype)
        if limits.tiny**0.5 / limits.eps < float(plain.detach()) < limits.max**0.5:
            return plain
    # The squares of a float32 gradient of 1e-23 underflow, and a residual of 0 would be a lie.
    largest = vector.abs().amax()
    scale = torch.where(largest > 0.0, largest, 1.0)
    size: Tensor = scale * torch.linalg.vector_norm(vector / scale)
    return size


@with_signature
class _Below(torch.autograd.Function):
    @staticmethod
    def forward(
        function: Callable[..., tuple[Tensor, ...]], refusal: str | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.refusal, ctx.count = inputs[1], len(output)
        if ctx.refusal is None:
            ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise SecondDerivativeError(ctx.refusal)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[None, ...]:
        if ctx.refusal is None:
            return (None,) * int(ctx.count)
        raise SecondDerivativeError(
            f"{ctx.refusal} Nor has it one in forward mode (torch.func.jvp, jacfwd): use torch.func.vjp or jacrev."
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Any, refusal: str | None, *tensors: Tensor) -> tuple[Any, Any]:
        rows = []
        for index in range(info.batch_size):
            row = [x if d is None else x.select(d, index) for x, d in zip(tensors, in_dims[2:], strict=True)]
            rows.append(_Below.apply(function, refusal, *row))  # type: ignore[no-untyped-call]
        return tuple(torch.stack(parts) for parts in zip(*rows, strict=True)), (0,) * len(rows[0])


def below_transforms(
    function: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], refusal: str | None = None
) -> tuple[Tensor, ...]:
    """A function of plain tensors, run on plain tensors below all `torch.func` transforms; under vmap once a row.

    It is not differentiated: what it returns is constant, or with a `refusal` a derivative of it raises
    `SecondDerivativeError(refusal)`.
    """
    if not (torch.is_grad_enabled() or transforms_active() or forward_ad._current_level >= 0):
        return function(*tensors)  # nobody can differentiate it, and the autograd function costs more than a small sum
    return _Below.apply(function, refusal, *tensors)  # type: ignore[no-any-return, no-untyped-call]


def nearest(answer: Sequence[Tensor], attribute: str, kind: type[Kind]) -> Kind | None:
    """What one of our own autograd functions has left under `attribute`: of the node that is nearest in the graph."""
    pending = deque(tensor.grad_fn for tensor in answer if tensor.grad_fn is not None)
    seen = set(pending)
    while pending:
        node = pending.popleft()
        left = getattr(node, attribute, None)
        if isinstance(left, kind):
            return left
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)
    return None


def row_by_row(function: Callable[[Tensor], tuple[Tensor | None, ...]], cotangent: Tensor) -> Any:
    """`function` of each row of a cotangent that `torch.autograd.grad(..., is_grads_batched=True)` batches.

    That is PyTorch's old vmap, which hardly any operation of a solver has a rule for; and nobody is told of it.
    None when the cotangent is a plain one.
    """
    if not torch._C._functorch.is_legacy_batchedtensor(cotangent):
        return None
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    rows = torch._remove_batch_dim(cotangent, level, 1, 0)
    found = zip(*(function(row) for row in rows.unbind()), strict=True)
    return tuple(None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level) for column in found)


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
            # What stands for a missing derivative leads to leaves of PyTorch's own.
            if following is not None and following not in seen and following.name() not in UNDIFFERENTIABLE:
                seen.add(following)
                pending.append(following)
    return found


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


def tracked_at_any_level(tensor: Tensor) -> bool:
    """Whether a tensor requires grad under plain autograd or under any of the running `torch.func` levels."""
    functorch = torch._C._functorch
    while not tensor.requires_grad:
        if not functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = functorch.get_unwrapped(tensor)
    return True

"""Operations that PyTorch cannot differentiate twice, or not rightly: found in a graph, replaced or else named."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel

from bilevel.elementary import CHUNKED, THIRD, WEIGHT_NORM, Elementary
from bilevel.errors import SecondDerivativeError

_WRONG_THIRD = ("LayerNorm", "BatchNorm", "RmsNorm", "Logcumsumexp")
"""In the names of nodes whose third derivative is wrong."""

_TIMES: ContextVar[int] = ContextVar("times_differentiated", default=0)


@contextmanager
def differentiated_twice(wanted: bool = True) -> Iterator[None]:
    """What is evaluated in here will be differentiated twice, if `wanted`; three times within another such place.

    So it is with a response inside of a loss that is differentiated twice.
    """
    if not wanted:
        yield
        return
    token = _TIMES.set(3 if _TIMES.get() else 2)
    try:
        yield
    finally:
        _TIMES.reset(token)


@contextmanager
def differentiated_thrice(wanted: bool = True) -> Iterator[None]:
    """What is evaluated in here will be differentiated three times, or may be, if `wanted`."""
    token = _TIMES.set(3 if wanted else _TIMES.get())
    try:
        yield
    finally:
        _TIMES.reset(token)


@dataclass(frozen=True)
class FastKernels:
    """What a loss uses that has one right derivative only, and that PyTorch also has in a form with two.

    Args:
        attention: Fused attention; the other form is the plain, "math" one.
        compiled: `torch.compile`; the other form is what was compiled.
        recurrent: cuDNN's recurrent networks; the other form is PyTorch's own.
        weight_norm: Normalised weights, of which PyTorch's second derivative takes the norms for constants, and is
            wrong in silence; the other form is elementary operations.
        chunked: `linear_cross_entropy` in chunks, whose gradient has no graph, so that its second derivative is 0 in
            silence; the other form has all logits in memory at once.
        third: What has two right derivatives only. The third of layer, batch and instance normalisation takes the
            moments for constants, and that of logcumsumexp is wrong or NaN. Where three will be taken, elementary
            operations are run.
    """

    attention: bool = False
    compiled: bool = False
    recurrent: bool = False
    weight_norm: bool = False
    chunked: bool = False
    third: bool = False

    def __bool__(self) -> bool:
        """Whether there is one whose other form is run by a switch of the whole process."""
        return self.attention or self.compiled or self.recurrent

    @staticmethod
    def of(outputs: Iterable[Tensor], modules: Iterable[nn.Module] = ()) -> FastKernels:
        """Those in the graph of `outputs`, or in `modules` that were compiled in place."""
        names = {node.name() for node in nodes(outputs)}
        # Of what is compiled as a module older versions of PyTorch may show nothing at the first call.
        parts = [part for module in modules for part in module.modules()]
        in_place = any(part._compiled_call_impl is not None or hasattr(part, "_orig_mod") for part in parts)
        return FastKernels(
            attention=any(name.startswith("ScaledDotProduct") for name in names),
            compiled=in_place or any(name.startswith("CompiledFunction") for name in names),
            recurrent=any("CudnnRnn" in name for name in names),
            weight_norm=any(name.startswith("WeightNormInterface") for name in names),
            chunked=any("linear_cross_entropy_batch_chunked" in name for name in names),
            third=any(part in name for name in names for part in _WRONG_THIRD),
        )

    def replace_in(self, stack: ExitStack) -> None:
        """Run the forms with as many right derivatives as will be taken (`differentiated_twice`), up to its end."""
        times = _TIMES.get()
        if not times:
            return
        if self.attention:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if self.weight_norm:
            stack.enter_context(Elementary(WEIGHT_NORM))
        if self.chunked:
            stack.enter_context(Elementary(CHUNKED))
        if self.third and times > 2:
            stack.enter_context(Elementary(THIRD))
        if "torch._dynamo" in sys.modules:  # whatever was compiled: not all of it runs compiled at its first call
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if self.recurrent:
            kept = torch.backends.cudnn
            stack.enter_context(
                kept.flags(
                    enabled=False,
                    benchmark=kept.benchmark,
                    deterministic=kept.deterministic,
                    allow_tf32=kept.allow_tf32,
                )
            )

    def told(self) -> str:
        """What is run in place of what, in words; nothing where the other form costs no more."""
        told = []
        if self.attention:
            told.append("fused attention is computed by the plain kernel (SDPBackend.MATH)")
        if self.compiled:
            told.append("what torch.compile made runs uncompiled")
        if self.recurrent:
            told.append("cuDNN's recurrent network is computed by PyTorch's own kernels")
        if self.chunked:
            told.append("linear_cross_entropy has all its logits at once, and not in chunks")
        return " and ".join(told)


_THIRD = (
    "its loss normalises layers or batches, or takes logcumsumexp, and the hypergradient is differentiated again "
    "(create_graph=True): PyTorch's third derivative of these is wrong in silence. "
    "Take the derivatives by torch.func, or use Implicit, where elementary operations are run in their place; or use "
    "GroupNorm, whose third derivative is right."
)


def once_only(player: str, kernels: FastKernels, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors; where the third derivative would be wrong, gradients in them refuse to be differentiated.

    Inside of a loss that is differentiated twice, what is evaluated has a right third derivative.
    """
    if not kernels.third or _TIMES.get():
        return list(tensors)
    told = f"Player {player!r}: {_THIRD}"
    return [_OnceOnly.apply(t, told) if t.requires_grad else t for t in tensors]  # type: ignore[no-untyped-call]


class _OnceOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, told: str) -> Tensor:
        ctx.told = told
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        (cotangent,) = cotangents
        if torch.is_grad_enabled() and cotangent.requires_grad:
            cotangent = _Refused.apply(cotangent, ctx.told)  # type: ignore[no-untyped-call]
        return cotangent, None


class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, told: str) -> Tensor:
        ctx.told = told
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        raise SecondDerivativeError(ctx.told)


def nodes(outputs: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the graph of `outputs`."""
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                pending.append(following)


UNDIFFERENTIABLE = frozenset(("torch::autograd::NotImplemented", "torch::autograd::Error"))
"""The nodes that stand for a derivative that does not exist, and raise when it is asked for."""


def require_second(player: str, slopes: Sequence[Tensor], custom: Sequence[str]) -> None:
    """Raise `SecondDerivativeError` where a player's gradient, on a graph, cannot be differentiated; tries it once.

    It finds what would raise in a later backward pass, which the user may call herself. `custom` names the user's own
    autograd functions in the loss.
    """
    if custom and any(node.name() == "torch::autograd::Error" for node in nodes(slopes)):
        raise SecondDerivativeError(f"Player {player!r}: {_once(custom)}")
    tracked = [slope for slope in slopes if slope.requires_grad]
    if not tracked:
        return
    # Which operations have no second derivative, only PyTorch's own error says.
    ends = [node.variable for node in nodes(tracked) if getattr(node, "variable", None) is not None]
    try:
        torch.autograd.grad(tracked, ends, [torch.ones_like(slope) for slope in tracked], allow_unused=True)
    except RuntimeError as error:
        told = explanation(error)
        if not told:
            raise
        raise SecondDerivativeError(f"Player {player!r}: {told}") from error


def require_custom_second(player: str, loss: Tensor) -> list[str]:
    """Names the user's own autograd functions in a loss's graph.

    Raises `SecondDerivativeError` for one whose backward pass moves with its cotangent, but returns no graph.
    """
    own = [node for node in nodes([loss]) if isinstance(node, BackwardCFunction) and not _ours(node)]
    for node in own:
        # One that can be called once only, and gave numbers, is taken to move.
        once = _pulled(node, 1.0)
        twice = _pulled(node, 2.0) or tuple(torch.full_like(a, torch.nan) if _is_real(a) else a for a in once)
        pairs = [(a, b) for a, b in zip(once, twice, strict=True) if _is_real(a) and _is_real(b)]
        if any(not a.requires_grad and not torch.equal(a, b) for a, b in pairs):
            raise SecondDerivativeError(
                f"Player {player!r}: the backward of the autograd function {_class(node)} returns numbers without a "
                "graph, as under torch.no_grad() or by .detach(): its derivative would be lost in silence. Compute it "
                "from ctx.saved_tensors with differentiable operations."
            )
    return sorted({_class(node) for node in own})


def _is_real(given: Any) -> bool:
    return isinstance(given, Tensor) and given.dtype.is_floating_point


def _pulled(node: Any, scale: float) -> tuple[Any, ...]:
    """What a custom function's backward gives for cotangents of `scale`; nothing where it cannot be called by hand.

    One that cannot be called on a graph is called without: so it is in a first backward pass, where it loses the graph.
    """
    for tracked in (True, False):
        try:
            with torch.set_grad_enabled(tracked):
                cotangents = [
                    torch.full(tuple(of.shape), scale, dtype=of.dtype, device=of.device, requires_grad=tracked)
                    if of.dtype.is_floating_point
                    else torch.zeros(tuple(of.shape), dtype=of.dtype, device=of.device)
                    for of in node._input_metadata
                ]
                found = node.apply(*cotangents)
        except RuntimeError:
            continue
        return found if isinstance(found, tuple) else (found,)
    return ()


def _ours(node: Any) -> bool:
    return str(node._forward_cls.__module__).startswith("bilevel.")


def explanation(error: RuntimeError) -> str:
    """What one of PyTorch's errors about second derivatives says, with the way out; empty for any other error."""
    text = str(error)
    named = re.search(r"derivative for (?:aten::|')(\w+)'? is not implemented", text)
    if named:
        operation = named.group(1).removeprefix("_")
        return (
            f"PyTorch has no second derivative of {operation.removesuffix('_backward')} (it says: {text}). "
            + _way_out(operation)
        )
    if "once_differentiable" in text:
        return _once([])
    if "donated buffers" in text or "double backward" in text:
        return (
            f"what torch.compile made has one derivative only (it says: {text[:80]}...). Pass the model or the "
            "function as it was before torch.compile, or call it under torch.compiler.set_stance('force_eager')."
        )
    return ""


WITHIN_TRANSFORMS = "a loss inside torch.func saves tensors by hooks"


def told_of_loss(error: RuntimeError, *, transformed: bool) -> str:
    """What an error of PyTorch's that a loss raised says of gradients inside it, with the way out; else empty.

    `transformed` says whether the loss was run inside of a transform of torch.func.
    """
    text = str(error)
    if transformed and ("saved tensor hooks" in text or WITHIN_TRANSFORMS in text):
        return (
            "its loss saves tensors by hooks, as torch.utils.checkpoint and save_on_cpu do, which PyTorch does not run "
            "inside torch.func, by which many games at once and Hypernetwork(...) are computed. Leave the hooks out, "
            "or use another response and plain autograd."
        )
    if "saved tensor hooks" in text:
        return (
            "its loss uses torch.func, which PyTorch does not run where saved tensors are watched, as Segments, "
            "ForwardMode and ReverseMode(offload=True) do. Take the gradient inside the loss by "
            "torch.autograd.grad(..., create_graph=True), or use plain ReverseMode()."
        )
    if "device meta" in text:
        return (
            f"a tensor in its loss is on the meta device, and has no numbers (PyTorch says: {text[:100]}). A game "
            "keeps a copy of its players' variables and buffers alone: batches, frozen parameters and what a loss "
            "captures stay where they were made."
        )
    if "must override the setup_context" in text or "does not have vmap support" in text:
        named = re.search(r"vmap over (\w+)", text)
        return (
            f"{f'the autograd function {named.group(1)}' if named else 'an autograd function'} in its loss is not made "
            "for torch.func, by which many games at once and Hypernetwork(...) are computed. Give it "
            "`generate_vmap_rule = True` and a setup_context(ctx, inputs, output), with a forward without ctx."
        )
    if "requires_grad_() inside of a function being transformed" in text or (
        "torch.autograd.functional" in text and "functorch" in text
    ):
        return (
            "its loss takes a gradient by torch.autograd.grad, which PyTorch does not run inside torch.func and "
            "many games at once. Take it by torch.func.grad in the loss, or use plain autograd outside."
        )
    return ""


def _way_out(operation: str) -> str:
    if "scaled_dot_product" in operation or "attention" in operation:
        return (
            "Use the plain kernel: `with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):` around "
            "it in the loss."
        )
    if "cudnn_rnn" in operation:
        return "Use PyTorch's own kernels: `with torch.backends.cudnn.flags(enabled=False):` around it in the loss."
    return (
        "Write it with other operations (elementary ones all have a second derivative), or use a response that takes "
        "first derivatives only, Hypernetwork(...)."
    )


def _once(custom: Sequence[str]) -> str:
    which = f"autograd function {' or '.join(custom)}" if custom else "one of its autograd functions"
    return (
        f"{which} is marked @once_differentiable, and has no second derivative. Take the mark away, and write its "
        "backward with differentiable operations on ctx.saved_tensors."
    )


def _class(node: Any) -> str:
    return str(node.name()).removesuffix("Backward")

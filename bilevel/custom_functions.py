"""Autograd functions of the user's own: whether their second derivative, and their first one, is what it says.

PyTorch differentiates what a backward pass computes. A number that forward has computed and saved is a constant to it:
the second derivative is then wrong, in silence. Held against differences of the function alone, at its own inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction, _is_setup_context_defined

from bilevel.errors import SecondDerivativeError
from bilevel.randomness import random_kept, random_state
from bilevel.second_order import nodes

# Torch's own are right, or known (`second_order`); what torch.library makes is a function of the user's.
_TORCHS, _LIBRARY, _GENERATED = ("torch.", "torchvision."), "torch._library.", "GeneratedBackwardFor_"
_CALLS = 8  # of one class with other settings, as a string or a flag
FINE = (1e-3, 1e-4, 1e-5, 1e-6)  # steps, relative to an entry's size
_COARSE = (1e-2, 5e-3, 2.5e-3)  # where numbers are kept in 32 bits
_WRONG = 0.01  # of the larger of the two slopes
_ENTRIES = 4  # moved at once, so that few kinks are crossed in a step
_PATCHING = RLock()


def own_functions(outputs: Iterable[Tensor]) -> list[type]:
    """The classes of the user's autograd functions in the graph of `outputs`.

    Not PyTorch's nor this library's, nor what `torch.func` makes of a function where it runs.
    """
    classes = {node._forward_cls for node in nodes(outputs) if isinstance(node, BackwardCFunction)}  # type: ignore[attr-defined]
    return sorted((cls for cls in classes if _is_users(cls)), key=lambda cls: cls.__name__)


def _is_users(cls: type) -> bool:
    module = f"{cls.__module__}."
    if module.startswith(_LIBRARY):
        return not cls.__name__.startswith(_GENERATED + "torch")
    # The laws plant functions as a user's.
    return module.startswith("bilevel.testing.") or not module.startswith((*_TORCHS, "bilevel."))


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an autograd function: its class, what it was called with, and which tensors were differentiated."""

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    moved: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the function."""
        return str(self.function.__name__).removeprefix(_GENERATED)


@contextmanager
def recorded(classes: Sequence[type]) -> Iterator[list[Call]]:
    """The calls of these functions while it is entered, a few of each; their inputs are copied.

    For that while each class has another `forward`, around its own: `apply` may have been taken from the class long
    ago, and looks `forward` up when it is called.
    """
    calls: list[Call] = []
    kinds: dict[Any, int] = {}
    with _PATCHING:
        kept = [(cls, vars(cls).get("forward")) for cls in classes]
        try:
            for cls in classes:
                setattr(cls, "forward", staticmethod(_noting(cls, calls, kinds)))  # noqa: B010 - of a class
            yield calls
        finally:
            for cls, before in kept:
                if before is None:
                    delattr(cls, "forward")
                else:
                    setattr(cls, "forward", before)  # noqa: B010


def _noting(cls: Any, calls: list[Call], kinds: dict[Any, int]) -> Callable[..., Any]:
    forward, skipped = cls.forward, 0 if _is_setup_context_defined(cls.setup_context) else 1  # type: ignore[no-untyped-call]

    @wraps(forward)
    def noted(*arguments: Any, **options: Any) -> Any:
        given = arguments[skipped:]
        moved = tuple(i for i, a in enumerate(given) if isinstance(a, Tensor) and a.requires_grad)
        plain = [type(a) if isinstance(a, Tensor) else repr(a)[:80] for a in (*given, *options.values())]
        kind = (cls, tuple(map(str, plain)), moved)
        if moved and kind not in kinds and len(kinds) < _CALLS and not torch._C._are_functorch_transforms_active():
            kinds[kind] = 1
            copies = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in given)
            calls.append(Call(cls, copies, dict(options), moved))
        return forward(*arguments, **options)

    return noted


@dataclass(frozen=True)
class Slopes:
    """Two slopes along one direction that should be one: by autograd, and by differences."""

    claimed: float
    differences: float

    def __str__(self) -> str:
        """Both, in words."""
        return f"autograd says {self.claimed:.3g} along a direction, differences {self.differences:.3g}"


@dataclass(frozen=True)
class OwnFunctions:
    """The autograd functions of a loss, and what is wrong with them, by name.

    Args:
        names: All that there are.
        second: Those whose second derivative is not the derivative of their first.
        first: Those whose first derivative is not that of their values, where these are smooth: as of a gradient
            reversal, and not of rounding with a straight-through gradient.
    """

    names: tuple[str, ...] = ()
    second: dict[str, Slopes] = field(default_factory=dict)
    first: dict[str, Slopes] = field(default_factory=dict)

    def with_those_of(self, other: OwnFunctions) -> OwnFunctions:
        """Both."""
        names = tuple(dict.fromkeys((*self.names, *other.names)))
        return OwnFunctions(names, {**self.second, **other.second}, {**self.first, **other.first})


def refuse_second(player: str, functions: OwnFunctions) -> None:
    """Raise `SecondDerivativeError` where the second derivative of one of a player's functions would be wrong."""
    if not functions.second:
        return
    function, slopes = next(iter(functions.second.items()))
    raise SecondDerivativeError(
        f"Player {player!r}: the second derivative of the autograd function {function} is wrong: {slopes}, the same "
        "for every step and nearby. Its backward uses what forward has computed and saved, which is a constant to a "
        "second derivative. In backward compute it from ctx.saved_tensors, with nothing but inputs and outputs saved; "
        "or let forward return it as a further output. Or use a response of first derivatives alone, Nudged(...)."
    )


def examined(calls: Sequence[Call]) -> OwnFunctions:
    """What is wrong with the functions that were called."""
    found = OwnFunctions(tuple(dict.fromkeys(call.name for call in calls)))
    for call in calls:
        name = call.name
        with random_kept(call.arguments[call.moved[0]].device):
            function = _Function.of(call)
            if function is None:
                continue
            second = _second(function)
            first = _first(function)
        if second is not None:
            found.second.setdefault(name, second)
        if first is not None:
            found.first.setdefault(name, first)
    return found


class _Function:
    """A function of the moved inputs t, with random cotangents c of its outputs, as two numbers with their slopes.

    The one is c'F(t), whose slope by autograd is c'J(t) d. The other is v'(J'c), what its backward pass gives, for a
    random v; its slope is what a second derivative is made of.
    """

    def __init__(self, call: Call, double: bool) -> None:
        self.call = call
        self.steps: tuple[float, ...] = FINE
        self.given = [
            a.double() if double and isinstance(a, Tensor) and a.dtype.is_floating_point else a for a in call.arguments
        ]
        self.here = [self.given[i] for i in call.moved]
        self.generator = torch.Generator().manual_seed(0)
        self.random = random_state(self.here[0].device)
        self.cotangents = [self.drawn(out) for out in self.outputs(self.here)]
        self.weights = [self.drawn(t) for t in self.here]

    @staticmethod
    def of(call: Call) -> _Function | None:
        """In float64 if it runs in that; None where it cannot be examined."""
        dtypes = {call.arguments[i].dtype for i in call.moved}
        if not dtypes <= {torch.float64, torch.float32}:
            if any(dtype.is_complex for dtype in dtypes):
                return None
            dtypes = set()  # of a half precision only what it is in float64 can be told
        for double in (True, False) if dtypes else (True,):
            try:
                function = _Function(call, double)
                finite = function.settle()
            except Exception:
                continue
            if finite:
                return function
        return None

    def settle(self) -> bool:
        """Choose the steps by how fine its numbers are; whether it can be told anything of."""
        first = self.slopes(self.here)[0]
        again = self.slopes(self.here)[0]
        if not (torch.isfinite(first) and torch.equal(first, again)):
            return False  # random numbers that are not torch's, or a state
        if self.here[0].dtype == torch.float64:
            moved, _ = self.slopes([t * (1.0 + 1e-10 * self.drawn(t)) for t in self.here])
            if not torch.equal(moved, first):
                return True
        # In 32 bits a few units of rounding show at a few entries; those of a coarser grid do not, or not every time.
        seen = [self.slopes([t + 1e-6 * _direction(self, t, _ENTRIES) for t in self.here])[0] for _ in range(3)]
        if not any(torch.equal(value, first) for value in seen):
            self.steps = _COARSE
        return True

    def drawn(self, like: Tensor) -> Tensor:
        """Noise like a tensor."""
        return torch.randn(tuple(like.shape), generator=self.generator, dtype=torch.float64).to(like)

    def outputs(self, moved: Sequence[Tensor]) -> list[Tensor]:
        """What it returns that can be differentiated, for moved inputs; always with the same random numbers."""
        arguments = list(self.given)
        for index, tensor in zip(self.call.moved, moved, strict=True):
            arguments[index] = tensor.view_as(tensor).clone()  # it may write into its input
        with random_kept(self.here[0].device, start=self.random), torch.enable_grad():
            found = self.call.function.apply(*arguments, **self.call.options)
        every = found if isinstance(found, tuple) else (found,)
        return [out for out in every if isinstance(out, Tensor) and out.dtype.is_floating_point]

    def values(self, point: Sequence[Tensor], along: Sequence[Tensor] | None = None) -> tuple[Tensor, float]:
        """c'F(t), and its slope along a direction by autograd."""
        leaves = [t.detach().requires_grad_(along is not None) for t in point]
        outs = [(out, c) for out, c in zip(self.outputs(leaves), self.cotangents, strict=True)]
        total = torch.stack([(out.double() * c.double()).sum() for out, c in outs]).sum()
        return total.detach(), 0.0 if along is None else _along(total, leaves, along)

    def slopes(
        self,
        point: Sequence[Tensor],
        along: Sequence[Tensor] | None = None,
        cotangents: Sequence[Tensor] | None = None,
        turned: bool = False,
    ) -> tuple[Tensor, float]:
        """v'(J'c), and its slope along a direction of t, or if `turned` of c, by autograd."""
        leaves = [t.detach().requires_grad_() for t in point]
        weights = [c.detach().requires_grad_() for c in cotangents or self.cotangents]
        with torch.enable_grad():
            outs = self.outputs(leaves)
            pairs = [(out, c) for out, c in zip(outs, weights, strict=True) if out.requires_grad]
            grads = torch.autograd.grad(
                [out for out, _ in pairs],
                leaves,
                [c for _, c in pairs],
                create_graph=along is not None,
                materialize_grads=True,
            )
            total = torch.stack([(g.double() * v.double()).sum() for g, v in zip(grads, self.weights, strict=True)])
            total = total.sum()
        return total.detach(), 0.0 if along is None else _along(total, weights if turned else leaves, along)

    def with_cotangents(self, cotangents: Sequence[Tensor], along: Sequence[Tensor] | None) -> tuple[Tensor, float]:
        """The same as a function of c."""
        return self.slopes(self.here, along, cotangents, turned=True)


def _along(total: Tensor, leaves: Sequence[Tensor], along: Sequence[Tensor]) -> float:
    if not total.requires_grad:
        return 0.0
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return float(sum((g.double() * d.double()).sum() for g, d in zip(grads, along, strict=True)))


Number = Callable[..., tuple[Tensor, float]]


def _second(function: _Function) -> Slopes | None:
    """The slopes of its backward pass where autograd and differences disagree for sure; else None.

    They have to disagree at the inputs of the call and nearby, wherever differences count: along directions of all
    entries, or along three of a few. A kink is at one place, and a wrong formula everywhere.
    """
    dense: list[Slopes] = []
    sparse: list[Slopes] = []
    agreed = 0
    for trial in range(8):
        whole = trial in (0, 3)
        point = function.here if trial < 2 else [_beside(function, t) for t in function.here]
        along = [_direction(function, t, t.numel() if whole else _ENTRIES) for t in point]
        verdict, slopes = judged(function.slopes, point, along, function.steps)
        agreed += verdict == "right"
        if verdict == "wrong":
            (dense if whole else sparse).append(slopes)
        if len(dense) == 2 or len(sparse) == 3:
            return (dense + sparse)[0]
        if agreed == 3 and not dense and not sparse:
            break
    # Where it is now it may be flat, or in its one right branch: other signs are where it may come to be.
    far: list[tuple[str, Slopes]] = []
    for _ in range(4):
        point = [t * function.drawn(t).sign() for t in function.here]
        along = [_direction(function, t, _ENTRIES) for t in point]
        far.append(judged(function.slopes, point, along, function.steps))
    wrong = [slopes for verdict, slopes in far if verdict == "wrong"]
    if len(wrong) > 1:
        return wrong[0]
    along = [function.drawn(c) for c in function.cotangents]
    verdict, slopes = judged(function.with_cotangents, function.cotangents, along, function.steps)
    return slopes if verdict == "wrong" else None


def _first(function: _Function) -> Slopes | None:
    """The slopes of its values along three entries, where its backward pass gives others; else None.

    Where values stand still, rounded or clipped, another gradient is what their author means.
    """
    wrong: list[Slopes] = []
    for trial in range(8):
        point = function.here if trial == 0 else [_beside(function, t) for t in function.here]
        along = [_direction(function, t, 1) for t in point]
        verdict, slopes = judged(function.values, point, along, function.steps)
        if verdict == "wrong" and abs(slopes.differences) > _WRONG * abs(slopes.claimed):
            wrong.append(slopes)
        if len(wrong) == 3:
            return wrong[0]
        if trial == 3 and not wrong:
            break
    return None


def judged(
    number: Number, point: Sequence[Tensor], along: Sequence[Tensor], steps: Sequence[float] = FINE
) -> tuple[str, Slopes]:
    """Whether a number's slope along a direction, as it says, is "right", "wrong", or "unclear".

    `number(point, along)` is the number and its claimed slope; `along` is None where the number alone is asked for.
    Differences count where they are the same at every step: at a kink or a jump they are not.
    """
    try:
        here, claimed = number(point, along)
        found, size, still = [], abs(float(here)), True
        for step in steps:
            ends = []
            for sign in (1.0, -1.0):
                value, _ = number([t + sign * step * d for t, d in zip(point, along, strict=True)], None)
                ends.append(float(value))
            found.append((ends[0] - ends[1]) / (2.0 * step))
            still = still and ends == [float(here)] * 2
            size = max(size, *map(abs, ends))
    except Exception:
        return "unclear", Slopes(0.0, 0.0)
    last = found[len(found) // 2]
    slopes = Slopes(claimed, last)
    rounding = size * torch.finfo(torch.float32 if steps is _COARSE else point[0].dtype).eps
    apart, scale = abs(last - claimed), max(abs(last), abs(claimed))
    spread = max(found) - min(found)
    # What stands still to the last bit is rounded on purpose, and another slope of it as well.
    if not (spread < float("inf")) or scale == 0.0 or (still and claimed != 0.0):
        return "unclear", slopes
    if apart <= _WRONG * scale:
        return "right", slopes
    sure = spread <= 0.1 * apart and apart > 100.0 * rounding / steps[-1]
    return "wrong" if sure else "unclear", slopes


def _size(tensor: Tensor) -> Tensor:
    """How far an entry may be moved: its own size, or a tenth of the others'."""
    usual = float(tensor.detach().double().square().mean().sqrt()) or 1.0
    return tensor.abs().clamp(min=0.1 * usual)


def _beside(function: _Function, tensor: Tensor) -> Tensor:
    """A point nearby; entries keep their signs, which a logarithm asks for, and leave 0, where many a kink is."""
    away = torch.where(tensor == 0.0, 0.1 * _size(tensor), 0.05 * tensor.abs())
    return tensor + away * function.drawn(tensor).clamp(-3.0, 3.0)


def _direction(function: _Function, tensor: Tensor, entries: int) -> Tensor:
    """Of so many entries."""
    direction = function.drawn(tensor).sign() * _size(tensor)
    if entries >= tensor.numel():
        return direction
    chosen = torch.randperm(tensor.numel(), generator=function.generator)[:entries].to(tensor.device)
    mask = torch.zeros(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    mask[chosen] = 1.0
    return direction * mask.reshape(tensor.shape)

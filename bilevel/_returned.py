"""What an extension returns, and what it may not write to: checked in words where the library calls it.

One small function for each question; each base class asks them in one place. They cost microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from bilevel.tree import leaves


def described(value: object) -> str:
    """What came, in words."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {value.dtype}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, (list, tuple, dict)):
        return f"a {type(value).__name__} of {len(value)}"
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"


def both(found: object, who: str, wanted: str) -> tuple[Any, Any]:
    """The two things that a call returned; raise `TypeError` where it returned anything else."""
    if not isinstance(found, tuple) or len(found) != 2:
        raise TypeError(f"{who} returned {described(found)}; expected a tuple of two: {wanted}.")
    return found


def require_instance(found: object, kind: type, who: str, wanted: str) -> None:
    """Raise `TypeError` for what is of another kind."""
    if not isinstance(found, kind):
        raise TypeError(f"{who} is {described(found)}; expected {wanted}.")


def require_like(found: object, like: Tensor, who: str, hint: str = "") -> None:
    """Raise where this is no tensor of the shape, dtype and device of `like`."""
    if not isinstance(found, Tensor):
        raise TypeError(f"{who} is {described(found)}; expected a tensor {list(like.shape)} of {like.dtype}.{hint}")
    if found.shape != like.shape or found.dtype != like.dtype:
        raise ValueError(f"{who} is {described(found)}; expected {list(like.shape)} of {like.dtype}.{hint}")
    if found.device != like.device:
        raise ValueError(f"{who} is on {found.device}; expected {like.device}.{hint}")


def require_leaves(
    found: object, like: Sequence[Tensor], who: str, names: Callable[[], Sequence[str]] | None = None
) -> None:
    """Raise where these are not tensors, one for each of `like` and like it; `names` gives those of the leaves."""
    if not isinstance(found, (list, tuple)):
        raise TypeError(f"{who} is {described(found)}; expected a list of {len(like)} tensors, leaf after leaf.")
    if len(found) != len(like):
        shapes = [list(leaf.shape) for leaf in like]
        raise ValueError(f"{who} has {len(found)} leaves; expected {len(like)}, of shapes {shapes}.")
    for index, (leaf, wanted) in enumerate(zip(found, like, strict=True)):
        alike = isinstance(leaf, Tensor) and leaf.shape == wanted.shape
        if not (alike and leaf.dtype == wanted.dtype and leaf.device == wanted.device):
            place = f"leaf {index}" if names is None else f"leaf {names()[index]!r}"
            require_like(leaf, wanted, f"{who}, {place},")


class Lent:
    """Values that an extension may read and not write to.

    `out` gives containers of their own, so that an `append` reaches nobody; writes to tensors are seen afterwards.
    """

    def __init__(self) -> None:
        self._held: list[tuple[str, list[Tensor], list[int]]] = []

    def out(self, what: str, value: Any) -> Any:
        """The value to hand out; `what` names it in the error."""
        self.note(what, value)
        return _apart(value)

    def note(self, what: str, value: Any) -> None:
        """Watch the tensors in a value of which nobody is handed a container."""
        # Of those of inference mode torch counts no writes.
        tensors = [leaf for leaf in leaves(value) if isinstance(leaf, Tensor) and not leaf.is_inference()]
        if tensors:
            self._held.append((what, tensors, [tensor._version for tensor in tensors]))

    def require_untouched(self, who: str) -> None:
        """Raise `ValueError` if one of the tensors was written to since."""
        for what, tensors, before in self._held:
            if [tensor._version for tensor in tensors] != before:
                raise ValueError(
                    f"{who} wrote into {what} in place; others hold that tensor. Make a new one, x = x + 1 and not "
                    "x.add_(1) or x[...] = 1, or .clone() it first."
                )


_CONTAINERS = (dict, list, tuple)


def _apart(value: Any) -> Any:
    """The same value in containers of its own; those of other kinds are not copied."""
    kind = type(value)
    if kind is dict:
        return {key: _apart(entry) if type(entry) in _CONTAINERS else entry for key, entry in value.items()}
    if kind is list or kind is tuple:
        return kind([_apart(entry) if type(entry) in _CONTAINERS else entry for entry in value])
    return value

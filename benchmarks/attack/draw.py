"""What a game is drawn from, and the ways in which a user may write it down."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

F64 = torch.float64


class Draw(random.Random):
    """Random numbers by one seed, NumPy's and torch's ways included."""

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers, float64."""
        generator = torch.Generator().manual_seed(self.randrange(2**31))
        return torch.randn(*shape, generator=generator, dtype=F64)

    def maybe(self, probability: float) -> bool:
        """True so often."""
        return self.random() < probability

    def odd(self, probability: float, low: float = -8.0, high: float = 8.0) -> float:
        """1, or now and then a power of ten: a scale that people do not think of."""
        return 10.0 ** self.uniform(low, high) if self.maybe(probability) else 1.0

    def parts(self, n: int, count: int) -> list[int]:
        """n cut into at most `count` lengths."""
        cuts = sorted(self.sample(range(1, n), min(count, n) - 1)) if n > 1 else []
        return [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]


NAMES = (
    ("x", "y"), ("a", "z"), ("weight_decay", "w"), ("lr", "weights"), ("step", "y"), ("work", "y"), ("z", "a"),
    ("momentum", "params"), ("betas", "y"), ("state", "y"), ("u", "batch_size"), ("rhs", "v"), ("others", "y"),
)  # fmt: skip
"""Leaders and followers; names that mean something inside of a library, too."""


class Layout:
    """One way to write n numbers: a tensor, a scalar, a matrix, a nest of dicts and tuples, a module."""

    def __init__(self, draw: Draw, n: int, *, modules: bool = True, kinds: Sequence[str] = ()) -> None:
        found = ["tensor", "dict", "list", "nested"] + (["scalar"] if n == 1 else []) + (["matrix"] if n == 4 else [])
        found += ["module", "tied", "frozen"] if modules else []
        self.kind = draw.choice(list(kinds) or found)
        self.sizes = draw.parts(n, 2) if self.kind in ("dict", "list", "nested", "module", "tied", "frozen") else [n]

    def init(self, flat: Tensor) -> Any:
        """What a player's `init` is."""
        parts = [part.clone() for part in flat.split(self.sizes)]
        if self.kind not in ("module", "tied", "frozen"):
            return self.tree(flat.clone())
        module = nn.Module()
        for i, part in enumerate(parts):
            module.register_parameter(f"p{i}", nn.Parameter(part))
        if self.kind == "tied":
            module.sub = nn.Module()
            module.sub.register_parameter("again", module.p0)
        if self.kind == "frozen":
            module.register_parameter("still", nn.Parameter(torch.ones(2, dtype=flat.dtype), requires_grad=False))
        module.register_buffer("count", torch.zeros((), dtype=flat.dtype))
        return module

    def tree(self, flat: Tensor, like: Any = None) -> Any:
        """The same as a tree of parts of `flat`; of a module in the order of `like`."""
        parts = list(flat.split(self.sizes))
        if self.kind == "tensor":
            return flat
        if self.kind == "scalar":
            return flat.reshape(())
        if self.kind == "matrix":
            return flat.reshape(2, 2)
        if self.kind == "list":
            return parts
        if self.kind == "dict":
            return {f"k{len(parts) - i}": part for i, part in enumerate(parts)}
        if self.kind == "nested":
            return {"a": [parts[0]], "b": {"c": tuple(parts[1:])}}
        named = {f"p{i}": part for i, part in enumerate(parts)}
        return {name: named[name] for name in like}

    def flat(self, given: Any) -> Tensor:
        """Back to `[n]`."""
        if self.kind in ("tensor", "scalar", "matrix"):
            return given.reshape(-1)
        if self.kind == "list":
            return torch.cat(list(given))
        if self.kind == "dict":
            return torch.cat([given[f"k{len(self.sizes) - i}"] for i in range(len(self.sizes))])
        if self.kind == "nested":
            return torch.cat([given["a"][0], *given["b"]["c"]])
        return torch.cat([given[f"p{i}"] for i in range(len(self.sizes))])


class Streamed(IterableDataset):  # type: ignore[type-arg]
    """Batches that come one after the other, without a length."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def source(draw: Draw, batches: Sequence[Any], *, workers: bool = False) -> tuple[str, Any]:
    """The batches, in order, as some kind of data; now and then read by a worker, where passes are few."""
    kind = draw.choice(["list", "tuple", "function", "loader", "stream", "streamed loader"])
    if workers and draw.maybe(0.1):
        kind = "workers"
    given: dict[str, Callable[[], Any]] = {
        "list": lambda: list(batches),
        "tuple": lambda: tuple(batches),
        "function": lambda: lambda: iter(batches),
        "loader": lambda: DataLoader(list(batches), batch_size=None),
        "stream": lambda: Streamed(batches),
        "streamed loader": lambda: DataLoader(Streamed(batches), batch_size=None),
        "workers": lambda: DataLoader(
            list(batches), batch_size=None, num_workers=1, persistent_workers=draw.maybe(0.5)
        ),
    }
    return kind, given[kind]()


def named(names: Sequence[str], function: Callable[..., Any], *, batch: bool = False) -> Callable[..., Any]:
    """A function whose parameters have these names; `function` is given their dict, and the batch or None."""
    listed = ", ".join([*names, "batch"] if batch else names)
    values = ", ".join(f"{name!r}: {name}" for name in names)
    scope: dict[str, Any] = {"function_": function}
    exec(f"def loss({listed}):\n    return function_({{{values}}}, {'batch' if batch else 'None'})", scope)
    return scope["loss"]

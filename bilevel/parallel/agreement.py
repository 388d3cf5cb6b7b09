"""What ranks must have in common before they play: found to differ at the start, in words, and not by a deadlock."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable, Mapping, Sized
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bilevel._version import __version__
from bilevel.errors import ParallelError
from bilevel.game import Game
from bilevel.parallel.batches import Examples, sampler_of, weight
from bilevel.parallel.ranks import Ranks
from bilevel.randomness import random_state
from bilevel.sharding import ShardedTensor
from bilevel.sharding.tensor import shape_of
from bilevel.tree import leaves, named_leaves

Table = Mapping[str, str]
"""What is compared -> what it is here, in words."""

_TOLD = 4
_GLANCED = 1024  # entries of a batch's tensor that are compared in each step
_WIDTHS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def require_agreement(ranks: Ranks, table: Table, asker: str) -> None:
    """Raise `ParallelError` on all ranks where one of them has something else than the first."""
    tables = ranks.everybodys(dict(table))
    found = []
    for key in dict.fromkeys(key for each in tables for key in each):
        values = [each.get(key, "missing") for each in tables]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            found.append(f"{key} is {_short(values[0])} on rank 0 and {_short(values[other])} on rank {other}")
    if found:
        more = f", and {len(found) - _TOLD} more" if len(found) > _TOLD else ""
        hints = {hint for key, hint in _HINTS.items() if any(text.startswith(key) for text in found)}
        raise ParallelError(
            f"{asker}: the ranks do not play the same game: {'; '.join(found[:_TOLD])}{more}. "
            + " ".join(sorted(hints) or ["Start the same program with the same arguments on each."])
        )


_HINTS = {
    "the start of": "Call torch.manual_seed(0) before the model is made, or load the same file on each.",
    "torch's random numbers": "Call torch.manual_seed(0) at the start of the program, on each alike.",
    "the first batch of": (
        "A batch is whole on each rank, which takes its share of the rows. Where each rank reads a part of its own, "
        "use a DistributedSampler, or DataParallel(sharded=True)."
    ),
    "the number of batches of": "Deal the data out evenly: a DistributedSampler repeats some examples, or drops them.",
    "the version of": "Install the same on each machine.",
    "the processor's": "Use machines of one kind: others round otherwise, and would decide otherwise.",
    "the device": "Use machines of one kind: others round otherwise, and would decide otherwise.",
    "the examples that": "Count them by the same examples= on each.",
    "the number of threads": "Set the same OMP_NUM_THREADS on each machine.",
}


def of_the_call(game: object, options: Mapping[str, str]) -> dict[str, str]:
    """What was asked for: told apart first, for what kind of game it is decides what ranks say to each other next."""
    return {"the kind of game": type(game).__name__} | {f"DataParallel's {key}": text for key, text in options.items()}


def of_the_machine(device: torch.device) -> dict[str, str]:
    """What arithmetic depends on: other kernels round otherwise, and ranks that round otherwise decide otherwise."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "the version of bilevel": __version__,
        "the version of PyTorch": torch.__version__,
        "the version of Python": platform.python_version(),
        "the processor's instruction set": torch.backends.cpu.get_cpu_capability(),
        "the device": f"{device.type}, {name}",
        "the number of threads": str(torch.get_num_threads()),
        "the default dtype": str(torch.get_default_dtype()),
        "torch.are_deterministic_algorithms_enabled()": str(torch.are_deterministic_algorithms_enabled()),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
    }


def of_the_game(game: Game, sharded: Iterable[str], examples: Examples | None = None) -> dict[str, str]:
    """Who plays, from where, on which data."""
    found = {"players, in order of play": ", ".join(game.names), "torch's random numbers": told(random_state())}
    dealt = set(sharded)
    for name, player in game.players.items():
        forms = [f"{path}{shape_of(leaf)} {leaf.dtype}" for path, leaf in named_leaves(game.initial(name))]
        found[f"the form of {name!r}"] = _short(", ".join(forms), 120)
        found[f"the start of {name!r}"] = told((game.initial(name), game.buffers().get(name, {})))
        sets = {"domain=": player.domain, "prox=": player.prox, "the ranges": player.coordinates}
        found |= {f"{what} of {name!r}": _whole(_said(one)) for what, one in sets.items()}
        if isinstance(player.init, nn.Module):
            found |= {f"{path or 'the module'} of {name!r}": text for path, text in _layers(player.init)}
        if player.data is None:
            continue
        found[f"the data of {name!r}"] = f"{type(player.data).__name__}, {'sharded' if name in dealt else 'whole'}"
        if isinstance(player.data, Sized):
            found[f"the number of batches of {name!r}"] = _length(player.data)
        if name not in dealt:
            batch = game.draw(name, game.start(name))[0]
            found[f"the first batch of {name!r}"] = told(batch)
            if examples is not None and type(game) is Game:
                found[f"the examples that the first batch of {name!r} holds"] = str(weight(name, batch, examples))
    return found


def _said(thing: Any) -> str:
    """A set or a range in words: its class and numbers, tensors by their bits; of anything else its class."""
    if is_dataclass(thing) and not isinstance(thing, type):
        return f"{type(thing).__name__}({', '.join(_said(getattr(thing, field.name)) for field in fields(thing))})"
    if isinstance(thing, Mapping):
        return f"{{{', '.join(f'{key}: {_said(value)}' for key, value in thing.items())}}}"
    if isinstance(thing, list | tuple):
        return f"[{', '.join(map(_said, thing))}]"
    if isinstance(thing, Tensor):
        return f"tensor {list(thing.shape)} {told(thing)}"
    return repr(thing) if isinstance(thing, float | int | str | None) else type(thing).__name__


def _layers(module: nn.Module) -> Iterable[tuple[str, str]]:
    """What the layers are beside their parameters: a share of dropout, a padding, whether they train."""
    for path, part in module.named_modules():
        own = re.sub(r" at 0x[0-9a-f]+", "", part.extra_repr())
        yield path, f"{type(part).__name__}({own}){' in training' if part.training else ''}"


def require_sampler(ranks: Ranks, name: str, data: Any) -> None:
    """Raise `ValueError` for a sampler that deals out to other ranks than these."""
    sampler = sampler_of(data)
    if sampler is None or (sampler.num_replicas, sampler.rank) == (ranks.size, ranks.rank):
        return
    raise ValueError(
        f"DataParallel: the DistributedSampler of player {name!r} has rank={sampler.rank} of "
        f"num_replicas={sampler.num_replicas}; this is rank {ranks.rank} of {ranks.size}. Leave both out, and it asks "
        "the process group."
    )


def fingerprint(tree: Any) -> int:
    """A number that differs, as a rule, where any bit of a tree differs; computed where its tensors are.

    Parts of spread tensors are left out: they differ from rank to rank.
    """
    total = 0
    for place, leaf in enumerate(leaves(tree), start=1):
        total = (total + place * _bits(_comparable(leaf))) % 2**62
    return total


def glanced(tree: Any) -> int:
    """The same of some entries of each tensor, evenly spaced: as cheap for large batches as for small ones."""

    def some(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or isinstance(leaf, ShardedTensor):
            return leaf
        flat = leaf.detach().reshape(-1)
        return flat[:: max(1, flat.numel() // _GLANCED)]

    known = [_comparable(leaf) for leaf in leaves(tree)]
    shapes = [tuple(leaf.shape) for leaf in known if isinstance(leaf, Tensor)]
    return fingerprint([[some(leaf) for leaf in known], shapes])


def told(tree: Any) -> str:
    """What a tree of tensors and plain values is known by, in words."""
    return f"#{fingerprint(tree):016x}"


def _comparable(leaf: Any) -> Any:
    """A dense tensor as it is; of others their kind, and of other objects what they print, but not where they lie."""
    if isinstance(leaf, Tensor) and not isinstance(leaf, ShardedTensor):
        dense = leaf.layout == torch.strided and not leaf.is_nested and not leaf.is_quantized
        return leaf if dense else f"{leaf.layout} {leaf.dtype}"
    return leaf if isinstance(leaf, ShardedTensor) else re.sub(r" at 0x[0-9a-fA-F]+", "", repr(leaf))


def _bits(leaf: Any) -> int:
    if isinstance(leaf, ShardedTensor):
        return 0
    if not isinstance(leaf, Tensor):
        return int.from_bytes(hashlib.blake2b(leaf.encode(), digest_size=7).digest())
    plain = leaf.detach()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    whole = plain.contiguous().view(_WIDTHS[plain.element_size()]).to(torch.int64).reshape(-1)
    # Squares as well, so that entries which trade places or differences are seen.
    mixed = whole * 0x9E3779B1 ^ (whole >> 7)
    places = torch.arange(1, whole.numel() + 1, device=whole.device)
    return (int((mixed * places).sum()) + whole.numel()) % 2**62


def _length(data: Sized) -> str:
    try:
        return str(len(data))
    except TypeError:  # a loader over an iterable dataset has none
        return "unknown"


def _whole(text: str, limit: int = 120) -> str:
    """Shortened, and known by all of it."""
    return text if len(text) <= limit else f"{_short(text, limit)} {told(text)}"


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else f"{text[: limit - 3]}..."

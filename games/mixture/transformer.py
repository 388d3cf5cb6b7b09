"""A small transformer on characters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from games.mixture.texts import PRINTABLE


class Block(nn.Module):
    """Attention to what came before, and a network for each place; both beside a path that leads past them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """`x: [batch, length, width]`, and so the result."""
        rows, length, width = x.shape
        parts = self.project(self.before(x)).reshape(rows, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        # The fused kernel, which has no second derivative: neither method here takes one.
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.join(seen.transpose(1, 2).reshape(rows, length, width))
        out: Tensor = x + self.inner(self.between(x))
        return out


class Transformer(nn.Module):
    """Scores of the next character for each place of a text."""

    def __init__(self, length: int, *, width: int = 48, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.length = length
        self.characters = nn.Embedding(len(PRINTABLE), width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.last, self.scores = nn.LayerNorm(width), nn.Linear(width, len(PRINTABLE))
        nn.init.normal_(self.characters.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        """`codes: [batch, length]` to `[batch, length, characters]`."""
        x = self.characters(codes) + self.places[: codes.shape[1]]
        out: Tensor = self.scores(self.last(self.blocks(x)))
        return out


def made(length: int, seed: int) -> Transformer:
    """One with initial weights of its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(length)

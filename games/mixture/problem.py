"""The game: the mixture moves for the held-out loss, the model follows on what the mixture weighs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import bilevel as bl
from games.mixture.texts import Source, drawn, windows
from games.mixture.transformer import Transformer, made

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Args:
        length: Characters that a piece of text has.
        each: Pieces of each source in a batch of the model's.
        held_out: Pieces of held-out text in a batch of the mixture's.
    """

    length: int = 32
    each: int = 4
    held_out: int = 12


def losses_by_source(model: Model, batch: Tensor) -> Tensor:
    """Mean cross-entropy a character of each source, `[sources]`, in nats; `batch: [sources, each, length + 1]`."""
    count, each, length = batch.shape
    flat = batch.reshape(count * each, length)
    scores = model(flat[:, :-1])
    lost = cross_entropy(scores.flatten(0, 1), flat[:, 1:].flatten(), reduction="none")
    return lost.reshape(count, -1).mean(1)


def held_out_loss(model: Model, batch: Tensor) -> Tensor:
    """The same of pieces `[pieces, length + 1]` together."""
    return losses_by_source(model, batch[None])[0]


def train_loss(model: Model, mixture: Tensor, batch: Tensor) -> Tensor:
    """What the model is trained on: each source by its share, softmax(mixture)."""
    return torch.softmax(mixture, 0) @ losses_by_source(model, batch)


def valid_loss(model: Model, batch: Tensor) -> Tensor:
    """What the mixture is for."""
    return held_out_loss(model, batch)


class Corpus:
    """The sources on a device, and batches of them."""

    def __init__(self, sources: Sequence[Source], sizes: Sizes, device: torch.device) -> None:
        self.sources, self.sizes, self.device = list(sources), sizes, device
        self.clean = [source for source in sources if not source.noise]

    def train(self) -> Tensor:
        """`[sources, each, length + 1]`, of what is trained on."""
        size = self.sizes
        return torch.stack([windows(s.train, size.each, size.length) for s in self.sources]).to(self.device)

    def held_out(self) -> Tensor:
        """`[pieces, length + 1]` of the clean sources' held-out text, as many of each."""
        each = self.sizes.held_out // len(self.clean)
        return torch.cat([windows(s.held_out, each, self.sizes.length) for s in self.clean]).to(self.device)

    def last_word(self, *, each: int = 400) -> Tensor:
        """Pieces `[pieces, length + 1]` that no run has seen, the same for all, by which models are compared."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12_345)
            return torch.cat([windows(s.test, each, self.sizes.length) for s in self.clean]).to(self.device)

    def model(self, seed: int) -> Transformer:
        """A fresh one."""
        return made(self.sizes.length, seed).to(self.device)

    def game(self, seed: int) -> bl.Game:
        """The mixture leads, at equal shares; the model follows."""
        start = torch.zeros(len(self.sources), device=self.device)
        return bl.Game(
            mixture=bl.Player(valid_loss, start, data=drawn(self.held_out)),
            model=bl.Player(train_loss, self.model(seed), data=drawn(self.train)),
        )


ADAM = partial(torch.optim.Adam, lr=3e-3)
"""What trains the model in every run."""

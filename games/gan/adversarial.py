"""A generator and a discriminator of your own as a game of two players, on samples of your own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

import bilevel as bl

LOSSES = ("non-saturating", "zero-sum", "relativistic")


@dataclass(frozen=True)
class Draws:
    """Endless minibatches (latents `[batch, latent]`, real examples): the same ones for both players in a step.

    `real(count, generator)` draws real examples. Each pass has `length` batches and starts from torch's own generator,
    which a checkpoint carries: a resumed run sees what the uninterrupted one would have seen.
    """

    real: Callable[[int, torch.Generator], Tensor]
    latent: int
    batch: int = 128
    length: int = 200

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass."""
        seed = int(torch.randint(2**31, ()))  # now, and not at the first batch: the pass is fixed when it starts

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(self.length):
                yield torch.randn(self.batch, self.latent, generator=generator), self.real(self.batch, generator)

        return batches()


def adversarial_game(
    generator: nn.Module,
    discriminator: nn.Module,
    data: Iterable[Any],
    *,
    loss: str = "non-saturating",
    penalty: float = 0.0,
) -> bl.Game:
    r"""A generator, from latents to examples, against a discriminator, from examples to logits `[n]` or `[n, 1]`.

        discriminator: E softplus(-D(real)) + E softplus(D(G(latents))) + penalty / 2  E |grad D(real)|^2
        generator:     E softplus(-D(G(latents)))    "non-saturating", Goodfellow et al. 2014 (arXiv 1406.2661)
                       minus the discriminator's     "zero-sum": its divergence, but little slope where it loses
        both:          E softplus(-+(D(real) - D(fake)))    "relativistic" pairs, Huang et al. 2024 (arXiv 2501.05441)

    `data` gives pairs (latents, real examples), anew at each iteration; both players see the same pair in a step. The
    penalty (R1, arXiv 1801.04406) is the discriminator's alone and makes the equilibrium attract. Costs one pass of
    each network for each player, and twice the discriminator's with a penalty.
    """
    if loss not in LOSSES:
        raise ValueError(f"adversarial_game: loss={loss!r}; expected one of {', '.join(LOSSES)}.")
    if not penalty >= 0.0:
        raise ValueError(f"adversarial_game: penalty={penalty}; expected a number >= 0.")

    def logits(variables: Any, examples: Tensor) -> Tensor:
        outputs: Tensor = functional_call(discriminator, variables, (examples,))
        return outputs.reshape(len(examples))

    def fooled(made: Any, judge: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return logits(judge, functional_call(generator, made, (batch[0],)))

    def judged(made: Any, judge: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return logits(judge, batch[1]), fooled(made, judge, batch)

    def discriminating(generator: Any, discriminator: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        real, fake = judged(generator, discriminator, batch)
        losses: Tensor = softplus(fake - real) if loss == "relativistic" else softplus(-real) + softplus(fake)
        if not penalty:
            return losses.mean()
        slope: Tensor = torch.func.grad(lambda x: logits(discriminator, x).sum())(batch[1])
        return losses.mean() + 0.5 * penalty * slope.square().flatten(1).sum(1).mean()

    def generating(generator: Any, discriminator: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        if loss == "non-saturating":  # which real examples do not enter
            return softplus(-fooled(generator, discriminator, batch)).mean()
        real, fake = judged(generator, discriminator, batch)
        return softplus(real - fake).mean() if loss == "relativistic" else -(softplus(-real) + softplus(fake)).mean()

    return bl.Game(
        generator=bl.Player(generating, generator, data), discriminator=bl.Player(discriminating, discriminator, data)
    )


def perceptron(sizes: list[int], *, last: nn.Module | None = None) -> nn.Sequential:
    """Linear layers of these sizes with ReLUs between them, and `last` after them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1], *([last] if last else []))

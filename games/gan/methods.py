"""The ways in which the discriminator follows, each made from the same settings, so that all are tuned alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import bilevel as bl
from bilevel.tree import Variables

BETAS = (0.0, 0.99)
"""Adam's, for everybody: a memory of gradients past makes players circle."""


@dataclass(frozen=True)
class Setting:
    """What is tuned, for every method on the same grid: Adam's rate for the generator, the discriminator's as a

    multiple of it, and the generator's loss.
    """

    rate: float
    ratio: float
    loss: str

    @property
    def generator(self) -> Callable[..., torch.optim.Optimizer]:
        """The generator's optimiser."""
        return partial(torch.optim.Adam, lr=self.rate, betas=BETAS)

    @property
    def discriminator(self) -> Callable[..., torch.optim.Optimizer]:
        """The discriminator's optimiser, or its response's."""
        return partial(torch.optim.Adam, lr=self.rate * self.ratio, betas=BETAS)


SETTINGS = tuple(Setting(*chosen) for chosen in product((1e-3, 4e-3), (1.0, 4.0), ("non-saturating", "zero-sum")))


@dataclass(frozen=True)
class Method:
    """`options(setting, generator, latent, spread)` gives `bl.solve`'s options for a game of `adversarial_game`.

    `spread` is about how far examples are from 0.
    """

    name: str
    about: str
    options: Callable[[Setting, nn.Module, int, float], dict[str, Any]]


def _both(setting: Setting) -> dict[str, Any]:
    return {"generator": setting.generator, "discriminator": setting.discriminator}


def _simultaneous(setting: Setting, generator: nn.Module, latent: int, spread: float) -> dict[str, Any]:
    return {"optimizer": _both(setting)}


def _alternating(setting: Setting, generator: nn.Module, latent: int, spread: float) -> dict[str, Any]:
    return {"optimizer": _both(setting), "dynamics": bl.dynamics.Alternating()}


def _competitive(setting: Setting, generator: nn.Module, latent: int, spread: float) -> dict[str, Any]:
    solver = bl.GMRES(max_steps=2, rtol=1e-9)
    return {"optimizer": _both(setting), "dynamics": bl.dynamics.Competitive(setting.rate, linear_solver=solver)}


def _unrolled(steps: int, setting: Setting, generator: nn.Module, latent: int, spread: float) -> dict[str, Any]:
    return {"optimizer": setting.generator, "discriminator": bl.Unrolled(setting.discriminator, steps=steps)}


def _implicit(setting: Setting, generator: nn.Module, latent: int, spread: float) -> dict[str, Any]:
    # A discriminator's loss is not convex in its weights: GMRES takes the sign that comes, damping keeps it small.
    solver = bl.GMRES(max_steps=3, rtol=1e-9, damping=1.0)
    response = bl.Implicit(setting.discriminator, steps=3, tolerance=None, linear_solver=solver)
    return {"optimizer": setting.generator, "discriminator": response}


def _learned(setting: Setting, generator: nn.Module, latent: int, spread: float) -> dict[str, Any]:
    response = bl.Hypernetwork(
        setting.discriminator,
        scale=NOISE,
        network=bl.networks.Uncentred(partial(SampleSummary, generator, latent, spread=spread)),
        sampler=bl.responses.Draws(_nearby),
        tolerance=None,
    )
    return {"optimizer": setting.generator, "discriminator": response}


METHODS = {
    method.name: method
    for method in (
        Method("simultaneous", "the discriminator stands still", _simultaneous),
        Method("alternating", "it moves first, and stands still", _alternating),
        Method("competitive", "both at the equilibrium of their local bilinear game", _competitive),
        Method("unrolled 1", "one Adam step of it, differentiated", partial(_unrolled, 1)),
        Method("unrolled 5", "five Adam steps of it, differentiated", partial(_unrolled, 5)),
        Method("implicit", "three Adam steps, and the implicit function theorem", _implicit),
        Method("learned", "a hypernetwork from a summary of the generator to it", _learned),
    )
}

FINALISTS: dict[str, tuple[int, int]] = {
    "simultaneous": (6, 1),
    "alternating": (6, 1),
    "competitive": (0, 1),
    "unrolled 1": (6, 1),
    "unrolled 5": (2, 1),
    "implicit": (6, 1),
    "learned": (0, 1),
}
"""For each method, which setting of each loss `bilevel gan tuning` found best: non-saturating, then zero-sum."""

TUNED: dict[str, Setting] = {method: SETTINGS[number] for method, (_, number) in FINALISTS.items()}
"""Which of the two `bilevel gan finals` found best in longer runs: for every method the zero-sum loss."""

NOISE = 0.003
"""Standard deviation of the generator's weights around its present ones, where the learned discriminator is fitted."""


def _nearby(others: Mapping[str, Variables], generator: torch.Generator) -> dict[str, Variables]:
    made: dict[str, Tensor] = others["generator"]
    return {"generator": {n: p + NOISE * torch.randn(p.shape, generator=generator) for n, p in made.items()}}


class SampleSummary(nn.Module):
    r"""From a generator's weights to the shift of a discriminator's: the best response as a function of the samples.

    A discriminator answers what is generated, whatever weights generate it. So the map goes through a summary that
    ten thousand weights have in common, the mean of `features` random Fourier features of G(fixed latents) / spread,
    and one hidden layer: [inputs] -> [features] -> [hidden] -> [outputs], for leading dimensions of any kind. The last
    layer starts at 0.
    """

    def __init__(
        self,
        generator: nn.Module,
        latent: int,
        inputs: int,
        outputs: int,
        *,
        spread: float = 1.0,
        features: int = 32,
        hidden: int = 32,
    ) -> None:
        super().__init__()
        # Held out of the module's own parameters: only its form is used, its weights are the input.
        self._form = (generator,)
        self._names = {name: p.shape for name, p in generator.named_parameters()}
        self._unit = NOISE * inputs**0.5
        fixed = torch.Generator().manual_seed(0)
        latents = torch.randn(64, latent, generator=fixed)
        with torch.no_grad():
            size = generator(latents).shape[1]
        self.register_buffer("latents", latents)
        frequencies = (8.0 / size) ** 0.5 / spread * torch.randn(size, features, generator=fixed)
        self.register_buffer("frequencies", frequencies)
        self.register_buffer("phases", 6.2831853 * torch.rand(features, generator=fixed))
        self.hidden = nn.Linear(features, hidden)
        self.last = nn.Linear(hidden, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """The shift `[..., outputs]` at inputs `[..., n]` in units of the response's scale."""
        if inputs.ndim > 1:
            return torch.func.vmap(self.forward)(inputs)
        pieces = (inputs * self._unit).split([shape.numel() for shape in self._names.values()])
        weights = {n: piece.view(s) for (n, s), piece in zip(self._names.items(), pieces, strict=True)}
        samples = functional_call(self._form[0], weights, (self.latents,))
        summary = torch.cos(samples @ self.frequencies + self.phases).mean(-2)
        return self.last(torch.tanh(self.hidden(2.0 * summary)))  # type: ignore[no-any-return]

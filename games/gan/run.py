"""One run of a generator against a discriminator by one method, for a given amount of work."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import bilevel as bl
from games.experiments.data import DigitSource
from games.experiments.experiment import Result, Results
from games.gan.adversarial import Draws, adversarial_game, perceptron
from games.gan.methods import METHODS, Setting
from games.gan.mixtures import Mixture, grid, ring

AVERAGING = 0.995
"""Share of the averaged generator that a step keeps: samples come from weights averaged over some 200 steps."""

LATENT, WIDTH = 2, 128


def mixtures() -> dict[str, Mixture]:
    """By the names that runs have."""
    return {"ring": ring(), "grid": grid()}


def run_method(
    game: bl.Game,
    method: str,
    setting: Setting,
    generator: nn.Module,
    latent: int,
    *,
    evaluations: int,
    seed: int,
    moments: int,
    spread: float = 1.0,
    measure: Callable[[dict[str, Tensor]], Result],
) -> list[Result]:
    """Play by `method` for `evaluations` gradients and products, and measure the generator at `moments` times.

    `measure` gets the averaged weights of the generator. `spread` is about how far examples are from 0.
    Each entry is what `measure` returned with its `work`, `seconds` (the processor's, measuring included) and `step`.
    The generator's rate, and the discriminator's where it leads too, falls to 0 along a cosine. A run that fails keeps
    what it had: its last entry has `failure`.
    """
    options = METHODS[method].options(setting, generator, latent, spread)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.BilevelWarning)  # responses to one minibatch are rough; the samples tell
        first = bl.solve(game, steps=3, seed=seed, **options).history
        steps = max(1, int(evaluations // (first[2]["work"] - first[1]["work"])))
        when = {max(1, round(steps * (i + 1) / moments)) for i in range(moments)}
        averaged: dict[str, Tensor] = {}
        measurements: list[Result] = []
        began = time.process_time()  # of which neighbours on the machine take nothing

        def step(number: int, record: Mapping[str, float], variables: Mapping[str, Any]) -> None:
            for name, weight in variables["generator"].items():
                now = weight.detach()
                averaged[name] = averaged[name].lerp(now, 1.0 - AVERAGING) if name in averaged else now.clone()
            if number in when:
                spent = time.process_time() - began
                measurements.append(
                    {"step": number, "work": record["work"], "seconds": spent, **measure(dict(averaged))}
                )

        cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=steps)
        try:
            bl.solve(game, steps=steps, seed=seed, scheduler=cosine, callbacks=[step], **options)
        except bl.BilevelError as error:
            measurements.append({"failure": f"{type(error).__name__}: {error}"})
    return measurements


def mixture_run(
    source: DigitSource,
    *,
    mixture: str,
    method: str,
    rate: float,
    ratio: float,
    loss: str,
    seed: int,
    evaluations: int,
    moments: int = 10,
    keep_samples: bool = False,
) -> Result:
    """One generator on one mixture: `moments` `[{step, work, seconds, modes, high_quality, ...}]`."""
    wanted = mixtures()[mixture]
    torch.manual_seed(seed)
    radius = float(wanted.centres.norm(dim=1).max())
    generator = nn.Sequential(perceptron([LATENT, WIDTH, WIDTH, 2]), _Scaled(radius))
    discriminator = nn.Sequential(_Scaled(1.0 / radius), perceptron([2, WIDTH, WIDTH, 1]))
    game = adversarial_game(generator, discriminator, Draws(wanted.sample, LATENT), loss=loss)
    latents = torch.randn(2500, LATENT, generator=torch.Generator().manual_seed(10_000 + seed))

    def measure(weights: dict[str, Tensor]) -> Result:
        with torch.no_grad():
            samples = functional_call(generator, weights, (latents,))
        quality = wanted.quality(samples)
        measured: Result = {
            "modes": quality.modes,
            "high_quality": quality.high_quality,
            "reverse_kl": quality.reverse_kl,
            "covariance_ratio": quality.covariance_ratio,
        }
        return measured | ({"samples": samples[:500]} if keep_samples else {})

    measurements = run_method(
        game,
        method,
        Setting(rate, ratio, loss),
        generator,
        LATENT,
        evaluations=evaluations,
        seed=seed,
        moments=moments,
        spread=radius,
        measure=measure,
    )
    return {"moments": measurements}


class _Scaled(nn.Module):
    """Multiplies by a constant, so that networks see numbers of size one whatever the mixture's size."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        return self.factor * inputs


def final_quality(result: Result) -> Result:
    """How good the samples of a mixture's run were at its end; the worst of all numbers where it failed at once."""
    nothing = {"modes": 0, "high_quality": 0.0, "reverse_kl": math.inf, "covariance_ratio": math.nan, "seconds": 0.0}
    return final_moment(result) or nothing


def final_moment(result: Result) -> Result | None:
    """A run's last measurement of its generator, if it had one."""
    whole = [moment for moment in result["moments"] if "failure" not in moment]
    return whole[-1] if whole else None


def by_method(results: Results) -> dict[str, list[Result]]:
    """The runs of each method, by seed."""
    found: dict[str, list[Result]] = {}
    for name, result in results.items():
        found.setdefault(name.rpartition("-")[0], []).append(result)
    return found

"""The experiments of `bilevel gan`, in parts that run side by side."""

from __future__ import annotations

from games.experiments.experiment import Experiment
from games.gan.image_experiment import image_experiment
from games.gan.methods import FINALISTS, METHODS, SETTINGS
from games.gan.mixture_experiment import mixture_experiment
from games.gan.tuning_experiment import tuning_experiment


def experiments(
    *, seeds: int = 10, evaluations: int = 40_000, methods: tuple[str, ...] = tuple(METHODS)
) -> dict[str, Experiment]:
    """All of them by name; tuning is on seeds that the others do not use.

    Images are tried on 3 seeds at most, with a quarter of the evaluations for digits and an eighth for mnist.
    """
    found = [
        tuning_experiment("tuning", {method: tuple(range(len(SETTINGS))) for method in methods}, evaluations=8_000),
        tuning_experiment("finals", {method: FINALISTS[method] for method in methods}, evaluations=30_000),
        *(mixture_experiment(name, methods, seeds=seeds, evaluations=evaluations) for name in ("ring", "grid")),
        *(
            image_experiment(name, methods, seeds=min(seeds, 3), evaluations=-(-evaluations // share))
            for name, share in (("digits", 4), ("mnist", 8))
        ),
    ]
    return {experiment.name: experiment for experiment in found}

"""The search as a sampler of Optuna's, and what an objective of Optuna's needs from here. Needs `bilevel[optuna]`."""

from __future__ import annotations

import json
import math
import random
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from bilevel.constraints import Choice, Coordinate, Interval, Log
from bilevel.search._search import GradientSearch, State
from bilevel.search.process import ADDITIVE
from bilevel.search.space import Space

try:
    import optuna
except ImportError as error:
    raise ImportError("bilevel.search.optuna needs Optuna. Install it: pip install 'bilevel[optuna]'.") from error

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.search_space import intersection_search_space
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

GRADIENT, ASKED = "gradient:", "bilevel:asked:"
"""Beginnings of the attributes that hold a slope, and a value that a running trial was given, each under its name."""


def report_gradient(trial: Trial, gradient: Mapping[str, float | Tensor]) -> None:
    """Tell `GradientSampler` the slope of a trial's value in some or all of its numbers.

    The slopes are those of what the objective returns, also when it is maximised, in the numbers as they were
    suggested, with `log=True` too. They are kept as attributes of the trial, `"gradient:decay"`, in whatever storage
    the study has. One that is NaN or infinite counts as not seen. Other samplers take no notice.

    Raises `ValueError` for a name that the trial did not suggest, a category, or more than one number.

    >>> study = optuna.create_study(sampler=GradientSampler(seed=0))
    >>> trial = study.ask()
    >>> decay = trial.suggest_float("decay", 1e-6, 1e-2, log=True)
    >>> report_gradient(trial, {"decay": -3.0})
    >>> trial.user_attrs
    {'gradient:decay': -3.0}
    """
    for name, slope in gradient.items():
        if name not in trial.params:
            raise ValueError(
                f"report_gradient: trial {trial.number} has no {name!r}; it has suggested {sorted(trial.params)}."
            )
        if isinstance(trial.distributions[name], CategoricalDistribution):
            raise ValueError(f"report_gradient: {name!r} is one of several categories and has no slope. Leave it out.")
        if isinstance(slope, Tensor) and slope.numel() != 1:
            raise ValueError(f"report_gradient: the slope in {name!r} has shape {list(slope.shape)}; expected [].")
        if math.isfinite(float(slope)):
            trial.set_user_attr(GRADIENT + name, float(slope))


@final
class GradientSampler(optuna.samplers.BaseSampler):
    """`GradientSearch` as a sampler of an Optuna study: trials that report gradients need fewer of them.

    An objective hands its hypergradient over by `report_gradient(trial, {...})`; a trial without one counts by its
    value alone. Floats, integers, steps, `log=True` and categories are all in the model. Trials that run side by side
    (`n_jobs`, several processes on one storage) keep away from each other. Failed and pruned trials count as the worst
    that was seen: the sampler has no other way to learn that a place is bad.

    What is suggested follows from the seed and the trials in the storage: a study goes on in a new process, with the
    same seed, as it would have in the old one. The first trial is in the middle of the ranges, with the first of the
    categories; `study.enqueue_trial` starts elsewhere. A name that not all trials have, in one range, is sampled by
    itself, as Optuna's own relative samplers do.

    A suggestion costs what `GradientSearch` tells.

    Args:
        evaluations: How many trials are planned: by then the trust region has its last size.
        radius: As in `GradientSearch`.
        cap: As there; in a study that maximises, values below it.
        slope_cap: As there.
        additive: As there.
        seed: Of the random candidates; default: another one in each process.
        independent_sampler: For names that not all trials have; default: uniform draws.

    Raises:
        ValueError, TypeError: For settings that `GradientSearch` refuses; in a study with several objectives.

    Examples:
        >>> import torch
        >>> def objective(trial):
        ...     x = torch.tensor(trial.suggest_float("x", -2.0, 2.0), requires_grad=True)
        ...     loss = (x - 1.0) ** 2
        ...     report_gradient(trial, {"x": torch.autograd.grad(loss, x)[0]})
        ...     return loss.item()
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> study = optuna.create_study(sampler=GradientSampler(evaluations=6, seed=0))
        >>> study.optimize(objective, n_trials=6)
        >>> round(study.best_params["x"], 2)
        1.0
    """

    def __init__(
        self,
        *,
        evaluations: int = 20,
        radius: tuple[float, float] = (0.3, 0.1),
        cap: float | None = None,
        slope_cap: float | None = None,
        additive: tuple[float, ...] = ADDITIVE,
        seed: int | None = None,
        independent_sampler: optuna.samplers.BaseSampler | None = None,
    ) -> None:
        self._options: dict[str, Any] = {
            "evaluations": evaluations,
            "radius": radius,
            "cap": cap,
            "slope_cap": slope_cap,
            "additive": additive,
        }
        GradientSearch({"any": Interval(0.0, 1.0)}, **self._options)  # refuses what it refuses
        self._seed = secrets.randbits(31) if seed is None else seed
        self._independent = independent_sampler
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def reseed_rng(self) -> None:
        """A trial's number is part of its seed: workers differ already."""
        if self._independent is not None:
            self._independent.reseed_rng()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """What all completed trials have, in one range."""
        self._raise_error_if_multi_objective(study)
        completed = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        return {name: kind for name, kind in intersection_search_space(completed).items() if not kind.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The next point of the search."""
        if not search_space:
            return {}
        parameters = {name: _parameter(kind) for name, kind in search_space.items()}
        options = dict(self._options)
        if options["cap"] is not None:
            options["cap"] = _sign(study) * options["cap"]
        search = GradientSearch({name: parameter.kind for name, parameter in parameters.items()}, **options)
        # One thread after the other: each sees what the last one was given.
        with self._lock:
            state = _told(search, study, trial, parameters, search.init(self._seed))
            (point,), _ = search.ask({**state, "asked": trial.number})
            found = {name: parameters[name].suggested(value) for name, value in point.items()}
            for name, value in found.items():
                # What a trial is given is seen by others once its objective asks for it, one name at a time.
                study._storage.set_trial_system_attr(trial._trial_id, ASKED + name, json.dumps(value))
        return found

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """The middle in the first trial; then a draw of its own."""
        self._raise_error_if_multi_objective(study)
        if self._independent is not None and trial.number > 0:
            return self._independent.sample_independent(study, trial, param_name, param_distribution)
        parameter = _parameter(param_distribution)
        space = Space({param_name: parameter.kind})
        place = space.start
        if trial.number > 0:
            share = random.Random(f"{self._seed} {trial.number} {param_name}").random()
            place = space.drawn(place.new_tensor([share]))
        return parameter.suggested(space.values(place)[param_name])

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """As the sampler for names of their own has it."""
        if self._independent is not None:
            self._independent.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """As the sampler for names of their own has it."""
        if self._independent is not None:
            self._independent.after_trial(study, trial, state, values)


class Pruning:
    """A callback of `tune` and `solve` that lets Optuna's pruner stop a trial: it reports a number of the history.

    Args:
        trial: The trial.
        key: Which number: by default the leader's loss of `tune`, on the validation data.

    Raises:
        ValueError: In the run, for a key that the history does not have.
        optuna.TrialPruned: Where the pruner says so.
    """

    def __init__(self, trial: Trial, *, key: str = "hyper") -> None:
        self.trial, self.key = trial, key

    def __call__(self, step: int, record: Mapping[str, float], variables: Mapping[str, Any]) -> None:
        """Look at a step."""
        if self.key not in record:
            raise ValueError(f"Pruning: the history has no {self.key!r}; it has {sorted(record)}.")
        self.trial.report(record[self.key], step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


@dataclass(frozen=True)
class _Parameter:
    """What is searched in the place of one of Optuna's: a category's rank, or a number z of `low + step * z`."""

    distribution: BaseDistribution
    kind: Coordinate | Choice
    low: float = 0.0
    step: float = 1.0

    def suggested(self, z: Any) -> Any:
        """Optuna's value of a searched one."""
        if isinstance(self.distribution, CategoricalDistribution):
            return self.distribution.choices[z]
        value = self.low + self.step * z
        return round(value) if isinstance(self.distribution, IntDistribution) else value

    def searched(self, value: Any) -> Any:
        """The searched value of one of Optuna's."""
        z = (self.distribution.to_internal_repr(value) - self.low) / self.step
        return round(z) if isinstance(self.kind, Choice) else z


def _parameter(kind: BaseDistribution) -> _Parameter:
    if isinstance(kind, CategoricalDistribution):
        return _Parameter(kind, Choice(range(len(kind.choices)), ordered=False))
    if not isinstance(kind, FloatDistribution | IntDistribution):
        raise TypeError(f"GradientSampler: {kind!r}; expected a float, an integer or a category.")
    if isinstance(kind, IntDistribution) and kind.log:
        return _Parameter(kind, Choice(range(kind.low, kind.high + 1), log=True))
    if kind.step is not None:
        count = round((kind.high - kind.low) / kind.step) + 1
        return _Parameter(kind, Choice(range(count)), kind.low, kind.step)
    return _Parameter(kind, Log(kind.low, kind.high) if kind.log else Interval(kind.low, kind.high))


def _told(
    search: GradientSearch, study: Study, trial: FrozenTrial, parameters: Mapping[str, _Parameter], state: State
) -> State:
    """The state that knows the other trials of the study, as far as these have all that is searched."""
    sign = _sign(study)
    states = (TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED, TrialState.RUNNING)
    for other in study.get_trials(deepcopy=False, states=states):
        given = _given(other)
        if other.number == trial.number or not parameters.keys() <= given.keys():
            continue
        point = {name: parameter.searched(given[name]) for name, parameter in parameters.items()}
        if other.state == TrialState.RUNNING:
            state = search.expect(state, point)
            continue
        if other.state != TrialState.COMPLETE:
            state = search.tell(state, point, math.nan)
            continue
        slopes = {
            name: sign * other.user_attrs[GRADIENT + name] * parameter.step
            for name, parameter in parameters.items()
            if GRADIENT + name in other.user_attrs
        }
        state = search.tell(state, point, sign * float(other.values[0]), slopes)
    return state


def _sign(study: Study) -> float:
    return 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0


def _given(trial: FrozenTrial) -> dict[str, Any]:
    """The values of a trial; of one that runs also those that its objective has not asked for yet."""
    asked = {
        key.removeprefix(ASKED): json.loads(value) for key, value in trial.system_attrs.items() if key.startswith(ASKED)
    }
    fixed = trial.system_attrs.get("fixed_params", {})
    return {**asked, **fixed, **trial.params}

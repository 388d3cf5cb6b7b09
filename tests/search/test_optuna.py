"""The search as Optuna's sampler: told what trials report, it resumes from a storage, and trials run side by side."""

import math
import pickle

import pytest
import torch

import bilevel as bl
from bilevel.search import GradientSearch

optuna = pytest.importorskip("optuna")
from bilevel.search.optuna import GradientSampler, Pruning, report_gradient  # noqa: E402

optuna.logging.set_verbosity(optuna.logging.WARNING)
OFFSETS = {"a": 0.4, "b": 0.0, "c": 0.9}


def suggested(trial):
    return {
        "x": trial.suggest_float("x", -2.0, 2.0),
        "rate": trial.suggest_float("rate", 1e-4, 1.0, log=True),
        "layers": trial.suggest_int("layers", 1, 8),
        "kind": trial.suggest_categorical("kind", ["a", "b", "c"]),
    }


def value(x, rate, layers, kind):
    """Least, 0, at x = -1, a rate of 0.01, 3 layers, kind b."""
    return (x + 1) ** 2 + (rate.log() - math.log(0.01)) ** 2 / 10 + 0.05 * (layers - 3) ** 2 + OFFSETS[kind]


def objective(trial, sign=1.0, report=True):
    point = suggested(trial)
    given = {n: torch.tensor(point[n], dtype=torch.float64, requires_grad=True) for n in ("x", "rate")}
    loss = sign * value(**(point | given))
    if report:
        report_gradient(trial, dict(zip(given, torch.autograd.grad(loss, list(given.values())), strict=True)))
    return loss.item()


def study_of(seed=0, evaluations=18, **options):
    return optuna.create_study(sampler=GradientSampler(seed=seed, evaluations=evaluations), **options)


def test_it_finds_numbers_integers_and_categories_in_either_direction():
    study = study_of()
    study.optimize(objective, n_trials=18)
    assert (study.best_params["layers"], study.best_params["kind"]) == (3, "b")
    assert study.best_value < 1e-2
    # The first trial is in the middle.
    assert study.trials[0].params == {"x": 0.0, "rate": pytest.approx(1e-2), "layers": 4, "kind": "a"}
    upwards = study_of(direction="maximize")
    upwards.optimize(lambda trial: objective(trial, sign=-1.0), n_trials=18)
    # The same losses and slopes, up to their sign, and so the same proposals.
    assert [-trial.value for trial in upwards.trials] == [trial.value for trial in study.trials]


def test_what_it_suggests_is_what_the_search_would_ask():
    study = study_of(seed=3)
    study.optimize(objective, n_trials=4)
    space = {
        "kind": bl.Choice([0, 1, 2], ordered=False),  # Optuna sorts a space by name
        "layers": bl.Choice(range(1, 9)),
        "rate": bl.Log(1e-4, 1.0),
        "x": bl.Interval(-2.0, 2.0),
    }
    search = GradientSearch(space, evaluations=18)
    state = search.init(3)
    for trial in study.trials:
        gradient = {name: trial.user_attrs[f"gradient:{name}"] for name in ("x", "rate")}
        point = trial.params | {"kind": "abc".index(trial.params["kind"])}
        state = search.tell(state, point, trial.value, gradient)
    (wanted,), _ = search.ask({**state, "asked": 4})
    found = suggested(study.ask())
    assert found == wanted | {"kind": "abc"[wanted["kind"]]}


def test_without_gradients_it_goes_by_values():
    study = study_of(evaluations=30)
    study.optimize(lambda trial: objective(trial, report=False), n_trials=12)
    assert not any(trial.user_attrs for trial in study.trials)
    # It does better than the middle, where it began: 1 for x, 0.05 for the layers, 0.4 for the kind.
    assert study.best_value < 1.0


def test_it_goes_on_in_a_new_process_as_it_would_have(tmp_path):
    whole = study_of(seed=5)
    whole.optimize(objective, n_trials=8)
    storage = f"sqlite:///{tmp_path}/trials.db"
    study_of(seed=5, study_name="s", storage=storage).optimize(objective, n_trials=3)
    again = optuna.load_study(study_name="s", storage=storage, sampler=GradientSampler(seed=5, evaluations=18))
    again.optimize(objective, n_trials=5)
    assert [trial.params for trial in again.trials] == [trial.params for trial in whole.trials]


def test_trials_side_by_side_keep_away_from_each_other():
    study = study_of()
    study.optimize(objective, n_trials=3)
    points = [suggested(study.ask()) for _ in range(3)]
    assert len({(point["x"], point["rate"], point["layers"], point["kind"]) for point in points}) == 3
    # One that has not asked for all of its values yet is waited for at all of them.
    study = study_of()
    study.optimize(objective, n_trials=3)
    half, whole = study.ask(), study.ask()
    half.suggest_float("x", -2.0, 2.0)
    second = suggested(whole)
    assert second != suggested(half)
    assert len(study.trials) == 5


def test_threads():
    study = study_of()
    study.optimize(objective, n_trials=8, n_jobs=2)
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 8


def test_trials_that_failed_were_pruned_or_enqueued():
    study = study_of()
    study.enqueue_trial({"x": 1.5, "rate": 0.5, "layers": 8, "kind": "c"})

    def broken(trial):
        loss = objective(trial)
        if trial.number == 1:
            raise optuna.TrialPruned
        return math.nan if trial.number == 2 else loss

    study.optimize(broken, n_trials=6)
    assert study.trials[0].params["kind"] == "c"
    assert study.trials[0].params["x"] == 1.5
    # A mean that knew nothing of a failure would be least there again.
    assert len({tuple(trial.params.items()) for trial in study.trials}) == 6


def test_steps_logarithmic_integers_single_values_and_names_of_some_trials():
    def conditional(trial):
        x = trial.suggest_float("x", 0.0, 1.0, step=0.25)
        width = trial.suggest_int("width", 4, 4096, log=True)
        even = trial.suggest_int("even", 2, 8, step=2)
        trial.suggest_categorical("only", ["one"])
        trial.suggest_float("point", 2.0, 2.0)
        report_gradient(trial, {"x": 2.0 * (x - 0.5)})
        if trial.number % 2:
            trial.suggest_float("momentum", 0.0, 0.9)
        return (x - 0.5) ** 2 + (math.log(width) - math.log(64)) ** 2 / 10 + (even - 4) ** 2 / 10

    study = study_of(evaluations=16)
    study.optimize(conditional, n_trials=16)
    for trial in study.trials:
        assert trial.params["x"] in (0.0, 0.25, 0.5, 0.75, 1.0)
        assert trial.params["even"] in (2, 4, 6, 8)
        assert isinstance(trial.params["width"], int)
    assert (study.best_params["x"], study.best_params["even"]) == (0.5, 4)
    drawn = [trial.params["momentum"] for trial in study.trials if "momentum" in trial.params]
    assert len(set(drawn)) == 8


def test_what_is_wrong_is_refused():
    study = study_of()
    trial = study.ask()
    suggested(trial)
    with pytest.raises(ValueError, match="trial 0 has no 'width'"):
        report_gradient(trial, {"width": 1.0})
    with pytest.raises(ValueError, match="'kind' is one of several categories"):
        report_gradient(trial, {"kind": 1.0})
    with pytest.raises(ValueError, match=r"the slope in 'x' has shape \[2\]"):
        report_gradient(trial, {"x": torch.zeros(2)})
    report_gradient(trial, {"x": math.nan})
    assert trial.user_attrs == {}
    with pytest.raises(ValueError, match="evaluations=0"):
        GradientSampler(evaluations=0)
    both = optuna.create_study(sampler=GradientSampler(), directions=["minimize", "maximize"])
    with pytest.raises(ValueError, match="multi-objective"):
        both.ask().suggest_float("x", 0.0, 1.0)


def test_a_sampler_is_pickled():
    study = study_of()
    study.optimize(objective, n_trials=2)
    sampler = pickle.loads(pickle.dumps(study.sampler))
    other = study_of()
    other.add_trials(study.trials)
    other.sampler = sampler
    assert suggested(other.ask()) == suggested(study.ask())


def test_a_study_of_tuning_runs_prunes_and_chooses_the_width():
    """The way back: Optuna takes what has no derivative, each trial tunes the rest while it trains."""
    torch.manual_seed(0)
    inputs = torch.randn(60, 3)
    targets = torch.sin(2 * inputs[:, :1])
    data = [(inputs[:30], targets[:30])], [(inputs[30:], targets[30:])]

    def valid(weights, batch):
        return (weights(batch[0]) - batch[1]).square().mean()

    def train(weights, decay, batch):
        return valid(weights, batch) + bl.penalty(weights, decay)

    def tuned(trial):
        torch.manual_seed(0)
        width = trial.suggest_categorical("width", [1, 16])
        model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
        result = bl.tune(
            model, train, valid, *data, hyper={"decay": bl.Log(1e-6, 1.0)},
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=2e-2), steps=100, callbacks=[Pruning(trial)],
            check=0.0,
        )  # fmt: skip
        reported.append(len(result.history))
        return result.history[-1]["hyper"]

    reported = []
    pruner = optuna.pruners.ThresholdPruner(upper=10.0)
    study = optuna.create_study(sampler=GradientSampler(seed=0), pruner=pruner)
    study.optimize(tuned, n_trials=2)
    assert {trial.params["width"] for trial in study.trials} == {1, 16}
    assert [len(trial.intermediate_values) for trial in study.trials] == reported
    study.pruner = optuna.pruners.ThresholdPruner(upper=-1.0)
    study.optimize(tuned, n_trials=1)
    assert study.trials[-1].state == optuna.trial.TrialState.PRUNED
    with pytest.raises(ValueError, match="the history has no 'loss'"):
        Pruning(study.ask(), key="loss")(0, {"hyper": 1.0}, {})

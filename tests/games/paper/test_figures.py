"""Figures 2, 4, 5 and the many penalties: from short runs of their real parts to a picture and a line."""

import warnings

import pytest
import torch

import bilevel as bl
from games.experiments.data import DigitSource
from games.experiments.store import as_json
from games.paper import figure2, figure4, figure5, many
from games.paper.catalogue import experiments
from games.paper.converged import cross_validated, evenly_spaced

SOURCE = DigitSource()


@pytest.fixture(autouse=True)
def short_runs_do_not_converge():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.BilevelWarning)
        yield


def test_figure_2_compares_a_learned_curve_with_cross_validation():
    truth = as_json(cross_validated(SOURCE, values=figure2.CROSSES, seed=0))
    assert max(truth["stationarity"]) <= 1e-5 and truth["best"] in truth["values"]
    found = as_json(figure2.learned(SOURCE, seed=0, fits=30, steps=2))
    numbers = figure2.agreement(truth, found)
    assert -1 <= numbers["rank"] <= 1 and 0 <= numbers["steps_off"] <= 10 and numbers["gap"] > 0
    # A curve compared with itself is right in every number, and one turned around is wrong in every one.
    assert figure2.agreement(truth, {"crosses": truth["valid"]}) == {
        "rank": pytest.approx(1.0),
        "steps_off": 0,
        "gap": 0.0,
        "span": numbers["span"],
    }
    assert figure2.agreement(truth, {"crosses": [-v for v in truth["valid"]]})["rank"] == pytest.approx(-1.0)
    results = {f"cross-validation, seed {s}": truth for s in figure2.SEEDS}
    results |= {f"hypernetwork, seed {s}": found for s in figure2.SEEDS}
    assert len(figure2.draw(results).axes) == 3
    assert f"worst gap {numbers['gap']:.3f}" in figure2.summarize(results)


def test_figure_4_measures_errors_near_and_far():
    truth = {"values": [0.0, 1.0, 2.0], "valid": [3.0, 1.0, 2.0], "train": [0.0, 1.0, 2.0], "best": 1.0}
    found = {"values": truth["values"], "valid": [3.5, 1.25, 2.125], "train": [0.0, 1.0, 2.0], "end": 1.2}
    assert figure4.errors(truth, found) == (0.25, 0.5)
    assert figure4.errors(truth, found | {"end": 0.2}) == (0.5, 0.125)


@pytest.mark.slow
def test_figure_4_runs_with_and_without_noise():
    results = {"cross-validation": as_json(cross_validated(SOURCE, values=figure4.VALUES[::10], seed=0))}
    for name in ("perturbed", "noiseless"):
        for start in figure4.STARTS:
            found = figure4.joint(SOURCE, start=start, noisy=name == "perturbed", steps=2, seed=0)
            found |= {"valid": found["valid"][::10], "train": found["train"][::10], "values": found["values"][::10]}
            assert abs(found["end"] - start) <= 0.03
            results[f"{name} from {start:g}"] = as_json(found)
    assert len(figure4.draw(results).axes) == 8
    assert f"perturbed from -1 ends at {results['perturbed from -1']['end']:.2f}" in figure4.summarize(results)


def test_figure_5_predicts_held_out_losses():
    data = figure5.truth(SOURCE, seed=0, known=6, held=5)
    assert data["held"]["stationarity"] < 1e-9
    assert not torch.equal(data["known"]["decay"][0], data["held"]["decay"][0])
    small = {"seed": 0, "known": 6, "held": 5}
    process, fixed, fresh = figure5.METHODS
    runs = {
        process: as_json(figure5.gaussian_process(SOURCE, **small)),
        fixed: as_json(figure5.hypernetwork(SOURCE, fits=5, fresh=False, **small)),
        fresh: as_json(figure5.hypernetwork(SOURCE, fits=5, fresh=True, **small)),
    }
    assert all(run["true"] == as_json(data["held"]["valid"]) and len(run["predicted"]) == 5 for run in runs.values())
    results = {f"{method}, seed {seed}": run for method, run in runs.items() for seed in figure5.SEEDS}
    assert len(figure5.draw(results).axes) == 6
    assert f"{figure5.median_error(results, fresh, 0):.3f}" in figure5.summarize(results)


def test_many_penalties_improve_on_one():
    scalar = as_json(many.best_single_penalty(SOURCE, low=-9.0, high=-7.0, count=3))
    assert scalar["stationarity"] <= 1e-5
    run = as_json(many.tuned(SOURCE, response="implicit", steps=5, seed=0))
    results = {many.BEST_SCALAR: scalar} | dict.fromkeys(many.responses(), run)
    assert len(many.draw(results).axes) == 2
    assert f"implicit {run['valid']:.3f} ({run['valid'] / scalar['valid']:.2f} x)" in many.summarize(results)
    assert run["valid"] < scalar["valid"]


def test_every_experiment_has_parts_of_its_own_names():
    for name, experiment in experiments().items():
        names = [part.name for part in experiment.parts]
        assert experiment.name == name and len(set(names)) == len(names) > 0
    assert evenly_spaced(3) == [-1.0, 1.0, 3.0]

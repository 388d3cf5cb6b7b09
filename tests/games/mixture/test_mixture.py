"""The mixture's texts, its game, and a short run of each method."""

import json
import os
import signal

import pytest
import torch
from typer.testing import CliRunner

from games.cli import app
from games.errors import DataError
from games.mixture.problem import Corpus, Sizes, losses_by_source, train_loss
from games.mixture.run import METHODS, below, run
from games.mixture.texts import _parted, decoded, encoded, fewest_characters, sources, windows

CPU = torch.device("cpu")


def corpus():
    return Corpus(sources(20_000), Sizes(length=8, each=2, held_out=6), CPU)


def nothing(*args):
    pass


def test_five_sources_two_of_which_have_lost_their_order():
    found = sources(20_000)
    assert [source.noise for source in found] == [False, False, False, True, True]
    for source in found:
        assert (len(source.train), len(source.held_out), len(source.test)) == (16_000, 2_000, 2_000)
    whole, shuffled = (torch.cat([found[i].train, found[i].held_out, found[i].test]) for i in (0, 3))
    assert torch.equal(whole.sort().values, shuffled.sort().values)
    assert not torch.equal(whole, shuffled)
    assert "import" in decoded(found[0].train)
    assert "import" not in decoded(found[3].train)
    with pytest.raises(DataError, match="asked for were 100,000,000"):
        sources(10**8)


def test_characters_are_read_and_written():
    assert decoded(encoded("two\nlines")) == "two\nlines"
    assert decoded(encoded("é" + "=" * 40)) == " " + "=" * 8
    pieces = windows(torch.arange(100), 7, 10)
    assert pieces.shape == (7, 11)
    assert bool((pieces.diff() == 1).all())


def test_the_loss_is_each_source_by_its_share():
    played = corpus()
    model, batch = played.model(0), played.train()
    each = losses_by_source(model, batch)
    assert each.shape == (5,)
    torch.testing.assert_close(each[2], losses_by_source(model, batch[2:3])[0])
    mixture = torch.tensor([0.0, 1.0, -1.0, 0.5, 0.0])
    torch.testing.assert_close(train_loss(model, mixture, batch), (torch.softmax(mixture, 0) * each).sum())


def test_what_is_held_out_is_of_the_clean_sources():
    played = corpus()
    assert played.held_out().shape == (6, 9)
    assert torch.equal(played.last_word(each=3), played.last_word(each=3))


def test_below_is_for_good():
    curve = [(10, [0.5, 0.5]), (20, [0.995, 0.005]), (30, [0.9, 0.1]), (40, [0.995, 0.005]), (50, [0.999, 0.001])]
    assert below(curve, [1]) == 40
    assert below(curve[:3], [1]) is None


@pytest.mark.parametrize("method", METHODS)
def test_a_short_run(method):
    seen = []
    row = run(method, corpus(), steps=20, seed=0, show=lambda *told: seen.append(told))
    assert [step for step, _, _ in seen] == [10, 20]
    assert sum(row.shares) == pytest.approx(1.0, abs=1e-6)
    # Twenty steps of Adam on characters: better than all characters alike.
    assert row.loss < torch.log(torch.tensor(96.0))
    if method == "oracle":
        assert row.shares[3:] == [0.0, 0.0]
    if method in ("Nudged", "ValueFunction"):
        assert len(row.curve) == 2
        assert row.shares != pytest.approx([0.2] * 5)


def test_the_command_prints_and_writes(tmp_path):
    options = ["mixture", "--method", "uniform", "--method", "Nudged", "--steps", "20", "--characters", "20000"]
    small = ["--length", "8", "--each", "2", "--output", str(tmp_path)]
    found = CliRunner().invoke(app, [*options, *small])
    assert found.exit_code == 0, found.output
    assert "test loss" in found.stdout
    content = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in content["rows"]] == ["uniform", "Nudged"]
    assert (tmp_path / "shares.png").stat().st_size > 10_000
    printed = CliRunner().invoke(app, [*options[:3], *options[5:], *small, "--json"])
    assert json.loads(printed.stdout)["rows"][0]["method"] == "uniform"
    assert CliRunner().invoke(app, ["mixture", "--method", "magic"]).exit_code == 2
    assert CliRunner().invoke(app, ["mixture", "--steps", "3"]).exit_code == 2
    short = CliRunner().invoke(app, ["mixture", "--characters", "9999", "--length", "8"])
    assert short.exit_code == 2
    assert "--characters 9999: expected at least 10000" in short.output


@pytest.mark.parametrize("length", [8, 999, 1000, 2500])
def test_the_fewest_characters_have_a_piece_in_each_part(length):
    fewest = fewest_characters(length)
    part = _parted("text", torch.zeros(fewest, dtype=torch.int64))
    for codes in (part.train, part.held_out, part.test):
        assert windows(codes, 2, length).shape == (2, length + 1)
    assert _parted("text", torch.zeros(fewest - 1, dtype=torch.int64)).test.numel() <= length


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_where_one_ends_that_was_not(tmp_path, monkeypatch):
    from games.mixture import command

    def call(folder, *options):
        small = ["--characters", "20000", "--length", "8", "--each", "2", "--steps", "60"]
        return CliRunner().invoke(app, ["mixture", *small, "--output", str(folder), *options])

    def rows(folder):
        found = json.loads((folder / "results.json").read_text())["rows"]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in found]

    assert call(tmp_path / "whole").exit_code == 0
    played, run = [], command.run

    def pressed(method, *arguments, show, **options):
        played.append(method)

        def shown(step, *rest):
            if method == "ValueFunction" and step == 30:
                os.kill(os.getpid(), signal.SIGTERM)
            show(step, *rest)

        return run(method, *arguments, show=shown, **options)

    monkeypatch.setattr(command, "run", pressed)
    stopped = call(tmp_path / "parts")
    assert stopped.exit_code == 143 and "--resume goes on from the last step" in stopped.stderr
    assert played == ["Nudged", "ValueFunction"]
    monkeypatch.setattr(command, "run", lambda method, *a, **o: played.append(method) or run(method, *a, **o))
    assert call(tmp_path / "parts", "--resume").exit_code == 0
    assert played == ["Nudged", "ValueFunction", "ValueFunction", "uniform", "oracle"], "what is done is not done again"
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")

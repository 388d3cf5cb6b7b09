"""`bilevel tune --model`: a model and data of one's own, and each refusal in one line."""

import importlib
import json
import os
import signal
import struct
import sys
import textwrap

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from games.cli import app
from games.errors import DataError
from games.tuning.own.arrays import read
from games.tuning.own.sets import sets

NET = """
    import torch
    from torch import nn
    from torch.nn.functional import cross_entropy

    def build():
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))

    def line(): return nn.Linear(6, 1)
    def narrow(): return nn.Linear(5, 3)
    def nothing(): return {"weights": 3}
    def broken(): raise RuntimeError("no such file of weights")
    number = 3

    def batches(seed):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(60, 6, generator=g)
        return list(zip(x.split(20), x[:, :3].argmax(1).split(20)))

    def loaders(): return batches(0), batches(1), batches(2)
    def one(): return batches(0)[:1]

    import itertools

    class Endless:
        def __iter__(self): return itertools.cycle(batches(3))

    def endless_valid(): return batches(0), Endless()
    def endless_test(): return batches(0), batches(1), Endless()
    def spent(): return iter(batches(0)), batches(1)
    def sgd(parameters): return torch.optim.SGD(parameters, lr=0.1, nesterov=True, momentum=0.8)
    def loss(model, batch): return cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)
    def vector(model, batch): return model(batch[0])

    class Failing(nn.Linear):
        error, calls, allowed = ValueError, 0, 40  # calls in training mode, of which so many succeed

        def forward(self, x):
            if self.training:
                Failing.calls += 1
                if Failing.calls > self.allowed:
                    raise self.error("the images are too dark")
            return super().forward(x)

    def failing(error, allowed):
        Failing.error, Failing.calls, Failing.allowed = error, 0, allowed
        return Failing(6, 3)

    def value(): return failing(ValueError, 40)
    def type_(): return failing(TypeError, 40)
    def index(): return failing(IndexError, 40)
    def system(): return failing(OSError, 40)
    def at_once(): return failing(ValueError, 0)

    def fresh():
        made.append(0)
        return nn.Linear(6, 3) if len(made) == 1 else failing(TypeError, 3)
    made = []
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_net.py").write_text(textwrap.dedent(NET))
    (folder / "own_bad.py").write_text("def build(:\n")
    generator = np.random.default_rng(0)
    x = generator.normal(size=(90, 6))
    y = x[:, :3].argmax(1)
    np.savez(folder / "classes.npz", x=x, y=y)
    np.savez(folder / "values.npz", x_train=x[:60], y_train=x[:60, 0], x_val=x[60:75], y_val=x[60:75, 0])
    yield folder
    sys.path[:] = [entry for entry in sys.path if entry != str(folder)]
    for name in ("own_net", "own_bad"):
        sys.modules.pop(name, None)


def call(place, *options, model="build", data="classes.npz"):
    given = ["tune", "--model", f"{place}/own_net.py:{model}", "--data", f"{place}/{data}", *map(str, options)]
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, given)


def results(folder):
    content = json.loads((folder / "results.json").read_text())
    del content["seconds"]
    for record in content["history"]:
        del record["seconds"]
    return content


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    result = call(place, "--steps", 60, "--output", out, "--retrain", 1, "--plot")
    assert result.exit_code == 0, result.output
    return result, out


def test_a_model_and_a_table(whole):
    result, out = whole
    assert {"decay", "dropout", "smoothing"} == set(results(out)["hyper"])
    assert results(out)["check"] in result.stdout
    assert set(results(out)["advised"]) <= {"decay", "dropout", "smoothing"}
    for text in ("decay", "dropout 3", "smoothing", "60 training steps", "Advised: ", "1 fresh trainings", "accuracy"):
        assert text in result.stdout
    assert (out / "run.png").read_bytes().startswith(b"\x89PNG")
    state = torch.load(out / "model.pt", weights_only=True)
    assert state["0.weight"].shape == (16, 6)
    assert results(out)["model"]["valid"]["accuracy"] > 0.5


def test_json_is_all_that_is_printed(place, tmp_path):
    options = ("--hyper", "decay:layer", "--hyper", "noise=0.2", "--optimizer", "AdamW", "--lr", 0.01)
    result = call(place, "--epochs", 5, "--json", "--output", tmp_path, *options)
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert set(content["hyper"]["decay"]) == {"0", "1", "4"}
    assert content["start"]["noise"] == pytest.approx(0.2)


def test_loaders_losses_and_optimisers_are_functions(place, tmp_path):
    own = f"{place}/own_net.py"
    options = ("--loss", f"{own}:loss", "--optimizer", f"{own}:sgd", "--hyper", "dropout:all")
    result = call(place, "--epochs", 8, "--output", tmp_path, *options, data="own_net.py:loaders")
    assert result.exit_code == 0, result.output
    assert "test loss" in result.stdout


def test_numbers_are_regressed(place, tmp_path):
    result = call(place, "--steps", 30, "--output", tmp_path, model="line", data="values.npz")
    assert result.exit_code == 0, result.output
    assert set(results(tmp_path)["hyper"]) == {"decay"}
    assert "accuracy" not in result.stdout


def test_control_c_and_resume_equal_a_run_that_was_not_stopped(place, tmp_path, whole, monkeypatch):
    import games.tuning.own.run as module

    original = module.bl.tune

    def interrupted(*arguments, callbacks, **options):
        def press(step, record, variables):
            if step == 4:
                os.kill(os.getpid(), signal.SIGINT)

        return original(*arguments, callbacks=(press, *callbacks), **options)

    monkeypatch.setattr(module.bl, "tune", interrupted)
    options = ("--steps", 60, "--retrain", 1, "--plot", "--output", tmp_path)
    assert call(place, *options).exit_code == 130
    monkeypatch.undo()
    assert not (tmp_path / "results.json").exists()
    assert "another run: length" in refused(call(place, "--steps", 61, "--output", tmp_path, "--resume"))
    assert call(place, *options, "--resume").exit_code == 0
    assert results(tmp_path) == results(whole[1])


def test_control_c_in_the_check_ends_it_at_once_and_loses_only_the_training_under_way(
    place, tmp_path, whole, monkeypatch
):
    from bilevel.tuning import retraining

    original, calls = retraining._sped, []

    def pressing(*arguments):
        calls.append(0)
        if len(calls) == 40:  # of 30 steps each: in the second
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(retraining, "_sped", pressing)
    options = ("--steps", 60, "--retrain", 1, "--plot", "--output", tmp_path)
    stopped = call(place, *options)
    assert stopped.exit_code == 130
    assert "Wrote results.json and model.pt" in stopped.stderr
    assert len(calls) == 40
    kept = results(tmp_path)
    assert kept.pop("check").startswith("The check was stopped, so that nothing tells what")
    assert kept.pop("retrained") is None
    assert {"hyper", "model", "history"} < kept.keys()
    assert kept["hyper"] == results(whole[1])["hyper"]
    assert call(place, *options, "--resume").exit_code == 0
    assert len(calls) == 40 + 2 * 30 + 2 * 60  # two of the check's three, and both that --retrain asked for
    assert results(tmp_path) == results(whole[1])


def test_without_a_check(place, tmp_path):
    assert call(place, "--steps", 10, "--check", 0, "--output", tmp_path).exit_code == 0
    assert results(tmp_path)["check"] is None


def test_a_model_file_that_has_changed_is_refused_and_may_be_accepted(tmp_path):
    (tmp_path / "changing_parts.py").write_text("hidden = 4\n")
    net = tmp_path / "changing_net.py"
    net.write_text(
        "from torch import nn\nfrom changing_parts import hidden\n"
        "def build(): return nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 3))\n"
    )
    generator = np.random.default_rng(0)
    x = generator.normal(size=(90, 6))
    np.savez(tmp_path / "classes.npz", x=x, y=x[:, :3].argmax(1))

    def tune(*options):
        """As in a process of its own, which reads the files anew."""
        for name in ("changing_net", "changing_parts"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        given = ["--model", f"{net}:build", "--data", tmp_path / "classes.npz", "--output", tmp_path / "out", *options]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "path", list(sys.path))
            patch.setattr(sys, "dont_write_bytecode", True)
            return CliRunner(env={"COLUMNS": "120"}).invoke(app, ["tune", "--steps", "10", *map(str, given)])

    assert tune().exit_code == 0
    (tmp_path / "changing_parts.py").write_text("hidden = 4  # units\n")
    line = refused(tune("--resume"))
    assert "another run: changing_parts.py has another content now. Put back what was there, or pass --accept" in line
    assert tune("--resume", "--accept-changes").exit_code == 0
    assert tune("--resume").exit_code == 0
    net.write_text(net.read_text().replace("Tanh", "ReLU"))  # of the same form, which no shape tells
    assert "changing_net.py has another content now" in refused(tune("--resume"))
    assert "--accept-changes needs --model" in refused(
        CliRunner().invoke(app, ["tune", "--accept-changes", "--output", str(tmp_path / "other")])
    )


def refused(result):
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"model": "absent"}, "own_net.py has no function 'absent'; it has build"),
        ({"model": "number"}, "a int, and no function, 'number'"),
        ({"model": "nothing"}, "returned a dict; expected an nn.Module"),
        ({"model": "broken"}, r"failed: RuntimeError: no such file of weights \(own_net.py, line 12\)"),
        ({"model": "narrow"}, r"fail on a batch, a list of a tensor \(64, 6\) of float32.*mat1 and mat2"),
        ({"data": "absent.npz"}, "There is no file"),
        ({"data": "own_net.py:one"}, "returned 1 things; expected loaders"),
        ({"data": "own_net.py:endless_valid"}, "gave 10,000 batches without an end"),
        ({"data": "own_net.py:endless_test"}, "gave 10,000 batches without an end"),
        ({"data": "own_net.py:spent"}, "iterated again and again"),
        ({"data": "own_net.py"}, "none of the data that can be read"),
        ({"data": "values.npz"}, "outputs have shape"),
    ],
)
def test_functions_and_data_that_cannot_be_used(place, tmp_path, options, told):
    import re

    assert re.search(told, refused(call(place, "--output", tmp_path, **options)))


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("value", "failed: the images are too dark (own_net.py, line "),
        ("type_", "failed: TypeError: the images are too dark (own_net.py, line "),
        ("index", "failed: IndexError: the images are too dark (own_net.py, line "),
        ("system", "failed: OSError: the images are too dark (own_net.py, line "),
        ("fresh", "failed: TypeError: the images are too dark (own_net.py, line "),  # in the fresh training alone
    ],
)
def test_a_training_that_fails_is_no_wrong_input(place, tmp_path, model, told):
    options = ("--steps", 60, "--hyper", "decay", "--output", tmp_path, "--retrain", 1)
    first = call(place, *options, model=model)
    assert first.exit_code == 1, first.output
    assert isinstance(first.exception, SystemExit)
    (line,) = [line for line in first.stderr.splitlines() if line.startswith("Error: ")]
    assert told in line
    assert not (tmp_path / "results.json").exists()


def test_a_model_that_fails_in_training_mode_alone_is_refused_before_any(place, tmp_path):
    for resume in ((), ("--resume",)):  # a run that was refused has begun, and has nothing to lose
        result = call(place, "--steps", 60, "--hyper", "decay", "--output", tmp_path, *resume, model="at_once")
        assert "on its first batch (a list): the images are too dark" in refused(result)
    assert not list(tmp_path.glob("*.pt"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--hyper", "weight"], "there is no 'weight'; expected one of decay"),
        (["--hyper", "smoothing:layer"], "takes no :layer"),
        (["--hyper", "decay", "--hyper", "decay"], "is there already"),
        (["--hyper", "dropout=2"], "--hyper dropout=2: "),
        (["--hyper", "mixup=low"], "--hyper mixup=low: "),
        (["--optimizer", "adem"], "expected one of ASGD, Adadelta"),
        (["--lr", 0], "expected a rate above 0"),
        (["--epochs", 3, "--steps", 3], "give one of them"),
        (["--epochs", 0], "--epochs 0: expected at least 1"),
        (["--batch-size", 0], "--batch-size 0: expected at least 1"),
        (["--response", "unrolled"], "--response goes without --model"),
        (["--valid", 200], "200|201 examples were asked for"),
        (["--loss", "hinge"], "expected cross_entropy, mse"),
        (["--check", 2], "--check 2.0: expected a share of the run's length"),
        (["--ray", "local"], "--ray local: a run is one training, which is done here. Add --retrain"),
        (["--ray", "local", "--retrain", 2, "--device", "cuda"], "--device cuda cannot be had there. Use --device cpu"),
        (["--device", "gpu"], "--device gpu cannot be used; here are cpu"),
        (["--device", "cuda:63"], "--device cuda:63 cannot be used; here are cpu"),
    ],
)
def test_options_that_cannot_be_used(place, tmp_path, options, told):
    import re

    assert re.search(told, refused(call(place, "--output", tmp_path, *options)))


def test_a_file_that_is_none(place, tmp_path):
    run = CliRunner(env={"COLUMNS": "120"}).invoke
    for model, told in (
        ("net.py", "expected path.py:function"),
        (f"{place}/none.py:build", "there is no file"),
        (f"{place}/own_bad.py:build", "does not run: SyntaxError"),
    ):
        assert told in refused(run(app, ["tune", "--model", model, "--output", str(tmp_path)]))
    assert "--epochs needs --model" in refused(run(app, ["tune", "--epochs", "3", "--output", str(tmp_path)]))
    assert "returned shape" in refused(
        call(place, "--loss", f"{place}/own_net.py:vector", "--output", tmp_path, data="own_net.py:loaders")
    )


def test_idx_files_and_folders_of_images(tmp_path):
    from PIL import Image

    for part, count in (("train", 20), ("t10k", 10)):
        for stem, shape in (("images-idx3", (count, 4, 4)), ("labels-idx1", (count,))):
            header = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape)
            values = (np.arange(np.prod(shape)) % 10).astype(np.uint8)
            (tmp_path / f"{part}-{stem}-ubyte").write_bytes(header + values.tobytes())
    found = sets(str(tmp_path), train=None, valid=None, batch=8, seed=0, image_size=None)
    images, _ = next(iter(found.train))
    assert images.shape == (8, 1, 4, 4)
    assert images.min() >= 0.0 and images.max() <= 1.0
    folder = tmp_path / "images"
    for part in ("train", "val"):
        for name, colour in (("cat", (250, 0, 0)), ("dog", (0, 0, 250))):
            (folder / part / name).mkdir(parents=True)
            for index in range(3):
                Image.new("RGB", (5, 4), colour).save(folder / part / name / f"{index}.png")
    name, parts = read(str(folder), None)
    assert (name, set(parts)) == ("images", {"train", "valid"})
    assert parts["train"].inputs.shape == (6, 3, 4, 5)
    assert parts["train"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert parts["train"].inputs[0, 0, 0, 0] > 0.9 > parts["train"].inputs[5, 0, 0, 0]
    Image.new("L", (9, 9)).save(folder / "train" / "cat" / "z.png")
    with pytest.raises(DataError, match="image-size 32"):
        read(str(folder), None)
    assert read(str(folder), 6)[1]["train"].inputs.shape == (7, 3, 6, 6)
    (folder / "train" / "cat" / "z.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be read as an image"):
        read(str(folder), None)


def test_arrays_that_cannot_be_examples(tmp_path):
    x, y = np.zeros((4, 2)), np.arange(4)
    for arrays, told in (
        ({"a": x}, "has the arrays"),
        ({"x": x, "y": y[:3]}, "expected as many"),
        ({"x": np.full((4, 2), np.nan), "y": y}, "NaN or infinite"),
        ({"x": x, "y": y - 2}, "expected classes from 0"),
        ({"x": x.astype(str), "y": y}, "expected numbers"),
        ({"x": x, "y": y, "x_test": x}, "only"),
    ):
        np.savez(tmp_path / "file.npz", **arrays)
        with pytest.raises(DataError, match=told):
            read(str(tmp_path / "file.npz"), None)
    (tmp_path / "file.npz").write_bytes(b"no archive")
    with pytest.raises(DataError, match="cannot be read as"):
        read(str(tmp_path / "file.npz"), None)
    np.savez(tmp_path / "m.npz", train_images=np.zeros((4, 5, 5, 3), np.uint8), train_labels=y[:, None])
    assert read(str(tmp_path / "m.npz"), None)[1]["train"].inputs.shape == (4, 3, 5, 5)

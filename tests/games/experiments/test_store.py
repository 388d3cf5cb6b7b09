"""The store: a finished result is found again, another is not; a checkpoint of another run is refused, and kept."""

import errno
import json
import os

import numpy as np
import pytest
import torch

from bilevel.errors import CheckpointError
from bilevel.solving import checkpoint as checkpoints
from games.experiments.store import Store, as_json, digest, write_json

ONE = {"settings": {"rate": 0.1}, "data": (1, 2)}


def test_a_result_is_found_by_name_and_identity(tmp_path):
    store = Store(tmp_path / "new" / "folder")
    assert store.load("a b", ONE) is None
    kept = store.save("a b", ONE, {"loss": torch.tensor([1 / 3, np.inf]), "names": ("x",)})
    assert kept == {"loss": [0.3333333, None], "names": ["x"]}
    assert store.load("a b", ONE) == kept, "a resumed run has the numbers of the uninterrupted one"
    assert store.load("a b", {**ONE, "data": (1, 3)}) is None
    assert store.load("a", ONE) is None
    store.discard("a b")
    store.discard("a b")
    assert store.load("a b", ONE) is None


def test_what_was_never_finished_counts_as_missing(tmp_path):
    store = Store(tmp_path)
    for content in ("{ half a", "[]", '{"result": {}}', json.dumps({"identity": as_json(ONE)})):
        store.file("a").write_text(content)
        assert store.load("a", ONE) is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_a_checkpoint_goes_on_only_for_its_own_run(tmp_path):
    store = Store(tmp_path)
    file = store.checkpoint("run", ONE, steps=5, resume=True)
    assert not file.exists()
    checkpoints.save(file, {"step": 3})
    assert store.checkpoint("run", ONE, steps=3, resume=True) == file
    with pytest.raises(CheckpointError, match="is at step 3, beyond steps=2"):
        store.checkpoint("run", ONE, steps=2, resume=True)
    other = {**ONE, "settings": {"rate": 0.2}}
    with pytest.raises(CheckpointError, match=r"of another run: settings \{'rate': 0.1\}, here \{'rate': 0.2\}"):
        store.checkpoint("run", other, steps=5, resume=True)
    assert file.exists(), "what was refused is kept"
    store.checkpoint("run", other, steps=5, resume=False)
    assert not file.exists()


@pytest.mark.parametrize("beside", [None, "no json", "[1]", '{"data": "of an older layout"}', '{"identity": 3}'])
def test_a_checkpoint_that_does_not_say_what_it_is_of_is_refused(tmp_path, beside):
    store = Store(tmp_path)
    file = store.checkpoint("run", ONE, steps=5, resume=True)
    checkpoints.save(file, {"step": 3})
    file.with_suffix(".json").unlink()
    if beside is not None:
        file.with_suffix(".json").write_text(beside)
    with pytest.raises(CheckpointError, match="does not say what run"):
        store.checkpoint("run", ONE, steps=5, resume=True)


def test_a_file_that_has_changed_is_told_in_words_and_may_be_accepted(tmp_path):
    store = Store(tmp_path)
    before = {"seed": 1, "files": {"net.py": digest(b"one"), "parts/old.py": digest(b"two")}}
    after = {"seed": 1, "files": {"net.py": digest(b"three"), "parts/new.py": digest(b"two")}}
    file = store.checkpoint("run", before, steps=5, resume=True)
    checkpoints.save(file, {"step": 3})
    told = r"another run: net.py has another content now, parts/old.py was there alone, parts/new.py is new. Say so\.$"
    for accepted in ((), ("seed",)):
        with pytest.raises(CheckpointError, match=told):
            store.checkpoint("run", after, steps=5, resume=True, accepted=accepted, hint="Say so.")
    with pytest.raises(CheckpointError, match="another run: seed 1, here 2"):
        store.checkpoint("run", {**after, "seed": 2}, steps=5, resume=True, accepted=("files",))
    assert store.checkpoint("run", after, steps=5, resume=True, accepted=("files",)) == file
    assert store.checkpoint("run", after, steps=5, resume=True) == file, "it is of this run from now on"


def test_nothing_is_left_beside_a_file_that_could_not_be_written(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"x": 1})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.json'$"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert os.listdir(tmp_path) == ["a.json"] and json.loads((tmp_path / "a.json").read_text()) == {"x": 1}

"""Images that every method makes, and figures of runs whose seconds nobody took."""

import json
from pathlib import Path

import pytest

from games.experiments.data import DigitSource
from games.gan.catalogue import experiments
from games.gan.images import image_run
from games.gan.methods import METHODS, TUNED

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_figures_without_seconds_leave_their_panels_out():
    ring = experiments()["ring"]
    runs = json.loads((DOCS / "gan/ring.json").read_text(encoding="utf-8"))["results"]
    timed, untimed = (
        {name: {"moments": [moment | {"seconds": seconds} for moment in run["moments"]]} for name, run in runs.items()}
        for seconds in (1.0, None)
    )
    assert [len(ring.draw(some).axes) for some in (timed, untimed)] == [4, 2]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_images(method):
    setting = TUNED[method]
    found = image_run(
        DigitSource(), images="digits", method=method, rate=setting.rate, ratio=setting.ratio, loss=setting.loss,
        seed=0, evaluations=60, moments=1, keep_samples=True,
    )  # fmt: skip
    [end] = found["moments"]
    assert 1 <= end["classes"] <= 10
    assert end["frechet"] > found["floor"] > 0.0
    assert end["samples"].shape == (20, 64)
    assert found["accuracy"] > 0.9

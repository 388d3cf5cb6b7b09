"""The figures: what is drawn where, that the files are not blank, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from games.errors import MissingExtraError
from games.tuning.figures import decay_figure, draw_decay, draw_losses, losses_figure

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread

DIGITS = tuple("0123456789")


def run(length: int = 5, cost: float = 10.0) -> list[dict[str, float]]:
    return [
        {"work": cost * (step + 1), "leader_loss": 1 / (step + 1), "follower_loss": 0.1 * step, "seconds": 0.0}
        for step in range(length)
    ]


def decay(scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    return -6 + scale * torch.randn(784, 10, generator=torch.Generator().manual_seed(seed))


def is_blank(path: Path) -> bool:
    pixels = imread(path)
    return bool((pixels == pixels[0, 0]).all())


# --- losses


def test_losses_are_drawn_where_the_axes_say() -> None:
    runs = {"unrolled": run(cost=100.0), "implicit": run()}
    figure = losses_figure(runs)
    valid, train = figure.axes
    assert valid.get_ylabel() == "validation loss (nats)"
    assert train.get_ylabel() == "training loss (nats)"
    assert train.get_xlabel() == "work (gradient equivalents)"
    for axes, key in ((valid, "leader_loss"), (train, "follower_loss")):
        for line, records in zip(axes.lines, runs.values(), strict=True):
            assert list(line.get_xdata()) == [record["work"] for record in records]
            assert list(line.get_ydata()) == [record[key] for record in records]
    assert [text.get_text() for text in figure.legends[0].texts] == ["unrolled", "implicit"]


def test_a_method_has_one_colour_and_one_line_in_both_panels() -> None:
    valid, train = losses_figure({str(number): run() for number in range(7)}).axes
    looks = [[(line.get_color(), line.get_linestyle()) for line in axes.lines] for axes in (valid, train)]
    assert looks[0] == looks[1]
    assert len({colour for colour, _ in looks[0]}) == 7


def test_test_results_are_marked_at_the_end_and_written_out() -> None:
    figure = losses_figure({"implicit": run(), "unrolled": run()}, test={"implicit": (0.25, 0.914)})
    diamonds = [line for line in figure.axes[0].lines if line.get_marker() == "D" and len(line.get_xdata())]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in diamonds] == [(50.0, 0.25)]
    texts = [text.get_text() for text in figure.legends[0].texts]
    assert texts == ["implicit: test 0.250 nats, 91.4 %", "unrolled", "test loss at the end"]


def test_work_is_logarithmic_and_zero_keeps_its_place() -> None:
    assert losses_figure({"a": run(10)}).axes[0].get_xscale() == "log"
    assert losses_figure({"a": run(9)}).axes[0].get_xscale() == "linear"  # less than a decade
    start = {"work": 0.0, "leader_loss": 1.0, "follower_loss": 0.0}
    assert losses_figure({"a": [start, *run(10)]}).axes[0].get_xscale() == "symlog"
    assert losses_figure({"a": [start]}).axes[0].get_xscale() == "linear"


def test_one_record_is_a_visible_point() -> None:
    assert losses_figure({"a": run(1)}).axes[0].lines[0].get_marker() == "o"


def test_losses_are_written(tmp_path: Path) -> None:
    path = tmp_path / "losses.png"
    draw_losses({"implicit": run(), "unrolled": run()}, path, test={"implicit": (0.25, 0.9)})
    assert not is_blank(path)
    draw_losses({"implicit": run()}, tmp_path / "losses.svg")
    assert "<svg" in (tmp_path / "losses.svg").read_text()


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "There are 0 runs; a figure tells 1 to 7 apart"),
        ({str(number): run() for number in range(8)}, "There are 8 runs"),
        ({"a": []}, "The run 'a' has no records"),
        ({"a": [{"work": 1.0, "leader_loss": 1.0}]}, "Record 0 of the run 'a' has no 'follower_loss'"),
        ({"a": [*run(2), {**run(3)[2], "leader_loss": float("nan")}]}, "Record 2 .* leader_loss=nan; expected finite"),
        ({"a": [{**run(1)[0], "follower_loss": float("inf")}]}, "follower_loss=inf"),
        ({"a": [{**run(1)[0], "work": -1.0}]}, "work=-1.0 after 0.0"),
        ({"a": run()[::-1]}, "work=40.0 after 50.0; work starts at 0 or above and does not decrease"),
    ],
)
def test_bad_runs_are_refused(runs: dict[str, list[dict[str, float]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses_figure(runs)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"b": (0.1, 0.9)}, "test result of 'b'; the runs are a"),
        ({"a": (float("nan"), 0.9)}, "expected a finite loss"),
        ({"a": (0.1, 91.4)}, "an accuracy from 0 to 1"),
    ],
)
def test_bad_test_results_are_refused(test: dict[str, tuple[float, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses_figure({"a": run()}, test=test)


# --- decay


def test_each_class_of_each_method_is_an_image() -> None:
    decays = {"implicit": decay(seed=1), "unrolled": decay(seed=2)}
    figure = decay_figure(decays, classes=DIGITS, centre=-6.0)
    *panels, bar = figure.axes
    assert len(panels) == 20 and bar.get_ylabel() == "log decay"
    assert [axes.get_title() for axes in panels[:10]] == list(DIGITS)
    assert [panels[0].get_ylabel(), panels[10].get_ylabel()] == ["implicit", "unrolled"]
    for position, axes in enumerate(panels):
        expected = list(decays.values())[position // 10][:, position % 10].reshape(28, 28).double()
        assert torch.equal(torch.as_tensor(axes.images[0].get_array().data), expected)


def test_one_scale_around_the_start_that_outliers_do_not_stretch() -> None:
    wild = decay(seed=1)
    wild[0, 0] = 1000.0
    figure = decay_figure({"a": wild, "b": decay(seed=2)}, classes=DIGITS, centre=-6.0)
    limits = {axes.images[0].get_clim() for axes in figure.axes[:-1]}
    ((low, high),) = limits
    assert low + high == pytest.approx(-12.0)
    # The 99th percentile of a standard normal is 2.33; the standard error of the larger of two from 15,680 is 0.03.
    assert high + 6 == pytest.approx(2.33, abs=0.15)
    ticks = [text.get_text() for text in figure.axes[-1].get_yticklabels()]
    assert ticks[2] == "-6 (start)"


def test_untouched_decay_is_all_white() -> None:
    figure = decay_figure({"a": torch.full((784, 10), -6.0)}, classes=DIGITS, centre=-6.0)
    image = figure.axes[0].images[0]
    red, green, blue, _ = image.to_rgba(-6.0)
    assert min(red, green, blue) > 0.95


def test_other_shapes_and_types() -> None:
    values = torch.zeros(9, 2, dtype=torch.bfloat16, requires_grad=True)
    figure = decay_figure({"a": values}, classes=("cat", "dog"), centre=0.0, image_shape=(3, 3))
    assert figure.axes[1].images[0].get_array().shape == (3, 3)


def test_decay_is_written(tmp_path: Path) -> None:
    path = tmp_path / "decay.png"
    draw_decay({"implicit": decay()}, path, classes=DIGITS, centre=-6.0)
    assert not is_blank(path)


@pytest.mark.parametrize(
    ("decays", "centre", "message"),
    [
        ({}, 0.0, "There are 0 decays of 10 classes to draw"),
        ({"a": torch.zeros(10, 784)}, 0.0, r"shape \[10, 784\]; expected .* = \[784, 10\]. Transpose it"),
        ({"a": torch.zeros(785, 10)}, 0.0, r"shape \[785, 10\]; expected .* = \[784, 10\]\.$"),
        ({"a": torch.full((784, 10), torch.nan)}, 0.0, "has 7840 values that are not finite"),
        ({"a": torch.zeros(784, 10)}, float("inf"), "centre=inf"),
    ],
)
def test_bad_decays_are_refused(decays: dict[str, torch.Tensor], centre: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decay_figure(decays, classes=DIGITS, centre=centre)


# --- both


def test_figures_have_their_own_canvas_and_leave_pyplot_alone() -> None:
    pyplot = sys.modules.get("matplotlib.pyplot")
    before = pyplot.get_fignums() if pyplot else None
    assert isinstance(losses_figure({"a": run()}).canvas, FigureCanvasAgg)
    assert sys.modules.get("matplotlib.pyplot") is pyplot
    assert (pyplot.get_fignums() if pyplot else None) == before


def test_missing_matplotlib_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'bilevel\[data\]'"):
        losses_figure({"a": run()})
    with pytest.raises(MissingExtraError, match=r"pip install 'bilevel\[data\]'"):
        decay_figure({"a": decay()}, classes=DIGITS, centre=-6.0)

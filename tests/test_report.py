"""The page of a comparison: complete in itself, right in its numbers, and sortable in a real browser."""

import html.parser
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch

import bilevel as bl
from bilevel.comparison import Point, Reference, Row, Step
from bilevel.comparison.charts import COLOURS, charts, looks, power
from bilevel.comparison.report import COLUMNS, page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SECONDS = {"slow & sure": 3.0, "fast": 0.5, "<middling>": 1.25}


def row(game, response, seed):
    seconds = SECONDS[response] * (1 + seed / 10)
    points = tuple(Point(b, round(20 * b), round(10 * b), 0.1, 0.01 / b**2 / (1 + seed)) for b in (0.5, 1.0, 2.0))
    history = tuple(Step(step, 30.0 * step, 2.0 + 1.0 / step, 2.5) for step in (1, 2, 8))
    told = ("Solver: left 0.25 after 3 steps",) if response == "fast" else ()
    return Row(game, response, seed, points, history, 100, 50, seconds, 4096 * (1 + len(response)), 0.1, None, told)


@pytest.fixture(scope="module")
def comparison():
    rows = [row(game, response, seed) for game in ("ridge", "mnist") for response in SECONDS for seed in (0, 1)]
    rows[0] = Row("ridge", "slow & sure", 0, failure="solve: ValueError: x < y")
    return bl.comparison.Comparison(
        rows=tuple(rows),
        references=tuple(
            Reference(g, s, k, 1.0, 1e-11 if k == "converged" else None, None, 3.0, least)
            for g, k, least in (("ridge", "exact", 1.5), ("mnist", "converged", None))
            for s in (0, 1)
        ),
        settings={"steps": 8, "responses": {"fast": "Unrolled(<lambda>)"}},
        versions={"torch": "9.9"},
        machine="a machine",
        laws={"fast": [("chain rule", "passed", ""), ("scale", "failed", "x = 3 & y < 4")], "<middling>": []},
    )


class Page(html.parser.HTMLParser):
    """The tags, their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "path", "use", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in ("path", "use"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def parsed(comparison):
    text = page(comparison)
    return text, Page(text)


def test_the_page_needs_nothing_else(parsed):
    text, found = parsed
    assert found.open == [], "every tag is closed"
    for tag, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            target = attributes.get(name) or "#"
            assert target.startswith(("#", "data:,")), (tag, target)
    assert not re.search(r"https?:|@import|url\((?!#)|font-face", text)


def test_every_reference_inside_it_leads_somewhere_once(parsed):
    text, found = parsed
    names = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(names) == len(set(names))
    used = {a["href"][1:] for _, a in found.tags if a.get("href", "").startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert used - {""} <= set(names)
    described = {a[k] for _, a in found.tags for k in ("aria-labelledby", "aria-describedby") if k in a}
    assert described <= set(names)


def test_the_table(parsed, comparison):
    _, found = parsed
    heads = [a for tag, a in found.tags if tag == "th" and "data-key" in a]
    assert [a["data-key"] for a in heads] == [key for _, key, _ in COLUMNS]
    assert all(a["aria-sort"] == "none" and a["scope"] == "col" for a in heads)
    assert sum(tag == "button" for tag, _ in found.tags) == len(heads)
    text = " ".join("".join(found.text).split())
    for shown in ("<middling>", "slow & sure", "1 failed", "ridge", "x < y", "0.01"):
        assert shown in text
    medians = [s.seconds.median for s in comparison.summaries]
    assert {repr(m) for m in medians} <= {a.get("data-value") for _, a in found.tags}


def test_warnings_failures_laws_settings_are_told(parsed):
    text = " ".join("".join(parsed[1].text).split())
    assert "slow & sure on ridge, seed 0: solve: ValueError: x < y" in text
    assert "4 times: Solver: left 0.25 after 3 steps" in text
    assert "✗ failed" in text and "x = 3 & y < 4" in text and "✓ passed" in text
    assert "torch 9.9" in text and "Unrolled(<lambda>)" in text and "a machine" in text
    assert "1e-11" in text.replace("1.0e-11", "1e-11")


def test_figures_speak(parsed, comparison):
    text, found = parsed
    drawings = [a for tag, a in found.tags if tag == "svg"]
    assert len(drawings) == 3
    assert all(a["role"] == "img" and "viewbox" in a for a in drawings)
    assert "mnist: slow & sure, 0.0075 after 30" in drawings[0]["aria-label"]
    assert "from 2.125" in drawings[1]["aria-label"] and "most is" in drawings[2]["aria-label"]
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for drawn in svgs:  # text as text, in the page's colours
        assert ">ridge</text>" in drawn and "&lt;middling&gt;</text>" in drawn
        assert not set(re.findall(r"#[0-9a-f]{6}", drawn)) & {*COLOURS, "#1b1b1c", "#000000"}
        assert "var(--c0)" in drawn and "var(--ink)" in drawn


def test_colours_and_markers_stay_with_their_response(comparison):
    first = looks(comparison)
    assert len({(look["color"], look["marker"]) for look in first.values()}) == 3
    many = bl.comparison.Comparison(rows=tuple(Row("g", f"r{i}", 0) for i in range(24)))
    assert len({tuple(look.values()) for look in looks(many).values()}) == 24
    for chart in charts(comparison).values():
        used = {handle.get_color() for handle in chart.figure.legends[0].legend_handles}
        assert used == {look["color"] for look in first.values()}


def test_axes_say_what_they_show(comparison):
    drawn = charts(comparison)
    error, value, memory = (drawn[name].figure for name in ("error", "value", "memory"))
    assert all(axes.get_xscale() == axes.get_yscale() == "log" for axes in error.axes)
    assert error.get_supxlabel() == value.get_supxlabel() == "gradients + Hessian-vector products"
    assert [axes.get_ylabel() for axes in value.axes] == ["above the optimum", "leader's loss"]
    assert [axes.get_yscale() for axes in value.axes] == ["log", "linear"]
    assert "bytes" in memory.axes[0].get_xlabel()
    assert [power(v) for v in (1e-9, 0.01, 1.0, 1e5)] == ["10⁻⁹", "0.01", "1", "10⁵"]


def test_medians_are_drawn(comparison):
    axes = charts(comparison)["error"].figure.axes[1]  # mnist
    lines = {line.get_label(): line for line in axes.get_lines()}
    drawn = [line.get_ydata() for line in lines.values() if len(line.get_xdata()) == 3]
    # 0.01 / b^2 / (1 + seed): the median of two seeds is 3/4 of the first's.
    for ys in drawn:
        assert list(ys) == pytest.approx([0.03, 0.0075, 0.001875])


def test_nothing_measured_is_still_a_page():
    failed = bl.comparison.Comparison(rows=(Row("g", "r", 0, failure="hypergradient: no"),))
    assert "hypergradient: no" in page(failed)
    with pytest.raises(ValueError, match="no rows"):
        page(bl.comparison.Comparison(rows=()))


def test_an_error_of_zero_is_on_the_axis(comparison):
    exact = replace(comparison.rows[2], errors=tuple(replace(p, error=0.0) for p in comparison.rows[2].errors))
    drawn = charts(replace(comparison, rows=(exact,)))["error"].figure.axes[0]
    low, _ = drawn.get_ylim()
    assert 0.0 < low <= 1e-16


def test_without_matplotlib(comparison, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'bilevel\[data\]'"):
        comparison.to_html(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


# In a browser --------------------------------------------------------------------------------------------------------


def browse(folder, address, *options):
    """What Chromium makes of the page: the document after its script has run, and what it logged."""
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
            *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", f"--user-data-dir={folder}"),
            # Whatever it asks of a network fails, and is logged.
            *("--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=2000", *options, address),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, done.stderr


def order(dom, column):
    body = dom[dom.index("<tbody>", dom.index('id="results"')) :]
    body = body[: body.index("</tbody>")]
    rows = re.findall(r"<tr.*?</tr>", body, re.DOTALL)
    return [re.findall(r'data-value="([^"]*)"', cells)[column] for cells in rows]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on this machine: the page was not opened in one")
def test_in_a_browser(comparison, tmp_path):
    file = tmp_path / "page.html"
    comparison.to_html(file)
    keys = [key for _, key, _ in COLUMNS]
    address = file.as_uri()
    dom, log = browse(tmp_path / "profile", address, "--dump-dom")
    assert "CONSOLE" not in log, log
    assert not re.search(r"https?://", dom)
    assert order(dom, 0) == ["ridge"] * 3 + ["mnist"] * 3
    seconds = keys.index("seconds")
    for asked, sort in (("seconds", False), ("-seconds", True)):
        dom, log = browse(tmp_path / "profile", f"{address}#sort={asked}", "--dump-dom")
        assert "CONSOLE" not in log, log
        values = [float(value) for value in order(dom, seconds)]
        assert values == sorted(values, reverse=sort) and len(values) == 6
        assert dom.count(f'aria-sort="{"descending" if sort else "ascending"}"') == 1
    dom, _ = browse(tmp_path / "profile", f"{address}#sort=response", "--dump-dom")
    names = order(dom, keys.index("response"))
    assert names == ["&lt;middling&gt;"] * 2 + ["fast"] * 2 + ["slow &amp; sure"] * 2
    # What is missing comes last, either way.
    for asked in ("excess", "-excess"):
        dom, _ = browse(tmp_path / "profile", f"{address}#sort={asked}", "--dump-dom")
        assert order(dom, keys.index("excess"))[3:] == ["", "", ""]
    # A page that presses the heading's button itself, twice.
    press = 'document.querySelector("[data-key=memory] button").click();'
    pressed = tmp_path / "pressed.html"
    pressed.write_text(file.read_text(encoding="utf-8").replace("</body>", f"<script>{press * 2}</script></body>"))
    dom, log = browse(tmp_path / "profile", pressed.as_uri(), "--dump-dom")
    values = [float(value) for value in order(dom, keys.index("memory"))]
    assert "CONSOLE" not in log and values == sorted(values, reverse=True)
    shot = tmp_path / "shot.png"
    browse(tmp_path / "profile", address, f"--screenshot={shot}", "--window-size=1280,2000")
    assert shot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_measured_comparison_becomes_a_page(tmp_path):
    from bilevel.testing import Cournot

    response = bl.Unrolled(partial(torch.optim.SGD, lr=0.5), steps=4)
    bl.compare({"duopoly": Cournot(6.0, 0.5, (1.0, 1.0))}, {"unrolled": response}, steps=2, seeds=(0,)).to_html(
        tmp_path / "page.html"
    )
    assert "duopoly" in (tmp_path / "page.html").read_text(encoding="utf-8")

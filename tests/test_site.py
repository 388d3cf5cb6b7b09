"""The built site shows signatures, arguments and equations, cuts nothing off, fetches nothing; it can be read."""

import ast
import html
import importlib
import inspect
import itertools
import json
import re
import shutil
import subprocess
import sys
import threading
from enum import EnumMeta
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DOCUMENTED = [
    (path.stem, name)
    for path in sorted((ROOT / "docs/reference").glob("*.md"))
    for name in re.findall(r"^::: ([\w.]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
]
PROSE = ("bilevel.linear.lanczos", "bilevel.linear.system")
"""Records that nobody makes by hand: their fields are told, not argued for."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="the site was not built: pip install 'bilevel[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


def pages(site):
    return {
        path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in sorted(site.rglob("*.html"))
    }


def object_of(name):
    """What a dotted name stands for: the longest prefix that is a module, then attributes."""
    module, _, rest = name.rpartition(".")
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest = f"{last}.{rest}"
    for part in rest.split("."):
        found = getattr(found, part)
    return found


def text_of(markup):
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


# What the reference says ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def entries(site):
    """From a documented name to the HTML of its entry."""
    found = {}
    for page, name in DOCUMENTED:
        text = (site / "reference" / page / "index.html").read_text(encoding="utf-8")
        start = text.index(f'<h2 id="{name}"')
        ends = [text.find(mark, start + 1) for mark in ("<h2 ", "</article>")]
        found[name] = text[start : min(end for end in ends if end > 0)]
    return found


def wanted_signature(thing):
    """The signature that a reader needs; None of a module, of an enumeration and of a class without a constructor."""
    made = thing.__init__ if inspect.isclass(thing) else thing
    if getattr(made, "__module__", "").startswith("torch"):  # an optimiser of one's own is made as torch's are
        return None
    if not inspect.isfunction(made) or isinstance(thing, EnumMeta) or getattr(thing, "_is_protocol", False):
        return None
    signature = inspect.signature(made)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "self"]
    return signature.replace(parameters=parameters)


def shown_signature(entry):
    """The arguments of the first signature of an entry, as Python's own parser reads them."""
    found = re.search(r'<div class="[^"]*\bdoc-signature\b[^"]*">(.*?)</div>', entry, re.DOTALL)
    assert found, "there is no signature"
    text = text_of(found[1]).strip()
    return ast.parse(f"def {text}: ...").body[0].args


@pytest.mark.parametrize("name", [name for _, name in DOCUMENTED])
def test_an_entry_shows_how_to_call_it(entries, name):
    wanted = wanted_signature(object_of(name))
    if wanted is None:
        return
    shown = shown_signature(entries[name])
    positional, keyword = [*shown.posonlyargs, *shown.args], shown.kwonlyargs
    kinds = {
        parameter.name: parameter.kind in (parameter.KEYWORD_ONLY,)
        for parameter in wanted.parameters.values()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    assert {a.arg: False for a in positional} | {a.arg: True for a in keyword} == kinds
    padded = [None] * (len(positional) - len(shown.defaults)) + shown.defaults
    defaults = dict(zip([a.arg for a in [*positional, *keyword]], [*padded, *shown.kw_defaults], strict=True))
    for parameter in wanted.parameters.values():
        if parameter.name not in defaults:
            continue
        assert (defaults[parameter.name] is None) == (parameter.default is parameter.empty), parameter
        if isinstance(parameter.default, (int, float, str, bool, type(None))):
            said = ast.unparse(defaults[parameter.name])
            assert repr(parameter.default) == said or not said.replace(".", "").isalnum(), (parameter, said)


@pytest.mark.parametrize("name", [name for _, name in DOCUMENTED])
def test_an_entry_lists_its_arguments_and_errors(entries, name):
    thing = object_of(name)
    said = inspect.getdoc(thing) or ""
    listed = set(re.findall(r'<li class="doc-section-item field-body">\s*<b><code>(?:<[^>]+>|\*)*(\w+)', entries[name]))
    for title in ("Args", "Attributes"):
        section = re.search(rf"^{title}:\n(.*?)(?=^\S|\Z)", said, re.MULTILINE | re.DOTALL)
        written = re.findall(r"^    \**(\w+)(?: \(.*\))?:", section[1], re.MULTILINE) if section else []
        assert set(written) <= listed
    for title in ("Raises", "Examples"):
        if re.search(rf"^{title}:\n", said, re.MULTILINE):
            assert f'<span class="doc-section-title">{title}:</span>' in entries[name]
    wanted = wanted_signature(thing)
    if wanted is not None and len(wanted.parameters) > 5 and not thing.__module__.startswith(PROSE):
        assert set(wanted.parameters) <= listed, "more than five arguments: list them under Args:"


def test_examples_are_code(site):
    for name, text in pages(site).items():
        assert not re.search(r"<blockquote>\s*<blockquote>", text), name
        outside = re.sub(r"<(code|title)\b.*?</\1>", "", text, flags=re.DOTALL)
        assert "&gt;&gt;&gt;" not in outside, name
    assert any('class="language-pycon highlight"' in text for text in pages(site).values())


# What the site needs -------------------------------------------------------------------------------------------------


def test_no_part_of_a_page_comes_from_elsewhere(site):
    for name, text in pages(site).items():
        tags = re.findall(r"<(?:script|link|img|iframe|source|video)\b[^>]*>", text)
        told = [tag for tag in tags if re.search(r"""(?:src|href|srcset)=["']?(?:https?:)?//""", tag)]
        assert [tag for tag in told if 'rel="canonical"' not in tag] == [], name
    for path in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path
    assert (site / "assets/mathjax/LICENSE").exists()


# What a reader needs who cannot see it all --------------------------------------------------------------------------


def article(text):
    return text[text.index("<article") : text.index("</article>")]


def own(site):
    """The pages but for the one that says that there is none."""
    return {name: text for name, text in pages(site).items() if "<article" in text and name != "404.html"}


def test_pictures_have_a_text_beside_them(site):
    for name, text in own(site).items():
        pictures = re.findall(r"<img\b[^>]*>", article(text))
        assert [tag for tag in pictures if not re.search(r'alt="[^"]{8,}"', tag)] == [], name


def test_headings_come_in_order(site):
    for name, text in own(site).items():
        levels = [int(level) for level in re.findall(r"<h([1-6])\b", article(text))]
        assert levels[:1] == [1] and levels.count(1) == 1, name
        assert all(below <= above + 1 for above, below in itertools.pairwise(levels)), (name, levels)


def test_links_lead_somewhere(site):
    ids = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in pages(site).items()}
    for name, text in own(site).items():
        for target in set(re.findall(r'<a\b[^>]*\bhref="([^"]+)"', article(text))):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = html.unescape(target).partition("#")
            found = (site / name).parent / path if path else site / name
            found = found / "index.html" if found.is_dir() else found
            assert found.exists(), (name, target)
            if anchor and found.suffix == ".html":
                assert anchor in ids[found.resolve().relative_to(site.resolve()).as_posix()], (name, target)


def test_each_page_says_the_version(site):
    for name, text in own(site).items():
        assert f"bilevel {metadata.version('bilevel')}" in text, name


def test_a_figures_code_is_on_the_site(site):
    for path in (ROOT / "docs/figures").glob("*.py"):
        assert (site / "sources" / path.stem / "index.html").exists()


# In a browser --------------------------------------------------------------------------------------------------------

HARNESS = """<!doctype html><meta charset="utf-8"><body><script>
const loaded = frame => new Promise(done => frame.addEventListener("load", done, {once: true}));
const name = node => node.textContent.trim().slice(0, 60);
const wider = node => node.scrollWidth > node.clientWidth + 1;
const visible = node => node.getClientRects().length > 0;
const shown = node => node.getBoundingClientRect().width > 3;

// Words of tables, letters, digits, dots and underscores, that are spread over two lines.
function broken(body) {
  const found = [];
  for (const cell of body.querySelectorAll("article td, article th")) {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      for (const word of node.data.matchAll(/[\\w.]+/g)) {
        const range = node.ownerDocument.createRange();
        range.setStart(node, word.index);
        range.setEnd(node, word.index + word[0].length);
        if (new Set([...range.getClientRects()].map(at => Math.round(at.top))).size > 1) found.push(word[0]);
      }
    }
  }
  return found;
}

// Colours as [red, green, blue, alpha]; how bright; how far two are apart, as WCAG 2 has it.
const colour = text => (([r, g, b, alpha = 1]) => [r, g, b, alpha])(text.match(/[\\d.]+/g).map(Number));
const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]).concat(1);
const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const bright = ([r, g, b]) => [r, g, b].map(v => linear(v / 255))
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const contrast = (a, b) => (Math.max(bright(a), bright(b)) + .05) / (Math.min(bright(a), bright(b)) + .05);

function behind(node, view) {
  const layers = [];
  for (let at = node; at; at = at.parentElement) layers.push(colour(view.getComputedStyle(at).backgroundColor));
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
}

// Words that are too near to their ground: below 4.5, or 3 where they are large. Each pair of colours is told once.
function faint(body, view) {
  const found = {}, all = body.querySelector("article");
  if (!all) return found;
  const walker = body.createTreeWalker(all, NodeFilter.SHOW_TEXT);
  for (let text = walker.nextNode(); text; text = walker.nextNode()) {
    const node = text.parentElement, style = view.getComputedStyle(node);
    if (!text.data.trim() || !visible(node) || node.closest(".headerlink, mjx-container")) continue;
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.6 && style.fontWeight >= 700);
    const ground = behind(node, view), ratio = contrast(over(colour(style.color), ground), ground);
    const pair = `${style.color} on ${ground.map(Math.round)}`;
    if (ratio < (large ? 3 : 4.5)) found[pair] = [ratio.toFixed(2), name(node)];
  }
  return found;
}

async function measure(page, width) {
  const frame = document.createElement("iframe");
  Object.assign(frame.style, {width: `${width}px`, height: "900px", border: "0"});
  const ready = loaded(frame);
  frame.src = page;
  document.body.append(frame);
  await ready;
  const view = frame.contentWindow, body = view.document;
  if (body.querySelector(".arithmatex")) {
    for (let tries = 0; tries < 300 && !view.MathJax?.startup?.promise; tries++)
      await new Promise(go => setTimeout(go, 20));
    await view.MathJax.startup.promise;
  }
  const all = query => [...body.querySelectorAll(query)].filter(visible);
  const found = {
    page, width,
    equations: body.querySelectorAll("article .arithmatex").length,
    set: all("article .arithmatex > mjx-container > svg").filter(shown).length,
    wrong: all("article [data-mjx-error], article mjx-merror").map(name),
    code: all("article pre, article pre > code").filter(wider).map(name),
    clipped: all("article div.arithmatex").filter(wider).map(name),
    page_width: body.documentElement.scrollWidth, broken: broken(body),
    faint: {}, foreign: view.performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith(location.origin)),
  };
  const still = body.createElement("style");  // a colour on its way to another is neither
  still.textContent = "* { transition: none !important; }";
  body.head.append(still);
  if (width === 1280) for (const scheme of ["default", "slate"]) {
    body.body.setAttribute("data-md-color-scheme", scheme);
    found.faint[scheme] = faint(body, view);
  }
  frame.remove();
  return found;
}

(async () => {
  const found = [];
  try { for (const width of [1280, 390]) for (const page of PAGES) found.push(await measure(page, width)); }
  catch (error) { found.push({error: String(error)}); }
  await fetch("/measured", {method: "POST", body: JSON.stringify(found)});
})();
</script>"""


class Handler(SimpleHTTPRequestHandler):
    """Files of the site, and a place where the browser leaves what it measured."""

    def log_message(self, *_):
        """Say nothing."""

    def do_POST(self):
        self.server.found = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()


@pytest.fixture(scope="module")
def measured(site, tmp_path_factory):
    """Each page as Chromium lays it out in a window of 1280 pixels and on a telephone."""
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine: the pages were not opened in one")
    names = [name.removesuffix("index.html") for name in pages(site) if name != "404.html"]
    (site / "harness.html").write_text(HARNESS.replace("PAGES", json.dumps([f"/{name}" for name in names])))
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    server.done = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    browser = subprocess.Popen(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
            *("--disable-component-update", "--disable-sync", "--hide-scrollbars", "--window-size=1400,1000"),
            f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
            *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-port=0"),
            f"http://127.0.0.1:{server.server_port}/harness.html",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert server.done.wait(300), "chromium did not come to an end with the pages"
    finally:
        browser.terminate()
        browser.wait(30)
        server.shutdown()
        server.server_close()
    assert [row["error"] for row in server.found if "error" in row] == []
    assert len(server.found) == 2 * len(names) > 40
    return server.found


def at(measured, width):
    return [row for row in measured if row["width"] == width]


def test_equations_are_typeset(measured):
    assert [row for row in measured if row["set"] != row["equations"] or row["wrong"]] == []
    assert max(row["set"] for row in measured if row["page"] == "/maths/") >= 20


def test_nothing_is_cut_off_in_a_window(measured):
    rows = at(measured, 1280)
    assert [(row["page"], row["code"]) for row in rows if row["code"]] == []
    assert [(row["page"], row["clipped"]) for row in rows if row["clipped"]] == []
    assert [(row["page"], row["page_width"]) for row in rows if row["page_width"] > 1280] == []


def test_nothing_spreads_or_breaks_on_a_telephone(measured):
    rows = at(measured, 390)
    assert [(row["page"], row["page_width"]) for row in rows if row["page_width"] > 390] == []
    assert [(row["page"], row["broken"]) for row in rows if row["broken"]] == []


@pytest.mark.parametrize("scheme", ["default", "slate"])
def test_words_stand_out_from_their_ground(measured, scheme):
    found = {pair: (row["page"], told) for row in at(measured, 1280) for pair, told in row["faint"][scheme].items()}
    assert not found, "\n".join(f"{pair}: {told}" for pair, told in found.items())


def test_nothing_is_fetched_from_elsewhere(measured):
    assert [(row["page"], row["foreign"]) for row in measured if row["foreign"]] == []

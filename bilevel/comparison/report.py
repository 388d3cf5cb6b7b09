"""A comparison as one page of HTML: figures, a table that sorts, warnings, laws, settings. It needs no other file."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.comparison.charts import COLOURS, FAINT, INK, Chart, charts, looks
from bilevel.comparison.measurements import Measurements
from bilevel.comparison.rows import Spread, Summary, number, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATE = Path(__file__).with_name("report.html")

# Heading, what the fragment calls it, what it says.
COLUMNS = (
    ("Game", "game", "The game"),
    ("Response", "response", "The follower's response"),
    ("Error", "error", "Relative error of one hypergradient at the game's start"),
    ("Its work", "work", "Gradients + Hessian-vector products of that hypergradient"),
    ("Value", "value", "The leader's loss at the end of the run, the follower converged"),
    ("Above optimum", "excess", "The same above the leader's optimum, where it is known"),
    ("Gradients", "gradients", "Gradients of the whole run"),
    ("Products", "products", "Hessian-vector products of the whole run"),
    ("Seconds", "seconds", "Seconds of the whole run"),
    ("Memory", "memory", "Peak bytes of the tensors of one hypergradient"),
    ("Warnings", "warnings", "How many warnings and failures, over all seeds"),
)
MARKS = {"passed": "✓", "failed": "✗"}


def page(comparison: Measurements) -> str:
    """The whole page."""
    drawn = charts(comparison)
    parts = {
        "title": "Responses side by side",
        "lead": _lead(comparison),
        "palette": _palette(),
        "figures": "\n".join(_figure(name, chart) for name, chart in drawn.items()),
        "heads": "\n".join(_head(*column) for column in COLUMNS),
        "rows": "\n".join(_row(comparison, summary, place) for place, summary in enumerate(comparison.summaries)),
        "warnings": _warnings(comparison),
        "laws": _laws(comparison),
        "references": _references(comparison),
        "settings": _settings(comparison),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def svg(figure: Figure, name: str, alt: str) -> str:
    """A figure as an inline SVG with real text, in the page's own colours."""
    from matplotlib import rc_context  # noqa: PLC0415 - optional

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Of all figures in the page, each name once.
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    for index, colour in enumerate(COLOURS):
        text = text.replace(colour, f"var(--c{index})")
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    box = "".join(re.findall(r'viewBox="[^"]+"', text)[:1])
    opening = f'<svg {box} role="img" aria-label="{html.escape(alt)}">'
    return opening + text[text.index(">") + 1 :]


def _lead(comparison: Measurements) -> str:
    held = {"game": comparison.games, "response": comparison.responses, "seed": comparison.seeds}
    steps = comparison.settings.get("steps")
    told = ", ".join(f"{len(found)} {noun if len(found) == 1 else noun + 's'}" for noun, found in held.items())
    told += f"; {steps} leader steps a run" if steps else ""
    failures = sum(row.failure is not None for row in comparison.rows)
    count = len(comparison.warnings) - failures
    found = f"{failures} of {len(comparison.rows)} runs failed" if failures else "No run failed"
    return f"{told}. {found}; {f'{count:,} warnings are below' if count else 'nothing warned'}."


def _palette() -> str:
    return " ".join(f"--c{index}: {colour};" for index, colour in enumerate(COLOURS))


def _figure(name: str, chart: Chart) -> str:
    return (
        f'<figure id="{name}"><div class="wide" tabindex="0" role="region" aria-label="Figure: {name}">'
        f"{svg(chart.figure, name, chart.alt)}</div><figcaption>{html.escape(chart.caption)}</figcaption></figure>"
    )


def _head(heading: str, key: str, meaning: str) -> str:
    kind = ' class="text"' if key in ("game", "response") else ""
    return (
        f'<th scope="col" data-key="{key}"{kind} aria-sort="none">'
        f'<button type="button" title="{html.escape(meaning)}">{heading}</button></th>'
    )


def _row(comparison: Measurements, summary: Summary, place: int) -> str:
    colour = COLOURS.index(looks(comparison)[summary.response]["color"])
    troubles = summary.warnings + summary.failures
    told = f"{summary.failures} failed" if summary.failures else str(summary.warnings or "")
    if troubles:
        told = f'<a href="#warnings">{told}</a>'
    cells = [
        f'<th scope="row" data-value="{html.escape(summary.game)}">{html.escape(summary.game)}</th>',
        f'<td class="text" data-value="{html.escape(summary.response)}">'
        f'<span class="dot" style="background: var(--c{colour})"></span>{html.escape(summary.response)}</td>',
        _cell(summary.error),
        _cell(summary.work),
        _cell(summary.value),
        _cell(summary.excess),
        _cell(summary.gradients),
        _cell(summary.products),
        _cell(summary.seconds),
        _cell(summary.memory, size),
        f'<td data-value="{troubles}">{told}</td>',
    ]
    return f'<tr data-place="{place}">{"".join(cells)}</tr>'


def _cell(spread: Spread | None, form: Any = number) -> str:
    if spread is None:
        return '<td data-value="">–</td>'
    median, low, high = form(spread.median), form(spread.low), form(spread.high)
    extent = f"<small>{low} to {high}</small>" if low != high else ""
    return f'<td data-value="{spread.median!r}">{median}{extent}</td>'


def _warnings(comparison: Measurements) -> str:
    """Failures in plain sight, warnings folded by response, the same kind of words once with its runs."""
    failed = [row for row in comparison.rows if row.failure]
    failures = [f"{row.response} on {row.game}, seed {row.seed}: {row.failure}" for row in failed]
    failures += [f"Reference of {r.game}, seed {r.seed}: {r.failure}" for r in comparison.references if r.failure]
    parts = [f"<h3>Failures</h3>{_list(failures, 'failed')}"] if failures else []
    for name in comparison.responses:
        kinds: dict[str, list[tuple[str, str]]] = {}
        for row in comparison.rows:
            if row.response == name:
                for text in row.warnings:
                    # One entry for each thing that is said, whatever the numbers in it.
                    kinds.setdefault(re.sub(r"[\d.]+(e[+-]?\d+)?", "#", text), []).append(
                        (f"{row.game} (seed {row.seed})", text)
                    )
        if not kinds:
            continue
        items = []
        for found in kinds.values():
            runs = ", ".join(dict.fromkeys(who for who, _ in found))
            items.append(f"{len(found)} times: {html.escape(found[0][1])} <small>{html.escape(runs)}</small>")
        count = sum(len(found) for found in kinds.values())
        listed = "".join(f"<li>{item}</li>" for item in items)
        parts.append(f"<details><summary>{html.escape(name)}: {count}</summary><ul>{listed}</ul></details>")
    return "\n".join(parts) or "<p>None.</p>"


def _list(items: Iterable[str], kind: str) -> str:
    return f'<ul class="{kind}">' + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def _laws(comparison: Measurements) -> str:
    """A row a law, a column a response; notes below their verdict."""
    if not comparison.laws:
        return "<p>Not checked in this comparison. <code>bilevel.testing.check_response</code> checks them.</p>"
    names = list(comparison.laws)
    laws = list(dict.fromkeys(law for given in comparison.laws.values() for law, _, _ in given))
    found = {(name, law): (verdict, note) for name, given in comparison.laws.items() for law, verdict, note in given}
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in names)
    rows = []
    for law in laws:
        cells = []
        for name in names:
            verdict, note = found.get((name, law), ("", ""))
            shown = html.escape(f"{MARKS.get(verdict, '')} {verdict}".strip()) or "–"
            told = f"<small>{html.escape(note)}</small>" if note else ""
            cells.append(f'<td class="{"failed" if verdict == "failed" else "verdict"}">{shown}{told}</td>')
        rows.append(f'<tr><th scope="row">{html.escape(law)}</th>{"".join(cells)}</tr>')
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Laws"><table><thead><tr><th scope="col">Law</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _references(comparison: Measurements) -> str:
    heads = ("Game", "Seed", "Kind", "Norm of the hypergradient", "Follower's gradient left", "Linear residual left")
    rows = []
    for r in comparison.references:
        numbers = [number(value) if value is not None else "–" for value in (r.norm, r.stationarity, r.residual)]
        cells = "".join(f"<td>{text}</td>" for text in (r.seed, html.escape(r.kind), *numbers))
        rows.append(f'<tr><th scope="row">{html.escape(r.game)}</th>{cells}</tr>')
    top = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _settings(comparison: Measurements) -> str:
    content: Mapping[str, Any] = {
        **comparison.settings,
        "versions": ", ".join(f"{name} {number_}" for name, number_ in comparison.versions.items()),
        "machine": comparison.machine,
    }
    shown = [
        f"<dt>{html.escape(key)}</dt><dd>"
        + (html.escape(value) if isinstance(value, str) else f"<pre>{html.escape(json.dumps(value, indent=1))}</pre>")
        + "</dd>"
        for key, value in content.items()
    ]
    return f"<dl>{''.join(shown)}</dl>"

"""Each notebook of docs/tutorials becomes a page of the site, tutorials/NAME.md, with what its cells printed and drew.

A figure's alternative text is its cell's metadata "alt". The notebook itself lies beside the page.
"""

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

TUTORIALS = Path(__file__).resolve().parents[2] / "docs" / "tutorials"


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its figures by their names."""
    parts, figures = [], {}
    for index, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"````python\n{source}\n````")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{index}.png"
                figures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![{cell['metadata']['alt']}]({name})")
            else:
                text = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"````{{ .text .output }}\n{text.rstrip()}\n````")
    download = f"[The notebook]({path.name}){{ .md-button download }}"
    first, rest = parts[0].split("\n", 1)
    return "\n\n".join([first, download, rest.strip(), *parts[1:]]) + "\n", figures


def on_files(files: Files, config: Any) -> Files:
    """Add the pages and the figures."""
    for path in sorted(TUTORIALS.glob("*.ipynb")):
        text, figures = page(path)
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=text))
        for name, content in figures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files

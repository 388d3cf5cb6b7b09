"""Each program of docs/figures becomes a page of the site, so that a figure can link to the code that made it.

The pages are sources/NAME.md; they are no files of the repository. The hook also writes the version into the footer.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "figures"


def version() -> str:
    """That of the library, without importing torch."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return found[1]


def on_config(config: Any) -> Any:
    """Write the version into every page's footer."""
    config.copyright = f"bilevel {version()}, MIT licence"
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for path in sorted(FIGURES.glob("*.py")):
        body = path.read_text(encoding="utf-8")
        text = f"---\nsearch:\n  exclude: true\n---\n\n# docs/figures/{path.name}\n\n````python\n{body}````\n"
        files.append(File.generated(config, f"sources/{path.stem}.md", content=text))
    return files

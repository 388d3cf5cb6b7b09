import importlib.util
from pathlib import Path

import pytest
import torch

FIGURES = Path(__file__).resolve().parents[1] / "docs/figures"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def page_script():
    """From a name to the program docs/figures/NAME.py, as a module: it knows what a page's tables should say."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"{name}_page", FIGURES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def pytest_terminal_summary(terminalreporter):
    """What tests recorded as told: reports carry it here from whichever worker ran them."""
    ran = [report for reports in terminalreporter.stats.values() for report in reports]
    told = [pair for report in ran if getattr(report, "when", None) == "call" for pair in report.user_properties]
    for title in dict.fromkeys(title for title, _ in told):
        terminalreporter.section(title)
        for line in sorted(line for name, line in told if name == title):
            terminalreporter.write_line(line)

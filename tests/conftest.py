import importlib.util
from pathlib import Path

import pytest
import torch

FIGURES = Path(__file__).resolve().parents[1] / "docs/figures"
SUMMARIES = pytest.StashKey[dict[str, list[str]]]()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # These problems are small: on a shared machine threads would mostly wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def summaries(request):
    """Title -> lines that are told at the end of the run."""
    return request.config.stash.setdefault(SUMMARIES, {})


@pytest.fixture(scope="session")
def page_script():
    """From a name to the program docs/figures/NAME.py, as a module: it knows what a page's tables should say."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"{name}_page", FIGURES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def pytest_terminal_summary(terminalreporter, config):
    for title, lines in config.stash.get(SUMMARIES, {}).items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)

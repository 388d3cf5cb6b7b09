import pytest
import torch

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


def pytest_terminal_summary(terminalreporter, config):
    for title, lines in config.stash.get(SUMMARIES, {}).items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)

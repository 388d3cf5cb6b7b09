import signal

import pytest
import torch

# A shell's background job ignores Ctrl-C, and commands leave it ignored: tests press it in any case.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_terminal_summary(terminalreporter):
    """What tests recorded as told: reports carry it here from whichever worker ran them."""
    ran = [report for reports in terminalreporter.stats.values() for report in reports]
    told = [pair for report in ran if getattr(report, "when", None) == "call" for pair in report.user_properties]
    for title in dict.fromkeys(title for title, _ in told):
        terminalreporter.section(title)
        for line in sorted(line for name, line in told if name == title):
            terminalreporter.write_line(line)

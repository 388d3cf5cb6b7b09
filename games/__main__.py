"""`python -m games` is the command `bilevel`."""

from __future__ import annotations

import signal
from collections.abc import Callable

from games import stopping


def main() -> None:
    """Run the command line, and end the process; Ctrl-C while PyTorch is still being loaded is one line, too."""
    try:
        stopping.main(_loaded)
    finally:
        # What is left is Python's own end, in which an exception has nowhere to go: a signal ends the process at once.
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)


def _loaded() -> Callable[[], object]:
    from games.cli import main as run

    return run


if __name__ == "__main__":
    main()

"""`python -m games` is the command `bilevel`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C while PyTorch is still being loaded ends it in one line too."""
    try:
        from games.cli import main as run
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()

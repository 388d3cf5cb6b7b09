"""`python -m games` is the command `bilevel`."""

from games.cli import main

if __name__ == "__main__":
    main()

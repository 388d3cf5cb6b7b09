"""Reaction curves with the path of play, one figure for each kind of economic game: docs/economics/*.png."""

from pathlib import Path

from games.economics.bounded_figures import bounded_figures
from games.economics.figures import figures

if __name__ == "__main__":
    for name, figure in {**figures(), **bounded_figures()}.items():
        figure.savefig(Path(__file__).resolve().parents[1] / "economics" / f"{name}.png", dpi=100)

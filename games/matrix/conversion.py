"""From and to the objects of pygambit, nashpy and OpenSpiel; none of them is needed but for its own conversion."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from games.errors import MissingExtraError
from games.matrix.finite import FiniteGame


def to_nashpy(game: FiniteGame) -> Any:
    """A `nashpy.Game` of two players."""
    try:
        import nashpy
    except ImportError as error:
        raise MissingExtraError(f"this needs nashpy ({error}). pip install 'bilevel[games]'") from error
    if len(game.actions) != 2:
        raise ValueError(f"nashpy solves games of two players; this one has {len(game.actions)}. Use Gambit().")
    return nashpy.Game(*(table.numpy() for table in game.payoffs))


def from_nashpy(game: Any) -> FiniteGame:
    """From a `nashpy.Game`."""
    return FiniteGame.of(*(np.array(table, dtype=np.float64) for table in game.payoff_matrices))


def to_pygambit(game: FiniteGame) -> Any:
    """A strategic `pygambit.Game`; payoffs become decimal fractions, exact to a double's 17 digits."""
    return _pygambit().Game.from_dict({n: t.numpy() for n, t in zip(game.names, game.payoffs, strict=True)})


def to_rational_pygambit(game: FiniteGame) -> Any:
    """As `to_pygambit`, in each player's own units: payoffs less the smallest, over a power of ten near their range.

    Gambit's solvers lose equilibria at payoffs of 1e9. All of it is done in decimal fractions, so that nothing is
    rounded and ties stay ties. Beside an offset of a million ranges and more doubles are no decimals any more, and
    differences are taken as doubles have them.
    """
    pygambit = _pygambit()
    tables = {}
    for name, table in zip(game.names, game.payoffs, strict=True):
        doubles = table.numpy()
        if abs(doubles).max() > 1e6 * np.ptp(doubles):
            doubles = doubles - doubles.min()
        exact = np.vectorize(lambda value: Fraction(repr(float(value))), otypes=[object])(doubles)
        least, width = exact.min(), exact.max() - exact.min()
        unit = Fraction(10) ** math.floor(math.log10(width)) if width else Fraction(1)
        tables[name] = np.vectorize(
            lambda value, least=least, unit=unit: pygambit.Rational(*((value - least) / unit).as_integer_ratio()),
            otypes=[object],
        )(exact)
    return pygambit.Game.from_dict(tables)


def from_pygambit(game: Any) -> FiniteGame:
    """From a `pygambit.Game`; one in extensive form becomes its reduced strategic form.

    The players' labels are kept as names where they are Python identifiers.
    """
    labels = tuple(player.label for player in game.players)
    kept = labels if all(label.isidentifier() for label in labels) else ()
    return FiniteGame.of(*(table.astype(np.float64) for table in game.to_arrays(dtype=float)), names=kept)


def to_open_spiel(game: FiniteGame) -> Any:
    """A `pyspiel.MatrixGame` for two players, else a `pyspiel.TensorGame`."""
    pyspiel = _pyspiel()
    if len(game.actions) == 2:
        rows, columns = ([str(i) for i in range(n)] for n in game.actions)
        tables = (table.tolist() for table in game.payoffs)
        return pyspiel.create_matrix_game("finite_game", "Finite game", rows, columns, *tables)
    names = [[str(i) for i in range(n)] for n in game.actions]
    flat = [table.flatten().tolist() for table in game.payoffs]
    return pyspiel.create_tensor_game("finite_game", "Finite game", names, flat)


def from_open_spiel(game: Any) -> FiniteGame:
    """From a `pyspiel.MatrixGame` or `TensorGame`; convert others first, by `pyspiel.extensive_to_tensor_game`."""
    pyspiel = _pyspiel()
    if not isinstance(game, (pyspiel.MatrixGame, pyspiel.TensorGame)):
        raise TypeError(
            f"from_open_spiel: {type(game).__name__} is no matrix or tensor game. Convert it first: "
            "pyspiel.extensive_to_tensor_game(game)."
        )
    return FiniteGame.of(*(np.array(game.player_utilities(i)) for i in range(game.num_players())))


def _pygambit() -> Any:
    try:
        import pygambit
    except ImportError as error:
        raise MissingExtraError(f"this needs pygambit ({error}). pip install 'bilevel[games]'") from error
    return pygambit


def _pyspiel() -> Any:
    try:
        import pyspiel
    except ImportError as error:
        raise MissingExtraError(f"this needs OpenSpiel ({error}). pip install 'bilevel[games]'") from error
    return pyspiel

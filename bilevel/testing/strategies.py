"""Hypothesis strategies that draw games with known answers.

Numbers are multiples of 1/16, so that a drawn game prints as short code and shrinks to one that a person can read. All
draws are well conditioned by construction: nothing is filtered.
"""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import strategies as st

from bilevel.testing.changes import LaidOut, Reflection, Single, Stretch
from bilevel.testing.constrained import BoxQuadratic, ConstrainedGame, Lasso, NonNegativeLeastSquares, WaterFilling
from bilevel.testing.duopolies import Bertrand, Cournot
from bilevel.testing.families import Exponential, LogBarrier, Quadratic
from bilevel.testing.forms import Nested, Scalar
from bilevel.testing.known import KnownGame, Matrix, Numbers
from bilevel.testing.players import QuadraticPlayers, bertrand_players, cournot_players, saddle
from bilevel.testing.programmes import Programme
from bilevel.testing.regressions import Logistic, Ridge


def numbers(size: int, low: float = -1.0, high: float = 1.0) -> st.SearchStrategy[Numbers]:
    """`size` multiples of 1/16 in [low, high]; simplest is the one nearest to zero."""
    entry = st.integers(round(low * 16), round(high * 16)).map(lambda k: k / 16)
    return st.tuples(*[entry] * size)


def matrices(rows: int, columns: int) -> st.SearchStrategy[Matrix]:
    """`rows` x `columns` multiples of 1/16 in [-1, 1], with a first entry of 1: never all zero."""
    return st.tuples(*[numbers(columns)] * rows).map(lambda m: ((1.0, *m[0][1:]), *m[1:]))


def quadratics(
    leaders: int = 3, followers: int = 4, *, conditioning: float = 5.0, coupling: float = 1.0, symmetric: bool = False
) -> st.SearchStrategy[Quadratic]:
    """`Quadratic` with up to so many entries.

    Args:
        leaders: The most entries of x.
        followers: The most entries of y.
        conditioning: Curvatures lie in [1 / conditioning, 1].
        coupling: The largest $|B_{ij}|$.
        symmetric: Draw potential games: the leader's cross term is the follower's.
    """

    @st.composite
    def draw_one(draw: st.DrawFn) -> Quadratic:
        n, m = draw(st.integers(1, leaders)), draw(st.integers(1, followers))
        steps = draw(st.tuples(*[st.integers(0, 8)] * m))
        table = draw(matrices(m, n))
        scaled = tuple(tuple(coupling * entry for entry in row) for row in table)
        cross = tuple(tuple(-e for e in row) for row in scaled) if symmetric else draw(matrices(m, n))
        return Quadratic(
            curvatures=tuple(round(1.0 - (1.0 - 1.0 / conditioning) * k / 8, 6) for k in steps),
            coupling=scaled,
            at=draw(numbers(n, 0.25, 1.0)),
            axis=draw(numbers(m)),
            target=draw(numbers(m, -2.0, 2.0)),
            cross=cross,
            # The total second derivative stays positive definite however large the answer is.
            ridge=1.0 + 2.0 * conditioning * coupling * n * m if symmetric else 1.0 + 2.0 * n * m,
        )

    return draw_one()


def _regression(kind: Callable[..., KnownGame], labels: bool, size: int) -> st.SearchStrategy[KnownGame]:
    @st.composite
    def draw_one(draw: st.DrawFn) -> KnownGame:
        m = draw(st.integers(1, size))
        outputs = st.sampled_from((1.0, -1.0)) if labels else st.integers(-32, 32).map(lambda k: k / 16)

        def rows() -> Matrix:
            inputs = draw(matrices(m + 1, m))
            return tuple((*row, draw(outputs)) for row in inputs)

        train = rows()
        if not labels:
            train = ((*train[0][:-1], 1.0), *train[1:])  # something to fit
        # Curvature: at most 1/2 from the data and 1/2 from the penalties, at least exp(-1.75) = 0.17.
        return kind(train=train, valid=rows(), at=draw(numbers(m, -1.75, -0.75)))

    return draw_one()


def ridges(size: int = 4) -> st.SearchStrategy[KnownGame]:
    """`Ridge` with up to `size` weights and a penalty for each."""
    return _regression(Ridge, False, size)


def logistics(size: int = 3) -> st.SearchStrategy[KnownGame]:
    """`Logistic` with up to `size` weights and a penalty for each."""
    return _regression(Logistic, True, size)


def _smooth(kind: Callable[..., KnownGame], leaders: int, followers: int) -> st.SearchStrategy[KnownGame]:
    @st.composite
    def draw_one(draw: st.DrawFn) -> KnownGame:
        n, m = draw(st.integers(1, leaders)), draw(st.integers(1, followers))
        return kind(coupling=draw(matrices(m, n)), at=draw(numbers(n)), target=draw(numbers(m, -2.0, 2.0)))

    return draw_one()


def exponentials(leaders: int = 3, followers: int = 3) -> st.SearchStrategy[KnownGame]:
    """`Exponential` with up to so many entries."""
    return _smooth(Exponential, leaders, followers)


def log_barriers(leaders: int = 3, followers: int = 3) -> st.SearchStrategy[KnownGame]:
    """`LogBarrier` with up to so many entries."""
    return _smooth(LogBarrier, leaders, followers)


def cournots() -> st.SearchStrategy[KnownGame]:
    """`Cournot` duopolies whose Stackelberg equilibrium is interior."""
    cost = st.integers(0, 16).map(lambda k: k / 16)
    slope = st.integers(4, 8).map(lambda k: k / 16)
    return st.builds(lambda b, c, d: Cournot(6.0, b, (c, d)), slope, cost, cost)


def bertrands() -> st.SearchStrategy[KnownGame]:
    """`Bertrand` duopolies with stable demand."""
    quarter = st.integers(0, 16).map(lambda k: k / 16)
    beta = st.integers(5, 8).map(lambda k: k / 16)
    return st.builds(lambda a, b, g, c: Bertrand(1.0 + a, b, g / 4, c), quarter, beta, quarter, quarter)


def constrained(leaders: int = 3, followers: int = 3) -> st.SearchStrategy[ConstrainedGame]:
    """A game of any family whose follower a set holds, or that has a term without a derivative."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> ConstrainedGame:
        n, m = draw(st.integers(1, leaders)), draw(st.integers(2, followers))
        target = draw(numbers(m, -2.0, 2.0))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            curvatures = draw(numbers(m, 0.25, 1.0))
            return BoxQuadratic(curvatures, draw(matrices(m, n)), draw(numbers(n, 0.25, 1.0)), target, draw(numbers(m)))
        if kind == 1:
            return NonNegativeLeastSquares(draw(matrices(n, m)), draw(numbers(n, 0.25, 1.0)), target)
        if kind == 2:
            return WaterFilling(draw(matrices(m, n)), draw(numbers(n)), target)
        # No multiple of 1/16 is at the kink.
        return Lasso(draw(numbers(m)), draw(st.sampled_from([(-0.71,), (-1.83,), (-3.1,)])), target)

    return draw_one()


def programmes(leaders: int = 3, followers: int = 3, rows: int = 3) -> st.SearchStrategy[Programme]:
    """A quadratic `Programme` with up to so many rows, an equality or none."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> Programme:
        n, m, k = draw(st.integers(1, leaders)), draw(st.integers(2, followers)), draw(st.integers(0, rows))
        # Off the grid of the other numbers, each in its own way: nothing is just at a constraint.
        offset = tuple(draw(numbers(1, 0.0, 1.0))[0] + 0.01 * root for root in (1.41421356, 1.73205081, 2.23606798)[:k])
        return Programme(
            draw(numbers(m, 0.25, 1.0)),
            draw(matrices(m, n)),
            draw(numbers(n, 0.25, 1.0)),
            draw(numbers(m, -2.0, 2.0)),
            draw(matrices(k, m)) if k else (),
            offset,
            draw(matrices(k, n)) if k else (),
            draw(st.sampled_from((None, 1.0 + 0.01 * 2.64575131))) if k else 1.0,
            draw(numbers(m)),
        )

    return draw_one()


def leader_follower() -> st.SearchStrategy[KnownGame]:
    """A game of any of the families above, in float64 vectors."""
    return st.one_of(
        quadratics(),
        ridges(),
        exponentials(),
        log_barriers(),
        cournots(),
        bertrands(),
        logistics(),
    )


def laid_out(games: st.SearchStrategy[KnownGame] | None = None) -> st.SearchStrategy[KnownGame]:
    """Games as vectors, as scalars where a player has one entry, and as nested pytrees."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> KnownGame:
        known = draw(leader_follower() if games is None else games)

        def layout(size: int) -> Nested | Scalar:
            options = [Nested(), Nested(reverse=True)] + ([Scalar()] if size == 1 else [])
            return draw(st.sampled_from(options))

        return LaidOut(known, layout(known.x0.numel()), layout(known.y0.numel()))

    return draw_one()


def single_precision(games: st.SearchStrategy[KnownGame] | None = None) -> st.SearchStrategy[KnownGame]:
    """Games played in float32."""
    return (leader_follower() if games is None else games).map(Single)


def reflections(size: int) -> st.SearchStrategy[Reflection]:
    """Orthogonal changes of `size` coordinates."""
    return numbers(size).map(lambda axis: Reflection((1.0, *axis[1:])))


def stretches(size: int) -> st.SearchStrategy[Stretch]:
    """Diagonal changes of `size` coordinates, by factors from 3/4 to 1: the curvature stays below 1."""
    return numbers(size, 0.75, 1.0).map(Stretch)


def players(count: int = 4, *, least: int = 2, symmetric: bool = False) -> st.SearchStrategy[QuadraticPlayers]:
    """General-sum quadratic games of `least` to `count` players, diagonally dominant; potential when `symmetric`."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> QuadraticPlayers:
        n = draw(st.integers(least, count))
        off = [[entry / 8 for entry in draw(numbers(n))] for _ in range(n)]
        own = draw(numbers(n, 0.5, 1.0))
        rows = []
        for i in range(n):
            rows.append(
                tuple(own[i] if i == j else (off[min(i, j)][max(i, j)] if symmetric else off[i][j]) for j in range(n))
            )
        return QuadraticPlayers(tuple(rows), draw(numbers(n, 0.25, 1.0)))

    return draw_one()


def saddles() -> st.SearchStrategy[QuadraticPlayers]:
    """Strictly convex-concave zero-sum games of two players."""
    return st.builds(
        saddle,
        numbers(2, 0.25, 1.0),
        st.integers(-16, 16).map(lambda k: k / 16),
        numbers(2),
    )


def oligopolies(firms: int = 4) -> st.SearchStrategy[QuadraticPlayers]:
    """Cournot and Bertrand oligopolies of 2 to `firms` firms."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> QuadraticPlayers:
        costs = draw(numbers(draw(st.integers(2, firms)), 0.0, 1.0))
        if draw(st.booleans()):
            return bertrand_players(1.0, 0.5, 0.125, costs)
        return cournot_players(6.0, 0.5, costs)

    return draw_one()


def trilevels() -> st.SearchStrategy[QuadraticPlayers]:
    """Quadratic games of three players in order of play, each anticipating those after it."""
    return players(3, least=3)

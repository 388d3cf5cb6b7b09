"""check_hypergradient: right on right responses, never right on planted errors, and what it says of each."""

import math
import random
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import bilevel as bl
from bilevel import testing
from bilevel.game import Game
from bilevel.responses import Response
from bilevel.responses.base import State
from bilevel.testing import KnownGame, Quadratic, Verdict, check_hypergradient, hypergradient, strategies
from bilevel.testing.finite_differences import slope_at_zero
from bilevel.tree import Variables, map_leaves

ROOT = Path(__file__).resolve().parents[2]
DOUBLE = torch.float64
SGD = partial(torch.optim.SGD, lr=0.7)
# Curvatures are at most about 1: this converges on every family.
CONVERGED = bl.Implicit(SGD, steps=3000, tolerance=1e-7)
GAME = Quadratic(
    curvatures=(0.5, 1.0),
    coupling=((1.0, 0.25), (0.5, -0.25)),
    at=(2.0, 1.0),
    target=(1.0, -1.0),
    cross=((0.25, 0.125), (0.25, 0.5)),
)


@dataclass(frozen=True)
class Planted(Response):
    """A response whose answer's derivative is multiplied by a factor."""

    inner: Response
    factor: float

    @property
    def promise(self):
        return self.inner.promise

    def after_backward(self, state: State, answer: Variables) -> State:
        return self.inner.after_backward(state, answer)

    def report(self, state: State) -> bl.responses.Report:
        return self.inner.report(state)

    def init(self, game: Game, *, follower: str | None = None, seed: int = 0) -> State:
        return self.inner.init(game, follower=follower, seed=seed)

    def __call__(
        self, game: Game, others: Mapping[str, Variables], state: State, batch: object = None
    ) -> tuple[Variables, State]:
        y, after = self.inner(game, others, state, batch)
        if self.factor == 0.0:
            return map_leaves(Tensor.detach, y), after
        return map_leaves(lambda t: t.detach() + self.factor * (t - t.detach()), y), after


def scalar_game(leader: Callable[..., Tensor], follower: Callable[..., Tensor], x: float, y: object = 1.0) -> bl.Game:
    return bl.Game(
        x=bl.Player(leader, torch.tensor(x, dtype=DOUBLE)), y=bl.Player(follower, torch.tensor(y, dtype=DOUBLE))
    )


def told(check: testing.HypergradientCheck) -> str:
    return " ".join(check.findings)


# Right -------------------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(strategies.leader_follower())
def test_a_converged_response_is_right(known: KnownGame) -> None:
    check = check_hypergradient(known.game(), CONVERGED)
    assert check, str(check)
    # The claim is exact to 1e-7 times the conditioning (below 10); so the error that is shown is the check's own.
    assert check.error < 1e-4 or known.hypergradient(known.x0).norm() < 1e-4


@settings(max_examples=15, deadline=None)
@given(strategies.single_precision())
def test_single_precision_is_never_called_wrong(known: KnownGame) -> None:
    check = check_hypergradient(known.game(), bl.Implicit(SGD, steps=3000, tolerance=1e-4))
    assert check.verdict is not Verdict.WRONG, str(check)


@settings(max_examples=15, deadline=None)
@given(strategies.laid_out())
def test_layouts_do_not_matter(known: KnownGame) -> None:
    assert check_hypergradient(known.game(), CONVERGED)


@pytest.mark.parametrize(
    "response",
    [
        bl.Implicit(bl.Scipy("L-BFGS-B"), tolerance=1e-6),
        bl.Unrolled(SGD, steps=80),
        bl.Hypernetwork(partial(torch.optim.Adam, lr=1e-2), warmup=1000, sampler=bl.responses.Perturbations(count=4)),
    ],
    ids=["Implicit", "Unrolled", "Hypernetwork"],
)
def test_every_strategy_that_converges_is_right(response: Response) -> None:
    check = check_hypergradient(GAME.game(), response)
    assert check, str(check)
    assert check.findings == ()


def test_the_table_is_the_known_hypergradient() -> None:
    check = check_hypergradient(GAME.game(), CONVERGED)
    # Two entries, two directions at right angles: together they hold the whole gradient.
    norm = math.hypot(*(row.difference for row in check.rows))
    assert norm == pytest.approx(float(GAME.hypergradient(GAME.x0).norm()), rel=1e-9)


def test_settling_lets_a_warm_started_response_arrive() -> None:
    response = bl.Unrolled(SGD, steps=3)
    assert not check_hypergradient(GAME.game(), response)
    # Started at the optimum, three steps still see only three steps' worth of the derivative: 1 - .65^3 of it.
    check = check_hypergradient(GAME.game(), response, settle=30)
    assert check.verdict is Verdict.WRONG
    assert "derivative is at fault" in told(check)
    assert check_hypergradient(GAME.game(), bl.Implicit(SGD, steps=5, tolerance=1e-6), settle=30)


def test_a_state_of_ones_own_is_used() -> None:
    game, response = GAME.game(), bl.Implicit(SGD, steps=5, tolerance=1e-6)
    state = response.init(game)
    with torch.no_grad(), pytest.warns(bl.errors.NonConvergenceWarning):
        for _ in range(10):
            _, state = response(game, {"x": game.initial("x")}, state)
    assert check_hypergradient(game, response, state=state)


def test_another_pair_of_three_players() -> None:
    def first(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (a - 1) ** 2 + (b - c) ** 2

    def second(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (b - a) ** 2 + c**2

    def third(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return (c - a * b) ** 2

    start = torch.tensor(0.5, dtype=DOUBLE)
    game = bl.Game(a=bl.Player(first, start), b=bl.Player(second, start), c=bl.Player(third, start))
    assert check_hypergradient(game, bl.Unrolled(SGD, steps=60))
    check = check_hypergradient(game, bl.Unrolled(SGD, steps=60), leader="b", at={"a": torch.tensor(2.0, dtype=DOUBLE)})
    assert check
    # d/db [(b - 2)^2 + (2 b)^2] at .5
    assert abs(check.rows[0].difference) == pytest.approx(1.0, rel=1e-6)


# Held --------------------------------------------------------------------------------------------------------------


def test_dropout_and_minibatches_are_held() -> None:
    torch.manual_seed(0)
    rows = torch.randn(4, 8, 5, dtype=DOUBLE)

    def train(x: Tensor, y: Tensor, batch: Tensor) -> Tensor:
        return (torch.nn.functional.dropout(batch, 0.3) @ y - 1).square().mean() + x.exp() * y.square().sum()

    def valid(y: Tensor, batch: Tensor) -> Tensor:
        return (batch @ y - 1).square().mean()

    game = bl.Game(
        x=bl.Player(valid, torch.tensor(-1.0, dtype=DOUBLE), data=list(rows[2:])),
        y=bl.Player(train, torch.zeros(5, dtype=DOUBLE), data=list(rows[:2])),
    )
    before = torch.random.get_rng_state()
    first = check_hypergradient(game, bl.Implicit(bl.Scipy("L-BFGS-B"), tolerance=1e-6))
    assert first, str(first)
    assert torch.equal(before, torch.random.get_rng_state())
    again = check_hypergradient(game, bl.Implicit(bl.Scipy("L-BFGS-B"), tolerance=1e-6))
    assert first == again
    other = check_hypergradient(game, bl.Implicit(bl.Scipy("L-BFGS-B"), tolerance=1e-6), batches={"x": rows[3]})
    assert other
    assert other.rows != first.rows


# Wrong -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(strategies.leader_follower())
def test_an_error_of_a_twentieth_is_never_right(known: KnownGame) -> None:
    honest = hypergradient.claimed
    generator = torch.Generator().manual_seed(0)

    def planted(*arguments: object) -> object:
        claim = honest(*arguments)  # type: ignore[arg-type]
        away = torch.randn(claim.x.numel(), generator=generator, dtype=DOUBLE)
        size = torch.linalg.vector_norm(claim.gradient)
        return replace(claim, gradient=claim.gradient + 0.055 * size * away / away.norm())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hypergradient, "claimed", planted)
        # As many directions as x has entries: then nothing can hide.
        check = check_hypergradient(known.game(), CONVERGED, directions=known.x0.numel(), atol=0.0)
    if known.hypergradient(known.x0).norm() > 1e-6:
        assert check.verdict is Verdict.WRONG, str(check)


@pytest.mark.parametrize(
    ("factor", "finding"),
    [
        (-1.0, "implicit term has the wrong sign"),
        (0.0, "the direct term alone"),
        (1.05, "implicit term 1.05 times"),
        (0.95, "implicit term 0.95 times"),
    ],
)
def test_a_planted_factor_is_named(factor: float, finding: str) -> None:
    check = check_hypergradient(GAME.game(), Planted(CONVERGED, factor))
    assert check.verdict is Verdict.WRONG
    assert finding in told(check)
    assert "derivative is at fault" in told(check)


def test_a_game_without_a_direct_term() -> None:
    game = scalar_game(lambda y: (y - 1) ** 2, lambda x, y: (y - x) ** 2, 3.0)
    assert "minus the truth" in told(check_hypergradient(game, Planted(CONVERGED, -1.0)))
    assert "No path leads" in told(check_hypergradient(game, Planted(CONVERGED, 0.0)))


def test_an_unconverged_answer_is_named() -> None:
    check = check_hypergradient(GAME.game(), bl.Implicit(SGD, steps=3))
    assert check.verdict is Verdict.WRONG
    assert "The answer is at fault" in told(check)
    assert "It warned: FollowerNonConvergenceWarning" in told(check)


def test_an_unrolled_answer_is_right_for_its_steps() -> None:
    check = check_hypergradient(GAME.game(), bl.Unrolled(SGD, steps=3))
    assert check.verdict is Verdict.WRONG
    assert "exact derivative of what the response computes" in check.findings[0]


def test_a_cheap_inverse_is_named() -> None:
    response = bl.Implicit(SGD, steps=3000, tolerance=1e-6, linear_solver=bl.linear.Identity())
    check = check_hypergradient(GAME.game(), response)
    assert check.verdict is Verdict.WRONG
    assert "relative residual" in told(check)


def test_a_cold_hypernetwork_is_named() -> None:
    check = check_hypergradient(GAME.game(), bl.Hypernetwork(partial(torch.optim.Adam, lr=1e-2)))
    assert check.verdict is Verdict.WRONG
    assert "learned slope leaves" in told(check)


def test_a_loss_that_detaches_is_named() -> None:
    game = scalar_game(lambda y: (y - 1) ** 2, lambda x, y: (y - x.detach() * x) ** 2, 2.5)
    check = check_hypergradient(game, CONVERGED)
    assert check.verdict is Verdict.WRONG
    assert "The loss of player 'y' itself is differentiated wrongly in 'x'" in check.findings[0]


# Cannot tell ---------------------------------------------------------------------------------------------------------


def softplus_without_minimum(x: Tensor, y: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-y * x)


@pytest.mark.parametrize(
    ("leader", "follower", "x", "y", "finding"),
    [
        (lambda x, y: y.abs() + (x - 1) ** 2, lambda x, y: (y - x) ** 2, 0.0, 1.0, "has a kink here"),
        (lambda x, y: (y - 1) ** 2, lambda x, y: (y - x) ** 2 / 2 + y.abs(), 0.5, 1.0, "kink where it is least"),
        (lambda x, y: (y - 1) ** 2, lambda x, y: y * x, 2.5, 1.0, "runs away"),
        (lambda x, y: (y - 1) ** 2, softplus_without_minimum, 2.5, 1.0, "not unique or very flat"),
        (
            lambda x, y: (y - 1).square().sum(),
            lambda x, y: (y.sum() - x) ** 2,
            2.5,
            [1.0, 0.0],
            "not unique or very flat",
        ),
        (lambda x, y: (y - 1) ** 2, lambda x, y: y**3 / 3 - y + x * y, 0.9999, 0.02, "hops"),
    ],
    ids=["kink of the leader", "kink of the follower", "linear", "minimum at infinity", "valley", "fold"],
)
def test_what_cannot_be_told_says_why(
    leader: Callable[..., Tensor], follower: Callable[..., Tensor], x: float, y: object, finding: str
) -> None:
    check = check_hypergradient(scalar_game(leader, follower, x, y), bl.Unrolled(partial(SGD, lr=0.1), steps=100))
    assert check.verdict is Verdict.CANNOT_TELL, str(check)
    assert not check
    assert finding in told(check), str(check)


def test_a_flat_direction_that_no_loss_sees_does_no_harm() -> None:
    game = scalar_game(lambda y: (y.sum() - 1) ** 2, lambda x, y: (y.sum() - x) ** 2, 2.5, [1.0, 0.0])
    assert check_hypergradient(game, bl.Unrolled(partial(SGD, lr=0.1), steps=100))


def test_random_numbers_that_are_not_torchs_are_seen() -> None:
    game = scalar_game(lambda y: (y - 1) ** 2 + 1e-3 * random.random(), lambda x, y: (y - x) ** 2, 3.0)
    check = check_hypergradient(game, CONVERGED)
    assert check.verdict is Verdict.CANNOT_TELL
    assert "another value when it is evaluated again" in told(check)


def test_a_response_that_raises_is_told() -> None:
    game = scalar_game(lambda y: (y - 1) ** 2, lambda x, y: -((y - x) ** 2), 2.5)
    check = check_hypergradient(game, bl.Implicit(partial(SGD, lr=0.1), tolerance=None))
    assert check.verdict is Verdict.CANNOT_TELL
    assert "The response raised IndefiniteSystemError" in check.findings[0]


def test_noise_is_told() -> None:
    def leader(x: Tensor, y: Tensor) -> Tensor:
        return 1e4 + (y - 1) ** 2  # the loss's last digit is a thousandth

    game = bl.Game(x=bl.Player(leader, torch.tensor(1.01)), y=bl.Player(lambda x, y: (y - x) ** 2, torch.tensor(1.0)))
    check = check_hypergradient(game, CONVERGED, rtol=1e-5)
    assert check.verdict is Verdict.CANNOT_TELL
    assert "float64" in told(check)


# What it looks like ---------------------------------------------------------------------------------------------------


def test_it_prints() -> None:
    check = check_hypergradient(GAME.game(), Planted(CONVERGED, -1.0))
    assert "\n" not in repr(check)
    assert len(repr(check)) <= 235  # pytest cuts at 240
    assert repr(check).startswith("<hypergradient of 'x' through 'y': wrong, off by ")
    assert "the claimed gradient's" in str(check)
    assert check.findings[0] in str(check)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"leader": "y"}, "does not move before"),
        ({"follower": "z"}, "is no player"),
        ({"directions": 0}, "directions >= 1"),
        ({"rtol": 0.0}, "rtol > 0"),
        ({"at": {"y": torch.zeros(2)}}, "The follower 'y' answers"),
        ({"at": {"x": torch.zeros(3, dtype=DOUBLE)}}, "the form of its init"),
        ({"at": {"x": torch.zeros(2)}}, "torch.float64"),
        ({"batches": {"x": 1}}, "players with data are"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_hypergradient(GAME.game(), CONVERGED, **options)  # type: ignore[arg-type]


def test_it_needs_no_hypothesis() -> None:
    code = "import sys, bilevel as bl; bl.testing.check_hypergradient; print('hypothesis' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"


# The differences ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [1e-15, 1e-8, 1e-4])
def test_the_error_of_the_differences_holds(noise: float) -> None:
    generator = random.Random(0)
    for _ in range(100):
        rate = generator.uniform(0.2, 3.0)

        def noisy(s: float, rate: float = rate) -> float:
            return math.exp(rate * s) + noise * generator.uniform(-1, 1)

        found = slope_at_zero(noisy, noisy(0.0), step=0.1, noise=noise, goal=1e-6)
        assert abs(found.value - rate) <= found.error
        assert found.error < 1e-6 or found.error < 3e3 * noise


def test_a_kink_is_no_slope() -> None:
    found = slope_at_zero(lambda s: abs(s) + s, 0.0, step=0.1, noise=1e-15, goal=1e-6)
    assert not found.settled
    assert found.kink == pytest.approx(2.0)
    assert found.error >= 1.0


def test_a_step_out_of_the_domain_is_shortened() -> None:
    found = slope_at_zero(
        lambda s: math.log(0.05 + s) if s > -0.05 else math.nan, math.log(0.05), step=1.0, noise=1e-15, goal=1e-2
    )
    assert abs(found.value - 20.0) <= found.error <= 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_a_follower_that_starts_at_its_optimum_of_0_is_checked(dtype, size):
    """It has neither a gradient nor a size to measure by."""
    zero = torch.tensor(0.0, dtype=dtype)
    game = bl.Game(
        x=bl.Player(lambda y: (y - 3 * size) ** 2, zero),
        y=bl.Player(lambda x, y: (y - x) ** 2 + 0.25 * y**2, zero),
    )
    response = bl.Implicit(partial(torch.optim.SGD, lr=0.1), steps=50)
    check = check_hypergradient(game, response)
    assert check.verdict is Verdict.RIGHT, str(check)

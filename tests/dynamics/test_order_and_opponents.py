"""LOLA's fixed points, the ridge and the total gradient on random zero-sum games, two timescales."""

from functools import partial

import pytest
import torch
from torch import optim

import bilevel as bl
from bilevel.dynamics import Field

D = torch.float64


def scalar(value):
    return torch.tensor(value, dtype=D)


def tandem():
    """L_i = (x + y)^2 - 2 z_i."""
    return bl.Game(
        x=bl.Player(lambda x, y: (x + y) ** 2 - 2 * x, scalar(0.2)),
        y=bl.Player(lambda x, y: (x + y) ** 2 - 2 * y, scalar(0.5)),
    )


@pytest.mark.parametrize(
    ("rule", "total"),
    [
        (bl.dynamics.Simultaneous(), 1.0),
        (bl.dynamics.LookAhead(0.1), 1.0),
        # s = x + y: the own term 2 s - 2, the shaping term -a d/dx 2 s (2 s - 2) = -a (8 s - 4), at a = .1.
        (bl.dynamics.LOLA(0.1), 4 / 3),
        # s' = s - a (2 s - 2) = .8 s + .2 and .8 * 2 s' = 2.
        (bl.dynamics.ExactLOLA(0.1), 1.3125),
    ],
    ids=["simultaneous", "look-ahead", "LOLA", "exact LOLA"],
)
def test_the_tandem_ends_where_the_books_say(rule, total):
    ended = bl.solve(tandem(), dynamics=rule, optimizer=partial(optim.SGD, lr=0.05), steps=600).variables
    assert float(ended["x"] + ended["y"]) == pytest.approx(total, abs=1e-8)


def dilemma(seed):
    """The iterated prisoner's dilemma, discount .96: logits of cooperation after start, CC, CD, DC, DD."""
    draw = torch.randn(2, 5, dtype=D, generator=torch.Generator().manual_seed(seed))
    years = torch.tensor([1.0, 3.0, 0.0, 2.0], dtype=D)  # of the first, after CC, CD, DC, DD

    def cost(mine, other, own_years):
        first, second = torch.sigmoid(mine), torch.sigmoid(other[torch.tensor([0, 1, 3, 2, 4])])
        joint = torch.stack([first * second, first * (1 - second), (1 - first) * second, (1 - first) * (1 - second)], 1)
        return joint[0] @ torch.linalg.solve(torch.eye(4, dtype=D) - 0.96 * joint[1:], own_years)

    return bl.Game(
        x=bl.Player(lambda x, y: cost(x, y, years), draw[0]),
        y=bl.Player(lambda x, y: cost(y, x, years), draw[1]),
    )


def test_the_dilemmas_values():
    game = dilemma(0)
    sure = 40.0
    tit = torch.tensor([sure, sure, -sure, sure, -sure], dtype=D)  # as the first sees it: repeat what the other did
    defect = torch.full((5,), -sure, dtype=D)
    for player in "xy":
        assert float(game.loss(player, {"x": tit, "y": tit})) == pytest.approx(25.0)
        assert float(game.loss(player, {"x": defect, "y": defect})) == pytest.approx(50.0)


@pytest.mark.slow
def test_lola_learns_to_cooperate_where_plain_play_defects():
    plain, shaped = [], []
    for seed in range(5):
        game, sgd = dilemma(seed), partial(optim.SGD, lr=1.0)
        for rule, found in ((bl.dynamics.Simultaneous(), plain), (bl.dynamics.LOLA(1.0), shaped)):
            ended = bl.solve(game, dynamics=rule, optimizer=sgd, steps=300)
            found.append(0.04 * sum(ended.values.values()) / 2)  # years a round
    assert sum(value > 1.8 for value in plain) >= 4, plain
    assert sum(value < 1.2 for value in shaped) >= 4, shaped


def quadratic_field(A, B, C, z):
    """Of f = x'Ax/2 + x'By + y'Cy/2, which x minimises and y maximises."""
    n = len(A)

    def loss(point):
        x, y = point["x"][0], point["y"][0]
        value = 0.5 * x @ A @ x + x @ B @ y + 0.5 * y @ C @ y
        return {"x": value, "y": -value}

    def evaluate(point, wanted, differentiable):
        losses = loss(point)
        return {name: list(torch.autograd.grad(losses[name], point[name], create_graph=True)) for name in wanted}

    return Field(evaluate, {"x": [z[:n]], "y": [z[n:]]}, None, loss)


def dense(rule, A, B, C):
    """The matrix of z -> directions."""
    size = len(A) + len(C)
    columns = []
    for z in torch.eye(size, dtype=D):
        field = quadratic_field(A, B, C, z)
        columns.append(field.stack(rule.directions(field, {})[0]).detach())
    return torch.stack(columns, dim=1)


def ridge_matrix(A, B, C):
    lower = torch.linalg.solve(C, B.mT)
    return torch.cat([torch.cat([A, B], -1), torch.cat([-B.mT - lower @ A, -C - lower @ B], -1)], -2)


def total_matrix(A, B, C):
    schur = A - B @ torch.linalg.solve(C, B.mT)
    return torch.cat([torch.cat([schur, torch.zeros_like(B)], -1), torch.cat([-B.mT, -C], -1)], -2)


def drawn(n, m, count, seed):
    generator = torch.Generator().manual_seed(seed)

    def symmetric(k):
        raw = torch.randn(count, k, k, dtype=D, generator=generator)
        return 0.5 * (raw + raw.mT)

    A = symmetric(n) + torch.eye(n, dtype=D)
    C = symmetric(m) - torch.eye(m, dtype=D)
    return A, torch.randn(count, n, m, dtype=D, generator=generator), C


SIZES = [(n, m) for n in (1, 2, 3) for m in (1, 2, 3)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_stable_points_are_the_differential_stackelberg_ones(size):
    """9 sizes of 1,112 games, 10,008 in all; near-degenerate ones, where rounding decides, are counted and left out."""
    A, B, C = drawn(*size, 1112, seed=size[0] * 10 + size[1])
    schur = A - B @ torch.linalg.solve(C, B.mT)
    own, follower, total = (torch.linalg.eigvalsh(M).amin(-1) for M in (A, -C, schur))
    clear = (follower.abs() > 1e-3) & (total.abs() > 1e-3)
    assert int(clear.sum()) > 1050
    stackelberg, nash = (follower > 0) & (total > 0), (follower > 0) & (own > 0)
    assert 0 < int(stackelberg.sum()) < 1112 and bool((stackelberg | ~nash)[clear].all())
    assert int((stackelberg & ~nash).sum()) > 0
    for matrix in (ridge_matrix(A, B, C), total_matrix(A, B, C)):
        stable = torch.linalg.eigvals(matrix).real.amin(-1) > 0
        assert torch.equal(stable[clear], stackelberg[clear])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_rules_are_those_matrices(size):
    A, B, C = drawn(*size, 5, seed=7)
    solver = bl.linear.Dense()
    for a, b, c in zip(A, B, C):
        assert torch.allclose(
            dense(bl.dynamics.FollowTheRidge(linear_solver=solver), a, b, c), ridge_matrix(a, b, c), atol=1e-8
        )
        assert torch.allclose(
            dense(bl.dynamics.TotalGradient(linear_solver=solver), a, b, c), total_matrix(a, b, c), atol=1e-8
        )


@pytest.mark.slow
@pytest.mark.parametrize("rule", [bl.dynamics.FollowTheRidge(), bl.dynamics.TotalGradient()], ids=["ridge", "total"])
def test_the_traps(rule):
    sgd = partial(optim.SGD, lr=0.05)

    def play(value):
        game = bl.Game(x=bl.Player(value, scalar(0.3)), y=bl.Player(lambda x, y: -value(x, y), scalar(0.2)))
        ended = bl.solve(game, dynamics=rule, optimizer=sgd, steps=400).variables
        return abs(float(ended["x"])) + abs(float(ended["y"]))

    # Stackelberg and not Nash: they stay. Neither: they leave, where gradient play would come to rest.
    assert play(lambda x, y: -0.5 * x**2 + 2 * x * y - 0.75 * y**2) < 1e-6
    assert play(lambda x, y: 0.75 * x**2 + 2 * x * y + 0.5 * y**2 - 0.25 * y**4) > 0.5


@pytest.mark.slow
def test_the_total_gradient_of_a_general_game_is_implicits_at_the_followers_optimum():
    game = bl.Game(
        x=bl.Player(lambda x, y, z: (y - 2 * z + 1) ** 2 + x**2, scalar(0.3)),
        y=bl.Player(lambda x, y, z: y**2 + 0.5 * y * z - x * y, scalar(0.0)),
        z=bl.Player(lambda x, y, z: z**2 - 0.7 * y * z + (x * z).sin(), scalar(0.0)),
    )
    joined = game.joined(both=("y", "z"))
    pair = bl.Implicit(bl.ScipyRoot(), steps=200, tolerance=1e-10, linear_solver=bl.linear.Dense())
    led = bl.solve(joined, both=pair, optimizer=partial(optim.SGD, lr=0.1), steps=200)
    rates = {"x": partial(optim.SGD, lr=0.05), "y": partial(optim.SGD, lr=0.3), "z": partial(optim.SGD, lr=0.3)}
    total = bl.solve(game, dynamics=bl.dynamics.TotalGradient(), optimizer=rates, steps=800)
    assert float(total.variables["x"]) == pytest.approx(float(led.variables["x"]), abs=1e-6)


def test_two_timescales_are_two_learning_rates():
    game, sgd = tandem(), lambda lr: partial(optim.SGD, lr=lr)
    scaled = bl.solve(game, dynamics=bl.dynamics.TwoTimescale({"y": 5.0}), optimizer=sgd(0.05), steps=30)
    named = bl.solve(game, optimizer={"x": sgd(0.05), "y": sgd(0.25)}, steps=30)
    assert float(scaled.variables["y"]) == pytest.approx(float(named.variables["y"]), abs=1e-12)


@pytest.mark.parametrize(
    "rule",
    [
        bl.dynamics.LOLA(0.1),
        bl.dynamics.ExactLOLA(0.1),
        bl.dynamics.FollowTheRidge(),
        bl.dynamics.TotalGradient(),
        bl.dynamics.TwoTimescale({"x": 0.5}),
    ],
    ids=repr,
)
def test_minibatches_are_shared_within_a_step_and_resuming_is_exact(rule, tmp_path):
    rows = [torch.tensor(float(i), dtype=D) for i in range(4)]
    seen = []

    def lead(x, y, batch):
        seen.append(float(batch))
        return (x - batch) ** 2 + x * y

    game = bl.Game(x=bl.Player(lead, scalar(0.0), data=rows), y=bl.Player(lambda x, y: y**2 - x * y, scalar(1.0)))
    options = {"dynamics": rule, "optimizer": partial(optim.Adam, lr=0.1)}
    seen.clear()
    whole = bl.solve(game, steps=4, **options)
    order = [value for at, value in enumerate(seen) if at == 0 or value != seen[at - 1]]
    assert order == [0.0, 1.0, 2.0, 3.0]
    bl.solve(game, steps=2, checkpoint=tmp_path / "run.pt", **options)
    again = bl.solve(game, steps=4, checkpoint=tmp_path / "run.pt", **options)
    assert torch.equal(whole.variables["x"], again.variables["x"])


def test_refusals():
    for wrong in (
        lambda: bl.dynamics.LOLA(0.0),
        lambda: bl.dynamics.ExactLOLA(-1.0),
        lambda: bl.dynamics.FollowTheRidge(0.0),
        lambda: bl.dynamics.TwoTimescale({"x": 0.0}),
    ):
        with pytest.raises(ValueError, match="positive finite"):
            wrong()
    for rule, wanted in (
        (bl.dynamics.FollowTheRidge(leaders=2), "at least one to lead"),
        (bl.dynamics.TwoTimescale({"q": 1.0}), r"names \['q'\]"),
    ):
        with pytest.raises(ValueError, match=wanted):
            bl.solve(tandem(), dynamics=rule, steps=1)
    one = bl.Game(x=bl.Player(lambda x: x**2, scalar(1.0)))
    with pytest.raises(ValueError, match="at least one to lead"):
        bl.solve(one, dynamics=bl.dynamics.TotalGradient(), steps=1)

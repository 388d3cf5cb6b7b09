"""A state that is written into, and an examination now and then: the same numbers, and what is lost is said."""

import io
from functools import partial

import pytest
import torch
from torch import optim

import bilevel as bl
from bilevel.comparison.memory import peak_bytes
from bilevel.testing.laws.state import same_bits

from .test_leafwise import X, best_rows, game

ADAM = partial(optim.Adam, lr=0.02)
IN_PLACE = bl.responses.Memory(in_place=True)
NETWORKS = {"rows": bl.networks.RowScaled(), "dense": bl.networks.Linear(), "low rank": bl.networks.LowRank(2)}


def pair(network, **options):
    """The same response, copying and in place."""
    made = partial(bl.Hypernetwork, ADAM, scale=0.1, network=network, steps=2, tolerance=None, **options)
    return made(), made(memory=IN_PLACE)


@pytest.mark.parametrize(
    "options", [{}, {"warmup": 3, "sampler": bl.responses.Perturbations(around={"x": X})}], ids=["local", "around"]
)
@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_in_place_is_the_same_numbers_in_the_same_state(network, options):
    played, (copying, writing) = game(best_rows), pair(network, **options)
    copied, written = copying.init(played), writing.init(played)
    for step in range(4):
        x = {"x": (X + 0.1 * step).requires_grad_()}
        one, copied = copying(played, x, copied)
        other, after = writing(played, x, written)
        assert after is written
        same_bits(other, one, "the answer")
        same_bits(written, copied)


def test_in_place_an_earlier_answer_keeps_its_values_and_loses_its_derivative_aloud():
    played, (copying, writing) = game(best_rows), pair(bl.networks.RowScaled(), warmup=30)
    x = X.clone().requires_grad_()
    wanted, _ = copying(played, {"x": x}, copying.init(played))
    state = writing.init(played)
    answer, state = writing(played, {"x": x}, state)
    (slope,) = torch.autograd.grad(answer["matrix"].square().sum(), x, retain_graph=True)
    assert torch.equal(slope, torch.autograd.grad(wanted["matrix"].square().sum(), x)[0])
    kept = answer["matrix"].detach().clone()
    writing(played, {"x": X + 1}, state)
    assert torch.equal(answer["matrix"], kept)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(answer["matrix"].square().sum(), x)


def test_in_place_a_call_that_raises_leaves_a_state_that_goes_on():
    stops = []

    def follow(x, weights):
        if len(stops) == 1:
            stops.append(1)
            raise RuntimeError("stopped")
        return 0.5 * ((weights - x) ** 2).sum()

    def lead(weights):
        return weights.square().sum()

    played = bl.Game(x=bl.Player(lead, X), weights=bl.Player(follow, torch.zeros(3, dtype=torch.float64)))
    writing = bl.Hypernetwork(ADAM, network=bl.networks.RowScaled(), memory=IN_PLACE, warmup=400, tolerance=None)
    state = writing.init(played)
    writing(played, {"x": X}, state)
    stops.append(1)
    with pytest.raises(RuntimeError, match="stopped"):
        writing(played, {"x": X + 1}, state)
    torch.testing.assert_close(state["centre"], X + 1)  # written around the new centre: the same map
    torch.testing.assert_close(state["w0"][0], X + 1, atol=0.1, rtol=0.0)
    answer, _ = writing(played, {"x": X + 1}, state)
    torch.testing.assert_close(answer, X + 1, atol=0.1, rtol=0.0)


def test_solve_in_place_is_solve_and_resumes(tmp_path):
    played, (copying, writing) = game(best_rows), pair(bl.networks.RowScaled())
    run = partial(bl.solve, played, optimizer=partial(optim.SGD, lr=0.1))
    whole, again = run(weights=copying, steps=6), run(weights=writing, steps=6)
    same_bits(again.variables, whole.variables, "variables")
    for first in (writing, copying):  # the numbers are the same, and a run may change its mind
        path = tmp_path / f"{first.in_place}.pt"
        run(weights=first, steps=3, checkpoint=path)
        same_bits(run(weights=writing, steps=6, checkpoint=path).variables, whole.variables, "resumed")


def test_solve_in_place_stopped_in_a_step_keeps_the_last_file(tmp_path):
    calls, stop = [], [0]

    def lead(weights):
        calls.append(1)
        if len(calls) in stop:
            raise KeyboardInterrupt
        return ((weights["matrix"] - 1) ** 2).sum()

    played = bl.Game(x=bl.Player(lead, X), weights=game(best_rows).players["weights"])
    _, writing = pair(bl.networks.RowScaled())
    run = partial(bl.solve, played, weights=writing, optimizer=partial(optim.SGD, lr=0.1), steps=6)
    whole = run()
    stop[:], path = [len(calls) + 6], tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint=path, checkpoint_every=2)
    stop.clear()
    assert torch.load(path, weights_only=True)["step"] % 2 == 0
    same_bits(run(checkpoint=path, checkpoint_every=2).variables, whole.variables, "resumed")


def test_solve_refuses_it_where_states_are_asked_more_than_once():
    _, writing = pair(bl.networks.RowScaled())
    with pytest.raises(ValueError, match=r"Extragradient\(.*evaluates the players more than once a step"):
        bl.solve(game(best_rows), weights=writing, dynamics=bl.dynamics.Extragradient(0.1), steps=1)
    three = bl.Game(
        x=bl.Player(lambda y, z: (y * z) ** 2, torch.tensor(1.0)),
        y=bl.Player(lambda x, y, z: (y - x - z) ** 2, torch.tensor(0.0)),
        z=bl.Player(lambda x, y, z: (z - x - y) ** 2, torch.tensor(0.0)),
    )
    with pytest.raises(ValueError, match=r"\['z'\] write into their states at every call"):
        bl.solve(three, y=bl.Hypernetwork(ADAM), z=bl.Hypernetwork(ADAM, memory=IN_PLACE), steps=1)


def test_in_place_nan_is_refused_before_it_is_written():
    def follow(x, weights):
        return ((weights - x) ** 2).sum() / (x.sum() < 100)  # NaN beyond

    def lead(weights):
        return weights.square().sum()

    start = torch.zeros(3, dtype=torch.float64)
    played = bl.Game(x=bl.Player(lead, X), weights=bl.Player(follow, start))
    writing = bl.Hypernetwork(ADAM, network=bl.networks.RowScaled(), memory=IN_PLACE, steps=3, tolerance=None)
    state = writing.init(played)
    with pytest.raises(bl.errors.NonFiniteError, match="its loss became"):
        writing(played, {"x": X + 1000}, state)
    assert torch.isfinite(state["w0"][0]).all()


def test_an_examination_now_and_then():
    played, x = game(best_rows), {"x": X}
    rare = bl.Hypernetwork(ADAM, network=bl.networks.RowScaled(), examine_every=3, tolerance=0.01)
    state, told, residuals = rare.init(played), [], []
    for _ in range(4):
        with pytest.warns(bl.errors.NonConvergenceWarning) as caught:
            _, state = rare(played, x, state)
        told += [str(w.message) for w in caught]
        residuals.append(state["residual"])
    assert state["gradients"] == 4 * 2 + 2 * 3
    assert residuals[0] == residuals[1] == residuals[2] != residuals[3]
    assert ["calls ago" in text for text in told] == [False, True, True, False]
    assert "(measured 2 calls ago)" in told[2]
    with pytest.raises(ValueError, match="examine_every=0; expected at least 1"):
        bl.Hypernetwork(ADAM, examine_every=0)


def test_a_run_counts_examinations_and_tells_what_still_holds():
    rare = bl.Hypernetwork(ADAM, network=bl.networks.RowScaled(), examine_every=3, tolerance=1e-6)
    with pytest.warns(
        bl.errors.NonConvergenceWarning, match=r"in 2 of 5 steps, last in step 5: .*\(measured [12] calls ago\)"
    ):
        solution = bl.solve(
            game(best_rows), weights=rare, steps=5
        )  # examined in steps 1 and 4; the answer is a 6th call
    assert len(solution.warnings) == 1


def test_an_examination_now_and_then_resumes():
    played, x = game(best_rows), {"x": X}
    rare = bl.Hypernetwork(ADAM, network=bl.networks.RowScaled(), examine_every=3, tolerance=None)
    _, state = rare(played, x, rare.init(played))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    ends = []
    for start in (state, torch.load(file, weights_only=True)):
        after = start
        for _ in range(3):
            _, after = rare(played, x, after)
        ends.append(after)
    same_bits(*ends)


def test_an_examination_needs_no_more_memory_than_a_step():
    def follow(x, weights):
        fit = (weights["a"] @ weights["b"]).square().mean() - weights["a"].sum()
        return fit + sum(h.exp() * w.square().sum() for h, w in zip(x, weights.values(), strict=True))

    def lead(weights):
        return sum(w.sum() for w in weights.values())

    start = {name: torch.ones(256, 256) for name in "ab"}
    played = bl.Game(x=bl.Player(lead, torch.zeros(2)), weights=bl.Player(follow, start))

    def peak(examine_every):
        response = bl.Hypernetwork(
            ADAM,
            network=bl.networks.RowScaled(),
            memory=IN_PLACE,
            examine_every=examine_every,
            sampler=bl.responses.Perturbations(antithetic=False),
            tolerance=None,
        )
        state, x = response.init(played), {"x": torch.zeros(2)}
        for _ in range(2):
            response(played, x, state)
        return peak_bytes(lambda: response(played, x, state), torch.device("cpu"))

    matrix = start["a"].numel() * 4
    assert peak(1) <= peak(100) + matrix / 4

"""Our own responses obey the laws; foreign functions are held to the same; reports read well."""

from functools import partial

import pytest
import torch
from torch import optim

import bilevel as bl
from bilevel.testing import Quadratic, check_hypergradient_function, check_response
from bilevel.testing.laws import LAWS
from bilevel.tree import leaves, structure_of

from .mutants import Tampered

SGD = partial(optim.SGD, lr=0.5)
RESPONSES = {
    "unrolled": bl.Unrolled(SGD, steps=50),
    "unrolled, momentum": bl.Unrolled(partial(optim.SGD, lr=0.3, momentum=0.5), steps=50),
    "unrolled, segments": bl.Unrolled(SGD, steps=50, differentiation=bl.Segments(count=4)),
    "unrolled, forward mode": bl.Unrolled(SGD, steps=50, differentiation=bl.ForwardMode()),
    "implicit, CG": bl.Implicit(SGD, steps=50, tolerance=1e-8),
    "implicit, GMRES": bl.Implicit(SGD, steps=50, tolerance=1e-8, linear_solver=bl.GMRES()),
    "implicit, Neumann": bl.Implicit(SGD, steps=50, tolerance=1e-8, linear_solver=bl.Neumann(max_steps=200)),
    "implicit, Dense": bl.Implicit(SGD, steps=50, tolerance=1e-8, linear_solver=bl.linear.Dense()),
    "implicit, Identity": bl.Implicit(SGD, steps=50, linear_solver=bl.linear.Identity()),
    "implicit, L-BFGS": bl.Implicit(bl.Scipy("L-BFGS-B"), steps=50, tolerance=1e-5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RESPONSES)
def test_our_responses_obey_the_laws(name):
    report = check_response(RESPONSES[name], examples=5)
    held = {row.law for row in report.rows if row.verdict == "holds"}
    assert report
    if name != "implicit, Identity":  # which promises no accuracy, and is held to little
        assert {"exact", "budget", "exact, float32", "scalar = vector", "vmap = loop", "resume"} <= held, str(report)


NETWORKS = (bl.networks.Linear(), bl.networks.RowScaled(), bl.networks.LowRankLayers(2))


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: type(network).__name__)
def test_a_learned_response_obeys_those_that_a_fit_can(network):
    learned = bl.Hypernetwork(partial(optim.Adam, lr=1e-2), scale=0.1, warmup=200, network=network)
    chosen = ["nothing silent", "nothing mutated", "resume", "vmap = loop", "chunks", "exact"]
    report = check_response(learned, laws=[law for law in LAWS if law.name in chosen], examples=4)
    assert {"nothing silent", "nothing mutated", "resume", "vmap = loop"} <= {
        row.law for row in report.rows if row.verdict == "holds"
    }, str(report)


def test_a_failure_is_shrunk_to_a_game_that_a_person_can_read():
    with pytest.raises(AssertionError, match="1 of 1 laws broken") as caught:
        check_response(Tampered(), laws=LAWS[:1])
    assert "Quadratic(curvatures=(1.0,), coupling=((1.0,),)" in " ".join(str(caught.value).split())
    report = check_response(Tampered(), laws=LAWS[:1], raises=False)
    known = eval(report.rows[0].game, {"Quadratic": Quadratic})
    assert known.x0.numel() == known.y0.numel() == 1


def by_hand(leader, follower, x, y, *, optimizer, steps):
    """Unrolled gradient descent as one writes it."""
    (group,) = optimizer([torch.zeros(1)]).param_groups
    if group["maximize"]:
        raise NotImplementedError("It only descends.")
    form, flat = structure_of(y), [leaf.clone().requires_grad_() for leaf in leaves(y)]
    moved = [torch.zeros_like(leaf) for leaf in flat]
    for _ in range(steps):
        slopes = torch.autograd.grad(follower(x, form.build(flat)), flat, create_graph=True)
        moved = [group["momentum"] * last + slope for last, slope in zip(moved, slopes)]
        flat = [leaf - group["lr"] * move for leaf, move in zip(flat, moved)]
    loss = leader(x, form.build(flat))
    slopes = torch.autograd.grad(loss, leaves(x), create_graph=True, materialize_grads=True)
    return structure_of(x).build(slopes)


@pytest.mark.slow
def test_a_function_of_ones_own_is_checked_by_the_same_laws():
    report = check_hypergradient_function(by_hand, unrolled=True, examples=4)
    rows = {row.law: row for row in report.rows}
    assert report and rows["exact"].verdict == rows["unrolled = Neumann"].verdict == "holds", str(report)
    assert rows["own values"].verdict == "holds"
    assert rows["maximize"].note == "It only descends."
    assert rows["resume"].note == "Only a response has a state."


def test_a_detached_momentum_buffer_is_found():
    def detached(leader, follower, x, y, *, optimizer, steps):
        (group,) = optimizer([torch.zeros(1)]).param_groups
        form, flat = structure_of(y), [leaf.clone().requires_grad_() for leaf in leaves(y)]
        moved = [torch.zeros_like(leaf) for leaf in flat]
        for step in range(steps):
            slopes = torch.autograd.grad(follower(x, form.build(flat)), flat, create_graph=True)
            moved = [group["momentum"] * (m.detach() if step == 1 else m) + s for m, s in zip(moved, slopes)]
            flat = [leaf - group["lr"] * move for leaf, move in zip(flat, moved)]
        loss = leader(x, form.build(flat))
        return structure_of(x).build(torch.autograd.grad(loss, leaves(x), materialize_grads=True))

    own = [law for law in LAWS if law.name == "own values"]
    report = check_hypergradient_function(detached, unrolled=True, laws=own, examples=4)
    assert report.rows[0].verdict == "fails" and "momentum 0.5" in report.rows[0].note


def test_a_function_that_crashes_fails_and_says_how():
    def crashes(leader, follower, x, y, *, optimizer, steps):
        raise RuntimeError("no such thing")

    report = check_hypergradient_function(crashes, unrolled=False, laws=LAWS[:1], examples=2)
    assert report.rows[0].verdict == "fails" and "raised RuntimeError: no such thing" in report.rows[0].note


def test_a_step_size_that_never_arrives_is_told_and_not_failed():
    slow = bl.Unrolled(partial(optim.SGD, lr=1e-4), steps=5)
    report = check_response(slow, laws=[law for law in LAWS if law.name == "exact"], examples=1)
    assert report.rows[0].verdict == "does not apply" and "step size" in report.rows[0].note

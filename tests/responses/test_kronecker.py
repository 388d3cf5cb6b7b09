"""Kronecker factors of a network's matrix: exact where theory says so, and never more than a preconditioner."""

from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import bilevel as bl
from bilevel.linear import ConjugateGradient, Dense, Extrapolated, KroneckerPreconditioner, LinearSolver, Recycled
from bilevel.responses import AllBatches, GaussNewton, Hessian

D = torch.float64
SGD = torch.optim.SGD
DECAY = 0.3


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def outputs(weights, batch):
    return weights(batch[0])


def rest(weights, decay):
    return bl.penalty(weights, decay)


def squares(outputs, batch):
    return 0.5 * (outputs - batch[1]).square().sum(-1).mean()


def classes(outputs, batch):
    return cross_entropy(outputs, batch[1])


@dataclass(frozen=True, kw_only=True)
class Looks(LinearSolver):
    """Solves, and keeps the system that it saw."""

    seen: list = field(default_factory=list)

    def iterate(self, system):
        self.seen.append(system.operator)
        return Dense().iterate(system)


def played(net, loss, batch, solver, valid=None, **options):
    """The hypergradient of one penalty at the network's own weights, and the response's report."""

    def follow(weights, decay, batch):
        return loss(outputs(weights, batch), batch) + rest(weights, decay)

    def lead(weights):
        return loss(weights(valid[0]), valid)

    valid = batch if valid is None else valid
    decay = torch.tensor(DECAY, dtype=D)
    game = bl.Game(decay=bl.Player(lead, decay), weights=bl.Player(follow, net, data=[batch]))
    given = bl.ClosedForm(lambda decay: {name: p.detach() + 0.0 * decay for name, p in net.named_parameters()})
    options = {"curvature": GaussNewton(outputs, loss, rest)} | options
    response = bl.Implicit(given, tolerance=None, linear_solver=solver, **options)
    x = decay.clone().requires_grad_()
    y, after = response(game, {"decay": x}, response.init(game))
    (slope,) = torch.autograd.grad(game.loss("decay", {"decay": x, "weights": y}), x)
    return slope, response.report(response.after_backward(after, y))


def matrix_and_factors(net, loss, batch):
    """The whole matrix, dense, and that of the preconditioner."""
    solver = Looks(damping=0.1)
    played(net, loss, batch, solver)
    (operator,) = solver.seen
    unit = torch.eye(sum(p.numel() for p in net.parameters()), dtype=D)
    whole = torch.stack([operator.matvec(row) for row in unit])
    apply, _ = KroneckerPreconditioner(floor=1e-15).prepare(operator, {})
    return whole, torch.linalg.inv(torch.stack([apply(row) for row in unit]))


def blocks(matrix, net):
    ends = torch.tensor([p.numel() for p in net.parameters()]).cumsum(0).tolist()
    return [matrix[a:b, a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers).to(D)


# Exact ---------------------------------------------------------------------------------------------------------------


def test_a_layer_of_squares_is_its_factors():
    net, batch = network(nn.Linear(3, 2, bias=False)), (normal(1, 7, 3), normal(2, 7, 2))
    whole, factored = matrix_and_factors(net, squares, batch)
    # Two inversions of matrices with a condition below 20, in float64.
    torch.testing.assert_close(factored, whole, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (1, 3)),
        (lambda: network(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(4, 3)), (1, 2, 3, 3)),
    ],
    ids=["linear", "convolution"],
)
def test_each_leafs_block_is_exact_for_one_example(make, shape):
    net, batch = make(), (normal(1, *shape), torch.tensor([2]))
    whole, factored = matrix_and_factors(net, classes, batch)
    for own, wanted in zip(blocks(factored, net), blocks(whole, net), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-10, atol=1e-12)


def test_the_factors_are_means_and_sums_over_examples():
    # The definition, by hand: A the mean of inputs, B the sum of slopes, and a penalty and damping beside.
    net, batch = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (normal(1, 6, 3), torch.arange(6) % 3)
    _, factored = matrix_and_factors(net, classes, batch)
    inside = torch.tanh(net[0](batch[0])).detach()
    p = net(batch[0]).softmax(1).detach()
    curved = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]) / 6
    jacobian = net[2].weight.detach() * (1.0 - inside.square())[:, None, :]
    expected = [
        torch.kron((jacobian.mT @ curved @ jacobian).sum(0), batch[0].mT @ batch[0] / 6),
        (jacobian.mT @ curved @ jacobian).sum(0),
        torch.kron(curved.sum(0), inside.mT @ inside / 6),
        curved.sum(0),
    ]
    for own, wanted in zip(blocks(factored, net), expected, strict=True):
        added = (DECAY + 0.1) * torch.eye(len(wanted), dtype=D)
        torch.testing.assert_close(own, wanted + added, rtol=1e-10, atol=1e-12)


# Only a preconditioner -----------------------------------------------------------------------------------------------


class Shared(nn.Module):
    """A weight of two layers, a layer that is called twice, one that is not called, and leaves without factors."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 2)
        self.second.weight = self.first.weight
        self.norm, self.scale = nn.LayerNorm(3), nn.Parameter(torch.ones(()))
        self.grouped = nn.Conv1d(3, 3, 1, groups=3)

    def forward(self, x):
        x = self.second(torch.tanh(self.first(self.norm(x))))
        return self.scale * self.grouped(self.first(x)[:, :, None])[:, :, 0]


SOLVERS = {
    "plain": ConjugateGradient(rtol=1e-12, preconditioner=KroneckerPreconditioner()),
    "recycled": ConjugateGradient(rtol=1e-12, preconditioner=Recycled(size=3, base=KroneckerPreconditioner())),
    "extrapolated": Extrapolated(ConjugateGradient(rtol=1e-12, preconditioner=KroneckerPreconditioner())),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_the_answer_is_the_matrixs_own(name):
    torch.manual_seed(0)
    net, batch, valid = Shared().to(D), (normal(1, 9, 3), torch.arange(9) % 3), (normal(2, 8, 3), torch.arange(8) % 3)
    exact, _ = played(net, classes, batch, Dense(), valid)
    found, _ = played(net, classes, batch, SOLVERS[name], valid)
    # A residual of 1e-12, and eigenvalues between the penalty of .3 and some 10.
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=0.0)


def test_outputs_of_sequences_and_of_one_number():
    net = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
    batch, valid = (normal(1, 6, 3), normal(2, 6)), (normal(3, 5, 3), normal(4, 5))
    loss = lambda outputs, batch: (outputs - batch[1]).square().mean()
    exact, _ = played(net, loss, batch, Dense(), valid)
    torch.testing.assert_close(played(net, loss, batch, SOLVERS["plain"], valid)[0], exact, rtol=1e-9, atol=0.0)
    net, targets = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), normal(2, 6, 5, 2)
    batch, valid = (normal(1, 6, 5, 3), targets), (normal(3, 4, 5, 3), normal(4, 4, 5, 2))
    exact, _ = played(net, loss, batch, Dense(), valid)
    torch.testing.assert_close(played(net, loss, batch, SOLVERS["plain"], valid)[0], exact, rtol=1e-9, atol=0.0)


def test_what_the_factors_took_is_counted():
    net, batch = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (normal(1, 6, 3), torch.arange(6) % 3)
    solver = ConjugateGradient(max_steps=1, rtol=None, preconditioner=KroneckerPreconditioner())
    _, report = played(net, classes, batch, solver)
    # One step, its residual, and three columns of the outputs.
    assert report.products == 2 + 3


def game_of(net, batch):
    def follow(weights, decay, batch):
        return classes(outputs(weights, batch), batch) + rest(weights, decay)

    return bl.Game(
        decay=bl.Player(lambda weights: classes(weights(batch[0]), batch), bl.Log(1e-3, 1.0, start=0.1)),
        weights=bl.Player(follow, net, data=[batch]),
    )


def test_factors_serve_for_some_systems_and_a_run_goes_on_with_them(tmp_path):
    net, batch = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), (normal(1, 6, 3), torch.arange(6) % 3)
    solver = ConjugateGradient(max_steps=1, rtol=None, preconditioner=KroneckerPreconditioner(every=3))
    response = bl.Implicit(
        partial(SGD, lr=0.1), steps=5, tolerance=None, linear_solver=solver,
        curvature=GaussNewton(outputs, classes, rest),
    )  # fmt: skip
    options = {"weights": response, "optimizer": partial(SGD, lr=0.1)}
    whole = bl.solve(game_of(net, batch), steps=5, **options)
    path = tmp_path / "run.pt"
    bl.solve(game_of(net, batch), steps=2, checkpoint=path, **options)
    again = bl.solve(game_of(net, batch), steps=5, checkpoint=path, **options)
    assert torch.equal(whole.variables["decay"], again.variables["decay"])
    assert whole.products == again.products


# Refused -------------------------------------------------------------------------------------------------------------


def test_what_has_no_factors_is_refused_before_any_work():
    net, batch = network(nn.Linear(3, 3)), (normal(1, 6, 3), torch.arange(6) % 3)
    solver = SOLVERS["recycled"]
    with pytest.raises(ValueError, match="Hessian has none"):
        played(net, classes, batch, solver, curvature=Hessian())
    with pytest.raises(ValueError, match="AllBatches.* gives no one matrix"):
        played(net, classes, batch, solver, batches=AllBatches())
    pair = lambda weights, batch: (weights(batch[0]), weights(batch[0]))
    of_pair = lambda outputs, batch: classes(outputs[0], batch)
    with pytest.raises(ValueError, match="the outputs are tuple"):
        played(net, classes, batch, solver, curvature=GaussNewton(pair, of_pair, rest))
    tensors = bl.Game(
        x=bl.Player(lambda w: w.square().sum(), torch.zeros(())),
        w=bl.Player(lambda w, x: (w - x).square().sum(), torch.zeros(2)),
    )
    curvature = GaussNewton(lambda w: w, lambda outputs, x: (outputs - x).square().sum())
    response = bl.Implicit(partial(SGD, lr=0.1), linear_solver=solver, curvature=curvature)
    with pytest.raises(ValueError, match="'w' is no module"):
        response.init(tensors)
    with pytest.raises(ValueError, match="needs the factors of a network's matrix"):
        KroneckerPreconditioner().prepare(bl.linear.LinearOperator(lambda v: v, symmetric=True), {})
    with pytest.raises(ValueError, match="every of at least 1"):
        KroneckerPreconditioner(every=0)

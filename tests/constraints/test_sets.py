"""Sets and terms: their projections are nearest points, with right derivatives of any order, under vmap."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import bilevel as bl
from bilevel.constraints import (
    L1,
    Affine,
    Ball,
    Box,
    ConstraintSet,
    ElasticNet,
    GroupLasso,
    Halfspace,
    NonNegative,
    PositiveSemidefinite,
    Product,
    SecondOrderCone,
    Simplex,
)

D = torch.float64
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=D)


MAPS = {
    "box": (Box(-0.3, 0.5), (5,)),
    "box of tensors": (Box(torch.tensor([-1.0, 0.0, -math.inf], dtype=D), math.inf), (2, 3)),
    "nonnegative": (NonNegative(), (5,)),
    "simplex": (Simplex(1.5), (2, 5)),
    "ball 1": (Ball(1.0, p=1), (5,)),
    "ball 2": (Ball(1.0), (5,)),
    "ball inf": (Ball(0.5, p=math.inf), (5,)),
    "halfspace": (Halfspace(normal(5), -0.2), (5,)),
    "affine": (Affine(normal(2, 5), normal(2)), (5,)),
    "second-order cone": (SecondOrderCone(), (2, 4)),
    "semidefinite": (PositiveSemidefinite(), (4, 4)),
    "L1": (L1(0.3), (5,)),
    "elastic net": (ElasticNet(0.3, 0.2), (5,)),
    "group lasso": (GroupLasso(0.8), (3, 4)),
}
STEP = 0.7


@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("name", MAPS)
def test_derivatives_to_second_order_and_vmap(name, size):
    chosen, shape = MAPS[name]
    z = (size * normal(*shape)).requires_grad_()

    def mapped(z):
        return chosen.apply(z, STEP)

    assert gradcheck(mapped, (z,)) and gradgradcheck(mapped, (z,))
    rows = normal(3, *shape)
    torch.testing.assert_close(torch.func.vmap(mapped)(rows), torch.stack([mapped(row) for row in rows]))
    second = torch.func.vmap(torch.func.jacrev(torch.func.jacrev(lambda z: mapped(z).square().sum())))(rows)
    assert bool(torch.isfinite(second).all())


@pytest.mark.parametrize("name", [name for name, (chosen, _) in MAPS.items() if isinstance(chosen, ConstraintSet)])
def test_a_projection_is_the_nearest_point(name):
    """<z - P(z), q - P(z)> <= 0 for every q of a convex set: the obtuse angle that makes P(z) the nearest point."""
    chosen, shape = MAPS[name]
    for _ in range(5):
        z = 2.0 * normal(*shape)
        p = chosen.project(z)
        assert chosen.contains(p) and chosen.contains(z) == (not bool((z != p).any()))
        torch.testing.assert_close(chosen.distance(z), (z - p).norm())
        torch.testing.assert_close(chosen.project(p), p)
        for _ in range(20):
            q = chosen.project(2.0 * normal(*shape))
            assert float(((z - p) * (q - p)).sum()) <= 1e-12 * (1.0 + float(z.norm())) ** 2


@pytest.mark.parametrize("name", ["L1", "elastic net", "group lasso"])
def test_a_proximal_map_is_the_minimum_that_defines_it(name):
    chosen, shape = MAPS[name]
    z = normal(*shape)
    p = chosen.apply(z, STEP)

    def value(y):
        return float(chosen.value(y) + (y - z).square().sum() / (2.0 * STEP))

    assert all(value(p) <= value(p + 0.05 * normal(*shape)) for _ in range(50))


def test_equal_eigenvalues_and_a_point_at_zero_have_finite_derivatives():
    z = torch.diag(torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=D)).requires_grad_()
    assert gradcheck(PositiveSemidefinite().project, (z,)) and gradgradcheck(PositiveSemidefinite().project, (z,))
    for chosen in (Ball(1.0), Ball(1.0, p=1), GroupLasso(0.1, dim=None), SecondOrderCone()):
        zero = torch.zeros(3, dtype=D, requires_grad=True)
        (slope,) = torch.autograd.grad(chosen.apply(zero, 1.0).sum(), zero)
        assert bool(torch.isfinite(slope).all())


def test_a_bound_that_holds_passes_its_derivative_on():
    high = torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)
    found = Box(0.0, lambda high: high).settled({"high": high}).project(torch.tensor([3.0, 0.5], dtype=D))
    assert torch.autograd.grad(found.sum(), high)[0].tolist() == [1.0, 0.0]


def test_a_product_has_a_set_for_each_branch():
    both = Product({"price": Box(0.0, 1.0), "share": Simplex(), "free": None})
    y = {"free": torch.ones(2), "price": torch.tensor([2.0, -1.0]), "share": torch.zeros(2, 2)}
    found = both.project(y)
    assert list(found) == list(y) and found["price"].tolist() == [1.0, 0.0]
    assert found["share"].tolist() == [[0.5, 0.5]] * 2 and not both.entrywise and both.limits(y) is None
    low, high = Product([Box(0.0, 1.0), None]).limits([torch.zeros(1), torch.zeros(2)])
    assert [t.tolist() for t in low + high] == [[0.0], [-math.inf] * 2, [1.0], [math.inf] * 2]


def lead(x, y):
    return (y**2).sum() + (x**2).sum()


def follow(x, y):
    return ((y - x.sum()) ** 2).sum()


def made(init, domain=None, **options):
    return bl.Game(x=bl.Player(lead, torch.zeros(2)), y=bl.Player(follow, init, domain=domain, **options))


REFUSED = {
    "infeasible start": (
        lambda: made(torch.tensor([2.0, 5.0]), Box(0.0, 1.0)),
        ValueError,
        r"'y': init lies 4\.12 out",
    ),
    "simplex start": (lambda: made(torch.zeros(2), Simplex()), ValueError, r"lies 0\.707 outside.*project\(init\)"),
    "empty box": (lambda: Box(1.0, 0.0), ValueError, "Box is empty: its low lies up to 1 above"),
    "empty box of tensors": (lambda: made(torch.zeros(2), Box(torch.tensor([0.0, 1.0]), 0.5)), ValueError, "is empty"),
    "nan": (lambda: Box(float("nan"), 1.0), ValueError, "low is nan; expected numbers"),
    "shape": (lambda: made(torch.zeros(2), Box(torch.zeros(3), 1.0)), ValueError, r"low of its Box has shape \(3,\)"),
    "nest": (lambda: made(torch.zeros(2), Box({"a": 0.0}, 1.0)), ValueError, "low is nested as"),
    "unknown type": (lambda: made(torch.zeros(2), (0.0, 1.0)), TypeError, "domain is a tuple; expected a set such as"),
    "unknown prox": (lambda: made(torch.zeros(2), prox=0.1), TypeError, "prox is a float; expected a term such as"),
    "scalar simplex": (lambda: made(torch.tensor(1.0), Simplex()), ValueError, "at least one dimension"),
    "simplex total": (lambda: made(torch.zeros(2), Simplex(-1.0)), ValueError, "total of its Simplex is -1"),
    "radius": (lambda: made(torch.zeros(2), Ball(0.0)), ValueError, "radius of its Ball is 0"),
    "ball p": (lambda: Ball(1.0, p=3), ValueError, "p=3; expected 1, 2 or math.inf"),
    "normal": (
        lambda: made(torch.zeros(2), Halfspace(torch.zeros(2), 1.0)),
        ValueError,
        "normal of its Halfspace has t",
    ),
    "normal's shape": (
        lambda: made(torch.zeros(2), Halfspace(torch.ones(3), 1.0)),
        ValueError,
        r"has shapes \[\(3,\)\]",
    ),
    "contradiction": (
        lambda: made(torch.zeros(2), Affine(torch.ones(2, 2), torch.tensor([0.0, 1.0]))),
        ValueError,
        "equations of its Affine contradict each other",
    ),
    "equations' sizes": (
        lambda: made(torch.zeros(2), Affine(torch.ones(1, 3), torch.ones(1))),
        ValueError,
        r"\[1, 3\]",
    ),
    "cone": (lambda: made(torch.zeros(1), SecondOrderCone()), ValueError, "at least two entries"),
    "matrix": (lambda: made(torch.zeros(2, 3), PositiveSemidefinite()), ValueError, "wants square ones"),
    "branches": (lambda: made({"a": torch.zeros(2)}, Product({"b": Box()})), ValueError, r"parts \['b'\]"),
    "negative weight": (lambda: L1(-1.0), ValueError, "L1: weight is -1.0; expected finite numbers of at least 0"),
    "nobody": (
        lambda: made(torch.zeros(2), prox=L1(lambda z: z)),
        ValueError,
        "its domain or prox has a parameter 'z', which names no player",
    ),
    "itself": (lambda: made(torch.zeros(2), prox=L1(lambda y: y.sum())), ValueError, "depends on its own variables"),
    "residual as well": (
        lambda: made(torch.zeros(2), Box(), residual=lambda y, gradient: gradient),
        ValueError,
        "both residual= and domain= or prox=",
    ),
    "simplex with L1": (lambda: made(torch.ones(1), Simplex(), prox=L1(1.0)), ValueError, "the two together have"),
    "module in a simplex": (
        lambda: bl.Player(lambda x, y: x, torch.nn.Linear(2, 1), domain=Simplex()),
        ValueError,
        "init is a module and domain=Simplex",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused_before_any_work(name):
    make, error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        make().joined()  # a game or a set: made, and refused on the way

"""Settings of the wrong kind are refused where they are made, in words, whatever object they are of."""

import dataclasses
import inspect

import pytest
import torch

import bilevel as bl

ROOMS = (bl, bl.linear, bl.inner, bl.networks, bl.dynamics, bl.constraints, bl.responses)
# What users are given and do not make.
RESULTS = {"LinearSolution", "LinearSystem", "LinearOperator", "Candidate", "Behaviour", "Report", "Estimate"}


def numeric(kind):
    """The names int, float and bool in a field's annotation, where it has nothing else but None."""
    parts = set(str(kind).split(" | ")) - {"None"}
    return parts if parts and parts <= {"int", "float", "bool"} else set()


def settings():
    """(class, field, its kinds) of everything that a user makes."""
    classes = {
        found
        for room in ROOMS
        for name in dir(room)
        if not name.startswith("_")
        and inspect.isclass(found := getattr(room, name))
        and dataclasses.is_dataclass(found)
        and not inspect.isabstract(found)
        and found.__module__.startswith("bilevel.")
        and found.__name__ not in RESULTS
    }
    return [
        pytest.param(owner, field.name, numeric(field.type), id=f"{owner.__name__}.{field.name}")
        for owner in sorted(classes, key=lambda owner: owner.__qualname__)
        if owner.__module__.startswith(("bilevel.linear", "bilevel.inner", "bilevel.networks", "bilevel.dynamics"))
        or owner.__module__.startswith(("bilevel.constraints", "bilevel.responses"))
        for field in dataclasses.fields(owner)
        if field.init and numeric(field.type)
    ]


# Arguments that a class has no default for, of the right kind.
GIVEN = {
    "optimizer": torch.optim.SGD,
    "solver": bl.linear.ConjugateGradient(),
    "weight": 0.1,
    "step_size": 0.1,
    "low": 0.1,
    "high": 0.9,
    "radius": 1.0,
    "ratios": {"x": 1.0},
}


def made(owner, **options):
    """One of a class, by what it must be given and these options."""
    needed = {
        field.name: GIVEN.get(field.name, 3 if "int" in numeric(field.type) else 0.5)
        for field in dataclasses.fields(owner)
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    return owner(**{**needed, **options})


@pytest.mark.parametrize(("owner", "name", "kinds"), settings())
def test_a_setting_of_another_kind_is_refused_by_name(owner, name, kinds):
    wrong = ["three", torch.tensor([1.0, 2.0]), torch.tensor(1.0), object(), [1]]
    if "bool" not in kinds:
        wrong.append(True)
    if kinds == {"int"}:
        wrong += [2.5, float("nan"), float("inf")]
    for value in wrong:
        with pytest.raises(TypeError, match=rf"{name}="):
            made(owner, **{name: value})


def test_numpys_numbers_are_numbers():
    numpy = pytest.importorskip("numpy")
    assert bl.linear.GMRES(restart=numpy.int64(5), rtol=numpy.float64(1e-3)).restart == 5


@pytest.mark.parametrize("ratios", [5.0, "x", None, [("x", 1.0)]])
def test_ratios_are_by_player(ratios):
    with pytest.raises(TypeError, match="ratios="):
        bl.dynamics.TwoTimescale(ratios)
    with pytest.raises(TypeError, match="ratio of 'x'"):
        bl.dynamics.TwoTimescale({"x": "fast"})


@pytest.mark.parametrize(
    "make",
    [
        lambda: bl.Scipy(5.0),
        lambda: bl.Scipy("L-BFGS-B", options=3),
        lambda: bl.ScipyRoot(None),
        lambda: bl.dynamics.Competitive(0.1, linear_solver=3),
        lambda: bl.dynamics.TotalGradient(linear_solver="GMRES"),
    ],
)
def test_other_settings_of_another_kind_are_refused(make):
    with pytest.raises(TypeError, match="expected a"):
        make()


@pytest.mark.parametrize("options", [{"eps_abs": 0.0}, {"eps_abs": float("nan")}, {"max_iter": 0}])
def test_proxqps_settings_are_positive(options):
    with pytest.raises(ValueError, match="ProxQP"):
        bl.inner.ProxQP(**options)

"""What an extension returns, and what it must not write to: refused in words where the library calls it."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import optim

import bilevel as bl
from bilevel.errors import NonConvergenceWarning, NonFiniteError
from bilevel.extend import (
    Candidate,
    Dynamics,
    Estimate,
    InnerSolver,
    LinearOperator,
    LinearSolver,
    Optimum,
    Preconditioner,
    Response,
    fresh_state,
    leaves,
)
from bilevel.game.situation import Situation
from bilevel.linear import Dense, Diagonal, Recycled
from bilevel.responses.base import answered

D = torch.float64
CURVATURE = torch.tensor([1.0, 3.0], dtype=D)
X = torch.tensor([0.3, -0.7], dtype=D)


def follow(x, y):
    return 0.5 * (CURVATURE * (y["a"] - x).square()).sum() + 0.5 * (y["b"] - x.sum()).square()


def lead(x, y):
    return (y["a"] - 1.0).square().sum() + y["b"] ** 2 + 0.1 * x.square().sum()


def game(residual=None):
    start = {"a": torch.zeros(2, dtype=D), "b": torch.zeros((), dtype=D)}
    return bl.Game(x=bl.Player(lead, torch.zeros(2, dtype=D)), y=bl.Player(follow, start, residual=residual))


def exact(x):
    return 2.0 * (x - 1.0) + 2.0 * x.sum() + 0.2 * x


def hypergradient(response, x=X, played=None):
    played = game() if played is None else played
    x = x.clone().requires_grad_()
    y, state = response(played, {"x": x}, response.init(played))
    (slope,) = torch.autograd.grad(lead(x, y), x)
    return slope, response.after_backward(state, y)


# Inner solvers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner(InnerSolver):
    """The optimum, in the form that `answer` gives it, from (problem, y, memory)."""

    answer: Callable[..., Any]

    def minimise(self, problem, y, memory, *, steps, threshold):
        return self.answer(problem, y, memory)


def best(problem):
    x = problem.others["x"]
    return [x.clone(), x.sum()]


MEMORIES = [
    None,
    {"k": 1},
    {"leaves": 3},
    [4],
    [{"a": 1}, {}],
    7,
    "three",
    (1, 2),
    torch.ones(2),
    {"a": [1, {"b": 2.0}]},
]


@pytest.mark.parametrize("memory", MEMORIES, ids=repr)
@pytest.mark.parametrize("preconditioner", [None, Diagonal()], ids=["plain", "Diagonal"])
def test_the_memory_of_an_inner_solver_is_its_own(memory, preconditioner):
    given = []

    def answer(problem, y, before):
        given.append(before)
        return best(problem), memory

    linear = bl.ConjugateGradient(rtol=1e-12, preconditioner=preconditioner)
    response = bl.Implicit(Inner(answer), linear_solver=linear)
    slope, state = hypergradient(response)
    # Conjugate gradients end within three steps, at 1e-12 |b|.
    assert torch.allclose(slope, exact(X), atol=1e-10)
    response(game(), {"x": X}, state)
    assert given[0] is None
    assert repr(given[1]) == repr(memory)


@pytest.mark.parametrize("memory", MEMORIES, ids=repr)
def test_a_run_goes_on_from_another_solvers_memory(memory, tmp_path):
    """With another inner solver, what the first one remembers says nothing."""
    sgd, file = partial(optim.SGD, lr=0.05), tmp_path / "run.pt"
    first = bl.Implicit(Inner(lambda problem, y, before: (best(problem), memory)))
    bl.solve(game(), y=first, optimizer=sgd, steps=2, checkpoint=file)
    second = bl.Implicit(partial(optim.SGD, lr=0.3, momentum=0.1), steps=300, tolerance=1e-9)
    found = bl.solve(game(), y=second, optimizer=sgd, steps=4, checkpoint=file, accept_changes=True)
    plain = bl.solve(game(), y=second, optimizer=sgd, steps=4)
    # Hypergradients to 1e-9 of a size of about 3, in four steps of 0.05.
    assert torch.allclose(found.variables["x"], plain.variables["x"], atol=1e-8)


def noisy(problem, y, memory):
    y[0].copy_(best(problem)[0])
    return [y[0], best(problem)[1]], None


def grown(problem, y, memory):
    count = torch.zeros(1) if memory is None else memory["count"]
    return best(problem), {"count": count.add_(1)}


def moved(problem, y, memory):
    problem.others["x"].zero_()
    return best(problem), None


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (lambda p, y, m: best(p), TypeError, r"Inner\.minimise returned a list of 2; expected a tuple of two"),
        (lambda p, y, m: None, TypeError, "returned None; expected a tuple of two"),
        (lambda p, y, m: (torch.zeros(3), None), TypeError, r"player 'y' is a tensor \[3\].*expected a list of 2"),
        (lambda p, y, m: ((leaf for leaf in best(p)), None), TypeError, "is a generator; expected a list of 2"),
        (lambda p, y, m: (dict(zip("ab", best(p), strict=True)), None), TypeError, "is a dict of 2"),
        (lambda p, y, m: (best(p)[:1], None), ValueError, r"has 1 leaves; expected 2, of shapes \[\[2\], \[\]\]"),
        (lambda p, y, m: ([y[0][:1], y[1]], None), ValueError, r"leaf 'a', is a tensor \[1\] of.*expected \[2\]"),
        (lambda p, y, m: ([y[0], y[1][None]], None), ValueError, r"leaf 'b', is a tensor \[1\] of.*expected \[\]"),
        (lambda p, y, m: (best(p)[::-1], None), ValueError, r"leaf 'a', is a tensor \[\] of.*expected \[2\]"),
        (lambda p, y, m: ([t.float() for t in best(p)], None), ValueError, r"of torch\.float32; expected \[2\] of.*64"),
        (lambda p, y, m: ([t.numpy() for t in best(p)], None), TypeError, "is a ndarray; expected a tensor"),
        (lambda p, y, m: (p.gradients([y[0]]), None), ValueError, r"were asked for at \['a tensor \[2\] of torch"),
        (lambda p, y, m: (p.gradients(p.form.build(y)), None), ValueError, "were asked for at a dict of 2; expected a"),
        (noisy, ValueError, "wrote into the leaves y to start from in place"),
        (moved, ValueError, "wrote into the variables of player 'x' in place"),
    ],
)
def test_an_inner_solver_that_breaks_its_contract_is_refused_in_words(answer, error, text):
    with pytest.raises(error, match=text):
        hypergradient(bl.Implicit(Inner(answer)))


def test_an_inner_solver_cannot_change_a_state():
    response = bl.Implicit(Inner(grown))
    _, state = hypergradient(response)
    with pytest.raises(ValueError, match="wrote into the memory that it was given in place"):
        response(game(), {"x": X}, state)

    def appended(problem, y, memory):
        memory = [] if memory is None else memory
        memory.append(1.0)
        return best(problem), memory

    response = bl.Implicit(Inner(appended))
    _, state = hypergradient(response)
    _, after = response(game(), {"x": X}, state)
    assert state["optimizer"] == [1.0] and after["optimizer"] == [1.0, 1.0]


def test_a_class_is_no_solver():
    with pytest.raises(TypeError, match=r"optimizer is the class Inner itself; expected one of it, Inner\("):
        bl.Implicit(Inner)
    with pytest.raises(TypeError, match="Nudged: optimizer is the class Inner itself"):
        bl.Nudged(Inner)


def test_an_inner_solver_is_held_to_it_in_each_of_many_games():
    played = bl.Games(game(), 2)
    response = bl.Implicit(Inner(lambda p, y, m: ([y[0][:1], y[1]], None)))
    with pytest.raises(ValueError, match=r"Inner\.minimise: its answer for player 'y', leaf 'a', is a tensor \[1\]"):
        response(played, {"x": X.repeat(2, 1)}, response.init(played))


# Residuals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inner",
    [partial(optim.SGD, lr=1.0), partial(optim.SGD, lr=0.5, momentum=0.1), partial(optim.Adam, lr=0.1), bl.ScipyRoot()],
    ids=["SGD", "momentum", "Adam", "ScipyRoot"],
)
def test_a_residual_may_return_its_arguments_themselves(inner):
    played = game(lambda x, y: {"a": y["a"] - x, "b": y["b"]})
    response = bl.Implicit(inner, steps=2000, tolerance=1e-9, linear_solver=bl.GMRES(rtol=1e-12))
    slope, state = hypergradient(response, played=played)
    # y = (x, 0) to 1e-9 of |F| at the start, 1.
    assert torch.allclose(state["variables"]["b"], torch.zeros((), dtype=D), atol=1e-8)
    assert torch.allclose(slope, 2.0 * (X - 1.0) + 0.2 * X, atol=1e-7)


def test_a_view_of_an_argument_is_copied_too():
    start = torch.ones(2, dtype=D)
    own = bl.Player(lambda x, y: (y * x).sum(), start, residual=lambda x, y: {"a": y["a"][:], "b": y["b"] - x})
    own = replace(own, init={"a": start, "b": start}, objective=lambda x, y: (y["a"] * x).sum() + y["b"].sum())
    played = bl.Game(x=bl.Player(lambda x, y: (y["b"] - x).sum(), start), y=own)
    y = played.structure("y").split(torch.ones(4, dtype=D))
    _, slopes, _ = played.residual("y")(Situation(played, "y", {"x": start}), y)
    assert slopes[0].data_ptr() != y[0].data_ptr() and torch.equal(slopes[0], y[0])


STEEP = torch.tensor([[0.4, 0.1], [-0.2, 0.3]], dtype=D)


def settle(y, x):
    return torch.tanh(STEEP @ y + x)


def without_grad(x, y):
    with torch.no_grad():
        target = settle(y, x)
    return y - target


def fixed_point(residual, start=(0.0, 0.0)):
    own = bl.Player(lambda x, y: (y - x).square().sum(), torch.tensor(start, dtype=D), residual=residual)
    return bl.Game(x=bl.Player(lambda y: y.square().sum(), X), y=own)


@pytest.mark.parametrize(
    ("residual", "text"),
    [
        (lambda x, y: y - settle(y.detach(), x), "its own variables, 'y'"),
        (lambda x, y: y.detach() - settle(y.detach(), x), "its own variables, 'y'"),
        (lambda x, y: y - settle(y, x.detach()), r"the variables of \['x'\]"),
        (lambda x, y: y - torch.tensor(settle(y, x).tolist(), dtype=D), "its own variables, 'y'"),
        (without_grad, "its own variables, 'y'"),
    ],
    ids=["y", "y twice", "x", "numbers", "no_grad"],
)
def test_a_residual_that_is_detached_is_refused(residual, text):
    with pytest.raises(ValueError, match=f"along a direction of {text}.*a part of its derivative is lost"):
        fixed_point(residual)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "residual",
    [
        lambda x, y: y - torch.tanh(STEEP.to(y) @ y + x),
        lambda y, gradient: y - (y - 0.4 * gradient).clamp(0.0, 1.0),
        lambda y, gradient: y - torch.nn.functional.softshrink(y - 0.4 * gradient, 0.1),
        lambda x, y: 1e-8 * (y - x),
        lambda x, y: (y - x) ** 3,
        lambda x, y: (y - x).abs() + y,
        lambda x, y: y - x + 0.0 * torch.randn(2, dtype=y.dtype),
        lambda x, y: torch.nn.functional.dropout(y - x, 0.5),
    ],
)
def test_a_residual_with_kinks_or_noise_is_not_refused(residual, dtype):
    for start in ((0.0, 0.0), (1.0, 0.0), (0.3, -0.4)):
        own = bl.Player(lambda x, y: (y - x).square().sum(), torch.tensor(start, dtype=dtype), residual=residual)
        with torch.random.fork_rng():
            bl.Game(x=bl.Player(lambda y: y.square().sum(), X.to(dtype)), y=own)


def written(x, y):
    y.sub_(x)
    return y


@pytest.mark.parametrize(
    ("residual", "error", "text"),
    [
        (lambda x, y: None, TypeError, "its residual returned None; expected tensors"),
        (lambda x, y: {"y": y - x}, ValueError, r"returned \{'y': \(2,\)\}; expected the form of its init, \(2,\)"),
        (lambda x, y: (y - x,), ValueError, r"returned \(\(2,\),\); expected the form of its init, \(2,\)"),
        (lambda x, y: [0.0, 1.0], TypeError, r"returned a list of 2 with 0\.0 in it; expected tensors"),
        (lambda x, y: (y - x).detach().numpy(), TypeError, "returned a ndarray; expected tensors"),
        (lambda x, y: (y - x).numpy(), ValueError, "residual raised RuntimeError.*It must be differentiable"),
        (written, ValueError, r"residual raised RuntimeError.*make new tensors, y - z and not y\.sub_\(z\)"),
        (lambda x, y, batch: y - x, ValueError, "its residual takes `batch`, but the player has no data="),
    ],
)
def test_a_residual_of_another_form_is_refused_in_words(residual, error, text):
    with pytest.raises(error, match=text):
        fixed_point(residual)


def test_a_residual_needs_a_response():
    """Who leads follows its loss, and its bounds would be ignored in silence."""
    with pytest.raises(ValueError, match="solve: 'y' has a residual of its own and no response"):
        bl.solve(fixed_point(lambda x, y: y - settle(y, x)), steps=1)
    own = bl.Player(lambda x, y: (x - y).square().sum(), X, residual=lambda x, y: x - y)
    follower = bl.Player(lambda x, y: (y - x).square().sum(), X)
    with pytest.raises(ValueError, match="solve: 'x' has a residual of its own and no response"):
        bl.solve(bl.Game(x=own, y=follower), y=bl.Implicit(bl.ClosedForm(lambda x: x)), steps=1)


# Linear solvers ------------------------------------------------------------------------------------------------------

MATRIX = torch.tensor([[4.0, 1.0, 0.0], [1.0, 3.0, 0.5], [0.0, 0.5, 2.0]], dtype=D)
B = torch.tensor([1.0, -2.0, 0.5], dtype=D)
OPERATOR = LinearOperator(MATRIX.mv, symmetric=True)


@dataclass(frozen=True, kw_only=True)
class Linear(LinearSolver):
    answer: Callable[..., Any]

    def iterate(self, system):
        return self.answer(system)


def solution(system):
    return torch.linalg.solve(MATRIX, system.rhs)


def overwritten(system):
    found = system.measure(solution(system))
    found.solution.mul_(2.0)
    return found


@pytest.mark.parametrize(
    "answer",
    [
        lambda s: Candidate(2.0 * solution(s), s.rhs * 0.0, s.rhs_norm * 0.0),
        lambda s: replace(s.measure(solution(s)), solution=2.0 * solution(s)),
        lambda s: replace(s.measure(2.0 * solution(s)), residual_norm=s.rhs_norm * 0.0),
        overwritten,
    ],
    ids=["by hand", "another solution", "another norm", "written after"],
)
def test_a_residual_that_was_not_measured_is_measured(answer):
    with pytest.warns(NonConvergenceWarning, match="Linear stopped"):
        found = Linear(answer=answer).solve(OPERATOR, B)
    # u is twice the solution, so that the residual is b - 2 b.
    assert not found.converged and torch.allclose(found.residual_norm, B.norm())


def test_a_measured_residual_costs_no_further_product():
    found = Linear(answer=lambda s: replace(s.measure(solution(s)), error=0.5)).solve(OPERATOR, B)
    assert found.converged and found.products == 1 and found.error == 0.5


def doubled(system):
    system.rhs.mul_(2.0)
    return system.measure(solution(system))


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (solution, TypeError, r"Linear\.iterate returned a tensor \[3\].*expected what system\.measure"),
        (lambda s: None, TypeError, "returned None; expected what"),
        (lambda s: s.measure(solution(s)[:2]), ValueError, r"A product with A was asked for.*\[2\].*expected \[3\]"),
        (lambda s: s.measure(solution(s).float()), ValueError, "float32; expected"),
        (lambda s: replace(s.start(), solution=B[:2]), ValueError, r"the solution that it returned is a tensor \[2\]"),
        (
            lambda s: replace(s.measure(solution(s)), memory=[1]),
            TypeError,
            "the memory that it returned is a list of 1",
        ),
        (doubled, ValueError, r"Linear\.iterate wrote into system\.rhs in place"),
    ],
)
def test_a_linear_solver_that_breaks_its_contract_is_refused_in_words(answer, error, text):
    with pytest.raises(error, match=text):
        Linear(answer=answer).solve(OPERATOR, B.clone())


def test_a_linear_solver_writes_to_no_start_and_no_memory():
    def started(system):
        system.start().solution.fill_(7.0)
        return system.measure(solution(system))

    with pytest.raises(ValueError, match=r"wrote into system\.initial in place"):
        Linear(answer=started).solve(OPERATOR, B, torch.zeros_like(B))

    def counting(system):
        return replace(system.measure(solution(system)), memory={"count": system.memory["count"].add_(1)})

    with pytest.raises(ValueError, match=r"wrote into system\.memory in place"):
        Linear(answer=counting).solve(OPERATOR, B, memory={"count": torch.zeros(())})


def test_an_operator_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"by LinearOperator\.matvec, is a tensor \[2\] of.*expected \[3\]"):
        bl.GMRES().solve(LinearOperator(lambda v: v[:2]), B)


# Preconditioners -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Own(Preconditioner):
    """The map and the memory that `answer` gives, from the memory."""

    answer: Callable[..., Any]
    first: Any = None

    def init(self, like, shapes=None):
        return {} if self.first is None else self.first

    def prepare(self, operator, memory):
        return self.answer(memory)


def mapped(inverse):
    return Own(lambda memory: (inverse, memory))


class Learns(Preconditioner):
    """It overrides `prepare` alone, and remembers how many systems it has seen."""

    def prepare(self, operator, memory):
        return (lambda r: r / 2.0), {"count": memory.get("count", 0) + 1}


@dataclass(frozen=True, kw_only=True)
class Counts(LinearSolver):
    """The same of a linear solver."""

    def iterate(self, system):
        return replace(Dense().iterate(system), memory={"count": system.memory.get("count", 0) + 1})


@pytest.mark.parametrize("solver", [bl.ConjugateGradient(preconditioner=Learns()), Counts()], ids=["map", "solver"])
def test_a_memory_is_kept_that_starts_empty(solver, tmp_path):
    response = bl.Implicit(Inner(lambda p, y, m: (best(p), None)), linear_solver=solver)
    _, state = hypergradient(response)
    for count in (1, 2):
        assert state["linear"]["memory"] == {"count": count}
        x = X.clone().requires_grad_()
        y, state = response(game(), {"x": x}, state)
        lead(x, y).backward()
        state = response.after_backward(state, y)
    found = solver.solve(OPERATOR, B, memory={})
    assert found.memory == {"count": 1}
    assert solver.solve(OPERATOR, B).memory == {}


def test_an_empty_memory_is_begun():
    solver = bl.ConjugateGradient(preconditioner=Diagonal())
    assert set(solver.solve(OPERATOR, B, memory={}).memory) == set(solver.init(B))


BUFFER = torch.empty(3, dtype=D)
WHOLE = torch.diagonal(MATRIX)


@pytest.mark.parametrize(
    ("preconditioner", "error", "text"),
    [
        (mapped(lambda r: (r / WHOLE)[:2]), ValueError, r"M\^-1 r of Own: what it returned is a tensor \[2\].*\[3\]"),
        (mapped(lambda r: (r / WHOLE)[:, None]), ValueError, r"is a tensor \[3, 1\] of.*expected \[3\]"),
        (mapped(lambda r: (r / WHOLE).float()), ValueError, "float32; expected"),
        (mapped(lambda r: (r / WHOLE).numpy()), TypeError, "is a ndarray; expected a tensor"),
        (mapped(lambda r: r.div_(WHOLE)), ValueError, "of Own wrote into r itself; expected a new tensor each time"),
        (mapped(lambda r: torch.div(r, WHOLE, out=BUFFER)), ValueError, "wrote into what it had returned before"),
        (mapped(lambda r: torch.div(r, WHOLE, out=BUFFER).view(3)), ValueError, "wrote into what it had returned"),
        (mapped(lambda r: r * torch.nan), NonFiniteError, "preconditioner gave NaN or infinite entries"),
        (mapped(lambda r: r / 0.0), NonFiniteError, "preconditioner gave NaN or infinite entries"),
        (mapped(None), TypeError, r"Own\.prepare returned None as the map"),
        (Own(lambda memory: lambda r: r), TypeError, r"Own\.prepare returned a function; expected a tuple of two"),
        (Own(lambda memory: (lambda r: r, None)), TypeError, "the memory that it returned is None; expected a memory"),
        (Own(lambda memory: (lambda r: r, memory), [B]), TypeError, r"Own\.init: what it returned is a list of 1"),
    ],
)
def test_a_preconditioner_that_breaks_its_contract_is_refused_in_words(preconditioner, error, text):
    for given in (preconditioner, Recycled(base=preconditioner)):
        with pytest.raises(error, match=text):
            bl.ConjugateGradient(rtol=1e-10, preconditioner=given).solve(OPERATOR, B)


def test_a_function_is_held_to_the_same():
    with pytest.raises(ValueError, match=r"of preconditioner= wrote into r itself"):
        bl.ConjugateGradient(preconditioner=lambda r: r.div_(WHOLE)).solve(OPERATOR, B)
    found = bl.ConjugateGradient(rtol=1e-10, preconditioner=lambda r: r).solve(OPERATOR, B)
    assert found.converged


def test_a_preconditioner_writes_to_no_memory():
    def prepare(memory):
        memory["k"].add_(1.0)
        return (lambda r: r / memory["k"]), memory

    solver = bl.ConjugateGradient(preconditioner=Own(prepare, {"k": torch.zeros((), dtype=D)}))
    with pytest.raises(ValueError, match=r"Own\.prepare wrote into the memory that it was given in place"):
        solver.solve(OPERATOR, B)


def test_a_preconditioners_products_are_checked():
    class Probes(Preconditioner):
        def prepare(self, operator, memory):
            operator.matvec(torch.ones(2, dtype=D))

    with pytest.raises(ValueError, match=r"A product with A was asked for, of a vector that is a tensor \[2\]"):
        bl.ConjugateGradient(preconditioner=Probes()).solve(OPERATOR, B)


# Rules of play -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule(Dynamics):
    answer: Callable[..., Any]

    def directions(self, field, state):
        return self.answer(field, state)


def two():
    """Two leaders, at rest at y = 1/2."""
    return bl.Game(
        x=bl.Player(lambda x, y: x["a"] @ y + 0.5 * x["b"] ** 2, {"a": X, "b": torch.ones((), dtype=D)}),
        y=bl.Player(lambda x, y: -x["a"] @ y + 0.5 * y.square().sum() - y.sum(), X),
    )


def play(answer, rule=Rule, **options):
    return bl.solve(two(), dynamics=rule(answer), optimizer=partial(optim.SGD, lr=0.1), steps=3, **options)


def changed(function):
    return lambda field, state: (function(field.here()), state)


def pushed(field, state):
    field.point["x"][0].add_(1.0)
    return field.here(), state


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (lambda f, s: f.here(), TypeError, r"Rule\.directions returned a dict of 2; expected a tuple of two"),
        (lambda f, s: None, TypeError, "returned None; expected a tuple of two"),
        (lambda f, s: (f.stack(f.here()), s), TypeError, r"is a tensor \[5\] of.*expected a dict of directions"),
        (changed(lambda d: {"x": d["x"]}), ValueError, r"directions for \['x'\], without 'y'; expected those of"),
        (changed(lambda d: {**d, "z": d["y"]}), ValueError, r"directions for \['x', 'y', 'z'\], with 'z'"),
        (changed(lambda d: {**d, "y": d["y"][0]}), TypeError, r"player 'y' is a tensor \[2\].*expected a list of 1"),
        (changed(lambda d: {**d, "y": [None]}), TypeError, "player 'y', leaf 0, is None; expected a tensor"),
        (changed(lambda d: {**d, "y": None}), TypeError, "player 'y' is None; expected a list of 1"),
        (changed(lambda d: {**d, "y": [0.0]}), TypeError, r"leaf 0, is 0\.0; expected a tensor \[2\]"),
        (changed(lambda d: {**d, "y": [d["y"][0][:1]]}), ValueError, r"is a tensor \[1\] of.*expected \[2\]"),
        (changed(lambda d: {**d, "x": d["x"][:1]}), ValueError, "player 'x' has 1 leaves; expected 2"),
        (changed(lambda d: {k: [t.float() for t in v] for k, v in d.items()}), ValueError, "float32; expected"),
        (lambda f, s: (f.here(), None), TypeError, "the state that it returned is None; expected a dict"),
        (lambda f, s: (f.here(), [1]), TypeError, "the state that it returned is a list of 1; expected a dict"),
        (lambda f, s: (f.at({"x": f.point["x"]}), s), ValueError, r"Field\.at was given a point of players \['x'\]"),
        (
            lambda f, s: (f.at({**f.point, "y": [B]}), s),
            ValueError,
            r"the point of player 'y', leaf 0, is a tensor \[3\]",
        ),
        (lambda f, s: (f.split(B), s), ValueError, r"Field\.split was given a tensor \[3\].*expected one vector \[5\]"),
        (lambda f, s: (f.linearised().matvec(B), s), ValueError, r"Jacobian was given a tensor \[3\].*vector \[5\]"),
        (pushed, ValueError, r"Rule\.directions wrote into field\.point\['x'\] in place"),
    ],
)
def test_a_rule_of_play_that_breaks_its_contract_is_refused_in_words(answer, error, text):
    with pytest.raises(error, match=text):
        play(answer)


def test_a_rule_of_play_writes_to_no_state():
    def counting(field, state):
        count = state.get("count", torch.zeros(()))
        count += 1
        return field.here(), {"count": count}

    with pytest.raises(ValueError, match="wrote into a tensor of its state in place"):
        play(counting)


def test_a_rule_of_play_may_return_everybody_in_turn():
    @dataclass(frozen=True)
    class InTurn(Rule):
        alternates = True

    whole = play(lambda f, s: (f.split(f.linearised().value), s), InTurn)
    movers = play(lambda f, s: (f.here(), s), InTurn)
    for name in ("x", "y"):
        for one, other in zip(leaves(whole.variables[name]), leaves(movers.variables[name]), strict=True):
            assert torch.allclose(one, other, rtol=1e-12)


def test_a_class_is_no_rule():
    with pytest.raises(TypeError, match=r"dynamics is the class Optimistic itself; expected one of it, Optimistic\(\)"):
        bl.solve(two(), dynamics=bl.dynamics.Optimistic, steps=1)
    with pytest.raises(TypeError, match="solve: dynamics is 'optimistic'; expected a rule of play"):
        bl.solve(two(), dynamics="optimistic", steps=1)


# Responses -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changed(Response):
    """The last of some steps, differentiated, and what `change` makes of it."""

    change: Callable[..., Any]

    promise = Estimate(Optimum(), bias=0.9, reason="last step")

    def init(self, game, *, follower=None, seed=0):
        return fresh_state(game, follower, seed)

    def __call__(self, game, others, state, batch=None):
        follower = game.follower(others, state, batch)
        y = leaves(state["variables"])
        _, slopes = follower.gradients(y, others)
        y = [leaf - 0.3 * slope for leaf, slope in zip(y, slopes, strict=True)]
        return self.change(follower.form.build(y), follower.next_state(state, y, slopes), state)


def written_state(y, after, state):
    state["variables"]["a"].add_(1.0)
    return y, after


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            lambda y, s, _: y,
            TypeError,
            "response of player 'y', Changed, returned a dict of 2; expected a tuple of two",
        ),
        (lambda y, s, _: ({**y, "a": y["a"][:1]}, s), ValueError, r"other variables.*\(1,\).*expected.*\(2,\)"),
        (lambda y, s, _: ({"a": y["a"]}, s), ValueError, "returned other variables than the game has"),
        (lambda y, s, _: (list(y.values()), s), ValueError, "returned other variables than the game has"),
        (lambda y, s, _: (None, s), TypeError, "returned None as the variables of 'y'"),
        (lambda y, s, _: ({k: v.float() for k, v in y.items()}, s), ValueError, r"float32.*are of torch\.float64"),
        (lambda y, s, _: ({k: v.detach() for k, v in y.items()}, s), ValueError, r"do not depend on those of \['x'\]"),
        (lambda y, s, _: (y, None), TypeError, "returned None as the next state"),
        (lambda y, s, _: (y, {}), ValueError, r"a next state without \['follower', 'variables'"),
        (lambda y, s, _: (y, {k: v for k, v in s.items() if k != "data"}), ValueError, r"without \['data'\]"),
        (lambda y, s, _: (y, {**s, "variables": {"a": X}}), ValueError, "in its next state returned other variables"),
        (written_state, ValueError, r"wrote into state\['variables'\] in place"),
    ],
)
def test_a_response_that_breaks_its_contract_is_refused_in_words(change, error, text):
    with pytest.raises(error, match=text):
        bl.solve(game(), y=Changed(change), steps=2)


def test_a_response_that_stands_still_is_no_error_where_nobody_asks():
    """Without a gradient nothing is lost."""
    still = Changed(lambda y, s, _: ({k: v.detach() for k, v in y.items()}, s))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        played = game()
        state = still.init(played)
        before = copy.deepcopy(state)
        with torch.no_grad():
            answered(still, played, {"x": X}, state)
        answered(still, played, {"x": X}, state)
    assert all(torch.equal(state["variables"][k], before["variables"][k]) for k in "ab")


def test_check_hypergradient_names_an_answer_of_another_shape():
    played = bl.Game(
        x=bl.Player(lambda y: (y - 1.0).square().sum(), torch.zeros(2, dtype=D)),
        y=bl.Player(lambda x, y: (y - x).square().sum(), torch.zeros(2, dtype=D)),
    )
    with pytest.raises(ValueError, match="check_hypergradient: Changed returned other variables than the game has"):
        bl.testing.check_hypergradient(played, Changed(lambda y, s, _: (y[:1], s)))

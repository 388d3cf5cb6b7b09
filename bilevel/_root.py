"""The one primitive for implicit derivatives: a solution of F(y, x) = 0 that knows how it moves with x."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bilevel.autodiff import (
    NewLeafTracker,
    Pullback,
    captured_leaves,
    concrete,
    nearest,
    pullback,
    pushforward,
    row_by_row,
    tracked_at_any_level,
    transforms_active,
    with_signature,
)
from bilevel.errors import CapturedTensorError, NonFiniteError, SecondDerivativeError
from bilevel.linear import GMRES, LinearOperator, LinearSolution, LinearSolver, Memory
from bilevel.linear.base import SolvesLinearSystems
from bilevel.linear.kronecker import FactoredProducts
from bilevel.linear.norms import largest_entry, norm
from bilevel.linear.operator import Shapes
from bilevel.second_order import differentiated_thrice
from bilevel.sharding.tensor import entries
from bilevel.tree import Variables, flatten, join, leaves, structure_of

FlatResidual = Callable[..., Tensor]

Examine = Callable[[LinearSolution, Tensor, list[Tensor], tuple[Tensor, ...], Pullback], int]
"""Looks at a backward solve: what it found, its right-hand side, the inputs that asked, (dF/dx)^T u, and products.

It returns how many products it took."""


class Products(ABC):
    """Where the products of an implicit derivative come from, if not from one graph of F."""

    @property
    def random(self) -> bool:
        """Whether each product is with another sample of the matrix."""
        return False

    @property
    def refusal(self) -> str:
        """What is said where they are needed inside a transform or for a second derivative; empty where F itself is.

        F has then the same derivatives as these products.
        """
        return ""

    @abstractmethod
    def pull(self, y: Tensor, xs: Sequence[Tensor], wanted: Sequence[int]) -> Pullback:
        """From u `[n]` to (dF/dy)^T u, and (dF/dx)^T u for the wanted of xs."""

    def learned(self) -> dict[str, Any]:
        """What a backward pass changes in the response's state."""
        return {}


@dataclass
class Receipt:
    """What a backward solve leaves behind: its fields are set when backward runs. `receipt_of` finds it by the answer.

    `adjoint: [n]` is the last solution u of (dF/dy)^T u = v and the warm start of the next, `[0]` as long as there is
    none; `residual` is 0-d, the
    residual norm relative to |v|; `products` counts; `error` is the solver's estimate of the derivative's relative
    error, NaN if it makes none and infinite if it saw too little; `memory` is what it keeps from system to system.
    """

    adjoint: Tensor
    residual: Tensor
    products: Tensor
    error: Tensor
    memory: Memory = field(default_factory=dict)

    @staticmethod
    def blank(like: Tensor, solver: SolvesLinearSystems | None = None, shapes: Shapes | None = None) -> Receipt:
        """A receipt for `like: [n]` unknowns, leaves of these shapes, before any backward solve."""
        nothing = like.new_full((), torch.nan)
        memory = {} if solver is None else solver.init(like, shapes)
        return Receipt(torch.empty_like(like[:0]), nothing, torch.zeros((), dtype=torch.int64), nothing.clone(), memory)


def root(
    residual: Callable[[Variables, Variables], Variables],
    solution: Variables,
    inputs: Variables,
    *,
    linear_solver: LinearSolver | None = None,
    symmetric: bool = False,
    receipt: Receipt | None = None,
) -> Variables:
    r"""A solution y of $F(y, x) = 0$ with its derivatives in x attached, by the implicit-function theorem.

    $$
    \frac{dy}{dx} = -\Big(\frac{\partial F}{\partial y}\Big)^{-1} \frac{\partial F}{\partial x}
    $$

    Returns y with the same values. Backward solves $(\partial F / \partial y)^\top u = v$ and returns
    $-(\partial F / \partial x)^\top u$. That solve is itself a `root`, so that derivatives of any order are right, and
    `torch.func.grad`, `jacrev`, `jvp`, `jacfwd`, `hessian` and `vmap` compose; forward mode solves with
    $\partial F / \partial y$ itself, and takes two backward passes a product.

    An error of y moves the derivative to first order, and an unconverged solve warns.

    Costs one evaluation of F here, one graph of F and the solver's products in backward.
    Source: Blondel et al. 2022 (arXiv 2105.15183).

    Args:
        residual: F as `residual(y, x)`: any stationarity residual, shaped like y.
        solution: y, found by any means; it is detached here.
        inputs: x, a pytree of tensors.
        linear_solver: Default `GMRES(rtol=1e-10)` in float64 and `GMRES(rtol=1e-5)` in float32, which asks for no
            symmetry.
        symmetric: Promises that $\partial F / \partial y$ is symmetric, as a loss's Hessian is: needed by
            ConjugateGradient.
        receipt: Receives what the backward solve measures, and warms the next one.

    Raises:
        CapturedTensorError: If F uses a tensor that requires grad and is not in `inputs`: it would get no gradient.
        ValueError: If $F(y, x)$ has not y's form.

    Examples:
        >>> x = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        >>> y = root(lambda y, x: y ** 2 - x, x.sqrt(), x)
        >>> torch.autograd.grad(y, x)[0].item()  # 1 / (2 sqrt 2)
        0.353553...
    """
    form, input_form = structure_of(solution), structure_of(inputs)
    flat, xs = flatten(solution).detach(), leaves(inputs)

    def flat_residual(y: Tensor, *x: Tensor) -> Tensor:
        value = residual(form.unflatten(y), input_form.build(x))
        found = structure_of(value)
        if found.shapes != form.shapes:
            raise ValueError(
                f"root: the residual F(y, x) has leaves of shapes {[tuple(s) for s in found.shapes]}; expected those "
                f"of the solution, {[tuple(s) for s in form.shapes]}."
            )
        return flatten(value)

    if linear_solver is None:
        linear_solver = GMRES(rtol=1e-10 if flat.dtype == torch.float64 else 1e-5)
    refuse_captures(flat_residual, flat, xs)
    attached = attach(
        flat_residual,
        flat,
        xs,
        linear_solver=linear_solver,
        symmetric=symmetric,
        shapes=form.shapes,
        receipt=receipt,
    )
    return form.unflatten(attached)


def refuse_captures(residual: FlatResidual, y: Tensor, xs: list[Tensor]) -> None:
    """Raise `CapturedTensorError` when F reaches a tensor that requires grad and was not passed."""
    if transforms_active():
        # Nothing that is passed is tracked, so whatever is tracked in the value came in by another way.
        value = residual(y.detach(), *(x.detach() for x in xs))
        captured: Tensor | None = value if tracked_at_any_level(value) else None
    else:
        passed = [tensor.detach().clone().requires_grad_() for tensor in (y, *xs)]
        # Leaves that F makes itself, for a gradient penalty say, are nobody's.
        with torch.enable_grad(), NewLeafTracker() as born:
            value = residual(*passed)
        captured = next(iter(captured_leaves([value], [*passed, *born.leaves])), None)
    if captured is not None:
        shape = "" if captured is value else f" of shape {tuple(captured.shape)}"
        raise CapturedTensorError(
            f"The residual captures a tensor{shape} that requires grad, so that its derivative would be lost in "
            "silence. Pass it among the inputs (as a player's variables), or detach it."
        )


def attach(
    residual: FlatResidual,
    y: Tensor,
    xs: list[Tensor],
    *,
    linear_solver: SolvesLinearSystems,
    symmetric: bool,
    shapes: Shapes | None = None,
    receipt: Receipt | None = None,
    products: Pullback | None = None,
    examine: Examine | None = None,
    source: Products | None = None,
) -> Tensor:
    """`root` on flat vectors: y `[n]` with derivatives in `xs` attached; checks nothing.

    `shapes` are those of the leaves that y is made of.
    `products`, if given, is the pullback of F in y and those of `xs` that require grad, at this very y: the first
    backward then takes its products from that graph instead of building it again, and lets it go.
    `examine` is called once, by the first backward outside torch.func, with what its solve found.
    `source` makes products in place of F's own graph.
    """
    system = _System(residual, linear_solver, symmetric, shapes, receipt, products, examine, source)
    attached = _Root.apply(system, y.detach(), *xs)  # type: ignore[no-untyped-call]
    return attached  # type: ignore[no-any-return]


def receipt_of(answer: Variables) -> Receipt | None:
    """The receipt of the backward solve of `answer`: of the root that is nearest in its graph; None without one."""
    system = nearest(leaves(answer), "system", _System)
    return None if system is None else system.receipt


def source_of(answer: Variables) -> Products | None:
    """The source of the products of `answer`: of the root that is nearest in its graph; None without one."""
    system = nearest(leaves(answer), "system", _System)
    return None if system is None else system.source


@dataclass(frozen=True)
class _System:
    """The part of a root that is no tensor; a class of its own, so that vmap hands it over untouched."""

    residual: FlatResidual
    solver: SolvesLinearSystems
    symmetric: bool
    shapes: Shapes | None
    receipt: Receipt | None
    products: Pullback | None = None
    examine: Examine | None = None
    source: Products | None = None

    def require_own(self) -> None:
        """Raise where F itself would be differentiated, whose derivatives are not those of the source."""
        if self.source is not None and self.source.refusal:
            raise SecondDerivativeError(self.source.refusal)


@with_signature
class _Root(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(system: _System, y: Tensor, *xs: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.system, _, *xs = inputs
        # The output, not the input: it depends on x, and so the second derivative sees y move.
        ctx.save_for_backward(output, *xs)
        ctx.save_for_forward(output, *xs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        y, *xs = ctx.saved_tensors
        moves = [torch.zeros_like(x) if t is None else t for x, t in zip(xs, tangents[2:], strict=True)]
        return _tangent(ctx.system, y, xs, moves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (cotangent,) = grads
        by_rows = row_by_row(lambda row: _Root.backward(ctx, row), cotangent)
        if by_rows is not None:
            return by_rows  # type: ignore[no-any-return]
        y, *xs = ctx.saved_tensors
        system: _System = ctx.system
        # Taken once: whoever keeps the loss after backward keeps no graph with it. A second backward builds its own.
        ctx.system = replace(system, products=None, examine=None)
        wanted = [index for index, needed in enumerate(ctx.needs_input_grad[2:]) if needed]

        def partial(y: Tensor, *some: Tensor) -> Tensor:
            every = list(xs)
            for index, x in zip(wanted, some, strict=True):
                every[index] = x
            return system.residual(y, *every)

        given = [xs[index] for index in wanted]
        again = torch.is_grad_enabled() or transforms_active()
        if again:
            system.require_own()
            with differentiated_thrice():
                in_y = pullback(lambda y: partial(y, *given), y)[1]
                found, _ = _solve(system, in_y, cotangent)
                adjoint = _attach_adjoint(system, found.solution, cotangent, y, xs)
                _, in_x = pullback(lambda *some: partial(y, *some), *given)
                derivatives = in_x(adjoint)
            products = in_y
        else:
            # One graph serves the whole solve and the mixed product, which the solve's last one can bring along.
            ready = system.products if all(x.requires_grad == (i in wanted) for i, x in enumerate(xs)) else None
            if ready is not None:
                products = ready
            elif system.source is not None:
                products = system.source.pull(y, xs, wanted)
            else:
                products = pullback(partial, y, *given)[1]
            found, derivatives = _solve(system, products, cotangent)
        if system.examine is not None and not transforms_active():
            with torch.no_grad():
                taken = system.examine(found, cotangent, given, derivatives, products)
            if system.receipt is not None:
                system.receipt.products = system.receipt.products + taken
        result: list[Tensor | None] = [None] * len(xs)
        for index, derivative in zip(wanted, derivatives, strict=True):
            result[index] = -derivative
        return (None, None, *result)


def _solve(system: _System, products: Pullback, rhs: Tensor) -> tuple[LinearSolution, tuple[Tensor, ...]]:
    """u `[n]` with (dF/dy)^T u = rhs, and (dF/dx)^T u for each further primal of `products`."""

    def both(v: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        # The product that measures the residual gives the mixed products too: they share most of their work.
        product, *mixed = products(v)
        return product, tuple(mixed)

    def mixed_alone(u: Tensor) -> tuple[Tensor, ...]:
        return products(u, slice(1, None))

    single = not transforms_active() and not torch.is_grad_enabled()
    operator = LinearOperator(
        lambda v: products(v, slice(1))[0],
        system.symmetric,
        shapes=system.shapes,
        matvec_and_mixed=both if single else None,
        interest=(lambda u: join(mixed_alone(u))) if single else None,
        random=system.source is not None and system.source.random,
        factors=products.factors if isinstance(products, FactoredProducts) else None,
    )
    # A receipt is plain memory: under a transform it neither warms the solve nor is written.
    receipt = None if transforms_active() else system.receipt
    with torch.no_grad():
        start = receipt.adjoint if receipt is not None and entries(receipt.adjoint) else None
        memory = None if receipt is None else receipt.memory
        found = system.solver.solve(operator, rhs if receipt is None else rhs.detach(), start, memory=memory)
        if receipt is not None:
            size = norm(rhs)
            some = concrete(size) > 0
            # As long as the follower: taken over and not copied. To start from 0 costs a product and gives nothing.
            receipt.adjoint = found.solution if some else found.solution[:0]
            receipt.residual = found.residual_norm / size if some else found.residual_norm
            receipt.products = receipt.products + found.products
            receipt.error = torch.full_like(receipt.error, found.error)
            receipt.memory = found.memory
    if largest_entry(found.solution) == float("inf"):  # a norm's squares overflow where the adjoint does not
        raise NonFiniteError("The adjoint of the implicit derivative is infinite: the follower's Jacobian is singular.")
    if not single:
        return found, ()  # to be differentiated themselves
    return found, mixed_alone(found.solution) if found.mixed is None else found.mixed


def _tangent(system: _System, y: Tensor, xs: list[Tensor], moves: list[Tensor]) -> Tensor:
    """How y moves when xs do: the root d of G(d; y, x, dx) = dF/dy d + dF/dx dx, differentiable in y, x and dx."""
    system.require_own()

    def residual(d: Tensor, y: Tensor, *rest: Tensor) -> Tensor:
        xs, moves = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        with differentiated_thrice():
            return pushforward(system.residual, y, *xs, like=y)([d, *moves])

    with torch.no_grad():
        rhs = -residual(torch.zeros_like(y), y, *xs, *moves)
        along = pushforward(lambda y: system.residual(y, *xs), y, like=y)
        operator = LinearOperator(lambda v: along([v]), system.symmetric, shapes=system.shapes)
        d = system.solver.solve(operator, rhs).solution
    return attach(
        residual,
        d,
        [y, *xs, *moves],
        linear_solver=system.solver,
        symmetric=system.symmetric,
        shapes=system.shapes,
    )


def _attach_adjoint(system: _System, adjoint: Tensor, cotangent: Tensor, y: Tensor, xs: list[Tensor]) -> Tensor:
    """The adjoint u as the root of G(u; v, y, x) = (dF/dy)^T u - v, differentiable in v, y and x."""

    # The solver adds its own damping to dG/du, as it did for u; G itself leaves it out.
    def residual(u: Tensor, v: Tensor, y: Tensor, *xs: Tensor) -> Tensor:
        with torch.enable_grad(), differentiated_thrice():
            _, products = pullback(lambda y: system.residual(y, *xs), y)
            return products(u)[0] - v

    return attach(
        residual,
        adjoint,
        [cotangent, y, *xs],
        linear_solver=system.solver,
        symmetric=system.symmetric,
        shapes=system.shapes,
    )


__all__ = ["Products", "Receipt", "attach", "receipt_of", "refuse_captures", "root", "source_of"]

"""jaxopt: `GradientDescent`, differentiated implicitly or through its steps; torch losses are called back from JAX."""

from __future__ import annotations

from functools import partial

import jax
import jaxopt
from bridge import InTorch, in_jax, to_jax
from translate import sgd_options

from bilevel.tree import flatten, structure_of

jax.config.update("jax_enable_x64", True)  # as its documentation asks of double precision
SOLVE = partial(jaxopt.linear_solve.solve_cg, maxiter=50, tol=1e-10)


def _by(leader, follower, x, y, optimizer, steps, **how):
    of_x, of_y = structure_of(x), structure_of(y)
    loss = in_jax(lambda y, x: follower(of_x.unflatten(x), of_y.unflatten(y)))
    outer = in_jax(lambda y, x: leader(of_x.unflatten(x), of_y.unflatten(y)))

    def objective(y, x):  # jaxopt reads a signature
        return loss(y, x)

    rate = sgd_options(optimizer)["lr"]
    solver = jaxopt.GradientDescent(objective, stepsize=rate, acceleration=False, maxiter=steps, tol=-1.0, **how)
    start = to_jax(flatten(y))
    value = jax.grad(lambda x: outer(solver.run(start, x).params, x))
    return of_x.unflatten(InTorch.apply(value, flatten(x)))


def unrolled(leader, follower, x, y, *, optimizer, steps):
    """Unrolled: `implicit_diff=False`."""
    return _by(leader, follower, x, y, optimizer, steps, implicit_diff=False)


def implicit(leader, follower, x, y, *, optimizer, steps):
    """Implicit: `implicit_diff=True`, by conjugate gradients."""
    return _by(leader, follower, x, y, optimizer, steps, implicit_diff=True, implicit_diff_solve=SOLVE)

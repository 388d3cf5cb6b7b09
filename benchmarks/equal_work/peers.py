"""The same derivatives by other libraries, as their documentation says; those not installed are left out."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from ours_and_hand import NEUMANN_STEP, Run
from problem import Leaves, Problem

import bilevel.tree

Peer = Callable[[Problem, str], Run | None]


class Holder(torch.nn.Module):
    """Tensors as a module's parameters."""

    def __init__(self, tensors: Leaves) -> None:
        super().__init__()
        self.names = [f"leaf{index}" for index in range(len(tensors))]
        for name, tensor in zip(self.names, tensors, strict=True):
            self.register_parameter(name, torch.nn.Parameter(tensor.detach().clone()))

    def forward(self) -> Leaves:
        """The tensors."""
        return tuple(getattr(self, name) for name in self.names)


def _fresh(tensors: Leaves) -> Leaves:
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


def torchopt(problem: Problem, kind: str) -> Run | None:
    """`MetaSGD`; `custom_root` with its conjugate gradients or its Neumann series."""
    import torchopt as theirs

    decays = _fresh(problem.decays)

    def unroll() -> Leaves:
        net = Holder(problem.weights)
        inner = theirs.MetaSGD(net, lr=problem.lr, momentum=problem.momentum)
        for _ in range(problem.unroll):
            inner.step(problem.follow(decays, net()))
        return torch.autograd.grad(problem.lead(net()), decays)

    solve = (
        theirs.linear_solve.solve_cg(maxiter=problem.cg, rtol=0.0, atol=0.0)
        if kind == "cg"
        else theirs.linear_solve.solve_inv(ns=True, maxiter=problem.neumann, alpha=NEUMANN_STEP)
    )
    slopes = torch.func.grad(lambda weights, decays: problem.follow(decays, weights))
    answer = theirs.diff.implicit.custom_root(slopes, argnums=1, solve=solve)(lambda weights, decays: weights)

    def implicit() -> Leaves:
        weights = answer(_fresh(problem.weights), decays)
        return torch.autograd.grad(problem.lead(weights), decays)

    return unroll if kind == "unroll" else implicit


def higher(problem: Problem, kind: str) -> Run | None:
    """`innerloop_ctx`; it has no implicit derivative."""
    import higher as theirs

    decays = _fresh(problem.decays)

    def unroll() -> Leaves:
        net = Holder(problem.weights)
        sgd = torch.optim.SGD(net.parameters(), lr=problem.lr, momentum=problem.momentum)
        with theirs.innerloop_ctx(net, sgd) as (patched, inner):
            for _ in range(problem.unroll):
                inner.step(problem.follow(decays, patched()))
            return torch.autograd.grad(problem.lead(patched()), decays)

    return unroll if kind == "unroll" else None


def hypergrad(problem: Problem, kind: str) -> Run | None:
    """`diff_sgd`; `conjugate_gradient` and `neumann`."""
    from hypergrad import approx_hypergrad
    from hypergrad.optimizers import diff_sgd

    decays = _fresh(problem.decays)

    def unroll() -> Leaves:
        weights, state = list(_fresh(problem.weights)), None
        for _ in range(problem.unroll):
            slopes = torch.autograd.grad(problem.follow(decays, tuple(weights)), weights, create_graph=True)
            weights, state = diff_sgd(
                list(weights), list(slopes), state, lr=problem.lr, momentum=problem.momentum, weight_decay=0
            )
        return torch.autograd.grad(problem.lead(tuple(weights)), decays)

    def implicit() -> Leaves:
        method = approx_hypergrad.conjugate_gradient if kind == "cg" else approx_hypergrad.neumann
        count, rate = (problem.cg, 1.0) if kind == "cg" else (problem.neumann, NEUMANN_STEP)
        weights = tuple(w.detach() for w in problem.weights)
        found: Leaves = method(
            lambda i, o: problem.follow(o, i), lambda i, o: problem.lead(i), weights, decays, num_iters=count, lr=rate
        )
        return found

    return unroll if kind == "unroll" else implicit


def boat(problem: Problem, kind: str) -> Run | None:
    """The configurations RAD, CG and NS, its losses by their dotted path."""
    import boat_torch

    operations = {"unroll": "RAD", "cg": "CG", "neumann": "NS"}
    steps = {"unroll": problem.unroll, "cg": 1, "neumann": 1}[kind]
    losses = {
        f"{level}_level_loss": {"function": f"{__name__}.boat_loss", "params": {}} for level in ("lower", "upper")
    }

    def run() -> Leaves:
        upper, lower = Holder(problem.decays), Holder(problem.weights)
        config = {"fo_op": None, "gm_op": ["NGD"], "na_op": [operations[kind]], "return_grad": True, "device": "cpu"}
        config |= {"accumulate_grad": False, "copy_last_param": True, "fo_ol_batch_input": False}
        config |= {"loss_log_path": os.devnull, "GDA": {"alpha_init": 0.5, "alpha_decay": 0.9}}
        config |= {"RGT": {"truncate_iter": 0}, "DI": {"lr": 0.1}, "lower_iters": steps}
        config |= {"CG": {"k": problem.cg, "tolerance": 0.0}, "NS": {"k": problem.neumann, "tolerance": 0.0}}
        config |= {"lower_level_model": lower, "upper_level_model": upper}
        config |= {"lower_level_var": list(lower.parameters()), "upper_level_var": list(upper.parameters())}
        config["lower_level_opt"] = torch.optim.SGD(lower.parameters(), lr=problem.lr, momentum=problem.momentum)
        config["upper_level_opt"] = torch.optim.SGD(upper.parameters(), lr=1.0)
        made = boat_torch.Problem(config, losses)
        made.build_ll_solver()
        made.build_ul_solver()
        follow = {"loss": problem.follow}
        lead = {"loss": lambda x, y: problem.lead(y)}
        slopes, _ = made.run_iter(follow, lead, current_iter=0)
        return tuple(slopes)

    return run


def boat_loss(feed, upper, lower, params=None):  # type: ignore[no-untyped-def]
    """What both dotted paths name: the loss travels as data."""
    return feed["loss"](upper(), tuple(lower() if params is None else lower(params=params)))


def jaxopt(problem: Problem, kind: str) -> Run | None:
    """In JAX throughout, compiled: `GradientDescent` through its steps (no momentum), `root_vjp` with its own CG."""
    import jax
    import jax.numpy as jnp
    import jaxopt as theirs

    to_jax = lambda tree: tuple(jnp.asarray(t.numpy()) for t in tree)  # noqa: E731
    decays, start = to_jax(problem.decays), to_jax(problem.weights)
    sets = {"train": to_jax(problem.train), "valid": to_jax(problem.valid)}

    def fit(weights, data):  # type: ignore[no-untyped-def]
        hidden = data[0]
        for index in range(0, len(weights), 2):
            hidden = hidden @ weights[index].T + weights[index + 1]
            hidden = jnp.tanh(hidden) if index + 2 < len(weights) else hidden
        picked = jnp.take_along_axis(jax.nn.log_softmax(hidden), data[1][:, None], axis=1)
        return -picked.mean()

    def follow(weights, decays, train):  # type: ignore[no-untyped-def]
        penalty = sum((jnp.exp(d) * w**2).sum() for d, w in zip(decays, weights, strict=True))
        return fit(weights, train) + penalty

    if kind == "neumann":
        return None

    # Everything is an argument: XLA would spend minutes on folding constants of this size.
    def slopes_of_unrolled(decays, start, train, valid):  # type: ignore[no-untyped-def]
        solver = theirs.GradientDescent(
            follow, stepsize=problem.lr, acceleration=False, maxiter=problem.unroll, tol=-1.0, implicit_diff=False
        )
        return jax.grad(lambda d: fit(solver.run(start, d, train).params, valid))(decays)

    def slopes_of_root(decays, start, train, valid):  # type: ignore[no-untyped-def]
        def solve(matvec, b):  # type: ignore[no-untyped-def]
            return theirs.linear_solve.solve_cg(matvec, b, maxiter=problem.cg, tol=0.0)

        found, _ = theirs.implicit_diff.root_vjp(
            jax.grad(follow), start, (decays, train), jax.grad(fit)(start, valid), solve=solve
        )
        return found

    compiled = jax.jit(slopes_of_unrolled if kind == "unroll" else slopes_of_root)

    def run() -> Leaves:
        slopes = jax.block_until_ready(compiled(decays, start, sets["train"], sets["valid"]))
        return tuple(torch.from_numpy(jax.device_get(g).copy()) for g in slopes)

    return run


def peers() -> dict[str, Peer]:
    """Those that are installed."""
    found: dict[str, Peer] = {}
    wanted: dict[str, tuple[str, Peer]] = {
        "torchopt": ("torchopt", torchopt),
        "higher": ("higher", higher),
        "hypergrad": ("hypergrad", hypergrad),
        "boat-torch": ("boat_torch", boat),
        "jaxopt": ("jaxopt", jaxopt),
    }
    for name, (module, peer) in wanted.items():
        try:
            __import__(module)
        except ImportError:
            print(f"{name} is not installed, and is left out")
            continue
        found[name] = peer
    return found


def flat(leaves: Leaves) -> torch.Tensor:
    """One vector."""
    return bilevel.tree.flatten([leaf.detach() for leaf in leaves])

"""BOAT: methods named in a configuration, losses by their dotted path, variables as two modules."""

from __future__ import annotations

import os

import boat_torch
import torch
from pytrees import Holder

# The configuration of its own example, examples/L2_Reg, with the gradient returned and the linear solver set tight.
CONFIG = {"fo_op": None, "gm_op": ["NGD"], "return_grad": True, "device": "cpu", "accumulate_grad": False}
CONFIG |= {"copy_last_param": True, "fo_ol_batch_input": False, "loss_log_path": os.devnull, "DI": {"lr": 0.1}}
CONFIG |= {"GDA": {"alpha_init": 0.5, "alpha_decay": 0.9}, "RGT": {"truncate_iter": 0}}
CONFIG |= {"CG": {"k": 50, "tolerance": 1e-10}}
LOSSES = {f"{level}_level_loss": {"function": f"{__name__}.loss", "params": {}} for level in ("lower", "upper")}


def loss(feed, upper, lower, params=None):
    """What both dotted paths name: the loss travels as data."""
    return feed["loss"](upper(), lower() if params is None else lower(params=params))


def _by(method, leader, follower, x, y, optimizer, steps):
    upper, lower = Holder(x), Holder(y)
    models = {"lower_level_model": lower, "upper_level_model": upper}
    variables = {"lower_level_var": list(lower.parameters()), "upper_level_var": list(upper.parameters())}
    optimizers = {
        "lower_level_opt": optimizer(list(lower.parameters())),
        "upper_level_opt": torch.optim.SGD(upper.parameters(), lr=1.0),
    }
    config = {**CONFIG, "na_op": [method], "lower_iters": steps, **models, **variables, **optimizers}
    problem = boat_torch.Problem(config, LOSSES)
    problem.build_ll_solver()
    problem.build_ul_solver()
    slopes, _ = problem.run_iter({"loss": follower}, {"loss": leader}, current_iter=0)
    return upper.structure.build(slopes)


def unrolled(leader, follower, x, y, *, optimizer, steps):
    """Unrolled: the operations NGD and RAD."""
    return _by("RAD", leader, follower, x, y, optimizer, steps)


def implicit(leader, follower, x, y, *, optimizer, steps):
    """Implicit: the operations NGD and CG."""
    return _by("CG", leader, follower, x, y, optimizer, steps)

"""How a follower finds its optimum: torch.optim, SciPy, a programme's own solver, or an answer known in closed form."""

from bilevel.inner.base import InnerSolver, Problem
from bilevel.inner.closed_form import ClosedForm
from bilevel.inner.entrywise import EntrywiseSGD
from bilevel.inner.optimizer import TorchOptimizer
from bilevel.inner.own import DifferentiableOptimizer
from bilevel.inner.programmes import HiGHS, ProgrammeSolver, ProxQP
from bilevel.inner.projected import ProjectedGradient
from bilevel.inner.scipy import Scipy, ScipyRoot

__all__ = [
    "ClosedForm",
    "DifferentiableOptimizer",
    "EntrywiseSGD",
    "HiGHS",
    "InnerSolver",
    "Problem",
    "ProgrammeSolver",
    "ProjectedGradient",
    "ProxQP",
    "Scipy",
    "ScipyRoot",
    "TorchOptimizer",
]

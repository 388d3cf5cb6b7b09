"""How a follower finds its optimum: torch.optim, SciPy, or an answer known in closed form."""

from bilevel.inner.base import InnerSolver, Problem
from bilevel.inner.closed_form import ClosedForm
from bilevel.inner.scipy import Scipy, ScipyRoot
from bilevel.inner.torch_optim import TorchOptimizer

__all__ = ["ClosedForm", "InnerSolver", "Problem", "Scipy", "ScipyRoot", "TorchOptimizer"]

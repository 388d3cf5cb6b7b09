"""What extends the library: the base classes and helpers of whoever adds a part.

A response, a learned map, a linear or an inner solver, a preconditioner, a rule of play, a residual, an optimiser.

Everything here is public and stays. CONTRIBUTING has worked examples.
"""

from bilevel.autodiff import concrete, gradient, pullback, transforms_active
from bilevel.dynamics import Dynamics, Field
from bilevel.game import Follower, Residual, UserResidual
from bilevel.game.processes import separate_ranks
from bilevel.inner import DifferentiableOptimizer, InnerSolver, Problem
from bilevel.linear import (
    Candidate,
    LinearOperator,
    LinearSolution,
    LinearSolver,
    LinearSystem,
    Memory,
    Preconditioner,
    gaussian,
    norm,
)
from bilevel.networks import FlatNetwork, LeafNetwork
from bilevel.responses import (
    Behaviour,
    Differentiation,
    Estimate,
    Inexactness,
    Optimum,
    Promise,
    Report,
    Response,
    State,
    Steps,
)
from bilevel.responses.base import FartherLook, fresh_state
from bilevel.responses.learned.sampling import Sampler
from bilevel.tree import Structure, Variables, flatten, join, leaves, map_leaves, structure_of

__all__ = [
    "Behaviour",
    "Candidate",
    "DifferentiableOptimizer",
    "Differentiation",
    "Dynamics",
    "Estimate",
    "FartherLook",
    "Field",
    "FlatNetwork",
    "Follower",
    "Inexactness",
    "InnerSolver",
    "LeafNetwork",
    "LinearOperator",
    "LinearSolution",
    "LinearSolver",
    "LinearSystem",
    "Memory",
    "Optimum",
    "Preconditioner",
    "Problem",
    "Promise",
    "Report",
    "Residual",
    "Response",
    "Sampler",
    "State",
    "Steps",
    "Structure",
    "UserResidual",
    "Variables",
    "concrete",
    "flatten",
    "fresh_state",
    "gaussian",
    "gradient",
    "join",
    "leaves",
    "map_leaves",
    "norm",
    "pullback",
    "separate_ranks",
    "structure_of",
    "transforms_active",
]

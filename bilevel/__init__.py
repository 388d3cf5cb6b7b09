"""Nested optimisation and differentiable games in PyTorch: one game, interchangeable responses.

A solution concept is what each player assumes about the others while it differentiates. A `Game` holds the players,
a response is a differentiable map from the others' variables to a follower's own, and `solve` plays.
"""

from bilevel import testing
from bilevel.certificate import Certificate, Standing
from bilevel.certify import certify, certify_nash
from bilevel.compare import compare
from bilevel.comparison import Comparison
from bilevel.dynamics import (
    LOLA,
    Alternating,
    Competitive,
    Consensus,
    Dynamics,
    ExactLOLA,
    Extragradient,
    FollowTheRidge,
    LookAhead,
    NegativeMomentum,
    Optimistic,
    Simultaneous,
    SymplecticAdjustment,
    TotalGradient,
    TwoTimescale,
)
from bilevel.errors import (
    BilevelError,
    BilevelWarning,
    CapturedTensorError,
    CheckpointError,
    ConvergenceError,
    ExhaustedDataError,
    IndefiniteSystemError,
    NonConvergenceWarning,
    NonFiniteError,
    NotSymmetricError,
    SingularSystemError,
    UnreliableResponseWarning,
)
from bilevel.exploitability import Exploitability, exploitability
from bilevel.game import Game, Player
from bilevel.inner import ClosedForm, InnerSolver, Scipy, ScipyRoot
from bilevel.linear import (
    GMRES,
    ConjugateGradient,
    Dense,
    Diagonal,
    Identity,
    LinearOperator,
    LinearSolution,
    LinearSolver,
    Neumann,
    Nystrom,
    NystromPreconditioner,
    Preconditioner,
    Recycled,
)
from bilevel.many import Games
from bilevel.responses import MLP, Elementwise, Hypernetwork, Implicit, Linear, LowRank, Response, Unrolled
from bilevel.root import root
from bilevel.solution import Solution
from bilevel.solutions import Solutions
from bilevel.solve import solve

__all__ = [
    "GMRES",
    "LOLA",
    "MLP",
    "Alternating",
    "BilevelError",
    "BilevelWarning",
    "CapturedTensorError",
    "Certificate",
    "CheckpointError",
    "ClosedForm",
    "Comparison",
    "Competitive",
    "ConjugateGradient",
    "Consensus",
    "ConvergenceError",
    "Dense",
    "Diagonal",
    "Dynamics",
    "Elementwise",
    "ExactLOLA",
    "ExhaustedDataError",
    "Exploitability",
    "Extragradient",
    "FollowTheRidge",
    "Game",
    "Games",
    "Hypernetwork",
    "Identity",
    "Implicit",
    "IndefiniteSystemError",
    "InnerSolver",
    "Linear",
    "LinearOperator",
    "LinearSolution",
    "LinearSolver",
    "LookAhead",
    "LowRank",
    "NegativeMomentum",
    "Neumann",
    "NonConvergenceWarning",
    "NonFiniteError",
    "NotSymmetricError",
    "Nystrom",
    "NystromPreconditioner",
    "Optimistic",
    "Player",
    "Preconditioner",
    "Recycled",
    "Response",
    "Scipy",
    "ScipyRoot",
    "Simultaneous",
    "SingularSystemError",
    "Solution",
    "Solutions",
    "Standing",
    "SymplecticAdjustment",
    "TotalGradient",
    "TwoTimescale",
    "UnreliableResponseWarning",
    "Unrolled",
    "certify",
    "certify_nash",
    "compare",
    "exploitability",
    "root",
    "solve",
    "testing",
]

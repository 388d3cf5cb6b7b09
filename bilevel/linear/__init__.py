"""Solvers for u = (A + damping I)^-1 b from products with A: the inner half of an implicit derivative."""

from bilevel.linear.base import LinearSolution, LinearSolver
from bilevel.linear.block_diagonal import BlockDiagonal
from bilevel.linear.conjugate_gradient import ConjugateGradient
from bilevel.linear.dense import Dense
from bilevel.linear.extrapolated import Extrapolated
from bilevel.linear.from_optimizer import AdamPreconditioner, LBFGSPreconditioner
from bilevel.linear.gaussian import gaussian
from bilevel.linear.gmres import GMRES
from bilevel.linear.identity import Identity
from bilevel.linear.kronecker import KroneckerPreconditioner
from bilevel.linear.neumann import Neumann
from bilevel.linear.norms import norm
from bilevel.linear.nystrom import Nystrom
from bilevel.linear.operator import KroneckerFactors, LinearOperator
from bilevel.linear.preconditioner import Diagonal, NystromPreconditioner, Preconditioner, Recycled
from bilevel.linear.stochastic_gradient import StochasticGradient
from bilevel.linear.stopping import HypergradientTolerance
from bilevel.linear.system import Candidate, LinearSystem, Memory

__all__ = [
    "GMRES",
    "AdamPreconditioner",
    "BlockDiagonal",
    "Candidate",
    "ConjugateGradient",
    "Dense",
    "Diagonal",
    "Extrapolated",
    "HypergradientTolerance",
    "Identity",
    "KroneckerFactors",
    "KroneckerPreconditioner",
    "LBFGSPreconditioner",
    "LinearOperator",
    "LinearSolution",
    "LinearSolver",
    "LinearSystem",
    "Memory",
    "Neumann",
    "Nystrom",
    "NystromPreconditioner",
    "Preconditioner",
    "Recycled",
    "StochasticGradient",
    "gaussian",
    "norm",
]

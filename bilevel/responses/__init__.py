"""What a leader assumes about its follower while it differentiates: one room a strategy."""

from bilevel.responses.base import Response, State
from bilevel.responses.batches import AllBatches, Batches, FreshBatches, HeldBatch
from bilevel.responses.curvature import Curvature, GaussNewton, Hessian
from bilevel.responses.implicit import Implicit
from bilevel.responses.inexactness import AsLeaderMoves, Geometric, Inexactness
from bilevel.responses.last_step import LastStep
from bilevel.responses.learned import Draws, Hypernetwork, Memory, Perturbations, Sampler
from bilevel.responses.nudged import Nudged
from bilevel.responses.promise import Behaviour, Estimate, Optimum, Promise, Report, Steps
from bilevel.responses.single_loop import SingleLoop
from bilevel.responses.unrolled import Differentiation, ForwardMode, ReverseMode, Segments, Unrolled

__all__ = [
    "AllBatches",
    "AsLeaderMoves",
    "Batches",
    "Behaviour",
    "Curvature",
    "Differentiation",
    "Draws",
    "Estimate",
    "ForwardMode",
    "FreshBatches",
    "GaussNewton",
    "Geometric",
    "HeldBatch",
    "Hessian",
    "Hypernetwork",
    "Implicit",
    "Inexactness",
    "LastStep",
    "Memory",
    "Nudged",
    "Optimum",
    "Perturbations",
    "Promise",
    "Report",
    "Response",
    "ReverseMode",
    "Sampler",
    "Segments",
    "SingleLoop",
    "State",
    "Steps",
    "Unrolled",
]

"""How players who move at the same time follow the field of their own gradients."""

from bilevel.dynamics.base import Dynamics, Field
from bilevel.dynamics.simultaneous import Simultaneous

__all__ = ["Dynamics", "Field", "Simultaneous"]

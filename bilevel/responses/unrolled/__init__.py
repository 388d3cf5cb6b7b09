"""The follower takes k optimiser steps; three ways of differentiating them."""

from bilevel.responses.unrolled.differentiation import Differentiation, ReverseMode
from bilevel.responses.unrolled.forward_mode import ForwardMode
from bilevel.responses.unrolled.response import Unrolled
from bilevel.responses.unrolled.segments import Segments

__all__ = ["Differentiation", "ForwardMode", "ReverseMode", "Segments", "Unrolled"]

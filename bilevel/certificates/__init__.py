"""What a point is worth: bounds on its hypergradient's error, conditions of equilibrium, gains from moving alone."""

from bilevel.certificates._certify import certify, certify_nash
from bilevel.certificates._exploitability import exploitability
from bilevel.certificates._interval import HypergradientInterval, Interval, hypergradient_interval
from bilevel.certificates.certificate import Certificate, Standing
from bilevel.certificates.gains import Exploitability
from bilevel.certificates.globally import GlobalAnswer, solve_globally

__all__ = [
    "Certificate",
    "Exploitability",
    "GlobalAnswer",
    "HypergradientInterval",
    "Interval",
    "Standing",
    "certify",
    "certify_nash",
    "exploitability",
    "hypergradient_interval",
    "solve_globally",
]

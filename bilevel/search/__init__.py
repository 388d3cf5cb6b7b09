"""A search over a few hyperparameters that takes hypergradients where they are known."""

from bilevel.search._search import Found, GradientSearch, minimise

__all__ = ["Found", "GradientSearch", "minimise"]

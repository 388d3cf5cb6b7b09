"""Finite games: payoff tensors, the field's solvers behind one function, and how players learn to play them."""

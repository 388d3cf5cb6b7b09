"""Cross-validation in any game: a follower retrained to convergence at each candidate, side by side, resumable."""

from games.cross_validation.candidates import Candidate, grid, random
from games.cross_validation.search import CrossValidated, CrossValidation

__all__ = ["Candidate", "CrossValidated", "CrossValidation", "grid", "random"]

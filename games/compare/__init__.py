"""Responses side by side on a fixed suite of games: what the command `bilevel compare` runs."""

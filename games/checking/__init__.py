"""The commands `bilevel check` and `bilevel certify`: a game of the user's own, read from a Python file."""

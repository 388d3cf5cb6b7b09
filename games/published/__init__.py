"""Small bilevel problems of the literature with known leader values, and how many of them the library solves."""

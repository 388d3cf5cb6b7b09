"""Applications and known games on top of `bilevel`, which does not know them."""

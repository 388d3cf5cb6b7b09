"""The global optimum of a linear or convex quadratic bilevel programme, with a proof."""

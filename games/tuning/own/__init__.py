"""A model and data of one's own on the command line: `bilevel tune --model net.py:build`."""

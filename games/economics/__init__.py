"""Oligopolies, tolls and contracts, each with its answer in closed form."""

"""Oligopolies, tolls, contracts and security games, each with its answer in closed form."""

"""How many games, or tasks, are spoken of."""

from __future__ import annotations


def told_of(count: int, noun: str, offset: int) -> str:
    """So many games from one on, in words."""
    return f"{noun}s {offset} to {offset + count - 1}" if offset else f"{count} {noun}s"

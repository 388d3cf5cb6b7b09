"""How a solve runs: leaders and their optimisers, the rounds of a step, gathered warnings, what a checkpoint holds."""

from bilevel.running.run import Record, Run

__all__ = ["Record", "Run"]

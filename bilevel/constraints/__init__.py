"""What a player may choose: functions as constraints, their multipliers, and what the follower's derivative needs."""

from bilevel.constraints.functions import Constrained, Labels, Linearised

__all__ = ["Constrained", "Labels", "Linearised"]

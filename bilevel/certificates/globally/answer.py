"""What `solve_globally` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bilevel._printed import printed
from bilevel.tree import Variables, named_leaves


@dataclass(frozen=True, eq=False)
class GlobalAnswer:
    """The best point of a bilevel programme, and what is proved of it.

    Attributes:
        value: The leader's loss there.
        variables: By player.
        multipliers: The follower's, in the form of what its functions return, by "inequality", "equality", "domain"
            and "domain equality".
        proved: Whether no other point is better by more than the tolerance.
        reason: How it is proved, or why not.
        worst: The leader's loss there if its follower took the optimum that the leader likes least, infinite where that
            breaks the leader's functions. Where it equals `value`, the answer is the pessimistic one as well. NaN where
            it is not known: a quadratic loss of the leader's, and a follower whose optima have no bounds, or too many
            corners.
        bound: What no point is below. It holds as far as `proved` says.
        nodes: Of the searches, together.
        optimistic: Whether a follower with several optima takes the one that the leader likes best; else it takes the
            one that the leader likes least.
        attained: False where no point has the lowest value itself, which is `bound`, and this one comes near it. Only
            a pessimistic answer may not be attained.
    """

    value: float
    variables: Mapping[str, Variables]
    multipliers: Mapping[str, Variables]
    proved: bool
    reason: str
    worst: float
    bound: float
    nodes: int
    optimistic: bool = True
    attained: bool = True

    @property
    def gap(self) -> float:
        """How far the value is above the bound; at least 0."""
        return max(self.value - self.bound, 0.0)

    def __str__(self) -> str:
        """A table of the players' variables and the follower's multipliers."""
        from rich.table import Table  # noqa: PLC0415

        standing = "the global optimum" if self.proved else "not proved to be the global optimum"
        if self.optimistic:
            ties = f"If the follower broke ties against the leader: {self.worst:.8g}."
        else:
            ties = "The follower breaks ties against the leader."
        table = Table(
            title=f"{self.value:.8g}: {standing} (gap {self.gap:.2g}, {self.nodes} nodes)",
            caption=f"{self.reason} {ties}",
        )
        table.add_column("what")
        table.add_column("numbers", justify="right")
        rows = {**self.variables, **{f"multipliers, {kind}": tree for kind, tree in self.multipliers.items()}}
        for name, tree in rows.items():
            for path, leaf in named_leaves(tree):
                shown = [f"{number:.6g}" for number in leaf.reshape(-1)[:12].tolist()]
                table.add_row(f"{name}{path}", ", ".join(shown) + (", and more" if leaf.numel() > 12 else ""))
        return printed(table)

"""What a certificate says: findings with a verdict and a number each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch

from bilevel._printed import printed
from bilevel.tree import Variables


class Standing(Enum):
    """Certified, refuted, or neither: the number is then too close to call, or could not be had.

    Its members are `CERTIFIED`, `REFUTED` and `INCONCLUSIVE`.
    """

    CERTIFIED = "certified"
    REFUTED = "refuted"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True)
class Finding:
    """One condition of a certificate.

    Attributes:
        name: Which condition.
        standing: Whether it holds.
        value: The number that decides it.
        wanted: What the number was held against.
        remark: What to know about the number.
    """

    name: str
    standing: Standing
    value: float
    wanted: str
    remark: str = ""


@dataclass(frozen=True, eq=False)
class Certificate:
    """What a point of a game is worth; it is true where all conditions are certified.

    Attributes:
        concept: "differential Stackelberg" or "differential Nash".
        findings: The conditions of the concept, each with its number.
        hypergradient: The leader's, as claimed. This and the next five are of `certify`.
        corrected: The leader's, after one Newton step of the follower.
        hypergradient_norm: |hypergradient|, beside which the errors are read: they are absolute.
        error_estimate: |hypergradient - corrected|.
        error_bound: Bounds |hypergradient - exact|.
        corrected_bound: Bounds |corrected - exact|.
        judged_in: The dtype in which the conditions were evaluated, where it is known.
        gradients: Gradients that it cost.
        products: Hessian-vector products that it cost.
        one_sided: At a kink of the follower's answer the hypergradient on each of its sides, by the names of the
            constraints that bind there; empty where there is no kink.
    """

    concept: str
    findings: tuple[Finding, ...]
    hypergradient: Variables = field(default=None, repr=False)
    corrected: Variables = field(default=None, repr=False)
    hypergradient_norm: float = float("nan")
    error_estimate: float = float("nan")
    error_bound: float = float("nan")
    corrected_bound: float = float("nan")
    judged_in: torch.dtype | None = None
    gradients: int = 0
    products: int = 0
    one_sided: Mapping[str, Variables] = field(repr=False, default_factory=dict)

    @property
    def standing(self) -> Standing:
        """Certified when all conditions are, refuted when one is, else inconclusive."""
        standings = {finding.standing for finding in self.findings}
        if Standing.REFUTED in standings:
            return Standing.REFUTED
        return Standing.INCONCLUSIVE if Standing.INCONCLUSIVE in standings else Standing.CERTIFIED

    @property
    def by_name(self) -> Mapping[str, Finding]:
        """The findings by name."""
        return {finding.name: finding for finding in self.findings}

    def __bool__(self) -> bool:
        return self.standing is Standing.CERTIFIED

    def __str__(self) -> str:
        """A table of the findings."""
        from rich.table import Table  # noqa: PLC0415

        table = Table(title=f"{self.concept}: {self.standing.value}")
        for column in ("condition", "standing", "number", "wanted", "remark"):
            table.add_column(column, justify="right" if column == "number" else "left", overflow="fold")
        for found in self.findings:
            table.add_row(found.name, found.standing.value, f"{found.value:.3g}", found.wanted, found.remark)
        return printed(table, width=110)

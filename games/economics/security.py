"""A defender who spreads guards over targets, and an attacker who watches and picks one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

import bilevel as bl
from games.matrix.finite import FiniteGame


@dataclass(frozen=True, eq=False)
class Covered:
    """How often each target is guarded `[n]`, which one is attacked, and what both expect."""

    coverage: Tensor
    attacked: int
    defender: float
    attacker: float


@final
@dataclass(frozen=True)
class Security:
    r"""Target i is guarded with probability c_i, sum c_i = `resources`; the attacker picks where it gains most.

        attacker at i: c_i caught_i + (1 - c_i) prize_i,    defender: c_i saved_i + (1 - c_i) lost_i

    `prize` and `caught` are what the attacker receives from a target without and with a guard, `lost` and `saved` what
    the defender does; prize_i > caught_i and saved_i > lost_i, in money. Source: Kiekintveld et al. 2009, "Computing
    optimal randomized resource allocations for massive security games"; such games guard airports and ferries.

    >>> found = Security(prize=(4.0, 2.0), caught=(0.0, 0.0), lost=(-4.0, -2.0), saved=(0.0, 0.0)).stackelberg()
    >>> found.coverage  # 4 (1 - c) = 2 (1 - (1 - c))
    tensor([0.6667, 0.3333], dtype=torch.float64)
    """

    prize: tuple[float, ...]
    caught: tuple[float, ...]
    lost: tuple[float, ...]
    saved: tuple[float, ...]
    resources: float = 1.0

    def __post_init__(self) -> None:
        sizes = {len(each) for each in (self.prize, self.caught, self.lost, self.saved)}
        if sizes != {len(self.prize)} or len(self.prize) < 2:
            raise ValueError(f"Security: payoffs of {sorted(sizes)} targets; expected one number, at least 2, for all.")
        for more, less, said in (
            (self.prize, self.caught, "prize > caught"),
            (self.saved, self.lost, "saved > lost"),
        ):
            if not all(a > b for a, b in zip(more, less, strict=True)):
                raise ValueError(f"Security: {said} fails for a target of {list(zip(more, less, strict=True))}.")
        if not 0.0 < self.resources < len(self.prize):
            raise ValueError(
                f"Security: resources={self.resources}; expected more than 0 and fewer than the {len(self.prize)} "
                "targets, which would all be guarded."
            )

    def attacker(self, coverage: Tensor) -> Tensor:
        """What the attacker expects at each target `[n]`."""
        prize, caught = _pair(self.prize, self.caught, coverage)
        return coverage * caught + (1.0 - coverage) * prize

    def defender(self, coverage: Tensor) -> Tensor:
        """What the defender expects if each target `[n]` is the one attacked."""
        lost, saved = _pair(self.lost, self.saved, coverage)
        return coverage * saved + (1.0 - coverage) * lost

    def stackelberg(self) -> Covered:
        """The best coverage to be seen with: guards fill up whatever is most worth attacking, as water does.

        The attacker's payoff is pressed to the level v at which sum_i max(0, (prize_i - v) / (prize_i - caught_i)) is
        `resources`, but not below the highest `caught`, where a target is guarded always. Among the targets that pay v
        it picks the one that the defender likes best, the strong Stackelberg equilibrium's rule. Exact: v is found on
        the line between two prizes. Costs a sort.
        """
        one = torch.zeros((), dtype=torch.float64)
        prize, caught = _pair(self.prize, self.caught, one)
        order = prize.argsort(descending=True)
        slopes = (1.0 / (prize - caught))[order]
        weights, sums = slopes.cumsum(0), (slopes * prize[order]).cumsum(0)
        # With the k highest prizes in play the level is (sum of slope * prize - resources) / sum of slopes.
        levels = (sums - self.resources) / weights
        below = torch.cat([prize[order][1:], torch.full((1,), -torch.inf, dtype=torch.float64)])
        level = levels[int((levels >= below).nonzero()[0])].clamp(min=caught.max())
        coverage = ((prize - level) / (prize - caught)).clamp(0.0, 1.0)
        pays = self.attacker(coverage)
        ties = pays >= pays.max() - 1e-9 * (prize.max() - caught.min())
        gains = torch.where(ties, self.defender(coverage), -torch.inf)
        attacked = int(gains.argmax())
        return Covered(coverage, attacked, float(gains[attacked]), float(pays[attacked]))

    def finite(self) -> FiniteGame:
        """With one guard, the defender's choice of a target against the attacker's, as a `FiniteGame`."""
        if self.resources != 1.0:
            raise ValueError(
                f"Security.finite: resources={self.resources}; expected 1 guard, whose place is an action."
            )
        guarded = torch.eye(len(self.prize), dtype=torch.float64)
        rows = [torch.stack([pay(row) for row in guarded]) for pay in (self.defender, self.attacker)]
        return FiniteGame(tuple(rows), ("defender", "attacker"))

    def game(self, *, precision: float) -> bl.Game:
        """Players `coverage` and `attack`, both logits `[n]`, float64, from 0.

        The attacker picks target i with probability softmax(attack)_i, and gains an entropy over `precision` besides: a
        quantal response softmax(precision * payoffs), what people do in experiments (McKelvey and Palfrey 1995), which
        is the rational attacker's as `precision`, per unit of money, grows. Give a response that answer, by
        `Implicit(ClosedForm(lambda coverage: precision * game.attacker(game.coverage(coverage))))`: a descent over
        saturated logits may stand still at the wrong target.
        """
        if not 0.0 < precision < float("inf"):
            raise ValueError(f"Security.game: precision={precision}; expected a positive finite number.")

        def defend(coverage: Tensor, attack: Tensor) -> Tensor:
            return -attack.softmax(-1) @ self.defender(self.coverage(coverage))

        def strike(coverage: Tensor, attack: Tensor) -> Tensor:
            chosen = attack.softmax(-1)
            return chosen @ attack.log_softmax(-1) / precision - chosen @ self.attacker(self.coverage(coverage))

        zeros = torch.zeros(len(self.prize), dtype=torch.float64)
        return bl.Game(coverage=bl.Player(defend, zeros), attack=bl.Player(strike, zeros))

    def coverage(self, logits: Tensor) -> Tensor:
        """sigmoid(logits + shift) `[n]`, with the one shift that makes it sum to `resources`; differentiable."""

        def excess(shift: Tensor, logits: Tensor) -> Tensor:
            return torch.sigmoid(logits + shift).sum() - self.resources

        flat = logits.detach()
        edge = torch.logit(torch.tensor(self.resources / len(flat), dtype=flat.dtype))
        low, high = edge - flat.max(), edge - flat.min()
        for _ in range(200):  # bisection to the last bit: the excess rises from at most 0 at low to at least 0 at high
            middle = 0.5 * (low + high)
            above = excess(middle, flat) > 0.0
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        shift = bl.root(excess, 0.5 * (low + high), logits, symmetric=True, linear_solver=bl.linear.Dense())
        return torch.sigmoid(logits + shift)


def _pair(first: Sequence[float], second: Sequence[float], like: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.tensor(first, dtype=like.dtype, device=like.device),
        torch.tensor(second, dtype=like.dtype, device=like.device),
    )

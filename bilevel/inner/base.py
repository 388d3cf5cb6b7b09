"""What an inner solver is given, and what it gives back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, final

from torch import Tensor

from bilevel._returned import Lent, both, require_leaves
from bilevel.constraints import ConstraintSet
from bilevel.constraints.functions import Constrained
from bilevel.game.data import Batch
from bilevel.game.residual import OwnGradient, Residual
from bilevel.inner.torch_optim import require_factory
from bilevel.sharding import ShardedTensor
from bilevel.tree import Structure, Variables, leaf_names


class Problem(Protocol):
    r"""What an inner solver sees of its follower: $\min_y f(y)$, the other players standing still.

    Of several players who answer together, and of a player with a residual of its own, the loss does not say where
    they settle: only `gradients`, the residual, does.

    Attributes:
        name: The follower's.
        form: The layout of y: the shapes of its leaves, and how they make up the follower's variables.
        batch: The present batch, None without data.
    """

    name: str
    form: Structure
    batch: Batch

    @property
    def minimises(self) -> bool:
        """Whether y settles at a minimum of f; else f is to be ignored."""

    @property
    def constraints(self) -> Constrained | None:
        """The programme that y is to solve, where functions constrain it; None where they do not."""

    @property
    def rests(self) -> Residual:
        """What vanishes where y settles, and what it is projected onto."""

    @property
    def bounds(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """The bounds of each entry, where y settles at a minimum of f within bounds alone; else None."""

    @property
    def others(self) -> Mapping[str, Variables]:
        """The variables, detached, of the players whom the follower's functions name, and of the solver's `names`."""

    def gradients(self, y: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Loss and residual of each leaf, its gradient as a rule, on the present batch; counted as one gradient."""

    def field(self, y: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Loss and what a step goes along: the residual, or where steps are projected the gradient of f."""

    def at_rest(self, y: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        """The residual, from what `field` gave at y."""

    def settled(self, z: Sequence[Tensor], step: Any = 1.0) -> list[Tensor]:
        """Where a step of this length that led to z ends: projected, where the player has a domain or a term."""

    def advance(self) -> None:
        """Move on to the next batch."""


class FreeProblem:
    """What a `Problem` is whose follower rests where its loss's gradient vanishes, and is projected nowhere."""

    minimises = True
    constraints: Constrained | None = None
    bounds: tuple[list[Tensor], list[Tensor]] | None = None
    rests: Residual = OwnGradient()

    def gradients(self, y: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradients."""
        raise NotImplementedError

    def field(self, y: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The same as `gradients`."""
        return self.gradients(y)

    def at_rest(self, y: Sequence[Tensor], slopes: Sequence[Tensor]) -> list[Tensor]:
        """The gradient."""
        return list(slopes)

    def settled(self, z: Sequence[Tensor], step: Any = 1.0) -> list[Tensor]:
        """Where a step ends."""
        return list(z)

    def advance(self) -> None:
        """The batch is held."""


_FIELDS = "bilevel.ScipyRoot(), or a torch.optim optimiser that steps along gradients alone, SGD or Adam"
FIELD_RESPONSES = f"Implicit with {_FIELDS}; Unrolled takes the latter as well"
"""For `instead` of `require_minimum`, where a response goes by the loss, whatever optimiser it has."""


def require_minimum(problem: Problem, what: str, instead: str = _FIELDS) -> None:
    """Raise `TypeError` for what goes by the loss, where a minimum of it is not what is looked for."""
    if problem.rests.projects:
        raise TypeError(
            f"{what} minimises a loss without constraints, and {problem.name!r} has {problem.rests.told}. Use "
            "bilevel.inner.ProjectedGradient(), or SGD, whose steps are projected; for bounds alone "
            "bilevel.Scipy('L-BFGS-B') as well. A set written as functions, inequality= and equality=, is kept by "
            "bilevel.Scipy('SLSQP')."
        )
    if not problem.minimises:
        raise TypeError(
            f"{what} minimises one loss, and {problem.name!r} is several players with a loss each, or has a residual "
            f"of its own. Use {instead}."
        )


class InnerSolver(ABC):
    """Finds a follower's optimum; nothing of it is differentiated.

    A callable from parameters to a torch.optim optimiser is an inner solver wherever one is expected. Subclass this for
    any other method, as a frozen dataclass that holds its settings. Who calls it (`minimised`) refuses an answer that
    has not the form of y, and a solver that wrote into what it was lent.
    """

    @property
    def takes_constraints(self) -> bool:
        """Whether it sees `problem.constraints`; a solver that does not is refused for a constrained follower."""
        return False

    @property
    def takes_equilibria(self) -> bool:
        """Whether it settles several players within constraints, whose programme does not `minimises`."""
        return False

    @property
    def names(self) -> tuple[str, ...]:
        """The players that it looks up in `problem.others` besides those whom the follower's own functions name."""
        return ()

    @property
    def takes_parts(self) -> bool:
        """Whether variables may be spread over ranks: it takes sums and norms of them, and acts on each entry alone."""
        return False

    @final
    def refuse(self, problem: Problem, asker: str) -> None:
        """Raise `TypeError` for a constrained follower whose constraints this solver would not see."""
        programme = problem.constraints
        if programme is not None and not programme.minimises:
            if self.takes_equilibria:
                return
            raise TypeError(
                f"{asker}: {self!r} minimises one loss, and {problem.name!r} is several players with a loss each, "
                "within constraints. Use ScipyRoot(), or ClosedForm(...) with their equilibrium."
            )
        if programme is not None and not self.takes_constraints:
            raise TypeError(
                f"{asker}: {self!r} does not see the constraints of player {problem.name!r}, and would leave them. Use "
                'Scipy("SLSQP"), Scipy("trust-constr"), or ClosedForm(...) with the constrained optimum.'
            )

    def domain(self, form: Structure) -> ConstraintSet | None:
        """The set that it keeps the follower in by options of its own, where the follower has none itself."""
        return None

    @abstractmethod
    def minimise(
        self, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: float
    ) -> tuple[list[Tensor], Any]:
        """The leaves of y where the method ends, and what to remember for the next call: a tuple of two.

        The leaves are tensors like those of `y`. The memory is opaque to everybody else.

        Args:
            problem: Loss and gradients at any y, and the batches.
            y: The leaves to start from; they are not written to.
            memory: None in a first call, or what the last call returned: tensors, numbers, strings, None, and lists,
                tuples and dicts of them, which a checkpoint can hold. Its tensors are not written to.
            steps: The most steps to take.
            threshold: Stop sooner once |gradient| is at most this.
        """

    def remembered(self, memory: Any) -> Sequence[Mapping[str, Any]]:
        """What a torch.optim optimiser remembers of each leaf, out of a memory; `[]` of any other method."""
        return []


def named_by(optimizer: object) -> tuple[str, ...]:
    """The `names` of an inner solver; none of what makes a torch.optim optimiser."""
    return optimizer.names if isinstance(optimizer, InnerSolver) else ()


def require_solver(asker: str, optimizer: object) -> None:
    """Raise `TypeError` for what is neither an inner solver nor makes a torch.optim optimiser."""
    if isinstance(optimizer, type) and issubclass(optimizer, InnerSolver):
        name = optimizer.__name__
        raise TypeError(f"{asker} is the class {name} itself; expected one of it, {name}(...).")
    if not isinstance(optimizer, InnerSolver):
        require_factory(asker, optimizer)


def minimised(
    solver: InnerSolver, problem: Problem, y: list[Tensor], memory: Any, *, steps: int, threshold: Any
) -> tuple[list[Tensor], Any]:
    """What `solver.minimise` returns, held to its contract.

    Raises:
        TypeError, ValueError: For an answer that is no tuple of leaves like y's and a memory, and for a solver that
            wrote into `y`, into its memory or into the other players' variables.
    """
    name, lent = f"{type(solver).__name__}.minimise", Lent()
    if not solver.takes_parts and any(isinstance(leaf, ShardedTensor) for leaf in y):
        raise TypeError(
            f"{name} works on whole vectors, and those of player {problem.name!r} are spread over the ranks. Use a "
            "torch.optim optimiser."
        )
    given, kept = lent.out("the leaves y to start from", y), lent.out("the memory that it was given", memory)
    for player, variables in problem.others.items():
        lent.note(f"the variables of player {player!r}", variables)
    found = solver.minimise(problem, given, kept, steps=steps, threshold=threshold)
    lent.require_untouched(name)
    ends, after = both(found, name, "the leaves of y where it ended, and what to remember, or None")
    told = f"{name}: its answer for player {problem.name!r}"
    require_leaves(ends, y, told, lambda: leaf_names(problem.form.build(y), problem.name))
    return list(ends), after

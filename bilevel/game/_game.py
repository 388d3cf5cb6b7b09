"""What is being solved: players, their objectives, their variables and data. All checks of the user's input."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.autodiff import gradient, transforms_active
from bilevel.game.data import Batch, Position, Stream
from bilevel.randomness import random_kept
from bilevel.tree import Structure, Variables, detached, join, leaves, map_leaves, named_leaves, structure_of

Buffers = dict[str, dict[str, Tensor]]
"""Non-differentiated state of the players' modules: player -> buffer's name -> tensor."""

# Words that a call of an objective or of solve() already uses; a player of that name could never be addressed.
RESERVED = frozenset(
    (
        *("batch", "game", "optimizer", "steps", "scheduler", "clip_norm", "callbacks", "checkpoint"),
        *("checkpoint_every", "resume", "progress", "seed", "dynamics"),
    )
)


@dataclass(frozen=True, kw_only=False)
class Player:
    """One player: a loss to minimise, the variables it chooses, and the data that it sees.

    `objective` is called with keyword arguments named after the players that it depends on, and with `batch` when
    the player has data; it returns a scalar loss, to minimise. `init` is a tensor, a pytree of tensors, or an
    `nn.Module`: then the variables are the module's parameters that require grad, as a dict by name, and its buffers
    (BatchNorm's statistics, say) travel along as state that advances. The module itself is never changed. `data` is
    any iterable of batches that can be iterated more than once; it is re-iterated for ever.

    `optimizer_hyper=True` declares that the variables are hyperparameters of the *inner optimiser*, a learning rate
    say: they reach the follower through `Unrolled(lambda params, lr: SGD(params, lr=lr))` and no objective.

    Raises `TypeError` or `ValueError` naming the argument, what came and what was expected.

    >>> def loss(x, y): return ((y - x) ** 2).sum()
    >>> Player(loss, init=torch.zeros(3)).names
    ('x', 'y')
    """

    objective: Callable[..., Tensor]
    init: Any
    data: Iterable[Batch] | None = None
    optimizer_hyper: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not callable(self.objective):
            raise TypeError(f"Player: objective is {_kind(self.objective)}; expected a function that returns a loss.")
        for parameter in inspect.signature(self.objective).parameters.values():
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise TypeError(
                    f"Player: parameter {str(parameter)!r} of the objective cannot be named in a call. Name each "
                    "parameter after a player (and `batch`), as in `def loss(decay, weights, batch)`."
                )
        if self.data is not None:
            if isinstance(self.data, Tensor | Mapping) or not isinstance(self.data, Iterable):
                raise TypeError(
                    f"Player: data is {_kind(self.data)}; expected an iterable of batches, such as a DataLoader or "
                    "a list. A single batch is `data=[batch]`."
                )
            if isinstance(self.data, Iterator):
                raise TypeError(
                    f"Player: data is a {type(self.data).__name__}, which can be iterated only once and would be "
                    "exhausted after one pass. Pass something re-iterable: a list of batches or a DataLoader."
                )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The parameters that the objective must be called with."""
        return tuple(
            name
            for name, p in inspect.signature(self.objective).parameters.items()
            if p.default is inspect.Parameter.empty
        )

    def variables(self) -> Variables:
        """A fresh copy of the initial variables."""
        if isinstance(self.init, nn.Module):
            return {name: p.detach().clone() for name, p in self.init.named_parameters() if p.requires_grad}
        return detached(self.init)

    def buffers(self) -> dict[str, Tensor]:
        """A fresh copy of the module's buffers; empty when `init` is no module."""
        if isinstance(self.init, nn.Module):
            return {name: b.detach().clone() for name, b in self.init.named_buffers()}
        return {}


class Game:
    """Players in order of play: the first moves first and leads.

    `Game(decay=Player(...), weights=Player(...))`. Everything is checked here, before any work, with one evaluation
    of each objective on its first batch: names, shapes, dtypes and devices, data, and that every leader reaches
    somebody's loss and every follower's loss depends on someone who moves before it.

    It keeps a copy of where its players start, and none of the tensors that they were given: who writes into these, or
    trains the module, changes no game. A module's numbers may go once the game is made, by `model.to("meta")`.

    Raises `TypeError` or `ValueError` naming player, argument, what came, what was expected and the way out.

    >>> def lead(x, y): return (y ** 2).sum() + (x ** 2).sum()
    >>> def follow(x, y): return ((y - x - 1) ** 2).sum()
    >>> game = Game(x=Player(lead, torch.zeros(2)), y=Player(follow, torch.zeros(2)))
    >>> game.loss("y", {"x": torch.zeros(2), "y": torch.zeros(2)}).item()
    2.0
    """

    def __init__(self, **players: Player) -> None:
        self._players = dict(players)
        self._order = tuple(players)
        self._groups: dict[str, tuple[str, ...]] = {}
        self._anticipated: dict[str, Callable[[Mapping[str, Variables]], Variables]] = {}
        self._check_names()
        # Read once: inspecting a signature costs as much as a small network's gradient.
        self._arguments = {n: tuple(a for a in p.names if a != "batch") for n, p in players.items()}
        self._initial = {name: player.variables() for name, player in players.items()}
        self._check_variables()
        # The copy above is the only one: whoever lets go of the tensors that he passed holds them no longer.
        self._players = {n: p if isinstance(p.init, nn.Module) else replace(p, init=None) for n, p in players.items()}
        self._structures = {name: structure_of(value) for name, value in self._initial.items()}
        self._buffers = {name: player.buffers() for name, player in players.items()}
        self._streams = {name: Stream(name, p.data) for name, p in players.items() if p.data is not None}
        self._check_objectives()

    # What is in the game -------------------------------------------------------------------------------------------

    @property
    def players(self) -> Mapping[str, Player]:
        """The players by name, in order of play; those of a joint one by their own names.

        Each comes with a copy of its initial variables, or with its module: to write into the copy changes no game.
        """
        return _Players(self._players, self._initial)

    @property
    def names(self) -> tuple[str, ...]:
        """The players' names, in order of play."""
        return self._order

    def members(self, player: str) -> tuple[str, ...]:
        """Those who make up a joint player; of any other player itself alone."""
        return self._groups.get(player, (player,))

    @property
    def anticipated(self) -> frozenset[str]:
        """The players whose variables are functions of those who move before them."""
        return frozenset(self._anticipated)

    @property
    def count(self) -> int | None:
        """How many games are played as one, each loss being `[count]`; None for one by itself. See `Games`."""
        return None

    def require_one(self, asker: str) -> None:
        """Raise `TypeError` when these are many games, and say how to ask one by one."""
        if self.count is not None:
            raise TypeError(f"{asker} looks at one game, not at {self.count}: give it games.game(i) and solutions[i].")

    @property
    def device(self) -> torch.device:
        """Where everybody's variables live."""
        return leaves(self._initial[self.names[0]])[0].device  # type: ignore[no-any-return]

    def total(self, loss: Tensor) -> Tensor:
        """What is differentiated in place of `loss`, which `evaluate` gave: of many games the sum, else itself."""
        return loss

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """The norm of a player's leaves taken together: 0-d, or `[count]` of many games."""
        return torch.linalg.vector_norm(join(tensors))  # type: ignore[no-any-return]

    def initial(self, player: str) -> Variables:
        """A fresh copy of a player's initial variables."""
        return detached(self._initial[player])

    def structure(self, player: str) -> Structure:
        """How a player's variables are laid out in a flat vector."""
        return self._structures[player]

    def buffers(self) -> Buffers:
        """A fresh copy of the initial buffers of every player's module."""
        return self._grouped(detached(self._buffers))

    def arguments(self, player: str) -> tuple[str, ...]:
        """The players that a player's objective names; of a joint player, all its members' objectives."""
        owner = {member: group for group, members in self._groups.items() for member in members}
        named = [owner.get(name, name) for member in self.members(player) for name in self._named(member)]
        return tuple(dict.fromkeys(named))

    def _named(self, member: str) -> tuple[str, ...]:
        """The objective's own parameters."""
        return self._arguments[member]

    # Playing it ----------------------------------------------------------------------------------------------------

    def start(self, player: str, seed: int = 0) -> Position | None:
        """The position of a player's first batch; None when it has no data. A joint player's has one by member."""
        if player in self._groups:
            return {member: self.start(member, seed) for member in self._groups[player]}
        return Stream.start(seed) if player in self._streams else None

    def draw(self, player: str, position: Position | None) -> tuple[Batch, Position | None]:
        """A player's batch at a position, and the next position; `(None, None)` when it has no data.

        A joint player's are dicts by member.
        """
        if player in self._groups and position is not None:
            drawn = {member: self.draw(member, position[member]) for member in self._groups[player]}
            return {m: batch for m, (batch, _) in drawn.items()}, {m: place for m, (_, place) in drawn.items()}
        if player not in self._streams or position is None:
            return None, None
        return self._streams[player].draw(position)

    def loss(
        self, player: str, variables: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> Tensor:
        """A player's loss, a 0-d tensor, at everybody's variables."""
        return self.evaluate(player, variables, batch, buffers)[0]

    def evaluate(
        self, player: str, variables: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> tuple[Tensor, Buffers]:
        """A player's loss and the buffers after it; the modules' own buffers and `buffers` stay as they are.

        A joint player's is the sum of its members' losses, in which each member moves alone: its first derivative is
        the stack of their own gradients, and its second derivative means nothing; `own_gradients` has both.
        """
        if player in self._groups:
            return self._evaluate_group(player, variables, batch, buffers)
        arguments = {name: self._value(name, variables) for name in self._named(player)}
        if player in self._streams:
            arguments["batch"] = batch
        current = self._buffers if buffers is None else {**self._buffers, **self._ungrouped(buffers)}
        with self._swapped(current, arguments) as swapped:
            loss = self._players[player].objective(**arguments)
        return loss, self._grouped(swapped)

    def own_gradients(
        self,
        player: str,
        y: Sequence[Tensor],
        others: Mapping[str, Variables],
        batch: Batch = None,
        buffers: Buffers | None = None,
    ) -> tuple[Tensor, list[Tensor], Buffers]:
        """The loss, the gradient of each leaf `y` of a player's variables, and the buffers after it.

        A joint player's are its members' own gradients, each of its own loss alone: what vanishes where nobody in it
        gains by moving alone. Differentiable again, in others and in y, when grad is enabled.
        """
        form, current = self._structures[player], dict(buffers or {})
        if player not in self._groups:
            after: Buffers = {}

            def alone(*own: Tensor) -> Tensor:
                value, advanced = self.evaluate(player, {**others, player: form.build(own)}, batch, current)
                after.update(advanced)
                return self.total(value)

            value, found = gradient(alone, *y)
            return value, list(found), current | {name: after[name] for name in (player,) if name in after}
        places = form.build(range(len(form.shapes)))  # type: ignore[arg-type]
        losses: list[Tensor] = []
        slopes: list[Tensor] = list(y)
        for member in self.members(player):
            mine = leaves(places[member])

            def loss(*own: Tensor, member: str = member, mine: Sequence[int] = mine) -> Tensor:
                moved = list(y)
                for index, leaf in zip(mine, own, strict=True):
                    moved[index] = leaf
                part = None if batch is None else batch[member]
                value, after = self.evaluate(member, {**others, player: form.build(moved)}, part, current)
                if player in after:
                    current[player] = after[player]
                return self.total(value)

            value, found = gradient(loss, *(y[index] for index in mine))
            losses.append(value)
            for index, slope in zip(mine, found, strict=True):
                slopes[index] = slope
        return sum(losses[1:], losses[0]), slopes, current

    def joined(self, **groups: Sequence[str]) -> Game:
        """The same game, in which players who move together make up one joint player.

        `game.joined(firms=("b", "c"))`: the variables of `firms` are `{"b": ..., "c": ...}`, and one response answers
        for all of them where nobody among them gains by moving alone: their stacked own gradients

            F(y) = (grad_b f_b, grad_c f_c) = 0

        are the residual. No single loss has that gradient, so dF/dy is not symmetric: give `Implicit` a linear solver
        such as `GMRES()`, and an inner solver that follows a field: a torch.optim optimiser or `ScipyRoot()`.
        Players who lead together need no joining: leave them without a response.

        Raises `ValueError` for names that are no players or taken, fewer than two, joined already, the first
        mover, or players between whom somebody else moves.

        >>> def lead(x, a, b): return x ** 2 + a + b
        >>> game = Game(
        ...     x=Player(lead, torch.tensor(1.0)),
        ...     a=Player(lambda x, a, b: a ** 2 + a * (b - x), torch.tensor(0.0)),
        ...     b=Player(lambda x, a, b: b ** 2 + b * (a - x), torch.tensor(0.0)),
        ... )
        >>> game.joined(both=("a", "b")).names
        ('x', 'both')
        """
        game = object.__new__(type(self))
        game.__dict__.update(self.__dict__)
        for name, members in groups.items():
            game._join(name, tuple(members))
        return game

    def anticipate(self, **responses: Callable[[Mapping[str, Variables]], Variables]) -> Game:
        """The same game, in which the named players' variables are functions of those who move before them.

        A loss that names such a player calls its function instead of looking its variables up.
        """
        game = object.__new__(type(self))
        game.__dict__.update(self.__dict__)
        game._anticipated = {**self._anticipated, **responses}
        return game

    def check(self, player: str, variables: Variables) -> None:
        """Refuse variables whose nest or shapes are not those of the player's `init`."""
        structure, wanted = structure_of(variables), self._structures[player]
        if structure.spec != wanted.spec or structure.shapes != wanted.shapes:
            came = {path or "tensor": tuple(leaf.shape) for path, leaf in named_leaves(variables)}
            expected = {path or "tensor": tuple(leaf.shape) for path, leaf in named_leaves(self._initial[player])}
            raise ValueError(f"Variables of player {player!r} are {came}; expected the form of its init, {expected}.")

    def _value(self, name: str, variables: Mapping[str, Variables]) -> Variables:
        if name in variables:
            return variables[name]
        for group, members in self._groups.items():
            if name in members:
                return self._value(group, variables)[name]
        if name not in self._anticipated:
            raise ValueError(f"The variables of player {name!r} are missing; given are {sorted(variables)}.")
        return self._anticipated[name](variables)

    def _evaluate_group(
        self, group: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers | None
    ) -> tuple[Tensor, Buffers]:
        own, current = self._value(group, variables), dict(buffers or {})
        losses = []
        for member in self._groups[group]:
            tree = {m: v if m == member else map_leaves(Tensor.detach, v) for m, v in own.items()}
            part = None if batch is None else batch[member]
            loss, after = self.evaluate(member, {**variables, group: tree}, part, current)
            losses.append(loss)
            current |= {group: after[group]} if group in after else {}
        return sum(losses[1:], losses[0]), current

    def _grouped(self, buffers: Buffers) -> Buffers:
        """A joint player's buffers under its own name, `member.path`."""
        found = {name: tensors for name, tensors in buffers.items() if name in self._order}
        for group, members in self._groups.items():
            found[group] = {f"{m}.{path}": t for m in members for path, t in buffers.get(m, {}).items()}
        return found

    def _ungrouped(self, buffers: Buffers) -> Buffers:
        found: Buffers = {}
        for name, tensors in buffers.items():
            if name not in self._groups:
                found[name] = tensors
                continue
            for path, tensor in tensors.items():
                member, _, rest = path.partition(".")
                found.setdefault(member, {})[rest] = tensor
        return found

    def _join(self, name: str, members: tuple[str, ...]) -> None:
        told = f"joined({name}={members})"
        if name in RESERVED or name in self._order or name in self._players:
            raise ValueError(f"{told}: the name {name!r} is taken; players are {list(self._order)}. Choose another.")
        if len(set(members)) != len(members) or len(members) < 2:
            raise ValueError(f"{told}: expected at least two different players.")
        for member in members:
            if member not in self._order or member in self._groups or member in self._anticipated:
                raise ValueError(f"{told}: {member!r} is no player that can be joined; those are {list(self._order)}.")
        first = min(self._order.index(member) for member in members)
        if first == 0:
            raise ValueError(
                f"{told}: {self._order[0]!r} moves first and has nobody to answer to. Players who lead together need "
                "no joining: leave them without a response."
            )
        together = self._order[first : first + len(members)]
        if set(together) != set(members):
            raise ValueError(
                f"{told}: in the order of play, {list(self._order)}, others move between them. Declare them together."
            )
        if any(self._players[member].optimizer_hyper for member in members):
            raise ValueError(f"{told}: a hyperparameter of the inner optimiser is no follower.")
        self._groups = {**self._groups, name: together}
        self._order = (*self._order[:first], name, *self._order[first + len(members) :])
        self._initial = {**self._initial, name: {member: self._initial[member] for member in together}}
        self._structures = {**self._structures, name: structure_of(self._initial[name])}

    @contextmanager
    def _swapped(self, buffers: Buffers, arguments: Mapping[str, Any]) -> Iterator[Buffers]:
        """Lend the modules clones of `buffers`; yields the dict that holds the advanced ones afterwards."""
        advanced: Buffers = {}
        lent: list[tuple[str, str, nn.Module, str, Tensor]] = []
        lift: Callable[[Tensor], Tensor] = torch.clone
        if transforms_active() and any(buffers.values()):
            lift = _lifting(leaves(dict(arguments)))
        try:
            for player, tensors in buffers.items():
                advanced[player] = {}
                for path, tensor in tensors.items():
                    prefix, _, name = path.rpartition(".")
                    owner = self._players[player].init.get_submodule(prefix)
                    lent.append((player, path, owner, name, owner._buffers[name]))
                    owner._buffers[name] = lift(tensor)
            yield advanced
            for player, path, owner, name, _ in lent:
                after = owner._buffers[name]
                if after is not None:
                    advanced[player][path] = after.detach()
        finally:
            for _, _, owner, name, original in lent:
                owner._buffers[name] = original

    # The checks ----------------------------------------------------------------------------------------------------

    def _check_names(self) -> None:
        if not self._players:
            raise ValueError("Game: no players. Declare them in order of play: Game(leader=Player(...), ...).")
        for name, player in self._players.items():
            if name in RESERVED:
                raise ValueError(
                    f"Game: {name!r} cannot name a player; solve() and objectives use the word themselves."
                )
            if not isinstance(player, Player):
                raise TypeError(f"Game: {name!r} is {_kind(player)}; expected a Player(objective, init=...).")
        known = (*self._players, "batch")
        for name, player in self._players.items():
            for argument in player.names:
                if argument not in known:
                    raise ValueError(
                        f"Player {name!r}: its objective has a parameter {argument!r}, which names no player. "
                        f"Players are {list(self._players)}; rename it, or give it a default value."
                    )
            if "batch" in player.names and player.data is None:
                raise ValueError(f"Player {name!r}: its objective takes `batch`, but the player has no data=.")
            if "batch" not in player.names and player.data is not None:
                raise ValueError(f"Player {name!r}: it has data, but its objective takes no `batch`.")

    def _check_variables(self) -> None:
        kinds: dict[tuple[torch.dtype, torch.device], str] = {}
        for name, variables in self._initial.items():
            pairs = named_leaves(variables)
            if not pairs:
                raise ValueError(f"Player {name!r}: init has no variables; expected at least one tensor.")
            for path, leaf in pairs:
                where = f"Player {name!r}: init{path}"
                if not isinstance(leaf, Tensor):
                    raise TypeError(f"{where} is {_kind(leaf)}; expected a tensor, as in torch.tensor({leaf!r}).")
                if not leaf.is_floating_point():
                    raise TypeError(f"{where} has dtype {leaf.dtype}; expected a floating dtype: use init.float().")
                if leaf.numel() == 0:
                    raise ValueError(f"{where} is empty, shape {tuple(leaf.shape)}; expected at least one entry.")
                kinds.setdefault((leaf.dtype, leaf.device), where)
        if len(kinds) > 1:
            (first, at), (second, there) = list(kinds.items())[:2]
            raise ValueError(
                f"{there} is {second[0]} on {second[1]}, but {at} is {first[0]} on {first[1]}. All variables of a "
                "game share one dtype and one device: use .to(dtype, device)."
            )
        for name, variables in self._initial.items():
            for path, leaf in named_leaves(variables):
                if not bool(torch.isfinite(leaf).all()):
                    raise ValueError(
                        f"Player {name!r}: init{path} holds NaN or infinity; expected finite numbers to start from."
                    )

    def _check_objectives(self) -> None:
        """Evaluate each objective once and see from the graph what it depends on."""
        reached: dict[str, set[str]] = {name: set() for name in self._players}
        for name in self._players:
            for other, paths in self._dependence(name).items():
                reached[other] |= paths
        for name, player in self._players.items():
            if player.optimizer_hyper:
                continue
            missing = [path for path, _ in named_leaves(self._initial[name]) if path not in reached[name]]
            if len(missing) == len(leaves(self._initial[name])):
                raise ValueError(
                    f"Player {name!r}: its variables reach no objective, so that every gradient for them would be "
                    "zero. Name it in an objective and use it there; if it tunes the inner optimiser, say "
                    "Player(..., optimizer_hyper=True)."
                )
            if missing and name == self.names[0]:
                raise ValueError(f"Player {name!r}: init{missing[0]} reaches no objective; its gradient would be zero.")

    def _dependence(self, name: str) -> dict[str, set[str]]:
        """The leaves that a player's loss depends on: player -> paths. Refuses losses that nothing can be done with."""
        trial = {
            other: map_leaves(lambda t: t.detach().clone().requires_grad_(), v) for other, v in self._initial.items()
        }
        batch, _ = self.draw(name, self.start(name))
        with random_kept(self.device), torch.enable_grad():
            try:
                loss = self.loss(name, trial, batch)
            except Exception as error:
                raise ValueError(
                    f"Player {name!r}: its objective raised {type(error).__name__} on its first batch "
                    f"({_kind(batch)}): {error}. Data is an iterable of batches: a single one is data=[batch]."
                ) from error
        if not isinstance(loss, Tensor):
            raise TypeError(f"Player {name!r}: its objective returned {_kind(loss)}; expected a scalar tensor.")
        if loss.ndim != 0:
            raise ValueError(
                f"Player {name!r}: its objective returned a tensor of shape {tuple(loss.shape)}; expected a scalar "
                "(shape ()). Take .sum() or .mean()."
            )
        if not loss.requires_grad:
            raise ValueError(
                f"Player {name!r}: its loss is not differentiable in any player's variables (dtype {loss.dtype}, no "
                "graph). Use the arguments themselves, without .detach(), .item() or integer operations; a module is "
                "called by torch.func.functional_call(model, weights, inputs)."
            )
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"Player {name!r}: its loss at init is {loss.item()}; expected a finite number.")
        owners = [(other, path, leaf) for other, v in trial.items() for path, leaf in named_leaves(v)]
        grads = torch.autograd.grad(loss, [leaf for *_, leaf in owners], allow_unused=True)
        found: dict[str, set[str]] = {}
        for (other, path, _), grad in zip(owners, grads, strict=True):
            if grad is not None:
                found.setdefault(other, set()).add(path)
        self._check_dependence(name, found)
        return found

    def _check_dependence(self, name: str, found: Mapping[str, set[str]]) -> None:
        if not found:
            raise ValueError(f"Player {name!r}: its loss depends on no player's variables.")
        position = self.names.index(name)
        if position == 0:
            return
        if name not in found:
            raise ValueError(
                f"Player {name!r}: its objective does not depend on its own variables, so that it has nothing to "
                "choose. Did the objective use a module's own parameters instead of the argument?"
            )
        earlier = self.names[:position]
        if not any(other in found or self._players[other].optimizer_hyper for other in earlier):
            raise ValueError(
                f"Player {name!r}: its objective does not depend on {' or '.join(map(repr, earlier))}, who moves "
                "before it; its response would have no derivative. Use that argument in the objective, or make the "
                "leader Player(..., optimizer_hyper=True) when it tunes the inner optimiser."
            )


@dataclass(frozen=True, eq=False)
class _Players(Mapping[str, Player]):
    """Players of a game; what one starts from is copied when that one is asked for, which may be 10 million numbers."""

    players: Mapping[str, Player]
    initial: Mapping[str, Variables]

    def __getitem__(self, name: str) -> Player:
        player = self.players[name]
        return player if isinstance(player.init, nn.Module) else replace(player, init=detached(self.initial[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.players)

    def __len__(self) -> int:
        return len(self.players)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{value!r}" if value is None else f"a {type(value).__name__}"


def _lifting(tensors: list[Any]) -> Callable[[Tensor], Tensor]:
    """Make a buffer a citizen of the running torch.func transforms, which refuse in-place writes to outsiders."""
    numbers = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]  # a batch may hold other things
    zero = sum((torch.zeros_like(t).sum() for t in numbers), torch.zeros(()))
    return lambda buffer: buffer + zero.to(buffer)

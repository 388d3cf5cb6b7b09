"""What is being solved: players, their objectives, their variables and data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bilevel.autodiff import norm
from bilevel.constraints import ConstraintSet, Coordinate
from bilevel.constraints.walls import has_walls
from bilevel.custom_functions import OwnFunctions, refuse_second
from bilevel.game.calling import called
from bilevel.game.checks import (
    check_domains,
    check_follower,
    check_names,
    check_objectives,
    check_shared,
    check_variables,
)
from bilevel.game.constrained import ConstrainedGradient
from bilevel.game.data import Batch, Position, Stream
from bilevel.game.follower import Follower
from bilevel.game.groups import Groups
from bilevel.game.held import HeldBatches
from bilevel.game.joining import joining
from bilevel.game.joint import JointKKT
from bilevel.game.kkt import KKT
from bilevel.game.parts import Anticipated, DeclaredPlayers, Move, Parts, first_tensor
from bilevel.game.player import Player
from bilevel.game.processes import plays_alone, refuse_lone_rank, refuse_spread
from bilevel.game.residual import MembersGradients, OwnGradient, Residual
from bilevel.game.running import moved_to, moving_modules, of_followers, on_graph, warn_where_standing
from bilevel.game.shards import refuse_layouts, spread
from bilevel.game.situation import Buffers
from bilevel.game.starts import formed
from bilevel.game.statistics import Seen, settled
from bilevel.second_order import FastKernels
from bilevel.sharding.unsharded import Saving
from bilevel.tree import Structure, Variables, detached, join, leaves, map_leaves, named_leaves, structure_of

Derived = TypeVar("Derived", bound="Game")
Kind = TypeVar("Kind")


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

    def __init__(self, /, **players: Player) -> None:
        check_names(players)
        like = first_tensor(players)
        initial = {name: player.variables(like) for name, player in players.items()}
        refuse_spread(players)
        check_shared(players)
        refuse_layouts(players, initial)
        players, initial, shards = spread(players, initial)
        check_variables(initial)
        check_domains(players, initial)
        self._parts = Parts(
            # The copy is the only one: whoever lets go of the tensors that he passed holds them no longer.
            players={
                n: p if isinstance(p.init, nn.Module) or any(p.coordinates) else replace(p, init=None)
                for n, p in players.items()
            },
            order=tuple(players),
            # Read once: inspecting a signature costs as much as a small network's gradient.
            arguments={n: tuple(a for a in p.names if a != "batch") for n, p in players.items()},
            initial=initial,
            structures={name: structure_of(value) for name, value in initial.items()},
            buffers={name: player.buffers() for name, player in players.items()},
            streams={
                name: Stream(name, p.data, leaves(initial[name])[0].device)
                for name, p in players.items()
                if p.data is not None
            },
            groups=Groups(),
            anticipated={},
            depends={},
            starts_alone={},
            runs={},
            alone=plays_alone(),
            shards=shards,
            modular=any(isinstance(player.init, nn.Module) for player in players.values()),
            submodules={n: tuple(p.init.modules()) for n, p in players.items() if isinstance(p.init, nn.Module)},
        )
        depends, starts_alone, runs = check_objectives(self, self._parts.players)
        self._parts = replace(self._parts, depends=depends, starts_alone=starts_alone, runs=runs)

    def derived(self: Derived, **changed: Any) -> Derived:
        """The same game with some of its `Parts` changed; checks nothing."""
        game = copy.copy(self)
        game._parts = replace(self._parts, **changed)
        return game

    def to(self: Derived, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Derived:
        """The same game elsewhere, or in another precision: variables, buffers, and the tensors of its batches.

        What losses capture is yours to move, as are the frozen parameters of a player's module. Everything is checked
        again.

        >>> game = Game(y=Player(lambda y: (y - 1) ** 2, torch.tensor(0.0)))
        >>> game.to(dtype=torch.float64).initial("y").dtype
        torch.float64
        """
        self.require_one("Game.to")
        if isinstance(device, torch.dtype):
            raise TypeError(f"Game.to: device is {device}; expected a device. Say dtype={device}.")
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"Game.to: dtype={dtype}; expected a floating dtype, for everybody's variables.")
        move, parts = Move(None if device is None else torch.device(device), dtype), self._parts
        game = self.derived(
            initial={name: map_leaves(move, value) for name, value in parts.initial.items()},
            buffers=map_leaves(move, parts.buffers),
            streams={name: stream.mapped(move.batch) for name, stream in parts.streams.items()},
            depends={},
            starts_alone={},
            runs={},
        )
        check_domains(parts.players, game._parts.initial)
        depends, starts_alone, runs = check_objectives(game, parts.players)
        return game.derived(depends=depends, starts_alone=starts_alone, runs=runs)

    # What is in the game -------------------------------------------------------------------------------------------

    @property
    def players(self) -> Mapping[str, Player]:
        """The players by name, in order of play; those of a joint one by their own names.

        Each comes with a copy of its initial variables, or with its module: to write into the copy changes no game.
        """
        return DeclaredPlayers(self._parts.players, self._parts.initial)

    @property
    def optimizer_players(self) -> tuple[str, ...]:
        """Those who are hyperparameters of an inner optimiser (`optimizer_hyper=True`)."""
        return self._parts.optimizer_players

    @property
    def names(self) -> tuple[str, ...]:
        """The players' names, in order of play."""
        return self._parts.order

    def members(self, player: str) -> tuple[str, ...]:
        """Those who make up a joint player; of any other player itself alone."""
        return self._parts.groups.of(player)

    @property
    def anticipated(self) -> frozenset[str]:
        """The players whose variables are functions of those who move before them."""
        return frozenset(self._parts.anticipated)

    def kernels(self, player: str) -> FastKernels:
        """What a player's loss uses that has one derivative only, where there is a form with two; a joint player's all.

        Where two derivatives are taken, that form is run.
        """
        members = self.members(player)
        if len(members) == 1:
            return self._parts.runs[members[0]].kernels
        found = [astuple(self._parts.runs[member].kernels) for member in members]
        return FastKernels(*(any(flags) for flags in zip(*found, strict=True)))

    def own_functions(self, player: str) -> OwnFunctions:
        """The user's own autograd functions in a player's loss and constraints; a joint player's all."""
        found = OwnFunctions()
        for member in self.members(player):
            found = found.with_those_of(self._parts.runs[member].functions)
        return found

    def require_twice(self, player: str) -> None:
        """Raise `SecondDerivativeError` where a second derivative of what a player minimises would be wrong.

        So it is with an autograd function of the user's whose backward uses numbers that its forward has computed.
        """
        for member in self.members(player):
            if self.residual(member).curves_loss:
                refuse_second(member, self._parts.runs[member].functions)

    def require_follower(self, name: str) -> None:
        """Raise `ValueError` for a player that cannot follow: it has nothing to choose, or nobody to answer to."""
        check_follower(name, self.members(name), self._parts.players, self._parts.depends)

    def starts_alone(self, player: str) -> tuple[str, ...]:
        """The leaders' variables, in words, that reach a player by its `start` and reach nobody's loss."""
        return tuple(told for member in self.members(player) for told in self._parts.starts_alone[member])

    def starting_point(
        self, player: str, others: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> Variables | None:
        """Where a player with `start=` begins to follow, differentiable in the others; None of all other players."""
        start = None if player in self._parts.groups.members else self._parts.players[player].start
        if start is None:
            return None
        found, _ = self.call(player, start, others, batch, buffers, {})
        return formed(player, found, self._parts.structures[player])

    def reaches(self, player: str, moving: Iterable[str]) -> bool:
        """Whether what a player minimises was seen to depend on its own variables or on those of who is `moving`."""
        seen = frozenset().union(*(self._parts.depends[member] for member in self.members(player)))
        return any(member in seen for name in (player, *moving) for member in self.members(name))

    # What a stack of games answers otherwise ----------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many games this stands for."""
        return 1

    def each(self, function: Callable[..., Any], *trees: Any) -> Any:
        """`function(*trees)`; of many games in each by itself."""
        return function(*trees)

    @property
    def record_keys(self) -> tuple[str, ...]:
        """What follows a number's name in a run's records: nothing, or what tells of more than one game."""
        return ("",)

    def refuse_mixing(self, asker: str, player: str, optimizer: Callable[..., Any]) -> None:
        """Raise `TypeError` for an optimiser of a player's that would mix what must stay apart."""

    def response_of(self, player: str, response: Kind) -> Kind:
        """A player's response as it answers here."""
        return response

    def position_of_answer(self, leader: str, states: Mapping[str, Any]) -> Position | None:
        """Where that batch of a leader's lies which goes with the followers' answers; None where any of its goes."""
        return None

    @property
    def undivided(self) -> Game:
        """All that several processes play together, of which this may be a part."""
        return self

    @property
    def batches_stand_still(self) -> bool:
        """Whether every draw of a player is the same batch, or there are none."""
        streams = self._parts.streams.values()
        return all(isinstance(stream.data, list | tuple) and len(stream.data) == 1 for stream in streams)

    @property
    def leads_alike(self) -> bool:
        """Whether the leaders' variables are the same in all processes that play this game together."""
        return True

    def gathered(self, tree: Variables) -> Variables:
        """A tree of what is `[count, ...]` with what other processes have, where each plays some of the games."""
        return tree

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all processes, where each plays some of the games."""
        return list(numbers)

    def everybodys(self, content: Any) -> list[Any]:
        """Plain content of all processes that play other games than this one."""
        return [content]

    def whole_states(self, states: Mapping[str, Any]) -> dict[str, Any]:
        """Followers' states with what other processes have, where each plays some of the games."""
        return dict(states)

    def stepping(self) -> AbstractContextManager[object]:
        """Around a step of a run: processes that play other games may draw other random numbers."""
        return nullcontext()

    def foreseeing(self) -> AbstractContextManager[object]:
        """While somebody is asked what it will do, which other processes may not ask."""
        return nullcontext()

    def largest(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all processes that play this game together: here they themselves."""
        return list(numbers)

    def require_ranks(self, asker: str) -> None:
        """Raise `ValueError` where this process is one of several ranks, who would drift apart in silence."""
        refuse_lone_rank(asker, alone=self._parts.alone)

    def require_separable(self, dynamics: object) -> None:
        """Raise `TypeError` for a rule of play that would mix what must stay apart."""

    def described_norm(self, norm: Tensor) -> str:
        """A norm that is not finite, in words."""
        return f"norm {float(norm)}"

    def require_shared(self, asker: str, players: Sequence[str]) -> None:
        """Raise `TypeError` when this stands for many games, in each of which these players are others."""

    def require_one(self, asker: str) -> None:
        """Raise `TypeError` when this stands for many games (`Games`), and say how to ask one by one."""

    def require_minima(self, asker: str, *, joined: bool = False, constrained: bool = False) -> None:
        """Raise `ValueError` when somebody rests elsewhere than at a minimum of a loss of its own.

        With `joined`, players who answer together may each rest at a minimum of its own loss; with `constrained`, at
        one within constraints.
        """
        for name in self.names:
            members = self.members(name)
            if members != (name,) and not joined:
                raise ValueError(
                    f"{asker}: {name!r} is {list(members)} together, who have no single Hessian. Give the game before "
                    "joined(), or hold the answer against finite differences."
                )
            for member in members:
                kept, rests = bool(self._parts.players[member].constraints), self.residual(member)
                if (kept or rests.projects) and constrained:
                    continue
                if kept or rests.projects:
                    raise ValueError(
                        f"{asker}: {member!r} has {'functions as constraints' if kept else rests.told}: where it rests "
                        "its Lagrangian is stationary, not its loss. testing.check_hypergradient and certify_nash know "
                        "constraints; or hold the hypergradient against finite differences of re-solved followers."
                    )
                if not rests.minimises:
                    raise ValueError(
                        f"{asker}: {member!r} rests where a residual of its own vanishes, which need not be a minimum "
                        "of its loss. Hold the answer against finite differences of re-solved followers."
                    )

    def by_walls(self: Derived, player: str) -> Derived:
        """The same game, in which a player's domain is smooth functions with multipliers, where it can be said so."""
        rests = self.residual(player)
        if not isinstance(rests, ConstrainedGradient) or rests.prox is not None or rests.domain is None:
            return self
        if not has_walls(rests.domain):
            return self
        return self.derived(rests={**self._parts.rests, player: KKT(None, None, rests.domain)})

    def by_functions(self: Derived, player: str, asker: str) -> Derived:
        """The same game, in which a player rests by its KKT conditions, also if nothing constrains it.

        Raises `ValueError`, beginning with `asker`, for a set that is no smooth functions, or a `prox=`.
        """
        rests = {member: self.by_walls(member).residual(member) for member in self.members(player)}
        for member, own in rests.items():
            if not isinstance(own, KKT | OwnGradient):
                told = own.told or "a residual of its own"
                raise ValueError(
                    f"{asker}: {member!r} has {told}, which is no set of smooth functions. Bounds, Simplex, Halfspace, "
                    "Affine, Ball(p=2) and products of them are. testing.check_hypergradient and certify_nash know "
                    "the others."
                )
        as_kkt = {member: own if isinstance(own, KKT) else KKT(None, None) for member, own in rests.items()}
        found = as_kkt[player] if player in as_kkt else JointKKT.of(as_kkt, f"{asker}: {player!r}")
        return self.derived(rests={**self._parts.rests, **as_kkt, player: found})

    @property
    def device(self) -> torch.device:
        """Where everybody's variables live."""
        return self.like.device

    @property
    def like(self) -> Tensor:
        """One of the initial variables, whose dtype and device are everybody's; it is not to be written to."""
        return leaves(self._parts.initial[self.names[0]])[0]  # type: ignore[no-any-return]

    def total(self, loss: Tensor) -> Tensor:
        """What is differentiated in place of `loss`, which `evaluate` gave: of many games the sum, else itself."""
        return loss

    def norms(self, tensors: Sequence[Tensor]) -> Tensor:
        """The norm of a player's leaves taken together: 0-d, or `[count]` of many games."""
        return norm(join(tensors))

    def alike(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """What of a follower's state is the same in all processes that play this game together."""
        return state

    def is_spread(self, player: str) -> bool:
        """Whether each rank holds a part of a player's variables."""
        return any(member in self._parts.shards for member in self.members(player))

    def require_whole(self, asker: str, players: Iterable[str] = ()) -> None:
        """Raise `TypeError` where the variables of a player, or of one of these, are spread over ranks."""
        for name in players or self.names:
            if self.is_spread(name):
                raise TypeError(
                    f"{asker} works on whole vectors, and those of player {name!r} are spread over the ranks. Use "
                    "Unrolled, Nudged, SingleLoop, or Implicit with ConjugateGradient() or Neumann(), or a player "
                    "whose variables each rank holds whole: the module before fully_shard, init.full_tensor()."
                )

    def saving(self) -> AbstractContextManager[object]:
        """Where autograd saves what several derivatives need: of spread variables this rank's part."""
        return Saving() if self._parts.shards else nullcontext()

    def given_back(self, variables: Mapping[str, Variables]) -> dict[str, Variables]:
        """Everybody's variables as their users know them: those who are spread over ranks as the DTensors they were."""
        found = dict(variables)
        for name, shards in self._parts.shards.items():
            owner = self._parts.groups.owner(name)
            if owner in found:
                own = found[owner] if owner == name else found[owner][name]
                back = shards.given_back(own)
                found[owner] = back if owner == name else {**found[owner], name: back}
        return found

    def norms_of_others(self, tensors: Sequence[Tensor], *, summed: bool = False) -> Tensor:
        """The norm of the leaves of those whom a follower answers to: 0-d, or one a game.

        `summed` says that the leaves are a sum over games where these players are one for all.
        """
        return self.norms(list(tensors))

    def initial(self, player: str) -> Variables:
        """A fresh copy of a player's initial variables."""
        return detached(self._parts.initial[player])

    def structure(self, player: str) -> Structure:
        """How a player's variables are laid out in a flat vector."""
        return self._parts.structures[player]

    def buffers(self) -> Buffers:
        """A fresh copy of the initial buffers of every player's module."""
        return self._parts.groups.joined(detached(self._parts.buffers))

    def buffers_of(self, player: str) -> dict[str, Tensor]:
        """A fresh copy of a player's among them."""
        members = {member: detached(self._parts.buffers[member]) for member in self.members(player)}
        return self._parts.groups.joined(members)[player]

    def arguments(self, player: str) -> tuple[str, ...]:
        """The players that a player's objective names; of a joint player, all its members' objectives."""
        return self._parts.arguments_of(player)

    def reads(self, player: str, further: Iterable[str] = ()) -> tuple[str, ...]:
        """The others whose variables can reach a player's functions, in order of play, and `further` ones.

        They are those whom the functions name; what a loss reads by a condition is among them, for its name is asked
        for in any case. Whoever names a player who is anticipated reads everybody: that one may look at anybody.

        >>> from bilevel.game import Player
        >>> zero = torch.tensor(0.0)
        >>> y = Player(lambda x, y: (x - y) ** 2, zero)
        >>> game = Game(x=Player(lambda y: y, zero), y=y, z=Player(lambda z: z, zero))
        >>> game.reads("y")
        ('x',)
        """
        return self._parts.reads(player, further)

    def residual(self, player: str) -> Residual:
        """What vanishes where a player rests: it owns it, and no response asks what kind it is."""
        members = self.members(player)
        if player in self._parts.rests:
            return self._parts.rests[player]
        if members == (player,):
            return self._parts.players[player].rests
        rests = {member: self._parts.players[member].rests for member in members}
        if any(self._parts.players[member].constraints for member in members):
            return JointKKT.of(rests, player)
        return MembersGradients(rests)

    def within(self: Derived, player: str, domain: ConstraintSet) -> Derived:
        """The same game, in which a player without constraints stays in a set, as its inner solver does."""
        return self.derived(rests={**self._parts.rests, player: ConstrainedGradient(domain, None, solvers=True)})

    def form_of_one(self, player: str) -> Structure:
        """How a player's variables are laid out in one game."""
        return self.structure(player)

    def follower(
        self,
        others: Mapping[str, Variables],
        state: Mapping[str, Any],
        batch: Batch = None,
        *,
        further: Iterable[str] = (),
    ) -> Follower:
        """The follower of a response's state during one call: its residual, its batches, its module's buffers.

        Of the others it takes those whom its functions name (`reads`), and those `further` ones whom the response looks
        up by itself; what the rest play costs nothing.
        """
        return Follower(self, others, state, batch, further)

    # Playing it ----------------------------------------------------------------------------------------------------

    def start(self, player: str, seed: int = 0) -> Position | None:
        """The position of a player's first batch; None when it has no data. A joint player's has one by member."""
        if self.members(player) != (player,):
            return {member: self.start(member, seed) for member in self.members(player)}
        return Stream.start(seed) if player in self._parts.streams else None

    def draw(self, player: str, position: Position | None) -> tuple[Batch, Position | None]:
        """A player's batch at a position, and the next position; `(None, None)` when it has no data.

        A joint player's are dicts by member.
        """
        if self.members(player) != (player,) and position is not None:
            drawn = {member: self.draw(member, position[member]) for member in self.members(player)}
            return {m: batch for m, (batch, _) in drawn.items()}, {m: place for m, (_, place) in drawn.items()}
        if player not in self._parts.streams or position is None:
            return None, None
        return self._parts.streams[player].draw(position)

    def whole_pass(self, player: str, position: Position | None, asker: str, way_out: str = "") -> Iterator[Batch]:
        """All the batches of the pass that a position is in, from its first; None once where there is no data.

        Raises `DataError`, in which `asker` reads them, for a pass that does not end: after 10,000 batches of data
        without a length. Its message may close with one more `way_out`.
        """
        if position is None or player not in self._parts.streams:
            if position is not None and any(position[member] is not None for member in self.members(player)):
                raise TypeError(
                    f"{player!r} is {list(self.members(player))} together, whose data need not end together: there is "
                    "no pass over all of it. Use a method that takes batch by batch."
                )
            yield self.draw(player, position)[0]
            return
        yield from self._parts.streams[player].whole_pass(position, asker, way_out)

    def remembered(self, player: str, position: Position | None) -> dict[str, Batch]:
        """The batch before a position, as the data gave it, by member; nothing of those whose batch is gone."""
        places = {} if position is None else {player: position} if "epoch" in position else position
        streams = self._streams(player)
        found = {
            name: streams[name].remembered(at) for name, at in places.items() if name in streams and at is not None
        }
        return {name: batch for name, batch in found.items() if batch is not None}

    def pass_length(self, player: str) -> int | None:
        """How many batches a pass over a player's data has, as far as the data say."""
        return self._parts.streams[player].length if player in self._parts.streams else None

    def require_end(self, player: str, asker: str, way_out: str = "", *, read: bool = False) -> None:
        """Raise `ValueError` before any work where a pass over a player's data is known to have no end.

        With `read`, one pass over data that say no length is read to know it.
        """
        for stream in self._streams(player).values():
            stream.require_end(asker, way_out, read=read)

    def hold(self, player: str, batches: HeldBatches) -> None:
        """Let `batches` keep all that is drawn for a player from now on, whoever draws it, until `release`.

        What is drawn does not change. A list of batches is read by its numbers, and nothing of it is kept.
        """
        for stream in self._streams(player).values():
            stream.held(batches)

    def release(self, player: str, batches: HeldBatches) -> None:
        """Keep nothing more of a player's batches."""
        for stream in self._streams(player).values():
            stream.released(batches)

    def replay(self: Derived, player: str, batches: HeldBatches) -> Derived:
        """The same game, in which a player draws nothing but batches that were held; `DataError` for others."""
        streams = {name: stream.replayed(batches) for name, stream in self._streams(player).items()}
        return self.derived(streams={**self._parts.streams, **streams})

    def _streams(self, player: str) -> dict[str, Stream]:
        return {member: self._parts.streams[member] for member in self.members(player) if member in self._parts.streams}

    def stop_reading(self) -> None:
        """Stop the workers that read the players' data; `solve` does so in the end.

        Whoever draws again starts them again, and reads from the beginning of its pass up to its position.
        """
        for stream in self._parts.streams.values():
            stream.close()

    def loss(
        self, player: str, variables: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> Tensor:
        """A player's loss, a 0-d tensor, at everybody's variables.

        `buffers` are those of the players' modules: of followers `statistics(variables, states)`, by default what the
        modules began with. Warns where the loss runs the BatchNorm of a follower whose statistics stand still, though
        its variables are an answer that is to be differentiated.
        """
        warn_where_standing(self._parts, player, variables, buffers)
        return self.evaluate(player, variables, batch, buffers)[0]

    def statistics(
        self,
        variables: Mapping[str, Variables],
        states: Mapping[str, Mapping[str, Any]],
        batches: Mapping[str, Batch] | None = None,
    ) -> Buffers:
        r"""The followers' buffers as a leader's loss takes them: running statistics s move with the weights.

        A leader's loss runs a follower's module in evaluation mode. BatchNorm then goes by its running statistics,
        which are a mean over the follower's own batches and so a function of its weights y, and of what the follower's
        loss does to its inputs. Their values are those of the states; their derivative is that of a batch's own
        moments, which running statistics have where they have settled:

        $$
        s = s_{\text{kept}}, \qquad \frac{ds}{d(x, y)} = \frac{d}{d(x, y)} \operatorname{moments}(x, y; \text{batch})
        $$

        Of other buffers the values alone. Costs an evaluation of the follower's loss, with its graph, if a module has
        such statistics and its variables are on a graph; else nothing.

        Args:
            variables: Everybody's; the followers' as their responses gave them.
            states: Follower -> the response's state that came with them.
            batches: Follower -> a batch of its data; default: its next one.

        Examples:
            >>> def lead(x, y): return (y - 1).square()
            >>> game = Game(x=Player(lead, torch.tensor(0.0)), y=Player(lambda x, y: (x - y) ** 2, torch.tensor(0.0)))
            >>> game.statistics({name: game.initial(name) for name in game.names}, {})
            {}
        """
        return of_followers(self, self._parts, variables, states, batches or {})

    def moves_statistics(self, player: str, variables: Mapping[str, Variables]) -> bool:
        """Whether somebody goes by running statistics of a player's module, which move with variables on a graph."""
        return not self._parts.read_by_statistics.isdisjoint(self.members(player)) and on_graph(variables)

    def by_statistics(self, player: str) -> tuple[str, ...]:
        """Those whose modules a player's loss runs by running statistics that move, as BatchNorm's."""
        return tuple(other for member in self.members(player) for other in self._parts.runs[member].by_statistics)

    def moving(self, player: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers) -> Buffers:
        """A player's buffers among `buffers`, whose running statistics have the derivative of this batch's moments."""
        return {player: moved_to(self, player, variables, batch, buffers)}

    def moments(
        self, player: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers
    ) -> dict[str, Tensor]:
        """What running statistics go to on this batch, by the buffers' names; differentiable in all variables."""
        found: dict[str, Tensor] = {}
        for member in moving_modules(self._parts, player):
            own = batch if member == player or batch is None else batch[member]
            prefix = "" if member == player else f"{member}."
            told = self.member_moments(member, variables, own, buffers)
            found |= {prefix + path: value for path, value in told.items()}
        return found

    def member_moments(
        self, member: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers
    ) -> dict[str, Tensor]:
        """`moments` of one who is no joint player."""
        own, seen = self._parts.players[member], Seen()
        called(self._parts, member, own.objective, variables, batch, buffers, {}, saving=self.saving(), seen=seen)
        return settled(own.init, seen)

    def evaluate(
        self, player: str, variables: Mapping[str, Variables], batch: Batch = None, buffers: Buffers | None = None
    ) -> tuple[Tensor, Buffers]:
        """A player's loss and the buffers after it; the modules' own buffers and `buffers` stay as they are.

        A joint player's is the sum of its members' losses, in which each member moves alone: its first derivative is
        the stack of their own gradients, and its second derivative means nothing; `residual` has both.
        """
        if self.members(player) != (player,):
            return self._evaluate_group(player, variables, batch, buffers)
        found, after = self.call(player, self._parts.players[player].objective, variables, batch, buffers, {})
        return found, after

    def call(
        self,
        player: str,
        function: Callable[..., Any],
        variables: Mapping[str, Variables],
        batch: Batch,
        buffers: Buffers | None,
        extra: Mapping[str, Variables],
    ) -> tuple[Variables, Buffers]:
        """A function called as the player's objective is: with everybody it names, `batch`, and what is `extra`."""
        return called(self._parts, player, function, variables, batch, buffers, extra, saving=self.saving())

    def coordinates(self, player: str) -> list[Coordinate | None]:
        """The range of each leaf of a player's variables that has one; [] where none has."""
        return [found for member in self.members(player) for found in self._ranges(member)]

    def _ranges(self, member: str) -> list[Coordinate | None]:
        found = self._parts.players[member].coordinates
        return found if any(found) else [None] * len(self.structure(member).shapes)

    def joined(self: Derived, **groups: Sequence[str]) -> Derived:
        """The same game, in which players who move together make up one joint player.

        `game.joined(firms=("b", "c"))`: the variables of `firms` are `{"b": ..., "c": ...}`, and one response answers
        for all of them where nobody among them gains by moving alone: their stacked own gradients

            F(y) = (grad_b f_b, grad_c f_c) = 0

        are the residual. No single loss has that gradient, so dF/dy is not symmetric: give `Implicit` an inner solver
        that follows a field: a torch.optim optimiser or `ScipyRoot()`, which takes functions as constraints too. Where
        several of them have the same function as `inequality=` or `equality=`, it is one constraint that they share
        with one multiplier: they settle in the variational equilibrium.
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
        game = self
        for name, members in groups.items():
            game = game.derived(**joining(game._parts, name, tuple(members)))
        return game

    def starting(self: Derived, **variables: Variables) -> Derived:
        """The same game, in which these players start elsewhere.

        Raises `ValueError` for variables of another form than their init's, which are not finite, or outside a domain.

        >>> game = Game(y=Player(lambda y: (y - 1) ** 2, torch.tensor(0.0)))
        >>> game.starting(y=torch.tensor(3.0)).initial("y")
        tensor(3.)
        """
        initial = {**self._parts.initial, **{name: detached(given) for name, given in variables.items()}}
        for name, given in variables.items():
            if name not in self._parts.players:
                raise ValueError(f"Game.starting: {name!r} is no player; players are {list(self._parts.players)}.")
            self.check(name, given)
        check_variables({name: initial[name] for name in self._parts.players})
        check_domains(self._parts.players, initial)
        return self.derived(initial=initial)

    def anticipate(self: Derived, **responses: Anticipated) -> Derived:
        """The same game, in which the named players' variables are functions of those who move before them.

        A loss that names such a player calls its function instead of looking its variables up.
        """
        return self.derived(anticipated={**self._parts.anticipated, **responses})

    def check(self, player: str, variables: Variables) -> None:
        """Refuse variables whose nest or shapes are not those of the player's `init`."""
        if not self._parts.structures[player].fits(variables):
            came = {path or "tensor": tuple(leaf.shape) for path, leaf in named_leaves(variables)}
            expected = {path or "tensor": tuple(leaf.shape) for path, leaf in named_leaves(self.initial(player))}
            raise ValueError(f"Variables of player {player!r} are {came}; expected the form of its init, {expected}.")

    def value(self, name: str, variables: Mapping[str, Variables]) -> Variables:
        """A player's variables among those given, or what it answers to them."""
        return self._parts.value(name, variables)

    def _evaluate_group(
        self, group: str, variables: Mapping[str, Variables], batch: Batch, buffers: Buffers | None
    ) -> tuple[Tensor, Buffers]:
        own, current = self.value(group, variables), dict(buffers or {})
        losses = []
        for member in self.members(group):
            tree = {m: v if m == member else map_leaves(Tensor.detach, v) for m, v in own.items()}
            part = None if batch is None else batch[member]
            loss, after = self.evaluate(member, {**variables, group: tree}, part, current)
            losses.append(loss)
            current |= {group: after[group]} if group in after else {}
        return sum(losses[1:], losses[0]), current

"""The followers of a run: what they answer to the leaders, each foreseeing those who move after it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from bilevel._returned import require_instance
from bilevel.errors import UnreliableResponseWarning
from bilevel.game import Buffers, Game
from bilevel.game.others import Others
from bilevel.responses import Response, State
from bilevel.responses.base import answered
from bilevel.responses.promise import Report
from bilevel.tree import Variables

States = Mapping[str, State]
"""Follower -> its response's state."""

_LEADS = -1
"""The place of who leads: everybody answers to it."""

Answers = tuple[Mapping[str, Variables], dict[str, State], Buffers]
"""Everybody's variables, the followers' next states, and everybody's buffers."""


class Followers:
    """The followers' responses; their states are arguments and return values."""

    def __init__(self, game: Game, responses: Mapping[str, Response]) -> None:
        for name, response in responses.items():
            if name not in game.names:
                raise TypeError(f"solve: {name!r} is neither an option nor a player; players are {list(game.names)}.")
            if not isinstance(response, Response):
                raise TypeError(
                    f"solve: {name}={response!r} is no response; expected Unrolled, Implicit, Hypernetwork, ..."
                )
        if game.names[0] in responses:
            raise ValueError(f"solve: {game.names[0]!r} moves first and leads; it can have no response.")
        for name in game.names:
            own = [member for member in game.members(name) if game.players[member].residual is not None]
            if own and name not in responses:
                raise ValueError(
                    f"solve: {own[0]!r} has a residual of its own and no response. Who leads follows the gradient of "
                    "its loss, and nobody would look at the residual. Give it a response, such as "
                    f"{name}=Implicit(ScipyRoot()), or leave out residual=."
                )
        self._game = game
        chosen = {name: responses[name] for name in game.names if name in responses}
        self.responses = {name: game.response_of(name, response) for name, response in chosen.items()}
        self._places = {n: place if n in chosen else _LEADS for place, n in enumerate(game.names)}
        self._warn_of_statistics()
        if self.in_place and len(self.responses) > 1:
            raise ValueError(
                f"solve: {self.in_place} write into their states at every call, and with several followers the others "
                "call them too. Use Hypernetwork(memory=Memory(in_place=False))."
            )

    def _warn_of_statistics(self) -> None:
        """Tell of a follower that runs another one by running statistics: it is given those of the start."""
        members = {name: self._game.members(name) for name in self.responses}
        following = {member for own in members.values() for member in own}
        for name, own in members.items():
            seen = [other for other in self._game.by_statistics(name) if other in following and other not in own]
            if seen:
                warnings.warn(
                    f"solve: the loss of follower {name!r} runs the module of follower {seen[0]!r} by running "
                    "statistics (BatchNorm), and is given those that the module began with: what it answers, and its "
                    "derivative, are those of another network. Use GroupNorm or LayerNorm there.",
                    UnreliableResponseWarning,
                    stacklevel=4,
                )

    @property
    def in_place(self) -> list[str]:
        """Those whose response writes into the state that it is passed."""
        return [name for name, response in self.responses.items() if response.in_place]

    def init(self, seed: int) -> dict[str, State]:
        """The states before the first call, the last player's first."""
        states: dict[str, State] = {}
        views: dict[str, Game] = {}
        for name, response in reversed(list(self.responses.items())):
            views[name] = self._view(name, views, states)
            state = response.init(views[name], follower=name, seed=seed)
            require_instance(state, dict, f"{type(response).__name__}.init: the state of {name!r}", "fresh_state(...)")
            states[name] = state
        return states

    def respond(self, point: Mapping[str, Variables], states: States, buffers: Buffers) -> Answers:
        """What the followers answer to the leaders' `point`, from these states."""
        if not self.responses:
            return point, {}, buffers
        variables, after = dict(point), dict(states)
        views = self.views(states)
        for name, response in self.responses.items():
            variables[name], after[name] = answered(response, views[name], self._before(name, variables), states[name])
        return variables, after, with_followers(buffers, after)

    def after_backward(self, states: States, variables: Mapping[str, Variables]) -> dict[str, State]:
        """The states with what the backward pass through the followers' answers has learned."""
        return {name: self.responses[name].after_backward(state, variables[name]) for name, state in states.items()}

    def reports(self, states: States) -> dict[str, Report]:
        """What each response says of a state of its own."""
        return {name: self.responses[name].report(state) for name, state in states.items()}

    def views(self, states: States) -> dict[str, Game]:
        """The game as each follower sees it: those who move after it answer by their responses, from these states."""
        views: dict[str, Game] = {}
        for name in reversed(list(self.responses)):
            views[name] = self._view(name, views, states)
        return views

    def _view(self, name: str, views: Mapping[str, Game], states: States) -> Game:
        """The game as one follower sees it; who moves after it and is not named in its functions is not foreseen."""
        place = self._places[name]
        later = [other for other in self._game.arguments(name) if self._places[other] > place]
        if not later:
            return self._game
        return self._game.anticipate(**{n: self._foreseen(views[n], n, states[n]) for n in later})

    def _foreseen(self, view: Game, name: str, state: State) -> Callable[[Mapping[str, Variables]], Variables]:
        """What a follower answers by its response, from this state, in its view of the game."""

        def answer(variables: Mapping[str, Variables]) -> Variables:
            given = {n: v for n, v in variables.items() if self._places.get(n, _LEADS) < self._places[name]}
            with self._game.foreseeing():
                return answered(self.responses[name], view, given, state)[0]

        return answer

    def _before(self, name: str, variables: Mapping[str, Variables]) -> Others:
        """The variables of those who lead or move before a follower."""
        places, place = self._places, self._places[name]
        return Others(variables, lambda other: places[other] < place)


def with_followers(buffers: Buffers, states: Mapping[str, Any]) -> Buffers:
    """Everybody's buffers: the followers' are in their states."""
    return {**buffers, **{name: state["buffers"] for name, state in states.items() if state["buffers"]}}

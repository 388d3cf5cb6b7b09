"""Laws of a response as a function: state in, state out, nothing changed, the same under transforms and in chunks."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from bilevel.game import Game, Player
from bilevel.testing import strategies
from bilevel.testing.known import KnownGame, constant
from bilevel.testing.laws.answers import require_close
from bilevel.testing.laws.base import Law
from bilevel.testing.players import QuadraticPlayers
from bilevel.testing.regressions import Ridge
from bilevel.testing.subject import NotOffered, ResponseSubject, Subject
from bilevel.testing.tolerance import exact

_STEPS = 8


def _response(subject: Subject) -> ResponseSubject:
    if not isinstance(subject, ResponseSubject):
        raise NotOffered("Only a response has a state.")
    return subject


def _hypergradient(game: Game, x: Tensor, response: Any, state: Any, batch: Any = None) -> tuple[Tensor, Any]:
    """The gradient `[n]` of the leader "x", and the state after."""
    x = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, after = response(game, {"x": x}, state, batch)
        before = snapshot(after)
        (slope,) = torch.autograd.grad(game.loss("x", {"x": x, "y": y}), x)
        same_bits(after, before, "the state that the call returned, after the backward pass")
        learned = response.after_backward(after, y)
        same_bits(after, before, "the state that the call returned, after after_backward")
    return slope, learned


def snapshot(tree: Any) -> Any:
    """A deep copy of a state to compare with later."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, Mapping):
        return {key: snapshot(value) for key, value in tree.items()}
    return [snapshot(value) for value in tree] if isinstance(tree, list | tuple) else tree


def same_bits(one: Any, other: Any, where: str = "state") -> None:
    """Assert that two nests of tensors, numbers and strings are the same, bit for bit."""
    if isinstance(one, Tensor):
        assert torch.equal(torch.nan_to_num(one.double()), torch.nan_to_num(other.double())), f"{where} differs"
    elif isinstance(one, Mapping):
        assert set(one) == set(other), f"{where} has keys {sorted(map(str, one))} and {sorted(map(str, other))}"
        for key in one:
            same_bits(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), f"{where} has {len(one)} and {len(other)} entries"
        for index, pair in enumerate(zip(one, other, strict=True)):
            same_bits(*pair, f"{where}[{index}]")
    else:
        assert one == other or (one != one and other != other), f"{where} is {one} and {other}"  # noqa: PLR0124 - nan


def nothing_mutated(subject: Subject, known: KnownGame) -> None:
    """A call changes neither the state, nor the others' variables, nor the game; twice the same call, the same bits."""
    response, game, x = _response(subject).with_steps(_STEPS), known.game(), known.x0
    if response.in_place:
        raise NotOffered("It says that it overwrites its input state and returns it.")
    state = response.init(game)
    before, start, given = snapshot(state), snapshot({n: game.initial(n) for n in game.names}), x.clone()
    one, after = _hypergradient(game, x, response, state)
    same_bits(state, before, "the state that was passed")
    same_bits(x, given, "the leader's variables")
    same_bits({n: game.initial(n) for n in game.names}, start, "the game's start")
    again, after_again = _hypergradient(game, x, response, state)
    same_bits(again, one, "the hypergradient of the same call")
    same_bits(after_again, after, "the state after the same call")


def resumed(subject: Subject, known: KnownGame) -> None:
    """Saved, loaded and continued is continued: bit for bit, with `weights_only=True`."""
    response, game, x = _response(subject).with_steps(_STEPS), known.game(), known.x0
    _, state = _hypergradient(game, x, response, response.init(game))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    moved = x + 0.0625
    one, after = _hypergradient(game, moved, response, state)
    other, after_loaded = _hypergradient(game, moved, response, loaded)
    same_bits(other, one, "the hypergradient after loading")
    same_bits(after_loaded, after, "the state after loading")


def vmap_is_loop(subject: Subject, known: KnownGame) -> None:
    """`vmap(grad(...))` over points is the loop over them, and `torch.func.grad` is plain autograd."""
    response, game = _response(subject).with_steps(_STEPS), known.game()
    state = response.init(game)
    points = torch.stack([known.x0, known.x0 + 0.125, known.x0 - 0.0625])

    def value(x: Tensor) -> Tensor:
        return game.loss("x", {"x": x, "y": response(game, {"x": x}, state)[0]})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = torch.func.vmap(torch.func.grad(value), randomness="different")(points)
        alone = torch.stack([torch.func.grad(value)(point) for point in points])
    # A batched solver goes on until its last system is done: every row is within its own tolerance, not the same bits.
    allowed = _solver_slack(_response(subject)) * exact(known).scale
    require_close(together, alone, allowed, "vmap over three leaders")
    plain, after = _hypergradient(game, known.x0, response, state)
    if not response.behaviour.steps_in_transforms:
        # What the plain call answered by is the state that it returned.
        state = after
        alone = torch.func.grad(value)(known.x0)[None]
    require_close(alone[0], plain, allowed, "torch.func.grad against plain autograd")


def _solver_slack(subject: ResponseSubject) -> float:
    """How far two right answers may lie apart: rounding, or the tolerance of the linear solver times conditioning."""
    return 1e-9 + 20.0 * subject.response.behaviour.rtol


def chunks(subject: Subject, known: Ridge) -> None:
    """A loss that goes through its batch in chunks, and a batch that is passed or drawn, are the whole batch's."""
    response, x = _response(subject).with_steps(_STEPS), known.x0
    table = constant(known.train, x)
    inputs, outputs = known._data(known.train, x)
    table = torch.cat([inputs, outputs[:, None]], 1)

    def follower(x: Tensor, y: Tensor, batch: list[Tensor]) -> Tensor:
        squares = sum((rows[:, :-1] @ y - rows[:, -1]).square().sum() for rows in batch)
        return 0.5 * squares / len(known.train) + 0.5 * (x.exp() * y.square()).sum()

    def game(batch: list[Tensor]) -> Game:
        return Game(x=Player(known.leader, x), y=Player(follower, known.y0, [batch]))

    whole = game([table])
    one, _ = _hypergradient(whole, x, response, response.init(whole))
    passed, _ = _hypergradient(whole, x, response, response.init(whole), [table])
    chunked = game([table[:1], table[1:]])
    other, _ = _hypergradient(chunked, x, response, response.init(chunked))
    allowed = 1e-9 * exact(known).scale + 1e-12
    require_close(passed, one, allowed, "with the batch passed")
    # The sums are taken in another order: what differs is rounding, but a solver may stop an iteration sooner.
    require_close(other, one, allowed + _solver_slack(_response(subject)) * exact(known).scale, "in chunks")


def player_order(subject: Subject, known: QuadraticPlayers) -> None:
    """Who is named first among those who move before the follower does not matter."""
    response = _response(subject).with_steps(_STEPS)
    if response.behaviour.random:
        raise NotOffered("It draws random numbers of its own, and that in the order of the players.")
    game, names = known.game(), known.names
    last, earlier = names[-1], names[:-1]
    players = game.players
    turned = Game(**{name: players[name] for name in (*reversed(earlier), last)})
    answers = []
    for played, order in ((game, earlier), (game, tuple(reversed(earlier))), (turned, tuple(reversed(earlier)))):
        others = {name: torch.full((), 0.5 + 0.25 * earlier.index(name)).double().requires_grad_() for name in order}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y, _ = response(played, others, response.init(played, follower=last))
            loss = played.loss(earlier[0], {**others, last: y})
            slopes = torch.autograd.grad(loss, [others[name] for name in earlier])
        answers.append(torch.stack(slopes))
    for answer in answers[1:]:
        require_close(answer, answers[0], 1e-9 + _solver_slack(_response(subject)) * 10.0, "with players reordered")


def warm_start_stays(subject: Subject, known: KnownGame) -> None:
    """A state continues: called again at the same leader, the follower is no further from its optimum."""
    response, game = _response(subject).with_steps(_STEPS), known.game()
    if not response.behaviour.warm:
        raise NotOffered("It does not start where it stopped.")
    if response.behaviour.random:
        raise NotOffered("It draws random numbers of its own: the same call twice need not come nearer.")
    wanted, state, distances = known.best_response(known.x0), response.init(game), []
    for _ in range(2):
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            y, state = response(game, {"x": known.x0}, state)
        distances.append(float((y - wanted).norm()))
    before, after = distances
    assert after <= max(before, 1e-9) * 1.5, f"continued, |y - y*| went from {before:.3g} to {after:.3g}"


def _small() -> st.SearchStrategy[KnownGame]:
    return st.one_of(strategies.quadratics(2, 3), strategies.ridges(2), strategies.exponentials(2, 2))


STATE = (
    Law("nothing mutated", "state in, state out; the same call, the same bits", _small, nothing_mutated, 0.5),
    Law("resume", "saved and loaded is continued, bit for bit", _small, resumed, 0.5),
    Law("warm start", "a state continues where it stopped", strategies.quadratics, warm_start_stays, 0.5),
    Law("vmap = loop", "torch.func sees the same function", _small, vmap_is_loop, 0.5),
    Law("chunks", "chunked and passed batches are the whole batch", strategies.ridges, chunks, 0.5),
    Law("order of players", "among those who move before", strategies.players, player_order, 0.5),
)

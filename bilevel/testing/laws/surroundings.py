"""Laws of what surrounds a response: names, modules, interrupts, settings and memory change no number."""

from __future__ import annotations

import copy
import gc
import inspect
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier
from time import sleep
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel.autodiff import transforms_active
from bilevel.errors import BilevelError, CheckpointError
from bilevel.game import Game, Player
from bilevel.responses import Response
from bilevel.solving import solve
from bilevel.testing.families import Quadratic
from bilevel.testing.known import KnownGame
from bilevel.testing.laws.answers import require_close
from bilevel.testing.laws.base import Law
from bilevel.testing.laws.short_runs import FEW, few_steps, quiet, sgd
from bilevel.testing.laws.state import same_bits, snapshot
from bilevel.testing.subject import NotOffered, Subject
from bilevel.testing.tolerance import exact

# Names -----------------------------------------------------------------------------------------------------------

NAMES = (
    ("weight_decay", "momentum"),
    ("lr", "params"),
    ("step", "work"),
    ("gradient_norm", "gradients"),
    ("state", "follower"),
)
"""Names of a leader and a follower: options of optimisers, keys of a run's records, words of the library's own."""


def _named(known: KnownGame, leader: str, follower: str) -> Game:
    """The game with other names for its players."""

    def renamed(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def loss(*given: Tensor, **by_name: Tensor) -> Tensor:
            return function(*given, *(by_name[name] for name in (leader, follower) if name in by_name))

        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        loss.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, kind) for name in (leader, follower)]
        )
        return loss

    return Game(
        **{leader: Player(renamed(known.leader), known.x0), follower: Player(renamed(known.follower), known.y0)}
    )


def names_do_not_matter(subject: Subject, known: KnownGame) -> None:
    """What the players are called changes neither a hypergradient nor what a run records of itself."""
    response = few_steps(subject)
    slopes: list[Tensor] = []
    records: list[list[float]] = []
    for leader, follower in (("x", "y"), *NAMES):
        game, x = _named(known, leader, follower), known.x0.clone().requires_grad_()
        with quiet():
            y, _ = response(game, {leader: x}, response.init(game))
            slopes += torch.autograd.grad(game.loss(leader, {leader: x, follower: y}), x)
            found = solve(game, optimizer=sgd, steps=2, **{follower: response})  # type: ignore[call-overload]
        keys = ("step", "gradients", "products", "work")
        records.append([found.history[-1][key] for key in keys])
        told = f"with players {leader!r} and {follower!r}"
        # The same arithmetic; rounding is for whoever orders his sums by name.
        require_close(slopes[-1], slopes[0], 1e-12 * exact(known).scale, f"hypergradient {told}")
        assert records[-1] == records[0], f"{told} the last record has {keys} {records[-1]}; expected {records[0]}"


# Modules ---------------------------------------------------------------------------------------------------------


def _module() -> nn.Module:
    """Ridge regression on normalised inputs: convex, and with running statistics."""
    module = nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 1)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(0.25)
    return module


_INPUTS = torch.tensor([[1.0, 0.5], [-0.5, 2.0], [0.25, -1.0], [-1.5, 0.75]], dtype=torch.float64)
_TARGETS = torch.tensor([[1.0], [-1.0], [0.5], [0.0]], dtype=torch.float64)


def _module_game(first: nn.Module, second: nn.Module, pause: float = 0.0) -> Game:
    """A decay, and two regressions by modules, of which the last one follows."""

    def error(weights: Any) -> Tensor:
        square: Tensor = (weights(_INPUTS) - _TARGETS).square().mean()
        return square

    def train(decay: Tensor, weights: Any) -> Tensor:
        total = sum(p.square().sum() for p in weights.values())
        loss = error(weights) + decay.exp() * total
        if pause:
            sleep(pause)
            loss = 0.5 * (loss + error(weights) + decay.exp() * total)
        told: Tensor = loss
        return told

    def fit(decay: Tensor, first: Any) -> Tensor:
        return train(decay, first)

    def follow(decay: Tensor, second: Any) -> Tensor:
        return train(decay, second)

    def judge(decay: Tensor, first: Any, second: Any) -> Tensor:
        return error(first) + error(second) + 0.5 * decay.square()

    decay = torch.tensor(-1.0, dtype=torch.float64)
    return Game(decay=Player(judge, decay), first=Player(fit, first), second=Player(follow, second))


def _module_slope(response: Response, game: Game, state: Any = None) -> tuple[Tensor, Any]:
    """The hypergradient of the decay at the start of the game, and the state after."""
    decay = game.initial("decay").clone().requires_grad_()
    others = {"decay": decay, "first": game.initial("first")}
    second, after = response(game, others, response.init(game) if state is None else state)
    loss = game.loss("decay", {**others, "second": second}, None)
    (slope,) = torch.autograd.grad(loss, decay)
    return slope, response.after_backward(after, second)


def _all_of(module: nn.Module) -> dict[str, Any]:
    """What a user may look at in a module."""
    flags = {name: part.training for name, part in module.named_modules()}
    tensors = dict(module.state_dict(keep_vars=True))
    grads = {name: p.grad for name, p in module.named_parameters()}
    asks = {name: p.requires_grad for name, p in module.named_parameters()}
    objects = {name: id(tensor) for name, tensor in tensors.items()}
    return {
        "objects": objects,
        "tensors": snapshot(tensors),
        "grads": snapshot(grads),
        "training": flags,
        "requires_grad": asks,
    }


def modules_are_the_users(subject: Subject, _: object) -> None:
    """A module that is a player, or two, stays as it was; who trains it meanwhile changes no game."""
    response = few_steps(subject)
    shared = _module()
    before = _all_of(shared)
    with quiet():
        game = _module_game(shared, shared)
        slope, state = _module_slope(response, game)
        same_bits(_all_of(shared), before, "the user's module, of two players, after a call")
        own, _ = _module_slope(response, _module_game(_module(), _module()))
        require_close(slope, own, 1e-12 * (1.0 + float(own.abs())), "hypergradient with one module for two players")
        again, _ = _module_slope(response, game, state)
        for parameter in shared.parameters():
            parameter.detach().add_(1.0)
        shared(_INPUTS)  # in training mode, so that its statistics move too
        moved, _ = _module_slope(response, game)
        same_bits(moved, slope, "the hypergradient after the user went on training the module")
        later, _ = _module_slope(response, game, state)
        same_bits(later, again, "the hypergradient of a later call after the user went on training the module")


def _module_for_player() -> Game:
    """A loss that runs the module itself, and sees its player in the penalty alone."""
    module = _module()

    def follow(decay: Tensor, weights: Any) -> Tensor:
        error: Tensor = (module(_INPUTS) - _TARGETS).square().mean()
        for parameter in weights.values():
            error = error + decay.exp() * parameter.square().sum()
        return error

    def judge(weights: Any) -> Tensor:
        square: Tensor = (weights(_INPUTS) - _TARGETS).square().mean()
        return square

    decay = torch.tensor(-1.0, dtype=torch.float64)
    return Game(decay=Player(judge, decay), weights=Player(follow, module))


def _written_over() -> Game:
    """A loss that writes into the variables that it is passed."""

    def follow(decay: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            weights.clamp_(-0.125, 0.125)
        return (weights - 1.0).square().sum() + decay.exp() * weights.square().sum()

    def judge(weights: Tensor) -> Tensor:
        return (weights - 0.5).square().sum()

    decay, weights = torch.tensor(-1.0, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    return Game(decay=Player(judge, decay), weights=Player(follow, weights))


class _Saving(torch.autograd.Function):
    """The cube, whose backward uses a slope that forward has saved."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(3.0 * y**2)
        return y**3

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        slope: Tensor = ctx.saved_tensors[0] * cotangents[0]
        return slope


def _plain_game(curved: Callable[[Tensor], Tensor]) -> Game:
    """A decay of a follower that minimises a sum of cubes beside it."""

    def follow(decay: Tensor, weights: Tensor) -> Tensor:
        return 0.25 * curved(weights).sum() + (weights - 1.0).square().sum() + decay.exp() * weights.square().sum()

    def judge(weights: Tensor) -> Tensor:
        return (weights - 0.5).square().sum()

    decay, weights = torch.tensor(-1.0, dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64)
    return Game(decay=Player(judge, decay), weights=Player(follow, weights))


def _bent_by_a_hook() -> Game:
    """A loss that halves a gradient by a hook."""

    def halved(weights: Tensor) -> Tensor:
        cubes = weights**3
        if cubes.requires_grad:
            cubes.register_hook(lambda g: 0.5 * g)  # type: ignore[no-untyped-call]
        return cubes

    return _plain_game(halved)


def _bent_by_a_module() -> Game:
    """A loss that calls a module with a hook which halves gradients."""

    def halved(_: nn.Module, inputs: Any, outputs: Any) -> Any:
        return tuple(0.5 * g for g in inputs)

    module = nn.Softplus()
    module.register_full_backward_hook(halved)
    return _plain_game(module)


def _cube(y: Tensor) -> Tensor:
    return y**3


def functions_keep_their_derivatives(subject: Subject, _: object) -> None:
    """A loss with an autograd function whose second derivative PyTorch loses is refused, or has the right answer."""
    response = few_steps(subject)
    slopes: list[Tensor] = []
    kinds: tuple[Callable[[Tensor], Tensor], ...] = (_cube, _Saving.apply)
    try:
        for curved in kinds:
            with quiet():
                game = _plain_game(curved)
                decay = game.initial("decay").clone().requires_grad_()
                weights, _ = response(game, {"decay": decay}, response.init(game))
                slopes += torch.autograd.grad(game.loss("decay", {"decay": decay, "weights": weights}), decay)
    except BilevelError:
        return
    # The same arithmetic of the loss; what nudged solves leave depends on rounding, by far less than this.
    require_close(slopes[1], slopes[0], 1e-4 * (1.0 + float(slopes[0].abs())), "hypergradient with a saved slope")


LOSSES: Mapping[str, Callable[[], Game]] = {
    "runs a module in place of its player": _module_for_player,
    "writes into its variables": _written_over,
    "halves a gradient by a hook": _bent_by_a_hook,
    "halves a gradient by a module's hook": _bent_by_a_module,
}
"""Losses that are no functions of their arguments, and games with them."""


def losses_are_functions(subject: Subject, kind: str) -> None:
    """A loss that is no function of its arguments is refused: by the game, or by the response."""
    response = few_steps(subject)
    with quiet():
        try:
            game = LOSSES[kind]()
            decay = game.initial("decay").clone().requires_grad_()
            weights, _ = response(game, {"decay": decay}, response.init(game))
            torch.autograd.grad(game.loss("decay", {"decay": decay, "weights": weights}), decay)
        except (BilevelError, TypeError, ValueError):
            return
    raise AssertionError(f"the follower's loss {kind}, and nobody refuses it")


def threads_are_apart(subject: Subject, _: object) -> None:
    """Two threads that call one response, with one module, answer as one after the other."""
    response = few_steps(subject)
    if response.behaviour.random:
        raise NotOffered("It draws from torch's global random numbers, which threads share.")
    module = _module()
    with quiet():
        game = _module_game(module, module, pause=1e-3)
        states = [response.init(game, seed=seed) for seed in (0, 1)]
        _, states[1] = _module_slope(response, game, states[1])
        alone = [_module_slope(response, game, copy.copy(state)) for state in states]
        begin = Barrier(2)

        def beside(state: Any) -> Any:
            begin.wait(60.0)  # a busy machine may start the second thread when the first one has ended
            return _module_slope(response, game, copy.copy(state))

        with ThreadPoolExecutor(2) as pool:
            together = list(pool.map(beside, states))
    for (slope, after), (wanted, kept) in zip(together, alone, strict=True):
        require_close(slope, wanted, 1e-12 * (1.0 + float(wanted.abs())), "hypergradient beside another thread's")
        same_bits(after.get("buffers"), kept.get("buffers"), "the buffers after a call beside another thread's")


# Interrupts and settings -----------------------------------------------------------------------------------------


class _Interrupt:
    """Raises `KeyboardInterrupt` in the second evaluation after it was armed."""

    def __init__(self) -> None:
        self.left = 0

    def arm(self) -> None:
        self.left = 2

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def _noisy(known: KnownGame, interrupt: Callable[[], None]) -> Game:
    """The game with noise from torch's generator in the follower's loss."""

    def follower(x: Tensor, y: Tensor) -> Tensor:
        noise = 0.0625 * torch.randn(y.shape, dtype=y.dtype)
        interrupt()
        return known.follower(x, y) + (noise * y).sum()

    return Game(x=Player(known.leader, known.x0), y=Player(follower, known.y0))


def interrupted_is_untouched(subject: Subject, known: KnownGame) -> None:
    """A call that Ctrl-C stops leaves nothing behind, and a run that it stops goes on as if it had not."""
    response, interrupt = few_steps(subject), _Interrupt()
    game = _noisy(known, interrupt)
    x = known.x0.clone().requires_grad_()
    with quiet():
        state = response.init(game)
    with quiet():
        wanted, _ = response(game, {"x": x}, state)
    interrupt.arm()
    try:
        with quiet():
            response(game, {"x": x}, state)
    except KeyboardInterrupt:
        with quiet():
            found, _ = response(game, {"x": x}, state)
        same_bits(found.detach(), wanted.detach(), "the answer of a call that was stopped before, and made again")
    interrupt.left = 0

    def halfway(step: int, record: Any, variables: Any) -> None:
        if step == 2:
            interrupt.arm()

    def run(**options: Any) -> Any:
        return solve(game, y=response, optimizer=sgd, steps=4, **options)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.pt"
        with quiet():
            whole = run()
        with quiet():
            try:
                run(checkpoint=path, callbacks=[halfway])
            except KeyboardInterrupt:
                interrupt.left = 0
        with quiet(seed=1):
            resumed = run(checkpoint=path)
    same_bits(resumed.variables, whole.variables, "where a run ends that was stopped in a step")


def settings_are_known(subject: Subject, known: KnownGame) -> None:
    """A run that is resumed with other settings of the response is refused."""
    response = few_steps(subject)
    if response.budget is None:
        raise NotOffered("It has no budget that could be another.")
    with tempfile.TemporaryDirectory() as folder, quiet():
        path = Path(folder) / "run.pt"
        solve(known.game(), y=response, optimizer=sgd, steps=1, checkpoint=path)
        try:
            solve(known.game(), y=response.with_budget(FEW + 1), optimizer=sgd, steps=2, checkpoint=path)
        except CheckpointError:
            return
    raise AssertionError(f"a run saved with {FEW} steps a call goes on with {FEW + 1}, and nobody is told")


# Memory ----------------------------------------------------------------------------------------------------------


class _Witness:
    """Lives as long as the graph of one evaluation."""

    def __call__(self, gradient: Tensor) -> None:
        """A hook that does nothing."""


@contextmanager
def _only_new_objects() -> Iterator[None]:
    """Let the collector look at what is made from now on alone; a large process has a million objects."""
    if gc.get_freeze_count():  # somebody has frozen his own, and there is one way only to thaw
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def nothing_is_kept(subject: Subject, known: KnownGame) -> None:
    """A call whose answer is let go of leaves its state alone: no graph and no tensor more, however many calls."""
    response, witnesses = few_steps(subject), weakref.WeakSet[_Witness]()

    def follower(x: Tensor, y: Tensor) -> Tensor:
        loss = known.follower(x, y)
        if loss.requires_grad and not transforms_active():
            witness = _Witness()
            witnesses.add(witness)
            loss.register_hook(witness)  # type: ignore[no-untyped-call]
        return loss

    def call(state: Any) -> Any:
        x = known.x0.clone().requires_grad_()
        y, after = response(game, {"x": x}, state)
        torch.autograd.backward(game.loss("x", {"x": x, "y": y}), inputs=[x])
        return response.after_backward(after, y)

    game, counts = Game(x=Player(known.leader, known.x0), y=Player(follower, known.y0)), []
    with quiet(), _only_new_objects():
        state = response.init(game)
        for number in range(9):
            state = call(state)
            if number in (4, 8):
                gc.collect()
                tensors = sum(issubclass(type(one), Tensor) for one in gc.get_objects())
                counts.append((len(witnesses), tensors))
    (graphs, tensors), (graphs_after, tensors_after) = counts
    assert graphs_after <= graphs, (
        f"after 5 calls {graphs} graphs of the follower's loss are alive, after 9 {graphs_after}"
    )
    assert tensors_after <= tensors, f"four more calls leave {tensors_after - tensors} more tensors alive"


_GAMES = (Quadratic(curvatures=(1.0, 0.5), coupling=((1.0,), (0.5,)), at=(0.5,), target=(1.0, -1.0)),)


def _known() -> st.SearchStrategy[KnownGame]:
    return st.sampled_from(_GAMES)


def _modules() -> st.SearchStrategy[str]:
    return st.sampled_from(("two regressions by BatchNorm and Linear",))


def _functions() -> st.SearchStrategy[str]:
    return st.just("a cube whose slope is saved")


def _losses() -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(LOSSES))


SURROUNDINGS = (
    Law("names", "what players are called changes nothing", _known, names_do_not_matter, 0.1),
    Law("modules", "the user's own module is left alone", _modules, modules_are_the_users, 0.1),
    Law("losses", "what is no function of its arguments is refused", _losses, losses_are_functions, 0.3),
    Law("functions", "a second derivative that is none is refused", _functions, functions_keep_their_derivatives, 0.1),
    Law("threads", "beside another thread as alone", _modules, threads_are_apart, 0.1),
    Law("interrupts", "Ctrl-C leaves nothing behind", _known, interrupted_is_untouched, 0.1),
    Law("settings", "a run goes on with the settings it had", _known, settings_are_known, 0.1),
    Law("memory", "no graph outlives its answer", _known, nothing_is_kept, 0.1),
)

"""What a game is refused for, before any work: names, variables, and what each loss depends on."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bilevel.autodiff import captured_leaves
from bilevel.custom_functions import OwnFunctions, examined, own_functions, recorded, refuse_second
from bilevel.errors import BilevelError, SecondDerivativeError
from bilevel.game.detached import refuse_detached
from bilevel.game.first_call import FirstCall, told_of_recomputation
from bilevel.game.hooks import GradientHooks, hooked_parts, hooks_elsewhere
from bilevel.game.player import Player, kind
from bilevel.game.residual import GRADIENT, PlayedGame, signature
from bilevel.game.situation import Situation
from bilevel.game.starts import StartsAlone, check_start_names, start_dependence
from bilevel.game.statistics import moving_layers
from bilevel.game.threads import made_in_threads, next_number
from bilevel.randomness import random_kept
from bilevel.second_order import FastKernels, explanation
from bilevel.sharding.tensor import entries
from bilevel.tree import Variables, leaves, map_leaves, named_leaves

# Words that a call of an objective or of solve() already uses; a player of that name could never be addressed.
RESERVED = frozenset(
    (
        *("batch", "game", "optimizer", "steps", "scheduler", "clip_norm", "callbacks", "checkpoint"),
        *("checkpoint_every", "resume", "accept_changes", "progress", "seed", "dynamics", "record", "parallel"),
        *("starts", "self"),
    )
)


def check_names(players: Mapping[str, Player]) -> None:
    """Refuse players whose names are taken, and functions whose parameters name nobody."""
    if not players:
        raise ValueError("Game: no players. Declare them in order of play: Game(leader=Player(...), ...).")
    for name, player in players.items():
        if name in RESERVED:
            raise ValueError(f"Game: {name!r} cannot name a player; solve() and objectives use the word themselves.")
        if not isinstance(player, Player):
            raise TypeError(f"Game: {name!r} is {kind(player)}; expected a Player(objective, init=...).")
    for name, player in players.items():
        _check_parameters(name, "objective", player.names, players)
        _refuse_defaults(name, "objective", player.objective, players, player)
        if "batch" in player.names and player.data is None:
            raise ValueError(f"Player {name!r}: its objective takes `batch`, but the player has no data=.")
        check_start_names(name, players)
        if player.start is not None:
            _refuse_defaults(name, "start", player.start, players, player)
        takes_batch = "batch" in player.names
        if player.residual is not None:
            parameters = player.own_residual.names
            if GRADIENT in parameters and GRADIENT in players:
                raise ValueError(
                    f"Player {name!r}: `gradient` in its residual is its objective's own gradient, and a player has "
                    "that name. Rename the player."
                )
            _check_parameters(name, "residual", [p for p in parameters if p != GRADIENT], players)
            _refuse_defaults(name, "residual", player.own_residual.function, players, player)
            if "batch" in parameters and player.data is None:
                raise ValueError(f"Player {name!r}: its residual takes `batch`, but the player has no data=.")
            takes_batch = takes_batch or "batch" in parameters
        takes_batch = takes_batch or "batch" in player.start_names
        for what, function in player.constraints.items():
            _check_parameters(name, what, player.parameters(function), players)
            _refuse_defaults(name, what, function, players, player)
            if "batch" in player.parameters(function) and player.data is None:
                raise ValueError(f"Player {name!r}: its {what} takes `batch`, but the player has no data=.")
            takes_batch = takes_batch or "batch" in player.parameters(function)
        _check_parameters(name, "domain or prox", player.option_players, players)
        if name in player.option_players or "batch" in player.option_players:
            raise ValueError(
                f"Player {name!r}: its domain or prox depends on "
                f"{'its own variables' if name in player.option_players else 'batch'}; expected numbers, or functions "
                "of other players."
            )
        if not takes_batch and player.data is not None:
            raise ValueError(f"Player {name!r}: it has data, but its objective takes no `batch`.")


def _check_parameters(name: str, what: str, parameters: Sequence[str], players: Mapping[str, Player]) -> None:
    for parameter in parameters:
        if parameter not in (*players, "batch"):
            raise ValueError(
                f"Player {name!r}: its {what} has a parameter {parameter!r}, which names no player. "
                f"Players are {list(players)}; rename it, or give it a default value."
            )


def _refuse_defaults(
    name: str, what: str, function: Callable[..., Any], players: Mapping[str, Player], player: Player
) -> None:
    """Refuse a parameter with a default that has a player's name: does it mean the player, or its default?

    What `functools.partial` binds was meant.
    """
    bound = function.keywords if isinstance(function, partial) else {}
    for parameter, given in signature(function).parameters.items():
        if given.default is inspect.Parameter.empty or parameter in bound:
            continue
        if parameter in players or (parameter == "batch" and player.data is not None):
            meant = f"player {parameter!r}" if parameter in players else "the batch"
            raise ValueError(
                f"Player {name!r}: its {what} has a parameter {parameter!r} with a default value, which would be used "
                f"in the place of {meant}. Leave the default out to be given {meant}, or rename the parameter."
            )


def check_shared(players: Mapping[str, Player]) -> None:
    """Refuse players whose modules are not the same and share a parameter: each would move a copy of its own."""
    owners: dict[int, tuple[str, str]] = {}
    for name, player in players.items():
        if not isinstance(player.init, nn.Module):
            continue
        for path, parameter in player.init.named_parameters():
            other, there = owners.setdefault(id(parameter), (name, path))
            if parameter.requires_grad and players[other].init is not player.init:
                raise ValueError(
                    f"Players {other!r} and {name!r}: {there!r} of the one module and {path!r} of the other are the "
                    "same parameter, and each player would move a copy of its own. If it is one player's, let the "
                    f"other's loss call that player, {other}(...), and leave it out of the other module; if two copies "
                    "are meant, pass copy.deepcopy(module)."
                )


def check_variables(initial: Mapping[str, Variables]) -> None:
    """Refuse variables that are no finite floating-point tensors of one dtype on one device."""
    kinds: dict[tuple[torch.dtype, torch.device], str] = {}
    for name, variables in initial.items():
        pairs = named_leaves(variables)
        if not pairs:
            raise ValueError(f"Player {name!r}: init has no variables; expected at least one tensor.")
        for path, leaf in pairs:
            where = f"Player {name!r}: init{path}"
            if not isinstance(leaf, Tensor):
                number = isinstance(leaf, int | float)
                told = f"as in torch.tensor({float(leaf)})" if number else "as torch.as_tensor makes one"
                raise TypeError(f"{where} is {kind(leaf)}; expected a tensor, {told}.")
            if leaf.is_complex():
                raise TypeError(
                    f"{where} is complex ({leaf.dtype}); expected real variables. Pass torch.view_as_real(init), and "
                    "take torch.view_as_complex(...) of it in the losses."
                )
            if not leaf.is_floating_point():
                raise TypeError(f"{where} has dtype {leaf.dtype}; expected a floating dtype: use init.float().")
            if entries(leaf) == 0:
                raise ValueError(f"{where} is empty, shape {tuple(leaf.shape)}; expected at least one entry.")
            kinds.setdefault((leaf.dtype, leaf.device), where)
    if len(kinds) > 1:
        halves = {torch.bfloat16, torch.float16}
        (first, at), (second, there) = list(kinds.items())[:2]
        raise ValueError(
            f"{there} is {second[0]} on {second[1]}, but {at} is {first[0]} on {first[1]}. All variables of a game "
            f"share one dtype and one device: use .to(device, dtype).{_HALF if halves & {first[0], second[0]} else ''}"
        )
    for name, variables in initial.items():
        for path, leaf in named_leaves(variables):
            refuse_numberless(f"Player {name!r}: init{path}", leaf)
            if not bool(torch.isfinite(leaf).all()):
                raise ValueError(
                    f"Player {name!r}: init{path} holds NaN or infinity; expected finite numbers to start from."
                )


def refuse_numberless(where: str, tensor: Tensor) -> None:
    """Raise `ValueError` for a tensor that has a shape and no numbers."""
    fake = type(tensor).__name__ == "FakeTensor"
    if tensor.is_meta or fake:
        raise ValueError(
            f"{where} is {'a fake tensor' if fake else 'on the meta device'}, which has a shape and no numbers. "
            + ("Make it outside FakeTensorMode." if fake else "Make it on a real device: device='cpu'; a module by ")
            + ("" if fake else "model.to_empty(device='cpu') and its initialisation.")
        )


_HALF = (
    " To compute in half precision keep the variables in float32, and run the loss under torch.autocast(device_type, "
    "dtype=torch.bfloat16)."
)


def check_domains(players: Mapping[str, Player], initial: Mapping[str, Variables]) -> None:
    """Refuse domains and terms that do not fit the variables, domains without points, and starts outside them."""
    for name, player in players.items():
        given = {other: initial[other] for other in player.option_players}
        if player.prox is not None:
            player.prox.settled(given).check(initial[name], f"Player {name!r}: init")
        if player.domain is not None:
            player.domain.settled(given).require(initial[name], f"Player {name!r}: init")


@dataclass(frozen=True)
class Runs:
    """What a player's loss runs.

    Args:
        kernels: What of it has one derivative only, where there is a form with two.
        strangers: Buffers that it advances, of modules that no player owns: the module, and the buffer's name.
        by_statistics: The other players whose modules it runs by running statistics, as BatchNorm's, that move.
        beside: The players whose modules it runs and who are not called for by their names.
        functions: The user's own autograd functions in it, and in what constrains the player.
        hooked: Modules with hooks on their gradients, by what they are called.
        sets_hooks: Whether it sets hooks on gradients itself.
        threads: Whether it computes in threads of its own.
    """

    kernels: FastKernels = field(default_factory=FastKernels)
    strangers: tuple[tuple[nn.Module, str], ...] = ()
    by_statistics: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    functions: OwnFunctions = field(default_factory=OwnFunctions)
    hooked: tuple[tuple[str, nn.Module], ...] = ()
    sets_hooks: bool = False
    threads: bool = False


Depends = Mapping[str, frozenset[str]]
"""Player -> those whose variables what vanishes where it rests depends on, as a rule its loss."""


def check_objectives(game: PlayedGame, players: Mapping[str, Player]) -> tuple[Depends, StartsAlone, dict[str, Runs]]:
    """Evaluate each objective and each start once and see from the graph what it depends on, and what it runs."""
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "Game: nothing can be differentiated inside torch.inference_mode(). Make the game outside it; where "
            "numbers are wanted alone, torch.no_grad() serves."
        )
    initial = {name: game.initial(name) for name in players}
    owned, order = _Owned.of(players), {name: place for place, name in enumerate(players)}
    reached: dict[str, set[str]] = {name: set() for name in players}
    depends: dict[str, frozenset[str]] = {}
    runs: dict[str, Runs] = {}
    for name in players:
        # Who is not named is not looked at: in a game of a thousand players a loss names a few.
        named = {name, *(member for other in game.arguments(name) for member in game.members(other))}
        given = {other: initial[other] for other in sorted(named, key=order.__getitem__)}
        in_loss, in_residual, runs[name] = _dependence(game, name, players, given, owned)
        # Whether a function of players uses all of them is not looked at: it is named after them alone.
        for other in players[name].option_players:
            paths = {path for path, _ in named_leaves(initial[other])}
            in_residual = {**in_residual, other: in_residual.get(other, set()) | paths}
        depends[name] = frozenset(in_residual)
        for part in (in_loss, in_residual):
            for other, paths in part.items():
                reached[other] |= paths
    alone: dict[str, tuple[str, ...]] = {}
    for name in players:
        found = start_dependence(game, name, players, initial)
        alone[name] = tuple(f"{o}{path}" for o, paths in found.items() for path in sorted(paths - reached[o]))
        for other, paths in found.items():
            reached[other] |= paths
    for name, player in players.items():
        if player.optimizer_hyper:
            continue
        missing = [path for path, _ in named_leaves(initial[name]) if path not in reached[name]]
        if len(missing) == len(leaves(initial[name])):
            raise ValueError(
                f"Player {name!r}: its variables reach no objective, so that every gradient for them would be "
                f"zero. Name it in an objective and use it there. {_START.format(name=name)} If it tunes the inner "
                "optimiser, say Player(..., optimizer_hyper=True)."
            )
        if missing and name == next(iter(players)):
            raise ValueError(f"Player {name!r}: init{missing[0]} reaches no objective; its gradient would be zero.")
    for name, player in players.items():
        # A loss may leave its player's variables out: a leader may act through others, or have nothing to gain. What
        # vanishes where somebody rests says where that is.
        through = bool(player.constraints) and any(order[other] > order[name] for other in depends[name])
        if not player.follows_loss and name not in depends[name] and not through:
            raise ValueError(_chooses_nothing(name, players))
    moving = {other for own in runs.values() for other in own.by_statistics if _moves(game, other, initial)}
    kept = {name: tuple(other for other in own.by_statistics if other in moving) for name, own in runs.items()}
    return depends, alone, {name: replace(own, by_statistics=kept[name]) for name, own in runs.items()}


def _moves(game: PlayedGame, name: str, initial: Mapping[str, Variables]) -> bool:
    """Whether the running statistics of a player's module depend on variables, and not on its data alone."""
    named = {name, *(member for other in game.arguments(name) for member in game.members(other))}
    trial = {other: map_leaves(lambda t: t.detach().clone().requires_grad_(), initial[other]) for other in named}
    batch, _ = game.draw(name, game.start(name))
    with random_kept(game.device), torch.enable_grad():
        found = game.moments(name, trial, batch, {})
    return any(value.requires_grad for value in found.values())


def check_follower(name: str, members: Sequence[str], players: Mapping[str, Player], depends: Depends) -> None:
    """Refuse a follower that has nothing to choose, or nobody to answer to; `members` make it up."""
    for member in members:
        if member not in depends[member]:
            raise ValueError(_chooses_nothing(member, players))
    order = list(players)
    earlier = order[: min(order.index(member) for member in members)]
    answers = frozenset().union(*(depends[member] for member in members))
    answers |= {other for member in members for other in players[member].start_names}
    if not any(other in answers or players[other].optimizer_hyper for other in earlier):
        what = _what(players[members[0]])
        raise ValueError(
            f"Player {name!r}: its {what} does not depend on {' or '.join(map(repr, earlier))}, who moves "
            f"before it; its response would have no derivative. Use that argument in the {what}. "
            f"{_START.format(name=earlier[0])} If the leader tunes the inner optimiser, make it Player(..., "
            "optimizer_hyper=True); or give this player no response, so that it leads too."
        )


# An initialisation reaches a follower by where its steps begin, which no loss sees: as in MAML.
_START = (
    "If {name!r} is where the follower's steps begin, as in MAML, say so of the follower: Player(..., "
    "start=lambda {name}: {name})."
)


def _what(player: Player) -> str:
    if player.constraints:
        return f"objective, with its {' and '.join(player.constraints)},"
    return "objective" if player.residual is None else "residual"


def _chooses_nothing(name: str, players: Mapping[str, Player]) -> str:
    return (
        f"Player {name!r}: its {_what(players[name])} does not depend on its own variables, so that it has nothing to "
        "choose. Did the objective use a module's own parameters instead of the argument?"
    )


Paths = dict[str, set[str]]
"""Player -> the paths of those of its leaves that something depends on."""


@dataclass(frozen=True)
class _Owned:
    """The modules that are players: of each of their parts the players, of each parameter one and its name there."""

    parts: Mapping[int, Sequence[str]]
    parameters: Mapping[int, tuple[str, str]]

    @staticmethod
    def of(players: Mapping[str, Player]) -> _Owned:
        modules = {name: player.init for name, player in players.items() if isinstance(player.init, nn.Module)}
        parts: dict[int, list[str]] = {}
        for name, module in modules.items():
            for part in module.modules():
                parts.setdefault(id(part), []).append(name)
        return _Owned(
            parts,
            {id(p): (name, path) for name, module in modules.items() for path, p in module.named_parameters()},
        )


def _dependence(
    game: PlayedGame,
    name: str,
    players: Mapping[str, Player],
    initial: Mapping[str, Variables],
    owned: _Owned,
) -> tuple[Paths, Paths, Runs]:
    """What a player's loss depends on, what its residual does, and what they run; `initial`: of whom these name.

    Refuses losses that nothing can be done with.
    """
    trial = {other: map_leaves(lambda t: t.detach().clone().requires_grad_(), v) for other, v in initial.items()}
    batch, _ = game.draw(name, game.start(name))
    versions = _versions(batch)
    with random_kept(game.device), torch.enable_grad():
        seen = FirstCall()
        called = [players[other].init for other in game.arguments(name)]
        modules = [module for module in called if isinstance(module, nn.Module)]
        hooks, began = GradientHooks(name, leaves(trial[name])[0].dtype), next_number()
        try:
            with seen.watched(owned.parts, own_module=bool(modules)), hooks.around():
                loss = game.loss(name, trial, batch)
            if seen.hooked:
                hooks.modules = _called_by_name(seen.hooked, players)
                with hooks.around():
                    loss = game.loss(name, trial, batch)
        except Exception as error:
            _refuse_spread(name, seen)
            if isinstance(error, BilevelError) and str(error).startswith(f"Player {name!r}: "):
                raise
            told = told_of_recomputation(error)
            if told:
                raise ValueError(f"Player {name!r}: {told}") from error
            raise ValueError(
                f"Player {name!r}: its objective raised {type(error).__name__} on its first batch "
                f"({kind(batch)}): {error}{_hint(error, players[name])}"
            ) from error
    _refuse_spread(name, seen)
    _refuse_lossy(name, hooks)
    _refuse_written(name, "objective", trial, initial)
    _refuse_written_batch(name, versions, _versions(batch))
    if not isinstance(loss, Tensor):
        raise TypeError(f"Player {name!r}: its objective returned {kind(loss)}; expected a scalar tensor.")
    if loss.ndim != 0:
        raise ValueError(
            f"Player {name!r}: its objective returned a tensor of shape {tuple(loss.shape)}; expected a scalar "
            "(shape ()). Take .sum() or .mean()."
        )
    refuse_numberless(f"Player {name!r}: its loss", loss)
    _refuse_own_parameters(name, loss, owned, trial)
    if not loss.requires_grad:
        raise ValueError(
            f"Player {name!r}: its loss is not differentiable in any player's variables (dtype {loss.dtype}, no "
            "graph). Use the arguments themselves, without .detach(), .item() or integer operations; a player that is "
            "a module is called itself: weights(inputs)."
        )
    if loss.is_complex():
        raise TypeError(
            f"Player {name!r}: its objective returned a complex number ({loss.dtype}); expected a real one. Take "
            ".real, or .abs().square()."
        )
    kernels, custom = FastKernels.of([loss], modules), own_functions([loss])
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"Player {name!r}: its loss at init is {loss.item()}; expected a finite number.")
    found = _reached(name, "loss", loss, trial)

    elsewhere: list[object] = []

    def again() -> Tensor:
        with random_kept(game.device), torch.enable_grad(), hooks_elsewhere(elsewhere):
            return game.loss(name, trial, batch)

    # On a GPU a gradient inside the loss is computed by PyTorch's own threads.
    threads = game.device.type == "cpu" and made_in_threads(loss, began, again)
    if elsewhere:
        raise ValueError(
            f"Player {name!r}: its objective computes in threads of its own, and sets hooks on gradients there, which "
            "nobody sees to. Take the hooks away, or compute in the loss's own thread."
        )
    if threads and (kernels.weight_norm or kernels.chunked or kernels.third):
        raise ValueError(
            f"Player {name!r}: its objective computes in threads of its own, and runs what PyTorch does not "
            "differentiate twice rightly (weight_norm, linear_cross_entropy in chunks, or layers that normalise), "
            "whose other form is run in the loss's own thread alone. Compute in that: PyTorch's operations use several "
            "cores by themselves."
        )
    own, known = players[name].residual is not None, len(custom)
    functions = _examined(game, players[name], name, trial, batch, custom)
    if own and players[name].rests.curves_loss:
        refuse_second(name, functions)
    with seen.watched(owned.parts, own_module=bool(modules)), hooks.around():
        rests = _residual_dependence(game, name, trial, batch) if own else {n: set(paths) for n, paths in found.items()}
        for what, function in players[name].constraints.items():
            reached, more = _constraint_dependence(game, players, owned, name, what, function, trial, batch)
            for other, paths in reached.items():
                rests.setdefault(other, set()).update(paths)
            custom += more
        if len(custom) > known:
            functions = _examined(game, players[name], name, trial, batch, custom)
    _refuse_written(name, "residual", trial, initial)
    if not found or not rests:
        told = "residual" if found else "loss"
        raise ValueError(f"Player {name!r}: its {told} depends on no player's variables.")
    evaluated = {owner for layer in seen.by_statistics for owner in owned.parts.get(layer, ()) if owner != name}
    by_statistics = tuple(
        other
        for other in sorted(evaluated, key=list(players).index)
        if any(id(layer) in seen.by_statistics for layer in moving_layers(players[other].init).values())
    )
    ran = dict.fromkeys(owner for part in seen.owned for owner in owned.parts[part])
    beside = tuple(owner for owner in ran if owner not in initial)
    runs = Runs(
        kernels,
        tuple(dict.fromkeys(seen.strangers)),
        by_statistics,
        beside,
        functions,
        tuple(hooks.modules.items()),
        hooks.met,
        threads,
    )
    return found, rests, runs


def _examined(
    game: PlayedGame,
    player: Player,
    name: str,
    trial: Mapping[str, Variables],
    batch: object,
    custom: Sequence[type],
) -> OwnFunctions:
    """What is wrong with the user's own autograd functions in what a player minimises, and in its constraints."""
    if not custom:
        return OwnFunctions()
    with random_kept(game.device), torch.enable_grad(), recorded(list(dict.fromkeys(custom))) as calls:
        for function in (player.objective, *player.constraints.values()):
            game.call(name, function, trial, batch, game.buffers(), {})
    return examined(calls)


def _called_by_name(modules: Sequence[nn.Module], players: Mapping[str, Player]) -> dict[str, nn.Module]:
    """Modules by what they are called in words: parts of players' modules by their paths."""
    owned = {
        id(part): what
        for name, player in players.items()
        if isinstance(player.init, nn.Module)
        for what, part in hooked_parts(player.init, name).items()
    }
    return {owned.get(id(part), f"a {type(part).__name__} that the objective calls"): part for part in modules}


def _refuse_lossy(name: str, hooks: GradientHooks) -> None:
    """Refuse a loss that saves other tensors for its derivatives than it has computed."""
    if hooks.lossy:
        raise ValueError(
            f"Player {name!r}: its objective saves tensors by hooks that give back others ({hooks.lossy}): its "
            "gradient would be that of other numbers, in silence. Save them as they are, as "
            "torch.autograd.graph.save_on_cpu() does; less memory takes Unrolled(differentiation=Segments())."
        )


def _refuse_written(name: str, what: str, trial: Mapping[str, Variables], initial: Mapping[str, Variables]) -> None:
    """Refuse a function that writes into the variables that it is called with.

    Its gradient would not know of it, and whoever holds the variables, an optimiser or the start of the next call,
    would find others.
    """
    for other, variables in trial.items():
        for (path, leaf), (_, was) in zip(named_leaves(variables), named_leaves(initial[other]), strict=True):
            # By `.data` a tensor is written into without a new version; its values tell.
            if leaf._version or not torch.equal(leaf.detach(), was):
                raise ValueError(
                    f"Player {name!r}: its {what} writes into the variables of {other!r}{path} (as clamp_(), copy_() "
                    "or an assignment to entries under torch.no_grad() do), which no gradient sees. Write into a copy, "
                    f"{other}.clone(), or make new tensors: {other}.clamp(...), torch.where(...). What keeps a player "
                    "within bounds belongs to the player: a domain, a residual, or other coordinates."
                )


def _versions(batch: object) -> dict[str, int]:
    """How often each tensor of a batch was written into, by its path."""
    pairs = named_leaves(batch)
    return {path: t._version for path, t in pairs if isinstance(t, Tensor) and not t.is_inference()}


def _refuse_written_batch(name: str, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Refuse a loss that writes into its batch: each of its many evaluations on that batch would see another one."""
    for path, version in before.items():
        if after.get(path) != version:
            did = "writes into" if path in after else "takes away"
            way = "batch = dict(batch) before pop()" if path not in after else "batch.clone(), x / 255 for x.div_(255)"
            raise ValueError(
                f"Player {name!r}: its objective {did} batch{path}. A loss is evaluated many times on one batch, and "
                f"the next time would see another one. Work on a copy: {way}."
            )


def _refuse_spread(name: str, seen: FirstCall) -> None:
    if seen.spread:
        raise ValueError(f"Player {name!r}: a module that its objective calls is {seen.spread[0]}")


def _hint(error: Exception, player: Player) -> str:
    """The way out of what an objective raised, where it is known."""
    text = str(error)
    if "Inference tensors" in text:
        return " Make it under torch.no_grad() in place of torch.inference_mode(), or .clone() it outside that mode."
    if isinstance(error, TypeError) and re.search(
        r"must be (float|int|bool|Number|number)\b.*, not (Tensor|Param)", text
    ):
        return (
            ". That operation takes a plain number, and no derivative goes through one. Write it with operations on "
            "tensors; dropout with a rate p that is to be tuned, for instance, as a relaxed mask: "
            "inputs * torch.sigmoid((torch.logit(torch.rand_like(inputs)) - torch.logit(p)) / 0.1) / (1 - p)."
        )
    data = player.data
    if isinstance(data, list | tuple) and data and all(isinstance(part, Tensor) for part in data):
        return (
            f". Its data is a {type(data).__name__} of tensors, of which each is a batch by itself; if they are one "
            "batch together, pass data=[batch]."
        )
    return "" if text.endswith(".") else "."


def _reached(name: str, what: str, value: Tensor, trial: Mapping[str, Variables]) -> Paths:
    owners = [(other, path, leaf) for other, v in trial.items() for path, leaf in named_leaves(v)]
    try:
        grads = torch.autograd.grad(value, [leaf for *_, leaf in owners], allow_unused=True)
    except RuntimeError as error:
        told = told_of_recomputation(error)
        if told:
            raise ValueError(f"Player {name!r}: {told}") from error
        if isinstance(error, BilevelError):
            raise
        told = explanation(error)
        if not told:
            raise ValueError(
                f"Player {name!r}: the gradient of its {what} raised {type(error).__name__} at init: {error}"
            ) from error
        raise SecondDerivativeError(f"Player {name!r}: its {what} takes a gradient itself: {told}") from error
    found: Paths = {}
    for (other, path, _), grad in zip(owners, grads, strict=True):
        if grad is None:
            continue
        if grad.layout != torch.strided:
            raise TypeError(
                f"Player {name!r}: the gradient of its {what} in the variables of {other!r}{path} is sparse, as that "
                "of an embedding with sparse=True. Use sparse=False: sparse gradients have no second derivative."
            )
        if not bool(torch.isfinite(grad).all()):
            raise ValueError(
                f"Player {name!r}: its {what} at init is finite, but its gradient in the variables of {other!r}{path} "
                "holds NaN or infinity, as that of a square root, a norm or a standard deviation at 0. Start "
                "elsewhere, or add a small number under the root."
            )
        found.setdefault(other, set()).add(path)
    return found


def _residual_dependence(game: PlayedGame, name: str, trial: Mapping[str, Variables], batch: object) -> Paths:
    """The same of a residual of the player's own; refuses one that is not finite or not of the form of its init."""

    def residual(point: Mapping[str, Variables]) -> list[Tensor]:
        others = {other: v for other, v in point.items() if other != name}
        with random_kept(game.device), torch.enable_grad():
            here = Situation(game, name, others, batch, game.buffers())
            return game.residual(name)(here, leaves(point[name]))[1]

    found = _first_call(name, lambda: residual(trial), batch)
    for (path, leaf), value in zip(named_leaves(trial[name]), found, strict=True):
        if value.dtype != leaf.dtype or not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"Player {name!r}: its residual{path} at init is {value.dtype}"
                f"{'' if bool(torch.isfinite(value).all()) else ' with NaN or infinite entries'}; expected finite "
                f"numbers of {leaf.dtype}."
            )
    total = torch.stack([value.sum() for value in found]).sum()
    if not total.requires_grad:
        raise ValueError(
            f"Player {name!r}: its residual is not differentiable in any player's variables. Use the arguments "
            "themselves, without .detach() or .item()."
        )
    reached = _reached(name, "residual", total, trial)
    refuse_detached(name, residual, trial)
    return reached


def _first_call(name: str, residual: Callable[[], list[Tensor]], batch: object) -> list[Tensor]:
    """What a residual of the player's own gives at init; what it raises, in words."""
    try:
        return residual()
    except Exception as error:
        if str(error).startswith(f"Player {name!r}: its residual"):
            raise
        hint = ""
        if "in-place" in str(error):
            hint = " Others hold its arguments: make new tensors, y - z and not y.sub_(z)."
        elif "numpy()" in str(error):
            hint = " It must be differentiable: torch's operations on the arguments themselves."
        raise ValueError(
            f"Player {name!r}: its residual raised {type(error).__name__} on its first batch ({kind(batch)}): "
            f"{error}{hint}"
        ) from error


def _constraint_dependence(
    game: PlayedGame,
    players: Mapping[str, Player],
    owned: _Owned,
    name: str,
    what: str,
    function: Callable[..., Any],
    trial: Mapping[str, Variables],
    batch: object,
) -> tuple[Paths, list[type]]:
    """What a constraint depends on, and the user's own autograd functions in it.

    Refuses one that is no tensor of the variables' dtype, or not the player's own.
    """
    told = f"Player {name!r}: its {what}"
    with random_kept(game.device), torch.enable_grad():
        try:
            value, _ = game.call(name, function, trial, batch, game.buffers(), {})
        except Exception as error:
            raise ValueError(
                f"{told} raised {type(error).__name__} at init, on its first batch ({kind(batch)}): {error}"
            ) from error
    pairs = named_leaves(value)
    if not pairs:
        raise TypeError(f"{told} returned {kind(value)} without a tensor; expected one, or a pytree of them.")
    dtype = leaves(trial[name])[0].dtype
    found: Paths = {}
    for path, leaf in pairs:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{told} returned {kind(leaf)}{f' at {path}' if path else ''}; expected a tensor.")
        if leaf.numel() == 0 or leaf.dtype != dtype or leaf.device != game.device:
            raise ValueError(
                f"{told}{path} is a tensor of shape {tuple(leaf.shape)} of {leaf.dtype} on {leaf.device}; expected at "
                f"least one entry of {dtype} on {game.device}, as its variables are."
            )
        if not bool(torch.isfinite(leaf).all()):
            raise ValueError(f"{told}{path} at init holds NaN or infinity; expected finite numbers. Start elsewhere.")
        reached = _reached(name, what, leaf.sum(), trial) if leaf.requires_grad else {}
        # A leader may keep to what its followers answer: those who move after it.
        later = list(players)[list(players).index(name) + 1 :]
        if name not in reached and not any(other in reached for other in later):
            on = f"on {' and '.join(map(repr, reached))} alone" if reached else "on nobody's variables"
            raise ValueError(
                f"{told}{path} depends {on}; a constraint of {name!r} is one of its own variables. Use the argument "
                f"`{name}` itself, without .detach(), or give the constraint to whom it binds."
            )
        for other, paths in reached.items():
            found.setdefault(other, set()).update(paths)
    _refuse_own_parameters(name, torch.stack([leaf.sum() for leaf in leaves(value)]).sum(), owned, trial)
    return found, own_functions(leaf for leaf in leaves(value) if leaf.requires_grad)


def _refuse_own_parameters(name: str, loss: Tensor, owned: _Owned, trial: Mapping[str, Variables]) -> None:
    """Refuse a loss that calls a player's module with the module's own parameters in place of the argument."""
    if not owned.parameters:
        return
    passed = [leaf for variables in trial.values() for leaf in leaves(variables)]
    for leaf in captured_leaves([loss], passed):
        if id(leaf) in owned.parameters:
            other, path = owned.parameters[id(leaf)]
            raise ValueError(
                f"Player {name!r}: its objective uses {path!r} of the module of player {other!r} itself, and not the "
                f"argument `{other}`: what the game moves would never be seen. Call the argument to run the module: "
                f"{other}(inputs)."
            )

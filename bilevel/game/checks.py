"""What a game is refused for, before any work: names, variables, and what each loss depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bilevel.autodiff import captured_leaves
from bilevel.game.player import Player, kind
from bilevel.game.residual import GRADIENT, PlayedGame
from bilevel.game.starts import StartsAlone, check_start_names, start_dependence
from bilevel.randomness import random_kept
from bilevel.tree import Variables, leaves, map_leaves, named_leaves

# Words that a call of an objective or of solve() already uses; a player of that name could never be addressed.
RESERVED = frozenset(
    (
        *("batch", "game", "optimizer", "steps", "scheduler", "clip_norm", "callbacks", "checkpoint"),
        *("checkpoint_every", "resume", "accept_changes", "progress", "seed", "dynamics"),
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
        if "batch" in player.names and player.data is None:
            raise ValueError(f"Player {name!r}: its objective takes `batch`, but the player has no data=.")
        check_start_names(name, players)
        takes_batch = "batch" in player.names
        if player.residual is not None:
            parameters = player.own_residual.names
            if GRADIENT in parameters and GRADIENT in players:
                raise ValueError(
                    f"Player {name!r}: `gradient` in its residual is its objective's own gradient, and a player has "
                    "that name. Rename the player."
                )
            _check_parameters(name, "residual", [p for p in parameters if p != GRADIENT], players)
            takes_batch = takes_batch or "batch" in parameters
        takes_batch = takes_batch or "batch" in player.start_names
        if not takes_batch and player.data is not None:
            raise ValueError(f"Player {name!r}: it has data, but its objective takes no `batch`.")


def _check_parameters(name: str, what: str, parameters: Sequence[str], players: Mapping[str, Player]) -> None:
    for parameter in parameters:
        if parameter not in (*players, "batch"):
            raise ValueError(
                f"Player {name!r}: its {what} has a parameter {parameter!r}, which names no player. "
                f"Players are {list(players)}; rename it, or give it a default value."
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
                raise TypeError(f"{where} is {kind(leaf)}; expected a tensor, as in torch.tensor({leaf!r}).")
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
    for name, variables in initial.items():
        for path, leaf in named_leaves(variables):
            if not bool(torch.isfinite(leaf).all()):
                raise ValueError(
                    f"Player {name!r}: init{path} holds NaN or infinity; expected finite numbers to start from."
                )


Depends = Mapping[str, frozenset[str]]
"""Player -> those whose variables what vanishes where it rests depends on, as a rule its loss."""


def check_objectives(game: PlayedGame, players: Mapping[str, Player]) -> tuple[Depends, StartsAlone]:
    """Evaluate each objective and each start once and see from the graph what it depends on."""
    initial = {name: game.initial(name) for name in players}
    reached: dict[str, set[str]] = {name: set() for name in players}
    depends: dict[str, frozenset[str]] = {}
    for name in players:
        in_loss, in_residual = _dependence(game, name, players, initial)
        depends[name] = frozenset(in_residual)
        for found in (in_loss, in_residual):
            for other, paths in found.items():
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
                "zero. Name it in an objective and use it there. If it is where a follower starts, say so of the "
                f"follower, Player(..., start=lambda {name}: {name}); if it tunes the inner optimiser, say "
                "Player(..., optimizer_hyper=True)."
            )
        if missing and name == next(iter(players)):
            raise ValueError(f"Player {name!r}: init{missing[0]} reaches no objective; its gradient would be zero.")
    order = list(players)
    for name in order[1:]:
        later = order[order.index(name) + 1 :]
        # A leader need not appear in its own loss: it may act through those who move after it, or their optimiser.
        acts = players[name].optimizer_hyper or name in depends[name]
        if not acts and not any(name in depends[other] or name in players[other].start_names for other in later):
            raise ValueError(_chooses_nothing(name, players))
    return depends, alone


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
            f"before it; its response would have no derivative. Use that argument in the {what}, give this player a "
            f"start= where it starts at a function of the leader, start=lambda {earlier[0]}: ..., make the leader "
            "Player(..., optimizer_hyper=True) when it tunes the inner optimiser, or give this player no response, so "
            "that it leads too."
        )


def _what(player: Player) -> str:
    return "objective" if player.follows_loss else "residual"


def _chooses_nothing(name: str, players: Mapping[str, Player]) -> str:
    return (
        f"Player {name!r}: its {_what(players[name])} does not depend on its own variables, so that it has nothing to "
        "choose. Did the objective use a module's own parameters instead of the argument?"
    )


Paths = dict[str, set[str]]
"""Player -> the paths of those of its leaves that something depends on."""


def _dependence(
    game: PlayedGame, name: str, players: Mapping[str, Player], initial: Mapping[str, Variables]
) -> tuple[Paths, Paths]:
    """What a player's loss depends on, and what its residual does; refuses losses that nothing can be done with."""
    trial = {other: map_leaves(lambda t: t.detach().clone().requires_grad_(), v) for other, v in initial.items()}
    batch, _ = game.draw(name, game.start(name))
    with random_kept(game.device), torch.enable_grad():
        try:
            loss = game.loss(name, trial, batch)
        except Exception as error:
            raise ValueError(
                f"Player {name!r}: its objective raised {type(error).__name__} on its first batch "
                f"({kind(batch)}): {error}. Data is an iterable of batches: a single one is data=[batch]."
            ) from error
    if not isinstance(loss, Tensor):
        raise TypeError(f"Player {name!r}: its objective returned {kind(loss)}; expected a scalar tensor.")
    if loss.ndim != 0:
        raise ValueError(
            f"Player {name!r}: its objective returned a tensor of shape {tuple(loss.shape)}; expected a scalar "
            "(shape ()). Take .sum() or .mean()."
        )
    _refuse_own_parameters(name, loss, players, trial)
    if not loss.requires_grad:
        raise ValueError(
            f"Player {name!r}: its loss is not differentiable in any player's variables (dtype {loss.dtype}, no "
            "graph). Use the arguments themselves, without .detach(), .item() or integer operations; a player that is "
            "a module is called itself: weights(inputs)."
        )
    if not bool(torch.isfinite(loss)):
        raise ValueError(f"Player {name!r}: its loss at init is {loss.item()}; expected a finite number.")
    found = _reached(name, "loss", loss, trial)
    rests = found if players[name].follows_loss else _residual_dependence(game, name, trial, batch)
    if not found or not rests:
        told = "residual" if found else "loss"
        raise ValueError(f"Player {name!r}: its {told} depends on no player's variables.")
    return found, rests


def _reached(name: str, what: str, value: Tensor, trial: Mapping[str, Variables]) -> Paths:
    owners = [(other, path, leaf) for other, v in trial.items() for path, leaf in named_leaves(v)]
    grads = torch.autograd.grad(value, [leaf for *_, leaf in owners], allow_unused=True)
    found: Paths = {}
    for (other, path, _), grad in zip(owners, grads, strict=True):
        if grad is None:
            continue
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
    others = {other: v for other, v in trial.items() if other != name}
    with random_kept(game.device), torch.enable_grad():
        _, found, _ = game.residual(name)(game, name, leaves(trial[name]), others, batch, game.buffers())
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
    return _reached(name, "residual", total, trial)


def _refuse_own_parameters(
    name: str, loss: Tensor, players: Mapping[str, Player], trial: Mapping[str, Variables]
) -> None:
    """Refuse a loss that calls a player's module with the module's own parameters in place of the argument."""
    owned = {
        id(parameter): (other, path)
        for other, player in players.items()
        if isinstance(player.init, nn.Module)
        for path, parameter in player.init.named_parameters()
    }
    if not owned:
        return
    passed = [leaf for variables in trial.values() for leaf in leaves(variables)]
    for leaf in captured_leaves([loss], passed):
        if id(leaf) in owned:
            other, path = owned[id(leaf)]
            raise ValueError(
                f"Player {name!r}: its objective uses {path!r} of the module of player {other!r} itself, and not the "
                f"argument `{other}`: what the game moves would never be seen. Call the argument to run the module: "
                f"{other}(inputs)."
            )

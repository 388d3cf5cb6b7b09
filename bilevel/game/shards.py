"""Players whose variables are spread over processes: what each rank holds of them, and how a loss sees them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, distributed, nn

from bilevel.errors import ParallelError
from bilevel.game.player import Player
from bilevel.sharding import Layout, Peers, ShardedTensor
from bilevel.sharding.gathers import put_together
from bilevel.sharding.modules import is_fully_sharded, without_hooks
from bilevel.sharding.tensor import Form
from bilevel.sharding.unsharded import Unsharded
from bilevel.tree import Variables, leaves, map_leaves, named_leaves, structure_of


@dataclass(frozen=True, eq=False)
class Shards:
    """How one player's variables are spread.

    Args:
        layouts: Of each leaf.
        placed: The mesh and the placements that each leaf came with; None of one that each rank held whole.
    """

    layouts: Sequence[Layout]
    placed: Sequence[tuple[Any, Any] | None]

    def assembled(self, variables: Variables, *, shared: bool) -> Variables:
        """The variables as a loss takes them: whole where it uses them."""
        form, own = structure_of(variables), leaves(variables)
        pairs = zip(own, self.layouts, strict=True)
        return form.build(
            [Unsharded(leaf, layout, shared) if isinstance(leaf, ShardedTensor) else leaf for leaf, layout in pairs]
        )

    def given_back(self, variables: Variables) -> Variables:
        """The variables as they came: DTensors, and whole what was whole."""
        from torch.distributed.tensor import DTensor  # noqa: PLC0415 - nobody has one who has not imported it

        found = []
        for leaf, layout, placed in zip(leaves(variables), self.layouts, self.placed, strict=True):
            if not isinstance(leaf, ShardedTensor):
                found.append(leaf)
            elif placed is None:
                found.append(put_together(layout, leaf.peers, leaf.local))
            else:
                stride = torch.empty(layout.shape, device="meta").stride()
                local = leaf.local.detach().clone()
                shape = torch.Size(layout.shape)
                found.append(DTensor.from_local(local, *placed, run_check=False, shape=shape, stride=stride))
        return structure_of(variables).build(found)


@dataclass(frozen=True)
class MeshPeers:
    """The ranks of a device mesh's process group, before a game is shared."""

    group: Any

    @property
    def rank(self) -> int:
        """The number of this one."""
        return distributed.get_rank(self.group)

    @property
    def size(self) -> int:
        """How many there are."""
        return distributed.get_world_size(self.group)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks."""
        return self._reduced(tensor, distributed.ReduceOp.SUM)

    def greatest(self, tensor: Tensor) -> Tensor:
        """The largest over all ranks."""
        return self._reduced(tensor, distributed.ReduceOp.MAX)

    def parts(self, tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Every rank's vector."""
        return gathered(
            tensor, sizes, lambda found, own: _waited(lambda: distributed.all_gather(found, own, group=self.group))
        )

    def _reduced(self, tensor: Tensor, operation: Any) -> Tensor:
        found = tensor.detach().clone().contiguous()
        _waited(lambda: distributed.all_reduce(found, operation, group=self.group))
        return found


def _waited(reduce: Callable[[], object]) -> None:
    """A sum over ranks; raises `ParallelError` where one of them has gone."""
    try:
        reduce()
    except RuntimeError as error:
        raise ParallelError(
            "Game: while players with sharded variables were looked at, this rank waited for the others, and they did "
            "not all come: one has ended, hangs, or makes another game. (PyTorch says: "
            f"{' '.join(str(error).split())[:200]})"
        ) from error


def gathered(tensor: Tensor, sizes: Sequence[int], gather: Callable[[list[Tensor], Tensor], object]) -> list[Tensor]:
    """Every rank's vector, by a gather of vectors of one length."""
    own = tensor.new_zeros(max(sizes))
    own[: tensor.numel()] = tensor
    found = [torch.empty_like(own) for _ in sizes]
    gather(found, own)
    return [part[:size] for part, size in zip(found, sizes, strict=True)]


def spread(
    players: Mapping[str, Player], initial: Mapping[str, Variables]
) -> tuple[dict[str, Player], dict[str, Variables], dict[str, Shards]]:
    """The players and where they start, as this rank holds them, and how those are spread who are.

    A player one of whose leaves is a DTensor holds a part of all of them.
    """
    found, started, shards = dict(players), dict(initial), {}
    for name, player in players.items():
        own = leaves(initial[name])
        meshes = [leaf.device_mesh for leaf in own if is_spread(leaf)]
        if not meshes:
            continue
        peers = MeshPeers(meshes[0].get_group())
        pairs = [_cut(leaf, peers) for leaf in own]
        shards[name] = Shards([layout for _, layout in pairs], [_placed(leaf) for leaf in own])
        started[name] = structure_of(initial[name]).build([part for part, _ in pairs])
        if isinstance(player.init, nn.Module):
            found[name] = replace(player, init=_plain_module(player.init, peers))
    return found, started, shards


def _cut(leaf: Any, peers: Peers) -> tuple[ShardedTensor, Layout]:
    dims = [place.dim for place in leaf.placements if place.is_shard()] if is_spread(leaf) else []
    layout = Layout(tuple(leaf.shape), dims[0] if dims else 0, peers.size)
    if dims:
        local = leaf.to_local().detach().clone()
    else:
        local = layout.cut((leaf.to_local() if is_spread(leaf) else leaf).detach(), peers.rank)
    return ShardedTensor(local.reshape(layout.part(peers.rank)), peers, Form((layout,), False)), layout


def _placed(leaf: Any) -> tuple[Any, Any] | None:
    sharded = is_spread(leaf) and any(place.is_shard() for place in leaf.placements)
    return (leaf.device_mesh, leaf.placements) if sharded else None


def _plain_module(module: nn.Module, peers: Peers) -> nn.Module:
    """The module without hooks; parameters of its own that stand still are put together where they are used."""
    plain = without_hooks(module)
    for part in plain.modules():
        for name, parameter in part._parameters.items():
            if is_spread(parameter) and not parameter.requires_grad:  # type: ignore[union-attr]
                leaf, layout = _cut(parameter, peers)
                part._parameters[name] = Unsharded(leaf, layout, False)  # type: ignore[assignment]
    return plain


def resettled(initial: Mapping[str, Variables], peers: Peers) -> dict[str, Variables]:
    """The same parts, whose sums other peers make."""

    def moved(leaf: Any) -> Any:
        return ShardedTensor(leaf.local, peers, leaf.form) if isinstance(leaf, ShardedTensor) else leaf

    return {name: map_leaves(moved, tree) for name, tree in initial.items()}


def is_spread(leaf: Any) -> bool:
    """Whether a leaf is a DTensor."""
    from bilevel.game.processes import loaded  # noqa: PLC0415

    return isinstance(leaf, loaded("torch.distributed.tensor", "DTensor"))


def refuse_layouts(players: Mapping[str, Player], initial: Mapping[str, Variables]) -> None:
    """Raise `ValueError` for DTensors and sharded modules that are spread in a way that is not known here."""
    meshes: dict[int, str] = {}
    for name, player in players.items():
        for path, leaf in named_leaves(initial[name]):
            if is_spread(leaf):
                told = _told_of_layout(leaf)
                if told:
                    raise ValueError(f"Player {name!r}: init{path} is a DTensor {told}")
                meshes[id(leaf.device_mesh)] = name
        module = player.init
        if isinstance(module, nn.Module) and any(is_fully_sharded(part) for part in module.modules()):
            _refuse_module(name, module)
    coordinates = [name for name, player in players.items() if any(player.coordinates)]
    spread_out = [name for name in players if any(is_spread(leaf) for leaf in leaves(initial[name]))]
    for name in spread_out:
        player = players[name]
        given = {
            "domain=": player.domain is not None or name in coordinates,
            "prox=": player.prox is not None,
            "residual=": player.residual is not None,
            "start=": player.start is not None,
            "constraints": bool(player.constraints),
        }
        used = [what for what, present in given.items() if present]
        if used:
            raise ValueError(
                f"Player {name!r}: its variables are DTensors, spread over processes, and {used[0]} would see one "
                "rank's part of them. Leave it out, or pass variables that each rank holds whole: init.full_tensor()."
            )


def _told_of_layout(leaf: Any) -> str:
    mesh, way = leaf.device_mesh, "Pass variables that each rank holds whole: init.full_tensor()."
    ranks = distributed.get_world_size()
    if mesh.ndim != 1 or mesh.mesh.flatten().tolist() != list(range(ranks)):
        return (
            f"over a mesh of {list(mesh.mesh.shape)} processes; expected one dimension of all {ranks} ranks in order, "
            f"init_device_mesh(device, ({ranks},)). {way}"
        )
    (place,) = leaf.placements
    if type(place).__name__ not in ("Shard", "Replicate"):
        return f"with the placement {place}; expected Shard(dim) or Replicate(). {way}"
    return ""


def _refuse_module(name: str, module: nn.Module) -> None:
    whole = [path for path, leaf in module.named_parameters() if leaf.requires_grad and not is_spread(leaf)]
    states = [part._get_fsdp_state() for part in module.modules() if is_fully_sharded(part)]  # type: ignore[operator]
    if len(whole) == sum(leaf.requires_grad for leaf in module.parameters()):
        raise ValueError(
            f"Player {name!r}: its module is sharded by fully_shard, and its parameters are gathered just now. Call "
            "module.reshard() before it becomes a player."
        )
    for state in states:
        policy = getattr(state, "_mp_policy", None)
        dtypes = [getattr(policy, key, None) for key in ("param_dtype", "reduce_dtype", "output_dtype")]
        if any(dtype is not None for dtype in dtypes):
            raise ValueError(
                f"Player {name!r}: its module is sharded by fully_shard with {policy}, which a game does not follow. "
                "Leave mp_policy= out, and compute in half precision under torch.autocast inside the loss."
            )


__all__ = ["MeshPeers", "Shards", "gathered", "refuse_layouts", "resettled", "spread"]

"""Trees are walked as PyTorch walks them, whatever they are made of."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from bilevel.game.modules import CallableVariables
from bilevel.tree import leaves, map_leaves, rebuilt, structure_of

Pair = namedtuple("Pair", "first second")

ONE, TWO, THREE = torch.ones(2), torch.zeros(3, 1), nn.Parameter(torch.ones(()))

TREES = {
    "tensor": ONE,
    "dict": {"b": ONE, "a": TWO},
    "nested": {"x": [ONE, {"y": (TWO, THREE)}], "z": ()},
    "empty": {},
    "named tuple": Pair(ONE, [TWO]),
    "ordered": OrderedDict(b=ONE, a={"c": TWO}),
    "inside": {"p": Pair(ONE, TWO), "v": CallableVariables({"w": THREE}, nn.Linear(1, 1), True)},
    "other leaves": {"n": None, "i": 3, "s": "text", "size": torch.Size((2,)), "o": frozenset((1,))},
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_what_pytorch_sees(name):
    tree = TREES[name]
    expected, spec = pytree.tree_flatten(tree)
    found = leaves(tree)
    assert len(found) == len(expected) and all(one is other for one, other in zip(found, expected, strict=True))
    for again in (map_leaves(lambda leaf: leaf, tree), rebuilt(tree, found)):
        values, form = pytree.tree_flatten(again)
        assert form == pytree.tree_structure(pytree.tree_map(lambda leaf: leaf, tree))
        assert all(one is other for one, other in zip(values, expected, strict=True))
    assert spec.num_leaves == len(found)


@pytest.mark.parametrize("name", [name for name in TREES if name != "other leaves"])
def test_a_structure_builds_what_pytorch_would(name):
    tree = TREES[name]
    form, found = structure_of(tree), leaves(tree)
    built = form.build(found)
    assert type(built) is type(pytree.tree_unflatten(found, form.spec))
    assert pytree.tree_structure(built) == pytree.tree_structure(pytree.tree_unflatten(found, form.spec))
    with pytest.raises(ValueError):
        form.build([*found, torch.ones(1)])


def test_a_structure_fits_what_is_laid_out_alike():
    tree = {"a": torch.zeros(2), "b": torch.zeros(3, 1)}
    form = structure_of(tree)
    assert form.fits({"a": torch.ones(2), "b": torch.ones(3, 1)})
    assert not form.fits({"b": torch.ones(3, 1), "a": torch.ones(2)})  # another order is another flat vector
    assert not form.fits({"a": torch.ones(2), "b": torch.ones(3)})
    assert not form.fits({"a": torch.ones(2)})
    assert not form.fits({"a": torch.ones(2), "b": {"c": torch.ones(3, 1)}})
    assert not form.fits([torch.ones(2), torch.ones(3, 1)])
    assert structure_of(torch.zeros(2)).fits(torch.ones(2))

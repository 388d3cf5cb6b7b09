import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bilevel.errors import ExhaustedDataError
from bilevel.game.data import Stream


def draws(stream, position, count):
    batches = []
    for _ in range(count):
        batch, position = stream.draw(position)
        batches.append(batch[0].tolist() if isinstance(batch, list | tuple) else batch)
    return batches, position


LOADERS = {
    "list": lambda: [0, 1, 2],
    "shuffled": lambda: DataLoader(TensorDataset(torch.arange(7)), batch_size=2, shuffle=True),
    "own generator": lambda: DataLoader(
        TensorDataset(torch.arange(7)), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(5)
    ),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_every_position_can_be_reached_again(make):
    whole, _ = draws(Stream("w", make()), Stream.start(3), 11)
    for cut in (0, 1, 3, 4, 5, 10):
        _, position = draws(Stream("w", make()), Stream.start(3), cut)
        rest, _ = draws(Stream("w", make()), position, 11 - cut)
        assert rest == whole[cut:]


def test_two_consumers_in_turn_see_the_same():
    stream, one, two = Stream("w", LOADERS["shuffled"]()), Stream.start(0), Stream.start(0)
    for _ in range(9):
        first, one = stream.draw(one)
        second, two = stream.draw(two)
        assert torch.equal(first[0], second[0])


def test_passes_differ_and_seeds_differ():
    batches, _ = draws(Stream("w", LOADERS["shuffled"]()), Stream.start(0), 8)
    assert batches[:4] != batches[4:]
    assert draws(Stream("w", LOADERS["shuffled"]()), Stream.start(1), 4)[0] != batches[:4]


def test_data_that_runs_dry_is_told():
    class Once:
        left = True

        def __iter__(self):
            yield from [1] if self.left else []
            self.left = False

    stream = Stream("weights", Once())
    _, position = stream.draw(Stream.start())
    with pytest.raises(ExhaustedDataError, match=r"player 'weights' gave no batch in pass 2"):
        stream.draw(position)


def test_global_random_numbers_are_left_alone():
    before = torch.random.get_rng_state()
    draws(Stream("w", LOADERS["shuffled"]()), Stream.start(0), 9)
    assert torch.equal(before, torch.random.get_rng_state())

import itertools
import multiprocessing
import os
import pickle
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

import bilevel as bl
from bilevel.errors import BilevelError, DataError, ExhaustedDataError
from bilevel.game.data import Stream

pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # a machine with one core says so
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]
SGD = torch.optim.SGD


def draws(stream, position, count):
    batches = []
    for _ in range(count):
        batch, position = stream.draw(position)
        batch = batch[0] if isinstance(batch, list | tuple) else batch
        batches.append(batch.tolist() if isinstance(batch, torch.Tensor) else batch)
    return batches, position


class Augmented(Dataset):
    """An example with random numbers of every kind that a worker seeds."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return torch.tensor([index, torch.rand(()).item(), random.random(), np.random.rand()], dtype=torch.float64)  # noqa: NPY002


class Noisy(Dataset):
    """An example with PyTorch's random numbers."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return index + torch.rand(())


class Shards(IterableDataset):
    """Seven numbers, shared out among the workers, in another order in each pass."""

    def __iter__(self):
        info = get_worker_info()
        mine = range(7) if info is None else range(info.id, 7, info.num_workers)
        for index in torch.randperm(len(mine)).tolist():
            yield mine[index] + torch.rand(())


class Lazy:
    """Batches made from random numbers one by one."""

    def __iter__(self):
        for _ in range(4):
            yield torch.rand(2)


def endless():
    yield from itertools.count(int(torch.randint(100, ())))


class InOrder(Sampler):
    """A sampler that goes on where it was stopped, and shuffles by a generator of its own, as torchdata's do."""

    def __init__(self):
        self.own, self.order, self.place = torch.Generator().manual_seed(3), None, 0

    def __iter__(self):
        if self.order is None:
            self.order = torch.randperm(7, generator=self.own).tolist()
        while self.place < 7:
            self.place += 1
            yield self.order[self.place - 1]
        self.order, self.place = None, 0

    def __len__(self):
        return 7

    def state_dict(self):
        return {"own": self.own.get_state(), "order": self.order, "place": self.place}

    def load_state_dict(self, state):
        self.own.set_state(state["own"])
        self.order, self.place = state["order"], state["place"]


class Counting(Sampler):
    """It counts its passes, and shuffles by their number."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        yield from np.random.default_rng(self.passes).permutation(7).tolist()
        self.passes += 1

    def __len__(self):
        return 7


class InPlace(Counting):
    """It shuffles one order again and again."""

    def __init__(self, kind):
        self.order = list(range(7)) if kind == "list" else np.arange(7) if kind == "array" else torch.arange(7)
        self.shuffle = random.Random(5).shuffle if kind == "list" else np.random.default_rng(5).shuffle
        self.random = self.shuffle.__self__

    def __iter__(self):
        self.random.shuffle(self.order if not isinstance(self.order, torch.Tensor) else self.order.numpy())
        yield from map(int, self.order)


class Walk(IterableDataset):
    """Numbers that go on from pass to pass, with a state that can be saved."""

    def __init__(self):
        self.place, self.random = 0, np.random.RandomState(4)

    def __iter__(self):
        info = get_worker_info()
        for _ in range(5):
            self.place += 1
            yield torch.tensor([self.place + 100.0 * (info.id if info else 0), self.random.rand()])

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


class Batches:
    """Batches of one's own making: a list that is shuffled anew in each pass, and a count."""

    def __init__(self):
        self.made, self.random, self.order = 0, random.Random(2), [0, 1, 2, 3]

    def __iter__(self):
        self.random.shuffle(self.order)
        for number in self.order:
            self.made += 1
            yield torch.tensor([number, self.made])


class Jitter:
    """A transform with a generator of its own."""

    def __init__(self):
        self.random = np.random.default_rng(1)

    def __call__(self, index):
        return torch.tensor([index, self.random.random()])


class Jittered(Dataset):
    def __init__(self):
        self.transforms = [Jitter()]

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return self.transforms[0](index)


DATA = TensorDataset(torch.arange(7))
KEEPING = {
    "a sampler that goes on": lambda **options: DataLoader(DATA, batch_size=2, sampler=InOrder(), **options),
    "in a batch sampler": lambda **options: DataLoader(
        DATA, batch_sampler=BatchSampler(InOrder(), 2, False), **options
    ),
    "counts its passes": lambda **options: DataLoader(DATA, batch_size=2, sampler=Counting(), **options),
    "shuffles a list": lambda **options: DataLoader(DATA, batch_size=2, sampler=InPlace("list"), **options),
    "shuffles an array": lambda **options: DataLoader(DATA, batch_size=2, sampler=InPlace("array"), **options),
    "shuffles a tensor": lambda **options: DataLoader(DATA, batch_size=2, sampler=InPlace("tensor"), **options),
    "iterable with a state": lambda **options: DataLoader(Walk(), batch_size=2, **options),
    "transform with a generator": lambda **options: DataLoader(Jittered(), batch_size=2, **options),
}
LOADERS = {
    **KEEPING,
    "batches of one's own": Batches,
    "list": lambda: [0, 1, 2],
    "shuffled": lambda: DataLoader(DATA, batch_size=2, shuffle=True),
    "own generator": lambda: DataLoader(DATA, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(5)),
    "sampler's generator": lambda: DataLoader(
        DATA, batch_size=2, sampler=RandomSampler(DATA, generator=torch.Generator().manual_seed(5))
    ),
    "drawn in chunks": lambda: DataLoader(
        DATA,
        sampler=RandomSampler(DATA, replacement=True, num_samples=70, generator=torch.Generator()),
        batch_size=10,
    ),
    "batch sampler": lambda: DataLoader(
        DATA,
        batch_sampler=BatchSampler(WeightedRandomSampler(torch.arange(7.0), 7, generator=torch.Generator()), 2, True),
    ),
    "distributed": lambda: DataLoader(DATA, sampler=DistributedSampler(DATA, num_replicas=2, rank=1)),
    "noise": lambda: DataLoader(Noisy(), batch_size=2),
    "workers": lambda: DataLoader(Augmented(), batch_size=2, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(
        Augmented(), batch_size=2, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "iterable data set": lambda: DataLoader(Shards(), batch_size=2, num_workers=2),
    "iterable data set, persistent": lambda: DataLoader(Shards(), batch_size=2, num_workers=2, persistent_workers=True),
    "lazy": Lazy,
    "function": lambda: lambda: iter(Lazy()),
    "endless": lambda: endless,
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_every_position_can_be_reached_again(make):
    whole, _ = draws(Stream("w", make()), Stream.start(3), 11)
    for cut in (0, 1, 3, 4, 5, 10):
        _, position = draws(Stream("w", make()), Stream.start(3), cut)
        rest, _ = draws(Stream("w", make()), position, 11 - cut)
        assert rest == whole[cut:]


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_what_others_draw_from_the_global_numbers_changes_nothing(make):
    whole, _ = draws(Stream("w", make()), Stream.start(3), 11)
    stream, position = Stream("w", make()), Stream.start(3)
    for wanted in whole:
        torch.rand(5)
        before = torch.random.get_rng_state()
        (batch,), position = draws(stream, position, 1)
        assert batch == wanted
        assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_consumers_of_one_object_do_not_disturb_each_other(make):
    whole, _ = draws(Stream("w", make()), Stream.start(0), 12)
    data = make()
    one, two = Stream("v", data), Stream("w", data)
    ahead, first = draws(two, Stream.start(0), 5)
    batches, second = [], Stream.start(0)
    for _ in range(7):
        ahead += draws(two, first, 1)[0]
        first = two.draw(first)[1]
        batches += draws(one, second, 1)[0]
        second = one.draw(second)[1]
    assert ahead == whole
    assert batches == whole[:7]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("name", ["in a batch sampler", "shuffles an array", *list(KEEPING)[-2:]])
def test_what_data_keep_is_kept_beside_workers(name, persistent):
    make = partial(KEEPING[name], num_workers=2, persistent_workers=persistent)
    whole, _ = draws(Stream("w", make()), Stream.start(3), 10)  # into the third pass
    _, position = draws(Stream("w", make()), Stream.start(3), 9)
    assert draws(Stream("w", make()), position, 1)[0] == whole[9:]


def test_a_user_may_set_what_a_sampler_goes_by():
    sampler = Counting()
    stream = Stream("w", DataLoader(DATA, batch_size=7, sampler=sampler))
    (first, second), position = draws(stream, Stream.start(), 2)
    assert first != second and sampler.passes == 1
    sampler.passes = 0
    assert draws(stream, position, 1)[0] != [first]  # the pass after it has ended adds one
    stream.close()
    sampler.passes = 5
    (sixth,), _ = draws(Stream("w", DataLoader(DATA, batch_size=7, sampler=sampler)), Stream.start(), 1)
    assert sixth == np.random.default_rng(5).permutation(7).tolist()


def test_what_is_kept_is_plain_and_small_and_absent_where_there_is_nothing(tmp_path):
    for name, make in LOADERS.items():
        if "workers" in name or "persistent" in name or name == "endless":
            continue
        _, position = draws(Stream("w", make()), Stream.start(), 9)
        assert ("kept" in position) == (name in (*list(KEEPING)[2:7], "batches of one's own")), name
        torch.save(position, tmp_path / "position")
        assert torch.load(tmp_path / "position", weights_only=True) == position


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


def test_global_random_numbers_are_left_alone():
    before = torch.random.get_rng_state()
    draws(Stream("w", LOADERS["shuffled"]()), Stream.start(0), 9)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_loaders_own_generator_is_left_alone():
    generator = torch.Generator().manual_seed(5)
    draws(Stream("w", DataLoader(DATA, shuffle=True, generator=generator)), Stream.start(0), 9)
    assert generator.initial_seed() == 5
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(5).get_state())


def test_a_stream_travels_to_another_process():
    stream = Stream("w", DataLoader(DATA, batch_size=2, shuffle=True))
    whole, position = draws(stream, Stream.start(), 3)
    other = pickle.loads(pickle.dumps(stream))
    assert draws(other, Stream.start(), 3)[0] == whole
    assert draws(other, position, 4) == draws(stream, position, 4)


# Workers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Augmented, Shards])
def test_persistent_workers_give_what_new_ones_give(make):
    shuffle = {"shuffle": True} if make is Augmented else {}
    new, kept = (
        DataLoader(make(), batch_size=2, num_workers=2, persistent_workers=persistent, **shuffle)
        for persistent in (False, True)
    )
    one, _ = draws(Stream("w", new), Stream.start(7), 14)
    two, _ = draws(Stream("w", kept), Stream.start(7), 14)
    assert one == two
    if make is Augmented:
        assert sorted(row[0] for batch in two[:4] for row in batch) == list(range(7))


def test_persistent_workers_persist_and_are_the_streams_own():
    loader = DataLoader(Pids(), batch_size=1, num_workers=1, persistent_workers=True)
    stream, position, pids = Stream("w", loader), Stream.start(), set()
    for _ in range(9):
        (pid, *_), position = draws(stream, position, 1)[0][0], stream.draw(position)[1]
        pids.add(pid)
        theirs = {int(batch[0]) for batch in loader}  # resets the iterator of the loader itself
        assert theirs.isdisjoint(pids)
    assert len(pids) == 1


class Pids(Dataset):
    opened = None

    def __len__(self):
        return 3

    def __getitem__(self, index):
        return os.getpid() if self.opened is None else self.opened


def open_it(worker):
    info = get_worker_info()
    assert isinstance(info.dataset, Pids)
    info.dataset.opened = 100 + worker


def test_a_workers_beginning_sees_the_users_data_set():
    loader = DataLoader(Pids(), num_workers=2, persistent_workers=True, worker_init_fn=open_it)
    assert draws(Stream("w", loader), Stream.start(), 6)[0] == [[100], [101], [100]] * 2


def open_files():
    return len(os.listdir("/proc/self/fd"))


def children(others):
    """This process's children without those, which joblib keeps for the next of its calls."""
    return set(multiprocessing.active_children()) - others


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts this process's files")
@pytest.mark.parametrize("persistent", [False, True])
def test_a_hundred_passes_leave_no_workers_and_no_files(persistent):
    others = set(multiprocessing.active_children())
    loader = DataLoader(DATA, batch_size=4, num_workers=1, persistent_workers=persistent)
    stream = Stream("w", loader)
    _, position = draws(stream, Stream.start(), 3)
    files = open_files()
    most = 0
    for _ in range(200):
        _, position = stream.draw(position)
        most = max(most, len(children(others)))
    assert position == {"seed": 0, "epoch": 101, "index": 1}
    assert most <= 1
    assert open_files() <= files + 1  # between two batches of a pass as at the start, within what a batch itself holds
    stream.close()
    assert not children(others)


def test_workers_of_passes_that_nobody_ends_stop():
    others = set(multiprocessing.active_children())
    stream = Stream("w", DataLoader(DATA, num_workers=1))
    for seed in range(10):
        stream.draw(Stream.start(seed))
        assert len(children(others)) <= 4
    stream.close()
    assert not children(others)


def test_files_of_passes_that_nobody_ends_are_closed():
    opened = []

    def make():
        opened.append(1)
        try:
            yield from range(5)
        finally:
            opened.pop()

    stream = Stream("w", make)
    for seed in range(10):
        stream.draw(Stream.start(seed))
    assert len(opened) <= 4
    stream.close()
    assert not opened


# What is told -----------------------------------------------------------------------------------------------------


class Told:
    """A sampler that is told the pass."""

    def __init__(self, told):
        self.told = told

    def set_epoch(self, epoch):
        self.told.append(epoch)

    def __iter__(self):
        return iter(range(self.told[-1] % 3 if self.told else 0, 4))

    def __len__(self):
        return 4


class ToldBatches(Told):
    def __iter__(self):
        return iter([[0, 1], [self.told[-1]]])


@pytest.mark.parametrize(
    "make",
    [
        lambda told: DataLoader(DATA, batch_size=2, sampler=Told(told)),
        lambda told: DataLoader(DATA, batch_sampler=BatchSampler(Told(told), 2, drop_last=False)),
        lambda told: DataLoader(DATA, batch_sampler=ToldBatches(told)),
        lambda told: Told(told),
    ],
    ids=["sampler", "within the batch sampler", "batch sampler", "the data themselves"],
)
def test_each_pass_is_told_once(make):
    told = []
    stream, position = Stream("w", make(told)), Stream.start()
    while position["epoch"] < 3:
        _, position = stream.draw(position)
        assert told[-1] == position["epoch"]
    assert told == [0, 1, 2, 3]
    Stream("w", make(told)).draw(position)
    assert told == [0, 1, 2, 3, 3]  # resumed


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


def test_empty_data_are_told():
    for data in ([], DataLoader(TensorDataset(torch.ones(0)))):
        with pytest.raises(ExhaustedDataError, match=r"player 'weights' gave no batch in pass 1"):
            Stream("weights", data).draw(Stream.start())


@pytest.mark.parametrize("kind", ["function", "object"])
def test_one_iterator_given_again_is_refused_with_the_way_out(kind):
    iterator = (batch for batch in range(5))

    class Same:
        def __iter__(self):
            return iterator

    stream = Stream("weights", Same() if kind == "object" else lambda: iterator)
    _, position = draws(stream, Stream.start(), 3)
    with pytest.raises(ExhaustedDataError, match=r"'weights' .*can be iterated once only.*data=lambda: make\(\)"):
        stream.draw(Stream.start(1))  # somebody else, from the start
    with pytest.raises(ExhaustedDataError, match=r"'weights' .*pass 2.*can be iterated once only"):
        draws(stream, position, 3)


def loss(w, batch):
    return (w - batch).square().sum()


def test_a_player_refuses_what_can_be_iterated_once():
    for once in (iter([1]), (i for i in range(3)), zip([1], [2])):
        with pytest.raises(TypeError, match=r"only once.*data=lambda: make\(\)"):
            bl.Player(loss, torch.zeros(()), data=once)


def test_a_player_refuses_what_makes_no_batches():
    for wrong in (3, "batches", {"a": 1}, torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match=r"iterable of batches.*function that makes one.*data=\[batch\]"):
            bl.Player(loss, torch.zeros(()), data=wrong)
    with pytest.raises(TypeError, match=r"missing a required argument: 'path'; .*without arguments"):
        bl.Player(loss, torch.zeros(()), data=lambda path: [path])


def test_a_function_that_makes_batches_is_data():
    def follow(w, v, batch):
        return (v - w - batch).square().sum()

    def make():
        yield torch.tensor(1.0)
        yield torch.tensor(3.0)

    game = bl.Game(w=bl.Player(loss, torch.zeros(()), data=make), v=bl.Player(follow, torch.zeros(()), data=make))
    solution = bl.solve(game, v=bl.Unrolled(partial(SGD, lr=0.1), steps=1), steps=3)
    listed = bl.Game(
        w=bl.Player(loss, torch.zeros(()), data=list(make())), v=bl.Player(follow, torch.zeros(()), data=list(make()))
    )
    again = bl.solve(listed, v=bl.Unrolled(partial(SGD, lr=0.1), steps=1), steps=3)
    assert solution.variables == again.variables


class Broken(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 3:
            raise FileNotFoundError(f"row-{index}.png")
        return torch.tensor(float(index))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_data_raise_is_told_with_the_player(workers):
    stream = Stream("weights", DataLoader(Broken(), num_workers=workers))
    _, position = draws(stream, Stream.start(), 3)
    with pytest.raises(DataError, match=r"player 'weights' raised FileNotFoundError at batch 4 of pass 1:[\s\S]*row-3"):
        stream.draw(position)
    assert isinstance(DataError(), BilevelError)
    assert draws(stream, Stream.start(), 2)[0] == [[0.0], [1.0]]


def test_what_a_function_raises_is_told_with_the_player():
    def make():
        raise OSError("no such bucket")

    for wrong in (make, lambda: 3):
        with pytest.raises(DataError, match=r"'weights' raised (OSError|TypeError) at batch 1 of pass 1: "):
            Stream("weights", wrong).draw(Stream.start())


def test_data_that_have_become_fewer_are_told():
    for data in (list(range(3)), lambda: iter(range(3))):
        with pytest.raises(DataError, match=r"'weights' ended after 3 batches of pass 2, .* at batch 6"):
            Stream("weights", data).draw({"seed": 0, "epoch": 1, "index": 5})


# How often data are read --------------------------------------------------------------------------------------------


class Rows(Dataset):
    """Twenty numbers that count how often they are read."""

    def __init__(self):
        self.read = 0

    def __len__(self):
        return 20

    def __getitem__(self, index):
        self.read += 1
        return torch.tensor(float(index))


class Counted(DataLoader):
    """Ten batches that count how often a pass begins."""

    begun = 0

    def __iter__(self):
        self.begun += 1
        return super().__iter__()


def counted(steps, many=None, joined=False, **options):
    """Batches read by the leader and by the follower in each step, and in the end; and passes begun by the follower."""

    def lead(x, y, batch):
        return (y - batch.mean()).square() + x.square()

    def follow(x, y, batch):
        return (y - 0.01 * batch.mean() - x).square()

    loaders = [Counted(Rows(), batch_size=2, shuffle=True) for _ in range(2)]
    players = {
        "x": bl.Player(lead, torch.tensor(0.0), loaders[0]),
        "y": bl.Player(follow, torch.tensor(0.0), loaders[1]),
    }
    if joined:
        players["z"] = bl.Player(lambda x, y, z: (z - x - y).square(), torch.tensor(0.0))
    game = bl.Game(**players)
    game = game.joined(both=("y", "z")) if joined else game
    game = game if many is None else bl.Games(game, many)
    read, last = [], [0, 0]

    def note(*_):
        now = [loader.dataset.read // 2 for loader in loaders]
        read.append((now[0] - last[0], now[1] - last[1]))
        last[:] = now

    bl.solve(game, steps=steps, callbacks=[note], **options)
    note()
    return read, loaders[1].begun


def unrolled(steps, **options):
    return bl.Unrolled(partial(SGD, lr=0.01), steps=steps, **options)


# response -> batches in a step, and more in the first one
USED = {
    "unrolled": (unrolled(1), 1, 0),
    "unrolled three": (unrolled(3), 3, 0),
    "unrolled more than are kept": (unrolled(12), 12, 0),
    "segments": (unrolled(7, differentiation=bl.responses.Segments()), 7, 0),
    "forward": (unrolled(3, differentiation=bl.responses.ForwardMode()), 3, 0),
    "truncated": (unrolled(7, backprop_steps=2), 7, 0),
    "implicit": (bl.Implicit(partial(SGD, lr=0.01), steps=3, tolerance=None), 3, 0),
    "implicit, one batch": (bl.Implicit(bl.Scipy("L-BFGS-B"), tolerance=None), 1, 0),
    "hypernetwork": (
        bl.Hypernetwork(partial(torch.optim.Adam, lr=0.01), scale=0.1, steps=2, warmup=5, tolerance=None), 2, 5
    ),
}  # fmt: skip


@pytest.mark.parametrize(("response", "used", "more"), USED.values(), ids=USED)
def test_each_batch_is_read_once(response, used, more):
    """The leader reads one in a step, the follower one for each step of its own; the one that comes next is shown.

    Unrolled tells the loss that its last step saw, and the next one is shown in the end only.
    """
    read, begun = counted(12, y=response)
    ahead = 0 if isinstance(response, bl.Unrolled) else 1
    assert read[0] == (1, used + more + ahead)  # the first check, the init and the first step read one together
    assert read[1:-1] == [(1, used)] * 11
    assert read[-1] == (0, used + 1 - ahead)  # the answer to where the leader ended
    assert begun == 1 + (13 * used + more) // 10


def test_players_without_responses_read_one_batch_a_step():
    read, begun = counted(25)
    assert read == [(1, 1)] * 25 + [(0, 0)]
    assert begun == 3


@pytest.mark.parametrize("options", [{"many": 3, "y": unrolled(3)}, {"joined": True, "both": unrolled(3)}])
def test_many_games_and_a_joint_player_read_as_one_does(options):
    """Their losses are not in what a step saw: they are shown on the batch that comes next, which is read ahead."""
    (first, *steps, last), begun = counted(6, **options)
    (one, *others, end), once = counted(6, y=unrolled(3))
    assert (steps, begun) == (others, once)
    assert first == (one[0], one[1] + 1)
    assert last == (end[0], end[1] - 1)


@pytest.mark.parametrize("rule", [bl.dynamics.Extragradient(0.01), bl.dynamics.Alternating()], ids=repr)
def test_a_rule_that_asks_again_reads_no_more(rule):
    """It is seen in its first step how many batches must be kept."""
    for used in (1, 3, 30):
        read, _ = counted(6, dynamics=rule, y=unrolled(used))
        assert read[0][0] == 1
        assert read[0][1] <= 2 * used + 1
        assert read[1:-1] == [(1, used)] * 5


def test_a_rule_that_asks_again_for_more_than_is_kept_reads_twice():
    read, _ = counted(6, dynamics=bl.dynamics.Extragradient(0.01), y=unrolled(90))
    assert read[2:-1] == [(1, 180)] * 4


def test_nested_followers_read_once():
    loaders = {name: Counted(Rows(), batch_size=2, shuffle=True) for name in "xyz"}

    def loss(other, own, batch):
        return (own - other - 0.01 * batch.mean()).square()

    game = bl.Game(
        x=bl.Player(lambda x, y, z, batch: loss(y, x, batch) + z, torch.tensor(0.0), loaders["x"]),
        y=bl.Player(lambda x, y, z, batch: loss(x, y, batch) + z.square(), torch.tensor(0.0), loaders["y"]),
        z=bl.Player(lambda x, y, z, batch: loss(x + y, z, batch), torch.tensor(0.0), loaders["z"]),
    )
    read, last = [], dict.fromkeys(loaders, 0)

    def note(*_):
        now = {name: loader.dataset.read // 2 for name, loader in loaders.items()}
        read.append(tuple(now[name] - last[name] for name in now))
        last.update(now)

    bl.solve(game, steps=5, callbacks=[note], y=unrolled(3), z=unrolled(2))
    assert read[1:] == [(1, 3, 2)] * 4


def test_solve_leaves_no_workers():
    others = set(multiprocessing.active_children())
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=2, num_workers=1, persistent_workers=True)
    game = bl.Game(w=bl.Player(lambda w, batch: (w - batch[0]).square().sum(), torch.zeros(()), data=loader))
    bl.solve(game, steps=3)
    assert not children(others)
    with pytest.raises(ZeroDivisionError):
        bl.solve(game, steps=3, callbacks=[lambda *_: 1 // 0])
    assert not children(others)


@pytest.mark.parametrize("persistent", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_with_workers_resumes_bit_for_bit(persistent, tmp_path):
    def make():
        loader = DataLoader(Augmented(), batch_size=2, shuffle=True, num_workers=2, persistent_workers=persistent)
        start = torch.zeros(4, dtype=torch.float64)
        return bl.Game(
            x=bl.Player(lambda x, y, batch: (y - batch.mean(0)).square().sum() + (x - 1).square().sum(), start, loader),
            y=bl.Player(lambda x, y, batch: (y - x * batch.mean(0)).square().sum(), start, loader),
        )

    whole = bl.solve(make(), steps=9, y=unrolled(3))
    bl.solve(make(), steps=4, y=unrolled(3), checkpoint=tmp_path / "run")
    rest = bl.solve(make(), steps=9, y=unrolled(3), checkpoint=tmp_path / "run")
    assert torch.equal(whole.variables["x"], rest.variables["x"])
    assert torch.equal(whole.variables["y"], rest.variables["y"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_data_made_on_a_gpu_have_numbers_of_their_own_there():
    device = torch.device("cuda", 0)

    def make():
        for _ in range(4):
            yield torch.rand(2, device=device)

    whole, _ = draws(Stream("w", make, device), Stream.start(3), 11)
    stream, position = Stream("w", make, device), Stream.start(3)
    for wanted in whole:
        torch.rand(5, device=device)
        before = torch.cuda.get_rng_state(device)
        (batch,), position = draws(stream, position, 1)
        assert batch == wanted
        assert torch.equal(before, torch.cuda.get_rng_state(device))
    _, position = draws(stream, Stream.start(3), 6)
    assert draws(Stream("w", make, device), position, 5)[0] == whole[6:]

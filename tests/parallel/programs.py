"""What the ranks of a test do: each program prints lines of JSON."""

import gc
import json
import os
import warnings
from contextlib import nullcontext
from functools import partial

import torch
import torch.utils.checkpoint
from torch import distributed as dist
from torch.optim import LBFGS, SGD, Adam
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bilevel as bl
from bilevel.extend import leaves
from bilevel.game.shards import MeshPeers
from bilevel.inner import TorchOptimizer
from bilevel.linear import (
    AdamPreconditioner,
    BlockDiagonal,
    Dense,
    Diagonal,
    Extrapolated,
    HypergradientTolerance,
    Identity,
    LBFGSPreconditioner,
    NystromPreconditioner,
    Recycled,
)  # fmt: skip
from bilevel.sharding import Layout, ShardedTensor
from bilevel.sharding.tensor import Form
from bilevel.sharding.unsharded import Unsharded

# Those that torchrun starts; `play` says it to the others.
RANK, SIZE = map(int, os.environ.get("RANK_OF_TEST", "0/1").split("/"))


def tell(**found):
    print(json.dumps(found), flush=True)


def drawn(rows, width, seed):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Seven and five examples: no number of ranks between two and four deals them out evenly.
TRAIN, TARGET = drawn(7, 4, 1), drawn(7, 1, 2)[:, 0].sign()
VALID, WANTED = drawn(5, 4, 3), drawn(5, 1, 4)[:, 0].sign()


def logistic(weights, batch):
    inputs, targets = batch
    return torch.nn.functional.softplus(-targets * (inputs @ weights["w"] + weights["b"])).mean()


def fit(decay, weights, batch):
    return logistic(weights, batch) + 0.5 * (decay.exp() * weights["w"].square()).sum() + 0.05 * weights["b"] ** 2


def judge(weights, batch):
    return logistic(weights, batch)


def make(train=((TRAIN, TARGET),), valid=((VALID, WANTED),), **changed):
    start = {"w": torch.zeros(4, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    players = {
        "decay": bl.Player(judge, torch.full((4,), -1.0, dtype=torch.float64), data=list(valid)),
        "weights": bl.Player(fit, start, data=list(train)),
    } | changed
    return bl.Game(**players)


SGD_STEPS = partial(SGD, lr=0.5, momentum=0.5)
OPTIMUM = partial(LBFGS, lr=1.0, max_iter=40, tolerance_grad=1e-13, line_search_fn="strong_wolfe")
RESPONSES = {
    "ReverseMode": bl.Unrolled(SGD_STEPS, steps=6),
    "Adam": bl.Unrolled(partial(Adam, lr=0.1), steps=6),
    "Segments": bl.Unrolled(SGD_STEPS, steps=6, differentiation=bl.Segments()),
    "ForwardMode": bl.Unrolled(SGD_STEPS, steps=6, differentiation=bl.ForwardMode()),
    "tuned rate": bl.Unrolled(lambda params, decay: SGD(params, lr=0.1 * decay.exp().sum()), steps=3),
    "accumulated": bl.Unrolled(TorchOptimizer(SGD_STEPS, accumulate=2, clip_norm=0.3), steps=4),
    "ConjugateGradient": bl.Implicit(OPTIMUM, linear_solver=bl.ConjugateGradient()),
    "GMRES": bl.Implicit(OPTIMUM, linear_solver=bl.GMRES()),
    "Neumann": bl.Implicit(OPTIMUM, linear_solver=bl.Neumann(max_steps=200)),
    "Nystrom": bl.Implicit(OPTIMUM, linear_solver=bl.Nystrom(rank=5, damping=1e-3)),
    "Dense": bl.Implicit(OPTIMUM, linear_solver=Dense()),
    "Identity": bl.Implicit(OPTIMUM, linear_solver=Identity()),
    "Extrapolated": bl.Implicit(OPTIMUM, linear_solver=Extrapolated(bl.ConjugateGradient())),
    "Diagonal": bl.Implicit(OPTIMUM, linear_solver=bl.ConjugateGradient(preconditioner=Diagonal())),
    "BlockDiagonal": bl.Implicit(OPTIMUM, linear_solver=bl.ConjugateGradient(preconditioner=BlockDiagonal())),
    "NystromPreconditioner": bl.Implicit(
        OPTIMUM, linear_solver=bl.ConjugateGradient(preconditioner=NystromPreconditioner(rank=2))
    ),
    "Recycled": bl.Implicit(OPTIMUM, linear_solver=bl.ConjugateGradient(preconditioner=Recycled())),
    "AdamPreconditioner": bl.Implicit(
        partial(Adam, lr=0.1), steps=150, tolerance=None,
        linear_solver=bl.ConjugateGradient(preconditioner=AdamPreconditioner()),
    ),
    "LBFGSPreconditioner": bl.Implicit(
        OPTIMUM, linear_solver=bl.ConjugateGradient(preconditioner=LBFGSPreconditioner())
    ),
    "HypergradientTolerance": bl.Implicit(
        OPTIMUM, linear_solver=bl.ConjugateGradient(stopping=HypergradientTolerance(1e-6))
    ),
    "Scipy": bl.Implicit(bl.Scipy("L-BFGS-B")),
    # Steps of fixed size: LBFGS stops by what rounding leaves. One ulp in the data moves a nudged LBFGS's hypergradient
    # by 2.5e-4 in one process, as much as two ranks do; with SGD by 3e-14.
    "Hypernetwork": bl.Hypernetwork(partial(SGD, lr=0.1), steps=5, tolerance=None),
    "Nudged": bl.Nudged(SGD_STEPS, steps=20, nudge=1e-2, tolerance=None),
    "SingleLoop": bl.SingleLoop(partial(SGD, lr=0.3)),
    # Points so far apart that rounding, divided by their distance, stays below the tolerance.
    "LastStep": bl.responses.LastStep(SGD_STEPS, steps=3, distance=1e-3),
    "LastStep, fitted": bl.responses.LastStep(SGD_STEPS, steps=3, distance=1e-3, fitted=True),
    "LastStep, Adam": bl.responses.LastStep(partial(Adam, lr=0.1), steps=3, distance=1e-3, fitted=True),
}  # fmt: skip


def hypergradients(game, response, calls=3):
    """The hypergradient of some calls, and the state after them."""
    state, decay, found = response.init(game), game.initial("decay"), []
    position = game.start("decay")
    for _ in range(calls):
        x = decay.clone().requires_grad_()
        weights, after = response(game, {"decay": x}, state)
        batch, position = game.draw("decay", position)
        loss = game.loss("decay", {"decay": x, "weights": weights}, batch)
        (slope,) = torch.autograd.grad(loss, x)
        state = response.after_backward(after, weights)
        decay = decay - 0.5 * slope
        found.append(slope)
    return torch.stack(found), state


def same_bits(shared, tree):
    """Whether all ranks hold the same."""
    own = [leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves(tree)]
    return len({repr(each) for each in shared.ranks.everybodys(own)}) == 1


def dealt_out(names, play):
    """What one process gives for each name: every rank finds some, and tells them to the others."""
    with bl.extend.separate_ranks(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = {}
        for name in list(names)[RANK::SIZE]:
            torch.manual_seed(0)
            own[name] = play(name)
    all_of_them = [None] * SIZE
    dist.all_gather_object(all_of_them, own)
    return {name: found for some in all_of_them for name, found in some.items()}


def answers(*names):
    names = names or RESPONSES
    alone = dealt_out(names, lambda name: hypergradients(make(), RESPONSES[name])[0])
    shared = bl.DataParallel(timeout=60.0).game(make())
    for name in names:
        one = alone[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            before = shared.ranks.bytes, shared.ranks.reductions
            many, state = hypergradients(shared, RESPONSES[name])
        tell(
            response=name,
            error=float((one - many).norm() / one.norm()),
            same=same_bits(shared, (many, state)),
            sent=shared.ranks.bytes - before[0],
            reductions=shared.ranks.reductions - before[1],
        )


class InTurn:
    """The batches that ranks read by their DistributedSamplers, put together again, pass by pass."""

    def __init__(self, data, size, rows):
        self.data, self.rows = data, rows
        self.samplers = [DistributedSampler(data, size, rank, seed=5) for rank in range(size)]

    def set_epoch(self, epoch):
        for sampler in self.samplers:
            sampler.set_epoch(epoch)

    def __iter__(self):
        places = [torch.tensor(list(sampler)).split(self.rows) for sampler in self.samplers]
        return iter([self.data[torch.cat(parts)] for parts in zip(*places, strict=True)])


def weighted(importance, weights, batch):
    inputs, targets, places = batch
    each = torch.nn.functional.softplus(-targets * (inputs @ weights["w"] + weights["b"]))
    return (importance[places].exp() * each).mean() + 0.1 * weights["w"].square().sum() + 0.05 * weights["b"] ** 2


def solves():
    """Games solved together and by one process each."""
    data = TensorDataset(TRAIN, TARGET)
    examples = bl.Player(judge, torch.zeros(7, dtype=torch.float64), data=[(VALID, WANTED)])
    with_places = [(TRAIN, TARGET, torch.arange(7))]
    begin = {"w": torch.zeros(4, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}

    def sampled(together):
        own = DataLoader(data, 2, sampler=DistributedSampler(data, seed=5)) if together else None
        return own or InTurn(data, SIZE, 2)

    games = {
        "list": (lambda _: make(), {}),
        # Batches of 3, 3 and 1: the last has a row for one rank alone.
        "shuffled": (lambda _: make(weights=bl.Player(fit, begin, data=DataLoader(data, 3, shuffle=True))), {}),
        "sampled": (lambda together: make(weights=bl.Player(fit, begin, data=sampled(together))), {}),
        "weight per example": (
            lambda _: bl.Game(importance=examples, weights=bl.Player(weighted, begin, data=with_places)),
            {},
        ),
        "dynamics": (lambda _: make(), {"dynamics": bl.dynamics.Extragradient(0.1)}),
    }  # fmt: skip
    for name, (game, options) in games.items():
        play = partial(bl.solve, steps=6, seed=3, weights=bl.Unrolled(SGD_STEPS, steps=2, tolerance=None), **options)
        with bl.extend.separate_ranks():
            one = play(game(False))
        seen = []
        many = play(game(True), parallel=bl.DataParallel(timeout=60.0), callbacks=[lambda *told: seen.append(told)])
        (leader, _) = one.variables
        told = many.history[-1]
        tell(
            game=name,
            error=float((one.variables[leader] - many.variables[leader]).norm() / one.variables[leader].norm()),
            steps=len(seen),
            communicated=told["communicated"],
            reductions=told["reductions"],
            values=abs(one.values["weights"] - many.values["weights"]),
        )


def drops():
    """A loss with dropout: what each rank drops, and whether the ranks end alike."""
    masks = []

    def dropped(decay, weights, batch):
        kept = torch.nn.functional.dropout(torch.ones_like(batch[0]), 0.5)
        masks.append(kept.detach().sum(1).tolist())
        return fit(decay, weights, (batch[0] * kept, batch[1]))

    begin = {"w": torch.zeros(4, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    data = [(torch.cat([TRAIN, TRAIN[:1]]), torch.cat([TARGET, TARGET[:1]]))]  # four rows a rank
    solution = PLAY(make(weights=bl.Player(dropped, begin, data=data)), steps=3, parallel=bl.DataParallel(timeout=60.0))
    tell(masks=masks[-8:], decay=solution.variables["decay"].tolist())


PLAY = partial(bl.solve, weights=bl.Unrolled(SGD_STEPS, steps=2, tolerance=None))


def told(play):
    """The error that a call raises, as its kind and its text."""
    try:
        play()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["nothing", ""]


def disagree():
    """Each case differs on the last rank."""
    odd = RANK == SIZE - 1
    together = bl.DataParallel(timeout=60.0)
    response = bl.Unrolled(SGD_STEPS, steps=3 if odd else 2, tolerance=None)
    begin = {"w": torch.full((4,), float(odd), dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    zeros = {"w": torch.zeros(4, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    halves = [(TRAIN[:4], TARGET[:4]), (TRAIN[4:], TARGET[4:])]

    class Passes:
        """Two batches a pass; on the odd rank the second cannot be read, which comes up in the middle of a step."""

        def __iter__(self):
            yield TRAIN, TARGET
            if odd:
                raise OSError("the disk has gone")
            yield TRAIN, TARGET

    def summed(decay, weights, batch):
        return fit(decay, weights, batch) * (len(batch[0]) if odd else 1)

    cases = {
        "response": lambda: PLAY(make(), steps=2, parallel=together, weights=response),
        "steps": lambda: PLAY(make(), steps=2 + odd, parallel=together),
        "start": lambda: together.game(make(weights=bl.Player(fit, begin, data=halves))),
        "length": lambda: together.game(make(train=halves[: 2 - odd])),
        "batch": lambda: together.game(make(train=[(TRAIN + odd, TARGET)])),
        "players": lambda: together.game(one_player("other" if odd else "decay")),
        "loss": lambda: together.game(make(weights=bl.Player(summed, zeros, data=halves))),
        "data": lambda: PLAY(make(weights=bl.Player(fit, zeros, data=Passes())), steps=3, parallel=together),
    }  # fmt: skip
    for case, play in cases.items():
        kind, text = told(play)
        tell(case=case, kind=kind, text=text)
    torch.manual_seed(RANK)
    kind, text = told(lambda: together.game(make()))
    tell(case="numbers", kind=kind, text=text)
    torch.manual_seed(0)
    if odd:
        bl.parallel.agreement.__version__ = "0.0.0"
    kind, text = told(lambda: together.game(make()))
    tell(case="version", kind=kind, text=text)


class Drops(torch.nn.Module):
    """A layer that drops out in training, by a share that is no parameter."""

    def __init__(self, share):
        super().__init__()
        torch.manual_seed(1)
        self.head, self.drop = torch.nn.Linear(4, 1).double(), torch.nn.Dropout(share)

    def forward(self, inputs):
        return self.head(self.drop(inputs))


def times(factor):
    return lambda decay, weights, batch: factor * fit(decay, weights, batch)


def disagree_further(folder):
    """Each case differs on the last rank, in what a start and a first batch do not show."""
    odd = RANK == SIZE - 1
    together = bl.DataParallel(timeout=20.0)
    zeros = {"w": torch.zeros(4, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    two, other = [(TRAIN, TARGET), (TRAIN + 1, TARGET)], [(TRAIN, TARGET), (TRAIN + 1 + odd, TARGET)]
    longer = [(TRAIN, TARGET), (TRAIN[: 7 - odd], TARGET[: 7 - odd])]

    def player(loss=fit, init=zeros, data=((TRAIN, TARGET),), **options):
        return bl.Player(loss, init, data=list(data), **options)

    def module(share):
        def loss(weights, decay, batch):
            return (weights(batch[0])[:, 0] - batch[1]).square().mean() + bl.penalty(weights, decay.exp().mean())

        def judged(weights, batch):
            return (weights(batch[0])[:, 0] - batch[1]).square().mean()

        leader = bl.Player(judged, torch.full((4,), -1.0, dtype=torch.float64), data=[(VALID, WANTED)])
        return make(decay=leader, weights=bl.Player(loss, Drops(share), data=[(TRAIN, TARGET)]))

    def frozen():
        made = Drops(0.1)
        made.head.bias.requires_grad_(not odd)
        return bl.Player(lambda weights, batch: weights(batch[0]).square().mean(), made, data=[(TRAIN, TARGET)])

    def determined():
        torch.use_deterministic_algorithms(odd)
        try:
            return together.game(make())
        finally:
            torch.use_deterministic_algorithms(False)

    def threads():
        torch.set_num_threads(1 + odd)
        try:
            return together.game(make())
        finally:
            torch.set_num_threads(1)

    def within(start=None, **options):
        x = bl.Player(lambda y: (y - 3.0).square().sum(), torch.ones(2) if start is None else start)
        return bl.Game(x=x, y=bl.Player(lambda y, x: (y - x).square().sum(), torch.ones(2), **options))

    def over(limit):
        return within(inequality=lambda y: y.sum() - limit)

    slow = bl.Unrolled(partial(SGD, lr=0.4 if odd else 0.5), steps=2, tolerance=None)
    exact = bl.Implicit(SGD_STEPS, steps=2, tolerance=None)
    turned = bl.dynamics.Extragradient(0.1) if odd else bl.dynamics.Alternating()
    play = partial(PLAY, steps=4, parallel=together)
    cases = {
        "rate": lambda: play(make(), weights=slow),
        "kind": lambda: play(make(), **({"weights": exact} if odd else {})),
        "captured": lambda: play(make(weights=player(times(1.0 + odd)))),
        "leader": lambda: play(make(), optimizer=partial(SGD, lr=0.1 + odd)),
        "dynamics": lambda: bl.solve(make(), steps=2, parallel=together, dynamics=turned),
        "seed": lambda: play(make(), seed=int(odd)),
        "clipped": lambda: play(make(), clip_norm=1.0 + odd),
        "dtype": lambda: together.game(one_player("decay", torch.float32 if odd else torch.float64)),
        "frozen": lambda: together.game(bl.Game(weights=frozen())),
        "dropout": lambda: play(module(0.5 if odd else 0.1)),
        "coupled": lambda: bl.DataParallel(coupled=bool(odd), timeout=20.0).game(make()),
        "sharded": lambda: bl.DataParallel(sharded=bool(odd), timeout=20.0).game(make()),
        "examples": lambda: bl.DataParallel(
            examples=(lambda batch: 2 * len(batch[0])) if odd else None, timeout=20.0
        ).game(make()),
        "limit": lambda: bl.DataParallel(timeout=20.0 + odd).game(make()),
        "checkpoint": lambda: play(make(), checkpoint=f"{folder}/run.pt" if odd else None),
        "second batch": lambda: play(make(weights=player(data=other if odd else two))),
        "second length": lambda: play(make(weights=player(data=longer))),
        "Games": lambda: together.game(games() if odd else make()),
        "Tasks": lambda: together.game(tasks_game(SINES) if odd else make()),
        "deterministic": determined,
        "threads": threads,
        "domain": lambda: together.game(within(domain=bl.Box(0.0, 1.0 + odd))),
        "no domain": lambda: together.game(within(domain=None if odd else bl.Simplex(2.0))),
        "walls": lambda: together.game(within(domain=bl.Box(0.0, torch.ones(2) + odd))),
        "prox": lambda: together.game(within(prox=bl.constraints.L1(0.1 + odd))),
        "range": lambda: together.game(within(bl.Log(0.1, 2.0 + odd, start=1.0))),
        "inequality": lambda: bl.solve(over(1.0 + odd), y=exact, steps=1, parallel=together),
    }  # fmt: skip
    for case, play_it in cases.items():
        kind, text = told(play_it)
        tell(case=case, kind=kind, text=text)


def one_player(name, dtype=torch.float32):
    if name == "other":
        return bl.Game(other=bl.Player(lambda other: other.square().sum(), torch.ones(2)))
    return bl.Game(decay=bl.Player(lambda decay: decay.square().sum(), torch.ones(2, dtype=dtype)))


def runs(path, timeout):
    """Plays until it is stopped, and says when it has begun."""
    game = make()
    try:
        PLAY(
            game,
            steps=100_000,
            checkpoint=path,
            checkpoint_every=2,
            parallel=bl.DataParallel(timeout=float(timeout)),
            callbacks=[lambda step, *_: tell(step=step) if step == 5 else None],
        )
    except bl.errors.ParallelError as error:
        tell(error=str(error))


def resumes(path, steps):
    """Goes on from a checkpoint, if there is one; alone without parallel=."""
    options = {} if SIZE == 1 else {"parallel": bl.DataParallel(timeout=60.0)}
    loader = DataLoader(TensorDataset(TRAIN, TARGET), 3, shuffle=True)
    begin = {"w": torch.zeros(4, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    game = make(weights=bl.Player(fit, begin, data=loader))
    solution = PLAY(game, steps=int(steps), checkpoint=path or None, **options)
    tell(decay=solution.variables["decay"].tolist(), steps=len(solution.history))


# Modules that are not plain ------------------------------------------------------------------------------------------


class Attends(torch.nn.Module):
    """Fused attention over pairs of features, within each example."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.query, self.head = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    def forward(self, inputs):
        parts = self.query(inputs).reshape(-1, 1, 2, 2)
        return self.head(torch.nn.functional.scaled_dot_product_attention(parts, parts, parts).reshape(-1, 4))


class Quantises(torch.nn.Module):
    """A layer whose weight is rounded to eighths, with the straight-through gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.head = torch.nn.Linear(4, 1)

    def forward(self, inputs):
        weight = torch.fake_quantize_per_tensor_affine(self.head.weight, 0.125, 0, -128, 127)
        return torch.nn.functional.linear(inputs, weight, self.head.bias)


def modules():
    """Each kind of module on these ranks and in one process; or what it is refused with."""
    plain = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    half = partial(torch.autocast, "cpu", dtype=torch.bfloat16)

    def made(model, around, run):
        def judge(weights, batch):
            inputs, targets = batch
            with around():
                return (run(weights, inputs)[:, 0] - targets).float().square().mean()

        def fit(decay, weights, batch):
            return judge(weights, batch) + bl.penalty(weights, decay.exp())

        train, valid = [[(x.float(), y.float())] for x, y in ((TRAIN, TARGET), (VALID, WANTED))]
        return bl.Game(
            decay=bl.Player(judge, torch.tensor(-1.0), data=valid), weights=bl.Player(fit, model, data=train)
        )

    def again(y, inputs):
        return torch.utils.checkpoint.checkpoint(y, inputs, use_reentrant=False)

    def called(y, inputs):
        return y(inputs)

    cases = {
        "autocast": (plain, half, called),
        "compiled": (torch.compile(plain, backend="eager"), nullcontext, called),
        "attention": (Attends(), nullcontext, called),
        "fake quantisation": (Quantises(), nullcontext, called),
        "checkpoint": (plain, nullcontext, again),
        "BatchNorm": (torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)), nullcontext, called),
    }
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=3, tolerance=None)
    for name, case in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                with bl.extend.separate_ranks():
                    one, _ = hypergradients(made(*case), response)
                many, _ = hypergradients(bl.DataParallel(timeout=60.0).game(made(*case)), response)
                tell(case=name, error=float((one - many).norm() / one.norm()), text="")
            except (ValueError, TypeError, bl.errors.BilevelError) as error:
                tell(case=name, error=0.0, text=str(error))


# Variables that are spread over the ranks ----------------------------------------------------------------------------

INPUTS, LABELS = drawn(9, 5, 5), torch.tensor([0, 1, 2, 0, 1, 0, 0, 2, 1])
HELD, HELD_LABELS = drawn(7, 5, 6), torch.arange(7) % 3


def net():
    """Layers whose rows no number of ranks from two to four deals out evenly."""
    torch.manual_seed(1)
    layers = torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)
    return torch.nn.Sequential(*layers).double()


def fit_net(decay, weights, batch):
    inputs, labels = batch
    return torch.nn.functional.cross_entropy(weights(inputs), labels) + bl.penalty(weights, 2.0 * decay.exp())


def judge_net(weights, batch):
    inputs, labels = batch
    return torch.nn.functional.cross_entropy(weights(inputs), labels)


def net_game(module):
    return bl.Game(
        decay=bl.Player(judge_net, torch.tensor(-3.0, dtype=torch.float64), data=[(HELD, HELD_LABELS)]),
        weights=bl.Player(fit_net, module, data=[(INPUTS, LABELS)]),
    )


def mesh():
    return torch.distributed.device_mesh.init_device_mesh("cpu", (SIZE,))


def fully_sharded():
    from torch.distributed.fsdp import fully_shard

    module = net()
    for part in (module[0], module[2], module):
        fully_shard(part, mesh=mesh())
    return module


def tensor_parallel():
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(net(), mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})


def partly():
    """One weight is a DTensor, cut along its columns; the others each rank holds whole."""
    from torch.distributed.tensor import Shard, distribute_tensor

    start = dict(net().named_parameters())
    return {**start, "2.weight": distribute_tensor(start["2.weight"].detach(), mesh(), [Shard(1)])}


def called(weights, batch):
    return torch.func.functional_call(net().to("meta"), dict(weights), batch)


def fit_tree(decay, weights, batch):
    inputs, labels = batch
    loss = torch.nn.functional.cross_entropy(called(weights, inputs), labels)
    return loss + bl.penalty(weights, 2.0 * decay.exp())


def judge_tree(weights, batch):
    inputs, labels = batch
    return torch.nn.functional.cross_entropy(called(weights, inputs), labels)


def tree_game(tree):
    return bl.Game(
        decay=bl.Player(judge_tree, torch.tensor(-3.0, dtype=torch.float64), data=[(HELD, HELD_LABELS)]),
        weights=bl.Player(fit_tree, tree, data=[(INPUTS, LABELS)]),
    )


PLAIN_SGD = partial(SGD, lr=0.3)


def on_parts(linear_solver):
    inner = partial(SGD, lr=0.3, momentum=0.5)
    return bl.Implicit(inner, steps=20, tolerance=None, linear_solver=linear_solver)


ON_PARTS = {
    "ReverseMode": bl.Unrolled(partial(SGD, lr=0.3, momentum=0.5), steps=4),
    "Adam": bl.Unrolled(partial(Adam, lr=0.05), steps=4),
    "clipped": bl.Unrolled(TorchOptimizer(PLAIN_SGD, clip_norm=0.1), steps=4),
    "Segments": bl.Unrolled(PLAIN_SGD, steps=4, differentiation=bl.Segments(count=2)),
    "Nudged": bl.Nudged(PLAIN_SGD, steps=10, nudge=1e-2, tolerance=None),
    "SingleLoop": bl.SingleLoop(PLAIN_SGD),
    # Few steps of LBFGS and of fixed size: when it stops by itself, or a line search does, rounding decides.
    "LBFGS": bl.Implicit(partial(LBFGS, lr=0.3, max_iter=4), steps=3, tolerance=None, linear_solver=Identity()),
    # Damped, for the network is at no optimum.
    "ConjugateGradient": on_parts(bl.ConjugateGradient(damping=1.0)),
    "Diagonal": on_parts(bl.ConjugateGradient(damping=1.0, preconditioner=Diagonal())),
    "Neumann": on_parts(bl.Neumann(max_steps=20, damping=1.0)),
}


def compared(one, shared, response):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        many, state = hypergradients(shared, response)
    return float((one - many).norm() / one.norm()), same_bits(shared, many), state


def spread_answers(*names):
    names = names or ON_PARTS
    alone = dealt_out(names, lambda name: hypergradients(net_game(net()), ON_PARTS[name])[0])
    shared = bl.DataParallel(timeout=60.0).game(net_game(fully_sharded()))
    for name in names:
        error, same, state = compared(alone[name], shared, ON_PARTS[name])
        held = sum(leaf.numel() for leaf in leaves(state["variables"]))
        tell(response=name, error=error, same=same, held=held)


def small_game(cut, spare=False):
    """Weights of three rows: of four ranks the last holds nothing at all. No loss of the leader's names `spare`."""
    start = {"w": 0.3 * drawn(3, 5, 71), "b": torch.zeros(3, dtype=torch.float64)}
    start |= {"spare": drawn(2, 3, 72)} if spare else {}
    if cut:
        from torch.distributed.tensor import Shard, distribute_tensor

        start |= {name: distribute_tensor(start[name], mesh(), [Shard(0)]) for name in start if name != "b"}

    def judge(weights, batch):
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(inputs @ weights["w"].T + weights["b"], labels)

    def fit(decay, weights, batch):
        return judge(weights, batch) + bl.penalty(weights, 2.0 * decay.exp())

    leader = bl.Player(judge, torch.tensor(-3.0, dtype=torch.float64), data=[(HELD, HELD_LABELS)])
    return bl.Game(decay=leader, weights=bl.Player(fit, start, data=[(INPUTS, LABELS)]))


def spread_small(*names, spare=False):
    alone = dealt_out(names, lambda name: hypergradients(small_game(False, spare), ON_PARTS[name])[0])
    torch.manual_seed(0)
    shared = bl.DataParallel(timeout=60.0).game(small_game(True, spare))
    for name in names:
        error, same, state = compared(alone[name], shared, ON_PARTS[name])
        held = sum(leaf.numel() for leaf in leaves(state["variables"]))
        tell(response=name, error=error, same=same, held=held)


def spread_spare(*names):
    spread_small(*names, spare=True)


def spread_keeps(*names):
    """How many parts are alive after a call, and after five more: a graph that holds itself would keep its own."""
    shared = bl.DataParallel(timeout=60.0).game(net_game(fully_sharded()))
    for name in names:
        counts, state = [], ON_PARTS[name].init(shared)
        for _ in range(6):
            x = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
            answer, state = ON_PARTS[name](shared, {"decay": x}, state)
            batch, _ = shared.draw("decay", shared.start("decay"))
            shared.loss("decay", {"decay": x, "weights": answer}, batch).backward()
            state = ON_PARTS[name].after_backward(state, answer)
            del answer
            gc.collect()
            counts.append(sum(isinstance(found, ShardedTensor) for found in gc.get_objects()))
        tell(response=name, first=counts[1], last=counts[-1])


def spread_layouts():
    one = dealt_out(["ReverseMode"], lambda name: hypergradients(net_game(net()), ON_PARTS[name])[0])["ReverseMode"]
    games = {"tensor parallel": lambda: net_game(tensor_parallel()), "partly": lambda: tree_game(partly())}
    for name, made in games.items():
        shared = bl.DataParallel(timeout=60.0).game(made())
        error, same, _ = compared(one, shared, ON_PARTS["ReverseMode"])
        tell(response=name, error=error, same=same)


BY_ENTRY = {  # a function of a part, and whether the whole is gathered for it
    "pow": (lambda w: (w**2).sum() + (2.0**w).mean(), False),
    "exp": (lambda w: (torch.exp(w) * w.abs() / (1.0 + w.square())).sum(), False),
    "sigmoid": (lambda w: (torch.sigmoid(w) - torch.nn.functional.softplus(w)).sum(), False),
    "where": (lambda w: torch.where(w > 0.0, w.exp(), 2.0 * w).clamp(-1.0, 2.0).sum(), False),
    "in place": (lambda w: (w.square().mul_(w) + 1.0).sum(), False),
    "added": (lambda w: torch.zeros(w.shape, dtype=w.dtype).add_(w.exp()).square().sum(), True),
    "dropped": (lambda w: torch.nn.functional.dropout(w, 0.0).square().sum(), True),
    "max": (lambda w: torch.max(w) * w.norm(), True),
    "rows": (lambda w: w.square().sum(0).sqrt().sum(), True),
    "products": (lambda w: (torch.tanh(INPUTS @ w) @ w.T).square().sum() if w.ndim == 2 else w.sum(), True),
}  # fmt: skip


class Counting(MeshPeers):
    """Says how often a whole was put together."""

    gathers = 0

    def parts(self, tensor, sizes):
        Counting.gathers += 1
        return super().parts(tensor, sizes)


def products_of(function, x, v):
    """A value, its gradient, and a product with its Hessian."""
    value = function(x)
    (slope,) = torch.autograd.grad(value, x, create_graph=True)
    curved = torch.autograd.grad(slope, x, v)[0] if slope.requires_grad else torch.zeros_like(v)
    return value.detach(), slope.detach(), curved


def spread_by_entry():
    """Of what each rank computes the same, and of the mean of what each computes."""
    peers = Counting(dist.group.WORLD)
    for name, (function, gathers) in BY_ENTRY.items():
        worst, Counting.gathers = 0.0, 0
        for shape, dim in (((5, 3), 0), ((5, 3), 1), ((2,), 0), ((), 0)):
            layout = Layout(shape, dim, SIZE)
            start, along = (drawn(1, max(1, layout.entries), seed)[0].reshape(shape) for seed in (7, 8))
            one = products_of(function, start.clone().requires_grad_(), along)
            for shared in (False, True):
                own, v = (ShardedTensor(layout.cut(t, RANK), peers, Form((layout,), False)) for t in (start, along))
                share = 1.0 / SIZE if shared else 1.0
                seen = partial(Unsharded, layout=layout, shared=shared)
                many = products_of(lambda part: share * function(seen(part)), own.requires_grad_(), v)
                worst = max(worst, abs(float(many[0] / share - one[0])))
                for whole, part in zip(one[1:], many[1:], strict=True):
                    worst = max(worst, *(layout.cut(whole, RANK) - part.local).abs().reshape(-1).tolist(), 0.0)
        tell(case=name, error=worst, gathered=Counting.gathers > 0, expected=gathers)
    own = ShardedTensor(layout.cut(start, RANK), peers, Form((layout,), False))
    kind, text = told(lambda: Unsharded(own, layout, True).fill_(0.0))
    tell(case="written", kind=kind, text=text)


def whole(tree):
    return [leaf.full_tensor() if hasattr(leaf, "full_tensor") else leaf for leaf in leaves(tree)]


def spread_solves(path):
    """By a response, and two networks at once."""
    with bl.extend.separate_ranks():
        one = PLAY_NET(net_game(net()), steps=4)
        duel = bl.solve(adversaries(net(), net()), steps=4, optimizer=PLAIN)
    many = PLAY_NET(net_game(fully_sharded()), steps=4, parallel=bl.DataParallel(timeout=60.0))
    parallel = bl.DataParallel(timeout=60.0)
    both = bl.solve(adversaries(fully_sharded(), fully_sharded()), steps=4, optimizer=PLAIN, parallel=parallel)
    for name, first, second in (("response", one, many), ("simultaneous", duel, both)):
        pairs = list(zip(whole(first.variables), whole(second.variables), strict=True))
        tell(
            case=name,
            error=max(float((a - b).norm() / a.norm()) for a, b in pairs),
            values=max(abs(first.values[n] - second.values[n]) for n in first.values),
            kinds=sorted({type(leaf).__name__ for leaf in leaves(second.variables)}),
        )


# Adam divides a gradient by its own size, and one that is nearly 0 by rounding: plain steps keep errors as they are.
PLAIN = partial(torch.optim.SGD, lr=0.1)


def adversaries(first, second):
    def lead(first, second, batch):
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(first(inputs) - second(inputs), labels)

    def follow(first, second, batch):
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(second(inputs) + 0.1 * first(inputs), 2 - labels)

    return bl.Game(
        first=bl.Player(lead, first, data=[(INPUTS, LABELS)]),
        second=bl.Player(follow, second, data=[(HELD, LABELS[:7])]),
    )


def PLAY_NET(game, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bl.solve(game, weights=ON_PARTS["Adam"], **options)


def spread_resumes(path, steps):
    options = {} if SIZE == 1 else {"parallel": bl.DataParallel(timeout=60.0)}
    game = net_game(net() if SIZE == 1 else fully_sharded())
    solution = PLAY_NET(game, steps=int(steps), checkpoint=path or None, **options)
    weights = torch.cat([leaf.reshape(-1) for leaf in whole(solution.variables["weights"])])
    tell(decay=float(solution.variables["decay"]), weights=weights.tolist(), steps=len(solution.history))


def spread_refusals():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    def told(case, make):
        try:
            made = make()
        except (ValueError, TypeError, bl.errors.BilevelError) as error:
            tell(case=case, text=str(error), kind=type(error).__name__)
        else:
            tell(case=case, text="", kind="", made=str(type(made).__name__))

    def square(y):
        return y.square().sum()

    grid = init_device_mesh("cpu", (1, SIZE), mesh_dim_names=("a", "b"))
    cut = distribute_tensor(torch.ones(4, 2), grid, [Shard(0), Shard(1)])
    one = distribute_tensor(torch.ones(4, 2), mesh(), [Shard(0)])
    half = fully_shard(net(), mesh=mesh(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    gathered = fully_sharded()
    gathered.unshard()
    for part in (gathered[0], gathered[2]):
        part.unshard()
    told("mesh", lambda: bl.Game(y=bl.Player(square, cut)))
    told("domain", lambda: bl.Game(y=bl.Player(square, one, domain=bl.Box(0.0, 2.0))))
    told("policy", lambda: net_game(half))
    told("gathered", lambda: net_game(gathered))
    game = net_game(fully_sharded())
    told("alone", lambda: bl.solve(game, weights=ON_PARTS["Adam"], steps=1))
    shared = bl.DataParallel(timeout=60.0).game(game)
    for name, response in {
        "Hypernetwork": bl.Hypernetwork(PLAIN_SGD, steps=1),
        "GMRES": bl.Implicit(PLAIN_SGD, linear_solver=bl.GMRES()),
        "ForwardMode": bl.Unrolled(PLAIN_SGD, steps=1, differentiation=bl.ForwardMode()),
        "Scipy": bl.Implicit(bl.Scipy("L-BFGS-B")),
    }.items():
        told(name, lambda response=response: response.init(shared))
    told("Games", lambda: bl.Games(game, 2))
    # What acts along one dimension of a part would act on this rank's alone.
    weight = shared.initial("weights")["0.weight"]
    told("product", lambda: weight @ weight.T)
    told("beside", lambda: weight + torch.ones(weight.shape, dtype=torch.float64))
    tell(case="sums", text=str(float(weight.square().sum())), kind="")


# Tasks ---------------------------------------------------------------------------------------------------------------

# Batches of 5, 5 and 4 tasks: no number of ranks from two to four deals all of them out evenly.
SINES = [
    {"support": (drawn(n, 6, 10 + n), drawn(n, 6, 20)), "query": (drawn(n, 4, 30), drawn(n, 4, 40))} for n in (5, 4)
]


def curve(weights, inputs):
    return torch.tanh(inputs[:, None] * weights["a"]) @ weights["b"]


def fit_task(meta, task, batch):
    inputs, targets = batch
    return (curve(task, inputs) - targets).square().mean() + 5.0 * sum(
        (task[name] - meta[name]).square().sum() for name in meta
    )


def judge_task(task, batch):
    inputs, targets = batch
    return (curve(task, inputs) - targets).square().mean()


def tasks_game(data, **options):
    start = {"a": drawn(3, 1, 50)[:, 0], "b": drawn(3, 1, 60)[:, 0]}
    task = {"start": lambda meta: meta} if "clients" not in options else {}
    return bl.Tasks(meta=bl.Player(judge_task, start), task=bl.Player(fit_task, start, **task), data=data, **options)


def tasks():
    numbered = [
        {**batch, "client": (torch.arange(len(batch["query"][0])) + 2 * place) % 6} for place, batch in enumerate(SINES)
    ]
    cases = {
        "maml": (SINES, {}, bl.Unrolled(partial(SGD, lr=0.05), steps=2)),
        "imaml": (SINES, {}, bl.Implicit(partial(SGD, lr=0.05), steps=200, tolerance=None)),
        "clients": (numbered, {"clients": 6}, bl.Unrolled(partial(SGD, lr=0.05), steps=2)),
    }
    for name, (data, options, response) in cases.items():
        with bl.extend.separate_ranks():
            one = bl.solve(tasks_game(data, **options), task=response, steps=5)
        many = bl.solve(tasks_game(data, **options), task=response, steps=5, parallel=bl.DataParallel(timeout=60.0))
        pairs = [(one.variables["meta"][key], many.variables["meta"][key]) for key in ("a", "b")]
        last = [(one.variables["task"][key], many.variables["task"][key]) for key in ("a", "b")]
        tell(
            case=name,
            error=max(float((a - b).norm() / a.norm()) for a, b in pairs + last),
            values=max(abs(one.values[player] - many.values[player]) for player in one.values),
            history=max(abs(a["meta"] - b["meta"]) for a, b in zip(one.history, many.history, strict=True)),
            worst=max(
                abs(a["task.stationarity.worst"] - b["task.stationarity.worst"])
                for a, b in zip(one.history, many.history, strict=True)
            ),
            sent=many.history[-1]["communicated"],
        )


def few_tasks():
    few = [{part: tuple(leaf[:1] for leaf in SINES[0][part]) for part in ("support", "query")}]
    try:
        bl.solve(tasks_game(few), task=bl.Unrolled(PLAIN_SGD, steps=1), steps=1, parallel=bl.DataParallel(timeout=60.0))
    except bl.errors.ParallelError as error:
        tell(text=str(error))


# Many games ----------------------------------------------------------------------------------------------------------

# Seven: no number of ranks from two to four deals them out evenly. Two batches each, so that followers which end after
# other numbers of steps could end on other batches.
HOMES = [(drawn(7 * 6, 4, seed).reshape(7, 6, 4), drawn(7, 6, seed + 1)) for seed in (70, 72)]
AWAY = [(drawn(7 * 5, 4, 74).reshape(7, 5, 4), drawn(7, 5, 75))]


def miss(weights, batch):
    inputs, targets = batch
    return (inputs @ weights["w"] + weights["b"] - targets).square().mean()


def regularised(decay, weights, batch):
    return miss(weights, batch) + (decay.exp() * weights["w"].square()).sum() + 0.1 * weights["b"].square()


def games(count=7, homes=HOMES, loss=regularised, judged=miss):
    one = [tuple(leaf[0] for leaf in batch) for batch in homes]
    start = {"w": torch.zeros(4, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    game = bl.Game(
        decay=bl.Player(judged, torch.full((4,), -1.0, dtype=torch.float64), data=[tuple(x[0] for x in AWAY[0])]),
        weights=bl.Player(loss, start, data=one),
    )
    begun = {"decay": drawn(7, 4, 76) - 1.0}
    return bl.Games(game, 7, init=begun, data={"decay": AWAY, "weights": homes}).chosen(range(count))


GRADUAL = partial(SGD, lr=0.1)
GAMES = {
    "ReverseMode": (bl.Unrolled(partial(Adam, lr=0.05), steps=4, tolerance=None), {}),
    "Segments": (bl.Unrolled(GRADUAL, steps=4, tolerance=None, differentiation=bl.Segments()), {}),
    "Implicit": (bl.Implicit(GRADUAL, steps=60, tolerance=3e-2), {}),
    # Games end after other numbers of steps, which Adam counts.
    "Adam": (bl.Implicit(partial(Adam, lr=0.05), steps=60, tolerance=3e-2), {}),
    "in turn": (bl.Implicit(partial(LBFGS, lr=0.3, max_iter=4), steps=2, tolerance=None), {}),
    "look-ahead": (bl.Implicit(GRADUAL, steps=60, tolerance=3e-2), {"dynamics": bl.dynamics.Extragradient(0.1)}),
    "clipped": (bl.Unrolled(GRADUAL, steps=3, tolerance=None), {"clip_norm": 1e-3}),
}


def flat_of(tree):
    return torch.cat([leaf.detach().reshape(-1) for leaf in leaves(tree)])


def outcome(run):
    """All the numbers that a run of many games gives."""
    history = [[number for key, number in record.items() if key not in UNTIMED] for record in run.history]
    found = {what: getattr(run, what) for what in ("variables", "values", "stationarity", "residuals")}
    return found | {"history": torch.tensor(history), "states": run.states["weights"]["variables"]}


def games_alike():
    def alone(name):
        response, options = GAMES[name]
        return outcome(bl.solve(games(), weights=response, steps=4, **options))

    ones = dealt_out(GAMES, alone)
    for name, (response, options) in GAMES.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen = []
            many = bl.solve(
                games(), weights=response, steps=4, parallel=bl.DataParallel(timeout=60.0),
                callbacks=[lambda *told: seen.append(told[2]["decay"].tolist())], **options,
            )  # fmt: skip
        errors = {}
        for what, b in outcome(many).items():
            a = ones[name][what]
            if leaves(a):
                errors[what] = float((flat_of(a) - flat_of(b)).norm() / flat_of(a).norm())
        same = seen[-1] == many.variables["decay"].tolist()
        tell(case=name, errors=errors, length=len(many), seen=len(seen), same=same, warnings=len(many.warnings))


def games_in_a_loop():
    """One's own loop: what a rank holds, and what all hold together."""
    with bl.extend.separate_ranks():
        alone = games()
    shared = bl.DataParallel(timeout=60.0).game(games())
    errors = []
    for response in (GAMES["ReverseMode"][0], GAMES["Implicit"][0]):
        slopes = []
        for game in (alone, shared):
            x = game.initial("decay").requires_grad_()
            answer, _ = response(game, {"decay": x}, response.init(game))
            batch, _ = game.draw("decay", game.start("decay"))
            losses = game.loss("decay", {"decay": x, "weights": answer}, batch)
            slopes.append(game.gathered(torch.autograd.grad(losses.sum(), x)[0]))
        errors.append(float((slopes[0] - slopes[1]).norm() / slopes[0].norm()))
    tell(errors=errors, counts=shared.ranks.everybodys([shared.offset, shared.count]), total=shared.undivided.count)


def games_resume(folder, steps):
    """Goes on from checkpoints, if there are some; alone without parallel=."""
    options = {} if SIZE == 1 else {"parallel": bl.DataParallel(timeout=60.0)}
    for name in ("ReverseMode", "Adam", "in turn"):
        path = f"{folder}/{name}.pt" if folder else None
        response, more = GAMES[name]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = bl.solve(games(), weights=response, steps=int(steps), checkpoint=path, **options, **more)
        history = [[number for key, number in record.items() if key not in UNTIMED] for record in found.history]
        tell(case=name, variables=flat_of(found.variables).tolist(), history=history, warnings=found.warnings)


UNTIMED = ("seconds", "communicated", "reductions")


def games_refused():
    odd = RANK == SIZE - 1
    together = bl.DataParallel(timeout=60.0)
    few = GAMES["Implicit"][0]
    learner = bl.Hypernetwork(GRADUAL, steps=1)
    scaled = [(inputs * (1.0 + 50.0 * (torch.arange(7) == 5))[:, None, None], targets) for inputs, targets in HOMES]
    cases = {
        "fewer": lambda: together.game(games(1)),
        "other count": lambda: together.game(games(6 if odd else 7)),
        "other data": lambda: together.game(games(homes=[(x + odd, y) for x, y in HOMES])),
        "other start": lambda: together.game(games().chosen([1, 0, 2]) if odd else games().chosen([0, 1, 2])),
        "response": lambda: bl.solve(games(), weights=few.with_budget(3 + odd), steps=1, parallel=together),
        "Hypernetwork": lambda: bl.solve(games(), weights=learner, steps=1, parallel=together),
        "sharded": lambda: bl.DataParallel(sharded=True, timeout=60.0).game(games()),
        "twice": lambda: together.game(together.game(games())),
        "alone": lambda: bl.solve(games(), weights=few, steps=1),
        "fails": lambda: bl.solve(games(homes=scaled), weights=few, steps=2, parallel=together),
    }  # fmt: skip
    for case, play in cases.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind, text = told(play)
        tell(case=case, kind=kind, text=text)


def games_drop():
    """Dropout: games draw each for itself, and the ranks stay together."""
    masks = []

    def dropped(decay, weights, batch):
        kept = torch.nn.functional.dropout(torch.ones_like(batch[0]), 0.5)
        masks.append(1)
        return regularised(decay, weights, (batch[0] * kept, batch[1]))

    response = bl.Implicit(GRADUAL, steps=30, tolerance=1e-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solution = bl.solve(games(loss=dropped), weights=response, steps=3, parallel=bl.DataParallel(timeout=60.0))
    tell(decay=solution.variables["decay"].tolist(), steps=len(solution.history))


def play(rank, size, folder, name, *rest):
    """Be one rank, in a process that was forked for it: what it prints goes into files of its own."""
    global RANK, SIZE
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{kind}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    RANK, SIZE = rank, size
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    globals()[name](*rest)
    if dist.is_initialized():
        dist.destroy_process_group()

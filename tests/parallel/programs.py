"""What the ranks of a test do: `programs.py NAME MEETING ...` prints lines of JSON."""

import json
import os
import sys
import warnings
from functools import partial

import torch
from torch import distributed as dist
from torch.optim import LBFGS, SGD, Adam
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bilevel as bl
from bilevel.extend import leaves
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

# Doctest looks for examples in every module: without a rank this one does nothing.
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


def answers(*names):
    with bl.extend.separate_ranks():
        alone = make()
    shared = bl.DataParallel(timeout=60.0).game(make())
    for name in names or RESPONSES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            one, _ = hypergradients(alone, RESPONSES[name])
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


def one_player(name):
    if name == "other":
        return bl.Game(other=bl.Player(lambda other: other.square().sum(), torch.ones(2)))
    return bl.Game(decay=bl.Player(lambda decay: decay.square().sum(), torch.ones(2)))


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


if __name__ == "__main__":
    _, name, meeting, *rest = sys.argv
    torch.manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=RANK, world_size=SIZE)
    globals()[name](*rest)
    if dist.is_initialized():
        dist.destroy_process_group()

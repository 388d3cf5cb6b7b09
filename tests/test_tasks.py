"""All tasks of a batch in one pass are the tasks one by one."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset

import bilevel as bl
from bilevel.autodiff import in_all_rows, transforms_active
from bilevel.inner import EntrywiseSGD

D = torch.float64
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
TASKS, SHOTS = 5, 4


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def batch_of(count=TASKS, seed=0):
    """Regressions of one input, each on a line of its own."""
    slopes, inputs = randn(count, 1, 1, seed=seed), randn(count, 2 * SHOTS, 1, seed=seed + 100)
    targets = slopes * inputs + 0.1 * randn(count, 2 * SHOTS, 1, seed=seed + 200)
    return {"support": (inputs[:, :SHOTS], targets[:, :SHOTS]), "query": (inputs[:, SHOTS:], targets[:, SHOTS:])}


def single(batch, index):
    return {part: tuple(t[index] for t in pair) for part, pair in batch.items()}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).to(D)


def judge(task, batch):
    return mse_loss(task(batch[0]), batch[1])


def maml(data=None, fit=judge, **options):
    return bl.Tasks(
        meta=bl.Player(judge, net()),
        task=bl.Player(fit, net(1), start=lambda meta: meta),
        data=[batch_of()] if data is None else data,
        **options,
    )


def near(task, meta):
    return sum(((a - b) ** 2).sum() for a, b in zip(task.values(), meta.values(), strict=True))


def fit_near(meta, task, batch):
    return judge(task, batch) + near(task, meta)


def imaml(data=None, **options):
    """The follower's optimum depends on the leader by a proximal term."""
    return bl.Tasks(
        meta=bl.Player(judge, net()),
        task=bl.Player(fit_near, net(), start=lambda meta: meta),
        data=[batch_of()] if data is None else data,
        **options,
    )


def anil():
    """The leader is the body, the followers are heads."""

    def fit(body, head, batch):
        return mse_loss(torch.tanh(body(batch[0])) @ head, batch[1]) + 0.1 * (head**2).sum()

    torch.manual_seed(0)
    return bl.Tasks(
        body=bl.Player(fit, nn.Linear(1, 6).to(D)),
        head=bl.Player(fit, torch.zeros(6, 1, dtype=D)),
        data=[batch_of()],
    )


def meta_sgd(steps=1, per_step=False):
    start = {name: p.detach() for name, p in net().named_parameters()}
    shape = (steps,) if per_step else ()
    rates = {name: 0.1 + 0.05 * randn(*shape, *p.shape, seed=7) for name, p in start.items()}
    game = bl.Tasks(
        meta=bl.Player(judge, {"init": start, "rates": rates}, optimizer_hyper=True),
        task=bl.Player(judge, net(), start=lambda meta: meta["init"]),
        data=[batch_of()],
    )
    factory = lambda params, meta: EntrywiseSGD(params, meta["rates"], per_step)
    return game, bl.Unrolled(factory, steps=steps)


def learned_rate():
    """A start and one learning rate, of two leaders."""
    game = bl.Tasks(
        meta=bl.Player(judge, net()),
        rate=bl.Player(judge, torch.tensor(-2.0, dtype=D), optimizer_hyper=True),
        task=bl.Player(judge, net(1), start=lambda meta: meta),
        data=[batch_of()],
    )
    return game, bl.Unrolled(lambda params, rate: SGD(params, lr=rate.exp(), momentum=0.5), steps=3)


def exact(**options):
    solver = bl.ConjugateGradient(rtol=1e-14, max_steps=200)
    return bl.Implicit(partial(SGD, lr=0.1, momentum=0.8), steps=2000, tolerance=1e-14, linear_solver=solver, **options)


GAMES = {
    "MAML": lambda: (maml(), bl.Unrolled(partial(SGD, lr=0.1), steps=3)),
    "MAML with Adam": lambda: (maml(), bl.Unrolled(partial(ADAM, lr=0.1), steps=3)),
    "MAML in segments": lambda: (
        maml(),
        bl.Unrolled(partial(SGD, lr=0.1), steps=4, differentiation=bl.Segments(count=2)),
    ),
    "MAML, clipped": lambda: (
        maml(),
        bl.Unrolled(bl.inner.TorchOptimizer(partial(SGD, lr=0.1), clip_norm=0.2), steps=3),
    ),
    "ANIL": lambda: (anil(), bl.Unrolled(partial(SGD, lr=0.1), steps=3)),
    "ANIL at the optimum": lambda: (anil(), exact()),
    "Meta-SGD": meta_sgd,
    "Meta-SGD, a rate each step": lambda: meta_sgd(steps=3, per_step=True),
    "a learned rate": learned_rate,
    "iMAML": lambda: (imaml(), exact()),
}


def at_once(stack, response, names):
    leading = {name: bl.tree.map_leaves(lambda t: t.requires_grad_(), stack.initial(name)) for name in names[:-1]}
    state = response.init(stack)
    own, state = response(stack, leading, state)
    batch, _ = stack.draw(names[0], stack.start(names[0]))
    loss = stack.loss(names[0], {**leading, names[-1]: own}, batch)
    leaves = [leaf for name in names[:-1] for leaf in bl.tree.leaves(leading[name])]
    return loss, torch.autograd.grad(loss, leaves, allow_unused=True), own, state


@pytest.mark.parametrize("steps", [1, 3])
def test_a_pass_takes_a_gradient_a_step_and_no_more(steps):
    # What stationarity is told in units of is the first of them.
    calls = []

    def fit(task, batch):
        calls.append(batch)
        return judge(task, batch)

    stack = maml(fit=fit).together(batch_of())
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=steps)
    state = response.init(stack)
    calls.clear()
    _, after = response(stack, {"meta": stack.initial("meta")}, state, batch_of()["support"])
    assert len(calls) == steps and after["gradients"] == steps


@pytest.mark.parametrize("name", GAMES)
def test_one_pass_is_the_loop_over_tasks(name):
    game, response = GAMES[name]()
    stack = game.together(batch_of())
    loss, slopes, own, state = at_once(stack, response, game.names)
    found = [at_once(stack.game(index), response, game.names) for index in range(TASKS)]
    # Steps are the same arithmetic, a few thousand additions of numbers of order one; solves end at 1e-14.
    torch.testing.assert_close(loss, torch.stack([f[0] for f in found]).mean(), rtol=1e-12, atol=1e-12)
    for place, slope in enumerate(slopes):
        expected = torch.stack([f[1][place] for f in found]).mean(0)
        torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-12)
    for index, alone in enumerate(found):
        assert float(state["stationarity"][index]) == pytest.approx(alone[3]["stationarity"], rel=1e-6, abs=1e-12)
        for all_, one in zip(bl.tree.leaves(own), bl.tree.leaves(alone[2]), strict=True):
            torch.testing.assert_close(all_[index], one, rtol=1e-12, atol=1e-12)


def by_hand(meta, batch, rates, steps):
    """The mean query loss of MAML, task after task, in plain torch."""
    module, losses = net(), []
    for index in range(len(batch["support"][0])):
        task, here = single(batch, index), dict(meta)
        for _ in range(steps):
            own = mse_loss(functional_call(module, here, task["support"][0]), task["support"][1])
            slopes = torch.autograd.grad(own, list(here.values()), create_graph=True)
            here = {n: p - rates[n] * g for (n, p), g in zip(here.items(), slopes, strict=True)}
        losses.append(mse_loss(functional_call(module, here, task["query"][0]), task["query"][1]))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("steps", [1, 3])
def test_maml_is_plain_torch(steps):
    game = maml()
    _, found, *_ = at_once(game.together(batch_of()), bl.Unrolled(partial(SGD, lr=0.1), steps=steps), game.names)
    meta = {n: p.detach().requires_grad_() for n, p in net().named_parameters()}
    loss = by_hand(meta, batch_of(), dict.fromkeys(meta, 0.1), steps)
    for ours, theirs in zip(found, torch.autograd.grad(loss, list(meta.values())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_meta_sgd_is_plain_torch():
    game, response = meta_sgd()
    _, found, *_ = at_once(game.together(batch_of()), response, game.names)
    meta = bl.tree.map_leaves(lambda t: t.requires_grad_(), game.initial("meta"))
    loss = by_hand(meta["init"], batch_of(), meta["rates"], 1)
    wanted = torch.autograd.grad(loss, bl.tree.leaves(meta))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_imaml_is_the_difference_of_solved_followers():
    game, response = imaml(), exact()
    stack = game.together(batch_of())
    _, found, *_ = at_once(stack, response, game.names)
    start, state = game.initial("meta"), response.init(stack)
    direction = {name: randn(*leaf.shape, seed=3) for name, leaf in start.items()}

    def loss(step):
        meta = {name: leaf + step * direction[name] for name, leaf in start.items()}
        own, _ = response(stack, {"meta": meta}, state)
        return float(stack.loss("meta", {"meta": meta, "task": own}, batch_of()["query"]))

    # Central differences of order four: h^4 = 1e-12 times a fifth derivative of order ten, and rounding of 1e-15 / h.
    step = 1e-3
    slope = (8 * (loss(step) - loss(-step)) - (loss(2 * step) - loss(-2 * step))) / (12 * step)
    expected = sum(float((g * d).sum()) for g, d in zip(found, direction.values(), strict=True))
    assert expected == pytest.approx(slope, abs=1e-9)


def test_imaml_is_an_exact_solve_on_a_quadratic():
    # A ridge around the leader: (X'X/n + lam) w = X'y/n + lam x, so that dw/dx = lam (X'X/n + lam)^-1.
    lam, inputs, targets = 0.3, randn(3, 6, 2, seed=1), randn(3, 6, seed=2)

    def fit(meta, task, batch):
        return 0.5 * ((batch[0] @ task - batch[1]) ** 2).mean() + lam / 2 * ((task - meta) ** 2).sum()

    game = bl.Tasks(
        meta=bl.Player(lambda task, batch: (task**2).sum() * batch, torch.ones(2, dtype=D)),
        task=bl.Player(fit, torch.zeros(2, dtype=D)),
        data=[{"support": (inputs, targets), "query": torch.ones(3, dtype=D)}],
    )
    _, (found,), own, _ = at_once(game.together(game.draw_tasks(game.start_of_tasks())[0]), exact(), game.names)
    hessians = inputs.mT @ inputs / 6 + lam * torch.eye(2, dtype=D)
    wanted = torch.linalg.solve(hessians, (inputs.mT @ targets[..., None])[..., 0] / 6 + lam)
    torch.testing.assert_close(own, wanted, rtol=1e-12, atol=1e-12)
    expected = (lam * torch.linalg.solve(hessians, 2 * wanted)).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


# Through solve -------------------------------------------------------------------------------------------------------


DATA = [batch_of(4, seed=1), batch_of(4, seed=2), batch_of(3, seed=3)]


def test_a_step_takes_a_batch_in_order_the_last_smaller():
    game = maml(DATA)
    solution = bl.solve(game, task=bl.Unrolled(partial(SGD, lr=0.1), steps=2), optimizer=partial(SGD, lr=0.05), steps=5)
    meta = {n: p.detach().clone() for n, p in net().named_parameters()}
    for step in range(5):
        meta = {n: p.requires_grad_() for n, p in meta.items()}
        loss = by_hand(meta, DATA[step % 3], dict.fromkeys(meta, 0.1), 2)
        assert solution.history[step]["meta"] == pytest.approx(loss.item(), rel=1e-12)
        slopes = torch.autograd.grad(loss, list(meta.values()))
        meta = {n: (p - 0.05 * g).detach() for (n, p), g in zip(meta.items(), slopes, strict=True)}
    for name, value in meta.items():
        torch.testing.assert_close(solution.variables["meta"][name], value.detach(), rtol=1e-12, atol=1e-13)
    # What is told of the end is of the batch that comes next: the leader's query goes with the followers' support.
    meta = {n: p.requires_grad_() for n, p in meta.items()}
    assert solution.values["meta"] == pytest.approx(by_hand(meta, DATA[5 % 3], dict.fromkeys(meta, 0.1), 2).item())
    assert solution.variables["task"]["0.weight"].shape == (3, 6, 1)
    assert set(solution.history[0]) >= {"task", "task.stationarity", "task.stationarity.worst"}


@pytest.mark.parametrize("make", [maml, imaml])
def test_a_resumed_run_is_the_whole_one(tmp_path, make):
    implicit = bl.Implicit(partial(SGD, lr=0.1, momentum=0.8), steps=200)
    response = bl.Unrolled(partial(ADAM, lr=0.1), steps=2) if make is maml else implicit
    whole = bl.solve(make(DATA), task=response, steps=7)
    bl.solve(make(DATA), task=response, steps=4, checkpoint=tmp_path / "run.pt")
    resumed = bl.solve(make(DATA), task=response, steps=7, checkpoint=tmp_path / "run.pt")
    for name, value in whole.variables["meta"].items():
        assert torch.equal(value, resumed.variables["meta"][name])
    same = ("meta", "task", "gradients", "products")
    assert [[r[k] for k in same] for r in whole.history] == [[r[k] for k in same] for r in resumed.history]


def test_a_run_goes_on_with_other_settings(tmp_path):
    path = tmp_path / "run.pt"
    bl.solve(maml(DATA), task=bl.Unrolled(partial(SGD, lr=0.1), steps=2), steps=4, checkpoint=path)
    other = bl.Unrolled(partial(SGD, lr=0.2), steps=2)
    with pytest.raises(bl.errors.CheckpointError, match=r"responses.task.response.optimizer.lr was 0.1"):
        bl.solve(maml(DATA), task=other, steps=6, checkpoint=path)
    solution = bl.solve(maml(DATA), task=other, steps=6, checkpoint=path, accept_changes=True)
    assert solution.history[-1]["gradients"] > solution.history[-2]["gradients"]


def test_implicit_warns_of_tasks_that_fall_short():
    with pytest.warns(bl.errors.FollowerNonConvergenceWarning, match=r"in \d of 5 tasks, the worst being task \d"):
        bl.solve(imaml(), task=bl.Implicit(partial(SGD, lr=0.1), steps=20), steps=1)


def test_every_task_begins_anew_whatever_warm_start_says():
    ends = [
        bl.solve(maml(DATA), task=bl.Unrolled(partial(ADAM, lr=0.1), steps=2, warm_start=warm), steps=4)
        for warm in (True, False)
    ]
    for one, other in zip(*(end.variables["meta"].values() for end in ends), strict=True):
        assert torch.equal(one, other)


def clients_of(numbers, seed):
    return {**batch_of(len(numbers), seed=seed), "client": torch.tensor(numbers)}


def test_clients_keep_their_followers(tmp_path):
    """Two steps of each client, in the order in which they come: the second begins where the first ended."""

    def fit(meta, task, batch):
        return 0.5 * ((task - batch) ** 2).sum() + 0.5 * ((task - meta) ** 2).sum()

    def make():
        values = torch.tensor([[1.0], [2.0], [3.0]], dtype=D)
        rounds = [[0, 1], [2, 1], [1]]
        data = [{"support": values[r], "query": values[r], "client": torch.tensor(r)} for r in rounds]
        meta = bl.Player(lambda task, batch: ((task - batch) ** 2).sum(), torch.zeros(1, dtype=D))
        return bl.Tasks(meta=meta, task=bl.Player(fit, torch.zeros(1, dtype=D)), data=data, clients=3)

    response = bl.Unrolled(partial(SGD, lr=0.25), steps=1)
    solution = bl.solve(make(), task=response, optimizer=partial(SGD, lr=0.1), steps=2)
    # y <- y - .25 (2 y - b - x): client 1 came twice, and comes once more for the answer to the end.
    x, y = 0.0, [0.0, 0.0, 0.0]
    for clients in ([0, 1], [2, 1]):
        for c in clients:
            y[c] = y[c] / 2 + 0.25 * (c + 1 + x)
        x = x - 0.1 * sum(2 * (y[c] - (c + 1)) * 0.25 for c in clients) / 2
    assert float(solution.variables["meta"]) == pytest.approx(x, abs=1e-14)
    y[1] = y[1] / 2 + 0.25 * (2 + x)
    assert solution.states["task"]["kept"].flatten().tolist() == pytest.approx(y, abs=1e-14)
    whole = bl.solve(make(), task=response, steps=5)
    bl.solve(make(), task=response, steps=2, checkpoint=tmp_path / "run.pt")
    resumed = bl.solve(make(), task=response, steps=5, checkpoint=tmp_path / "run.pt")
    assert torch.equal(whole.variables["meta"], resumed.variables["meta"])
    assert torch.equal(whole.states["task"]["kept"], resumed.states["task"]["kept"])


def test_warm_clients_take_implicit_fewer_steps():
    def make(clients):
        data = [clients_of([0, 1, 2], seed=1)]
        task = bl.Player(fit_near, net())
        return bl.Tasks(meta=bl.Player(judge, net()), task=task, data=data, clients=clients)

    response = bl.Implicit(partial(SGD, lr=0.1), steps=2000, tolerance=1e-6)
    cold, warm = (bl.solve(make(clients), task=response, steps=5) for clients in (None, 3))
    assert warm.gradients < cold.gradients
    # Both stop at 1e-6 of a gradient of order one, around an optimum of curvature one and more; five steps of 0.01.
    for one, other in zip(cold.variables["meta"].values(), warm.variables["meta"].values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.0, atol=1e-3)


class Lines(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return single(batch_of(1, seed=index), 0)


def test_a_loader_collates_tasks(tmp_path):
    def loader():
        return DataLoader(Lines(), batch_size=4, shuffle=True)

    response = bl.Unrolled(partial(SGD, lr=0.1), steps=1)
    whole = bl.solve(maml(loader()), task=response, steps=7)
    bl.solve(maml(loader()), task=response, steps=4, checkpoint=tmp_path / "run.pt")
    resumed = bl.solve(maml(loader()), task=response, steps=7, checkpoint=tmp_path / "run.pt")
    assert torch.equal(whole.variables["meta"]["0.weight"], resumed.variables["meta"]["0.weight"])


def test_a_list_of_tasks_is_stacked():
    batch = batch_of()
    listed = [single(batch, index) for index in range(TASKS)]
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=1)
    one, other = (bl.solve(maml([data]), task=response, steps=3) for data in (batch, listed))
    assert torch.equal(one.variables["meta"]["0.weight"], other.variables["meta"]["0.weight"])


def test_adapted_gives_the_losses_of_held_out_tasks():
    game, held_out = maml(), batch_of(3, seed=9)
    start = game.initial("meta")
    found = game.adapted({"meta": start}, held_out, task=bl.Unrolled(partial(SGD, lr=0.1), steps=4))
    for index in range(3):
        task = {part: tuple(t[None] for t in pair) for part, pair in single(held_out, index).items()}
        meta = {n: p.requires_grad_() for n, p in game.initial("meta").items()}
        expected = by_hand(meta, task, dict.fromkeys(meta, 0.1), 4)
        assert float(found.losses["meta"][index]) == pytest.approx(expected.item(), rel=1e-12)
    assert found.losses["task"].shape == (3,)
    assert found.variables["0.weight"].shape == (3, 6, 1)
    with pytest.raises(TypeError, match="expected one response, task="):
        game.adapted({"meta": start}, held_out, meta=bl.Unrolled(partial(SGD, lr=0.1)))


def test_batch_statistics_are_each_tasks_own():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).to(D)
    game = bl.Tasks(
        meta=bl.Player(judge, module), task=bl.Player(judge, module, start=lambda meta: meta), data=[batch_of()]
    )
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=2)
    solution = bl.solve(game, task=response, steps=2)
    stack = game.together(batch_of())
    own, state = response(stack, {"meta": solution.variables["meta"]}, response.init(stack))
    for index in range(TASKS):
        alone = stack.game(index)
        one, after = response(alone, {"meta": solution.variables["meta"]}, response.init(alone))
        torch.testing.assert_close(own["0.weight"][index], one["0.weight"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state["buffers"]["1.running_mean"][index], after["buffers"]["1.running_mean"])
    assert int(state["buffers"]["1.num_batches_tracked"][0]) == 2


# Followers within functions -------------------------------------------------------------------------------------------


def bounded(capacity, **options):
    """In each task the follower goes to the middle of its data and of the leader, and has room up to a capacity."""

    def fit(meta, task, batch):
        return (task - batch).square().sum() + (task - meta).square().sum()

    return bl.Tasks(
        meta=bl.Player(lambda task, batch: (task - batch).square().sum(), torch.full((2,), 0.3, dtype=D)),
        task=bl.Player(fit, torch.zeros(2, dtype=D), inequality=capacity),
        **options,
    )


def points(*clients):
    generator = torch.Generator().manual_seed(0)
    found = {part: torch.randn(3, 2, generator=generator, dtype=D) for part in ("support", "query")}
    return {**found, "client": torch.tensor(clients)} if clients else found


WITHIN = bl.Implicit(bl.Scipy("SLSQP"), warm_start=True)


@pytest.mark.parametrize("capacity", [lambda task: task - 0.1, lambda task, batch: task - 0.1 - batch])
def test_followers_within_functions_have_a_closed_form_in_each_task(capacity):
    batch = points()
    room = 0.1 + (batch["support"] if "batch" in capacity.__code__.co_varnames else 0.0)
    tasks = bounded(capacity, data=[batch])
    stack = tasks.together(batch)
    meta = torch.full((2,), 0.3, dtype=D, requires_grad=True)
    answer, state = WITHIN(stack, {"meta": meta}, WITHIN.init(stack), batch["support"])
    free = 0.5 * (batch["support"] + meta)
    wanted = torch.minimum(free, torch.as_tensor(room, dtype=D))
    # Polished to rounding, of numbers of size 1 to 4.
    torch.testing.assert_close(answer, wanted, rtol=0.0, atol=1e-12)
    torch.testing.assert_close(state["multipliers"]["inequality"], 4.0 * (free - wanted).detach(), rtol=0.0, atol=1e-12)
    slopes = [torch.autograd.grad(tasks.loss("meta", {"task": y}, batch["query"]), meta)[0] for y in (answer, wanted)]
    torch.testing.assert_close(*slopes, rtol=0.0, atol=1e-12)


def test_a_run_within_functions_tells_the_multipliers_of_each_task_and_clients_keep_theirs():
    """The leader's optimum: with all but one entry held at .1 only that entry of one task still moves it."""
    found = bl.solve(
        bounded(lambda task: task - 0.1, data=[points(2, 0, 4)], clients=5),
        task=WITHIN,
        optimizer=partial(SGD, lr=0.1),
        steps=5,
    )
    answer, given = found.variables["task"], points()["support"]
    wanted = torch.minimum(0.5 * (given + found.variables["meta"]), torch.tensor(0.1, dtype=D))
    # The answer is to the leader before its last step.
    assert (answer - wanted).abs().max() < 0.1 and found.multipliers["task"]["inequality"].shape == (3, 2)
    assert bool(((found.multipliers["task"]["inequality"] > 0.0) == (answer > 0.1 - 1e-9)).all())


def test_functions_of_a_leader_of_tasks_are_refused():
    with pytest.raises(TypeError, match=r"Tasks: 'meta' leads and has functions that constrain it, \['inequality'\]"):
        bl.Tasks(
            meta=bl.Player(lambda task: task.sum(), torch.zeros(2, dtype=D), inequality=lambda meta: meta - 1.0),
            task=bl.Player(lambda meta, task, batch: (task - meta - batch).square().sum(), torch.zeros(2, dtype=D)),
            data=[points()],
        )


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"support": batch_of()["support"]}], r"no 'query', only \['support'\]: the leaders are judged by it"),
        ([{"query": batch_of()["query"]}], "no 'support'"),
        ([batch_of()["support"][0]], "is a tensor of shape"),
        ([[single(batch_of(), 0), {"support": single(batch_of(), 1)["support"]}]], "Task 1 of a batch has no 'query'"),
        (
            [[single(batch_of(), 0), {**single(batch_of(), 1), "query": (torch.zeros(9, 1, dtype=D),) * 2}]],
            r"query\[0\] of task 1 is \[9, 1\] of torch.float64, and that of task 0 \[4, 1\].*one shape into a batch",
        ),
        (
            [{"support": batch_of()["support"], "query": batch_of(4)["query"]}],
            r"its query\[0\] has a leading dimension of 4; expected 5, one entry a task as in its support\[0\]",
        ),
        ([[]], "holds no task"),
        (
            [
                {
                    "support": batch_of()["support"],
                    "query": tuple(t / 0 for t in batch_of()["query"]),
                }
            ],
            "expected a finite number",
        ),
        ([], "gave no batch"),
    ],
)
def test_wrong_data_are_refused_in_words(data, message):
    with pytest.raises((ValueError, TypeError, bl.errors.DataError), match=message):
        maml(data)


def test_a_loss_that_is_not_finite_names_its_task():
    batch = batch_of()
    batch["query"][1][3] = torch.nan
    with pytest.raises(ValueError, match="its loss at init is nan in task 3 of the first batch"):
        maml([batch])


def test_a_follower_that_no_leader_reaches_is_refused():
    with pytest.raises(ValueError, match=r"does not depend on 'meta'.*start=lambda meta: meta"):
        bl.Tasks(
            meta=bl.Player(lambda meta, task, batch: judge(task, batch) + near(meta, task), net()),
            task=bl.Player(judge, net()),
            data=[batch_of()],
        )


def test_an_optimum_that_does_not_depend_on_the_leader_is_refused():
    with pytest.raises(TypeError, match=r"reaches it by its start= and no loss.*proximal term"):
        bl.solve(maml(), task=exact(), steps=1)


def test_what_a_task_is_not():
    player = bl.Player(judge, net())
    with pytest.raises(ValueError, match="expected at least a leader"):
        bl.Tasks(task=player, data=[batch_of()])
    with pytest.raises(ValueError, match="'meta' has data="):
        bl.Tasks(meta=bl.Player(judge, net(), data=[1]), task=player, data=[batch_of()])
    with pytest.raises(ValueError, match="no objective takes `batch`"):
        bl.Tasks(
            x=bl.Player(lambda y: y**2, torch.tensor(1.0)),
            y=bl.Player(lambda x, y: (x - y) ** 2, torch.tensor(1.0)),
            data=[batch_of()],
        )
    with pytest.raises(TypeError, match=r"can be iterated only once"):
        maml(iter([batch_of()]))
    with pytest.raises(TypeError, match="expected a Player"):
        bl.Tasks(meta=net(), task=player, data=[batch_of()])


def test_what_solve_refuses():
    response = bl.Unrolled(partial(SGD, lr=0.1), steps=1)
    with pytest.raises((TypeError, ValueError), match=r"task.*no response"):
        bl.solve(maml(), steps=1)
    with pytest.raises((TypeError, ValueError), match="'meta' (moves first|leads)"):
        bl.solve(maml(), meta=response, steps=1)
    with pytest.raises(TypeError, match="is one batch of tasks"):
        bl.solve(maml().together(batch_of()), task=response, steps=1)
    with pytest.raises(TypeError, match="not at 5 tasks. Use Unrolled or Implicit"):
        bl.solve(imaml(), task=bl.Hypernetwork(partial(SGD, lr=0.1), scale=0.1), steps=1)
    with pytest.raises(TypeError, match="would mix 5 tasks"):
        bl.solve(maml(), task=bl.Unrolled(lambda p: SGD([{"params": p, "lr": 0.1 / len(p[0])}])), steps=1)
    with pytest.raises(TypeError, match=r"tasks.together\(batch\)"):
        response.init(maml())
    with pytest.raises(TypeError, match="nobody to join"):
        maml().joined(both=("meta", "task"))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [([0, 0], "one of them twice"), ([0, 3], "expected numbers from 0 to 2"), ([0.0, 1.0], "whole numbers")],
)
def test_wrong_clients_are_refused(numbers, message):
    data = [{**batch_of(2), "client": torch.tensor(numbers)}]
    with pytest.raises((TypeError, ValueError, bl.errors.DataError), match=message):
        bl.Tasks(meta=bl.Player(judge, net()), task=bl.Player(fit_near, net()), data=data, clients=3)


def test_clients_need_a_follower_that_is_kept():
    with pytest.raises(ValueError, match=r"clients=3 keeps followers.*start="):
        maml([clients_of([0], seed=1)], clients=3)
    game = bl.Tasks(
        meta=bl.Player(judge, net()), task=bl.Player(fit_near, net()), data=[clients_of([0], seed=1)], clients=3
    )
    with pytest.raises(ValueError, match="Say warm_start=True"):
        bl.solve(game, task=bl.Unrolled(partial(SGD, lr=0.1), steps=1, warm_start=False), steps=1)


def test_rates_are_as_many_as_tensors_and_steps():
    y = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="2 rates for 1 tensors"):
        EntrywiseSGD([y], [torch.ones(2), torch.ones(2)])
    optimizer = EntrywiseSGD([y], [torch.ones(1, 2)], per_step=True)
    y.grad = torch.ones(2)
    optimizer.step()
    with pytest.raises(ValueError, match=r"step 2 has no rate.*warm_start=False"):
        optimizer.step()


def test_new_tasks_are_answered_with_learned_rates_too():
    game, response = meta_sgd()
    solution = bl.solve(game, task=response, steps=2)
    found = game.adapted(solution.variables, batch_of(3, seed=9), task=response)
    with torch.no_grad():
        response.init(game.together(batch_of()))
    assert bool(torch.isfinite(found.losses["meta"]).all())


# What a pass is made of ----------------------------------------------------------------------------------------------


def test_a_start_is_called_once_for_all_tasks_unless_it_draws_or_sees_them():
    calls = []

    def same(meta):
        calls.append(meta)
        return meta

    def drawn(meta):
        return {name: w + torch.randn(w.shape, dtype=w.dtype) for name, w in meta.items()}

    def seen(meta, batch):
        return {name: w + batch[0].mean() for name, w in meta.items()}

    for start, differ in ((same, False), (drawn, True), (seen, True)):
        game = bl.Tasks(meta=bl.Player(judge, net()), task=bl.Player(judge, net(), start=start), data=[batch_of()])
        stack = game.together(batch_of())
        meta = stack.initial("meta")
        calls.clear()
        found = stack.starting_point("task", {"meta": meta}, batch_of()["support"])
        for name, leaf in found.items():
            assert leaf.shape == (TASKS, *meta[name].shape)
            assert (not torch.equal(leaf[0], leaf[1])) == differ
    calls.clear()
    game = bl.Tasks(meta=bl.Player(judge, net()), task=bl.Player(judge, net(), start=same), data=[batch_of()])
    stack = game.together(batch_of())
    calls.clear()
    stack.starting_point("task", {"meta": stack.initial("meta")}, batch_of()["support"])
    assert len(calls) == 1


def test_a_function_in_all_rows_is_its_vmap():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator, dtype=D) for shape in ((4, 3), (4, 3, 2)))

    def function(row, matrix):
        noise = torch.rand(2, dtype=D)
        return (row @ matrix).tanh() + noise, noise, torch.ones(2, dtype=D)

    torch.manual_seed(1)
    found = in_all_rows(function, 4, [first, second])
    torch.manual_seed(1)
    expected = torch.func.vmap(function, randomness="different")(first, second)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=0.0)
    with pytest.raises(ValueError, match="size"):
        in_all_rows(function, 4, [first, second[:3]])
    with pytest.raises(ValueError, match="returned \\['float'\\]; expected tensors"):
        in_all_rows(lambda row: (1.0,), 4, [first])
    # What fails inside leaves no level behind.
    assert not transforms_active()

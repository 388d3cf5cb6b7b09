"""tune: a model's hyperparameters in one training run."""

import copy
import csv
import statistics
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import bilevel as bl
from bilevel.tree import leaves
from bilevel.tuning import CSVLogger, EarlyStopping, MLflowLogger, WandbLogger

# Told of once, by a test of its own.
ADAM = partial(torch.optim.Adam, lr=1e-2)
torch.manual_seed(0)
INPUTS = torch.randn(300, 12)
# A twelfth of the inputs tells the label: without a penalty a small training set is fitted by heart.
LABELS = (INPUTS[:, 0] + 0.5 * torch.randn(300) > 0).long()
TRAIN = [(INPUTS[:60][rows], LABELS[:60][rows]) for rows in torch.arange(60).split(20)]
VALID = [(INPUTS[60:], LABELS[60:])]
RANGES = {"decay": bl.Log(1e-5, 1.0, start=1e-4), "smoothing": bl.Unit(0.0, 0.3, start=0.01)}


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 2))


def valid_loss(weights, batch):
    return cross_entropy(weights(batch[0]), batch[1])


def train_loss(weights, decay, smoothing, batch):
    logits = weights(batch[0])
    return bl.hyper.cross_entropy(logits, batch[1], smoothing=smoothing) + bl.penalty(weights, decay)


def smoothed(weights, smoothing, batch):
    return bl.hyper.cross_entropy(weights(batch[0]), batch[1], smoothing=smoothing)


def run(**options):
    given = {"hyper": RANGES, "optimizer": ADAM, "steps": 400, "model": network(), "check": 0.0} | options
    model, loss = given.pop("model"), given.pop("train", train_loss)
    torch.manual_seed(2)
    return bl.tune(model, loss, valid_loss, TRAIN, VALID, **given)


@pytest.fixture(scope="module")
def tuned():
    return run()


def test_it_ends_better_than_it_began(tuned):
    again = bl.retrain(tuned, seeds=2)
    assert again.better
    assert max(again.found) < min(again.start)
    assert tuned.hyper["decay"] > 1e-3, "of a decay that starts far too small"
    assert "at the values found" in str(again)


def test_fresh_trainings_are_compared_with_nothing_tuned(tuned):
    with pytest.raises(ValueError, match=r"hyperparameters \['decay'.*not a loss without them"):
        bl.retrain(tuned, plain=True, steps=5)
    assert bl.retrain(tuned, steps=5).plain == ()
    # Smoothing that starts at .3 is worse than none for a model that is trained for long enough to be sure.
    smoothing = bl.hyper.LabelSmoothing(within=bl.Unit(0.0, 0.5, start=0.3))
    declared = run(hyper=[smoothing], train=valid_loss, steps=20)
    again = bl.retrain(declared, plain=True, steps=99, make=network)
    torch.manual_seed(0)
    model = network()
    optimizer = ADAM(model.parameters())
    for _ in range(33):
        for batch in TRAIN:
            optimizer.zero_grad()
            valid_loss(model, batch).backward()
            optimizer.step()
    with torch.no_grad():
        lost = statistics.fmean(float(valid_loss(model.eval(), batch)) for batch in VALID)
    # The same sums in another order, over 99 steps in float32.
    assert again.plain[0] == pytest.approx(lost, rel=1e-3)
    assert again.plain[0] != again.start[0]
    assert "nothing tuned" in str(again)
    assert again.better == (again.found[0] < min(again.start[0], again.plain[0]))


def test_fresh_trainings_are_kept_as_they_end(tuned, tmp_path):
    made = []

    def make(stop_at=None):
        made.append(0)
        if len(made) == stop_at:
            raise KeyboardInterrupt
        return network()

    whole = bl.retrain(tuned, seeds=2, steps=10, make=network)
    kept = {"steps": 10, "checkpoint": tmp_path / "again.pt"}
    with pytest.raises(KeyboardInterrupt):
        bl.retrain(tuned, seeds=2, make=partial(make, 4), **kept)
    made.clear()
    again = bl.retrain(tuned, seeds=2, make=make, **kept)
    assert (again.found, again.start) == (whole.found, whole.start)
    for model, other in zip(again.models, whole.models, strict=True):
        assert not model.training
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True)
        )
    assert len(made) == 3, "two models of trainings that had ended, and the one training that was missing"
    with pytest.raises(bl.errors.CheckpointError, match="of other trainings: its steps was 10 and is now 11"):
        bl.retrain(tuned, make=network, **kept | {"steps": 11})


def test_half_a_row_of_a_killed_run_is_no_row(tmp_path):
    path = tmp_path / "run.csv"
    path.write_bytes(b"step,loss\n1,0.5\n2,0.25\n3,0.1")  # about to write 0.125
    CSVLogger(path)(3, {"step": 3, "loss": 0.125}, {})
    assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.25", "3,0.125"]
    path.write_bytes(b"step,loss\n1,0.5\n1")  # of step 12, say
    CSVLogger(path)(2, {"step": 2, "loss": 0.25}, {})
    assert path.read_text().split() == ["step,loss", "1,0.5", "2,0.25"]


def test_batch_norm_is_followed_and_what_cannot_be_is_told():
    class Own(nn.BatchNorm1d):
        def forward(self, inputs):
            return super().forward(inputs)

    def network(layer):
        return nn.Sequential(nn.Linear(12, 8), layer, nn.Linear(8, 2))

    with warnings.catch_warnings():
        warnings.simplefilter("error", bl.errors.UnreliableResponseWarning)
        for layer in (nn.BatchNorm1d(8), nn.LayerNorm(8), nn.BatchNorm1d(8, track_running_stats=False)):
            run(steps=20, model=network(layer))
    with pytest.warns(bl.errors.UnreliableResponseWarning, match=r"statistics of 'weights\.1' \(Own\).*GroupNorm"):
        run(steps=20, model=network(Own(8)))


def test_the_model_given_is_left_alone_and_the_trained_one_is_whole():
    model = network()
    before = copy.deepcopy(model.state_dict())
    tuned = run(model=model, steps=60)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    weights, buffers = tuned.solution.variables["weights"], tuned.solution.buffers["weights"]
    state = tuned.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in {**weights, **buffers}.items())
    assert not torch.equal(state["1.running_mean"], before["1.running_mean"])


def test_every_hyperparameter_stands_in_the_history_and_what_is_printed(tuned):
    last = tuned.history[-1]
    assert last["hyper.decay"] == pytest.approx(float(tuned.hyper["decay"]))
    assert {"hyper", "weights", "hyper.smoothing", "seconds"} <= set(last)
    frame = tuned.to_frame()
    assert len(frame) == len(tuned.history)
    assert frame["hyper.decay"].iloc[-1] == last["hyper.decay"]
    assert tuned.numbers == {name: pytest.approx(last[f"hyper.{name}"]) for name in ("decay", "smoothing")}
    told = str(tuned)
    assert "smoothing" in told
    assert "400 training steps, 40 of them before" in told


def test_the_steps_are_those_that_were_asked_for():
    assert run(epochs=20, steps=None).plan.steps == 60
    plan = run(steps=63, every=7, warmup=0.5).plan
    assert (plan.warmup, plan.leader_steps, plan.steps) == (35, 4, 63)
    plan = run(steps=63, every=7).plan
    assert (plan.warmup, plan.leader_steps, plan.steps) == (7, 8, 63)


def test_the_models_gradient_is_clipped_as_in_a_loop():
    # SGD of rate 1 whose gradients are clipped to 1e-3: no weight is farther from its start than steps * 1e-3.
    sgd = partial(torch.optim.SGD, lr=1.0)
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 2))
    tuned = run(model=model, optimizer=sgd, clip_norm=1e-3, steps=20)
    response = tuned.plan.response
    tuning = tuned.tuning.game()
    state = response.init(tuning)
    _, after = response(tuning, {"hyper": tuning.initial("hyper")}, state, TRAIN[0])
    steps = response.warmup + response.steps
    moved = torch.cat([(b - a).reshape(-1) for a, b in zip(state["w0"], after["w0"], strict=True)])
    assert 0.0 < float(moved.norm()) <= 1e-3 * steps + 1e-6
    again = bl.retrain(tuned, make=lambda: copy.deepcopy(model))
    ends = [torch.nn.utils.parameters_to_vector(m.parameters()).detach() for m in (model, again.models[0])]
    assert 0.0 < float((ends[1] - ends[0]).norm()) <= 20e-3 + 1e-6


D = torch.float64
SGD = partial(torch.optim.SGD, lr=0.1)
AT_ZERO = nn.Linear(1, 2, bias=False, dtype=D)
nn.init.zeros_(AT_ZERO.weight)
ONE = [torch.ones(1, 1, dtype=D)]


def pulled(weights, pull, batch):
    """Where the pull drags two weights: the first slowly, which pays, and the second at once, which costs."""
    slow, quick = weights(batch)[0]
    return 0.5 * (0.1 * (slow - pull).square() + (quick - pull).square())


def missed(weights, batch):
    return missed_at(*weights(batch)[0])


def missed_at(slow, quick):
    return 0.5 * ((slow - 1.0) ** 2 + 0.7 * quick**2)


def after(steps, pull, rate):
    """The validation loss after so many of those steps from zero, in closed form."""
    slow, quick = (pull * (1.0 - (1.0 - rate * curvature) ** steps) for curvature in (0.1, 1.0))
    return missed_at(slow, quick)


def trap(**options):
    """A run that looks two steps ahead, and lets go of a pull that pays after a hundred."""
    given = {"hyper": {"pull": bl.Unit(0.0, 1.0, start=0.9)}, "optimizer": SGD, "steps": 400} | options
    look = bl.Unrolled(SGD, steps=2)
    return bl.tune(given.pop("model", AT_ZERO), pulled, missed, ONE, ONE, response=look, **given)


def test_what_pays_late_wins_in_a_fresh_training_where_a_greedy_check_prefers_the_other(recwarn):
    before = torch.random.get_rng_state()
    tuned = trap()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert float(AT_ZERO.weight.abs().sum()) == 0.0
    found = float(tuned.hyper["pull"])
    assert found < 0.2, "it is caught"
    # A greedy check trains the run's weights on for an eighth of the steps, and prefers what the run has found.
    (slow, _), steps = tuned.model.weight.detach()[:, 0].tolist(), 50
    on = [pull + (slow - pull) * (1.0 - 0.01) ** steps for pull in (found, 0.9)]
    assert missed_at(on[0], found) < missed_at(on[1], 0.9)
    # The same products in another order, over 200 steps, whose errors do not grow.
    near = partial(pytest.approx, rel=1e-12)
    seen = tuned.retrained
    assert (seen.steps, seen.speed, seen.models) == (200, 2.0, ())
    assert seen.found == (near(after(200, found, 0.2)),)
    assert seen.start == (near(after(200, 0.9, 0.2)),)
    assert seen.plain == (), "the loss cannot be called without its pull"
    assert tuned.advised is tuned.start
    told = [str(w.message) for w in recwarn if w.category is bl.errors.ShortHorizonWarning]
    assert len(told) == 1 and "of 200 steps at 2 times the rate" in told[0]
    for text in (told[0], " ".join(str(tuned).split())):
        assert "Advised: the start's values" in text


def test_a_check_may_be_of_whole_trainings_or_be_left_out(recwarn):
    whole, without = trap(steps=40, check=1.0), trap(steps=40, check=0.0)
    assert (whole.retrained.start, whole.retrained.speed) == ((pytest.approx(after(40, 0.9, 0.1), rel=1e-12),), 1.0)
    assert without.retrained is None
    assert without.advised is without.hyper
    assert without.numbers == whole.numbers


def test_nothing_tuned_is_advised_where_it_wins():
    decay = bl.hyper.WeightDecay(within=bl.Log(1e-1, 1.0, start=0.5))
    slowly = partial(torch.optim.SGD, lr=1e-3)
    near_one = lambda weights, batch: (weights(batch) - 1.0).square().sum()
    with pytest.warns(bl.errors.ShortHorizonWarning, match="Advised: nothing tuned"):
        tuned = bl.tune(AT_ZERO, near_one, near_one, ONE, ONE, hyper=[decay], optimizer=SGD, steps=40, leader=slowly)
    assert tuned.advised == {}
    assert tuned.retrained.best == "plain"
    model = nn.Linear(1, 2, bias=False, dtype=D)
    assert tuned.tuning.loss_at(tuned.advised)(model, ONE[0]) == near_one(model, ONE[0])


def test_values_that_win_are_told_in_silence(recwarn):
    tuned = run(check=0.1)
    assert tuned.retrained.better
    assert tuned.advised is tuned.hyper
    assert not any(issubclass(w.category, bl.errors.ShortHorizonWarning) for w in recwarn)


@pytest.mark.filterwarnings("ignore::bilevel.BilevelWarning")
def test_a_scheduler_and_the_rate_go_as_far_in_fewer_steps():
    halved = partial(torch.optim.lr_scheduler.StepLR, step_size=20, gamma=0.5)
    hyper = {"pull": bl.Unit(0.0, 1.0, start=0.9)}
    options = {"hyper": hyper, "optimizer": SGD, "steps": 40, "scheduler": halved, "check": 0.25}
    tuned = bl.tune(AT_ZERO, pulled, missed, ONE, ONE, **options)
    # Five steps at four times the rate, and five at half of that.
    left = {curvature: (1.0 - 0.4 * curvature) ** 5 * (1.0 - 0.2 * curvature) ** 5 for curvature in (0.1, 1.0)}
    ended = missed_at(*(0.9 * (1.0 - left[curvature]) for curvature in (0.1, 1.0)))
    assert tuned.retrained.start == (pytest.approx(ended, rel=1e-12),)


@pytest.mark.filterwarnings("ignore::bilevel.BilevelWarning")
def test_a_run_that_is_stopped_in_its_check_goes_on_bit_for_bit(tmp_path):
    torch.manual_seed(3)
    model, other = (nn.Linear(1, 2, bias=False, dtype=D) for _ in range(2))
    whole = trap(model=model, steps=40, checkpoint=tmp_path / "whole.pt")

    class Stopping(torch.optim.SGD):
        left = 20 + 3  # the check's first training, and three steps of its second

        def step(self, closure=None):
            Stopping.left -= 1
            if Stopping.left < 0:
                raise KeyboardInterrupt
            return super().step(closure)

    trainings = []
    for begun in (model, other):  # who goes on need not have the weights that the run began with
        file = tmp_path / "run.pt"
        options = {"model": begun, "steps": 40, "checkpoint": file, "optimizer": partial(Stopping, lr=0.1)}
        try:
            again = trap(**options)
        except bl.errors.CheckStopped as stopped:
            assert torch.equal(stopped.tuned.model.weight, whole.model.weight)
            assert "The check was stopped, so that nothing" in str(stopped.tuned)
            trainings.append(torch.load(tmp_path / "run.pt.check", weights_only=True)["trainings"])
            Stopping.left = 20  # the second training alone
    assert [list(kept) for kept in trainings] == [["found 0"]]
    assert (again.retrained.found, again.retrained.start) == (whole.retrained.found, whole.retrained.start)
    assert again.numbers == whole.numbers
    # A run that begins anew, in the same place, begins with its own weights.
    Stopping.left = 1000
    fresh = trap(**options | {"resume": False})
    assert fresh.retrained.start != whole.retrained.start


class Failing(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("no step at this rate")


def test_a_check_that_fails_leaves_the_run():
    told = "The check failed, .*: RuntimeError: no step at this rate"
    with pytest.warns(bl.errors.ShortHorizonWarning, match=told):
        tuned = trap(steps=40, optimizer=partial(Failing, lr=0.1))
    assert tuned.retrained is None
    assert tuned.numbers == trap(steps=40, check=False).numbers
    assert "The check failed" in str(tuned)
    assert tuned.advised is tuned.hyper


@pytest.mark.filterwarnings("ignore::bilevel.BilevelWarning")
def test_batches_of_objects_that_are_made_anew_are_the_same():
    class Graph:
        """It prints as where it lies."""

    def batches():
        yield ONE[0], Graph()

    def dragged(weights, pull, batch):
        return pulled(weights, pull, batch[0])

    pull = {"pull": bl.Unit(0.0, 1.0, start=0.9)}
    look = bl.Unrolled(SGD, steps=2)
    tuned = bl.tune(AT_ZERO, dragged, missed, batches, ONE, hyper=pull, optimizer=SGD, steps=40, response=look)
    assert tuned.retrained is not None and tuned.retrained.alike


@pytest.mark.filterwarnings("ignore::bilevel.BilevelWarning")
@pytest.mark.parametrize("alike", [True, False])
def test_the_trainings_of_a_check_have_the_same_batches_or_say_so(alike):
    own = np.random.default_rng(0)  # out of reach, in a function's globals or cells

    class Noisy(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, row):
            noise = np.random.standard_normal() if alike else own.standard_normal()  # noqa: NPY002 - as users' data do
            return torch.full((1,), 1.0 + noise, dtype=D)

    still = partial(torch.optim.SGD, lr=0.0)  # so that all but the batches is the same
    pull = {"pull": bl.Unit(0.0, 1.0, start=0.9)}
    look = bl.Unrolled(SGD, steps=2)
    loader = DataLoader(Noisy(), batch_size=1)
    tuned = bl.tune(
        AT_ZERO, pulled, missed, loader, ONE, hyper=pull, optimizer=SGD, steps=20, response=look, leader=still
    )
    seen = tuned.retrained
    assert seen.alike == (seen.found == seen.start) == alike
    assert ("They had different batches" in seen.told()) != alike


@pytest.mark.filterwarnings("ignore::bilevel.BilevelWarning")
def test_a_check_without_a_verdict_is_told():
    # Eight times a rate of .6 multiplies the error of the quick weight by -3.8 in each step; float32 ends at 3e38.
    batches = [batch.float() for batch in ONE]
    options = {"hyper": {"pull": bl.Unit(0.0, 1.0, start=0.9)}, "response": bl.Unrolled(SGD, steps=5)}
    with pytest.warns(bl.errors.ShortHorizonWarning, match=r"no verdict.*check=1\.0"):
        tuned = bl.tune(
            copy.deepcopy(AT_ZERO).float(), pulled, missed, batches, batches, steps=400, check=0.125,
            optimizer=partial(torch.optim.SGD, lr=0.6), **options,
        )  # fmt: skip
    assert tuned.advised is tuned.hyper


def test_declarations_need_no_word_in_the_loss():
    torch.manual_seed(2)
    hyper = [bl.hyper.WeightDecay(), bl.hyper.Dropout(), bl.hyper.LabelSmoothing()]
    tuned = bl.tune(network(), valid_loss, valid_loss, TRAIN, VALID, hyper=hyper, optimizer=ADAM, steps=60)
    assert len(tuned.hyper) == 3
    assert all(f"hyper.{name}" in key for name in tuned.hyper for key in tuned.history[0] if name in key)


def test_another_response_takes_its_place():
    response = bl.Unrolled(ADAM, steps=10)
    tuned = run(response=response, steps=100)
    assert (tuned.plan.every, tuned.plan.warmup, tuned.plan.leader_steps) == (10, 0, 10)
    assert tuned.plan.response is response
    learned = bl.Hypernetwork(ADAM, network=bl.networks.RowScaled(), steps=5, warmup=20, tolerance=None)
    plan = run(response=learned, steps=60).plan
    assert (plan.every, plan.warmup, plan.leader_steps) == (5, 20, 8)
    one = run(response=bl.SingleLoop(partial(torch.optim.SGD, lr=1e-3)), steps=12).plan
    assert (one.every, one.warmup, one.leader_steps, one.steps) == (1, 0, 12, 12)


def test_a_run_that_is_stopped_goes_on_bit_for_bit(tmp_path):
    whole = run(steps=120, checkpoint=tmp_path / "whole.pt")

    def stop(step, record, variables):
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(steps=120, checkpoint=tmp_path / "run.pt", callbacks=[CSVLogger(tmp_path / "run.csv"), stop])
    resumed = run(steps=120, checkpoint=tmp_path / "run.pt", callbacks=[CSVLogger(tmp_path / "run.csv")])
    assert all(torch.equal(whole.hyper[name], resumed.hyper[name]) for name in RANGES)
    keys = [key for key in whole.history[0] if key != "seconds"]
    assert [[r[k] for k in keys] for r in whole.history] == [[r[k] for k in keys] for r in resumed.history]
    with (tmp_path / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [record["step"] for record in resumed.history]
    assert float(rows[-1]["hyper.decay"]) == resumed.history[-1]["hyper.decay"]


def test_it_stops_early_and_still_gives_what_it_has():
    early = run(steps=400, callbacks=[EarlyStopping(3, least=0.9)])
    assert len(early.history) == 4
    assert isinstance(early.model, nn.Module)
    with pytest.raises(ValueError, match="the history has no 'accuracy'"):
        run(steps=60, callbacks=[EarlyStopping(3, key="accuracy")])


class Told:
    """A stand-in for a service's client."""

    def __init__(self):
        self.calls = []

    def log(self, row, step):
        self.calls.append((step, row))

    def log_metrics(self, row, step):
        self.calls.append((step, row))


def test_services_are_told_each_step():
    wandb, mlflow = Told(), Told()
    run(steps=60, callbacks=[WandbLogger(wandb), MLflowLogger(mlflow)])
    assert [step for step, _ in wandb.calls] == list(range(1, len(wandb.calls) + 1))
    assert wandb.calls[-1][1]["hyper.decay"] > 0.0
    assert wandb.calls == mlflow.calls
    assert "step" not in wandb.calls[0][1]


def test_the_figure_has_a_panel_for_each(tuned, tmp_path):
    figure = tuned.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["loss", "decay", "smoothing"]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log", "linear"]


class Rateless(torch.optim.SGD):
    """An optimiser that finds its rate by itself."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.param_groups[0]["lr"] = None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"check": 0.5, "optimizer": Rateless}, r"lr=None; expected a number. Pass check=1\.0"),
        ({"check": -0.1}, "check=-0.1; expected a share of the training steps, 0 <= check <= 1"),
        ({"check": 1.1}, "check=1.1; expected"),
        ({"warmup": 1.0}, "warmup=1.0; expected a share of the training steps"),
        ({"clip_norm": 0.0}, "clip_norm=0.0; expected a number above 0"),
        ({"clip_norm": 1.0, "response": bl.Unrolled(ADAM, steps=2)}, "clip_norm= goes with the default response"),
        ({"steps": None}, "expected one of the two"),
        ({"steps": 0}, "whole number from 1"),
        ({"every": 0}, "every=0"),
        ({"hyper": {}}, "nothing to tune"),
        ({"hyper": {"decay": RANGES["decay"]}}, "smoothing"),
        ({"response": bl.Unrolled(ADAM), "scheduler": lambda o: None}, "goes with the default response"),
        ({"response": 3}, "response is a int"),
        ({"model": 3}, "expected an nn.Module"),
    ],
)
def test_what_cannot_be_tuned_is_refused(options, told):
    with pytest.raises((TypeError, ValueError), match=told):
        run(**options)


def test_more_numbers_than_can_be_learned_are_tuned_through_a_few_steps():
    """A decay for each of 480 weights: a learned answer to so many ran away, without a warning."""
    steps = {"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=50), "clip_norm": 1.0}
    options = {"hyper": [bl.hyper.WeightDecay(per="weight")], "train": valid_loss, "steps": 200} | steps
    tuned = run(**options)
    inner = tuned.plan.response.optimizer
    assert isinstance(tuned.plan.response, bl.Unrolled)
    assert (tuned.plan.every, inner.scheduler, inner.clip_norm) == (5, steps["scheduler"], 1.0)
    assert sum(leaf.numel() for leaf in leaves(tuned.hyper)) > 400
    assert isinstance(run(**options | {"hyper": [bl.hyper.WeightDecay()], "steps": 10}).plan.response, bl.Hypernetwork)
    losses = tuned.to_frame()["hyper"]
    assert losses.iloc[-1] < 0.8 * losses.iloc[0]


def test_a_fresh_model_of_a_layer_of_ones_own_has_to_be_made():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = nn.Linear(12, 2), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.scale * self.inner(x)

    tuned = run(model=Scale(), steps=30)
    with pytest.raises(ValueError, match="make="):
        bl.retrain(tuned)
    assert len(bl.retrain(tuned, make=Scale, steps=20).found) == 1


def test_a_run_records_what_it_is_asked_to():
    game = bl.Game(
        x=bl.Player(lambda y: (y - 3.0) ** 2, torch.tensor(0.0)),
        y=bl.Player(lambda x, y: (y - 2.0 * x) ** 2, torch.tensor(0.0)),
    )
    solve = partial(bl.solve, game, y=bl.Implicit(bl.ClosedForm(lambda x: 2.0 * x)), steps=3)
    solution = solve(record=lambda variables: {"x.value": variables["x"]})
    assert solution.history[-1]["x.value"] == pytest.approx(float(solution.variables["x"]))
    for wrong in (lambda v: {"x": 1.0}, lambda v: 3.0, lambda v: {"a": "b"}):
        with pytest.raises((TypeError, ValueError), match="solve: record="):
            solve(record=wrong)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="'record' cannot name a player"):
        bl.Game(record=bl.Player(lambda record: record, torch.tensor(0.0)))

"""Mixtures and what their measures say, adversarial games of one's own networks, every method, the command."""

import json
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import logsigmoid, softplus
from typer.testing import CliRunner

import bilevel as bl
from games.cli import app
from games.experiments.data import DigitSource
from games.gan.adversarial import LOSSES, Draws, adversarial_game, perceptron
from games.gan.catalogue import experiments
from games.gan.images import frechet, judged
from games.gan.methods import METHODS, NOISE, SETTINGS, SampleSummary
from games.gan.mixture_experiment import rows
from games.gan.mixtures import grid, ring
from games.gan.run import mixture_run

CPU = torch.Generator


def seeded(seed=0):
    return CPU().manual_seed(seed)


# Measures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixture", [ring(), grid()], ids=["ring", "grid"])
def test_real_samples_are_nearly_perfect(mixture):
    found = mixture.quality(mixture.sample(20_000, seeded()))
    assert found.modes == len(mixture.centres)
    assert found.high_quality == pytest.approx(1.0 - math.exp(-4.5), abs=0.003)  # Rayleigh within 3
    assert found.reverse_kl < 0.002
    # The variance of a Rayleigh cut at 3: (1 - (1 + 4.5) exp(-4.5)) / (1 - exp(-4.5)).
    assert found.covariance_ratio == pytest.approx(0.9494, abs=0.02)


def test_lost_modes_are_told_by_count_and_by_divergence():
    mixture = ring()
    half = mixture.sample(20_000, seeded())
    half = half[half[:, 1] > 0.1]  # three of eight centres lie above
    found = mixture.quality(half)
    assert found.modes == 3
    assert found.reverse_kl == pytest.approx(math.log(8 / 3), abs=0.01)
    collapsed = mixture.quality(mixture.centres[:1].repeat(100, 1))
    assert (collapsed.modes, collapsed.high_quality, collapsed.covariance_ratio) == (1, 1.0, 0.0)
    assert collapsed.reverse_kl == pytest.approx(math.log(8))


def test_a_mode_hit_by_chance_does_not_count():
    """A tenth of the fair share: 12 of 1,000 samples on 8 modes hit nothing, 13 do."""
    mixture = ring()
    for few, modes in ((12, 1), (13, 2)):
        samples = torch.cat([mixture.centres[:1].repeat(1000 - few, 1), mixture.centres[1:2].repeat(few, 1)])
        assert mixture.quality(samples).modes == modes


def test_samples_far_off_are_of_no_quality_and_bad_ones_are_refused():
    nowhere = ring().quality(torch.zeros(10, 2))
    assert (nowhere.modes, nowhere.high_quality, nowhere.reverse_kl) == (0, 0.0, math.inf)
    for bad in (torch.empty(0, 2), torch.full((3, 2), torch.nan), torch.zeros(3)):
        with pytest.raises(ValueError, match=r"finite \[n, 2\]"):
            ring().quality(bad)


# The game ----------------------------------------------------------------------------------------------------------


def networks():
    torch.manual_seed(3)
    return perceptron([2, 8, 2]).double(), perceptron([2, 8, 1]).double()


def draws(length=4):
    return Draws(lambda count, chance: ring().sample(count, chance).double(), latent=2, batch=16, length=length)


class Doubled(Draws):
    def __iter__(self):
        return ((latents.double(), real.double()) for latents, real in super().__iter__())


def one(loss, penalty=0.0):
    generator, discriminator = networks()
    data = Doubled(draws().real, 2, 16, 4)
    return generator, discriminator, adversarial_game(generator, discriminator, data, loss=loss, penalty=penalty)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_the_papers(loss):
    generator, discriminator, game = one(loss)
    latents, real = torch.randn(16, 2).double(), ring().sample(16).double()
    players = {"generator": dict(generator.named_parameters()), "discriminator": dict(discriminator.named_parameters())}
    players = {name: {n: p.detach() for n, p in tree.items()} for name, tree in players.items()}
    on_real = discriminator(real).detach()[:, 0]
    on_fake = discriminator(generator(latents)).detach()[:, 0]
    told = {name: float(game.loss(name, players, (latents, real))) for name in players}
    if loss == "relativistic":
        assert told["discriminator"] == pytest.approx(float(softplus(on_fake - on_real).mean()))
        assert told["generator"] == pytest.approx(float(softplus(on_real - on_fake).mean()))
        return
    cross_entropy = -(logsigmoid(on_real).mean() + logsigmoid(-on_fake).mean())
    assert told["discriminator"] == pytest.approx(float(cross_entropy))
    wanted = -cross_entropy if loss == "zero-sum" else -logsigmoid(on_fake).mean()
    assert told["generator"] == pytest.approx(float(wanted))


def test_the_penalty_is_the_mean_square_slope_at_real_examples_and_the_discriminators_alone():
    generator, discriminator, game = one("non-saturating")
    *_, penalised = one("non-saturating", penalty=0.8)
    latents, real = torch.randn(16, 2).double(), ring().sample(16).double().requires_grad_()
    players = {
        name: {n: p.detach() for n, p in net.named_parameters()}
        for name, net in (("generator", generator), ("discriminator", discriminator))
    }
    [slope] = torch.autograd.grad(discriminator(real).sum(), real)
    batch = (latents, real.detach())
    more = float(penalised.loss("discriminator", players, batch) - game.loss("discriminator", players, batch))
    assert more == pytest.approx(0.4 * float(slope.square().sum(1).mean()))
    assert float(penalised.loss("generator", players, batch)) == float(game.loss("generator", players, batch))


def test_refusals():
    generator, discriminator = networks()
    with pytest.raises(ValueError, match="loss='hinge'"):
        adversarial_game(generator, discriminator, draws(), loss="hinge")
    with pytest.raises(ValueError, match="penalty=-1"):
        adversarial_game(generator, discriminator, draws(), penalty=-1.0)


def test_a_run_resumes_bit_for_bit_across_a_pass_of_draws(tmp_path):
    _, _, game = one("zero-sum")
    options = {
        "optimizer": partial(torch.optim.Adam, lr=1e-2),
        "dynamics": bl.dynamics.Alternating(),
        "checkpoint_every": 3,
    }
    torch.manual_seed(11)
    whole = bl.solve(game, steps=14, **options)
    torch.manual_seed(11)
    bl.solve(game, steps=6, checkpoint=tmp_path / "run.pt", **options)
    torch.manual_seed(999)
    again = bl.solve(game, steps=14, checkpoint=tmp_path / "run.pt", **options)
    for name in ("generator", "discriminator"):
        for key, value in whole.variables[name].items():
            assert torch.equal(value, again.variables[name][key])


# Methods -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_both_players_within_its_budget(method):
    found = mixture_run(
        DigitSource(),
        mixture="ring",
        method=method,
        rate=1e-3,
        ratio=4.0,
        loss="zero-sum",
        seed=0,
        evaluations=150,
        moments=3,
        keep_samples=True,
    )["moments"]
    assert [set(moment) >= {"modes", "high_quality", "work", "seconds", "samples"} for moment in found] == [True] * 3
    assert 100 < found[-1]["work"] <= 150
    assert not torch.equal(found[0]["samples"], found[-1]["samples"])


def test_the_learned_discriminator_goes_through_the_samples_that_weights_make():
    """Weights that generate the same get the same discriminator, whatever they are; others another one."""
    generator = perceptron([2, 6, 2])
    weights = torch.cat([p.detach().reshape(-1) for p in generator.parameters()])
    module = SampleSummary(generator, 2, len(weights), 5)
    nn.init.normal_(module.last.weight)
    unit = NOISE * len(weights) ** 0.5
    swapped = {n: p.detach().clone() for n, p in generator.named_parameters()}
    order = torch.tensor([1, 0, 2, 3, 4, 5])  # hidden units in another order generate the same
    swapped["0.weight"], swapped["0.bias"] = swapped["0.weight"][order], swapped["0.bias"][order]
    swapped["2.weight"] = swapped["2.weight"][:, order]
    same = torch.cat([p.reshape(-1) for p in swapped.values()])
    assert not torch.equal(same, weights)
    assert torch.allclose(module(weights / unit), module(same / unit), atol=1e-5)
    moved = module(torch.stack([weights, 1.1 * weights]) / unit)
    assert moved.shape == (2, 5)
    assert not torch.allclose(moved[0], moved[1], atol=1e-3)
    slope = torch.func.jacrev(lambda w: module(w / unit))(weights)
    assert float(slope.detach().abs().sum()) > 0.0


def test_the_learned_discriminator_sees_a_mixture_alike_at_any_size():
    generator = perceptron([2, 6, 2])
    weights = torch.cat([p.detach().reshape(-1) for p in generator.parameters()])
    small = SampleSummary(generator, 2, len(weights), 5)
    nn.init.normal_(small.last.weight)
    large = SampleSummary(nn.Sequential(*generator, Times(7.0)), 2, len(weights), 5, spread=7.0)
    large.load_state_dict({**small.state_dict(), "frequencies": large.frequencies})
    unit = NOISE * len(weights) ** 0.5
    assert torch.allclose(small(weights / unit), large(weights / unit), atol=1e-5)


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def test_settings_are_the_same_for_all():
    assert len(SETTINGS) == 8
    runs = experiments()["tuning"].parts
    tried = {}
    for part in runs:
        told = tuple(part.settings[key] for key in ("rate", "ratio", "loss", "seed", "evaluations"))
        tried.setdefault(part.settings["method"], set()).add(told)
    assert set(tried) == set(METHODS)
    assert all(settings == tried["simultaneous"] for settings in tried.values())
    assert {part.settings["seed"] for part in runs}.isdisjoint(p.settings["seed"] for p in experiments()["ring"].parts)


# Images --------------------------------------------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_in_closed_form():
    x = torch.randn(200_000, 2, dtype=torch.float64, generator=seeded())
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # exactly N(0, I)'s moments
    one = x @ torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)) + 1.0
    assert frechet(x, one) == pytest.approx(2.0 + (3.0 - 1.0) ** 2)
    assert frechet(one, x) == pytest.approx(frechet(x, one))
    assert frechet(one, one) == pytest.approx(0.0, abs=1e-9)


def test_the_judge_ranks_real_blurred_and_noise():
    from games.experiments.data import scikit_digits

    digits = scikit_digits(train=600, valid=10, test=600)
    judge = judged(digits.train.images, digits.train.labels, digits.test.images, digits.test.labels, epochs=20)
    assert judge.accuracy > 0.9
    real = digits.train.images
    mixed = 0.5 * (real + real[torch.randperm(len(real), generator=seeded())])
    noise = torch.rand(real.shape, generator=seeded())
    assert judge.frechet(real) == judge.floor < 0.2 * judge.frechet(mixed) < judge.frechet(noise)
    assert judge.classes(real) == 10
    only = real[digits.train.labels == 3]
    assert judge.classes(only) <= 2
    assert judge.frechet(only) > 5 * judge.floor


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_runs_draws_and_resumes(tmp_path):
    arguments = ["gan", "ring", "--seeds", "1", "--evaluations", "60", "--method", "alternating", "--method", "learned"]
    arguments += ["--output", str(tmp_path), "--jobs", "1"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "all 8 modes" in first.output
    assert {"ring.png", "ring-samples.png", "ring.json"} <= {file.name for file in tmp_path.iterdir()}
    results = json.loads((tmp_path / "ring.json").read_text())["results"]
    assert set(results) == {"alternating-0", "learned-0"}
    parts = {file: file.stat().st_mtime_ns for file in (tmp_path / "parts" / "ring").iterdir()}
    assert CliRunner().invoke(app, [*arguments, "--resume"]).exit_code == 0
    assert parts == {file: file.stat().st_mtime_ns for file in (tmp_path / "parts" / "ring").iterdir()}
    assert [line["discriminator"] for line in rows(ring(), results)] == ["alternating", "learned"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["circle"], "no such experiment"),
        (["--method", "best"], "no such method"),
        (["--seeds", "0"], "--seeds 0"),
        (["mnist", "--data", "/nowhere"], "/nowhere"),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path, arguments, said):
    found = CliRunner().invoke(app, ["gan", *arguments, "--output", str(tmp_path)])
    assert found.exit_code == 2
    assert said in found.output
    assert "Traceback" not in found.output


def test_a_generator_of_ones_own():
    """What the docs promise: any modules, any data; the variables go back into the module."""
    generator, discriminator, game = one("relativistic", penalty=0.1)
    solution = bl.solve(game, optimizer=partial(torch.optim.Adam, lr=1e-3), steps=3)
    generator.load_state_dict(solution.variables["generator"])
    latents = torch.randn(4, 2).double()
    made = functional_call(generator, solution.variables["generator"], (latents,))
    assert torch.equal(generator(latents), made)
    assert set(solution.variables["discriminator"]) == set(dict(discriminator.named_parameters()))

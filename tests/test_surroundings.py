"""What surrounds a game: optimisers that do more, schedules of one's own, losses that take gradients, odd options."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import bilevel as bl

F64 = torch.float64
START = torch.tensor([1.0, -2.0], dtype=F64)
SGD = partial(optim.SGD, lr=0.1)


def lead(x: Tensor, y: Tensor) -> Tensor:
    return (y - 1.0).square().sum() + 0.1 * x.square()


def follow(x: Tensor, y: Tensor) -> Tensor:
    return (y - torch.stack([x, 2.0 * x])).square().sum() + 0.1 * torch.cosh(y).sum()


def game(follower: Any = follow) -> bl.Game:
    zero = torch.tensor(0.3, dtype=F64)
    return bl.Game(x=bl.Player(lead, zero), y=bl.Player(follower, START))


def slope(optimizer: Any, steps: int, **options: Any) -> Tensor:
    response = bl.Unrolled(optimizer, steps=steps, **options)
    x = torch.tensor(0.3, dtype=F64, requires_grad=True)
    y, _ = response(game(), {"x": x}, response.init(game()))
    (found,) = torch.autograd.grad(lead(x, y), x)
    return found


def difference(make: Any, steps: int, scheduler: Any = None) -> float:
    """The same by central differences of a plain loop; h = 1e-5 leaves 1e-9 of the slope."""

    def value(at: float) -> float:
        x, y = torch.tensor(at, dtype=F64), START.clone().requires_grad_()
        optimizer = make([y])
        schedule = scheduler and scheduler(optimizer)
        for _ in range(steps):
            optimizer.zero_grad()
            follow(x, y).backward()
            optimizer.step()
            if schedule:
                schedule.step()
        return lead(x, y).item()

    return (value(0.3 + 1e-5) - value(0.3 - 1e-5)) / 2e-5


class DecayingWeights(optim.lr_scheduler.LRScheduler):
    """A schedule of the weight decay: on in odd steps, so that an option must also be taken back."""

    def step(self, *args: Any) -> None:
        super().step(*args)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = 0.5 * (self.last_epoch % 2)

    def get_lr(self) -> list[Any]:
        return list(self.base_lrs)


@pytest.mark.parametrize("differentiation", [bl.ReverseMode(), bl.Segments(count=2), bl.ForwardMode()])
def test_a_schedule_may_set_any_option(differentiation: Any) -> None:
    optimizer = bl.inner.TorchOptimizer(partial(optim.Adam, lr=0.1), scheduler=DecayingWeights)
    found = slope(optimizer, 6, differentiation=differentiation)
    assert found.item() == pytest.approx(difference(partial(optim.Adam, lr=0.1), 6, DecayingWeights), rel=1e-6)


@pytest.mark.parametrize("kind", [partial(optim.SGD, lr=0.1, momentum=0.9), partial(optim.Adam, lr=0.1)])
def test_an_optimiser_goes_on_from_what_its_factory_loads(kind: Any) -> None:
    parameter = START.clone().requires_grad_()
    trained = kind([parameter])
    for _ in range(3):
        parameter.grad = torch.ones_like(parameter)
        trained.step()

    def make(parameters: list[Tensor]) -> optim.Optimizer:
        optimizer = kind(parameters)
        optimizer.load_state_dict(copy.deepcopy(trained.state_dict()))  # torch would write into it
        return optimizer

    # torch's count of steps is float32, in which 1 - beta**step is off by 1e-8.
    assert slope(make, 5).item() == pytest.approx(difference(make, 5), rel=1e-6)
    assert abs(slope(make, 5) - slope(kind, 5)) > 1e-3


def test_a_rate_that_is_a_tensor_may_fall_to_zero() -> None:
    cosine = partial(optim.lr_scheduler.CosineAnnealingLR, T_max=3)

    def make(parameters: list[Tensor]) -> optim.Optimizer:
        return optim.Adam(parameters, lr=torch.tensor(0.05, dtype=F64))

    found = slope(bl.inner.TorchOptimizer(make, scheduler=cosine), 6)
    assert found.item() == pytest.approx(difference(make, 6, cosine), rel=1e-6)


def _hooks(parameters: list[Tensor]) -> optim.Optimizer:
    for parameter in parameters:
        parameter.register_hook(lambda gradient: 0.5 * gradient)
    return SGD(parameters)


def _writes(parameters: list[Tensor]) -> optim.Optimizer:
    with torch.no_grad():
        parameters[0].add_(1.0)
    return SGD(parameters)


@pytest.mark.parametrize(("make", "told"), [(_hooks, "registers hooks"), (_writes, "writes into the parameters")])
def test_factories_that_do_more_are_refused(make: Any, told: str) -> None:
    with pytest.raises((TypeError, ValueError), match=told):
        slope(make, 2)
    with pytest.raises((TypeError, ValueError), match=told):
        bl.solve(game(), y=bl.Unrolled(SGD, steps=2), optimizer=make, steps=1)


def test_hooks_on_a_players_parameters_are_refused() -> None:
    model = nn.Linear(2, 1)
    handle = model.weight.register_hook(lambda gradient: 0.0 * gradient)
    with pytest.raises(TypeError, match=r"'weight' has a hook"):
        bl.Player(lambda w: w.sum(), model)
    handle.remove()
    bl.Player(lambda w: w.sum(), model)


@pytest.mark.parametrize(
    "response", [bl.Unrolled(SGD, steps=3), bl.Unrolled(SGD, steps=4, differentiation=bl.Segments(count=2))]
)
def test_a_gradient_penalty_is_played(response: Any) -> None:
    torch.manual_seed(0)
    model, rows = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)), torch.randn(4, 2)

    def penalised(x: Tensor, w: Any, batch: Tensor) -> Tensor:
        inputs = batch.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(w(inputs).sum(), inputs, create_graph=True)
        return (w(batch) - x).square().mean() + (gradient.norm(dim=1) - 1.0).square().mean()

    zero = torch.tensor(0.0)
    played = bl.Game(
        x=bl.Player(lambda x, w, batch: (w(batch) - 1.0).square().mean() + x**2, zero, data=[rows]),
        w=bl.Player(penalised, model, data=[rows]),
    )
    variables = {name: played.initial(name) for name in played.names}
    with torch.no_grad():
        value = played.loss("w", variables, rows)
        drawn = torch.rand(())
    assert not value.requires_grad
    torch.testing.assert_close(value, played.loss("w", variables, rows).detach())
    assert 0.0 <= drawn < 1.0
    assert len(bl.solve(played, w=response, optimizer=SGD, steps=2).history) == 2


def test_a_value_with_a_gradient_inside_draws_random_numbers_once() -> None:
    def loss(y: Tensor) -> Tensor:
        noise = torch.rand(2, dtype=F64)
        (gradient,) = torch.autograd.grad((y * y).sum(), y, create_graph=True)
        return (y * noise).sum().square() + gradient.square().sum()

    played = bl.Game(y=bl.Player(loss, START))
    with torch.no_grad():
        torch.manual_seed(1)
        value, after = played.loss("y", {"y": START}), torch.rand(())
    torch.manual_seed(1)
    y = START.clone().requires_grad_()
    assert value == loss(y).detach()
    assert after == torch.rand(())


def test_a_leader_moved_by_nadam_resumes_bit_for_bit(tmp_path: Any) -> None:
    def run(steps: int, **options: Any) -> Tensor:
        found: Tensor = bl.solve(
            game(), y=bl.Unrolled(SGD, steps=2), optimizer=partial(optim.NAdam, lr=0.1), steps=steps, **options
        ).variables["x"]
        return found

    run(3, checkpoint=tmp_path / "run.pt")
    assert torch.equal(run(8, checkpoint=tmp_path / "run.pt"), run(8))


@pytest.mark.filterwarnings("ignore::bilevel.errors.InfeasibleWarning")  # a few steps do not end inside
def test_a_changed_run_may_get_functions_and_lose_them(tmp_path: Any) -> None:
    def run(steps: int, path: str, bound: Any) -> bl.Solution:
        players = bl.Game(x=bl.Player(lead, torch.tensor(0.3, dtype=F64), inequality=bound), y=bl.Player(follow, START))
        return bl.solve(
            players,
            y=bl.Unrolled(SGD, steps=2),
            optimizer=SGD,
            steps=steps,
            checkpoint=tmp_path / path,
            accept_changes=True,
        )

    run(3, "got", None)
    assert len(run(6, "got", lambda x: x - 0.2).history) == 6
    run(3, "lost", lambda x: x - 0.2)
    assert len(run(6, "lost", None).history) == 6


def _scaled(x: Tensor, batch: Any) -> Tensor:
    batch["rows"].mul_(2.0)
    return (x * batch["rows"]).sum().square()


def _popped(x: Tensor, batch: Any) -> Tensor:
    return (x * batch.pop("rows")).sum().square()


@pytest.mark.parametrize(("loss", "told"), [(_scaled, "writes into batch"), (_popped, "takes away batch")])
def test_losses_that_change_their_batch_are_refused(loss: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        bl.Game(x=bl.Player(loss, torch.ones(2), data=[{"rows": torch.ones(2)}]))


@pytest.mark.parametrize(
    "option",
    [
        {"steps": 3.5},
        {"steps": float("nan")},
        {"steps": True},
        {"steps": "3"},
        {"checkpoint_every": 1.5},
        {"seed": None},
        {"seed": 0.5},
        {"clip_norm": -1.0},
        {"clip_norm": 0.0},
        {"clip_norm": "1"},
        {"callbacks": print},
        {"callbacks": None},
        {"callbacks": [1]},
        {"record": 3},
        {"progress": "no"},
        {"resume": 0},
        {"accept_changes": "yes"},
        {"scheduler": "cosine"},
    ],
)
def test_options_of_another_kind_are_refused_by_name(option: Any) -> None:
    (name,) = option
    with pytest.raises((TypeError, ValueError), match=f"{name}.*expected"):
        bl.solve(game(), y=bl.Unrolled(SGD, steps=2), optimizer=SGD, **{"steps": 2, **option})


def test_what_is_no_game_or_no_device_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a bilevel\.Game"):
        bl.solve(None, steps=1)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="dtype=torch.float64"):
        game().to(F64)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="floating"):
        game().to(dtype=torch.int32)

"""What wraps or replaces a module: its hypergradient is the plain module's, or it is refused by name."""

import copy
import warnings
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import bilevel as bl

INPUTS, TARGETS = torch.linspace(-1.0, 1.0, 24).reshape(6, 4), torch.linspace(-1.0, 1.0, 6)[:, None]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))


def hypergradient(model, around=nullcontext, run=lambda y, inputs: y(inputs), quiet=True):
    """That of a weight decay's logarithm, after three steps."""

    def judge(y):
        with around():
            return (run(y, INPUTS) - TARGETS).float().square().mean()

    def fit(decay, y):
        return judge(y) + 0.1 * decay.exp() * sum(leaf.square().sum() for leaf in y.values())

    game = bl.Game(decay=bl.Player(judge, torch.tensor(-1.0)), y=bl.Player(fit, model))
    response = bl.Unrolled(partial(torch.optim.SGD, lr=0.1), steps=3)
    decay = torch.tensor(-1.0, requires_grad=True)
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore", bl.BilevelWarning)  # a kernel that is replaced is told
        answer, _ = response(game, {"decay": decay}, response.init(game))
    game.loss("decay", {"decay": decay, "y": answer}).backward()
    return decay.grad


def test_a_compiled_module_is_run_uncompiled():
    assert torch.allclose(hypergradient(torch.compile(net(), backend="eager")), hypergradient(net()), rtol=1e-5)


def test_a_compiled_module_is_told_of():
    model = net()
    model.compile(backend="eager")
    with pytest.warns(bl.BilevelWarning, match="what torch.compile made runs uncompiled"):
        hypergradient(model, quiet=False)


def test_fake_quantisation_has_the_derivative_of_its_straight_through_gradient():
    def rounded(y, inputs, quantise):
        weight, bias = y["0.weight"], y["0.bias"]
        return nn.functional.linear(inputs, quantise(weight), bias)

    def fake(weight):
        return torch.fake_quantize_per_tensor_affine(weight, 0.125, 0, -128, 127)

    def straight(weight):
        return weight + (fake(weight) - weight).detach()

    model = nn.Sequential(nn.Linear(4, 1))
    first, second = (hypergradient(model, run=partial(rounded, quantise=how)) for how in (fake, straight))
    assert float(second) != 0.0
    assert torch.allclose(first, second, rtol=1e-5)


def test_autocast_inside_a_loss_gives_the_hypergradient_of_half_precision():
    half = hypergradient(net(), around=partial(torch.autocast, "cpu", dtype=torch.bfloat16))
    # bfloat16 has eight bits: 2^-8 a product, of which a loss and its two derivatives have a dozen one after the other.
    assert torch.allclose(half, hypergradient(net()), rtol=12 * 2.0**-8)


def test_a_checkpointed_module_is_refused():
    with pytest.raises(ValueError, match="under torch.utils.checkpoint"):
        hypergradient(net(), run=lambda y, inputs: checkpoint(y, inputs, use_reentrant=False))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_layer_that_cuts_the_gradient_is_refused_and_one_on_fixed_inputs_serves():
    first, _, last = net()
    try:
        whole = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, dtype=torch.qint8)
        fixed = whole(INPUTS).detach()
    except (RuntimeError, AttributeError):
        pytest.skip("this PyTorch does not quantise here")
    served = hypergradient(nn.Sequential(whole, copy.deepcopy(first), nn.Tanh(), copy.deepcopy(last)))
    plain = nn.Sequential(copy.deepcopy(first), nn.Tanh(), copy.deepcopy(last))
    assert torch.allclose(served, hypergradient(plain, run=lambda y, _: y(fixed)), rtol=1e-5)
    with pytest.raises((ValueError, RuntimeError), match="y"):
        hypergradient(nn.Sequential(nn.Linear(4, 4), whole, last))


def test_fused_attention_is_computed_by_the_plain_kernel():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.query, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

        def forward(self, inputs):
            one = self.query(inputs)[None, None]
            return self.head(nn.functional.scaled_dot_product_attention(one, one, one)[0, 0])

    plain = hypergradient(Attends(), around=partial(sdpa_kernel, SDPBackend.MATH))
    assert torch.allclose(hypergradient(Attends()), plain, rtol=1e-4)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        hypergradient(net())


def test_data_parallel_of_torch_is_refused():
    with pytest.raises(ValueError, match=r"wrapped by nn.DataParallel, .* Pass the module that it wraps"):
        hypergradient(nn.DataParallel(net()))


# Two ranks: a dozen roundings of 2^-8 in bfloat16, and some ten of 6e-8 in float32 through three steps.
ON_RANKS = {"autocast": 12 * 2.0**-8, "compiled": 1e-5, "attention": 1e-5, "fake quantisation": 1e-5}
REFUSED_ON_RANKS = {"checkpoint": "under torch.utils.checkpoint", "BatchNorm": "Its BatchNorm ('1')"}


@pytest.mark.slow
def test_modules_that_are_not_plain_on_two_ranks(played):
    lines = played("modules", 2)
    assert lines[0] == lines[1]
    found = {told["case"]: told for told in lines[0]}
    assert list(found) == [*ON_RANKS, *REFUSED_ON_RANKS]
    for case, tolerance in ON_RANKS.items():
        assert not found[case]["text"], found[case]
        assert found[case]["error"] <= tolerance, found[case]
    for case, words in REFUSED_ON_RANKS.items():
        assert words in found[case]["text"]

"""Operators of one's own: the same bits whether something watches or not, and seen by all who have to see them."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from spikefit.ops.custom_op import custom_op
from spikefit.ops.lif import lif
from spikefit.ops.lif.op import _lif_backward, _lif_forward
from spikefit.ops.norm import affine, channel_norm
from spikefit.ops.norm.op import _channel_norm, _channel_norm_backward
from support import KERNELS, dyadic

calls: list[str] = []


@custom_op("spikefit_test::scaled")
def scaled(x: Tensor, factor: float) -> Tensor:
    calls.append(type(factor).__name__)
    return x * factor


@scaled.register_fake
def _(x, factor):
    return torch.empty_like(x)


def _save(ctx, inputs, output):
    ctx.factor = inputs[1]


scaled.register_autograd(lambda ctx, g: (g * ctx.factor, None), setup_context=_save)


@custom_op("spikefit_test::without_gradient")
def without_gradient(x: Tensor) -> Tensor:
    return x + 1


class Names(TorchDispatchMode):
    """Names of what is called."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.found.add(op.name())
        return op(*args, **(kwargs or {}))


def lif_step():
    x, v_0 = dyadic(1, 2, 40).requires_grad_(), dyadic(2, 40, seed=1)
    spikes, v_T = lif(x, v_0, backend="numba")
    return [spikes, v_T, *torch.autograd.grad((spikes * dyadic(1, 2, 40, seed=2)).sum(), x)]


def lif_sequence():
    x, v_0, leak = dyadic(5, 2, 40).requires_grad_(), dyadic(2, 40).requires_grad_(), torch.tensor(0.5).requires_grad_()
    spikes, v_T = lif(x, v_0, leak=leak, v_reset=0, surrogate="atan(3)", backend="numba")
    return [spikes, v_T, *torch.autograd.grad((spikes * spikes.cumsum(0)).sum() + v_T.sum(), [x, v_0, leak])]


def norm(per_step, T=3):
    torch.manual_seed(0)
    z, weight, bias = torch.randn(T, 4, 3, 5, 5).requires_grad_(), torch.rand(3).requires_grad_(), torch.rand(3)
    x, moments = channel_norm(z, weight, bias, per_step=per_step, backend="numba")
    return [x, moments.mean, moments.var, *torch.autograd.grad((x * x.roll(1, 0)).sum(), [z, weight])]


def affine_map():
    z, scale = torch.randn(3, 4, 2).requires_grad_(), torch.rand(2).requires_grad_()
    x = affine(z, scale, torch.rand(2), backend="numba")
    return [x, *torch.autograd.grad(x.square().sum(), [z, scale])]


RUNS = {
    "lif step": lif_step,
    "lif sequence": lif_sequence,
    "norm of steps": lambda: norm(True),
    "norm of one step": lambda: norm(False, T=1),
    "norm": lambda: norm(False),
    "affine": affine_map,
}


@pytest.mark.parametrize("name", RUNS)
def test_results_and_gradients_are_the_same_bits_whether_something_watches_or_not(name):
    torch.manual_seed(0)
    direct = RUNS[name]()
    torch.manual_seed(0)
    with Names() as names:
        watched = RUNS[name]()
    assert any(found.startswith("spikefit::") for found in names.found)
    assert any(found.startswith("spikefit::") and found.endswith("_backward") for found in names.found)
    for a, b in zip(direct, watched, strict=True):
        assert torch.equal(a, b)


def test_where_nothing_watches_the_function_itself_is_called(monkeypatch):
    def fail(*args):
        raise AssertionError("the dispatcher was asked")

    monkeypatch.setattr(scaled, "_op", fail)
    x = torch.ones(3, requires_grad=True)
    out = scaled(x, 2.0)
    assert "spikefit_test::scaled" in out.grad_fn.name()
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full((3,), 2.0))
    assert not scaled(x.detach(), 2.0).requires_grad
    with torch.no_grad():
        assert not scaled(x, 2.0).requires_grad
    # all that neurons and norms give the operators of every step, numbers as users write them
    for op in (_lif_forward, _lif_backward, _channel_norm, _channel_norm_backward):
        monkeypatch.setattr(op, "_op", fail)
    lif(dyadic(2, 2, 20).requires_grad_(), leak=1, v_threshold=1, v_reset=0, surrogate="rect(1)")[0].sum().backward()
    norm(True)


def test_numbers_of_another_type_are_converted_as_the_operator_does():
    calls.clear()
    assert torch.equal(scaled(torch.ones(2), 3), torch.full((2,), 3.0))
    assert calls == ["float"]


def test_lazy_negations_and_zeros_are_written_out_first():
    x, g = dyadic(2, 3, 20).requires_grad_(), torch.ones(2, 3, 20)
    spikes = lif(x, backend="numba")[0]
    assert torch.equal(lif(torch._neg_view(-x.detach()), backend="numba")[0], spikes)
    assert not torch.autograd.grad(spikes, x, torch._efficientzerotensor(g.shape))[0].any()


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_all_who_have_to_see_the_operator_do():
    x = torch.ones(3)
    with Names() as names:
        scaled(x, 2.0)
    assert "spikefit_test::scaled" in names.found
    with FakeTensorMode() as mode:
        assert isinstance(scaled(mode.from_tensor(x), 2.0), FakeTensor)
    # a fake tensor outside of its mode
    assert isinstance(scaled(FakeTensorMode().from_tensor(x), 2.0), FakeTensor)
    with Functions() as functions:
        scaled(x, 2.0)
    assert any("spikefit_test.scaled" in found for found in functions.found)
    assert "spikefit_test::scaled" in str(torch.jit.trace(lambda x: scaled(x, 2.0), x, check_trace=False).graph)
    seen = []
    compiled = torch.compile(
        lambda x: scaled(x, 2.0), fullgraph=True, backend=lambda g, _: (seen.append(str(g.graph)), g.forward)[1]
    )
    assert torch.equal(compiled(x), 2 * x)
    assert "spikefit_test" in seen[0]


def test_transforms_and_tangents_are_refused_by_torch_and_not_lost():
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda x: scaled(x, 2.0).sum())(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        scaled(forward_ad.make_dual(x.requires_grad_(), x), 2.0)


def test_an_operator_without_a_gradient_says_so():
    out = without_gradient(torch.ones(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        out.sum().backward()


@pytest.mark.parametrize("backend", KERNELS)
def test_one_step_alone_has_the_gradient_of_a_step_whose_state_is_wanted(backend):
    x, g = dyadic(1, 3, 50).requires_grad_(), dyadic(1, 3, 50, seed=1)
    found = []
    for v_0 in (dyadic(3, 50, seed=2), dyadic(3, 50, seed=2).requires_grad_()):
        found.append(torch.autograd.grad((lif(x, v_0, backend=backend)[0] * g).sum(), x)[0])
    assert torch.equal(*found)

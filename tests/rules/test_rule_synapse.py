"""The functions whose gradient reads a trace: values of the layers, gradients of autograd."""

import pytest
import torch
from torch import nn

from spikefit.layers import StandardizedConv1d, StandardizedConv2d, StandardizedLinear, apply_weight
from spikefit.layers.weight import map_of, parameters_of
from spikefit.rules.synapse import traced_affine, traced_leak, traced_map, weighted

SYNAPSES = {
    "linear": (lambda: nn.Linear(4, 6), (4,)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), (4,)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (4, 7, 5)),
    "strided 1x1": (lambda: nn.Conv2d(4, 6, 1, stride=2), (4, 7, 5)),
    "standardised linear": (lambda: StandardizedLinear(4, 6), (4,)),
    "standardised conv1d": (lambda: StandardizedConv1d(4, 6, 3), (4, 9)),
    "standardised conv2d": (lambda: StandardizedConv2d(4, 6, 3, padding=1), (4, 6, 5)),
}


def made(name):
    torch.manual_seed(0)
    make, shape = SYNAPSES[name]
    layer = make().double()
    return layer, torch.randn(1, 3, *shape, dtype=torch.float64, requires_grad=True)


def traced(layer, x, trace, c, chunk=None):
    return traced_map(x, trace, c, *parameters_of(layer, "cpu"), map_of(layer), chunk)


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("name", SYNAPSES)
def test_with_the_input_as_trace_it_is_the_layer(name, chunk):
    layer, x = made(name)
    leaves = [x, *layer.parameters()]
    wanted, got = apply_weight(layer, x, chunk=chunk), traced(layer, x, x.detach(), 1.0, chunk)
    assert torch.equal(got, wanted)
    g = torch.randn_like(wanted)
    for d, d_wanted in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(wanted, leaves, g), strict=True):
        torch.testing.assert_close(d, d_wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda i: traced(layer, i, torch.zeros_like(x), 1.0), x)


@pytest.mark.parametrize("name", SYNAPSES)
def test_with_another_trace_only_the_parameters_change(name):
    layer, x = made(name)
    trace = torch.randn_like(x).requires_grad_()
    parameters = list(layer.parameters())
    g = torch.randn_like(apply_weight(layer, x))
    got = torch.autograd.grad(traced(layer, x, trace, 2.5), [x, *parameters], g)
    plain = torch.autograd.grad(apply_weight(layer, x), [x, *parameters], g)
    of_trace = torch.autograd.grad(apply_weight(layer, trace.detach()), parameters, g)
    assert torch.equal(got[0], plain[0])
    for (path, _), d, d_trace in zip(layer.named_parameters(), got[1:], of_trace, strict=True):
        torch.testing.assert_close(d, d_trace * 2.5 if path == "bias" else d_trace, rtol=1e-12, atol=1e-12)
    (to_trace,) = torch.autograd.grad(traced(layer, x, trace, 1.0), trace, g, allow_unused=True)
    assert to_trace is None, "no gradient flows into a trace"


def test_it_keeps_the_trace_and_the_weight_and_not_the_input():
    layer, x = made("conv2d")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        trace = torch.randn_like(x).detach()
        traced(layer, x, trace, 1.0)
    assert {t.data_ptr() for t in kept} == {trace.data_ptr(), layer.weight.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trace_of_lower_precision_is_cast_in_backward(dtype):
    layer, x = made("conv2d")
    trace, g = torch.randn_like(x).detach(), torch.randn(1, 3, 6, 4, 3, dtype=torch.float64)
    got = torch.autograd.grad(traced(layer, x, trace.to(dtype), 1.0), layer.weight, g)[0]
    wanted = torch.autograd.grad(traced(layer, x, trace.to(dtype).double(), 1.0), layer.weight, g)[0]
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


def test_norms_leaks_and_weights_by_hand():
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], requires_grad=True)  # [1, B=2, C=2]
    weight, bias = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    trace = torch.tensor([[[1.0, 0.0], [2.0, -1.0]]])
    g = torch.tensor([[[1.0, 2.0], [4.0, 8.0]]])
    out = traced_affine(x, weight, bias, trace, 1.5)
    assert torch.equal(out, x)
    dx, d_weight, d_bias = torch.autograd.grad(out, [x, weight, bias], g)
    assert torch.equal(dx, g)
    assert d_weight.tolist() == [1 + 8, -8]
    assert d_bias.tolist() == [1.5 * 5, 1.5 * 10]

    leak, gain = torch.tensor(0.5, requires_grad=True), torch.tensor(0.25, requires_grad=True)
    f, h = torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    dx, d_leak, d_gain = torch.autograd.grad(traced_leak(x, leak, gain, f, h), [x, leak, gain], g)
    assert torch.equal(dx, g)
    assert float(d_leak) == (1 + 4 + 16) / 0.25
    assert float(d_gain) == 2 / 0.25

    assert torch.equal(torch.autograd.grad(weighted(x, 3.0), x, g)[0], 3 * g)

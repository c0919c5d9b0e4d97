"""The gradient of the LIF sequence: known answers, finite differences of a smooth twin, and recomputed inputs."""

import pytest
import torch

from spikefit.ops.lif import lif, lif_backward
from spikefit.ops.surrogate import atan, fast_sigmoid, rect, sigmoid, triangle
from support import EQUATIONS, KERNELS, KNOWN_GRADIENTS, KNOWN_TRACE, assert_close, assert_same_spikes, dyadic

BACKENDS = ["reference", *KERNELS]

# membrane behind the known trace
MEMBRANE = {"soft": 0.67578125, "hard": 0.625}


@pytest.mark.parametrize(("reset", "detach_reset", "surrogate", "wanted"), KNOWN_GRADIENTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_known_traces_and_gradients(backend, reset, detach_reset, surrogate, wanted):
    options = {"leak": 0.25, "v_reset": 0.0 if reset == "hard" else None, "backend": backend}
    x = torch.tensor(KNOWN_TRACE).view(4, 1, 1).requires_grad_()
    spikes, v_T = lif(x, **options, detach_reset=detach_reset, surrogate=surrogate)
    spikes.sum().backward()
    assert spikes.flatten().tolist() == [1, 0, 1, 0]
    assert v_T.item() == MEMBRANE[reset]
    assert_close(x.grad.flatten(), torch.tensor(wanted), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gain_of_the_known_trace(backend):
    spikes, v_T = lif(torch.tensor(KNOWN_TRACE).view(4, 1, 1), leak=0.25, gain=0.75, backend=backend)
    assert spikes.flatten().tolist() == [0, 0, 0, 0]
    assert v_T.item() == 0.7060546875


def smooth_lif(x, v, leak, gain, theta, surrogate, *, v_reset=None, reset=True, v_rest=None, detach_reset=False):
    """The neuron with the primitive of its surrogate in place of the step, by plain autograd; written on its own."""
    v_rest = v_rest if v_rest is not None else v_reset or 0.0
    spikes = []
    for x_t in x:
        u = v_rest + leak * (v - v_rest) + gain * x_t
        s = surrogate.primitive(u - theta)
        spikes.append(s)
        s = s.detach() if detach_reset else s
        if not reset:
            v = u
        elif v_reset is None:
            v = u - theta * s
        else:
            v = (1 - s) * u + s * v_reset
    return torch.stack(spikes), v


def smooth_inputs():
    torch.manual_seed(0)
    x, v_0 = torch.randn(5, 2, 2, dtype=torch.float64) + 0.5, torch.randn(2, 2, dtype=torch.float64)
    coefficients = [torch.tensor(c, dtype=torch.float64) for c in (0.8, 0.7, 0.9)]
    return [t.requires_grad_() for t in (x, v_0, *coefficients)]


class SmoothTwin(torch.autograd.Function):
    """Forward: the smooth neuron; backward: `lif_backward`, with the smooth spikes as the given ones."""

    @staticmethod
    def forward(ctx, x, v_0, leak, gain, theta, surrogate, options, backend):
        with torch.no_grad():
            spikes, v_T = smooth_lif(x, v_0, leak, gain, theta, surrogate, **options)
        ctx.save_for_backward(x, v_0, leak, gain, theta, spikes)
        ctx.options = options | {"surrogate": surrogate, "backend": backend, "detach_reset": False}
        return spikes, v_T

    @staticmethod
    def backward(ctx, g, q):
        x, v_0, leak, gain, theta, spikes = ctx.saved_tensors
        gradients = lif_backward(g, q, x, v_0, spikes, leak=leak, gain=gain, v_threshold=theta, **ctx.options)
        return *gradients, None, None, None


@pytest.mark.parametrize("surrogate", [atan(2), triangle(1), rect(1), sigmoid(4), fast_sigmoid(3)], ids=str)
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_smooth_twin_by_finite_differences(backend, equation, surrogate):
    options = EQUATIONS[equation]
    assert torch.autograd.gradcheck(lambda *t: SmoothTwin.apply(*t, surrogate, options, backend), smooth_inputs())


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_smooth_twin_with_detached_reset(backend, equation):
    inputs, options = smooth_inputs(), EQUATIONS[equation]
    spikes, v_T = smooth_lif(*inputs, atan(2), **options, detach_reset=True)
    g, q = torch.randn_like(spikes), torch.randn_like(v_T)
    wanted = torch.autograd.grad((spikes * g).sum() + (v_T * q).sum(), inputs)
    x, v_0, leak, gain, theta = inputs
    got = lif_backward(
        g, q, x, v_0, spikes.detach(), leak=leak, gain=gain, v_threshold=theta, backend=backend, **options
    )
    for name, a, b in zip(got._fields, got, wanted, strict=True):
        assert_close(a, b, 1e-12, name)


@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_written_adjoint_equals_autograd(backend, equation, detach_reset):
    options = EQUATIONS[equation] | {"detach_reset": detach_reset}
    x, v_0, g, q = dyadic(5, 2, 60), dyadic(2, 60, seed=1), dyadic(5, 2, 60, seed=2), dyadic(2, 60, seed=3)
    inputs = [t.requires_grad_() for t in (x, v_0, torch.tensor(0.5), torch.tensor(0.75), torch.tensor(1.0))]
    leak, gain, theta = inputs[2:]
    spikes, v_T = lif(x, v_0, leak=leak, gain=gain, v_threshold=theta, **options, backend="reference")
    wanted = torch.autograd.grad((spikes * g).sum() + (v_T * q).sum(), inputs)
    got = lif_backward(g, q, x, v_0, leak=0.5, gain=0.75, v_threshold=1.0, **options, backend=backend)
    for name, a, b in zip(got._fields, got, wanted, strict=True):
        assert_close(a, b, 1e-5, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8], ids=str)
@pytest.mark.parametrize("equation", ["soft, rest", "hard, level, rest"])
@pytest.mark.parametrize("backend", KERNELS)
def test_given_spikes_replace_the_threshold(backend, equation, dtype):
    x, v_0, g = dyadic(5, 2, 60), dyadic(2, 60, seed=1), dyadic(5, 2, 60, seed=2)
    spikes, _ = lif(x, v_0, **EQUATIONS[equation], backend="reference")
    other = (spikes.bool() ^ (dyadic(5, 2, 60, seed=4) > 1.5)).to(dtype)
    options = EQUATIONS[equation] | {"detach_reset": False}
    got = lif_backward(g, None, x, v_0, other, **options, backend=backend)
    wanted = lif_backward(g, None, x, v_0, other, **options, backend="reference")
    for name, a, b in zip(got._fields, got, wanted, strict=True):
        assert_close(a, b, 1e-5, name)
    own = lif_backward(g, None, x, v_0, spikes.to(dtype), **options, backend=backend)
    assert_close(own.x, lif_backward(g, None, x, v_0, **options, backend=backend).x, 1e-6, "the spikes of the forward")
    assert (own.x - got.x).abs().max() > 0.1, "other spikes must show"


@pytest.mark.parametrize("v_reset", [None, 0.0], ids=["soft", "hard"])
@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_given_spikes_make_recomputed_inputs_harmless(backend, detach_reset, v_reset):
    """A current off by 1e-4 moves gradients by less than 1e-2; thresholding again flips spikes and moves them more."""
    torch.manual_seed(2)
    x = torch.randn(64, 1, 4000) * 0.3 + 0.1
    options = {"leak": 0.9, "v_reset": v_reset, "detach_reset": detach_reset, "backend": backend}
    spikes, _ = lif(x, **options)
    assert_same_spikes(spikes, lif(x, **options | {"backend": "reference"})[0])
    g = torch.rand_like(x)
    exact = lif_backward(g, None, x, **options).x
    noisy = x + 1e-4 * torch.randn_like(x)
    assert (lif_backward(g, None, noisy, None, spikes, **options).x - exact).abs().max() < 1e-2
    assert (lif_backward(g, None, noisy, **options).x - exact).abs().max() > 1e-2

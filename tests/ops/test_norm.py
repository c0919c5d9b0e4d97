"""Channel normalisation: parity with torch's batch norm, one result for all layouts and pieces, honest refusals."""

import pytest
import torch
from torch.nn import functional as F

from spikefit.errors import BackendError, OptionError, ShapeError
from spikefit.layers.norm import BatchNorm
from spikefit.ops.dispatch import use_backend
from spikefit.ops.norm import affine, channel_norm, moments

SHAPES = [(5, 3, 7), (5, 3, 7, 9), (5, 3, 7, 4, 6), (1, 2, 1, 3, 3)]


def sequence(shape, dtype, channels_last=False):
    torch.manual_seed(0)
    z = torch.randn(shape, dtype=dtype) * 2 + 1
    if channels_last and len(shape) == 5:
        z = z.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, shape[:2])
    return z


def torch_norm(z, weight, bias, per_step):
    if per_step:
        return torch.stack([F.batch_norm(z_t, None, None, weight, bias, True) for z_t in z])
    return F.batch_norm(z.flatten(0, 1), None, None, weight, bias, True).unflatten(0, z.shape[:2])


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_matches_torch_batch_norm(backend, dtype, tolerance, shape, channels_last, per_step):
    z0, g = sequence(shape, dtype, channels_last), sequence(shape, dtype)
    results = []
    for ours in (True, False):
        z = z0.clone().requires_grad_()
        weight = torch.linspace(0.5, 2, shape[2], dtype=dtype).requires_grad_()
        bias = torch.linspace(-1, 1, shape[2], dtype=dtype).requires_grad_()
        if ours:
            x, moments = channel_norm(z, weight, bias, per_step=per_step, backend=backend)
            assert x.stride() == z0.stride()
            assert moments.mean.shape == (shape[0] if per_step else 1, shape[2])
        else:
            x = torch_norm(z, weight, bias, per_step)
        results.append((x.detach(), *torch.autograd.grad((x * g).sum(), [z, weight, bias])))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_gradient_against_finite_differences():
    z = sequence((3, 2, 2, 2), torch.float64).requires_grad_()
    weight = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    bias = torch.tensor([1.0, -1.0], dtype=torch.float64, requires_grad=True)
    for per_step in (False, True):
        assert torch.autograd.gradcheck(
            lambda z, w, b, per_step=per_step: channel_norm(z, w, b, per_step=per_step)[0], (z, weight, bias)
        )
    scale = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    shift = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(affine, (z, scale, shift))
    assert torch.autograd.gradcheck(affine, (z, scale[0].detach().requires_grad_(), shift[0]))


@pytest.mark.parametrize("per_step", [False, True])
def test_backends_agree_bit_for_bit_in_float32(per_step):
    z, weight, bias = sequence((6, 4, 5, 8, 8), torch.float32, channels_last=True), torch.rand(5) + 0.5, torch.rand(5)
    outputs = [channel_norm(z, weight, bias, per_step=per_step, backend=b)[0] for b in ("reference", "numba")]
    assert torch.equal(*outputs)


def test_steps_apart_equal_the_sequence_bit_for_bit():
    z, weight, bias = sequence((6, 4, 5, 8, 8), torch.float32, channels_last=True), torch.rand(5) + 0.5, torch.rand(5)
    whole, _ = channel_norm(z, weight, bias, per_step=True)
    steps = torch.cat([channel_norm(z[t : t + 1], weight, bias, per_step=True)[0] for t in range(6)])
    assert torch.equal(whole, steps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32(dtype):
    z = sequence((4, 3, 5, 6, 6), torch.float32).to(dtype)
    weight, bias = torch.rand(5) + 0.5, torch.rand(5)
    wanted, _ = channel_norm(z.float(), weight, bias)
    for backend in ("reference", "numba"):
        x, _ = channel_norm(z, weight, bias, backend=backend)
        assert x.dtype == dtype
        assert torch.equal(x, wanted.to(dtype))


def test_large_mean_does_not_cancel():
    z = sequence((4, 8, 3, 16, 16), torch.float32) + 1000
    x, moments = channel_norm(z, torch.ones(3), torch.zeros(3))
    wanted = z.double().var((0, 1, 3, 4), correction=0)
    torch.testing.assert_close(moments.var[0].double(), wanted, rtol=1e-6, atol=0)
    assert abs(float(x.mean())) < 1e-3


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_large_mean_keeps_the_variance_of_float64(backend, per_step):
    z = sequence((4, 8, 3, 16, 16), torch.float64) + 1000
    mean, var = moments(z, per_step=per_step, backend=backend)
    axes = (1, 3, 4) if per_step else (0, 1, 3, 4)
    wanted = z.var(axes, correction=0)
    torch.testing.assert_close(var if per_step else var[0], wanted, rtol=1e-13, atol=0)
    torch.testing.assert_close(mean if per_step else mean[0], z.mean(axes), rtol=1e-14, atol=0)


def test_a_batch_without_samples_has_no_gradient_and_the_moments_of_the_reference():
    z, scale = torch.randn(4, 0, 6, 3, 3).requires_grad_(), torch.rand(6).requires_grad_()
    torch.full((4096,), 1e30)  # what memory that nobody filled would hold
    affine(z, scale, torch.zeros(6), backend="numba").sum().backward()
    assert torch.equal(scale.grad, torch.zeros(6))
    for got, wanted in zip(*(moments(z.detach(), backend=b) for b in ("numba", "reference")), strict=True):
        torch.testing.assert_close(got, wanted, equal_nan=True)


def test_a_backend_asked_for_by_name_runs_or_says_why():
    z, weight = torch.rand(2, 3, 5), torch.ones(5)
    for call in (
        lambda: channel_norm(z, weight, weight, backend="triton"),
        lambda: affine(z, weight, weight, backend="triton"),
        lambda: BatchNorm(5, backend="triton")(z),
    ):
        with pytest.raises(BackendError, match="channel normalisation has no Triton kernel"):
            call()
    with pytest.raises(OptionError, match="backend: expected one of auto, reference, numba, triton, got 'foo'"):
        BatchNorm(5, backend="foo")
    # the wish for a whole model leaves norms to torch
    with use_backend("triton"):
        assert torch.equal(BatchNorm(5)(z), BatchNorm(5, backend="reference")(z))


@pytest.mark.parametrize("per_step", [False, True])
@pytest.mark.parametrize("shape", [(3,), (1,), ()])
def test_refuses_a_bias_of_another_shape(shape, per_step):
    with pytest.raises(ShapeError, match=r"expected weight and bias as \[C=4\]"):
        channel_norm(torch.randn(2, 3, 4, 5), torch.ones(4), torch.zeros(shape), per_step=per_step)


def test_refuses():
    with pytest.raises(ShapeError, match="expected \\[T, B, C=4"):
        channel_norm(torch.rand(2, 3, 5), torch.ones(4), torch.zeros(4))
    with pytest.raises(BackendError, match="numba kernels run on CPU"):
        affine(torch.rand(2, 3, 5, device="meta"), torch.ones(5), torch.zeros(5), backend="numba")

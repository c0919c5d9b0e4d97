"""The LIF kernels compiled on a GPU: the parity cases of tests/ops, and what only a device can show."""

import pytest
import torch

from spikefit.ops.lif import lif, lif_backward
from spikefit.ops.surrogate import atan, fast_sigmoid, rect, sigmoid, triangle
from support import EQUATIONS, assert_close, assert_same_run, assert_same_spikes, backends_called, dyadic, run_lif

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda"
SURROGATES = [atan(2), triangle(1), rect(1), rect(1, closed=True), sigmoid(4), fast_sigmoid(25)]
LEARNED = ["leak", "gain", "v_threshold"]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def inputs(T, *shape, dtype=torch.float32):
    v_0 = dyadic(*shape, low=-0.5, high=0.75, seed=1)
    return dyadic(T, *shape).to(DEVICE, dtype), v_0.to(DEVICE)


def compare(x, v_0, **options):
    """Triton against the reference on the same device; spikes also against the reference on the CPU."""
    got = run_lif("triton", x, v_0, **options)
    assert_same_run(got, run_lif("reference", x, v_0, **options), TOLERANCE[x.dtype])
    on_cpu = run_lif("reference", x.cpu(), v_0.cpu(), **options)
    assert_same_spikes(got["spikes"].cpu(), on_cpu["spikes"])


@pytest.mark.parametrize("strict", [False, True], ids=["at", "above"])
@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matches_reference(dtype, equation, detach_reset, strict):
    for T in (1, 4, 16):
        options = EQUATIONS[equation] | {"detach_reset": detach_reset, "strict": strict}
        compare(*inputs(T, 2, 3, 25, dtype=dtype), **options)
        compare(*inputs(T, 2, 3, 25, dtype=dtype), learn=LEARNED, **options)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_each_surrogate(surrogate):
    compare(*inputs(5, 3, 31), surrogate=surrogate, detach_reset=False, learn=LEARNED)


@pytest.mark.parametrize("equation", EQUATIONS)
def test_rounding_is_that_of_the_reference(equation):
    """Numbers with all their bits in use: one fused multiply-add or another order of operations would show."""
    torch.manual_seed(0)
    coefficients = {"leak": 0.9, "gain": 0.7, "v_threshold": 1.1}
    x, v_0 = (torch.randn(128, 2, 3000) * 0.5 + 0.3).to(DEVICE), torch.randn(2, 3000).to(DEVICE)
    options = {k: v + 0.1 if isinstance(v, float) else v for k, v in EQUATIONS[equation].items()}
    got, wanted = (run_lif(b, x, v_0, coefficients=coefficients, **options) for b in ("triton", "reference"))
    assert_same_run(got, wanted, 1e-4)


@pytest.mark.parametrize("shape", [(3, 8, 64, 32, 32), (2, 5, 1000003), (300, 2, 5000)], ids=str)
def test_wide_and_long_layers(shape):
    """Wide blocks, more blocks than programs, a ragged end, and more steps than the cache holds."""
    compare(*inputs(*shape), detach_reset=False, outputs=("spikes",))
    x, v_0 = inputs(*shape)
    spikes, _ = lif(x, v_0)
    got, wanted = (lif_backward(x, v_0, x, v_0, spikes, backend=b) for b in ("triton", "reference"))
    for name, a, b in zip(got._fields, got, wanted, strict=True):
        assert_close(a, b, 1e-4, name)


@pytest.mark.parametrize("view", [lambda x: x.permute(0, 1, 4, 2, 3), lambda x: x[:1].expand(6, -1, -1, -1, -1)])
def test_layouts(view):
    x = view(dyadic(4, 3, 5, 4, 16)).to(DEVICE)
    v_0 = torch.zeros_like(x[0])
    compare(x, v_0, detach_reset=False)
    assert lif(x)[0].stride() == (x.stride() if x.stride(0) else x.contiguous().stride())


def test_given_spikes_make_recomputed_inputs_harmless():
    torch.manual_seed(2)
    x = (torch.randn(64, 1, 20000) * 0.3 + 0.1).to(DEVICE)
    options = {"leak": 0.9, "backend": "triton"}
    spikes, _ = lif(x, **options)
    g, noisy = torch.rand_like(x), x + 1e-4 * torch.randn_like(x)
    exact = lif_backward(g, None, x, **options).x
    assert (lif_backward(g, None, noisy, None, spikes, **options).x - exact).abs().max() < 1e-2
    assert (lif_backward(g, None, noisy, **options).x - exact).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_kernel(dtype):
    layer = torch.nn.Linear(20, 40).to(DEVICE)

    def step():
        with torch.autocast(DEVICE, dtype=dtype):
            spikes, v_T = lif(layer(4 * dyadic(6, 3, 20).to(DEVICE)))
        assert spikes.dtype == dtype
        (spikes.float().sum() + v_T.sum()).backward()

    assert backends_called(step) == {"triton"}


def test_learned_coefficients_do_not_wait_for_the_device():
    x, v_0 = inputs(4, 2, 300)
    run_lif("triton", x, v_0, learn=LEARNED)
    leak = torch.tensor(0.5, device=DEVICE, requires_grad=True)
    tau = torch.ones((), device=DEVICE)
    x = x.requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        spikes, v_T = lif(x, v_0, leak=leak, gain=tau, v_threshold=tau)
        (spikes.sum() + v_T.sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert leak.grad.abs() > 0


def test_backward_never_holds_the_membrane_of_all_steps():
    T, N = 32, 2**22
    x, g = torch.rand(T, 1, N, device=DEVICE), torch.rand(T, 1, N, device=DEVICE)
    lif_backward(g, None, x, backend="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lif_backward(g, None, x, backend="triton")
    more = torch.cuda.max_memory_allocated() - before
    # dx, three membranes (v_0, q, dv_0) and the scratch, which does not grow with the layer
    assert more < 4 * N * (T + 3) + 160 * 2**20


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_more_elements_than_32_bits_can_count(dtype):
    T, N = 8, 2**28 + 1000
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    x = (torch.rand(1, 1, N, device=DEVICE) * 2).to(dtype).expand(T, -1, -1)
    spikes, _ = lif(x, backend="triton")
    tail = x[:, :, -5000:].contiguous()
    assert_same_spikes(spikes[:, :, -5000:], lif(tail, backend="reference")[0])
    dx = lif_backward(spikes, None, x, None, spikes, backend="triton").x[:, :, -5000:]
    wanted = lif_backward(spikes[:, :, -5000:], None, tail, backend="reference").x
    assert_close(dx.contiguous(), wanted, 8e-3)


def test_tensors_on_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x = dyadic(4, 2, 30).to("cuda:1")
    assert_same_spikes(lif(x, backend="triton")[0], lif(x, backend="reference")[0])

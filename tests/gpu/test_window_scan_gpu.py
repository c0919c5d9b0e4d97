"""The window kernels compiled on a GPU: the parity cases of tests/ops, and what only a device can show."""

import pytest
import torch

from spikefit.ops.surrogate import atan, fast_sigmoid, rect, sigmoid, triangle
from spikefit.ops.window_scan import across, behind, in_turn, window_scan
from support import assert_same_spikes, backends_called
from window_runs import FUSIONS, RESETS, assert_same_scan, inputs, run_scan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICE = "cuda"
NAMES = ["in_turn", "behind", "across", "across_release", "apart"]
SURROGATES = [atan(2), triangle(1), rect(1), rect(1, closed=True), sigmoid(4), fast_sigmoid(25)]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def compare(x, given, name, fuse, **options):
    """Triton against the reference on the same device; spikes and membranes also against the reference on the CPU."""
    got = run_scan("triton", x.to(DEVICE), given.to(DEVICE), name, fuse, **options)
    wanted = run_scan("reference", x.to(DEVICE), given.to(DEVICE), name, fuse, **options)
    assert_same_scan(got, wanted, TOLERANCE[x.dtype])
    on_cpu = run_scan("reference", x, given, name, fuse, **options)
    assert_same_spikes(got["spikes"].cpu(), on_cpu["spikes"])
    assert torch.equal(got["membranes"].cpu(), on_cpu["membranes"])


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("name", NAMES)
def test_matches_reference(name, fuse, reset):
    compare(*inputs(4, 3, 5000), name, fuse, reset=reset, phi=0.7, leak=0.9)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("strict", [True, False])
def test_dtypes(dtype, strict):
    compare(*inputs(4, 3, 500, dtype=dtype), "across", "omega", strict=strict, reset="soft")


@pytest.mark.parametrize("windows", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["in_turn", "behind", "across", "apart"])
def test_number_of_windows(name, windows):
    compare(*inputs(windows, 2, 5, 9), name, "omega")


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
def test_each_surrogate(surrogate):
    compare(*inputs(3, 3, 31), "behind", "omega", surrogate=surrogate)


@pytest.mark.parametrize("view", [lambda x: x.permute(0, 1, 4, 2, 3), lambda x: x[:1].expand(4, -1, -1, -1, -1)])
def test_layouts(view):
    x, given = inputs(4, 3, 5, 4, 16)
    compare(view(x), view(given), "across", "omega")
    spikes, _ = window_scan(view(x.to(DEVICE)), links=in_turn(4))
    assert spikes.stride() == (view(x).stride() if view(x).stride(0) else x.stride())


def test_wide_arguments_of_the_sine():
    x, given = inputs(2, 2, 100_000)
    got, wanted = (
        run_scan(b, 400 * x.to(DEVICE), 400 * given.to(DEVICE), "across", "omega", v_threshold=50.0)
        for b in ("triton", "reference")
    )
    assert_same_scan(got, wanted, 1e-4)


def test_auto_takes_the_kernel():
    x, given = (t.to(DEVICE).requires_grad_() for t in inputs(4, 2, 300))

    def step():
        spikes, membranes = window_scan(x, given, links=behind(4))
        (spikes.sum() + membranes.sum()).backward()

    assert backends_called(step, "window_scan") == {"triton"}


def test_holds_the_results_and_nothing_in_between():
    x, given = (torch.randn(4, 1, 2**22, device=DEVICE, requires_grad=True) for _ in range(2))
    window_scan(x, given, links=across(4))[0].sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    spikes, _ = window_scan(x, given, links=across(4), want_membranes=False)
    assert torch.cuda.max_memory_allocated() - before <= x.nbytes + 2**20
    g = torch.ones_like(spikes)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(spikes, [x, given], g)
    assert torch.cuda.max_memory_allocated() - before <= 2 * x.nbytes + 2**20


def test_more_elements_than_32_bits_can_count():
    P, N = 8, 2**28 + 1000
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    x = torch.rand(1, 1, N, device=DEVICE, dtype=torch.bfloat16).expand(P, -1, -1)
    spikes, _ = window_scan(x, links=in_turn(P), fuse="a", backend="triton", want_membranes=False)
    tail = x[:, :, -5000:].contiguous()
    assert_same_spikes(spikes[:, :, -5000:], window_scan(tail, links=in_turn(P), fuse="a", backend="reference")[0])

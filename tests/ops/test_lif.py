"""The LIF sequence: numba and Triton give the spikes and membranes of the reference bit for bit, and its gradients.

Triton runs in its interpreter here, which takes about 0.1 s a call: its cases are few and small. The same cases run
compiled in tests/gpu.
"""

import pytest
import torch
from torch.nn import functional as F

from spikefit.ops.lif import lif, lif_backward
from spikefit.ops.surrogate import atan, fast_sigmoid, rect, sigmoid, triangle
from support import (
    EQUATIONS,
    KERNELS,
    TRITON,
    assert_close,
    assert_same_run,
    assert_same_spikes,
    backends_called,
    dyadic,
    run_lif,
)

SURROGATES = [atan(2), triangle(1), rect(1), rect(1, closed=True), sigmoid(4), fast_sigmoid(25)]
SEVERAL_BLOCKS = [("numba", 1, 5000), ("numba", 600, 700), pytest.param("triton", 3, 250, marks=TRITON.marks)]
LEARNED = ["leak", "gain", "v_threshold"]


def inputs(T, *shape, dtype=torch.float32):
    """Current [T, *shape] and membrane [*shape] != 0, in multiples of 1/16."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return dyadic(T, *shape).to(dtype), dyadic(*shape, low=-0.5, high=0.75, seed=1).to(compute)


def compare(backend, x, v_0, tolerance=1e-5, **options):
    assert_same_run(run_lif(backend, x, v_0, **options), run_lif("reference", x, v_0, **options), tolerance)


@pytest.mark.parametrize("strict", [False, True], ids=["at", "above"])
@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("backend", KERNELS)
def test_matches_reference(backend, equation, detach_reset, strict):
    for T in (1, 4, 16) if backend == "numba" else (4,):
        compare(backend, *inputs(T, 2, 3, 25), strict=strict, detach_reset=detach_reset, **EQUATIONS[equation])


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
def test_matches_reference_in_double(equation, detach_reset):
    options = EQUATIONS[equation] | {"detach_reset": detach_reset, "learn": LEARNED}
    compare("numba", *inputs(16, 2, 33, dtype=torch.float64), tolerance=1e-12, **options)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_each_surrogate(backend, surrogate):
    compare(backend, *inputs(5, 3, 31), surrogate=surrogate, detach_reset=False, learn=LEARNED, tolerance=2e-5)


@pytest.mark.parametrize("T", [1, 7, 16])
@pytest.mark.parametrize("shape", [(1, 37), (3, 1, 129), (2, 3, 5, 7)], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_odd_shapes(backend, shape, T):
    compare(backend, *inputs(T, *shape), detach_reset=False)


@pytest.mark.parametrize("learn", [["leak"], ["gain"], ["v_threshold"], LEARNED], ids="+".join)
@pytest.mark.parametrize("equation", ["soft, rest", "hard, level, rest", "none"])
@pytest.mark.parametrize("backend", KERNELS)
def test_learned_coefficients(backend, equation, learn):
    for detach_reset in (True, False) if backend == "numba" else (False,):
        options = EQUATIONS[equation] | {"detach_reset": detach_reset, "learn": learn}
        compare(backend, *inputs(4, 2, 150), tolerance=2e-5, **options)


@pytest.mark.parametrize("equation", EQUATIONS)
@pytest.mark.parametrize("backend", KERNELS)
def test_rounding_is_that_of_the_reference(backend, equation):
    """Numbers with all their bits in use: one fused multiply-add or another order of operations would show."""
    torch.manual_seed(0)
    coefficients = {"leak": 0.9, "gain": 0.7, "v_threshold": 1.1}
    x, v_0 = torch.randn(64 if backend == "numba" else 12, 2, 100) * 0.5 + 0.3, torch.randn(2, 100)
    options = {k: v + 0.1 if isinstance(v, float) else v for k, v in EQUATIONS[equation].items()}
    compare(backend, x, v_0, coefficients=coefficients, tolerance=1e-4, **options)


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_strict_decides_at_the_threshold(backend):
    x = torch.tensor([1.0, 0.75, 1.25]).view(1, 1, 3)
    assert lif(x, backend=backend)[0].flatten().tolist() == [1, 0, 1]
    assert lif(x, strict=True, backend=backend)[0].flatten().tolist() == [0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("equation", ["soft", "hard, level, rest", "none"])
@pytest.mark.parametrize("backend", KERNELS)
def test_half_precision(backend, equation, dtype):
    x, v_0 = inputs(6, 3, 50, dtype=dtype)
    got = run_lif(backend, x, v_0, detach_reset=False, learn=LEARNED, **EQUATIONS[equation])
    assert got["spikes"].dtype == got["d x"].dtype == dtype
    assert got["v_T"].dtype == got["d v_0"].dtype == torch.float32
    # one unit in the last place of bfloat16 is 0.0078: Triton's interpreter cuts where a GPU rounds
    wanted = run_lif("reference", x, v_0, detach_reset=False, learn=LEARNED, **EQUATIONS[equation])
    assert_same_run(got, wanted, tolerance=8e-3 if dtype == torch.bfloat16 else 1e-3)
    assert_close(got["d v_0"], wanted["d v_0"], 1e-5, "computed in float32")


def test_half_precision_in_several_blocks(monkeypatch):
    from spikefit.ops.lif import cpu

    monkeypatch.setattr(cpu, "HALF_BLOCK", 64 * 6)
    compare("numba", *inputs(6, 3, 50, dtype=torch.bfloat16), tolerance=8e-3, learn=LEARNED)
    x, v_0 = inputs(6, 3, 50, dtype=torch.bfloat16)
    spikes, _ = lif(x, v_0, backend="reference")
    got, wanted = (lif_backward(x, None, x, v_0, spikes, backend=b) for b in ("numba", "reference"))
    for name, a, b in zip(got._fields, got, wanted, strict=True):
        assert_close(a, b, 8e-3, name)


@pytest.mark.parametrize(("backend", "T", "N"), SEVERAL_BLOCKS)
def test_several_blocks_of_neurons(backend, T, N):
    """More neurons than one block holds, and steps enough for the smallest block."""
    compare(backend, *inputs(T, 2, N), tolerance=1e-4, learn=LEARNED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_keeps_the_kernel(dtype):
    weight = dyadic(40, 20, seed=2)
    x_in = dyadic(6, 3, 20)

    def step():
        with torch.autocast("cpu", dtype=dtype):
            x = F.linear(x_in, weight).requires_grad_()
            assert x.dtype == dtype
            spikes, v_T = lif(x)
        assert spikes.dtype == dtype
        assert v_T.dtype == torch.float32
        assert_same_spikes(spikes, lif(x, backend="reference")[0])
        (spikes.float().sum() + v_T.sum()).backward()

    assert backends_called(step) == {"numba"}


@pytest.mark.parametrize("backend", KERNELS)
def test_channels_last_is_read_as_it_lies(backend):
    x, v_0 = inputs(3, 2, 5, 4, 3)
    last = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    got = run_lif(backend, last, v_0, detach_reset=False)
    assert got["spikes"].stride() == got["d x"].stride() == last.stride()
    assert got["v_T"].stride() == last[0].stride()
    assert_same_run(got, run_lif("reference", x, v_0, detach_reset=False), 1e-5)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x.transpose(0, 1),
        lambda x: x[..., ::2],
        lambda x: x[::2, :, 1:],
        lambda x: x.flip(0)[:, :1].expand(-1, 4, -1),
        lambda x: x[:1].expand(5, -1, -1),
        lambda x: x[:1, :, ::2].expand(5, -1, -1),
        lambda x: x[:1, :1].expand(5, 3, -1),
    ],
    ids=["inner", "time", "strided", "sliced", "batch repeated", "time repeated", "time repeated, strided", "both"],
)
@pytest.mark.parametrize("backend", KERNELS)
def test_views(backend, view):
    x = view(dyadic(4, 3, 32))
    v_0 = dyadic(*x.shape[1:], low=-0.5, high=0.75, seed=1)
    wanted = run_lif("reference", x.contiguous(), v_0, detach_reset=False)
    assert_same_run(run_lif(backend, x, v_0, detach_reset=False), wanted, 1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_gradients_that_arrive_as_views(backend):
    x, v_0 = inputs(4, 3, 32)
    g, q, spikes = dyadic(4, 32, 3).transpose(1, 2), dyadic(1, 32).expand(3, -1), dyadic(1, 3, 32) > 0
    spikes = spikes.expand(4, -1, -1)
    got, wanted = (lif_backward(g, q, x, v_0, spikes, backend=b) for b in (backend, "reference"))
    for name, a, b in zip(got._fields, got, wanted, strict=True):
        assert_close(a, b, 1e-5, name)


@pytest.mark.parametrize("outputs", [("spikes",), ("v_T",)], ids="".join)
@pytest.mark.parametrize("backend", KERNELS)
def test_only_one_result_is_used(backend, outputs):
    compare(backend, *inputs(4, 3, 30), outputs=outputs, detach_reset=False)


@pytest.mark.parametrize("wanted", ["x", "v_0", "leak"])
@pytest.mark.parametrize("backend", KERNELS)
def test_only_one_input_asks_for_a_gradient(backend, wanted):
    x, v_0 = inputs(4, 3, 30)
    gradients = []
    for run in (backend, "reference"):
        tensors = {"x": x.clone(), "v_0": v_0.clone(), "leak": torch.tensor(0.5)}
        tensors[wanted].requires_grad_()
        spikes, v_T = lif(tensors["x"], tensors["v_0"], leak=tensors["leak"], backend=run)
        (spikes * x + v_T).sum().backward()
        assert all((t.grad is not None) == (name == wanted) for name, t in tensors.items())
        gradients.append(tensors[wanted].grad)
    assert_close(*gradients, 1e-5)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_nan_passes_through(backend, surrogate):
    x = dyadic(3, 2, 20)
    x[1, 0, 3] = torch.nan
    runs = []
    for run in (backend, "reference"):
        inner = x.clone().requires_grad_()
        spikes, v_T = lif(inner, surrogate=surrogate, backend=run)
        (spikes + v_T).sum().backward()
        runs.append((spikes.detach(), v_T.detach(), inner.grad))
    assert runs[0][1].isnan().sum() == 1
    assert runs[0][0][1:, 0, 3].tolist() == [0, 0], "a comparison with NaN is false"
    for got, wanted in zip(*runs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "numba", TRITON])
def test_pieces_in_time_equal_one_call(backend):
    x, v_0 = inputs(6, 3, 30)
    spikes, v_T = lif(x, v_0, backend=backend)
    first, v = lif(x[:2], v_0, backend=backend)
    second, v = lif(x[2:], v, backend=backend)
    assert_same_spikes(torch.cat([first, second]), spikes)
    assert torch.equal(v, v_T)


@pytest.mark.parametrize("backend", ["reference", "numba", TRITON])
def test_empty_batch(backend):
    x = torch.zeros(4, 0, 3, requires_grad=True)
    spikes, v_T = lif(x, leak=torch.tensor(0.5, requires_grad=True), backend=backend)
    (spikes.sum() + v_T.sum()).backward()
    assert spikes.shape == x.grad.shape == (4, 0, 3)
    assert v_T.shape == (0, 3)

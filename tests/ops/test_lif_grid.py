"""Membranes on a grid: what rounding does to them, undoing it to the bit, and a gradient that goes straight through."""

import pytest
import torch

from spikefit.errors import OptionError, RangeError
from spikefit.neurons import IF, LIF, ParametricLIF, create_neuron
from spikefit.ops.lif import lif, lif_backward
from spikefit.ops.lif.equation import Equation, GridLeak, grid_leak
from spikefit.ops.lif.reference import charge, lif_on_grid, undo_on_grid
from spikefit.ops.surrogate import atan
from support import KERNELS, assert_close, assert_same_spikes

CALLS, NEURONS = 60, 20_000
# 2^-m and 1 - 2^-m
LEAKS = [1 / 2, 1 / 4, 1 / 8, 3 / 4, 15 / 16, 1 - 2.0**-10]


def currents(calls=CALLS, neurons=NEURONS, dtype=torch.float32):
    return torch.randn(calls, 1, neurons, generator=torch.Generator().manual_seed(0), dtype=dtype)


def on_grid(frac_bits, detach_reset=True):
    return Equation.make(
        v_reset=None,
        reset=True,
        v_rest=None,
        strict=False,
        detach_reset=detach_reset,
        surrogate=atan(2),
        frac_bits=frac_bits,
    )


def in_integers(x, leak, gain, frac_bits):
    """u, s, v and lost bits of every call in whole numbers, by hand, as float64: U = W + X, V = U - 2^f s."""
    one, V, rows = 2**frac_bits, torch.zeros_like(x[0], dtype=torch.int64), []
    shift, ties = grid_leak(leak)
    for x_t in x:
        W, digits = (V - (V >> shift), V % 2**shift == 2**shift - 1) if ties else (V >> shift, V % 2**shift)
        U = W + torch.round(gain * x_t * one).to(torch.int64)
        s = (U - one >= 0).to(torch.int64)
        V = U - one * s
        rows.append((U.double() / one, s.double(), V.double() / one, digits.to(torch.uint8)))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_forward_is_that_of_whole_numbers(backend, leak, dtype):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton kernels compute in float32")
    x = currents(20, 500 if backend != "triton" else 130, dtype)
    for gain in (1.0, 0.75):
        _, s, v, _ = in_integers(x, leak, gain, 16)
        spikes, v_T = lif(x, leak=leak, gain=gain, frac_bits=16, backend=backend)
        assert_same_spikes(spikes, s.to(dtype))
        assert torch.equal(v_T.double(), v[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("leak", LEAKS)
def test_sixty_calls_are_undone_to_the_bit(leak, dtype):
    x, form = currents(dtype=dtype), grid_leak(leak)
    options = {"leak": leak, "gain": 0.75, "v_threshold": 1.0, "equation": on_grid(16)}
    spikes, v, lost = lif_on_grid(x, torch.zeros_like(x[0]), **options)
    u, _, after, digits = in_integers(x, leak, 0.75, 16)
    assert torch.equal(lost, digits)
    assert lost.dtype == torch.uint8
    assert int(lost.max()) == (1 if form.ties else 2**form.shift - 1)
    # the bits are needed: without them the first call already comes back wrong
    assert not torch.equal(undo_on_grid(x[-1], v, spikes[-1], 0 * lost[-1], **options)[1].double(), after[-2])
    for k in reversed(range(CALLS)):
        charged, v = undo_on_grid(x[k], v, spikes[k], lost[k], **options)
        before = after[k - 1] if k > 0 else torch.zeros_like(after[0])
        assert torch.equal(v.double(), before), f"{int((v != before).sum())} mismatches at call {k}"
        assert torch.equal(charged.double(), u[k])


@pytest.mark.parametrize("frac_bits", [4, 8, 16])
@pytest.mark.parametrize("leak", [1 / 2, 1 / 4, 1 / 32, 3 / 4, 31 / 32])
def test_a_call_rounds_by_a_step_and_a_half_of_the_grid_at_most(leak, frac_bits):
    """The leak rounds by up to 1 - 2^-m of a step, down at 2^-m and up at 1 - 2^-m; round(gain x) by half a step."""
    v = torch.round(currents(1)[0].double() * 2**frac_bits) / 2**frac_bits
    x = currents(2)[1].double()
    u = charge(x, v, leak, 0.75, on_grid(frac_bits))
    error = (u - (leak * v + 0.75 * x)) * 2**frac_bits
    shift, ties = grid_leak(leak)
    most = (1 - 2.0**-shift) + 0.5
    lowest, highest = (-0.5, most) if ties else (-most, 0.5)
    assert lowest <= float(error.min()) < lowest + 0.2
    assert highest - 0.2 < float(error.max()) <= highest
    assert torch.equal(u, torch.round(u * 2**frac_bits) / 2**frac_bits)
    # each of the two parts by itself
    unit, kept = 2.0**-frac_bits, charge(0 * x, v, leak, 0.75, on_grid(frac_bits))
    assert (kept - leak * v).abs().max() < unit
    assert (charge(x, 0 * v, leak, 0.75, on_grid(frac_bits)) - 0.75 * x).abs().max() <= unit / 2


@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("leak", [1 / 4, 7 / 8])
def test_the_gradient_goes_straight_through_the_rounding(leak, detach_reset):
    """Autograd and the written adjoint equal the adjoint of the neuron without a grid, on the rounded membranes."""
    gain, frac_bits, x = 0.75, 6, currents(12, 300, torch.float64)
    u, s, _, _ = in_integers(x, leak, gain, frac_bits)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    q = torch.randn(x.shape[1:], generator=generator, dtype=torch.float64)
    wanted, carry = torch.zeros_like(x), q
    for k in reversed(range(len(x))):
        slope = atan(2).slope(u[k] - 1)
        du = slope * g[k] + (1 if detach_reset else 1 - slope) * carry
        wanted[k], carry = gain * du, leak * du
    options = {"leak": leak, "gain": gain, "detach_reset": detach_reset, "frac_bits": frac_bits}
    x.requires_grad_()
    v_0 = torch.zeros_like(x[0], requires_grad=True)
    for backend in ("reference", "numba"):
        spikes, v_T = lif(x, v_0, **options, backend=backend)
        assert_same_spikes(spikes.detach(), s)
        dx, dv = torch.autograd.grad((spikes * g).sum() + (v_T * q).sum(), [x, v_0])
        assert_close(dx, wanted, 1e-14, "dx")
        assert_close(dv, carry, 1e-14, "dv_0")
        for given in (None, s):
            made = lif_backward(g, q, x.detach(), spikes=given, **options, backend=backend)
            assert_close(made.x, wanted, 1e-14, "written adjoint")
            assert_close(made.v_0, carry, 1e-14, "written adjoint, v_0")
    del options["frac_bits"]
    plain = lif_backward(g, q, x.detach(), **options, backend="reference").x
    assert (plain - wanted).abs().max() > 1e-3, "a grid this coarse must show"


def test_the_grid_of_a_neuron():
    # 1 - 1/tau misses these powers of two by rounding
    assert [LIF(tau=1 / (1 - 2.0**-m), frac_bits=16).coefficients()[0] for m in range(1, 9)] == [
        2.0**-m for m in range(1, 9)
    ]
    assert [LIF(tau=2.0**m, frac_bits=16).coefficients()[0] for m in range(2, 23)] == [
        1 - 2.0**-m for m in range(2, 23)
    ]
    assert [grid_leak(leak) for leak in (0.5, 0.25, 2.0**-8)] == [GridLeak(m, False) for m in (1, 2, 8)]
    assert [grid_leak(leak) for leak in (0.75, 0.9375, 1 - 2.0**-22)] == [GridLeak(m, True) for m in (2, 4, 22)]
    assert [grid_leak(leak) for leak in (1.0, 0.0, 0.7, 0.9, 1 - 2.0**-23)] == [None] * 5
    assert [GridLeak(m, ties).digits for m, ties in ((1, False), (3, False), (4, True))] == [1, 3, 1]
    assert "frac_bits=12" in repr(create_neuron("lif", frac_bits=12))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: LIF(tau=3.0, frac_bits=16),
            OptionError,
            r"leak = 1/2, 1/4, 1/8.*leak = 3/4, 7/8.*got leak=0\.66.*change tau",
        ),
        (lambda: LIF(tau=1.0, frac_bits=16), OptionError, r"leak = 1/2.*got leak=0\.0"),
        (lambda: LIF(tau=1e30, frac_bits=16), OptionError, r"leak = 1/2.*got leak=1\.0"),
        (lambda: IF(frac_bits=16), OptionError, r"leak = 1/2, 1/4.*got leak=1\.0"),
        (lambda: lif(currents(2, 3), leak=0.3, frac_bits=16), OptionError, r"got leak=0\.3"),
        (lambda: LIF(v_reset=0.0, frac_bits=16), OptionError, "soft reset.*got reset 'hard'.*leave out v_reset"),
        (lambda: LIF(reset=False, frac_bits=16), OptionError, "soft reset.*got reset 'none'"),
        (lambda: LIF(v_rest=0.5, frac_bits=16), OptionError, r"rests at 0.*v_rest=0\.5"),
        (
            lambda: ParametricLIF(frac_bits=16),
            OptionError,
            r"ParametricLIF: .*fixed leak, 2\^-m or 1 - 2\^-m, .*learns it; use LIF",
        ),
        (
            lambda: lif(currents(2, 3), leak=torch.tensor(0.5), frac_bits=16),
            OptionError,
            "fixed numbers for leak.*use neuron 'lif'",
        ),
        (lambda: LIF(v_threshold=0.3, frac_bits=4), OptionError, r"v_threshold must be a multiple of 2\^-4.*got 0\.3"),
        (lambda: lif(currents(2, 3), v_threshold=0.3, frac_bits=4), OptionError, r"multiple of 2\^-4.*more frac_bits"),
        *[
            (lambda bits=bits: LIF(frac_bits=bits), OptionError, f"frac_bits must be a whole number.*got {bits!r}")
            for bits in (0, -1, 23, 2.5, True, "16")
        ],
        (
            lambda: lif(200 * torch.ones(1, 1, 3), frac_bits=16),
            RangeError,
            r"membranes below 128, .*2\^-16.*got 200.*lower frac_bits",
        ),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_the_range_ends_where_numbers_stop_being_exact(backend):
    x = torch.tensor([127.0, -127.0, 127.9]).view(1, 1, 3)
    spikes, v_T = lif(x, frac_bits=16, backend=backend)
    assert torch.equal(v_T.flatten()[:2], torch.tensor([126.0, -127.0]))
    for wrong in (128.0, -128.0, float("inf"), float("nan")):
        with pytest.raises(RangeError, match=f"got {abs(wrong):g}; lower frac_bits, or normalise"):
            lif(torch.full((1, 1, 1), wrong), frac_bits=16, backend=backend)
    assert lif(torch.full((1, 1, 1), 1000.0), frac_bits=8, backend=backend)[0].item() == spikes[0, 0, 0].item() == 1


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_one_neuron_that_leaves_the_range_for_one_step_is_seen(backend):
    """What comes after it, and what other neurons do, hides nothing."""
    x = torch.zeros(9, 2, 70)
    x[4, 1, 33] = 130.0
    x[5, 1, 33] = -130.0
    with pytest.raises(RangeError, match=r"below 128, .*got 130;"):
        lif(x, leak=0.75, frac_bits=16, backend=backend)

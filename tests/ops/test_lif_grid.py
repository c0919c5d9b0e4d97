"""Membranes on a grid: what rounding does to them, undoing it to the bit, and a gradient that goes straight through."""

import pytest
import torch

from spikefit.errors import BackendError, OptionError, StateError
from spikefit.neurons import IF, LIF, ParametricLIF, create_neuron
from spikefit.ops.lif import lif, lif_backward
from spikefit.ops.lif.equation import Equation, shift_of
from spikefit.ops.lif.reference import charge, remainder, undo
from spikefit.ops.surrogate import atan
from support import assert_close, assert_same_spikes

CALLS, NEURONS = 60, 20_000


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


def in_integers(x, shift, gain, frac_bits):
    """u, s and v of every call in whole numbers, by hand, as float64: U = (V >> m) + X, V = U - 2^f s."""
    one, V, rows = 2**frac_bits, torch.zeros_like(x[0], dtype=torch.int64), []
    for x_t in x:
        U = (V >> shift) + torch.round(gain * x_t * one).to(torch.int64)
        s = (U - one >= 0).to(torch.int64)
        V = U - one * s
        rows.append((U.double() / one, s.double(), V.double() / one))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_forward_is_that_of_whole_numbers(shift, dtype):
    x = currents(20, 500, dtype)
    for gain in (1.0, 0.75):
        _, s, v = in_integers(x, shift, gain, 16)
        spikes, v_T = lif(x, leak=2.0**-shift, gain=gain, frac_bits=16)
        assert_same_spikes(spikes, s.to(dtype))
        assert torch.equal(v_T.double(), v[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shift", [1, 2, 3])
def test_sixty_calls_are_undone_to_the_bit(shift, dtype):
    leak, frac_bits, x = 2.0**-shift, 16, currents(dtype=dtype)
    options = {"leak": leak, "gain": 0.75, "v_threshold": 1.0}
    v, before, spikes, lost = torch.zeros_like(x[0]), [], [], []
    for x_t in x:
        before.append(v)
        lost.append(remainder(v, shift, frac_bits))
        s, v = lif(x_t[None], v, **options, frac_bits=frac_bits)
        spikes.append(s[0])
    assert all(r.dtype == torch.uint8 and int(r.max()) < 2**shift for r in lost)
    guess = v
    for k in reversed(range(CALLS)):
        v = undo(x[k], v, spikes[k], lost[k], **options, equation=on_grid(frac_bits))
        assert torch.equal(v, before[k]), f"{int((v != before[k]).sum())} mismatches at call {k}"
    # the digits are needed: without them the first call already comes back wrong
    guess = undo(x[-1], guess, spikes[-1], None, **options, equation=on_grid(frac_bits))
    assert not torch.equal(guess, before[-1])


@pytest.mark.parametrize("frac_bits", [4, 8, 16])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_a_call_rounds_by_a_step_and_a_half_of_the_grid_at_most(shift, frac_bits):
    """floor(v / 2^m) loses up to 1 - 2^-m of a step, round(gain x) half a step; the result lies on the grid."""
    v = torch.round(currents(1)[0].double() * 2**frac_bits) / 2**frac_bits
    x = currents(2)[1].double()
    u = charge(x, v, 2.0**-shift, 0.75, on_grid(frac_bits))
    error = (u - (2.0**-shift * v + 0.75 * x)) * 2**frac_bits
    lowest = -(1 - 2.0**-shift) - 0.5
    assert lowest <= float(error.min()) < lowest + 0.1
    assert 0.3 < float(error.max()) <= 0.5
    assert torch.equal(u, torch.round(u * 2**frac_bits) / 2**frac_bits)
    # each of the two parts by itself
    unit, kept = 2.0**-frac_bits, charge(0 * x, v, 2.0**-shift, 0.75, on_grid(frac_bits))
    assert (kept - 2.0**-shift * v).abs().max() < unit
    assert (charge(x, 0 * v, 2.0**-shift, 0.75, on_grid(frac_bits)) - 0.75 * x).abs().max() <= unit / 2


@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
def test_the_gradient_goes_straight_through_the_rounding(detach_reset):
    """Autograd and the written adjoint equal the adjoint of the neuron without a grid, on the rounded membranes."""
    shift, gain, frac_bits = 2, 0.75, 6
    leak, x = 2.0**-shift, currents(12, 300, torch.float64)
    u, s, _ = in_integers(x, shift, gain, frac_bits)
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
    spikes, v_T = lif(x, v_0, **options)
    assert_same_spikes(spikes.detach(), s)
    dx, dv = torch.autograd.grad((spikes * g).sum() + (v_T * q).sum(), [x, v_0])
    assert_close(dx, wanted, 1e-14, "dx")
    assert_close(dv, carry, 1e-14, "dv_0")
    for given in (None, s):
        made = lif_backward(g, q, x.detach(), spikes=given, **options)
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
    assert [shift_of(leak) for leak in (0.5, 0.25, 2.0**-8, 1.0, 0.75, 0.0)] == [1, 2, 8, None, None, None]
    assert "frac_bits=12" in repr(create_neuron("lif", frac_bits=12))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LIF(tau=3.0, frac_bits=16), OptionError, r"leak = 1/2, 1/4, 1/8.*got leak=0\.66.*change tau"),
        (lambda: LIF(tau=1.0, frac_bits=16), OptionError, r"leak = 1/2.*got leak=0\.0"),
        (lambda: LIF(tau=1e30, frac_bits=16), OptionError, r"leak = 1/2.*got leak=1\.0"),
        (lambda: IF(frac_bits=16), OptionError, r"leak = 1/2, 1/4.*got leak=1\.0"),
        (lambda: lif(currents(2, 3), leak=0.3, frac_bits=16), OptionError, r"got leak=0\.3"),
        (lambda: LIF(v_reset=0.0, frac_bits=16), OptionError, "soft reset.*got reset 'hard'.*leave out v_reset"),
        (lambda: LIF(reset=False, frac_bits=16), OptionError, "soft reset.*got reset 'none'"),
        (lambda: LIF(v_rest=0.5, frac_bits=16), OptionError, r"rests at 0.*v_rest=0\.5"),
        (lambda: ParametricLIF(frac_bits=16), OptionError, "ParametricLIF: .*fixed leak.*learns it; use LIF"),
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
            StateError,
            r"membranes below 128, .*2\^-16.*got 200.*lower frac_bits",
        ),
        (lambda: lif(currents(2, 3), frac_bits=16, backend="numba"), BackendError, "frac_bits.*no compiled kernel"),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_range_ends_where_numbers_stop_being_exact():
    x = torch.tensor([127.0, -127.0, 127.9]).view(1, 1, 3)
    spikes, v_T = lif(x, frac_bits=16)
    assert torch.equal(v_T.flatten()[:2], torch.tensor([126.0, -127.0]))
    for wrong in (128.0, -128.0, float("inf"), float("nan")):
        with pytest.raises(StateError, match="lower frac_bits, or normalise"):
            lif(torch.full((1, 1, 1), wrong), frac_bits=16)
    assert lif(torch.full((1, 1, 1), 1000.0), frac_bits=8)[0].item() == spikes[0, 0, 0].item() == 1

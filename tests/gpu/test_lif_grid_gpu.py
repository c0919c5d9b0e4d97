"""Membranes on a grid on a GPU: the kernels against the reference on the CPU, forward and backwards in time."""

import pytest
import torch

from spikefit.errors import RangeError
from spikefit.ops.lif import lif, lif_backward
from spikefit.ops.lif.grid_op import lif_on_grid, lif_on_grid_backward
from spikefit.ops.lif.op import dynamics_of
from support import assert_close, assert_same_spikes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LEAKS = [1 / 2, 1 / 8, 3 / 4, 15 / 16, 1 - 2.0**-10]


def sequence(T, seed):
    return torch.randn(T, 4, 5000, generator=torch.Generator().manual_seed(seed)) * 0.7 + 0.2


@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_sequence_and_back(leak, detach_reset):
    x, g = sequence(500, 0), sequence(500, 1)
    options = {"leak": leak, "gain": 1.0, "v_threshold": 1.0, "detach_reset": detach_reset, "frac_bits": 16}
    fixed = {"v_reset": None, "reset": True, "v_rest": None, "strict": False, "surrogate": "atan(2)", "backend": "auto"}
    d, v_0 = dynamics_of(x, **options, **fixed), torch.zeros_like(x[0])
    wanted = lif_on_grid(x, v_0, d, "reference")
    got = lif_on_grid(x.cuda(), v_0.cuda(), d, "triton")
    assert_same_spikes(got[0].cpu(), wanted[0])
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted, strict=True))
    assert all(
        torch.equal(a.cpu(), b) for a, b in zip(lif(x.cuda(), **options, backend="triton"), wanted, strict=False)
    )
    spikes, v_T, lost = got
    dx, dv_0, back = lif_on_grid_backward(g.cuda(), None, x.cuda(), v_T, spikes, lost, d, "triton")
    assert torch.equal(back.cpu(), v_0)
    exact = lif_backward(g, None, x, spikes=wanted[0], **options, backend="reference")
    assert_close(dx.cpu(), exact.x, 1e-5)
    assert_close(dv_0.cpu(), exact.v_0, 1e-5)


def test_a_membrane_that_leaves_the_range():
    x = torch.zeros(9, 2, 5000, device="cuda")
    x[4, 1, 33], x[5, 1, 33] = 130.0, -130.0
    with pytest.raises(RangeError, match="got 130;"):
        lif(x, leak=0.75, frac_bits=16, backend="triton")

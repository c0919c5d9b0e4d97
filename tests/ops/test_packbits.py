"""Packing: every width, size and backend comes back as it went in; the layout is the documented one."""

import pytest
import torch

from spikefit.errors import OptionError, ShapeError
from spikefit.ops.packbits import pack, packed_length, unpack
from support import KERNELS

BACKENDS = ["reference", *KERNELS]


def values(*shape, bits, seed=0):
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("channels", [1, 7, 8, 9, 63, 1000])
def test_comes_back(backend, bits, channels):
    v = values(3, 2, channels, bits=bits)
    packed = pack(v.float(), bits, backend=backend)
    assert packed.shape == (3, 2, packed_length(channels, bits))
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, pack(v, bits, backend="reference"))
    assert torch.equal(unpack(packed, channels, bits, dtype=torch.int64, backend=backend), v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.float32, torch.float64]
)
def test_dtypes(backend, dtype):
    v = values(5, 24, bits=1).to(dtype)
    got = unpack(pack(v, backend=backend), 24, dtype=dtype, backend=backend)
    assert got.dtype == dtype
    assert torch.equal(got, v)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layout(backend):
    assert pack(torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 1]), backend=backend).tolist() == [0b1001, 1]
    assert pack(torch.tensor([3, 0, 1, 2, 1]), 2, backend=backend).tolist() == [0b10_01_00_11, 1]
    assert pack(torch.tensor([15, 1, 2]), 4, backend=backend).tolist() == [0x1F, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_strides(backend):
    v = values(4, 3, 20, 5, bits=1)
    packed = pack(v.movedim(2, -1), backend=backend)
    assert torch.equal(unpack(packed[1:3], 20, dtype=torch.int64, backend=backend), v.movedim(2, -1)[1:3])
    whole = pack(values(3, 1 << 20, bits=1), backend=backend)
    assert whole.shape == (3, 1 << 17)


@pytest.mark.parametrize("bits", [1, 4])
def test_opcheck(bits):
    packed = pack(values(2, 11, bits=bits), bits)
    for backend in ("reference", "numba"):
        torch.library.opcheck(torch.ops.spikefit.pack, (values(2, 11, bits=bits).float(), bits, backend))
        torch.library.opcheck(torch.ops.spikefit.unpack, (packed, 11, bits, torch.float32, backend))


def test_bad_input():
    with pytest.raises(OptionError, match="bits must be one of 1, 2, 4, 8, got 3"):
        pack(torch.zeros(4), 3)
    with pytest.raises(ShapeError, match="at least one axis"):
        pack(torch.tensor(1))
    for value, bits in ((0.5, 1), (2.0, 1), (-1.0, 2), (float("nan"), 1), (4.0, 2)):
        with pytest.raises(OptionError, match=f"pack: expected whole numbers 0..{2**bits - 1}.*got {value}"):
            pack(torch.tensor([1.0, value, 0.0]), bits)
    assert pack(torch.tensor([1.0, 0.5]), check=False).shape == (1,)
    with pytest.raises(ShapeError, match="expected uint8"):
        unpack(torch.zeros(2, dtype=torch.uint8), 8)
    with pytest.raises(ShapeError, match="expected uint8"):
        unpack(torch.zeros(1), 8)

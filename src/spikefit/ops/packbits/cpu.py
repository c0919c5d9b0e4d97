"""Packing on CPU: numba, parallel over rows. See `reference` for the layout."""

import functools

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

from spikefit.ops.packbits.reference import PATTERN
from spikefit.ops.threads import use_torch_threads

# Moves eight bytes of 0 or 1 into the eight bits of the highest byte, the first byte into the lowest bit.
GATHER = np.uint64(0x0102040810204080)


def pack(values_RC: Tensor, bits: int) -> Tensor:
    R, C = values_RC.shape
    per_byte = 8 // bits
    packed = torch.empty((R, -(-C // per_byte)), dtype=torch.uint8)
    use_torch_threads()
    if bits == 1 and C % 8 == 0:
        _pack_words(values_RC.view(torch.int64).numpy().view(np.uint64), packed.numpy())
    else:
        _pack(values_RC.numpy(), packed.numpy(), bits)
    return packed


def unpack(packed_RP: Tensor, out_RC: Tensor, bits: int) -> None:
    use_torch_threads()
    pattern = out_RC.view(PATTERN[out_RC.element_size()])
    _unpack(packed_RP.numpy(), pattern.numpy(), table(out_RC.dtype, bits))


@functools.cache
def table(dtype: torch.dtype, bits: int) -> np.ndarray:
    """[256, 8 / bits]: the values of every byte, as bit patterns of `dtype`."""
    shifts = bits * torch.arange(8 // bits)
    values = (torch.arange(256).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.to(dtype).view(PATTERN[dtype.itemsize]).numpy()


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _pack_words(words_RP, packed_RP):
    for r in prange(packed_RP.shape[0]):
        for p in range(packed_RP.shape[1]):
            packed_RP[r, p] = (words_RP[r, p] * GATHER) >> np.uint64(56)


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _pack(values_RC, packed_RP, bits):
    per_byte = 8 // bits
    for r in prange(packed_RP.shape[0]):
        for p in range(packed_RP.shape[1]):
            byte = 0
            for k in range(min(per_byte, values_RC.shape[1] - p * per_byte)):
                byte |= int(values_RC[r, p * per_byte + k]) << (bits * k)
            packed_RP[r, p] = byte


@numba.njit(cache=True, error_model="numpy", parallel=True)
def _unpack(packed_RP, out_RC, table):
    per_byte, C = table.shape[1], out_RC.shape[1]
    for r in prange(packed_RP.shape[0]):
        for p in range(C // per_byte):
            byte = packed_RP[r, p]
            for k in range(per_byte):
                out_RC[r, p * per_byte + k] = table[byte, k]
        for c in range(C // per_byte * per_byte, C):
            out_RC[r, c] = table[packed_RP[r, c // per_byte], c % per_byte]

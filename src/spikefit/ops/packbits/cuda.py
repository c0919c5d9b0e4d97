"""Packing on CUDA: Triton. See `reference` for the layout; loaded only when a CUDA call needs it."""

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def pack(values_RC: Tensor, bits: int) -> Tensor:
    R, C = values_RC.shape
    packed = values_RC.new_empty((R, -(-C // (8 // bits))))
    with _on(values_RC.device):
        _pack_kernel[(triton.cdiv(packed.numel(), BLOCK),)](
            values_RC, packed, packed.numel(), C, packed.shape[1], BITS=bits, BLOCK=BLOCK
        )
    return packed


def unpack(packed_RP: Tensor, out_RC: Tensor, bits: int) -> None:
    with _on(packed_RP.device):
        _unpack_kernel[(triton.cdiv(out_RC.numel(), BLOCK),)](
            packed_RP, out_RC, out_RC.numel(), out_RC.shape[1], packed_RP.shape[1], BITS=bits, BLOCK=BLOCK
        )


def _on(device: torch.device):
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@triton.jit
def _pack_kernel(v_ptr, p_ptr, total, C, P, BITS: tl.constexpr, BLOCK: tl.constexpr):
    # int64: one sequence can hold more than 2**31 spikes
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, first = byte // P, (byte % P) * (8 // BITS)
    acc = tl.zeros([BLOCK], tl.int32)
    for k in tl.static_range(8 // BITS):
        c = first + k
        value = tl.load(v_ptr + row * C + c, mask=(byte < total) & (c < C), other=0).to(tl.int32)
        acc |= value << (BITS * k)
    tl.store(p_ptr + byte, acc.to(tl.uint8), mask=byte < total)


@triton.jit
def _unpack_kernel(p_ptr, o_ptr, total, C, P, BITS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = i < total
    row, c = i // C, i % C
    byte = tl.load(p_ptr + row * P + c // (8 // BITS), mask=here, other=0).to(tl.int32)
    value = (byte >> (BITS * (c % (8 // BITS))).to(tl.int32)) & ((1 << BITS) - 1)
    tl.store(o_ptr + i, value.to(tl.float32).to(o_ptr.dtype.element_ty), mask=here)

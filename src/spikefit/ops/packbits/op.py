"""The one door to packing: it checks, chooses a backend per call, and registers the kernels with torch."""

import torch
from torch import Tensor

from spikefit.errors import OptionError, ShapeError
from spikefit.ops import dispatch
from spikefit.ops.custom_op import custom_op
from spikefit.ops.packbits import reference

BITS = (1, 2, 4, 8)
# Values turned to bytes at a time, so that packing a large tensor needs little memory beside it.
SLICE = 1 << 20


def pack(values: Tensor, bits: int = 1, *, check: bool = True, backend: dispatch.Backend = "auto") -> Tensor:
    """Store small whole numbers in few bits: [..., C] -> [..., P] uint8, P = ceil(C bits / 8).

    The last axis is packed, its first value in the lowest bits, and every row ends on a whole byte.

    Args:
        values: [..., C] of any real dtype, holding 0 .. 2**bits - 1.
        bits: per value: 1, 2, 4 or 8.
        check: look at the values first; without, one that does not fit is lost. On CUDA the look waits for the device.
        backend: "auto", "reference", "numba" (CPU) or "triton" (CUDA).

    Raises:
        ShapeError: no axis.
        OptionError: another number of bits, or a value that does not fit in so many.
        BackendError: the backend asked for cannot run this call.
    """
    if values.ndim == 0:
        raise ShapeError("pack: expected values with at least one axis, got a 0-d tensor; give it one: v.view(1).")
    if check:
        _check_values(values, bits)
    return _pack(values, _checked(bits), _choose(values, backend))


def unpack(
    packed: Tensor,
    channels: int,
    bits: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    backend: dispatch.Backend = "auto",
) -> Tensor:
    """The inverse of `pack`: [..., P] uint8 -> [..., channels] of `dtype`, contiguous.

    Raises:
        ShapeError: not uint8, or another number of bytes than `channels` values take.
        OptionError: another number of bits.
        BackendError: the backend asked for cannot run this call.
    """
    if packed.dtype != torch.uint8 or packed.ndim == 0 or packed.shape[-1] != packed_length(channels, bits):
        raise ShapeError(
            f"unpack: expected uint8 [..., {packed_length(channels, bits)}] for {channels} values of {bits} bit, got "
            f"{packed.dtype} {tuple(packed.shape)}; pass what pack returned, and the same number of bits."
        )
    return _unpack(packed, channels, _checked(bits), dtype, _choose(packed, backend))


def packed_length(channels: int, bits: int = 1) -> int:
    """Bytes that a row of `channels` values takes."""
    return -(-channels * _checked(bits) // 8)


def _check_values(values: Tensor, bits: int) -> None:
    most = 2 ** _checked(bits) - 1
    wrong = (values < 0) | (values > most)
    if values.is_floating_point():
        wrong |= values != values.trunc()
    if bool(wrong.any()):
        raise OptionError(
            f"pack: expected whole numbers 0..{most}, which {bits} bits can hold, got {values[wrong][0].item()}; give "
            "more bits, or keep the tensor dense."
        )


def _checked(bits: int) -> int:
    if bits not in BITS:
        raise OptionError(f"pack: bits must be one of {', '.join(map(str, BITS))}, got {bits}.")
    return bits


def _choose(x: Tensor, backend: str) -> str:
    asked = dispatch.resolve(backend)
    triton = dispatch.auto_triton_refusal if asked != "triton" else dispatch.triton_refusal
    # the dtype of the values does not matter to the kernels, so float64 is no reason to refuse
    return dispatch.choose(backend, triton=triton(x[..., :0].to(torch.uint8)), numba=dispatch.numba_refusal(x))


def _kernels(backend: str):
    if backend == "triton":
        from spikefit.ops.packbits import cuda

        return cuda
    if backend == "numba":
        from spikefit.ops.packbits import cpu

        return cpu
    return reference


@custom_op("spikefit::pack")
def _pack(values: Tensor, bits: int, backend: str) -> Tensor:
    rows = values.reshape(-1, values.shape[-1])
    step = max(1, SLICE // max(1, rows.shape[1]))
    kernels = _kernels(backend)
    pieces = [kernels.pack(piece.to(torch.uint8).contiguous(), bits) for piece in rows.split(step)]
    packed = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return packed.view(*values.shape[:-1], packed.shape[1])


@_pack.register_fake
def _(values, bits, backend):
    return values.new_empty((*values.shape[:-1], packed_length(values.shape[-1], bits)), dtype=torch.uint8)


@custom_op("spikefit::unpack")
def _unpack(packed: Tensor, channels: int, bits: int, dtype: torch.dtype, backend: str) -> Tensor:
    out = packed.new_empty((*packed.shape[:-1], channels), dtype=dtype)
    if out.numel() > 0:
        _kernels(backend).unpack(packed.reshape(-1, packed.shape[-1]), out.view(-1, channels), bits)
    return out


@_unpack.register_fake
def _(packed, channels, bits, dtype, backend):
    return packed.new_empty((*packed.shape[:-1], channels), dtype=dtype)

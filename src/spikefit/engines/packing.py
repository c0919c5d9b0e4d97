"""Packing of what autograd saves: spikes and other tensors of few distinct values are held as bits, in any network.

A tensor with at most 256 distinct values (bit patterns, so -0.0 and NaN are values too) is held as a table of levels
and one code of 1, 2, 4 or 8 bits per element:

    x_i = levels[code_i]        spikes: levels 0, 1;  ternary: -1, 0, 1;  2x2 average pool of spikes: 0, 1/4, ..., 1

Levels 0, 1, ..., 2**bits - 1 need no table, and levels at equal distances, low + step * code, are found by arithmetic.
Every packed tensor has been unpacked once and compared bit by bit; one that would not come back stays as it is.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from spikefit.errors import OptionError, TrainingError
from spikefit.ops.packbits import pack, unpack
from spikefit.ops.packbits.reference import PATTERN

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Most levels of one tensor. More of them in a sample of SAMPLE elements reject a tensor at once; with more than FEW, a
# larger sample is looked at before all elements are, and integers are tried as distances first.
LEVELS, SAMPLE, FEW = 256, 1024, 16
# Elements per row of packed bits, a multiple of 8, and per piece that is worked on at a time: a piece fits in the cache
# of a CPU; on other devices it is large enough to hide the start of the kernels.
ROW, PIECE_CPU, PIECE = 256, 1 << 18, 1 << 22


@contextlib.contextmanager
def pack_saved_tensors(min_numel: int = 4096) -> "Iterator[PackedSaves]":
    """Hold what autograd saves inside the block as bits where that is exact; gradients are the same bit for bit.

        with pack_saved_tensors() as saves:
            loss = loss_function(network(x), y)
        loss.backward()
        print(saves.saved_bytes, saves.packed_bytes)

    For networks of any library; no layer is replaced and nothing is computed twice. Tensors come back with their dtype,
    shape, strides and device. Left alone: parameters and other leaves that require a gradient, views of them, tensors
    with more than 256 distinct values, complex and sparse tensors, tensor subclasses. Indices of max-pooling are packed
    as distances from the smallest index at their position.

    A packed tensor is a copy: changing the original in place afterwards does no harm. For a tensor that is kept as it
    is, such a change raises in backward, as it does in plain autograd. Every save is checked when it happens, which
    waits for the device. `torch.utils.checkpoint` and autocast work inside the block; in nested blocks the inner one
    packs. Backward may run inside or outside of the block. Double backward is not promised.

    Args:
        min_numel: tensors with fewer elements are kept as they are; at least 1.

    Yields:
        Counts of bytes so far, see `PackedSaves`.

    Raises:
        OptionError: `min_numel` is not a whole number above zero.
        TrainingError: in backward, if a tensor that was kept as it is has been modified in place.
    """
    if isinstance(min_numel, bool) or not isinstance(min_numel, int) or min_numel < 1:
        raise OptionError(
            f"pack_saved_tensors: min_numel must be a whole number of at least 1 element, got {min_numel!r}."
        )
    saves = PackedSaves(min_numel)
    with torch.autograd.graph.saved_tensors_hooks(saves.pack, lambda saved: saved.restore()):
        yield saves


class PackedSaves:
    """What one block saves. Holds no tensor itself: the graph does, until it is freed.

    Parameters (leaves that require a gradient, and their views) and tensor subclasses are not counted.
    """

    def __init__(self, min_numel: int) -> None:
        self.min_numel = min_numel
        self._saved, self._held = _Count(), _Count()
        self._storages: weakref.WeakValueDictionary[int, _Storage] = weakref.WeakValueDictionary()
        self._packed: weakref.WeakValueDictionary[tuple, Packed | Shifted] = weakref.WeakValueDictionary()

    @property
    def saved_bytes(self) -> int:
        """Bytes that autograd alone would have held, each storage once: the most at one time so far."""
        return self._saved.most

    @property
    def packed_bytes(self) -> int:
        """Bytes held instead, packed values and storages of tensors kept as they are: the most at one time so far."""
        return self._held.most

    def pack(self, tensor: Tensor) -> "Kept | Packed | Shifted":
        """What the graph holds in place of `tensor`."""
        if type(tensor) is not Tensor or tensor.layout is not torch.strided or _is_parameter(tensor):
            return Kept(tensor)
        storage = self._storage(tensor)
        packed = self._find_or_pack(tensor, storage) if tensor.numel() >= self.min_numel else None
        if packed is not None:
            return packed
        # A view keeps its whole storage, as in plain autograd: its siblings are mostly kept too, a copy would be added.
        lease = storage.kept()
        if lease is None:
            lease = _Lease(self._held, tensor.untyped_storage().nbytes(), storage)
            storage.kept = weakref.ref(lease)
        return Kept(tensor, lease)

    def _storage(self, tensor: Tensor) -> "_Storage":
        data = tensor.untyped_storage()
        storage = self._storages.get(data._cdata)
        if storage is None:
            storage = _Storage(StorageWeakRef(data), _Lease(self._saved, data.nbytes()))
            self._storages[data._cdata] = storage
        return storage

    def _find_or_pack(self, tensor: Tensor, storage: "_Storage") -> "Packed | Shifted | None":
        if not _has_patterns(tensor) or _memory_order(tensor).numel() < self.min_numel:
            return None
        place = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        key = (storage.address.cdata, tensor._version, *place)
        packed = self._packed.get(key)
        # Kernels that write without telling autograd, and writes through `.data`, leave the version as it is.
        if packed is not None and packed.holds(tensor):
            return packed
        packed = _pack_best(tensor)
        if packed is not None:
            packed.lease = _Lease(self._held, packed.nbytes, storage)
            self._packed[key] = packed
        return packed


class _Count:
    """Bytes now and the most so far."""

    now = most = 0


class _Lease:
    """Counts bytes while it lives."""

    def __init__(self, count: _Count, nbytes: int, storage: "_Storage | None" = None) -> None:
        self.count, self.nbytes, self.storage = count, nbytes, storage
        count.now += nbytes
        count.most = max(count.most, count.now)

    def __del__(self) -> None:
        self.count.now -= self.nbytes


@dataclass(eq=False)
class _Storage:
    """A storage by its address, which is not used again while this object lives; the memory itself is not held."""

    address: StorageWeakRef
    saved: _Lease
    kept: Callable[[], _Lease | None] = lambda: None


class Kept:
    """A tensor as it is. Autograd checks no version of what a hook gives back, so that is done here."""

    def __init__(self, tensor: Tensor, lease: _Lease | None = None) -> None:
        # a result is held without its node, which holds this object; a leaf has none
        self.tensor = tensor if tensor.is_leaf and tensor.requires_grad else tensor.detach()
        self.version = tensor._version
        self.lease = lease

    def restore(self) -> Tensor:
        """The tensor.

        Raises:
            TrainingError: it was modified in place since.
        """
        if self.tensor._version != self.version:
            raise TrainingError(
                f"pack_saved_tensors: a tensor that backward needs, {self.tensor.dtype} {tuple(self.tensor.shape)}, "
                f"was modified in place: expected version {self.version}, got {self.tensor._version}. Replace the "
                "in-place operation after its use, for example x += y by x = x + y."
            )
        return self.tensor


class Codec:
    """Between bit patterns [n] and packed rows: codes of `width` bits that stand for `levels`."""

    def __init__(self, levels: Tensor, dtype: torch.dtype) -> None:
        """Choose width and arithmetic for the sorted patterns `levels` of a tensor of `dtype`."""
        self.width = next(w for w in (1, 2, 4, 8) if len(levels) <= 2**w)
        self.dtype = dtype if dtype in FLOATS else levels.dtype
        counts = torch.arange(2**self.width, dtype=self.dtype, device=levels.device).view(levels.dtype)
        self.counts = bool(torch.isin(levels, counts).all())
        self.even = False
        if self.counts:
            levels = counts
        elif self.dtype in FLOATS and len(levels) > 2:
            values = levels.view(self.dtype).sort().values
            self.low, self.step = values[0], values[1] - values[0]
            codes = torch.arange(len(levels), dtype=self.dtype, device=levels.device)
            self.even = torch.equal(self._even_codes(values), codes)
            levels = values.view(levels.dtype) if self.even else levels
        # every code has a level, so that unpacking a wrong one is safe
        self.levels = torch.cat([levels, levels[-1:].expand(2**self.width - len(levels))])

    def _even_codes(self, values: Tensor) -> Tensor:
        return (values - self.low).div_(self.step).round_()

    def encode(self, patterns: Tensor) -> Tensor:
        """[n] -> uint8 [ceil(n / ROW), bytes per row]; a pattern outside of the levels gives some wrong code."""
        if self.counts:
            codes = patterns.view(self.dtype)
        elif self.even:
            codes = self._even_codes(patterns.view(self.dtype))
        elif self.width == 1:
            codes = patterns != self.levels[0]
        else:
            codes = torch.bucketize(patterns, self.levels, out_int32=True)
        return pack(nn.functional.pad(codes, (0, -len(codes) % ROW)).view(-1, ROW), self.width, check=False)

    def decode(self, rows: Tensor, n: int) -> Tensor:
        """The inverse of `encode`."""
        if self.counts:
            return unpack(rows, ROW, self.width, dtype=self.dtype).view(self.levels.dtype).view(-1)[:n]
        codes = unpack(rows, ROW, self.width, dtype=torch.int32).view(-1)[:n]
        return self.levels.index_select(0, codes)


class Packed:
    """A tensor as bits; made by `_pack`, which fills it."""

    lease: _Lease | None = None

    def __init__(self, tensor: Tensor, codec: Codec) -> None:
        self.codec = codec
        self.dtype, self.shape, self.stride = tensor.dtype, tensor.shape, tensor.stride()
        rows = sum(-(-part.numel() // ROW) for part in _pieces(_patterns(tensor)))
        self.bits = torch.empty(rows, ROW * codec.width // 8, dtype=torch.uint8, device=tensor.device)

    @property
    def nbytes(self) -> int:
        return self.bits.nbytes + self.codec.levels.nbytes

    def _parts(self, patterns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pieces of the tensor and their rows of bits."""
        row = 0
        for part in _pieces(patterns):
            end = row - (-part.numel() // ROW)
            yield part, self.bits[row:end]
            row = end

    def fill(self, patterns: Tensor) -> Tensor:
        """Encode all elements and compare what comes back; returns patterns that the levels lack, sorted."""
        strangers = patterns.new_empty(0)
        for part, rows in self._parts(patterns):
            values = part.reshape(-1)
            rows.copy_(self.codec.encode(values))
            back = self.codec.decode(rows, len(values))
            if not torch.equal(back, values):
                strangers = torch.cat([strangers, values[back != values]]).unique()
                if len(strangers) > LEVELS:
                    break
        return strangers

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor`, of the same shape and strides, has these values bit for bit."""
        parts = self._parts(_patterns(tensor))
        return all(torch.equal(self.codec.decode(rows, part.numel()), part.reshape(-1)) for part, rows in parts)

    def restore(self) -> Tensor:
        """The tensor: same dtype, shape, strides and device."""
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.bits.device)
        for part, rows in self._parts(_patterns(tensor)):
            part.copy_(self.codec.decode(rows, part.numel()).view(part.shape))
        return tensor


@dataclass(eq=False)
class Shifted:
    """Integers as packed distances from `base`, their smallest value at each position of the trailing axes."""

    distance: Packed
    base: Tensor
    lease: _Lease | None = None

    @property
    def nbytes(self) -> int:
        return self.distance.nbytes + self.base.nbytes

    def holds(self, tensor: Tensor) -> bool:
        return torch.equal(self.restore(), tensor)

    def restore(self) -> Tensor:
        return self.distance.restore().to(self.base.dtype).add_(self.base)


def _pack_best(tensor: Tensor) -> Packed | Shifted | None:
    """Pack `tensor`, indices as distances unless they are few; None where that is not exact or saves nothing."""
    if tensor.dtype not in (torch.int32, torch.int64) or tensor.ndim < 3:
        return _pack(tensor)
    return _pack(tensor, most=FEW) or _pack_shifted(tensor) or _pack(tensor)


def _pack(tensor: Tensor, most: int = LEVELS) -> Packed | None:
    """Pack `tensor`, or return None where that is not exact, saves nothing, or takes more than `most` levels."""
    patterns = _patterns(tensor)
    levels = _sample(patterns, SAMPLE).unique()
    if FEW < len(levels) <= most:
        levels = _sample(patterns, 16 * SAMPLE).unique()
    # the second round knows all levels, if they are few enough
    for _ in range(2):
        if len(levels) > most:
            return None
        packed = Packed(tensor, Codec(levels, tensor.dtype))
        if packed.nbytes >= patterns.nbytes:
            return None
        strangers = packed.fill(patterns)
        if len(strangers) == 0:
            return packed
        levels = torch.cat([levels, strangers]).unique()
    return None


def _sample(x: Tensor, count: int) -> Tensor:
    """About `count` elements; the step is odd, so that they do not stay in one column."""
    return x.take(torch.arange(0, x.numel(), x.numel() // count | 1, device=x.device))


def _pack_shifted(tensor: Tensor) -> Shifted | None:
    """Pack indices, [N, C, ...] with a few neighbouring values at each position, as those of max-pooling."""
    if not _patterns(tensor).is_contiguous() or 0 in tensor.stride():
        return None
    base = tensor.amin((0, 1), keepdim=True)
    distance = torch.empty_like(tensor, dtype=torch.int16)
    count = max(1, _piece_size(tensor) // tensor[0].numel())
    for part, out in zip(tensor.split(count), distance.split(count), strict=True):
        torch.sub(part, base, out=out)
        if not torch.equal(out + base, part):
            return None
    packed = _pack(distance)
    return None if packed is None else Shifted(packed, base)


def _is_parameter(tensor: Tensor) -> bool:
    """A parameter, another leaf that requires a gradient, or a view of one."""
    base = tensor._base if tensor._is_view() else tensor
    return base is not None and (isinstance(base, nn.Parameter) or (base.is_leaf and base.requires_grad))


def _has_patterns(tensor: Tensor) -> bool:
    """Whether the elements can be read as bit patterns, and each lies in its own place of memory."""
    if tensor.is_complex() or tensor.is_neg() or tensor.is_quantized or tensor.is_meta:
        return False
    reach = 0
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda axis: axis[1]):
        if size > 1 and stride > 0:
            if stride <= reach:
                return False
            reach += (size - 1) * stride
    return True


def _memory_order(tensor: Tensor) -> Tensor:
    """A view of the distinct elements (of an expanded axis only the first), axes in the order of memory."""
    for axis, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(axis, 0, 1)
    tensor = tensor.squeeze()
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))


def _patterns(tensor: Tensor) -> Tensor:
    """The distinct elements in the order of memory, as the integers of their bits."""
    return _memory_order(tensor).view(PATTERN[tensor.element_size()])


def _piece_size(x: Tensor) -> int:
    return PIECE_CPU if x.device.type == "cpu" else PIECE


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """Views that make up `x`, in order, so small that copies of one cost little."""
    size = _piece_size(x)
    if x.is_contiguous():
        yield from x.view(-1).split(size)
    elif x[0].numel() <= size:
        yield from x.split(size // x[0].numel())
    else:
        for part in x:
            yield from _pieces(part)

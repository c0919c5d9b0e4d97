"""Packing of saved tensors: the same gradients bit for bit, fewer bytes held, and never a wrong value."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from spikefit.engines import packing
from spikefit.engines.packing import Kept, Packed, PackedSaves, Shifted, pack_saved_tensors
from spikefit.errors import OptionError, TrainingError
from support import dyadic

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16]


class Spike(torch.autograd.Function):
    """Fires at u >= 1; triangular slope."""

    @staticmethod
    def forward(ctx, u):
        ctx.save_for_backward(u)
        return (u >= 1).to(u.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (u,) = ctx.saved_tensors
        return gradient * (1 - (u - 1).abs()).clamp(min=0)


class PlainNetwork(nn.Module):
    """Two layers of convolution, batch norm, LIF and max-pool in plain torch: [T, B, 2, 16, 16] -> [B, 10]."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ModuleList([nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.readout = nn.Linear(16 * width, 10)

    def forward(self, x_TBCHW):
        v, total = [0.0, 0.0], 0.0
        for s in x_TBCHW:
            for i, (weight, norm) in enumerate(zip(self.weights, self.norms, strict=True)):
                u = 0.5 * v[i] + norm(weight(s))
                s = Spike.apply(u)
                v[i] = u - s
                s = F.max_pool2d(s, 2)
            total = total + self.readout(s.flatten(1))
        return total


def spikes(*shape, seed=0):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.3).float()


def step(forward, inputs, *, pack, **options):
    """One forward and backward: (output, gradients, bytes that autograd alone holds, bytes held)."""
    if not pack:
        output = forward()
        return output.detach(), torch.autograd.grad(output.float().square().mean(), inputs), None, None
    with pack_saved_tensors(**options) as saves:
        output = forward()
        loss = output.float().square().mean()
    # what was saved and let go again before the end of the forward is in the most at one time only
    assert 0.9 * saves.packed_bytes < held_bytes() <= saves.packed_bytes
    return output.detach(), torch.autograd.grad(loss, inputs), saves.saved_bytes, saves.packed_bytes


def held_bytes():
    """Bytes behind all records that are alive, each storage once, parameters left out."""
    storages = {}
    gc.collect()
    for record in gc.get_objects():
        if type(record) is Kept:
            tensors = [record.tensor] if record.lease is not None else []
        elif type(record) is Packed:
            tensors = [record.bits, record.codec.levels]
        elif type(record) is Shifted:
            tensors = [record.base]
        else:
            continue
        storages |= {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def assert_same_step(got, wanted):
    assert torch.equal(got[0], wanted[0])
    assert sum(float(g.abs().sum()) for g in wanted[1]) > 0, "a zero gradient proves nothing"
    for a, b in zip(got[1], wanted[1], strict=True):
        assert torch.equal(a, b)


def save(tensor, min_numel=1):
    """What is held in place of `tensor`; it gives the tensor back: dtype, shape, strides, and values bit for bit."""
    record = PackedSaves(min_numel).pack(tensor)
    back = record.restore()
    assert (back.dtype, back.shape, back.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    pattern = packing.PATTERN[tensor.element_size()]
    assert torch.equal(back.view(pattern), tensor.view(pattern))
    return record


# Whole networks


def test_network_has_the_same_gradients_and_holds_fewer_bytes_per_step():
    network, bytes_of = PlainNetwork(), {}
    for T in (4, 12):
        x = spikes(T, 8, 2, 16, 16)
        wanted = step(lambda x=x: network(x), list(network.parameters()), pack=False)
        got = step(lambda x=x: network(x), list(network.parameters()), pack=True, min_numel=1024)
        assert_same_step(got, wanted)
        bytes_of[T] = got[2:]
    saved, packed = ((bytes_of[12][i] - bytes_of[4][i]) / 8 for i in (0, 1))
    neurons = 8 * 8 * (16 * 16 + 8 * 8)
    # Per neuron: the inputs of batch norm and of the spike function, 4 B each, and bits. Autograd alone: spikes (4 B),
    # for every fourth neuron the pooled spikes (4 B) and where they were (8 B), and the input of the network as well.
    assert 8 * neurons < packed < 8.6 * neurons
    assert saved > 14 * neurons


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_inside(reentrant):
    network, u = PlainNetwork(), dyadic(4, 8, 2, 16, 16).requires_grad_()
    inputs = [u, *network.parameters()]

    def checkpointed():
        return checkpoint(network, Spike.apply(u), use_reentrant=reentrant)

    def run(forward, context):
        network.zero_grad()
        u.grad = None
        with context as saves:
            output = forward()
        output.square().mean().backward()
        return (output.detach(), [p.grad.clone() for p in inputs]), saves

    wanted, _ = run(lambda: network(Spike.apply(u)), torch.enable_grad())
    got, saves = run(checkpointed, pack_saved_tensors())
    assert_same_step(got, wanted)
    # the spikes that enter, one bit each; `u` is a leaf
    assert saves.packed_bytes < u.numel() / 8 + 1024


def test_backward_inside_the_block_many_times_and_nested_blocks():
    network, x = PlainNetwork(), spikes(3, 8, 2, 16, 16)
    parameters = list(network.parameters())
    wanted = step(lambda: network(x), parameters, pack=False)
    with pack_saved_tensors() as outer:
        for _ in range(2):
            with pack_saved_tensors() as inner:
                output = network(x)
            loss = output.square().mean()
            first = torch.autograd.grad(loss, parameters, retain_graph=True)
            again = torch.autograd.grad(loss, parameters)
            assert_same_step((output.detach(), first), wanted)
            assert_same_step((output.detach(), again), wanted)
    assert outer.packed_bytes == outer.saved_bytes < 1024
    assert 0 < inner.packed_bytes < inner.saved_bytes


def test_autocast():
    network, x = PlainNetwork(), spikes(3, 8, 2, 16, 16)
    parameters = list(network.parameters())

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return network(x)

    wanted, got = (step(forward, parameters, pack=pack) for pack in (False, True))
    assert_same_step(got, wanted)
    assert got[3] < 0.8 * got[2]


def test_spikingjelly():
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, layer, neuron

    network = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1), layer.BatchNorm2d(8), neuron.LIFNode(), layer.MaxPool2d(2)
    )
    functional.set_step_mode(network, "m")
    x = spikes(4, 8, 2, 16, 16)

    def forward():
        functional.reset_net(network)
        return network(x).mean(0)

    wanted, got = (step(forward, list(network.parameters()), pack=pack) for pack in (False, True))
    assert_same_step(got, wanted)
    assert got[3] < 0.7 * got[2]


def test_snntorch():
    snntorch = pytest.importorskip("snntorch")
    weight, norm, node = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), snntorch.Leaky(beta=0.5, threshold=0.5)
    x = spikes(4, 8, 2, 16, 16)

    def forward():
        v, total = node.init_leaky(), 0
        for x_t in x:
            s, v = node(norm(weight(x_t)), v)
            total = total + F.max_pool2d(s, 2)
        return total

    wanted, got = (step(forward, [*weight.parameters(), *norm.parameters()], pack=pack) for pack in (False, True))
    assert_same_step(got, wanted)
    assert got[3] < 0.8 * got[2]


# Which tensors are packed, in how many bits


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 63, 1000, 5000])
def test_zeros_and_ones_take_one_bit(dtype, n):
    record = save(spikes(n).to(dtype))
    assert record.codec.width == 1 if n >= 63 else True
    assert isinstance(save(spikes(n).to(dtype), min_numel=n + 1), Kept)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("levels", "width", "way"),
    [
        ([0, 1, 2, 3], 2, "counts"),
        ([0, 2], 1, "table"),
        ([-1, 0, 1], 2, "even"),
        ([0, 0.25, 0.5, 0.75, 1], 4, "even"),
        ([k / 9 for k in range(10)], 4, "even"),
        ([-3, -2, -1, 0, 5, 7], 4, "table"),
        ([0, 1, 2.5, float("inf")], 2, "table"),
        (list(range(16)), 4, "counts"),
        (list(range(200)), 8, "counts"),
        ([k / 4 - 10 for k in range(100)], 8, "even"),
        ([-1], 1, "table"),
    ],
)
def test_few_levels_take_few_bits(dtype, levels, width, way):
    index = torch.randint(0, len(levels), (20_000,), generator=torch.Generator().manual_seed(0))
    record = save(torch.tensor(levels, dtype=dtype)[index])
    assert record.codec.width == width
    assert way == "counts" if record.codec.counts else "even" if record.codec.even else "table"


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_ternary_integers(dtype):
    assert save(torch.randint(-1, 2, (5000,)).to(dtype)).codec.width == 2


ODD = [0.5, -1.0, -0.0, float("nan"), float("inf"), 1e-45, 2.0, 255.0, 256.0, 1e30, -1e30]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("levels", [[0.0, 1.0], [-1.0, 0.0, 1.0], [0.0, 1.25], [k / 4 for k in range(5)]])
@pytest.mark.parametrize("place", [1, 299_999, 600_001])
def test_one_odd_value_survives(odd, levels, place):
    index = torch.randint(0, len(levels), (600_002,), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(levels)[index]
    x[place] = odd
    save(x)


def test_different_nans_and_zeros_are_different_values():
    patterns = torch.tensor([0, -(2**31), 0x7FC00000, 0x7FC00001, 0x7F800001], dtype=torch.int32)
    assert save(patterns.view(torch.float32).repeat(1000)).codec.width == 4


@pytest.mark.parametrize(("levels", "packs"), [(256, True), (257, False)])
def test_at_most_256_levels(levels, packs):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(levels, generator=generator)[torch.randint(0, levels, (50_000,), generator=generator)]
    assert isinstance(save(x), Packed) == packs


def test_rare_levels_that_the_sample_does_not_show():
    x = spikes(700_000)
    x[torch.arange(100) * 6000 + 17] = torch.arange(100) + 0.5
    assert save(x).codec.width == 8
    x[torch.arange(300) * 2000 + 18] = torch.arange(300) + 0.25
    assert isinstance(save(x), Kept)


def test_huge_integers():
    for low, high in [(0, 2**62), (2**53, 2**53 + 1), (-(2**63), 2**63 - 1)]:
        assert save(torch.tensor([low, high])[spikes(5000).long()]).codec.width == 1


def test_real_values_are_kept_as_they_are():
    for dtype in FLOATS:
        x = torch.randn(5000, dtype=dtype)
        assert save(x).tensor.data_ptr() == x.data_ptr()
    assert isinstance(save(torch.randint(0, 200, (5000,), dtype=torch.uint8)), Kept), "eight bits of eight save nothing"


def test_indices_of_max_pooling():
    x = spikes(6, 8, 32, 32).flatten(0, 1)[:, None]
    for layout in (torch.contiguous_format, torch.channels_last):
        _, index = F.max_pool2d(x.expand(-1, 3, -1, -1).contiguous(memory_format=layout), 2, return_indices=True)
        record = save(index)
        assert isinstance(record, Shifted)
        assert record.nbytes < index.nbytes / 20
    save(torch.randint(-(2**62), 2**62, (8, 8, 8, 8)))
    save(torch.randint(0, 10_000, (8, 8, 8, 8)))
    base = 3 * torch.arange(1024).view(32, 32)
    for low, high in [(0, 2**15 - 1), (0, 2**16), (-(2**62), 2**62)]:
        save(base + torch.tensor([low, high])[spikes(8, 8, 32, 32).long()])


# Memory layout


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3),
        lambda x: x[3],
        lambda x: x[:, 2],
        lambda x: x[..., 3],
        lambda x: x[:, 1:3, ::2, 1:],
        lambda x: x[:, :, None],
        lambda x: x.permute(2, 0, 3, 1)[1:],
    ],
)
def test_strides_are_kept(view, monkeypatch):
    x = view(spikes(6, 6, 8, 16))
    for piece, row in [(packing.PIECE_CPU, packing.ROW), (200, packing.ROW), (100, 8), (3, 8)]:
        monkeypatch.setattr(packing, "PIECE_CPU", piece)
        monkeypatch.setattr(packing, "ROW", row)
        assert isinstance(save(x), Packed)
    assert isinstance(save(view(torch.randn(6, 6, 8, 16))), Kept)


def test_repeated_elements_are_packed_once():
    x = spikes(1, 64, 100).expand(50, 64, 100)
    assert save(x).nbytes < 6400 / 8 + 100
    assert isinstance(save(x, min_numel=6401), Kept)
    assert isinstance(save(spikes(5000).unfold(0, 10, 5)), Kept), "overlapping memory is left alone"


def test_what_has_no_plain_bits_is_kept():
    class Special(torch.Tensor):
        pass

    for x in [
        torch.zeros(5000, dtype=torch.complex64),
        torch.zeros(5000, dtype=torch.complex64).conj().imag,
        torch.zeros(50, 100).to_sparse(),
        torch.zeros(5000, device="meta"),
        torch.zeros(5000).as_subclass(Special),
        torch.zeros(0),
    ]:
        assert isinstance(PackedSaves(1).pack(x), Kept)


# Sharing, changing in place, letting go


def test_a_tensor_saved_many_times_is_packed_once():
    s, weight = spikes(100, 100), torch.randn(100, 100, requires_grad=True)
    with pack_saved_tensors() as saves:
        outputs = [s @ weight, s.view(100, 100) @ weight, weight * s]
    assert saves.saved_bytes == s.nbytes
    assert saves.packed_bytes == held_bytes() <= s.numel() / 8 + 100
    assert isinstance(saves.pack(s[1:]), Packed), "another view is packed by itself"
    del outputs


def test_a_write_that_autograd_does_not_see_is_not_confused():
    s, weight = spikes(100, 100), torch.randn(100, 100, requires_grad=True)
    with pack_saved_tensors():
        first = s @ weight
        s.data.neg_().add_(1)
        second = s @ weight
    (got_second,) = torch.autograd.grad(second.sum(), weight)
    (got_first,) = torch.autograd.grad(first.sum(), weight)
    assert torch.equal(got_second, s.T @ torch.ones(100, 100))
    assert torch.equal(got_first, (1 - s).T @ torch.ones(100, 100))


def test_memory_that_is_used_again_is_not_confused():
    weight, outputs, wanted = torch.randn(5000, requires_grad=True), [], []
    with pack_saved_tensors() as saves:
        for i in range(50):
            s = spikes(5000, seed=i)
            outputs.append((weight * s).sum())
            wanted.append(s.clone())
            del s
    assert saves.saved_bytes == 50 * 20_000
    assert saves.packed_bytes == held_bytes() < saves.saved_bytes / 20
    for output, s in zip(outputs, wanted, strict=True):
        assert torch.equal(torch.autograd.grad(output, weight)[0], s)


def test_change_in_place_after_saving():
    weight, x, s = torch.randn(5000, requires_grad=True), torch.randn(5000), spikes(5000)
    with pack_saved_tensors():
        kept, packed, result, own = weight * x, weight * s, weight.exp(), weight * weight
    x.add_(1)
    result.mul_(2)
    for output in (kept, result):
        with pytest.raises(TrainingError, match=r"float32 \(5000,\), was modified in place: expected version 0, got 1"):
            output.sum().backward()
    before = s.clone()
    s.zero_()
    assert torch.equal(torch.autograd.grad(packed.sum(), weight)[0], before), "packed values are a copy"
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        own.sum().backward()


def test_parameters_stay_themselves():
    layer, x = nn.Linear(100, 100), torch.randn(100, 100, requires_grad=True)
    nn.init.ones_(layer.weight)
    with pack_saved_tensors() as saves:
        y = layer(x * 2)
    saved = y.grad_fn._saved_mat2
    assert saved.data_ptr() == layer.weight.data_ptr()
    assert saved.stride() == layer.weight.t().stride()
    assert saves.saved_bytes == saves.packed_bytes == x.nbytes
    assert saves.pack(layer.weight).restore() is layer.weight
    assert saves.pack(layer.weight.detach()).restore() is not layer.weight


def test_nothing_lives_longer_than_the_graph():
    gc.collect()
    gc.disable()  # reference counts alone must do
    try:
        weight = torch.randn(5000, requires_grad=True)
        with pack_saved_tensors() as saves:
            s = spikes(5000)
            u = (weight * s).exp()
            loss = (u * u).sum()
            storages = [StorageWeakRef(t.untyped_storage()) for t in (s, u)]
            del s, u
            assert [storage.expired() for storage in storages] == [True, False], "packed, and kept as it is"
            records = [weakref.ref(r) for r in gc.get_objects() if type(r) in (Kept, Packed, Shifted)]
            assert len(records) >= 3
            loss.backward()
            assert all(storage.expired() for storage in storages)
            assert all(record() is None for record in records)
            assert not saves._packed
            assert not saves._storages
            assert saves._saved.now == saves._held.now == 0
            most = saves.saved_bytes, saves.packed_bytes
            (weight * spikes(5000)).sum().backward()
            assert most == (saves.saved_bytes, saves.packed_bytes), "counts are the most at one time"
        with pack_saved_tensors():
            dropped = (weight * 2).exp()
        storage = StorageWeakRef(dropped.untyped_storage())
        del dropped
        assert storage.expired(), "a result that is never used must not hold itself"
    finally:
        gc.enable()


def test_min_numel_is_positive():
    with pytest.raises(OptionError, match="at least 1 element, got 0"), pack_saved_tensors(min_numel=0):
        pass

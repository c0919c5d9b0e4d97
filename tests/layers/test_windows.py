"""Windows of a map, their coding, and blocks made of them: known answers, gradients, refusals."""

import math

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from spikefit.errors import OptionError, ShapeError, StateError
from spikefit.layers.window_block import WindowSpike
from spikefit.layers.window_cells import CELLS
from spikefit.layers.window_coding import decode, encode, encode_packed
from spikefit.layers.window_parts import PatchMerging, Stream
from spikefit.layers.windows import Windows, cut, put_back, recompose, windows_of
from spikefit.neurons.window import WindowLIF
from spikefit.ops.dispatch import use_backend
from spikefit.ops.surrogate import parse_surrogate
from support import dyadic, saved_bytes

ALL = [(kind, count) for kind in ("tile", "dilated") for count in (1, 2, 4)]


def maps(B=2, side=8, C=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(B, side, side, C, generator=generator, dtype=dtype)


def block_input(B=2, C=4, side=8, seed=0):
    """Stream of multiples of 1/16, [1, B, C, H, W]."""
    return dyadic(1, B, C, side, side, low=0, high=1, seed=seed)


def on_a_grid(block):
    """Weights of the cell as multiples of 1/16, small enough for exact sums."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randint(-6, 7, p.shape) / 16)
    return block


def chain(currents, start):
    """u_p of a leaky chain without reset, by hand."""
    u, made = start, []
    for x in currents:
        u = 0.4 * u + x
        made.append(u)
    return torch.stack(made)


def test_places_and_cover_of_a_16x16_map():
    tile, dilated = windows_of("tile", 4, (16, 16)), windows_of("dilated", 4, (16, 16))
    assert (tile.side, tile.offsets) == ((8, 8), ((0, 0), (0, 8), (8, 0), (8, 8)))
    assert (dilated.side, dilated.offsets) == ((12, 12), ((0, 0), (0, 4), (4, 0), (4, 4)))
    assert torch.equal(tile.cover(), torch.ones(16, 16, dtype=torch.int64))
    cover = dilated.cover()
    assert [(cover == n).sum().item() for n in (1, 2, 4)] == [64, 128, 64]
    assert (cover[4:12, 4:12] == 4).all()
    assert (cover[:4, :4] == 1).all()
    assert (cover[:4, 4:12] == 2).all()


def test_two_windows_are_halves_or_three_quarters_of_the_rows():
    assert windows_of("tile", 2, (8, 6))[1:] == ((4, 6), ((0, 0), (4, 0)))
    assert windows_of("dilated", 2, (8, 6))[1:] == ((6, 6), ((0, 0), (2, 0)))


def test_one_window_is_the_whole_map_of_either_kind():
    assert windows_of("tile", 1, (5, 7)) == windows_of("dilated", 1, (5, 7)) == Windows((5, 7), (5, 7), ((0, 0),))


def test_a_map_of_two_pixels_has_tiles_and_no_dilated_windows():
    assert windows_of("tile", 4, (2, 2)).side == (1, 1)
    with pytest.raises(ShapeError, match=r"4 dilated windows need H and W as multiples of 4, got a map of 2x2"):
        windows_of("dilated", 4, (2, 2))


@pytest.mark.parametrize("size", [(6, 6), (8, 6)])
def test_sides_that_do_not_divide_are_refused_with_the_way_out(size):
    with pytest.raises(ShapeError, match="pad or resize the images, or use windows=1 or kind='tile'"):
        windows_of("dilated", 4, size)
    with pytest.raises(ShapeError, match="4 tile windows need H and W as multiples of 2, got a map of 5x4"):
        windows_of("tile", 4, (5, 4))


@pytest.mark.parametrize(("kind", "count"), ALL)
def test_the_mean_of_windows_cut_out_of_a_map_is_the_map(kind, count):
    x, windows = dyadic(2, 8, 8, 3), windows_of(kind, count, (8, 8))
    assert torch.equal(recompose(cut(x, windows), windows), x)


@pytest.mark.parametrize(("kind", "count"), ALL)
def test_putting_back_is_the_adjoint_of_cutting(kind, count):
    windows = windows_of(kind, count, (8, 8))
    x = maps(dtype=torch.float64).requires_grad_()
    parts = torch.rand_like(cut(x.detach(), windows)).requires_grad_()
    assert torch.isclose((cut(x, windows) * parts).sum(), (x * put_back(parts, windows)).sum())
    assert gradcheck(lambda x: cut(x, windows), x)
    assert gradcheck(lambda p: recompose(p, windows), parts)


def by_pairs(parts, windows):
    """Overlaps averaged in the left and right pair of windows, then in the two strips."""
    (H, W), (h, w), C = windows.size, windows.side, parts.shape[-1]

    def joined(a, b, length, offset, axis):
        shape = list(a.shape)
        shape[axis] = length
        total, count = a.new_zeros(shape), a.new_zeros(shape)
        for part, first in ((a, 0), (b, offset)):
            total.narrow(axis, first, part.shape[axis]).add_(part)
            count.narrow(axis, first, part.shape[axis]).add_(1)
        return total / count

    top, bottom = joined(parts[0], parts[1], W, W - w, 2), joined(parts[2], parts[3], W, W - w, 2)
    assert top.shape[-1] == C
    return joined(top, bottom, H, H - h, 1)


def test_recomposition_by_pairs_is_that_by_counts_and_every_threshold_is_the_union():
    windows = windows_of("dilated", 4, (16, 16))
    parts = (torch.rand(4, 2, 12, 12, 3, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    mean = recompose(parts, windows)
    assert torch.allclose(mean, by_pairs(parts, windows))
    assert set(mean.unique().tolist()) == {0, 0.25, 0.5, 0.75, 1}
    union = recompose(parts, windows, "or")
    assert torch.equal(union, (mean > 0.1).float())
    assert torch.equal(union, (mean > 0.2).float())
    assert 0.05 < union.mean() < 0.95


def test_the_gradient_of_the_union_is_that_of_the_mean_or_only_where_nothing_fired():
    windows = windows_of("dilated", 4, (8, 8))
    parts = (torch.rand(4, 2, 6, 6, 3, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    g = torch.rand(2, 8, 8, 3)

    def gradient(mode, or_grad="ste"):
        p = parts.clone().requires_grad_()
        recompose(p, windows, mode, or_grad=or_grad).backward(g)
        return p.grad

    assert torch.equal(gradient("or"), gradient("mean"))
    silent = recompose(parts, windows) == 0
    p = parts.clone().requires_grad_()
    recompose(p, windows).backward(g * silent)
    assert torch.equal(gradient("or", "release"), p.grad)
    assert not torch.equal(p.grad, gradient("mean"))


def test_recompose_names_what_is_wrong():
    windows, parts = windows_of("tile", 4, (8, 8)), torch.zeros(4, 1, 4, 4, 2)
    with pytest.raises(OptionError, match="recompose: mode must be one of or, mean, got 'sum'"):
        recompose(parts, windows, "sum")
    with pytest.raises(OptionError, match="or_grad must be one of ste, release"):
        recompose(parts, windows, "or", or_grad="x")
    with pytest.raises(ShapeError, match=r"expected windows \[4, B, 4, 4, C\], got \(2, 1, 4, 4, 2\)"):
        recompose(parts[:2], windows)


# coding


def test_draws_are_new_for_every_window_and_follow_the_value():
    x, windows = torch.full((50, 8, 8, 2), 0.3), windows_of("dilated", 4, (8, 8))
    torch.manual_seed(0)
    coded = encode(x, windows, "bernoulli_sg")
    assert set(coded.unique().tolist()) == {0, 1}
    assert abs(coded.mean() - 0.3) < 0.01
    # the middle of the map lies in all windows: what they drew there differs
    middle = [coded[p][:, 2 - r : 4, 2 - c : 4] for p, (r, c) in enumerate(windows.offsets)]
    assert not torch.equal(middle[0][:, -1, -1], middle[3][:, -1, -1])
    assert encode(x * 0, windows, "bernoulli_sg").sum() == 0
    assert encode(x * 0 + 1, windows, "bernoulli_sg").mean() == 1
    assert torch.equal(encode(x + 0.3, windows, "heaviside"), torch.ones(4, 50, 6, 6, 2))


def test_a_generator_decides_the_draws_and_leaves_the_global_one_alone():
    x, windows = maps(), windows_of("tile", 4, (8, 8))
    before = torch.get_rng_state()
    one, two = (encode(x, windows, "bernoulli_sg", torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(OptionError, match="expected a generator on meta, where the map is, got one on cpu"):
        encode(x.to("meta"), windows, "bernoulli_sg", torch.Generator())


@pytest.mark.parametrize("coding", ["bernoulli_sg", "bernoulli_ste", "heaviside"])
def test_packed_spikes_are_the_same_and_take_a_bit(coding):
    x, windows = (maps(C=16) * 2 - 0.5), windows_of("dilated", 4, (8, 8))
    dense, packed = x.clone().requires_grad_(), x.clone().requires_grad_()
    made = encode(dense, windows, coding, torch.Generator().manual_seed(1))
    carrier, bits = encode_packed(packed, windows, coding, torch.Generator().manual_seed(1))
    found = decode(carrier, bits)
    assert torch.equal(found, made)
    assert bits.numel() * 8 == made.numel()
    assert carrier.untyped_storage().nbytes() == 4
    assert found.requires_grad == made.requires_grad == (coding != "bernoulli_sg")
    if coding != "bernoulli_sg":
        g = torch.rand_like(made)
        made.backward(g)
        found.backward(g)
        inside = ((x > 0) & (x < 1)).float()
        assert torch.equal(packed.grad, dense.grad)
        assert torch.allclose(dense.grad, put_back(g, windows) * inside)
        assert 0 < inside.mean() < 1


# blocks


def test_a_learned_threshold_comes_back_from_its_largest_value():
    neuron = WindowLIF(learn_threshold=True)
    neuron.v_threshold.backward()
    assert neuron.w_threshold.grad == 1
    optimizer = torch.optim.SGD(neuron.parameters(), lr=0.1)
    for target in (1.0, 1.0, 0.3):
        for _ in range(50):
            optimizer.zero_grad()
            (neuron.v_threshold - target).square().backward()
            optimizer.step()
        assert float(neuron.v_threshold.detach()) == pytest.approx(min(target, 0.5), abs=1e-3)
    # beyond its end it is the bound, and what the bound is made of learns
    neuron = WindowLIF(learn_threshold=True, learn_phi=True)
    neuron.w_threshold.data.fill_(0.6)
    neuron.v_threshold.neg().backward()
    assert neuron.w_threshold.grad == 0
    assert neuron.w_phi.grad > 0


def test_two_inputs_below_the_threshold_fire_in_the_second_window():
    neuron = WindowLIF(fuse="a")
    from spikefit.ops.window_scan import in_turn

    for values, spikes, membranes in (((0.4, 0.4), [0, 1], [0.4, 0.56]), ((0.5, 0.0), [0, 0], [0.5, 0.2])):
        x = torch.tensor(values).view(2, 1, 1)
        s, m = neuron(x, None, in_turn(2), fuse="a")
        assert s.flatten().tolist() == spikes
        assert m.flatten().tolist() == pytest.approx(membranes)


def test_a_pixel_through_the_whole_block_by_hand():
    """Convolutions that copy, windows of one pixel, values that always code as they are."""
    block = WindowSpike(1, windows=2, coding="heaviside").eval()
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
        block.cell.weights[0].weight[0, 0, 1, 1] = 0.4
        block.cell.weights[1].weight[0, 0, 1, 1] = 1
        block.fc.weight.fill_(1)
    x = torch.ones(1, 1, 1, 2, 1)
    y, _ = block(x)
    # layer 1: u = 0.4, 0.56: spikes 0, 1; layer 2: u = 0, 0.4 omega(0.4, 0) + 1: spikes 0, 1
    assert y.flatten().tolist() == [1, 2]


def test_without_carry_tiles_are_independent_crops():
    torch.manual_seed(0)
    block = WindowSpike(4, fuse="none", coding="heaviside", mlp="gelu").eval()
    alone = WindowSpike(4, fuse="none", coding="heaviside", windows=1).eval()
    alone.load_state_dict(block.state_dict())
    x = torch.rand(1, 2, 4, 8, 8)
    y, _ = block(x)
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 4), slice(4, 8)):
            crop, _ = alone(x[..., rows, columns])
            assert torch.allclose(crop, y[..., rows, columns], atol=1e-6)
    carried = WindowSpike(4, fuse="omega", coding="heaviside").eval()
    carried.load_state_dict(block.state_dict())
    assert not torch.allclose(carried(x)[0], y)


def test_one_window_is_the_same_for_both_kinds():
    torch.manual_seed(0)
    tile, dilated = WindowSpike(4, windows=1), WindowSpike(4, windows=1, kind="dilated")
    dilated.load_state_dict(tile.state_dict())
    x, g = torch.rand(1, 2, 4, 8, 8), torch.Generator
    assert torch.equal(tile(x, generator=g().manual_seed(0))[0], dilated(x, generator=g().manual_seed(0))[0])


def run_block(block, stream, seed=0):
    """Outputs and all gradients of a block, inputs included."""
    x = stream.x.clone().requires_grad_()
    memory = None if stream.memory is None else stream.memory.clone().requires_grad_()
    out, state = block(x if memory is None else Stream(x, memory), generator=torch.Generator().manual_seed(seed))
    assert state == ()
    parts = list(out) if isinstance(out, Stream) else [out]
    generator = torch.Generator().manual_seed(9)
    block.zero_grad()
    torch.autograd.backward(parts, [torch.rand(p.shape, generator=generator) for p in parts])
    grads = {name: p.grad for name, p in block.named_parameters()} | {"x": x.grad}
    return parts, grads | ({} if memory is None else {"memory": memory.grad})


CASES = [
    {"cell": cell, "carry": carry, "kind": kind}
    for cell in CELLS
    for carry in ("block", "layer")
    for kind in ("tile", "dilated")
] + [
    {"coding": "bernoulli_ste", "mlp": "spiking", "kind": "dilated"},
    {"coding": "heaviside", "condense": "mean", "windows": 2},
    {"reset": "soft", "or_grad": "release"},
    {"reset": "hard", "norm": "step_bn"},
    {"norm": "rms", "learn_phi": True, "learn_threshold": True},
    {"cell": "lstm", "pairs": "release"},
    {"fuse": "omega_release", "carry": "layer"},
    {"fuse": "none", "windows": 1},
]


def made_for(case, side=8):
    case = {"cell": "cnn", **case}
    torch.manual_seed(0)
    block = (
        on_a_grid(WindowSpike(4, **case)) if case["cell"] == "cnn" and "norm" not in case else WindowSpike(4, **case)
    )
    x = block_input(side=side)
    layer = block.carry == "layer"
    return block, Stream(x, dyadic(2, block.cell.width, side, side, seed=3) if layer else None)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_window_after_the_other_gives_the_same(case):
    block, stream = made_for(case)
    batched, g_batched = run_block(block, stream)
    block.order = "sequential"
    sequential, g_sequential = run_block(block, stream)
    exact = block.cell.weights[0].__class__.__name__ == "WindowConv" and "norm" not in case
    for a, b in zip(batched, sequential, strict=True):
        assert torch.equal(a, b) if exact else torch.allclose(a, b, atol=1e-5)
    for name, wanted in g_batched.items():
        if wanted is None:
            assert g_sequential[name] is None
            continue
        assert torch.allclose(g_sequential[name], wanted, atol=1e-4), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_give_the_outputs_and_gradients_of_plain_bptt(case):
    block, stream = made_for(case)
    plain, g_plain = run_block(block, stream)
    buffers = {name: b.clone() for name, b in block.named_buffers()}
    again, _ = made_for(case)
    again.keep = "spikes"
    packed, g_packed = run_block(again, stream)
    for a, b in zip(plain, packed, strict=True):
        assert torch.equal(a, b)
    for name, wanted in g_plain.items():
        assert (g_packed[name] is None) if wanted is None else torch.equal(g_packed[name], wanted), name
    for name, b in again.named_buffers():
        assert torch.equal(b, buffers[name]), name


def test_a_lean_block_keeps_the_stream_and_bits():
    torch.manual_seed(0)
    block = WindowSpike(16, kind="dilated")
    x = torch.rand(1, 8, 16, 16, 16).requires_grad_()
    weights = sum(p.untyped_storage().nbytes() for p in block.parameters())
    plain = saved_bytes(lambda: block(x)) - weights
    block.keep = "spikes"
    stream = x.numel() * 4
    bits = 4 * 8 * 12 * 12 * 16 // 8
    assert saved_bytes(lambda: block(x)) <= stream + bits + 256 < plain / 8


def test_the_spiking_branch_sends_no_gradient_to_the_stream_unless_the_coding_does():
    def through_the_branch(coding):
        torch.manual_seed(0)
        block = WindowSpike(4, coding=coding)
        with torch.no_grad():
            block.mlp.down.weight.zero_()
        x = torch.rand(1, 2, 4, 8, 8).requires_grad_()
        block(x)[0].sum().backward()
        # the stream itself has slope 1, and so has what the MLP adds to it: nothing
        return (x.grad - 1).abs().max()

    assert through_the_branch("bernoulli_sg") == 0
    assert through_the_branch("bernoulli_ste") > 1e-3
    assert through_the_branch("heaviside") > 1e-3


class Smooth(nn.Module):
    """The neuron with the primitive of its surrogate in the place of the step, by plain operations."""

    def __init__(self, fuse="omega"):
        super().__init__()
        self.fuse = fuse

    def forward(self, x, given=None, links=None, *, fuse=None, want_membranes=True):
        made, primitive = [], parse_surrogate("atan(2)").primitive
        for p, pair in enumerate(links.pairs):
            a, c = (
                {"zeros": torch.zeros_like(x[0]), "given": None if given is None else given[link.window]}.get(
                    link.source
                )
                if link.source != "made"
                else made[link.window]
                for link in pair
            )
            if fuse == "a":
                r = a
            else:
                r = 2 * torch.sin(math.pi / 4 * a) * torch.cos(math.pi / 4 * c)
            made.append(0.4 * r + x[p])
        u = torch.stack(made)
        return primitive(u - 0.5), u


@pytest.mark.parametrize("carry", ["block", "layer"])
@pytest.mark.parametrize("cell", ["cnn", "lstm"])
def test_the_smooth_twin_of_a_block_passes_gradcheck(cell, carry):
    torch.manual_seed(0)
    block = WindowSpike(2, cell, kind="dilated", coding="analog", condense="mean", carry=carry).double()
    for i in range(len(block.cell.neurons)):
        block.cell.neurons[i] = Smooth()
    x = torch.rand(1, 1, 2, 4, 4, dtype=torch.float64).requires_grad_()
    memory = torch.rand(1, block.cell.width, 4, 4, dtype=torch.float64).requires_grad_()
    weights = list(block.parameters())

    def run(x, memory, *weights):
        out, _ = block(Stream(x, memory) if carry == "layer" else x)
        return tuple(out) if carry == "layer" else out

    assert gradcheck(run, (x, memory if carry == "layer" else memory.detach(), *weights))


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_the_chain_of_four_windows_is_a_hand_written_loop(backend):
    torch.manual_seed(0)
    block = on_a_grid(WindowSpike(4, coding="heaviside"))
    x, windows = block_input(), windows_of("tile", 4, (8, 8))
    coded = encode(x[0].permute(0, 2, 3, 1), windows, "heaviside")

    def weigh(i, s):
        return torch.stack([nn.functional.conv2d(
            w.permute(0, 3, 1, 2), block.cell.weights[i].weight, block.cell.weights[i].bias, padding=1
        ).permute(0, 2, 3, 1) for w in s])  # fmt: skip

    z1 = weigh(0, coded)
    m1 = chain(z1, torch.zeros_like(z1[0]))
    z2, m2, spikes = weigh(1, (m1 > 0.5).float()), torch.zeros_like(z1[0]), []
    for p in range(4):
        a = m1[p - 1] if p else torch.zeros_like(m2)
        m2 = 0.4 * 2 * torch.sin(math.pi / 4 * a) * torch.cos(math.pi / 4 * m2) + z2[p]
        spikes.append((m2 > 0.5).float())
    with use_backend(backend):
        found, membranes = block.cell(coded, None)
    assert membranes is None
    assert 0.05 < found.mean() < 0.95
    # sines of another library may round a membrane across the threshold
    assert (found != torch.stack(spikes)).float().mean() < 1e-3


def test_membranes_of_the_block_before_start_the_first_window_as_a_sine():
    torch.manual_seed(0)
    block = WindowSpike(4, carry="layer", windows=1, coding="heaviside")
    memory = torch.rand(2, 4, 8, 8)
    with torch.no_grad():
        for p in block.parameters():
            p.zero_()
    out, _ = block(Stream(torch.zeros(1, 2, 4, 8, 8), memory))
    # no input: layer 1 holds leak sin(phi pi M), layer 2 leak sin(phi pi) of that
    once = 0.4 * torch.sin(0.5 * math.pi * memory)
    assert torch.allclose(out.memory, 0.4 * torch.sin(0.5 * math.pi * once), atol=1e-6)


def test_no_membranes_are_a_map_of_zeros():
    torch.manual_seed(0)
    block, x = WindowSpike(4, "lstm"), torch.rand(1, 2, 4, 8, 8)
    one, _ = block(x, generator=torch.Generator().manual_seed(0))
    two, _ = block(Stream(x, torch.zeros(2, 8, 8, 8)), generator=torch.Generator().manual_seed(0))
    assert torch.equal(one.x, two.x)
    assert torch.equal(one.memory, two.memory)


def test_release_switches_change_what_they_say_and_nothing_else():
    def run(**options):
        torch.manual_seed(0)
        block = WindowSpike(4, **{"kind": "dilated", **options})
        stream = block_input()
        out, grads = run_block(block, Stream(stream, dyadic(2, 8, 8, 8, seed=3) if options.get("cell") else None))
        return out[0], grads["cell.weights.0.weight" if not options.get("cell") else "fc.weight"]

    def memories(**options):
        torch.manual_seed(0)
        block = WindowSpike(4, "lstm", **options)
        return run_block(block, Stream(block_input(), dyadic(2, 8, 8, 8, seed=3)))[0][1]

    y, g = run()
    assert not torch.equal(run(fuse="omega_release")[0], y) or not torch.equal(run(fuse="omega_release")[1], g)
    same_y, other_g = run(or_grad="release")
    assert torch.equal(same_y, y)
    assert not torch.equal(other_g, g)
    assert not torch.equal(run(condense="mean")[0], y)
    assert not torch.equal(memories(pairs="release"), memories())


def test_batches_may_come_in_any_order_and_size():
    torch.manual_seed(0)
    block = WindowSpike(4, "lstm").eval()
    a, b = torch.rand(1, 2, 4, 8, 8), torch.rand(1, 5, 4, 8, 8)

    def once(x, memory=None, seed=0):
        return block(Stream(x, memory), generator=torch.Generator().manual_seed(seed))[0]

    with torch.no_grad():
        first_a = once(a)
        alone = once(first_a.x, first_a.memory, 1)
        first_a, first_b = once(a), once(b)
        second_b, second_a = once(first_b.x, first_b.memory, 1), once(first_a.x, first_a.memory, 1)
    assert torch.equal(second_a.x, alone.x)
    assert second_b.x.shape[1] == 5


def test_merging_takes_corners_in_the_order_of_columns():
    merging = PatchMerging(1, memory=2)
    with torch.no_grad():
        merging.reduce.weight.copy_(torch.tensor([[1.0, 10, 100, 1000], [0, 0, 0, 1]]))
    x = torch.tensor([[1.0, 2], [3, 4]]).view(1, 1, 1, 2, 2)
    out, _ = merging(Stream(x, torch.rand(1, 2, 2, 2)))
    assert out.x.flatten().tolist() == [1 + 30 + 200 + 4000, 4]
    assert out.memory.shape == (1, 4, 1, 1)
    assert merging.reduce_memory.weight.shape == (4, 8)
    plain, _ = PatchMerging(1)(x)
    assert plain.shape == (1, 1, 2, 1, 1)
    with pytest.raises(StateError, match="expected membranes beside the map exactly where it was made for them"):
        PatchMerging(1)(Stream(x, torch.rand(1, 2, 2, 2)))


BAD = [
    ({"cell": "transformer"}, "cell must be one of cnn, lstm"),
    ({"windows": 3}, "windows must be one of 1, 2, 4, got 3"),
    ({"kind": "wide"}, "kind must be one of tile, dilated, got 'wide'"),
    ({"coding": "rate"}, "coding must be one of bernoulli_sg"),
    ({"condense": "max"}, "condense must be one of or, mean"),
    ({"carry": "time"}, "carry must be one of block, layer"),
    ({"order": "random"}, "order must be one of batched, sequential"),
    ({"fuse": "product"}, "fuse must be one of omega"),
    ({"reset": "full"}, "reset must be one of none, soft, hard"),
    ({"norm": "layer"}, "norm must be one of none, bn, step_bn, rms"),
    ({"mlp": "relu"}, "mlp must be one of gelu, spiking"),
    ({"phi": 1.0}, r"phi must lie in \(0, 1\), got 1.0"),
    ({"phi": 0.0}, r"phi must lie in \(0, 1\), got 0.0"),
    ({"cell": "lstm", "phi": 0.6}, "phi must be below 0.6 for a recurrent cell.*allow_unstable=True"),
    ({"cell": "gru", "phi": 0.9}, "phi must be below 0.6"),
    ({"pairs": "release"}, "leave pairs out"),
    ({"cell": "lstm", "pairs": "release", "windows": 2}, "pairs='release' is for membranes carried"),
    ({"norm": "bn", "order": "sequential"}, "use norm='step_bn', or leave order out"),
    ({"cell": "lstm", "carry": "block", "phi": 0.3}, "fuse and phi have no effect.*use carry='layer'"),
    ({"cell": "mlp", "fuse": "sum"}, "carried as it is"),
    ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
    ({"leak": 1.5}, r"leak must lie in \[0, 1\]"),
    ({"v_threshold": 0.0}, "v_threshold must be a finite number > 0"),
    ({"fuse": "sum", "learn_phi": True}, "fuse='sum' does not read phi"),
    ({"phi": 0.7, "learn_phi": True}, "a learned phi starts below 0.65"),
    ({"v_threshold": 0.6, "learn_threshold": True}, "stays at most 0.25"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(o) for o, _ in BAD])
def test_options_that_make_no_sense_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        WindowSpike(4, **options)


def test_recurrent_cells_run_with_larger_phi_if_told_so():
    block = WindowSpike(4, "lstm", phi=0.7, allow_unstable=True)
    assert block(torch.rand(1, 2, 4, 8, 8))[0].x.shape == (1, 2, 4, 8, 8)


def test_inputs_that_do_not_fit_are_named():
    block = WindowSpike(4)
    with pytest.raises(ShapeError, match="It works in one step; got T=4"):
        block(torch.rand(4, 2, 4, 8, 8))
    with pytest.raises(ShapeError, match=r"expected x as \[1, B, 4, H, W\].*x.unsqueeze\(0\)"):
        block(torch.rand(2, 4, 8, 8))
    with pytest.raises(StateError, match="carry='block' takes no membranes"):
        block(Stream(torch.rand(1, 2, 4, 8, 8), torch.rand(2, 4, 8, 8)))
    with pytest.raises(StateError, match=r"expected membranes \(2, 8, 8, 8\) on cpu.*got \(3, 8, 8, 8\)"):
        WindowSpike(4, "lstm")(Stream(torch.rand(1, 2, 4, 8, 8), torch.rand(3, 8, 8, 8)))


def test_membranes_that_are_not_finite_are_found_in_anomaly_mode_only():
    block = WindowSpike(4, "lstm")
    stream = Stream(torch.rand(1, 2, 4, 8, 8), torch.full((2, 8, 8, 8), math.nan))
    block(stream)
    with pytest.raises(FloatingPointError, match="expected finite membranes"), torch.autograd.set_detect_anomaly(True):
        block(stream)


def test_learned_constants_move_within_their_bounds():
    torch.manual_seed(0)
    block = WindowSpike(4, learn_phi=True, learn_threshold=True)
    neuron = block.cell.neurons[1]
    assert neuron.phi.item() == pytest.approx(0.5)
    assert neuron.v_threshold.item() == pytest.approx(0.5)
    block(torch.rand(1, 2, 4, 8, 8))[0].sum().backward()
    assert neuron.w_phi.grad.abs() > 0
    assert neuron.w_threshold.grad.abs() > 0
    with torch.no_grad():
        neuron.w_phi.fill_(20)
        neuron.w_threshold.fill_(7)
    assert neuron.phi.item() <= 0.65
    assert (neuron.phi * neuron.v_threshold).item() <= 0.25 + 1e-6

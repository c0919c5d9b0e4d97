"""Blocks of two streams: streams come back to the bit, gradients equal plain autograd, and what is refused."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from spikefit.errors import OptionError, RangeError, ReconstructionError, ShapeError, StateError, StrategyError
from spikefit.layers import Chain, Dropout, SpikingConv2d, SpikingLinear, TwoStreams
from spikefit.layers.coupling import couple, largest, on_grid, uncouple
from spikefit.layers.reversible_function import checksum_of, run_reversible
from spikefit.layers.two_streams import halves, side_by_side
from spikefit.neurons import LIF
from support import dyadic, saved_bytes


def dense(width=4, norm="step_bn", *more):
    return Chain(LIF(), SpikingLinear(width, width, norm=norm), *more, SpikingLinear(width, width, neuron=None))


def images(width=4, norm="bn", *more):
    neuron = {"name": "lif", "v_reset": 0.0}
    last = SpikingConv2d(width, width, norm=norm, neuron=None)
    return Chain(LIF(v_reset=0.0), SpikingConv2d(width, width, norm=norm, neuron=neuron), *more, last)


def make(blocks=3, half=images, seed=0, **options):
    torch.manual_seed(seed)
    return TwoStreams([(half(), half()) for _ in range(blocks)], **options)


def sequence(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def gradients(blocks, x, run, seed=2):
    """Output, then the gradients of input and parameters, for fixed gradients of streams and states."""
    torch.manual_seed(seed)
    out, state = run(blocks, x)
    leaves = [out, *(v for v in torch.utils._pytree.tree_flatten(state)[0] if v is not None)]
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(leaf.shape, generator=generator).to(leaf.dtype) for leaf in leaves]
    made = torch.autograd.grad(leaves, [x, *blocks.parameters()], given, allow_unused=True)
    return [leaf.detach() for leaf in leaves], list(made)


def plain(blocks, x):
    return blocks(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["rev", "para"])
@pytest.mark.parametrize("half", [images, dense])
def test_streams_states_and_all_gradients_are_those_of_plain_autograd(order, half, dtype):
    shape = (4, 3, 8, 6, 6) if half is images else (4, 3, 8)
    ours, twin = make(half=half, order=order).to(dtype), make(half=half, order=order).to(dtype)
    got, d_got = gradients(ours, sequence(*shape, dtype=dtype), run_reversible)
    wanted, d_wanted = gradients(twin, sequence(*shape, dtype=dtype), plain)
    assert sum(bool(d.abs().max() > 0) for d in d_wanted) > 0.7 * len(d_wanted), "zero gradients prove nothing"
    for a, b in zip(got + d_got, wanted + d_wanted, strict=True):
        assert torch.equal(a, b)
    # statistics moved once, as in plain training
    for a, b in zip(ours.buffers(), twin.buffers(), strict=True):
        assert torch.equal(a, b)


def test_the_equations():
    """y1 = x1 + F(x2), y2 = x2 + G(y1) by hand, and the order that swaps streams."""
    blocks = make(1, half=dense, stream_grid=None).double()
    x = sequence(3, 2, 8, dtype=torch.float64).detach()
    first, second = x.chunk(2, 2)
    f, g = blocks.nets
    y1 = first + f(second)[0]
    y2 = second + g(y1)[0]
    torch.testing.assert_close(blocks(x)[0], torch.cat([y1, y2], 2), rtol=0, atol=0)
    blocks.order = "para"
    y1 = second + f(first)[0]
    y2 = first + g(y1)[0]
    torch.testing.assert_close(blocks(x)[0], torch.cat([y1, y2], 2), rtol=0, atol=0)


class Smooth(nn.Module):
    """A sub-network without spikes, for finite differences."""

    def __init__(self, width=3):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x, state=None):
        v = torch.zeros_like(x[0]) if state is None else state
        made = []
        for step in x:
            v = torch.tanh(self.linear(step)) + 0.5 * v
            made.append(v)
        return torch.stack(made), v

    def init_state(self, batch_size, shape, *, device=None, dtype=torch.float32):
        return torch.zeros((batch_size, *shape), device=device, dtype=dtype), shape


@pytest.mark.parametrize("order", ["rev", "para"])
def test_derivative_of_smooth_sub_networks(order, monkeypatch):
    # finite differences do not see a straight-through rounding, so the grid is as fine as float64 allows
    monkeypatch.setattr("spikefit.layers.coupling.FINEST", 44)
    torch.manual_seed(0)
    blocks = TwoStreams([(Smooth(), Smooth()) for _ in range(2)], order=order, stream_grid=44).double()
    x = torch.randn(2, 2, 6, dtype=torch.float64, requires_grad=True)
    v = [torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    names, parameters = zip(*blocks.named_parameters(), strict=True)

    def run(x, *rest):
        tensors = dict(zip(names, rest[4:], strict=True))
        with torch.nn.utils.stateless._reparametrize_module(blocks, tensors):
            out, state = run_reversible(blocks, x, tuple(rest[:4]))
        return out, *state

    assert torch.autograd.gradcheck(run, (x, *v, *parameters), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("inner", [None, torch.bfloat16])
def test_streams_come_back_to_the_bit_at_depth_64(inner):
    blocks, twin = make(64), make(64)
    results = []
    for net, run in ((blocks, run_reversible), (twin, plain)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inner is not None):
            results.append(gradients(net, sequence(2, 2, 8, 4, 4), run))
    (got, d_got), (wanted, d_wanted) = results
    assert got[0].dtype == torch.float32
    for a, b in zip(got + d_got, wanted + d_wanted, strict=True):
        assert torch.equal(a, b)


def test_half_precision_streams_without_a_grid_do_not_come_back():
    """The counter-check: the same blocks, streams in bfloat16, undone as on the grid."""
    blocks = make(4, stream_grid=None)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        first, second = (half.bfloat16() for half in halves(sequence(2, 2, 8, 4, 4).detach()))
        start = (first, second)
        for i in range(0, 8, 2):
            first = couple(first, blocks.nets[i](second)[0])
            second = couple(second, blocks.nets[i + 1](first)[0])
        for i in reversed(range(0, 8, 2)):
            second = uncouple(second, blocks.nets[i + 1](first)[0])
            first = uncouple(first, blocks.nets[i](second)[0])
    assert not torch.equal(first, start[0])
    assert not torch.equal(second, start[1])


def test_memory_does_not_grow_with_depth():
    def held(run, blocks):
        net, x = make(blocks), sequence(4, 2, 8, 8, 8)
        parameters = sum(p.numel() * p.element_size() for p in net.parameters())
        return saved_bytes(lambda: run(net, x)) - (parameters if run is run_reversible else 0)

    # beside the parameters, which are inputs of the function, a block leaves its two checksums
    assert held(run_reversible, 9) - held(run_reversible, 1) == 8 * 16
    assert held(plain, 9) - held(plain, 1) > 8 * 4 * 2 * 8 * 64 * 4


class Counted(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.calls = net, 0

    def forward(self, x, state=None):
        self.calls += 1
        return self.net(x, state)


def test_every_sub_network_runs_once_forward_and_once_backward():
    nets = [Counted(images()) for _ in range(4)]
    blocks = TwoStreams([(nets[0], nets[1]), (nets[2], nets[3])])
    out, _ = run_reversible(blocks, sequence(2, 2, 8, 4, 4))
    assert [net.calls for net in nets] == [1] * 4
    out.sum().backward()
    assert [net.calls for net in nets] == [2] * 4


def test_dropout_draws_the_same_again_and_leaves_the_generator_alone():
    half = lambda: images(4, "bn", Dropout(0.5))  # noqa: E731
    ours, twin = make(half=half), make(half=half)
    _, d_got = gradients(ours, sequence(3, 2, 8, 4, 4), run_reversible)
    after = torch.rand(3)
    _, d_wanted = gradients(twin, sequence(3, 2, 8, 4, 4), plain)
    assert torch.equal(after, torch.rand(3))
    for a, b in zip(d_got, d_wanted, strict=True):
        assert torch.equal(a, b)


def test_a_changed_bit_is_noticed():
    class Nudged(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.later = net, False

        def forward(self, x, state=None):
            f, v = self.net(x, state)
            if self.later:
                f = f + 0
                f[0, 1, 2, 3, 1] += 2.0**-14  # the last place of a stream
            return f, v

    nets = [Nudged(images()) for _ in range(6)]
    blocks = TwoStreams([(nets[i], nets[i + 1]) for i in (0, 2, 4)])
    out, _ = run_reversible(blocks, sequence(2, 2, 8, 4, 4))
    nets[3].later = True
    with pytest.raises(ReconstructionError, match="block 1"):
        out.sum().backward()
    # without the check the wrong gradient would come out
    nets[3].later = False
    out, _ = run_reversible(blocks, sequence(2, 2, 8, 4, 4), check=False)
    nets[3].later = True
    out.sum().backward()


def test_a_changed_last_bit_of_what_is_kept_is_noticed():
    out, _ = run_reversible(make(3), sequence(2, 2, 8, 4, 4))
    kept = out.data[0, 0, 3, 2, 1]
    kept.copy_(torch.nextafter(kept, torch.tensor(99.0)))
    with pytest.raises(ReconstructionError, match="block 2"):
        out.sum().backward()


def test_a_checksum_sees_every_single_bit():
    x = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0)).movedim(-1, 2)
    wanted = checksum_of(x)
    for at in range(x.numel()):
        for bit in (0, 7, 22, 30, 31):
            changed = x.movedim(2, -1).clone()
            flat = changed.view(-1).view(torch.int32)
            flat[at] ^= -(2**31) if bit == 31 else 1 << bit
            assert checksum_of(changed.movedim(-1, 2)) != wanted
    assert checksum_of(x.clone()) == wanted
    assert checksum_of(x.flip(0)) != wanted


class Random(nn.Module):
    """Draws from a generator that is not torch's own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x, state=None):
        return torch.rand(x.shape, generator=self.generator) * x, None


def test_a_sub_network_that_does_not_repeat_itself_is_detected():
    blocks = TwoStreams([(images(), images()), (Random(), images())])
    x = sequence(2, 2, 8, 4, 4)
    out, _ = run_reversible(blocks, x)
    with pytest.raises(ReconstructionError, match="block 1 came back with other bits"):
        out.sum().backward()
    assert x.grad is None


class Scaled(nn.Module):
    """Reads a tensor that it does not own."""

    def __init__(self, net, scale):
        super().__init__()
        self.net, self.scale = net, [scale]

    def forward(self, x, state=None):
        f, state = self.net(x, state)
        return f * self.scale[0], state


def test_a_tensor_that_is_no_parameter_of_the_sub_network_is_refused():
    """It would get no gradient, in silence."""
    outside = nn.Parameter(torch.tensor(1.5))
    for scale in (outside, outside * 2):
        blocks = TwoStreams([(images(), images()), (images(), Scaled(images(), scale))])
        with pytest.raises(StrategyError, match=r"G of block 1 depends on a tensor .* no parameter of it"):
            run_reversible(blocks, sequence(2, 2, 8, 4, 4))[0].sum().backward()
    blocks = TwoStreams([(images(), Scaled(images(), outside.detach()))])
    run_reversible(blocks, sequence(2, 2, 8, 4, 4))[0].sum().backward()


class TorchNorm(nn.Module):
    """Batch norm of torch, and a counter of its own."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, state=None):
        self.calls += 1
        return self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]), None


@pytest.mark.parametrize("run", [plain, run_reversible])
def test_buffers_of_your_own_modules_move_once(run):
    own = [TorchNorm() for _ in range(2)]
    blocks = TwoStreams([(Chain(images(), own[0]), Chain(images(), own[1]))])
    run(blocks, sequence(2, 2, 8, 4, 4))[0].sum().backward()
    for norm in own:
        assert int(norm.calls) == int(norm.norm.num_batches_tracked) == 1


def test_outputs_may_be_changed_in_place_like_those_of_plain_autograd():
    found = []
    for run in (plain, run_reversible):
        blocks, x = make(2), sequence(2, 2, 8, 4, 4)
        found.append(torch.autograd.grad((run(blocks, x)[0] * 2).relu_().sum(), x)[0])
    assert torch.equal(*found)
    out, _ = run_reversible(make(2), sequence(2, 2, 8, 4, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.mul_(2).sum().backward()


def test_a_stream_that_leaves_its_grid_is_refused():
    class Large(nn.Module):
        def forward(self, x, state=None):
            return torch.full_like(x, 600.0), None

    fits = TwoStreams([(Large(), Large())])
    fits(torch.zeros(1, 1, 2))
    with pytest.raises(RangeError, match=r"block 1: a stream reached 1200, .* below 1024 .*stream_grid=10"):
        TwoStreams([(Large(), Large())] * 2)(torch.zeros(1, 1, 2))
    with pytest.raises(RangeError, match="block 1"):
        run_reversible(TwoStreams([(Large(), Large())] * 2), torch.zeros(1, 1, 2, requires_grad=True))
    assert largest(14) == 1024
    assert largest(14, torch.float64) == 2.0**39


def test_sums_on_the_grid_are_exact_up_to_the_range():
    x = on_grid(torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 2046 - 1023, 14)
    f = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    y = couple(x, f, grid=14)
    inside = y.abs() < largest(14)
    assert torch.equal(uncouple(y, f, grid=14)[inside], x[inside])
    # no minus zero: it would come back as another number
    assert not torch.signbit(on_grid(torch.tensor([-1e-9, -0.0]), 14)).any()


def test_a_coupling_with_a_gain():
    x, f, gain = dyadic(3, 2, 4), dyadic(3, 2, 4, seed=1), torch.tensor([0.5, 0.25, 2.0, 1.0])
    y = couple(x, f, gain=gain)
    assert torch.equal(y, gain * x + f)
    assert torch.equal(uncouple(y, f, gain=gain), x)


def test_plain_gradients_hooks_and_inputs_without_gradient():
    blocks, x = make(2), sequence(2, 2, 8, 4, 4)
    seen = []
    weight = blocks.nets[0].blocks[1].synapse.weight
    weight.register_hook(lambda g: seen.append(g.shape))
    x.register_hook(lambda g: seen.append(x.sum().item()))  # reads the input: nobody has freed it
    run_reversible(blocks, x)[0].sum().backward()
    assert weight.shape in seen
    assert len(seen) == 2
    out, _ = run_reversible(blocks, x.detach())
    found = torch.autograd.grad(out.square().sum(), list(blocks.parameters()))
    assert all(g.abs().max() > 0 for g in found[:1])
    with torch.no_grad():
        assert not run_reversible(blocks, x)[0].requires_grad
    frozen = make(2)
    for p in frozen.nets[0].parameters():
        p.requires_grad_(False)
    run_reversible(frozen, x)[0].square().sum().backward()
    assert all(p.grad is None for p in frozen.nets[0].parameters())
    assert all(p.grad is not None for p in frozen.nets[1].parameters())


def test_a_second_derivative_is_refused():
    x = sequence(2, 2, 8, 4, 4)
    out, _ = run_reversible(make(1), x)
    with pytest.raises(StrategyError, match="no second derivative"):
        torch.autograd.grad(out.sum(), x, create_graph=True)


def test_a_graph_that_is_kept_goes_back_twice():
    blocks, x = make(2), sequence(2, 2, 8, 4, 4)
    out, _ = run_reversible(blocks, x)
    first = torch.autograd.grad(out.square().sum(), x, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(out.square().sum(), x)[0])


def test_pieces_of_a_sequence_equal_the_whole():
    """Steps one by one, with the state handed on, in evaluation and with norms per step in training."""
    for half, training in ((images, False), (lambda: images(4, "step_bn"), True)):
        blocks = make(2, half=half).train(training)
        x = sequence(5, 2, 8, 4, 4).detach()
        whole, _ = blocks(x)
        state, made = blocks.init_state(2, (8, 4, 4))[0], []
        for t in range(5):
            out, state = blocks(x[t : t + 1], state)
            made.append(out)
        assert torch.equal(torch.cat(made), whole)


def test_gradients_flow_through_states_of_pieces():
    ours, twin = (make(2, half=lambda: images(4, "step_bn")) for _ in range(2))
    found = []
    for blocks, run in ((ours, run_reversible), (twin, lambda b, x, s=None: b(x, s))):
        x, state, loss = sequence(4, 2, 8, 4, 4), None, 0.0
        for piece in (x[:1], x[1:3], x[3:]):
            out, state = run(blocks, piece, state)
            loss = loss + out.square().sum()
        found.append(torch.autograd.grad(loss, [x, *blocks.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert torch.equal(found[0][0], found[1][0])


class Running(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x):
        return run_reversible(self.blocks, x)[0]


def train_in_parallel(rank, folder):
    """One of two processes: a step on its half of the batch; gradients are averaged by hooks of the parameters."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    blocks = make(2)
    parallel = DistributedDataParallel(Running(blocks))
    for _ in range(2):  # the second step would fail if a parameter had been ready twice
        blocks.zero_grad()
        parallel(sequence(2, 4, 8, 4, 4)[:, 2 * rank : 2 * rank + 2]).square().sum().backward()
    torch.save([p.grad for p in blocks.parameters()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_alike(tmp_path):
    torch.multiprocessing.spawn(train_in_parallel, (str(tmp_path),), nprocs=2)
    halves_of = []
    for rank in (0, 1):
        twin = make(2)
        for _ in range(2):
            twin.zero_grad()
            twin(sequence(2, 4, 8, 4, 4)[:, 2 * rank : 2 * rank + 2])[0].square().sum().backward()
        halves_of.append([p.grad for p in twin.parameters()])
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for d, a, b in zip(got, *halves_of, strict=True):
            torch.testing.assert_close(d, (a + b) / 2, rtol=1e-6, atol=1e-5)


def test_streams_lie_channels_last_and_come_apart_again():
    first, second = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
    a, b = halves(side_by_side(first, second))
    assert torch.equal(a, first)
    assert torch.equal(b, second)
    assert a.movedim(2, -1).is_contiguous()


def test_bad_input_is_refused():
    with pytest.raises(ShapeError, match="even number of channels"):
        make(1)(torch.zeros(2, 2, 7, 4, 4))
    with pytest.raises(ShapeError, match="even number of channels"):
        make(1).init_state(1, (7, 4, 4))
    narrow = Chain(LIF(), SpikingConv2d(4, 4, pool="max"), SpikingConv2d(4, 4, neuron=None))
    with pytest.raises(
        ShapeError, match=r"G of block 0 must return the shape of its stream, expected .*\(2, 2, 4, 8, 8\)"
    ):
        TwoStreams([(images(), narrow)])(torch.zeros(2, 2, 8, 8, 8))
    with pytest.raises(ShapeError, match="G of block 0"):
        TwoStreams([(images(), narrow)]).init_state(1, (8, 8, 8))
    with pytest.raises(OptionError, match="order must be one of rev, para, got 'forth'"):
        make(1, order="forth")
    for grid in (3, 21, 14.0, True):
        with pytest.raises(OptionError, match="4 to 20"):
            make(1, stream_grid=grid)
    with pytest.raises(OptionError, match="at least one pair"):
        TwoStreams([])
    with pytest.raises(StateError, match="expected a state of 2 entries, got 3 entries"):
        make(1)(torch.zeros(1, 1, 8, 4, 4), (None,) * 3)
    with pytest.raises(ShapeError, match=r"sub-networks are in torch\.bfloat16.*use torch\.autocast"):
        make(1).to(torch.bfloat16)(torch.zeros(1, 1, 8, 4, 4))
    with pytest.raises(StrategyError, match="streams on a grid"):
        run_reversible(make(1, stream_grid=None), torch.zeros(1, 1, 8, 4, 4))
    with pytest.raises(StrategyError, match="streams on a grid"):
        run_reversible(make(1, stream_grid=None), torch.zeros(1, 1, 8, 4, 4, dtype=torch.bfloat16))

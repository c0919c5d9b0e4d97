"""Units: one forward whatever the pieces, plain gradients, statistics once, honest refusals."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import spectral_norm

from spikefit.errors import OptionError, ShapeError, StateError
from spikefit.layers import (
    KEEPS,
    NORMS,
    AveragePoolTime,
    Dropout,
    Flatten,
    FlattenTime,
    GlobalAveragePool,
    Readout,
    ResidualBlock,
    SpikingConv1d,
    SpikingConv2d,
    SpikingLinear,
    SpikingUnit,
    StandardizedConv1d,
    StandardizedConv2d,
    StandardizedLinear,
    apply_weight,
    create_norm,
    frozen_statistics,
)
from spikefit.neurons import IF, LIF
from support import assert_same_spikes


def repeat(x, timesteps):
    return x.expand(timesteps, *x.shape)


def spikes(*shape, rate=0.3):
    torch.manual_seed(0)
    return (torch.rand(shape) < rate).float()


def loud(unit):
    """Larger weights where no norm scales the current, so that neurons fire."""
    if unit.norm is None:
        with torch.no_grad():
            unit.synapse.weight *= 4
    return unit


def plain_unit(unit, x):
    """The unit written with torch's own layers, over [T * B, ...] and a Python loop over time."""
    z = unit.synapse(x.flatten(0, 1))
    if unit.norm is not None:
        n = unit.norm
        z = F.batch_norm(z, None, None, n.weight, n.bias, True, eps=n.eps)
    s, _ = LIF(backend="reference")(z.unflatten(0, x.shape[:2]))
    pool = {None: lambda s: s, "max": F.max_pool2d, "avg": F.avg_pool2d}[unit.pool]
    return s if unit.pool is None else pool(s.flatten(0, 1), 2).unflatten(0, x.shape[:2])


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: SpikingConv2d(3, 8), (4, 2, 3, 6, 6)),
        (lambda: SpikingConv2d(3, 8, stride=2, norm="none", pool="max"), (4, 2, 3, 8, 8)),
        (lambda: SpikingConv2d(4, 8, 5, groups=2, dilation=2, norm="tdbn", pool="avg"), (4, 2, 4, 9, 8)),
        (lambda: SpikingConv1d(3, 8), (4, 2, 3, 11)),
        (lambda: SpikingLinear(13, 8), (5, 3, 13)),
        (lambda: SpikingLinear(13, 8, norm="none"), (5, 3, 13)),
    ],
)
def test_matches_plain_layers(make, shape):
    torch.manual_seed(1)
    unit = loud(make().double())
    x = spikes(*shape).double().requires_grad_()
    out, v = unit(x)
    wanted = plain_unit(unit, x)
    assert 0.02 < out.mean() < 0.98
    assert torch.equal(out, wanted)
    assert v.shape == (shape[1], *unit.output_shape(shape[2:]))
    weights = torch.randn_like(out)
    inputs = [x, *unit.parameters()]
    ours = torch.autograd.grad((out * weights).sum(), inputs)
    theirs = torch.autograd.grad((wanted * weights).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


STANDARDISED = {
    "conv2d": (SpikingConv2d, StandardizedConv2d, (16, 4, 4)),
    "conv1d": (SpikingConv1d, StandardizedConv1d, (16, 9)),
    "dense": (SpikingLinear, StandardizedLinear, (16,)),
}


@pytest.mark.parametrize("name", STANDARDISED)
def test_standardised_weights_have_unit_output_variance(name):
    make, kind, shape = STANDARDISED[name]
    unit = make(16, 32, norm="ws")
    assert type(unit.synapse) is kind
    assert sorted(dict(unit.synapse.named_parameters())) == ["bias", "gain", "weight"]
    weight = unit.synapse.standardized().flatten(1)
    assert weight.mean(1).abs().max() < 1e-6
    torch.testing.assert_close(weight.pow(2).sum(1), torch.ones(32), rtol=0.05, atol=0)
    unit(spikes(2, 2, *shape))[0].sum().backward()
    assert unit.synapse.gain.grad.abs().max() > 0
    x = spikes(1, 2, *shape)
    torch.testing.assert_close(apply_weight(unit.synapse, x)[0], unit.synapse(x[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STANDARDISED)
def test_standardised_weights_do_not_see_scale_and_shift(name):
    _, kind, shape = STANDARDISED[name]
    layer = kind(16, 8, *([] if kind is StandardizedLinear else [3])).double()
    moved = kind(16, 8, *([] if kind is StandardizedLinear else [3])).double()
    moved.load_state_dict(layer.state_dict())
    with torch.no_grad():
        moved.weight.mul_(4).add_(1)
    x = spikes(2, *shape).double()
    # eps is what remains of the scale
    torch.testing.assert_close(moved(x), layer(x), rtol=1e-2, atol=1e-2)
    assert layer(x).std() > 0.1


def test_convolution_over_time_with_standardised_weights():
    torch.manual_seed(1)
    unit = SpikingConv1d(3, 8, 4, padding=2, over="time", norm="ws", neuron={"name": "if", "v_threshold": 0.5})
    x = torch.randn(8, 5, 3)
    out, _ = unit(x)
    z = F.conv1d(x.permute(1, 2, 0), unit.synapse.standardized(), unit.synapse.bias, padding=2).permute(2, 0, 1)
    assert_same_spikes(out, IF(v_threshold=0.5)(z)[0])


@pytest.mark.parametrize("norm", ["step_bn", "none", "ws"])
def test_pieces_equal_the_whole_bit_for_bit(norm):
    torch.manual_seed(1)
    unit = SpikingConv2d(3, 16, norm=norm, neuron={"name": "lif", "tau": 4.0, "v_threshold": 0.5}, pool="max")
    x = torch.randn(6, 3, 3, 8, 8)
    whole, v_T = unit(x)
    pieces, v = [], None
    for t in range(6):
        s, v = unit(x[t : t + 1], v)
        pieces.append(s)
    assert 0.05 < whole.mean() < 0.95
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(v, v_T)


def test_chunked_rows_give_the_same_spikes():
    torch.manual_seed(1)
    whole, cut = SpikingConv2d(4, 16), SpikingConv2d(4, 16, chunk=8)
    cut.load_state_dict(whole.state_dict())
    x = spikes(3, 20, 4, 8, 8).requires_grad_()
    a, b = whole(x)[0], cut(x)[0]
    assert torch.equal(a, b)
    for g, h in zip(*(torch.autograd.grad(s.square().sum(), x) for s in (a, b)), strict=True):
        torch.testing.assert_close(g, h)


@pytest.mark.parametrize("norm", ["bn", "step_bn", "none"])
def test_repeated_step_is_computed_once_and_equals_its_copy(norm):
    torch.manual_seed(1)
    units = [loud(SpikingConv2d(3, 8, norm=norm)) for _ in range(2)]
    units[1].load_state_dict(units[0].state_dict())
    image = (torch.randint(0, 16, (4, 3, 8, 8)) / 16).double()
    results = []
    for unit, copy in zip(units, (False, True), strict=True):
        unit.double()
        x = image.clone().requires_grad_()
        sequence = repeat(x, timesteps=5)
        out, v = unit(sequence.contiguous() if copy else sequence)
        gradients = torch.autograd.grad(
            (out * torch.arange(5.0)[:, None, None, None, None]).sum(), [x, *unit.parameters()]
        )
        results.append((out, v, *gradients, *unit.buffers()))
    assert 0.05 < results[0][0].detach().mean() < 0.95
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("norm", "per_step"), [("bn", False), ("step_bn", True)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_are_those_of_torch(norm, per_step, momentum):
    ours = create_norm(norm, 5, momentum=momentum)
    theirs = nn.BatchNorm2d(5, momentum=momentum)
    for seed in range(3):
        torch.manual_seed(seed)
        z = torch.randn(4, 3, 5, 6, 6) * 3 + 1
        ours(z)
        for piece in z if per_step else [z.flatten(0, 1)]:
            theirs(piece)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(z), theirs(z.flatten(0, 1)).unflatten(0, (4, 3)), rtol=1e-5, atol=1e-5)


def test_frozen_statistics_stay():
    norm, other = create_norm("bn", 3), create_norm("bn", 3)
    with frozen_statistics([nn.Sequential(norm)]):
        other(torch.randn(2, 4, 3))
        a = norm(torch.randn(2, 4, 3))
    assert int(norm.num_batches_tracked) == 0
    assert int(other.num_batches_tracked) == 1
    assert abs(float(a.detach().mean())) < 1e-6
    norm(torch.randn(2, 4, 3))
    assert int(norm.num_batches_tracked) == 1


def test_norm_names():
    assert [getattr(create_norm(n, 4), "time_scope", None) for n in NORMS] == [
        "sequence",
        "sequence",
        "step",
        "step",
        None,
        None,
    ]
    assert create_norm("tdbn", 4, v_threshold=0.5).weight.tolist() == [0.5] * 4
    with pytest.raises(OptionError, match="Did you mean step_bn"):
        create_norm("stepbn", 4)
    with pytest.raises(OptionError, match="takes no options"):
        create_norm("none", 4, eps=1.0)


def test_convolution_over_time():
    torch.manual_seed(1)
    unit = SpikingConv1d(3, 8, 8, padding=4, over="time", neuron=IF())
    x = torch.randn(16, 5, 3)
    out, v = unit(x)
    assert (out.shape, v.shape, unit.consumes_time) == ((17, 5, 8), (5, 8), True)
    z = F.conv1d(x.permute(1, 2, 0), unit.synapse.weight, padding=4).permute(2, 0, 1)
    wanted, _ = IF(backend="reference")(
        F.batch_norm(z.flatten(0, 1), None, None, training=True).unflatten(0, z.shape[:2])
    )
    assert (out != wanted).float().mean() < 1e-3


def test_residual_block_adds_the_shortcut_to_the_current():
    torch.manual_seed(1)
    for block in (ResidualBlock(4, 4), ResidualBlock(4, 8, stride=2)):
        block = block.double()
        x = spikes(3, 2, 4, 8, 8).double()
        out, (v_1, v_2) = block(x)
        y, _ = block.first(x)
        short = (
            x if block.short is None else F.batch_norm(block.short.synapse(x.flatten(0, 1)), None, None, training=True)
        )
        z = F.batch_norm(block.second.synapse(y.flatten(0, 1)), None, None, training=True) + short.view(
            -1, *out.shape[2:]
        )
        wanted, _ = LIF(backend="reference")(z.unflatten(0, (3, 2)))
        assert torch.equal(out, wanted)
        assert v_1.shape == v_2.shape == out.shape[1:]
        state, shape = block.init_state(2, (4, 8, 8))
        assert [tuple(s.shape) for s in state] == [tuple(v_1.shape), tuple(v_2.shape)]
        assert shape == out.shape[2:]


def test_layers_without_a_neuron():
    x = torch.arange(24.0).view(2, 1, 3, 2, 2)
    assert torch.equal(Flatten()(x)[0], x.view(2, 1, 12))
    assert torch.equal(GlobalAveragePool()(x)[0], x.mean((3, 4)))
    sequence = torch.arange(12.0).view(6, 1, 2)
    assert torch.equal(AveragePoolTime(2)(sequence)[0][:, 0, 0], torch.tensor([1.0, 5.0, 9.0]))
    assert torch.equal(FlattenTime()(sequence)[0][0, 0], torch.cat([sequence[:, 0, 0], sequence[:, 0, 1]]))
    dropout = Dropout(0.5)
    assert set(dropout(torch.ones(4, 5, 6))[0].unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropout.eval()(sequence)[0], sequence)
    head = Readout(2, 3, tau=2.0)
    logits, v = head(sequence)
    z = head.linear(sequence)
    torch.testing.assert_close(logits[1], 0.5 * z[0] + z[1])
    assert torch.equal(logits[-1], v)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_autocast_keeps_the_kernel_and_trains(dtype):
    pytest.importorskip("numba", reason="numba is not installed")
    unit = SpikingConv2d(3, 8, pool="max", neuron={"name": "lif", "backend": "numba"})
    x = torch.rand(4, 2, 3, 8, 8)
    with torch.autocast("cpu", dtype=dtype):
        out, v = unit(x)
    assert (out.dtype, v.dtype) == (dtype, torch.float32)
    assert 0.02 < out.float().mean() < 0.98
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in unit.parameters())


def over_time(kernel_size=3):
    return SpikingConv1d(3, 8, kernel_size, padding=0, over="time")


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: SpikingConv2d(3, 8), (2, 2, 3, 4, 4)),
        (over_time, (4, 2, 3)),
        (lambda: SpikingLinear(3, 8), (2, 2, 3)),
        (lambda: Readout(3, 8), (2, 2, 3)),
    ],
)
def test_another_dtype_than_the_weight_is_refused_under_every_strategy(make, shape, dtype, keep):
    layer = make()
    layer.keep = keep
    with pytest.raises(ShapeError, match=rf"{type(layer).__name__}: .*in torch.float32.*got {dtype}.*x.to\(.*model.to"):
        layer(torch.rand(shape).to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.rand(shape).to(dtype))[0].dtype == torch.bfloat16
    layer.to(dtype)
    assert layer(torch.rand(shape).to(dtype))[0].dtype == dtype


@pytest.mark.parametrize("keep", KEEPS)
def test_a_pool_of_one_pixel_is_refused_under_every_strategy(keep):
    unit = SpikingConv2d(3, 8, pool="max")
    unit.keep = keep
    with pytest.raises(ShapeError, match="at least 2 pixels a side, got 1x1"):
        unit(torch.rand(2, 2, 3, 1, 1))


class HalfConv(nn.Conv2d):
    def forward(self, x):
        return 0.5 * super().forward(x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SpikingConv2d(3, 8)(torch.rand(2, 3, 8, 8)), ShapeError, r"\[T, B, 3, H, W\].*encoding.repeat"),
        (lambda: SpikingUnit(HalfConv(3, 8, 3), None, LIF()), OptionError, "HalfConv with a forward of its own"),
        (lambda: SpikingUnit(nn.Conv3d(3, 8, 3), None, LIF()), OptionError, "expected nn.Conv1d, .* got Conv3d"),
        (lambda: SpikingUnit(spectral_norm(nn.Linear(3, 8)), None, LIF()), OptionError, "hook.*parametrizations"),
        (lambda: SpikingConv2d(3, 8)(torch.rand(2, 2, 4, 8, 8)), ShapeError, r"\[T, B, 3, H, W\]"),
        (lambda: SpikingConv2d(3, 8)(torch.rand(0, 2, 3, 8, 8)), ShapeError, "T = 0"),
        (lambda: SpikingConv2d(3, 8)(torch.ones(2, 2, 3, 8, 8, dtype=torch.uint8)), ShapeError, "floating point"),
        (lambda: SpikingLinear(3, 8)(torch.rand(4, 3)), ShapeError, r"SpikingLinear.*\[T, B, 3\].*repeat"),
        (lambda: SpikingLinear(3, 8)(torch.rand(4, 2, 5)), ShapeError, r"\[T, B, 3\]"),
        (lambda: SpikingConv2d(3, 8)(torch.rand(2, 2, 3, 8, 8), torch.zeros(1, 8, 8, 8)), StateError, "membrane"),
        (lambda: SpikingConv2d(3, 8)(torch.rand(1, 2, 3, 8, 8).cfloat()), ShapeError, "x.real or x.abs"),
        (lambda: SpikingConv2d(3, 8)(torch.rand(1, 2, 8, 8, 3)), ShapeError, r"SpikingConv2d: .*movedim\(-1, 2\)"),
        (lambda: SpikingConv2d(3, 8)(torch.rand(1, 2, 4, 8, 8)), ShapeError, "Give it 3 channels, .*in_channels=4"),
        (lambda: SpikingLinear(3, 8)(torch.rand(4, 2, 5)), ShapeError, "Give it 3 features, .*in_features=5"),
        (lambda: SpikingLinear(3, 8)(torch.rand(4, 2, 5, 3)), ShapeError, r"\[T, B, 3\].*Flatten"),
        (lambda: SpikingLinear(3, 8, norm="none")(torch.rand(4, 2, 5, 3)), ShapeError, r"\[T, B, 3\].*Flatten"),
        (lambda: Readout(3, 8)(torch.rand(4, 2, 5, 3)), ShapeError, r"Readout: .*\[T, B, 3\].*Flatten"),
        (lambda: Readout(3, 8).init_state(2, (4,)), ShapeError, r"Readout: .*\[T, B, 3\].*in_features=4"),
        (lambda: SpikingConv1d(3, 8)(torch.rand(4, 2, 3)), ShapeError, r"\[T, B, 3, L\], got \(4, 2, 3\)"),
        (
            lambda: over_time()(torch.rand(9, 2, 5)),
            ShapeError,
            r"SpikingConv1d: .*\[T, B, 3\], got \(9, 2, 5\).*in_channels",
        ),
        (lambda: over_time()(torch.rand(9, 2, 3, 5)), ShapeError, r"\[T, B, 3\], got \(9, 2, 3, 5\)"),
        (lambda: over_time()(torch.rand(9, 3)), ShapeError, r"batch axis: x.unsqueeze\(1\)"),
        (lambda: over_time(9)(torch.rand(4, 2, 3)), ShapeError, "at least 9 time steps .*got T = 4.*smaller kernel"),
        (lambda: SpikingConv1d(3, 8, 9, padding=0)(torch.rand(1, 2, 3, 4)), ShapeError, "a side of 9.*got 4"),
        (lambda: SpikingConv2d(3, 8, 5, padding=1)(torch.rand(1, 2, 3, 2, 8)), ShapeError, "a side of 3x3.*got 2x8"),
        (lambda: SpikingConv2d(3, 8, pool="max")(torch.rand(2, 2, 3, 1, 4)), ShapeError, "at least 2 pixels .*got 1x4"),
        (lambda: Flatten()(torch.rand(2, 3)), ShapeError, "encoding.repeat"),
        (lambda: GlobalAveragePool()(torch.rand(2, 2, 3)), ShapeError, "space axes"),
        (
            lambda: GlobalAveragePool()(torch.ones(2, 2, 3, 2, 2).long()),
            ShapeError,
            "GlobalAveragePool: .*floating point",
        ),
        (lambda: AveragePoolTime(3)(torch.rand(2, 2, 3)), ShapeError, "at least 3 time steps, got T = 2"),
        (lambda: AveragePoolTime()(torch.rand(4, 2, 3, 5)), ShapeError, r"AveragePoolTime: .*\[T, B, C\].*Flatten"),
        (lambda: FlattenTime()(torch.rand(4, 3)), ShapeError, r"FlattenTime: .*\[T, B, C\]"),
        (lambda: create_norm("bn", 3)(torch.ones(2, 2, 3).long()), ShapeError, "norm: .*floating point"),
        (lambda: ResidualBlock(3, 3)(torch.rand(1, 1, 3, 4, 4), (None,)), StateError, "two membranes, got 1 entries"),
        (lambda: Readout(3, 2.5), OptionError, "whole number, got 2.5"),
        (lambda: SpikingConv2d(3, 8, pool="mean"), OptionError, "pool must be None, 'max' or 'avg'"),
        (lambda: SpikingConv2d(3, 8, chunk=0), OptionError, "chunk must be a whole number .* got 0"),
        (lambda: SpikingConv2d(3, 8, chunk=2.5), OptionError, "chunk must be a whole number .* got 2.5"),
        (lambda: SpikingConv1d(3, 8, over="depth"), OptionError, "'space' or 'time'"),
        (lambda: SpikingConv1d(3, 8, over="time", pool="avg"), OptionError, "AveragePoolTime"),
        (lambda: Dropout(1.0), OptionError, r"\[0, 1\)"),
        (lambda: Readout(3, 0), OptionError, "num_classes must be at least 1"),
        (
            lambda: SpikingUnit(nn.Conv2d(3, 8, 3, padding="same"), None, None)(torch.rand(1, 1, 3, 8, 8)),
            OptionError,
            "numeric",
        ),
    ],
)
def test_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()

"""T-RevSNN: parameters, forms of the network, strategies on it, streaming, deployment, and bytes against time."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spikefit import create_model, use_strategy
from spikefit.errors import StrategyError
from spikefit.layers import StandardizedConv2d, StandardizedLinear
from spikefit.losses import create_loss
from spikefit.planning import Target, predicted_bytes, profile, random_sample, verify, watch_saved
from spikefit.planning.measured import measured_peak_bytes
from spikefit.planning.target import mean_cross_entropy
from support import assert_close

WIDTHS = (8, 8, 8, 16)
ENCODES = ("repeat", "frames", "group")
FUSIONS = ("adjacent", "all_deeper")
STRATEGIES = (
    "step_checkpoint",
    "spike_bits",
    "spike_bits:2",
    "reversible",
    "reversible:1",
    "reversible:2",
    "reversible:none,0.001,repair",
)


def small(encode="repeat", T=4, *, seed=0, lively=True, strategy="bptt", side=8, **options):
    """A tiny network whose hidden spikes are on as well."""
    torch.manual_seed(seed)
    channels = 2 if encode == "frames" else 3
    options = {"widths": WIDTHS, "timesteps": T, "input_shape": (channels, side, side), "encode": encode, **options}
    if T % 4 and encode != "frames":
        options.setdefault("auxiliary", False)
    model = create_model("trevsnn_mini", **options)
    if lively:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape))
            for raw in model.body.gains.raw:
                raw.clamp_(0.5, 0.9)
    return use_strategy(model, strategy)


def sequence(model, B=2, dtype=torch.float32, seed=1):
    """(leaf, what the network reads): an image that is repeated in place, or frames."""
    repeated = not is_frames(model)
    generator = torch.Generator().manual_seed(seed)
    leaf = torch.rand(1 if repeated else model.timesteps, B, *model.input_shape, generator=generator).to(dtype)
    leaf.requires_grad_()
    return leaf, leaf.expand(model.timesteps, *leaf.shape[1:])


def is_frames(model):
    return len(model.body.head_of) == model.timesteps and not model.auxiliary_heads


def gradients(model, x, leaf):
    """Outputs, then gradients by name, of logits with fixed weights; with auxiliary heads if there are any."""
    outs = model(x, auxiliary=True) if model.auxiliary_heads else (model(x),)
    generator = torch.Generator().manual_seed(3)
    value = sum((o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum() for o in outs)
    named = {"input": leaf} | {name: p for name, p in model.named_parameters() if p.requires_grad}
    made = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return [o.detach() for o in outs], dict(zip(named, made, strict=True))


def parameters(*modules):
    return sum(p.numel() for m in modules for p in m.parameters())


# stem, shared, step 1, each later step, auxiliary heads, final head, total
PARTS = {
    "trevsnn_tiny": (46_528, 957_184, 3_351_680, 3_491_840, 1_158_000, 1_388_000, 17_376_912),
    "trevsnn_small": (97_440, 1_855_872, 6_612_416, 6_902_528, 1_542_000, 1_516_000, 32_331_312),
    "trevsnn_dvs": (5_120, 361_600, 1_217_344, 1_260_800, 0, 2_700, 10_412_364),
    "trevsnn_mini": (464, 15_168, 58_912, 61_488, 1_260, 540, 260_808),
}
DEPLOYED = {
    "trevsnn_tiny": (16_218_912, 15_216_912),
    "trevsnn_small": (30_789_312, 29_787_312),
    "trevsnn_dvs": (10_412_364, 10_412_244),
    "trevsnn_mini": (259_548, 259_428),
}
CLASSES = {"trevsnn_tiny": 1000, "trevsnn_small": 1000, "trevsnn_dvs": 10, "trevsnn_mini": 10}


def on_meta(name, **options):
    with torch.device("meta"):
        return create_model(name, **{"num_classes": CLASSES[name], **options})


@pytest.mark.parametrize("name", PARTS)
def test_parameters_of_every_part(name):
    model = on_meta(name)
    body, T = model.body, model.timesteps
    # stems of single steps stand at the first stage of each
    entries = [step[0].entry for step in body.branches if step[0].entry is not None]
    gains = sum(p.numel() for p in body.gains.parameters()) // T
    steps = [parameters(*step) + gains for step in body.branches]
    steps = [n - parameters(*entries) // T for n in steps]
    heads = [parameters(h) for key, h in body.heads.items() if key != "final"]
    found = (parameters(model.blocks[0], *entries), parameters(body.shared), steps[0], steps[1], sum(heads))
    assert (*found, parameters(body.heads["final"]), parameters(model)) == PARTS[name]
    assert set(steps[1:]) == {PARTS[name][3]}
    counts = model.parameter_counts()
    assert counts == dict(
        zip(("trainable", "without_auxiliary", "deployed"), (PARTS[name][-1], *DEPLOYED[name]), strict=True)
    )


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("trevsnn_tiny", {"kernel": 3}, 17_203_856),
        ("trevsnn_small", {"kernel": 3}, 32_085_040),
        ("trevsnn_dvs", {"kernel": 3}, 10_220_364),
        ("trevsnn_tiny", {"encode": "group"}, 17_487_888),
        ("trevsnn_small", {"encode": "group"}, 32_580_720),
        ("trevsnn_mini", {"gain": "free"}, 260_808),
        ("trevsnn_mini", {"gain": "one"}, 260_808 - 4 * 112),
        ("trevsnn_mini", {"auxiliary": False}, 259_548),
    ],
)
def test_parameters_of_other_forms(name, options, wanted):
    assert parameters(on_meta(name, **options)) == wanted
    if options.get("gain") == "free":
        fixed = on_meta(name, learn_gain=False)
        assert fixed.parameter_counts()["trainable"] == 260_808 - 4 * 112


@pytest.mark.parametrize("name", PARTS)
def test_widths_steps_and_sides(name):
    model = on_meta(name)
    rows = {"trevsnn_tiny": (56, 426_496, 200_704), "trevsnn_small": (56, 627_200, 301_056)}
    rows |= {"trevsnn_dvs": (128, 1_179_648, 524_288), "trevsnn_mini": (32, 27_136, 16_384)}
    side, S, X = rows[name]
    widths = model.body.gains.widths
    sides = (side, side // 2, side // 4, side // 4)
    assert sum(c * n * n for c, n in zip(widths, sides, strict=True)) == S
    assert widths[0] * side * side == X
    state = model.init_state(2, device="meta")
    x = torch.empty(1, 2, *model.input_shape, device="meta")
    _, (_, (_, *v)) = model.eval().run(x, state)
    assert [tuple(one.shape) for one in v] == [(2, c, n, n) for c, n in zip(widths, sides, strict=True)]


def test_standardised_weights_by_hand():
    """gain fan_in^-1/2 (W - mean) / sqrt(var + 1e-6)."""
    model = small()
    for layer in (m for m in model.modules() if isinstance(m, StandardizedConv2d | StandardizedLinear)):
        w = layer.weight.detach().double()
        flat = w.flatten(1)
        var = flat.var(1, correction=0)
        wanted = (flat - flat.mean(1, keepdim=True)) / (flat.shape[1] * (var + 1e-6)).sqrt()[:, None]
        wanted = (layer.gain.detach().double()[:, None] * wanted).view_as(w)
        torch.testing.assert_close(layer.standardized().double(), wanted, rtol=1e-5, atol=1e-6)


def test_where_training_starts():
    model = small(lively=False)
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)])
    assert 0.019 < weights.std() < 0.021
    assert all(m.bias.abs().max() == 0 for m in model.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)
    assert all((step[0].scale == 1).all() for step in model.body.branches)
    assert {float(a.detach().unique()) for row in model.body.gains() for a in row} == {0.75}
    assert {float(a.detach().unique()) for row in small(lively=False, gain="free").body.gains() for a in row} == {0.5}


def plain_network(model, x, fusion):
    """The equations, step by step, from the modules alone: logits of all heads in the order of steps."""

    def s(v):
        return (v >= 0.5).to(v.dtype)

    def f(step, stage, shared, below, deeper):
        part = step[stage]
        w = below if part.down is None else part.down(below)
        if fusion == "adjacent" and deeper:
            up = part.up(deeper[0])
            w = w + F.interpolate(up, size=w.shape[-2:], mode="nearest")
        w = w + part.scale.view(1, -1, 1, 1) * part.dw2(part.pw2(s(part.pw1(part.dw1(s(w))))))
        w = w + shared[stage](s(part.pw3(part.dw3(s(w)))))
        if fusion == "all_deeper":
            for conv, one in zip(part.mix if deeper else [], deeper, strict=True):
                w = w + F.interpolate(conv(one), size=w.shape[-2:], mode="nearest")
        return w

    body, logits, v = model.body, [], []
    for t, step in enumerate(body.branches):
        seen = model.blocks[0].parts(x[t])
        seen = seen if step[0].entry is None else step[0].entry(seen)
        a = [1.0 if one is None else one.view(1, -1, 1, 1) for one in body.gains()[t]]
        after = []
        for stage in range(4):
            below = seen if stage == 0 else s(after[-1])
            carried = [a[i] * v[i] for i in range(stage + 1, 4)] if v else []
            deeper = carried if fusion == "all_deeper" else [s(one) for one in v[stage + 1 : stage + 2]]
            made = f(step, stage, body.shared, below, deeper)
            after.append(made + a[stage] * v[stage] if v else made)
        v = after
        name = body.head_of.get(t + 1)
        if name is not None:
            head = body.heads[name]
            logits.append(head.net((s(v[3]) if head.reads == "spikes" else v[3]).mean((2, 3))))
    return torch.stack(logits)


@pytest.mark.parametrize("gain", ["bounded", "free", "one"])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("encode", ENCODES)
def test_the_equations(encode, fusion, gain):
    model = small(encode, fusion=fusion, gain=gain).double()
    x = sequence(model, dtype=torch.float64)[1].detach()
    for training in (True, False):
        model.train(training)
        with torch.no_grad():
            wanted = plain_network(model, x, fusion)
            got = model(x)
            assert got.shape == ((4, 2, 10) if encode == "frames" else (1, 2, 10))
            assert_close(got, wanted if encode == "frames" else wanted[-1:], 1e-12)
            if encode != "frames":
                logits, auxiliary = model(x, auxiliary=True)
                assert torch.equal(logits, got)
                assert_close(auxiliary, wanted[:3], 1e-12)
        assert wanted.std() > 0


def test_group_splits_the_last_convolution_of_the_stem():
    """The convolutions of the steps are one, whose channels are shared out in chunks."""
    model = create_model("trevsnn_tiny", encode="group", stem_channels=32, widths=None, input_shape=(3, 32, 32))
    assert model.body.gains.widths == (8, 128, 256, 384)
    x = torch.rand(1, 2, 3, 32, 32).expand(4, -1, -1, -1, -1)
    entries = [step[0].entry for step in model.body.branches]
    weight = torch.cat([e.standardized() for e in entries])
    whole = F.conv2d(model.blocks[0].parts(x[0]), weight, torch.cat([e.bias for e in entries]), stride=2, padding=1)
    assert_close(model.features(x), torch.stack(whole.chunk(4, 1)), 1e-5)


@pytest.mark.parametrize(
    ("strategy", "encode", "fusion"),
    [(s, "repeat", f) for s in STRATEGIES for f in FUSIONS]
    + [
        (s, e, f) for s in ("step_checkpoint", "spike_bits", "reversible") for e in ("frames", "group") for f in FUSIONS
    ],
)
def test_every_strategy_has_the_gradients_of_bptt(strategy, encode, fusion):
    if strategy.startswith("spike_bits") and fusion == "all_deeper":
        with pytest.raises(StrategyError, match=r"blocks\.1.*all_deeper"):
            small(encode, fusion=fusion, strategy=strategy)
        return
    found = []
    for one in (strategy, "bptt"):
        model = small(encode, fusion=fusion, strategy=one).double()
        leaf, x = sequence(model, dtype=torch.float64)
        found.append((*gradients(model, x, leaf), dict(model.named_buffers())))
    (got, d_got, moved), (wanted, d_wanted, wanted_moved) = found
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    silent = [name for name, g in d_wanted.items() if g is None or g.abs().max() == 0]
    assert len(silent) < 0.1 * len(d_wanted), silent
    for name, b in d_wanted.items():
        if b is not None:
            assert_close(d_got[name], b, 1e-10, name)
    for name, b in wanted_moved.items():
        assert torch.equal(moved[name], b), name
    assert {int(b) for name, b in moved.items() if name.endswith("tracked")} == {1}


def test_bits_and_checkpoints_equal_bptt_to_the_bit_in_float32():
    wanted = None
    for strategy in ("bptt", "step_checkpoint", "spike_bits", "spike_bits:2"):
        model = small(strategy=strategy)
        leaf, x = sequence(model)
        made = gradients(model, x, leaf)
        wanted = wanted or made
        assert all(torch.equal(a, b) for a, b in zip(made[0], wanted[0], strict=True))
        for name, b in wanted[1].items():
            # gradients of gains read states, which the inverse of spike_bits rounds
            if b is not None and not (strategy.startswith("spike_bits") and ".gains." in name):
                assert torch.equal(made[1][name], b), f"{strategy}: {name}"


@pytest.mark.parametrize("strategy", ["bptt", *STRATEGIES, "step_checkpoint:2", "checkpoint"])
def test_verify_passes(strategy):
    model = small(strategy=strategy, lively=False)
    found = verify(model, sequence(model)[1].detach(), loss=create_loss("ce_heads"))
    assert found.passed, str(found)
    # an inverse rounds, and is held to what it says it accepts
    approximate = strategy.partition(":")[0] in ("spike_bits", "reversible")
    assert (found.approximate is not None) == approximate
    assert found.tolerance == (1e-3 if approximate else 1e-5)


def test_the_way_back_on_a_grid_is_exact():
    model = small(strategy="reversible", gain="one", state_grid=14, lively=False)
    found = verify(model, sequence(model)[1].detach())
    assert found.passed, str(found)
    assert found.approximate is None


@pytest.mark.parametrize("strategy", ["step_checkpoint", "spike_bits", "reversible"])
def test_training_on_a_grid_is_that_of_bptt_to_the_bit(strategy):
    """Five steps with gains of one: losses, parameters and statistics."""
    ours, twin = (small(lively=False, gain="one", state_grid=14, strategy=s) for s in (strategy, "bptt"))
    losses = [[], []]
    for model, seen in zip((ours, twin), losses, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for i in range(5):
            logits, auxiliary = model(sequence(model, 4)[1].detach(), auxiliary=True)
            loss = create_loss("ce_heads")(logits, (torch.arange(4) + i) % 10, auxiliary=auxiliary)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 5, "the weights do not move"
    for (key, a), b in zip(ours.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_the_table_form_of_options():
    model = small()
    use_strategy(model, {"name": "reversible", "anchor_every": 2, "tol": 0.001, "on_flip": "repair"})
    assert str(model.strategy) == "reversible:2,0.001,repair"
    assert use_strategy(model, {"name": "reversible", "anchor_every": "none"}).strategy.option == "none"
    assert use_strategy(model, {"name": "spike_bits", "anchor_every": 3}).strategy.option == "3"
    assert use_strategy(model, "reversible:4,0.01").strategy.accepts == 0.01
    for text in ({"name": "reversible", "tol": 0.1}, {"name": "spike_bits", "every": 3}):
        with pytest.raises(StrategyError, match="anchor_every"):
            use_strategy(model, text)


def test_spike_bits_on_membranes_of_units_is_the_inverse():
    options = {"input_shape": (3, 8, 8), "width": 0.125, "norm": "step_bn", "share": "layer"}
    torch.manual_seed(0)
    model = create_model("vgg6", **options)
    x = torch.rand(4, 2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for strategy in ("spike_bits", "spike_bits:2"):
        found = verify(use_strategy(model, strategy), x)
        assert found.passed, str(found)
    assert found.accepts == 0.001
    by_name = []
    for strategy in ("spike_bits:2", "inverse:2"):
        model.zero_grad()
        use_strategy(model, strategy)(x).square().sum().backward()
        by_name.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*by_name, strict=True))


@pytest.mark.parametrize("encode", ENCODES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_steps_give_the_logits_of_the_sequence(encode, fusion):
    model = small(encode, fusion=fusion, auxiliary=None).eval()
    x = sequence(model)[1].detach()
    with torch.no_grad():
        wanted = model(x)
        runs = {"step": (model.step, x), "step_features": (model.step_features, model.features(x))}
        for name, (step, pieces) in runs.items():
            state, rows = model.init_state(2), []
            for t, one in enumerate(pieces):
                logits, state = step(one, state)
                if encode == "frames" or t == 3:
                    rows.append(logits)
                else:
                    assert logits is None, f"{name}: no final head stands behind step {t + 1}"
            assert torch.equal(torch.stack(rows), wanted), name
        for cuts in ([1, 3], [2, 2]):
            state, made = model.init_state(2), []
            for piece in x.split(cuts):
                rows, state = model.run(piece, state)
                made.append(rows)
            assert torch.equal(torch.cat(made), wanted)


@pytest.mark.parametrize("strategy", ["bptt", "step_checkpoint", "spike_bits", "reversible"])
def test_gradients_of_pieces(strategy):
    found = []
    for pieces in ((4,), (2, 2)):
        model = small(strategy=strategy).double()
        leaf, x = sequence(model, dtype=torch.float64)
        state, made = model.init_state(2), []
        for piece in x.split(pieces):
            rows, state = model.run(piece, state)
            made.append(rows)
        named = {"input": leaf} | dict(model.named_parameters())
        d = torch.autograd.grad(torch.cat(made).square().sum(), list(named.values()), allow_unused=True)
        found.append(dict(zip(named, d, strict=True)))
    for name, b in found[0].items():
        if b is not None:
            assert_close(found[1][name], b, 1e-10, name)


def test_deployed_is_the_same_network_but_for_rounding():
    for encode in ENCODES:
        model = small(encode).eval()
        x = sequence(model)[1].detach()
        with torch.no_grad():
            made = model.deployed()
            assert made.auxiliary_heads == 0
            assert_close(made(x), model(x), 1e-5)
            assert isinstance(made.body.heads["final"].net, nn.Linear)
        assert set(model.state_dict()) == set(small(encode).state_dict()), "the network itself stays as it was"


def test_the_two_convolutions_of_the_stem_fuse_but_for_the_first_row_and_column():
    """One 11x11 kernel of stride 4; the inner convolution pads with zeros where the fused one has its bias."""
    torch.manual_seed(0)
    model = create_model("trevsnn_tiny", widths=WIDTHS, input_shape=(3, 32, 32)).double()
    first, second = model.blocks[0].parts
    with torch.no_grad():
        for p in (first.bias, second.bias):
            p.normal_()
        inner, outer = first.standardized(), second.standardized()
        fused = torch.zeros(8, 3, 11, 11, dtype=torch.float64)
        for i in range(3):
            for j in range(3):
                fused[:, :, 2 * i : 2 * i + 7, 2 * j : 2 * j + 7] += torch.einsum(
                    "om,mcij->ocij", outer[:, :, i, j], inner
                )
        bias = second.bias + outer.sum((2, 3)) @ first.bias
        x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
        got, wanted = F.conv2d(x, fused, bias, stride=4, padding=5), model.blocks[0].parts(x)
    assert_close(got[..., 1:, 1:], wanted[..., 1:, 1:], 1e-12)
    assert (got[..., 0, :] - wanted[..., 0, :]).abs().max() > 1e-3


def held(strategy, T, B=2, **options):
    """Bytes that autograd holds behind a forward with the final head alone."""
    model = small(T=T, auxiliary=False, strategy=strategy, lively=False, **options)
    with watch_saved(model) as saved:
        logits = model(sequence(model, B)[1])
    del logits
    return saved.total


# elements of the states of the small network, and its gains per step
S, GAINS = 8 * 64 + 8 * 16 + 8 * 4 + 16 * 4, sum(WIDTHS)
ANY = "none,1e9"
# of what a branch gave, 8 bytes for every stage
MARKS = 8 * 4


@pytest.mark.parametrize(
    ("strategy", "options", "per_image", "per_step"),
    [
        # gains are inputs of the function; those that learn keep what they are computed from too
        ("step_checkpoint", {}, 4 * S, 4 * 2 * GAINS + MARKS),
        ("step_checkpoint", {"gain": "one"}, 4 * S, MARKS),
        ("spike_bits", {"learn_gain": False}, S / 4, 4 * GAINS + MARKS),
        (f"spike_bits:{ANY}", {}, S / 4, 4 * 2 * GAINS + MARKS),
        # of spikes too
        (f"reversible:{ANY}", {}, 0, 4 * 2 * GAINS + 2 * MARKS),
        ("reversible", {"gain": "one"}, 0, 2 * MARKS),
        ("reversible", {"gain": "one", "state_grid": 14}, 0, 0),
    ],
)
def test_kept_bytes_against_steps(strategy, options, per_image, per_step):
    found = {T: held(strategy, T, **options) for T in (4, 8, 16)}
    assert found[8] - found[4] == 4 * (2 * per_image + per_step)
    assert found[16] - found[8] == 8 * (2 * per_image + per_step)


def test_kept_bytes_of_anchors():
    """ceil(T / A) states."""
    one = held("reversible:1", 8)
    assert one - held(f"reversible:{ANY}", 8) == 7 * 4 * S * 2
    for every, count in ((2, 4), (3, 3), (5, 2)):
        assert one - held(f"reversible:{every},1e9", 8) == (8 - count) * 4 * S * 2
    bits = held(f"spike_bits:{ANY}", 8)
    assert held("spike_bits:2", 8) - bits == 3 * 4 * S * 2


def graph_elements():
    """Graph of the branches of a later step, per image: 25 N_l, down, and up."""
    widths, sizes = WIDTHS, (64, 16, 4, 4)
    made = 25 * S
    for i in range(1, 4):
        made += widths[i] * sizes[i] + widths[i - 1] * sizes[i - 1]
    for i in range(3):
        made += (widths[i + 1] + widths[i]) * sizes[i + 1]
    return made


def test_kept_bytes_of_bptt():
    """Graphs and states of every step, apart from what does not grow with the batch.

    Spikes of the second and the third stage are read by the stage below and by the next step, and are one tensor.
    """
    twice = 8 * 16 + 8 * 4
    slope = {B: (held("bptt", 8, B) - held("bptt", 4, B)) / 4 for B in (2, 4)}
    per_image = (slope[4] - slope[2]) / 2
    assert per_image == 4 * (graph_elements() + S - twice)


@pytest.mark.parametrize("strategy", ["bptt", "step_checkpoint", "spike_bits", "reversible"])
def test_fake_and_real_steps_hold_the_same_bytes(strategy):
    model = small(auxiliary=False, strategy=strategy, lively=False)
    x, y = random_sample(model.input_shape, 4, 2, repeated=True)
    with watch_saved(model) as saved:
        loss = mean_cross_entropy(model(x), y)
    predicted = predicted_bytes(model, x, y)
    assert predicted.saved.layers == saved.layers
    assert predicted.peak > saved.total > 0
    del loss


def test_profile_predicts_without_a_step():
    options = {"widths": [8, 8, 8, 16], "image": "3x8x8", "batch": 4, "predict_only": True}
    found = profile("trevsnn_mini", **options, strategy="spike_bits")
    assert found.predicted_peak_bytes > found.saved_bytes > 0


@pytest.mark.parametrize("strategy", ["bptt", "step_checkpoint", "spike_bits", "reversible"])
def test_measured_peak_lies_below_the_prediction_and_close_to_it(strategy):
    target = Target("trevsnn_mini", timesteps=4, batch=16, strategy=strategy, input_shape=(3, 32, 32))
    model = target.build()
    predicted, measured = predicted_bytes(model, *target.sample(model)).peak, measured_peak_bytes(target)
    assert measured <= predicted <= 1.15 * measured


@pytest.mark.parametrize("strategy", ["step_checkpoint", "spike_bits", "reversible:none,0.001,repair"])
@pytest.mark.parametrize("fusion", ["adjacent", "all_deeper"])
def test_states_of_a_network_in_half_precision_are_float32(strategy, fusion):
    if fusion == "all_deeper" and strategy == "spike_bits":
        pytest.skip("bits do not hold analog states")
    x = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).bfloat16().expand(4, -1, -1, -1, -1)
    found = {}
    for name in ("bptt", strategy):
        torch.manual_seed(0)
        model = create_model("trevsnn_mini", widths=(8, 8, 8, 16), input_shape=(3, 8, 8), fusion=fusion)
        model = use_strategy(model.bfloat16(), name)
        _, state = model.run(x[:2], model.init_state(4))
        assert {v.dtype for v in state[1][1:]} == {torch.float32}
        logits, auxiliary = model(x, auxiliary=True)
        assert logits.dtype == torch.bfloat16
        (logits.float().sum() + auxiliary.float().square().sum()).backward()
        found[name] = logits, {n: p.grad for n, p in model.named_parameters()}
    assert torch.equal(found["bptt"][0], found[strategy][0])
    for key, wanted in found["bptt"][1].items():
        got = found[strategy][1][key]
        assert got.dtype == torch.bfloat16
        assert float((got - wanted).abs().max()) <= 0.05 * max(float(wanted.abs().max()), 1e-6), key

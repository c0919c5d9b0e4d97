"""One-step window networks: published sizes, options, strategies, refusals, and a short training run."""

import pytest
import torch
from torch.nn import functional as F

from spikefit.errors import OptionError, ShapeError, StrategyError
from spikefit.layers.window_block import WindowSpike
from spikefit.layers.window_parts import PatchMerging
from spikefit.models import create_model, use_strategy
from spikefit.neurons.window import WindowLIF
from spikefit.planning import profile, verify

NETWORKS = ["dmsn_cnn12", "dmsn_lstm12"]
TWINS = ["dmsn_cnn12_ann", "dmsn_lstm12_ann"]
STRATEGIES = ["lean", "checkpoint", "checkpoint:1", "step_checkpoint"]


def small(name, **options):
    torch.manual_seed(0)
    model = create_model(name, **{"widths": (8, 16), "depths": (2, 2), "input_shape": (3, 16, 16), **options})
    # a head of zeros would hide everything in front of it
    torch.nn.init.normal_(model.blocks[-1].linear.weight)
    return model


def images(B=3, side=16):
    return torch.rand(1, B, 3, side, side, generator=torch.Generator().manual_seed(1))


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def of(model, *kinds):
    return sum(parameters(m) for m in model.modules() if isinstance(m, kinds))


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("dmsn_cnn12", {10: 13_885_402, 100: 13_920_052, 200: 13_958_552}),
        ("dmsn_lstm12", {10: 14_925_466, 100: 14_960_116, 200: 14_998_616}),
    ],
)
def test_parameters_are_the_published_ones(name, counts):
    for classes, wanted in counts.items():
        assert parameters(create_model(name, num_classes=classes)) == wanted


def test_parameters_by_part():
    cnn, lstm = (create_model(name) for name in NETWORKS)
    blocks = [[m for m in net.modules() if isinstance(m, WindowSpike)] for net in (cnn, lstm)]
    assert [sum(parameters(b.cell) for b in net) for net in blocks] == [9_708_864, 8_661_504]
    assert [sum(parameters(b.fc) for b in net) for net in blocks] == [541_344, 1_080_480]
    assert [sum(parameters(b.mlp) for b in net) for net in blocks] == [3_243_648, 3_243_648]
    merging = [[m for m in net.modules() if isinstance(m, PatchMerging)] for net in (cnn, lstm)]
    assert [sum(parameters(m.reduce) for m in net) for net in merging] == [387_072, 387_072]
    assert [m.reduce_memory for m in merging[0]] == [None] * 3
    assert sum(parameters(m.reduce_memory) for m in merging[1]) == 1_548_288
    assert [tuple(m.reduce_memory.weight.shape) for m in merging[1]] == [(192, 384), (384, 768), (768, 1536)]


def test_blocks_of_a_stage_take_turns_and_the_last_stage_has_tiles():
    kinds = [m.kind for m in create_model("dmsn_cnn12").modules() if isinstance(m, WindowSpike)]
    assert kinds == ["tile", "dilated"] * 5 + ["tile", "tile"]
    plain = create_model("dmsn_cnn12", dilated=False)
    assert {m.kind for m in plain.modules() if isinstance(m, WindowSpike)} == {"tile"}


def test_the_twin_has_the_same_weights():
    for name, twin in zip(NETWORKS, TWINS, strict=True):
        net, analog = create_model(name), create_model(twin)
        shapes = {k: v.shape for k, v in net.state_dict().items() if "reduce_memory" not in k}
        assert {k: v.shape for k, v in analog.state_dict().items()} == shapes


@pytest.mark.parametrize("name", NETWORKS + TWINS)
def test_outputs_and_a_head_that_starts_at_zero(name):
    model = create_model(name, width=1 / 12)
    logits = model(torch.rand(1, 2, 3, 32, 32))
    assert logits.shape == (1, 2, 10)
    assert logits.abs().sum() == 0
    logits.sum().backward()
    assert model.blocks[-1].linear.bias.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient(name):
    for carry in ("block", "layer"):
        for mlp in ("gelu", "spiking"):
            model = small(name, carry=carry, mlp=mlp, input_shape=(3, 32, 32), widths=(8, 16))
            with torch.no_grad():
                for path, p in model.named_parameters():
                    # outputs of an LSTM that has learnt nothing stay below the threshold
                    p.mul_(6 if ".core." in path else 1)
            model(images(8, 32)).pow(2).sum().backward()
            missing = [k for k, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
            assert missing == [], (carry, mlp)


@pytest.mark.parametrize("strategy", ["bptt", "lean", "checkpoint"])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("carry", ["block", "layer"])
def test_half_precision_carries_membranes_in_full(name, carry, strategy):
    model, seen = use_strategy(small(name, carry=carry), strategy), []
    for block in model.blocks:
        block.register_forward_hook(lambda m, inputs, output: seen.append(output[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images())
    logits.float().pow(2).sum().backward()
    streams = [out for out in seen if isinstance(out, tuple)]
    assert bool(streams) == (carry == "layer")
    assert {out.memory.dtype for out in streams if out.memory is not None} <= {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if strategy == "bptt":
        whole = small(name, carry=carry).to(torch.bfloat16)
        assert whole(images().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dmsn_cnn12", {"learn_phi": True}),
        ("dmsn_cnn12", {"learn_phi": True, "carry": "layer", "windows": 1}),
        ("dmsn_lstm12", {"learn_phi": True}),
        ("dmsn_lstm12", {"fuse": "none"}),
        ("dmsn_cnn12", {"fuse": "none", "carry": "layer"}),
    ],
)
def test_no_parameter_is_out_of_the_graph(name, options):
    model = small(name, **options)
    model(images()).pow(2).sum().backward()
    assert [k for k, p in model.named_parameters() if p.grad is None] == []
    learned = [k for k, _ in model.named_parameters() if k.endswith("w_phi")]
    assert bool(learned) == ("learn_phi" in options)


@pytest.mark.parametrize("options", [{"cell": "mlp"}, {"windows": 1}, {"cell": "lstm", "carry": "block"}])
def test_a_phi_that_nothing_reads_is_not_learned(options):
    with pytest.raises(OptionError, match="learn_phi needs two membranes"):
        small("dmsn_cnn12", learn_phi=True, **options)


def test_any_width_doubles_from_stage_to_stage():
    assert [m.channels for m in create_model("dmsn_cnn12", width=0.2).modules() if isinstance(m, PatchMerging)] == [
        10,
        20,
        40,
    ]
    with pytest.raises(OptionError, match=r"got widths \(8, 24\); take \(8, 16\)"):
        small("dmsn_cnn12", widths=(8, 24))


@pytest.mark.parametrize(("side", "windows"), [(36, 4), (28, 4), (36, 1), (33, 4)])
def test_sides_that_do_not_fit_are_refused_with_those_that_do(side, windows):
    with pytest.raises(ShapeError, match=rf"multiples of 32.*got \(3, {side}, {side}\).*\)\. Pad or resize them\.$"):
        create_model("dmsn_cnn12", width=1 / 12, windows=windows, input_shape=(3, side, side))
    with pytest.raises(ShapeError, match=r"multiples of 32.*got \(3, 36, 36\)"):
        create_model("dmsn_cnn12", width=1 / 12, windows=windows)(torch.rand(1, 1, 3, 36, 36))


def test_a_wrong_spike_of_a_window_is_seen_and_the_reset_is_told(monkeypatch):
    model, right = small("dmsn_cnn12", reset="soft", strategy="lean"), WindowLIF.forward
    # its head hides everything in front of it
    torch.nn.init.zeros_(model.blocks[-1].linear.weight)
    assert verify(model, images()).passed
    faulty = model.blocks[2].cell.neurons[1]

    def wrong(self, *args, **options):
        spikes, membranes = right(self, *args, **options)
        return (1 - spikes if self is faulty and model.strategy.name == "lean" else spikes), membranes

    monkeypatch.setattr(WindowLIF, "forward", wrong)
    verdict = verify(model, images())
    assert not verdict.passed
    assert "blocks.2.cell.neurons.1" in verdict.spikes_differing
    settings = profile(small("dmsn_cnn12", reset="soft", mlp="spiking"), images()).settings
    assert (settings["reset"], settings["leak"]) == ("soft", [0.4])


def test_draws_are_new_in_every_call_and_repeat_under_a_seed():
    model, x = small("dmsn_cnn12").eval(), images()
    torch.manual_seed(3)
    first = model(x)
    second = model(x)
    torch.manual_seed(3)
    assert torch.equal(model(x), first)
    assert not torch.equal(first, second)
    assert model.step(x[0], model.init_state(3))[0].shape == (3, 10)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", [{}, {"coding": "bernoulli_ste", "mlp": "spiking"}], ids=["usual", "spiking"])
def test_strategies_give_the_gradients_of_bptt_to_the_bit(name, strategy, options):
    model, x = small(name, dropout=0.3, norm="step_bn", **options), images()

    def run(strategy):
        use_strategy(model, strategy)
        model.zero_grad()
        torch.manual_seed(7)
        logits = model(x)
        logits.pow(2).sum().backward()
        return logits, {k: p.grad.clone() for k, p in model.named_parameters()}

    buffers = {k: b.clone() for k, b in model.named_buffers()}
    logits, wanted = run("bptt")
    moved = {k: b.clone() for k, b in model.named_buffers()}
    for k, b in model.named_buffers():
        b.copy_(buffers[k])
    found, got = run(strategy)
    assert torch.equal(found, logits)
    assert all(torch.equal(got[k], wanted[k]) for k in wanted)
    assert all(torch.equal(b, moved[k]) for k, b in model.named_buffers())


def kept_bytes(model, x):
    """Bytes between forward and backward, weights apart."""
    weights, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(x)
    assert logits.requires_grad
    return sum(t.untyped_storage().nbytes() for place, t in held.items() if place not in weights)


@pytest.mark.parametrize("name", NETWORKS)
def test_kept_bytes_per_block_fall(name):
    def kept(strategy, depth):
        model = small(name, depths=(depth,), widths=(16,))
        use_strategy(model, strategy)
        return kept_bytes(model, images(4))

    slopes = {s: (kept(s, 6) - kept(s, 2)) / 4 for s in ("bptt", "lean", "checkpoint:1", "checkpoint:20")}
    stream, width = 4 * 16 * 8 * 8 * 4, {"dmsn_cnn12": 0, "dmsn_lstm12": 2}[name]
    # a stream, what its cell carries, and a bit for every pixel of every window (tiles and dilated ones in turns)
    assert slopes["lean"] <= stream * (1 + width + 1.625 / 32) + 8
    assert slopes["lean"] < slopes["bptt"] / 6
    assert slopes["checkpoint:1"] <= slopes["lean"]
    assert slopes["checkpoint:20"] == 0


def test_lean_keeps_bits_and_nothing_else_can_be_chosen():
    with pytest.raises(StrategyError, match=r"blocks of windows keep bits of their spikes and the stream.*'input'"):
        use_strategy(small("dmsn_cnn12"), "lean:input")
    with pytest.raises(StrategyError, match="has no unit"):
        use_strategy(small("dmsn_cnn12_ann"), "lean")
    with pytest.raises(StrategyError):
        use_strategy(small("dmsn_cnn12"), "replay")


def test_refusals_name_the_fix():
    with pytest.raises(ShapeError, match=r"DMSN works in one step; got T=4.*encoding.timesteps=1"):
        small("dmsn_cnn12")(images().expand(4, -1, -1, -1, -1))
    with pytest.raises(ShapeError, match="4 dilated windows need H and W as multiples of 4, got a map of 14x14"):
        create_model("dmsn_cnn12", input_shape=(3, 28, 28))
    with pytest.raises(OptionError, match=r"phi must be below 0.6 for a recurrent cell"):
        create_model("dmsn_lstm12", phi=0.7)
    with pytest.raises(OptionError, match="merging doubles the channels"):
        create_model("dmsn_cnn12", widths=(8, 8, 16, 32))
    with pytest.raises(OptionError, match="list the same stages"):
        create_model("dmsn_cnn12", depths=(2, 2))
    with pytest.raises(OptionError, match="unknown option 'coding'"):
        create_model("dmsn_cnn12_ann", coding="heaviside")


@pytest.mark.parametrize("cell", ["gru", "rnn", "birnn", "mlp"])
def test_other_cells_through_the_same_interface(cell):
    model = small("dmsn_lstm12", cell=cell)
    model(images()).sum().backward()
    assert {m.carry for m in model.modules() if isinstance(m, WindowSpike)} == {"block" if cell == "mlp" else "layer"}


def test_multiply_adds_are_the_published_ones():
    found = profile("dmsn_cnn12", timesteps=1, batch=1, predict_only=True)
    by_part = {"conv": 0.0, "fc": 0.0, "mlp": 0.0, "merging": 0.0}
    for layer in found.layers:
        part = next((p for p, key in PARTS.items() if key in layer.name), None)
        if part and layer.macs is not None:
            by_part[part] += layer.macs
    assert {k: round(v / 1e6, 3) for k, v in by_part.items()} == {
        "conv": 193.757, "fc": 7.078, "mlp": 42.467, "merging": 3.539
    }  # fmt: skip


PARTS = {"conv": ".cell.weights", "fc": ".fc", "mlp": ".mlp.", "merging": ".reduce"}


@pytest.mark.parametrize("name", NETWORKS)
def test_two_hundred_steps_lower_the_loss(name):
    torch.manual_seed(0)
    model = create_model(name, widths=(8, 16), depths=(1, 1), input_shape=(3, 16, 16), num_classes=4)
    y = torch.arange(16) % 4
    # classes differ in which quarter of the image is bright
    x = torch.rand(1, 16, 3, 16, 16) * 0.3
    for i, label in enumerate(y.tolist()):
        x[0, i, :, 8 * (label // 2) :, 8 * (label % 2) :] += 0.7
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x)[0], y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]


def test_the_prediction_knows_the_workspace_of_an_lstm():
    found = profile("dmsn_lstm12", timesteps=1, batch=4, predict_only=True, width=1 / 6)
    assert "an LSTM reserves memory of which it writes about half" in found.settings["prediction"]
    model, x = create_model("dmsn_lstm12", width=1 / 6, dropout=0.1), torch.rand(1, 4, 3, 32, 32)
    assert 0.9 <= found.saved_bytes / kept_bytes(model, x) <= 1.3

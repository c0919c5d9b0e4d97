"""Steps coupled in time: known answers, gradients under every way to keep, the inverse, its guard and its detector."""

import math
import re

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from spikefit.errors import OptionError, RangeError, ReconstructionError, ShapeError, StateError, StrategyError
from spikefit.layers import coupled_function
from spikefit.layers.coupled_function import run_coupled
from spikefit.layers.coupled_keep import ROUNDINGS, Keep, packed_codes, unpacked_codes
from spikefit.layers.coupled_steps import CoupledSteps, Head, laid_out
from spikefit.layers.gains import Gains
from spikefit.layers.rebuild import inverse_error
from spikefit.neurons import Threshold
from spikefit.ops import threshold
from support import saved_bytes

WIDTHS, SIDE, CLASSES, BATCH = (4, 6, 8), 4, 5, 3
# accepts any error: the guard has tests of its own
ANY = 1e30
KEEPS = {
    "states": Keep(),
    "bits": Keep("bits"),
    "bits, 2": Keep("bits", 2),
    "anchors": Keep("anchors"),
    "anchors, 1": Keep("anchors", 1),
    "anchors, 2": Keep("anchors", 2),
    "anchors, 3, repair": Keep("anchors", 3, on_flip="repair"),
}


class Own(nn.Module):
    """Convolutions from below and from deeper stages, a norm, and what all steps share behind spikes."""

    def __init__(self, stage, t, fusion, norm, drop):
        super().__init__()
        c = WIDTHS[stage]
        self.below = nn.Conv2d(WIDTHS[max(stage - 1, 0)], c, 3, padding=1)
        deeper = [] if t == 0 else WIDTHS[stage + 1 :] if fusion == "all_deeper" else WIDTHS[stage + 1 : stage + 2]
        self.deeper = nn.ModuleList(nn.Conv2d(d, c, 1) for d in deeper)
        self.norm = nn.BatchNorm2d(c) if norm else nn.Identity()
        self.drop, self.fire = nn.Dropout(drop), Threshold()

    def forward(self, shared, below, *deeper):
        w = self.below(below)
        for conv, one in zip(self.deeper, deeper, strict=True):
            w = w + conv(one)
        w = self.norm(w)
        # in front of weights: states of exactly 0 lie on the edge of the window, where any rounding flips it
        return w + shared(self.drop(self.fire(w)))


def make(T=4, *, kind="free", a=0.5, fusion="adjacent", norm=True, drop=0.0, learn=True, grid=None, seed=0, heads=True):
    torch.manual_seed(seed)
    gains = Gains(WIDTHS, T, kind=kind, learn=learn)
    if kind == "free":
        for raw in gains.raw:
            nn.init.constant_(raw, a)
    named = {"early": Head("state", nn.Linear(WIDTHS[-1], CLASSES)), "final": Head("spikes", nn.Linear(8, CLASSES))}
    return CoupledSteps(
        [[Own(stage, t, fusion, norm, drop) for stage in range(len(WIDTHS))] for t in range(T)],
        gains,
        shared=[nn.Conv2d(c, c, 1) for c in WIDTHS],
        heads=named,
        # one head stands behind several steps
        head_of=({1: "early", max(1, T // 2): "early"} | {T: "final"}) if heads else {},
        classes=CLASSES,
        fusion=fusion,
        state_grid=grid,
    )


def sequence(T=4, *, repeated=False, dtype=torch.float32):
    """(leaf, what the steps read)."""
    generator = torch.Generator().manual_seed(1)
    leaf = torch.randn(1 if repeated else T, BATCH, WIDTHS[0], SIDE, SIDE, generator=generator, dtype=torch.float64)
    leaf = leaf.to(dtype).requires_grad_()
    return leaf, leaf.expand(T, *leaf.shape[1:]) if repeated else leaf


def outputs_of(block, x, keep, state=None):
    rows, (_, *v) = block(x, state) if keep is None else run_coupled(block, x, state, keep=keep)
    return [rows, *v]


def weighted(outs):
    """Every output times numbers that are always the same."""
    generator = torch.Generator().manual_seed(3)
    return sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum() for o in outs)


def step(block, keep, *, repeated=False, dtype=torch.float32, T=None, seed=2):
    """(outputs, gradients by name) of one run; random numbers start from `seed`."""
    leaf, x = sequence(T or block.timesteps, repeated=repeated, dtype=dtype)
    torch.manual_seed(seed)
    outs = outputs_of(block, x, keep)
    named = {"x": leaf} | {name: p for name, p in block.named_parameters() if p.requires_grad}
    made = torch.autograd.grad(weighted(outs), list(named.values()), allow_unused=True)
    return [o.detach() for o in outs], dict(zip(named, made, strict=True))


def assert_lively(outs, grads, share=0.8):
    spikes = torch.cat([threshold.spikes(v).flatten().float() for v in outs[1:]])
    assert 0.05 < spikes.mean() < 0.95, "a silent or saturated block proves nothing"
    moved = [g is not None and bool(g.abs().max() > 0) for g in grads.values()]
    assert sum(moved) > share * len(moved), "zero gradients prove nothing"


def assert_equal(got, wanted, tolerance=0.0, without=()):
    """Gradients by name, the same ones missing; `tolerance` over the largest of each."""
    assert got.keys() == wanted.keys()
    for name, b in wanted.items():
        a = got[name]
        if any(word in name for word in without):
            continue
        # a tensor that only a mask stands in front of may have no gradient, or one of zeros
        a, b = (torch.zeros(1) if one is None else one for one in (a, b))
        if tolerance == 0:
            assert torch.equal(*torch.broadcast_tensors(a, b)), f"{name}: {float((a - b).abs().max()):.2e}"
        else:
            error = float((a - b).abs().max() / b.abs().max().clamp(min=1))
            assert error <= tolerance, f"{name}: {error:.2e}"


def test_spike_and_window():
    v = torch.tensor([-0.1, 0, 0.25, 0.5, 0.75, 1, 1.1, math.nan], requires_grad=True)
    s = threshold.fire(v)
    s.sum().backward()
    assert s.tolist() == [0, 0, 0, 1, 1, 1, 1, 0]
    assert v.grad.tolist() == [0, 1, 1, 1, 1, 1, 0, 0]
    assert threshold.spikes(v).tolist() == s.bool().tolist()
    assert threshold.window(v).tolist() == v.grad.bool().tolist()
    assert torch.equal(Threshold()(v), s)


class Factor(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(value, dtype=torch.float64))


class Scalar(nn.Module):
    def __init__(self, p=None):
        super().__init__()
        self.p = p

    def forward(self, shared, below, *deeper):
        return shared.w * below + sum(self.p.w * one for one in deeper)


@pytest.mark.parametrize("keep", [None, *KEEPS.values()])
def test_two_scalar_stages_by_hand(keep, monkeypatch):
    """T = 2: F_1 = w1 x + p s(v_2[t-1]), F_2 = w2 s(v_1[t]), a = 1/2; worked out with pencil and paper."""
    w1, w2, p = Factor(0.5), Factor(0.625), Factor(0.25)
    gains = Gains((1, 1), 2, kind="free").double()
    branches = [[Scalar(), Scalar()], [Scalar(p), Scalar()]]
    block = CoupledSteps(branches, gains, shared=[w1, w2], heads={}, head_of={}, classes=1)
    x = torch.ones(1, 1, 1, dtype=torch.float64, requires_grad=True)
    undone = recorded(monkeypatch)
    rows, v_1, v_2 = outputs_of(block, x.expand(2, 1, 1), keep)
    assert rows.shape == (0, 1, 1)
    assert (v_1.item(), v_2.item()) == (1.0, 0.9375)
    made = torch.autograd.grad(v_2.sum(), [x, w1.w, w2.w, p.w, *gains.raw])
    assert [one.tolist() for one in made[1:4]] == [1.34765625, 1.65625, 0.625]
    assert made[0].item() == 0.673828125
    assert [one.tolist() for one in made[4:]] == [[0.0, 0.3125], [0.0, 0.625]]
    if keep in (Keep("bits"), Keep("anchors")):
        assert [one.item() for one in undone] == [0.625, 0.5]


def recorded(monkeypatch):
    """The states that backward undoes, in its order: the last step first, the deepest stage first."""
    found, undo = [], coupled_function._Backward._undone

    def undone(carried, a):
        found.append(undo(carried, a))
        return found[-1]

    monkeypatch.setattr(coupled_function._Backward, "_undone", staticmethod(undone))
    return found


@pytest.mark.parametrize(
    ("T", "a", "repeated"),
    [(1, 0.5, False), (2, 0.9, True), (4, 0.5, False), (4, 0.9, True), (8, 0.5, True), (8, 0.9, False)],
)
@pytest.mark.parametrize(
    ("keep", "fusion"),
    [(k, "adjacent") for k in KEEPS] + [(k, "all_deeper") for k, keep in KEEPS.items() if keep.kind != "bits"],
)
def test_gradients_in_float64(T, a, repeated, keep, fusion):
    ours, twin = (make(T, a=a, fusion=fusion).double() for _ in range(2))
    got, d_got = step(ours, KEEPS[keep], repeated=repeated, dtype=torch.float64)
    wanted, d_wanted = step(twin, None, repeated=repeated, dtype=torch.float64)
    assert_lively(wanted, d_wanted, 0.7 if T == 1 else 0.8)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    assert_equal(d_got, d_wanted, 1e-10)
    # statistics moved once, as in plain training
    assert all(torch.equal(x, y) for x, y in zip(ours.buffers(), twin.buffers(), strict=True))
    assert {int(b) for name, b in ours.named_buffers() if name.endswith("tracked")} == {1}


@pytest.mark.parametrize("kind", ["free", "bounded", "one"])
@pytest.mark.parametrize("repeated", [False, True])
def test_gradients_to_the_bit_in_float32(repeated, kind):
    wanted, d_wanted = step(make(kind=kind), None, repeated=repeated)
    assert_lively(wanted, d_wanted)
    for keep in (Keep(), Keep("bits"), Keep("bits", 2 if kind != "one" else None), Keep("anchors"), Keep("anchors", 2)):
        got, d_got = step(make(kind=kind), keep, repeated=repeated)
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
        # gains read states, which the inverse rounds
        assert_equal(d_got, d_wanted, without=() if keep.kind == "states" else ("gains",))
        assert_equal(d_got, d_wanted, 1e-4)


def test_gains_that_do_not_learn_leave_bits_exact():
    got, wanted = (step(make(8, a=0.25, learn=False), keep)[1] for keep in (Keep("bits"), None))
    assert_equal(got, wanted)


def test_a_grid_makes_the_way_back_exact(monkeypatch):
    wanted, d_wanted = step(make(16, kind="one", grid=14), None)
    assert_lively(wanted, d_wanted)
    for v in wanted[1:]:
        assert torch.equal(v * 2**14, (v * 2**14).round())
    undone = recorded(monkeypatch)
    for keep in (Keep("anchors"), Keep("anchors", 3), Keep("bits")):
        _, d_got = step(make(16, kind="one", grid=14), keep)
        assert_equal(d_got, d_wanted)
    assert len(undone) == 15 * 3 + 10 * 3
    states, block = forward_states(make(16, kind="one", grid=14)), 45
    for i, v in enumerate(undone[:block]):
        assert torch.equal(v, states[14 - i // 3][2 - i % 3])


def forward_states(block):
    """v[t] of every step, by plain autograd."""
    x, state, found = sequence(block.timesteps)[1], None, []
    for one in x.split(1):
        state = block(one, state)[1]
        found.append([v.detach() for v in state[1:]])
    return found


@pytest.mark.parametrize(("a", "T"), [(0.5, 8), (0.5, 16), (0.9, 16), (0.25, 8)])
def test_the_error_of_the_inverse_lies_below_its_bound(a, T, monkeypatch):
    """Kept spikes: rounding grows by 1 / a per step and no further."""
    block = make(T, a=a, norm=False)
    states = forward_states(block)
    undone = recorded(monkeypatch)
    step(block, Keep("bits", None, ANY))
    assert len(undone) == 3 * (T - 1)
    largest = max(float(v.abs().max()) for row in states for v in row)
    for i, v in enumerate(undone):
        j = 1 + i // 3
        error = float((v - states[T - 1 - j][2 - i % 3]).abs().max())
        assert error <= ROUNDINGS * inverse_error(j, a, largest, torch.float32)
    assert error > 0, "no rounding proves nothing"


def test_the_bound_by_hand():
    for dtype, eps in ((torch.float32, 2.0**-24), (torch.float64, 2.0**-53)):
        assert inverse_error(3, 0.5, 8.0, dtype) == pytest.approx(eps * 8 * (2**3 - 1) / 0.5)
        assert inverse_error(3, 1.0, 8.0, dtype) == pytest.approx(eps * 8 * 3)


@pytest.mark.parametrize("fusion", ["adjacent", "all_deeper"])
@pytest.mark.parametrize("keep", [None, Keep(), Keep("anchors", None, ANY), Keep("anchors", 2, ANY)])
def test_derivative_of_the_smooth_twin(keep, fusion, monkeypatch):
    """With clamp(v, 0, 1) for the threshold, whose derivative the window is: finite differences, in all tensors."""

    def smooth(v):
        return v.clamp(0, 1)

    monkeypatch.setattr(threshold, "fire", smooth)
    monkeypatch.setattr("spikefit.neurons.threshold.fire", smooth)
    # what backward hands to branches in the place of spikes
    monkeypatch.setattr(threshold, "spikes", smooth)
    monkeypatch.setattr(coupled_function, "mark", lambda v: torch.zeros((), dtype=torch.int64))
    monkeypatch.setattr("spikefit.layers.coupled_keep.mark", lambda v: torch.zeros((), dtype=torch.int64))
    monkeypatch.setattr(coupled_function, "output_mark", lambda v: torch.zeros((), dtype=torch.int64))
    monkeypatch.setattr("spikefit.layers.coupled_keep.output_mark", lambda v: torch.zeros((), dtype=torch.int64))
    block = make(3, fusion=fusion, norm=False, a=0.7).double()
    names, parameters = zip(*block.named_parameters(), strict=True)
    leaf = sequence(3, dtype=torch.float64)[0][:, :1, :, :2, :2].detach().requires_grad_()

    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block

        def forward(self, x):
            return tuple(outputs_of(self.block, x, keep))

    net = Running()

    def run(x, *tensors):
        return functional_call(net, {f"block.{n}": t for n, t in zip(names, tensors, strict=True)}, (x,))

    assert torch.autograd.gradcheck(run, (leaf, *parameters), eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("keep", KEEPS.values())
def test_pieces_with_a_state_equal_one_call(keep):
    """Logits, and gradients through the states between the pieces."""
    wanted, d_wanted = step(make(5, norm=False).double(), None, dtype=torch.float64)
    for cuts in ([2, 3], [1, 1, 3], [4, 1]):
        block = make(5, norm=False).double()
        leaf, x = sequence(5, dtype=torch.float64)
        rows, state = [], block.init_state(BATCH, (4, 4, 4))[0]
        for piece in x.split(cuts):
            made, state = run_coupled(block, piece, state, keep=keep)
            rows.append(made)
        assert state[0] == 5
        outs = [torch.cat(rows), *state[1:]]
        assert all(torch.equal(a, b) for a, b in zip(outs, wanted, strict=True))
        named = {"x": leaf} | dict(block.named_parameters())
        made = torch.autograd.grad(weighted(outs), list(named.values()), allow_unused=True)
        assert_equal(dict(zip(named, made, strict=True)), d_wanted, 1e-10)


@pytest.mark.parametrize("keep", [k for k in KEEPS if k != "anchors, 1"])
def test_autocast_is_that_of_forward_and_states_stay_wide(keep):
    """Branches in bfloat16, forward and backward; backward itself is called outside."""
    found = []
    for one in (KEEPS[keep], None):
        block = make()
        leaf, x = sequence()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outs = outputs_of(block, x, one)
        assert all(v.dtype == torch.float32 for v in outs[1:])
        named = {"x": leaf} | dict(block.named_parameters())
        made = torch.autograd.grad(weighted(outs), list(named.values()), allow_unused=True)
        found.append((outs, dict(zip(named, made, strict=True))))
    (got, d_got), (wanted, d_wanted) = found
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not torch.equal(wanted[1], step(make(), None)[0][1]), "autocast did nothing"
    assert_lively([wanted[0], *wanted[1:]], d_wanted)
    # plain autograd keeps one copy of a weight in bfloat16 for all steps and adds up there
    assert_equal(d_got, d_wanted, 2e-2, without=("shared", "heads"))


@pytest.mark.parametrize("keep", KEEPS.values())
def test_random_numbers_are_drawn_again_and_the_generator_left_alone(keep):
    ours, twin = make(drop=0.3), make(drop=0.3)
    got, d_got = step(ours, keep)
    after = torch.rand(3)
    wanted, d_wanted = step(twin, None)
    assert torch.equal(after, torch.rand(3))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert_equal(d_got, d_wanted, without=("gains",))
    assert_equal(d_got, d_wanted, 1e-4)


@pytest.mark.parametrize("keep", KEEPS.values())
def test_evaluation_has_gradients_too(keep):
    ours, twin = make().double(), make().double()
    for block in (ours, twin):
        step(block, None, dtype=torch.float64, seed=5)  # moves the statistics
        block.eval()
    got, d_got = step(ours, keep, dtype=torch.float64)
    wanted, d_wanted = step(twin, None, dtype=torch.float64)
    assert_lively(wanted, d_wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert_equal(d_got, d_wanted, 1e-10)
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("keep", KEEPS.values())
def test_hooks_fire_once_with_the_gradient(keep):
    block, twin = make(), make()
    seen = {}
    for name, p in block.named_parameters():
        p.register_hook(lambda g, name=name: seen.setdefault(name, []).append(g.clone()))
    leaf, x = sequence()
    weighted(outputs_of(block, x, keep)).backward()
    weighted(outputs_of(twin, sequence()[1], None)).backward()
    for name, p in twin.named_parameters():
        if p.grad is not None and p.grad.abs().max() > 0:
            assert len(seen[name]) == 1, name
            torch.testing.assert_close(seen[name][0], p.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert leaf.grad is not None


@pytest.mark.parametrize("keep", KEEPS.values())
def test_frozen_parameters_and_an_input_without_gradient(keep):
    wanted = step(make(), None)[1]
    block = make()
    for part in (block.branches[1][0], block.shared[2], block.heads["early"]):
        part.requires_grad_(False)
    frozen = {name for name, p in block.named_parameters() if not p.requires_grad}
    got = step(block, keep)[1]
    assert_equal(got, {k: g for k, g in wanted.items() if k not in frozen}, 1e-4)
    block = make()
    outs = outputs_of(block, sequence()[1].detach(), keep)
    made = torch.autograd.grad(weighted(outs), list(block.parameters()), allow_unused=True)
    names = [name for name, _ in block.named_parameters()]
    assert_equal(dict(zip(names, made, strict=True)), {k: g for k, g in wanted.items() if k != "x"}, 1e-4)
    if keep.kind == "bits":
        # with gains that learn nothing no states are kept
        keep = Keep("bits")
    everything = make().requires_grad_(False)
    leaf, x = sequence()
    weighted(outputs_of(everything, x, keep)).backward()
    torch.testing.assert_close(leaf.grad, wanted["x"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keep", KEEPS.values())
def test_what_only_some_outputs_say(keep):
    """The gradient of logits alone, of one state alone, and of nothing that a parameter reaches."""
    for i in range(4):
        found = []
        for one in (keep, None):
            block = make().double()
            leaf, x = sequence(dtype=torch.float64)
            named = {"x": leaf} | dict(block.named_parameters())
            value = weighted([outputs_of(block, x, one)[i]])
            found.append(
                dict(zip(named, torch.autograd.grad(value, list(named.values()), allow_unused=True), strict=True))
            )
        assert_equal(*found, 1e-10)


@pytest.mark.parametrize("keep", KEEPS.values())
def test_second_derivatives_second_backwards_and_changes_in_place(keep):
    block = make()
    leaf, x = sequence()
    value = weighted(outputs_of(block, x, keep))
    with pytest.raises(StrategyError, match="expected a first derivative"):
        torch.autograd.grad(value, leaf, create_graph=True)
    first = torch.autograd.grad(value, leaf, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, leaf)[0])
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()
    for name in ("branches.2.1.below.weight", "shared.0.weight", "heads.final.net.weight"):
        value = weighted(outputs_of(block, x, keep))
        with torch.no_grad():
            block.get_parameter(name).mul_(1.5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()


def test_without_gradients_nothing_is_kept():
    with torch.no_grad():
        outs = outputs_of(make(), sequence()[1], Keep("anchors"))
    assert not any(o.requires_grad for o in outs)


@pytest.mark.parametrize(
    ("keep", "kind", "learn", "bytes_per_step"),
    [
        (Keep(), "free", True, 4),
        (Keep("bits"), "free", False, 1 / 4),
        (Keep("bits", None, ANY), "free", True, 1 / 4),
        (Keep("anchors", None, ANY), "free", True, 0),
        (Keep("anchors"), "one", True, 0),
    ],
)
def test_kept_bytes_against_steps(keep, kind, learn, bytes_per_step):
    """Beside parameters and gains: states or 2 bits of them, and marks of 8 bytes a stage."""

    def held(T, keep, grid=None):
        block = make(T, kind=kind, learn=learn, norm=False, heads=False, grid=grid)
        x = sequence(T, repeated=True)[1]
        storages = {p.untyped_storage().data_ptr(): p for p in block.parameters()}
        own = sum(p.untyped_storage().nbytes() for p in storages.values())
        return saved_bytes(lambda: outputs_of(block, x, keep)) - own

    elements = sum(WIDTHS) * SIDE**2 * BATCH
    # of what branches gave, and of spikes
    marks = 8 * len(WIDTHS) * (2 if keep.kind == "anchors" else 1)
    for T in (4, 8):
        assert held(2 * T, keep) - held(T, keep) == T * (bytes_per_step * elements + marks)
        if kind == "one":
            assert held(2 * T, keep, 14) == held(T, keep, 14)
        assert held(2 * T, None) - held(T, None) > T * 8 * elements


class Later(nn.Module):
    """Gives another output once `moved` is set."""

    def __init__(self, net):
        super().__init__()
        self.net, self.moved = net, 0.0

    def forward(self, *args):
        return self.net(*args) + self.moved


def test_an_output_that_would_flip_a_spike_is_noticed_where_it_is():
    block = make(norm=False)
    block.branches[2][1] = later = Later(block.branches[2][1])
    outs = outputs_of(block, sequence()[1], Keep("anchors"))
    later.moved = 0.5
    # stage 2 behind step 2 would come from what stage 2 of step 3 makes
    with pytest.raises(ReconstructionError, match=r"stage 2 of step 3 gave another output"):
        weighted(outs).backward()


def test_on_a_grid_the_sum_of_all_marks_notices():
    for moved, noticed in ((0.5, True), (0.0, False)):
        block = make(norm=False, kind="one", grid=14)
        block.branches[2][1] = later = Later(block.branches[2][1])
        outs = outputs_of(block, sequence()[1], Keep("anchors"))
        later.moved = moved
        if noticed:
            with pytest.raises(ReconstructionError, match=r"stage \d gave another output"):
                weighted(outs).backward()
        else:
            weighted(outs).backward()


def test_states_on_the_edge_of_the_window_are_noticed_and_repaired():
    """A dropped output leaves a state of exactly 0, which comes back as 0 plus rounding, and the window is closed."""

    class Dropped(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.drop = net, nn.Dropout(0.5)

        def forward(self, *args):
            return self.drop(self.net(*args))

    found = []
    for keep in (None, Keep("anchors", on_flip="repair"), Keep("anchors")):
        block = make(norm=False)
        for t in range(4):
            block.branches[t] = nn.ModuleList(Dropped(net) for net in block.branches[t])
        if keep is not None and keep.on_flip == "raise":
            with pytest.raises(ReconstructionError, match="behind step"):
                step(block, keep)
        else:
            found.append(step(block, keep)[1])
    assert_equal(*found, without=("gains",))
    assert_equal(*found, 1e-4)


@pytest.mark.parametrize("fusion", ["adjacent", "all_deeper"])
@pytest.mark.parametrize("every", [None, 6])
def test_spikes_that_rounding_flips_are_noticed_and_repaired(every, fusion):
    """a = 1/4 over 12 steps, from the last state alone: rounding grows to the size of a state."""
    _, wanted = step(make(12, a=0.25, fusion=fusion, norm=False), None)
    with pytest.raises(ReconstructionError, match=r"spikes of stage \d behind step \d+"):
        step(make(12, a=0.25, fusion=fusion, norm=False), Keep("anchors", None, ANY))
    _, got = step(make(12, a=0.25, fusion=fusion, norm=False), Keep("anchors", every, ANY, "repair"))
    if fusion == "adjacent":
        # all that branches read are spikes
        assert_equal(got, wanted, without=("gains",))
    assert_equal(got, wanted, 0.05)


def test_a_kept_state_that_is_changed_is_repaired():
    """The nudge stays within a window, so that nothing but the inverse sees it."""
    _, wanted = step(make(norm=False).double(), None, dtype=torch.float64)
    for on_flip in ("raise", "repair"):
        block = make(norm=False).double()
        leaf, x = sequence(dtype=torch.float64)
        outs = outputs_of(block, x, Keep("anchors", None, ANY, on_flip))
        value = weighted(outs)
        v = outs[1].data
        inside = (v > 0.6) & (v < 0.7)
        assert inside.any()
        v[inside] += 0.2
        named = {"x": leaf} | dict(block.named_parameters())
        if on_flip == "raise":
            with pytest.raises(ReconstructionError, match="stage 1 behind step 3"):
                value.backward()
            continue
        made = torch.autograd.grad(value, list(named.values()), allow_unused=True)
        assert_equal(dict(zip(named, made, strict=True)), wanted, 1e-10)


def numbers_in(message):
    """(a, R, E, safe A) of the message of the guard."""
    found = re.search(
        r"\|a\| down to (\S+), where \|v\| up to R = (\S+) leaves an error of up to E = (\S+) in", message
    )
    safe = re.search(r"the largest safe anchor_every is (\d+)", message)
    return (*map(float, found.groups()), int(safe.group(1)))


@pytest.mark.parametrize("kind", ["anchors", "bits"])
@pytest.mark.parametrize("every", [None, 12])
def test_the_guard_names_the_largest_safe_distance(kind, every):
    block, T = make(16, a=0.25, norm=False), 16
    largest = max(float(v.abs().max()) for row in forward_states(block) for v in row)
    with pytest.raises(StrategyError, match=f"anchor_every={every}") as error:
        outputs_of(block, sequence(T)[1], Keep(kind, every))
    smallest, seen, bound, safe = numbers_in(str(error.value))
    assert smallest == 0.25
    assert seen == pytest.approx(largest, rel=5e-3)
    undone = T - 1 if every is None else every - 1
    assert bound == pytest.approx(ROUNDINGS * inverse_error(undone, 0.25, largest, torch.float32), rel=0.05)
    for word in (
        "float64",
        "torch.float32",
        "0.001 accepted",
        "spike_bits" if kind == "anchors" else "step_checkpoint",
    ):
        assert word in str(error.value)
    outputs_of(block, sequence(T)[1], Keep(kind, safe))
    with pytest.raises(StrategyError):
        outputs_of(block, sequence(T)[1], Keep(kind, safe + 1))
    outputs_of(block, sequence(T)[1], Keep(kind, every, ANY))
    outputs_of(block.double(), sequence(T, dtype=torch.float64)[1], Keep(kind, every))


def test_bits_need_no_guard_where_gains_do_not_learn():
    outputs_of(make(16, a=0.25, learn=False), sequence(16)[1], Keep("bits"))
    outputs_of(make(16, a=0.25), sequence(16)[1], Keep("states"))


@pytest.mark.parametrize("value", [0.0, 5e-4, -5e-4, math.nan])
@pytest.mark.parametrize("keep", [Keep("anchors"), Keep("bits"), Keep("anchors", 1)])
def test_gains_too_small_to_divide_by(keep, value):
    block = make(norm=False)
    state = block.state_dict()
    state["gains.raw.1"][2 * WIDTHS[1] + 3] = value  # stage 2 of step 3
    block.load_state_dict(state)
    words = rf"at least 0\.001 for gain='free', got {abs(value):g} in stage 2 of step 3"
    with pytest.raises(StrategyError, match=words):
        outputs_of(block, sequence()[1], keep)
    outputs_of(block, sequence()[1], Keep())
    # a of the first step multiplies nothing
    first = make(norm=False)
    with torch.no_grad():
        first.gains.raw[0][: WIDTHS[0]] = 0.0
    outputs_of(first, sequence()[1], keep)


def test_bounded_gains_stay_in_their_range():
    gains = Gains((2,), 3, kind="bounded")
    assert torch.equal(torch.stack([row[0] for row in gains()]), torch.full((3, 2), 0.75))
    with torch.no_grad():
        gains.raw[0].copy_(torch.tensor([-40.0, -5, 0, 5, 40, 1]))
    a = torch.cat([row[0] for row in gains()])
    assert a.min() == 0.5
    assert a.max() == 1
    torch.testing.assert_close(a, 0.5 + 0.5 * torch.sigmoid(gains.raw[0]))
    block = make(kind="bounded", norm=False)
    with torch.no_grad():
        block.gains.raw[0].fill_(math.nan)
    with pytest.raises(StrategyError, match=r"at least 0\.5 for gain='bounded', got nan in stage 1 of step 2"):
        outputs_of(block, sequence()[1], Keep("anchors"))
    assert torch.equal(torch.cat([row[0] for row in Gains((2,), 2, kind="free")()]), torch.full((4,), 0.5))
    assert Gains((2,), 3, kind="one")() == [[None]] * 3
    assert not Gains((2,), 3, learn=False).raw[0].requires_grad
    with pytest.raises(OptionError, match="free, bounded, one, got 'half'"):
        Gains((2,), 3, kind="half")


class Scaled(nn.Module):
    """Reads a tensor that it does not own."""

    def __init__(self, net, scale):
        super().__init__()
        self.net, self.scale = net, [scale]

    def forward(self, *args):
        return self.net(*args) * self.scale[0]


@pytest.mark.parametrize("keep", KEEPS.values())
def test_a_tensor_that_is_no_parameter_of_the_branch_is_refused(keep):
    """It would get no gradient, in silence."""
    outside = nn.Parameter(torch.tensor(1.5))
    block = make(norm=False)
    block.branches[2][1] = Scaled(block.branches[2][1], outside)
    with pytest.raises(StrategyError, match=r"stage 2 of step 3 depends on a tensor .* no parameter of it"):
        weighted(outputs_of(block, sequence()[1], keep)).backward()


def test_bad_blocks_and_states_are_refused():
    with pytest.raises(OptionError, match="adjacent, all_deeper, got 'none'"):
        make(fusion="none")
    with pytest.raises(OptionError, match=r"state_grid=14 .* gain='free' multiplies states"):
        make(grid=14)
    with pytest.raises(StrategyError, match=r"all_deeper.*analog.*step_checkpoint.*reversible"):
        outputs_of(make(fusion="all_deeper"), sequence()[1], Keep("bits"))
    block, x = make(), sequence()[1]
    with pytest.raises(ShapeError, match=r"4 time steps.*0 have run.*up to 4 more, got 5.*timesteps=5"):
        block(sequence(5)[1])
    state = block(x)[1]
    with pytest.raises(ShapeError, match="4 have run"):
        block(x[:1], state)
    with pytest.raises(StateError, match="an initial state is not accepted"):
        block(x, (0, *state[1:]))
    with pytest.raises(StateError, match=r"step of 0 to 4, got step 9"):
        block(x[:1], (9, *state[1:]))
    with pytest.raises(StateError, match="3 states of 3 samples"):
        block(x[:1], (2, *state[2:]))
    with pytest.raises(StateError, match=r"float32 or float64 .*torch\.bfloat16"):
        block(x[:1], (2, *(v.bfloat16() for v in state[1:])))
    with pytest.raises(StateError, match="got list"):
        block(x, [0])
    other = make()
    other.branches[1][1].forward = lambda shared, below, *deeper: below.new_zeros(BATCH, WIDTHS[1], 2, 2)
    with pytest.raises(ShapeError, match=r"stage 2 must have one shape in all steps, expected \(3, 6, 4, 4\)"):
        other(x)


def test_a_state_that_leaves_its_grid_is_refused():
    block = make(norm=False, kind="one", grid=14)
    with torch.no_grad():
        block.branches[1][2].below.bias.fill_(2000.0)
    for keep in (None, Keep("anchors")):
        with pytest.raises(RangeError, match="CoupledSteps stage 3"):
            outputs_of(block, sequence()[1], keep)


def test_a_repeated_input_is_looked_at_once():
    leaf, x = sequence(repeated=True)
    block = make()
    assert len({one.data_ptr() for one in block.inputs(x)}) == 1
    weighted(outputs_of(block, x, Keep())).backward()
    assert leaf.grad.shape == leaf.shape


def test_smooth_windows_agree_with_clamp():
    """The window is the derivative of clamp(v, 0, 1), also on its edges."""
    v = torch.linspace(-1, 2, 301, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(F.hardtanh(v, 0, 1).sum() + v.sum() * 0, v)[0]
    got = torch.autograd.grad(threshold.fire(v).sum(), v)[0]
    edge = (v == 0) | (v == 1)
    assert torch.equal(got[~edge], wanted[~edge])


@pytest.mark.parametrize("keep", KEEPS.values())
def test_heads_may_draw_random_numbers(keep):
    runs = []
    for how in (None, keep):
        block = make(drop=0.0)
        for head in block.heads.values():
            head.net = nn.Sequential(nn.Dropout(0.5), head.net)
        runs.append(step(block.double(), how, dtype=torch.float64))
    (outs, wanted), (_, got) = runs
    assert_lively(outs, wanted)
    assert_equal(got, wanted, 1e-10)


class Restless(nn.Module):
    """A branch whose output depends on how often it ran."""

    def __init__(self, net):
        super().__init__()
        self.net, self.runs = net, 0

    def forward(self, shared, below, *deeper):
        self.runs += 1
        return self.net(shared, below, *deeper) + 2.0**-12 * self.runs


@pytest.mark.parametrize("fusion", ["adjacent", "all_deeper"])
@pytest.mark.parametrize("keep", [k for k in KEEPS.values() if k.kind != "anchors"] + [Keep("anchors", 1, ANY)])
def test_a_branch_that_does_not_repeat_itself_is_noticed(keep, fusion):
    if fusion == "all_deeper" and keep.kind == "bits":
        pytest.skip("bits do not hold analog states")
    block = make(fusion=fusion)
    block.branches[2][1] = Restless(block.branches[2][1])
    rows, _ = run_coupled(block, sequence()[1], keep=keep)
    with pytest.raises(ReconstructionError, match=r"stage 2 of step 3 gave another output .*bptt"):
        rows.sum().backward()


@pytest.mark.parametrize("keep", KEEPS.values())
def test_evaluation_between_forward_and_backward_is_noticed(keep):
    block = make()
    rows, _ = run_coupled(block, sequence()[1], keep=keep)
    block.eval()
    with pytest.raises(ReconstructionError, match=r"another output .*model\.eval\(\) between steps only"):
        rows.sum().backward()


def test_what_was_repaired_is_compared_too():
    block = make(fusion="all_deeper", norm=False)
    for branch in block.branches[1]:
        branch.below = Restless2(branch.below)
    rows, _ = run_coupled(block, sequence()[1], keep=Keep("anchors", 3, ANY, "repair"))
    with pytest.raises(ReconstructionError, match="another output"):
        rows.sum().backward()


class Restless2(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.runs = net, 0

    def forward(self, x):
        self.runs += 1
        return self.net(x) + (self.runs - 1)


def test_on_a_grid_a_branch_that_does_not_repeat_itself_is_noticed():
    block = make(kind="one", grid=14)
    block.branches[2][1] = Restless(block.branches[2][1])
    rows, _ = run_coupled(block, sequence()[1], keep=Keep("anchors"))
    with pytest.raises(ReconstructionError, match="gave another output"):
        rows.sum().backward()


@pytest.mark.parametrize("keep", KEEPS.values())
def test_a_branch_that_changes_its_input_in_place_is_refused(keep):
    block = make()
    block.branches[0][0].below = nn.Sequential(nn.SiLU(inplace=True), block.branches[0][0].below)
    x = sequence()[0].detach().to(memory_format=torch.contiguous_format)
    x = torch.stack([one.contiguous(memory_format=torch.channels_last) for one in x])
    with pytest.raises(StrategyError, match=r"stage 1 of step 1 has changed its input in place.*inplace=False"):
        run_coupled(block, x, keep=keep)


def test_options_without_effect_are_refused():
    with pytest.raises(StrategyError, match=r"spike_bits: .*gains learn nothing"):
        run_coupled(make(learn=False), sequence()[1], keep=Keep("bits", 2))
    with pytest.raises(StrategyError, match=r"state_grid=14 .*nothing to repair"):
        run_coupled(make(kind="one", grid=14), sequence()[1], keep=Keep("anchors", None, on_flip="repair"))


def test_a_refused_batch_moves_no_statistics():
    block = make(T=16, a=0.3)
    before = {name: b.clone() for name, b in block.named_buffers()}
    with pytest.raises(StrategyError, match="largest safe anchor_every"):
        run_coupled(block, sequence(16)[1], keep=Keep("anchors"))
    assert all(torch.equal(b, before[name]) for name, b in block.named_buffers())


def test_gains_above_one_are_bounded_by_one():
    block = make(T=4, a=1.5, norm=False)
    with pytest.raises(StrategyError, match=r"largest safe anchor_every is ([2-9]|\d\d)"):
        run_coupled(block, sequence(4)[1] * 1000, keep=Keep("anchors", None, 3e-3))


def test_messages_of_a_grid_call_its_option_by_name():
    with pytest.raises(OptionError, match="CoupledSteps: state_grid is the number"):
        make(kind="one", grid=30)
    block = make(kind="one", grid=20, norm=False)
    with pytest.raises(RangeError, match=r"state_grid=16.*state_grid=None"):
        block(sequence()[1] * 100)


def test_parts_that_do_not_belong_together_are_refused():
    def build(**changed):
        block = make()
        options = {"heads": dict(block.heads), "head_of": block.head_of, "classes": CLASSES, "shared": block.shared}
        return CoupledSteps(block.branches, changed.pop("gains", block.gains), **(options | changed))

    build()
    with pytest.raises(OptionError, match="gains for 5 steps"):
        build(gains=Gains(WIDTHS, 5))
    with pytest.raises(OptionError, match="2 stages"):
        build(gains=Gains(WIDTHS[:2], 4))
    with pytest.raises(OptionError, match="2 shared modules"):
        build(shared=list(make().shared)[:2])
    for head_of in ({7: "final"}, {1: "fnal"}):
        with pytest.raises(OptionError, match="head_of says which"):
            build(head_of=head_of)
    with pytest.raises(OptionError, match="reads must be 'spikes' or 'state', got 'spike'"):
        Head("spike", nn.Linear(8, 5))
    with pytest.raises(ShapeError, match="at least one sample"):
        make()(torch.zeros(4, 0, 4, 4, 4))


@pytest.mark.parametrize("shape", [(3, 5, 7, 7), (3, 5, 7), (3, 5), (2, 3, 3, 5, 2)])
def test_codes_take_two_bits_whatever_the_shape(shape):
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = packed_codes(v)
    assert packed.numel() == -(-v.numel() // 4)
    codes = unpacked_codes(packed, v.shape)
    assert torch.equal(codes & 1 == 1, threshold.spikes(v))
    assert torch.equal(codes >> 1 == 1, threshold.window(v))
    assert codes.stride() == laid_out(v).stride()

"""The two-group node: three strategies give one gradient, on three backends, and its inverse errs as much as it says.

Triton runs in its interpreter here: its cases are few and small. The same cases run compiled in tests/gpu.
"""

import warnings

import pytest
import torch

from spikefit.errors import BackendError, OptionError, ReconstructionError, ShapeError, StateError, StrategyError
from spikefit.ops.node import Reversal, cpu, reference, reversing, two_group
from spikefit.ops.node.equation import (
    LONGEST,
    TwoGroups,
    forward_multiplier,
    reverse_growth,
    reverse_multiplier,
    safe_steps,
)
from spikefit.ops.surrogate import atan, fast_sigmoid, rect, sigmoid, triangle
from support import KERNELS, NODE_RESETS, TRITON, assert_same_node_run, backends_called, dyadic, run_node, saved_bytes

SURROGATES = [atan(2), triangle(1), rect(1), rect(1, closed=True), sigmoid(4), fast_sigmoid(25)]
REVERSED = ["streamlined", "generic"]


def make(alpha=0.4, kappa=0.5, **options):
    known = {"beta": 0.5, "v_threshold": 1.0, "v_reset": 0.0, "detach_reset": False, "surrogate": atan(2)}
    return TwoGroups.make(alpha=alpha, kappa=kappa, **(known | options))


def inputs(T, *shape, dtype=torch.float64, seed=0):
    """Random currents [T, *shape] that make about a third of the neurons fire, and a state [*shape] != 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, *shape, generator=generator, dtype=torch.float64) * 1.5 + 0.5
    v_0 = torch.rand(*shape, generator=generator, dtype=torch.float64) - 0.25
    return x.to(dtype), v_0.to(dtype)


def test_multipliers_have_their_known_values():
    assert reverse_multiplier(0.5, 0.5) == pytest.approx(4, abs=1e-12)
    assert reverse_multiplier(0.4, 0.5) == pytest.approx(5.51, abs=0.005)
    assert reverse_multiplier(0.3, 0.5) == pytest.approx(8.53, abs=0.005)
    for kappa in (0.25, 0.5, 0.9, 1.0):
        assert forward_multiplier(kappa, kappa) == pytest.approx(1, abs=1e-14)
        assert reverse_multiplier(kappa, kappa) == pytest.approx(kappa**-2)
    assert forward_multiplier(0.3, 0.5) == pytest.approx(0.77, abs=0.005)
    assert [safe_steps(make(alpha), torch.float32) for alpha in (0.1, 0.3, 0.4, 0.5)] == [2, 4, 5, 7]
    assert safe_steps(make(0.5), torch.float64) == 21
    assert safe_steps(make(0.8, 0.9), torch.float32) == 29
    assert safe_steps(make(1.0, 1.0), torch.float32) == LONGEST
    assert safe_steps(make(1e-7), torch.float32) == 0


def test_the_multiplier_is_that_of_the_linear_map():
    """Without spikes a step is linear in the state; its eigenvalues are the growth forwards, inverted backwards."""
    for alpha, kappa in ((0.4, 0.5), (0.3, 0.5), (0.8, 0.9)):
        node = make(alpha, kappa, v_threshold=1e9)
        unit = torch.eye(2, dtype=torch.float64)
        zero = torch.zeros(2, dtype=torch.float64)
        columns = torch.stack(reference.step(zero, zero, unit[0], unit[1], node).state)
        found = torch.linalg.eigvals(columns).abs()
        # the output of one group drives the other, and at x = 0 it is 0
        assert float(found.max()) == pytest.approx(forward_multiplier(alpha, kappa))
        assert 1 / float(found.min()) == pytest.approx(reverse_multiplier(alpha, kappa))


@pytest.mark.parametrize("reset", NODE_RESETS)
def test_the_inverse_returns_inputs_and_state(reset):
    node = make(**NODE_RESETS[reset])
    x, v_0 = inputs(4, 3, 6, 5)
    done, states = reference.forward(x, v_0, node, every=1), [v_0]
    states += [*done.anchors, done.v_T]
    assert torch.equal(done.y, reference.two_group(x, v_0, node)[0])
    rate = done.counts.double().mean() / (3 * 3 * 5)
    assert 0.05 < rate < 0.95
    for t in range(4):
        back = reference.undo(*done.y[t].chunk(2, 1), *states[t + 1].chunk(2, 1), node)
        assert (torch.cat(back.outer, 1) - x[t]).abs().max() < 1e-14
        assert (torch.cat(back.state, 1) - states[t]).abs().max() < 1e-14
        assert [int(s.sum()) for s in back.s] == done.counts[t].tolist()


@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("reset", NODE_RESETS)
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_three_strategies_give_one_gradient(backend, reset, detach_reset):
    options = NODE_RESETS[reset] | {"detach_reset": detach_reset}
    for T in range(1, 9):
        x, v_0 = inputs(T, 2, 6, 7, seed=T)
        wanted = run_node("reference", "bptt", x, v_0, **options)
        tolerance = max(1e-12, 10 * reverse_growth(T, make(), torch.float64))
        assert_same_node_run(run_node(backend, "bptt", x, v_0, **options), wanted, 1e-12)
        for name in REVERSED:
            assert_same_node_run(run_node(backend, name, x, v_0, **options), wanted, tolerance)
            for every in (1, 3):
                got = run_node(backend, name, x, v_0, anchor_every=every, **options)
                assert_same_node_run(got, wanted, 1e-12)


@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("reset", NODE_RESETS)
@pytest.mark.parametrize("strategy", ["bptt", *REVERSED])
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_match_the_reference_in_float32(backend, strategy, reset, detach_reset):
    options = NODE_RESETS[reset] | {"detach_reset": detach_reset, "check": "spikes"}
    x, v_0 = inputs(5, 2, 6, 7, dtype=torch.float32)
    got = run_node(backend, strategy, x, v_0, anchor_every=3, **options)
    assert_same_node_run(got, run_node("reference", "bptt", x, v_0, **options), 2e-5)


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_each_surrogate(backend, surrogate):
    # numbers on a grid, and a slope of rect that rounding cannot move over its edge
    x, v_0 = dyadic(3, 2, 4, 5, high=3.0) + 0.01, dyadic(2, 4, 5, low=-0.5, high=0.75, seed=1)
    wanted = run_node("reference", "bptt", x, v_0, surrogate=surrogate)
    for strategy in ("bptt", *REVERSED):
        assert_same_node_run(run_node(backend, strategy, x, v_0, surrogate=surrogate), wanted, 1e-4)


@pytest.mark.parametrize("reset", NODE_RESETS)
@pytest.mark.parametrize("surrogate", [atan(2), sigmoid(4), fast_sigmoid(5)], ids=str)
def test_the_written_gradient_is_the_derivative_of_the_smooth_twin(monkeypatch, reset, surrogate):
    """With the smooth step in the place of the threshold, finite differences know the gradient."""
    monkeypatch.setattr(reference, "fire", lambda u, theta, equation: equation.surrogate.primitive(u - theta))
    node = make(surrogate=surrogate, **NODE_RESETS[reset])
    x, v_0 = inputs(4, 2, 4, 3)
    done = reference.forward(x, v_0, node, every=2)
    generator = torch.Generator().manual_seed(1)
    g, q = (torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (done.y, done.v_T))
    dx, dv_0, _ = reference.streamlined(g, q, done.y, done.v_T, done.anchors, node, 2)

    def loss(x, v_0):
        y, v_T, *_ = reference.forward(x, v_0, node, 99)
        return float((y * g).sum() + (v_T * q).sum())

    for t, d in ((x, dx), (v_0, dv_0)):
        for i in range(0, t.numel(), 5):
            step = torch.zeros(t.numel(), dtype=t.dtype)
            step[i] = 1e-5
            step = step.view_as(t)
            pair = [loss(x + k * step, v_0) if t is x else loss(x, v_0 + k * step) for k in (1, -1)]
            assert float(d.flatten()[i]) == pytest.approx((pair[0] - pair[1]) / 2e-5, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.permute(0, 1, 4, 2, 3),
        lambda x: x[:1].expand(3, *x.shape[1:]),
        lambda x: x.flatten(2)[:, :, :62],
        lambda x: x[..., ::2],
    ],
    ids=["channels last", "repeated", "no space, strided", "strided"],
)
def test_layouts(backend, view):
    x = view(inputs(3, 2, 4, 3, 8, dtype=torch.float32)[0])
    v_0 = inputs(1, *x.shape[1:], dtype=torch.float32, seed=3)[1].transpose(0, 1).contiguous().transpose(0, 1)
    wanted = run_node("reference", "bptt", x, v_0)
    for strategy in ("bptt", *REVERSED):
        assert_same_node_run(run_node(backend, strategy, x, v_0, anchor_every=2), wanted, 2e-5)


@pytest.mark.parametrize(("backend", "B", "C", "space"), [
    ("numba", 3, 2, 2100), ("numba", 700, 8, 1), pytest.param("triton", 3, 4, 100, marks=TRITON.marks),
])  # fmt: skip
def test_several_tiles_and_a_ragged_end(backend, B, C, space):
    x, v_0 = inputs(2, B, C, space, dtype=torch.float32)
    wanted = run_node("reference", "bptt", x, v_0)
    for strategy in ("bptt", *REVERSED):
        assert_same_node_run(run_node(backend, strategy, x, v_0, check="spikes"), wanted, 2e-5)


@pytest.mark.parametrize(("alpha", "kappa"), [(0.1, 0.5), (0.3, 0.5), (0.5, 0.5), (0.8, 0.9)])
def test_the_state_comes_back_as_well_as_the_bound_says_and_no_further(alpha, kappa):
    """rms error of the state: below 0.01 after the steps that are allowed, above it after twice as many."""
    node, errors = make(alpha, kappa), []
    allowed = safe_steps(node, torch.float32)
    for steps in (allowed, 2 * allowed):
        x, _ = inputs(steps, 4, 64, 8, dtype=torch.float32)
        done, state = reference.forward(x, torch.zeros_like(x[0]), node, every=steps), None
        state = done.v_T.chunk(2, 1)
        for t in reversed(range(steps)):
            state = reference.undo(*done.y[t].chunk(2, 1), *state, node).state
        errors.append(float(torch.cat(state, 1).square().mean().sqrt()))
    assert errors[0] < 1e-2 < errors[1]


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("alpha", [0.3, 0.4, 0.5])
def test_anchors_keep_long_sequences_right(backend, alpha):
    x, v_0 = inputs(64, 2, 16, 8, dtype=torch.float32)
    wanted = run_node("reference", "bptt", x, v_0, alpha=alpha)
    assert_same_node_run(run_node(backend, "streamlined", x, v_0, alpha=alpha, anchor_every=4), wanted, 1e-4)
    with pytest.warns(UserWarning, match="gradients will be off"):
        far = run_node(backend, "streamlined", x, v_0, alpha=alpha, anchor_every=16, check="off")
    assert not (far["d x"] - wanted["d x"]).abs().max() < 1e-4


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("strategy", REVERSED)
def test_states_take_no_memory_per_step(backend, strategy):
    def held(T, every, check="off"):
        x, v_0 = inputs(T, 2, 8, 5)
        x, options = x.requires_grad_(), {"check": check, "backend": backend}
        with_outputs = saved_bytes(lambda: two_group(x, v_0, reversal=Reversal(strategy, every), **options))
        return with_outputs - x.nbytes  # the outputs, which the next layer keeps anyway

    state = 8 * 2 * 8 * 5
    assert [held(T, None) for T in (1, 4, 8, 12)] == [state] * 4, "independent of T"
    assert [held(T, 4) for T in (1, 4, 5, 8, 13)] == [n * state for n in (1, 1, 2, 2, 4)], "ceil(T / K) states"
    assert held(12, None, "spikes") - held(12, None) == 12 * 2 * 8, "two integers per step and group"


@pytest.mark.parametrize(
    ("options", "each"),
    [
        ({"v_reset": 0.0, "detach_reset": False}, 3),
        ({"v_reset": 0.0, "detach_reset": True}, 2),
        ({"v_reset": None, "detach_reset": False}, 1),
        ({"v_reset": None, "detach_reset": True}, 1),
    ],
    ids=["hard attached", "hard detached", "soft attached", "soft detached"],
)
def test_plain_autograd_keeps_so_many_values_per_neuron_and_step(options, each):
    for T in (4, 20):
        x, v_0 = inputs(T, 2, 8, 5)
        x = x.requires_grad_()
        loop = saved_bytes(lambda x=x, v_0=v_0: two_group(x, v_0, **options, backend="reference"))
        assert loop == each * x.nbytes
        kernel = saved_bytes(lambda x=x, v_0=v_0: two_group(x, v_0, **options, backend="numba"))
        assert kernel == x.nbytes, "the membranes alone"


@pytest.mark.parametrize(
    ("dtype", "alpha", "kappa", "every", "T", "ratio"),
    [
        (torch.float64, 0.5, 0.5, None, 20, 60),
        (torch.float32, 0.8, 0.9, None, 20, 60),
        (torch.float32, 0.8, 0.8, None, 20, 60),
        (torch.float32, 0.4, 0.5, 4, 64, 12),
    ],
    ids=["float64, alpha .5", "float32, kappa .9", "float32, kappa .8", "anchors"],
)
def test_ratio_of_states_and_a_right_gradient_go_together(dtype, alpha, kappa, every, T, ratio):
    options = {"alpha": alpha, "kappa": kappa}
    x, v_0 = inputs(T, 2, 8, 25, dtype=dtype)
    leaf = x.clone().requires_grad_()
    held = [
        saved_bytes(lambda r=r: two_group(leaf, v_0, **options, reversal=r, check="off", backend="reference"))
        for r in (None, Reversal("streamlined", every))
    ]
    assert held[0] / (held[1] - x.nbytes) == ratio
    wanted = run_node("reference", "bptt", x, v_0, **options)
    for backend in ("reference", "numba"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = run_node(backend, "streamlined", x, v_0, anchor_every=every, check="spikes", **options)
        assert_same_node_run(got, wanted, 1e-3)


@pytest.mark.parametrize("strategy", REVERSED)
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
def test_wrong_spikes_are_found_and_named(backend, strategy):
    x, v_0 = inputs(8, 2, 16, 20, dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"anchor_every=8 undoes up to 8 steps.*rho=56\.8.*anchor_every is 2"):
        y, _ = two_group(
            x.requires_grad_(), v_0, alpha=0.1, check="spikes", reversal=Reversal(strategy, 8), backend=backend
        )
    with pytest.raises(ReconstructionError, match=rf"\({strategy}\) found \d+ spikes in group [12] at step [1-7] of 8"):
        y.sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("strategy", REVERSED)
@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_membranes_that_meet_the_threshold_exactly_are_refused(backend, strategy, dtype):
    generator = torch.Generator().manual_seed(0)
    x = (2 * torch.randn(4, 2, 4000, generator=generator)).round().to(dtype)
    v_0 = torch.zeros_like(x[0])
    with pytest.raises(ReconstructionError, match=r"a membrane at the threshold.*strategy='bptt', or finer inputs"):
        run_node(backend, strategy, x, v_0)
    wanted, unchecked = run_node(backend, "bptt", x, v_0), run_node(backend, strategy, x, v_0, check="off")
    assert (unchecked["d x"] - wanted["d x"]).abs().max() > 0.01 * wanted["d x"].abs().max()
    finer = x + 0.37 * torch.rand(x.shape, generator=generator, dtype=dtype)
    assert_same_node_run(run_node(backend, strategy, finer, v_0), run_node(backend, "bptt", finer, v_0), 1e-3)


def test_generic_compares_its_second_forward_too(monkeypatch):
    """The inverse counts right, the forward after it one spike more."""
    x, v_0 = inputs(4, 2, 4, 5)
    y, _ = two_group(x.requires_grad_(), v_0, reversal=Reversal("generic", 2), backend="numba")
    forward = cpu.forward

    def one_more(*arguments):
        forward(*arguments)
        arguments[6].add_(1)

    monkeypatch.setattr(cpu, "forward", one_more)
    with pytest.raises(ReconstructionError, match=r"\(generic\) found \d+ spikes in group 2 at step 4 of 4"):
        y.sum().backward()


def test_generic_of_the_reference_counts_both_passes():
    x, v_0 = inputs(5, 2, 4, 5)
    done = reference.forward(x, v_0, make(), every=2)
    zeros = torch.zeros_like(done.v_T)
    *_, found = reference.generic(torch.ones_like(x), zeros, done.y, done.v_T, done.anchors, make(), 2)
    assert torch.equal(found, torch.stack([done.counts, done.counts]))
    # a kept state serves the forward of the run after it and the inverse of the run before it
    done.anchors[0] += 3
    *_, found = reference.generic(torch.ones_like(x), zeros, done.y, done.v_T, done.anchors, make(), 2)
    assert torch.equal(found[0, 2:], done.counts[2:])
    assert not torch.equal(found[1, 2:], done.counts[2:])


def test_the_check_names_the_step_that_backward_meets_first():
    x, v_0 = inputs(4, 2, 6, 5)
    done = reference.forward(x, v_0, make(), every=4)
    y, _ = two_group(x.requires_grad_(), v_0, check="spikes", reversal=Reversal("streamlined", None))
    counts = y.grad_fn.saved_tensors[3].data  # without a note that they were changed
    assert torch.equal(counts, done.counts)
    counts[0] += 1
    counts[2, 0] += 1
    with pytest.raises(ReconstructionError, match=rf"found {int(done.counts[2, 0])} spikes in group 1 at step 3 of 4"):
        y.sum().backward()


def test_without_anchors_a_long_sequence_is_refused():
    x, v_0 = inputs(16, 2, 4, 5, dtype=torch.float32)
    with pytest.raises(
        StrategyError, match=r"16 steps would be undone.*rho=5\.51.*float32.*anchor_every is 5; or raise"
    ):
        two_group(x, v_0, reversal=Reversal("streamlined", None))
    two_group(x[:5], v_0, reversal=Reversal("streamlined", None))
    two_group(x.double()[:13], v_0.double(), reversal=Reversal("streamlined", None))
    with pytest.raises(StrategyError, match=r"one step undone already.*Raise alpha, use float64"):
        two_group(x, v_0, alpha=1e-7, reversal=Reversal())


def test_anchors_by_default_are_as_far_as_is_safe_and_at_most_four():
    found = [Reversal().distance(make(alpha), 64, torch.float32) for alpha in (0.1, 0.3, 0.4, 0.5)]
    assert found == [2, 4, 4, 4]
    assert Reversal().distance(make(), 3, torch.float32) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Reversal(anchor_every=5).distance(make(), 64, torch.float32) == 5
        assert Reversal(anchor_every=50).distance(make(), 5, torch.float32) == 5, "no more than 5 steps are undone"


@pytest.mark.parametrize("beta", [1e-3, -1e-3, 10.0, -10.0])
def test_gradients_are_right_at_the_ends_of_beta(beta):
    for reset in NODE_RESETS.values():
        x, v_0 = inputs(8, 2, 16, 20, dtype=torch.float32)
        wanted = run_node("numba", "bptt", x, v_0, beta=beta, **reset)
        got = run_node("numba", "streamlined", x, v_0, beta=beta, anchor_every=4, **reset)
        assert_same_node_run(got, wanted, 5e-3)


def test_warnings_point_at_the_caller():
    with pytest.warns(UserWarning, match="gradients will be off") as found:
        two_group(inputs(8, 2, 4, 5, dtype=torch.float32)[0], reversal=Reversal("streamlined", 8))
    assert found[0].filename == __file__


@pytest.mark.parametrize("strategy", REVERSED)
def test_backward_runs_the_backend_of_the_forward(strategy):
    x, v_0 = inputs(3, 2, 4, 5)

    def step():
        y, _ = two_group(x.clone().requires_grad_(), v_0, reversal=Reversal(strategy), backend="numba")
        y.sum().backward()

    assert backends_called(step, "two_group") == {"numba"}


@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.parametrize("strategy", REVERSED)
def test_inputs_and_gradients_are_left_alone_and_a_graph_serves_twice(backend, strategy):
    x, v_0 = inputs(5, 2, 4, 6, dtype=torch.float32)
    g, q = torch.randn_like(x), torch.randn_like(v_0)
    before = [t.clone() for t in (x, v_0, g, q)]
    leaf = x.requires_grad_()
    y, v_T = two_group(leaf, v_0, reversal=Reversal(strategy, 2), backend=backend)
    kept = y.detach().clone(), v_T.detach().clone()
    first, second = (torch.autograd.grad([y, v_T], leaf, [g, q], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    for now, then in zip((x, v_0, g, q, y, v_T), (*before, *kept), strict=True):
        assert torch.equal(now, then)
    # only one of the two results is used
    (alone,) = torch.autograd.grad(v_T, leaf, q, retain_graph=True)
    (both,) = torch.autograd.grad([y, v_T], leaf, [torch.zeros_like(g), q])
    assert torch.equal(alone, both)


def test_outputs_changed_in_place_are_noticed():
    x, v_0 = inputs(3, 2, 4, 5)
    y, _ = two_group(x.requires_grad_(), v_0, reversal=Reversal())
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(("backend", "reversal"), [("numba", None), ("numba", Reversal()), ("reference", Reversal())])
def test_second_derivatives_are_refused(backend, reversal):
    x, v_0 = inputs(3, 2, 4, 5)
    x.requires_grad_()
    y, _ = two_group(x, v_0, reversal=reversal, backend=backend)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(BackendError, match=r"first derivatives only.*backend='reference'"):
        gradient.sum().backward()


def test_the_context_reaches_what_runs_inside_and_nothing_else():
    from spikefit.ops.node.reversal import active_reversal

    assert active_reversal() is None
    with reversing("generic", anchor_every=2):
        assert active_reversal() == Reversal("generic", 2)
        with reversing():
            assert active_reversal() == Reversal("streamlined", "auto")
        assert active_reversal() == Reversal("generic", 2)
    assert active_reversal() is None


X, V = torch.zeros(4, 2, 6, 3), torch.zeros(2, 6, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: two_group(X[:, :, :5]), ShapeError, r"even number of channels.*got 5 in \(4, 2, 5, 3\); take"),
        (lambda: two_group(X[:, :, :0]), ShapeError, "even number of channels.*got 0"),
        (lambda: two_group(X[:0]), ShapeError, r"at least one time step.*T = 0"),
        (lambda: two_group(X[0, 0]), ShapeError, r"expected x as \[T, B, C, ...\], got \(6, 3\)"),
        (lambda: two_group(X.bfloat16()), ShapeError, "expected float32 or float64, got torch.bfloat16.*autocast"),
        (lambda: two_group(X.half()), ShapeError, "got torch.float16"),
        (lambda: two_group(X.int()), ShapeError, r"got torch.int32: .*real numbers. Pass x.float\(\)"),
        (lambda: two_group(X.bool()), ShapeError, "got torch.bool: .*Pass x.float"),
        (lambda: two_group(X, V.bfloat16()), StateError, r"expected a state \(2, 6, 3\) torch.float32.*got.*bfloat16"),
        (lambda: two_group(X, V[:1]), StateError, r"got \(1, 6, 3\).*Pass the state of this batch"),
        (lambda: two_group(X, alpha=0.0), OptionError, r"alpha must lie in \(0, kappa\].*divides.*got 0.0"),
        (lambda: two_group(X, alpha=-0.1), OptionError, r"alpha must lie in \(0, kappa\]"),
        (
            lambda: two_group(X, alpha=0.7),
            OptionError,
            r"at most kappa, here 0.5, got 0.7.*grow by 1.24 per step.*Lower",
        ),
        (lambda: two_group(X, alpha=float("nan")), OptionError, "alpha must be a finite number, got nan"),
        (lambda: two_group(X, beta=0), OptionError, "beta must not be 0.*take beta=0.5"),
        (
            lambda: two_group(X, beta=1000.0),
            OptionError,
            r"\|beta\| must lie in \[0.001, 10\], got 1000.*input hides the spike",
        ),
        (lambda: two_group(X, beta=-1e-4), OptionError, r"got -0.0001.*spike hides the input; take beta=0.5"),
        (lambda: two_group(X, kappa=0.0), OptionError, r"kappa must lie in \(0, 1\].*got 0.0"),
        (lambda: two_group(X, kappa=1.5), OptionError, r"kappa must lie in \(0, 1\]"),
        (lambda: two_group(X, v_threshold=0.0), OptionError, "v_threshold must be a finite number > 0"),
        (lambda: two_group(X, v_reset=float("inf")), OptionError, "v_reset must be a finite number"),
        (lambda: two_group(X, check="all"), OptionError, "check must be one of off, spikes, got 'all'"),
        (lambda: Reversal("stream"), StrategyError, "one of streamlined, generic, got 'stream'"),
        (lambda: Reversal(anchor_every=0), StrategyError, "at least 1, None for none, or 'auto', got 0"),
        (lambda: Reversal(anchor_every=2.5), StrategyError, "got 2.5"),
        (lambda: Reversal(anchor_every=True), StrategyError, "got True"),
        (lambda: two_group(X.double(), backend="triton"), BackendError, "Triton kernels compute in float32"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_half_precision_under_autocast_is_converted():
    x, _ = inputs(3, 2, 4, 5, dtype=torch.float32)
    leaf = x.bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, v = two_group(leaf, reversal=Reversal())
    assert (y.dtype, v.dtype) == (torch.float32, torch.float32)
    assert torch.equal(y, two_group(leaf.detach().float())[0])
    y.sum().backward()
    assert leaf.grad.dtype == torch.bfloat16
    assert leaf.grad.abs().max() > 0

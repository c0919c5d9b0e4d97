"""The scan of windows: every backend gives the same spikes and membranes bit for bit, and the gradients of a loop that
is written on its own. Triton runs in its interpreter here; the same cases run compiled in tests/gpu."""

import pytest
import torch

from spikefit.ops.surrogate import atan, fast_sigmoid, rect, sigmoid, triangle
from spikefit.ops.window_scan import Link, Links, apart, behind, in_turn, reference, window_scan
from spikefit.ops.window_scan.links import NOTHING
from support import KERNELS, TRITON, assert_close, assert_same_spikes, backends_called, dyadic
from window_runs import (
    FUSIONS,
    RESETS,
    assert_same_scan,
    by_hand,
    graded,
    inputs,
    links_of,
    run_scan,
)

BACKENDS = ["reference", *KERNELS]
NAMES = ["in_turn", "behind", "across", "across_release", "apart"]
SURROGATES = [atan(2), triangle(1), rect(1), rect(1, closed=True), sigmoid(4), fast_sigmoid(25)]
ONLY_REFERENCE = ["omega_release", "tanh", "sigmoid"]


def loop(x, given, name, fuse, **options):
    """`by_hand`, forward and backward, in the form of `run_scan`."""
    leaves = {"d x": x.clone().requires_grad_()}
    if name not in ("in_turn", "apart"):
        leaves["d given"] = given.clone().requires_grad_()
    spikes, membranes = by_hand(leaves["d x"], leaves.get("d given"), name, fuse, **options)
    return graded({"spikes": spikes, "membranes": membranes}, leaves)


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_a_loop_on_exact_numbers(backend, name, reset):
    x, given = dyadic(4, 2, 30, low=-1.0, high=2.0), dyadic(4, 2, 30, seed=1)
    for leak in (0.5, 0.4):
        got = run_scan(backend, x, given, name, "a", leak=leak, reset=reset)
        assert_same_scan(got, loop(x, given, name, "a", leak=leak, reset=reset), 1e-5)


@pytest.mark.parametrize("fuse", [*FUSIONS, *ONLY_REFERENCE])
@pytest.mark.parametrize("name", NAMES)
def test_the_reference_equals_a_loop_with_the_functions_of_torch(name, fuse):
    x, given = (t.double() for t in inputs(4, 2, 300))
    for reset in RESETS:
        got = run_scan("reference", x, given, name, fuse, reset=reset, phi=0.7)
        wanted = loop(x, given, name, fuse, reset=reset, phi=0.7)
        assert_same_spikes(got["spikes"], wanted["spikes"])
        for key in got.keys() - {"spikes"}:
            assert_close(got[key], wanted[key], 1e-12, key)


@pytest.mark.parametrize("name", NAMES)
def test_omega_in_float32_is_as_close_as_rounding_allows(name):
    x, given = inputs(4, 2, 2000)
    got, wanted = run_scan("reference", x, given, name, "omega"), loop(x, given, name, "omega")
    assert_close(got["membranes"], wanted["membranes"], 1e-6)
    clear = (wanted["membranes"] - 0.5).abs() > 1e-5
    assert clear.float().mean() > 0.99
    assert torch.equal(got["spikes"][clear], wanted["spikes"][clear])


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("fuse", FUSIONS)
@pytest.mark.parametrize("backend", KERNELS)
def test_rounding_is_that_of_the_reference(backend, fuse, reset):
    """Numbers with all their bits in use: one fused multiply-add or another order of operations would show."""
    for name in NAMES if backend == "numba" else ["behind", "across"]:
        x, given = inputs(4, 3, 1500 if backend == "numba" else 100)
        options = {"reset": reset, "phi": 0.7, "leak": 0.9}
        wanted = run_scan("reference", x, given, name, fuse, **options)
        assert_same_scan(run_scan(backend, x, given, name, fuse, **options), wanted, 2e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_wide_arguments_of_the_sine(backend):
    x, given = inputs(2, 2, 20000 if backend == "numba" else 300)
    x, given = 400 * x, 400 * given
    wanted = run_scan("reference", x, given, "across", "omega", v_threshold=50.0)
    assert_same_scan(run_scan(backend, x, given, "across", "omega", v_threshold=50.0), wanted, 1e-4)


@pytest.mark.parametrize("windows", [1, 2, 3, 7])
@pytest.mark.parametrize("name", ["in_turn", "behind", "across", "apart"])
@pytest.mark.parametrize("backend", KERNELS)
def test_number_of_windows(backend, name, windows):
    x, given = inputs(windows, 2, 5, 9)
    assert_same_scan(run_scan(backend, x, given, name, "omega"), run_scan("reference", x, given, name, "omega"), 1e-5)


@pytest.mark.parametrize("fuse", ["sum", "omega"])
@pytest.mark.parametrize("backend", KERNELS)
def test_links_of_ones_own(backend, fuse):
    """Far membranes, a tensor given for a later window, and one read by several windows twice over."""
    pairs = [
        (Link("given", 3), Link("given", 3)),
        (Link("made", 0), NOTHING),
        (NOTHING, Link("given", 3)),
        (Link("made", 0), Link("made", 0)),
    ]
    x, given = inputs(4, 2, 200)
    links, runs = Links(tuple(pairs)), []
    for run in (backend, "reference"):
        leaves = {"d x": x.clone().requires_grad_(), "d given": given.clone().requires_grad_()}
        s, m = window_scan(leaves["d x"], leaves["d given"], links=links, fuse=fuse, reset="soft", backend=run)
        runs.append(graded({"spikes": s, "membranes": m}, leaves))
    assert_same_scan(*runs, 1e-5)
    assert runs[0]["d given"][:3].abs().max() == 0
    assert runs[0]["d given"][3].abs().max() > 0


@pytest.mark.parametrize("surrogate", SURROGATES, ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_each_surrogate(backend, surrogate):
    x, given = inputs(3, 3, 31)
    runs = [run_scan(b, x, given, "behind", "omega", surrogate=surrogate) for b in (backend, "reference")]
    assert_same_scan(*runs, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_known_answer(backend):
    """Leak 0.4, threshold 0.5, inputs 0.4 and 0.4: membranes 0.4 and 0.56. A membrane of exactly 0.5 does not fire."""
    spikes, membranes = window_scan(torch.full((2, 1, 1), 0.4), links=in_turn(2), fuse="a", backend=backend)
    assert spikes.flatten().tolist() == [0, 1]
    torch.testing.assert_close(membranes.flatten(), torch.tensor([0.4, 0.56]))
    level = torch.tensor([0.5, 0.5000001, 0.4999999]).view(1, 1, 3)
    assert window_scan(level, links=in_turn(1), fuse="a", backend=backend)[0].flatten().tolist() == [0, 1, 0]
    loose, _ = window_scan(level, links=in_turn(1), fuse="a", strict=False, backend=backend)
    assert loose.flatten().tolist() == [1, 1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["in_turn", "across"])
@pytest.mark.parametrize("backend", KERNELS)
def test_half_precision(backend, name, dtype, monkeypatch):
    if backend == "numba":
        from spikefit.ops.window_scan import cpu

        monkeypatch.setattr(cpu, "HALF_BLOCK", 4096)  # one block of neurons at a time: the last cut is ragged
    x, given = inputs(4, 3, 700 if backend == "numba" else 50, dtype=dtype)
    got, wanted = (run_scan(b, x, given, name, "omega", reset="soft") for b in (backend, "reference"))
    assert got["spikes"].dtype == got["d x"].dtype == dtype
    assert got["membranes"].dtype == torch.float32
    assert_same_scan(got, wanted, 8e-3 if dtype == torch.bfloat16 else 1e-3)
    quiet = [run_scan(b, x, given, name, "omega", want_membranes=False) for b in (backend, "reference")]
    assert_same_scan(*quiet, 8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("backend", KERNELS)
def test_channels_last_is_read_as_it_lies(backend):
    x, given = inputs(3, 2, 5, 4, 3)
    last = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    got = run_scan(backend, last, given, "across", "omega")
    for name in ("spikes", "membranes", "d x"):
        assert got[name].stride() == last.stride(), name
    assert_same_scan(got, run_scan("reference", x, given, "across", "omega"), 1e-5)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x.transpose(0, 1),
        lambda x: x[..., ::2],
        lambda x: x[1:, :, 1:],
        lambda x: x[:1].expand(4, -1, -1),
        lambda x: x[:1, :, ::2].expand(4, -1, -1),
        lambda x: x[:1, :1].expand(4, 3, -1),
        lambda x: x[:, :1].expand(-1, 3, -1),
    ],
    ids=["inner", "windows", "strided", "sliced", "repeated", "repeated, strided", "both repeated", "batch repeated"],
)
@pytest.mark.parametrize("backend", KERNELS)
def test_views(backend, view):
    x, given = (view(t) for t in inputs(4, 3, 32))
    wanted = run_scan("reference", x.contiguous(), given.contiguous(), "across", "omega")
    assert_same_scan(run_scan(backend, x, given, "across", "omega"), wanted, 1e-5)
    assert_same_scan(run_scan(backend, x.contiguous(), given, "across", "omega"), wanted, 1e-5)


@pytest.mark.parametrize("fuse", ONLY_REFERENCE)
def test_a_fusion_without_a_kernel_runs_on_the_reference(fuse):
    x, given = inputs(4, 2, 30)
    assert backends_called(lambda: window_scan(x, given, links=behind(4), fuse=fuse), "window_scan") == set()
    assert backends_called(lambda: window_scan(x, given, links=behind(4)), "window_scan") == {"numba"}


def primitive(surrogate):
    """A `Fire` whose step is the smooth primitive of the surrogate."""

    class Smooth:
        apply = staticmethod(lambda d, *_: surrogate.primitive(d))

    return Smooth


@pytest.mark.parametrize("surrogate", [atan(2), rect(1)], ids=str)
@pytest.mark.parametrize("fuse", [*FUSIONS, *ONLY_REFERENCE])
@pytest.mark.parametrize("name", NAMES)
def test_smooth_twin_by_finite_differences(name, fuse, surrogate, monkeypatch):
    """In double, with the primitive in the place of the step; phi and the threshold are learned."""
    monkeypatch.setattr(reference, "Fire", primitive(surrogate))
    x, given = inputs(4, 1, 2)
    leaves = [x, given, torch.tensor(0.6), torch.tensor(0.45)]
    leaves = [t.double().requires_grad_() for t in leaves]

    def scan(x, given, phi, theta):
        spikes, membranes = by_name(name, x, given, fuse, phi, theta, surrogate)
        # a zero of every input: what a scan does not read has a gradient of zero
        return spikes + 0 * (given.sum() + phi), membranes

    assert torch.autograd.gradcheck(scan, leaves)


def by_name(name, x, given, fuse, phi, theta, surrogate):
    links = links_of(name, len(x))
    given = given if links.reads_given else None
    return window_scan(x, given, links=links, fuse=fuse, phi=phi, v_threshold=theta, surrogate=surrogate)


@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_gradients_of_learned_constants_through_a_detached_reset(reset):
    x, given = (t.double() for t in inputs(4, 2, 40))
    found = []
    for run in ("library", "loop"):
        phi, theta = (torch.tensor(c, dtype=torch.float64, requires_grad=True) for c in (0.6, 0.45))
        if run == "library":
            results = window_scan(x, given, links=behind(4), phi=phi, v_threshold=theta, reset=reset)
        else:
            results = by_hand(x, given, "behind", "omega", phi=phi, theta=theta, reset=reset)
        found.append(graded(dict(zip(("spikes", "membranes"), results, strict=True)), {"phi": phi, "theta": theta}))
    for name in ("phi", "theta"):
        assert found[1][name].abs() > 0.1
        assert_close(found[0][name], found[1][name], 1e-12, name)


@pytest.mark.parametrize("outputs", ["spikes", "membranes"])
@pytest.mark.parametrize("backend", ["numba", TRITON])
def test_only_one_result_is_used(backend, outputs):
    x, given = inputs(4, 2, 40)
    found = []
    for run in (backend, "reference"):
        leaves = [x.clone().requires_grad_(), given.clone().requires_grad_()]
        results = dict(
            zip(("spikes", "membranes"), window_scan(*leaves, links=behind(4), reset="hard", backend=run), strict=True)
        )
        found.append(graded({outputs: results[outputs]}, {"d x": leaves[0], "d given": leaves[1]}))
    for name in ("d x", "d given"):
        assert found[1][name].abs().max() > 0
        assert_close(found[0][name], found[1][name], 1e-5, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_apart_equal_windows_alone(backend):
    x, _ = inputs(4, 2, 40)
    spikes, membranes = window_scan(x, links=apart(4), fuse="none", backend=backend)
    alone = [window_scan(x[p : p + 1], links=in_turn(1), fuse="a", backend=backend) for p in range(4)]
    assert_same_spikes(spikes, torch.cat([s for s, _ in alone]))
    assert torch.equal(membranes, torch.cat([m for _, m in alone]))

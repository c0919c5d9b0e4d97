"""What the scan of windows owes its callers: bytes held, autograd, torch.compile, and one clear sentence for errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spikefit import use_backend
from spikefit.errors import BackendError, OptionError, ShapeError, StateError
from spikefit.ops.window_scan import Link, Links, across, apart, behind, in_turn, window_scan
from support import KERNELS, TRITON, assert_close, backends_called, dyadic, saved_bytes
from window_runs import inputs

BACKENDS = ["reference", *KERNELS]
NEURONS = 2 * 40


@pytest.mark.parametrize("want_membranes", [True, False])
@pytest.mark.parametrize(("links", "tensors"), [(in_turn, 1), (behind, 2), (across, 2)])
@pytest.mark.parametrize("backend", KERNELS)
def test_holds_its_inputs_only(backend, links, tensors, want_membranes):
    def held(windows):
        x, given = (t.requires_grad_() for t in inputs(windows, 2, 40))
        given = None if tensors == 1 else given
        options = {"links": links(windows), "backend": backend, "want_membranes": want_membranes}
        return saved_bytes(lambda: window_scan(x, given, **options))

    assert held(4) == 4 * 4 * tensors * NEURONS
    assert (held(9) - held(4)) / 5 == 4 * tensors * NEURONS


def test_holds_half_precision_as_it_is_and_a_repeated_window_once():
    x, given = inputs(4, 2, 40, dtype=torch.bfloat16)
    assert saved_bytes(lambda: window_scan(x.requires_grad_(), given, links=across(4))) == (2 + 4) * 4 * NEURONS
    repeated = inputs(1, 2, 40)[0].expand(4, -1, -1).requires_grad_()
    assert saved_bytes(lambda: window_scan(repeated, links=in_turn(4))) == 4 * NEURONS


def test_does_not_hold_what_the_fusion_ignores():
    x, given = (t.requires_grad_() for t in inputs(4, 2, 40))
    assert saved_bytes(lambda: window_scan(x, given, links=across(4), fuse="none")) == 4 * 4 * NEURONS


def test_the_reference_holds_more():
    x, given = (t.requires_grad_() for t in inputs(4, 2, 40))
    held = [saved_bytes(lambda b=b: window_scan(x, given, links=across(4), backend=b)) for b in ("numba", "reference")]
    assert held[1] > 2 * held[0]


def test_holds_nothing_without_gradients():
    x, given = inputs(4, 2, 40)
    assert saved_bytes(lambda: window_scan(x, given, links=across(4))) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: window_scan(x.requires_grad_(), given, links=across(4))) == 0


@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend):
    x, given, g, q = (dyadic(3, 2, 5, seed=i) for i in range(4))
    last = dyadic(3, 2, 4, 4, 5).permute(0, 1, 4, 2, 3)
    for links, second in ((across(3), given), (in_turn(3), None)):
        options = (0.5, 0.5, links.codes, "sum", 0.5, "soft", True, "atan", 2.0)
        for gradient in (q, None):
            arguments = (g, gradient, x, second, *options, second is not None, backend)
            torch.library.opcheck(torch.ops.spikefit.window_scan_backward, arguments)
        for want in (True, False):
            leaves = [None if t is None else t.clone().requires_grad_() for t in (x, second)]
            torch.library.opcheck(torch.ops.spikefit.window_scan, (*leaves, *options, want, backend))
            if second is None:
                leaf = last.clone(memory_format=torch.preserve_format).requires_grad_()
                torch.library.opcheck(torch.ops.spikefit.window_scan, (leaf, None, *options, want, backend))


def test_runs_on_tensors_without_values():
    with FakeTensorMode():
        x, given = (torch.empty(4, 2, 5, requires_grad=True) for _ in range(2))
        spikes, membranes = window_scan(x, given, links=across(4), backend="numba")
        dx, dgiven = torch.autograd.grad(spikes.sum() + membranes.sum(), [x, given])
    assert spikes.shape == membranes.shape == dx.shape == dgiven.shape == (4, 2, 5)


@pytest.mark.parametrize("fuse", ["omega", "a"])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compile_traces_without_a_break(backend, fuse):
    def loss(x, given):
        options = {"fuse": fuse, "reset": "soft", "backend": backend}
        spikes, membranes = window_scan(2 * x, given, links=behind(4), **options)
        return (spikes * x).sum() + membranes.square().sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [dyadic(4, 2, 20).requires_grad_(), dyadic(4, 2, 20, seed=1).requires_grad_()]
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    for got, wanted in zip(*gradients, strict=True):
        assert wanted.abs().max() > 0
        assert_close(got, wanted, 1e-6)


def test_learned_constants_compile():
    def loss(x, phi, theta):
        return window_scan(x, links=in_turn(4), fuse="omega", phi=phi, v_threshold=theta)[1].square().sum()

    leaves = [dyadic(4, 2, 20).requires_grad_(), *(torch.tensor(0.5, requires_grad=True) for _ in range(2))]
    wanted = torch.autograd.grad(loss(*leaves), leaves[:2])
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves), leaves[:2])
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivative_is_refused(backend):
    x = dyadic(3, 2, 5).requires_grad_()
    loss = window_scan(x, links=in_turn(3), fuse="a", backend=backend)[0].sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; call window_scan with backend='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_gradients_are_left_alone(backend):
    tensors = [dyadic(4, 2, 40, seed=i) for i in range(4)]
    before = [t.clone() for t in tensors]
    x, given, g, q = tensors
    x, given = x.requires_grad_(), given.requires_grad_()
    results = window_scan(x, given, links=across(4), reset="hard", backend=backend)
    kept = [t.detach().clone() for t in results]
    torch.autograd.grad(results, [x, given], [g, q])
    for now, then in zip((*tensors, *results), (*before, *kept), strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("wanted", ["x", "given"])
@pytest.mark.parametrize("backend", KERNELS)
def test_a_gradient_is_made_only_for_those_who_ask(backend, wanted):
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if op.name() == "spikefit::window_scan_backward":
                made.append(out[1].numel())
            return out

    found = []
    for run in (backend, "reference"):
        tensors = dict(zip(("x", "given"), inputs(4, 3, 20), strict=True))
        tensors[wanted].requires_grad_()
        spikes, membranes = window_scan(**tensors, links=across(4), backend=run)
        with Watch():
            (spikes.sum() + membranes.square().sum()).backward()
        found.append(tensors[wanted].grad)
    assert made == [240 if wanted == "given" else 0]
    assert_close(*found, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_membranes_only_for_those_who_ask(backend):
    x, given = inputs(4, 2, 30)
    spikes, membranes = window_scan(x, given, links=behind(4), backend=backend)
    again, none = window_scan(x, given, links=behind(4), backend=backend, want_membranes=False)
    assert none is None
    assert membranes.shape == x.shape
    assert torch.equal(again, spikes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    x, given = (torch.zeros(4, 0, 3, requires_grad=True) for _ in range(2))
    spikes, membranes = window_scan(x, given, links=across(4), backend=backend)
    (spikes.sum() + membranes.sum()).backward()
    assert spikes.shape == membranes.shape == x.grad.shape == given.grad.shape == (4, 0, 3)


@pytest.mark.parametrize("backend", ["numba", TRITON])
def test_nan_passes_as_in_the_reference(backend):
    x, given = inputs(3, 2, 20)
    x[0, 0, 3] = given[1, 1, 7] = torch.nan
    for fuse in ("omega", "relu"):
        runs = []
        for run in (backend, "reference"):
            leaves = [x.clone().requires_grad_(), given.clone().requires_grad_()]
            results = window_scan(*leaves, links=across(3), fuse=fuse, backend=run)
            gradients = torch.autograd.grad(results, leaves, [torch.ones_like(x)] * 2)
            runs.append([*(t.detach() for t in results), *gradients])
        assert runs[0][1].isnan().sum() == 5, "three windows of one neuron, two of the other"
        for got, wanted in zip(*runs, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_works_inside_activation_checkpointing():
    x = dyadic(4, 2, 40).requires_grad_()

    def loss(x):
        return window_scan(x, links=in_turn(4), fuse="omega")[1].square().sum()

    (wanted,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x)
    assert torch.equal(got, wanted)


def test_auto_takes_the_reference_for_what_only_it_can_run():
    x, given = inputs(4, 2, 20)
    cases = [{"phi": torch.tensor(0.5)}, {"v_threshold": torch.tensor(0.5)}, {"fuse": "tanh"}]
    for options in cases:
        assert not backends_called(lambda o=options: window_scan(x, given, links=behind(4), **o), "window_scan")
    double = [t.double() for t in (x, given)]
    assert not backends_called(lambda: window_scan(*double, links=behind(4)), "window_scan")
    assert backends_called(lambda: window_scan(x, given, links=behind(4)), "window_scan") == {"numba"}
    with use_backend("reference"):
        assert not backends_called(lambda: window_scan(x, given, links=behind(4)), "window_scan")


X = torch.zeros(4, 2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: window_scan(X.int(), links=in_turn(4)), ShapeError, r"expected a floating point current, got .*int32"),
        (
            lambda: window_scan(X[:, 0, 0], links=in_turn(4)),
            ShapeError,
            r"x as \[P, B, ...\], got \(4,\). Windows come",
        ),
        (
            lambda: window_scan(X, links=in_turn(3)),
            ShapeError,
            r"links has 3 windows, x of shape \(4, 2, 3\) has 4; make the links for as many windows as x has",
        ),
        (lambda: window_scan(X, links="in_turn"), OptionError, r"links must be a Links, for example in_turn\(4\), got"),
        (
            lambda: window_scan(X, links=in_turn(4), fuse="omgea"),
            OptionError,
            r"fuse must be one of .*Did you mean omega",
        ),
        (lambda: window_scan(X, links=in_turn(4), fuse=3), OptionError, "fuse must be one of .* got 3"),
        (
            lambda: window_scan(X, links=in_turn(4), reset=None),
            OptionError,
            "reset must be one of none, soft, hard, got",
        ),
        (lambda: window_scan(X, links=in_turn(4), phi=1.5), OptionError, r"phi must lie in \(0, 1\), got 1.5"),
        (lambda: window_scan(X, links=in_turn(4), phi=torch.tensor(-0.5)), OptionError, r"phi must lie .* got -0.5"),
        (lambda: window_scan(X, links=in_turn(4), phi=X), ShapeError, r"phi is a number or a 0-d tensor, got a tensor"),
        (
            lambda: window_scan(X, links=in_turn(4), leak=1.5),
            OptionError,
            r"leak must be a number in \[0, 1\], got 1.5",
        ),
        (
            lambda: window_scan(X, links=in_turn(4), leak=torch.tensor(0.5)),
            OptionError,
            r"leak must be a number in \[0, 1\], got tensor",
        ),
        (
            lambda: window_scan(X, links=in_turn(4), v_threshold=0.0),
            OptionError,
            "v_threshold must be a finite number > 0",
        ),
        (lambda: window_scan(X, links=in_turn(4), surrogate="rct(1)"), OptionError, "did you mean rect"),
        (
            lambda: window_scan(X, links=behind(4)),
            OptionError,
            r"fuse='omega' uses them, and given is None; pass given of shape \(4, 2, 3\), or links .* in_turn\(4\)",
        ),
        (lambda: window_scan(X, X, links=in_turn(4)), OptionError, "no window of these links reads it; leave it out"),
        (
            lambda: window_scan(X, X[:3], links=behind(4)),
            StateError,
            r"expected given \(4, 2, 3\) torch.float32 on cpu, got \(3, 2, 3\)",
        ),
        (
            lambda: window_scan(X, X.double(), links=behind(4)),
            StateError,
            "got .* torch.float64 on cpu. Pass the membranes",
        ),
        (lambda: window_scan(X.half(), X.half(), links=behind(4)), StateError, "torch.float32 on cpu, got .*float16"),
        (lambda: window_scan(X, X.to("meta"), links=behind(4)), StateError, "got .* on meta"),
        (
            lambda: window_scan(X, links=in_turn(4), phi=torch.tensor(0.5), backend="numba"),
            BackendError,
            r"backend='numba': phi is a tensor \(learned\), .*float\(phi\)",
        ),
        (
            lambda: window_scan(X, links=in_turn(4), v_threshold=torch.tensor(0.5), backend="triton"),
            BackendError,
            r"backend='triton': v_threshold is a tensor",
        ),
        (
            lambda: window_scan(X, links=in_turn(4), fuse="tanh", backend="numba"),
            BackendError,
            "fuse='tanh' has no compiled kernel; those with one are none, a, c, sum, mean, relu, omega",
        ),
        (
            lambda: window_scan(X.double(), links=in_turn(4), backend="numba"),
            BackendError,
            "computes in float32, got float64 input. Use backend='auto'",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_source_that_the_fusion_ignores_may_be_missing(backend):
    links = Links(((Link("zeros"), Link("given", 0)), (Link("made", 0), Link("given", 1))))
    x = inputs(2, 2, 30)[0]
    spikes, membranes = window_scan(x, links=links, fuse="a", backend=backend)
    wanted = window_scan(x, links=in_turn(2), fuse="a", backend=backend)
    assert torch.equal(spikes, wanted[0])
    assert torch.equal(membranes, wanted[1])
    assert torch.equal(window_scan(x, links=behind(2), fuse="none", backend=backend)[1], x)
    assert torch.equal(window_scan(x, links=apart(2), backend=backend)[1], x)

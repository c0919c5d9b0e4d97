"""What the LIF op owes its callers: bytes held, autograd, torch.compile, and one clear sentence for bad input."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from spikefit import use_backend
from spikefit.errors import BackendError, OptionError, ShapeError, StateError
from spikefit.ops.lif import lif, lif_backward
from spikefit.ops.surrogate import atan
from support import KERNELS, TRITON, assert_close, dyadic, saved_bytes

BACKENDS = ["reference", *KERNELS]
NEURONS = 2 * 40


def per_neuron_step(make_x, **options):
    """Bytes held between forward and backward, as a slope in T."""

    def held(T):
        x = make_x(T).requires_grad_()
        return saved_bytes(lambda: lif(x, **options))

    return (held(20) - held(8)) / 12 / NEURONS


@pytest.mark.parametrize(("dtype", "wanted"), [(torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 2)], ids=str)
def test_holds_the_input_only(dtype, wanted):
    for options in ({}, {"v_reset": 0.0, "detach_reset": False}, {"leak": torch.tensor(0.5, requires_grad=True)}):
        assert per_neuron_step(lambda T: dyadic(T, 2, 40).to(dtype), backend="numba", **options) == wanted


@pytest.mark.parametrize("backend", KERNELS)
def test_holds_input_and_state_once(backend):
    x, v_0 = dyadic(4, 2, 40).requires_grad_(), dyadic(2, 40).requires_grad_()
    assert saved_bytes(lambda: lif(x, v_0, backend=backend)) == 4 * (4 + 1) * NEURONS


def test_holds_nothing_more_for_a_repeated_step():
    assert per_neuron_step(lambda T: dyadic(1, 2, 40).expand(T, -1, -1), backend="numba") == 0


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, 4),
        ({"v_reset": 0.0}, 8),
        ({"v_reset": 0.0, "detach_reset": False}, 12),
    ],
)
def test_the_reference_holds_what_autograd_holds(options, wanted):
    assert per_neuron_step(lambda T: dyadic(T, 2, 40), leak=0.5, backend="reference", **options) == wanted


def test_holds_nothing_without_gradients():
    assert saved_bytes(lambda: lif(dyadic(4, 2, 40))) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: lif(dyadic(4, 2, 40).requires_grad_())) == 0


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend, learned):
    x, v_0, g, q = (dyadic(*shape, seed=i) for i, shape in enumerate([(3, 2, 5), (2, 5), (3, 2, 5), (2, 5)]))
    coefficients = torch.tensor([0.5, 0.75, 1.0]) if learned else None
    options = (0.5, 0.75, 1.0, "hard", 0.25, 0.0, False, False, "atan", 2.0, None, backend)
    torch.library.opcheck(torch.ops.spikefit.lif_backward, (g, q, x, v_0, coefficients, None, *options, True, learned))
    torch.library.opcheck(torch.ops.spikefit.lif_backward, (g, q, x, v_0, coefficients, g, *options, True, learned))
    inputs = [t if t is None else t.requires_grad_() for t in (x, v_0, coefficients)]
    torch.library.opcheck(torch.ops.spikefit.lif, (*inputs, *options))
    last = dyadic(3, 2, 4, 4, 5).permute(0, 1, 4, 2, 3).requires_grad_()
    torch.library.opcheck(torch.ops.spikefit.lif, (last, torch.zeros_like(last[0]), None, *options))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_compile_traces_without_a_break(backend):
    def loss(x, v_0, leak):
        spikes, v_T = lif(2 * x, v_0, leak=leak, v_reset=0.0, surrogate=atan(3), backend=backend)
        return (spikes * x).sum() + v_T.sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        inputs = [dyadic(4, 2, 20).requires_grad_(), dyadic(2, 20, seed=1).requires_grad_()]
        inputs.append(torch.tensor(0.5, requires_grad=True))
        gradients.append(torch.autograd.grad(function(*inputs), inputs))
    for got, wanted in zip(*gradients, strict=True):
        assert_close(got, wanted, 1e-6)


def test_a_compiled_function_follows_use_backend():
    compiled = torch.compile(lambda x: lif(2 * x)[0].sum(), fullgraph=True, backend="aot_eager")
    x = dyadic(3, 2, 20)
    wanted = lif(2 * x)[0].sum()
    held = []
    for backend in ("auto", "reference", "auto"):
        with use_backend(backend):
            assert compiled(x) == wanted
            held.append(saved_bytes(lambda: compiled(x.clone().requires_grad_())))
    assert held[0] == held[2] != held[1]


@pytest.mark.parametrize("backend", KERNELS)
def test_second_derivative_is_refused(backend):
    x = dyadic(3, 2, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(lif(x, backend=backend)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; call lif with backend='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_and_gradients_are_left_alone(backend):
    x, v_0, g, q = (dyadic(*shape, seed=i) for i, shape in enumerate([(4, 2, 40), (2, 40), (4, 2, 40), (2, 40)]))
    before = [t.clone() for t in (x, v_0, g, q)]
    spikes, v_T = lif(x, v_0, backend=backend)
    kept = spikes.clone(), v_T.clone()
    lif_backward(g, q, x, v_0, spikes, backend=backend)
    lif(x, v_T, backend=backend)
    for now, then in zip((x, v_0, g, q, spikes, v_T), (*before, *kept), strict=True):
        assert torch.equal(now, then)


def test_a_surrogate_may_be_a_text():
    x = dyadic(3, 2, 5).requires_grad_()
    first, second = (torch.autograd.grad(lif(x, surrogate=s)[0].sum(), x)[0] for s in (atan(3), "atan(3)"))
    assert torch.equal(first, second)


def test_works_inside_activation_checkpointing():
    x = dyadic(4, 2, 40).requires_grad_()
    wanted = torch.autograd.grad(lif(x)[0].square().sum(), x)
    got = torch.autograd.grad(checkpoint(lambda x: lif(x)[0].square().sum(), x, use_reentrant=False), x)
    assert torch.equal(got[0], wanted[0])


X, V = torch.zeros(4, 2, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: lif(X.int()),
            ShapeError,
            r"lif: expected a floating point current, got torch.int32; call x.float\(\)",
        ),
        (lambda: lif(X[:, 0, 0]), ShapeError, r"expected x as \[T, B, ...\], got \(4,\). Time comes first: encoding"),
        (lambda: lif(X[:0]), ShapeError, r"at least one time step, got x of shape \(0, 2, 3\) with T = 0"),
        (lambda: lif(X, V[:1]), StateError, r"expected a membrane \(2, 3\) torch.float32 on cpu, got \(1, 3\)"),
        (lambda: lif(X, V.double()), StateError, r"got \(2, 3\) torch.float64 on cpu. Pass the state of this batch"),
        (lambda: lif(X.bfloat16(), V.bfloat16()), StateError, r"membrane \(2, 3\) torch.float32 on cpu, got"),
        (lambda: lif(X, V.to("meta")), StateError, "got .* on meta"),
        (lambda: lif(X, leak=1.5), OptionError, r"leak must lie in \[0, 1\] \(leak = 1 - 1/tau.* got 1.5"),
        (lambda: lif(X, leak=-0.1), OptionError, r"leak must lie in \[0, 1\]"),
        (lambda: lif(X, leak=float("nan")), OptionError, r"leak must lie in \[0, 1\] .* got nan"),
        (lambda: lif(X, gain=float("inf")), OptionError, "gain must be a finite number, got inf"),
        (lambda: lif(X, v_threshold=0.0), OptionError, "v_threshold must be a finite number > 0, got 0.0"),
        (lambda: lif(X, v_reset=float("nan")), OptionError, "v_reset must be a finite number or None, got nan"),
        (lambda: lif(X, v_rest=float("inf")), OptionError, "v_rest must be a finite number or None, got inf"),
        (
            lambda: lif(X, reset=False, v_reset=0.0),
            OptionError,
            "reset=False never resets, so v_reset=0.0 has no effect",
        ),
        (lambda: lif(X, leak=torch.full((3,), 0.5)), ShapeError, r"numbers or 0-d tensors, got a tensor \(3,\)"),
        (lambda: lif(X, leak=torch.tensor(1.5), backend="numba"), OptionError, r"leak must lie in \[0, 1\].* got 1.5"),
        (lambda: lif(X, leak=torch.tensor(1.5), backend="reference"), OptionError, r"leak must lie in \[0, 1\]"),
        (
            lambda: lif(X, v_threshold=torch.tensor(-1.0), backend="reference"),
            OptionError,
            "v_threshold must be .* > 0",
        ),
        (
            lambda: lif_backward(X, None, X, leak=torch.tensor(2.0), backend="reference"),
            OptionError,
            "leak must lie in",
        ),
        (lambda: lif(X, v_reset="soft"), OptionError, r"None, got 'soft'\. For a soft reset, write v_reset=None"),
        (lambda: lif(X, surrogate="atn(2)"), OptionError, "did you mean atan"),
        (lambda: lif(X, surrogate=2), OptionError, "expected text such as .* got 2"),
        (lambda: lif_backward(X[:2], None, X), ShapeError, r"g must have the shape of x, \(4, 2, 3\), got \(2, 2, 3\)"),
        (
            lambda: lif_backward(X, None, X, None, X[:1]),
            ShapeError,
            r"spikes must have the shape of x, .*got \(1, 2, 3\)",
        ),
        (lambda: lif_backward(X, None, X[:0]), ShapeError, "lif_backward: expected at least one time step"),
        (lambda: lif_backward(X, V[:1], X), StateError, r"lif_backward: expected q, .*\(2, 3\).* got \(1, 3\)"),
        (lambda: lif(X.double(), backend="triton"), BackendError, "backend='triton': .* Use backend='auto'"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("backend", ["numba", TRITON])
def test_a_state_may_lie_in_another_order_than_the_input(backend):
    x, v_0 = dyadic(3, 2, 4, 5), dyadic(2, 5, 4).transpose(1, 2)
    got, wanted = (lif(x, v_0, backend=b) for b in (backend, "reference"))
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("backend", KERNELS)
def test_the_gradient_of_the_membrane_is_made_only_for_those_who_ask(backend):
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if op.name() == "spikefit::lif_backward":
                made.append(out[1].numel())
            return out

    x, v_0 = dyadic(3, 2, 20).requires_grad_(), dyadic(2, 20, seed=1)
    for state in (v_0, v_0.clone().requires_grad_()):
        with Watch():
            lif(x, state, backend=backend)[0].sum().backward()
    assert made == [0, 40]

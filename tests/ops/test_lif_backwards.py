"""Sequences on a grid run backwards: known answers of the leak, what ties cost, and kernels against the reference."""

import math

import pytest
import torch

from spikefit.ops.lif import lif, lif_backward
from spikefit.ops.lif.equation import GridLeak, grid_leak
from spikefit.ops.lif.grid_arithmetic import leaked, lost, unleaked
from spikefit.ops.lif.grid_op import lif_on_grid, lif_on_grid_backward
from spikefit.ops.lif.op import dynamics_of
from spikefit.ops.surrogate import atan, sigmoid, triangle
from support import KERNELS, assert_close, assert_same_spikes

# bits of information in one tie, rounded
ENTROPY = {1: 1.0, 2: 0.81, 3: 0.54, 4: 0.34, 6: 0.12, 10: 0.01}
FORMS = [GridLeak(m, ties) for ties in (False, True) for m in (1, 2, 5, 8)] + [GridLeak(m, True) for m in (10, 22)]


def dynamics(x, leak, **options):
    options = {"gain": 1.0, "v_threshold": 1.0, "strict": False, "detach_reset": True, "surrogate": atan(2)} | options
    fixed = {"v_reset": None, "reset": True, "v_rest": None, "frac_bits": 16, "backend": "auto"}
    return dynamics_of(x, leak=leak, **fixed, **options)


def sequence(T, *shape, dtype=torch.float32, seed=0):
    return (torch.randn(T, *shape, generator=torch.Generator().manual_seed(seed)) * 0.7 + 0.2).to(dtype)


def start(*shape, dtype=torch.float32):
    """A membrane on the grid of 2^-16."""
    v = torch.randint(-(2**17), 2**16, shape, generator=torch.Generator().manual_seed(3))
    return (v / 2**16).to(torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("m", "v", "w", "tie"), [(1, 5, 3, 1), (1, -3, -1, 1), (2, 7, 6, 1), (2, 8, 6, 0)])
def test_known_answers_of_the_tie_leak(m, v, w, tie, dtype):
    form, value = GridLeak(m, True), torch.tensor([v], dtype=dtype)
    assert (leaked(value, form).item(), lost(value, form).item()) == (w, tie)
    assert unleaked(leaked(value, form), lost(value, form), form).item() == v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_million_values_come_back(form, dtype):
    """Of all sizes up to the range, both signs, and around the ends of it and of every tie."""
    generator, limit = torch.Generator().manual_seed(0), 2**23 - 1
    v = torch.randint(-limit, limit + 1, (1_000_000,), generator=generator)
    small = torch.arange(-(2**14), 2**14)
    edges = torch.cat([torch.arange(limit - 5000, limit + 1), -torch.arange(limit - 5000, limit + 1)])
    near_ties = (torch.randint(-limit, limit, (10_000,), generator=generator) >> form.shift << form.shift)[:, None]
    near_ties = (near_ties + torch.arange(-2, 2)).flatten().clamp(-limit, limit)
    v = torch.cat([v, small, edges, near_ties]).to(dtype)
    w, bits = leaked(v, form), lost(v, form)
    exact = v.long() - (v.long() >> form.shift) if form.ties else v.long() >> form.shift
    assert torch.equal(w.long(), exact)
    assert torch.equal(unleaked(w, bits, form), v)
    assert (w.abs() <= v.abs() + 1).all()


@pytest.mark.parametrize("m", ENTROPY)
def test_how_often_ties_come_and_what_they_are_worth(m):
    v = torch.randint(-(2**22), 2**22, (1_000_000,), generator=torch.Generator().manual_seed(m)).float()
    rate, wanted = float(lost(v, GridLeak(m, True)).double().mean()), 2.0**-m
    assert abs(rate - wanted) < 5 * math.sqrt(wanted / len(v))
    entropy = -(rate * math.log2(rate) + (1 - rate) * math.log2(1 - rate))
    # the list rounds to two digits
    assert abs(entropy - ENTROPY[m]) < 0.0055


@pytest.mark.parametrize("leak", [1 / 2, 1 / 8, 3 / 4, 15 / 16, 1 - 2.0**-10])
def test_two_thousand_steps_return_the_first_membrane(leak):
    x, v_0 = sequence(2000, 2, 64), start(2, 64)
    d = dynamics(x, leak)
    spikes, v_T, bits = lif_on_grid(x, v_0, d, "auto")
    assert 0.01 < spikes.mean() < 0.8
    back = lif_on_grid_backward(x, None, x, v_T, spikes, bits, d, "auto")[2]
    assert torch.equal(back, v_0)
    # one bit that is wrong comes back wrong
    bits[1000, 1, 7] ^= 1
    wrong = lif_on_grid_backward(x, None, x, v_T, spikes, bits, d, "auto")[2]
    assert (wrong != v_0).nonzero().tolist() == [[1, 7]]


CASES = [
    (1 / 2, {}),
    (1 / 8, {"detach_reset": False, "surrogate": triangle(1)}),
    (3 / 4, {"strict": True, "gain": 0.75}),
    (15 / 16, {"detach_reset": False, "gain": 0.75, "surrogate": sigmoid(4)}),
    (1 - 2.0**-10, {"v_threshold": 0.5}),
]


@pytest.mark.parametrize("shape", [(1, 3), (2, 5, 29), (4, 2, 3, 5, 7)], ids=str)
@pytest.mark.parametrize(("leak", "options"), CASES)
@pytest.mark.parametrize("backend", KERNELS)
def test_kernels_match_the_reference(backend, leak, options, shape):
    T, *rest = shape
    x, v_0, g, q = sequence(T, *rest), start(*rest), sequence(T, *rest, seed=1), sequence(1, *rest, seed=2)[0]
    d, forward, backward = dynamics(x, leak, **options), {}, {}
    for name in ("reference", backend):
        forward[name] = lif_on_grid(x, v_0, d, name)
        backward[name] = lif_on_grid_backward(g, q, x, *forward[name][1::-1], forward[name][2], d, name)
    for got, wanted in zip(forward[backend], forward["reference"], strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    for name in ("reference", backend):
        assert torch.equal(backward[name][2], v_0)
    for got, wanted in zip(backward[backend][:2], backward["reference"][:2], strict=True):
        assert_close(got, wanted, 1e-5)


@pytest.mark.parametrize(("leak", "options"), CASES)
@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_gradients_are_those_of_the_forward_recomputed(backend, leak, options):
    """In double precision, of many blocks; both ways from the spikes on are those of plain autograd."""
    x, v_0, g = (sequence(40, 3, 700, dtype=torch.float64, seed=seed) for seed in (0, 1, 2))
    v_0, q = start(3, 700, dtype=torch.float64), v_0[0]
    d = dynamics(x, leak, **options)
    spikes, v_T, bits = lif_on_grid(x, v_0, d, backend)
    leaf, first = x.clone().requires_grad_(), v_0.clone().requires_grad_()
    wanted, last = lif(leaf, first, leak=leak, frac_bits=16, backend="reference", **options)
    assert_same_spikes(spikes, wanted.detach())
    assert torch.equal(v_T, last.detach())
    gradients = torch.autograd.grad((wanted * g).sum() + (last * q).sum(), [leaf, first])
    got = lif_on_grid_backward(g, q, x, v_T, spikes, bits, d, backend)
    again = lif_backward(g, q, x, v_0, spikes, leak=leak, frac_bits=16, backend=backend, **options)
    for made, other, exact in zip(got, again, gradients, strict=False):
        assert exact.abs().max() > 0
        assert_close(made, exact, 1e-12)
        assert torch.equal(made, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", KERNELS)
def test_half_precision(backend, dtype):
    x, g, v_0 = sequence(6, 2, 40, dtype=dtype), sequence(6, 2, 40, dtype=dtype, seed=1), start(2, 40)
    d = dynamics(x, 7 / 8)
    (s, v_T, bits), wanted = lif_on_grid(x, v_0, d, backend), lif_on_grid(x, v_0, d, "reference")
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip((s, v_T, bits), wanted, strict=True))
    assert (s.dtype, v_T.dtype) == (dtype, torch.float32)
    got = lif_on_grid_backward(g, None, x, v_T, s, bits, d, backend)
    exact = lif_on_grid_backward(g, None, x, v_T, s, bits, d, "reference")
    assert torch.equal(got[2], v_0)
    assert_close(got[0], exact[0], 8e-3)
    assert_close(got[1], exact[1], 1e-5)


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_any_order_in_memory(backend):
    """Channels last, and spikes and bits in another order than the current."""
    x, v_0, g = sequence(5, 2, 6, 3, 4), start(2, 6, 3, 4), sequence(5, 2, 6, 3, 4, seed=1)
    d = dynamics(x, 3 / 4)
    wanted = lif_on_grid(x, v_0, d, "reference")
    gradients = lif_on_grid_backward(g, None, x, wanted[1], wanted[0], wanted[2], d, "reference")
    last = x.movedim(2, -1).contiguous().movedim(-1, 2)
    assert last.stride() != x.stride()
    got = lif_on_grid(last, v_0, d, backend)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    made = lif_on_grid_backward(g, None, last, wanted[1], wanted[0], wanted[2], d, backend)
    assert all(torch.equal(a, b) for a, b in zip(made, gradients, strict=True))


def test_the_leaks_of_these_tests_have_both_forms():
    assert {grid_leak(leak).ties for leak, _ in CASES} == {True, False}

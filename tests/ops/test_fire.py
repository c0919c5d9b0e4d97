"""Firing: every backend gives the bits and gradients of the layers run one after the other by plain autograd."""

import pytest
import torch
from torch.nn import functional as F

from spikefit.ops.fire import Current, Grid, fire, fire_gradient, fire_sums
from spikefit.ops.lif import lif
from spikefit.ops.lif.equation import Equation
from spikefit.ops.lif.op import Dynamics
from spikefit.ops.packbits import pack, unpack
from spikefit.ops.surrogate import atan, triangle
from support import EQUATIONS, KERNELS, assert_close, dyadic

BACKENDS = ["reference", *KERNELS]
# name: T, grid, channels, what the current is made of
CASES = {
    "plain": (4, Grid(2, 3, 5, ""), 8, {}),
    "dense": (3, Grid(5, 1, 1, ""), 11, {}),
    "one step": (1, Grid(2, 4, 4, "max"), 16, {}),
    "max": (3, Grid(2, 6, 4, "max"), 8, {}),
    "max, odd": (3, Grid(2, 5, 7, "max"), 9, {}),
    "avg, odd": (3, Grid(2, 5, 3, "avg"), 8, {}),
    "max, line": (3, Grid(3, 1, 7, "max"), 8, {}),
    "avg, line": (3, Grid(3, 1, 6, "avg"), 8, {}),
    # more neurons per block, and more steps, than the kernels take in one go
    "long rows": (10, Grid(3, 8, 10, ""), 40, {}),
    "long rows, max": (9, Grid(2, 4, 30, "max"), 24, {}),
    "repeated": (4, Grid(2, 4, 4, "max"), 8, {"z": 1}),
    "per step": (4, Grid(2, 4, 4, ""), 8, {"R": 4}),
    "two branches": (3, Grid(2, 4, 4, ""), 8, {"K": 2}),
    "two branches, second repeated": (3, Grid(2, 4, 4, ""), 8, {"K": 2, "second": 1}),
    "spikes": (3, Grid(2, 4, 4, ""), 12, {"spikes": True}),
    "extra": (3, Grid(2, 4, 4, "max"), 8, {"extra": 3}),
    "extra, repeated, per step": (3, Grid(2, 4, 4, ""), 8, {"extra": 1, "R": 3}),
}


def make(case, dtype=torch.float64):
    """(current, v_0, grid, T, gradients g and q) with exact values."""
    T, grid, C, has = CASES[case]
    M, R = grid.images * grid.height * grid.width, has.get("R", 1)
    zs = [dyadic(has.get("z", T), M, C, seed=1)]
    if has.get("K") == 2:
        zs.append(dyadic(has.get("second", T), M, C, seed=2))
    scales = [dyadic(R, C, low=0.25, high=1, seed=3 + k) for k in range(len(zs))]
    shifts = [dyadic(R, C, low=0, high=0.5, seed=5 + k) for k in range(len(zs))]
    extra = dyadic(has["extra"], M, C, low=-0.25, high=0.25, seed=7).to(dtype) if "extra" in has else None
    spikes = (dyadic(T, M, C, seed=8) > 1).to(dtype) if has.get("spikes") else None
    tensors = [[t.to(dtype) for t in group] for group in (zs, scales, shifts)]
    current = Current(*tensors, extra, None if spikes is None else pack(spikes))
    v_0 = dyadic(M, C, low=0, high=0.5, seed=9).to(torch.float64 if dtype == torch.float64 else torch.float32)
    g = dyadic(T, grid.pooled_rows, C, seed=10).to(dtype)
    return current, v_0, spikes, grid, T, g, dyadic(M, C, seed=11).to(v_0.dtype)


def dynamics(equation="soft", *, detach=True, surrogate=None, learned=None):
    options = {"v_reset": None, "reset": True, "v_rest": None, "strict": False} | EQUATIONS[equation]
    made = Equation.make(**options, detach_reset=detach, surrogate=surrogate or atan(2))
    return Dynamics(made, (0.5, 0.75, 1.0), learned)


def pooled(s, grid):
    """[T, M, C] -> [T, G, C] by torch's own pools."""
    if not grid.pool:
        return s
    images = s.unflatten(1, (grid.images, grid.height, grid.width)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    function = F.max_pool2d if grid.pool == "max" else F.avg_pool2d
    out = function(images, grid.window)
    return out.permute(0, 2, 3, 1).reshape(s.shape[0], -1, s.shape[2])


def by_autograd(case, d, dtype=torch.float64):
    """Spikes, last membrane and all gradients, from plain autograd through affine map, sum, LIF and pool."""
    current, v_0, spikes, grid, T, g, q = make(case, dtype)
    zs = [z.requires_grad_() for z in current.zs]
    v_0.requires_grad_()
    scales = [s.requires_grad_() for s in current.scales]
    x = sum(z * s[:, None] + b[:, None] for z, s, b in zip(zs, scales, current.shifts, strict=True))
    x = x + (0 if current.extra is None else current.extra) + (0 if spikes is None else spikes)
    x = x.expand(T, *x.shape[1:]).clone().requires_grad_() if not x.requires_grad else x.expand(T, *x.shape[1:])
    x.retain_grad()
    numbers = (torch.tensor([0.5, 0.75, 1.0], dtype=v_0.dtype) if d.learned is None else d.learned).requires_grad_()
    e = d.equation
    options = {
        "v_reset": e.v_reset if e.reset == "hard" else None,
        "reset": e.reset != "none",
        "v_rest": e.v_rest,
        "strict": e.strict,
        "detach_reset": e.detach_reset,
        "surrogate": e.surrogate,
    }
    leak, gain, theta = numbers.unbind()
    s, v_T = lif(x, v_0, leak=leak, gain=gain, v_threshold=theta, **options, backend="reference")
    loss = (pooled(s, grid) * g).sum() + (v_T * q).sum()
    dz = torch.autograd.grad(loss, [*zs, *scales, x, v_0, numbers])
    K = len(zs)
    return s.detach(), v_T.detach(), dz[:K], dz[K : 2 * K], dz[2 * K], dz[2 * K + 1], dz[2 * K + 2]


def assert_agrees(case, d, backend):
    current, v_0, _, grid, T, g, q = make(case)
    s, v_T, dz, d_scale, dx, dv_0, d_3 = by_autograd(case, d)
    assert 0.05 < s.mean() < 0.95
    bits, last = fire(current, v_0, T, grid, d, backend=backend)
    assert torch.equal(unpack(bits, s.shape[2], dtype=s.dtype), s)
    assert torch.equal(last, v_T)

    arguments = (g, q, current, v_0, bits, grid, d)
    sums = fire_sums(*arguments, backend=backend)
    for k, scale in enumerate(current.scales):
        # d scale is the sum of dx z, which is what a norm asks for
        got = sums[1 + k] if scale.shape[0] == sums.shape[1] else sums[1 + k].sum(0, keepdim=True)
        assert_close(got, d_scale[k], 1e-12, f"sum {k}")
    assert_close(sums[0].sum(0), dx.sum((0, 1)), 1e-12, "sum of dx")

    factors = [torch.stack([1.5 * scale, 0 * scale + 0.25, 0 * scale - 2]) for scale in current.scales]
    wanted = [1.5 * gradient + 0.25 * z - 2 for gradient, z in zip(dz, [z.clone() for z in current.zs], strict=True)]
    got_dx, got_dv, got_3 = fire_gradient(
        *arguments, factors, want_current=True, want_state=True, want_coefficients=True, backend=backend
    )
    for z, w in zip(current.zs, wanted, strict=True):
        assert_close(z, w, 1e-12, "dz")
    for got, want, what in ((got_dx, dx, "dx"), (got_dv, dv_0, "dv_0"), (got_3, d_3, "d_3")):
        assert_close(got, want, 1e-12, what)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_autograd(case, backend):
    assert_agrees(case, dynamics(), backend)


@pytest.mark.parametrize("backend", ["reference", "numba"])
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_equations(equation, detach, backend):
    d = dynamics(equation, detach=detach, surrogate=triangle(1), learned=torch.tensor([0.5, 0.75, 1.0]).double())
    assert_agrees("max", d, backend)


@pytest.mark.parametrize("case", ["plain", "max, odd", "two branches", "spikes", "repeated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", KERNELS)
def test_backends_agree(backend, dtype, case):
    d, results = dynamics("hard", detach=False), []
    for name in ("reference", backend):
        current, v_0, _, grid, T, g, q = make(case, dtype)
        current = current._replace(
            scales=[s.float() for s in current.scales], shifts=[s.float() for s in current.shifts]
        )
        bits, v_T = fire(current, v_0, T, grid, d, backend=name)
        sums = fire_sums(g, q, current, v_0, bits, grid, d, backend=name)
        factors = [torch.stack([s, s, s]) for s in current.scales]
        _, dv_0, _ = fire_gradient(g, q, current, v_0, bits, grid, d, factors, want_state=True, backend=name)
        results.append([bits, v_T, sums, dv_0, *current.zs])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for wanted, got in zip(*results, strict=True):
        assert_close(got, wanted, tolerance)


def test_a_wrong_current_flips_no_spike():
    """The reset is forced: noise on the recomputed current moves the membrane by a bounded amount."""
    torch.manual_seed(0)
    T, grid, C = 64, Grid(100, 1, 1, ""), 200
    z, g = torch.randn(T, 100, C, dtype=torch.float64), torch.randn(T, 100, C, dtype=torch.float64)
    ones, zeros = torch.ones(1, C, dtype=torch.float64), torch.zeros(1, C, dtype=torch.float64)
    d = dynamics()._replace(constants=(0.9, 1.0, 1.0))
    bits, _ = fire(Current([z], [ones], [zeros], None, None), None, T, grid, d)
    noisy = z + 1e-4 * torch.randn_like(z)
    flipped, _ = fire(Current([noisy], [ones], [zeros], None, None), None, T, grid, d)
    assert not torch.equal(flipped, bits), "the noise must flip spikes where the threshold is evaluated again"

    def gradient(current, spikes):
        terms = Current([current.clone()], [ones], [zeros], None, None)
        factors = [torch.stack([ones, zeros, zeros])]
        return fire_gradient(g, None, terms, None, spikes, grid, d, factors, want_current=True)[0]

    wanted = gradient(z, bits)
    assert (gradient(noisy, bits) - wanted).abs().max() < 1e-2
    assert (gradient(noisy, flipped) - wanted).abs().max() > 1e-2

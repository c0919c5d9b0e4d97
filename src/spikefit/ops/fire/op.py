"""The one door to firing: it chooses a backend per call and registers the kernels with torch; no gradients."""

from collections.abc import Sequence

import torch
from torch import Tensor

from spikefit.ops import dispatch
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.fire import reference
from spikefit.ops.fire.layout import Current, Grid
from spikefit.ops.lif.op import Dynamics, choose_backend, flat, left_grid, numbers, unflat
from spikefit.ops.packbits import packed_length


def fire(
    current: Current,
    v_0: Tensor | None,
    timesteps: int,
    grid: Grid,
    dynamics: Dynamics,
    *,
    backend: dispatch.Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Sum a current, run LIF neurons on it, and pack their spikes; the dense spikes of the layer are never made.

        x_t = sum of the terms of `current`,   (s, v_T) = LIF(x, v_0),   bits = pack(s)

    Args:
        current: the terms, on rows of channels; see `Current`.
        v_0: membrane before the first step, [M, C]; zeros if None.
        timesteps: T.
        grid: how the rows lie as images.
        dynamics: equation and coefficients of the neurons; a learned tensor gets its gradient from `fire_gradient`.
        backend: "auto", "reference", "numba" (CPU) or "triton" (CUDA).

    Returns:
        (bits [T, M, P] uint8, v_T [M, C] float32, or float64 for float64 input).

    Raises:
        BackendError: the backend asked for cannot run this call.
    """
    return _fire(*current, v_0, *_dynamics(dynamics), *grid, timesteps, _choose(current, dynamics, backend))


def fire_sums(
    g: Tensor,
    q: Tensor | None,
    current: Current,
    v_0: Tensor | None,
    bits: Tensor,
    grid: Grid,
    dynamics: Dynamics,
    *,
    backend: dispatch.Backend = "auto",
) -> Tensor:
    """The sums that the gradient of a norm needs: of dL/dx, and of dL/dx z_k of every branch k.

    Args:
        g: gradient of the spikes behind the pool, [T, G, C].
        q: gradient of the last membrane, [M, C], or None.
        current, v_0, grid, dynamics, backend: as in `fire`.
        bits: what `fire` returned; its spikes take the place of the threshold.

    Returns:
        [1 + K, R, C] float64; R = T where a scale has a row per step, else 1.
    """
    return _fire_sums(g, q, *current, v_0, bits, *_dynamics(dynamics), *grid, _choose(current, dynamics, backend))


def fire_gradient(
    g: Tensor,
    q: Tensor | None,
    current: Current,
    v_0: Tensor | None,
    bits: Tensor,
    grid: Grid,
    dynamics: Dynamics,
    factors: Sequence[Tensor],
    *,
    want_current: bool = False,
    want_state: bool = False,
    want_coefficients: bool = False,
    backend: dispatch.Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Overwrite every z_k with its gradient, a dL/dx + b z_k + c.

    Args:
        g, q, current, v_0, bits, grid, dynamics, backend: as in `fire_sums`.
        factors: (a, b, c) of every branch, [3, R, C] each in the compute dtype.
        want_current, want_state, want_coefficients: which of the three results to compute; others are empty or zero.

    Returns:
        (dL/dx [T, M, C], dL/dv_0 [M, C], d(leak, gain, v_threshold) [3]).
    """
    return _fire_gradient(
        g,
        q,
        *current,
        v_0,
        bits,
        *_dynamics(dynamics),
        *grid,
        list(factors),
        want_current,
        want_state,
        want_coefficients,
        _choose(current, dynamics, backend),
    )


def _choose(current: Current, dynamics: Dynamics, backend: str) -> str:
    """Backend of the call: "fused" for the kernels of this room, else the backend that its pieces run on."""
    z = current.zs[0]
    chosen = choose_backend(z, dynamics.equation.surrogate, backend)
    whole = chosen == "numba" and z.dtype in (torch.float32, torch.float64) and len(current.zs) <= 2
    return "fused" if whole else chosen


def _dynamics(d: Dynamics) -> tuple:
    return d.learned, *d.constants, *flat(d.equation)


@torch.library.custom_op("spikefit::fire", mutates_args=())
def _fire(
    zs: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    extra: Tensor | None,
    spikes: Tensor | None,
    v_0: Tensor | None,
    learned: Tensor | None,
    leak: float,
    gain: float,
    v_threshold: float,
    reset: str,
    v_reset: float,
    v_rest: float,
    strict: bool,
    detach_reset: bool,
    surrogate: str,
    parameter: float,
    frac_bits: int | None,
    images: int,
    height: int,
    width: int,
    pool: str,
    timesteps: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    current, grid = Current(list(zs), list(scales), list(shifts), extra, spikes), Grid(images, height, width, pool)
    equation = unflat(reset, v_reset, v_rest, strict, detach_reset, surrogate, parameter, frac_bits)
    bits, v_T = _results(zs[0], timesteps)
    constants = (leak, gain, v_threshold)
    if backend == "fused":
        from spikefit.ops.fire import cpu

        cpu.forward(current, v_0, bits, v_T, numbers(learned, constants, "numba"), equation)
        if left_grid(v_T, equation):
            reference.forward(current, v_0, bits, v_T, grid, Dynamics(equation, constants, None), "reference")
    else:
        reference.forward(current, v_0, bits, v_T, grid, Dynamics(equation, constants, learned), backend)  # type: ignore[arg-type]
    return bits, v_T


@_fire.register_fake
def _(zs, *rest):
    return _results(zs[0], rest[-2])


def _results(z: Tensor, timesteps: int) -> tuple[Tensor, Tensor]:
    """Uninitialised (bits, v_T)."""
    _, M, C = z.shape
    bits = z.new_empty((timesteps, M, packed_length(C)), dtype=torch.uint8)
    return bits, z.new_empty((M, C), dtype=compute_dtype(z.dtype))


@torch.library.custom_op("spikefit::fire_sums", mutates_args=())
def _fire_sums(
    g: Tensor,
    q: Tensor | None,
    zs: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    extra: Tensor | None,
    spikes: Tensor | None,
    v_0: Tensor | None,
    bits: Tensor,
    learned: Tensor | None,
    leak: float,
    gain: float,
    v_threshold: float,
    reset: str,
    v_reset: float,
    v_rest: float,
    strict: bool,
    detach_reset: bool,
    surrogate: str,
    parameter: float,
    frac_bits: int | None,
    images: int,
    height: int,
    width: int,
    pool: str,
    backend: str,
) -> Tensor:
    current, grid = Current(list(zs), list(scales), list(shifts), extra, spikes), Grid(images, height, width, pool)
    equation = unflat(reset, v_reset, v_rest, strict, detach_reset, surrogate, parameter, frac_bits)
    dynamics = Dynamics(equation, (leak, gain, v_threshold), learned)
    return _backward(g, q, current, v_0, bits, grid, dynamics, backend)[0]


@_fire_sums.register_fake
def _(g, q, zs, scales, *rest):
    rows = max(scale.shape[0] for scale in scales)
    return g.new_empty((1 + len(zs), rows, zs[0].shape[2]), dtype=torch.float64)


@torch.library.custom_op("spikefit::fire_gradient", mutates_args={"zs"})
def _fire_gradient(
    g: Tensor,
    q: Tensor | None,
    zs: Sequence[Tensor],
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    extra: Tensor | None,
    spikes: Tensor | None,
    v_0: Tensor | None,
    bits: Tensor,
    learned: Tensor | None,
    leak: float,
    gain: float,
    v_threshold: float,
    reset: str,
    v_reset: float,
    v_rest: float,
    strict: bool,
    detach_reset: bool,
    surrogate: str,
    parameter: float,
    frac_bits: int | None,
    images: int,
    height: int,
    width: int,
    pool: str,
    factors: Sequence[Tensor],
    want_current: bool,
    want_state: bool,
    want_coefficients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    current, grid = Current(list(zs), list(scales), list(shifts), extra, spikes), Grid(images, height, width, pool)
    equation = unflat(reset, v_reset, v_rest, strict, detach_reset, surrogate, parameter, frac_bits)
    dynamics = Dynamics(equation, (leak, gain, v_threshold), learned)
    dx, dv_0, _ = _gradients(zs[0], bits.shape[0], want_current, want_state)
    _, d_3 = _backward(
        g,
        q,
        current,
        v_0,
        bits,
        grid,
        dynamics,
        backend,
        write=list(factors),
        dx_TMC=dx if want_current else None,
        dv_0=dv_0 if want_state else None,
        want_coefficients=want_coefficients,
    )
    return dx, dv_0, d_3.to(dv_0.dtype)


@_fire_gradient.register_fake
def _(g, q, zs, scales, shifts, extra, spikes, v_0, bits, *rest):
    return _gradients(zs[0], bits.shape[0], rest[-4], rest[-3])


def _gradients(z: Tensor, timesteps: int, want_current: bool, want_state: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised (dL/dx, dL/dv_0, d_3); what is not wanted is empty."""
    _, M, C = z.shape
    compute = compute_dtype(z.dtype)
    dx = z.new_empty((timesteps, M, C) if want_current else (0, 0, 0))
    return dx, z.new_empty((M, C) if want_state else (0, 0), dtype=compute), z.new_empty(3, dtype=compute)


def _backward(g, q, current, v_0, bits, grid, dynamics, backend, *, want_coefficients=False, **results):
    if backend != "fused":
        return reference.backward(g, q, current, v_0, bits, grid, dynamics, backend, **results)
    from spikefit.ops.fire import cpu

    given = numbers(dynamics.learned, dynamics.constants, "numba")
    return cpu.backward(
        g, q, current, v_0, bits, grid, given, dynamics.equation, want_coefficients=want_coefficients, **results
    )

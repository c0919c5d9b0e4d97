"""The door to membranes on a grid that are run backwards: it chooses a backend and registers the kernels with torch.

Forward gives what every call loses beside the spikes; backward starts from the last membrane, undoes call by call and
applies the adjoint on the way, so that neither holds a membrane per step.
"""

from typing import Any

import torch
from torch import Tensor

from spikefit.ops.custom_op import custom_op
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.lif import reference
from spikefit.ops.lif.op import Dynamics, Layout, choose_backend, flat, left_grid, unflat


def lif_on_grid(x: Tensor, v_0: Tensor, dynamics: Dynamics, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Run neurons on a grid over a sequence, without a graph, and note what backward needs to undo it.

        u_t = leaked(v_{t-1}) + round(gain x_t),   s_t = [u_t >= v_threshold],   v_t = u_t - v_threshold s_t

    Args:
        x: current, [T, B, ...].
        v_0: membrane before the first step, [B, ...], on the grid.
        dynamics: what `dynamics_of` made, with `frac_bits`.
        backend: as in `lif`.

    Returns:
        (spikes [T, B, ...] in the dtype of `x`, last membrane [B, ...], lost [T, B, ...] uint8): the tie bit of every
        call at leak 1 - 2^-m, the last m digits at leak 2^-m.

    Raises:
        RangeError: a membrane that its grid cannot hold exactly.
        BackendError: the backend asked for cannot run this call.
    """
    chosen = choose_backend(x, dynamics.equation.surrogate, backend)
    return _forward(x, v_0, *dynamics.constants, *flat(dynamics.equation), chosen)


def lif_on_grid_backward(
    g: Tensor,
    q: Tensor | None,
    x: Tensor,
    v_T: Tensor,
    spikes: Tensor,
    lost: Tensor,
    dynamics: Dynamics,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `lif_on_grid`, from the last membrane backwards.

    Args:
        g: dL/ds, [T, B, ...].
        q: dL/dv_T, [B, ...]; None for zeros.
        x: the current of forward, bit for bit.
        v_T, spikes, lost: what forward returned; spikes of any dtype.
        dynamics, backend: as in `lif_on_grid`.

    Returns:
        (dL/dx [T, B, ...], dL/dv_0 [B, ...], v_0 [B, ...] to the bit).

    Raises:
        BackendError: the backend asked for cannot run this call.
    """
    chosen = choose_backend(x, dynamics.equation.surrogate, backend)
    q = v_T.new_zeros(()).expand_as(v_T) if q is None else q
    return _backward(g, q, x, v_T, spikes, lost, *dynamics.constants, *flat(dynamics.equation), chosen)


def _kernels(backend: str):
    """The module with `forward` and `backward` on rows."""
    if backend == "triton":
        from spikefit.ops.lif import grid_cuda

        return grid_cuda
    from spikefit.ops.lif import grid_cpu

    return grid_cpu


def _room(x: Tensor, backend: str) -> torch.dtype:
    """In which dtype kernels read and write sequences: numba has no half precision."""
    return x.dtype if backend == "triton" else compute_dtype(x.dtype)


@custom_op("spikefit::lif_on_grid")
def _forward(
    x: Tensor,
    v_0: Tensor,
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    equation = unflat(reset, v_reset, v_rest, strict, detach_reset, surrogate, parameter, frac_bits)
    options: dict[str, Any] = {"leak": leak, "gain": gain, "v_threshold": v_threshold, "equation": equation}
    if backend == "reference":
        return reference.lif_on_grid(x, v_0, **options)
    layout, dtype = Layout.of(x), _room(x, backend)
    spikes, v_T = layout.empty(x, dtype), layout.empty_state(x, v_0.dtype)
    lost = layout.empty(x, torch.uint8)
    _kernels(backend).forward(
        layout.rows(x.to(dtype)),
        layout.flat(v_0).contiguous(),
        layout.rows(spikes),
        layout.flat(v_T),
        layout.rows(lost),
        (leak, gain, v_threshold),
        equation,
    )
    if left_grid(v_T, equation):
        reference.lif_on_grid(x, v_0, **options)
    return spikes.to(x.dtype), v_T, lost


@_forward.register_fake
def _(x, v_0, *rest):
    layout = Layout(x)
    return layout.empty(x, x.dtype), layout.empty_state(x, v_0.dtype), layout.empty(x, torch.uint8)


@custom_op("spikefit::lif_on_grid_backward")
def _backward(
    g: Tensor,
    q: Tensor,
    x: Tensor,
    v_T: Tensor,
    spikes: Tensor,
    lost: Tensor,
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
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    equation = unflat(reset, v_reset, v_rest, strict, detach_reset, surrogate, parameter, frac_bits)
    if backend == "reference":
        options: dict[str, Any] = {"leak": leak, "gain": gain, "v_threshold": v_threshold, "equation": equation}
        return reference.lif_on_grid_backward(g, q, x, v_T, spikes, lost, **options)
    layout, dtype = Layout.of(x), _room(x, backend)
    dx = layout.empty(x, dtype)
    dv_0, v_0 = layout.empty_state(x, v_T.dtype), layout.empty_state(x, v_T.dtype)
    _kernels(backend).backward(
        layout.rows(g.to(dtype)),
        layout.flat(q.to(v_T.dtype)).contiguous(),
        layout.rows(x.to(dtype)),
        layout.flat(v_T).contiguous(),
        layout.rows(spikes.to(dtype)),
        layout.rows(lost),
        layout.rows(dx),
        layout.flat(dv_0),
        layout.flat(v_0),
        (leak, gain, v_threshold),
        equation,
    )
    return dx.to(x.dtype), dv_0, v_0


@_backward.register_fake
def _(g, q, x, v_T, *rest):
    layout = Layout(x)
    return layout.empty(x, x.dtype), layout.empty_state(x, v_T.dtype), layout.empty_state(x, v_T.dtype)

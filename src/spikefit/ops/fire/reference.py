"""The meaning of firing: norm, sum, LIF and packing one after the other, on a few images at a time.

See `layout` for the letters. With the reference backend it is plain torch; with another, LIF, packing and norm run on
its kernels, which is how devices and dtypes without a kernel of their own are served. Working memory is about
`SCRATCH` values of the layer, whatever its size.

    x_t = sum of the terms of the current,   (s, v_T) = LIF(x, v_0),   bits = pack(s)

Backward takes the spikes from the bits, so a current that was recomputed cannot flip one; D and the other gradients are
those of `ops.lif.reference`.
"""

import torch
from torch import Tensor

from spikefit.ops import dispatch, norm
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.fire.layout import Current, Grid
from spikefit.ops.lif.op import Dynamics, advance, retrace
from spikefit.ops.packbits import pack, unpack

# Values of the layer that are dense at a time.
SCRATCH = 1 << 20


def forward(
    current: Current,
    v_0: Tensor | None,
    bits_TMP: Tensor,
    v_T: Tensor,
    grid: Grid,
    dynamics: Dynamics,
    backend: dispatch.Backend,
) -> None:
    """Fill `bits_TMP` and the last membrane `v_T` [M, C]."""
    for rows in _pieces(bits_TMP, v_T.shape[1], grid):
        x = _sum_terms(current, rows, bits_TMP.shape[0], backend)
        s, v_T[rows] = advance(x, _state(v_0, current.zs[0], rows), dynamics, backend)
        bits_TMP[:, rows] = pack(s, check=False, backend=backend)


def backward(
    g_TGC: Tensor,
    q: Tensor | None,
    current: Current,
    v_0: Tensor | None,
    bits_TMP: Tensor,
    grid: Grid,
    dynamics: Dynamics,
    backend: dispatch.Backend,
    *,
    write: list[Tensor] | None = None,
    dx_TMC: Tensor | None = None,
    dv_0: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(sums [1 + K, R, C] float64, d(leak, gain, v_threshold) [3]); fills the other results that are given.

        sums_0 = sum of dL/dx over rows,   sums_k = sum of dL/dx z_k;   per step where R = T

    Args:
        g_TGC: gradient of the spikes behind the pool.
        q: gradient of the last membrane [M, C], or None.
        write: per branch k a tensor [3, R, C] (a, b, c): z_k <- a dL/dx + b z_k + c. None computes the sums instead.
        dx_TMC: to be filled with dL/dx, or None.
        dv_0: [M, C] to be filled, or None.
    """
    T, C, z = bits_TMP.shape[0], current.zs[0].shape[2], current.zs[0]
    R = max(scale.shape[0] for scale in current.scales)
    sums = z.new_zeros((1 + len(current.zs), R, C), dtype=torch.float64)
    d_3 = z.new_zeros(3, dtype=compute_dtype(z.dtype))
    for rows in _pieces(bits_TMP, C, grid):
        x = _sum_terms(current, rows, T, backend)
        s = unpack(bits_TMP[:, rows], C, dtype=x.dtype, backend=backend)
        g = unpool(g_TGC, s, rows, grid).to(x.dtype)
        dx, dv, d = retrace(g, _state(q, z, rows), x, _state(v_0, z, rows), s, dynamics, backend)
        d_3 += d
        if dx_TMC is not None:
            dx_TMC[:, rows] = dx
        if dv_0 is not None:
            dv_0[rows] = dv
        for k, whole in enumerate(current.zs):
            z_k = whole[:, rows]
            dx_k = dx if z_k.shape[0] == T else dx.sum(0, keepdim=True)
            if write is not None:
                whole[:, rows] = norm.combine(dx_k, z_k, *write[k].unbind(), backend=_of_norm(backend))
                continue
            first, second = norm.gradient_sums(dx_k, z_k, backend=_of_norm(backend))
            for row, value in ((0, first), (1 + k, second)) if k == 0 else ((1 + k, second),):
                sums[row] += value if R > 1 else value.sum(0, keepdim=True)
    return sums, d_3


def unpool(g_TGC: Tensor, s_TmC: Tensor, rows: slice, grid: Grid) -> Tensor:
    """dL/ds of some whole images, [T, m, C], from the gradient behind the pool.

    The maximum of a window is its first spike in row-major order, or its first place if it is empty, as in torch.
    """
    T, m, C = s_TmC.shape
    if not grid.pool:
        return g_TGC[:, rows]
    (p, q), pixels = grid.window, grid.height * grid.width
    height, width = grid.height // p, grid.width // q
    first = rows.start // pixels * height * width
    g = g_TGC[:, first : first + m // pixels * height * width].reshape(T, -1, height, 1, width, 1, C)
    s = s_TmC.reshape(T, -1, grid.height, grid.width, C)[:, :, : height * p, : width * q]
    s = s.reshape(T, -1, height, p, width, q, C)
    if grid.pool == "avg":
        share = (g / (p * q)).expand_as(s)
    else:
        # places in row-major order along the last axis; argmax finds the first of equal ones
        places = s.permute(0, 1, 2, 4, 6, 3, 5).flatten(5)
        chosen = torch.nn.functional.one_hot(places.argmax(-1), p * q).unflatten(-1, (p, q))
        share = torch.where(chosen.permute(0, 1, 2, 5, 3, 6, 4).bool(), g, 0)
    out = s_TmC.new_zeros((T, m // pixels, grid.height, grid.width, C), dtype=g_TGC.dtype)
    out[:, :, : height * p, : width * q] = share.reshape(T, -1, height * p, width * q, C)
    return out.view(T, m, C)


def _pieces(bits_TMP: Tensor, C: int, grid: Grid) -> list[slice]:
    """Rows of whole images, about `SCRATCH` values of the layer at a time."""
    T, M, _ = bits_TMP.shape
    pixels = grid.height * grid.width
    step = pixels * max(1, SCRATCH // (T * C * pixels))
    return [slice(first, min(M, first + step)) for first in range(0, M, step)]


def _of_norm(backend: dispatch.Backend) -> dispatch.Backend:
    """The backend of norms beside neurons on `backend`: norms have no Triton kernel."""
    return "reference" if backend == "triton" else backend


def _sum_terms(current: Current, rows: slice, T: int, backend: dispatch.Backend) -> Tensor:
    """The current of some rows, [T, m, C]."""
    x: Tensor | None = None
    for z, scale, shift in zip(current.zs, current.scales, current.shifts, strict=True):
        term = norm.affine(z[:, rows], scale, shift, backend=_of_norm(backend))
        x = term if x is None else x + term
    assert x is not None, "a current has at least one branch"
    if current.extra is not None:
        x = x + current.extra[:, rows]
    if current.spikes is not None:
        x = x + unpack(current.spikes[:, rows], x.shape[2], dtype=x.dtype, backend=backend)
    return x.expand(T, *x.shape[1:])


def _state(v: Tensor | None, z: Tensor, rows: slice) -> Tensor:
    """Some rows of a membrane [M, C], or one zero repeated."""
    if v is None:
        return z.new_zeros((), dtype=compute_dtype(z.dtype)).expand(rows.stop - rows.start, z.shape[2])
    return v[rows]

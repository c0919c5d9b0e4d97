"""The one door to the scan of windows: it checks, chooses a backend, and registers the kernels with autograd."""

import torch
from torch import Tensor

from spikefit.errors import BackendError, OptionError, ShapeError, StateError
from spikefit.ops import dispatch
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.lif.op import DTYPES, Layout, choose_backend
from spikefit.ops.lif.reference import Scalar
from spikefit.ops.surrogate import Surrogate, rect
from spikefit.ops.window_scan import reference
from spikefit.ops.window_scan.equation import Equation
from spikefit.ops.window_scan.fusion import COMPILED, check_phi, check_threshold
from spikefit.ops.window_scan.links import Links


def window_scan(
    x: Tensor,
    given: Tensor | None = None,
    *,
    links: Links,
    fuse: str = "omega",
    phi: Scalar = 0.5,
    leak: float = 0.4,
    v_threshold: Scalar = 0.5,
    reset: str = "none",
    strict: bool = True,
    surrogate: Surrogate | str = rect(1),  # noqa: B008 (an immutable value)
    backend: dispatch.Backend = "auto",
    want_membranes: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Run the neurons of P windows of one image, which start from each other's membranes or from given ones.

        u_p = leak fuse(A_p, C_p) + x_p                                charge
        s_p = 1 if u_p > v_threshold else 0                            fire (u_p >= v_threshold unless `strict`)
        m_p = u_p,  u_p - v_threshold s_p  or  u_p (1 - s_p)           handed on: reset "none", "soft", "hard"

    A_p and C_p are zeros, given tensors or membranes m of earlier windows, as `links` says. No gradient flows through
    the s inside a reset. Between forward and backward the kernels keep `x` and `given` and rebuild the rest; the
    reference keeps what autograd keeps.

    Args:
        x: input current, [P, B, ...], windows first, in the unit of `v_threshold`; float32, float64, float16 or
            bfloat16.
        given: membranes from elsewhere, one per window, shape of `x`; float32, or float64 for float64 input. None if
            no window reads one.
        links: the sources of each of the P windows, for example `in_turn(P)`; see `spikefit.ops.window_scan.links`.
        fuse: "omega" (2 sin(phi pi A/2) cos(phi pi C/2)), "a" (A alone), "c", "sum", "mean", "relu", "tanh", "sigmoid"
            (these three of A + C), "none" (nothing is carried), "omega_release" (a parenthesis closed elsewhere).
        phi: projection constant, 0 < phi < 1. Number or 0-d tensor.
        leak: share of the fused membrane that is kept, 0 <= leak <= 1.
        v_threshold: firing level, > 0. Number or 0-d tensor.
        reset: what happens to the membrane of a neuron that fired, before it is handed on.
        strict: fire on u > v_threshold instead of u >= v_threshold.
        surrogate: slope of the step, a `Surrogate` or its text, "rect(1)".
        backend: "auto", "reference", "numba" (CPU) or "triton" (CUDA). Only the reference runs learned (tensor) phi and
            v_threshold, float64, and the fusions "tanh", "sigmoid" and "omega_release".
        want_membranes: False to return None in the place of the membranes, and spare their memory.

    Returns:
        (spikes, membranes): spikes in {0, 1}, [P, B, ...] with dtype of `x`, and m of every window, [P, B, ...],
        float32 (float64 for float64 input). Arithmetic is float32 or float64 inside, whatever `x` is.

    Raises:
        ShapeError: no window or batch axis, another number of windows than `links` has, or an integer input.
        StateError: `given` of another shape, dtype or device than `x` asks for.
        OptionError: an option outside its range, or `given` missing or superfluous.
        BackendError: the backend asked for cannot run this call.

    Source: Yao, Wu, Chen, Zhang, ACML 2023, PMLR 222, pp. 1558-1573.
    """
    equation = Equation.make(links=links, fuse=fuse, leak=leak, reset=reset, strict=strict, surrogate=surrogate)
    check_phi("window_scan", phi)
    check_threshold("window_scan", v_threshold)
    _check_input(x, links)
    given = _checked_given(x, given, links, equation)
    chosen = _choose_backend(x, equation, phi, v_threshold, backend)
    if chosen == "reference":
        spikes, membranes = reference.window_scan(x, given, phi=phi, v_threshold=v_threshold, equation=equation)
    else:
        spikes, membranes = _forward(
            x, given, float(phi), float(v_threshold), *_flat(equation), want_membranes, chosen
        )  # fmt: skip
    return spikes, membranes if want_membranes else None


def _check_input(x: Tensor, links: Links) -> None:
    if x.dtype not in DTYPES:
        raise ShapeError(f"window_scan: expected a floating point current, got {x.dtype}; call x.float() first.")
    if x.ndim < 2:
        raise ShapeError(
            f"window_scan: expected x as [P, B, ...], got {tuple(x.shape)}. Windows come first, then the batch: "
            "torch.stack(windows) of [B, ...]."
        )
    if x.shape[0] != len(links):
        raise ShapeError(
            f"window_scan: links has {len(links)} windows, x of shape {tuple(x.shape)} has {x.shape[0]}; make the "
            "links for as many windows as x has."
        )


def _checked_given(x: Tensor, given: Tensor | None, links: Links, equation: Equation) -> Tensor | None:
    """`given` if a window reads it, else None; a fusion may ignore what the links read."""
    needed = equation.links.reads_given
    if given is None:
        if needed:
            raise OptionError(
                f"window_scan: these links read given membranes, fuse={equation.fuse!r} uses them, and given is None; "
                f"pass given of shape {tuple(x.shape)}, or links that read none, such as in_turn({x.shape[0]})."
            )
        return None
    if not links.reads_given:
        raise OptionError("window_scan: given was passed, but no window of these links reads it; leave it out.")
    compute = compute_dtype(x.dtype)
    if given.shape != x.shape or given.dtype != compute or given.device != x.device:
        raise StateError(
            f"window_scan: expected given {tuple(x.shape)} {compute} on {x.device}, got {tuple(given.shape)} "
            f"{given.dtype} on {given.device}. Pass the membranes of this batch, one per window of x."
        )
    return given if needed else None


def _choose_backend(x: Tensor, equation: Equation, phi: Scalar, v_threshold: Scalar, backend: str) -> str:
    """Resolve the backend for this call."""
    no = _no_kernel(x, equation, phi, v_threshold)
    if no is not None:
        return dispatch.choose(backend, triton=no, numba=no)
    return choose_backend(x, equation.surrogate, backend)


def _no_kernel(x: Tensor, equation: Equation, phi: Scalar, v_threshold: Scalar) -> str | None:
    """Why no compiled kernel of the scan can run the call, whatever its surrogate and device; None if one can."""
    for name, scalar in (("phi", phi), ("v_threshold", v_threshold)):
        if isinstance(scalar, Tensor):
            return f"{name} is a tensor (learned), and the compiled window_scan takes numbers; float({name}) fixes it."
    if equation.fuse not in COMPILED:
        return f"fuse={equation.fuse!r} has no compiled kernel; those with one are {', '.join(COMPILED)}."
    if x.dtype == torch.float64:
        return "the compiled window_scan computes in float32, got float64 input."
    return None


def _flat(equation: Equation) -> tuple[list[int], str, float, str, bool, str, float]:
    """The equation as arguments a custom op can take."""
    e = equation
    return e.links.codes, e.fuse, e.leak, e.reset, e.strict, e.surrogate.name, e.surrogate.parameter


def _unflat(
    links: list[int], fuse: str, leak: float, reset: str, strict: bool, surrogate: str, parameter: float
) -> Equation:
    slope = Surrogate(surrogate, parameter)
    return Equation(Links.decode(links), fuse, leak, reset, strict, slope)  # type: ignore[arg-type]


def _kernels(backend: str):
    """The module with `forward` and `backward` on rows."""
    if backend == "triton":
        from spikefit.ops.window_scan import cuda

        return cuda
    from spikefit.ops.window_scan import cpu

    return cpu


def _wanted(layout: Layout, x: Tensor, want: bool) -> Tensor:
    """Room for membranes or their gradients, [P, B, ...] float32 in the order of `layout`; [0] if not wanted."""
    return layout.empty(x, torch.float32) if want else x.new_empty(0, dtype=torch.float32)


def _rows(layout: Layout, sequence: Tensor) -> Tensor:
    """[P, N] in memory order, or [0, 0] for nothing."""
    return layout.rows(sequence) if sequence.ndim > 1 else sequence.view(0, 0)


@torch.library.custom_op("spikefit::window_scan", mutates_args=())
def _forward(
    x: Tensor,
    given: Tensor | None,
    phi: float,
    v_threshold: float,
    links: list[int],
    fuse: str,
    leak: float,
    reset: str,
    strict: bool,
    surrogate: str,
    parameter: float,
    want_membranes: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(spikes, membranes); the latter empty unless wanted."""
    equation, layout = _unflat(links, fuse, leak, reset, strict, surrogate, parameter), Layout.of(x)
    spikes, membranes = layout.empty(x, x.dtype), _wanted(layout, x, want_membranes)
    if x.numel() > 0:
        _kernels(backend).forward(
            layout.input_rows(x),
            None if given is None else layout.rows(given),
            layout.rows(spikes),
            _rows(layout, membranes),
            phi,
            v_threshold,
            equation,
        )
    return spikes, membranes


@_forward.register_fake
def _(x, given, *rest):
    layout = Layout(x)
    return layout.empty(x, x.dtype), _wanted(layout, x, rest[-2])


@torch.library.custom_op("spikefit::window_scan_backward", mutates_args=())
def _backward(
    g: Tensor,
    q: Tensor | None,
    x: Tensor,
    given: Tensor | None,
    phi: float,
    v_threshold: float,
    links: list[int],
    fuse: str,
    leak: float,
    reset: str,
    strict: bool,
    surrogate: str,
    parameter: float,
    want_given: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(dx, dgiven) from the gradients of spikes and membranes; dgiven is empty unless wanted."""
    equation, layout = _unflat(links, fuse, leak, reset, strict, surrogate, parameter), Layout.of(x)
    dx, dgiven = layout.empty(x, x.dtype), _wanted(layout, x, want_given)
    if x.numel() > 0:
        _kernels(backend).backward(
            layout.rows(g.to(x.dtype)),
            None if q is None else layout.rows(q.float()),
            layout.input_rows(x),
            None if given is None else layout.rows(given),
            layout.rows(dx),
            _rows(layout, dgiven),
            phi,
            v_threshold,
            equation,
        )
    return dx, dgiven


@_backward.register_fake
def _(g, q, x, given, *rest):
    layout = Layout(x)
    return layout.empty(x, x.dtype), _wanted(layout, x, rest[-2])


def _save_inputs(ctx, inputs, output) -> None:
    x, given, *options, ctx.want_membranes, ctx.backend = inputs
    ctx.options = options
    ctx.save_for_backward(x, *([] if given is None else [given]))
    ctx.set_materialize_grads(False)


def _gradients(ctx, g, q):
    x, *given = ctx.saved_tensors
    none = [None] * (len(ctx.options) + 2)
    q = q if ctx.want_membranes else None
    if g is None and q is None:
        return None, None, *none
    want_given = ctx.needs_input_grad[1]
    dx, dgiven = _backward(
        torch.zeros_like(x) if g is None else g,
        q,
        x,
        given[0] if given else None,
        *ctx.options,
        want_given,
        ctx.backend,
    )
    return dx, dgiven if want_given else None, *none


_forward.register_autograd(_gradients, setup_context=_save_inputs)


def _no_second_derivative(ctx, *gradients):
    raise BackendError(
        "window_scan: the compiled kernels have no second derivative; call window_scan with backend='reference'."
    )


_backward.register_autograd(_no_second_derivative)

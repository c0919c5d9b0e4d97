"""The one door to the LIF sequence: it checks, chooses a backend per call, and registers the kernels with autograd."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from spikefit.errors import BackendError, OptionError, ShapeError, StateError
from spikefit.ops import dispatch
from spikefit.ops.custom_op import custom_op
from spikefit.ops.dtype import compute_dtype
from spikefit.ops.lif import reference
from spikefit.ops.lif.equation import Equation, check_coefficients, check_on_grid
from spikefit.ops.lif.reference import Scalar
from spikefit.ops.surrogate import FORMS, Surrogate, atan
from spikefit.ops.values import has_values

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Dynamics(NamedTuple):
    """What drives a membrane: the equation, and (leak, gain, v_threshold) as numbers or as a learned tensor [3]."""

    equation: Equation
    constants: tuple[float, float, float]
    learned: Tensor | None


class LIFGradients(NamedTuple):
    """Gradients of one LIF sequence; `leak`, `gain` and `v_threshold` are 0-d tensors summed over all neurons."""

    x: Tensor
    v_0: Tensor
    leak: Tensor
    gain: Tensor
    v_threshold: Tensor


def lif(
    x: Tensor,
    v_0: Tensor | None = None,
    *,
    leak: Scalar = 0.5,
    gain: Scalar = 1.0,
    v_threshold: Scalar = 1.0,
    v_reset: float | None = None,
    reset: bool = True,
    v_rest: float | None = None,
    strict: bool = False,
    detach_reset: bool = True,
    surrogate: Surrogate | str = atan(2),  # noqa: B008 (an immutable value)
    frac_bits: int | None = None,
    backend: dispatch.Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Run leaky integrate-and-fire neurons over a sequence, from membrane `v_0`.

        u_t = v_rest + leak (v_{t-1} - v_rest) + gain x_t        charge
        s_t = 1 if u_t >= v_threshold else 0                     fire (u_t > v_threshold if `strict`)
        v_t = u_t - v_threshold s_t                              soft reset (`v_reset=None`)
        v_t = u_t + s_t (v_reset - u_t)                          hard reset
        v_t = u_t                                                `reset=False`

    Between forward and backward the kernels keep `x` and `v_0` and rebuild the membrane; the reference keeps what
    autograd keeps.

    Args:
        x: input current, [T, B, ...], in the unit of `v_threshold`; float32, float64, float16 or bfloat16. A view that
            repeats one step (stride 0 along T) is read once.
        v_0: membrane before the first step, [B, ...]; zeros if None. float32, or float64 for float64 input.
        leak: share of the membrane kept per step, 0 <= leak <= 1; `1 - 1/tau` with tau in steps. Number or 0-d tensor.
        gain: factor on the input; `1/tau` when the input decays with the membrane. Number or 0-d tensor.
        v_threshold: firing level, > 0. Number or 0-d tensor.
        v_reset: None for a soft reset, else the level a hard reset goes to.
        reset: False for no reset at all.
        v_rest: level the membrane decays to; None means `v_reset` for a hard reset, else 0.
        strict: fire on u > v_threshold instead of u >= v_threshold.
        detach_reset: no gradient through the s inside the reset.
        surrogate: slope of the step, a `Surrogate` or its text, "atan(2)"; see `spikefit.ops.surrogate`.
        frac_bits: round the membrane to the grid of 2^-frac_bits, u_t = floor(leak v_{t-1}) + round(gain x_t), which
            can be run backwards to the bit; gradients go straight through. Needs a soft reset and leak = 1/2, 1/4, ...,
            or 3/4, 7/8, ..., which is rounded up: v - floor(v / 2^m) in steps of the grid, at leak = 1 - 2^-m.
        backend: "auto", "reference", "numba" (CPU) or "triton" (CUDA).

    Returns:
        (s, v_T): spikes in {0, 1}, [T, B, ...] with the dtype and memory order of `x`, and the membrane after the last
        step, [B, ...], float32 (float64 for float64 input). Arithmetic is float32 or float64 inside, whatever `x` is.

    Raises:
        ShapeError: no time or batch axis, T = 0, or an integer input.
        StateError: `v_0` of another shape, dtype or device than `x` asks for.
        OptionError: a coefficient outside its range.
        RangeError: a membrane that its grid cannot hold exactly.
        BackendError: the backend asked for cannot run this call.

    Source: Neftci, Mostafa, Zenke 2019, arXiv:1901.09948.
    """
    equation = Equation.make(
        v_reset=v_reset,
        reset=reset,
        v_rest=v_rest,
        strict=strict,
        detach_reset=detach_reset,
        surrogate=surrogate,
        frac_bits=frac_bits,
    )
    v_0 = checked_state("lif", x, v_0)
    dynamics = Dynamics(equation, *coefficients(leak, gain, v_threshold, v_0, frac_bits))
    return advance(x, v_0, dynamics, choose_backend(x, equation.surrogate, backend))


def lif_backward(
    g: Tensor,
    q: Tensor | None,
    x: Tensor,
    v_0: Tensor | None = None,
    spikes: Tensor | None = None,
    *,
    leak: Scalar = 0.5,
    gain: Scalar = 1.0,
    v_threshold: Scalar = 1.0,
    v_reset: float | None = None,
    reset: bool = True,
    v_rest: float | None = None,
    strict: bool = False,
    detach_reset: bool = True,
    surrogate: Surrogate | str = atan(2),  # noqa: B008 (an immutable value)
    frac_bits: int | None = None,
    backend: dispatch.Backend = "auto",
) -> LIFGradients:
    """The gradient of `lif`, given the gradients of its two results.

    The membrane is rebuilt from `x`. If `spikes` are given they take the place of the threshold in that pass, so that
    an `x` which was recomputed, and is off by rounding, cannot flip a spike:
    |error of u| <= gain |error of x| / (1 - leak).

    Args:
        g: dL/ds, [T, B, ...].
        q: dL/dv_T, [B, ...]; None for zeros.
        x, v_0: the inputs of the forward call.
        spikes: [T, B, ...] of any dtype, as the forward call returned them; None to threshold again.
        leak, gain, v_threshold, v_reset, reset, v_rest, strict, detach_reset, surrogate, frac_bits, backend: as in
            `lif`.

    Returns:
        LIFGradients; `x` has shape and dtype of `x`, the rest is in the compute dtype.

    Raises:
        As `lif`; ShapeError also if `g` or `spikes` differ from `x` in shape, StateError if `q` differs from `v_0`.
    """
    equation = Equation.make(
        v_reset=v_reset,
        reset=reset,
        v_rest=v_rest,
        strict=strict,
        detach_reset=detach_reset,
        surrogate=surrogate,
        frac_bits=frac_bits,
    )
    v_0 = checked_state("lif_backward", x, v_0)
    for name, tensor in (("g", g), ("spikes", spikes)):
        if tensor is not None and tensor.shape != x.shape:
            raise ShapeError(
                f"lif_backward: {name} must have the shape of x, {tuple(x.shape)}, got {tuple(tensor.shape)}."
            )
    q = v_0.new_zeros(()).expand_as(v_0) if q is None else q
    if q.shape != v_0.shape:
        raise StateError(
            f"lif_backward: expected q, the gradient of the last membrane, {tuple(v_0.shape)}, got {tuple(q.shape)}."
        )
    dynamics = Dynamics(equation, *coefficients(leak, gain, v_threshold, v_0, frac_bits))
    dx, dv_0, d_3 = retrace(g, q, x, v_0, spikes, dynamics, choose_backend(x, equation.surrogate, backend))
    return LIFGradients(dx, dv_0, *d_3.unbind())


def advance(x: Tensor, v_0: Tensor, dynamics: Dynamics, backend: str) -> tuple[Tensor, Tensor]:
    """`lif` on a chosen backend, without its checks."""
    equation, constants, learned = dynamics
    if backend == "reference":
        leak, gain, v_threshold = constants if learned is None else _in_range(learned)
        return reference.lif(x, v_0, leak=leak, gain=gain, v_threshold=v_threshold, equation=equation)
    return _lif_forward(x, v_0, learned, *constants, *flat(equation), backend)


@torch.no_grad()
def retrace(
    g: Tensor, q: Tensor, x: Tensor, v_0: Tensor, spikes: Tensor | None, dynamics: Dynamics, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`lif_backward` on a chosen backend, without its checks: (dx, dv_0, d(leak, gain, v_threshold) [3])."""
    equation, constants, learned = dynamics
    if backend == "reference":
        leak, gain, v_threshold = constants if learned is None else _in_range(learned)
        return reference.lif_backward(
            g, q, x, v_0, spikes, leak=leak, gain=gain, v_threshold=v_threshold, equation=equation
        )
    return _lif_backward(g, q, x, v_0, learned, spikes, *constants, *flat(equation), backend, True, True)


def _in_range(learned: Tensor) -> tuple[Tensor, ...]:
    """(leak, gain, v_threshold) [0-d], checked where reading them costs nothing."""
    # a GPU would have to be waited for
    if learned.device.type == "cpu" and has_values(learned):
        check_coefficients(*learned.tolist())
    return learned.unbind()


def checked_state(who: str, x: Tensor, v_0: Tensor | None) -> Tensor:
    """Check `x` and `v_0`; returns v_0, one zero repeated if None."""
    if x.dtype not in DTYPES:
        raise ShapeError(f"{who}: expected a floating point current, got {x.dtype}; call x.float() first.")
    if x.ndim < 2:
        raise ShapeError(
            f"{who}: expected x as [T, B, ...], got {tuple(x.shape)}. Time comes first: "
            "encoding.repeat(x, timesteps=T) adds it, x.unsqueeze(1) adds a batch axis."
        )
    if x.shape[0] == 0:
        raise ShapeError(f"{who}: expected at least one time step, got x of shape {tuple(x.shape)} with T = 0.")
    if v_0 is None:
        return x.new_zeros((), dtype=compute_dtype(x.dtype)).expand(x.shape[1:])
    return checked_membrane(who, v_0, x.shape[1:], x)


def checked_membrane(who: str, v: Tensor, shape: torch.Size, like: Tensor) -> Tensor:
    """`v` if it is a membrane of `shape` for a layer whose sequences are `like` in dtype and device.

    Raises:
        StateError: it is not.
    """
    compute = compute_dtype(like.dtype)
    if v.shape != shape or v.dtype != compute or v.device != like.device:
        raise StateError(
            f"{who}: expected a membrane {tuple(shape)} {compute} on {like.device}, got {tuple(v.shape)} {v.dtype} on "
            f"{v.device}. Pass the state of this batch, or None to start from zero."
        )
    return v


def dynamics_of(
    like: Tensor,
    *,
    leak: Scalar,
    gain: Scalar,
    v_threshold: Scalar,
    v_reset: float | None,
    reset: bool,
    v_rest: float | None,
    strict: bool,
    detach_reset: bool,
    surrogate: Surrogate | str,
    frac_bits: int | None,
    backend: dispatch.Backend,
) -> Dynamics:
    """The options of `lif` as one value, for a layer whose weights are `like` in dtype and device."""
    equation = Equation.make(
        v_reset=v_reset,
        reset=reset,
        v_rest=v_rest,
        strict=strict,
        detach_reset=detach_reset,
        surrogate=surrogate,
        frac_bits=frac_bits,
    )
    values = like.new_empty(0, dtype=compute_dtype(like.dtype))
    return Dynamics(equation, *coefficients(leak, gain, v_threshold, values, frac_bits))


def coefficients(
    leak: Scalar, gain: Scalar, v_threshold: Scalar, v_0: Tensor, frac_bits: int | None = None
) -> tuple[tuple[float, float, float], Tensor | None]:
    """(numbers, None) if all are numbers, else (unused numbers, tensor [3] through which gradients flow)."""
    given = (leak, gain, v_threshold)
    tensors = [c for c in given if isinstance(c, Tensor)]
    for c in tensors:
        if c.ndim != 0:
            raise ShapeError(
                f"lif: leak, gain and v_threshold are numbers or 0-d tensors, got a tensor {tuple(c.shape)}."
            )
    if tensors and frac_bits is not None:
        raise OptionError(
            "lif: a membrane on a grid (frac_bits) needs fixed numbers for leak (2^-m or 1 - 2^-m), gain and "
            "v_threshold, got learned ones; use neuron 'lif', or leave out frac_bits."
        )
    if not tensors:
        check_coefficients(*given)  # type: ignore[arg-type]
        if frac_bits is not None:
            check_on_grid(frac_bits, leak, v_threshold)  # type: ignore[arg-type]
        return (float(leak), float(gain), float(v_threshold)), None
    return (0.0, 0.0, 0.0), torch.stack([torch.as_tensor(c, dtype=v_0.dtype, device=v_0.device) for c in given])


def choose_backend(x: Tensor, surrogate: Surrogate, backend: str) -> str:
    """Resolve the backend for this call."""
    if FORMS[surrogate.name].kernel is None:
        no = f"surrogate {surrogate.name} has no compiled slope."
        return dispatch.choose(backend, triton=no, numba=no)
    asked = dispatch.resolve(backend)
    triton = dispatch.triton_refusal(x) if asked == "triton" else dispatch.auto_triton_refusal(x)
    return dispatch.choose(backend, triton=triton, numba=dispatch.numba_refusal(x))


def left_grid(v_T: Tensor, equation: Equation) -> bool:
    """Whether a kernel marked membranes that left the range of their grid; the reference says how far they went."""
    return equation.frac_bits is not None and not bool(v_T.isfinite().all())


def flat(equation: Equation) -> tuple[str, float, float, bool, bool, str, float, int | None]:
    """The equation as arguments a custom op can take."""
    e, slope = equation, equation.surrogate
    levels = float(e.v_reset), float(e.v_rest)
    return e.reset, *levels, e.strict, e.detach_reset, slope.name, float(slope.parameter), e.frac_bits


class Layout:
    """How a sequence [T, B, ...] lies in memory, and its view as rows [T, N] (or [1, N] if one step is repeated).

    Elementwise kernels do not care which axis is which, as long as all tensors share one order; so channels-last
    sequences are read as they are. A sequence whose steps are not dense is copied first.
    """

    def __init__(self, x: Tensor) -> None:
        strides = x.stride()
        inner = sorted(range(1, x.ndim), key=lambda i: (-strides[i], i))
        self.order = (0, *inner)
        self.shape = tuple(x.shape[i] for i in self.order)
        step = x[0].permute([i - 1 for i in inner])
        self.repeated = x.shape[0] > 1 and x.stride(0) == 0 and step.is_contiguous()

    @staticmethod
    def of(x: Tensor) -> "Layout":
        """The layout of a tensor with values, found once per shape and strides."""
        return _layout(x.shape, x.stride())

    def rows(self, x: Tensor) -> Tensor:
        """[T, B, ...] -> [T, N] in memory order; copies only if `x` lies differently."""
        return x.permute(self.order).contiguous().view(self.shape[0], -1)

    def input_rows(self, x: Tensor) -> Tensor:
        """As `rows`, but [1, N] for a repeated step."""
        return self.rows(x) if not self.repeated else x.permute(self.order)[0].reshape(1, -1)

    def flat(self, v: Tensor) -> Tensor:
        """[B, ...] -> [N]; a repeated value stays one value with stride 0."""
        if not any(v.stride()):
            return v.as_strided((v.numel(),), (0,))
        return v.permute([i - 1 for i in self.order[1:]]).contiguous().view(-1)

    def empty(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A sequence [T, B, ...] in this order."""
        inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        return like.new_empty(self.shape, dtype=dtype).permute(inverse)

    def empty_state(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """A membrane [B, ...] in this order."""
        order = [i - 1 for i in self.order[1:]]
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return like.new_empty(self.shape[1:], dtype=dtype).permute(inverse)


@functools.lru_cache(maxsize=256)
def _layout(shape: torch.Size, strides: tuple[int, ...]) -> Layout:
    return Layout(torch.empty_strided(shape, strides, device="meta"))


def _state_row(layout: Layout, v: Tensor, backend: str) -> Tensor:
    """A membrane as [N]; numba also reads one repeated value, which spares filling a tensor with zeros."""
    row = layout.flat(v)
    return row.contiguous() if backend == "triton" else row


def _kernels(backend: str):
    """The module with `forward` and `backward` on rows."""
    if backend == "triton":
        from spikefit.ops.lif import cuda

        return cuda
    from spikefit.ops.lif import cpu

    return cpu


@functools.lru_cache(maxsize=256)
def unflat(
    reset: str,
    v_reset: float,
    v_rest: float,
    strict: bool,
    detach_reset: bool,
    surrogate: str,
    parameter: float,
    frac_bits: int | None,
) -> Equation:
    slope = Surrogate(surrogate, parameter)
    return Equation(reset, v_reset, v_rest, strict, detach_reset, slope, frac_bits)  # type: ignore[arg-type]


@custom_op("spikefit::lif")
def _lif_forward(
    x: Tensor,
    v_0: Tensor,
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    equation = unflat(reset, v_reset, v_rest, strict, detach_reset, surrogate, parameter, frac_bits)
    layout = Layout.of(x)
    spikes, v_T = layout.empty(x, x.dtype), layout.empty_state(x, v_0.dtype)
    _kernels(backend).forward(
        layout.input_rows(x),
        _state_row(layout, v_0, backend),
        layout.rows(spikes),
        layout.flat(v_T),
        numbers(learned, (leak, gain, v_threshold), backend),
        equation,
    )
    if left_grid(v_T, equation):
        reference.lif(x, v_0, leak=leak, gain=gain, v_threshold=v_threshold, equation=equation)
    return spikes, v_T


@_lif_forward.register_fake
def _(x, v_0, *rest):
    layout = Layout(x)
    return layout.empty(x, x.dtype), layout.empty_state(x, v_0.dtype)


@custom_op("spikefit::lif_backward")
def _lif_backward(
    g: Tensor,
    q: Tensor,
    x: Tensor,
    v_0: Tensor,
    learned: Tensor | None,
    spikes: Tensor | None,
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
    want_state: bool,
    want_coefficients: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dv_0, d(leak, gain, v_threshold)); dv_0 is empty, and the last zeros, unless wanted."""
    equation = unflat(reset, v_reset, v_rest, strict, detach_reset, surrogate, parameter, frac_bits)
    layout = Layout.of(x)
    dx, dv_0 = layout.empty(x, x.dtype), _state_gradient(layout, v_0, want_state)
    d_3 = _kernels(backend).backward(
        layout.rows(g.to(x.dtype)),
        _state_row(layout, q.to(v_0.dtype), backend),
        layout.input_rows(x),
        _state_row(layout, v_0, backend),
        None if spikes is None else layout.rows(spikes.to(x.dtype)),
        layout.rows(dx),
        layout.flat(dv_0) if want_state else dv_0,
        numbers(learned, (leak, gain, v_threshold), backend),
        equation,
        want_coefficients,
    )
    return dx, dv_0, d_3


@_lif_backward.register_fake
def _(g, q, x, v_0, *rest):
    layout = Layout(x)
    return layout.empty(x, x.dtype), _state_gradient(layout, v_0, rest[-2]), v_0.new_empty(3)


def _state_gradient(layout: Layout, v_0: Tensor, want: bool) -> Tensor:
    return layout.empty_state(v_0, v_0.dtype) if want else v_0.new_empty(0)


def numbers(learned: Tensor | None, constants: tuple[float, float, float], backend: str):
    """(leak, gain, v_threshold) as numbers; on a GPU learned ones stay a tensor, which spares a synchronisation."""
    if learned is None:
        return constants
    if backend == "triton":
        return learned
    values = tuple(learned.tolist())
    check_coefficients(*values)
    return values


def _save_inputs(ctx, inputs, output) -> None:
    x, v_0, learned, *ctx.options = inputs
    ctx.save_for_backward(x, v_0, *([] if learned is None else [learned]))
    ctx.set_materialize_grads(False)


def _backward(ctx, g, q):
    x, v_0, *learned = ctx.saved_tensors
    none = [None] * len(ctx.options)
    if g is None and q is None:
        return None, None, None, *none
    dx, dv_0, d_3 = _lif_backward(
        torch.zeros_like(x) if g is None else g,
        v_0.new_zeros(()).expand_as(v_0) if q is None else q,
        x,
        v_0,
        learned[0] if learned else None,
        None,
        *ctx.options,
        ctx.needs_input_grad[1],
        bool(learned),
    )
    return dx, dv_0 if ctx.needs_input_grad[1] else None, d_3 if learned else None, *none


_lif_forward.register_autograd(_backward, setup_context=_save_inputs)


def _no_second_derivative(ctx, *gradients):
    raise BackendError("lif: the compiled kernels have no second derivative; call lif with backend='reference'.")


_lif_backward.register_autograd(_no_second_derivative)

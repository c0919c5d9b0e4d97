"""Choose the backend of an operation, per call and never in silence."""

import contextlib
import contextvars
import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Literal, get_args

import torch

from spikefit.errors import BackendError, OptionError

Backend = Literal["auto", "reference", "numba", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

_default: contextvars.ContextVar[str] = contextvars.ContextVar("spikefit_backend", default="auto")
# The same for torch.compile, which cannot read context variables but traces again when a global has changed.
_default_when_traced = "auto"

# A module looked up once: find_spec reads the disk.
_installed: dict[str, bool] = {}


def installed(package: str) -> bool:
    """Whether `package` can be imported; it is not imported here."""
    if package not in _installed:
        _installed[package] = find_spec(package) is not None
    return _installed[package]


@contextlib.contextmanager
def use_backend(backend: Backend | str) -> Iterator[None]:
    """Within the block, operations called with `backend="auto"` use `backend`.

    An operation keeps for its backward the backend chosen in forward, so only the forward needs to be inside.

    Args:
        backend: "auto", "reference", "numba" or "triton".

    Raises:
        OptionError: unknown name.

    Example:
        with spikefit.use_backend("reference"):
            logits = model(x)
    """
    global _default_when_traced
    before, _default_when_traced = _default_when_traced, check_backend(backend)
    token = _default.set(backend)
    try:
        yield
    finally:
        _default.reset(token)
        _default_when_traced = before


def check_backend(backend: str) -> str:
    """Return `backend` if it is a known name, else raise OptionError."""
    if backend not in BACKENDS:
        raise OptionError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}.")
    return backend


def resolve(backend: str) -> str:
    """The wish that counts: `backend`, or the default of `use_backend` where it is "auto"."""
    if check_backend(backend) != "auto":
        return backend
    return _default_when_traced if torch.compiler.is_compiling() else _default.get()


def choose(backend: str, *, triton: str | None, numba: str | None) -> str:
    """Resolve `backend` to "reference", "numba" or "triton".

    Args:
        backend: the wish; "auto" takes the default of `use_backend`, else the fastest that can run.
        triton, numba: None if that backend can run the call, else the reason why not.

    Raises:
        BackendError: a backend asked for by name cannot run the call; the message is its reason.
    """
    backend = resolve(backend)
    refusal = {"triton": triton, "numba": numba}
    if backend == "auto":
        return next((name for name, reason in refusal.items() if reason is None), "reference")
    reason = refusal.get(backend)
    if reason is not None:
        raise BackendError(f"backend={backend!r}: {reason} Use backend='auto' to let spikefit choose.")
    return backend


def numba_refusal(x: torch.Tensor) -> str | None:
    """The reason why a numba kernel cannot take `x`, or None."""
    if not installed("numba"):
        return "numba is not installed; pip install 'spikefit[cpu]'."
    if x.device.type != "cpu":
        return f"numba kernels run on CPU tensors, got a tensor on {x.device}."
    return None


def triton_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    try:
        from triton import knobs
    except ImportError:  # before Triton 3.4
        return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    return bool(knobs.runtime.interpret)


def triton_refusal(x: torch.Tensor) -> str | None:
    """The reason why a Triton kernel cannot take `x`, or None."""
    if not installed("triton"):
        return "triton is not installed; pip install 'spikefit[cuda]'."
    if x.dtype == torch.float64:
        return "Triton kernels compute in float32, got float64 input, which needs backend='reference' on a GPU."
    if x.device.type == "cuda":
        return None
    if x.device.type == "cpu" and triton_interpreted():
        return None
    return f"Triton kernels run on CUDA tensors, got a tensor on {x.device} (TRITON_INTERPRET=1 runs them on CPU)."


# what torch.compiler.assume_constant_result does, without its import of the compiler, which takes seconds
for _function in (installed, triton_interpreted):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010


def auto_triton_refusal(x: torch.Tensor) -> str | None:
    """As `triton_refusal`, but on CPU the interpreter is a test tool and never an automatic choice."""
    if x.device.type != "cuda":
        return f"Triton kernels run on CUDA tensors, got a tensor on {x.device}."
    return triton_refusal(x)

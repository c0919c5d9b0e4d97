"""Threads of the numba kernels: as many as torch uses and, where both run on GNU OpenMP, the very same ones.

A worker of OpenMP spins for some milliseconds after its work. Two OpenMP runtimes in one process therefore take each
other's cores whenever torch and a numba kernel alternate; one runtime for both hands the work on in microseconds.
"""

import contextlib
import ctypes
import functools
from pathlib import Path

import numba
import torch


def use_torch_threads() -> None:
    """Let the next numba kernels run on `torch.get_num_threads()` threads (at most those numba was started with)."""
    _share_runtime()
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


@functools.cache
def _share_runtime() -> None:
    """Make numba's OpenMP layer find torch's copy of the runtime first; speed only, results do not depend on it."""
    threads = torch.get_num_threads()
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        # a symbol of the global scope goes before the one of the library that numba's layer names itself
        with contextlib.suppress(OSError):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    numba.set_num_threads(numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    # the start of numba's layer sets the thread count of the runtime, which is now torch's too
    torch.set_num_threads(threads)

"""Choose how Triton kernels run, before anything imports triton.

Triton decides when a kernel is defined whether it will be compiled or interpreted. Without a GPU the kernels run in the
interpreter, on CPU tensors (tests/ops); with one they are compiled (tests/gpu).
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

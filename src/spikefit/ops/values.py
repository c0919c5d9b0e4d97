"""Whether a tensor can be looked into."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def has_values(x: Tensor) -> bool:
    """False for tensors of predictions and of graphs that are being compiled, and for empty ones."""
    return not (isinstance(x, FakeTensor) or x.is_meta or torch.compiler.is_compiling()) and x.numel() > 0

"""The dtype that kernels compute in."""

import torch


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of membranes, statistics and sums of a layer in `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32

"""Channel normalisation: the statistics and the affine map of batch norm, over a sequence or per step."""

from spikefit.ops.norm.op import (
    Moments,
    NormGradient,
    affine,
    channel_norm,
    combine,
    gradient_sums,
    moments,
    norm_gradient,
    scale_and_shift,
)
from spikefit.ops.norm.renorm import renorm, running_map

__all__ = [
    "Moments",
    "NormGradient",
    "affine",
    "channel_norm",
    "combine",
    "gradient_sums",
    "moments",
    "norm_gradient",
    "renorm",
    "running_map",
    "scale_and_shift",
]

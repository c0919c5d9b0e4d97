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

__all__ = [
    "Moments",
    "NormGradient",
    "affine",
    "channel_norm",
    "combine",
    "gradient_sums",
    "moments",
    "norm_gradient",
    "scale_and_shift",
]

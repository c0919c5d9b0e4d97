"""Channel normalisation: the statistics and the affine map of batch norm, over a sequence or per step."""

from spikefit.ops.norm.op import Moments, affine, channel_norm

__all__ = ["Moments", "affine", "channel_norm"]

"""The neuron without a membrane: a threshold, which T-RevSNN has everywhere but between its time steps."""

from torch import Tensor, nn

from spikefit.ops.threshold import fire


class Threshold(nn.Module):
    """Spikes of an analog value, with no memory of earlier ones: s = 1 if v >= 1/2 else 0.

    Backward passes the gradient where 0 <= v <= 1 and stops it elsewhere; see `spikefit.ops.threshold`.

    Shapes:
        any -> the same, in {0, 1}. There is no state.
    """

    def forward(self, v: Tensor) -> Tensor:
        """Spikes in {0, 1}, shape and dtype of `v`."""
        return fire(v)

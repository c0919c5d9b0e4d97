"""Encodings of static samples, and the one transpose of samples that are sequences."""

import torch
from torch import Tensor

from spikefit.errors import OptionError, ShapeError


def check_timesteps(who: str, timesteps: int) -> int:
    """`timesteps` as it is.

    Raises:
        OptionError: no whole number of at least 1.
    """
    if isinstance(timesteps, bool) or not isinstance(timesteps, int) or timesteps < 1:
        raise OptionError(f"{who}: timesteps must be a whole number of at least 1, got {timesteps!r}.")
    return timesteps


def _check_tensor(who: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise ShapeError(
            f"{who}: expected a tensor [B, ...], got {type(x).__name__}; event recordings need encoding.event_frames, "
            "arrays torch.from_numpy."
        )


def repeat(x: Tensor, timesteps: int) -> Tensor:
    """Show the same sample at every step (direct coding): x_t = x.

    Args:
        x: [B, ...].
        timesteps: T >= 1.

    Returns:
        [T, B, ...], a view that repeats `x` in place; units compute weight and norm of such a sequence once.

    Raises:
        OptionError: timesteps below 1.
        ShapeError: no tensor, or no batch axis.

    Source: Rueckauer et al. 2017, doi:10.3389/fnins.2017.00682 (analog input to the first layer).
    """
    _check_tensor("encoding.repeat", x)
    if x.ndim < 2:
        raise ShapeError(f"encoding.repeat: expected x as [B, ...], got {tuple(x.shape)}; x.unsqueeze(0) adds a batch.")
    return x.unsqueeze(0).expand(check_timesteps("encoding.repeat", timesteps), *x.shape)


def rate(x: Tensor, timesteps: int, *, generator: torch.Generator | None = None) -> Tensor:
    """Poisson coding: s_t ~ Bernoulli(x) at every step, independently.

    Args:
        x: [B, ...], firing probability per step, in [0, 1].
        timesteps: T >= 1.
        generator: source of the random numbers; None takes torch's global one.

    Returns:
        [T, B, ...] of 0 and 1, dtype of `x`.

    Raises:
        OptionError: timesteps below 1, or values outside [0, 1].
        ShapeError: no tensor.

    Source: Diehl, Cook 2015, doi:10.3389/fncom.2015.00099 (Poisson-distributed input).
    """
    check_timesteps("encoding.rate", timesteps)
    _check_tensor("encoding.rate", x)
    if x.numel() and not (float(x.min()) >= 0 and float(x.max()) <= 1):
        raise OptionError(
            f"encoding.rate: probabilities must lie in [0, 1], got {float(x.min()):.3g} to {float(x.max()):.3g}; "
            "leave out mean and std of the data, or use encoding.repeat."
        )
    noise = torch.rand((timesteps, *x.shape), generator=generator, dtype=torch.float32).to(x.device)
    return (noise < x).to(x.dtype)


def latency(x: Tensor, timesteps: int) -> Tensor:
    """One spike per value, the earlier the larger: at step floor((1 - x) (T - 1) + 1/2); none for x = 0.

    Args:
        x: [B, ...], in [0, 1].
        timesteps: T >= 1.

    Returns:
        [T, B, ...] of 0 and 1, dtype of `x`.

    Raises:
        OptionError: timesteps below 1, or values outside [0, 1].
        ShapeError: no tensor.

    Source: Thorpe, Delorme, Van Rullen 2001, doi:10.1016/S0893-6080(01)00083-1.
    """
    check_timesteps("encoding.latency", timesteps)
    _check_tensor("encoding.latency", x)
    if x.numel() and not (float(x.min()) >= 0 and float(x.max()) <= 1):
        raise OptionError(
            f"encoding.latency: values must lie in [0, 1], got {float(x.min()):.3g} to {float(x.max()):.3g}; "
            "leave out mean and std of the data."
        )
    first = ((1 - x) * (timesteps - 1) + 0.5).floor()
    steps = torch.arange(timesteps, device=x.device, dtype=x.dtype).view(-1, *[1] * x.ndim)
    return ((steps == first) & (x > 0)).to(x.dtype)


def sequence(x: Tensor) -> Tensor:
    """Samples that are sequences: [B, T, ...] -> [T, B, ...], the one transpose between loader and network.

    Args:
        x: [B, T, ...].

    Returns:
        [T, B, ...], contiguous.

    Raises:
        ShapeError: no tensor, or no time axis.
    """
    _check_tensor("encoding.sequence", x)
    if x.ndim < 3:
        raise ShapeError(
            f"encoding.sequence: expected x as [B, T, ...], got {tuple(x.shape)}; static data need encoding.repeat."
        )
    return x.transpose(0, 1).contiguous()

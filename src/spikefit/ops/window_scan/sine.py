"""Sine and cosine in float32 as one fixed sequence of additions and multiplications, the same on every backend.

    n = round(y / pi),   r = y - n pi,   sin y = (-1)^n sin r,   cos y = (-1)^n cos r
    sin r = r + r z (S_0 + S_1 z + S_2 z^2 + S_3 z^3),            z = r^2
    cos r = 1 - z/2 + z^2 (C_0 + C_1 z + C_2 z^2 + C_3 z^3)

pi is subtracted in three parts, of which n times the first two is exact (Cody and Waite 1980, Software Manual for the
Elementary Functions). The coefficients minimise the largest error on |r| <= 1.0005 pi/2. Error at most 2e-7 for
|y| <= 1000; the library functions of torch, numba and Triton are as good, but differ in their last bit, which would
flip spikes. float64 takes those of torch.
"""

import math

import torch
from torch import Tensor

S = (-0.1666665705858382, 0.008333016355319916, -0.0001980654710072451, 2.599903249092781e-06)
C = (0.04166665572994251, -0.0013888568213190114, 2.476924066917087e-05, -2.619248405542711e-07)

PER_PI = 1 / math.pi
# 8 and 13 digits, so that products with a whole number of up to 11 digits are exact, and the rest
PI_HIGH = 201 / 64
PI_MIDDLE = round((math.pi - PI_HIGH) * 2**22) / 2**22
PI_LOW = math.pi - PI_HIGH - PI_MIDDLE
# Added and subtracted, 1.5 2^23 rounds a float32 below 2^22 to a whole number, half to even.
ROUNDER = 12582912.0


def sine(y: Tensor) -> Tensor:
    """sin y, elementwise; shape and dtype of `y`, half precision computed in float32. Differentiable at any order."""
    if y.dtype == torch.float64:
        return torch.sin(y)
    return _Sine.apply(y) if y.dtype == torch.float32 else _Sine.apply(y.float()).to(y.dtype)


def cosine(y: Tensor) -> Tensor:
    """cos y, as `sine`."""
    if y.dtype == torch.float64:
        return torch.cos(y)
    return _Cosine.apply(y) if y.dtype == torch.float32 else _Cosine.apply(y.float()).to(y.dtype)


class _Sine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        r, sign = _reduced(y)
        z = r * r
        p = ((S[3] * z + S[2]) * z + S[1]) * z + S[0]
        return sign * (r + r * z * p)

    @staticmethod
    def backward(ctx, g: Tensor):
        return g * cosine(ctx.saved_tensors[0])


class _Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        r, sign = _reduced(y)
        z = r * r
        p = ((C[3] * z + C[2]) * z + C[1]) * z + C[0]
        return sign * ((1 - 0.5 * z) + z * z * p)

    @staticmethod
    def backward(ctx, g: Tensor):
        return -(g * sine(ctx.saved_tensors[0]))


def _reduced(y: Tensor) -> tuple[Tensor, Tensor]:
    """(r, (-1)^n) with y = n pi + r, |r| <= pi/2."""
    n = _nearest(y * PER_PI)
    r = ((y - n * PI_HIGH) - n * PI_MIDDLE) - n * PI_LOW
    odd = n - 2 * _nearest(n * 0.5)
    return r, 1 - 2 * (odd * odd)


def _nearest(y: Tensor) -> Tensor:
    return (y + ROUNDER) - ROUNDER

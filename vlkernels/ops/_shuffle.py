"""Pixel shuffle, norms and activations in plain PyTorch, for the references of the dense projectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
}
NORMS = ("none", "layer", "rms")


def normalised(
    x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float = 0.0
) -> Tensor:
    """LayerNorm or RMSNorm over the last axis, times (weight + offset), plus bias; statistics in float32 at least."""
    if norm == "none":
        return x
    if norm == "layer":
        weight = weight if weight is None or not offset else weight + offset
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset:  # Gemma's: scaled before it is rounded
        return (wide * (weight.to(wide.dtype) + offset)).to(x.dtype)
    return wide.to(x.dtype) if weight is None else wide.to(x.dtype) * weight


def shuffled(x: Tensor, s: int) -> Tensor:
    """(B, h, w, C) -> (B, h w / s², s² C), channels in the order (row, column, channel)."""
    if s == 1:
        return x
    B, h, w, C = x.shape
    return x.view(B, h // s, s, w // s, s, C).transpose(2, 3).reshape(B, h * w // (s * s), s * s * C)


def unshuffled(y: Tensor, shape: tuple[int, ...], s: int) -> Tensor:
    """The inverse of shuffled: tokens (.., s² C) back to x's shape (B, h, w, C)."""
    if s == 1:
        return y.view(shape)
    B, h, w, C = shape
    return y.view(B, h // s, w // s, s, s, C).transpose(2, 3).reshape(B, h, w, C)


def merged(x: Tensor, m: int) -> Tensor:
    """(..., n, C) -> (..., n / m, m C)"""
    return x if m == 1 else x.reshape(*x.shape[:-2], x.shape[-2] // m, m * x.shape[-1])

"""Pixel shuffle, norms and activations in plain PyTorch, for the references of the dense projectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check

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


def check_shuffle_and_norm(
    x: Tensor, shuffle: int, norm: str, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> int:
    """The channels after the shuffle, or an error that names the argument that does not fit."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; accepted: {', '.join(NORMS)}")
    if shuffle > 1 and (x.dim() != 4 or x.shape[1] % shuffle or x.shape[2] % shuffle):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; accepted with shuffle={shuffle}: (B, h, w, C), h and w multiples of it"
        )
    channels = x.shape[-1] * shuffle * shuffle
    _check.shape("norm_weight", norm_weight, (channels,), "(C shuffle²,)")
    _check.shape("norm_bias", norm_bias, (channels,), "(C shuffle²,)")
    if norm == "none" and (norm_weight is not None or norm_bias is not None):
        raise ValueError('norm is "none", yet norm_weight or norm_bias is given')
    if norm == "rms" and norm_bias is not None:
        raise ValueError("norm_bias is given; RMSNorm has none")
    return channels


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

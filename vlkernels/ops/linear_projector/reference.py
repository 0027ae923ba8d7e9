"""linear_projector: [pixel shuffle] -> [norm] -> linear, the one-layer connectors that have something to fuse.

Idefics3 and SmolVLM (arXiv 2408.12637: shuffle), Gemma 3 (2503.19786: RMSNorm); survey eq. 18.
Dims: T all output rows, C vision width, K = C times the tokens merged into one, N text width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._shuffle import check_shuffle_and_norm, normalised, shuffled


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-5,
    norm_offset: float = 0.0,
    shuffle: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = norm(shuffle(x)) Wᵀ + bias.

    Args:
        x: (..., C); with shuffle s > 1 (B, h, w, C), both sides multiples of s.
        weight: (N, K), K = C s², any strides (Gemma 3 stores its transpose). bias: (N,).
        norm_weight, norm_bias: (C s²); RMSNorm has no bias.
        norm: "none", "layer" (biased variance) or "rms", over the channels after the shuffle.
        eps: added to the variance, or the mean square.
        norm_offset: added to norm_weight (Gemma's RMSNorm: 1).
        shuffle: s; each s x s neighbourhood becomes one token with channels in the order (row, column, channel).
        dtype: compute everything in this dtype; autocast sets it. The norm's statistics are float32 in any case.

    Returns: y (..., N), or (B, h w / s², N) with a shuffle, in `dtype`, else in x's dtype.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if dtype is not None:
        x, weight, bias, norm_weight, norm_bias = (
            t if t is None else t.to(dtype) for t in (x, weight, bias, norm_weight, norm_bias)
        )
    return F.linear(normalised(shuffled(x, shuffle), norm, norm_weight, norm_bias, eps, norm_offset), weight, bias)


def residuals(x, weight, bias, norm_weight, norm_bias, norm, eps, norm_offset, shuffle, dtype) -> tuple[Tensor]:
    """What a kernel's forward saves besides arguments: the norm's (mean, rstd)."""
    rows = x.numel() // (x.shape[-1] * shuffle * shuffle)
    return (x.new_empty((rows, 2) if norm != "none" else (0,), dtype=torch.float32),)


def check(x, weight, bias, norm_weight, norm_bias, norm, eps, norm_offset, shuffle, dtype) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"x": x, "weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    _check.floating(**tensors)
    _check.same_device(**tensors)
    if shuffle < 1:
        raise ValueError(f"shuffle is {shuffle}; accepted: 1 or more")
    if x.dim() < 1 or weight.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; accepted: x (..., C), weight (N, K)"
        )
    channels = check_shuffle_and_norm(x, shuffle, norm, norm_weight, norm_bias)
    if weight.shape[1] != channels:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; accepted for x {tuple(x.shape)}: {channels} columns")
    _check.shape("bias", bias, (weight.shape[0],), "(N,)")
    if norm_offset and norm_weight is None:
        raise ValueError(f"norm_offset is {norm_offset}; accepted: 0 without a norm_weight")
    if dtype is None:
        _check.same_dtype(" (or pass dtype=, or use autocast)", **tensors)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    return x, weight, bias, norm_weight, norm_bias, norm, float(eps), float(norm_offset), shuffle, dtype


def draw(*values) -> tuple:
    """Nothing is random here."""
    return values

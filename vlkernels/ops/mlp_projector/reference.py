"""mlp_projector: [pixel shuffle] -> [norm] -> linear -> activation -> linear, the dense connector of most vision-LLMs.

LLaVA-1.5 (arXiv 2310.03744), InternVL (2312.14238), Aya Vision, Qwen-VL's mergers; survey eq. 19.
Dims: T all output rows, C vision width, K = C times the tokens merged into one, F inner width, N text width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check

ACTS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
    "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
}
NORMS = ("none", "layer", "rms")


def forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    act: str = "gelu",
    gated: bool = False,
    norm: str = "none",
    eps: float = 1e-5,
    shuffle: int = 1,
    merge: int = 1,
    level: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = act(norm(x) W1ᵀ + b1) W2ᵀ + b2; gated: h = act(second half) * first half in place of act(.).

    Args:
        x: (..., C); with shuffle s > 1 (B, h, w, C), both sides multiples of s.
        w1: (F, K), or (2F, K) when gated, K = C s² merge. w2: (N, F). b1, b2: (F) or (2F), and (N).
        norm_weight, norm_bias: (C s²); RMSNorm has no bias.
        act: "gelu" (erf), "gelu_tanh", "silu", "relu", "quick_gelu".
        gated: the gate is the second half of the first product (Aya Vision, Cohere2Vision).
        norm: "none", "layer" (biased variance) or "rms", over the channels after the shuffle and before the merge.
        eps: added to the variance, or the mean square.
        shuffle: s; each s x s neighbourhood becomes one token with channels in the order (row, column, channel).
        merge: m adjacent rows become one, after the norm (Qwen2-VL's merger: 4).
        level: 0 keeps the first product for backward, 1 recomputes it (one matrix product more, less memory).
        dtype: compute everything in this dtype; autocast sets it. The norm's statistics are float32 in any case.

    Returns: y (..., N), or (B, h w / s², N) with a shuffle, in `dtype`, else in x's dtype.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if dtype is not None:
        x, w1, w2, b1, b2, norm_weight, norm_bias = (
            t if t is None else t.to(dtype) for t in (x, w1, w2, b1, b2, norm_weight, norm_bias)
        )
    x = shuffled(x, shuffle)
    if norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    elif norm == "rms":
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        x = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
        x = x if norm_weight is None else x * norm_weight
    x = merged(x, merge)
    pre = F.linear(x, w1, b1)
    if gated:
        value, gate = pre.chunk(2, -1)
        h = ACTS[act](gate) * value
    else:
        h = ACTS[act](pre)
    return F.linear(h, w2, b2)


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


def residuals(x, w1, w2, b1, b2, norm_weight, norm_bias, act, gated, norm, eps, shuffle, merge, level, dtype):
    """What a kernel's forward saves besides arguments: pre (T, F or 2F) at level 0, and the norm's (mean, rstd)."""
    channels = x.shape[-1] * shuffle * shuffle
    rows = x.numel() // channels
    pre = (rows // merge, w1.shape[0]) if level == 0 else (0,)
    stats = (rows, 2) if norm != "none" else (0,)
    return x.new_empty(pre, dtype=dtype or x.dtype), x.new_empty(stats, dtype=torch.float32)


def check(x, w1, w2, b1, b2, norm_weight, norm_bias, act, gated, norm, eps, shuffle, merge, level, dtype) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"x": x, "w1": w1, "w2": w2, "b1": b1, "b2": b2, "norm_weight": norm_weight, "norm_bias": norm_bias}
    _check.floating(**tensors)
    _check.same_device(**tensors)
    if act not in ACTS:
        raise ValueError(f"act is {act!r}; accepted: {', '.join(ACTS)}")
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; accepted: {', '.join(NORMS)}")
    if level not in (0, 1):
        raise ValueError(f"level is {level!r}; accepted: 0 (keep the first product), 1 (recompute it)")
    if shuffle < 1 or merge < 1:
        raise ValueError(f"shuffle is {shuffle}, merge {merge}; accepted: 1 or more")
    if x.dim() < (2 if merge > 1 else 1) or w1.dim() != 2 or w2.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, w1 {tuple(w1.shape)}, w2 {tuple(w2.shape)}; accepted: x (..., C), "
            "w1 (F, K) or (2F, K), w2 (N, F)"
        )
    if shuffle > 1 and (x.dim() != 4 or x.shape[1] % shuffle or x.shape[2] % shuffle):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; accepted with shuffle={shuffle}: (B, h, w, C), h and w multiples of it"
        )
    channels = x.shape[-1] * shuffle * shuffle
    rows = x.shape[-2] if shuffle == 1 and x.dim() > 1 else x.numel() // channels
    if rows % merge:
        raise ValueError(f"x has {rows} tokens; accepted with merge={merge}: a multiple of {merge}")
    if w1.shape[1] != channels * merge:
        raise ValueError(f"w1 has shape {tuple(w1.shape)}; accepted for x {tuple(x.shape)}: {channels * merge} columns")
    if gated and w1.shape[0] % 2:
        raise ValueError(f"w1 has {w1.shape[0]} rows; accepted when gated: an even number")
    inner = w1.shape[0] // 2 if gated else w1.shape[0]
    _check.shape("w2", w2, (w2.shape[0], inner), "(N, F)")
    _check.shape("b1", b1, (w1.shape[0],), "(F,), or (2F,) when gated")
    _check.shape("b2", b2, (w2.shape[0],), "(N,)")
    _check.shape("norm_weight", norm_weight, (channels,), "(C shuffle²,)")
    _check.shape("norm_bias", norm_bias, (channels,), "(C shuffle²,)")
    if norm == "none" and (norm_weight is not None or norm_bias is not None):
        raise ValueError('norm is "none", yet norm_weight or norm_bias is given')
    if norm == "rms" and norm_bias is not None:
        raise ValueError("norm_bias is given; RMSNorm has none")
    if dtype is None:
        _check.same_dtype(" (or pass dtype=, or use autocast)", **tensors)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    return (x, w1, w2, b1, b2, norm_weight, norm_bias, act, bool(gated), norm, float(eps), shuffle, merge, level, dtype)


def draw(*values) -> tuple:
    """Nothing is random here."""
    return values

"""mlp_projector: [pixel shuffle] -> [norm] -> linear -> activation -> linear, the dense connector of most vision-LLMs.

LLaVA-1.5 (arXiv 2310.03744), InternVL (2312.14238), Aya Vision, Qwen-VL's mergers; survey eq. 19.
Dims: T all output rows, C vision width, K = C times the tokens merged into one, F inner width, N text width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._shuffle import ACTS, check_shuffle_and_norm, merged, normalised, shuffled


def forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    wg: Tensor | None = None,
    scale: Tensor | None = None,
    row_mask: Tensor | None = None,
    act: str = "gelu",
    gated: bool = False,
    norm: str = "none",
    norm_act: str = "none",
    eps: float = 1e-5,
    shuffle: int = 1,
    merge: int = 1,
    level: int = 0,
    residual: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = act(norm(x) W1ᵀ + b1) W2ᵀ + b2 [+ x]; gated: h = act(second half) * first half in place of act(.).

    Args:
        x: (..., C); with shuffle s > 1 (B, h, w, C), both sides multiples of s.
        w1: (F, K), or (2F, K) when gated, K = C s² merge. w2: (N, F). b1, b2: (F) or (2F), and (N).
        norm_weight, norm_bias: (C s²); RMSNorm has no bias.
        act: "gelu" (erf), "gelu_tanh", "silu", "relu", "quick_gelu".
        wg: (F, K), the gate's weight where it is one of its own (GLM-4V, CogVLM): h = act(x Wgᵀ) * (x W1ᵀ), no b1.
        scale: one number, of any shape, and row_mask: (...,), of 0 and 1 or bool: y = [x +] scale row_mask (h W2ᵀ), no
            b2 (Flamingo's gate after its tanh). Kernels scale h: nothing more is kept, and where scale is 0 y is x.
        gated: the gate is the second half of the first product (Aya Vision, Cohere2Vision).
        norm: "none", "layer" (biased variance) or "rms", over the channels after the shuffle and before the merge.
        norm_act: an activation right after the norm ("none" or one of act's; GLM-4V, CogVLM: "gelu").
        eps: added to the variance, or the mean square.
        shuffle: s; each s x s neighbourhood becomes one token with channels in the order (row, column, channel).
        merge: m adjacent rows become one, after the norm (Qwen2-VL's merger: 4).
        level: 0 keeps the first product for backward, 1 recomputes it (one matrix product more, less memory).
        residual: add x itself, before its norm (a transformer's feed-forward block); N = C, no shuffle, no merge.
        dtype: compute everything in this dtype; autocast sets it. The norm's statistics are float32 in any case.

    Returns: y (..., N), or (B, h w / s², N) with a shuffle, in `dtype`, else in x's dtype; with `residual` in the wider
    of that and x's.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    skip = x
    if dtype is not None:
        x, w1, w2, b1, b2, norm_weight, norm_bias, wg = (
            t if t is None else t.to(dtype) for t in (x, w1, w2, b1, b2, norm_weight, norm_bias, wg)
        )
    x = normalised(shuffled(x, shuffle), norm, norm_weight, norm_bias, eps)
    x = merged(x if norm_act == "none" else ACTS[norm_act](x), merge)
    pre = F.linear(x, w1, b1)
    if wg is not None:
        h = ACTS[act](F.linear(x, wg)) * pre
    elif gated:
        value, gate = pre.chunk(2, -1)
        h = ACTS[act](gate) * value
    else:
        h = ACTS[act](pre)
    y = F.linear(h, w2, b2)
    if row_mask is not None:
        y = y.masked_fill((row_mask == 0)[..., None], 0.0)
    if scale is not None:
        y = (scale.reshape(1) * y).to(y.dtype)
    return skip + y if residual else y


def residuals(
    x, w1, w2, b1, b2, norm_weight, norm_bias, wg, scale, row_mask, act, gated, norm, norm_act, eps, shuffle, merge,
    level, residual, dtype,
):  # fmt: skip
    """What kernels save besides arguments: pre (T, F, with a gate 2F) at level 0, the norm's (mean, rstd)."""
    channels = x.shape[-1] * shuffle * shuffle
    rows = x.numel() // channels
    inner = w1.shape[0] * (1 if wg is None else 2)
    pre = (rows // merge, inner) if level == 0 else (0,)
    stats = (rows, 2) if norm != "none" else (0,)
    return x.new_empty(pre, dtype=dtype or x.dtype), x.new_empty(stats, dtype=torch.float32)


def check(
    x, w1, w2, b1, b2, norm_weight, norm_bias, wg, scale, row_mask, act, gated, norm, norm_act, eps, shuffle, merge,
    level, residual, dtype,
) -> tuple:  # fmt: skip
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"x": x, "w1": w1, "w2": w2, "b1": b1, "b2": b2, "norm_weight": norm_weight}
    tensors |= {"norm_bias": norm_bias, "wg": wg}
    _check.floating(**tensors)
    _check.floating(scale=scale)
    _check.same_device(**tensors, scale=scale, row_mask=row_mask)
    if act not in ACTS:
        raise ValueError(f"act is {act!r}; accepted: {', '.join(ACTS)}")
    if norm_act not in ("none", *ACTS) or (norm_act != "none" and norm == "none"):
        raise ValueError(f"norm_act is {norm_act!r}; accepted: none, and with a norm {', '.join(ACTS)}")
    if level not in (0, 1):
        raise ValueError(f"level is {level!r}; accepted: 0 (keep the first product), 1 (recompute it)")
    if shuffle < 1 or merge < 1:
        raise ValueError(f"shuffle is {shuffle}, merge {merge}; accepted: 1 or more")
    if x.dim() < (2 if merge > 1 else 1) or w1.dim() != 2 or w2.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, w1 {tuple(w1.shape)}, w2 {tuple(w2.shape)}; accepted: x (..., C), "
            "w1 (F, K) or (2F, K), w2 (N, F)"
        )
    channels = check_shuffle_and_norm(x, shuffle, norm, norm_weight, norm_bias)
    rows = x.shape[-2] if shuffle == 1 and x.dim() > 1 else x.numel() // channels
    if rows % merge:
        raise ValueError(f"x has {rows} tokens; accepted with merge={merge}: a multiple of {merge}")
    if w1.shape[1] != channels * merge:
        raise ValueError(f"w1 has shape {tuple(w1.shape)}; accepted for x {tuple(x.shape)}: {channels * merge} columns")
    if gated and w1.shape[0] % 2:
        raise ValueError(f"w1 has {w1.shape[0]} rows; accepted when gated: an even number")
    if wg is not None and (gated or b1 is not None):
        raise ValueError("wg is the gate's own weight: accepted with gated=False and without b1")
    inner = w1.shape[0] // 2 if gated else w1.shape[0]
    _check.shape("wg", wg, tuple(w1.shape), "the shape of w1")
    _check.shape("w2", w2, (w2.shape[0], inner), "(N, F)")
    _check.shape("b1", b1, (w1.shape[0],), "(F,), or (2F,) when gated")
    _check.shape("b2", b2, (w2.shape[0],), "(N,)")
    if (scale is not None or row_mask is not None) and (b2 is not None or shuffle > 1 or merge > 1):
        raise ValueError(f"scale or row_mask with b2, shuffle={shuffle}, merge={merge}; accepted: without these")
    if scale is not None and scale.numel() != 1:
        raise ValueError(f"scale has shape {tuple(scale.shape)}; accepted: one number")
    _check.shape("row_mask", row_mask, tuple(x.shape[:-1]), "the rows of x")
    if residual and (shuffle > 1 or merge > 1 or w2.shape[0] != x.shape[-1]):
        raise ValueError(
            f"residual=True adds x with {x.shape[-1]} channels to {w2.shape[0]}, shuffle is {shuffle}, merge {merge}; "
            "accepted: equal widths, shuffle=1, merge=1"
        )
    if dtype is None:
        _check.same_dtype(" (or pass dtype=, or use autocast)", **tensors)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    return (
        x, w1, w2, b1, b2, norm_weight, norm_bias, wg, scale, row_mask, act, bool(gated), norm, norm_act, float(eps),
        shuffle, merge, level, bool(residual), dtype,
    )  # fmt: skip


def draw(*values) -> tuple:
    """Nothing is random here."""
    return values

"""pooled_mlp: linear -> activation -> average pooling of the token grid -> linear.

LDPv2 of MobileVLM V2 (arXiv 2402.03766) pools after its second linear. Each pooled token is an average, whose weights
add up to 1, so that pool(h W2ᵀ + b2) = pool(h) W2ᵀ + b2: pooled first, the second product has 144 rows and not 576.
Dims: B images of h x w tokens, row by row, C vision width, F inner width, N text width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._conv import check_dtype, check_grid, pooled
from .._shuffle import ACTS


def forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    h: int,
    w: int,
    out_h: int,
    out_w: int,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    act: str = "gelu",
    level: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = pool(act(x W1ᵀ + b1)) W2ᵀ + b2

    Args:
        x: (B, h w, C), row by row; any h and w.
        w1: (F, C). w2: (N, F). b1, b2: (F), (N).
        out_h, out_w: pooled row i is the average of rows floor(i h / out_h) to ceil((i + 1) h / out_h) - 1, as torch's
            adaptive pooling: rows overlap where h is no multiple, and repeat where out_h is larger.
        act: "gelu" (erf), "gelu_tanh", "silu", "relu", "quick_gelu".
        level: 0 keeps the first product for backward, 1 recomputes it (one matrix product more, less memory).
        dtype: compute everything in this dtype; autocast sets it.

    Returns: y (B, out_h out_w, N) in `dtype`, else in x's dtype.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if dtype is not None:
        x, w1, w2, b1, b2 = (t if t is None else t.to(dtype) for t in (x, w1, w2, b1, b2))
    return F.linear(pooled(ACTS[act](F.linear(x, w1, b1)), h, w, out_h, out_w), w2, b2)


def residuals(x, w1, w2, h, w, out_h, out_w, b1, b2, act, level, dtype) -> tuple[Tensor]:
    """What kernels save besides arguments: pre (B h w, F) at level 0."""
    return (x.new_empty((x.shape[0] * h * w, w1.shape[0]) if level == 0 else (0,), dtype=dtype or x.dtype),)


def check(x, w1, w2, h, w, out_h, out_w, b1, b2, act, level, dtype) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"x": x, "w1": w1, "w2": w2, "b1": b1, "b2": b2}
    _check.floating(**tensors)
    _check.same_device(**tensors)
    check_grid(x, h, w)
    if out_h < 1 or out_w < 1:
        raise ValueError(f"out_h is {out_h}, out_w is {out_w}; accepted: 1 or more each")
    if act not in ACTS:
        raise ValueError(f"act is {act!r}; accepted: {', '.join(ACTS)}")
    if level not in (0, 1):
        raise ValueError(f"level is {level!r}; accepted: 0 (keep the first product), 1 (recompute it)")
    if w1.dim() != 2 or w2.dim() != 2 or 0 in w1.shape or 0 in w2.shape:
        raise ValueError(f"w1 has shape {tuple(w1.shape)}, w2 {tuple(w2.shape)}; accepted: (F, C), (N, F)")
    _check.shape("w1", w1, (w1.shape[0], x.shape[-1]), "(F, C)")
    _check.shape("w2", w2, (w2.shape[0], w1.shape[0]), "(N, F)")
    _check.shape("b1", b1, (w1.shape[0],), "(F,)")
    _check.shape("b2", b2, (w2.shape[0],), "(N,)")
    check_dtype(dtype, tensors)
    return x, w1, w2, h, w, out_h, out_w, b1, b2, act, level, dtype


def draw(*values) -> tuple:
    """Nothing is random here."""
    return values

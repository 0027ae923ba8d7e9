"""depthwise_conv_norm_act: act(norm(depthwise 3 x 3 (x) [+ x])) of a token-major map, and its mean over the tokens.

The middle of RegNet's bottleneck in Honeybee's C-Abstractor (arXiv 2312.06742) and of MobileVLM's LDP (2312.16886), and
the positional convolution at the end of LDPv2 (2402.03766). The means are what a squeeze-excitation squeezes.
Dims: B images of h x w tokens, row by row, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._conv import ACTS, check_convolution, check_dtype, check_grid, depthwise, out_side

NORMS = ("none", "layer")


def forward(
    x: Tensor,
    weight: Tensor,
    h: int,
    w: int,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    stride: int = 1,
    skip: bool = False,
    norm: str = "layer",
    act: str = "none",
    eps: float = 1e-5,
    means: bool = False,
    level: int = 0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """y = act(norm(conv(x) + bias [+ x]) norm_weight + norm_bias); the means of y over the tokens of each image

    Args:
        x: (B, h w, C), row by row; any h and w.
        weight, bias: (C, 1, 3, 3) and (C), of a convolution with padding 1 and a filter for each channel.
        norm_weight, norm_bias: (C), of a norm over the channels of each token.
        stride: 1, or 2: y has ceil(h / 2) x ceil(w / 2) tokens.
        skip: add x itself before the norm; stride 1.
        norm: "layer" (biased variance) or "none". eps: added to the variance.
        act: "none", "silu", "hardswish", "gelu" (erf), "relu".
        means: compute the second result.
        level: 0 keeps the convolution's result for backward where there is a norm or an activation, 1 recomputes it.
        dtype: compute everything in this dtype; autocast sets it. The norm's statistics are float32 in any case.

    Returns: y (B, h' w', C) in `dtype`, else in x's dtype, and its means (B, C), or (B, 0) without `means`, in float32
    (float64 for float64).

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if dtype is not None:
        x, weight, bias, norm_weight, norm_bias = (
            t if t is None else t.to(dtype) for t in (x, weight, bias, norm_weight, norm_bias)
        )
    y = depthwise(x, weight, bias, h, w, stride)
    y = y + x if skip else y
    if norm == "layer":
        y = F.layer_norm(y, y.shape[-1:], norm_weight, norm_bias, eps)
    y = ACTS[act](y)
    wide = torch.promote_types(y.dtype, torch.float32)
    return y, (y if means else y[:, :, :0]).mean(1, dtype=wide)


def residuals(
    x, weight, h, w, bias, norm_weight, norm_bias, stride, skip, norm, act, eps, means, level, dtype
) -> tuple[Tensor, Tensor]:
    """What a kernel's forward saves besides arguments: c before norm and activation at level 0, (mean, rstd)."""
    tokens = out_side(h, stride) * out_side(w, stride)
    keeps = level == 0 and (norm != "none" or act != "none")
    c = (x.shape[0], tokens, x.shape[2]) if keeps else (0,)
    stats = (x.shape[0] * tokens, 2) if norm != "none" else (0,)
    return x.new_empty(c, dtype=dtype or x.dtype), x.new_empty(stats, dtype=torch.float32)


def check(x, weight, h, w, bias, norm_weight, norm_bias, stride, skip, norm, act, eps, means, level, dtype) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"x": x, "weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    _check.floating(**tensors)
    _check.same_device(**tensors)
    check_grid(x, h, w)
    check_convolution(x, weight, stride, act, level)
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; accepted: {', '.join(NORMS)}")
    if norm == "none" and (norm_weight is not None or norm_bias is not None):
        raise ValueError('norm is "none", yet norm_weight or norm_bias is given')
    for name in ("bias", "norm_weight", "norm_bias"):
        _check.shape(name, tensors[name], (x.shape[-1],), "(C,)")
    if skip and stride != 1:
        raise ValueError(f"skip=True adds x to a result of stride {stride}; accepted: stride=1")
    check_dtype(dtype, tensors)
    return (
        x, weight, h, w, bias, norm_weight, norm_bias, stride, bool(skip), norm, act, float(eps), bool(means), level,
        dtype,
    )  # fmt: skip


def draw(*values) -> tuple:
    """Nothing is random here."""
    return values

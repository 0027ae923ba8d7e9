"""multi_layer_kv: the keys and values of all layers that attend to the same visual tokens, in one product.

Every layer of a resampler, Q-Former or gated decoder projects the same tokens, after a norm of its own: Flamingo
(arXiv 2204.14198), BLIP-2 (2301.12597), Idefics, Mllama.
Dims: T visual tokens, C their width, L layers, W columns of one layer (keys and values: 2 G K).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._shuffle import NORMS, normalised


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    parts: list[Tensor] = (),
    layers: int = 1,
    norm: str = "none",
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y[..., l W : (l + 1) W] = (norm(x) norm_weight_l + norm_bias_l) W_lᵀ + bias_l for each layer l.

    Args:
        x: (..., C).
        weight: (L W, C), the layers' weights one below the other. bias: (L W).
        norm_weight, norm_bias: (L, C), a norm's scale and shift in each layer; RMSNorm has no shift.
        parts: the tensors whose concatenation `weight` is: kept for backward in its place, without a gradient.
        layers: L.
        norm: "none", "layer" (biased variance) or "rms", over C. eps: added to the variance, or the mean square.
        dtype: compute everything in this dtype; autocast sets it. The norm's statistics are float32 in any case.

    Kernels use that the statistics are the same in all layers: with n = norm(x) before scale and shift, layer l is
    n (W_l diag(norm_weight_l))ᵀ + (W_l norm_bias_l + bias_l). With G_l = dy_lᵀ n and d_l the column sums of dy_l,

        dW_l = G_l diag(norm_weight_l) + d_l norm_bias_lᵀ,   dnorm_weight_l = sum over rows of W_l * G_l,
        dnorm_bias_l = d_l W_l,   dbias_l = d_l

    so one weight-gradient product serves all of them, and only dx needs a norm backward, once for all layers.

    Returns: y (..., L W), in `dtype`, else in x's dtype.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if dtype is not None:
        x, weight, bias, norm_weight, norm_bias = (
            t if t is None else t.to(dtype) for t in (x, weight, bias, norm_weight, norm_bias)
        )
    out = []
    for i, w in enumerate(weight.chunk(layers)):
        scale = None if norm_weight is None else norm_weight[i]
        shift = None if norm_bias is None else norm_bias[i]
        b = None if bias is None else bias.chunk(layers)[i]
        out.append(F.linear(normalised(x, norm, scale, shift, eps), w, b))
    return torch.cat(out, -1)


def residuals(x, weight, bias, norm_weight, norm_bias, parts, layers, norm, eps, dtype) -> tuple[Tensor]:
    """What a kernel's forward saves besides arguments: the norm's (mean, rstd)."""
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return (x.new_empty((rows, 2) if norm != "none" else (0,), dtype=torch.float32),)


def check(x, weight, bias, norm_weight, norm_bias, parts, layers, norm, eps, dtype) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"x": x, "weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    _check.floating(**tensors)
    _check.same_device(**tensors)
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[1] == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; accepted: x (..., C), weight (L W, C), C > 0"
        )
    if layers < 1 or weight.shape[0] % layers:
        raise ValueError(f"layers is {layers}, weight has {weight.shape[0]} rows; accepted: a multiple of layers >= 1")
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; accepted: {', '.join(NORMS)}")
    _check.shape("bias", bias, (weight.shape[0],), "(L W,)")
    _check.shape("norm_weight", norm_weight, (layers, x.shape[-1]), "(L, C)")
    _check.shape("norm_bias", norm_bias, (layers, x.shape[-1]), "(L, C)")
    if norm == "none" and (norm_weight is not None or norm_bias is not None):
        raise ValueError('norm is "none", yet norm_weight or norm_bias is given')
    if norm == "rms" and norm_bias is not None:
        raise ValueError("norm_bias is given; RMSNorm has none")
    if dtype is None:
        _check.same_dtype(" (or pass dtype=, or use autocast)", **tensors)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    return x, weight, bias, norm_weight, norm_bias, parts, int(layers), norm, float(eps), dtype


def draw(*values) -> tuple:
    """Nothing is random here."""
    return values

"""linear_projector in Triton: norm and shuffle are one pass, cuBLAS runs the product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _norm, _refuse
from .._norm import config  # noqa: F401  (the op's own kernels are the norm's)


def refuses(x, weight, bias, norm_weight, norm_bias, norm, eps, norm_offset, shuffle, dtype) -> str | None:
    if (reason := _refuse.common(x, dtype, weight=weight)) is not None:
        return reason
    if 0 in weight.shape:
        return f"zero channels: weight {tuple(weight.shape)}"
    return _norm.refuses(x, norm, shuffle)


def declines(x, weight, bias, norm_weight, norm_bias, norm, eps, norm_offset, shuffle, dtype) -> str | None:
    return "without a norm there is nothing to fuse" if norm == "none" else None


def forward(x, weight, bias, norm_weight, norm_bias, norm, eps, norm_offset, shuffle, dtype) -> tuple[Tensor, Tensor]:
    """y (..., N), stats (rows, 2) with a norm."""
    out_dtype = dtype or x.dtype
    xn, stats = _norm.normed(x, norm_weight, norm_bias, norm, eps, shuffle, out_dtype, offset=norm_offset)
    y = F.linear(xn, weight.to(out_dtype), None if bias is None else bias.to(out_dtype))
    lead = (x.shape[0], x.shape[1] * x.shape[2] // (shuffle * shuffle)) if shuffle > 1 else tuple(x.shape[:-1])
    return y.view(*lead, weight.shape[0]), stats


def backward(dy, saved, needs, norm, eps, norm_offset, shuffle, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    x, weight, bias, norm_weight, norm_bias = (saved[n] for n in ("x", "weight", "bias", "norm_weight", "norm_bias"))
    out_dtype = dtype or x.dtype
    grads: dict[str, Tensor] = {}
    dy2 = dy.reshape(-1, weight.shape[0]).to(out_dtype)
    if needs["bias"]:
        grads["bias"] = dy2.sum(0, dtype=torch.float32).to(bias.dtype)
    if needs["weight"]:
        xn, _ = _norm.normed(x, norm_weight, norm_bias, norm, eps, shuffle, out_dtype, offset=norm_offset)
        grads["weight"] = (dy2.t() @ xn).to(weight.dtype)
    if needs["x"] or needs["norm_weight"] or needs["norm_bias"]:
        dxn = dy2 @ weight.to(out_dtype)
        grads |= _norm.norm_backward(
            dxn, x, norm_weight, norm_bias, saved["stats"], norm, shuffle, needs, offset=norm_offset
        )
    return grads

"""depthwise_conv_norm_act in Triton: forward reads x once and writes y once; backward is a pass over the rows, through
activation and norm, and one through the taps. The kernels are in _depthwise_kernels.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _depthwise, _refuse
from .._conv import out_side


def refuses(
    x, weight, h, w, bias, norm_weight, norm_bias, stride, skip, norm, act, eps, means, level, dtype
) -> str | None:
    tensors = {"weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    if (reason := _refuse.common(x, dtype, **tensors)) is not None:
        return reason
    return _depthwise.refuses(x, norm != "none")


def declines(*values) -> str | None:
    return None


config = _depthwise.config


def forward(
    x, weight, h, w, bias, norm_weight, norm_bias, stride, skip, norm, act, eps, means, level, dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, its means (B, C or 0), c at level 0 where backward needs it, stats (rows, 2) with a norm."""
    keeps = level == 0 and (norm != "none" or act != "none")
    y, c, stats, mean = _depthwise.convolve(
        x, weight, bias, norm_weight, norm_bias, h, w, stride, skip, norm != "none", act, eps, dtype or x.dtype,
        want_c=keeps, want_means=means,
    )  # fmt: skip
    if not means:
        mean = torch.empty((x.shape[0], 0), dtype=torch.float32, device=x.device)
    return y, mean, c, stats


def backward(dy, dmeans, saved, needs, h, w, stride, skip, norm, act, eps, means, level, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    x, weight, bias, norm_weight, norm_bias, c, stats = (
        saved[n] for n in ("x", "weight", "bias", "norm_weight", "norm_bias", "c", "stats")
    )
    out_dtype, normed = dtype or x.dtype, norm != "none"
    shape = (x.shape[0], out_side(h, stride) * out_side(w, stride), x.shape[2])
    dmeans = dmeans if means else None
    grads: dict[str, Tensor] = {}
    taps = needs["weight"] or needs["bias"]
    need_dc = needs["x"] or taps
    plain = not normed and act == "none"
    if plain and dmeans is None:
        dc = dy
    else:
        if not plain and level == 1:
            _, c, stats, _ = _depthwise.convolve(
                x, weight, bias, norm_weight, norm_bias, h, w, stride, skip, normed, act, eps, out_dtype,
                want_y=False, want_c=True,
            )  # fmt: skip
        sums = needs["norm_weight"] or needs["norm_bias"]
        dc, sums = _depthwise.rows_backward(
            dy, None, dmeans, None if plain else c, stats, norm_weight, norm_bias, normed, act, shape, h * w,
            out_dtype, x.device, need_dc, sums,
        )  # fmt: skip
        for i, (name, t) in enumerate((("norm_weight", norm_weight), ("norm_bias", norm_bias))):
            if needs[name]:
                grads[name] = sums[i].sum(0).to(t.dtype)
    if need_dc:
        dx, sums = _depthwise.backward(
            dc, x, weight, h, w, stride, skip, normed, out_dtype, x.dtype, needs["x"], taps
        )  # fmt: skip
        if needs["x"]:
            grads["x"] = dx
        if taps:
            grads |= _depthwise.tap_gradients(sums, weight, bias, needs, ("weight", "bias"))
    return grads

"""conv_se_linear in Triton: the convolution with its norm, activation and sums is one pass; the excitation scales the
rows of y as the product loads them; norm, shortcut and activation after the product are a pass over its rows.

Backward starts from the kept, or recomputed, c and d: y and what the convolution read are made again from them, and
live only between two launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _depthwise, _norm, _refuse
from .._conv import out_side
from . import squeeze
from .kernels import out_bwd_launch, out_fwd_launch, scaled_product

config = _depthwise.config


def refuses(
    x, conv_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, weight, h, w, norm_weight, norm_bias, out_norm_weight,
    out_norm_bias, in_norm_weight, in_norm_bias, shortcut, stride, in_norm, act, se_act, gate, out_act, eps, level,
    dtype,
) -> str | None:  # fmt: skip
    tensors = {
        "conv_weight": conv_weight, "fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias, "weight": weight, "norm_weight": norm_weight, "norm_bias": norm_bias,
        "out_norm_weight": out_norm_weight, "out_norm_bias": out_norm_bias, "in_norm_weight": in_norm_weight,
        "in_norm_bias": in_norm_bias, "shortcut": shortcut,
    }  # fmt: skip
    if (reason := _refuse.common(x, dtype, **tensors)) is not None:
        return reason
    if weight.shape[0] > _depthwise.MAX_CHANNELS:
        return f"{weight.shape[0]} channels to normalise; kernels take up to {_depthwise.MAX_CHANNELS}"
    return _depthwise.refuses(x, True)


def declines(*values) -> str | None:
    return None


def forward(
    x, conv_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, weight, h, w, norm_weight, norm_bias, out_norm_weight,
    out_norm_bias, in_norm_weight, in_norm_bias, shortcut, stride, in_norm, act, se_act, gate, out_act, eps, level,
    dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """out (B, h' w', N), the means of y (B, C), statistics of the three norms, and at level 0 c and d."""
    out_dtype = dtype or x.dtype
    z, in_stats = _inner(x, in_norm_weight, in_norm_bias, in_norm, act, eps, out_dtype)
    y, c, stats, means = _depthwise.convolve(
        z, conv_weight, None, norm_weight, norm_bias, h, w, stride, False, True, act, eps, out_dtype,
        want_c=level == 0, want_means=True,
    )  # fmt: skip
    scale = squeeze.forward(means, fc1_weight, fc1_bias, fc2_weight, fc2_bias, se_act, gate, out_dtype)[-1]
    d = scaled_product(y, scale, weight.to(out_dtype))
    out, out_stats = out_fwd_launch(d, out_norm_weight, out_norm_bias, shortcut, out_act, eps)
    out = out.view(x.shape[0], out_side(h, stride) * out_side(w, stride), weight.shape[0])
    kept = (c, d) if level == 0 else (c, d.new_empty(0))
    return out, means, stats, in_stats, out_stats, *kept


def backward(
    dy, saved, needs, h, w, stride, in_norm, act, se_act, gate, out_act, eps, level, dtype
) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    x, conv_weight, weight, shortcut = (saved[n] for n in ("x", "conv_weight", "weight", "shortcut"))
    norm, out_norm, in_norm_tensors = (
        (saved[f"{n}_weight"], saved[f"{n}_bias"]) for n in ("norm", "out_norm", "in_norm")
    )
    fc = [saved[n] for n in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")]
    means, stats, c, d = (saved[n] for n in ("means", "stats", "c", "d"))
    out_dtype, B = dtype or x.dtype, x.shape[0]
    shape = (B, out_side(h, stride) * out_side(w, stride), x.shape[2])
    squeezed = squeeze.forward(means, *fc, se_act, gate, out_dtype)
    scale = squeezed[-1]
    need_z = needs["conv_weight"] or level == 1
    z = _inner(x, *in_norm_tensors, in_norm, act, eps, out_dtype)[0] if need_z else None
    if level == 1:
        y, c, _, _ = _depthwise.convolve(
            z, conv_weight, None, *norm, h, w, stride, False, True, act, eps, out_dtype, want_c=True
        )  # fmt: skip
        d = scaled_product(y, scale, weight.to(out_dtype))
        del y

    dd, grads = out_bwd_launch(dy, d, saved["out_stats"], *out_norm, shortcut, out_act, needs)
    inner = ("x", "conv_weight", "norm_weight", "norm_bias", "in_norm_weight", "in_norm_bias")
    need_dc = needs["x"] or needs["conv_weight"] or needs["in_norm_weight"] or needs["in_norm_bias"]
    need_inner = any(needs[n] for n in inner)
    need_squeezed = need_inner or any(needs[n] for n in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"))
    dys = (dd @ weight.to(out_dtype)).view(shape) if need_squeezed else None
    ys, dscale = _depthwise.excite(c, stats, *norm, scale, dys, act, B, h * w, needs["weight"], need_squeezed)
    if needs["weight"]:
        grads["weight"] = (dd.t() @ ys.view(-1, shape[2])).to(weight.dtype)
    del ys
    if need_squeezed:
        dmeans, squeeze_grads = squeeze.backward(dscale, squeezed, *fc, se_act, gate, needs, need_inner)
        grads |= squeeze_grads
    if need_inner:
        sums = needs["norm_weight"] or needs["norm_bias"]
        dc, parts = _depthwise.rows_backward(
            dys, scale, dmeans, c, stats, *norm, True, act, shape, h * w, out_dtype, x.device, need_dc, sums
        )
        for i, name in enumerate(("norm_weight", "norm_bias")):
            if needs[name]:
                grads[name] = parts[i].sum(0).to(norm[i].dtype)
    if need_dc:
        need_dz = needs["x"] or needs["in_norm_weight"] or needs["in_norm_bias"]
        like = x if z is None else z
        dz, parts = _depthwise.backward(
            dc, like, conv_weight, h, w, stride, False, True, out_dtype, out_dtype if in_norm else x.dtype, need_dz,
            needs["conv_weight"],
        )  # fmt: skip
        if needs["conv_weight"]:
            grads |= _depthwise.tap_gradients(parts, conv_weight, None, needs, ("conv_weight", ""))
        if need_dz and in_norm:
            renamed = {"x": needs["x"], "norm_weight": needs["in_norm_weight"], "norm_bias": needs["in_norm_bias"]}
            found = _norm.norm_backward(dz, x, *in_norm_tensors, saved["in_stats"], "layer", 1, renamed, act)
            grads |= {n if n == "x" else f"in_{n}": t for n, t in found.items()}
        elif need_dz:
            grads["x"] = dz
    return grads


def _inner(x, weight, bias, in_norm: bool, act: str, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the convolution reads, and the statistics of its norm."""
    if not in_norm:
        return x, torch.empty(0, dtype=torch.float32, device=x.device)
    z, stats = _norm.normed(x, weight, bias, "layer", eps, 1, dtype, act)
    return z.view(x.shape), stats

"""conv_se_linear: the second half of a bottleneck with squeeze-excitation, or a whole inverted residual.

    z = act(norm(x)), or x                          with or without in_norm
    y = act(norm(depthwise 3 x 3 (z)))
    s = gate(fc2 se_act(fc1 mean of y over the tokens))
    out = out_act(norm((s y) Wᵀ) + shortcut)

RegNet's blocks with channel norms in Honeybee's C-Abstractor (arXiv 2312.06742), MobileNetV3's in MobileVLM's LDP
(2312.16886). All norms are over the channels of a token and have one eps.
Dims: B images of h x w tokens, row by row, C channels inside, S squeezed, N outside.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._conv import ACTS, check_convolution, check_dtype, check_grid, depthwise, out_side

GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": F.hardsigmoid}
SE_ACTS = ("silu", "relu")


def forward(
    x: Tensor,
    conv_weight: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    weight: Tensor,
    h: int,
    w: int,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    out_norm_weight: Tensor | None = None,
    out_norm_bias: Tensor | None = None,
    in_norm_weight: Tensor | None = None,
    in_norm_bias: Tensor | None = None,
    shortcut: Tensor | None = None,
    stride: int = 1,
    in_norm: bool = False,
    act: str = "silu",
    se_act: str = "silu",
    gate: str = "sigmoid",
    out_act: str = "none",
    eps: float = 1e-5,
    level: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """out = out_act(norm((s y) Wᵀ) + shortcut), y = act(norm(conv(z))), s = gate(fc2 se_act(fc1 mean(y)))

    Args:
        x: (B, h w, C), row by row; any h and w.
        conv_weight: (C, 1, 3, 3), padding 1, a filter for each channel.
        fc1_weight, fc1_bias: (S, C), (S). fc2_weight, fc2_bias: (C, S), (C). weight: (N, C).
        norm_weight, norm_bias, in_norm_weight, in_norm_bias: (C). out_norm_weight, out_norm_bias: (N).
        shortcut: (B, h' w', N), added after the last norm.
        stride: 1, or 2: h' = ceil(h / 2), w' = ceil(w / 2).
        in_norm: the convolution reads z = act(norm(x)) in place of x.
        act, out_act: "none", "silu", "hardswish", "gelu" (erf), "relu". se_act: "silu", "relu".
        gate: "sigmoid", "hardsigmoid".
        level: 0 keeps the convolution's result and the product for backward, 1 recomputes them: one matrix product
            more, and less memory.
        dtype: compute everything in this dtype; autocast sets it. The norms' statistics are float32 in any case.

    Returns: out (B, h' w', N) in `dtype`, else in x's dtype.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if dtype is not None:
        (
            x, conv_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, weight, norm_weight, norm_bias, out_norm_weight,
            out_norm_bias, in_norm_weight, in_norm_bias, shortcut,
        ) = (
            t if t is None else t.to(dtype)
            for t in (x, conv_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, weight, norm_weight, norm_bias,
                      out_norm_weight, out_norm_bias, in_norm_weight, in_norm_bias, shortcut)
        )  # fmt: skip
    channels = x.shape[-1:]
    if in_norm:
        x = ACTS[act](F.layer_norm(x, channels, in_norm_weight, in_norm_bias, eps))
    y = ACTS[act](F.layer_norm(depthwise(x, conv_weight, None, h, w, stride), channels, norm_weight, norm_bias, eps))
    s = F.linear(y.mean(1), fc1_weight, fc1_bias)
    s = GATES[gate](F.linear(ACTS[se_act](s), fc2_weight, fc2_bias))
    out = F.linear(y * s[:, None], weight)
    out = F.layer_norm(out, out.shape[-1:], out_norm_weight, out_norm_bias, eps)
    return ACTS[out_act](out if shortcut is None else out + shortcut)


def residuals(
    x, conv_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, weight, h, w, norm_weight, norm_bias, out_norm_weight,
    out_norm_bias, in_norm_weight, in_norm_bias, shortcut, stride, in_norm, act, se_act, gate, out_act, eps, level,
    dtype,
):  # fmt: skip
    """What kernels save besides arguments: the means of y, (mean, rstd) of the norms, at level 0 c and the product."""
    (B, N, C), tokens = x.shape, out_side(h, stride) * out_side(w, stride)

    def floats(*shape):
        return x.new_empty(shape, dtype=torch.float32)

    kept = ((B, tokens, C), (B * tokens, weight.shape[0])) if level == 0 else ((0,), (0,))
    return (
        floats(B, C), floats(B * tokens, 2), floats(B * N, 2) if in_norm else floats(0), floats(B * tokens, 2),
        *(x.new_empty(shape, dtype=dtype or x.dtype) for shape in kept),
    )  # fmt: skip


def check(
    x, conv_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, weight, h, w, norm_weight, norm_bias, out_norm_weight,
    out_norm_bias, in_norm_weight, in_norm_bias, shortcut, stride, in_norm, act, se_act, gate, out_act, eps, level,
    dtype,
) -> tuple:  # fmt: skip
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {
        "x": x, "conv_weight": conv_weight, "fc1_weight": fc1_weight, "fc1_bias": fc1_bias, "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias, "weight": weight, "norm_weight": norm_weight, "norm_bias": norm_bias,
        "out_norm_weight": out_norm_weight, "out_norm_bias": out_norm_bias, "in_norm_weight": in_norm_weight,
        "in_norm_bias": in_norm_bias, "shortcut": shortcut,
    }  # fmt: skip
    _check.floating(**tensors)
    _check.same_device(**tensors)
    check_grid(x, h, w)
    check_convolution(x, conv_weight, stride, act, level)
    C = x.shape[-1]
    for name, value, accepted in (("se_act", se_act, SE_ACTS), ("gate", gate, GATES), ("out_act", out_act, ACTS)):
        if value not in accepted:
            raise ValueError(f"{name} is {value!r}; accepted: {', '.join(accepted)}")
    if fc1_weight.dim() != 2 or weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"fc1_weight has shape {tuple(fc1_weight.shape)}, weight {tuple(weight.shape)}; accepted: (S, C), (N, C)"
        )
    S, N = fc1_weight.shape[0], weight.shape[0]
    _check.shape("fc1_weight", fc1_weight, (S, C), "(S, C)")
    _check.shape("fc1_bias", fc1_bias, (S,), "(S,)")
    _check.shape("fc2_weight", fc2_weight, (C, S), "(C, S)")
    _check.shape("fc2_bias", fc2_bias, (C,), "(C,)")
    _check.shape("weight", weight, (N, C), "(N, C)")
    for name, width in (("norm", C), ("in_norm", C), ("out_norm", N)):
        for part in ("weight", "bias"):
            _check.shape(
                f"{name}_{part}", tensors[f"{name}_{part}"], (width,), "(N,)" if name == "out_norm" else "(C,)"
            )
    if not in_norm and (in_norm_weight is not None or in_norm_bias is not None):
        raise ValueError("in_norm is False, yet in_norm_weight or in_norm_bias is given")
    tokens = out_side(h, stride) * out_side(w, stride)
    _check.shape("shortcut", shortcut, (x.shape[0], tokens, N), "(B, h' w', N)")
    check_dtype(dtype, tensors)
    return (
        x, conv_weight, fc1_weight, fc1_bias, fc2_weight, fc2_bias, weight, h, w, norm_weight, norm_bias,
        out_norm_weight, out_norm_bias, in_norm_weight, in_norm_bias, shortcut, stride, bool(in_norm), act, se_act,
        gate, out_act, float(eps), level, dtype,
    )  # fmt: skip


def draw(*values) -> tuple:
    """Nothing is random here."""
    return values

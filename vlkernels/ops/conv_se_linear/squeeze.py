"""The excitation of an image from the means of its channels: two small products, (B, C) -> (B, S) -> (B, C)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._conv import ACTS
from .reference import GATES


def forward(
    means, fc1_weight, fc1_bias, fc2_weight, fc2_bias, se_act: str, gate: str, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The means in `dtype`, fc1's result, its activation, fc2's result, and the excitation (B, C)."""
    m = means.to(dtype)
    u1 = F.linear(m, fc1_weight.to(dtype), fc1_bias.to(dtype))
    a1 = ACTS[se_act](u1)
    u2 = F.linear(a1, fc2_weight.to(dtype), fc2_bias.to(dtype))
    return m, u1, a1, u2, GATES[gate](u2)


def backward(
    dscale, squeezed, fc1_weight, fc1_bias, fc2_weight, fc2_bias, se_act: str, gate: str, needs: dict, need_means: bool
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The gradient of the means (B, C) in float32, and of the four parameters where needed, from dscale in float32."""
    m, u1, a1, u2, s = squeezed
    dtype, grads = m.dtype, {}
    if gate == "sigmoid":
        s = s.float()
        du2 = dscale * (s * (1.0 - s))
    else:
        du2 = torch.where((u2 > -3.0) & (u2 < 3.0), dscale * (1.0 / 6.0), 0.0)
    if needs["fc2_bias"]:
        grads["fc2_bias"] = du2.sum(0).to(fc2_bias.dtype)
    du2 = du2.to(dtype)
    if needs["fc2_weight"]:
        grads["fc2_weight"] = (du2.t() @ a1).to(fc2_weight.dtype)
    if not (need_means or needs["fc1_weight"] or needs["fc1_bias"]):
        return None, grads
    da1, u = (du2 @ fc2_weight.to(dtype)).float(), u1.float()
    if se_act == "silu":
        t = torch.sigmoid(u)
        du1 = da1 * (t * (1.0 + u * (1.0 - t)))
    else:
        du1 = torch.where(u > 0.0, da1, 0.0)
    if needs["fc1_bias"]:
        grads["fc1_bias"] = du1.sum(0).to(fc1_bias.dtype)
    du1 = du1.to(dtype)
    if needs["fc1_weight"]:
        grads["fc1_weight"] = (du1.t() @ m).to(fc1_weight.dtype)
    return (du1 @ fc1_weight.to(dtype)).float() if need_means else None, grads

"""bottleneck_adapter beside plain PyTorch, as adapter-hub, MAGMA, FrozenBiLM, VL-PET and LaVIN write it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.ops._shuffle import normalised
from vlkernels.ops.bottleneck_adapter.reference import ACTS

from . import Provider, compiled, plain

BASELINE = "eager"


def equation(
    x, down, up, down_bias, up_bias, norm_weight, norm_bias, base, residual, gate, route, act, norm, scale, skip,
    gate_act, p,
) -> Tensor:  # fmt: skip
    """The op's equation with torch's own dropout, each expert by itself; a fixed scale of 1 multiplies nothing."""
    n = normalised(x, norm, norm_weight, norm_bias, 1e-5) if norm != "none" else x
    z = ACTS[act](F.linear(n, down, down_bias))
    z = F.dropout(z, p) if p else z
    if route is None:
        y = F.linear(z, up, up_bias)
    else:
        R, terms = down.shape[0], []
        for e in range(route.shape[1]):
            bias = None if up_bias is None else up_bias[e]
            terms.append(route[:, e, None, None] * F.linear(z, up[:, e * R : (e + 1) * R], bias))
        y = sum(terms[1:], terms[0])
    y = y + x if skip == "gated" else y
    if gate is not None:
        y = (torch.sigmoid(gate) if gate_act == "sigmoid" else gate) * y
    y = y if scale == 1.0 else scale * y
    for added in (x if skip == "add" else None, base, residual):
        y = y if added is None else y + added
    return y


def _without_seed(kw: dict) -> dict:
    return {name: value for name, value in kw.items() if name != "seed"}


PROVIDERS = (
    Provider("eager", plain(equation, _without_seed)),
    Provider("compile", plain(compiled(equation), _without_seed)),
)
PEERS: tuple[Provider, ...] = ()

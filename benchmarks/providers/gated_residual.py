"""gated_residual beside plain PyTorch, as gated layers write it: a tanh, a product and an addition."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from vlkernels.ops._shuffle import normalised

from . import Provider, compiled, plain

BASELINE = "eager"


def equation(x, gate, branch, inner, weight, row_mask, norm_weight, norm_bias, tanh, norm, p) -> tuple[Tensor, Tensor]:
    """The op's equation with torch's own dropout."""
    branch = F.linear(inner, weight) if branch is None else branch
    branch = F.dropout(branch, p) if p else branch
    if row_mask is not None:
        branch = row_mask[:, None] * branch
    level = gate.repeat_interleave(x.shape[-1] // gate.numel()) if gate.numel() not in (1, x.shape[-1]) else gate
    y = x + (level.tanh() if tanh else level) * branch
    return y, normalised(y, norm, norm_weight, norm_bias, 1e-5) if norm != "none" else y.flatten()[:0]


def _without_seed(kw: dict) -> dict:
    return {name: value for name, value in kw.items() if name != "seed"}


PROVIDERS = (
    Provider("eager", plain(equation, _without_seed)),
    Provider("compile", plain(compiled(equation), _without_seed)),
)
PEERS: tuple[Provider, ...] = ()

"""prefix_attention beside what models run: LLaMA-Adapter and peft write scores, softmax, gate and product out.

"sdpa" is torch's scaled_dot_product_attention over the prefix, gated and added.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import Provider, compiled, plain

BASELINE = "eager"


def _heads(kw: dict) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v as (B, H, rows, K), the prefix repeated over batch and heads, and the gate (H or 1, 1, 1)."""
    q, k, v = (kw[n].transpose(1, 2) for n in "qkv")
    B, H = q.shape[:2]
    k, v = (t.expand(B, -1, -1, -1).repeat_interleave(H // t.shape[1], 1) for t in (k, v))
    gate = kw["gate"].tanh() if kw["tanh"] else kw["gate"]
    if kw.get("factor") is not None:
        gate = gate * kw["factor"]
    return q, k, v, gate[:, None, None]


def _eager(**kw) -> Tensor:
    q, k, v, gate = _heads(kw)
    scores = q @ k.transpose(-1, -2) * (kw["scale"] or q.shape[-1] ** -0.5)
    weights = (gate * F.softmax(scores.float(), -1)).to(v.dtype)
    return kw["o"] + (weights @ v).transpose(1, 2)


def _sdpa(**kw) -> Tensor:
    q, k, v, gate = _heads(kw)
    found = F.scaled_dot_product_attention(q, k, v, scale=kw["scale"] or None)
    return kw["o"] + (gate * found).to(q.dtype).transpose(1, 2)


PROVIDERS = (
    Provider("eager", plain(_eager)),
    Provider("compile", plain(compiled(_eager))),
    Provider("sdpa", plain(_sdpa)),
)
PEERS: tuple[Provider, ...] = ()

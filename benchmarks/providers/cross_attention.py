"""cross_attention beside what models run: keys and values of both sources concatenated, then eager attention or SDPA.

"eager" is the attention that OpenFlamingo, IDEFICS and LAVIS write out; "sdpa" is torch's scaled_dot_product_attention
over the concatenation, which runs FlashAttention 2 where no mask keeps it from it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.ops._shuffle import normalised
from vlkernels.ops.cross_attention import reference
from vlkernels.testing.case import Case, Precision

from . import Instance, Provider, Unavailable, autocast, compiled, frozen_of, leaves_of

BASELINE = "eager"


def _whole(kw: dict) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """q, and k and v of both sources, as (B, H, rows, K), the additive mask, and B."""
    q, H, K = kw["q"], kw["q"].shape[2], kw["q"].shape[3]
    B = reference.sizes(q, *(kw.get(n) for n in ("k", "k2", "x", "mask", "mask2", "bias", "index")))[0]
    k, v, mask = kw.get("k"), kw.get("v"), kw.get("mask")
    if kw.get("x") is not None:
        k, v = F.linear(kw["x"], kw["kv_weight"], kw.get("kv_bias")).unflatten(-1, (2, -1, K)).unbind(-3)
    if kw.get("index") is not None:
        k, v, mask = (t if t is None else t[kw["index"]] for t in (k, v, mask))
    sources = [(k, v, mask)] if kw.get("k2") is None else [(k, v, mask), (kw["k2"], kw["v2"], kw.get("mask2"))]
    norm, eps = kw["norm"], kw.get("eps", 1e-5)
    q = normalised(q, norm, kw.get("q_norm_weight"), kw.get("q_norm_bias"), eps).expand(B, -1, -1, -1)
    # no copy of one source alone
    join = (lambda ts: ts[0]) if len(sources) == 1 else (lambda ts: torch.cat(ts, 1))
    k, v = (join([s[i].expand(B, -1, -1, -1) for s in sources]) for i in (0, 1))
    k = normalised(k, norm, kw.get("k_norm_weight"), kw.get("k_norm_bias"), eps)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if k.shape[1] != H:
        k, v = (t.repeat_interleave(H // t.shape[1], 1) for t in (k, v))
    return q, k, v, _added(kw, sources, B, q), B


def _added(kw: dict, sources: list, B: int, q: Tensor) -> Tensor | None:
    """The additive mask (B, 1 or H, 1 or M, N + N2), where there is one."""
    if kw.get("bias") is None and not kw["causal"] and all(mask is None for *_, mask in sources):
        return None
    least = torch.finfo(q.dtype).min
    parts = []
    for i, (k, _, mask) in enumerate(sources):
        part = torch.zeros((B, 1, q.shape[2], k.shape[1]), dtype=q.dtype, device=q.device)
        if mask is not None:
            part = part.masked_fill(~mask[:, None, None, :], max(kw["masked"], least))
        if i == 0 and kw.get("bias") is not None:
            part = part + kw["bias"].to(q.dtype)
        if i == 1 and kw["causal"]:
            late = torch.ones(part.shape[2:], dtype=torch.bool, device=q.device)
            part = part.masked_fill(late.triu(k.shape[1] - q.shape[2] + 1), -math.inf)
        parts.append(part)
    heads = max(p.shape[1] for p in parts)
    return torch.cat([p.expand(-1, heads, -1, -1) for p in parts], -1)


def _eager(kw: dict) -> Tensor:
    q, k, v, added, _ = _whole(kw)
    s = (q * (kw.get("scale") or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    weights = (s if added is None else s + added).softmax(-1)
    return (F.dropout(weights, kw["p"]) @ v).transpose(1, 2)


def _sdpa(kw: dict) -> Tensor:
    q, k, v, added, _ = _whole(kw)
    y = F.scaled_dot_product_attention(q, k, v, added, kw["p"], scale=kw.get("scale") or None)
    return y.transpose(1, 2)


def _plain(function):
    def build(case: Case, kw: dict, precision: Precision) -> Instance:
        if kw["masked"] == -math.inf:
            raise Unavailable("a query that sees nothing is NaN in plain PyTorch")

        def forward() -> Tensor:
            with autocast(kw, precision):
                return function(kw)

        return Instance(forward, leaves_of(kw), frozen_of(kw))

    return build


PROVIDERS = (
    Provider("eager", _plain(_eager)),
    Provider("compile", _plain(compiled(_eager))),
    Provider("sdpa", _plain(_sdpa)),
)
PEERS: tuple[Provider, ...] = ()

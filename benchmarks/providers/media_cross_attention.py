"""media_cross_attention beside what models run: scores, a dense mask, softmax; or SDPA over that mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.ops._shuffle import normalised

from . import Provider, compiled, plain

BASELINE = "eager"


def _prepared(kw: dict) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """q, k, v as (B, H, rows, K), which keys are seen (B, 1, T, N), and which rows are zero."""
    q, k, v, norm = kw["q"], kw["k"], kw["v"], kw["norm"]
    q, k = (normalised(t, norm, kw.get(s + "_norm_weight"), None, 1e-5) for s, t in (("q", q), ("k", k)))
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    seen = zero = None
    medium = torch.arange(k.shape[2], device=q.device) // kw["tokens"]
    if kw["visible"] is not None:
        seen = (kw["visible"] if kw["visible"].dtype == torch.bool else kw["visible"] >= 0)[..., medium][:, None]
    if kw["span"] is not None:
        begin, end = kw["span"][..., :1], kw["span"][..., 1:]
        zero = (begin == end)[:, None]
        if seen is None:
            seen = ((begin <= medium) & (medium < end))[:, None]
    return q, k, v, seen, zero


def eager(**kw) -> Tensor:
    """OpenFlamingo's: masked scores, softmax, then zero rows."""
    q, k, v, seen, zero = _prepared(kw)
    s = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    weights = (s if seen is None else s.masked_fill(~seen, torch.finfo(s.dtype).min)).softmax(-1)
    weights = weights if zero is None else weights.masked_fill(zero, 0.0)
    return (F.dropout(weights, kw["p"]) @ v).transpose(1, 2)


def sdpa(**kw) -> Tensor:
    """One fused attention over an additive mask, as transformers runs it; zero rows after it."""
    q, k, v, seen, zero = _prepared(kw)
    added = None
    if seen is not None:
        added = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, torch.finfo(q.dtype).min)
    y = F.scaled_dot_product_attention(q, k, v, added, kw["p"])
    return (y if zero is None else y.masked_fill(zero, 0.0)).transpose(1, 2)


PROVIDERS = (
    Provider("eager", plain(eager)),
    Provider("compile", plain(compiled(eager))),
    Provider("sdpa", plain(sdpa)),
)
PEERS: tuple[Provider, ...] = ()

"""media_cross_attention: the text of interleaved sequences against media, each token seeing the media it may.

Flamingo's gated cross-attention (arXiv 2204.14198; survey eq. 23): OpenFlamingo, IDEFICS, Mllama.
Dims: B batch, T text tokens, J media, N = J n keys (n of each medium), H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _check
from .._dropout import draw_seed, keep_factor, keep_mask
from .._shuffle import normalised

NORMS = ("none", "rms")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    span: Tensor | None = None,
    visible: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    seed: Tensor | None = None,
    tokens: int = 1,
    norm: str = "none",
    eps: float = 1e-5,
    scale: float = 0.0,
    p: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = dropout(softmax(scale norm(q) norm(k)ᵀ where the token sees the key's medium)) v, per head.

    Args:
        q: (B, T, H, K). k, v: (B, N, G, K), any strides; query head h reads key/value head h // (H / G).
        span: int32 (B, T, 2), made once for all layers by `spans.py`: token t sees the media begin <= j < end.
            begin == end: its result is zero. begin > end: it sees nothing and gets the mean of all values.
            Between 0 and J. None: all media, up to `visible`.
        visible: (B, T, J), which media token t sees: bool, or an additive mask whose visible entries are 0. With a
            span, nothing outside of it, and in a span of begin < end at least one. A token that sees nothing gets the
            mean of all values unless its span makes it zero.
        q_norm_weight, k_norm_weight: (K), of the RMSNorm of each head of q and k.
        seed: 0-d int64 on q's device, of the dropout; drawn from torch's generator when p > 0 and none is given.
        tokens: n, keys of one medium, in a row. 1 makes span and visible refer to keys.
        norm: "none" or "rms", over K, of q and k. eps: of that norm. scale: of the scores; 0 stands for K^-0.5.
        p: dropout of the attention weights; weight (b, h, t, n) is element (row (b H + h) T + t, column n) of
            ops._dropout.keep_mask.
        dtype: compute everything in this dtype; autocast sets it. Softmax and statistics are float32 at least.

    The mean is upstream's: all scores replaced by one number, so q and k get no gradient there.

    Returns: y (B, T, H, K), in `dtype`, else in q's dtype; zeros without keys.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if dtype is not None:
        q, k, v, q_norm_weight, k_norm_weight = (
            t if t is None else t.to(dtype) for t in (q, k, v, q_norm_weight, k_norm_weight)
        )
    (B, T, H, K), N, G = q.shape, k.shape[1], k.shape[2]
    if N == 0:
        return torch.zeros_like(q) + 0 * v.sum()
    q, k = (normalised(t, norm, w, None, eps) for t, w in ((q, q_norm_weight), (k, k_norm_weight)))
    s = torch.einsum("btgjk,bngk->bgjtn", q.unflatten(2, (G, -1)), k).flatten(1, 2) * (scale or K**-0.5)
    seen, zero = None, None
    medium = torch.arange(N, device=q.device) // tokens
    if span is not None:
        begin, end = span[..., :1], span[..., 1:]
        seen, zero = (begin <= medium) & (medium < end), begin == end
    if visible is not None:
        open_ = (visible if visible.dtype == torch.bool else visible >= 0)[..., medium]
        seen = open_ if seen is None else seen & open_
    if seen is not None:
        s = s.masked_fill(~seen[:, None], torch.finfo(s.dtype).min)
    weights = s.softmax(-1)
    if zero is not None:
        weights = weights.masked_fill(zero[:, None], 0.0)
    if p > 0.0:
        keep = keep_mask(seed, B * H * T, N, p).view(weights.shape)
        weights = weights * keep.to(weights.dtype) * keep_factor(p)
    y = torch.einsum("bgjtn,bngk->btgjk", weights.unflatten(1, (G, -1)), v)
    return y.flatten(2, 3).contiguous()


def residuals(
    q, k, v, span, visible, q_norm_weight, k_norm_weight, seed, tokens, norm, eps, scale, p, dtype
) -> tuple[Tensor]:
    """What a kernel's forward saves besides arguments and y: each softmax's maximum and denominator (B, H, T, 2)."""
    B, T, H, _ = q.shape
    return (q.new_empty((B, H, T, 2), dtype=torch.float32),)


def check(q, k, v, span, visible, q_norm_weight, k_norm_weight, seed, tokens, norm, eps, scale, p, dtype) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"q": q, "k": k, "v": v, "q_norm_weight": q_norm_weight, "k_norm_weight": k_norm_weight}
    _check.floating(**tensors)
    _check.same_device(**tensors, span=span, visible=visible)
    if q.dim() != 4 or 0 in q.shape[2:]:
        raise ValueError(f"q has shape {tuple(q.shape)}; accepted: (B, T, H, K) with H and K 1 or more")
    B, T, H, K = q.shape
    for name, t in (("k", k), ("v", v)):
        if t.dim() != 4 or t.shape[0] != B or t.shape[3] != K or t.shape[2] == 0 or H % t.shape[2]:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; accepted for q {tuple(q.shape)}: (B, N, G, K), {H} a multiple of G"
            )
    _check.shape("v", v, tuple(k.shape), "the shape of k")
    if tokens < 1 or k.shape[1] % tokens:
        raise ValueError(f"{k.shape[1]} keys with tokens={tokens}; accepted: whole media of 1 token or more")
    media = k.shape[1] // tokens
    if span is not None and (span.dtype != torch.int32 or tuple(span.shape) != (B, T, 2)):
        raise ValueError(f"span is {span.dtype} {tuple(span.shape)}; accepted: int32 (B, T, 2) = {(B, T, 2)}")
    if visible is not None:
        if visible.dtype != torch.bool and visible.dtype not in _check.FLOATS:
            raise TypeError(f"visible has dtype {visible.dtype}; accepted: bool, or an additive mask of a float dtype")
        _check.shape("visible", visible, (B, T, media), "(B, T, J)")
        if visible.requires_grad:
            raise ValueError("visible requires a gradient, which this op does not give; accepted: visible.detach()")
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; accepted: {', '.join(NORMS)}")
    for name in ("q_norm_weight", "k_norm_weight"):
        _check.shape(name, tensors[name], (K,), "(K,)")
        if tensors[name] is not None and norm == "none":
            raise ValueError(f'{name} is given with norm="none"; accepted: norm="rms"')
    _check.probability("p", p)
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() or seed.device != q.device):
        raise ValueError(
            f"seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; accepted: 0-d int64 on q's device"
        )
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"scale is {scale}; accepted: a positive number, or 0 for K^-0.5")
    if dtype is None:
        _check.same_dtype(" (or pass dtype=, or use autocast)", **tensors)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    return (
        q, k, v, span, visible, q_norm_weight, k_norm_weight, seed, int(tokens), norm, float(eps), float(scale),
        float(p), dtype,
    )  # fmt: skip


def draw(q, k, v, span, visible, q_norm_weight, k_norm_weight, seed, tokens, norm, eps, scale, p, dtype) -> tuple:
    """The seed of the dropout, where there is any and none was given."""
    if p > 0.0 and seed is None:
        seed = draw_seed(q.device)
    return q, k, v, span, visible, q_norm_weight, k_norm_weight, seed, tokens, norm, eps, scale, p, dtype

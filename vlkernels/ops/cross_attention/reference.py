"""cross_attention: few queries against keys and values of one or two sources, which are never concatenated.

Perceiver resamplers (Flamingo, arXiv 2204.14198: media, then the latents themselves), Q-Formers (BLIP-2, 2301.12597),
Qwen-VL's and MiniCPM-V's resamplers (2308.12966, 2408.01800), mPLUG-Owl's abstractor (2304.14178); survey eq. 9, 14.
Dims: B batch, M queries, N and N2 keys of the two sources, H heads, G key/value heads (H a multiple), K head dim,
C channels of x.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check, _source
from .._dropout import draw_seed, keep_factor, keep_mask
from .._shuffle import NORMS, normalised

# added to the score of a masked key: with one visible key its weight is exactly 0, with none all weigh the same
MASKED = torch.finfo(torch.float32).min


def forward(
    q: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    x: Tensor | None = None,
    kv_weight: Tensor | None = None,
    kv_bias: Tensor | None = None,
    mask: Tensor | None = None,
    mask2: Tensor | None = None,
    bias: Tensor | None = None,
    index: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    x_parts: list[Tensor] = (),
    kv_parts: list[Tensor] = (),
    seed: Tensor | None = None,
    norm: str = "none",
    eps: float = 1e-5,
    scale: float = 0.0,
    masked: float = MASKED,
    p: float = 0.0,
    causal: bool = False,
    x_norm: str = "none",
    x_eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = dropout(softmax(scale norm(q) norm([k; k2])ᵀ + masks)) [v; v2], per head.

    Args:
        q: (B, M, H, K), or (1, M, H, K) for queries that are the same in the whole batch.
        k, v: (B, N, G, K), any strides; query head h reads key/value head h // (H / G). A batch of 1 serves all.
        k2, v2: (B, N2, G, K), a second source after the first, such as the latents; a batch of 1 serves all.
        x: (B, N, C), in place of k and v: [k | v] = x kv_weightᵀ + kv_bias is computed here and again in backward, so
            that neither is kept. kv_weight: (2 G K, C), keys first. kv_bias: (2 G K).
        x_parts, kv_parts: what x and kv_weight are made of by `ops._source.tokens(x_parts, x_norm, x_eps, dtype)` and
            `ops._source.weights(kv_parts)`, whoever calls has done so: kept for backward in their place, without a
            gradient, and joined again there. So no normalised x, no joined and no folded weight is kept.
        mask: bool (B, N) or (1, N), True = attend; mask2: the same of the second source, (B, N2) or (1, N2).
        bias: (1 or B, 1 or H, M, N), added to the scores of the first source; it gets no gradient.
        index: int64 (B,), which row of the first source (k, v or x, and mask) row b of q attends to; rows may repeat.
        q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias: (K), of the norms of each head of q and of the keys.
        seed: 0-d int64 on q's device, of the dropout; drawn from torch's generator when p > 0 and none is given.
        norm: "none", "layer" or "rms", over K, of q and of both sources' keys. eps: of that norm.
        scale: of the scores; 0 stands for K^-0.5.
        masked: added to the score of a masked key, clipped to the compute dtype's range. -inf removes the key: a query
            that sees nothing then gets 0. The default gives it the mean over all masked keys, as in transformers.
        p: dropout of the attention weights; weight (b, h, m, n) is element (row (b H + h) M + m, column n) of
            ops._dropout.keep_mask, columns of the second source starting at the next multiple of 8 after N.
        causal: query m sees key j of the second source for j <= m + N2 - M.
        dtype: compute everything in this dtype; autocast sets it. Softmax and statistics are float32 at least.

    Returns: y (B, M, H, K), in `dtype`, else in q's dtype.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if dtype is not None:
        q, k, v, k2, v2, x, kv_weight, kv_bias, q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias = (
            t if t is None else t.to(dtype)
            for t in (
                q, k, v, k2, v2, x, kv_weight, kv_bias, q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias,
            )
        )  # fmt: skip
    B, M, H, K = sizes(q, k, k2, x, mask, mask2, bias, index)
    if x is not None:
        k, v = F.linear(x, kv_weight, kv_bias).unflatten(-1, (2, -1, K)).unbind(-3)
    if index is not None:
        k, v, mask = (t if t is None or t.shape[0] == 1 else t[index] for t in (k, v, mask))
    q = normalised(q, norm, q_norm_weight, q_norm_bias, eps).expand(B, M, H, K)
    sources = [(k, v, mask, bias, False)] if k is not None else []
    sources += [(k2, v2, mask2, None, causal)] if k2 is not None else []
    scores = []
    for keys, _, visible, added, triangular in sources:
        keys = normalised(keys, norm, k_norm_weight, k_norm_bias, eps)
        s = torch.einsum("bmgjk,bngk->bgjmn", q.unflatten(2, (keys.shape[2], -1)), keys.expand(B, -1, -1, -1))
        s = s.flatten(1, 2) * (scale or K**-0.5)
        if added is not None:
            s = s + added.to(s.dtype)
        if visible is not None:
            s = (
                s
                + torch.zeros(visible.shape, dtype=s.dtype, device=s.device).masked_fill(
                    ~visible, _clipped(masked, s.dtype)
                )[:, None, None, :]
            )
        if triangular:
            N2 = keys.shape[1]
            late = torch.ones(M, N2, dtype=torch.bool, device=s.device).triu(N2 - M + 1)
            s = s.masked_fill(late, -math.inf)
        scores.append(s)
    s = torch.cat(scores, -1)
    if s.shape[-1] == 0:
        return torch.zeros_like(q)
    dead = (s == -math.inf).all(-1, keepdim=True)
    weights = s.masked_fill(dead, 0.0).softmax(-1).masked_fill(dead, 0.0)
    if p > 0.0:
        widths = [keys.shape[1] for keys, *_ in sources]
        weights = weights * _kept(seed, B * H * M, widths, p).view(weights.shape).to(weights.dtype) * keep_factor(p)
    y = 0
    for w, (_, values, *_) in zip(weights.split([t.shape[-1] for t in scores], -1), sources, strict=True):
        w = w.unflatten(1, (values.shape[2], -1))
        y = y + torch.einsum("bgjmn,bngk->bmgjk", w, values.expand(B, -1, -1, -1))
    return y.flatten(2, 3)


def _clipped(masked: float, dtype: torch.dtype) -> float:
    return masked if masked == -math.inf else max(masked, torch.finfo(dtype).min)


def _kept(seed: Tensor, rows: int, widths: list[int], p: float) -> Tensor:
    """(rows, N + N2) bool: which attention weights dropout keeps; each source starts at a multiple of 8."""
    starts = [0, (widths[0] + 7) // 8 * 8][: len(widths)]
    mask = keep_mask(seed, rows, starts[-1] + widths[-1], p)
    return torch.cat([mask[:, a : a + w] for a, w in zip(starts, widths, strict=True)], -1)


def sizes(q, k, k2, x, mask, mask2, bias, index) -> tuple[int, int, int, int]:
    """B, M, H, K of y."""
    given = [t.shape[0] for t in (q, k2, mask2, bias) if t is not None]
    given += [t.shape[0] for t in (k, x, mask) if t is not None] if index is None else [index.shape[0]]
    B = next((b for b in given if b != 1), 1)
    return (B, *q.shape[1:])


def joined(name: str, parts: list[Tensor], others: dict) -> Tensor:
    """x or kv_weight of its parts."""
    if name == "kv_weight":
        return _source.weights(parts)
    return _source.tokens(parts, others["x_norm"], others["x_eps"], others["dtype"])


def residuals(
    q, k, v, k2, v2, x, kv_weight, kv_bias, mask, mask2, bias, index, q_norm_weight, q_norm_bias, k_norm_weight,
    k_norm_bias, x_parts, kv_parts, seed, norm, eps, scale, masked, p, causal, x_norm, x_eps, dtype,
) -> tuple[Tensor]:  # fmt: skip
    """What a kernel's forward saves besides arguments and y: each softmax's maximum and denominator (B, H, M, 2)."""
    B, M, H, _ = sizes(q, k, k2, x, mask, mask2, bias, index)
    return (q.new_empty((B, H, M, 2), dtype=torch.float32),)


def check(
    q, k, v, k2, v2, x, kv_weight, kv_bias, mask, mask2, bias, index, q_norm_weight, q_norm_bias, k_norm_weight,
    k_norm_bias, x_parts, kv_parts, seed, norm, eps, scale, masked, p, causal, x_norm, x_eps, dtype,
) -> tuple:  # fmt: skip
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {
        "q": q, "k": k, "v": v, "k2": k2, "v2": v2, "x": x, "kv_weight": kv_weight, "kv_bias": kv_bias,
        "q_norm_weight": q_norm_weight, "q_norm_bias": q_norm_bias, "k_norm_weight": k_norm_weight,
        "k_norm_bias": k_norm_bias,
    }  # fmt: skip
    _check.floating(**tensors, bias=bias)
    _check.same_device(**tensors, mask=mask, mask2=mask2, bias=bias, index=index)
    if q.dim() != 4 or 0 in q.shape[2:]:
        raise ValueError(f"q has shape {tuple(q.shape)}; accepted: (B, M, H, K) with H and K 1 or more")
    H, K = q.shape[2:]
    if (k is None) != (v is None) or (k2 is None) != (v2 is None) or (x is None) != (kv_weight is None):
        raise ValueError("k and v, k2 and v2, x and kv_weight belong together; accepted: both or neither")
    if x is None and (x_parts or kv_parts):
        raise ValueError("x_parts or kv_parts is given without x; accepted: x and kv_weight with them")
    if x_norm not in NORMS:
        raise ValueError(f"x_norm is {x_norm!r}; accepted: {', '.join(NORMS)}")
    if kv_bias is not None and x is None:
        raise ValueError("kv_bias is given without x; accepted: x and kv_weight with it")
    if (k is None) == (x is None) and (k is not None or k2 is None):
        raise ValueError("accepted: k and v, or x and kv_weight, or neither beside k2 and v2")
    first = x if k is None else k
    heads = {}
    for name, other, t in (("k", "v", k), ("v", "k", v), ("k2", "v2", k2), ("v2", "k2", v2)):
        if t is None:
            continue
        if t.dim() != 4 or t.shape[3] != K or t.shape[2] == 0 or H % t.shape[2]:
            raise ValueError(
                f"{name} has shape {tuple(t.shape)}; accepted for q {tuple(q.shape)}: (B, N, G, K), {H} a multiple of G"
            )
        heads[name] = t.shape[2]
        if tuple(t.shape) != tuple(tensors[other].shape):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, {other} {tuple(tensors[other].shape)}; equal ones go")
    if x is not None:
        if x.dim() != 3 or kv_weight.dim() != 2 or kv_weight.shape[1] != x.shape[2]:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, kv_weight {tuple(kv_weight.shape)}; accepted: (B, N, C) and (2 G K, C)"
            )
        G = kv_weight.shape[0] // (2 * K)
        if kv_weight.shape[0] % (2 * K) or G == 0 or H % G:
            raise ValueError(
                f"kv_weight has {kv_weight.shape[0]} rows; accepted: 2 G K with K = {K}, {H} a multiple of G"
            )
        _check.shape("kv_bias", kv_bias, (kv_weight.shape[0],), "(2 G K,)")
        heads["kv_weight"] = G
    if len(set(heads.values())) > 1:
        raise ValueError(f"key/value heads differ: {heads}; accepted: one number G")
    for name, t, source in (("mask", mask, first), ("mask2", mask2, k2)):
        if t is None:
            continue
        if source is None or t.dtype != torch.bool or t.dim() != 2 or t.shape[1] != source.shape[1]:
            raise ValueError(
                f"{name} is {t.dtype} {tuple(t.shape)}; accepted: bool (B, keys), True = attend, beside its source"
            )
    _check_batches(q, first, k2, mask, mask2, bias, index)
    if bias is not None:
        if (
            first is None
            or bias.dim() != 4
            or bias.shape[1] not in (1, H)
            or bias.shape[2:] != (q.shape[1], first.shape[1])
        ):
            raise ValueError(
                f"bias has shape {tuple(bias.shape)}; accepted: (1 or B, 1 or H, M, N) beside a first source"
            )
        if bias.requires_grad:
            raise ValueError("bias requires a gradient, which this op does not give; accepted: bias.detach()")
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; accepted: {', '.join(NORMS)}")
    for name in ("q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias"):
        _check.shape(name, tensors[name], (K,), "(K,)")
        if tensors[name] is not None and (norm == "none" or (norm == "rms" and name.endswith("bias"))):
            raise ValueError(f"{name} is given with norm={norm!r}; accepted: a norm that has it")
    _check.probability("p", p)
    if seed is not None and (seed.dtype != torch.int64 or seed.dim() or seed.device != q.device):
        raise ValueError(
            f"seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; accepted: 0-d int64 on q's device"
        )
    if not masked < 0.0:
        raise ValueError(f"masked is {masked}; accepted: a negative number or -inf")
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"scale is {scale}; accepted: a positive number, or 0 for K^-0.5")
    if causal and (k2 is None or k2.shape[1] < q.shape[1]):
        raise ValueError("causal orders the queries along the second source; accepted with at least M keys in k2")
    if dtype is None:
        _check.same_dtype(" (or pass dtype=, or use autocast)", **tensors)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    return (
        q, k, v, k2, v2, x, kv_weight, kv_bias, mask, mask2, bias, index, q_norm_weight, q_norm_bias, k_norm_weight,
        k_norm_bias, x_parts, kv_parts, seed, norm, float(eps), float(scale), float(masked), float(p), bool(causal),
        x_norm, float(x_eps), dtype,
    )  # fmt: skip


def _check_batches(q, first, k2, mask, mask2, bias, index) -> None:
    """One batch B, or 1; with an index the first source and its mask have a number of rows of their own."""
    own = {"q": q, "k2": k2, "mask2": mask2, "bias": bias}
    source = {"k (or x)": first, "mask": mask}
    if index is not None:
        if index.dtype != torch.int64 or index.dim() != 1 or first is None:
            raise ValueError(f"index is {index.dtype} {tuple(index.shape)}; accepted: int64 (B,) beside a first source")
        if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling() and type(index) is Tensor:
            low, high = (int(t) for t in torch.aminmax(index))
            if low < 0 or high >= first.shape[0]:
                raise ValueError(f"index reaches from {low} to {high}; accepted: 0 to {first.shape[0] - 1}")
        own["index"] = index
    else:
        own |= source
    for group in (own, source):
        sizes = {name: t.shape[0] for name, t in group.items() if t is not None}
        if len({b for b in sizes.values() if b != 1}) > 1:
            raise ValueError(f"batch sizes differ: {sizes}; accepted: one number, or 1")


def draw(*values) -> tuple:
    """The seed of the dropout, where there is any and none was given."""
    *before, seed, norm, eps, scale, masked, p, causal, x_norm, x_eps, dtype = values
    if p > 0.0 and seed is None:
        seed = draw_seed(values[0].device)
    return *before, seed, norm, eps, scale, masked, p, causal, x_norm, x_eps, dtype

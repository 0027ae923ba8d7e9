"""The Triton kernels of media_cross_attention; triton.py launches them and picks their tiles."""

import triton
import triton.language as tl

from .. import _tl
from .._attention import attention_bwd_rows, attention_keys, attention_rows

# the score of a key that a token does not see: where it sees none, all weigh the same
UNSEEN = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def media_rows(span_ptr, b, offs_m, mask_m, M, J, HAS_SPAN: tl.constexpr, BLOCK_M: tl.constexpr):
    """(begin, end) of a tile of tokens, and the media [low, high) that some of them needs"""
    begin = tl.zeros((BLOCK_M,), tl.int32)
    end = tl.zeros((BLOCK_M,), tl.int32)
    low = 0
    high = J
    if HAS_SPAN:
        at = span_ptr + 2 * (b * M + offs_m)
        begin = tl.load(at, mask_m, 0)
        end = tl.load(at + 1, mask_m, 0)
        some = begin < end
        # the mean is over all media, wherever the token stands
        mean = begin > end
        low = tl.maximum(tl.min(tl.where(some, begin, tl.where(mean, 0, J)), 0), 0)
        high = tl.minimum(tl.max(tl.where(some, end, tl.where(mean, J, 0)), 0), J)
    return begin, end, low, high


@triton.jit
def media_scores(
    q, keys, visible_ptr, begin, end, offs_m, mask_m, offs_n, mask_n, tokens, stride_vm, stride_vj, scale,
    HAS_SPAN: tl.constexpr, VISIBLE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(s, seen): scale q kᵀ, UNSEEN where the token does not see the key, -inf past the last key"""
    s = _tl.dot(q, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION) * scale
    seen = mask_m[:, None] & mask_n[None, :]
    medium = offs_n // tokens
    if VISIBLE != "none":
        # what is visible lies within the span; within a sample 32 bits do
        entry = tl.load(visible_ptr + (offs_m * stride_vm)[:, None] + (medium * stride_vj)[None, :], seen, 0)
        if VISIBLE == "bool":
            seen = seen & (entry != 0)
        else:
            seen = seen & (entry.to(tl.float32) >= 0)
    elif HAS_SPAN:
        seen = seen & (begin[:, None] <= medium[None, :]) & (medium[None, :] < end[:, None])
    # a key that is not there weighs nothing even where none is seen
    return tl.where(seen, s, tl.where(mask_n, UNSEEN, float("-inf"))[None, :]), seen


@triton.jit
def media_cross_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, span_ptr, visible_ptr, seed_ptr, y_ptr, stats_ptr,
    M, N, J, tokens, H, G, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kg, stride_vb, stride_vn,
    stride_vg, stride_seen_b, stride_seen_m, stride_seen_j, scale, drop_below, factor, blocks,
    HAS_SPAN: tl.constexpr, VISIBLE: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = softmax(s) v of one tile of tokens of one head, over the keys that one of them needs"""
    pid = tl.program_id(0)
    block = pid % blocks
    h = (pid // blocks) % H
    b = (pid // blocks // H).to(tl.int64)
    g = h // (H // G)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows = (b * H + h) * M + offs_m
    begin, end, low, high = media_rows(span_ptr, b, offs_m, mask_m, M, J, HAS_SPAN, BLOCK_M)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    q = attention_rows(q_ptr + b * stride_qb + h * stride_qh, offs_m, mask_m, stride_qm, K, BLOCK_K, PRODUCT)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    # whole tiles of keys, as dropout numbers them
    for n in range(low * tokens // BLOCK_N * BLOCK_N, high * tokens, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        keys = attention_keys(k_ptr + b * stride_kb + g * stride_kg, offs_n, mask_n, stride_kn, K, BLOCK_K, PRODUCT)
        s, _ = media_scores(
            q, keys, visible_ptr + b * stride_seen_b, begin, end, offs_m, mask_m, offs_n, mask_n, tokens,
            stride_seen_m, stride_seen_j, scale, HAS_SPAN, VISIBLE, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        w = tl.exp(s - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(w, 1)
        if HAS_DROPOUT:
            w = w * _tl.dropout_keep(seed, rows, n, drop_below, BLOCK_M, BLOCK_N).to(tl.float32) * factor
        values = attention_keys(v_ptr + b * stride_vb + g * stride_vg, offs_n, mask_n, stride_vn, K, BLOCK_K, PRODUCT)
        acc = _tl.dot(_tl.cast(w, PRODUCT), values, acc * fade[:, None], PRECISION)
        top = higher
    # a token that gets zero, and all of them without keys: 0 / inf, and weights of 0 in backward
    nothing = total == 0.0
    if HAS_SPAN:
        nothing = nothing | (begin == end)
    total = tl.where(nothing, float("inf"), total)
    top = tl.where(nothing, float("inf"), top)
    offs_k = tl.arange(0, BLOCK_K)
    out = y_ptr + ((b * M + offs_m) * H + h)[:, None] * K + offs_k[None, :]
    y = acc / total[:, None]
    tl.store(out, _tl.cast(y, y_ptr.dtype.element_ty), mask_m[:, None] & (offs_k < K)[None, :])
    tl.store(stats_ptr + 2 * rows, top, mask_m)
    tl.store(stats_ptr + 2 * rows + 1, total, mask_m)


@triton.jit
def media_bwd_step(
    q, dy, delta, top, inverse, keys, values, visible_ptr, seed, rows, begin, end, offs_m, mask_m, offs_n, mask_n, n,
    tokens, stride_vm, stride_vj, scale, drop_below, factor, HAS_SPAN: tl.constexpr, VISIBLE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(w, ds): the weights that met the values, and scale * w (dw - delta) where the key is seen, dw = dy vᵀ"""
    s, seen = media_scores(
        q, keys, visible_ptr, begin, end, offs_m, mask_m, offs_n, mask_n, tokens, stride_vm, stride_vj, scale,
        HAS_SPAN, VISIBLE, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    w = tl.exp(s - top[:, None]) * inverse[:, None]
    dw = _tl.dot(dy, tl.trans(values), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
    met = w
    if HAS_DROPOUT:
        keep = _tl.dropout_keep(seed, rows, n, drop_below, BLOCK_M, BLOCK_N).to(tl.float32) * factor
        met = w * keep
        dw = dw * keep
    return met, tl.where(seen, w * (dw - delta[:, None]) * scale, 0.0)


@triton.jit
def media_cross_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, span_ptr, visible_ptr, seed_ptr, dy_ptr, y_ptr, stats_ptr, dq_ptr,
    M, N, J, tokens, H, G, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kg, stride_vb, stride_vn,
    stride_vg, stride_seen_b, stride_seen_m, stride_seen_j, scale, drop_below, factor, stride_dyb, stride_dym,
    stride_dyh, blocks,
    HAS_SPAN: tl.constexpr, VISIBLE: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq = ds k of one tile of tokens of one head"""
    pid = tl.program_id(0)
    block = pid % blocks
    h = (pid // blocks) % H
    b = (pid // blocks // H).to(tl.int64)
    g = h // (H // G)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q, dy, delta, top, inverse, mask_m, rows = attention_bwd_rows(
        q_ptr, dy_ptr, y_ptr, stats_ptr, b, h, offs_m, M, H, stride_qb, stride_qm, stride_qh, stride_dyb, stride_dym,
        stride_dyh, PRODUCT, K, BLOCK_K,
    )  # fmt: skip
    begin, end, low, high = media_rows(span_ptr, b, offs_m, mask_m, M, J, HAS_SPAN, BLOCK_M)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    k_ptr += b * stride_kb + g * stride_kg
    v_ptr += b * stride_vb + g * stride_vg
    visible_ptr += b * stride_seen_b
    for n in range(low * tokens // BLOCK_N * BLOCK_N, high * tokens, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        keys = attention_keys(k_ptr, offs_n, mask_n, stride_kn, K, BLOCK_K, PRODUCT)
        values = attention_keys(v_ptr, offs_n, mask_n, stride_vn, K, BLOCK_K, PRODUCT)
        _, ds = media_bwd_step(
            q, dy, delta, top, inverse, keys, values, visible_ptr, seed, rows, begin, end, offs_m,
            mask_m, offs_n, mask_n, n, tokens, stride_seen_m, stride_seen_j, scale, drop_below, factor, HAS_SPAN,
            VISIBLE, HAS_DROPOUT, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dq = _tl.dot(_tl.cast(ds, PRODUCT), keys, dq, PRECISION)
    offs_k = tl.arange(0, BLOCK_K)
    out = dq_ptr + ((b * M + offs_m) * H + h)[:, None] * K + offs_k[None, :]
    tl.store(out, _tl.cast(dq, dq_ptr.dtype.element_ty), mask_m[:, None] & (offs_k < K)[None, :])


@triton.jit
def media_cross_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, span_ptr, visible_ptr, seed_ptr, dy_ptr, y_ptr, stats_ptr, dk_ptr, dv_ptr,
    M, N, J, tokens, H, G, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kg, stride_vb, stride_vn,
    stride_vg, stride_seen_b, stride_seen_m, stride_seen_j, scale, drop_below, factor, stride_dyb, stride_dym,
    stride_dyh, blocks,
    HAS_SPAN: tl.constexpr, VISIBLE: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk = dsᵀ q and dv = wᵀ dy of one tile of keys, over the heads that read it and the tiles of tokens that see it"""
    tiles = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid % tiles) * BLOCK_N
    g = (pid // tiles) % G
    b = (pid // tiles // G).to(tl.int64)
    offs_n = n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_k = tl.arange(0, BLOCK_K)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    keys = attention_keys(k_ptr + b * stride_kb + g * stride_kg, offs_n, mask_n, stride_kn, K, BLOCK_K, PRODUCT)
    values = attention_keys(v_ptr + b * stride_vb + g * stride_vg, offs_n, mask_n, stride_vn, K, BLOCK_K, PRODUCT)
    dk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    heads = H // G
    for i in range(0, heads * blocks):
        h = g * heads + i // blocks
        offs_m = (i % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        begin, end, low, high = media_rows(span_ptr, b, offs_m, offs_m < M, M, J, HAS_SPAN, BLOCK_M)
        if (low * tokens < n + BLOCK_N) & (high * tokens > n):
            q, dy, delta, top, inverse, mask_m, rows = attention_bwd_rows(
                q_ptr, dy_ptr, y_ptr, stats_ptr, b, h, offs_m, M, H, stride_qb, stride_qm, stride_qh, stride_dyb,
                stride_dym, stride_dyh, PRODUCT, K, BLOCK_K,
            )  # fmt: skip
            w, ds = media_bwd_step(
                q, dy, delta, top, inverse, keys, values, visible_ptr + b * stride_seen_b, seed, rows, begin, end,
                offs_m, mask_m, offs_n, mask_n, n, tokens, stride_seen_m, stride_seen_j, scale, drop_below, factor,
                HAS_SPAN, VISIBLE, HAS_DROPOUT, PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            dv = _tl.dot(tl.trans(_tl.cast(w, PRODUCT)), dy, dv, PRECISION)
            dk = _tl.dot(tl.trans(_tl.cast(ds, PRODUCT)), q, dk, PRECISION)
    out = ((b * N + offs_n) * G + g)[:, None] * K + offs_k[None, :]
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    tl.store(dk_ptr + out, _tl.cast(dk, dk_ptr.dtype.element_ty), mask)
    tl.store(dv_ptr + out, _tl.cast(dv, dv_ptr.dtype.element_ty), mask)

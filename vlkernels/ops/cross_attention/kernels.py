"""The Triton kernels of cross_attention; triton.py launches them and picks their tiles."""

import triton
import triton.language as tl

from .. import _tl
from .._attention import attention_bwd_rows, attention_keys, attention_rows


@triton.jit
def attention_scores(
    q, keys, mask_ptr, bias_ptr, offs_m, offs_n, mask_m, mask_n, M, N, stride_mask, stride_bias_m, stride_bias_n,
    scale, masked, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """s = scale q kᵀ + bias + mask; -inf past the last key"""
    s = _tl.dot(q, tl.trans(keys), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION) * scale
    if HAS_BIAS:
        offs = offs_m[:, None].to(tl.int64) * stride_bias_m + offs_n[None, :].to(tl.int64) * stride_bias_n
        s += tl.load(bias_ptr + offs, mask_m[:, None] & mask_n[None, :], 0.0).to(tl.float32)
    if HAS_MASK:
        visible = tl.load(mask_ptr + offs_n.to(tl.int64) * stride_mask, mask_n, 1)
        s += tl.where(visible != 0, 0.0, masked)[None, :]
    if CAUSAL:
        s = tl.where(offs_n[None, :] <= offs_m[:, None] + (N - M), s, float("-inf"))
    return tl.where(mask_n[None, :], s, float("-inf"))


@triton.jit
def attention_fwd_step(
    acc, top, total, q, k_ptr, v_ptr, mask_ptr, bias_ptr, seed, rows, offs_m, mask_m, n, first_col, M, N, stride_kn,
    stride_vn, stride_mask, stride_bias_m, stride_bias_n, scale, masked, drop_below, factor,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, CAUSAL: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of keys and values into (acc, maximum, denominator) of the softmax"""
    offs_n = n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    keys = attention_keys(k_ptr, offs_n, mask_n, stride_kn, K, BLOCK_K, PRODUCT)
    s = attention_scores(
        q, keys, mask_ptr, bias_ptr, offs_m, offs_n, mask_m, mask_n, M, N, stride_mask, stride_bias_m, stride_bias_n,
        scale, masked, HAS_MASK, HAS_BIAS, CAUSAL, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    higher = tl.maximum(top, tl.max(s, 1))
    # a row whose keys are all removed so far has no maximum
    base = tl.where(higher == float("-inf"), 0.0, higher)
    w = tl.exp(s - base[:, None])
    fade = tl.exp(top - base)
    total = total * fade + tl.sum(w, 1)
    if HAS_DROPOUT:
        keep = _tl.dropout_keep(seed, rows, first_col + n, drop_below, BLOCK_M, BLOCK_N)
        w = w * keep.to(tl.float32) * factor
    values = attention_keys(v_ptr, offs_n, mask_n, stride_vn, K, BLOCK_K, PRODUCT)
    acc = _tl.dot(_tl.cast(w, PRODUCT), values, acc * fade[:, None], PRECISION)
    return acc, higher, total


@triton.jit
def attention_bwd_step(
    q, dy, delta, top, inverse, keys, values, mask_ptr, bias_ptr, seed, rows, offs_m, offs_n, mask_m, mask_n, n,
    first_col, M, N, stride_mask, stride_bias_m, stride_bias_n, scale, masked, drop_below, factor,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr, CAUSAL: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(w, ds): the weights that met the values, and scale * w (dw - delta), dw = dy vᵀ"""
    s = attention_scores(
        q, keys, mask_ptr, bias_ptr, offs_m, offs_n, mask_m, mask_n, M, N, stride_mask, stride_bias_m, stride_bias_n,
        scale, masked, HAS_MASK, HAS_BIAS, CAUSAL, PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    w = tl.exp(s - top[:, None]) * inverse[:, None]
    dw = _tl.dot(dy, tl.trans(values), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION)
    met = w
    if HAS_DROPOUT:
        keep = _tl.dropout_keep(seed, rows, first_col + n, drop_below, BLOCK_M, BLOCK_N).to(tl.float32) * factor
        met = w * keep
        dw = dw * keep
    return met, w * (dw - delta[:, None]) * scale


@triton.jit
def cross_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, mask_ptr, mask2_ptr, bias_ptr, index_ptr, seed_ptr, y_ptr, stats_ptr,
    M, N, N2, H, G, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kg, stride_vb, stride_vn, stride_vg,
    stride_k2b, stride_k2n, stride_k2g, stride_v2b, stride_v2n, stride_v2g, stride_mask_b, stride_mask_n,
    stride_mask2_b, stride_mask2_n, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, scale, masked,
    drop_below, factor, blocks, splits, keys_per_split,
    HAS_MASK: tl.constexpr, HAS_MASK2: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, CAUSAL: tl.constexpr, HAS_SECOND: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = softmax(s) v of one tile of queries of one head; with SPLIT the undivided sum over one range of keys"""
    pid = tl.program_id(0)
    split = pid % splits
    block = (pid // splits) % blocks
    h = (pid // splits // blocks) % H
    b = (pid // splits // blocks // H).to(tl.int64)
    g = h // (H // G)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows = (b * H + h) * M + offs_m
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    q = attention_rows(q_ptr + b * stride_qb + h * stride_qh, offs_m, mask_m, stride_qm, K, BLOCK_K, PRODUCT)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    source = b
    if HAS_INDEX:
        source = tl.load(index_ptr + b)
    begin = split * keys_per_split
    for n in range(begin, tl.minimum(begin + keys_per_split, N), BLOCK_N):
        acc, top, total = attention_fwd_step(
            acc, top, total, q, k_ptr + source * stride_kb + g * stride_kg, v_ptr + source * stride_vb + g * stride_vg,
            mask_ptr + source * stride_mask_b, bias_ptr + b * stride_bias_b + h * stride_bias_h, seed, rows, offs_m,
            mask_m, n, 0, M, N, stride_kn, stride_vn, stride_mask_n, stride_bias_m, stride_bias_n, scale, masked,
            drop_below, factor, HAS_MASK, HAS_BIAS, HAS_DROPOUT, False, PRODUCT, PRECISION, K,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if HAS_SECOND:
        # the last range of keys goes on with the second source
        for n in range(0, tl.where(split == splits - 1, N2, 0), BLOCK_N):
            acc, top, total = attention_fwd_step(
                acc, top, total, q, k2_ptr + b * stride_k2b + g * stride_k2g, v2_ptr + b * stride_v2b + g * stride_v2g,
                mask2_ptr + b * stride_mask2_b, bias_ptr, seed, rows, offs_m, mask_m, n, (N + 7) // 8 * 8, M, N2,
                stride_k2n, stride_v2n, stride_mask2_n, 0, 0, scale, masked, drop_below, factor, HAS_MASK2, False,
                HAS_DROPOUT, CAUSAL, PRODUCT, PRECISION, K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    offs_k = tl.arange(0, BLOCK_K)
    batch = tl.num_programs(0) // (splits * blocks * H)
    if SPLIT:
        y_ptr += split.to(tl.int64) * batch * M * H * K
        stats_ptr += split.to(tl.int64) * batch * M * H * 2
    else:
        # a row that sees nothing: 0 / inf, and weights of 0 in backward
        total = tl.where(top == float("-inf"), float("inf"), total)
        top = tl.where(top == float("-inf"), 0.0, top)
        acc = acc / total[:, None]
    out = y_ptr + ((b * M + offs_m) * H + h)[:, None] * K + offs_k[None, :]
    tl.store(out, _tl.cast(acc, y_ptr.dtype.element_ty), mask_m[:, None] & (offs_k < K)[None, :])
    tl.store(stats_ptr + 2 * rows, top, mask_m)
    tl.store(stats_ptr + 2 * rows + 1, total, mask_m)


@triton.jit
def cross_attention_combine_kernel(
    part_ptr, part_stats_ptr, y_ptr, stats_ptr, T, M, H, splits,
    K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """y and stats from the splits' undivided sums, maxima and denominators, in their order"""
    # rows of stats (b, h, m); those of y are (b, m, h)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = rows < T
    m = rows % M
    h = (rows // M) % H
    b = rows // M // H
    offs_k = tl.arange(0, BLOCK_K)
    out = ((b * M + m) * H + h)[:, None] * K + offs_k[None, :]
    mask = mask_t[:, None] & (offs_k < K)[None, :]
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    acc = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for split in range(splits):
        part = part_stats_ptr + 2 * (split * T.to(tl.int64) + rows)
        top_s = tl.load(part, mask_t, float("-inf"))
        total_s = tl.load(part + 1, mask_t, 0.0)
        higher = tl.maximum(top, top_s)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        fade = tl.exp(top - base)
        gain = tl.exp(top_s - base)
        total = total * fade + total_s * gain
        acc = acc * fade[:, None] + tl.load(part_ptr + split * T.to(tl.int64) * K + out, mask, 0.0) * gain[:, None]
        top = higher
    total = tl.where(top == float("-inf"), float("inf"), total)
    top = tl.where(top == float("-inf"), 0.0, top)
    tl.store(y_ptr + out, _tl.cast(acc / total[:, None], y_ptr.dtype.element_ty), mask)
    tl.store(stats_ptr + 2 * rows, top, mask_t)
    tl.store(stats_ptr + 2 * rows + 1, total, mask_t)


@triton.jit
def cross_attention_bwd_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, mask_ptr, mask2_ptr, bias_ptr, index_ptr, seed_ptr, dy_ptr, y_ptr, stats_ptr,
    dq_ptr, dk_ptr, dv_ptr, dk2_ptr, dv2_ptr,
    M, N, N2, H, G, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kg, stride_vb, stride_vn, stride_vg,
    stride_k2b, stride_k2n, stride_k2g, stride_v2b, stride_v2n, stride_v2g, stride_mask_b, stride_mask_n,
    stride_mask2_b, stride_mask2_n, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, scale, masked,
    drop_below, factor, stride_dyb, stride_dym, stride_dyh, stride_db, stride_dn, stride_dg, stride_d2b, stride_d2n,
    stride_d2g, splits, keys_per_split,
    HAS_MASK: tl.constexpr, HAS_MASK2: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, CAUSAL: tl.constexpr, HAS_SECOND: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All gradients of one head: keys and values are read once, dq stays here; no key/value head serves two heads"""
    pid = tl.program_id(0)
    split = pid % splits
    h = (pid // splits) % H
    b = (pid // splits // H).to(tl.int64)
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    q, dy, delta, top, inverse, mask_m, rows = attention_bwd_rows(
        q_ptr, dy_ptr, y_ptr, stats_ptr, b, h, offs_m, M, H, stride_qb, stride_qm, stride_qh, stride_dyb, stride_dym,
        stride_dyh, PRODUCT, K, BLOCK_K,
    )  # fmt: skip
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    begin = split * keys_per_split
    for n in range(begin, tl.minimum(begin + keys_per_split, N), BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        keys = attention_keys(k_ptr + b * stride_kb + h * stride_kg, offs_n, mask_n, stride_kn, K, BLOCK_K, PRODUCT)
        values = attention_keys(v_ptr + b * stride_vb + h * stride_vg, offs_n, mask_n, stride_vn, K, BLOCK_K, PRODUCT)
        w, ds = attention_bwd_step(
            q, dy, delta, top, inverse, keys, values, mask_ptr + b * stride_mask_b,
            bias_ptr + b * stride_bias_b + h * stride_bias_h, seed, rows, offs_m, offs_n, mask_m, mask_n, n, 0, M, N,
            stride_mask_n, stride_bias_m, stride_bias_n, scale, masked, drop_below, factor, HAS_MASK, HAS_BIAS,
            HAS_DROPOUT, False, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        ds = _tl.cast(ds, PRODUCT)
        dq = _tl.dot(ds, keys, dq, PRECISION)
        out = b * stride_db + offs_n[:, None].to(tl.int64) * stride_dn + h * stride_dg + offs_k[None, :]
        mask = mask_n[:, None] & (offs_k < K)[None, :]
        zero = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        dv = _tl.dot(tl.trans(_tl.cast(w, PRODUCT)), dy, zero, PRECISION)
        tl.store(dv_ptr + out, _tl.cast(dv, dv_ptr.dtype.element_ty), mask)
        dk = _tl.dot(tl.trans(ds), q, zero, PRECISION)
        tl.store(dk_ptr + out, _tl.cast(dk, dk_ptr.dtype.element_ty), mask)
    if HAS_SECOND:
        for n in range(0, tl.where(split == splits - 1, N2, 0), BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N2
            keys = attention_keys(
                k2_ptr + b * stride_k2b + h * stride_k2g, offs_n, mask_n, stride_k2n, K, BLOCK_K, PRODUCT
            )
            values = attention_keys(
                v2_ptr + b * stride_v2b + h * stride_v2g, offs_n, mask_n, stride_v2n, K, BLOCK_K, PRODUCT
            )
            w, ds = attention_bwd_step(
                q, dy, delta, top, inverse, keys, values, mask2_ptr + b * stride_mask2_b, bias_ptr, seed, rows, offs_m,
                offs_n, mask_m, mask_n, n, (N + 7) // 8 * 8, M, N2, stride_mask2_n, 0, 0, scale, masked, drop_below,
                factor, HAS_MASK2, False, HAS_DROPOUT, CAUSAL, PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            ds = _tl.cast(ds, PRODUCT)
            dq = _tl.dot(ds, keys, dq, PRECISION)
            out = b * stride_d2b + offs_n[:, None].to(tl.int64) * stride_d2n + h * stride_d2g + offs_k[None, :]
            mask = mask_n[:, None] & (offs_k < K)[None, :]
            zero = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
            dv = _tl.dot(tl.trans(_tl.cast(w, PRODUCT)), dy, zero, PRECISION)
            tl.store(dv2_ptr + out, _tl.cast(dv, dv2_ptr.dtype.element_ty), mask)
            dk = _tl.dot(tl.trans(ds), q, zero, PRECISION)
            tl.store(dk2_ptr + out, _tl.cast(dk, dk2_ptr.dtype.element_ty), mask)
    batch = tl.num_programs(0) // (splits * H)
    out = dq_ptr + (split.to(tl.int64) * batch + b) * M * H * K
    out += (offs_m[:, None].to(tl.int64) * H + h) * K + offs_k[None, :]
    tl.store(out, _tl.cast(dq, dq_ptr.dtype.element_ty), mask_m[:, None] & (offs_k < K)[None, :])


@triton.jit
def cross_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, mask_ptr, mask2_ptr, bias_ptr, index_ptr, seed_ptr, dy_ptr, y_ptr, stats_ptr,
    dq_ptr,
    M, N, N2, H, G, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kg, stride_vb, stride_vn, stride_vg,
    stride_k2b, stride_k2n, stride_k2g, stride_v2b, stride_v2n, stride_v2g, stride_mask_b, stride_mask_n,
    stride_mask2_b, stride_mask2_n, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, scale, masked,
    drop_below, factor, stride_dyb, stride_dym, stride_dyh, blocks,
    HAS_MASK: tl.constexpr, HAS_MASK2: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, CAUSAL: tl.constexpr, HAS_SECOND: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq = ds [k; k2] of one tile of queries of one head"""
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
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    source = b
    if HAS_INDEX:
        source = tl.load(index_ptr + b)
    dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for n in range(0, N, BLOCK_N):
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        keys = attention_keys(
            k_ptr + source * stride_kb + g * stride_kg, offs_n, mask_n, stride_kn, K, BLOCK_K, PRODUCT
        )
        values = attention_keys(
            v_ptr + source * stride_vb + g * stride_vg, offs_n, mask_n, stride_vn, K, BLOCK_K, PRODUCT
        )
        _, ds = attention_bwd_step(
            q, dy, delta, top, inverse, keys, values, mask_ptr + source * stride_mask_b,
            bias_ptr + b * stride_bias_b + h * stride_bias_h, seed, rows, offs_m, offs_n, mask_m, mask_n, n, 0, M, N,
            stride_mask_n, stride_bias_m, stride_bias_n, scale, masked, drop_below, factor, HAS_MASK, HAS_BIAS,
            HAS_DROPOUT, False, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dq = _tl.dot(_tl.cast(ds, PRODUCT), keys, dq, PRECISION)
    if HAS_SECOND:
        for n in range(0, N2, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N2
            keys = attention_keys(
                k2_ptr + b * stride_k2b + g * stride_k2g, offs_n, mask_n, stride_k2n, K, BLOCK_K, PRODUCT
            )
            values = attention_keys(
                v2_ptr + b * stride_v2b + g * stride_v2g, offs_n, mask_n, stride_v2n, K, BLOCK_K, PRODUCT
            )
            _, ds = attention_bwd_step(
                q, dy, delta, top, inverse, keys, values, mask2_ptr + b * stride_mask2_b, bias_ptr, seed, rows, offs_m,
                offs_n, mask_m, mask_n, n, (N + 7) // 8 * 8, M, N2, stride_mask2_n, 0, 0, scale, masked, drop_below,
                factor, HAS_MASK2, False, HAS_DROPOUT, CAUSAL, PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            dq = _tl.dot(_tl.cast(ds, PRODUCT), keys, dq, PRECISION)
    offs_k = tl.arange(0, BLOCK_K)
    out = dq_ptr + ((b * M + offs_m) * H + h)[:, None] * K + offs_k[None, :]
    tl.store(out, _tl.cast(dq, dq_ptr.dtype.element_ty), mask_m[:, None] & (offs_k < K)[None, :])


@triton.jit
def cross_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, k2_ptr, v2_ptr, mask_ptr, mask2_ptr, bias_ptr, index_ptr, seed_ptr, dy_ptr, y_ptr, stats_ptr,
    order_ptr, starts_ptr, dk_ptr, dv_ptr,
    M, N, N2, H, G, stride_qb, stride_qm, stride_qh, stride_kb, stride_kn, stride_kg, stride_vb, stride_vn, stride_vg,
    stride_k2b, stride_k2n, stride_k2g, stride_v2b, stride_v2n, stride_v2g, stride_mask_b, stride_mask_n,
    stride_mask2_b, stride_mask2_n, stride_bias_b, stride_bias_h, stride_bias_m, stride_bias_n, scale, masked,
    drop_below, factor, stride_dyb, stride_dym, stride_dyh, stride_db, stride_dn, stride_dg, blocks,
    HAS_MASK: tl.constexpr, HAS_MASK2: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDEX: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, CAUSAL: tl.constexpr, HAS_SECOND: tl.constexpr, PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, SECOND: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk = dsᵀ q and dv = wᵀ dy of one tile of keys, over all heads and rows of q that attend to it, in their order"""
    first_col = 0
    keys_all = N
    if SECOND:
        k_ptr = k2_ptr
        v_ptr = v2_ptr
        mask_ptr = mask2_ptr
        stride_kb = stride_k2b
        stride_kn = stride_k2n
        stride_kg = stride_k2g
        stride_vb = stride_v2b
        stride_vn = stride_v2n
        stride_vg = stride_v2g
        stride_mask_b = stride_mask2_b
        stride_mask_n = stride_mask2_n
        first_col = (N + 7) // 8 * 8
        keys_all = N2
    WITH_MASK: tl.constexpr = HAS_MASK2 if SECOND else HAS_MASK
    WITH_BIAS: tl.constexpr = HAS_BIAS and not SECOND
    WITH_INDEX: tl.constexpr = HAS_INDEX and not SECOND
    TRIANGULAR: tl.constexpr = CAUSAL and SECOND
    tiles = tl.cdiv(keys_all, BLOCK_N)
    pid = tl.program_id(0)
    n = (pid % tiles) * BLOCK_N
    g = (pid // tiles) % G
    source = (pid // tiles // G).to(tl.int64)
    offs_n = n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < keys_all
    offs_k = tl.arange(0, BLOCK_K)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    keys = attention_keys(k_ptr + source * stride_kb + g * stride_kg, offs_n, mask_n, stride_kn, K, BLOCK_K, PRODUCT)
    values = attention_keys(v_ptr + source * stride_vb + g * stride_vg, offs_n, mask_n, stride_vn, K, BLOCK_K, PRODUCT)
    dk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    begin = source
    end = source + 1
    if WITH_INDEX:
        begin = tl.load(starts_ptr + source)
        end = tl.load(starts_ptr + source + 1)
    heads = H // G
    # one loop over (row of q, head, tile of queries)
    for i in range(begin * heads * blocks, end * heads * blocks):
        b = (i // (heads * blocks)).to(tl.int64)
        if WITH_INDEX:
            b = tl.load(order_ptr + b)
        h = g * heads + ((i // blocks) % heads).to(tl.int32)
        offs_m = ((i % blocks) * BLOCK_M).to(tl.int32) + tl.arange(0, BLOCK_M)
        q, dy, delta, top, inverse, mask_m, rows = attention_bwd_rows(
            q_ptr, dy_ptr, y_ptr, stats_ptr, b, h, offs_m, M, H, stride_qb, stride_qm, stride_qh, stride_dyb,
            stride_dym, stride_dyh, PRODUCT, K, BLOCK_K,
        )  # fmt: skip
        w, ds = attention_bwd_step(
            q, dy, delta, top, inverse, keys, values, mask_ptr + source * stride_mask_b,
            bias_ptr + b * stride_bias_b + h * stride_bias_h, seed, rows, offs_m, offs_n, mask_m, mask_n, n, first_col,
            M, keys_all, stride_mask_n, stride_bias_m, stride_bias_n, scale, masked, drop_below, factor, WITH_MASK,
            WITH_BIAS, HAS_DROPOUT, TRIANGULAR, PRECISION, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        dv = _tl.dot(tl.trans(_tl.cast(w, PRODUCT)), dy, dv, PRECISION)
        dk = _tl.dot(tl.trans(_tl.cast(ds, PRODUCT)), q, dk, PRECISION)
    out = source * stride_db + offs_n[:, None].to(tl.int64) * stride_dn + g * stride_dg + offs_k[None, :]
    mask = mask_n[:, None] & (offs_k < K)[None, :]
    tl.store(dk_ptr + out, _tl.cast(dk, dk_ptr.dtype.element_ty), mask)
    tl.store(dv_ptr + out, _tl.cast(dv, dv_ptr.dtype.element_ty), mask)

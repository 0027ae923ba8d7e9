"""Triton kernels of dora_linear. Everywhere g = m / c, in float32."""

import triton
import triton.language as tl

from .. import _tl


@triton.jit
def dora_norm_kernel(
    w_ptr, a_ptr, b_ptr, parts_ptr, N, K, R, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, factor,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """parts[block of K] (N,) = Σ over the block's columns of (w + factor b a)²; b a lives in registers only"""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    block = tl.program_id(1)
    offs_k = block * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < K
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        # (BLOCK_N, BLOCK_R)
        b = tl.load(
            b_ptr + offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br,
            mask_n[:, None] & mask_r[None, :], 0.0,
        )  # fmt: skip
        # (BLOCK_R, BLOCK_K)
        a = tl.load(
            a_ptr + offs_r[:, None].to(tl.int64) * stride_ar + offs_k[None, :].to(tl.int64) * stride_ak,
            mask_r[:, None] & mask_k[None, :], 0.0,
        )  # fmt: skip
        acc = _tl.dot(_tl.cast(b, PRODUCT), _tl.cast(a, PRODUCT), acc, PRECISION)
    # (BLOCK_N, BLOCK_K)
    w = tl.load(
        w_ptr + offs_n[:, None].to(tl.int64) * stride_wn + offs_k[None, :].to(tl.int64) * stride_wk,
        mask_n[:, None] & mask_k[None, :], 0.0,
    )  # fmt: skip
    v = w.to(tl.float32) + factor * acc
    tl.store(parts_ptr + block.to(tl.int64) * N + offs_n, tl.sum(v * v, 1), mask_n)


@triton.jit
def dora_root_kernel(parts_ptr, c_ptr, count, N, BLOCK_N: tl.constexpr):
    """c (N,) = sqrt of the sum over the first axis of parts, in order"""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for part in range(0, count):
        acc += tl.load(parts_ptr + tl.cast(part, tl.int64) * N + offs_n, mask_n, 0.0)
    tl.store(c_ptr + offs_n, tl.sqrt(acc), mask_n)


@triton.jit
def dora_down_kernel(
    x_ptr, a_ptr, seed_ptr, s_ptr, kept_ptr, T, K, R, cols_per_split, stride_xt, stride_ar, stride_ak, factor,
    drop_below,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """kept (T, K) = keep * x and s[split] (T, R) = factor * kept Aᵀ over the columns of the split, one read of x"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    mask_t = offs_t < T
    mask_r = offs_r < R
    begin = split * cols_per_split
    end = tl.minimum(begin + cols_per_split, K)
    seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for k in range(begin, end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        mask_tk = mask_t[:, None] & mask_k[None, :]
        # (BLOCK_T, BLOCK_K)
        x = tl.load(x_ptr + offs_t[:, None] * stride_xt + offs_k[None, :], mask_tk, 0.0)
        x = _tl.cast(x, PRODUCT)
        x = _tl.times_mask(x, _tl.dropout_keep(seed, offs_t, k, drop_below, BLOCK_T, BLOCK_K))
        # the programs of the first rank tile write for all
        kept = _tl.cast(x, kept_ptr.dtype.element_ty)
        tl.store(kept_ptr + offs_t[:, None] * K + offs_k[None, :], kept, mask_tk & (tl.program_id(1) == 0))
        # (BLOCK_K, BLOCK_R)
        a = tl.load(
            a_ptr + offs_k[:, None].to(tl.int64) * stride_ak + offs_r[None, :].to(tl.int64) * stride_ar,
            mask_k[:, None] & mask_r[None, :], 0.0,
        )  # fmt: skip
        acc = _tl.dot(x, _tl.cast(a, PRODUCT), acc, PRECISION)
    s_ptrs = s_ptr + split.to(tl.int64) * T * R + offs_t[:, None] * R + offs_r[None, :]
    tl.store(s_ptrs, _tl.cast(acc * factor, s_ptr.dtype.element_ty), mask_t[:, None] & mask_r[None, :])


@triton.jit
def dora_drop_kernel(
    x_ptr, seed_ptr, kept_ptr, T, K, stride_xt, drop_below, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """kept (T, K) = keep * x"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_k = tl.program_id(1) * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    mask = (offs_t < T)[:, None] & (offs_k < K)[None, :]
    # (BLOCK_T, BLOCK_K)
    x = tl.load(x_ptr + offs_t[:, None] * stride_xt + offs_k[None, :], mask, 0.0)
    x = _tl.cast(x, kept_ptr.dtype.element_ty)
    x = _tl.times_mask(x, _tl.dropout_keep(tl.load(seed_ptr), offs_t, first_k, drop_below, BLOCK_T, BLOCK_K))
    tl.store(kept_ptr + offs_t[:, None] * K + offs_k[None, :], x, mask)


@triton.jit
def dora_update_kernel(
    plain_ptr, u_ptr, s_ptr, b_ptr, m_ptr, c_ptr, bias_ptr, seed_ptr, out_ptr, T, N, R,
    stride_plain, stride_u, stride_out, stride_bn, stride_br, factor, kept_factor, drop_below,
    HAS_PLAIN: tl.constexpr, HAS_GAIN: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """With a gain: out = g (u + factor s bᵀ) + bias, or plain + (g - 1) kept_factor u + g factor s bᵀ + bias.
    Without: out = plain + keep * kept_factor * (u + factor s bᵀ)."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_n = tl.program_id(1) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_t = offs_t < T
    mask_n = offs_n < N
    mask_tn = mask_t[:, None] & mask_n[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < R
        # (BLOCK_T, BLOCK_R)
        s = tl.load(s_ptr + offs_t[:, None] * R + offs_r[None, :], mask_t[:, None] & mask_r[None, :], 0.0)
        # (BLOCK_R, BLOCK_N)
        b = tl.load(
            b_ptr + offs_n[None, :].to(tl.int64) * stride_bn + offs_r[:, None].to(tl.int64) * stride_br,
            mask_r[:, None] & mask_n[None, :], 0.0,
        )  # fmt: skip
        acc = _tl.dot(s, _tl.cast(b, PRODUCT), acc, PRECISION)
    acc *= factor
    # (BLOCK_T, BLOCK_N)
    u = tl.load(u_ptr + offs_t[:, None] * stride_u + offs_n[None, :], mask_tn, 0.0).to(tl.float32)
    if HAS_GAIN:
        g = tl.load(m_ptr + offs_n, mask_n, 0.0).to(tl.float32) / tl.load(c_ptr + offs_n, mask_n, 1.0).to(tl.float32)
        if HAS_PLAIN:
            acc = ((g - 1.0) * kept_factor)[None, :] * u + g[None, :] * acc
        else:
            acc = g[None, :] * (u + acc)
    else:
        keep = _tl.dropout_keep(tl.load(seed_ptr), offs_t, first_n, drop_below, BLOCK_T, BLOCK_N)
        acc = _tl.times_mask((u + acc) * kept_factor, keep)
    if HAS_PLAIN:
        acc += tl.load(plain_ptr + offs_t[:, None] * stride_plain + offs_n[None, :], mask_tn, 0.0).to(tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask_n, 0.0).to(tl.float32)[None, :]
    out = _tl.cast(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_t[:, None] * stride_out + offs_n[None, :], out, mask_tn)


@triton.jit
def dora_columns_kernel(
    dy_ptr, u_ptr, m_ptr, c_ptr, out_ptr, dots_ptr, sums_ptr, T, N, rows_per_split, stride_dy, stride_u, shift,
    HAS_OUT: tl.constexpr, HAS_DOTS: tl.constexpr, HAS_SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From one read of dy: out (T, N) = (g - shift) dy; over the split's rows dots[split] (N,) = Σ dy u, sums = Σ dy"""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    mask_n = offs_n < N
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, T)
    if HAS_OUT:
        g = tl.load(m_ptr + offs_n, mask_n, 0.0).to(tl.float32) / tl.load(c_ptr + offs_n, mask_n, 1.0).to(tl.float32)
        gain = (g - shift)[None, :]
    if HAS_DOTS:
        dots = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if HAS_SUMS:
        sums = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for t in range(begin, end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < end)[:, None] & mask_n[None, :]
        # (BLOCK_T, BLOCK_N)
        dy = tl.load(dy_ptr + offs_t[:, None] * stride_dy + offs_n[None, :], mask, 0.0).to(tl.float32)
        if HAS_OUT:
            out = _tl.cast(gain * dy, out_ptr.dtype.element_ty)
            tl.store(out_ptr + offs_t[:, None] * N + offs_n[None, :], out, mask)
        if HAS_DOTS:
            dots += dy * tl.load(u_ptr + offs_t[:, None] * stride_u + offs_n[None, :], mask, 0.0).to(tl.float32)
        if HAS_SUMS:
            sums += dy
    if HAS_DOTS:
        tl.store(dots_ptr + split * N + offs_n, tl.sum(dots, 0), mask_n)
    if HAS_SUMS:
        tl.store(sums_ptr + split * N + offs_n, tl.sum(sums, 0), mask_n)


@triton.jit
def dora_gain_kernel(
    b_ptr, m_ptr, c_ptr, out_ptr, N, R, stride_bn, stride_br, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr
):
    """out (N, R) = g b in float32"""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_r < R)[None, :]
    g = tl.load(m_ptr + offs_n, mask_n, 0.0).to(tl.float32) / tl.load(c_ptr + offs_n, mask_n, 1.0).to(tl.float32)
    b = tl.load(b_ptr + offs_n[:, None].to(tl.int64) * stride_bn + offs_r[None, :].to(tl.int64) * stride_br, mask, 0.0)
    tl.store(out_ptr + offs_n[:, None].to(tl.int64) * R + offs_r[None, :], g[:, None] * b.to(tl.float32), mask)


@triton.jit
def dora_finish_kernel(
    q_ptr, b_ptr, m_ptr, c_ptr, dots_ptr, sums_ptr, db_ptr, dm_ptr, dbias_ptr, N, R, splits,
    stride_bn, stride_br, kept_factor,
    HAS_DB: tl.constexpr, HAS_DM: tl.constexpr, HAS_DBIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """For q = scale dyᵀ s: dB = g q, dm = (kept_factor Σ_split dots + Σ_r b q) / c, dbias = Σ_split sums, in order"""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if HAS_DB or HAS_DM:
        c = tl.load(c_ptr + offs_n, mask_n, 1.0).to(tl.float32)
        low = tl.zeros((BLOCK_N,), tl.float32)
        if HAS_DB:
            g = tl.load(m_ptr + offs_n, mask_n, 0.0).to(tl.float32) / c
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            mask = mask_n[:, None] & (offs_r < R)[None, :]
            row = offs_n[:, None].to(tl.int64)
            # (BLOCK_N, BLOCK_R)
            q = tl.load(q_ptr + row * R + offs_r[None, :], mask, 0.0)
            if HAS_DB:
                db = _tl.cast(g[:, None] * q, db_ptr.dtype.element_ty)
                tl.store(db_ptr + row * R + offs_r[None, :], db, mask)
            if HAS_DM:
                b = tl.load(b_ptr + row * stride_bn + offs_r[None, :].to(tl.int64) * stride_br, mask, 0.0)
                low += tl.sum(b.to(tl.float32) * q, 1)
        if HAS_DM:
            dots = tl.zeros((BLOCK_N,), tl.float32)
            for split in range(0, splits):
                dots += tl.load(dots_ptr + tl.cast(split, tl.int64) * N + offs_n, mask_n, 0.0)
            dm = (kept_factor * dots + low) / c
            tl.store(dm_ptr + offs_n, _tl.cast(dm, dm_ptr.dtype.element_ty), mask_n)
    if HAS_DBIAS:
        sums = tl.zeros((BLOCK_N,), tl.float32)
        for split in range(0, splits):
            sums += tl.load(sums_ptr + tl.cast(split, tl.int64) * N + offs_n, mask_n, 0.0)
        tl.store(dbias_ptr + offs_n, _tl.cast(sums, dbias_ptr.dtype.element_ty), mask_n)

"""Triton kernels of the low-rank products; `_lora.py` launches them and says what they compute."""

import triton
import triton.language as tl

from . import _tl


@triton.jit
def lora_down_step(
    acc, x, a_ptr, seed, offs_t, offs_k, offs_r, first_k, mask_k, R, stride_ar, stride_ak, drop_below,
    HAS_DROPOUT: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + keep(x) Aᵀ over one block of columns"""
    # (BLOCK_K, BLOCK_R)
    a = tl.load(
        a_ptr + offs_k[:, None].to(tl.int64) * stride_ak + offs_r[None, :].to(tl.int64) * stride_ar,
        mask_k[:, None] & (offs_r < R)[None, :], 0.0,
    )  # fmt: skip
    if HAS_DROPOUT:
        keep = _tl.dropout_keep(seed, offs_t, first_k, drop_below, BLOCK_T, BLOCK_K)
        x = _tl.times_mask(x, keep)
    return _tl.dot(x, _tl.cast(a, PRODUCT), acc, PRECISION)


@triton.jit
def lora_store_rows(acc, out_ptr, factor, split, offs_t, offs_r, mask_t, T, R):
    """out[split] (T, R) = factor * acc"""
    ptrs = out_ptr + split.to(tl.int64) * T * R + offs_t[:, None] * R + offs_r[None, :]
    tl.store(ptrs, _tl.cast(acc * factor, out_ptr.dtype.element_ty), mask_t[:, None] & (offs_r < R)[None, :])


@triton.jit
def lora_down_kernel(
    x_ptr, seed_ptr, a0_ptr, a1_ptr, a2_ptr, s0_ptr, s1_ptr, s2_ptr, T, K, R0, R1, R2, cols_per_split, stride_xt,
    stride_a0r, stride_a1r, stride_a2r, stride_a0k, stride_a1k, stride_a2k, factor, drop_below,
    GROUP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s_i[split] = factor * keep_i(x) A_iᵀ over the columns of the split"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_t = offs_t < T
    split = tl.program_id(2)
    begin = split * cols_per_split
    end = tl.minimum(begin + cols_per_split, K)
    seed0 = 0
    seed1 = 0
    seed2 = 0
    if HAS_DROPOUT:
        seed0 = tl.load(seed_ptr)
        if GROUP > 1:
            seed1 = tl.load(seed_ptr + 1)
        if GROUP > 2:
            seed2 = tl.load(seed_ptr + 2)
    acc0 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    if GROUP > 1:
        acc1 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    if GROUP > 2:
        acc2 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for k in range(begin, end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        # (BLOCK_T, BLOCK_K)
        x = tl.load(x_ptr + offs_t[:, None] * stride_xt + offs_k[None, :], mask_t[:, None] & mask_k[None, :], 0.0)
        x = _tl.cast(x, PRODUCT)
        acc0 = lora_down_step(
            acc0, x, a0_ptr, seed0, offs_t, offs_k, offs_r, k, mask_k, R0, stride_a0r, stride_a0k, drop_below,
            HAS_DROPOUT, PRODUCT, PRECISION, BLOCK_T, BLOCK_K,
        )  # fmt: skip
        if GROUP > 1:
            acc1 = lora_down_step(
                acc1, x, a1_ptr, seed1, offs_t, offs_k, offs_r, k, mask_k, R1, stride_a1r, stride_a1k, drop_below,
                HAS_DROPOUT, PRODUCT, PRECISION, BLOCK_T, BLOCK_K,
            )  # fmt: skip
        if GROUP > 2:
            acc2 = lora_down_step(
                acc2, x, a2_ptr, seed2, offs_t, offs_k, offs_r, k, mask_k, R2, stride_a2r, stride_a2k, drop_below,
                HAS_DROPOUT, PRODUCT, PRECISION, BLOCK_T, BLOCK_K,
            )  # fmt: skip
    lora_store_rows(acc0, s0_ptr, factor, split, offs_t, offs_r, mask_t, T, R0)
    if GROUP > 1:
        lora_store_rows(acc1, s1_ptr, factor, split, offs_t, offs_r, mask_t, T, R1)
    if GROUP > 2:
        lora_store_rows(acc2, s2_ptr, factor, split, offs_t, offs_r, mask_t, T, R2)


@triton.jit
def lora_update_step(
    acc, s_ptr, b_ptr, seed_ptr, offs_t, offs_n, first_n, mask_t, mask_n, R, stride_bn, stride_br, drop_below,
    INDEX: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """acc + keep * (s bᵀ); without dropout the terms of a group share one accumulator"""
    if HAS_DROPOUT:
        term = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    else:
        term = acc
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
        term = _tl.dot(s, _tl.cast(b, PRODUCT), term, PRECISION)
    if HAS_DROPOUT:
        keep = _tl.dropout_keep(tl.load(seed_ptr + INDEX), offs_t, first_n, drop_below, BLOCK_T, BLOCK_N)
        term = acc + term * keep.to(tl.float32)
    return term


@triton.jit
def lora_update_kernel(
    base_ptr, bias_ptr, seed_ptr, out_ptr, s0_ptr, s1_ptr, s2_ptr, b0_ptr, b1_ptr, b2_ptr, T, N, R0, R1, R2,
    stride_base, stride_out, stride_b0n, stride_b1n, stride_b2n, stride_b0r, stride_b1r, stride_b2r, factor, drop_below,
    GROUP: tl.constexpr, HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = base + factor * Σ_i keep_i * (s_i b_iᵀ + bias)"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    first_n = tl.program_id(1) * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_t = offs_t < T
    mask_n = offs_n < N
    mask_tn = mask_t[:, None] & mask_n[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    acc = lora_update_step(
        acc, s0_ptr, b0_ptr, seed_ptr, offs_t, offs_n, first_n, mask_t, mask_n, R0, stride_b0n, stride_b0r, drop_below,
        0, HAS_DROPOUT, PRODUCT, PRECISION, BLOCK_T, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    if GROUP > 1:
        acc = lora_update_step(
            acc, s1_ptr, b1_ptr, seed_ptr, offs_t, offs_n, first_n, mask_t, mask_n, R1, stride_b1n, stride_b1r,
            drop_below, 1, HAS_DROPOUT, PRODUCT, PRECISION, BLOCK_T, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    if GROUP > 2:
        acc = lora_update_step(
            acc, s2_ptr, b2_ptr, seed_ptr, offs_t, offs_n, first_n, mask_t, mask_n, R2, stride_b2n, stride_b2r,
            drop_below, 2, HAS_DROPOUT, PRODUCT, PRECISION, BLOCK_T, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask_n, 0.0).to(tl.float32)[None, :]
    acc *= factor
    if HAS_BASE:
        acc += tl.load(base_ptr + offs_t[:, None] * stride_base + offs_n[None, :], mask_tn, 0.0).to(tl.float32)
    out = _tl.cast(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_t[:, None] * stride_out + offs_n[None, :], out, mask_tn)


@triton.jit
def lora_outer_step(
    acc, z, g_ptr, seed, offs_t, offs_r, first_c, mask_t, R, drop_below,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """acc + keep(z)ᵀ g over one block of rows"""
    # (BLOCK_T, BLOCK_R)
    g = tl.load(g_ptr + offs_t[:, None] * R + offs_r[None, :], mask_t[:, None] & (offs_r < R)[None, :], 0.0)
    if HAS_DROPOUT:
        z = _tl.times_mask(z, _tl.dropout_keep(seed, offs_t, first_c, drop_below, BLOCK_T, BLOCK_C))
    return _tl.dot(tl.trans(z), g, acc, PRECISION)


@triton.jit
def lora_store_outer(acc, out_ptr, factor, split, offs_c, offs_r, mask_c, C, R, stride_oc, stride_or):
    """out[split] (C, R) = factor * acc"""
    offs = offs_c[:, None].to(tl.int64) * stride_oc + offs_r[None, :].to(tl.int64) * stride_or
    out = _tl.cast(acc * factor, out_ptr.dtype.element_ty)
    tl.store(out_ptr + split * C * R + offs, out, mask_c[:, None] & (offs_r < R)[None, :])


@triton.jit
def lora_outer_kernel(
    z_ptr, seed_ptr, g0_ptr, g1_ptr, g2_ptr, out0_ptr, out1_ptr, out2_ptr, T, C, R0, R1, R2, rows_per_split, stride_zt,
    stride_o0c, stride_o1c, stride_o2c, stride_o0r, stride_o1r, stride_o2r, factor, drop_below,
    GROUP: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out_i[split] = factor * keep_i(z)ᵀ g_i over the rows of the split"""
    first_c = tl.program_id(0) * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    mask_c = offs_c < C
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, T)
    seed0 = 0
    seed1 = 0
    seed2 = 0
    if HAS_DROPOUT:
        seed0 = tl.load(seed_ptr)
        if GROUP > 1:
            seed1 = tl.load(seed_ptr + 1)
        if GROUP > 2:
            seed2 = tl.load(seed_ptr + 2)
    acc0 = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    if GROUP > 1:
        acc1 = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    if GROUP > 2:
        acc2 = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for t in range(begin, end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        # (BLOCK_T, BLOCK_C)
        z = tl.load(z_ptr + offs_t[:, None] * stride_zt + offs_c[None, :], mask_t[:, None] & mask_c[None, :], 0.0)
        z = _tl.cast(z, PRODUCT)
        acc0 = lora_outer_step(
            acc0, z, g0_ptr, seed0, offs_t, offs_r, first_c, mask_t, R0, drop_below,
            HAS_DROPOUT, PRECISION, BLOCK_T, BLOCK_C,
        )  # fmt: skip
        if GROUP > 1:
            acc1 = lora_outer_step(
                acc1, z, g1_ptr, seed1, offs_t, offs_r, first_c, mask_t, R1, drop_below,
                HAS_DROPOUT, PRECISION, BLOCK_T, BLOCK_C,
            )  # fmt: skip
        if GROUP > 2:
            acc2 = lora_outer_step(
                acc2, z, g2_ptr, seed2, offs_t, offs_r, first_c, mask_t, R2, drop_below,
                HAS_DROPOUT, PRECISION, BLOCK_T, BLOCK_C,
            )  # fmt: skip
    lora_store_outer(acc0, out0_ptr, factor, split, offs_c, offs_r, mask_c, C, R0, stride_o0c, stride_o0r)
    if GROUP > 1:
        lora_store_outer(acc1, out1_ptr, factor, split, offs_c, offs_r, mask_c, C, R1, stride_o1c, stride_o1r)
    if GROUP > 2:
        lora_store_outer(acc2, out2_ptr, factor, split, offs_c, offs_r, mask_c, C, R2, stride_o2c, stride_o2r)


@triton.jit
def lora_up_kernel(
    dy_ptr, b_ptr, s_ptr, ds_ptr, db_ptr, T, N, R, rows_per_split, stride_dyt, stride_bn, stride_br,
    stride_ds, stride_db, factor,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """ds[block] = factor * dy B over the block's columns and dB[split] = factor * dyᵀ s over the split's rows"""
    block = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    mask_r = offs_r < R
    mask_nr = mask_n[:, None] & mask_r[None, :]
    # (BLOCK_N, BLOCK_R)
    b = tl.load(b_ptr + offs_n[:, None] * stride_bn + offs_r[None, :].to(tl.int64) * stride_br, mask_nr, 0.0)
    b = _tl.cast(b, PRODUCT)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, T)
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for t in range(begin, end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        mask_tr = mask_t[:, None] & mask_r[None, :]
        # (BLOCK_T, BLOCK_N)
        dy = tl.load(dy_ptr + offs_t[:, None] * stride_dyt + offs_n[None, :], mask_t[:, None] & mask_n[None, :], 0.0)
        dy = _tl.cast(dy, PRODUCT)
        # (BLOCK_T, BLOCK_R)
        s = tl.load(s_ptr + offs_t[:, None] * R + offs_r[None, :], mask_tr, 0.0)
        ds = _tl.dot(dy, b, tl.zeros((BLOCK_T, BLOCK_R), tl.float32), PRECISION) * factor
        ds = _tl.cast(ds, ds_ptr.dtype.element_ty)
        tl.store(ds_ptr + block * stride_ds + offs_t[:, None] * R + offs_r[None, :], ds, mask_tr)
        acc = _tl.dot(tl.trans(dy), s, acc, PRECISION)
    db = _tl.cast(acc * factor, db_ptr.dtype.element_ty)
    tl.store(db_ptr + split * stride_db + offs_n[:, None] * R + offs_r[None, :], db, mask_nr)


@triton.jit
def lora_sum_kernel(parts_ptr, out_ptr, count, size, BLOCK: tl.constexpr):
    """out = sum over the first axis of parts, in order"""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), tl.float32)
    ptrs = parts_ptr + offs
    for _ in range(0, count):
        acc += tl.load(ptrs, mask, 0.0)
        ptrs += size
    tl.store(out_ptr + offs, _tl.cast(acc, out_ptr.dtype.element_ty), mask)

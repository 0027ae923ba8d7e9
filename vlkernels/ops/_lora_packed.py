"""[W, B] in one buffer: cuBLAS computes y = [x, scale s] [W, B]ᵀ in one product, and [dx, dy B] = dy [W, B] in another.

Dims: T all rows, K width of x, N width of y, R rank.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _lora, _lora_kernels, _tl
from ._dropout import keep_factor, threshold
from ._packed_storage import spare

# -- launches ------------------------------------------------------------------------------------------------------


def extend(x2: Tensor, a: Tensor, seed: Tensor | None, p: float, scale: float, s: Tensor, tile: _lora.Tile) -> Tensor:
    """[x2, scale s] (T, K + R) in s's dtype, and s (T, R) = drop(x2) Aᵀ written into `s`, from one read of x2."""
    (count, width), rank = x2.shape, a.shape[0]
    ext = spare(x2, rank) if x2.dtype == s.dtype else None
    copy = ext is None
    if copy:
        ext = torch.empty((count, width + rank), dtype=s.dtype, device=s.device)
    parts = s
    if tile.splits > 1:
        parts = torch.empty((tile.splits, s.numel()), dtype=torch.float32, device=s.device)
    grid = (triton.cdiv(count, tile.rows), triton.cdiv(rank, tile.rank), tile.splits)
    lora_packed_down_kernel[grid](
        x2, a, seed, parts, ext, count, width, rank, tile.cols * triton.cdiv(width, tile.cols * tile.splits),
        x2.stride(0), a.stride(0), a.stride(1), ext.stride(0), keep_factor(p), scale, threshold(p),
        COPY=copy, WHOLE=tile.splits == 1, HAS_DROPOUT=seed is not None,
        BLOCK_T=tile.rows, BLOCK_K=tile.cols, BLOCK_R=tile.rank,
        num_warps=tile.warps, num_stages=tile.stages, **_tl.product(s.dtype),
    )  # fmt: skip
    if tile.splits > 1:
        lora_packed_tail_kernel[(triton.cdiv(s.numel(), 1024),)](
            parts, s, ext, tile.splits, s.numel(), width, rank, ext.stride(0), scale, BLOCK=1024, num_warps=4
        )
    return ext


def bias_of_both(bias: Tensor | None, lora_bias: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor | None:
    """bias + scale * lora_bias, rounded once."""
    if lora_bias is None:
        return None if bias is None else bias.to(dtype)
    low = lora_bias.float() * scale
    return (low if bias is None else low + bias.float()).to(dtype)


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def lora_packed_down_kernel(
    x_ptr, a_ptr, seed_ptr, s_ptr, ext_ptr, T, K, R, cols_per_split, stride_xt, stride_ar, stride_ak, stride_ext,
    factor, scale, drop_below,
    COPY: tl.constexpr, WHOLE: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """ext = [x, scale s] and s = factor * keep(x) Aᵀ; with several splits of the columns s[split], and no scale s"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_t = offs_t < T
    split = tl.program_id(2)
    begin = split * cols_per_split
    end = tl.minimum(begin + cols_per_split, K)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    # the first block of the rank copies
    mask_copy = mask_t & (tl.program_id(1) == 0)
    for k in range(begin, end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        # (BLOCK_T, BLOCK_K)
        x = tl.load(x_ptr + offs_t[:, None] * stride_xt + offs_k[None, :], mask_t[:, None] & mask_k[None, :], 0.0)
        x = _tl.cast(x, PRODUCT)
        if COPY:
            tl.store(ext_ptr + offs_t[:, None] * stride_ext + offs_k[None, :], x, mask_copy[:, None] & mask_k[None, :])
        acc = _lora_kernels.lora_down_step(
            acc, x, a_ptr, seed, offs_t, offs_k, offs_r, k, mask_k, R, stride_ar, stride_ak, drop_below,
            HAS_DROPOUT, PRODUCT, PRECISION, BLOCK_T, BLOCK_K,
        )  # fmt: skip
    _lora_kernels.lora_store_rows(acc, s_ptr, factor, split, offs_t, offs_r, mask_t, T, R)
    if WHOLE:
        tail = _tl.cast(acc * (factor * scale), ext_ptr.dtype.element_ty)
        ptrs = ext_ptr + offs_t[:, None] * stride_ext + K + offs_r[None, :]
        tl.store(ptrs, tail, mask_t[:, None] & (offs_r < R)[None, :])


@triton.jit
def lora_packed_tail_kernel(
    parts_ptr, s_ptr, ext_ptr, count, size, K, R, stride_ext, scale, BLOCK: tl.constexpr
):  # fmt: skip
    """s = the sum of the parts, in order; ext[:, K:] = scale s"""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), tl.float32)
    ptrs = parts_ptr + offs
    for _ in range(0, count):
        acc += tl.load(ptrs, mask, 0.0)
        ptrs += size
    tl.store(s_ptr + offs, _tl.cast(acc, s_ptr.dtype.element_ty), mask)
    tail = _tl.cast(acc * scale, ext_ptr.dtype.element_ty)
    tl.store(ext_ptr + offs // R * stride_ext + K + offs % R, tail, mask)

"""4-bit weights in Triton: one pass that dequantises, and a product for few rows that never writes the weight out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _nf4, _tl
from ._device import arch, multiprocessors
from ._scratch import kept

# bitsandbytes' dispatch, calibrated on H100 and H200, leaves its fused product above 512 rows
MAX_ROWS = 512


def dense(
    weight: Tensor,
    quant: Tensor,
    shape: tuple[int, int],
    blocksize: int,
    quant_dtype: torch.dtype | None,
    dtype: torch.dtype,
) -> Tensor:
    """The weight (N, K) in `dtype`: `_nf4.dequantize` bit for bit, kept by `_scratch`. Read only, for this op call."""
    shape = tuple(shape)
    return kept(
        lambda: dequantize(weight, quant, shape, blocksize, quant_dtype, dtype),
        shape[0] * shape[1] * dtype.itemsize, (weight, quant), shape, blocksize, quant_dtype, dtype,
    )  # fmt: skip


def dequantize(weight, quant, shape, blocksize, quant_dtype, dtype) -> Tensor:
    """One launch: the weight (N, K) in `dtype`, in a new tensor."""
    out = torch.empty(shape, dtype=dtype, device=weight.device)
    blocks = _nf4.block_count(shape, blocksize)
    floats, absmax = _nf4.sections(quant, blocks)
    # 1024 bytes a program: 16 bytes of output a thread and store in 16 bits. Not timed on a GPU yet.
    rows = max(1, 2048 // blocksize)
    nf4_dequantize_kernel[(triton.cdiv(blocks, rows),)](
        weight, floats, absmax, out, weight.numel(), out.numel(), blocks,
        BLOCKSIZE=blocksize, ROUND=_tl.TL_DTYPE[quant_dtype or torch.float32], BLOCK_Q=rows,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


# -- few rows ------------------------------------------------------------------------------------------------------


def fused_reason(rows: int, shape: tuple[int, int]) -> str | None:
    """Why `linear` does not take `rows` rows of x, or None."""
    if rows == 0 or rows > MAX_ROWS:
        return f"{rows} rows; the fused product takes 1 to {MAX_ROWS}"
    if shape[1] % 2:
        return f"{shape[1]} input channels; the fused product takes an even number, for a byte holds two"
    return None


@dataclass(frozen=True)
class Config:
    """rows of x, columns of y (rows of W) and input channels held at once; splits: ranges of K, summed later."""

    rows: int
    cols: int
    inner: int
    warps: int
    stages: int
    splits: int


def config(rows: int, shape: tuple[int, int], blocksize: int, dtype: torch.dtype, device_arch: int) -> Config:
    """None of the steps below has been timed on a GPU yet."""
    wide = dtype == torch.float32
    # W is the left factor: 64 of its rows reach wgmma however few rows x has
    cols, held = 64, min(32 if wide else 64, max(16, triton.next_power_of_2(rows)))
    aligned = shape[1] % blocksize == 0
    # where blocks cross rows each byte looks its scale up: 64 channels spill
    inner = min(32 if wide or not aligned else 64, blocksize)
    programs = triton.cdiv(rows, held) * triton.cdiv(shape[0], cols)
    # partial sums until each SM has a program, each over 512 channels at least
    splits = max(1, min(multiprocessors(device_arch) // programs, shape[1] // 512))
    return Config(held, cols, inner, warps=4, stages=2, splits=splits)


def linear(x2, weight, quant, bias, shape, blocksize, quant_dtype, out_dtype) -> Tensor:
    """y (T, N) = x2 (T, K) Wᵀ + bias in `out_dtype`, W dequantised in registers; x2 with contiguous columns."""
    rows, (cols, width) = x2.shape[0], shape
    y = torch.empty((rows, cols), dtype=out_dtype, device=x2.device)
    floats, absmax = _nf4.sections(quant, _nf4.block_count(shape, blocksize))
    tile = config(rows, shape, blocksize, out_dtype, arch(x2))
    parts = y
    if tile.splits > 1:
        parts = torch.empty((tile.splits, rows, cols), dtype=torch.float32, device=x2.device)
    per_split = triton.cdiv(width, tile.inner * tile.splits) * tile.inner
    grid = (triton.cdiv(cols, tile.cols), triton.cdiv(rows, tile.rows), tile.splits)
    nf4_linear_kernel[grid](
        x2, weight, floats, absmax, bias if tile.splits == 1 else None, parts, rows, cols, width, per_split,
        x2.stride(0), rows * cols,
        BLOCKSIZE=blocksize, ALIGNED=width % blocksize == 0, ROUND=_tl.TL_DTYPE[quant_dtype or torch.float32],
        HAS_BIAS=bias is not None and tile.splits == 1, PRODUCT=_tl.TL_DTYPE[out_dtype],
        PRECISION="tf32x3" if out_dtype == torch.float32 else "ieee",
        BLOCK_T=tile.rows, BLOCK_N=tile.cols, BLOCK_K=tile.inner,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if tile.splits > 1:
        nf4_sum_kernel[(triton.cdiv(rows * cols, 1024),)](
            parts, bias, y, tile.splits, rows * cols, cols, HAS_BIAS=bias is not None, BLOCK=1024, num_warps=4
        )
    return y


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def nf4_absmax(floats_ptr, absmax_ptr, block, mask):
    """absmax of the blocks: float32 as it is, uint8 by nested_code[absmax8] * nested_absmax[block // 256] + offset.

    floats: code (16), offset (1), zeros (3), nested code (256), nested absmax.
    """
    stored = tl.load(absmax_ptr + block, mask, 0)
    if absmax_ptr.dtype.element_ty == tl.uint8:
        nested = tl.load(floats_ptr + 276 + block // 256, mask, 0.0)
        # two roundings: the launch turns fused multiply-adds off
        scale = tl.load(floats_ptr + 20 + stored.to(tl.int32)) * nested + tl.load(floats_ptr + 16)
    else:
        scale = stored
    return scale


@triton.jit
def nf4_dequantize_kernel(
    packed_ptr, floats_ptr, absmax_ptr, out_ptr, bytes, count, blocks,
    BLOCKSIZE: tl.constexpr, ROUND: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """out[i] = code[index[i]] * absmax[i // BLOCKSIZE] over BLOCK_Q blocks"""
    HALF: tl.constexpr = BLOCKSIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    scale = nf4_absmax(floats_ptr, absmax_ptr, block, block < blocks)
    # (BLOCK_Q, HALF)
    byte = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    pair = tl.load(packed_ptr + byte, byte < bytes, 0).to(tl.int32)
    even = tl.load(floats_ptr + (pair >> 4)) * scale[:, None]
    odd = tl.load(floats_ptr + (pair & 15)) * scale[:, None]
    w = tl.reshape(tl.join(even, odd), (BLOCK_Q, BLOCKSIZE))
    offs = block[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    w = _tl.cast(_tl.cast(w, ROUND).to(tl.float32), out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs, w, offs < count)


@triton.jit
def nf4_linear_kernel(
    x_ptr, packed_ptr, floats_ptr, absmax_ptr, bias_ptr, y_ptr, T, N, K, cols_per_split, stride_xt, stride_split,
    BLOCKSIZE: tl.constexpr, ALIGNED: tl.constexpr, ROUND: tl.constexpr, HAS_BIAS: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y[split]ᵀ = W xᵀ + bias over the columns of the split; K is even"""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(2)
    mask_n = offs_n < N
    mask_t = offs_t < T
    begin = split * cols_per_split
    end = tl.minimum(begin + cols_per_split, K)
    HALF: tl.constexpr = BLOCK_K // 2
    acc = tl.zeros((BLOCK_N, BLOCK_T), tl.float32)
    for k in range(begin, end, BLOCK_K):
        # (BLOCK_N, HALF): two channels a byte
        first = k + 2 * tl.arange(0, HALF)
        mask = mask_n[:, None] & (first < end)[None, :]
        flat = offs_n[:, None] * K + first[None, :]
        pair = tl.load(packed_ptr + flat // 2, mask, 0).to(tl.int32)
        if ALIGNED:
            # one block a row: BLOCK_K divides BLOCKSIZE, BLOCKSIZE divides K
            scale = nf4_absmax(floats_ptr, absmax_ptr, (offs_n * K + k) // BLOCKSIZE, mask_n)[:, None]
        else:
            scale = nf4_absmax(floats_ptr, absmax_ptr, flat // BLOCKSIZE, mask)
        even = tl.load(floats_ptr + (pair >> 4)) * scale
        odd = tl.load(floats_ptr + (pair & 15)) * scale
        w = tl.reshape(tl.join(even, odd), (BLOCK_N, BLOCK_K))
        w = _tl.cast(_tl.cast(w, ROUND).to(tl.float32), PRODUCT)
        # (BLOCK_K, BLOCK_T)
        offs_k = k + tl.arange(0, BLOCK_K)
        x_mask = (offs_k < end)[:, None] & mask_t[None, :]
        x = tl.load(x_ptr + offs_t[None, :] * stride_xt + offs_k[:, None], x_mask, 0.0)
        acc = _tl.dot(w, _tl.cast(x, PRODUCT), acc, PRECISION)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask_n, 0.0).to(tl.float32)[:, None]
    y_ptrs = y_ptr + split.to(tl.int64) * stride_split + offs_t[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, _tl.cast(tl.trans(acc), y_ptr.dtype.element_ty), mask_t[:, None] & mask_n[None, :])


@triton.jit
def nf4_sum_kernel(parts_ptr, bias_ptr, y_ptr, splits, size, N, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y = sum over the first axis of parts, in order, + bias"""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), tl.float32)
    ptrs = parts_ptr + offs
    for _ in range(0, splits):
        acc += tl.load(ptrs, mask, 0.0)
        ptrs += size
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs % N, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + offs, _tl.cast(acc, y_ptr.dtype.element_ty), mask)

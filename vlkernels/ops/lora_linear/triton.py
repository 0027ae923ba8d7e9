"""lora_linear in Triton: cuBLAS runs the large products, these kernels the rank-r ones, a pass over each activation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import _refuse, _tl
from .._device import arch, multiprocessors
from .._dropout import keep_factor, threshold
from .reference import low_rank_dtype

MAX_RANK = 512
TL_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def refuses(x, weight, a, b, bias, lora_bias, base, seed, scale, p, dtype) -> str | None:
    if (reason := _refuse.common(x, dtype, weight=weight, a=a, b=b, base=base)) is not None:
        return reason
    if dtype is None and a.dtype not in (x.dtype, torch.float32):
        return f"adapters in {a.dtype} over {x.dtype}; kernels take adapters in x's dtype or float32"
    if a.shape[0] > MAX_RANK:
        return f"rank {a.shape[0]}; kernels take ranks from 1 to {MAX_RANK}"
    if a.shape[1] == 0 or b.shape[0] == 0:
        return f"zero channels: a {tuple(a.shape)}, b {tuple(b.shape)}"
    return None


def declines(x, weight, a, b, bias, lora_bias, base, seed, scale, p, dtype) -> str | None:
    # with dropout never: a checkpoint's first pass has no gradients, and its recomputation must draw the same mask
    if not torch.is_grad_enabled() and threshold(p) == 0 and x.numel() // x.shape[-1] <= 64:
        return "at most 64 rows without gradients (decoding): launch-bound, and nothing is saved"
    return None


def forward(x, weight, a, b, bias, lora_bias, base, seed, scale, p, dtype, update=None) -> tuple[Tensor, Tensor]:
    """y (..., N) and s (T, R). `update` replaces the rank-r update kernel (the CUDA backend's own)."""
    update = update or _update
    out_dtype = dtype or x.dtype
    if base is None:
        # cuBLAS; a fresh buffer, so the update may write over it
        y = F.linear(x.to(out_dtype), weight.to(out_dtype), None if bias is None else bias.to(out_dtype))
        y_in = y
    else:
        y_in = base.to(out_dtype)
        y = torch.empty_like(y_in, memory_format=torch.contiguous_format)
    x2 = _rows(x)
    low = low_rank_dtype(x, a, dtype)
    s = x.new_empty((x2.shape[0], a.shape[0]), dtype=low)
    if x2.shape[0] == 0:
        return y, s
    dims = Dims(x2.shape[0], x2.shape[1], b.shape[0], a.shape[0])
    tiles = config(dims, low, arch(x), _loaded(x, a))
    _down(x2, a, seed, keep_factor(p), p, s, tiles.down)
    update(_rows(y_in), s, b, lora_bias, None, scale, 0.0, _rows(y), tiles.update)
    return y, s


def backward(dy, saved, needs, scale, p, dtype, update=None) -> dict[str, Tensor]:
    """Gradients by argument name: dx, dW, da, db, dbias, dlora_bias, dbase for those that are needed."""
    update = update or _update
    x, weight, a, b, s = (saved[name] for name in ("x", "weight", "a", "b", "s"))
    out_dtype = dtype or x.dtype
    grads = {}
    dy2, x2 = _rows(dy.to(out_dtype)), _rows(x)
    if needs["base"]:
        grads["base"] = dy.to(saved["base"].dtype).clone(memory_format=torch.contiguous_format)
    if needs["weight"]:
        grads["weight"] = (dy2.t() @ x2.to(out_dtype)).to(weight.dtype)
    if needs["bias"] or needs["lora_bias"]:
        column_sums = dy2.sum(0, dtype=torch.float32)
        if needs["bias"]:
            grads["bias"] = column_sums.to(saved["bias"].dtype)
        if needs["lora_bias"]:
            grads["lora_bias"] = (column_sums * scale).to(saved["lora_bias"].dtype)
    if dy2.shape[0] == 0:
        grads |= {name: torch.zeros_like(saved[name]) for name in ("x", "a", "b") if needs[name]}
        return grads

    dims = Dims(x2.shape[0], x2.shape[1], b.shape[0], a.shape[0])
    tiles = config(dims, s.dtype, arch(x), _loaded(x, a))
    need_ds = needs["x"] or needs["a"]
    if need_ds and needs["b"] and tiles.up is not None:
        ds, grads["b"] = _up(dy2, b, s, scale, tiles)
    else:
        if need_ds:
            ds = torch.empty_like(s)
            _down(dy2, b.t(), None, scale, 0.0, ds, tiles.down_dy)
        if needs["b"]:
            grads["b"] = torch.empty_like(b, memory_format=torch.contiguous_format)
            _outer(dy2, s, None, scale, 0.0, grads["b"], tiles.outer_dy)
    if needs["a"]:
        grads["a"] = torch.empty_like(a, memory_format=torch.contiguous_format)
        _outer(x2, ds, saved["seed"], keep_factor(p), p, grads["a"].t(), tiles.outer_x)
    if needs["x"]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if weight is None:
            plain = None
        else:
            plain = dy2 @ weight.to(out_dtype)
            dx = plain.view(x.shape) if plain.dtype == x.dtype else dx
        update(plain, ds, a.t(), None, saved["seed"], 1.0, p, _rows(dx), tiles.update_dx)
        grads["x"] = dx
    return grads


# -- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dims:
    T: int
    K: int
    N: int
    R: int


@dataclass(frozen=True)
class Tile:
    """rows, cols of x or dy and columns of s (rank) held at once; splits: ranges of the summed axis, summed later."""

    rows: int
    cols: int
    rank: int
    warps: int
    stages: int = 3
    splits: int = 1


@dataclass(frozen=True)
class Config:
    down: Tile  # s = drop(x) Aᵀ
    update: Tile  # y += scale s Bᵀ
    update_dx: Tile  # dx += mask (ds A)
    down_dy: Tile  # ds = scale dy B
    outer_dy: Tile  # dB = scale dyᵀ s
    outer_x: Tile  # dA = dsᵀ drop(x)
    up: Tile | None  # ds and dB from one read of dy


def config(dims: Dims, dtype: torch.dtype, arch: int, loaded: torch.dtype | None = None) -> Config:
    """Tiles by shape; `dtype` is that of s and of the products, `loaded` the widest of x, a, b in memory.

    None of the steps below has been timed on a GPU yet.
    """
    wide = dtype == torch.float32  # products in three tf32 passes: operands and their splits take twice the registers
    converted = (
        not wide and loaded == torch.float32
    )  # autocast: a tile is in registers twice, before and after rounding
    rank = max(16, triton.next_power_of_2(dims.R))  # tl.dot needs 16
    sms = multiprocessors(arch)

    def down(width: int) -> Tile:
        held = min(rank, 64 if wide else 128)
        # every program reads all of A: tall tiles first (64 rows reach wgmma), then ranges of K until each SM has one
        rows = min(64 if not wide else 32, _cover(dims.T))
        programs = triton.cdiv(dims.T, rows) * triton.cdiv(rank, held)
        splits = max(1, min(sms // programs, width // 256))
        cols = min(32 if converted or (wide and held > 32) else 64, _cover(width))
        return Tile(rows, cols, held, warps=_warps(rows * held, 64 * 64, arch), splits=splits)

    def update(width: int) -> Tile:
        return Tile(64, min(64 if wide else 128, _cover(width)), min(rank, 32 if wide else 64), warps=4, stages=2)

    def outer(width: int) -> Tile:
        cols, held = min(64 if wide or converted else 128, _cover(width)), min(rank, 64 if wide else 128)
        programs = triton.cdiv(width, cols) * triton.cdiv(rank, held)
        # a partial costs 8 R bytes a column to write and read back against 2 bytes a row saved by parallelism
        splits = max(1, min(triton.cdiv(sms, programs), dims.T // max(64, 4 * rank)))
        return Tile(32 if wide else 64, cols, held, warps=_warps(cols * held, 128 * 64, arch), splits=splits)

    up = None
    # one read of dy saves 2 T N bytes and costs 8 T R bytes of partial ds per column block: it pays below cols / 4
    if rank <= 32:
        cols = min(128 if wide else 256, _cover(dims.N))
        blocks = triton.cdiv(dims.N, cols)
        splits = max(1, min(triton.cdiv(2 * sms, blocks), dims.T // max(64, 4 * rank)))
        up = Tile(16 if wide else 32, cols, rank, warps=8, stages=2, splits=splits)
    return Config(
        down=down(dims.K),
        update=update(dims.N),
        update_dx=update(dims.K),
        down_dy=down(dims.N),
        outer_dy=outer(dims.N),
        outer_x=outer(dims.K),
        up=up,
    )


def _warps(accumulators: int, most: int, arch: int) -> int:
    """Before wgmma operands take registers too: past `most` accumulators four warps spill there."""
    return 8 if arch < 90 and accumulators > most else 4


def _loaded(x: Tensor, a: Tensor) -> torch.dtype:
    return torch.float32 if torch.float32 in (x.dtype, a.dtype) else x.dtype


def _cover(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


# -- launches ------------------------------------------------------------------------------------------------------


def _rows(t: Tensor) -> Tensor:
    """(T, width) with contiguous columns; a copy only where strides allow no such view."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _product(dtype: torch.dtype) -> dict:
    return {"PRODUCT": TL_DTYPE[dtype], "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee"}


def _down(x2: Tensor, a: Tensor, seed: Tensor | None, factor: float, p: float, s: Tensor, tile: Tile) -> None:
    """s (T, R) = factor * keep(x2) Aᵀ; a (R, K) with any strides."""
    rows, width = x2.shape
    target = s
    if tile.splits > 1:
        target = torch.empty((tile.splits, s.numel()), dtype=torch.float32, device=s.device)
    cols_per_split = tile.cols * triton.cdiv(width, tile.cols * tile.splits)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(a.shape[0], tile.rank), tile.splits)
    lora_linear_down_kernel[grid](
        x2, a, seed, target, rows, width, a.shape[0], cols_per_split, x2.stride(0), a.stride(0), a.stride(1),
        s.numel(), factor, threshold(p),
        HAS_DROPOUT=seed is not None, BLOCK_T=tile.rows, BLOCK_K=tile.cols, BLOCK_R=tile.rank,
        num_warps=tile.warps, num_stages=tile.stages, **_product(s.dtype),
    )  # fmt: skip
    if tile.splits > 1:
        _sum(target, s)


def _update(base, s, b, bias, seed, scale, p, out, tile: Tile) -> None:
    """out (T, N) = base + keep / (1 - p) * scale * (s bᵀ + bias); b (N, R) with any strides; out may be base."""
    rows, width = out.shape
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.cols))
    lora_linear_update_kernel[grid](
        base, s, b, bias, seed, out, rows, width, s.shape[1],
        0 if base is None else base.stride(0), b.stride(0), b.stride(1), out.stride(0),
        scale * (1.0 if seed is None else keep_factor(p)), threshold(p),
        HAS_BASE=base is not None, HAS_BIAS=bias is not None, HAS_DROPOUT=seed is not None,
        BLOCK_T=tile.rows, BLOCK_N=tile.cols, BLOCK_R=tile.rank,
        num_warps=tile.warps, num_stages=tile.stages, **_product(s.dtype),
    )  # fmt: skip


def _outer(z2: Tensor, g: Tensor, seed, factor: float, p: float, out: Tensor, tile: Tile) -> None:
    """out (C, R) = factor * keep(z2)ᵀ g for z2 (T, C), g (T, R); out with any strides, contiguous or transposed."""
    rows, width = z2.shape
    rank = g.shape[1]
    target = out
    if tile.splits > 1:
        target = torch.empty((tile.splits, rank * width), dtype=torch.float32, device=z2.device)
    grid = (triton.cdiv(width, tile.cols), triton.cdiv(rank, tile.rank), tile.splits)
    lora_linear_outer_kernel[grid](
        z2, g, seed, target, rows, width, rank, triton.cdiv(rows, tile.splits), z2.stride(0),
        rank * width, out.stride(0), out.stride(1), factor, threshold(p),
        HAS_DROPOUT=seed is not None, BLOCK_T=tile.rows, BLOCK_C=tile.cols, BLOCK_R=tile.rank,
        num_warps=tile.warps, num_stages=tile.stages, **_product(g.dtype),
    )  # fmt: skip
    if tile.splits > 1:
        _sum(target, out)


def _up(dy2: Tensor, b: Tensor, s: Tensor, scale: float, tiles: Config) -> tuple[Tensor, Tensor]:
    """ds (T, R) = scale dy B and dB (N, R) = scale dyᵀ s from one read of dy."""
    tile = tiles.up
    (rows, width), rank = dy2.shape, s.shape[1]
    blocks = triton.cdiv(width, tile.cols)
    ds = torch.empty_like(s)
    db = torch.empty_like(b, memory_format=torch.contiguous_format)
    ds_parts = torch.empty((blocks, rows * rank), dtype=torch.float32, device=s.device) if blocks > 1 else ds
    db_parts = torch.empty((tile.splits, width * rank), dtype=torch.float32, device=s.device) if tile.splits > 1 else db
    lora_linear_up_kernel[(blocks, tile.splits)](
        dy2, b, s, ds_parts, db_parts, rows, width, rank, triton.cdiv(rows, tile.splits), dy2.stride(0),
        b.stride(0), b.stride(1), rows * rank, width * rank, scale,
        BLOCK_T=tile.rows, BLOCK_N=tile.cols, BLOCK_R=tile.rank,
        num_warps=tile.warps, num_stages=tile.stages, **_product(s.dtype),
    )  # fmt: skip
    if blocks > 1:
        _sum(ds_parts, ds)
    if tile.splits > 1:
        _sum(db_parts, db)
    return ds, db


def _sum(parts: Tensor, out: Tensor) -> None:
    """out = the sum of parts (S, n) over S in a fixed order; out holds n elements without gaps."""
    count, size = parts.shape
    lora_linear_sum_kernel[(triton.cdiv(size, 1024),)](parts, out, count, size, BLOCK=1024, num_warps=4)


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def lora_linear_down_kernel(
    x_ptr, a_ptr, seed_ptr, s_ptr, T, K, R, cols_per_split, stride_xt, stride_ar, stride_ak, stride_split,
    factor, drop_below,
    HAS_DROPOUT: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """s[split] = factor * keep(x) Aᵀ over the columns of the split"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_t = offs_t < T
    mask_r = offs_r < R
    split = tl.program_id(2)
    begin = split * cols_per_split
    end = tl.minimum(begin + cols_per_split, K)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for k in range(begin, end, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < end
        # (BLOCK_T, BLOCK_K)
        x = tl.load(x_ptr + offs_t[:, None] * stride_xt + offs_k[None, :], mask_t[:, None] & mask_k[None, :], 0.0)
        # (BLOCK_K, BLOCK_R)
        a = tl.load(
            a_ptr + offs_k[:, None].to(tl.int64) * stride_ak + offs_r[None, :].to(tl.int64) * stride_ar,
            mask_k[:, None] & mask_r[None, :], 0.0,
        )  # fmt: skip
        x = _tl.cast(x, PRODUCT)
        if HAS_DROPOUT:
            keep = _tl.dropout_keep(seed, offs_t, k, drop_below, BLOCK_T, BLOCK_K)
            x = _tl.times_mask(x, keep)
        acc = _tl.dot(x, _tl.cast(a, PRODUCT), acc, PRECISION)
    s = _tl.cast(acc * factor, s_ptr.dtype.element_ty)
    s_ptrs = s_ptr + split.to(tl.int64) * stride_split + offs_t[:, None] * R + offs_r[None, :]
    tl.store(s_ptrs, s, mask_t[:, None] & mask_r[None, :])


@triton.jit
def lora_linear_update_kernel(
    base_ptr, s_ptr, b_ptr, bias_ptr, seed_ptr, out_ptr, T, N, R, stride_base, stride_bn, stride_br, stride_out,
    factor, drop_below,
    HAS_BASE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = base + keep * factor * (s bᵀ + bias)"""
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
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask_n, 0.0).to(tl.float32)[None, :]
    acc *= factor
    if HAS_DROPOUT:
        acc *= _tl.dropout_keep(tl.load(seed_ptr), offs_t, first_n, drop_below, BLOCK_T, BLOCK_N).to(tl.float32)
    if HAS_BASE:
        acc += tl.load(base_ptr + offs_t[:, None] * stride_base + offs_n[None, :], mask_tn, 0.0).to(tl.float32)
    out = _tl.cast(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_t[:, None] * stride_out + offs_n[None, :], out, mask_tn)


@triton.jit
def lora_linear_outer_kernel(
    z_ptr, g_ptr, seed_ptr, out_ptr, T, C, R, rows_per_split, stride_zt, stride_split, stride_oc, stride_or,
    factor, drop_below,
    HAS_DROPOUT: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out[split] = factor * keep(z)ᵀ g over the rows of the split"""
    first_c = tl.program_id(0) * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2).to(tl.int64)
    mask_c = offs_c < C
    mask_r = offs_r < R
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, T)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    for t in range(begin, end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask_t = offs_t < end
        # (BLOCK_T, BLOCK_C)
        z = tl.load(z_ptr + offs_t[:, None] * stride_zt + offs_c[None, :], mask_t[:, None] & mask_c[None, :], 0.0)
        # (BLOCK_T, BLOCK_R)
        g = tl.load(g_ptr + offs_t[:, None] * R + offs_r[None, :], mask_t[:, None] & mask_r[None, :], 0.0)
        z = _tl.cast(z, PRODUCT)
        if HAS_DROPOUT:
            keep = _tl.dropout_keep(seed, offs_t, first_c, drop_below, BLOCK_T, BLOCK_C)
            z = _tl.times_mask(z, keep)
        acc = _tl.dot(tl.trans(z), g, acc, PRECISION)
    out = _tl.cast(acc * factor, out_ptr.dtype.element_ty)
    offs_o = offs_c[:, None].to(tl.int64) * stride_oc + offs_r[None, :].to(tl.int64) * stride_or
    tl.store(out_ptr + split * stride_split + offs_o, out, mask_c[:, None] & mask_r[None, :])


@triton.jit
def lora_linear_up_kernel(
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
def lora_linear_sum_kernel(parts_ptr, out_ptr, count, size, BLOCK: tl.constexpr):
    """out = sum over the first axis of parts, in order"""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    acc = tl.zeros((BLOCK,), tl.float32)
    ptrs = parts_ptr + offs
    for _ in range(0, count):
        acc += tl.load(ptrs, mask, 0.0)
        ptrs += size
    tl.store(out_ptr + offs, _tl.cast(acc, out_ptr.dtype.element_ty), mask)

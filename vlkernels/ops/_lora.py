"""Low-rank products in Triton, one pass over each activation, shared by the ops of the LoRA family.

Dims: T all rows, K width of x, N width of y, R rank. Up to three adapters over the same x (q, k, v, or gate and up)
share the passes over it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from . import _lora_kernels as kernels
from . import _lora_plan, _lora_two_source, _tl
from ._device import multiprocessors, tuned
from ._dropout import keep_factor, threshold

MAX_RANK = 512
MAX_GROUP = 3


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
    down: Tile  # s = drop(x) Aᵀ, of all adapters of the group
    update: Tile  # y += scale s Bᵀ
    update_dx: Tile  # dx += mask (ds A), of all adapters of the group
    down_dy: Tile  # ds = scale dy B
    outer_dy: Tile  # dB = scale dyᵀ s
    outer_x: Tile  # dA = dsᵀ drop(x), of all adapters of the group
    up: Tile | None  # ds and dB from one read of dy
    two_source: _lora_two_source.Tile  # y = scale s Bᵀ + x Wᵀ, under that plan
    two_source_dx: _lora_two_source.Tile  # dx = mask (ds A) + dy W
    packed: Tile  # s and [x, scale s], under that plan
    plan: str  # of _lora_plan.PLANS


def config(
    dims: Dims,
    dtype: torch.dtype,
    arch: int,
    loaded: torch.dtype | None = None,
    group: int = 1,
    plain: torch.dtype | None = None,
) -> Config:
    """Tiles by shape; `dtype` is that of s and of the products with it, `loaded` the widest of x, a, b in memory.

    group: adapters that share x; dims.R is then the largest of their ranks. plain: dtype of the product with W, default
    `dtype`. None of the steps below has been timed on a GPU yet; what benchmarks/tune.py recorded replaces them.
    """
    plain = plain or dtype
    wide = dtype == torch.float32  # products in three tf32 passes: operands and their splits take twice the registers
    # autocast: a tile is in registers twice, before and after rounding
    converted = not wide and loaded == torch.float32
    rank = max(16, triton.next_power_of_2(dims.R))  # tl.dot needs 16
    sms = multiprocessors(arch)
    # an accumulator an adapter: only sm_90, whose products read shared memory, holds those of a group in full tiles
    tight = group > 1 and arch != 90

    # the tiles of a product are of one adapter, or with `shared` of all that read the same x at once

    def down(width: int, shared: int = 1) -> Tile:
        full = not tight or shared == 1
        held = min(rank, (64 if full else 32) if wide else 128 if full or not (converted or arch == 100) else 64)
        # every program reads all of A: tall tiles first (64 rows reach wgmma), then ranges of K until each SM has one
        rows = min(32 if wide or (arch < 90 and shared > 2) else 64, cover(dims.T))
        programs = triton.cdiv(dims.T, rows) * triton.cdiv(rank, held)
        splits = max(1, min(sms // programs, width // 256))
        cols = min(32 if converted or (wide and (held > 32 or not full)) else 64, cover(width))
        warps = 8 if wide and not full else _warps(rows * held * shared, 64 * 64, arch, shared)
        return Tile(rows, cols, held, warps=warps, splits=splits)

    def update(width: int, shared: int = 1) -> Tile:
        cols = 64 if wide or shared > 1 else 128
        if wide and tight and shared > 1:
            cols = 32
        return Tile(64, min(cols, cover(width)), min(rank, 32 if wide else 64), warps=4, stages=2)

    def outer(width: int, shared: int = 1) -> Tile:
        cols = min(64 if wide or converted or shared > 1 else 128, cover(width))
        held = min(rank, 64 if wide or shared > 2 else 128)
        if tight and shared > 1:
            cols, held = min(32 if wide else 64, cols), min(held, 32)
        programs = triton.cdiv(width, cols) * triton.cdiv(rank, held)
        # a partial costs 8 R bytes a column to write and read back against 2 bytes a row saved by parallelism
        splits = max(1, min(triton.cdiv(sms, programs), dims.T // max(64, 4 * rank)))
        # three tf32 passes over 64x64 spill on sm_100 at four warps
        warps = 8 if arch == 100 and wide and held == 64 else _warps(cols * held * shared, 128 * 64, arch, shared)
        return Tile(32 if wide else 64, cols, held, warps=warps, splits=splits)

    up = None
    # one read of dy saves 2 T N bytes and costs 8 T R bytes of partial ds per column block: it pays below cols / 4
    if rank <= 32:
        cols = min(128 if wide else 256, cover(dims.N))
        blocks = triton.cdiv(dims.N, cols)
        splits = max(1, min(triton.cdiv(2 * sms, blocks), dims.T // max(64, 4 * rank)))
        up = Tile(16 if wide else 32, cols, rank, warps=8, stages=2, splits=splits)
    found = Config(
        down=down(dims.K, group),
        update=update(dims.N),
        update_dx=update(dims.K, group),
        down_dy=down(dims.N),
        outer_dy=outer(dims.N),
        outer_x=outer(dims.K, group),
        up=up,
        two_source=_lora_two_source.tile(dims.T, dims.N, dims.R, plain, dtype, arch, masked=False),
        two_source_dx=_lora_two_source.tile(dims.T, dims.K, dims.R, plain, dtype, arch, masked=True),
        # four warps spill on sm_100 beside the copy
        packed=replace(down(dims.K), warps=8) if arch == 100 else down(dims.K),
        plan=_lora_plan.DEFAULT,
    )
    return tuned("lora_linear", arch, found, config_key(dims, dtype, arch, loaded, group, plain))


def config_key(
    dims: Dims,
    dtype: torch.dtype,
    arch: int,
    loaded: torch.dtype | None = None,
    group: int = 1,
    plain: torch.dtype | None = None,
) -> dict:
    """What a tuned record of config(), called with these arguments, is found by on that architecture."""
    return {**vars(dims), "dtype": dtype, "loaded": loaded or dtype, "group": group, "plain": plain or dtype}


def _warps(accumulators: int, most: int, arch: int, shared: int) -> int:
    """Before wgmma operands take registers too: past `most` accumulators four warps spill there."""
    return 8 if (arch < 90 or shared > 1) and accumulators > most else 4


def loaded(*tensors: Tensor | None) -> torch.dtype:
    """The widest dtype in memory among x and the adapters."""
    dtypes = [t.dtype for t in tensors if t is not None]
    return torch.float32 if torch.float32 in dtypes else dtypes[0]


def cover(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


# -- launches ------------------------------------------------------------------------------------------------------


def rows(t: Tensor) -> Tensor:
    """(T, width) with contiguous columns; a copy only where strides allow no such view."""
    t = t.reshape(-1, t.shape[-1])
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def _filled(items: list, missing) -> list:
    """The items of up to three adapters, padded for a kernel that names three."""
    return [*items, *[missing] * (MAX_GROUP - len(items))]


def down(
    x2: Tensor, adapters: list[Tensor], seed: Tensor | None, p: float, outs: list[Tensor], tile: Tile, factor: float
) -> None:
    """outs[i] (T, R_i) = factor * keep_i(x2) A_iᵀ; A_i (R_i, K) with any strides; seed holds one number an adapter."""
    count, width = x2.shape
    ranks = [a.shape[0] for a in adapters]
    targets = outs
    if tile.splits > 1:
        targets = [torch.empty((tile.splits, s.numel()), dtype=torch.float32, device=s.device) for s in outs]
    cols_per_split = tile.cols * triton.cdiv(width, tile.cols * tile.splits)
    grid = (triton.cdiv(count, tile.rows), triton.cdiv(max(ranks), tile.rank), tile.splits)
    kernels.lora_down_kernel[grid](
        x2, seed, *_filled(adapters, None), *_filled(targets, None), count, width, *_filled(ranks, 0), cols_per_split,
        x2.stride(0), *_filled([a.stride(0) for a in adapters], 0), *_filled([a.stride(1) for a in adapters], 0),
        factor, threshold(p),
        GROUP=len(adapters), HAS_DROPOUT=seed is not None,
        BLOCK_T=tile.rows, BLOCK_K=tile.cols, BLOCK_R=tile.rank,
        num_warps=tile.warps, num_stages=tile.stages, **_tl.product(outs[0].dtype),
    )  # fmt: skip
    if tile.splits > 1:
        for parts, s in zip(targets, outs, strict=True):
            sum_parts(parts, s)


def update(
    base: Tensor | None,
    pairs: list[tuple[Tensor, Tensor]],
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
    out: Tensor,
    tile: Tile,
) -> None:
    """out (T, N) = base + Σ_i keep_i / (1 - p) * scale * (s_i b_iᵀ + bias).

    pairs: (s_i (T, R_i), b_i (N, R_i) with any strides); bias only without dropout; out may be base.
    """
    count, width = out.shape
    grid = (triton.cdiv(count, tile.rows), triton.cdiv(width, tile.cols))
    weights = [b for _, b in pairs]
    kernels.lora_update_kernel[grid](
        base, bias, seed, out, *_filled([s for s, _ in pairs], None), *_filled(weights, None), count, width,
        *_filled([s.shape[1] for s, _ in pairs], 0), 0 if base is None else base.stride(0), out.stride(0),
        *_filled([b.stride(0) for b in weights], 0), *_filled([b.stride(1) for b in weights], 0),
        scale * (1.0 if seed is None else keep_factor(p)), threshold(p),
        GROUP=len(pairs), HAS_BASE=base is not None, HAS_BIAS=bias is not None, HAS_DROPOUT=seed is not None,
        BLOCK_T=tile.rows, BLOCK_N=tile.cols, BLOCK_R=tile.rank,
        num_warps=tile.warps, num_stages=tile.stages, **_tl.product(pairs[0][0].dtype),
    )  # fmt: skip


def outer(
    z2: Tensor, gs: list[Tensor], seed: Tensor | None, p: float, outs: list[Tensor], tile: Tile, factor: float
) -> None:
    """outs[i] (C, R_i) = factor * keep_i(z2)ᵀ g_i for z2 (T, C), g_i (T, R_i); outs contiguous or transposed."""
    count, width = z2.shape
    ranks = [g.shape[1] for g in gs]
    targets = outs
    if tile.splits > 1:
        targets = [torch.empty((tile.splits, rank * width), dtype=torch.float32, device=z2.device) for rank in ranks]
    grid = (triton.cdiv(width, tile.cols), triton.cdiv(max(ranks), tile.rank), tile.splits)
    kernels.lora_outer_kernel[grid](
        z2, seed, *_filled(gs, None), *_filled(targets, None), count, width, *_filled(ranks, 0),
        triton.cdiv(count, tile.splits), z2.stride(0),
        *_filled([o.stride(0) for o in outs], 0), *_filled([o.stride(1) for o in outs], 0), factor, threshold(p),
        GROUP=len(gs), HAS_DROPOUT=seed is not None,
        BLOCK_T=tile.rows, BLOCK_C=tile.cols, BLOCK_R=tile.rank,
        num_warps=tile.warps, num_stages=tile.stages, **_tl.product(gs[0].dtype),
    )  # fmt: skip
    if tile.splits > 1:
        for parts, out in zip(targets, outs, strict=True):
            sum_parts(parts, out)


def up(dy2: Tensor, b: Tensor, s: Tensor, scale: float, tile: Tile) -> tuple[Tensor, Tensor]:
    """ds (T, R) = scale dy B and dB (N, R) = scale dyᵀ s from one read of dy."""
    (count, width), rank = dy2.shape, s.shape[1]
    blocks = triton.cdiv(width, tile.cols)
    ds = torch.empty_like(s)
    db = torch.empty_like(b, memory_format=torch.contiguous_format)
    ds_parts = torch.empty((blocks, count * rank), dtype=torch.float32, device=s.device) if blocks > 1 else ds
    db_parts = torch.empty((tile.splits, width * rank), dtype=torch.float32, device=s.device) if tile.splits > 1 else db
    kernels.lora_up_kernel[(blocks, tile.splits)](
        dy2, b, s, ds_parts, db_parts, count, width, rank, triton.cdiv(count, tile.splits), dy2.stride(0),
        b.stride(0), b.stride(1), count * rank, width * rank, scale,
        BLOCK_T=tile.rows, BLOCK_N=tile.cols, BLOCK_R=tile.rank,
        num_warps=tile.warps, num_stages=tile.stages, **_tl.product(s.dtype),
    )  # fmt: skip
    if blocks > 1:
        sum_parts(ds_parts, ds)
    if tile.splits > 1:
        sum_parts(db_parts, db)
    return ds, db


def backward_of_up(
    dy2: Tensor, b: Tensor, s: Tensor, scale: float, tiles: Config, need_ds: bool, need_b: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(ds, dB) of y = ... + scale s Bᵀ, each where it is needed."""
    if need_ds and need_b and tiles.up is not None:
        return up(dy2, b, s, scale, tiles.up)
    ds = db = None
    if need_ds:
        ds = torch.empty_like(s)
        down(dy2, [b.t()], None, 0.0, [ds], tiles.down_dy, scale)
    if need_b:
        db = torch.empty_like(b, memory_format=torch.contiguous_format)
        outer(dy2, [s], None, 0.0, [db], tiles.outer_dy, scale)
    return ds, db


def sum_parts(parts: Tensor, out: Tensor) -> None:
    """out = the sum of parts (S, n) over S in a fixed order; out holds n elements without gaps."""
    count, size = parts.shape
    kernels.lora_sum_kernel[(triton.cdiv(size, 1024),)](parts, out, count, size, BLOCK=1024, num_warps=4)

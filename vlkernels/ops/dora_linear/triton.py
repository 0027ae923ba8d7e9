"""dora_linear in Triton: cuBLAS runs the products with W; gain, low-rank branch and bias are one pass over its output.

Backward takes from one pass over dy and u what the columns need: the scaled gradient, dm's and dbias's sums.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .. import _lora, _refuse, _tl
from .._device import arch, multiprocessors
from .._dropout import keep_factor, threshold
from .._lora import Dims, Tile, cover, loaded
from . import kernels
from .reference import low_rank_dtype


def refuses(x, weight, a, b, magnitude, norm, bias, seed, scale, p, level, dtype) -> str | None:
    reason = _refuse.common(x, dtype, weight=weight, a=a, b=b, magnitude=magnitude, norm=norm)
    if reason is not None:
        return reason
    if dtype is None and a.dtype not in (x.dtype, torch.float32):
        return f"adapters in {a.dtype} over {x.dtype}; kernels take adapters in x's dtype or float32"
    if a.shape[0] > _lora.MAX_RANK:
        return f"rank {a.shape[0]}; kernels take ranks from 1 to {_lora.MAX_RANK}"
    if a.shape[1] == 0 or b.shape[0] == 0:
        return f"zero channels: a {tuple(a.shape)}, b {tuple(b.shape)}"
    return None


def declines(x, weight, a, b, magnitude, norm, bias, seed, scale, p, level, dtype) -> str | None:
    # with dropout never: a checkpoint's first pass has no gradients, and its recomputation must draw the same mask;
    # without a norm never: plain PyTorch builds B A for it
    plain = not torch.is_grad_enabled() and threshold(p) == 0 and norm is not None
    if plain and x.numel() // x.shape[-1] <= 64:
        return "at most 64 rows without gradients and the norm given (decoding): launch-bound, and nothing is saved"
    return None


@dataclass(frozen=True)
class Config:
    down: Tile  # s = drop(x) Aᵀ
    update: Tile  # y from u and s
    update_dx: Tile  # dx from ds
    down_dy: Tile  # ds = scale dy (g B)
    outer_dy: Tile  # q = scale dyᵀ s
    outer_x: Tile  # dA = dsᵀ drop(x)
    up: Tile | None  # ds and q from one read of dy
    norm: Tile  # rows of W, columns of W, rank
    columns: Tile  # rows and columns of dy; splits: ranges of rows


def config(dims: Dims, dtype: torch.dtype, arch: int, loaded: torch.dtype | None = None) -> Config:
    """Tiles by shape; dtype and loaded as in `_lora.config`. None of the steps below has been timed on a GPU yet."""
    low = _lora.config(dims, dtype, arch, loaded)
    # backward loads g b in float32
    wide_b = _lora.config(dims, dtype, arch, torch.float32)
    wide = dtype == torch.float32
    held = min(max(16, triton.next_power_of_2(dims.R)), 32 if wide else 64)
    norm = Tile(64, min(64 if wide else 128, cover(dims.K)), held, warps=4, stages=2)
    up = low.up
    if up is not None and wide and dims.R > 16:
        # three tf32 passes over a wider tile spill 114 times before wgmma
        up = dataclasses.replace(up, cols=min(64, up.cols))
    cols = min(128, cover(dims.N))
    # four programs an SM hide the latency of two streams; a range has at least four tiles of rows
    splits = max(1, min(triton.cdiv(4 * multiprocessors(arch), triton.cdiv(dims.N, cols)), dims.T // 128))
    columns = Tile(32, cols, 0, warps=8, splits=splits)

    def outer(tile: Tile) -> Tile:
        # on sm_100 a whole result, without partial sums, spills twice over four warps
        large = tile.splits == 1 and tile.cols * tile.rank > 64 * 128
        return dataclasses.replace(tile, warps=8) if arch >= 100 and large else tile

    return Config(
        down=low.down,
        update=low.update,
        update_dx=low.update_dx,
        down_dy=wide_b.down_dy,
        outer_dy=outer(low.outer_dy),
        outer_x=outer(low.outer_x),
        up=up,
        norm=norm,
        columns=columns,
    )


def forward(
    x, weight, a, b, magnitude, norm, bias, seed, scale, p, level, dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (..., N); the norm where it was not given; s (T, R); u (T, N), empty at level 1."""
    out_dtype, low = dtype or x.dtype, low_rank_dtype(a, dtype)
    x2, (out, rank) = _lora.rows(x), b.shape
    count, width = x2.shape
    tiles = config(Dims(max(count, 1), width, out, rank), low, arch(x), loaded(x, a))
    computed = row_norm(weight, a, b, scale, low, tiles.norm) if norm is None else x.new_empty(0, dtype=torch.float32)
    c = computed if norm is None else norm
    s = x.new_empty((count, rank), dtype=low)
    if count == 0:
        return x.new_empty((*x.shape[:-1], out), dtype=out_dtype), computed, s, x.new_empty((0, out), dtype=out_dtype)
    w = weight.to(out_dtype)
    if seed is None:
        _lora.down(x2, [a], None, 0.0, [s], tiles.down, 1.0)
        plain, u = None, x2.to(out_dtype) @ w.t()
    else:
        kept = _down(x2, a, seed, p, s, out_dtype, tiles.down)
        plain, u = x2.to(out_dtype) @ w.t(), kept @ w.t()
        del kept
    # both products are fresh buffers: y may take the place of the one that is not kept
    y = plain if plain is not None else torch.empty_like(u) if level == 0 else u
    _update(plain, u, s, b, scale, p, y, tiles.update, gain=(magnitude, c), bias=bias)
    u = u if level == 0 else u.new_empty((0, out))
    return y.view(*x.shape[:-1], out), computed, s, u


def backward(dy, saved, needs, scale, p, level, dtype) -> dict[str, Tensor]:
    """Gradients by argument name: dx, dW, da, db, dmagnitude, dbias for those that are needed."""
    x, weight, a, b, magnitude, seed, s, u = (
        saved[name] for name in ("x", "weight", "a", "b", "magnitude", "seed", "s", "u")
    )
    c = saved["computed_norm"] if saved["norm"] is None else saved["norm"]
    out_dtype = dtype or x.dtype
    dy2, x2 = _lora.rows(dy.to(out_dtype)), _lora.rows(x)
    if dy2.shape[0] == 0:
        names = ("x", "weight", "a", "b", "magnitude", "bias")
        return {n: torch.zeros_like(saved[n], memory_format=torch.contiguous_format) for n in names if needs[n]}
    dims = Dims(x2.shape[0], x2.shape[1], b.shape[0], a.shape[0])
    tiles = config(dims, s.dtype, arch(x), loaded(x, a))

    # z = keep * x, without dropout x itself
    z = None
    if needs["weight"] or (needs["magnitude"] and level == 1):
        z = x2.to(out_dtype) if seed is None else _drop(x2, seed, p, out_dtype)
    w = weight.to(out_dtype)
    if needs["magnitude"] and level == 1:
        u = z @ w.t()
    need_scaled = needs["x"] or needs["weight"]
    # scaled = g dy, or (g - 1) dy with dropout
    scaled, dots, sums = _columns(
        dy2, u, magnitude, c, 0.0 if seed is None else 1.0, need_scaled, needs["magnitude"], needs["bias"],
        tiles.columns,
    )  # fmt: skip

    # ds = scale (g dy) B and q = scale dyᵀ s: both take dy as it is, and g goes to B and to the end
    need_ds, need_q = needs["x"] or needs["a"], needs["b"] or needs["magnitude"]
    gained = _gained(b, magnitude, c) if need_ds else torch.empty_like(b, dtype=torch.float32)
    ds, q = _lora.backward_of_up(dy2, gained, s, scale, tiles, need_ds, need_q)
    grads = _finish(q, b, magnitude, c, dots, sums, keep_factor(p), saved["bias"], needs)

    if needs["a"]:
        grads["a"] = torch.empty_like(a, memory_format=torch.contiguous_format)
        _lora.outer(x2, [ds], seed, p, [grads["a"].t()], tiles.outer_x, keep_factor(p))
    if needs["weight"]:
        if seed is None:
            dw = scaled.t() @ z
        else:
            # dW = dyᵀ x + ((g - 1) dy)ᵀ keep * x / (1 - p)
            dw = torch.addmm(dy2.t() @ x2.to(out_dtype), scaled.t(), z, alpha=keep_factor(p))
        grads["weight"] = dw.to(weight.dtype)
    if needs["x"]:
        main = scaled @ w
        plain = None if seed is None else dy2 @ w
        target = main if plain is None else plain
        dx = target.view(x.shape) if target.dtype == x.dtype else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if seed is None:
            _lora.update(main, [(ds, a.t())], None, None, 1.0, 0.0, _lora.rows(dx), tiles.update_dx)
        else:
            _update(plain, main, ds, a.t(), 1.0, p, _lora.rows(dx), tiles.update_dx, seed=seed)
        grads["x"] = dx
    return grads


# -- launches ------------------------------------------------------------------------------------------------------


def norm_of(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """row_norm in the adapters' own dtype, with the tile that config() picks."""
    dims = Dims(1, weight.shape[1], weight.shape[0], a.shape[0])
    return row_norm(weight, a, b, scale, a.dtype, config(dims, a.dtype, arch(weight), loaded(weight, a)).norm)


def row_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float, low: torch.dtype, tile: Tile) -> Tensor:
    """c (N,) float32 = ‖W + scale B A‖ of each row, from one read of W; `low` is the dtype of the product B A.

    Each tile of B A is squared where it was made, so it is never in memory, and a W that B A cancels loses no digits.
    """
    (out, width), rank = weight.shape, a.shape[0]
    blocks = triton.cdiv(width, tile.cols)
    parts = torch.empty((blocks, out), dtype=torch.float32, device=weight.device)
    kernels.dora_norm_kernel[(triton.cdiv(out, tile.rows), blocks)](
        weight, a, b, parts, out, width, rank, *weight.stride(), *a.stride(), *b.stride(), scale,
        BLOCK_N=tile.rows, BLOCK_K=tile.cols, BLOCK_R=tile.rank,
        num_warps=tile.warps, num_stages=tile.stages, **_tl.product(low),
    )  # fmt: skip
    c = torch.empty((out,), dtype=torch.float32, device=weight.device)
    kernels.dora_root_kernel[(triton.cdiv(out, 128),)](parts, c, blocks, out, BLOCK_N=128, num_warps=4)
    return c


def _down(x2: Tensor, a: Tensor, seed: Tensor, p: float, s: Tensor, dtype: torch.dtype, tile: Tile) -> Tensor:
    """s (T, R) = drop(x) Aᵀ into `s`; returns keep * x (T, K) in `dtype`, which has it exactly."""
    (count, width), rank = x2.shape, a.shape[0]
    kept = torch.empty((count, width), dtype=dtype, device=x2.device)
    parts = s
    if tile.splits > 1:
        parts = torch.empty((tile.splits, s.numel()), dtype=torch.float32, device=s.device)
    cols_per_split = tile.cols * triton.cdiv(width, tile.cols * tile.splits)
    grid = (triton.cdiv(count, tile.rows), triton.cdiv(rank, tile.rank), tile.splits)
    kernels.dora_down_kernel[grid](
        x2, a, seed, parts, kept, count, width, rank, cols_per_split, x2.stride(0), *a.stride(), keep_factor(p),
        threshold(p),
        BLOCK_T=tile.rows, BLOCK_K=tile.cols, BLOCK_R=tile.rank,
        num_warps=tile.warps, num_stages=tile.stages, **_tl.product(s.dtype),
    )  # fmt: skip
    if tile.splits > 1:
        _lora.sum_parts(parts, s)
    return kept


def _drop(x2: Tensor, seed: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """keep * x (T, K) in `dtype`"""
    count, width = x2.shape
    kept = torch.empty((count, width), dtype=dtype, device=x2.device)
    cols = min(128, cover(width))
    grid = (triton.cdiv(count, 32), triton.cdiv(width, cols))
    kernels.dora_drop_kernel[grid](
        x2, seed, kept, count, width, x2.stride(0), threshold(p), BLOCK_T=32, BLOCK_K=cols, num_warps=4
    )
    return kept


def _update(
    plain: Tensor | None,
    u: Tensor,
    s: Tensor,
    b: Tensor,
    scale: float,
    p: float,
    out: Tensor,
    tile: Tile,
    gain: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
) -> None:
    """out (T, N) = g (u + scale s bᵀ) + bias for gain (m, c), with `plain` (g - 1) u / (1 - p) + g scale s bᵀ added to
    it; without a gain plain + keep / (1 - p) (u + scale s bᵀ). out may be plain or u."""
    (count, width), rank = out.shape, s.shape[1]
    grid = (triton.cdiv(count, tile.rows), triton.cdiv(width, tile.cols))
    m, c = gain or (None, None)
    kernels.dora_update_kernel[grid](
        plain, u, s, b, m, c, bias, seed, out, count, width, rank,
        0 if plain is None else plain.stride(0), u.stride(0), out.stride(0), *b.stride(),
        scale, keep_factor(p), threshold(p),
        HAS_PLAIN=plain is not None, HAS_GAIN=gain is not None, HAS_BIAS=bias is not None,
        BLOCK_T=tile.rows, BLOCK_N=tile.cols, BLOCK_R=tile.rank,
        num_warps=tile.warps, num_stages=tile.stages, **_tl.product(s.dtype),
    )  # fmt: skip


def _columns(
    dy2: Tensor, u: Tensor, m: Tensor, c: Tensor, shift: float, scaled: bool, dots: bool, sums: bool, tile: Tile
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(g - shift) dy (T, N), and over ranges of rows Σ dy u and Σ dy (splits, N), each where it is asked for."""
    count, width = dy2.shape
    if not (scaled or dots or sums):
        return None, None, None
    out = torch.empty((count, width), dtype=dy2.dtype, device=dy2.device) if scaled else None
    parts = [
        torch.empty((tile.splits, width), dtype=torch.float32, device=dy2.device) if wanted else None
        for wanted in (dots, sums)
    ]
    kernels.dora_columns_kernel[(triton.cdiv(width, tile.cols), tile.splits)](
        dy2, u if dots else None, m, c, out, *parts, count, width, triton.cdiv(count, tile.splits),
        dy2.stride(0), u.stride(0), shift,
        HAS_OUT=scaled, HAS_DOTS=dots, HAS_SUMS=sums, BLOCK_T=tile.rows, BLOCK_N=tile.cols,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, *parts


def _gained(b: Tensor, m: Tensor, c: Tensor) -> Tensor:
    """g B (N, R) in float32"""
    out, rank = b.shape
    gained = torch.empty((out, rank), dtype=torch.float32, device=b.device)
    cols = min(64, cover(rank))
    kernels.dora_gain_kernel[(triton.cdiv(out, 32), triton.cdiv(rank, cols))](
        b, m, c, gained, out, rank, *b.stride(), BLOCK_N=32, BLOCK_R=cols, num_warps=4
    )
    return gained


def _finish(
    q: Tensor | None,
    b: Tensor,
    m: Tensor,
    c: Tensor,
    dots: Tensor | None,
    sums: Tensor | None,
    kept_factor: float,
    bias: Tensor | None,
    needs: dict[str, bool],
) -> dict[str, Tensor]:
    """db, dmagnitude, dbias, those that are needed, from q = scale dyᵀ s and the partial column sums."""
    wanted = {"b": b, "magnitude": m, "bias": bias}
    grads = {
        name: torch.empty_like(t, memory_format=torch.contiguous_format) for name, t in wanted.items() if needs[name]
    }
    if not grads:
        return grads
    out, rank = b.shape
    splits = next((parts.shape[0] for parts in (dots, sums) if parts is not None), 0)
    kernels.dora_finish_kernel[(triton.cdiv(out, 32),)](
        q, b, m, c, dots, sums, grads.get("b"), grads.get("magnitude"), grads.get("bias"), out, rank, splits,
        *b.stride(), kept_factor,
        HAS_DB=needs["b"], HAS_DM=needs["magnitude"], HAS_DBIAS=needs["bias"],
        BLOCK_N=32, BLOCK_R=min(64, cover(rank)), num_warps=4,
    )  # fmt: skip
    return grads

"""Pixel shuffle and norm in one Triton pass each way, shared by the ops of the dense projectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tl
from ._device import arch, multiprocessors
from ._shuffle import shuffled, unshuffled

MAX_CHANNELS = 8192  # a row is held in one program's registers
TOGETHER = 4096  # up to here one backward launch makes dx and the sums


@dataclass(frozen=True)
class Config:
    """block: channels held by a program; programs: of the backward kernel, each with its own partial sums."""

    block: int
    warps: int
    programs: int


def config(rows: int, channels: int, device_arch: int) -> Config:
    """None of the steps below has been timed on a GPU yet."""
    sms = multiprocessors(device_arch)
    block = triton.next_power_of_2(channels)
    return Config(block, max(4, min(16, block // 256)), max(1, min(2 * sms, triton.cdiv(rows, 4))))


def refuses(x: Tensor, norm: str, shuffle: int) -> str | None:
    """Why the norm of the shuffled x has no kernel, or None."""
    channels = x.shape[-1] * shuffle * shuffle
    if norm != "none" and channels > MAX_CHANNELS:
        return f"{channels} channels to normalise; kernels take up to {MAX_CHANNELS}"
    if norm != "none" and shuffle > 1 and x.stride(1) * shuffle >= 2**31:
        return f"rows of x lie {x.stride(1)} elements apart; kernels take neighbourhoods within 2^31 elements"
    return None


def _grid_strides(x: Tensor, shuffle: int) -> tuple[Tensor, int, int, int, int, int]:
    """x with contiguous channels, and (h, w, stride of image, row, column); without a shuffle one row of tokens."""
    if shuffle == 1:
        x = x.reshape(-1, x.shape[-1])
        x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        return x, 1, max(1, x.shape[0]), 0, 0, x.stride(0)
    x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
    return x, x.shape[1] // shuffle, x.shape[2] // shuffle, x.stride(0), x.stride(1), x.stride(2)


def normed(
    x, weight, bias, norm: str, eps: float, shuffle: int, dtype: torch.dtype, act: str = "none", offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """act(norm(shuffle(x))) (rows, C s²) in `dtype`, and its statistics; x itself where nothing is to be done."""
    channels = x.shape[-1] * shuffle * shuffle
    rows = x.numel() // channels
    stats = torch.empty((rows, 2) if norm != "none" else (0,), dtype=torch.float32, device=x.device)
    if norm == "none":
        # the shuffle alone is one copy, which ATen makes as well
        return shuffled(x, shuffle).reshape(rows, channels).to(dtype), stats
    out = torch.empty((rows, channels), dtype=dtype, device=x.device)
    if rows == 0:
        return out, stats
    x, h, w, stride_b, stride_h, stride_w = _grid_strides(x, shuffle)
    tiles = config(rows, channels, arch(x))
    shuffle_norm_fwd_kernel[(rows,)](
        x, weight, bias, out, stats, h, w, x.shape[-1], channels, stride_b, stride_h, stride_w, eps, offset,
        NORM=norm, ACT=act, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, SHUFFLE=shuffle,
        BLOCK=tiles.block, num_warps=tiles.warps,
    )  # fmt: skip
    return out, stats


def norm_backward(
    dxn, x, weight, bias, stats, norm: str, shuffle: int, needs: dict, act: str = "none", offset: float = 0.0,
    skip: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Gradients of `normed` for x, norm_weight and norm_bias, where needs[name].

    skip: (rows, C), added to dx: what comes past the norm, of an op that adds x itself. Without a shuffle.
    """
    channels = x.shape[-1] * shuffle * shuffle
    rows = x.numel() // channels
    grads: dict[str, Tensor] = {}
    if norm == "none":
        dx = dxn if skip is None else dxn + skip
        return {"x": unshuffled(dx.to(x.dtype), x.shape, shuffle)}
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs["x"] else None
    if rows == 0:
        zero = {n: torch.zeros_like(t) for n, t in (("norm_weight", weight), ("norm_bias", bias)) if needs[n]}
        return zero | ({"x": dx} if needs["x"] else {})
    tiles = config(rows, channels, arch(x))
    sums = needs["norm_weight"] or needs["norm_bias"]
    parts = torch.empty((2, tiles.programs, channels), dtype=torch.float32, device=x.device) if sums else None
    xg, h, w, stride_b, stride_h, stride_w = _grid_strides(x, shuffle)
    if skip is not None and skip.stride(1) != 1:
        skip = skip.contiguous()
    _, _, _, out_b, out_h, out_w = _grid_strides(dx, shuffle) if needs["x"] else (None, 0, 0, 0, 0, 0)
    # wide rows do dx and the sums in two launches: together they spill past 4096 channels
    together = channels <= TOGETHER
    for with_dx, with_sums in ((needs["x"], sums),) if together else ((needs["x"], False), (False, sums)):
        if with_dx or with_sums:
            shuffle_norm_bwd_kernel[(tiles.programs,)](
                dxn, xg, weight, bias, stats, skip, dx, parts, rows, triton.cdiv(rows, tiles.programs), h, w,
                xg.shape[-1], channels, stride_b, stride_h, stride_w, out_b, out_h, out_w,
                0 if skip is None else skip.stride(0), offset,
                NORM=norm, ACT=act, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
                HAS_SKIP=with_dx and skip is not None, HAS_DX=with_dx, HAS_SUMS=with_sums, SHUFFLE=shuffle,
                BLOCK=tiles.block, num_warps=tiles.warps,
            )  # fmt: skip
    if needs["x"]:
        grads["x"] = dx
    if sums:
        if needs["norm_weight"]:
            grads["norm_weight"] = parts[0].sum(0).to(weight.dtype)
        if needs["norm_bias"]:
            grads["norm_bias"] = parts[1].sum(0).to(bias.dtype)
    return grads


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def shuffle_norm_offsets(row, offs_c, h, w, C, stride_b, stride_h, stride_w, SHUFFLE: tl.constexpr):
    """Where the channels of one row after the shuffle lie in x: row = (image, i, j), channel = (dy, dx, c)."""
    image = row // (h * w)
    i = (row // w) % h
    j = row % w
    dy = offs_c // (SHUFFLE * C)
    dx = (offs_c // C) % SHUFFLE
    c = offs_c % C
    first = image * stride_b + i * SHUFFLE * stride_h + j * SHUFFLE * stride_w
    return first + (dy * stride_h + dx * stride_w + c)


@triton.jit
def norm_row(x, mask_c, channels, eps, NORM: tl.constexpr):
    """The norm of one row without scale and shift, its mean (0 for RMSNorm) and 1 / deviation."""
    mean = 0.0
    if NORM == "layer":
        mean = tl.sum(x, 0) / channels
    centred = tl.where(mask_c, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / channels + eps)
    return centred * rstd, mean, rstd


@triton.jit
def norm_row_backward(g, xhat, rstd, channels, NORM: tl.constexpr):
    """rstd (g - mean(g) - xhat mean(g xhat)), the gradient of a row from that of xhat; RMSNorm without mean(g)"""
    along = tl.sum(g * xhat, 0) / channels
    level = 0.0
    if NORM == "layer":
        level = tl.sum(g, 0) / channels
    return rstd * (g - level - xhat * along)


@triton.jit
def shuffle_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, stats_ptr, h, w, C, channels, stride_b, stride_h, stride_w, eps, offset,
    NORM: tl.constexpr, ACT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SHUFFLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = act(norm of one row); stats[row] = (mean, 1 / deviation)"""
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK)
    mask_c = offs_c < channels
    offs = shuffle_norm_offsets(row, offs_c, h, w, C, stride_b, stride_h, stride_w, SHUFFLE)
    x = tl.load(x_ptr + offs, mask_c, 0.0).to(tl.float32)
    x, mean, rstd = norm_row(x, mask_c, channels, eps, NORM)
    tl.store(stats_ptr + 2 * row, mean)
    tl.store(stats_ptr + 2 * row + 1, rstd)
    if HAS_WEIGHT:
        x *= tl.load(weight_ptr + offs_c, mask_c, 0.0).to(tl.float32) + offset
    if HAS_BIAS:
        x += tl.load(bias_ptr + offs_c, mask_c, 0.0).to(tl.float32)
    if ACT != "none":
        x = _tl.act(x, ACT)
    tl.store(out_ptr + row * channels + offs_c, _tl.cast(x, out_ptr.dtype.element_ty), mask_c)


@triton.jit
def shuffle_norm_bwd_kernel(
    dxn_ptr, x_ptr, weight_ptr, bias_ptr, stats_ptr, skip_ptr, dx_ptr, parts_ptr, rows, rows_per_program, h, w, C,
    channels, stride_b, stride_h, stride_w, out_b, out_h, out_w, stride_skip, offset,
    NORM: tl.constexpr, ACT: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_DX: tl.constexpr, HAS_SUMS: tl.constexpr, SHUFFLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = the norm's gradient from g = dz weight, plus skip. Sums of dz xhat, dz."""
    program = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK)
    mask_c = offs_c < channels
    sum_weight = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for row in range(begin, end):
        offs = shuffle_norm_offsets(row, offs_c, h, w, C, stride_b, stride_h, stride_w, SHUFFLE)
        mean = tl.load(stats_ptr + 2 * row)
        rstd = tl.load(stats_ptr + 2 * row + 1)
        xhat = tl.where(mask_c, (tl.load(x_ptr + offs, mask_c, 0.0).to(tl.float32) - mean) * rstd, 0.0)
        g = tl.load(dxn_ptr + row * channels + offs_c, mask_c, 0.0).to(tl.float32)
        if ACT != "none":
            z = xhat
            if HAS_WEIGHT:
                z *= tl.load(weight_ptr + offs_c, mask_c, 0.0).to(tl.float32) + offset
            if HAS_BIAS:
                z += tl.load(bias_ptr + offs_c, mask_c, 0.0).to(tl.float32)
            g *= _tl.act_derivative(z, ACT)
        if HAS_SUMS:
            sum_weight += g * xhat
            sum_bias += g
        if HAS_DX:
            if HAS_WEIGHT:
                # read again for each row: held, it would cost the registers that the sums need
                g *= tl.load(weight_ptr + offs_c, mask_c, 0.0).to(tl.float32) + offset
            g = norm_row_backward(g, xhat, rstd, channels, NORM)
            if HAS_SKIP:
                g += tl.load(skip_ptr + row * stride_skip + offs_c, mask_c, 0.0).to(tl.float32)
            offs = shuffle_norm_offsets(row, offs_c, h, w, C, out_b, out_h, out_w, SHUFFLE)
            tl.store(dx_ptr + offs, _tl.cast(g, dx_ptr.dtype.element_ty), mask_c)
    if HAS_SUMS:
        tl.store(parts_ptr + program * channels + offs_c, sum_weight, mask_c)
        tl.store(parts_ptr + (tl.num_programs(0) + program) * channels + offs_c, sum_bias, mask_c)

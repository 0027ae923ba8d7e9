"""mlp_projector in Triton: cuBLAS runs the products; norm with shuffle, and the activation, are a pass each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import _tl
from .._device import arch
from .reference import shuffled, unshuffled

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CHANNELS = 8192  # a row of the norm is held in one program's registers
TOGETHER = 4096


def refuses(
    x, w1, w2, b1, b2, norm_weight, norm_bias, act, gated, norm, eps, shuffle, merge, level, dtype
) -> str | None:
    if x.is_meta or not (x.is_cuda or _tl.INTERPRETED.value):
        return f"x is on {x.device.type}; Triton kernels run on CUDA devices (or with TRITON_INTERPRET=1 anywhere)"
    if x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "the device is older than compute capability 8.0"
    for name, t in (("x", x), ("w1", w1), ("w2", w2)):
        if t.dtype not in KERNEL_DTYPES:
            return f"{name} is {t.dtype}; kernels take float32, bfloat16, float16"
    if dtype is not None and dtype not in KERNEL_DTYPES:
        return f"dtype is {dtype}; kernels take float32, bfloat16, float16"
    if norm != "none" and x.shape[-1] * shuffle * shuffle > MAX_CHANNELS:
        return f"{x.shape[-1] * shuffle * shuffle} channels to normalise; kernels take up to {MAX_CHANNELS}"
    if norm != "none" and shuffle > 1 and x.stride(1) * shuffle >= 2**31:
        return f"rows of x lie {x.stride(1)} elements apart; kernels take neighbourhoods within 2^31 elements"
    if w1.shape[0] == 0 or w2.shape[0] == 0 or w1.shape[1] == 0:
        return f"zero channels: w1 {tuple(w1.shape)}, w2 {tuple(w2.shape)}"
    return None


def declines(*values) -> str | None:
    return None


def forward(
    x, w1, w2, b1, b2, norm_weight, norm_bias, act, gated, norm, eps, shuffle, merge, level, dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y (..., N), pre (T, F or 2F) at level 0, stats (rows, 2) with a norm."""
    out_dtype = dtype or x.dtype
    xn, stats = _normed(x, norm_weight, norm_bias, norm, eps, shuffle, out_dtype)
    pre = F.linear(xn.reshape(-1, w1.shape[1]), w1.to(out_dtype), _to(b1, out_dtype))
    h = _act(pre, act, gated)
    y = F.linear(h, w2.to(out_dtype), _to(b2, out_dtype))
    shape = _out_shape(x, shuffle, merge)
    return y.view(*shape, w2.shape[0]), pre if level == 0 else pre.new_empty(0), stats


def backward(dy, saved, needs, act, gated, norm, eps, shuffle, merge, level, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    x, w1, w2, b1, b2, norm_weight, norm_bias, pre, stats = (saved[n] for n in (
        "x", "w1", "w2", "b1", "b2", "norm_weight", "norm_bias", "pre", "stats"))  # fmt: skip
    out_dtype = dtype or x.dtype
    grads: dict[str, Tensor] = {}
    dy2 = dy.reshape(-1, w2.shape[0]).to(out_dtype)
    xn = None
    if needs["w1"] or level == 1:
        xn = _normed(x, norm_weight, norm_bias, norm, eps, shuffle, out_dtype)[0].reshape(-1, w1.shape[1])
    if level == 1:
        pre = F.linear(xn, w1.to(out_dtype), _to(b1, out_dtype))
    if needs["b2"]:
        grads["b2"] = dy2.sum(0, dtype=torch.float32).to(b2.dtype)
    need_norm = needs["x"] or needs["norm_weight"] or needs["norm_bias"]
    need_pre = needs["w1"] or needs["b1"] or need_norm
    dh = dy2 @ w2.to(out_dtype) if need_pre else None
    dpre, h, db1 = _act_backward(pre, dh, act, gated, h_too=needs["w2"], sums=needs["b1"])
    if needs["w2"]:
        grads["w2"] = (dy2.t() @ h).to(w2.dtype)
    if needs["b1"]:
        grads["b1"] = db1.to(b1.dtype)
    if needs["w1"]:
        grads["w1"] = (dpre.t() @ xn).to(w1.dtype)
    if need_norm:
        dxn = dpre @ w1.to(out_dtype)
        grads |= _norm_backward(dxn, x, norm_weight, norm_bias, stats, norm, shuffle, needs)
    return grads


# -- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Activation tiles of act_rows x act_cols, summed over act_splits row ranges; the norm's rows in norm_programs."""

    act_rows: int
    act_cols: int
    act_splits: int
    norm_block: int
    norm_warps: int
    norm_programs: int


def config(rows: int, inner: int, channels: int, device_arch: int) -> Config:
    """None of the steps below has been timed on a GPU yet."""
    sms = {80: 108, 90: 132, 100: 148}.get(device_arch, 132)
    cols = min(128, max(16, triton.next_power_of_2(inner)))
    blocks = triton.cdiv(inner, cols)
    # 64 rows a range at least: a partial sum costs 8 bytes a column against 6 a row and column of the pass itself
    splits = max(1, min(triton.cdiv(8 * sms, blocks), rows // 64))
    block = triton.next_power_of_2(channels)
    return Config(
        act_rows=16,
        act_cols=cols,
        act_splits=splits,
        norm_block=block,
        norm_warps=max(4, min(16, block // 512)),
        norm_programs=max(1, min(2 * sms, triton.cdiv(rows, 4))),
    )


# -- launches ------------------------------------------------------------------------------------------------------


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _out_shape(x: Tensor, shuffle: int, merge: int) -> tuple[int, ...]:
    lead = (x.shape[0], x.shape[1] * x.shape[2] // (shuffle * shuffle)) if shuffle > 1 else tuple(x.shape[:-1])
    return lead if merge == 1 else (*lead[:-1], lead[-1] // merge)


def _grid_strides(x: Tensor, shuffle: int) -> tuple[Tensor, int, int, int, int, int]:
    """x with contiguous channels, and (h, w, stride of image, row, column); without a shuffle one row of tokens."""
    if shuffle == 1:
        x = x.reshape(-1, x.shape[-1])
        x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
        return x, 1, max(1, x.shape[0]), 0, 0, x.stride(0)
    x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
    return x, x.shape[1] // shuffle, x.shape[2] // shuffle, x.stride(0), x.stride(1), x.stride(2)


def _normed(x, weight, bias, norm: str, eps: float, shuffle: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """norm(shuffle(x)) (rows, C s²) in `dtype`, and its statistics; x itself where nothing is to be done."""
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
    tiles = config(rows, 1, channels, arch(x))
    mlp_projector_norm_kernel[(rows,)](
        x, weight, bias, out, stats, h, w, x.shape[-1], channels, stride_b, stride_h, stride_w, eps,
        NORM=norm, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, SHUFFLE=shuffle,
        BLOCK=tiles.norm_block, num_warps=tiles.norm_warps,
    )  # fmt: skip
    return out, stats


def _act(pre: Tensor, act: str, gated: bool) -> Tensor:
    rows, inner = pre.shape[0], pre.shape[1] // (2 if gated else 1)
    h = torch.empty((rows, inner), dtype=pre.dtype, device=pre.device)
    tiles = config(rows, inner, 1, arch(pre))
    if rows:
        mlp_projector_act_kernel[(triton.cdiv(rows, tiles.act_rows), triton.cdiv(inner, tiles.act_cols))](
            pre, h, rows, inner, ACT=act, GATED=gated, BLOCK_T=tiles.act_rows, BLOCK_F=tiles.act_cols, num_warps=4
        )
    return h


def _act_backward(pre, dh, act: str, gated: bool, h_too: bool, sums: bool):
    """dpre over dh's memory (or its own when gated), h again, and the column sums of dpre in float32."""
    rows, inner = pre.shape[0], pre.shape[1] // (2 if gated else 1)
    tiles = config(rows, inner, 1, arch(pre))
    h = torch.empty((rows, inner), dtype=pre.dtype, device=pre.device) if h_too else None
    dpre = None if dh is None else torch.empty_like(pre) if gated else dh
    parts = torch.empty((tiles.act_splits, pre.shape[1]), dtype=torch.float32, device=pre.device) if sums else None
    if rows == 0:
        return dpre, h, torch.zeros(pre.shape[1], device=pre.device) if sums else None
    if dh is not None or h_too:
        mlp_projector_act_bwd_kernel[(triton.cdiv(inner, tiles.act_cols), tiles.act_splits)](
            pre, dh, dpre, h, parts, rows, inner, triton.cdiv(rows, tiles.act_splits),
            ACT=act, GATED=gated, HAS_DH=dh is not None, HAS_H=h_too, HAS_SUMS=sums,
            BLOCK_T=tiles.act_rows, BLOCK_F=tiles.act_cols, num_warps=4,
        )  # fmt: skip
    return dpre, h, None if parts is None else parts.sum(0)


def _norm_backward(dxn, x, weight, bias, stats, norm: str, shuffle: int, needs: dict) -> dict[str, Tensor]:
    channels = x.shape[-1] * shuffle * shuffle
    rows = x.numel() // channels
    grads: dict[str, Tensor] = {}
    if norm == "none":
        return {"x": unshuffled(dxn.to(x.dtype), x.shape, shuffle)}
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs["x"] else None
    if rows == 0:
        zero = {n: torch.zeros_like(t) for n, t in (("norm_weight", weight), ("norm_bias", bias)) if needs[n]}
        return zero | ({"x": dx} if needs["x"] else {})
    tiles = config(rows, 1, channels, arch(x))
    sums = needs["norm_weight"] or needs["norm_bias"]
    parts = torch.empty((2, tiles.norm_programs, channels), dtype=torch.float32, device=x.device) if sums else None
    xg, h, w, stride_b, stride_h, stride_w = _grid_strides(x, shuffle)
    _, _, _, out_b, out_h, out_w = _grid_strides(dx, shuffle) if needs["x"] else (None, 0, 0, 0, 0, 0)
    # wide rows do dx and the sums in two launches: together they spill past 4096 channels
    together = channels <= TOGETHER
    for with_dx, with_sums in ((needs["x"], sums),) if together else ((needs["x"], False), (False, sums)):
        if with_dx or with_sums:
            mlp_projector_norm_bwd_kernel[(tiles.norm_programs,)](
                dxn, xg, weight, stats, dx, parts, rows, triton.cdiv(rows, tiles.norm_programs), h, w, xg.shape[-1],
                channels, stride_b, stride_h, stride_w, out_b, out_h, out_w,
                NORM=norm, HAS_WEIGHT=weight is not None, HAS_DX=with_dx, HAS_SUMS=with_sums, SHUFFLE=shuffle,
                BLOCK=tiles.norm_block, num_warps=tiles.norm_warps,
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
def mlp_projector_channel_offsets(row, offs_c, h, w, C, stride_b, stride_h, stride_w, SHUFFLE: tl.constexpr):
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
def mlp_projector_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, stats_ptr, h, w, C, channels, stride_b, stride_h, stride_w, eps,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, SHUFFLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row] = norm of one row; stats[row] = (mean, 1 / deviation)"""
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK)
    mask_c = offs_c < channels
    offs = mlp_projector_channel_offsets(row, offs_c, h, w, C, stride_b, stride_h, stride_w, SHUFFLE)
    x = tl.load(x_ptr + offs, mask_c, 0.0).to(tl.float32)
    mean = 0.0
    if NORM == "layer":
        mean = tl.sum(x, 0) / channels
    centred = tl.where(mask_c, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / channels + eps)
    tl.store(stats_ptr + 2 * row, mean)
    tl.store(stats_ptr + 2 * row + 1, rstd)
    x = centred * rstd
    if HAS_WEIGHT:
        x *= tl.load(weight_ptr + offs_c, mask_c, 0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias_ptr + offs_c, mask_c, 0.0).to(tl.float32)
    tl.store(out_ptr + row * channels + offs_c, _tl.cast(x, out_ptr.dtype.element_ty), mask_c)


@triton.jit
def mlp_projector_norm_bwd_kernel(
    dxn_ptr, x_ptr, weight_ptr, stats_ptr, dx_ptr, parts_ptr, rows, rows_per_program, h, w, C, channels,
    stride_b, stride_h, stride_w, out_b, out_h, out_w,
    NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DX: tl.constexpr, HAS_SUMS: tl.constexpr,
    SHUFFLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g - mean(g) - xhat mean(g xhat)), g = dxn weight; RMSNorm without mean(g). Sums of dxn xhat, dxn."""
    program = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK)
    mask_c = offs_c < channels
    sum_weight = tl.zeros((BLOCK,), tl.float32)
    sum_bias = tl.zeros((BLOCK,), tl.float32)
    begin = program * rows_per_program
    end = tl.minimum(begin + rows_per_program, rows)
    for row in range(begin, end):
        offs = mlp_projector_channel_offsets(row, offs_c, h, w, C, stride_b, stride_h, stride_w, SHUFFLE)
        mean = tl.load(stats_ptr + 2 * row)
        rstd = tl.load(stats_ptr + 2 * row + 1)
        xhat = tl.where(mask_c, (tl.load(x_ptr + offs, mask_c, 0.0).to(tl.float32) - mean) * rstd, 0.0)
        g = tl.load(dxn_ptr + row * channels + offs_c, mask_c, 0.0).to(tl.float32)
        if HAS_SUMS:
            sum_weight += g * xhat
            sum_bias += g
        if HAS_DX:
            if HAS_WEIGHT:
                # read again for each row: held, it would cost the registers that the sums need
                g *= tl.load(weight_ptr + offs_c, mask_c, 0.0).to(tl.float32)
            along = tl.sum(g * xhat, 0) / channels
            level = 0.0
            if NORM == "layer":
                level = tl.sum(g, 0) / channels
            g = rstd * (g - level - xhat * along)
            offs = mlp_projector_channel_offsets(row, offs_c, h, w, C, out_b, out_h, out_w, SHUFFLE)
            tl.store(dx_ptr + offs, _tl.cast(g, dx_ptr.dtype.element_ty), mask_c)
    if HAS_SUMS:
        tl.store(parts_ptr + program * channels + offs_c, sum_weight, mask_c)
        tl.store(parts_ptr + (tl.num_programs(0) + program) * channels + offs_c, sum_bias, mask_c)


@triton.jit
def mlp_projector_act_kernel(
    pre_ptr, h_ptr, T, F, ACT: tl.constexpr, GATED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr
):
    """h = act(pre), or act(second half) * first half"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (offs_t < T)[:, None] & (offs_f < F)[None, :]
    if GATED:
        pre_ptrs = pre_ptr + offs_t[:, None] * (2 * F) + offs_f[None, :]
        h = _tl.act(tl.load(pre_ptrs + F, mask, 0.0).to(tl.float32), ACT) * tl.load(pre_ptrs, mask, 0.0).to(tl.float32)
    else:
        h = _tl.act(tl.load(pre_ptr + offs_t[:, None] * F + offs_f[None, :], mask, 0.0).to(tl.float32), ACT)
    tl.store(h_ptr + offs_t[:, None] * F + offs_f[None, :], _tl.cast(h, h_ptr.dtype.element_ty), mask)


@triton.jit
def mlp_projector_act_bwd_kernel(
    pre_ptr, dh_ptr, dpre_ptr, h_ptr, parts_ptr, T, F, rows_per_split,
    ACT: tl.constexpr, GATED: tl.constexpr, HAS_DH: tl.constexpr, HAS_H: tl.constexpr, HAS_SUMS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dpre = dh act'(pre), h = act(pre), and the sums of dpre over the split's rows"""
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    split = tl.program_id(1).to(tl.int64)
    mask_f = offs_f < F
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, T)
    sums = tl.zeros((BLOCK_F,), tl.float32)
    gate_sums = tl.zeros((BLOCK_F,), tl.float32)
    width = F * (2 if GATED else 1)
    for t in range(begin, end, BLOCK_T):
        offs_t = t + tl.arange(0, BLOCK_T)
        mask = (offs_t < end)[:, None] & mask_f[None, :]
        offs = offs_t[:, None] * F + offs_f[None, :]
        offs_pre = offs_t[:, None] * width + offs_f[None, :]
        first = tl.load(pre_ptr + offs_pre, mask, 0.0).to(tl.float32)
        if GATED:
            gate = tl.load(pre_ptr + offs_pre + F, mask, 0.0).to(tl.float32)
            opened = _tl.act(gate, ACT)
            if HAS_H:
                tl.store(h_ptr + offs, _tl.cast(opened * first, h_ptr.dtype.element_ty), mask)
            if HAS_DH:
                dh = tl.load(dh_ptr + offs, mask, 0.0).to(tl.float32)
                dfirst = dh * opened
                dgate = dh * first * _tl.act_derivative(gate, ACT)
                tl.store(dpre_ptr + offs_pre, _tl.cast(dfirst, dpre_ptr.dtype.element_ty), mask)
                tl.store(dpre_ptr + offs_pre + F, _tl.cast(dgate, dpre_ptr.dtype.element_ty), mask)
                sums += tl.sum(dfirst, 0)
                gate_sums += tl.sum(dgate, 0)
        else:
            if HAS_H:
                tl.store(h_ptr + offs, _tl.cast(_tl.act(first, ACT), h_ptr.dtype.element_ty), mask)
            if HAS_DH:
                dfirst = tl.load(dh_ptr + offs, mask, 0.0).to(tl.float32) * _tl.act_derivative(first, ACT)
                tl.store(dpre_ptr + offs_pre, _tl.cast(dfirst, dpre_ptr.dtype.element_ty), mask)
                sums += tl.sum(dfirst, 0)
    if HAS_SUMS:
        tl.store(parts_ptr + split * width + offs_f, sums, mask_f)
        if GATED:
            tl.store(parts_ptr + split * width + F + offs_f, gate_sums, mask_f)

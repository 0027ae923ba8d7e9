"""mlp_projector in Triton: cuBLAS runs the products; norm with shuffle, and the activation, are a pass each.

The first product of a forward without gate is Triton's own where `config` expects that to be faster: it writes pre and
act(pre) together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import _norm, _refuse, _tl
from .._device import arch, multiprocessors


def refuses(
    x, w1, w2, b1, b2, norm_weight, norm_bias, wg, scale, row_mask, act, gated, norm, norm_act, eps, shuffle, merge,
    level, residual, dtype,
) -> str | None:  # fmt: skip
    if (reason := _refuse.common(x, dtype, w1=w1, w2=w2, scale=scale)) is not None:
        return reason
    if w1.shape[0] == 0 or w2.shape[0] == 0 or w1.shape[1] == 0:
        return f"zero channels: w1 {tuple(w1.shape)}, w2 {tuple(w2.shape)}"
    return _norm.refuses(x, norm, shuffle)


def declines(*values) -> str | None:
    return None


def forward(
    x, w1, w2, b1, b2, norm_weight, norm_bias, wg, scale, row_mask, act, gated, norm, norm_act, eps, shuffle, merge,
    level, residual, dtype, first_and_act: Callable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (..., N), pre (T, F or 2F) at level 0, stats (rows, 2) with a norm.

    first_and_act: another kernel for the first product and the activation, called (x, w1, b1, act, keep_pre).
    """
    out_dtype = dtype or x.dtype
    xn, stats = _norm.normed(x, norm_weight, norm_bias, norm, eps, shuffle, out_dtype, norm_act)
    xn = xn.reshape(-1, w1.shape[1])
    tiles = config(xn.shape[0], w2.shape[1], w1.shape[1], out_dtype, gated or wg is not None, arch(x))
    closing = _Closing.of(scale, row_mask)
    if first_and_act is not None and not closing.given:
        pre, h = first_and_act(xn, w1, b1, act, level == 0)
    elif tiles.product is not None and not closing.given:
        pre, h = _first_and_act(xn, w1, b1, act, level == 0, tiles.product)
    else:
        pre = _first(xn, w1, b1, wg, out_dtype)
        h = _act(pre, act, gated or wg is not None, tiles, closing)
        pre = pre if level == 0 else pre.new_empty(0)
    y = _last(h, w2, b2, x if residual else None)
    return y.view(*_out_shape(x, shuffle, merge), w2.shape[0]), pre, stats


def backward(
    dy, saved, needs, act, gated, norm, norm_act, eps, shuffle, merge, level, residual, dtype
) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    x, w1, w2, b1, b2, norm_weight, norm_bias, wg, scale, row_mask, pre, stats = (saved[n] for n in (
        "x", "w1", "w2", "b1", "b2", "norm_weight", "norm_bias", "wg", "scale", "row_mask", "pre", "stats",
    ))  # fmt: skip
    out_dtype = dtype or x.dtype
    grads: dict[str, Tensor] = {}
    dy2 = dy.reshape(-1, w2.shape[0]).to(out_dtype)
    xn = None
    if needs["w1"] or needs["wg"] or level == 1:
        xn = _norm.normed(x, norm_weight, norm_bias, norm, eps, shuffle, out_dtype, norm_act)[0]
        xn = xn.reshape(-1, w1.shape[1])
    if level == 1:
        pre = _first(xn, w1, b1, wg, out_dtype)
    if needs["b2"]:
        grads["b2"] = dy2.sum(0, dtype=torch.float32).to(b2.dtype)
    need_norm = needs["x"] or needs["norm_weight"] or needs["norm_bias"]
    need_pre = needs["w1"] or needs["wg"] or needs["b1"] or need_norm or needs["scale"]
    dh = dy2 @ w2.to(out_dtype) if need_pre else None
    tiles = config(dy2.shape[0], w2.shape[1], w1.shape[1], out_dtype, gated or wg is not None, arch(x))
    closing = _Closing.of(scale, row_mask)
    dpre, h, db1, dscale = _act_backward(
        pre, dh, act, gated or wg is not None, needs["w2"], needs["b1"], needs["scale"], tiles, closing
    )
    if needs["scale"]:
        grads["scale"] = dscale.to(scale.dtype).view(scale.shape)
    if needs["w2"]:
        grads["w2"] = (dy2.t() @ h).to(w2.dtype)
    if needs["b1"]:
        grads["b1"] = db1.to(b1.dtype)
    # with a gate of its own, the halves of dpre belong to two weights
    halves = (
        [(dpre, "w1", w1)] if wg is None or dpre is None else zip(dpre.chunk(2, 1), ("w1", "wg"), (w1, wg), strict=True)
    )
    skip = dxn = None
    if residual and needs["x"]:
        # without a norm the product adds what comes past the block; a wider dy is not rounded for it
        skip = dy.reshape(-1, w2.shape[0])
        if norm == "none" and dy.dtype == out_dtype == x.dtype:
            skip, dxn = None, skip
    for part, name, weight in halves:
        if needs[name]:
            grads[name] = (part.t() @ xn).to(weight.dtype)
        if need_norm:
            weight = weight.to(out_dtype)
            dxn = part @ weight if dxn is None else torch.addmm(dxn, part, weight)
    if need_norm:
        grads |= _norm.norm_backward(dxn, x, norm_weight, norm_bias, stats, norm, shuffle, needs, norm_act, skip=skip)
    return grads


# -- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """A product's tiles: rows x cols of pre, depth of both operands; group: row blocks that go through together."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int
    group: int = 8


@dataclass(frozen=True)
class Config:
    """Tiles of rows x cols of the activation; splits: row ranges with a partial sum each.

    product: of the first product with the activation in its epilogue; None where cuBLAS runs it.
    """

    rows: int
    cols: int
    splits: int
    product: Product | None


def config(rows: int, inner: int, depth: int, dtype: torch.dtype, gated: bool, device_arch: int) -> Config:
    """None of the steps below has been timed on a GPU yet."""
    sms = multiprocessors(device_arch)
    cols = min(128, max(16, triton.next_power_of_2(inner)))
    blocks = triton.cdiv(inner, cols)
    # 64 rows a range at least: a partial sum costs 8 bytes a column against 6 a row and column of the pass itself
    splits = max(1, min(triton.cdiv(8 * sms, blocks), rows // 64))
    # A model, for one H200: Triton's product at 0.80 and cuBLAS's at 0.93 of 790 TFLOP/s, so 0.44 fs an element of pre
    # and a column of x slower; the pass that it saves reads and writes 2 bytes an element at 4.3 TB/s, 930 fs. They are
    # equal at 2,100 columns. In float32 its three tf32 passes would be slower than the pass at any depth.
    own = None
    if depth <= 2048 and dtype != torch.float32 and not gated:
        # 256 columns read x half as often; sm_80 takes operands through registers and spills there
        wide = 256 if device_arch in (0, 90, 100) else 128
        own = Product(
            max(16, min(128, triton.next_power_of_2(rows))),
            max(16, min(wide, triton.next_power_of_2(inner))),
            max(16, min(64, triton.next_power_of_2(depth))),
            warps=8,
            stages=3,
        )
    return Config(16, cols, splits, own)


# -- launches ------------------------------------------------------------------------------------------------------


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)


def _first(x: Tensor, w1: Tensor, b1: Tensor | None, wg: Tensor | None, dtype: torch.dtype) -> Tensor:
    """pre = x W1ᵀ + b1 (T, F or 2F); with a gate's own weight its product is the second half."""
    if wg is None:
        return F.linear(x, w1.to(dtype), _to(b1, dtype))
    pre = torch.empty((x.shape[0], 2 * w1.shape[0]), dtype=dtype, device=x.device)
    for half, weight in zip(pre.chunk(2, 1), (w1, wg), strict=True):
        torch.mm(x, weight.to(dtype).t(), out=half)
    return pre


def _first_and_act(
    x: Tensor, w1: Tensor, b1: Tensor | None, act: str, keep_pre: bool, tile: Product
) -> tuple[Tensor, Tensor]:
    """pre = x W1ᵀ + b1 (T, F), empty unless it is kept, and h = act(pre), in x's dtype."""
    (rows, depth), inner = x.shape, w1.shape[0]
    w1 = w1.to(x.dtype)
    x = x if x.stride(1) == 1 or depth == 1 else x.contiguous()
    pre, h = (torch.empty(n, dtype=x.dtype, device=x.device) for n in ((rows, inner) if keep_pre else 0, (rows, inner)))
    if rows:
        mlp_projector_gemm_act_kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(inner, tile.cols),)](
            x, w1, b1, pre, h, rows, depth, inner, x.stride(0), w1.stride(0), w1.stride(1),
            ACT=act, HAS_BIAS=b1 is not None, HAS_PRE=keep_pre, BLOCK_T=tile.rows, BLOCK_F=tile.cols,
            BLOCK_K=tile.depth, GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages,
            **_tl.product(x.dtype),
        )  # fmt: skip
    return pre, h


def _last(h: Tensor, w2: Tensor, b2: Tensor | None, skip: Tensor | None) -> Tensor:
    """h W2ᵀ + b2 (T, N), plus skip (..., N) in the wider of both dtypes."""
    w2 = w2.to(h.dtype)
    if skip is None:
        return F.linear(h, w2, _to(b2, h.dtype))
    skip = skip.reshape(-1, w2.shape[0])
    if b2 is None and skip.dtype == h.dtype:
        return torch.addmm(skip, h, w2.t())
    y = F.linear(h, w2, _to(b2, h.dtype))
    return y.add_(skip) if torch.promote_types(y.dtype, skip.dtype) == y.dtype else skip + y


def _out_shape(x: Tensor, shuffle: int, merge: int) -> tuple[int, ...]:
    lead = (x.shape[0], x.shape[1] * x.shape[2] // (shuffle * shuffle)) if shuffle > 1 else tuple(x.shape[:-1])
    return lead if merge == 1 else (*lead[:-1], lead[-1] // merge)


@dataclass(frozen=True)
class _Closing:
    """What h is multiplied by before the second product: one number, and 0 or 1 for each row."""

    tensors: tuple[Tensor | None, Tensor | None]
    flags: dict[str, bool]

    @classmethod
    def of(cls, scale: Tensor | None, row_mask: Tensor | None) -> _Closing:
        if row_mask is not None:
            row_mask = row_mask.reshape(-1)
            row_mask = row_mask.view(torch.uint8) if row_mask.dtype == torch.bool else row_mask
        return cls((scale, row_mask), {"HAS_SCALE": scale is not None, "HAS_MASK": row_mask is not None})

    @property
    def given(self) -> bool:
        return any(self.flags.values())


def _act(pre: Tensor, act: str, gated: bool, tiles: Config, closing: _Closing) -> Tensor:
    rows, inner = pre.shape[0], pre.shape[1] // (2 if gated else 1)
    h = torch.empty((rows, inner), dtype=pre.dtype, device=pre.device)
    if rows:
        mlp_projector_act_kernel[(triton.cdiv(rows, tiles.rows), triton.cdiv(inner, tiles.cols))](
            pre, h, *closing.tensors, rows, inner, ACT=act, GATED=gated, **closing.flags, BLOCK_T=tiles.rows,
            BLOCK_F=tiles.cols, num_warps=4,
        )  # fmt: skip
    return h


def _act_backward(
    pre, dh, act: str, gated: bool, h_too: bool, sums: bool, scale_too: bool, tiles: Config, closing: _Closing
):
    """dpre over dh's memory (or its own when gated), h again, and in float32 the column sums of dpre and the sum of
    dh h before its scale."""
    rows, inner = pre.shape[0], pre.shape[1] // (2 if gated else 1)
    h = torch.empty((rows, inner), dtype=pre.dtype, device=pre.device) if h_too else None
    dpre = None if dh is None else torch.empty_like(pre) if gated else dh
    made = {"dtype": torch.float32, "device": pre.device}
    parts = torch.empty((tiles.splits, pre.shape[1]), **made) if sums else None
    blocks = triton.cdiv(inner, tiles.cols)
    dots = torch.empty((tiles.splits, blocks), **made) if scale_too else None
    if rows == 0:
        return dpre, h, torch.zeros(pre.shape[1], **made) if sums else None, torch.zeros((), **made)
    if dh is not None or h_too:
        mlp_projector_act_bwd_kernel[(blocks, tiles.splits)](
            pre, dh, dpre, h, parts, dots, *closing.tensors, rows, inner, triton.cdiv(rows, tiles.splits),
            ACT=act, GATED=gated, HAS_DH=dh is not None, HAS_H=h_too, HAS_SUMS=sums, HAS_DOTS=scale_too,
            **closing.flags, BLOCK_T=tiles.rows, BLOCK_F=tiles.cols, num_warps=4,
        )  # fmt: skip
    return dpre, h, None if parts is None else parts.sum(0), None if dots is None else dots.sum()


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def mlp_projector_store_act(
    acc, bias_ptr, pre_ptr, h_ptr, first_t, first_f, T, F,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PRE: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """pre = acc + bias, h = act(pre) for the tile at (first_t, first_f)"""
    t = tl.arange(0, acc.shape[0])
    f = tl.arange(0, acc.shape[1])
    mask_f = f < F - first_f
    if HAS_BIAS:
        acc += tl.load(bias_ptr + first_f + f, mask_f, 0.0).to(tl.float32)[None, :]
    mask = (t < T - first_t)[:, None] & mask_f[None, :]
    # within the tile 32 bits do
    first = first_t * F + first_f
    offs = t[:, None] * F + f[None, :]
    # of the rounded pre, as backward makes h again
    pre = _tl.cast(acc, PRODUCT)
    if HAS_PRE:
        tl.store(pre_ptr + first + offs, pre, mask)
    tl.store(h_ptr + first + offs, _tl.cast(_tl.act(pre.to(tl.float32), ACT), PRODUCT), mask)


@triton.jit
def mlp_projector_gemm_act_kernel(
    x_ptr, w_ptr, bias_ptr, pre_ptr, h_ptr, T, K, F, stride_xt, stride_wf, stride_wk,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_PRE: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """pre = x wᵀ + bias, h = act(pre)"""
    # GROUP row blocks go through the columns together: their x and each block of w are read while the cache holds them
    program = tl.program_id(0)
    blocks_f = tl.cdiv(F, BLOCK_F)
    group = program // (GROUP * blocks_f)
    rows_here = tl.minimum(tl.cdiv(T, BLOCK_T) - group * GROUP, GROUP)
    inside = program % (GROUP * blocks_f)
    first_t = (group * GROUP + inside % rows_here).to(tl.int64) * BLOCK_T
    first_f = inside // rows_here * BLOCK_F
    offs_t = first_t + tl.arange(0, BLOCK_T)
    offs_f = first_f + tl.arange(0, BLOCK_F)
    mask_t = offs_t < T
    mask_f = offs_f < F
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_t[:, None] * stride_xt + offs_k[None, :]
    w_ptrs = w_ptr + offs_f[None, :].to(tl.int64) * stride_wf + offs_k[:, None].to(tl.int64) * stride_wk
    step_w = tl.full((), BLOCK_K, tl.int64) * stride_wk
    acc = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        # (BLOCK_T, BLOCK_K)
        x = tl.load(x_ptrs, mask_t[:, None] & mask_k[None, :], 0.0)
        # (BLOCK_K, BLOCK_F)
        w = tl.load(w_ptrs, mask_k[:, None] & mask_f[None, :], 0.0)
        acc = _tl.dot(x, w, acc, PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += step_w
    if BLOCK_F > 128:
        # half of the columns at a time: with the activation of all of them 255 registers spill
        halves = tl.permute(tl.reshape(acc, (BLOCK_T, 2, BLOCK_F // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        mlp_projector_store_act(left, bias_ptr, pre_ptr, h_ptr, first_t, first_f, T, F, ACT, HAS_BIAS, HAS_PRE, PRODUCT)
        mlp_projector_store_act(
            right, bias_ptr, pre_ptr, h_ptr, first_t, first_f + BLOCK_F // 2, T, F, ACT, HAS_BIAS, HAS_PRE, PRODUCT
        )
    else:
        mlp_projector_store_act(acc, bias_ptr, pre_ptr, h_ptr, first_t, first_f, T, F, ACT, HAS_BIAS, HAS_PRE, PRODUCT)


@triton.jit
def mlp_projector_closing(scale_ptr, mask_ptr, offs_t, mask_t, HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr):
    """(scale, which rows are open), in float32 and bool"""
    scale = 1.0
    if HAS_SCALE:
        scale = tl.load(scale_ptr).to(tl.float32)
    open_t = mask_t
    if HAS_MASK:
        open_t = tl.load(mask_ptr + offs_t, mask_t, 0) != 0
    return scale, open_t


@triton.jit
def mlp_projector_act_kernel(
    pre_ptr, h_ptr, scale_ptr, mask_ptr, T, F, ACT: tl.constexpr, GATED: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_MASK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """h = act(pre), or act(second half) * first half, times scale and the row's 0 or 1"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (offs_t < T)[:, None] & (offs_f < F)[None, :]
    if GATED:
        pre_ptrs = pre_ptr + offs_t[:, None] * (2 * F) + offs_f[None, :]
        h = _tl.act(tl.load(pre_ptrs + F, mask, 0.0).to(tl.float32), ACT) * tl.load(pre_ptrs, mask, 0.0).to(tl.float32)
    else:
        h = _tl.act(tl.load(pre_ptr + offs_t[:, None] * F + offs_f[None, :], mask, 0.0).to(tl.float32), ACT)
    if HAS_SCALE or HAS_MASK:
        scale, open_t = mlp_projector_closing(scale_ptr, mask_ptr, offs_t, offs_t < T, HAS_SCALE, HAS_MASK)
        h = tl.where(open_t[:, None], h * scale, 0.0)
    tl.store(h_ptr + offs_t[:, None] * F + offs_f[None, :], _tl.cast(h, h_ptr.dtype.element_ty), mask)


@triton.jit
def mlp_projector_act_bwd_kernel(
    pre_ptr, dh_ptr, dpre_ptr, h_ptr, parts_ptr, dots_ptr, scale_ptr, mask_ptr, T, F, rows_per_split,
    ACT: tl.constexpr, GATED: tl.constexpr, HAS_DH: tl.constexpr, HAS_H: tl.constexpr, HAS_SUMS: tl.constexpr,
    HAS_DOTS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """dpre = scale dh act'(pre), h = scale act(pre), the sums of dpre over the split's rows, and <dh, act(pre)>"""
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    split = tl.program_id(1).to(tl.int64)
    mask_f = offs_f < F
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, T)
    sums = tl.zeros((BLOCK_F,), tl.float32)
    gate_sums = tl.zeros((BLOCK_F,), tl.float32)
    dots = tl.zeros((BLOCK_F,), tl.float32)
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
            h = opened * first
        else:
            h = _tl.act(first, ACT)
        scale = 1.0
        open_t = offs_t < end
        if HAS_SCALE or HAS_MASK:
            scale, open_t = mlp_projector_closing(scale_ptr, mask_ptr, offs_t, offs_t < end, HAS_SCALE, HAS_MASK)
            h = tl.where(open_t[:, None], h, 0.0)
        if HAS_H:
            tl.store(h_ptr + offs, _tl.cast(h * scale, h_ptr.dtype.element_ty), mask)
        if HAS_DH:
            dh = tl.load(dh_ptr + offs, mask, 0.0).to(tl.float32)
            if HAS_DOTS:
                dots += tl.sum(dh * h, 0)
            if HAS_SCALE or HAS_MASK:
                dh = tl.where(open_t[:, None], dh * scale, 0.0)
            if GATED:
                dfirst = dh * opened
                dgate = dh * first * _tl.act_derivative(gate, ACT)
                tl.store(dpre_ptr + offs_pre + F, _tl.cast(dgate, dpre_ptr.dtype.element_ty), mask)
                gate_sums += tl.sum(dgate, 0)
            else:
                dfirst = dh * _tl.act_derivative(first, ACT)
            tl.store(dpre_ptr + offs_pre, _tl.cast(dfirst, dpre_ptr.dtype.element_ty), mask)
            sums += tl.sum(dfirst, 0)
    if HAS_DOTS:
        tl.store(dots_ptr + split * tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(mask_f, dots, 0.0), 0))
    if HAS_SUMS:
        tl.store(parts_ptr + split * width + offs_f, sums, mask_f)
        if GATED:
            tl.store(parts_ptr + split * width + F + offs_f, gate_sums, mask_f)

"""multi_layer_kv in Triton: one norm pass and one cuBLAS product serve all layers; scales and shifts go into weights.

With n the norm of x before scale and shift, layer l is n (W_l diag(norm_weight_l))ᵀ + (W_l norm_bias_l + bias_l). The
folded weights are made in one pass over the weights, in backward again where x needs a gradient: L W C elements beside
the T C that a norm of each layer's own would write and read, in a batch of images far less. One product G = dyᵀ n then
holds every weight's gradient and every norm's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import _norm, _refuse, _tl
from .._device import arch, multiprocessors


def refuses(x, weight, bias, norm_weight, norm_bias, parts, layers, norm, eps, dtype) -> str | None:
    tensors = {"weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    if (reason := _refuse.common(x, dtype, **tensors)) is not None:
        return reason
    if weight.shape[0] == 0:
        return f"zero channels: weight {tuple(weight.shape)}"
    return _norm.refuses(x, norm, 1)


def declines(x, weight, bias, norm_weight, norm_bias, parts, layers, norm, eps, dtype) -> str | None:
    alone = layers == 1 and norm == "none"
    return "one layer without a norm is one linear, which plain PyTorch runs as well" if alone else None


def forward(x, weight, bias, norm_weight, norm_bias, parts, layers, norm, eps, dtype) -> tuple[Tensor, Tensor]:
    """y (..., L W), stats (rows, 2) with a norm."""
    out_dtype = dtype or x.dtype
    n, stats = _norm.normed(x, None, None, norm, eps, 1, out_dtype)
    folded, shift = _fold(weight, bias, norm_weight, norm_bias, layers, out_dtype)
    return F.linear(n, folded, shift).view(*x.shape[:-1], weight.shape[0]), stats


def backward(dy, saved, needs, layers, norm, eps, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    x, weight, bias, norm_weight, norm_bias, stats = (saved[n] for n in (
        "x", "weight", "bias", "norm_weight", "norm_bias", "stats"))  # fmt: skip
    out_dtype = dtype or x.dtype
    grads: dict[str, Tensor] = {}
    dy2 = dy.reshape(-1, weight.shape[0]).to(out_dtype)
    d = None
    if needs["bias"] or needs["norm_bias"] or (needs["weight"] and norm_bias is not None):
        d = dy2.sum(0, dtype=torch.float32)
    if needs["bias"]:
        grads["bias"] = d.to(bias.dtype)
    G = None
    if needs["weight"] or needs["norm_weight"]:
        n, _ = _norm.normed(x, None, None, norm, eps, 1, out_dtype)
        G = dy2.t() @ n
        del n
    grads |= _unfold(G, d, weight, norm_weight, norm_bias, layers, needs)
    if needs["x"]:
        folded, _ = _fold(weight, None, norm_weight, None, layers, out_dtype)
        only_x = {"x": True, "norm_weight": False, "norm_bias": False}
        grads |= _norm.norm_backward(dy2 @ folded, x, None, None, stats, norm, 1, only_x)
    return grads


# -- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Tiles of rows x cols of the weights; splits: row ranges of a layer with a partial sum each."""

    rows: int
    cols: int
    splits: int


def config(layers: int, width: int, channels: int, device_arch: int) -> Config:
    """None of the steps below has been timed on a GPU yet."""
    cols = min(128, max(16, triton.next_power_of_2(channels)))
    blocks = triton.cdiv(channels, cols) * layers
    # 64 rows a range at least: a partial sum costs 16 bytes a column against 6 a row and column of the pass itself
    splits = max(1, min(triton.cdiv(4 * multiprocessors(device_arch), blocks), width // 64))
    return Config(16, cols, splits)


# -- launches ------------------------------------------------------------------------------------------------------


def _fold(weight, bias, norm_weight, norm_bias, layers: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """W_l diag(norm_weight_l) (L W, C) and W_l norm_bias_l + bias_l (L W,), in `dtype`."""
    plain = norm_weight is None and norm_bias is None
    folded = weight.to(dtype) if norm_weight is None else torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if norm_bias is None:
        shift = None if bias is None else bias.to(dtype)
    else:
        shift = torch.empty(weight.shape[:1], dtype=dtype, device=weight.device)
    if plain:
        return folded, shift
    (count, channels), weight = weight.shape, _contiguous_columns(weight)
    tiles = config(layers, count // layers, channels, arch(weight))
    multi_layer_kv_fold_kernel[(triton.cdiv(count // layers, tiles.rows), layers)](
        weight, bias, _contiguous(norm_weight), _contiguous(norm_bias), folded, shift, count // layers, channels,
        weight.stride(0), HAS_BIAS=bias is not None, HAS_NORM_WEIGHT=norm_weight is not None,
        HAS_NORM_BIAS=norm_bias is not None, BLOCK_W=tiles.rows, BLOCK_C=tiles.cols, num_warps=4,
    )  # fmt: skip
    return folded, shift


def _unfold(G, d, weight, norm_weight, norm_bias, layers: int, needs: dict) -> dict[str, Tensor]:
    """Gradients of weight, norm_weight and norm_bias from G = dyᵀ n (L W, C) and the column sums d of dy."""
    norms = {n: t for n, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)) if needs[n]}
    if not norms and not needs["weight"]:
        return {}
    if norm_weight is None and norm_bias is None:
        return {"weight": G.to(weight.dtype)}
    grads: dict[str, Tensor] = {}
    count, channels = weight.shape
    if needs["weight"]:
        # G is not needed afterwards: dW over its memory
        grads["weight"] = (
            G if G.dtype == weight.dtype else torch.empty(weight.shape, dtype=weight.dtype, device=G.device)
        )
    tiles = config(layers, count // layers, channels, arch(weight))
    shape = (2, tiles.splits, layers, channels)
    parts = torch.empty(shape, dtype=torch.float32, device=weight.device) if norms else None
    weight = _contiguous_columns(weight)
    multi_layer_kv_unfold_kernel[(triton.cdiv(channels, tiles.cols), layers, tiles.splits)](
        G, weight, d, _contiguous(norm_weight), _contiguous(norm_bias), grads.get("weight"), parts,
        count // layers, channels, triton.cdiv(count // layers, tiles.splits), weight.stride(0),
        HAS_NORM_WEIGHT=norm_weight is not None, HAS_NORM_BIAS=norm_bias is not None, HAS_DW=needs["weight"],
        HAS_SUM_WEIGHT=needs["norm_weight"], HAS_SUM_BIAS=needs["norm_bias"],
        BLOCK_W=tiles.rows, BLOCK_C=tiles.cols, num_warps=4,
    )  # fmt: skip
    for i, name in enumerate(("norm_weight", "norm_bias")):
        if name in norms:
            grads[name] = parts[i].sum(0).to(norms[name].dtype)
    return grads


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _contiguous_columns(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def multi_layer_kv_fold_kernel(
    w_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, folded_ptr, shift_ptr, W, C, stride_w,
    HAS_BIAS: tl.constexpr, HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """folded = W_l diag(norm_weight_l), shift = W_l norm_bias_l + bias_l for some rows of one layer"""
    layer = tl.program_id(1).to(tl.int64)
    offs_w = tl.program_id(0) * BLOCK_W + tl.arange(0, BLOCK_W)
    mask_w = offs_w < W
    row = layer * W + offs_w
    shift = tl.zeros((BLOCK_W,), tl.float32)
    for c in range(0, C, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        mask_c = offs_c < C
        mask = mask_w[:, None] & mask_c[None, :]
        # (BLOCK_W, BLOCK_C)
        w = tl.load(w_ptr + row[:, None] * stride_w + offs_c[None, :], mask, 0.0).to(tl.float32)
        if HAS_NORM_BIAS:
            norm_bias = tl.load(norm_bias_ptr + layer * C + offs_c, mask_c, 0.0).to(tl.float32)
            shift += tl.sum(w * norm_bias[None, :], 1)
        if HAS_NORM_WEIGHT:
            w *= tl.load(norm_weight_ptr + layer * C + offs_c, mask_c, 0.0).to(tl.float32)[None, :]
            tl.store(folded_ptr + row[:, None] * C + offs_c[None, :], _tl.cast(w, folded_ptr.dtype.element_ty), mask)
    if HAS_NORM_BIAS:
        if HAS_BIAS:
            shift += tl.load(bias_ptr + row, mask_w, 0.0).to(tl.float32)
        tl.store(shift_ptr + row, _tl.cast(shift, shift_ptr.dtype.element_ty), mask_w)


@triton.jit
def multi_layer_kv_unfold_kernel(
    g_ptr, w_ptr, d_ptr, norm_weight_ptr, norm_bias_ptr, dw_ptr, parts_ptr, W, C, rows_per_split, stride_w,
    HAS_NORM_WEIGHT: tl.constexpr, HAS_NORM_BIAS: tl.constexpr, HAS_DW: tl.constexpr, HAS_SUM_WEIGHT: tl.constexpr,
    HAS_SUM_BIAS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dW_l = G_l diag(norm_weight_l) + d_l norm_bias_lᵀ; the split's share of the sums of W_l * G_l and of d_l W_l"""
    layer = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, W)
    if HAS_NORM_WEIGHT:
        norm_weight = tl.load(norm_weight_ptr + layer * C + offs_c, mask_c, 0.0).to(tl.float32)
    if HAS_NORM_BIAS:
        norm_bias = tl.load(norm_bias_ptr + layer * C + offs_c, mask_c, 0.0).to(tl.float32)
    sum_weight = tl.zeros((BLOCK_C,), tl.float32)
    sum_bias = tl.zeros((BLOCK_C,), tl.float32)
    for first in range(begin, end, BLOCK_W):
        offs_w = first + tl.arange(0, BLOCK_W)
        mask_w = offs_w < end
        mask = mask_w[:, None] & mask_c[None, :]
        row = layer * W + offs_w
        if HAS_DW or HAS_SUM_WEIGHT:
            # (BLOCK_W, BLOCK_C)
            g = tl.load(g_ptr + row[:, None] * C + offs_c[None, :], mask, 0.0).to(tl.float32)
        if HAS_NORM_BIAS and (HAS_DW or HAS_SUM_BIAS):
            d = tl.load(d_ptr + row, mask_w, 0.0)
        if HAS_SUM_WEIGHT or HAS_SUM_BIAS:
            w = tl.load(w_ptr + row[:, None] * stride_w + offs_c[None, :], mask, 0.0).to(tl.float32)
            if HAS_SUM_WEIGHT:
                sum_weight += tl.sum(w * g, 0)
            if HAS_SUM_BIAS:
                sum_bias += tl.sum(w * d[:, None], 0)
        if HAS_DW:
            if HAS_NORM_WEIGHT:
                g *= norm_weight[None, :]
            if HAS_NORM_BIAS:
                g += d[:, None] * norm_bias[None, :]
            tl.store(dw_ptr + row[:, None] * C + offs_c[None, :], _tl.cast(g, dw_ptr.dtype.element_ty), mask)
    part = (split * tl.num_programs(1) + layer) * C + offs_c
    if HAS_SUM_WEIGHT:
        tl.store(parts_ptr + part, sum_weight, mask_c)
    if HAS_SUM_BIAS:
        tl.store(parts_ptr + (tl.num_programs(2) * tl.num_programs(1)).to(tl.int64) * C + part, sum_bias, mask_c)

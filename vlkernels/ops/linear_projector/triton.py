"""linear_projector in Triton: norm and shuffle are one pass, cuBLAS runs the product, what follows it is one pass.

The position and the write into the text sequence stay out of the product. Forward, in rows of N elements, T rows of y
into a sequence of L:

    ours      product writes T; one pass reads T and the L - T rows that stay, writes L          T + 2 L
    plain     product writes T; gathering and adding a position 5 T; clone and index_copy        3 T + 2 L (+ 5 T)
    transformers' masked_scatter in place of index_copy adds, by ATen's source, 19 bytes an element of the sequence on
              a GPU: the mask expanded to N columns (1 + 1) and its running sum in int64 (8 + 8 + 1); a copy is 4
    fused into the product: 2 T less than ours. cuBLAS cannot scatter, so the product would have to be Triton's. In 16
              bits 2 T rows take 2 F / (K B) of the product's time at F FLOP/s and B bytes/s: at 800e12 and 4.8e12 a
              third for K = 1024, 8 % for K = 4096. Whether Triton's product loses less than that to cuBLAS has not
              been timed; the pass after cuBLAS moves less than plain PyTorch at every shape.

Backward reads dy once: T rows are gathered for the products, the others copied into d_into beside zeros.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import _norm, _refuse, _tl
from .._norm import config  # noqa: F401  (the plan of the norm's kernels; the row kernel has one tile)

ROWS, COLS = 16, 128  # a tile of the row kernel; not timed on a GPU yet


def refuses(
    x, weight, bias, norm_weight, norm_bias, position, position_index, into, index, parts, norm, eps,
    norm_offset, shuffle, dtype,
) -> str | None:  # fmt: skip
    if (reason := _refuse.common(x, dtype, weight=weight, position=position, into=into)) is not None:
        return reason
    if 0 in weight.shape:
        return f"zero channels: weight {tuple(weight.shape)}"
    return _norm.refuses(x, norm, shuffle)


def declines(
    x, weight, bias, norm_weight, norm_bias, position, position_index, into, index, parts, norm, eps,
    norm_offset, shuffle, dtype,
) -> str | None:  # fmt: skip
    # a position that is not gathered is one pass in plain PyTorch too
    fused = norm != "none" or into is not None or position_index is not None
    return None if fused else "without a norm, gathered positions or a text sequence there is nothing to fuse"


def forward(
    x, weight, bias, norm_weight, norm_bias, position, position_index, into, index, parts, norm, eps,
    norm_offset, shuffle, dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (..., N), or `into` with y's rows; stats (rows, 2) with a norm."""
    out_dtype, N = dtype or x.dtype, weight.shape[0]
    xn, stats = _norm.normed(x, norm_weight, norm_bias, norm, eps, shuffle, out_dtype, offset=norm_offset)
    xn = xn.reshape(-1, weight.shape[1])
    y = F.linear(xn, weight.to(out_dtype), None if bias is None else bias.to(out_dtype))
    lead = (x.shape[0], _per_image(x, shuffle)) if shuffle > 1 else tuple(x.shape[:-1])
    places = None if position is None else (position, position_index, _per_image(x, shuffle))
    if into is not None:
        base = _flat(into, N)
        out = torch.empty(into.shape, dtype=into.dtype, device=into.device)
        _rows(out.view(-1, N), y, _inverse(index, base.shape[0]), base, places)
        return out, stats
    if places is not None:
        _rows(y, y, None, None, places)
    return y.view(*lead, N), stats


def backward(dy, saved, needs, norm, eps, norm_offset, shuffle, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    x, weight, bias, norm_weight, norm_bias, position, position_index, index = (saved[n] for n in (
        "x", "weight", "bias", "norm_weight", "norm_bias", "position", "position_index", "index"))  # fmt: skip
    out_dtype, N = dtype or x.dtype, weight.shape[0]
    grads: dict[str, Tensor] = {}
    dy2 = dy.reshape(-1, N) if index is None else _flat(dy, N)
    if needs["into"]:
        grads["into"] = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device)
        _rows(grads["into"].view(-1, N), None, _inverse(index, dy2.shape[0]), dy2, None)
    if not any(need for name, need in needs.items() if name != "into"):
        return grads
    if index is not None:
        taken = torch.empty((index.numel(), N), dtype=out_dtype, device=dy.device)
        _rows(taken, dy2, index.reshape(-1), None, None)
        dy2 = taken
    dy2 = dy2.to(out_dtype)
    if needs["position"]:
        grads["position"] = _position_grad(dy2, position, position_index, _per_image(x, shuffle))
    if needs["bias"]:
        grads["bias"] = dy2.sum(0, dtype=torch.float32).to(bias.dtype)
    if needs["weight"]:
        xn, _ = _norm.normed(x, norm_weight, norm_bias, norm, eps, shuffle, out_dtype, offset=norm_offset)
        grads["weight"] = (dy2.t() @ xn.reshape(-1, weight.shape[1])).to(weight.dtype)
    if needs["x"] or needs["norm_weight"] or needs["norm_bias"]:
        dxn = dy2 @ weight.to(out_dtype)
        grads |= _norm.norm_backward(
            dxn, x, norm_weight, norm_bias, saved["stats"], norm, shuffle, needs, offset=norm_offset
        )
    return grads


# -- launches ------------------------------------------------------------------------------------------------------


def _per_image(x: Tensor, shuffle: int) -> int:
    """n of y (..., n, N)."""
    if shuffle > 1:
        return x.shape[1] * x.shape[2] // (shuffle * shuffle)
    return x.shape[-2] if x.dim() > 1 else 1


def _flat(t: Tensor, columns: int) -> Tensor:
    """(..., N) as (rows, N) with contiguous columns; a view where there is one."""
    t = t.reshape(-1, columns)
    return t if t.stride(1) == 1 or columns == 1 else t.contiguous()


def _inverse(index: Tensor, length: int) -> Tensor:
    """(L,): which row of y comes to row l of the sequence, -1 for none. An index outside is ATen's device assertion."""
    index = index.reshape(-1)
    inverse = torch.full((length,), -1, dtype=torch.int64, device=index.device)
    return inverse.index_copy_(0, index, torch.arange(index.numel(), device=index.device))


def _position_grad(dy: Tensor, position: Tensor, position_index: Tensor | None, per_image: int) -> Tensor:
    """(P, N): the sum of dy's rows at each position, in a fixed order; unused positions get 0."""
    P, N = position.shape
    if position_index is not None:
        # sorts and adds segments in float32, neither with atomics nor with a stop of the device
        index = position_index.reshape(-1)
        return torch.ops.aten.embedding_dense_backward(dy, index, P, -1, False).to(position.dtype)
    if dy.shape[0] == 0:
        return torch.zeros_like(position, memory_format=torch.contiguous_format)
    total = dy.view(-1, per_image, N).sum(0, dtype=torch.float32).to(position.dtype)
    return total if per_image == P else F.pad(total, (0, 0, 0, P - per_image))


def _rows(out: Tensor, source: Tensor | None, rows: Tensor | None, base: Tensor | None, places: tuple | None) -> None:
    """Fill out (R, N): row r is source[rows[r]] plus its position, or where that is no row of source base[r]."""
    R, N = out.shape
    if R == 0:
        return
    position, position_index, per_image = places or (None, None, 1)
    position = None if position is None else _flat(position, N)
    index = None if position_index is None else position_index.reshape(-1)
    count = rows.numel() if source is None else source.shape[0]
    linear_projector_rows_kernel[(triton.cdiv(R, ROWS), triton.cdiv(N, COLS))](
        out, source, rows, base, position, index, R, count, N, max(1, per_image),
        0 if position is None else position.shape[0], 0 if source is None else source.stride(0),
        0 if base is None else base.stride(0), 0 if position is None else position.stride(0),
        HAS_SOURCE=source is not None, HAS_ROWS=rows is not None, HAS_BASE=base is not None,
        HAS_POSITION=position is not None, HAS_INDEX=index is not None, BLOCK_T=ROWS, BLOCK_N=COLS, num_warps=4,
    )  # fmt: skip


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def linear_projector_rows_kernel(
    out_ptr, source_ptr, rows_ptr, base_ptr, position_ptr, index_ptr, R, S, N, per_image, P,
    stride_s, stride_b, stride_p,
    HAS_SOURCE: tl.constexpr, HAS_ROWS: tl.constexpr, HAS_BASE: tl.constexpr, HAS_POSITION: tl.constexpr,
    HAS_INDEX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[r] = source[s] + position[p(s)], s = rows[r]; where s is no row of source base[r], else 0"""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_t = offs_t < R
    mask_n = (offs_n < N)[None, :]
    s = offs_t
    if HAS_ROWS:
        s = tl.load(rows_ptr + offs_t, mask_t, -1)
    found = mask_t & (s >= 0) & (s < S)
    value = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    if HAS_SOURCE:
        here = found[:, None] & mask_n
        value = tl.load(source_ptr + s[:, None] * stride_s + offs_n[None, :], here, 0.0).to(tl.float32)
    if HAS_POSITION:
        p = s % per_image
        if HAS_INDEX:
            p = tl.load(index_ptr + s, found, 0)
        here = (found & (p >= 0) & (p < P))[:, None] & mask_n
        value += tl.load(position_ptr + p[:, None] * stride_p + offs_n[None, :], here, 0.0).to(tl.float32)
    if HAS_BASE:
        stays = (mask_t & (s < 0))[:, None] & mask_n
        base = tl.load(base_ptr + offs_t[:, None] * stride_b + offs_n[None, :], stays, 0.0).to(tl.float32)
        value = tl.where(stays, base, value)
    here = mask_t[:, None] & mask_n
    tl.store(out_ptr + offs_t[:, None] * N + offs_n[None, :], _tl.cast(value, out_ptr.dtype.element_ty), here)

"""mlp_projector with the first product and GELU in one compiled kernel (csrc/two_source, sm_90a), else as triton.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _two_source
from . import triton as passes

SOURCES = "two_source"  # below csrc


def refuses(
    x, w1, w2, b1, b2, norm_weight, norm_bias, wg, scale, row_mask, act, gated, norm, norm_act, eps, shuffle, merge,
    level, residual, dtype,
) -> str | None:  # fmt: skip
    if not x.is_cuda:
        return f"x is on {x.device.type}; compiled kernels run on CUDA devices"
    return _two_source.missing(x.device.index) or does_not_fit(
        x, w1, w2, b1, b2, norm_weight, norm_bias, wg, scale, row_mask, act, gated, norm, norm_act, eps, shuffle, merge,
        level, residual, dtype,
    )  # fmt: skip


def does_not_fit(
    x, w1, w2, b1, b2, norm_weight, norm_bias, wg, scale, row_mask, act, gated, norm, norm_act, eps, shuffle, merge,
    level, residual, dtype,
) -> str | None:  # fmt: skip
    """Why the kernels cannot take these arguments, on whatever device, or None."""
    if act != "gelu" or gated or wg is not None:
        gate = ", with a gate" if gated or wg is not None else ""
        return f"act is {act!r}{gate}; the compiled epilogue is plain gelu"
    if scale is not None or row_mask is not None:
        return "with a scale or a row mask; the compiled epilogue has none"
    compute = dtype or x.dtype
    if compute not in _two_source.DTYPES:
        return f"computing in {compute}; the compiled product takes bfloat16 and float16"
    if w1.shape[1] % 8:
        return f"w1 has {w1.shape[1]} columns; bulk copies take multiples of 8"
    # what is converted, normalised or shuffled first lies in memory of torch's own
    given = {"w1": w1} if w1.dtype == compute else {}
    if x.dtype == compute and norm == "none" and shuffle == 1 and (rows := _rows(x, w1.shape[1])) is not None:
        given["x"] = rows
    if given and (reason := _two_source.refuses(**given)) is not None:
        return reason
    return passes.refuses(
        x, w1, w2, b1, b2, norm_weight, norm_bias, wg, scale, row_mask, act, gated, norm, norm_act, eps, shuffle, merge,
        level, residual, dtype,
    )  # fmt: skip


def declines(*values) -> str | None:
    return "no measurement shows it ahead of cuBLAS and Triton yet; backend='cuda' forces it"


def forward(*values) -> tuple[Tensor, Tensor, Tensor]:
    return passes.forward(*values, first_and_act=_first_and_act)


backward = passes.backward


def _rows(x: Tensor, columns: int) -> Tensor | None:
    """x (T, columns) where that is a view of it."""
    try:
        return x.view(-1, columns)
    except RuntimeError:
        return None


def _first_and_act(x: Tensor, w1: Tensor, b1: Tensor | None, act: str, keep_pre: bool) -> tuple[Tensor, Tensor]:
    """pre = x W1ᵀ + b1 (T, F), empty unless it is kept, and h = gelu(pre), in x's dtype."""
    w1 = w1.to(x.dtype, memory_format=torch.contiguous_format) if w1.dtype != x.dtype else w1
    b1 = None if b1 is None else b1.to(x.dtype).contiguous()
    shape = (x.shape[0], w1.shape[0])
    pre, h = x.new_empty(shape if keep_pre else 0), x.new_empty(shape)
    if h.numel():
        _two_source.linear_act(x, w1, b1, act, out=h, pre=pre if keep_pre else None)
    return pre, h

"""Depthwise convolution and pooling of token-major maps in plain PyTorch, and what their ops check alike.

A map of h x w tokens is (B, h w, C), row by row, as vision towers give it; no channels-first copy is made.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _check

ACTS = {
    "none": lambda t: t,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "relu": F.relu,
}


def out_side(side: int, stride: int) -> int:
    """Rows, or columns, after a 3 x 3 convolution with padding 1: an odd side rounds up."""
    return (side + stride - 1) // stride


def channels_first(x: Tensor, h: int, w: int) -> Tensor:
    """(B, h w, C) as a (B, C, h, w) view."""
    return x.unflatten(1, (h, w)).permute(0, 3, 1, 2)


def tokens(x: Tensor) -> Tensor:
    """(B, C, h, w) as (B, h w, C)."""
    return x.permute(0, 2, 3, 1).flatten(1, 2).contiguous()


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, h: int, w: int, stride: int = 1) -> Tensor:
    """3 x 3 with padding 1, a filter of its own for each channel: (B, h w, C) -> (B, h' w', C)."""
    image = channels_first(x, h, w)
    return tokens(F.conv2d(image, weight, bias, stride=stride, padding=1, groups=x.shape[-1]))


def pooled(x: Tensor, h: int, w: int, out_h: int, out_w: int) -> Tensor:
    """torch's adaptive average pooling: cell i averages rows floor(i h / h') to ceil((i + 1) h / h') - 1."""
    return tokens(F.adaptive_avg_pool2d(channels_first(x, h, w), (out_h, out_w)))


def cell_counts(side: int, out: int) -> list[tuple[int, int]]:
    """(first, count) of the rows that each of `out` pooled rows averages."""
    ends = [(i * side // out, -((-(i + 1) * side) // out)) for i in range(out)]
    return [(first, end - first) for first, end in ends]


def cells_over(side: int, out: int) -> int:
    """At most so many pooled rows average the same row."""
    found = [0] * side
    for first, count in cell_counts(side, out):
        for row in range(first, first + count):
            found[row] += 1
    return max(found)


def check_grid(x: Tensor, h: int, w: int) -> None:
    """x is a map of h x w tokens, or an error."""
    if h < 1 or w < 1:
        raise ValueError(f"h is {h}, w is {w}; accepted: 1 or more each")
    if x.dim() != 3 or x.shape[1] != h * w or x.shape[2] == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; accepted: (B, h w, C) with h w = {h} x {w} = {h * w} tokens, C > 0"
        )


def check_convolution(x: Tensor, weight: Tensor, stride: int, act: str, level: int) -> None:
    """What both ops with a depthwise convolution check alike."""
    C = x.shape[-1]
    if tuple(weight.shape) != (C, 1, 3, 3):
        raise ValueError(
            f"the convolution's weight has shape {tuple(weight.shape)}; accepted: (C, 1, 3, 3) = {(C, 1, 3, 3)}"
        )
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride!r}; accepted: 1, 2")
    if act not in ACTS:
        raise ValueError(f"act is {act!r}; accepted: {', '.join(ACTS)}")
    if level not in (0, 1):
        raise ValueError(f"level is {level!r}; accepted: 0 (keep the convolution's result), 1 (recompute it)")


def check_dtype(dtype: torch.dtype | None, tensors: dict[str, Tensor | None]) -> None:
    if dtype is None:
        _check.same_dtype(" (or pass dtype=, or use autocast)", **tensors)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")

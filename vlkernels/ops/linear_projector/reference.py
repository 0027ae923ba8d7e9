"""linear_projector: [pixel shuffle] -> [norm] -> linear -> [+ position] -> [rows of the text sequence].

The connectors of one layer that have something around it: Idefics3 and SmolVLM (arXiv 2408.12637: shuffle), Gemma 3
(2503.19786: RMSNorm), VL-Adapter, VL-PET and LST (2112.06825: order embedding); the write into the sequence is what
every model does with its image tokens (transformers: masked_scatter). Survey eq. 18.
Dims: T all output rows, n of them an image, C vision width, K = C times the tokens merged into one, N text width, P
positions, L rows of the text sequence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from .._shuffle import check_shuffle_and_norm, normalised, shuffled


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    position: Tensor | None = None,
    position_index: Tensor | None = None,
    into: Tensor | None = None,
    index: Tensor | None = None,
    parts: list[Tensor] = (),
    norm: str = "none",
    eps: float = 1e-5,
    norm_offset: float = 0.0,
    shuffle: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y = norm(shuffle(x)) Wᵀ + bias + position[p]; with `into` a copy of it whose rows `index` are those of y.

    Args:
        x: (..., C); with shuffle s > 1 (B, h, w, C), both sides multiples of s.
        weight: (N, K), K = C s², any strides (Gemma 3 stores its transpose). bias: (N,).
        norm_weight, norm_bias: (C s²); RMSNorm has no bias.
        position: (P, N), a table added to y: row t of each image gets row t, for y (..., n, N) with n <= P.
        position_index: int64 with T elements, which row of `position` each row of y gets instead; they may repeat.
        into: (..., N) with any number of rows, the text embeddings. The result has its shape and dtype; it is not
            written to.
        index: int64 with T elements, the rows of `into` (its leading dimensions flattened) that y's rows replace, in
            y's order. All distinct, 0 <= index < L.
        parts: the tensors whose concatenation `weight` is: kept for backward in its place, without a gradient.
        norm: "none", "layer" (biased variance) or "rms", over the channels after the shuffle.
        eps: added to the variance, or the mean square.
        norm_offset: added to norm_weight (Gemma's RMSNorm: 1).
        shuffle: s; each s x s neighbourhood becomes one token with channels in the order (row, column, channel).
        dtype: compute everything in this dtype; autocast sets it. The norm's statistics are float32 in any case.

    Index values are not looked at, for on a GPU that would wait for the device: a row outside of `into` is index_copy's
    IndexError or device-side assertion, and of equal rows any one stays. modules.LinearProjector checks them on a CPU.

    Returns: y (..., N), or (B, h w / s², N) with a shuffle, in `dtype`, else in x's dtype; with `into` as described.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    if dtype is not None:
        x, weight, bias, norm_weight, norm_bias, position = (
            t if t is None else t.to(dtype) for t in (x, weight, bias, norm_weight, norm_bias, position)
        )
    y = F.linear(normalised(shuffled(x, shuffle), norm, norm_weight, norm_bias, eps, norm_offset), weight, bias)
    if position_index is not None:
        y = y + F.embedding(position_index.reshape(y.shape[:-1]), position)
    elif position is not None:
        y = y + position[: y.shape[-2]]
    if into is None:
        return y
    rows = y.reshape(-1, weight.shape[0]).to(into.dtype)
    return into.flatten(0, -2).index_copy(0, index.flatten(), rows).view(into.shape)


def residuals(
    x, weight, bias, norm_weight, norm_bias, position, position_index, into, index, parts, norm, eps,
    norm_offset, shuffle, dtype,
) -> tuple[Tensor]:  # fmt: skip
    """What a kernel's forward saves besides arguments: the norm's (mean, rstd)."""
    rows = x.numel() // (x.shape[-1] * shuffle * shuffle)
    return (x.new_empty((rows, 2) if norm != "none" else (0,), dtype=torch.float32),)


def check(
    x, weight, bias, norm_weight, norm_bias, position, position_index, into, index, parts, norm, eps,
    norm_offset, shuffle, dtype,
) -> tuple:  # fmt: skip
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"x": x, "weight": weight, "bias": bias, "norm_weight": norm_weight, "norm_bias": norm_bias}
    tensors |= {"position": position}
    _check.floating(**tensors, into=into)
    _check.same_device(**tensors, into=into)
    if shuffle < 1:
        raise ValueError(f"shuffle is {shuffle}; accepted: 1 or more")
    if x.dim() < 1 or weight.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; accepted: x (..., C), weight (N, K)"
        )
    channels = check_shuffle_and_norm(x, shuffle, norm, norm_weight, norm_bias)
    N = weight.shape[0]
    if weight.shape[1] != channels:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; accepted for x {tuple(x.shape)}: {channels} columns")
    _check.shape("bias", bias, (N,), "(N,)")
    if norm_offset and norm_weight is None:
        raise ValueError(f"norm_offset is {norm_offset}; accepted: 0 without a norm_weight")
    rows = x.numel() // channels if channels else 0
    _check_position(x, position, position_index, rows, shuffle * shuffle, N)
    if into is not None and (into.dim() < 2 or into.shape[-1] != N):
        raise ValueError(f"into has shape {tuple(into.shape)}; accepted: (..., N) with N = {N}, 2 axes at least")
    if (into is None) != (index is None):
        raise ValueError("into and index belong together; accepted: both or neither")
    if index is not None:
        _check_rows("index", index, x, rows)
    if dtype is None:
        _check.same_dtype(" (or pass dtype=, or use autocast)", **tensors)
    elif dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    return (
        x, weight, bias, norm_weight, norm_bias, position, position_index, into, index, parts, norm, float(eps),
        float(norm_offset), shuffle, dtype,
    )  # fmt: skip


def _check_position(x, position, position_index, rows: int, merged: int, N: int) -> None:
    if position is None:
        if position_index is not None:
            raise ValueError("position_index is given without position; accepted: both, or position alone")
        return
    if position.dim() != 2 or position.shape[1] != N:
        raise ValueError(f"position has shape {tuple(position.shape)}; accepted: (P, N) with N = {N}")
    if position_index is not None:
        _check_rows("position_index", position_index, x, rows)
        return
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted with a position and no position_index: (..., n, C)")
    per_image = x.shape[1] * x.shape[2] // merged if merged > 1 else x.shape[-2]
    if rows and position.shape[0] < per_image:
        raise ValueError(f"position has {position.shape[0]} rows; accepted: {per_image} or more")


def _check_rows(name: str, index: Tensor, x: Tensor, count: int) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(index).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {index.dtype}; accepted: int64")
    if index.device != x.device:
        raise ValueError(f"{name} is on {index.device}, x on {x.device}; all tensors must be on one device")
    if index.numel() != count:
        raise ValueError(f"{name} has {index.numel()} elements; accepted: {count}, one for each row of y")


def draw(*values) -> tuple:
    """Nothing is random here. A shuffle without a norm is done before the operator: what it keeps for backward is then
    the tokens, as in plain PyTorch, and not x, from which they would be copied once more."""
    x, *between, norm, eps, norm_offset, shuffle, dtype = values
    if shuffle == 1 or norm != "none":
        return values
    return shuffled(x if dtype is None else x.to(dtype), shuffle), *between, norm, eps, norm_offset, 1, dtype

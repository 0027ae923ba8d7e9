"""Norm and linears as one op where the children are plain, else through the children."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._shuffle import ACTS
from ..ops.linear_projector import linear_projector
from ..ops.mlp_projector import mlp_projector
from ._children import child_problem


def plain(
    *children: nn.Module | None,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm),
    bias: bool | None = None,
) -> bool:
    """The ops may read the children's parameters themselves: each is None or one of `kinds` and no more than that.

    bias: whether all linears must have a bias, or none; None: each as it likes.
    """
    return all(
        child is None
        or (
            child_problem("child", child, kinds) is None
            and (bias is None or type(child) is not nn.Linear or (child.bias is not None) == bias)
        )
        for child in children
    )


def fusable(*children: nn.Module | None, bias: bool = False) -> bool:
    """`plain` of linears and norms, RMSNorms among them, where the linears have a bias or, as most, none."""
    return plain(*children, kinds=(nn.Linear, nn.LayerNorm, nn.RMSNorm), bias=bias)


class GatedLinears(nn.Module):
    """The children of a gated feed-forward, named as transformers names them: gate_proj, up_proj, down_proj."""

    def __init__(self, width: int, inner: int, **made):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False, **made)
        self.up_proj = nn.Linear(width, inner, bias=False, **made)
        self.down_proj = nn.Linear(inner, width, bias=False, **made)


def norm_options(norm: nn.LayerNorm | nn.RMSNorm | None, weight: str = "norm_weight", bias: str = "norm_bias") -> dict:
    """The arguments of an op that does the norm itself, its scale and shift under the names that the op gives them."""
    if norm is None:
        return {"norm": "none"}
    kind = "layer" if isinstance(norm, nn.LayerNorm) else "rms"
    return {"norm": kind, "eps": norm.eps, weight: norm.weight, bias: getattr(norm, "bias", None)}


def as_bool(
    name: str, mask: Tensor | None, shape: Sequence[int], *, axes: int = 0, floats: bool = False
) -> Tensor | None:
    """The mask as bool, nonzero = visible; its first axis may be 1 where all axes are asked for.

    shape: what it must have. axes: it may also have only the first of these axes, that many at least (0: all of them).
    floats: whether a float mask of zeros and ones is one, too.
    """
    if mask is None:
        return None
    wanted = tuple(shape[: mask.dim()])
    fits = (axes or len(shape)) <= mask.dim() <= len(shape) and tuple(mask.shape[1:]) == wanted[1:]
    fits = fits and (mask.shape[0] == wanted[0] or (mask.shape[0] == 1 and not axes))
    if not fits or (mask.is_floating_point() and not floats):
        kinds = "bool, integers or floats" if floats else "bool or integers"
        less = " or the first axes of it" if axes else ""
        raise ValueError(
            f"{name} is {mask.dtype} {tuple(mask.shape)}; accepted: {kinds} {tuple(shape)}{less}, nonzero = visible"
        )
    return mask if mask.dtype == torch.bool else mask != 0


def projections(
    x: Tensor, norm: nn.Module, linears: Sequence[nn.Module], shifts: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """linear(norm(x) + shift) for each of linears: one product where all children are plain.

    x (..., n, C). shifts: for each linear (n, C) or None, constants of the position in n; with plain children they go
    through the weight once for all images, (norm(x) + e) Wᵀ = norm(x) Wᵀ + e Wᵀ.
    """
    shifts = [None] * len(linears) if shifts is None else shifts
    if not plain(norm, *linears):
        n = norm(x)
        return [linear(n if e is None else n + e) for linear, e in zip(linears, shifts, strict=True)]
    return packed_projection(
        x, norm, [m.weight for m in linears], [m.bias for m in linears] if linears[0].bias is not None else None, shifts
    )


def packed_projection(
    x: Tensor,
    norm: nn.LayerNorm,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    shifts: Sequence[Tensor | None] | None = None,
    index: Tensor | None = None,
) -> list[Tensor]:
    """(norm(x) + shift) Wᵀ + b for each weight, in one product. index: which row of the shifts each row of x gets."""
    position = None
    if shifts is not None and any(e is not None for e in shifts):
        moved = [None if e is None else F.linear(e, w) for e, w in zip(shifts, weights, strict=True)]
        like = next(t for t in moved if t is not None)
        full = [
            like.new_zeros(like.shape[0], w.shape[0]) if t is None else t for t, w in zip(moved, weights, strict=True)
        ]
        position = torch.cat(full, -1)
    weight = torch.cat(list(weights)) if len(weights) > 1 else weights[0]
    bias = biases if biases is None or len(biases) > 1 else biases[0]
    y = linear_projector(
        x, weight, torch.cat(list(bias)) if isinstance(bias, Sequence) else bias, position=position,
        position_index=index, parts=list(weights) if len(weights) > 1 else (), **norm_options(norm),
    )  # fmt: skip
    return list(y.split([w.shape[0] for w in weights], -1))


def residual_mlp(x: Tensor, norm: nn.Module, first: nn.Module, second: nn.Module, act: str, level: int) -> Tensor:
    """x + second(act(first(norm(x))))"""
    if not plain(norm, first, second):
        return x + second(ACTS[act](first(norm(x))))
    return mlp_projector(
        x, first.weight, second.weight, first.bias, second.bias, act=act, level=level, residual=True,
        **norm_options(norm),
    )  # fmt: skip


def check_heads(name: str, width: int, heads: int) -> int:
    """The width of a head."""
    if heads < 1 or width < 1 or width % heads:
        raise ValueError(f"{name} is {width} with {heads} heads; accepted: a multiple of the number of heads")
    return width // heads


def check_level(level: int) -> int:
    if level not in (0, 1):
        raise ValueError(f"level is {level!r}; accepted: 0, 1")
    return level


def check_tokens(name: str, x: Tensor, channels: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 3 or x.shape[-1] != channels:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: (B, N, C) with C = {channels}")

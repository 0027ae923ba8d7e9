"""deformable_attention: each query reads a few places of one or several maps, with weights of its own.

Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159 eq. 3), the sampling of Honeybee's D-Abstractor
(2312.06742): in front of it are a value projection and the two linears that give offsets and logits, behind it the
output projection.
Dims: B batch, M queries, H heads, K head dim, L levels, P points of a level, S positions of all levels together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _check


def forward(
    value: Tensor,
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None = None,
    shapes: list[int] = (),
    softmax: bool = True,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """y[b, q, h] = sum over levels l and points p of a[b, q, h, l, p] * bilinear(value of level l, head h; x, y)

    Args:
        value: (B, S, H, K): the maps' positions, row by row, one level after the other.
        points: (B, M, H, L, P, 2), (x, y). With `reference` offsets in positions of the level, x = reference_x w_l +
            offset_x - 0.5, which is reference + offset / (w_l, h_l) in [0, 1] units; without it locations in [0, 1]
            units, x = location_x w_l - 0.5. Position (0, 0) of a map has its centre at x = y = 0.
        weights: (B, M, H, L, P): logits, of which a is the softmax over L and P, or with softmax=False a itself.
        reference: (B or 1, M, L or 1, 2), (x, y) in [0, 1] units, or None.
        shapes: (h, w) of each level, as pairs or one number after the other; ints of the host, so that no device is
            waited for.
        dtype: of y; autocast sets it. Each tensor may be in any floating dtype.

    bilinear is grid_sample's with padding_mode="zeros", align_corners=False: the four positions around (x, y), those
    outside of the map count as zero. Between positions y is smooth; where x or y is a whole number the gradient is that
    of the cell to the right and below. A location that is NaN or infinite gives NaN, as grid_sample gives on a CPU, and
    no gradient to any value. Coordinates, softmax and sums are float32 at least, also in 16 bits: a location in bf16
    would be up to a tenth of a position off on a map of 24.

    Returns: y (B, M, H, K), in `dtype`, else in value's dtype.

    Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
    """
    wide = torch.promote_types(value.dtype, torch.float32)
    a = weights.to(wide)
    if softmax:
        a = a.flatten(-2).softmax(-1).view(weights.shape)
    y: Tensor | None = None
    first = 0
    for level in range(weights.shape[3]):
        h, w = shapes[2 * level], shapes[2 * level + 1]
        x0, y0 = points[:, :, :, level].to(wide).unbind(-1)
        if reference is None:
            at_x, at_y = x0 * w - 0.5, y0 * h - 0.5
        else:
            centre = reference[:, :, level if reference.shape[2] > 1 else 0].to(wide)[:, :, None, None]
            at_x, at_y = centre[..., 0] * w + x0 - 0.5, centre[..., 1] * h + y0 - 0.5
        part = _sampled(value[:, first : first + h * w].to(wide), at_x, at_y, a[:, :, :, level], h, w)
        y = part if y is None else y + part
        first += h * w
    return y.to(dtype or value.dtype)


def _sampled(value: Tensor, x: Tensor, y: Tensor, a: Tensor, h: int, w: int) -> Tensor:
    """sum over p of a * bilinear(value; x, y): value (B, h w, H, K); x, y, a (B, M, H, P) -> (B, M, H, K)."""
    B, M, H, P = x.shape
    left, top = x.detach().floor()[..., None], y.detach().floor()[..., None]
    corner = torch.arange(4, device=x.device)
    right, down = corner % 2, corner // 2
    cx, cy = left + right, top + down  # (B, M, H, P, 4)
    inside = (cx >= 0) & (cx < w) & (cy >= 0) & (cy < h)  # False for NaN
    index = torch.where(inside, cy * w + cx, 0).long().transpose(1, 2).reshape(B, H, 4 * M * P, 1)
    maps = value.transpose(1, 2)  # (B, H, h w, K)
    v = maps.gather(2, index.expand(-1, -1, -1, value.shape[3])).unflatten(2, (M, 4 * P)).transpose(1, 2)
    v = torch.where(inside.flatten(3)[..., None], v, 0)
    # 1 - the distance to the corner, along each axis
    along_x = torch.where(right == 1, x[..., None] - left, left + 1 - x[..., None])
    along_y = torch.where(down == 1, y[..., None] - top, top + 1 - y[..., None])
    return ((a[..., None] * along_x * along_y).flatten(3)[..., None] * v).sum(3)


def residuals(value, points, weights, reference, shapes, softmax, dtype) -> tuple[Tensor]:
    """What a kernel's forward saves besides arguments: the softmax's maximum and denominator."""
    return (weights.new_empty((*weights.shape[:3], 2) if softmax else (0,), dtype=torch.float32),)


def check(value, points, weights, reference, shapes, softmax, dtype) -> tuple:
    """The arguments as forward takes them, or an error that names the one that does not fit."""
    tensors = {"value": value, "points": points, "weights": weights, "reference": reference}
    _check.floating(**tensors)
    _check.same_device(**tensors)
    if value.dim() != 4 or value.shape[2] == 0 or value.shape[3] == 0:
        raise ValueError(f"value has shape {tuple(value.shape)}; accepted: (B, S, H, K), H and K > 0")
    B, S, H, _ = value.shape
    if weights.dim() != 5 or weights.shape[0] != B or weights.shape[2] != H or 0 in weights.shape[3:]:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}; accepted: (B, M, H, L, P) with B = {B}, H = {H}, L and P > 0"
        )
    _check.shape("points", points, (*weights.shape, 2), "(B, M, H, L, P, 2)")
    M, L = weights.shape[1], weights.shape[3]
    if reference is not None and (
        reference.dim() != 4
        or reference.shape[0] not in (1, B)
        or reference.shape[1] != M
        or reference.shape[2] not in (1, L)
        or reference.shape[3] != 2
    ):
        raise ValueError(
            f"reference has shape {tuple(reference.shape)}; accepted: (B or 1, M, L or 1, 2) with B = {B}, M = {M}, "
            f"L = {L}"
        )
    shapes = _flat(shapes)
    if len(shapes) != 2 * L:
        raise ValueError(f"shapes holds {len(shapes)} numbers; accepted: (h, w) of each of the {L} levels of weights")
    if any(size < 1 for size in shapes):
        raise ValueError(f"shapes is {shapes}; accepted: heights and widths of 1 or more")
    area = sum(h * w for h, w in zip(shapes[::2], shapes[1::2], strict=True))
    if area != S:
        raise ValueError(f"shapes is {shapes}, {area} positions; value has {S}")
    if dtype is not None and dtype not in _check.FLOATS:
        raise TypeError(f"dtype is {dtype}; accepted: float16, bfloat16, float32, float64")
    return value, points, weights, reference, shapes, bool(softmax), dtype


def _flat(shapes) -> list[int]:
    """(h, w) of each level, one number after the other."""
    if isinstance(shapes, Tensor):
        raise TypeError(
            "shapes is a torch.Tensor; accepted: ints of the host, as pairs (h, w) or one after the other "
            "(reading a tensor would wait for its device)"
        )
    flat: list[int] = []
    for item in shapes:
        if isinstance(item, Sequence):
            if len(item) != 2:
                raise ValueError(f"shapes is {shapes}; accepted: pairs (h, w), or numbers one after the other")
            flat.extend(item)
        else:
            flat.append(item)
    if any(isinstance(size, (bool, float, Tensor)) for size in flat):
        raise TypeError(f"shapes is {shapes}; accepted: ints")
    return flat


def draw(*values) -> tuple:
    """Nothing is random here."""
    return values

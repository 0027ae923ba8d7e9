"""deformable_attention beside plain PyTorch as models run it where no CUDA extension is built: torch's grid_sample on
each level, whose samples are stacked and weighted."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkernels.testing.case import Case, Precision

from . import Instance, Provider, Unavailable, compiled, plain

BASELINE = "eager"


def equation(
    value: Tensor, points: Tensor, weights: Tensor, shapes, softmax: bool, reference: Tensor | None = None
) -> Tensor:
    """The op's equation with grid_sample. value (B, S, H, K) -> (B, M, H, K)."""
    (B, _, H, K), (M, L, P) = value.shape, (weights.shape[1], *weights.shape[3:])
    sizes = [(shapes[2 * level], shapes[2 * level + 1]) for level in range(L)]
    # grid_sample wants its two arguments in one dtype; a grid in 16 bits would be up to a tenth of a position off, so
    # that upstream computes in float32 too
    wide = torch.promote_types(value.dtype, torch.float32)
    if softmax:
        weights = weights.flatten(3).softmax(-1).view(weights.shape)
    points = points.to(wide)
    if reference is not None:
        normaliser = torch.tensor([[w, h] for h, w in sizes], dtype=wide, device=points.device)
        points = reference[:, :, None, :, None] + points / normaliser[:, None]
    grid = 2 * points - 1
    samples = []
    for level, part in enumerate(value.split([h * w for h, w in sizes], 1)):
        maps = part.permute(0, 2, 3, 1).reshape(B * H, K, *sizes[level])
        at = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)
        sample = F.grid_sample(maps.to(wide), at, padding_mode="zeros", align_corners=False)
        samples.append(sample.to(value.dtype))
    shares = weights.transpose(1, 2).reshape(B * H, 1, M, L * P)
    y = (torch.stack(samples, -2).flatten(-2) * shares).sum(-1)
    return y.view(B, H, K, M).permute(0, 3, 1, 2).contiguous()


PROVIDERS = (
    Provider("eager", plain(equation)),
    Provider("compile", plain(compiled(equation))),
)


def _mmcv(case: Case, kw: dict, precision: Precision) -> Instance:
    """Deformable DETR's CUDA kernel as mmcv builds it, whose backward adds with atomics."""
    try:
        from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
    except (ImportError, RuntimeError) as error:
        raise Unavailable(f"mmcv with its compiled operators is not importable: {error}") from None

    def run(value, points, weights, shapes, softmax, reference=None) -> Tensor:
        grids = torch.tensor(shapes, device=value.device).view(-1, 2)
        first = grids.prod(1).cumsum(0) - grids.prod(1)
        if softmax:
            weights = weights.flatten(3).softmax(-1).view(weights.shape)
        if reference is not None:
            points = reference[:, :, None, :, None] + points / grids.flip(1)[:, None]
        points, weights = points.to(value.dtype), weights.to(value.dtype)
        y = MultiScaleDeformableAttnFunction.apply(value, grids, first, points, weights, math.gcd(64, len(value)))
        return y.unflatten(-1, (value.shape[2], -1))

    return plain(run)(case, kw, precision)


PEERS = (Provider("mmcv", _mmcv, "peer"),)

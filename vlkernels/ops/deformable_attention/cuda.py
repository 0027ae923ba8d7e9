"""deformable_attention compiled: a block keeps one head's map of one image in shared memory, or a slab of its channels.

The corners of all samples are read there. The gradient of value is summed there too, each row of the map by one warp in
the order of the queries, without atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _compiled, _refuse
from .._device import arch, multiprocessors
from . import triton as tiled

# as csrc/deformable_attention: threads' points and sums beside the map, and what one block's sums hold
_STAGED, _BATCH, _SUMS = 16 * 32 * 16, 512 * 16, 16 * 1024
MAX_LEVELS, MAX_POINTS = 8, 32


def refuses(value, points, weights, reference, shapes, softmax, dtype) -> str | None:
    if not value.is_cuda:
        return f"value is on {value.device.type}; compiled kernels run on CUDA devices"
    if (reason := _compiled.missing("deformable_attention", value.device.index)) is not None:
        return reason
    return unfit(value, points, weights, reference, dtype, _compiled.shared_limit(arch(value)))


def unfit(value, points, weights, reference, dtype, limit: int) -> str | None:
    """Why the kernels cannot take these arguments on a device with `limit` bytes of shared memory a block."""
    tensors = {"value": value, "points": points, "weights": weights, "reference": reference}
    for name, t in tensors.items():
        if t is not None and t.dtype not in _refuse.KERNEL_DTYPES:
            return f"{name} is {t.dtype}; kernels take float32, bfloat16, float16"
    if dtype is not None and dtype != value.dtype:
        return f"y would be {dtype}, value is {value.dtype}; the compiled kernel gives value's dtype"
    L, P = weights.shape[3:]
    if L > MAX_LEVELS or L * P > MAX_POINTS:
        return f"{L} levels of {P} points; the compiled kernel takes 8 levels and 32 points of all levels"
    # a slab of 32 channels is the narrowest; its gradient is summed in float32
    S, e = value.shape[1], value.element_size()
    needed = max(32 * S * e + _STAGED + _SUMS, 32 * S * 4 + _BATCH)
    if needed > limit:
        return f"a map of {S} positions takes {needed} bytes of shared memory, a block has {limit}"
    return None


def declines(value, points, weights, reference, shapes, softmax, dtype) -> str | None:
    return "not measured on a GPU yet; backend='cuda' forces it"


def chunks(images: int, heads: int, queries: int, points: int, capability: int) -> int:
    """Blocks that share one head's queries: as many as fill the device, of 16 queries each at least, for each reads the
    head's whole map; and so many that the sums of a block's points (12 bytes each) fit."""
    fill = multiprocessors(capability) // max(1, images * heads)
    most = max(1, queries // 16)
    needed = -(-queries // (_SUMS // (12 * points)))
    return max(1, needed, min(fill, most))


def forward(value, points, weights, reference, shapes, softmax, dtype) -> tuple[Tensor, Tensor]:
    """y (B, M, H, K); stats (B, M, H, 2): the softmax's maximum and denominator."""
    return run_forward(torch.ops.vlkernels_cuda, value, points, weights, reference, shapes, softmax)


def backward(dy, saved, needs, shapes, softmax, dtype) -> dict[str, Tensor]:
    """Gradients by argument name for those that are needed."""
    return run_backward(torch.ops.vlkernels_cuda, dy, saved, needs, shapes, softmax)


def run_forward(ops, value, points, weights, reference, shapes, softmax) -> tuple[Tensor, Tensor]:
    """The forward on the operators of one library."""
    (B, _, H, K), (M, L, P) = value.shape, (weights.shape[1], *weights.shape[3:])
    y = torch.empty((B, M, H, K), dtype=value.dtype, device=value.device)
    stats = torch.empty((B, M, H, 2) if softmax else (0,), dtype=torch.float32, device=value.device)
    if y.numel():
        value, points, weights, reference = tiled.laid_out(value, points, weights, reference)
        capability = arch(value)
        ops.deformable_attention_fwd(
            value, points, weights, reference, shapes, softmax, chunks(B, H, M, L * P, capability),
            _compiled.shared_limit(capability), y, stats,
        )  # fmt: skip
    return y, stats


def run_backward(ops, dy, saved, needs, shapes, softmax) -> dict[str, Tensor]:
    """The backward on the operators of one library."""
    value, points, weights, reference, stats = (saved[n] for n in ("value", "points", "weights", "reference", "stats"))
    (B, M, H), (L, P) = dy.shape[:3], weights.shape[3:]
    empty = {
        n: torch.empty(saved[n].shape, dtype=saved[n].dtype, device=dy.device) for n, need in needs.items() if need
    }
    if dy.numel() == 0:
        return {n: grad.zero_() for n, grad in empty.items()}
    dy = dy if dy.stride(3) == 1 else dy.contiguous()
    value, points, weights, reference = tiled.laid_out(value, points, weights, reference)
    capability = arch(dy)
    limit, parts = _compiled.shared_limit(capability), None
    if needs["reference"]:
        parts = torch.empty((B, M, H, reference.shape[2], 2), dtype=torch.float32, device=dy.device)
    if needs["points"] or needs["weights"] or needs["reference"]:
        dpoints, dweights = (
            empty[n] if n in empty else torch.empty(t.shape, dtype=t.dtype, device=dy.device)
            for n, t in (("points", points), ("weights", weights))
        )
        ops.deformable_attention_bwd_points(
            dy, value, points, weights, reference, stats, shapes, softmax, chunks(B, H, M, L * P, capability), limit,
            dpoints, dweights, parts,
        )  # fmt: skip
    if parts is not None:
        empty["reference"] = tiled.summed(parts, reference)
    if needs["value"]:
        ops.deformable_attention_bwd_value(
            dy, points, weights, reference, stats, shapes, softmax, limit, empty["value"]
        )
    return empty

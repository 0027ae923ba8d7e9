"""Bytes that the group plan of the LoRA family moves, for the ops' cases; one dtype throughout, frozen weights.

Tile re-reads served by the cache are left out. Dims: T rows, K input width, N output width, R rank (0: no adapter).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from . import _lora, _nf4, _nf4_triton, _norm
from ._device import arch


@dataclass(frozen=True)
class Shape:
    """One projection of a group."""

    N: int
    R: int
    bias: bool = False
    lora_bias: bool = False
    blocksize: int = 0  # of a weight in 4 bits with nested absmax

    def weight_bytes(self, K: int, e: int) -> int:
        """Of the weight in memory."""
        return packed_bytes(self.N, K, self.blocksize, True) if self.blocksize else e * self.N * K

    def product(self, T: int, K: int, e: int) -> dict[str, int]:
        """x Wᵀ + bias, and dy W."""
        forward = e * (T * K + self.N * K + T * self.N + self.N * self.bias)
        backward = e * (T * self.N + self.N * K + T * K)
        if not self.blocksize:
            return {"forward": forward, "backward": backward}
        packed = self.weight_bytes(K, e)
        dequantise = packed + e * self.N * K
        if _nf4_triton.fused_reason(T, (self.N, K)) is not None:
            # once: backward finds the weight where forward left it
            return {"forward": forward + dequantise, "backward": backward}
        dtype = torch.float32 if e == 4 else torch.bfloat16
        splits = _nf4_triton.config(T, (self.N, K), self.blocksize, dtype, arch(torch.empty(0))).splits
        fused = e * T * K + packed + e * self.N * self.bias + partial(splits, T * self.N, e)
        return {"forward": fused, "backward": backward + dequantise}


def packed_bytes(N: int, K: int, blocksize: int, double: bool) -> int:
    """What is read of a 4-bit weight (N, K): of the nested code what the blocks name."""
    blocks = _nf4.block_count((N, K), blocksize)
    absmax = blocks + 4 * min(blocks, 128) if double else 4 * blocks
    return _nf4.packed_count((N, K)) + 64 + absmax


def partial(splits: int, size: int, itemsize: int) -> int:
    """Writing a result, through float32 partial sums when it has several."""
    return itemsize * size + (8 * splits * size if splits > 1 else 0)


def tiles(T: int, K: int, N: int, R: int, itemsize: int, group: int = 1) -> _lora.Config:
    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    return _lora.config(_lora.Dims(T, K, N, R), dtype, arch(torch.empty(0)), group=group)


def _shared(T: int, K: int, group: list[Shape], e: int) -> _lora.Config | None:
    ranks = [s.R for s in group if s.R]
    return tiles(T, K, group[0].N, max(ranks), e, len(ranks)) if ranks else None


def forward(T: int, K: int, group: list[Shape], e: int, dropout: bool) -> int:
    """The products, one pass over x for all s, one over each adapted y."""
    moved = sum(s.product(T, K, e)["forward"] for s in group)
    shared = _shared(T, K, group, e)
    if shared is None:
        return moved
    low = [s for s in group if s.R]
    moved += e * (T * K + K * sum(s.R for s in low)) + 8 * len(low) * dropout
    moved += sum(partial(shared.down.splits, T * s.R, e) for s in low)
    return moved + sum(e * (T * s.R + s.N * s.R + 2 * T * s.N + s.N * s.lora_bias) for s in low)


def backward(T: int, K: int, group: list[Shape], e: int, dropout: bool, trained_biases: bool = True) -> int:
    """dx of all projections, dA, dB and the biases' sums."""
    shared = _shared(T, K, group, e)
    moved = 0
    for index, s in enumerate(group):
        moved += s.product(T, K, e)["backward"] + e * T * K * (index > 0)
        if trained_biases and (s.bias or s.lora_bias):
            vector = e * s.N
            moved += e * T * s.N + 4 * s.N
            moved += (s.bias + s.lora_bias) * (4 * s.N + vector) + 8 * s.N * s.lora_bias
        if not s.R:
            continue
        own = tiles(T, K, s.N, s.R, e)
        if own.up is not None:
            moved += e * (T * s.N + s.N * s.R + T * s.R)
            moved += partial(triton.cdiv(s.N, own.up.cols), T * s.R, e) + partial(own.up.splits, s.N * s.R, e)
        else:
            moved += e * (T * s.N + s.N * s.R) + partial(own.down_dy.splits, T * s.R, e)
            moved += e * (T * s.N + T * s.R) + partial(own.outer_dy.splits, s.N * s.R, e)
    if shared is None:
        return moved
    low = [s for s in group if s.R]
    ranks = sum(s.R for s in low)
    moved += e * (T * K + T * ranks) + 8 * len(low) * dropout
    moved += sum(partial(shared.outer_x.splits, K * s.R, e) for s in low)
    return moved + e * (T * ranks + K * ranks + 2 * T * K) + 8 * len(low) * dropout


def norm(T: int, K: int, e: int) -> dict[str, int]:
    """RMSNorm's own passes: the norm; backward the norm again, dx, and the weight's gradient by partial sums."""
    once = e * (2 * T * K + K) + 8 * T
    programs = _norm.config(T, K, arch(torch.empty(0))).programs
    sums = 8 * programs * K + 4 * programs * K + 4 * K + ((4 + e) * K if e < 4 else 0)
    return {"forward": once, "backward": once + e * (3 * T * K + K) + 8 * T + sums}

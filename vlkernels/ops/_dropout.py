"""Dropout as a function of (seed, row, column): never stored, the same on every backend and for every tile shape."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 65536  # p is a multiple of 1/65536: 16 random bits an element, 8 elements from one Philox call


def threshold(p: float) -> int:
    """An element is kept when its 16 random bits are >= this; the probability that acts is threshold(p) / 65536."""
    return round(p * LEVELS)


def keep_factor(p: float) -> float:
    """1 / (1 - p) for the probability that acts: the expectation is exact. 0 where p rounds to 1 and drops all."""
    return LEVELS / (LEVELS - threshold(p)) if threshold(p) < LEVELS else 0.0


def draw_seed(device: torch.device, count: int | None = None) -> Tensor:
    """A 0-d int64 seed, or `count` of them, from torch's generator: checkpointing replays it without a host sync."""
    return torch.randint(-(2**63), 2**63 - 1, () if count is None else (count,), dtype=torch.int64, device=device)


def _mul_hi_lo(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * constant, both factors below 2^32, in int64 without overflow."""
    high, low = (a >> 16) * constant, (a & 0xFFFF) * constant  # each below 2^48
    total = low + ((high & 0xFFFF) << 16)  # below 2^49
    return (high >> 16) + (total >> 32), total & 0xFFFFFFFF


def keep_mask(seed: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """(rows, cols) bool, True where dropout keeps the element.

    Philox4x32 with 7 rounds (Salmon et al., SC'11: the fewest that pass BigCrush), key = (low, high) word of the seed,
    counter = (col // 8, low word of row, high word of row, 0). Of the 128 bits, element col % 8 = j takes 16: half
    j % 2 (low half first) of word j // 2, and is kept when they are >= threshold(p).
    """
    device = seed.device
    row = torch.arange(rows, device=device)[:, None]
    group = torch.arange((cols + 7) // 8, device=device)[None, :]
    zero = torch.zeros_like(row + group)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    c0, c1, c2, c3 = zero + group, zero + (row & 0xFFFFFFFF), zero + (row >> 32), zero
    for _ in range(7):
        hi0, lo0 = _mul_hi_lo(c0, 0xD2511F53)
        hi1, lo1 = _mul_hi_lo(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    words = torch.stack((c0, c1, c2, c3), -1)
    bits = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(1)[:, :cols]
    return bits >= threshold(p)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """x * keep / (1 - p) over the last axis of x (..., cols); rows count all leading axes."""
    keep = keep_mask(seed, x.numel() // max(x.shape[-1], 1), x.shape[-1], p).reshape(x.shape)
    return x * keep.to(x.dtype) * keep_factor(p)

"""Tokens and weights of the product that makes keys and values, from what is in memory anyway.

Whoever recomputes keys and values in backward keeps these parts and joins them again there: a norm pass over x and one
pass over the weights, and neither the normalised x nor a weight with the norm folded in is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def tokens(parts: Sequence[Tensor], norm: str, eps: float, dtype: torch.dtype | None) -> Tensor:
    """[norm(x), columns] (B, N, C + P) in `dtype`, else x's, of x (B, N, C) and columns (B or 1, N, P) or none.

    norm: "none", "layer" or "rms", without scale and shift, which `weights` holds.
    """
    x, *columns = parts
    dtype = dtype or x.dtype
    if norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], None, None, eps)
    elif norm == "rms":
        x = F.rms_norm(x, x.shape[-1:], None, eps)
    x = x.to(dtype)
    if not columns:
        return x
    return torch.cat((x, columns[0].to(dtype).expand(*x.shape[:-1], -1)), -1)


def weights(parts: Sequence[Tensor]) -> Tensor:
    """Matrices (.., C) one below the other, times a vector (C,) where one follows them; a matrix (G, P) after that are
    columns to the right of the first G rows, with zeros below."""
    vectors = [i for i, t in enumerate(parts) if t.dim() == 1]
    end = vectors[0] if vectors else len(parts)
    rows = parts[:end] if not vectors else [w * parts[end] for w in parts[:end]]
    found = torch.cat(list(rows)) if len(rows) > 1 else rows[0]
    if end + 1 >= len(parts):
        return found
    columns = parts[end + 1].to(found.dtype)
    return torch.cat((found, F.pad(columns, (0, 0, 0, found.shape[0] - columns.shape[0]))), 1)

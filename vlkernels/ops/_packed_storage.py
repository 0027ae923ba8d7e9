"""[W, B] as one buffer, and x with spare columns: where the packed plan's operands lie. No kernels, no Triton.

Dims: T all rows, K width of x, N width of y, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def pack(weight: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Copies of weight (N, K) and b (N, R) as columns of one new buffer (N, K + R)."""
    buffer = torch.cat((weight.detach(), b.detach()), 1)
    return buffer[:, : weight.shape[1]], buffer[:, weight.shape[1] :]


def packed(weight: Tensor | None, b: Tensor) -> Tensor | None:
    """The buffer (N, K + R) whose columns weight and b are, as a view; None when they are not."""
    if weight is None or weight.dtype != b.dtype or weight.shape[0] != b.shape[0]:
        return None
    width, stride = weight.shape[1], (weight.shape[1] + b.shape[1], 1)
    if weight.stride() != stride or b.stride() != stride or b.storage_offset() != weight.storage_offset() + width:
        return None
    if weight.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return None
    return weight.detach().as_strided((weight.shape[0], stride[0]), stride)


# storages made by x_buffer, with K and R: only their spare columns may be written
_offered: dict[int, tuple[StorageWeakRef, int, int]] = {}


def x_buffer(rows: int, width: int, rank: int, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """An uninitialised (rows, width) with `rank` spare columns to the right of each row, which the packed plan uses."""
    for key in [key for key, (storage, *_) in _offered.items() if storage.expired()]:
        del _offered[key]
    buffer = torch.empty((rows, width + rank), dtype=dtype, device=device)
    storage = buffer.untyped_storage()
    _offered[storage._cdata] = StorageWeakRef(storage), width, rank
    return buffer[:, :width]


def spare(x2: Tensor, rank: int) -> Tensor | None:
    """x2 (T, K) with its spare columns, (T, K + R), when its storage came from x_buffer; else None."""
    # a weak reference keeps the key from being given out again, so a key that is found is x2's own
    _, width, columns = _offered.get(x2.untyped_storage()._cdata, (None, 0, 0))
    stride = (width + columns, 1)
    if (x2.shape[1], rank) != (width, columns) or x2.stride() != stride or x2.storage_offset() % stride[0]:
        return None
    return x2.detach().as_strided((x2.shape[0], stride[0]), stride)

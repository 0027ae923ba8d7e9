"""Fixed sine/cosine position tables, and their bicubic interpolation to another grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """f(p) = [sin(p w), cos(p w)], w_k = 10000^(-k / K), K = dim / 2: positions (P,) -> (P, dim), float64."""
    if dim < 2 or dim % 2:
        raise ValueError(f"a position table has {dim} channels; accepted: an even number")
    w = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = positions.to(torch.float64)[:, None] * w
    return torch.cat((angle.sin(), angle.cos()), -1)


def sincos_2d(h: int, w: int, dim: int) -> Tensor:
    """(h, w, dim), float64: of token (row i, column j) the first half is f(j), the second f(i)."""
    if dim % 4:
        raise ValueError(f"a 2-D position table has {dim} channels; accepted: a multiple of 4")
    rows, columns = sincos_1d(torch.arange(h), dim // 2), sincos_1d(torch.arange(w), dim // 2)
    return torch.cat((columns.expand(h, w, -1), rows[:, None].expand(h, w, -1)), -1)


def resized(table: Tensor, side: int, to: int) -> Tensor:
    """(side², dim) -> (to², dim): bicubic in float32 at least, half-pixel centres, edges clamped, no antialias."""
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    grid = wide.view(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(to, to), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).reshape(to * to, -1).to(table.dtype)


class ResizedTables:
    """A frozen table at each grid size it was asked for, until the table changes. Copies and pickles are empty.

    A change is noticed by the table's version, address, dtype and device; writes through `.data` are not noticed.
    """

    def __init__(self):
        self._tables: dict[int, Tensor] = {}
        self._key: tuple = ()
        self._storage: StorageWeakRef | None = None

    def get(self, table: Tensor, side: int, to: int) -> Tensor:
        if side == to:
            return table
        # a trained table is differentiated through; a traced one has no version to look at
        if table.requires_grad or torch.compiler.is_compiling() or type(table.detach()) is not Tensor:
            return resized(table, side, to)
        if table.is_inference() or table.is_meta:
            return resized(table, side, to)
        key = (table._version, table.data_ptr(), table.dtype, table.device, tuple(table.shape))
        # an expired reference keeps its address taken, so an equal address is the same memory
        storage = StorageWeakRef(table.untyped_storage())
        if key != self._key or self._storage is None or storage.cdata != self._storage.cdata:
            self.__init__()
            self._key, self._storage = key, storage
        if to not in self._tables:
            with torch.inference_mode(False), torch.no_grad():
                found = resized(table.detach(), side, to)
            if type(found) is not Tensor:  # inside a tracer's mode
                return found
            self._tables[to] = found
        return self._tables[to]

    def __len__(self) -> int:
        return len(self._tables)

    def __reduce__(self):
        return ResizedTables, ()

"""Dequantised weights kept for a moment, so that recomputation and backward of a layer do not make them twice.

A cache in order of last use, one for each (device, stream), within a budget of bytes. An entry is served again only on
the stream that filled it, only while the tensors that it was made from live, and only in their present version. Nothing
is ever written into a buffer after it was filled: an evicted one is dropped, and PyTorch's allocator, which orders
reuse by stream, hands its memory to the next. So a caller on the same stream may go on reading what it got.

Not seen: writes that hide from autograd's version counter too (through `.data`). Call `release_scratch()` after one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

# Two decoder layers of an 8B model in 16 bits take 2 * 436 MB: the layer that is recomputed and the one before it.
DEFAULT_LIMIT = 2**30

_limit = DEFAULT_LIMIT
_lock = threading.Lock()  # backward runs in threads of its own
_caches: dict[tuple, OrderedDict[tuple, _Entry]] = {}


class _Entry(NamedTuple):
    buffer: Tensor
    # they keep the storages' addresses from being given to others, not their memory
    sources: tuple[StorageWeakRef, ...]

    @property
    def dead(self) -> bool:
        return any(source.expired() for source in self.sources)


def scratch_limit(limit: int | None = None) -> int:
    """Set, and return, the bytes of dequantised weights kept per device and stream; None only asks.

    0 keeps none: every use dequantises. A weight larger than the limit is never kept. Default: 2**30.
    """
    global _limit
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ValueError(f"limit is {limit!r}; accepted: a number of bytes from 0, or None")
        with _lock:
            _limit = limit
            for cache in _caches.values():
                _shrink(cache, limit)
    return _limit


def release_scratch() -> int:
    """Drop every kept buffer; returns how many bytes that were."""
    with _lock:
        freed = sum(_bytes(cache) for cache in _caches.values())
        _caches.clear()
    return freed


def scratch_bytes() -> int:
    """Bytes kept at this moment, over all devices and streams."""
    with _lock:
        return sum(_bytes(cache) for cache in _caches.values())


def kept(make: Callable[[], Tensor], nbytes: int, sources: tuple[Tensor, ...], *facts) -> Tensor:
    """make(), or what it gave when it was last called for these sources and facts on this stream. Read only.

    make: gives a new tensor of `nbytes`, a function of the sources' contents and of `facts`.
    """
    device = sources[0].device
    if nbytes > _limit or not _cacheable(sources):
        return make()
    identity = tuple((t.untyped_storage()._cdata, t.storage_offset(), t.data_ptr()) for t in sources)
    versions = tuple(t._version for t in sources)
    with _lock:
        cache = _caches.setdefault((device, _stream(device)), OrderedDict())
        for key in [key for key, entry in cache.items() if entry.dead or (key[0] == identity and key[1] != versions)]:
            del cache[key]
        key = (identity, versions, facts)
        entry = cache.get(key)
        if entry is not None:
            cache.move_to_end(key)
            return entry.buffer
        _shrink(cache, _limit - nbytes)
    buffer = make()
    with _lock:
        cache[key] = _Entry(buffer, tuple(StorageWeakRef(t.untyped_storage()) for t in sources))
        _shrink(cache, _limit)
    return buffer


def _cacheable(sources: tuple[Tensor, ...]) -> bool:
    """No for tensors without data or version counter, and while a CUDA graph is captured: its replay must fill anew."""
    if any(isinstance(t, FakeTensor) or t.is_meta or t.is_inference() for t in sources):
        return False
    return not (sources[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _bytes(cache: OrderedDict) -> int:
    return sum(entry.buffer.nbytes for entry in cache.values())


def _shrink(cache: OrderedDict, limit: int) -> None:
    """Drop what was not used for longest until at most `limit` bytes are kept."""
    while cache and _bytes(cache) > limit:
        cache.popitem(last=False)

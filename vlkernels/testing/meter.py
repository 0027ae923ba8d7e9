"""Meters: saved bytes, kernel launches, bytes moved, FLOPs. All are measured on a run, none is declared.

Launches are counted on any device. Bytes and FLOPs of Triton kernels are counted in Triton's interpreter, which runs
every masked load, store and product; run with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry

from .. import backends
from ..ops import _tl

_ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "detach"}


def storages(tensors: Iterable[Tensor]) -> set[int]:
    """What tells the tensors' storages apart."""
    return {_identity(t) for t in tensors}


def _identity(t: Tensor) -> int:
    """The storage's address; a meta tensor's has none, but is an object."""
    storage = t.untyped_storage()
    return storage._cdata if t.is_meta else storage.data_ptr()


def saved_bytes(fn: Callable[[], object], apart: Iterable[Tensor] = ()) -> int:
    """Bytes of the distinct storages that fn's forward saves for backward; those of `apart` are left out.

    `apart` names what is there anyway: parameters, and the op's own input. Parameters are left out by themselves where
    autograd hands them over as such; a view of one needs to be named.
    """
    known = storages(apart)
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, torch.nn.Parameter) and _identity(t) not in known:
            found[_identity(t)] = t.untyped_storage().nbytes()
        return t

    keep = None
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        # the result holds the graph, so that no address is used twice while counting
        keep = fn()
    del keep
    return sum(found.values())


@contextlib.contextmanager
def launches() -> Iterator[Counter]:
    """Counts the Triton kernels launched inside the block, by name."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    counts: Counter = Counter()
    kind = InterpretedFunction if _tl.INTERPRETED.value else JITFunction
    run = kind.run

    def counted(self, *args, warmup, **kwargs):
        if not warmup:
            counts[self.fn.__name__] += 1
        return run(self, *args, warmup=warmup, **kwargs)

    with mock.patch.object(kind, "run", counted):
        yield counts


@dataclass
class Traffic:
    """What ran inside `traffic()`.

    moved: bytes, a byte counted once per launch however often its tiles are loaded (memory's share when the cache holds
    the re-reads). flops: of tiles, padding included.
    """

    moved: int = 0
    flops: int = 0
    launches: Counter = field(default_factory=Counter)
    moved_by: Counter = field(default_factory=Counter)

    @property
    def launch_count(self) -> int:
        return sum(self.launches.values())


class _AtenMeter(TorchDispatchMode):
    def __init__(self, record: Traffic):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "vlkernels":
            # into the operator's body: an op is never one launch
            name = func._schema.name.partition("::")[2]
            op = backends.OPS[name.removesuffix("_backward")]
            body = op._backward if name.endswith("_backward") else op._forward
            with self:
                return body(*args)
        with self:
            # linear and matmul arrive whole below autograd
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if func.is_view or name in _ALLOCATIONS:
            return out
        read = {k: v for k, v in kwargs.items() if k != "out"}
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, read)) if isinstance(t, Tensor)]
        if func._schema.is_mutable and tensors:
            tensors = tensors[1:] if name in ("copy_", "zero_", "fill_") else tensors
        results = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in (*tensors, *results))
        self.record.moved += moved
        self.record.moved_by[f"aten::{name}"] += moved
        self.record.launches[f"aten::{name}"] += 1
        # torch knows the products' FLOPs under the names that write in no place
        packet = getattr(torch.ops.aten, name.removesuffix("_"), func._overloadpacket)
        if packet in flop_registry:
            self.record.flops += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


def _distinct_bytes(rows: list[np.ndarray]) -> int:
    """Bytes of the distinct address * 16 + size; one sort is faster than np.unique on pairs."""
    keys = np.sort(np.concatenate(rows))
    first = np.append(True, keys[1:] != keys[:-1]) if keys.size else keys.astype(bool)
    return int((keys[first] % 16).sum())


@contextlib.contextmanager
def traffic(moved: bool = True) -> Iterator[Traffic]:
    """Counts bytes, launches and FLOPs inside the block: of ATen operators and of interpreted Triton kernels.

    moved=False leaves the kernels' bytes out, which take most of the time to count.
    """
    record = Traffic()
    if not _tl.INTERPRETED.value:
        with _AtenMeter(record):
            yield record
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    load, store, product = builder.create_masked_load, builder.create_masked_store, builder.create_dot
    touched: dict[str, list[np.ndarray]] = {"load": [], "store": []}
    run = interpreter.InterpretedFunction.run

    def note(kind: str, pointers, mask) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = np.asarray(pointers.data)[np.asarray(mask.data, dtype=bool)]
        touched[kind].append(addresses.astype(np.int64) * 16 + size)  # an address fits 48 bits, a size 4

    def counted_load(ptrs, mask, *rest):
        note("load", ptrs, mask)
        return load(ptrs, mask, *rest)

    def counted_store(ptrs, value, mask, *rest):
        note("store", ptrs, mask)
        return store(ptrs, value, mask, *rest)

    def counted_dot(a, b, *rest):
        record.flops += 2 * a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1]
        return product(a, b, *rest)

    def counted_run(self, *args, warmup, **kwargs):
        for addresses in touched.values():
            addresses.clear()
        with _disable_current_modes():  # the interpreter's own copies are not the kernel's
            out = run(self, *args, warmup=warmup, **kwargs)
        total = sum(_distinct_bytes(rows) for rows in touched.values() if rows)
        record.moved += total
        record.moved_by[self.fn.__name__] += total
        record.launches[self.fn.__name__] += 1
        return out

    with (
        mock.patch.object(builder, "create_masked_load", counted_load if moved else load),
        mock.patch.object(builder, "create_masked_store", counted_store if moved else store),
        mock.patch.object(builder, "create_dot", counted_dot),
        mock.patch.object(interpreter.InterpretedFunction, "run", counted_run),
        _AtenMeter(record),
    ):
        yield record

"""The compute capability that configurations are made for, and the tiles that were measured best on it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

# multiprocessors; one config serves the variants of an architecture
_SMS = {80: 108, 90: 132, 100: 148, 120: 170}

_assumed: int | None = None

OPS = Path(__file__).resolve().parent


def arch(t: Tensor) -> int:
    """10 * major + minor of t's device (90 for an H200), 0 where there is none."""
    if _assumed is not None:
        return _assumed
    if not t.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(t.device)
    return 10 * major + minor


def multiprocessors(capability: int) -> int:
    """How many programs fill a device of this architecture; sm_90's where it is unknown."""
    return _SMS.get(capability, _SMS[90])


@contextlib.contextmanager
def assume(capability: int) -> Iterator[None]:
    """Configure for a device that is not here: kernels are compiled ahead of time, not launched."""
    global _assumed
    previous, _assumed = _assumed, capability
    try:
        yield
    finally:
        _assumed = previous


def tuned(op: str, capability: int, config, key: Mapping[str, object]):
    """`config` with what benchmarks/tune.py measured best on this architecture for `key`, where it did.

    config: a frozen dataclass of tiles. key: the arguments that it was made from; a number of rows T stands for all
    that round to the same power of two, everything else is exact. Records: ops/<op>/tuned/<gpu>.json.
    """
    records = _records(op, capability)
    found = records.get(key_of(key)) if records else None
    if found is None:
        return config
    # a tile that this configuration has none of is left out: the record is of another version
    tiles = {n: t for n, t in found["tiles"].items() if dataclasses.is_dataclass(getattr(config, n, None))}
    changes = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in tiles.items()}
    if "plan" in found:
        changes["plan"] = found["plan"]
    return dataclasses.replace(config, **changes)


def key_of(key: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """The key as it is compared, from live values and from JSON alike."""
    rows = {"T": 2 ** round(math.log2(max(1, key["T"])))} if "T" in key else {}
    return tuple(sorted((name, str(value)) for name, value in {**key, **rows}.items()))


@functools.cache
def _records(op: str, capability: int) -> dict[tuple, dict]:
    """Entries of all files of an architecture by key; of two files the later in the alphabet counts."""
    files = [json.loads(path.read_text()) for path in sorted((OPS / op / "tuned").glob("*.json"))]
    return {key_of(e["key"]): e for file in files if file.get("arch") == capability for e in file["entries"]}

"""Clocks: device time of a call by events, wall time that waits for the device, inputs that the cache does not hold."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: median, 20th and 80th percentile of n calls after `warmup` untimed ones.

    clock: "events" (device time between two events around each call) or "wall" (perf_counter, device synchronised).
    """

    ms: float
    ms_p20: float
    ms_p80: float
    n: int
    warmup: int
    clock: str

    @classmethod
    def of(cls, samples_ms: Sequence[float], warmup: int, clock: str) -> Timing:
        ordered = sorted(samples_ms)
        return cls(
            statistics.median(ordered), percentile(ordered, 0.2), percentile(ordered, 0.8), len(ordered), warmup, clock
        )


def percentile(ordered: Sequence[float], q: float) -> float:
    """Linear interpolation between the neighbours of rank q (n - 1)."""
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def synchronise(device: torch.device | str) -> None:
    """Wait until the device has done what was asked of it; nothing to wait for on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timer(device: torch.device | str) -> Callable[[], float]:
    """A clock in seconds that waits for the device first, for timing by differences (pytest-benchmark's `timer`)."""

    def now() -> float:
        synchronise(device)
        return time.perf_counter()

    return now


def cache_bytes(device: torch.device | str) -> int:
    """Size of the device's last cache level in bytes; 0 on a CPU, whose figures nobody compares."""
    device = torch.device(device)
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def sets_past_cache(bytes_per_call: int, device: torch.device | str, most: int = 8) -> int:
    """How many input sets to rotate so that a set has left the cache when its turn comes: two caches in between."""
    cache = cache_bytes(device)
    return max(1, min(most, 1 + -(-2 * cache // max(1, bytes_per_call)))) if cache else 1


def measure(
    calls: Sequence[Callable[[], object]],
    device: torch.device | str,
    seconds: float = 0.4,
    warmup: int = 5,
    least: int = 10,
    most: int = 200,
    flush: bool = False,
) -> Timing:
    """Time calls that do the same work on different inputs, in rotation.

    Args:
        calls: one callable an input set; see `sets_past_cache`.
        seconds: how long to measure, as far as `least` and `most` samples allow.
        warmup: untimed calls before, at least one of each set: compilation, handles and allocations happen there.
        flush: overwrite twice the cache between calls as well, outside the timed span. Weights are then cold too.
    """
    device = torch.device(device)
    warmup = max(warmup, len(calls))
    for i in range(warmup):
        calls[i % len(calls)]()
    now = timer(device)
    begin = now()
    for i in range(3):
        calls[i % len(calls)]()
    each = max((now() - begin) / 3, 1e-6)
    count = int(min(most, max(least, seconds / each)))
    scrub = torch.empty(2 * cache_bytes(device), dtype=torch.int8, device=device) if flush else None

    def prepare() -> None:
        if scrub is not None:
            scrub.zero_()

    if device.type != "cuda":
        samples = []
        for i in range(count):
            prepare()
            begin = time.perf_counter()
            calls[i % len(calls)]()
            samples.append(1e3 * (time.perf_counter() - begin))
        return Timing.of(samples, warmup, "wall")

    with torch.cuda.device(device):
        spans = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(count)]
        for i, (start, end) in enumerate(spans):
            prepare()
            start.record()
            calls[i % len(calls)]()
            end.record()
        torch.cuda.synchronize(device)
    return Timing.of([start.elapsed_time(end) for start, end in spans], warmup, "events")


def host_microseconds(call: Callable[[], object], device: torch.device | str, n: int = 300, rounds: int = 5) -> float:
    """Microseconds that the host spends per call without waiting for the device: the best of `rounds` means over n."""
    best = float("inf")
    for _ in range(rounds):
        for _ in range(10):
            call()
        synchronise(device)
        begin = time.perf_counter()
        for _ in range(n):
            call()
        best = min(best, 1e6 * (time.perf_counter() - begin) / n)
        synchronise(device)
    return best


@contextlib.contextmanager
def peak_bytes(device: torch.device | str) -> Iterator[list[int]]:
    """Yields a list that holds, after the block, the most device bytes allocated above what was there at its start.

    Empty on a CPU, where torch counts no allocations.
    """
    device, result = torch.device(device), []
    if device.type != "cuda":
        yield result
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield result
    torch.cuda.synchronize(device)
    result.append(torch.cuda.max_memory_allocated(device) - before)

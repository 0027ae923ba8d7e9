"""Search the tiles of an op's kernels on the present GPU and write vlkernels/ops/<op>/tuned/<gpu>.json.

    python -m benchmarks.tune --op lora_linear [--precision NAME] [--case TEXT] [--minutes 8]

From what config() picks, one kernel's tile at a time is varied, a field by a factor of two; whatever lowers the summed
device time of the op's own kernels, forward and backward, stays. cuBLAS's products are not in the sum. An op with plans
is searched under each that needs no other storage, and the plans are compared by whole calls. A winner that fails the
correctness rule is not written. The file is written after every case; config() reads it (`ops/_device.tuned`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from vlkernels import backends
from vlkernels.op import Op
from vlkernels.testing import clock, compare
from vlkernels.testing.case import PRECISIONS, Case, Precision

from . import check, ops, providers, record

LIMITS = {
    "rows": (16, 256),
    "cols": (16, 256),
    "rank": (16, 128),
    "warps": (2, 8),
    "stages": (1, 5),
    "splits": (1, 512),
    "depth": (16, 128),
    "group": (1, 32),
}
NEEDS_STORAGE = ("packed",)  # plans that follow from how the weights are stored


def neighbours(tile) -> Iterator:
    """Tiles that differ in one field: by a factor of two, stages by one."""
    for name, (least, most) in LIMITS.items():
        value = getattr(tile, name, None)
        if value is None:
            continue
        for other in (value - 1, value + 1) if name == "stages" else (value // 2, value * 2):
            if least <= other <= most:
                yield dataclasses.replace(tile, **{name: other})


@contextlib.contextmanager
def fixed(op: Op, config) -> Iterator[None]:
    """Inside, the op's kernels run with this configuration."""
    with mock.patch.object(op.kernels["triton"], "config", lambda *_, **__: config):
        yield


@contextlib.contextmanager
def kernel_time() -> Iterator[list[tuple]]:
    """Yields a list of (start, end) events, one pair for each Triton launch inside the block."""
    from triton.runtime.jit import JITFunction

    run, spans = JITFunction.run, []

    def timed(self, *args, **kwargs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        out = run(self, *args, **kwargs)
        end.record()
        spans.append((start, end))
        return out

    with mock.patch.object(JITFunction, "run", timed):
        yield spans


def milliseconds(op: Op, call, config, repeats: int = 7) -> float:
    """Median over calls of the op's summed Triton kernel times; inf when the device cannot run the tiles."""
    from triton.errors import TritonError

    try:
        with fixed(op, config):
            call()
            sums = []
            for _ in range(repeats):
                torch.cuda._sleep(5_000_000)  # some ms: the host queues the whole call before its first kernel starts
                with kernel_time() as spans:
                    call()
                torch.cuda.synchronize()
                sums.append(sum(start.elapsed_time(end) for start, end in spans))
        return statistics.median(sums)
    except (TritonError, RuntimeError):
        return float("inf")


def search(op: Op, case: Case, precision: Precision, deadline: float) -> dict | None:
    """The best plan and tiles found before the deadline, as a record, or None when config() was not bettered by 1 %."""
    provider = providers.ours(op, "triton")
    job = ops.Job(op, case, precision, provider)
    (call,) = ops.callables(job, "forward+backward", "cuda", 1)
    start, key = picked(op, call)
    if start is None:
        return None
    before = best_ms = whole_call(op, call, start)
    best, plans = start, plans_of(op, start)
    for i, plan in enumerate(plans):
        begin = dataclasses.replace(start, plan=plan) if plan else start
        share = (deadline - time.monotonic()) / (len(plans) - i)
        found = climb(op, call, begin, time.monotonic() + share)
        ms = whole_call(op, call, found)
        if plan:
            print(f"  plan {plan}: {ms:.4f} ms a call (config() {before:.4f})", flush=True)
        if ms < 0.99 * best_ms:
            best, best_ms = found, ms
    if best == start:
        return None
    with fixed(op, best):
        failure = check.failure(check.errors(op, provider, case, precision, "cuda"))
    if failure:
        print(f"  the fastest tiles fail the rule and are not written: {failure}")
        return None
    return entry(best, key) | {"precision": precision.name, "ms": best_ms, "ms_before": before}


def climb(op: Op, call, start, deadline: float):
    """The configuration whose Triton kernels take the least time, one field of one tile at a time."""
    best, best_ms = start, milliseconds(op, call, start)
    moved = True
    while moved and time.monotonic() < deadline:
        moved = False
        for name in (f.name for f in dataclasses.fields(best) if dataclasses.is_dataclass(getattr(best, f.name))):
            for tile in neighbours(getattr(best, name)):
                if time.monotonic() > deadline:
                    break
                candidate = dataclasses.replace(best, **{name: tile})
                ms = milliseconds(op, call, candidate)
                if ms < 0.99 * best_ms:
                    best, best_ms, moved = candidate, ms, True
                    print(f"  {name} {tile}: {best_ms:.4f} ms", flush=True)
    return best


def whole_call(op: Op, call, config) -> float:
    """Milliseconds of a call with everything in it; inf when the device cannot run the tiles."""
    from triton.errors import TritonError

    try:
        with fixed(op, config):
            return clock.measure([call], "cuda").ms
    except (TritonError, RuntimeError):
        return float("inf")


def plans_of(op: Op, config) -> list[str | None]:
    """The plans to search: the configuration's own first; [None] for an op without plans."""
    if not hasattr(config, "plan"):
        return [None]
    others = getattr(compare.cases_of(op), "PLANS", ())
    return [config.plan, *(p for p in others if p != config.plan and p not in NEEDS_STORAGE)]


def entry(config, key: dict) -> dict:
    """What `_device.tuned` reads back."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    tiles = {name: dataclasses.asdict(tile) for name, tile in fields.items() if dataclasses.is_dataclass(tile)}
    plan = {"plan": config.plan} if hasattr(config, "plan") else {}
    return {"key": {n: v if isinstance(v, int) else str(v) for n, v in key.items()}, "tiles": tiles} | plan


def picked(op: Op, call) -> tuple:
    """(the configuration that config() picks in this call, the key of its record); None when it is no tiles, or when
    the op reads no records."""
    kernels, seen = op.kernels["triton"], []
    config, config_key = kernels.config, getattr(kernels, "config_key", None)

    def noted(*args, **kwargs):
        seen.append((config(*args, **kwargs), config_key and config_key(*args, **kwargs)))
        return seen[-1][0]

    with mock.patch.object(kernels, "config", noted):
        call()
    if not seen or config_key is None:
        return None, None
    found, key = seen[0]
    tiles = [f for f in dataclasses.fields(found) if dataclasses.is_dataclass(getattr(found, f.name))]
    return (found, key) if tiles else (None, None)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", required=True, choices=sorted(backends.OPS))
    parser.add_argument("--precision", choices=sorted(PRECISIONS), help="default: as people train, then all in bf16")
    parser.add_argument("--case", default="", help="cases whose name holds this text")
    parser.add_argument("--minutes", type=float, default=8.0)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"no GPU here: torch {torch.__version__} sees no CUDA device, and tiles are tuned on one")
        return 2
    op, run = backends.OPS[options.op], record.environment("cuda")
    path = Path(op.reference.__file__).parent / "tuned" / f"{record.short_name(run.device)}.json"
    names = [options.precision] if options.precision else list(ops.MAIN_PRECISIONS)
    cases = [c for c in compare.cases_of(op).CASES if "bench" in c.tags and options.case in c.name]
    todo = [(case, PRECISIONS[name]) for name in names for case in cases]
    deadline = time.monotonic() + 60 * options.minutes
    entries = []
    for i, (case, precision) in enumerate(todo):
        share = (deadline - time.monotonic()) / (len(todo) - i)
        if share <= 0:
            break
        print(f"{i + 1}/{len(todo)} {case} [{precision}], {share:.0f} s", flush=True)
        found = search(op, case, precision, time.monotonic() + share)
        if found is None:
            continue
        entries.append(found)
        path.parent.mkdir(exist_ok=True)
        arch = int(run.capability.removeprefix("sm_"))
        about = {
            "device": run.device,
            "arch": arch,
            "torch": run.torch,
            "triton": run.triton,
            "commit": run.commit,
            "time": run.time,
        }
        path.write_text(json.dumps(about | {"entries": entries}, indent=1) + "\n")
        print(f"  {found['ms_before']:.4f} -> {found['ms']:.4f} ms, wrote {path.relative_to(record.ROOT)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

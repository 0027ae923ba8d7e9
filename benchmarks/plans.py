"""Bytes that each plan of lora_linear moves on LLaVA's shape, over two floors; needs no GPU.

    python -m benchmarks.plans [--jobs N]         writes results/plans.json; `python -m benchmarks.report` shows it

Counted as in benchmarks.memory: at full width on two row counts, with the tiles of the case's row count for sm_90, in
bf16. `floor` reads each argument once and writes each result once; `plan floor` reads x once more for S = drop(x) Aᵀ,
which takes all of a row of x before the first number of y, and dy once more for dS.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from vlkernels import backends
from vlkernels.ops import _device, _packed_storage
from vlkernels.ops._lora_plan import DEFAULT
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS, Case, Make

from . import providers
from .check import fewer_rows, plan_of
from .providers import Instance, Provider
from .record import RESULTS

NAME = "lora_linear"
IN_BUFFER = "packed, x in its buffer"
ROWS = (16, 32)
ARCH = 90


def cases() -> list[Case]:
    """The op's first bench case that takes more than one plan: LLaVA's recipe."""
    found = [c for c in compare.cases_of(backends.OPS[NAME]).CASES if "bench" in c.tags and not c.get("quant")]
    return found[:1]


def by_plan() -> dict[str, Provider]:
    op = backends.OPS[NAME]
    found = {DEFAULT: providers.ours(op, "triton")}
    found |= {p.plan: p for p in providers.of(op) if p.plan and p.name.startswith("triton")}
    return found | {IN_BUFFER: _in_buffer(found["packed"])}


def _in_buffer(packed: Provider) -> Provider:
    """x as the layer before would leave it: with R spare columns."""

    def build(case: Case, arguments: dict, precision) -> Instance:
        x = arguments["x"]
        buffer = _packed_storage.x_buffer(*x.shape, arguments["a"].shape[0], x.dtype, x.device)
        buffer.copy_(x.detach())
        return packed.build(case, arguments | {"x": buffer.requires_grad_()}, precision)

    return Provider(IN_BUFFER, build, "ours", exact_dropout=True)


def measured(case: Case, plan: str) -> dict[str, int]:
    """Bytes forward and backward on the case's rows, from the line through two row counts."""
    (few, first), (more, second) = ((n, _counted(case, plan, n)) for n in ROWS)
    return {d: round(first[d] + (second[d] - first[d]) / (more - few) * (case["T"] - few)) for d in first}


def _counted(case: Case, plan: str, rows: int) -> dict[str, int]:
    op, provider, precision = backends.OPS[NAME], by_plan()[plan], PRECISIONS["bf16"]
    small = fewer_rows(case, rows)
    instance = provider.build(small, compare.cases_of(op).inputs(small, Make(precision)), precision)
    with _device.assume(ARCH), plan_of(op, case):
        with meter.traffic() as forward:
            y = instance.forward()
        dy = torch.randn_like(y)
        with meter.traffic() as backward:
            instance.backward(y, dy)
    return {"forward": forward.moved, "backward": backward.moved}


def floors(case: Case) -> dict[str, dict[str, int]]:
    module = compare.cases_of(backends.OPS[NAME])
    return {"floor": module.floor_bytes(case, 2), "plan floor": module.plan_floor_bytes(case, 2)}


def _work(index: int, plan: str) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    case = cases()[index]
    return {"case": case.name, "plan": plan, "moved": measured(case, plan)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: one a core")
    parser.add_argument("--json", type=Path, default=RESULTS / "plans.json")
    options = parser.parse_args(argv)
    todo = [(i, plan) for i in range(len(cases())) for plan in by_plan()]
    with ProcessPoolExecutor(options.jobs) as pool:
        entries = []
        for entry in pool.map(_work, *zip(*todo, strict=True)):
            entries.append(entry)
            print(f"  {len(entries)}/{len(todo)} {entry['case']} {entry['plan']}", file=sys.stderr, flush=True)
    options.json.write_text(json.dumps({"rows_counted": ROWS, "arch": ARCH, "entries": entries}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if not meter._tl.INTERPRETED.value:
        # the switch is read when triton is imported
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.plans", *sys.argv[1:]],
            os.environ | {"TRITON_INTERPRET": "1"},
        )
    sys.exit(main())

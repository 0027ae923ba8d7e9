"""Saved bytes, FLOPs, bytes moved and launches of each op and swapped module beside its baseline; needs no GPU.

    python -m benchmarks.memory [--json FILE] [--op NAME] [--jobs N]

Each op's bench cases and its swapped modules run at full width on few rows, our kernels in Triton's interpreter with
the tiles of the full row count. All counts are linear in the rows, so two row counts give bytes per token and per call.
The baseline's ATen operators are counted as a GPU would run them (dropout is one operator there). Exit status 1 when an
op is over its budget.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

import vlkernels
from vlkernels import backends
from vlkernels.op import Op
from vlkernels.testing import compare, meter
from vlkernels.testing.case import PRECISIONS, Case, Make, Precision

from . import providers
from .budgets import BUDGETS
from .check import fewer_rows, plan_of
from .providers import Instance, Provider

SCHEMA = 1
ROWS = (64, 128)  # no multiple of a row tile is needed: bytes are counted by masks, FLOPs apart


@dataclass(frozen=True)
class Subject:
    """One line of the report: `ours` and `baseline` on one case in one precision. kind: "op" or "module"."""

    kind: str
    name: str
    op: Op
    case: Case
    precision: Precision
    ours: Provider
    baseline: Provider

    def __str__(self) -> str:
        return f"{self.name} {self.case} [{self.precision}]"


def subjects(op: Op, precision: str = "bf16") -> list[Subject]:
    """The op on its bench cases, then its swapped modules on the first case of their dropout.

    Cases tagged "uncounted" take the interpreter too long at full width; the tests count them at small widths.
    """
    cases = [c for c in compare.cases_of(op).CASES if "bench" in c.tags and "uncounted" not in c.tags]
    baseline = providers.named(op, providers.baseline_of(op))
    found = [
        Subject("op", op.name, op, case, PRECISIONS[precision], providers.ours(op, "triton"), baseline)
        for case in cases
    ]
    for name, of, p, ours, stock in getattr(providers.module_of(op), "MODULES", ()):
        case = next(c for c in cases if c.get("p", 0.0) == p)
        found.append(Subject("module", name, op, case, PRECISIONS[of], ours, stock))
    return found


@dataclass
class Count:
    """What one provider costs. Bytes and FLOPs are (per token, per call); forward and backward apart.

    keeps_input: the op's own input is kept for backward too. It is not among the saved bytes, for what made it mostly
    keeps it as well (the layers q, k, v share one).
    """

    saved: tuple[float, float]
    keeps_input: bool
    flops: tuple[float, float]
    moved: dict[str, tuple[float, float]]
    launches: dict[str, dict[str, int]]

    def total(self, field: str, rows: int) -> float:
        """A count on `rows` rows; "moved" is forward and backward together."""
        parts = self.moved.values() if field == "moved" else [getattr(self, field)]
        return sum(slope * rows + fixed for slope, fixed in parts)

    def launch_count(self, name: str | None = None) -> int:
        return sum(sum(counts.values()) for key, counts in self.launches.items() if name in (None, key))


def count(subject: Subject, provider: Provider, rows: tuple[int, int] = ROWS) -> Count:
    """Run the provider forward and backward on two row counts and fit the lines through what the meters saw."""
    native = (
        contextlib.nullcontext() if provider is subject.ours else mock.patch("torch.nn.functional.dropout", _dropout)
    )
    forced = vlkernels.use_backend("triton" if provider is subject.ours else None)
    with native, forced:
        with plan_of(subject.op, subject.case):
            runs = [_run(subject, provider, n) for n in rows]
        # tiles of the full row count would pad these few rows; with tiles of their own no FLOP is padding
        with_input, *own = _run(subject, provider, rows[0], input_apart=False)
    saved, forward, backward = zip(*runs, strict=True)
    per_token = sum(traffic.flops for traffic in own) / rows[0]
    return Count(
        saved=_line(rows, saved),
        keeps_input=with_input > saved[0],
        flops=(per_token, 0.0),
        moved={
            "forward": _line(rows, [t.moved for t in forward]),
            "backward": _line(rows, [t.moved for t in backward]),
        },
        launches={"forward": dict(forward[-1].launches), "backward": dict(backward[-1].launches)},
    )


def _run(subject: Subject, provider: Provider, rows: int, input_apart: bool = True) -> tuple:
    """(saved bytes, forward traffic, backward traffic) on `rows` rows."""
    case = fewer_rows(subject.case, rows)
    arguments = compare.cases_of(subject.op).inputs(case, Make(subject.precision))
    instance = provider.build(case, arguments, subject.precision)
    output: list[Tensor] = []
    seen: list[meter.Traffic] = []

    def forward() -> Tensor:
        with meter.traffic() as traffic:
            y = instance.forward()
        seen.append(traffic)
        output.append(y)
        return y

    saved = meter.saved_bytes(forward, apart_of(instance, input_apart))
    outputs = torch.utils._pytree.tree_leaves(output[0])
    dy = tuple(compare.cotangent(out, subject.precision, 0, i) for i, out in enumerate(outputs))
    with meter.traffic() as traffic:
        instance.backward(output[0], dy)
    return saved, seen[0], traffic


def apart_of(instance: Instance, input_apart: bool = True) -> list[Tensor]:
    """What is in memory whether or not anything is saved: parameters, frozen weights and, by default, the input x."""
    leaves = [t for name, t in instance.leaves.items() if input_apart or name != "x"]
    return [*leaves, *instance.frozen]


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return torch.native_dropout(x, p, True)[0] if training and p else x


def _line(at: tuple[int, int], values) -> tuple[float, float]:
    """(slope, intercept) through two points."""
    (x0, x1), (y0, y1) = at, values
    slope = (y1 - y0) / (x1 - x0)
    return slope, y0 - slope * x0


def over_budget(subject: Subject, ours: Count, baseline: Count) -> list[str]:
    """In which respects the op is over its budget."""
    budget = BUDGETS.get(subject.op.name)
    if budget is None:
        return [f"{subject.op.name} has no budget in benchmarks/budgets.py"]
    rows, found = subject.case["T"], []
    saved, allowed = ours.total("saved", rows), budget.saved(subject.case, subject.precision)
    if saved > allowed:
        found.append(f"saves {saved:.0f} bytes, the budget is {allowed}")
    below = baseline.total("flops", rows)
    ratio = ours.total("flops", rows) / below if below else 0.0  # an op without products
    if ratio > budget.flops_ratio(subject.case):
        found.append(f"{ratio:.3f} of the baseline's FLOPs, the budget is {budget.flops_ratio(subject.case)}")
    return found


def entry(subject: Subject, rows: tuple[int, int] = ROWS) -> dict:
    """The subject's record."""
    ours, baseline = count(subject, subject.ours, rows), count(subject, subject.baseline, rows)
    full = subject.case["T"]
    budget = BUDGETS.get(subject.op.name)

    def figures(c: Count) -> dict:
        return {
            "saved": c.saved,
            "keeps_input": c.keeps_input,
            "flops": c.flops,
            "moved": c.moved,
            "launches": c.launches,
        }

    def ratio(field: str) -> float | None:
        below = baseline.total(field, full)
        return ours.total(field, full) / below if below else None

    return {
        "kind": subject.kind,
        "name": subject.name,
        "op": subject.op.name,
        "case": subject.case.name,
        "dims": dict(subject.case.dims),
        "options": dict(subject.case.options),
        "precision": subject.precision.name,
        "rows_counted": list(rows),
        "baseline_name": subject.baseline.name,
        "ours": figures(ours),
        "baseline": figures(baseline),
        "ratio": {field: ratio(field) for field in ("saved", "flops", "moved")}
        | {"launches": ours.launch_count() / baseline.launch_count()},
        "budget": {
            "saved_per_token": budget and budget.saved_per_token(subject.case, subject.precision),
            "saved_per_call": budget and budget.saved_per_call,
            "flops_ratio": budget and budget.flops_ratio(subject.case),
            "over": over_budget(subject, ours, baseline),
        },
    }


def _work(op: str, index: int) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return entry(subjects(backends.OPS[op])[index])


def main(argv: list[str] | None = None) -> int:
    from .tables import memory_lines

    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--op", help="one op only")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes; default: one a core")
    options = parser.parse_args(argv)
    if options.op and options.op not in backends.OPS:
        parser.error(f"--op is {options.op!r}; there are {', '.join(sorted(backends.OPS))}")
    names = [options.op] if options.op else sorted(backends.OPS)
    todo = [(name, i) for name in names for i in range(len(subjects(backends.OPS[name])))]
    done: dict[tuple[str, int], dict] = {}
    begin = time.monotonic()
    print(f"counting {len(todo)} subjects in {options.jobs} processes; some minutes", file=sys.stderr)
    with ProcessPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(_work, *key): key for key in todo}
        for future in as_completed(futures):
            key = futures[future]
            done[key] = future.result()
            label = f"{done[key]['name']} {done[key]['case']} [{done[key]['precision']}]"
            print(f"  {len(done)}/{len(todo)} {time.monotonic() - begin:4.0f} s  {label}", file=sys.stderr, flush=True)
    record = {
        "schema": SCHEMA,
        "package": vlkernels.__version__,
        "torch": torch.__version__.partition("+")[0],
        "entries": [done[key] for key in todo],
    }
    print("\n".join(memory_lines(record)))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    over = [
        f"{e['name']} {e['case']} [{e['precision']}]: {why}" for e in record["entries"] for why in e["budget"]["over"]
    ]
    print("\n".join(over) or "every op is within its budget")
    return 1 if over else 0


if __name__ == "__main__":
    if not meter._tl.INTERPRETED.value:
        # the switch is read when triton is imported
        os.execve(
            sys.executable,
            [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:]],
            os.environ | {"TRITON_INTERPRET": "1"},
        )
    sys.exit(main())

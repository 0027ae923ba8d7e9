"""Time ops: every provider on every bench case, correctness first, one record a figure.

    python -m benchmarks.ops [--op NAME] [--case TEXT] [--precision NAME] [--provider NAME] [--json FILE] [--minutes M]

On a GPU: our backends, plain PyTorch, torch.compile, peft and the frozen layer alone; with --peers, peers found on
PYTHONPATH instead. Without a GPU a tiny smoke run of plain PyTorch and peft goes to build/bench/: its figures say
nothing about kernels.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from vlkernels import backends
from vlkernels.op import Op
from vlkernels.testing import clock, compare, meter
from vlkernels.testing.case import PRECISIONS, Case, Make, Precision

from . import ceilings, check, providers, record
from .memory import apart_of
from .providers import Instance, Provider, Unavailable
from .record import MODES, Record, Run, Store

# as people train, then all in one dtype; the others on the first case alone
MAIN_PRECISIONS = ("bf16+fp32 amp", "bf16")
SMOKE_DIMS = 64  # no dim of a CPU smoke run is larger
SECONDS = 0.3  # of samples for one figure
ON_CPU = "A CPU smoke run: its figures say nothing about kernels."


@dataclass(frozen=True)
class Job:
    """One provider on one case in one precision, in all modes."""

    op: Op
    case: Case
    precision: Precision
    provider: Provider

    def __str__(self) -> str:
        return f"{self.op.name} {self.case} [{self.precision}] {self.provider.name}"


def jobs(ops: Iterable[Op], smoke: bool = False, peers: bool = False, sweep: bool = False) -> list[Job]:
    """All jobs, most important first: each op's first case with everyone, then ours and the baseline, then the rest.

    sweep: on the op's SWEEP in place of its bench cases, in the precisions that people train in.
    """
    ranked = []
    for op in ops:
        module = compare.cases_of(op)
        baseline = providers.baseline_of(op)
        known = [PRECISIONS[name] for name in module.PRECISIONS]
        main = [p for p in known if p.name in MAIN_PRECISIONS] or known[:1]
        main.sort(key=lambda p: MAIN_PRECISIONS.index(p.name) if p.name in MAIN_PRECISIONS else 0)
        cases = getattr(module, "SWEEP", ()) if sweep else [c for c in module.CASES if "bench" in c.tags]
        for i, case in enumerate(cases[:1] if smoke else cases):
            others = [] if smoke or i or sweep else [p for p in known if p not in main]
            for j, precision in enumerate(main + others):
                for provider in providers.of(op, kernels=not smoke, peers=peers):
                    if smoke and provider.name == "compile":
                        continue
                    first = provider.kind in ("ours", "peer") or provider.name == baseline
                    tier = 0 if first and not provider.plan else 2 if provider.name == "compile" else 1
                    stage = 0 if (i, j) == (0, 0) else 3 if j >= len(main) else 1 + tier
                    job = Job(op, tiny(case) if smoke else case, precision, provider)
                    ranked.append(((stage, i, j, tier, provider.name != baseline), job))
    return [job for _, job in sorted(ranked, key=lambda pair: pair[0])]


def tiny(case: Case) -> Case:
    dims = {name: min(SMOKE_DIMS, size) for name, size in case.dims.items()}
    return dataclasses.replace(case, name=f"smoke, dims at most {SMOKE_DIMS}", dims=dims)


def measure(job: Job, run: Run, device: str, seconds: float = SECONDS) -> list[Record]:
    """The job's records, one a mode. When the correctness check fails they carry the failure and no timing."""
    blank = {
        "run": run.time,
        "op": job.op.name,
        "case": job.case.name,
        "dims": dict(job.case.dims),
        "options": dict(job.case.options),
        "recipe": job.case.recipe,
        "precision": job.precision.name,
        "provider": job.provider.name,
        "kind": job.provider.kind,
    }
    records = [Record(**blank, mode=mode) for mode in MODES]
    try:
        if job.provider.kind != "bound":
            errors = check.errors(job.op, job.provider, job.case, job.precision, device)
            for r in records:
                r.error_share = check.share_of_limit(errors)
                r.failure = check.failure(errors)
        if records[0].failure is None:
            for r in records:
                _time(job, r, run, device, seconds)
    except Unavailable as reason:
        for r in records:
            r.failure = f"{record.NOT_AVAILABLE}: {reason}"
    except Exception as error:  # one provider's failure is recorded, whatever it is, and is not the run's
        for r in records:
            r.ms, r.failure = None, r.failure or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return records


def tidy(device: str) -> None:
    """Free what the last job held. Raises when the device no longer answers."""
    torch._dynamo.reset()  # the next case is another program, not a recompilation
    gc.collect()
    clock.synchronise(device)
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def _time(job: Job, r: Record, run: Run, device: str, seconds: float) -> None:
    """Fill in the figures of one mode."""
    module, case = compare.cases_of(job.op), job.case
    itemsize = job.precision.compute.itemsize
    names = ("forward",) if r.mode == "forward" else ("forward", "backward")
    fewest = module.floor_bytes(case, itemsize)
    sets = clock.sets_past_cache(sum(fewest[n] for n in names), device)
    calls = list(callables(job, r.mode, device, sets))
    timing = clock.measure(calls, device, seconds)
    r.ms, r.ms_p20, r.ms_p80, r.n, r.clock = timing.ms, timing.ms_p20, timing.ms_p80, timing.n, timing.clock
    fill_in(r, case, module, itemsize, run.ceilings, job.provider.plan)
    with clock.peak_bytes(device) as peak:
        calls[0]()
    r.peak_bytes = peak[0] if peak else None
    del calls
    r.saved_bytes = saved_bytes(job, device)


def fill_in(r: Record, case: Case, module, itemsize: int, measured: dict[str, float], plan: str = "") -> None:
    """The figures that follow from r.ms and what cases.py counts."""
    names = ("forward",) if r.mode == "forward" else ("forward", "backward")
    flops, fewest = module.flops(case), module.floor_bytes(case, itemsize)
    if r.kind == "bound":
        return  # it computes less than the op: neither count is its own
    r.tflops = sum(flops[n] for n in names) / r.ms * 1e-9
    if r.kind == "ours":
        moved = module.bytes_moved(case, itemsize, *([plan] if plan else []))
        r.tbs = sum(moved[n] for n in names) / r.ms * 1e-9
    if measured:
        r.floor_ms = sum(ceilings.floor_ms(flops[n], fewest[n], itemsize == 4, measured) for n in names)
        r.ratio_floor = r.ms / r.floor_ms


def callables(job: Job, mode: str, device: str, sets: int = 1) -> Iterator:
    """One timed call for each of `sets` input sets of random numbers."""
    for seed in range(sets):
        instance = fresh(job, seed, device)
        if mode == "forward":
            yield instance.forward
        else:
            # with gradients on, as in the timed calls: a compiled provider would be compiled once more without
            like = torch.utils._pytree.tree_leaves(instance.forward())
            dy = tuple(torch.randn_like(t, dtype=torch.float32).to(t.dtype) for t in like)
            yield lambda i=instance, dy=dy: i.backward(i.forward(), dy)


def saved_bytes(job: Job, device: str) -> int:
    instance = fresh(job, 0, device)
    return meter.saved_bytes(instance.forward, apart_of(instance))


def fresh(job: Job, seed: int, device: str) -> Instance:
    """An instance on random numbers that draws its own dropout masks, as a layer in training does."""
    arguments = compare.cases_of(job.op).inputs(job.case, Make(job.precision, seed, device))
    if "seed" in arguments:
        arguments["seed"] = None
    return job.provider.build(job.case, arguments, job.precision)


def run_jobs(todo: list[Job], store: Store, device: str, deadline: float, seconds: float = SECONDS) -> None:
    """Measure in order until the deadline (time.monotonic seconds); the rest is recorded as not measured."""
    begin, before = time.monotonic(), list(store.not_measured)
    for i, job in enumerate(todo):
        store.not_measured = before + [str(j) for j in todo[i:]]
        if time.monotonic() > deadline:
            store.save()
            print(f"out of time: {len(todo) - i} of {len(todo)} not measured", flush=True)
            return
        found = measure(job, store.run, device, seconds)
        store.not_measured = before + [str(j) for j in todo[i + 1 :]]
        store.add(*found)
        try:
            tidy(device)
        except RuntimeError as error:
            print(f"{job}: the device no longer answers, the rest is not measured: {error}", flush=True)
            return
        print(f"  {i + 1:>3}/{len(todo)} {time.monotonic() - begin:4.0f} s  {_line(job, found)}", flush=True)


def _line(job: Job, found: list[Record]) -> str:
    if found[0].failure:
        return f"{job}: {found[0].failure}"
    return f"{job}: " + ", ".join(
        f"{r.mode} {r.ms:.3f} ms"
        + (f" ({r.ratio_floor:.2f} of floor)" if r.ratio_floor else "")
        + (f" ({r.ratio_baseline:.2f} of baseline)" if r.ratio_baseline and r.kind == "ours" else "")
        for r in found
    )


def select(todo: list[Job], options: argparse.Namespace) -> list[Job]:
    def wanted(j: Job) -> bool:
        return (
            options.op in (None, j.op.name)
            and (options.case or "") in j.case.name
            and options.precision in (None, j.precision.name)
            and options.provider in (None, j.provider.name)
        )

    return [j for j in todo if wanted(j)]


def default_path(device: str) -> Path:
    """Smoke figures never reach benchmarks/results."""
    if torch.device(device).type == "cpu":
        return record.ROOT / "build" / "bench" / "cpu.json"
    return record.RESULTS / (record.short_name(torch.cuda.get_device_name(device)) + ".json")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ops", description=__doc__.splitlines()[0])
    for name, what in (("op", "this op"), ("precision", "this precision"), ("provider", "this provider")):
        parser.add_argument(f"--{name}", help=f"{what} alone")
    parser.add_argument("--case", help="cases whose name holds this text")
    parser.add_argument("--peers", action="store_true", help="peers found on PYTHONPATH, in place of all others")
    parser.add_argument(
        "--json", type=Path, help="records file; default benchmarks/results/<gpu>.json, or build/bench/"
    )
    parser.add_argument("--sweep", action="store_true", help="the op's table of widths, ranks and rows")
    parser.add_argument("--run", help="add to this run of the records file, whose ceilings hold, instead of a new one")
    parser.add_argument("--minutes", type=float, default=30.0, help="start no measurement after so many minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    smoke = torch.device(options.device).type == "cpu"
    path = options.json or default_path(options.device)
    if options.run:
        run = Run(**record.load(path)["runs"][options.run])
    else:
        run = record.environment(options.device)
        run.ceilings = {} if smoke else ceilings.measure(options.device)
    todo = select(jobs(backends.OPS.values(), smoke, options.peers, options.sweep), options)
    if not todo:
        parser.error("nothing of that name to measure")
    print(f"{run.device}, torch {run.torch}, commit {run.commit}: {len(todo)} jobs -> {path}")
    if smoke:
        print(ON_CPU)
    store = Store(path, run, {name: providers.baseline_of(op) for name, op in backends.OPS.items()})
    run_jobs(todo, store, options.device, time.monotonic() + 60 * options.minutes)
    return int(any(r.run == run.time and r.kind == "ours" and r.broken for r in store.records.values()))


if __name__ == "__main__":
    sys.exit(main())

"""Everything that needs a GPU, in one command and a fixed time: `make gpu`, on a machine that may have no network.

    python -m benchmarks.gpu [--minutes 9.5] [--dry-run] [--skip STEP,...] [--tests all]

Tests and sanitizers first, then ceilings, predictions and timings, the most important first; what the time does not
suffice for is recorded as not measured. The records file is written after every figure. Results also go to the folder
that the environment variable OUT names; VLKERNELS_COMMIT names the commit where there is no git. Exit status: 0 all
well, 1 a check failed, 2 no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

# vlkernels looks for its compiled library when it is imported: everything that imports it waits for the build
ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
# test files in which a GPU changes nothing
NOT_ON_GPU = (
    "aot", "benchmarks", "csrc", "csrc_deformable", "csrc_epilogue", "csrc_scan", "demo", "distributed", "layout",
    "module_records", "packaging", "peers", "readme", "steps", "unfused",
)  # fmt: skip
# with these every kernel has run; the other files take a call of their own: --tests all --skip ops,questions,...
FIRST = ("ops", "large", "lora_linear", "csrc_update", "csrc_two_source")
MARKERS = "not slow and not aot and not interpreter"
SANITIZERS = ("memcheck", "racecheck")
REPORT_SECONDS = 30  # kept for what follows the last measurement
PEERS = ("unsloth", "lorafusion", "mamba_ssm", "mmcv")


@dataclass(frozen=True)
class Step:
    """seconds: the most that the step may take; 0 where the rest of the time is its limit."""

    name: str
    seconds: int
    what: str


PLAN = (
    Step("build", 150, "use build/gpu/_ops.so, else compile it with nvcc; without either, Triton alone"),
    Step(
        "tests",
        180,
        f'pytest -m "{MARKERS}" of {", ".join(FIRST)}, CUBLAS_WORKSPACE_CONFIG set, in 4 processes with xdist',
    ),
    Step(
        "sanitizer",
        60,
        f"compute-sanitizer {' and '.join(SANITIZERS)} on a small case of every kernel, beside the tests",
    ),
    Step("repeat", 30, "two runs of each op agree in every bit"),
    Step("ceilings", 20, "a copy of 4 GiB, 8192^3 products in bf16 and fp32"),
    Step("questions", 60, "predictions against measurements"),
    Step("ops", 0, "every provider on every bench case, correctness first"),
    Step("peers", 60, f"{', '.join(PEERS)}, where PYTHONPATH holds them, in a process of their own"),
    Step("report", REPORT_SECONDS, "tables, plots, README"),
)


def say(text: str) -> None:
    print(f"[{time.monotonic() - BEGIN:5.0f} s] {text}", flush=True)


BEGIN = time.monotonic()


def run(command: list[str], seconds: float, env: dict[str, str], log: Path) -> tuple[int | None, str]:
    """(exit status, or None when the time was up; the end of its output). It gets SIGINT first, to write its report."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            status = None
            for sign in (signal.SIGINT, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, sign)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                    break
    return status, "\n".join(log.read_text(errors="replace").strip().splitlines()[-12:])


def build(seconds: float) -> None:
    """Compile build/gpu/_ops.so unless it was brought along."""
    import torch

    if (BUILD / "_ops.so").exists():
        say(f"build: {BUILD.relative_to(ROOT)}/_ops.so is there")
        return
    major, minor = torch.cuda.get_device_capability()
    archs = os.environ.get("VLKERNELS_ARCHS", "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}")
    say(f"build: compiling for {archs}")
    command = [sys.executable, "setup.py", "build_ops", "--dest", str(BUILD)]
    status, tail = run(command, seconds, {"VLKERNELS_ARCHS": archs}, log_of("build"))
    if status != 0:
        say(f"build: no compiled kernels, Triton alone ({'out of time' if status is None else tail.splitlines()[-1:]})")


def log_of(name: str) -> Path:
    return ROOT / "build" / "gpu_logs" / f"{name}.txt"


def test_files(everything: bool) -> list[str]:
    """The files of FIRST, and then, if wanted, all others on which a GPU has a say."""
    first = [f"tests/test_{name}.py" for name in FIRST]
    left_out = {f"tests/test_{name}.py" for name in NOT_ON_GPU} | set(first)
    others = sorted(f"tests/{p.name}" for p in (ROOT / "tests").glob("test_*.py"))
    return first + [name for name in others if everything and name not in left_out]


def tests(seconds: float, everything: bool) -> dict:
    """Outcome of the GPU tests."""
    files = test_files(everything)
    report = log_of("tests").with_suffix(".xml")
    report.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        MARKERS,
        "-p",
        "no:cacheprovider",
        f"--junitxml={report}",
        *files,
    ]
    if importlib.util.find_spec("pytest") is None:
        return {"outcome": "not run", "detail": "pytest is not installed"}
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", "4", "--dist", "load"]  # in order, as far as the time suffices
    else:
        say("tests: pytest-xdist is not installed: one process")
    # the workspace makes cuBLAS deterministic and slower: for tests, never for timings
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "VLKERNELS_TEST_DEVICE": "cuda", "HF_HUB_OFFLINE": "1"}
    status, tail = run(command, seconds, env, log_of("tests"))
    outcome = "out of time" if status is None else "passed" if status == 0 else "failed"
    found = {"outcome": outcome, "detail": tail.splitlines()[-1] if tail else ""}
    if report.exists():
        cases = list(ET.parse(report).getroot().iter("testcase"))
        bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
        skipped = sum(c.find("skipped") is not None for c in cases)
        found["detail"] = f"{len(cases) - len(bad) - skipped} passed, {len(bad)} failed, {skipped} skipped"
        found["failed"] = [f"{c.get('classname')}::{c.get('name')}" for c in bad]
    return found


def sanitizers(seconds_each: float, deadline: float) -> dict[str, dict]:
    """Outcome of each sanitizer on each backend."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if tool is None:
        return {"sanitizer": {"outcome": "not run", "detail": "compute-sanitizer was not found"}}
    found = {}
    names = ("triton", "cuda") if (BUILD / "_ops.so").exists() else ("triton",)
    for backend in names:
        for kind in SANITIZERS:
            left = min(seconds_each, deadline - time.monotonic())
            key = f"{kind} {backend}"
            if left < 10:
                found[key] = {"outcome": "not run", "detail": "out of time"}
                continue
            command = [tool, "--tool", kind, "--error-exitcode", "99"]
            command += [sys.executable, "-m", "benchmarks.sanitize", "--backend", backend]
            # with torch's cache a read past one tensor would land in another of its blocks
            env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if kind == "memcheck" else {}
            status, tail = run(command, left, env, log_of(key.replace(" ", "_")))
            outcome = {None: "out of time", 0: "passed", 99: "failed"}.get(status, "could not run")
            lines = [line for line in tail.splitlines() if "SUMMARY" in line or "rror" in line] or tail.splitlines()[
                -1:
            ]
            found[key] = {"outcome": outcome, "detail": " ".join(lines)[:300]}
    return found


def checks(plan: dict[str, Step], skip: set[str], everything: bool = False) -> dict[str, dict]:
    """Tests, and sanitizers beside them: neither is timed."""
    found: dict[str, dict] = {}
    # all files take what the skipped steps leave
    seconds = 420 if everything else plan["tests"].seconds
    deadline = time.monotonic() + seconds
    worker = None
    if "sanitizer" not in skip:
        worker = threading.Thread(target=lambda: found.update(sanitizers(plan["sanitizer"].seconds, deadline)))
        worker.start()
    if "tests" not in skip:
        say("tests and sanitizers")
        found["tests"] = tests(seconds, everything)
    if worker:
        worker.join()
    return found


def repeats(device: str) -> dict:
    """Whether two runs of each op agree in every bit, on the small case and with the tiles of the first bench case."""
    from vlkernels import backends
    from vlkernels.testing import compare
    from vlkernels.testing.case import PRECISIONS

    from . import check, sanitize

    found = []
    for name, op in sorted(backends.OPS.items()):
        first = next(c for c in compare.cases_of(op).CASES if "bench" in c.tags)
        for backend in sanitize.runnable(op, device):
            for precision in ("bf16", "fp32"):
                for case in (sanitize.small_case(op), check.checked_case(first, True)):
                    with check.plan_of(op, first):
                        differing = check.repeats(op, backend, case, PRECISIONS[precision], device)
                    if differing:
                        found.append(f"{name} {backend} {case} [{precision}] differs in {differing}")
    return {"outcome": "failed" if found else "passed", "detail": "; ".join(found)}


def guarded(what) -> dict:
    """A check's own crash is its failure, not the run's end."""
    try:
        return what()
    except Exception as error:
        return {"outcome": "failed", "detail": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def measure(found: dict[str, dict], deadline: float, skip: set[str], out: Path | None, device: str = "cuda") -> int:
    """Ceilings, predictions, timings; the number of our own failures."""
    from vlkernels import backends

    from . import ceilings, ops, providers, questions, record

    now = record.environment(device)
    say(
        f"{now.device} {now.capability}, driver {now.driver}, clocks {now.clocks}, torch {now.torch}, CUDA {now.cuda}, "
    )
    say(f"triton {now.triton}, peft {now.peft}, Python {now.python}, commit {now.commit}, library {now.library}")
    if "repeat" not in skip:
        found["run to run"] = guarded(lambda: repeats(device))
        say(f"run to run: {found['run to run']['outcome']} {found['run to run']['detail']}")
    say("ceilings")
    now.ceilings = ceilings.measure(device)
    say(", ".join(f"{name} {value:.2f}" for name, value in now.ceilings.items()))
    path = ops.default_path(device)
    baselines = {name: providers.baseline_of(op) for name, op in backends.OPS.items()}
    store = record.Store(path, now, baselines, [out] if out else [])
    store.checks = found
    todo = ops.jobs(backends.OPS.values())
    store.not_measured = [str(job) for job in todo]
    store.save()
    if "questions" not in skip:
        asked = []
        for question in questions.QUESTIONS:
            answer = questions.answer(question, device) | {"run": now.time}
            say(question.question)
            say(f"    predicted: {answer['prediction']}")
            say(f"    measured:  {answer['measured']}")
            asked.append(answer)
        store.questions = asked
    store.not_measured = []
    present = [name for name in PEERS if importlib.util.find_spec(name)] if "peers" not in skip else []
    reserved = REPORT_SECONDS + (60 if present else 0)
    store.save()
    if "ops" not in skip:
        say(f"timing {len(todo)} jobs")
        ops.run_jobs(todo, store, device, deadline - reserved)
    if present:
        say(f"peers: {', '.join(present)}")
        command = [
            sys.executable,
            "-m",
            "benchmarks.ops",
            "--peers",
            "--json",
            str(path),
            "--run",
            now.time,
            "--minutes",
            "0.8",
        ]
        status, tail = run(command, 60, {}, log_of("peers"))
        say(f"peers: exit status {status}\n{tail}")
    return sum(r.run == now.time and r.kind == "ours" and r.broken for r in store.records.values())


def finish(out: Path | None) -> None:
    """Tables, plots and README from the records; everything to OUT."""
    from . import report
    from .record import RESULTS

    readme = ROOT / "README.md"
    try:
        report.main(["--readme", str(readme)] if readme.exists() else [])
    except Exception as error:  # the records are there; tables can be made again
        say(f"report: {type(error).__name__}: {error}")
    if out is not None:
        kept = [*RESULTS.iterdir(), *log_of("x").parent.glob("*"), *([readme] if readme.exists() else []), report.NOTES]
        for path in kept:
            if path.is_file() and path.resolve().parent != out.resolve():
                shutil.copy(path, out / path.name)
        say(f"copied to {out}")


def print_plan(minutes: float, skip: set[str]) -> None:
    from vlkernels import backends

    from . import ops

    print(f"make gpu: {minutes:g} minutes in all")
    for step in PLAN:
        limit = f"at most {step.seconds} s" if step.seconds else "the rest"
        print(f"  {step.name:<10} {'skipped' if step.name in skip else limit:<14} {step.what}")
    todo = ops.jobs(backends.OPS.values())
    print(f"{len(todo)} jobs, two modes each, in this order:")
    print("\n".join(f"  {job}" for job in todo))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything (default 9.5)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and do nothing")
    parser.add_argument("--skip", default="", help="steps to leave out, comma separated")
    parser.add_argument(
        "--tests",
        choices=("ops", "all"),
        default="ops",
        help="those that run every kernel, or all, for 7 minutes",
    )
    options = parser.parse_args(argv)
    plan = {step.name: step for step in PLAN}
    skip = set(filter(None, options.skip.split(",")))
    if skip - set(plan):
        parser.error(f"--skip knows {', '.join(plan)}")
    import torch

    if not torch.cuda.is_available():
        print(f"no GPU here: torch {torch.__version__} sees no CUDA device, and this command measures one", flush=True)
    if options.dry_run:
        print_plan(options.minutes, skip)
        return 0
    if not torch.cuda.is_available():
        print("`python -m benchmarks.gpu --dry-run` prints what it would do; `make bench` runs without a GPU")
        return 2
    deadline = BEGIN + 60 * options.minutes
    out = Path(os.environ["OUT"]) if os.environ.get("OUT") else None
    if "build" not in skip:
        build(plan["build"].seconds)
    found = checks(plan, skip, options.tests == "all")
    for name, outcome in found.items():
        say(f"{name}: {outcome['outcome']} {outcome['detail']}")
        for test in outcome.get("failed", [])[:20]:
            say(f"    {test}")
    failures = measure(found, deadline, skip, out)
    finish(out)
    bad = [name for name, outcome in found.items() if outcome["outcome"] == "failed"]
    bad += ["tests out of time"] if found.get("tests", {}).get("outcome") == "out of time" else []
    say(f"done; failed checks: {', '.join(bad) or 'none'}; failed measurements of ours: {failures}")
    return 1 if bad or failures else 0


if __name__ == "__main__":
    sys.exit(main())

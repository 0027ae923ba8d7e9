"""`make bench`: the ops under pytest-benchmark, timed by a wall clock that waits for the device.

Each test checks correctness first and fails without a figure when the check does. The record is in the benchmark's
extra_info, in the schema of benchmarks/record.py; `python -m benchmarks.report --json FILE` makes the tables and plots.
"""

import math

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install pytest-benchmark, or time with python -m benchmarks.ops")

from vlkernels import backends  # noqa: E402
from vlkernels.testing import clock, compare  # noqa: E402

from . import ceilings, check, ops, record  # noqa: E402
from .providers import Unavailable  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMOKE = DEVICE == "cpu"
ROUNDS = 10 if SMOKE else 30
JOBS = ops.jobs(backends.OPS.values(), smoke=SMOKE)


@pytest.fixture(scope="session")
def run():
    torch.set_num_threads(1)
    found = record.environment(DEVICE)
    found.ceilings = {} if SMOKE else ceilings.measure(DEVICE)
    return found


@pytest.mark.benchmark(timer=clock.timer(DEVICE))
@pytest.mark.parametrize("mode", record.MODES)
@pytest.mark.parametrize("job", JOBS, ids=str)
def test_op(benchmark, job, mode, run):
    share = None
    try:
        if job.provider.kind != "bound":
            errors = check.errors(job.op, job.provider, job.case, job.precision, DEVICE)
            failure, share = check.failure(errors), check.share_of_limit(errors)
            assert failure is None, failure
        module, itemsize = compare.cases_of(job.op), job.precision.compute.itemsize
        sets = clock.sets_past_cache(module.floor_bytes(job.case, itemsize)["forward"], DEVICE)
        calls = list(ops.callables(job, mode, DEVICE, sets))
    except Unavailable as reason:
        pytest.skip(str(reason))
    turn = iter(range(10**9))
    benchmark.pedantic(lambda: calls[next(turn) % len(calls)](), rounds=ROUNDS, warmup_rounds=3 + sets, iterations=1)
    timing = clock.Timing.of([1e3 * s for s in benchmark.stats.stats.data], 3 + sets, "wall")
    r = record.Record(
        run.time, job.op.name, job.case.name, dict(job.case.dims), dict(job.case.options), job.case.recipe,
        job.precision.name, job.provider.name, job.provider.kind, mode,
        ms=timing.ms, ms_p20=timing.ms_p20, ms_p80=timing.ms_p80, n=timing.n, clock=timing.clock, error_share=share,
    )  # fmt: skip
    ops.fill_in(r, job.case, module, itemsize, run.ceilings)
    assert math.isfinite(r.ms)
    benchmark.extra_info["record"] = vars(r)
    benchmark.extra_info["run"] = vars(run)
    ops.tidy(DEVICE)

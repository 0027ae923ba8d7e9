"""The benchmark wing without a GPU: budgets, records, reports, and that no figure comes from a wrong kernel."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import check, gpu, memory, ops, providers, record, report, support, tables, tune
from benchmarks.budgets import BUDGETS
from vlkernels import backends
from vlkernels.testing import clock, compare, meter
from vlkernels.testing.case import PRECISIONS

ROOT = Path(__file__).resolve().parent.parent
OPS = tuple(backends.OPS.values())
LORA = backends.OPS["lora_linear"]
interpreted = pytest.mark.skipif(not meter._tl.INTERPRETED.value, reason="bytes are counted in the interpreter")


def small(subject):
    """The subject on its budget's small dims."""
    dims = {**subject.case.dims, **BUDGETS[subject.op.name].small}
    return dataclasses.replace(subject, case=dataclasses.replace(subject.case, dims=dims))


def budgeted():
    for op in OPS:
        if op.name not in BUDGETS:
            yield pytest.param(op, None, id=f"{op.name}-undeclared")
            continue
        found = memory.subjects(op)
        modules = [s for s in found if s.kind == "module"]
        for subject in (next(s for s in found if s.case.get("p", 0.05)), *modules):
            name = f"{op.name}-{subject.kind}-{subject.precision}-{subject.case.get('p', 0.0)}"
            yield pytest.param(op, subject, id=name)


@interpreted
@pytest.mark.parametrize("op, subject", list(budgeted()))
def test_budget(op, subject):
    """Saved bytes and FLOPs of the op and of each swapped module, counted on a small case, are within the budget."""
    assert subject is not None, f"declare what {op.name} may cost in benchmarks/budgets.py"
    subject = small(subject)
    entry = memory.entry(subject)
    assert not entry["budget"]["over"]
    # the budget is what is saved, not more than it
    assert entry["ours"]["saved"][0] == entry["budget"]["saved_per_token"]
    if op is LORA:  # fusion is there to move less
        assert entry["ratio"]["moved"] < 1
        assert entry["ratio"]["launches"] < 1


@interpreted
def test_budget_is_held():
    """A kernel that saves more than its budget is reported."""
    subject = small(memory.subjects(LORA)[0])
    wasteful = memory.Count((1e4, 0.0), True, (1e9, 0.0), {"forward": (1, 0), "backward": (1, 0)}, {})
    stock = dataclasses.replace(wasteful, flops=(1e8, 0.0))
    over = memory.over_budget(subject, wasteful, stock)
    assert len(over) == 2 and "bytes" in over[0] and "FLOPs" in over[1]


def test_memory_record():
    """The committed record covers the bench cases as they are, is within budget, and makes a table."""
    content = json.loads((record.RESULTS / "memory.json").read_text())
    assert content["schema"] == memory.SCHEMA
    counted = {(e["op"], e["case"]) for e in content["entries"]}
    for name in BUDGETS:
        if name in backends.OPS:
            cases = compare.cases_of(backends.OPS[name]).CASES
            cases = [c for c in cases if "bench" in c.tags and "uncounted" not in c.tags]
            assert {(name, c.name) for c in cases} <= counted, (
                "run python -m benchmarks.memory --json benchmarks/results/..."
            )
    assert not [e for e in content["entries"] if e["budget"]["over"]]
    lines = tables.memory_lines(content)
    assert len(lines) == len(content["entries"]) + 5


README = """# A project
<!-- begin:support -->
old
<!-- end:support -->
between
<!-- begin:memory -->
<!-- end:memory -->
<!-- begin:speed -->
<!-- end:speed -->
the end
"""


def test_readme_sections(tmp_path):
    """Sections are replaced, the rest stays, a second run changes nothing; without GPU records there is no speed."""
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert report.main(["--readme", str(readme), "--results", str(tmp_path), "--no-plots"]) == 0
    first = readme.read_text()
    assert "old" not in first and "between" in first and first.endswith("the end\n")
    assert f"<!-- begin:speed -->\n{tables.NOT_MEASURED}\n<!-- end:speed -->" in first
    for name in backends.OPS:
        assert f"| {name} | reference |" in first
    assert report.main(["--readme", str(readme), "--results", str(tmp_path), "--no-plots"]) == 0
    assert readme.read_text() == first


@pytest.mark.parametrize(
    "text, message",
    [
        ("<!-- begin:speed -->\n", "do not pair"),
        ("<!-- begin:sped -->\n<!-- end:sped -->\n", "no section named 'sped'"),
        ("<!-- begin:speed -->\n<!-- end:speed -->\n" * 2, "do not pair"),
    ],
)
def test_readme_markers(text, message):
    with pytest.raises(ValueError, match=message):
        report.fill(text, {"speed": ["x"]})


def test_committed_tables_are_current():
    """NOTES.md, and README.md where it has the sections, show what the committed records say."""
    found = tables.sections()
    for path in (report.NOTES, ROOT / "README.md"):
        if path.exists():
            text = path.read_text()
            assert report.fill(text, found) == text, f"python -m benchmarks.report --readme README.md ({path.name})"


def test_support_matrix(tmp_path):
    """Triton's cells say "not compiled yet" until the ahead-of-time record holds a build without problems."""
    before = [line for line in support.support_lines(tmp_path) if "| lora_linear | triton |" in line]
    assert support.NOT_COMPILED in before[0]
    build = {"op": "lora_linear", "arch": 90, "cases": ["a case [bf16]"], "problems": []}
    spilling = build | {"arch": 100, "problems": ["2 spill instructions"]}
    (tmp_path / "aot.json").write_text(json.dumps([build, spilling]))
    cells = [line for line in support.support_lines(tmp_path) if "| lora_linear | triton |" in line][0].split(" | ")
    assert cells.count("sm_90") == 1 and not any("sm_100" in c for c in cells)
    assert support.refusal(LORA, "triton", PRECISIONS["bf16"], 90) is None
    assert "8.0" in support.refusal(LORA, "triton", PRECISIONS["bf16"], 75)


def run_here():
    return record.environment("cpu")


def smoke_job(name: str) -> ops.Job:
    case = next(c for c in compare.cases_of(LORA).CASES if "bench" in c.tags)
    provider = providers.named(LORA, name)
    return ops.Job(LORA, ops.tiny(case), PRECISIONS["bf16+fp32 amp"], provider)


@pytest.mark.parametrize("name", ["peft", "eager", "frozen linear"])
def test_smoke(name, tmp_path):
    """The engine on a CPU: a record a mode with every figure that a CPU has, in a file of the schema."""
    pytest.importorskip("peft")
    now = run_here()
    found = ops.measure(smoke_job(name), now, "cpu", seconds=0.01)
    assert [r.mode for r in found] == list(record.MODES)
    for r in found:
        assert r.failure is None and 0 < r.ms_p20 <= r.ms <= r.ms_p80 and r.n >= 10 and r.clock == "wall"
        assert name == "frozen linear" or r.error_share <= 1
        assert r.ratio_floor is None and r.peak_bytes is None  # a CPU has no ceilings here and counts no allocations
    store = record.Store(tmp_path / "cpu.json", now, {"lora_linear": "peft"}, [tmp_path / "copy"])
    store.add(*found)
    content = record.load(tmp_path / "cpu.json")
    assert (tmp_path / "copy" / "cpu.json").read_text() == (tmp_path / "cpu.json").read_text()
    assert {f.name for f in dataclasses.fields(record.Record)} == set(content["records"][0])
    for row in record.rows(content):
        assert row["commit"] and row["torch"] == torch.__version__ and row["package"] and row["time"] == row["run"]
    assert any(ops.ON_CPU in line for line in tables.condition_lines(content))
    assert "not measured" not in "\n".join(tables.full_lines(content, "CPU"))


def test_smoke_leaves_results_alone():
    assert record.RESULTS not in ops.default_path("cpu").parents


def test_plain_providers_compute_the_op():
    """peft and plain PyTorch as they are timed obey the rule that our kernels obey."""
    pytest.importorskip("peft")
    case = next(c for c in compare.cases_of(LORA).CASES if "sharp" in c.tags)
    for name in ("peft", "eager"):
        for precision in ("fp32", "bf16+fp32"):
            found = check.errors(LORA, providers.named(LORA, name), case, PRECISIONS[precision], "cpu")
            assert {e.name for e in found} == {"y", "dx", "da", "db", "dbias", "dlora_bias"}
            assert check.failure(found) is None


@interpreted
def test_wrong_kernel_gets_no_timing():
    """A kernel that computes something else gets a record that says so and carries no figure."""
    job = dataclasses.replace(smoke_job("eager"), provider=providers.ours(LORA, "triton"))
    job = dataclasses.replace(job, case=dataclasses.replace(job.case, dims={"T": 16, "K": 32, "N": 32, "R": 16}))
    kernels = LORA.kernels["triton"]
    right = check.errors(LORA, job.provider, job.case, job.precision, "cpu")
    assert check.failure(right) is None

    forward = kernels.forward

    def wrong(*values, **kwargs):
        y, s = forward(*values, **kwargs)
        return y * 1.05, s

    with mock.patch.object(kernels, "forward", wrong), mock.patch.object(clock, "measure") as measured:
        found = ops.measure(job, run_here(), "cpu")
    assert not measured.called
    for r in found:
        assert r.ms is None and r.tflops is None and r.error_share > 1 and r.broken and r.failure.startswith("y: error")
    content = {"runs": {found[0].run: vars(run_here())}, "records": [vars(r) for r in found]}
    content["runs"][found[0].run]["time"] = found[0].run
    assert "failed" in "\n".join(tables.speed_lines(content))


def test_unavailable_is_recorded():
    """A provider that cannot run says why, and does not end the run."""

    def build(*_):
        raise providers.Unavailable("not installed")

    job = dataclasses.replace(smoke_job("eager"), provider=providers.Provider("absent", build, "peer"))
    found = ops.measure(job, run_here(), "cpu")
    assert all(r.ms is None and r.failure == "not available: not installed" and not r.broken for r in found)


def test_ratios():
    """Ratios are within a run, a case, a precision and a mode, over the op's baseline and over everyone."""
    blank = dict(
        run="a", op="lora_linear", case="c", dims={}, options={}, recipe="", precision="bf16", kind="", mode="forward"
    )
    times = {"peft": 2.0, "triton": 1.0, "broken": None}
    found = {name: record.Record(**blank, provider=name, ms=ms) for name, ms in times.items()}
    other = record.Record(**(blank | {"run": "b"}), provider="triton", ms=5.0)
    record.relate([*found.values(), other], {"lora_linear": "peft"})
    assert found["triton"].ratio_baseline == 0.5 and found["triton"].ratios == {"peft": 0.5}
    assert found["broken"].ratio_baseline is None and other.ratio_baseline is None


def test_records_of_another_schema_are_refused(tmp_path):
    path = tmp_path / "old.json"
    path.write_text('{"schema": 0, "records": []}')
    with pytest.raises(ValueError, match="schema 0"):
        record.load(path)


def test_device_names():
    names = {"NVIDIA H200": "h200", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA GeForce RTX 4090": "rtx_4090"}
    assert {name: record.short_name(name) for name in names} == names


def test_job_order():
    """The first case with everyone comes first; compile, which is slow to start, comes last."""
    todo = [j for j in ops.jobs([LORA])]
    everyone = todo[: len(providers.of(LORA))]
    assert {"peft", "eager", "compile", "triton packed"} <= {j.provider.name for j in everyone}
    assert len({(j.case.name, j.precision.name) for j in everyone}) == 1
    assert todo[-1].provider.name == "compile"
    assert len({str(j) for j in todo}) == len(todo)


def test_clock():
    timing = clock.measure([lambda: None, lambda: None], "cpu", seconds=0.001, least=10, most=20)
    assert timing.ms_p20 <= timing.ms <= timing.ms_p80 and 10 <= timing.n <= 20 and timing.clock == "wall"
    assert clock.percentile([1.0, 2.0, 3.0], 0.5) == 2.0 and clock.percentile([1.0, 2.0], 0.25) == 1.25
    assert clock.sets_past_cache(1, "cpu") == 1
    with mock.patch.object(clock, "cache_bytes", lambda device: 60 << 20):
        assert clock.sets_past_cache(512 << 20, "cuda") == 2
        assert clock.sets_past_cache(40 << 20, "cuda") == 4
        assert clock.sets_past_cache(1, "cuda") == 8


def test_tune_neighbours():
    from vlkernels.ops._lora import Tile

    tile = Tile(rows=64, cols=128, rank=128, warps=4)
    found = list(tune.neighbours(tile))
    assert tile not in found and len(set(found)) == len(found)
    assert all(sum(getattr(t, f.name) != getattr(tile, f.name) for f in dataclasses.fields(tile)) == 1 for t in found)


def test_sweep():
    """The table that users ask for: rows x widths x ranks x dropout, and decoding's rows."""
    found = {tuple(job.case[d] for d in "TKNR") + (job.case.get("p"),) for job in ops.jobs([LORA], sweep=True)}
    for T in (2048, 8192, 32768):
        for K, N in ((4096, 4096), (4096, 11008), (11008, 4096), (4096, 14336)):
            assert {(T, K, N, R, p) for R in (8, 16, 64, 128, 256) for p in (0.0, 0.05)} <= found
    assert {1, 16} <= {T for T, *_ in found}
    assert not ops.jobs([backends.OPS["mlp_projector"]], sweep=True)


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_gpu_dry_run():
    """The plan prints without a GPU and says that there is none."""
    result = command("benchmarks.gpu", "--dry-run")
    assert result.returncode == 0, result.stderr
    for step in gpu.PLAN:
        assert step.name in result.stdout
    assert "jobs, two modes each" in result.stdout
    assert torch.cuda.is_available() or "no GPU here" in result.stdout


def test_gpu_test_files():
    """Every file that may have a say on a GPU, those that run all kernels first."""
    few, every = gpu.test_files(False), gpu.test_files(True)
    assert every[: len(few)] == few and "tests/test_ops.py" in few and len(set(every)) == len(every)
    assert all((gpu.ROOT / name).exists() for name in every)
    left = {p.name for p in (gpu.ROOT / "tests").glob("test_*.py")} - {Path(name).name for name in every}
    assert left == {f"test_{name}.py" for name in gpu.NOT_ON_GPU}


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("arguments", [("benchmarks.gpu",), ("benchmarks.tune", "--op", "lora_linear")])
def test_no_gpu(arguments):
    result = command(*arguments)
    assert result.returncode == 2 and "no GPU here" in result.stdout


def test_gpu_time_limit(tmp_path):
    """A step that runs too long is interrupted and reported, with what it printed."""
    code = "print('started', flush=True); import time; time.sleep(60)"
    status, tail = gpu.run([sys.executable, "-c", code], 2.0, {}, tmp_path / "log.txt")
    assert status is None and tail.startswith("started")

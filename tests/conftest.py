"""One thread, poisoned memory, Triton's interpreter where there is no GPU, and a limit on what a test may take."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def _gpu() -> bool:
    # asked in a process of its own: the answer is needed before triton is imported, and asking starts CUDA
    code = "import torch; raise SystemExit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


if "VLKERNELS_TEST_DEVICE" not in os.environ:
    os.environ["VLKERNELS_TEST_DEVICE"] = "cuda" if _gpu() else "cpu"
if os.environ["VLKERNELS_TEST_DEVICE"] == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402  (after TRITON_INTERPRET is set)

torch.set_num_threads(1)
LIMIT_S = 20.0
# where hyper-threads are shared a test takes up to twice the processor time: one between the two limits is only named
FAIL_S = 2 * LIMIT_S


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def on_the_reference():
    """Where a test names no backend: its subject is the module, not the kernels."""
    from vlkernels import use_backend

    with use_backend("reference"):
        yield


@pytest.fixture
def device() -> str:
    return os.environ["VLKERNELS_TEST_DEVICE"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    slow = item.get_closest_marker("slow") is not None
    # processor time, for the wall also counts what others do on a shared machine
    if call.when == "call" and report.passed and not slow and item.user_properties:
        seconds = dict(item.user_properties).get("cpu_seconds", 0.0)
        if seconds > FAIL_S:
            report.outcome = "failed"
            report.longrepr = (
                f"took {seconds:.0f} s of processor time; mark it slow or make it shorter ({LIMIT_S:.0f} s)"
            )
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        item.user_properties.append(("cpu_seconds", round(sum(os.times()[:4]) - before, 2)))


def pytest_terminal_summary(terminalreporter):
    """Tests that are not marked slow and took long, for whoever adds to them next."""
    took = {r.nodeid: dict(r.user_properties).get("cpu_seconds", 0.0) for r in terminalreporter.stats.get("passed", [])
            if r.when == "call" and "slow" not in r.keywords}  # fmt: skip
    for name, seconds in sorted(took.items(), key=lambda pair: -pair[1]):
        if seconds > LIMIT_S:
            terminalreporter.write_line(
                f"over {LIMIT_S:.0f} s of processor time, mark it slow: {name} ({seconds:.0f} s)"
            )

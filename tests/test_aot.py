"""Every Triton kernel, in every configuration that its bench cases get, compiled ahead of time."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = "bf16,bf16+fp32 amp,fp32"
pytestmark = pytest.mark.aot


def compiled(tmp_path, *arguments: str) -> list[dict]:
    """The checker runs in a process of its own: under the interpreter a kernel has nothing to compile."""
    record = tmp_path / "aot.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "vlkernels.testing.aot", "--json", str(record), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(record.read_text())


def check(results: list[dict], arch: int) -> None:
    assert results
    for r in results:
        assert r["arch"] == arch and r["spills"] == 0 and r["stack"] == 0 and not r["problems"], r
        assert 0 < r["registers"] <= 255 and r["plain_tf32"] == 0, r
        tile = r["config"]
        rows = tile.get("BLOCK_C") or tile.get("BLOCK_T") or 0
        # without a side there are only sums
        product = tile.get("PRODUCT") in ("bf16", "fp16") and tile.get("HAS_SIDE", True)
        if arch == 90 and product and rows >= 64:
            assert r["wgmma"] > 0, r


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_all_builds(tmp_path, arch):
    check(compiled(tmp_path, "--arch", str(arch)), arch)


@pytest.fixture(scope="module")
def sm_90(tmp_path_factory) -> list[dict]:
    """Some builds of each kernel in the precisions that people train in; all of them are in test_all_builds."""
    return compiled(tmp_path_factory.mktemp("aot"), "--arch", "90", "--precision", PRECISIONS, "--most", "2")


def test_sm_90(sm_90):
    check(sm_90, 90)


def test_every_kernel_is_compiled(sm_90):
    """A kernel that no bench case launches would never be looked at."""
    from vlkernels import backends, ops

    shared = [importlib.import_module(f"vlkernels.ops.{m.name}") for m in pkgutil.iter_modules(ops.__path__)]
    compiled = {r["kernel"] for r in sm_90}
    for module in (*shared, *(op.kernels["triton"] for op in backends.OPS.values())):
        defined = {name for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "fn")}
        assert defined <= compiled, module.__name__
    assert {r["op"] for r in sm_90} == set(backends.OPS)


def test_plain_tf32_is_seen(tmp_path):
    """A product of float32 operands in one tf32 pass is reported: the check can fail."""
    code = (
        "from vlkernels.testing import aot\n"
        "from vlkernels.ops import _tl\n"
        "plain = _tl.product\n"
        "_tl.product = lambda dtype: plain(dtype) | {'PRECISION': 'tf32'}\n"
        "from vlkernels import backends\n"
        "builds = aot.recorded_builds(backends.OPS['lora_linear'], 90, ('fp32',))\n"
        "build = next(b for b in builds if b.kernel == 'lora_down_kernel')\n"
        "assert aot.compile_build(build)['plain_tf32'] > 0\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

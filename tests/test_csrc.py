"""The compiled wing where no GPU is: nvcc's reports, the library's symbols and border."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from vlkernels import _library

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "test_csrc"
ARCHS = ("sm_80", "sm_90a", "sm_100")


@contextlib.contextmanager
def locked(name: str):
    """One builder at a time, also across pytest-xdist's processes."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(*command, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=ROOT, **kwargs)


def python(code: str, **environment) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "VLKERNELS_OPS"} | environment
    return run(sys.executable, "-c", textwrap.dedent(code), env=env)


# -- nvcc ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def objects() -> Path:
    """Folder of the objects and ptxas reports of all of csrc, built for the default archs; _ops.so lies in BUILD."""
    with locked("nvcc"):
        env = {k: v for k, v in os.environ.items() if k != "VLKERNELS_ARCHS"}
        command = (sys.executable, "setup.py", "build_ops", "--dest", BUILD, "--objects", BUILD / "objects")
        built = run(*command, env=env)
    if "nothing can be compiled" in built.stderr:
        pytest.skip(built.stderr.strip().splitlines()[-1])
    assert built.returncode == 0, built.stdout + built.stderr
    return BUILD / "objects"


@pytest.fixture(scope="module")
def library(objects) -> Path:
    return BUILD / "_ops.so"


@dataclass(frozen=True)
class Usage:
    kernel: str
    arch: str
    stack: int
    spill: int
    registers: int
    shared: int


def ptxas_usage(folder: Path) -> list[Usage]:
    pattern = re.compile(
        r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers[^\n]*?(?:(\d+) bytes smem|\n)",
        re.DOTALL,
    )
    return [
        Usage(kernel, arch, int(stack), int(stores) + int(loads), int(registers), int(shared or 0))
        for report in folder.glob("*.cu.o.log")
        for kernel, arch, stack, stores, loads, registers, shared in pattern.findall(report.read_text())
    ]


@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_spills(objects, arch, record_property):
    usage = [u for u in ptxas_usage(objects) if u.arch == arch and "two_source" not in u.kernel]
    kernels = {u.kernel for u in usage}
    # 3 dtypes of base with fp32 s; 2 half dtypes x b in that dtype or fp32 x b along r or along n
    assert sum("update_fma_kernel" in name for name in kernels) == 3
    assert sum("update_mma_kernel" in name for name in kernels) == 8
    # forward and backward in 3 dtypes
    assert sum("selective_scan" in name for name in kernels) == 6
    for u in usage:
        record_property(f"{u.kernel} {arch}", f"{u.registers} registers, {u.shared} bytes of shared memory")
        assert u.stack == 0 and u.spill == 0, u
        assert u.registers <= 255, u
        # two blocks of 256 threads fill the 65,536 registers of a multiprocessor; a scan's have 128, and shared
        # memory keeps them to one a multiprocessor
        assert u.registers <= (255 if "selective_scan" in u.kernel else 128), u


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    with contextlib.suppress(ImportError):
        import triton

        found = found or shutil.which(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_machine_code_is_as_promised(objects, arch):
    tool = cuobjdump()
    if tool is None:
        pytest.skip("cuobjdump was not found")
    sass = run(tool, "-sass", "-arch", arch, objects / "csrc_lora_linear_lora_linear_update.cu.o").stdout
    functions = dict(re.findall(r"Function : (\S+)\n(.*?)(?=Function : |\Z)", sass, re.DOTALL))
    assert len(functions) == 11
    assert "TF32" not in sass
    for name, code in functions.items():
        assert "LDG.E.128" in code and "STG.E.128" in code, name
        assert "STL" not in code and "LDL" not in code, name
        if "fma_kernel" in name:
            assert "FFMA" in code and "HMMA" not in code, name
        else:
            dtype = ".BF16" if "bfloat16" in name else ""
            assert f"HMMA.16816.F32{dtype} " in code and "LDSM" in code and "LDGSTS.E.BYPASS.128" in code, name


# -- the library -----------------------------------------------------------------------------------------------------


def test_library_needs_neither_python_nor_cudart(library):
    needed = re.findall(r"\(NEEDED\).*\[(\S+)\]", run("readelf", "-d", library).stdout)
    assert "libtorch.so" in needed
    assert not [name for name in needed if re.match(r"lib(cuda|cudart|python|torch_(python|cuda)|c10_cuda)\b", name)]
    symbols = run("nm", "-D", library).stdout
    assert not re.search(r"\b_?Py[A-Z_]", symbols)
    assert not re.search(r"\b[TW] cuda[A-Z]", symbols), "the static CUDA runtime must not answer for other libraries"
    # undefined but weak: the CPU build of torch has no such function
    assert re.search(r"\bw aoti_torch_get_current_cuda_stream\b", symbols)


def test_library_loads_and_registers_the_op(library):
    loaded = python(
        f"""
        import torch
        torch.ops.load_library({str(library)!r})
        print(torch.ops.vlkernels_cuda.lora_linear_update.default._schema)
        x = torch.zeros(2, 2)
        try:
            torch.ops.vlkernels_cuda.lora_linear_update(x, x, x, None, None, 1.0, 0.0, x)
        except RuntimeError as error:
            print(error)
        assert not torch.cuda.is_initialized()
        """
    )
    schema, error = loaded.stdout.splitlines()[:2]
    assert schema == (
        "vlkernels_cuda::lora_linear_update(Tensor base, Tensor s, Tensor b, Tensor? bias, Tensor? seed, "
        "float scale, float p, Tensor(a!) out) -> ()"
    ), loaded.stderr
    assert "lora_linear_update: base is not on a CUDA device" in error


def test_library_is_found_by_environment(library):
    answers = python(
        f"""
        import json, os, torch
        from vlkernels import _library
        for path in ({str(BUILD / "none.so")!r}, {str(ROOT / "setup.py")!r}, {str(library)!r}):
            os.environ["VLKERNELS_OPS"] = path
            print(json.dumps([path, _library.load(), _library.load(), _library.info(), _library.covers((9, 0))]))
        assert not torch.cuda.is_initialized()
        """,
        VLKERNELS_OPS=str(BUILD / "none.so"),
    )
    assert answers.returncode == 0, answers.stderr
    absent, broken, good = (json.loads(line) for line in answers.stdout.splitlines())
    for (path, first, second, info, covered), reason in ((absent, "is no file"), (broken, "does not load")):
        assert path in first and reason in first and second == first
        assert info == {"path": None, "reason": first} and covered is False
    path, first, second, info, covered = good
    assert (first, second, covered, info["path"]) == (None, None, True, path)
    assert info["archs"] == [*ARCHS, "compute_100"]
    # two_source is left out where CUTLASS's headers are absent
    held = ["deformable_attention", "lora_linear", "selective_scan"]
    assert [op for op in info["ops"] if op != "two_source"] == held
    assert info["torch_target"] == "2.11" and re.match(r"\d+\.\d+", info["cuda"])


@pytest.mark.parametrize(
    "arch, runs_on, refuses",
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0)]),
        ("sm_90a", [(9, 0)], [(8, 0), (10, 0), (12, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("compute_100", [(10, 0), (10, 3), (12, 0)], [(8, 0), (9, 0)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
    ],
)
def test_which_devices_an_image_serves(arch, runs_on, refuses):
    assert all(_library._runs_on(arch, capability) for capability in runs_on)
    assert not any(_library._runs_on(arch, capability) for capability in refuses)

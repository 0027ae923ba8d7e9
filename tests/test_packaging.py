"""What pip builds and installs, and what setup.py says when it cannot compile."""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, cwd, **environment) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("VLKERNELS_", "PYTHON"))} | environment
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=env)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """What a clone holds, with the folders beside the package that must stay out of a wheel."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "MANIFEST.in", "README.md", "csrc", "vlkernels"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        elif source.exists():
            shutil.copy(source, folder / name)
    for name in ("models", "tests", "benchmarks"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    (folder / "vlkernels" / "_ops.so").write_text("left over from an editable install")
    tuned = folder / "vlkernels" / "ops" / "lora_linear" / "tuned"
    tuned.mkdir(exist_ok=True)
    (tuned / "device.json").write_text("{}")
    return folder


def build_wheel(checkout: Path, folder: Path, **environment) -> Path:
    command = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, checkout)
    built = run(sys.executable, *command, cwd=folder, **environment)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(wheel: Path, folder: Path) -> Path:
    """The Python of a fresh environment with this wheel, and with this environment's packages behind it."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    purelib = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    )
    # sys.path entries from a .pth come last, and .pth files inside them (editable installs) are not followed
    (purelib / "behind.pth").write_text("\n".join({sysconfig.get_path("purelib"), *site.getsitepackages()}))
    installed = run(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder
    )
    assert installed.returncode == 0, installed.stdout + installed.stderr
    return python


@pytest.fixture(scope="module")
def pure_wheel(checkout, tmp_path_factory) -> Path:
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"), VLKERNELS_BUILD="none")


@pytest.fixture(scope="module")
def python(pure_wheel, tmp_path_factory) -> Path:
    return install(pure_wheel, tmp_path_factory.mktemp("environment"))


def test_wheel_holds_only_the_package(pure_wheel, checkout):
    assert pure_wheel.name == "vlkernels-0.1.0-py3-none-any.whl"
    names = zipfile.ZipFile(pure_wheel).namelist()
    package = {name for name in names if name.startswith("vlkernels/")}
    assert {name.split("/")[0] for name in names} == {"vlkernels", "vlkernels-0.1.0.dist-info"}
    assert {str(p.relative_to(checkout)) for p in (checkout / "vlkernels").rglob("*.py")} <= package
    assert not [name for name in package if not name.endswith((".py", ".json", "py.typed"))]
    assert {"vlkernels-0.1.0.dist-info/licenses/LICENSE", "vlkernels/ops/lora_linear/tuned/device.json"} <= set(names)


def test_version_is_one(pure_wheel):
    import vlkernels

    assert vlkernels.__version__ == pure_wheel.name.split("-")[1]


def test_wheel_imports_in_a_fresh_environment(python, tmp_path):
    code = "import vlkernels; print(vlkernels.__file__); from vlkernels import _library; print(_library.load())"
    imported = run(python, "-c", code, cwd=tmp_path)
    assert imported.returncode == 0, imported.stderr
    file, reason = imported.stdout.splitlines()
    assert Path(file).is_relative_to(python.parent.parent)
    assert "this install holds no compiled kernels" in reason


@pytest.mark.skipif(not (ROOT / "vlkernels" / "__main__.py").exists(), reason="python -m vlkernels is not written yet")
def test_wheel_prints_info_in_a_fresh_environment(python, tmp_path):
    import torch

    info = run(python, "-m", "vlkernels", "info", cwd=tmp_path)
    assert info.returncode == 0, info.stderr
    assert "0.1.0" in info.stdout and torch.__version__ in info.stdout and "lora_linear" in info.stdout


@pytest.mark.slow
def test_compiled_wheel_serves_a_fresh_environment(checkout, tmp_path):
    setup = load_setup()
    try:
        setup.find_tools()
    except setup.Unavailable as reason:
        pytest.skip(str(reason))
    wheel = build_wheel(checkout, tmp_path, VLKERNELS_BUILD="cuda", VLKERNELS_ARCHS="sm_80")
    names = zipfile.ZipFile(wheel).namelist()
    assert "vlkernels/_ops.so" in names and {name.split("/")[0] for name in names} == {
        "vlkernels",
        "vlkernels-0.1.0.dist-info",
    }
    python = install(wheel, tmp_path / "environment")
    code = """if True:
        import json, sys
        from vlkernels import _library
        reason = _library.load()
        try:
            from vlkernels import _C
            module = _C.info()
        except ImportError:
            module = None
        print(json.dumps([reason, _library.info(), module]))
    """
    answer = run(python, "-c", code, cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr
    reason, info, module = json.loads(answer.stdout)
    assert reason is None
    assert Path(info.pop("path")).is_relative_to(tmp_path / "environment")
    assert info["archs"] == ["sm_80"]
    if importlib.util.find_spec("pybind11"):
        assert module == info


# -- setup.py --------------------------------------------------------------------------------------------------------


def load_setup():
    spec = importlib.util.spec_from_file_location("vlkernels_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch):
    for name in ("VLKERNELS_BUILD", "VLKERNELS_ARCHS", "VLKERNELS_CUTLASS", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    return load_setup()


def hide(monkeypatch, hidden: str):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == hidden else find_spec(name, *a))


def test_cuda_without_nvcc_fails_with_the_reason(checkout, tmp_path):
    command = ("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, checkout)
    built = run(sys.executable, *command, cwd=tmp_path, VLKERNELS_BUILD="cuda", CUDA_HOME=str(tmp_path))
    assert built.returncode != 0
    reason = f"VLKERNELS_BUILD=cuda, and nothing can be compiled: nvcc was not found (looked for {tmp_path}/bin/nvcc)"
    assert reason in built.stdout + built.stderr


def test_auto_without_nvcc_is_pure_python(setup, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    said = []
    assert setup.extensions(said.append) == []
    assert said == [f"pure Python, without compiled kernels: nvcc was not found (looked for {tmp_path}/bin/nvcc)"]


def fake_nvcc(folder: Path) -> None:
    """An nvcc that answers setup.py's questions, so that what comes after it can be tested anywhere."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        f'#!/bin/sh\necho "#$ TOP={folder}/bin/.." >&2\n'
        'case "$1" in --version) echo "release 12.4,";; --list-gpu-code) echo "sm_80 sm_90";; esac\n'
    )
    nvcc.chmod(0o755)


@pytest.mark.parametrize("mode", ["auto", "cuda"])
@pytest.mark.parametrize("missing", ["torch", "ninja", "sm_100", "torch 2.11"])
def test_what_is_missing_is_named(setup, monkeypatch, tmp_path, missing, mode):
    fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("VLKERNELS_BUILD", mode)
    if missing != "sm_100":
        monkeypatch.setenv("VLKERNELS_ARCHS", "sm_80 sm_90a")
    if missing == "torch 2.11":
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.10.1+cu128")
    if missing == "ninja":
        monkeypatch.setenv("PATH", "/bin")
        monkeypatch.setattr(shutil, "which", lambda name: name if name.endswith("nvcc") else None)
    hide(monkeypatch, missing)
    reason = {
        "torch": "torch is not importable (isolated builds never see it: pip install --no-build-isolation .)",
        "ninja": "ninja was not found",
        "sm_100": "nvcc 12.4 has no target sm_100; VLKERNELS_ARCHS can name others",
        "torch 2.11": "torch 2.10.1+cu128 is older than 2.11",
    }[missing]
    said = []
    if mode == "auto":
        assert setup.extensions(said.append) == []
        assert said == [f"pure Python, without compiled kernels: {reason}"]
    else:
        with pytest.raises(SystemExit) as failure:
            setup.extensions(said.append)
        assert str(failure.value) == f"vlkernels: VLKERNELS_BUILD=cuda, and nothing can be compiled: {reason}"


def test_without_pybind11_only_the_report_is_left_out(setup, monkeypatch, tmp_path):
    fake_nvcc(tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("VLKERNELS_ARCHS", "sm_80")
    hide(monkeypatch, "pybind11")
    said = []
    assert [extension.name for extension in setup.extensions(said.append)] == ["vlkernels._ops"]
    assert "vlkernels._C is left out" in said[0]


def test_bad_build_mode_is_refused(setup, monkeypatch):
    monkeypatch.setenv("VLKERNELS_BUILD", "yes")
    with pytest.raises(SystemExit, match="VLKERNELS_BUILD='yes'; expected auto, cuda or none"):
        setup.extensions(print)


def test_bad_arch_is_refused(setup, monkeypatch):
    monkeypatch.setenv("VLKERNELS_ARCHS", "90a")
    with pytest.raises(setup.Unavailable, match="VLKERNELS_ARCHS holds '90a'; expected names such as sm_90a"):
        setup.archs()


def test_two_source_needs_cutlass_and_sm_90a(setup, monkeypatch, tmp_path):
    def left_out():
        files, cutlass, reason = setup.ops_sources()
        held = [file for file in files if "two_source" in file]
        assert held == ([] if reason else setup.HOPPER_SOURCES) and (cutlass is None) == (reason is not None)
        assert len(files) - len(held) == len(setup.OPS_SOURCES) - len(setup.HOPPER_SOURCES)
        return cutlass or reason

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert left_out() == (
        "CUTLASS's headers were not found (looked for the nvidia-cutlass package; "
        "VLKERNELS_CUTLASS can name another folder)"
    )
    monkeypatch.setenv("VLKERNELS_CUTLASS", str(tmp_path))
    assert left_out() == f"CUTLASS's headers were not found (looked for VLKERNELS_CUTLASS={tmp_path})"
    header = tmp_path / "include" / "cute" / "arch" / "mma_sm90_gmma.hpp"
    header.parent.mkdir(parents=True)
    header.touch()
    assert left_out() == tmp_path / "include"
    monkeypatch.setenv("VLKERNELS_ARCHS", "sm_80 sm_100")
    assert left_out() == "sm_90a is not among VLKERNELS_ARCHS"


def test_jobs(setup, monkeypatch):
    assert 1 <= setup.max_jobs() <= len(os.sched_getaffinity(0))
    monkeypatch.setenv("MAX_JOBS", "7")
    assert setup.max_jobs() == 7


def test_without_triton():
    """Where triton is not installed everything imports, runs on the reference and says why."""
    code = """
        import sys
        sys.modules["triton"] = None  # as where it is not installed
        import torch, vlkernels
        x, w, a, b = (torch.randn(*s) for s in ((3, 8), (4, 8), (2, 8), (4, 2)))
        assert vlkernels.lora_linear(x, w, a, b).shape == (3, 4)
        assert vlkernels.LoRALinear(8, 4, 2)(x).shape == (3, 4)
        assert not vlkernels.swap(torch.nn.Linear(2, 2))
        vlkernels.explain(vlkernels.lora_linear, x, w, a, b)
        from vlkernels.__main__ import main
        assert main(["info"]) == 0
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "triton     refuses: triton is not installed" in done.stdout and "-> reference" in done.stdout

"""Builds vlkernels: the Python package and, where nvcc and torch are at hand, vlkernels/_ops.so and vlkernels/_C.

VLKERNELS_BUILD  auto (default): compile if possible, else pure Python and a message; cuda: compile or fail; none: never
VLKERNELS_ARCHS  targets, default "sm_80 sm_90a sm_100 compute_100" (compute_*: PTX, for devices newer than the list)
VLKERNELS_CUTLASS  folder of CUTLASS's headers, default those of the nvidia-cutlass package; without them, and without
                 sm_90a among the targets, csrc/two_source is left out
MAX_JOBS         compilations at a time, default min(cores, free GiB / 5)

`python setup.py build_ops --dest DIR` makes DIR/_ops.so alone; it serves every Python and every torch from 2.11 on.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = (2, 11)
DEFAULT_ARCHS = "sm_80 sm_90a sm_100 compute_100"
OBJECTS = ROOT / "build" / "csrc"
OPS, MODULE = "vlkernels._ops", "vlkernels._C"


class Unavailable(Exception):
    """Why nothing can be compiled here."""


def sources(*patterns):
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


OPS_SOURCES = sources("csrc/build_info.cpp", "csrc/*/*.cu", "csrc/*/*_torch.cpp")
HOPPER_SOURCES = sources("csrc/two_source/*.cu", "csrc/two_source/*_torch.cpp")  # CUTLASS's headers, sm_90a alone
MODULE_SOURCES = sources("csrc/module.cpp")


def output_of(*command):
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    return result.stdout if result.returncode == 0 else ""


def archs():
    names = re.split(r"[\s,;]+", os.environ.get("VLKERNELS_ARCHS", DEFAULT_ARCHS).strip())
    for name in names:
        if not re.fullmatch(r"(sm|compute)_\d+[af]?", name):
            raise Unavailable(f"VLKERNELS_ARCHS holds {name!r}; expected names such as sm_90a or compute_100")
    return names


def find_nvcc():
    """The real nvcc, which may hide behind a wrapper script on PATH, and its version."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
    nvcc = next(filter(None, map(shutil.which, candidates)), None)
    if nvcc is None:
        raise Unavailable(f"nvcc was not found (looked for {', '.join(candidates)})")
    top = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull), re.MULTILINE)
    version = re.search(r"release (\d+\.\d+)", output_of(nvcc, "--version"))
    if not top or not version:
        raise Unavailable(f"{nvcc} does not answer as nvcc does")
    nvcc = str(Path(top[1].strip()).resolve() / "bin" / "nvcc")
    known = re.findall(r"\d+", output_of(nvcc, "--list-gpu-code"))
    for name in archs():
        if re.search(r"\d+", name)[0] not in known:
            raise Unavailable(f"nvcc {version[1]} has no target {name}; VLKERNELS_ARCHS can name others")
    return nvcc, version[1]


def find_torch():
    """torch's folder and version, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        raise Unavailable("torch is not importable (isolated builds never see it: pip install --no-build-isolation .)")
    version = importlib.metadata.version("torch")
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < TORCH_TARGET:
        raise Unavailable(f"torch {version} is older than {TORCH_TARGET[0]}.{TORCH_TARGET[1]}")
    return Path(spec.origin).parent, version


def find_cutlass():
    """The folder of CUTLASS's headers. The package is not imported: it brings scipy, pydot and more along."""
    named = os.environ.get("VLKERNELS_CUTLASS")
    if named:
        folders = [Path(named), Path(named) / "include"]
        looked = f"VLKERNELS_CUTLASS={named}"
    else:
        looked = "the nvidia-cutlass package; VLKERNELS_CUTLASS can name another folder"
        try:
            package = importlib.metadata.distribution("nvidia-cutlass")
        except importlib.metadata.PackageNotFoundError:
            folders = []
        else:
            folders = [Path(package.locate_file("cutlass_library/source/include"))]
    for folder in folders:
        if (folder / "cute" / "arch" / "mma_sm90_gmma.hpp").is_file():
            return folder.resolve()
    raise Unavailable(f"CUTLASS's headers were not found (looked for {looked})")


def ops_sources():
    """What _ops.so is made of, CUTLASS's headers or None, and why HOPPER_SOURCES are left out or None."""
    try:
        if "sm_90a" not in archs():
            raise Unavailable("sm_90a is not among VLKERNELS_ARCHS")
        return OPS_SOURCES, find_cutlass(), None
    except Unavailable as reason:
        return [file for file in OPS_SOURCES if file not in HOPPER_SOURCES], None, str(reason)


def find_ninja():
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if shutil.which("ninja"):
        return ["ninja"]
    raise Unavailable("ninja was not found")


def find_tools():
    if platform.system() != "Linux":
        raise Unavailable("kernels are compiled on Linux only")
    return find_nvcc(), find_torch(), find_ninja()


def max_jobs():
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    free_kib = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    return max(1, min(len(os.sched_getaffinity(0)), free_kib // (5 * 2**20)))


NINJA_RULES = """
rule cu
  command = $tool -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || { cat $out.log; exit 1; }
  depfile = $out.d
  deps = gcc
rule cpp
  command = $tool -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $tool $in -o $out $libs
"""


def ninja_file(folder, nvcc, torch, ops, module, files, cutlass):
    """The build as text: one object per source in folder, then `ops` made of `files`, and `module`, unless None."""
    cxx = os.environ.get("CXX", "g++")
    common = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-I{folder}"]
    host = ["-fPIC", "-fvisibility=hidden", "-Wall"]
    targets = {}
    for name in archs():
        targets.setdefault(name.split("_")[1], []).append(name)
    gencodes = [f"-gencode=arch=compute_{number},code=[{','.join(names)}]" for number, names in targets.items()]
    torch_target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET[0] << 56 | TORCH_TARGET[1] << 48:#x}ULL"
    cu = [nvcc, *common, "-ccbin", cxx, "--threads=2", "-Xptxas=-v", f"-Xcompiler={','.join(host)}"]
    hopper = [*cu, "-isystem", cutlass, "--expt-relaxed-constexpr", "-gencode=arch=compute_90a,code=[sm_90a]"]
    cu = [*cu, *gencodes]
    cpp = [cxx, *common, *host]
    ops_cpp = [*cpp, torch_target, "-isystem", torch / "include"]
    # --no-as-needed: libtorch.so brings libtorch_cuda.so into reach, where the weak stream function lives
    ops_link = [nvcc, "-shared", "-cudart=static", "-ccbin", cxx, "-Xlinker=--exclude-libs=ALL,--no-as-needed"]
    lines = [NINJA_RULES]

    def path(p):
        return str(p).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def build(output, rule, inputs, tool, libs=()):
        lines.append(f"build {path(output)}: {rule} {' '.join(map(path, inputs))}")
        for name, words in ("tool", tool), ("libs", libs):
            lines.append(f"  {name} = {shlex.join(map(str, words)).replace('$', '$$')}")

    def build_shared(output, files, cpp, link, libs=()):
        objects = {folder / (file.replace("/", "_") + ".o"): file for file in files}
        for obj, file in objects.items():
            rule = "cu" if file.endswith(".cu") else "cpp"
            tool = cpp if rule == "cpp" else hopper if file in HOPPER_SOURCES else cu
            build(obj, rule, [ROOT / file], tool)
        build(output, "link", objects, link, libs)

    if ops:
        build_shared(ops, files, ops_cpp, ops_link, [f"-L{torch / 'lib'}", "-ltorch"])
    if module:
        import pybind11

        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        build_shared(module, MODULE_SOURCES, [*cpp, *includes], [cxx, "-shared"])
    return "\n".join([*lines, ""])


def compile_with_ninja(folder, ops=None, module=None):
    """Builds the files `ops` and `module`; ptxas's report on each .cu lies beside its object in folder (*.o.log)."""
    (nvcc, cuda), (torch, torch_version), ninja = find_tools()
    sources_of_ops, cutlass, reason = ops_sources()
    if reason is not None:
        print(f"vlkernels: csrc/two_source is left out: {reason}")
    info = {
        "version": re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1],
        "archs": archs(),
        "cuda": cuda,
        "torch": torch_version,
        "torch_target": ".".join(map(str, TORCH_TARGET)),
        "ops": sorted({Path(source).parent.name for source in sources_of_ops if source.endswith(".cu")}),
        "git": output_of("git", "describe", "--always", "--dirty", "--exclude=*").strip() or "unknown",
    }
    files = {
        folder / "vlk_build_info.h": f'#define VLK_BUILD_INFO R"json({json.dumps(info)})json"\n',
        folder / "build.ninja": ninja_file(folder, nvcc, torch, ops, module, sources_of_ops, cutlass),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        if not file.exists() or file.read_text() != text:  # an untouched file rebuilds nothing
            file.write_text(text)
    if subprocess.run([*ninja, "-C", folder, f"-j{max_jobs()}"]).returncode != 0:
        raise SystemExit("vlkernels: the compilation failed; VLKERNELS_BUILD=none installs without compiled kernels")


def build_ops():
    """The command of that name. No setuptools command: its older versions cannot read this pyproject.toml."""
    parser = argparse.ArgumentParser(prog="setup.py build_ops", description="compile _ops.so, without installing")
    parser.add_argument("--dest", type=Path, default=ROOT / "build" / "gpu", help="folder for _ops.so")
    parser.add_argument("--objects", type=Path, default=OBJECTS, help="folder for objects and ptxas reports")
    options = parser.parse_args(sys.argv[2:])
    try:
        compile_with_ninja(options.objects.resolve(), ops=options.dest.resolve() / "_ops.so")
    except Unavailable as reason:
        raise SystemExit(f"vlkernels: nothing can be compiled: {reason}") from None


class BuildExtensions(build_ext):
    def get_ext_filename(self, fullname):
        # no Python version in the name: one file serves all of them
        ours = fullname.replace(".", "/") + ".so"
        return ours if OPS.endswith(fullname) else super().get_ext_filename(fullname)

    def build_extensions(self):
        outputs = {ext.name: Path(self.get_ext_fullpath(ext.name)).resolve() for ext in self.extensions}
        compile_with_ninja(OBJECTS, outputs.get(OPS), outputs.get(MODULE))


def extensions(say):
    mode = os.environ.get("VLKERNELS_BUILD", "auto")
    if mode not in ("auto", "cuda", "none"):
        raise SystemExit(f"vlkernels: VLKERNELS_BUILD={mode!r}; expected auto, cuda or none")
    if mode == "none":
        say("pure Python, as VLKERNELS_BUILD=none asks")
        return []
    try:
        find_tools()
    except Unavailable as reason:
        if mode == "cuda":
            raise SystemExit(f"vlkernels: VLKERNELS_BUILD=cuda, and nothing can be compiled: {reason}") from None
        say(f"pure Python, without compiled kernels: {reason}")
        return []
    if importlib.util.find_spec("pybind11") is None:
        say("vlkernels._C is left out: pybind11 is not importable (it only reports what the build holds)")
        return [Extension(OPS, OPS_SOURCES)]
    return [Extension(OPS, OPS_SOURCES), Extension(MODULE, MODULE_SOURCES)]


def main():
    builds = not {"egg_info", "dist_info", "sdist"} & set(sys.argv)
    setup(
        packages=[".".join(folder.parts) for folder in sorted({Path(p).parent for p in sources("vlkernels/**/*.py")})],
        package_data={"": ["py.typed", "tuned/*.json"]},
        ext_modules=extensions(say=lambda text: print(f"vlkernels: {text}") if builds else None),
        cmdclass={"build_ext": BuildExtensions},
    )


if __name__ == "__main__":
    build_ops() if sys.argv[1:2] == ["build_ops"] else main()

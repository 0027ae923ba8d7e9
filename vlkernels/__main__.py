"""`python -m vlkernels info | explain | bench`."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys

import torch

import vlkernels
from vlkernels import _library, backends

FLOATS = ("fp32", "fp16", "bf16")


def info() -> int:
    """Versions, devices, and which op has which backend here, with the reason where it has not."""
    print(f"vlkernels {vlkernels.__version__}  python {platform.python_version()}  {platform.platform()}")
    print(f"torch {torch.__version__}  CUDA {torch.version.cuda or 'none'}")
    for package in ("triton", "transformers", "peft", "accelerate", "safetensors"):
        print(f"{package} {_version(package)}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            print(f"device cuda:{i}  {torch.cuda.get_device_name(i)}  compute capability {major}.{minor}")
    else:
        print("devices: no CUDA device; every op runs on the reference (Triton kernels also with TRITON_INTERPRET=1)")
    reason = _library.load()
    print(f"compiled kernels: {reason or _library.info()}")
    print(f"VLKERNELS_BACKEND: {os.environ.get('VLKERNELS_BACKEND', 'auto')}\n")
    for op in backends.OPS.values():
        print(op.name)
        for backend in backends.ORDER:
            kernel = op.kernels.get(backend)
            print(f"  {backend:<10} {kernel if isinstance(kernel, str) else 'present'}")
    return 0


def explain(name: str, rows: int, dims: list[int], dtype: str) -> int:
    """The decision for one op on made-up tensors of the given sizes."""
    if name not in backends.OPS:
        print(f"no op named {name!r}; there are {', '.join(backends.OPS)}", file=sys.stderr)
        return 2
    if isinstance(backends.OPS[name].kernels["triton"], str):
        print(f"explain needs triton to make an example: {backends.OPS[name].kernels['triton']}", file=sys.stderr)
        return 2
    from vlkernels.testing.case import PRECISIONS, Case, Make
    from vlkernels.testing.compare import cases_of

    op = backends.OPS[name]
    module = cases_of(op)
    sizes = dict(module.CASES[0].dims)
    sizes |= dict(zip(sizes, [rows, *dims], strict=False))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{sizes} {dtype} on {device}")
    vlkernels.explain(op, **module.inputs(Case("asked", sizes), Make(PRECISIONS[dtype], device=device)))
    return 0


def bench(arguments: list[str]) -> int:
    """The benchmarks of a checkout; an installed package does not carry them."""
    if not os.path.isdir("benchmarks"):
        print("benchmarks are run from a checkout: there is no folder benchmarks/ here", file=sys.stderr)
        return 2
    return subprocess.call([sys.executable, "-m", "benchmarks.ops", *arguments])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlkernels", description=vlkernels.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, which op has which backend")
    e = commands.add_parser("explain", help="which backend an op would run on, and why")
    e.add_argument("op")
    e.add_argument("rows", type=int, nargs="?", default=1024, help="rows of x (tokens)")
    e.add_argument("dims", type=int, nargs="*", help="the op's further dims, in the order of its cases")
    e.add_argument("--dtype", choices=FLOATS, default="bf16")
    b = commands.add_parser("bench", help="time the ops (from a checkout)", add_help=False)
    b.add_argument("rest", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    if options.command == "info":
        return info()
    if options.command == "explain":
        return explain(options.op, options.rows, options.dims, options.dtype)
    return bench(options.rest)


if __name__ == "__main__":
    sys.exit(main())

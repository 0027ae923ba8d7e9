"""Compile every Triton kernel ahead of time, without a GPU, and read what the compiler made of it.

    python -m vlkernels.testing.aot [--arch 80,90,100] [--op NAME] [--precision NAME] [--most N] [--json FILE]

Each op's forward and backward run on fake tensors of its bench cases; the kernel launches that they make, with the
configuration that config() picks for that architecture, are recorded and compiled (equal builds once). Printed per
build: registers, stack, spills, shared memory, wgmma, tf32. Exit status 1 on a spill, a stack frame, more shared memory
than the architecture has, or a plain tf32 product in a float32 build.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from unittest import mock

# bytes of shared memory that one block can have
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}


@dataclass(frozen=True)
class Build:
    """One specialised kernel: what Triton's launcher would compile for a recorded launch."""

    module: str
    kernel: str
    arch: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass
class Result:
    """What the compiler reports for one build; `problems` is empty when nothing is wrong."""

    op: str
    kernel: str
    arch: int
    cases: list[str]
    config: dict
    registers: int = -1
    stack: int = -1
    spills: int = -1
    shared: int = -1
    wgmma: int = 0
    mma: int = 0
    plain_tf32: int = 0
    problems: list[str] = field(default_factory=list)


def recorded_builds(op, arch: int, precisions: tuple[str, ...] | None = None) -> dict[Build, list[str]]:
    """Builds that the op's bench cases need on `arch`, each with the names of its cases."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from triton.runtime.jit import JITFunction

    from ..ops import _device
    from .case import PRECISIONS
    from .compare import cases_of

    module = cases_of(op)
    kernels = op.kernels["triton"]
    found: dict[Build, list[str]] = {}

    def record(self, *args, grid, warmup, **kwargs):
        build = _build(self, args, kwargs, arch)
        if label not in found.setdefault(build, []):
            found[build].append(label)

    with mock.patch.object(JITFunction, "run", record), _device.assume(arch):
        for case in module.CASES:
            if "bench" not in case.tags:
                continue
            for name in precisions or module.PRECISIONS:
                precision = PRECISIONS[name]
                for plan in ("", *getattr(module, "PLANS", ())):
                    label = f"{case.name} [{name}]" + (f" {plan}" if plan else "")
                    with FakeTensorMode(), torch.no_grad():
                        arguments = module.inputs(case, _FakeMake(precision))
                        arguments |= {"dtype": precision.autocast} if "dtype" in op.types else {}
                        with module.planned(plan, arguments) if plan else nullcontext(arguments) as arguments:
                            _run(op, kernels, arguments)
    return found


def _run(op, kernels, arguments: dict) -> None:
    """Forward and backward of the kernels, on whatever tensors these are."""
    import torch

    values = tuple(arguments.get(n, op.defaults.get(n)) for n in op.names)
    out = kernels.forward(*values)
    saved = {"y": out[0], **dict(zip(op.names, values, strict=True))}
    saved |= dict(zip(op.residuals, out[op.outputs :], strict=True))
    needs = {n: isinstance(v, torch.Tensor) and v.requires_grad for n, v in arguments.items()}
    others = {n: v for n, v in zip(op.names, values, strict=True) if n in op.others}
    direct = op.reference.direct(**others) if hasattr(op.reference, "direct") else ()
    kernels.backward(
        *(torch.empty_like(o) for o in out[: op.outputs]),
        saved={n: saved[n] for n in op.saves},
        needs={n: needs.get(n, False) and n not in direct for n in op.names},
        **others,
    )


class _FakeMake:
    """testing.case.Make for shapes alone: tensors without storage; a CPU build of torch has no CUDA ones."""

    def __init__(self, precision):
        self.precision = precision

    def normal(self, *shape, std=1.0, role="base", grad=False, wide=True):
        import torch

        dtype = self.precision.adapter if role == "adapter" else self.precision.base
        return torch.empty(shape, dtype=dtype, requires_grad=grad)

    def seed(self, count=None):
        import torch

        return torch.empty(() if count is None else (count,), dtype=torch.int64)

    def rows(self, count, below):
        import torch

        return torch.empty((count,), dtype=torch.int64)

    def numbers(self, values):
        import torch

        return torch.empty((len(values),), dtype=torch.int32)


def _build(fn, args, kwargs, arch: int) -> Build:
    import torch

    pointer = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.int64: "*i64",
        torch.int32: "*i32",
        torch.uint8: "*u8",
    }
    bound = dict(zip(fn.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in fn.arg_names}
    constexprs = {p.name for p in fn.params if p.is_constexpr}
    signature, constants, divisible = {}, {}, []
    for name in fn.arg_names:
        value = bound[name]
        if name in constexprs or value is None or (isinstance(value, int) and value == 1):
            # the launcher turns None and 1 into constants too
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = pointer[value.dtype]
            divisible.append(name)  # PyTorch's allocator aligns to 512 bytes
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    options = {k: kwargs[k] for k in ("num_warps", "num_stages", "enable_fp_fusion") if k in kwargs}
    return Build(
        fn.fn.__module__,
        fn.fn.__name__,
        arch,
        tuple(signature.items()),
        tuple((k, str(v) if hasattr(v, "primitive_bitwidth") else v) for k, v in constants.items()),
        tuple(divisible),
        tuple(options.items()),
    )


def compile_build(build: Build) -> dict:
    """Compile one build; returns the figures of Result."""
    import importlib

    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fn = getattr(importlib.import_module(build.module), build.kernel)
    index = {name: i for i, name in enumerate(fn.arg_names)}
    named = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
    constants = {(index[k],): named.get(v, v) if isinstance(v, str) else v for k, v in build.constants}
    source = ASTSource(
        fn,
        signature=dict(build.signature),
        constexprs=constants,
        attrs={(index[name],): [["tt.divisibility", 16]] for name in build.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", build.arch, 32), options=dict(build.options))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        sass = _tool("cuobjdump", "-sass", cubin.name)
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "shared": compiled.metadata.shared,
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "mma": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", sass)),
        # float32 operands multiplied in one tf32 pass; tf32x3 still carries its name here and is split later
        "plain_tf32": len(re.findall(r"tt\.dot .*inputPrecision = tf32(?!x3).*xf32>", compiled.asm["ttir"])),
    }


def _tool(name: str, *arguments: str) -> str:
    from triton import knobs

    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def problems(result: Result) -> list[str]:
    found = []
    if 0 <= result.registers < 8:
        found.append("a kernel without code: the compiler left a trap in its place")
    if result.spills:
        found.append(f"{result.spills} spill instructions")
    if result.stack:
        found.append(f"{result.stack} bytes of stack")
    if result.shared > SHARED_LIMIT.get(result.arch, 101_376):
        found.append(f"{result.shared} bytes of shared memory, the architecture has {SHARED_LIMIT[result.arch]}")
    if result.plain_tf32:
        found.append(f"{result.plain_tf32} plain tf32 products of float32 operands")
    return found


def spread(builds: dict[Build, list[str]], most: int | None) -> dict[Build, list[str]]:
    """At most `most` builds of each kernel and dtype of its products, from the first to the last of them."""
    groups: dict[tuple, list[Build]] = {}
    for build in builds:
        groups.setdefault((build.module, build.kernel, dict(build.constants).get("PRODUCT")), []).append(build)
    if most is None:
        return builds
    kept = {
        group[i * (len(group) - 1) // max(most - 1, 1)]
        for group in groups.values()
        for i in range(min(most, len(group)))
    }
    return {build: cases for build, cases in builds.items() if build in kept}


def check(
    arch: int, op_name: str | None, precisions: tuple[str, ...] | None, jobs: int, most: int | None = None
) -> list[Result]:
    """Compile the builds (all, or `most` of each kernel) of all ops, or of one, printing a line as each is done."""
    from .. import backends

    names = [op_name] if op_name else sorted(backends.OPS)
    needed: dict[Build, list[tuple[str, list[str]]]] = {}  # ops share kernels: each build once, with its ops' cases
    for name in names:
        if name not in backends.OPS:
            raise SystemExit(f"no op named {name!r}; there are {', '.join(sorted(backends.OPS))}")
        for build, cases in spread(recorded_builds(backends.OPS[name], arch, precisions), most).items():
            needed.setdefault(build, []).append((name, cases))
    results = []
    with ProcessPoolExecutor(jobs) as pool:
        futures = {pool.submit(compile_build, build): build for build in needed}
        for done in as_completed(futures):
            build = futures[done]
            config = {k: v for k, v in build.constants if k.isupper()} | dict(build.options)
            for name, cases in needed[build]:
                result = Result(name, build.kernel, arch, cases, config, **done.result())
                result.problems = problems(result)
                results.append(result)
            print(_line(results[-1]), flush=True)
    return sorted(results, key=lambda r: r.op)


def _line(r: Result) -> str:
    tiles = " ".join(f"{k.removeprefix('BLOCK_')}{v}" for k, v in r.config.items() if k.startswith("BLOCK"))
    flags = " ".join(k.removeprefix("HAS_").lower() for k, v in r.config.items() if k.startswith("HAS_") and v)
    product = str(r.config.get("PRODUCT", "")) + (
        "/" + r.config["PRECISION"] if r.config.get("PRODUCT") == "fp32" else ""
    )
    return (
        f"sm_{r.arch} {r.kernel:<28} {tiles:<18} {product:<12} {flags:<18} warps {r.config.get('num_warps')} "
        f"regs {r.registers:>3} stack {r.stack} spills {r.spills} shared {r.shared:>6} wgmma {r.wgmma:>2} "
        f"mma {r.mma:>3} {'; '.join(r.problems) or 'ok'}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlkernels.testing.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="90", help="compute capabilities, comma separated (80,90,100)")
    parser.add_argument("--op", help="one op only")
    parser.add_argument("--precision", help="comma separated precisions of the cases module; all by default")
    parser.add_argument("--most", type=int, help="builds of each kernel and dtype of an op; all by default")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(argv)
    try:
        archs = [int(a) for a in options.arch.split(",")]
    except ValueError:
        parser.error(f"--arch is {options.arch!r}; accepted: numbers such as 80,90,100")
    precisions = tuple(options.precision.split(",")) if options.precision else None
    results = [r for arch in archs for r in check(arch, options.op, precisions, options.jobs, options.most)]
    if options.json:
        # a build a line: thousands of them
        options.json.write_text("[\n" + ",\n".join(json.dumps(asdict(r)) for r in results) + "\n]\n")
    bad = [r for r in results if r.problems]
    print(f"{len(results)} builds, {len(bad)} with problems")
    return 1 if bad or not results else 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        # an interpreted kernel has nothing to compile; the switch is read when triton is imported
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "vlkernels.testing.aot", *sys.argv[1:]], environment)
    sys.exit(main())

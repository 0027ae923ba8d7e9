"""The support matrix: op x backend x dtype x architecture, from what the code answers and what the compiler made of it.

A backend supports a precision on an architecture when `refuses` says so there. Whether its kernels compile there is
read from the record of the ahead-of-time checker, benchmarks/results/aot.json, for Triton, and from the targets of the
build for CUDA; whether they were timed, from the records of GPU runs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from vlkernels import _library, backends
from vlkernels.op import Op
from vlkernels.testing import compare
from vlkernels.testing.case import PRECISIONS, Make, Precision

from .record import RESULTS, ROOT, load

ARCHS = (80, 90, 100)
NOT_COMPILED = "not compiled yet"


class _OnGPU(torch.Tensor):
    """A CPU tensor that says it is on a GPU: `refuses` looks at no number."""

    is_cuda = property(lambda self: True)
    device = property(lambda self: torch.device("cuda", 0))


@contextlib.contextmanager
def _pretend(arch: int, library: bool) -> Iterator[None]:
    """A device of this architecture, and a compiled library that holds code for it."""
    capability = divmod(arch, 10)
    patches = [
        mock.patch("torch.cuda.is_available", lambda: True),
        mock.patch("torch.cuda.get_device_capability", lambda device=None: capability),
    ]
    if library:
        held = [folder.name for folder in (ROOT / "csrc").iterdir() if list(folder.glob("*.cu"))]
        patches += [
            mock.patch.object(_library, "load", lambda: None),
            mock.patch.object(_library, "covers", lambda c: True),
            mock.patch.object(_library, "info", lambda: {"ops": held, "archs": [f"sm_{arch}"]}),
        ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def refusal(op: Op, backend: str, precision: Precision, arch: int) -> str | None:
    """Why the backend would refuse the op's smallest case in this precision on this architecture, or None."""
    kernels = _kernels(op, backend)
    if isinstance(kernels, str):
        return kernels
    module = compare.cases_of(op)
    case = min(module.CASES, key=lambda c: sum(c.dims.values()))
    arguments = module.inputs(case, Make(precision))
    arguments |= {"dtype": precision.autocast} if "dtype" in op.types else {}
    values = op.values(**arguments)
    on_gpu = [v.detach().as_subclass(_OnGPU) if isinstance(v, torch.Tensor) else v for v in values]
    with _pretend(arch, backend == "cuda"):
        return kernels.refuses(*on_gpu)


def _kernels(op: Op, backend: str):
    """The kernel module, imported by name where the compiled library is absent, or why there is none."""
    name = f"{op.reference.__package__}.{backend}"
    if importlib.util.find_spec(name) is None:
        return "no kernel"
    module = importlib.import_module(name) if isinstance(op.kernels[backend], str) else op.kernels[backend]
    return module if hasattr(module, "refuses") else "no kernel"


def compiled(op: Op, backend: str, precision: Precision, arch: int, aot: list[dict] | None) -> bool:
    """Whether this precision's kernels were compiled for this architecture without a spill or another problem."""
    if backend == "cuda":
        return any(re.fullmatch(rf"sm_{arch}a?", target) for target in _build_targets(op))
    label = f"[{precision.name}]"
    builds = [r for r in aot or () if r["op"] == op.name and r["arch"] == arch and any(label in c for c in r["cases"])]
    return bool(builds) and not any(r["problems"] for r in builds)


def _build_targets(op: Op) -> list[str]:
    """Architectures that setup.py builds the op's CUDA kernels for."""
    folder = getattr(_kernels(op, "cuda"), "SOURCES", op.name)
    if not list((ROOT / "csrc" / folder).glob("*.cu")):
        return []
    found = re.search(r'^DEFAULT_ARCHS = "([^"]+)"', (ROOT / "setup.py").read_text(), re.MULTILINE)
    return os.environ.get("VLKERNELS_ARCHS", found[1] if found else "").split()


def timed(results: Path = RESULTS) -> dict[tuple[str, str, str], set[str]]:
    """(op, backend, precision) -> capabilities on which a record holds a timing."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for path in gpu_records(results):
        content = load(path)
        for r in content["records"]:
            if r["ms"] is not None and r["kind"] == "ours":
                arch = content["runs"][r["run"]]["capability"]
                found.setdefault((r["op"], r["provider"], r["precision"]), set()).add(arch)
    return found


def gpu_records(results: Path = RESULTS) -> list[Path]:
    return sorted(p for p in results.glob("*.json") if p.stem not in ("memory", "aot", "plans", "modules"))


def support_lines(results: Path = RESULTS) -> list[str]:
    """The matrix as markdown lines."""
    path = results / "aot.json"
    aot = json.loads(path.read_text()) if path.exists() else None
    measured = timed(results)
    ops = [backends.OPS[name] for name in sorted(backends.OPS)]
    names = [n for n in PRECISIONS if any(n in compare.cases_of(op).PRECISIONS for op in ops)]
    lines = [
        "| op | backend | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for op in ops:
        for backend in backends.ORDER:
            cells = [_cell(op, backend, PRECISIONS[n], aot, measured) for n in names]
            lines.append(f"| {op.name} | {backend} | " + " | ".join(cells) + " |")
    return [
        *lines,
        "",
        "Precisions: dtype of the base; `+fp32`: adapters in float32; `amp`: under bf16 autocast. `sm_90`: accepted "
        "there and compiled for it (Triton: ahead of time and without spills; CUDA: a target of the build); **sm_90**: "
        "also timed on such a device.",
    ]


def _cell(op: Op, backend: str, precision: Precision, aot: list[dict] | None, measured: dict) -> str:
    if precision.name not in compare.cases_of(op).PRECISIONS:
        return "-"
    if backend == "reference":
        return "any device"
    able = [arch for arch in ARCHS if refusal(op, backend, precision, arch) is None]
    if not able:
        return "no"
    on = measured.get((op.name, backend, precision.name), set())
    found = [arch for arch in able if compiled(op, backend, precision, arch, aot)]
    return " ".join(f"**sm_{a}**" if f"sm_{a}" in on else f"sm_{a}" for a in found) or NOT_COMPILED

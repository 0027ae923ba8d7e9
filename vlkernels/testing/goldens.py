"""Golden runner: our modules against tensors recorded from upstream's own code.

    python -m vlkernels.testing.goldens DIR [--module PREFIX] [--backend reference|triton|cuda] [--json FILE]

A golden is a safetensors file: metadata `module` and `hyperparameters` (JSON); tensors `param.*` under upstream's
names, `in.*`, `out.*`, cotangents `cot.*`, and the gradients `grad_in.*`, `grad_param.*` of sum over k of
sum(out.k * cot.k).
Without a GPU, `--backend triton` runs in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import backends
from ..integrations.checkpoints import to_ours, to_upstream
from . import (
    golden_adapters,
    golden_builders,
    golden_convs,
    golden_deformable,
    golden_experts,
    golden_gated,
    golden_ladder,
    golden_mappers,
    golden_prefix,
    golden_qformers,
    golden_resamplers,
    golden_scans,
)
from .golden_builders import GoldenError, Named

# one line for each family
BUILDERS = {
    **golden_builders.BUILDERS,
    **golden_adapters.BUILDERS,
    **golden_convs.BUILDERS,
    **golden_deformable.BUILDERS,
    **golden_mappers.BUILDERS,
    **golden_resamplers.BUILDERS,
    **golden_qformers.BUILDERS,
    **golden_experts.BUILDERS,
    **golden_gated.BUILDERS,
    **golden_scans.BUILDERS,
    **golden_prefix.BUILDERS,
    **golden_ladder.BUILDERS,
}

# -- files ---------------------------------------------------------------------------------------------------------


PREFIXES = ("param", "in", "out", "cot", "grad_in", "grad_param", "aux")


@dataclasses.dataclass(frozen=True)
class Golden:
    module: str
    hyperparameters: Named
    in_block: bool  # which of the two tolerance rules holds
    tensors: dict[str, Named]  # by prefix, then by name
    device: torch.device


def read_metadata(path: Path) -> dict[str, str]:
    """The file's metadata, which names a module."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise GoldenError(f"not a safetensors file: {error}") from error
    if "module" not in metadata:
        raise GoldenError("the metadata has no field 'module'")
    return metadata


def read(path: Path, device: torch.device) -> Golden:
    from safetensors.torch import load_file

    metadata = read_metadata(path)
    try:
        hyperparameters = json.loads(metadata.get("hyperparameters", ""))
    except json.JSONDecodeError as error:
        raise GoldenError(f"the metadata's field 'hyperparameters' is missing or no JSON: {error}") from error
    if not isinstance(hyperparameters, dict):
        raise GoldenError("the metadata's field 'hyperparameters' is no JSON object")
    if metadata.get("dtype", "float32") != "float32":
        raise GoldenError(f"the metadata's dtype is {metadata['dtype']!r}; the tolerances are those of 'float32'")
    tensors = {prefix: Named(f"{prefix}.", {}) for prefix in PREFIXES}
    for key, tensor in load_file(path, device=str(device)).items():
        prefix, _, name = key.partition(".")
        if prefix not in tensors or not name:
            raise GoldenError(f"unknown key {key!r}; known: {', '.join(p + '.*' for p in PREFIXES)}")
        tensors[prefix][name] = tensor
    if not tensors["out"]:
        raise GoldenError("the file has no out.*")
    if (tensors["grad_in"] or tensors["grad_param"]) and not tensors["cot"]:
        raise GoldenError("the file has gradients but no cot.*")
    for kind, of in (("cot", "out"), ("grad_in", "in"), ("grad_param", "param")):
        for name in tensors[kind]:
            if name not in tensors[of]:
                raise GoldenError(f"the file has {kind}.{name} but no {of}.{name}")
    in_block = "kind" in metadata and "set" in metadata
    return Golden(metadata["module"], Named("hyper-parameter ", hyperparameters), in_block, tensors, device)


# -- the tolerance rule --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Difference:
    """The worst error of one tensor against its limit, and where it sits."""

    name: str
    error: float
    limit: float
    where: tuple[int, ...] = ()
    note: str = ""

    @property
    def fraction(self) -> float:
        if self.error == 0:
            return 0.0
        return self.error / self.limit if self.limit > 0 else math.inf

    @property
    def ok(self) -> bool:
        return self.fraction <= 1  # False for NaN

    def __str__(self) -> str:
        at = self.note or f"[{', '.join(map(str, self.where))}]"
        return f"{self.fraction:.2g} of its limit at {self.name}{at}"


def largest(t: Tensor) -> float:
    finite = t.double()[t.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def output_limit(truth: Tensor) -> float:
    """2e-5 max|ref|; integers and booleans are exact."""
    return 2e-5 * largest(truth) if truth.is_floating_point() else 0.0


def gradient_limit(truth: Tensor, top: float, in_block: bool) -> float:
    """1e-4 max|ref| with a floor by top, the file's largest gradient: some gradients are zero in exact arithmetic."""
    if in_block:
        return 1e-4 * max(largest(truth), 0.01 * top)
    return 1e-4 * largest(truth) + 1e-6 * top


def difference(name: str, got: Tensor | None, truth: Tensor, limit: float) -> Difference:
    if got is None:
        return Difference(name, math.inf, limit, note=" (the module gives none)")
    if got.shape != truth.shape:
        return Difference(name, math.inf, limit, note=f" (shape {tuple(got.shape)}, the file has {tuple(truth.shape)})")
    if truth.numel() == 0:
        return Difference(name, 0.0, limit)
    got = got.detach()
    # equal infinities have no difference
    distance = torch.where(got == truth, 0.0, (got.double() - truth.double()).abs()).flatten()
    index = (distance.nan_to_num(math.inf)).argmax()
    where = tuple(int(i) for i in torch.unravel_index(index, truth.shape))
    return Difference(name, float(distance[index]), limit, where)


# -- running -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Record:
    """One file's result. ops: (op, backend) of every op that ran."""

    file: str
    module: str
    verdict: str = "failed"
    message: str = ""
    outputs: list[Difference] = dataclasses.field(default_factory=list)
    gradients: list[Difference] = dataclasses.field(default_factory=list)
    ops: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        if self.verdict == "no such module":
            return f"{self.file}: {self.module}: no such module"
        parts = []
        if self.outputs:
            parts.append(f"output {_worst(self.outputs)}")
        if self.gradients:
            parts.append(f"gradient {_worst(self.gradients)}")
        if self.outputs:
            parts.append("ops run: " + (" ".join(f"{op}={backend}" for op, backend in self.ops) or "none"))
        parts.append(self.verdict + (f" ({self.message})" if self.message else ""))
        return f"{self.file}: {self.module}: " + "; ".join(parts)

    def as_json(self) -> dict:
        def rows(found: list[Difference]) -> list[dict]:
            return [
                # JSON has no NaN and no infinity
                {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
                for row in (dataclasses.asdict(d) | {"fraction": d.fraction, "ok": d.ok} for d in found)
            ]

        return dataclasses.asdict(self) | {"outputs": rows(self.outputs), "gradients": rows(self.gradients)}


def _worst(found: list[Difference]) -> Difference:
    return max(found, key=lambda d: math.inf if math.isnan(d.fraction) else d.fraction)


class _Launched(TorchDispatchMode):
    """Which operators `vlkernels::*` ran, and on which backend: below autograd, where only kernels arrive."""

    def __init__(self):
        super().__init__()
        self.seen: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vlkernels":
            self.seen.add((func._schema.name.removeprefix("vlkernels::"), args[-1]))
        return func(*args, **(kwargs or {}))


def check(path: Path, name: str, backend: str | None, device: torch.device) -> Record:
    """Run one file. Whatever goes wrong is the record's message: the other files still run."""
    record = Record(name, "?")
    start = time.perf_counter()
    try:
        record.module = read_metadata(path)["module"]
        if record.module in BUILDERS:
            _check(record, read(path, device), backend)
        else:
            record.verdict = "no such module"
    except GoldenError as error:
        record.message = _one_line(str(error))
    except Exception as error:
        record.message = _one_line(f"{type(error).__name__}: {error}")
    record.seconds = time.perf_counter() - start
    return record


def _check(record: Record, golden: Golden, backend: str | None) -> None:
    builder = BUILDERS[golden.module]
    files = golden.tensors
    with_gradients = bool(files["grad_in"] or files["grad_param"])
    module, run = builder.build(golden.hyperparameters)
    _load(module, golden)
    parameters = {n: module.get_parameter(n).requires_grad_() for n in to_ours(golden.module, files["grad_param"])}
    inputs = Named("in.", {n: t.clone().requires_grad_(n in files["grad_in"]) for n, t in files["in"].items()})

    forced = contextlib.nullcontext() if backend is None else backends.use_backend(backend)
    with _plain_float32(), forced, backends.record() as calls, _Launched() as launched:
        outputs = run(module, inputs)
        record.outputs = [difference(n, outputs.get(n), t, output_limit(t)) for n, t in files["out"].items()]
        if with_gradients and all(not d.note for d in record.outputs):
            sum((outputs[n] * cot).sum() for n, cot in files["cot"].items()).backward()
            got = {f"grad_in.{n}": inputs[n].grad for n in files["grad_in"]}
            by_name = to_upstream(golden.module, {n: p.grad for n, p in parameters.items()})
            got |= {f"grad_param.{n}": grad for n, grad in by_name.items()}
            record.gradients = _gradient_differences(got, golden)
    record.ops = sorted(set(calls))

    wrong = [str(d) for d in (*record.outputs, *record.gradients) if not d.ok]
    wrong += _ops_missing(
        builder.needs(golden.hyperparameters), record.ops, launched.seen, backend, bool(record.gradients)
    )
    record.message = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    record.verdict = "failed" if wrong else "passed"


def _load(module: nn.Module, golden: Golden) -> None:
    parameters = to_ours(golden.module, golden.tensors["param"])
    missing = [name for name in module.state_dict() if name not in parameters]
    if missing:
        upstream = next(iter(to_upstream(golden.module, {missing[0]: torch.empty(0)})))
        raise GoldenError(f"the file has no param.{upstream}")
    module.load_state_dict(parameters)
    module.to(golden.device).eval().requires_grad_(False)


def _gradient_differences(got: dict[str, Tensor | None], golden: Golden) -> list[Difference]:
    truth = {f"{kind}.{n}": t for kind in ("grad_in", "grad_param") for n, t in golden.tensors[kind].items()}
    top = max(map(largest, truth.values()))
    return [difference(n, got.get(n), t, gradient_limit(t, top, golden.in_block)) for n, t in truth.items()]


def _ops_missing(
    needed: tuple[str, ...],
    ran: list[tuple[str, str]],
    launched: set[tuple[str, str]],
    forced: str | None,
    with_gradients: bool,
) -> list[str]:
    """Why the run does not count although its numbers agree."""
    missing = []
    for op in needed:
        on = [backend for name, backend in ran if name == op]
        if not on or (forced is not None and on != [forced]):
            missing.append(f"the op {op} did not run" + (f" on {forced}" if forced else ""))
        for backend in on:
            operators = (op, f"{op}_backward") if with_gradients else (op,)
            missing += [
                f"the operator {name} was not launched on {backend}"
                for name in operators
                if backend != "reference" and (name, backend) not in launched
            ]
    return missing


@contextlib.contextmanager
def _plain_float32() -> Iterator[None]:
    """float32 products without TF32, as the tolerances assume."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(previous)


def _one_line(text: str) -> str:
    return textwrap.shorten(text, 400)


# -- command line --------------------------------------------------------------------------------------------------


def run_directory(directory: Path, prefix: str = "", backend: str | None = None) -> list[Record]:
    """Check every golden under `directory` whose module id starts with `prefix`, printing a line each.

    A file whose module cannot be read counts for every prefix.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    device = torch.device("cuda" if torch.cuda.is_available() and not interpreted else "cpu")
    records = []
    for path in sorted(directory.rglob("*.safetensors")):
        with contextlib.suppress(GoldenError):
            if not read_metadata(path)["module"].startswith(prefix):
                continue
        record = check(path, str(path.relative_to(directory)), backend, device)
        print(record, flush=True)
        records.append(record)
    return records


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlkernels.testing.goldens", description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="searched for *.safetensors, subfolders included")
    parser.add_argument("--module", default="", metavar="PREFIX", help="only module ids that start so")
    parser.add_argument("--backend", choices=tuple(reversed(backends.ORDER)), help="force every op onto one backend")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a list of records")
    options = parser.parse_args(argv)
    if importlib.util.find_spec("safetensors") is None:
        print("goldens are safetensors files: pip install safetensors")
        return 1
    if not options.directory.is_dir():
        print(f"{options.directory} is not a directory")
        return 1
    records = run_directory(options.directory, options.module, options.backend)
    if options.json is not None:
        options.json.write_text(json.dumps([record.as_json() for record in records], indent=1) + "\n")
    if not any(record.module.startswith(options.module) for record in records):
        wanted = f" of a module that starts with {options.module!r}" if options.module else ""
        print(f"no golden{wanted} under {options.directory}")
        return 1
    verdicts = [record.verdict for record in records]
    print(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("passed", "failed", "no such module")))
    return 0 if set(verdicts) == {"passed"} else 1


def _interpret_without_gpu(argv: list[str]) -> None:
    """Start over with TRITON_INTERPRET=1, which triton reads when it is imported, and by now it is."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--backend")
    backend = parser.parse_known_args(argv)[0].backend
    if backend == "triton" and "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
        print("no GPU here: the Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1)", flush=True)
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    _interpret_without_gpu(sys.argv[1:])
    sys.exit(main())

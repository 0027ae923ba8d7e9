"""The record of a run: what a figure is, where it was measured, and a file that survives being killed.

A file is {"schema", "runs": {id: environment and ceilings}, "records": [...], "questions": [...], "checks": {...},
"not_measured": [...]}. Each record names its run, so that figures of several runs can lie side by side.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

import vlkernels

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
MODES = ("forward", "forward+backward")
NOT_AVAILABLE = "not available"


@dataclass
class Record:
    """One provider on one case in one mode.

    ms, ms_p20, ms_p80: milliseconds per call, median and percentiles of n calls. tflops: the op's counted FLOPs over
    ms. tbs: bytes that the plan moves over ms, for our kernels, whose bytes are counted. floor_ms: the larger of FLOPs
    and fewest bytes over the ceilings measured in the same run; ratio_floor = ms / floor_ms. ratio_baseline, ratios: ms
    over the baseline's and over each other provider's; below 1 is faster. peak_bytes: most device memory above what was
    there; saved_bytes: kept for backward, parameters and the input apart. error_share: worst error as a share of its
    limit. failure: why there is no timing; then ms is None.
    """

    run: str
    op: str
    case: str
    dims: dict
    options: dict
    recipe: str
    precision: str
    provider: str
    kind: str
    mode: str
    ms: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    n: int = 0
    clock: str = ""
    tflops: float | None = None
    tbs: float | None = None
    floor_ms: float | None = None
    ratio_floor: float | None = None
    ratio_baseline: float | None = None
    ratios: dict = field(default_factory=dict)
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    error_share: float | None = None
    failure: str | None = None

    @property
    def broken(self) -> bool:
        """It ran and was wrong or crashed; what says that it cannot run a case is not broken."""
        return self.failure is not None and not self.failure.startswith(NOT_AVAILABLE)

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.case, self.precision, self.provider, self.mode


@dataclass
class Run:
    """Where and with what a run measured. ceilings: {"copy_tbs", "bf16_tflops", "fp32_tflops"}, measured in it."""

    time: str
    commit: str
    package: str
    device: str
    capability: str
    driver: str
    clocks: str
    torch: str
    cuda: str
    triton: str
    peft: str
    python: str
    library: str
    ceilings: dict = field(default_factory=dict)


def environment(device: str) -> Run:
    """What is here now; what cannot be found out reads "unknown"."""
    from vlkernels import _library

    on_gpu = torch.device(device).type == "cuda"
    capability = "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if on_gpu else ""
    library = _library.info()
    return Run(
        time=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        commit=commit(),
        package=vlkernels.__version__,
        device=torch.cuda.get_device_name(device) if on_gpu else f"CPU ({platform.machine()})",
        capability=capability,
        driver=_smi("driver_version") if on_gpu else "",
        clocks=_smi("clocks.sm,clocks.mem,clocks.max.sm") if on_gpu else "",
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        triton=_version("triton"),
        peft=_version("peft"),
        python=platform.python_version(),
        library=f"{','.join(library['archs'])} by CUDA {library['cuda']}" if library["path"] else "none",
    )


def commit() -> str:
    """VLKERNELS_COMMIT, else what git says of the checkout, else "unknown"."""
    if os.environ.get("VLKERNELS_COMMIT"):
        return os.environ["VLKERNELS_COMMIT"]
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*") or "unknown"


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def _smi(fields: str) -> str:
    return _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0") or "unknown"


def _output(*command: str) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""


def short_name(device_name: str) -> str:
    """A file name for a device: "NVIDIA H200" -> h200, "NVIDIA A100-SXM4-80GB" -> a100."""
    words = [w for w in re.split(r"[^a-z0-9]+", device_name.lower()) if w not in ("", "nvidia", "geforce", "tesla")]
    return words[0] if words and re.search(r"\d", words[0]) else "_".join(words) or "unknown"


class Store:
    """The records file: written after every addition, so that a killed run loses nothing.

    copies: folders that get the file as well. Records of earlier runs stay until the same figure is measured again.
    """

    def __init__(self, path: Path, run: Run, baselines: dict[str, str], copies: Iterable[Path] = ()):
        self.path, self.run, self.baselines, self.copies = Path(path), run, baselines, [Path(c) for c in copies]
        content = load(self.path) if self.path.exists() else {}
        self.runs: dict[str, dict] = content.get("runs", {})
        self.records = {r.key: r for r in (Record(**r) for r in content.get("records", []))}
        self.questions: list[dict] = content.get("questions", [])
        same = run.time in self.runs
        self.checks: dict[str, dict] = content.get("checks", {}) if same else {}
        self.not_measured: list[str] = content.get("not_measured", []) if same else []

    def add(self, *records: Record) -> None:
        self.records.update({r.key: r for r in records})
        self.save()

    def save(self) -> None:
        self.runs[self.run.time] = asdict(self.run)
        used = {r.run for r in self.records.values()} | {self.run.time} | {q["run"] for q in self.questions}
        relate(self.records.values(), self.baselines)
        content = {
            "schema": SCHEMA,
            "runs": {k: v for k, v in self.runs.items() if k in used},
            "records": [asdict(r) for r in self.records.values()],
            "questions": self.questions,
            "checks": self.checks,
            "not_measured": self.not_measured,
        }
        text = json.dumps(content, indent=1) + "\n"
        for folder in (self.path.parent, *self.copies):
            folder.mkdir(parents=True, exist_ok=True)
            draft = folder / (self.path.name + ".draft")
            draft.write_text(text)
            draft.replace(folder / self.path.name)


def load(path: Path) -> dict:
    """A records file; ValueError when it is not one of this schema."""
    content = json.loads(Path(path).read_text())
    if content.get("schema") != SCHEMA or "records" not in content:
        raise ValueError(f"{path} has schema {content.get('schema')}; this code reads {SCHEMA}")
    return content


def rows(content: dict) -> list[dict]:
    """The records with their run's environment beside each figure."""
    return [content["runs"][r["run"]] | r for r in content["records"]]


def relate(records: Iterable[Record], baselines: dict[str, str]) -> None:
    """Fill in the ratios between records of the same run, case, precision and mode."""
    groups: dict[tuple, dict[str, Record]] = {}
    for r in records:
        if r.ms is not None:
            groups.setdefault((r.run, r.op, r.case, r.precision, r.mode), {})[r.provider] = r
    for group in groups.values():
        for name, r in group.items():
            r.ratios = {other: r.ms / o.ms for other, o in group.items() if other != name}
            base = group.get(baselines.get(r.op, ""))
            r.ratio_baseline = r.ms / base.ms if base else None

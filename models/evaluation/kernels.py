"""One micro-batch of stage 2 through stock peft and through the kernels, at dropout 0, in fp32.

Run in a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vlkernels

from ..errors import UserError
from ..training.stages import StagedRun

# fp32 rounding along two decoder layers stays under 1e-5 of a tensor's largest gradient
TOLERANCE = 1e-4
MODELS = Path(__file__).resolve().parents[1]


def measure(model: nn.Module, inputs: dict[str, Tensor], dropout: float) -> dict[str, Any]:
    """Loss and gradients at dropout 0, saved bytes there and at `dropout`, launches, and ms where a GPU is timed."""
    from vlkernels.testing import meter

    held: list[Tensor] = []

    def loss() -> Tensor:
        held.append(model(**inputs).loss)
        return held[-1]

    model.train()
    model.zero_grad()
    set_dropout(model, 0.0)
    parameters = list(model.parameters())
    with meter.launches() as kernels, meter.traffic() as traffic:
        saved = meter.saved_bytes(loss, apart=parameters)
        held[-1].backward()
    value = held.pop().item()
    aten = sum(n for name, n in traffic.launches.items() if name.startswith("aten::"))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    milliseconds = None
    if inputs["input_ids"].is_cuda:
        milliseconds = _step_time(lambda: model(**inputs).loss.backward())
    set_dropout(model, dropout)
    saved_with_dropout = meter.saved_bytes(loss, apart=parameters)
    set_dropout(model, 0.0)
    return {
        "loss": value,
        "gradients": gradients,
        "saved_bytes": saved,
        "saved_bytes_dropout": saved_with_dropout,
        "kernels": dict(kernels),
        "launches": aten + sum(kernels.values()),
        "ms": milliseconds,
    }


def set_dropout(model: nn.Module, p: float) -> None:
    """Give every LoRA layer dropout p, as peft itself builds it: no module at all at 0."""
    for module in model.modules():
        if isinstance(getattr(module, "lora_dropout", None), nn.ModuleDict):
            for adapter in module.lora_dropout:
                module.lora_dropout[adapter] = nn.Dropout(p) if p > 0 else nn.Identity()


def compare(run: StagedRun, samples: int, backend: str) -> dict[str, Any]:
    """Stock peft against the swapped model on the first held-out digits; everything JSON can hold."""
    stage = run.recipe.stage("tune")
    digits, images = run.qa.held_out.digits[:samples], run.qa.held_out.images[:samples]
    batch = run.qa.collate(digits, torch.arange(samples) % 5, images)
    inputs = batch.inputs(run.device)
    model = run.finished_model()

    stock = measure(model, inputs, stage.lora.dropout)
    report = vlkernels.swap(model, strict=True)
    with vlkernels.use_backend(backend):
        ours = measure(model, inputs, stage.lora.dropout)
        decisions = str(report)
    worst_name, worst = worst_difference(stock.pop("gradients"), ours.pop("gradients"))
    loss_difference = abs(ours["loss"] - stock["loss"]) / abs(stock["loss"])
    # `not <=`: a NaN anywhere is a mismatch
    agree = loss_difference <= TOLERANCE and worst <= TOLERANCE and bool(ours["kernels"])
    return {
        "samples": samples,
        "tokens": int(batch.attention_mask.sum()),
        "dropout": stage.lora.dropout,
        "device": run.device,
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "stock": stock,
        "ours": ours,
        "loss_difference": loss_difference,
        "gradient_difference": worst,
        "gradient": worst_name,
        "tolerance": TOLERANCE,
        "agree": agree,
        "report": decisions,
    }


def worst_difference(expected: dict[str, Tensor], got: dict[str, Tensor]) -> tuple[str, float]:
    """The tensor with the worst deviation relative to its own largest expected element; NaN is worse than any."""
    worst_name, worst = "", -1.0
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        deviation = (got[name] - gradient).abs().max().item()
        relative = deviation / scale if scale > 0 else (0.0 if deviation == 0 else float("inf"))
        if relative > worst or relative != relative:
            worst_name, worst = name, relative
        if worst != worst:
            break
    return worst_name, worst


def in_subprocess(folder: Path, samples: int, device: str, backend: str, timeout: float = 600) -> dict[str, Any]:
    """`python -m models kernels-check` on a finished folder; without a GPU in Triton's interpreter.

    Returns what `compare` gives, or {"skipped": reason}, or {"failed": reason}.
    """
    environment = dict(os.environ)
    if device == "cpu":
        try:
            import triton  # noqa: F401
        except ImportError as error:
            return {"skipped": f"triton cannot be imported here ({error})"}
        environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "check.json"
        command = [sys.executable, "-m", "models", "kernels-check", "--checkpoint", str(Path(folder).resolve())]
        command += ["--samples", str(samples), "--backend", backend, "--json", str(result)]
        try:
            done = subprocess.run(
                command, cwd=MODELS.parent, env=environment, capture_output=True, text=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"the check did not end within {timeout:.0f} s"}
        if not result.exists():
            return {"failed": f"the check ended with status {done.returncode}:\n{done.stderr[-3000:].strip()}"}
        return json.loads(result.read_text())


def backend_here(device: str, requested: str) -> str:
    """Which backend to force for the check: what was asked for, else the GPU's choice; in the interpreter Triton."""
    if device == "cuda":
        return "auto" if requested == "reference" else requested
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            "no GPU is here, so the kernels run in Triton's interpreter: set TRITON_INTERPRET=1 before the command"
        )
    if requested == "cuda":
        raise UserError("--backend cuda needs a CUDA device; without one the check takes auto or triton")
    return "triton"


def _step_time(step: Callable[[], None], warmup: int = 5, repeats: int = 20) -> float:
    """Median ms of a forward and backward on the GPU."""
    times = []
    for i in range(warmup + repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if i >= warmup:
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)

"""Modules at published sizes, T5-base's training, and a Llama layer with LoRA: bytes, FLOPs, launches.

    python -m benchmarks.modules [--json benchmarks/results/modules.json] [--only kept,stage1,tuning,layer,...]

Saved bytes are read off the graph that a forward on meta tensors builds at full size; the kernels' operators say there
what they keep. FLOPs and launches are counted in Triton's interpreter at full width, on one image, each way.
Eager is upstream's equation (OpenFlamingo, LAVIS) or transformers' module, with the fused dropout that a GPU has.
Takes some minutes of one core. The figures of the Llama layer are those of `benchmarks.layer` on a CPU, T5-base's are
those of `benchmarks.tuning`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import vlkernels
from vlkernels import backends
from vlkernels.modules import Blip2Stage1, PerceiverResampler, QFormer
from vlkernels.testing import meter

from . import layer, module_bytes, tuning, upstream
from .memory import _dropout
from .record import RESULTS

BATCH = 64
PARTS = ("kept", "stage1", "tuning", "layer", "qformer", "resampler")


@dataclass
class Figure:
    """One version of a module. saved: MiB kept for backward of one image, and of each of BATCH; of: those over eager's.

    flops: forward + backward over eager's, on one image. launches: forward and backward on one image.
    """

    version: str
    saved: tuple[float, float]
    of: tuple[float, float]
    flops: float | None = None
    launches: tuple[int, int] | None = None


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Kernels chosen for meta tensors, whose operators then say shapes alone; and a GPU's dropout."""
    with (
        mock.patch.object(backends, "verdict", lambda op, backend, values: None),
        mock.patch("torch.nn.functional.dropout", _dropout),
    ):
        yield


def saved(call: Callable[[Tensor], Tensor], parameters: list[Tensor], backend: str, shape: tuple[int, ...]) -> tuple:
    """MiB of one image, and of each of BATCH; x is frozen and not counted."""
    found = []
    for images in (1, BATCH):
        x = torch.empty(images, *shape, dtype=torch.bfloat16, device="meta")
        with on_meta(), vlkernels.use_backend(backend):
            found.append(meter.saved_bytes(lambda x=x: call(x), [x, *parameters]) / images / 2**20)
    return tuple(found)


def step(
    call: Callable[[Tensor], Tensor], x: Tensor, leaves: list[Tensor], backend: str
) -> tuple[int, tuple[int, int]]:
    """FLOPs, and launches of forward and backward."""
    with (
        vlkernels.use_backend(backend),
        mock.patch("torch.nn.functional.dropout", _dropout),
        meter.traffic(moved=False) as traffic,
    ):
        y = call(x)
        forward = traffic.launch_count
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    return traffic.flops, (forward, traffic.launch_count - forward)


def figures(versions: list[tuple[str, Callable[[str], tuple]]], shape: tuple[int, ...]) -> list[Figure]:
    """versions: name and device -> (call, parameters, backend), eager first."""
    found: list[Figure] = []
    eager = None
    for name, make in versions:
        call, parameters, backend = make("meta")
        mib = saved(call, parameters, backend, shape)
        eager = eager or mib
        found.append(
            Figure(
                name, tuple(round(m, 3) for m in mib), tuple(round(m / e, 3) for m, e in zip(mib, eager, strict=True))
            )
        )
    return found


def count(found: list[Figure], versions: list, shape: tuple[int, ...]) -> None:
    """FLOPs and launches of one image, on the CPU."""
    eager = None
    for figure, (_, make) in zip(found, versions, strict=True):
        torch.manual_seed(0)
        call, parameters, backend = make("cpu")
        flops, figure.launches = step(call, torch.randn(1, *shape).bfloat16(), parameters, backend)
        eager = eager or flops
        figure.flops = round(flops / eager, 3)
        print(figure, file=sys.stderr, flush=True)


def resampler() -> list[Figure]:
    """OpenFlamingo's: 1024 wide, 6 layers, 8 x 64 heads, 64 latents, 256 tokens an image."""

    def ours(level: int):
        def make(device: str) -> tuple:
            module = PerceiverResampler(1024, level=level, device=device, dtype=torch.bfloat16)
            return module, list(module.parameters()), "triton"

        return make

    def eager(device: str) -> tuple:
        module = PerceiverResampler(1024, device=device, dtype=torch.bfloat16)
        named = dict(module.named_parameters())
        return lambda x: upstream.flamingo(named, x, K=64), list(named.values()), "reference"

    versions, shape = [("eager", eager), ("level 0", ours(0)), ("level 1", ours(1))], (1, 1, 256, 1024)
    found = figures(versions, shape)
    count(found, versions, shape)
    return found


def unsplit_launches() -> dict[str, int]:
    """Launches of the resampler's forward where a batch fills the device, so that no attention splits its keys: counted
    with few channels and tokens, on which the number does not depend."""
    module, x = PerceiverResampler(16, 6, 4, 2, 4, dtype=torch.bfloat16), torch.randn(2, 1, 1, 8, 16).bfloat16()
    named = dict(module.named_parameters())
    found = {}
    for name, call, backend in (
        ("eager", lambda x: upstream.flamingo(named, x, K=4), "reference"),
        ("level 0", module, "triton"),
    ):
        with vlkernels.use_backend(backend), meter.traffic(moved=False) as traffic:
            call(x)
        found[name] = traffic.launch_count
    return found


def blip2_qformer(dropout: float) -> list[tuple[str, Callable[[str], tuple]]]:
    """Versions of BLIP-2's query pass: 12 layers of 768, 12 heads, 32 queries, 257 x 1408 image tokens; on the CPU two
    layers, one with and one without cross-attention."""
    from transformers import Blip2QFormerConfig
    from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel

    def with_queries(module: nn.Module, device: str, call: Callable) -> tuple:
        queries = nn.Parameter(torch.zeros(1, 32, 768, dtype=torch.bfloat16, device=device))
        return (lambda x: call(module, queries, x)), [queries, *module.parameters()]

    def layers(device: str) -> int:
        return 12 if device == "meta" else 2

    def eager(device: str) -> tuple:
        config = Blip2QFormerConfig(
            num_hidden_layers=layers(device), encoder_hidden_size=1408, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout, attn_implementation="eager",
        )  # fmt: skip
        with torch.device(device):
            module = Blip2QFormerModel(config).bfloat16().train()
        return *with_queries(
            module, device, lambda m, q, x: m(query_embeds=q.expand(len(x), -1, -1), encoder_hidden_states=x)[0]
        ), "reference"  # fmt: skip

    def ours(level: int):
        def make(device: str) -> tuple:
            module = QFormer(
                layers=layers(device), hidden_dropout=dropout, attention_dropout=dropout, level=level, device=device,
                dtype=torch.bfloat16,
            )  # fmt: skip
            return *with_queries(module, device, lambda m, q, x: m(q, x).queries), "triton"

        return make

    return [("eager", eager), ("level 0", ours(0)), ("level 1", ours(1))]


def qformer(dropout: float) -> list[Figure]:
    """FLOPs and launches are those of two layers, without dropout."""
    versions, shape = blip2_qformer(dropout), (257, 1408)
    found = figures(versions, shape)
    if dropout == 0.0:
        count(found, versions, shape)
    return found


def stage1() -> dict[str, float]:
    """FLOPs of a step over upstream's, at LAVIS' sizes: 32 queries, 32 words, 257 x 1408 image tokens."""
    options = {"vocab_size": 30523, "lm_head": True, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    module = Blip2Stage1(QFormer(**options, device="meta"), device="meta")
    ids, rows = torch.zeros(2, 32, dtype=torch.long, device="meta"), torch.zeros(2, dtype=torch.long)
    keep, x = torch.ones_like(ids), torch.zeros(2, 257, 1408, device="meta")
    found = {}
    for name, trained in (("ln_vision trained", True), ("ln_vision frozen", False)):
        module.ln_vision.requires_grad_(trained)
        flops = []
        for call in (
            lambda: module(x, ids, keep).loss,
            lambda: upstream.lavis_stage1(module, x, ids, keep, (rows, rows))["loss"],
        ):
            with vlkernels.use_backend("reference"), meter.traffic() as traffic:
                call().backward()
            flops.append(traffic.flops)
        found[name] = round(flops[0] / flops[1], 3)
    return found


def _dicts(found: list) -> list[dict]:
    return [asdict(figure) for figure in found]


def kept() -> dict[str, dict]:
    """Saved bytes of the modules of module_bytes."""
    found = {}
    for name, subject in module_bytes.KEPT.items():
        figures = list(module_bytes.kept(subject, on_meta))
        print(name, figures, file=sys.stderr, flush=True)
        found[name] = {"title": subject.title, "per": subject.per, "figures": figures}
    return found


COUNTS = {
    "kept": lambda: {"kept": kept()},
    "resampler": lambda: {"resampler": _dicts(resampler()), "resampler forward launches, unsplit": unsplit_launches()},
    "qformer": lambda: {"qformer": {f"dropout {p}": _dicts(qformer(p)) for p in (0.0, 0.1)}},
    "stage1": lambda: {"stage1": stage1()},
    "tuning": lambda: {"tuning": tuning.record()},
    "layer": lambda: {"layer": _dicts(layer.measure("cpu", 0.05, 32, 256, 0.0))},
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.modules", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS / "modules.json")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to count again; the file keeps the others")
    options = parser.parse_args(argv)
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(PARTS):
        parser.error(f"--only names {', '.join(unknown)}; accepted: {', '.join(PARTS)}")
    record = json.loads(options.json.read_text()) if options.json.exists() else {}
    record |= {"package": vlkernels.__version__, "torch": torch.__version__.partition("+")[0], "batch": BATCH}
    for part in PARTS:
        if part in wanted:
            record |= COUNTS[part]()
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    if not meter._tl.INTERPRETED.value:
        # the switch is read when triton is imported
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.modules", *sys.argv[1:]],
            os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    sys.exit(main())

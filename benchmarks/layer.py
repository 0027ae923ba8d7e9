"""A decoder layer of Llama-7B's shape with LoRA on its seven linears: saved bytes, launches, FLOPs, and times on a GPU.

    python -m benchmarks.layer [--json FILE] [--shrink 32] [--tokens 256] [--dropout 0.05] [--minutes 1]

Stock peft beside the swapped layer, its blocks and its norms fused, in bf16 with float32 adapters under autocast, as
people train. Without a GPU the layer is counted with all widths divided by `--shrink` (one head), the bytes given at
full width; on a GPU it runs at full width and is timed as well. r = 128, alpha = 256.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import vlkernels
from vlkernels.testing import clock, meter

from .memory import _dropout

WIDTH, INNER, HEADS, RANK = 4096, 11008, 32, 128
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STOCK_KB = 241  # a token, stock peft at p = 0.05 with PyTorch's fused dropout of a GPU


@dataclass
class Figure:
    """One version of the layer. saved_kb: a token at full width, the layer's own input included; of_stock: of 241 KB.

    launches, flops: forward + backward; flops over the stock layer's. ms: forward + backward, None where not timed.
    """

    version: str
    saved_kb: float
    of_stock: float
    launches: int | None = None
    flops_ratio: float | None = None
    ms: float | None = None


def stock(device: str, dropout: float, shrink: int, fp32_adapters: bool = True) -> nn.Module:
    """transformers' decoder layer under peft, frozen in bf16."""
    import peft
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama as llama

    config = LlamaConfig(
        hidden_size=WIDTH // shrink,
        intermediate_size=INNER // shrink,
        num_attention_heads=max(1, HEADS // shrink),
        num_key_value_heads=max(1, HEADS // shrink),
        attn_implementation="sdpa",
    )
    owner = nn.ModuleDict({"layer": llama.LlamaDecoderLayer(config, 0).to(device, torch.bfloat16)})
    owner.requires_grad_(False)
    lora = peft.LoraConfig(
        r=RANK // shrink, lora_alpha=2 * RANK // shrink, lora_dropout=dropout, target_modules=list(LINEARS)
    )
    peft.inject_adapter_in_model(lora, owner)
    for name, p in owner.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(torch.float32 if fp32_adapters else torch.bfloat16)
            nn.init.normal_(p, std=0.02)
    owner.rotary = llama.LlamaRotaryEmbedding(config).to(device)
    return owner.train()


def plain(device: str, shrink: int) -> nn.Module:
    """The frozen layer without adapters: no adapter makes it faster."""
    owner = stock(device, 0.0, shrink)
    for block in (owner["layer"].self_attn, owner["layer"].mlp):
        for name, child in list(block.named_children()):
            if hasattr(child, "base_layer"):
                setattr(block, name, child.base_layer)
    return owner


def call(owner: nn.Module, tokens: int) -> tuple[Callable[[], Tensor], tuple[Tensor, ...], list[Tensor]]:
    """(forward of one batch, what gets gradients, what is in memory anyway)."""
    weight = next(owner.parameters())
    width = owner["layer"].input_layernorm.weight.shape[0]
    x = torch.randn(1, tokens, width, device=weight.device, dtype=torch.bfloat16, requires_grad=True)
    rotary = owner.rotary(x, torch.arange(tokens, device=weight.device)[None])

    def forward() -> Tensor:
        with torch.autocast(weight.device.type, torch.bfloat16):
            return owner["layer"](x, position_embeddings=rotary)

    leaves = (x, *(p for p in owner.parameters() if p.requires_grad))
    return forward, leaves, [*owner.parameters(), *rotary]


def counted(version: str, owner: nn.Module, shrink: int, tokens: int, backend: str | None) -> tuple[Figure, int]:
    """Saved bytes a token, by the line through two row counts, launches, and FLOPs of one step."""
    # CUDA's dropout is one operator
    one_dropout = mock.patch("torch.nn.functional.dropout", _dropout)
    with vlkernels.use_backend(backend), one_dropout:
        saved = []
        for rows in (tokens // 2, tokens):
            forward, leaves, apart = call(owner, rows)
            saved.append(meter.saved_bytes(forward, apart))
        kb = (saved[1] - saved[0]) / (tokens - tokens // 2) * shrink / 1024
        figure = Figure(version, round(kb, 1), round(kb / STOCK_KB, 3))
        with meter.traffic() as traffic:
            y = forward()
            torch.autograd.grad(y, leaves, torch.ones_like(y))
    figure.launches = traffic.launch_count
    return figure, traffic.flops


def timed(owner: nn.Module, tokens: int, seconds: float, wrap: Callable = lambda f: f) -> float:
    """Milliseconds of forward and backward."""
    forward, leaves, _ = call(owner, tokens)
    forward = wrap(forward)
    dy = torch.randn_like(forward())

    def step() -> None:
        torch.autograd.grad(forward(), leaves, dy)

    return clock.measure([step], dy.device, seconds).ms


def versions(device: str, dropout: float, shrink: int) -> list[tuple[str, Callable[[], nn.Module], str | None, bool]]:
    """(name, how it is made, forced backend, compiled)."""
    ours = None if device == "cuda" else "triton"

    def swapped(fuse_norms: bool, **options) -> nn.Module:
        owner = copy.deepcopy(stock(device, dropout, shrink))
        vlkernels.swap(owner, strict=True, fuse_norms=fuse_norms, **options)
        return owner

    found = [
        ("stock peft, float32 adapters", lambda: stock(device, dropout, shrink), None, False),
        ("swapped, layer by layer", lambda: swapped(False, include="Linear"), ours, False),
        ("swapped", lambda: swapped(False), ours, False),
        ("swapped, norms fused", lambda: swapped(True), ours, False),
    ]
    if device == "cuda":
        found += [
            ("frozen layer without adapters", lambda: plain(device, shrink), None, False),
            ("stock peft, bf16 adapters", lambda: stock(device, dropout, shrink, fp32_adapters=False), None, False),
            ("stock peft, torch.compile", lambda: stock(device, dropout, shrink), None, True),
        ]
    return found


def measure(device: str, dropout: float, shrink: int, tokens: int, minutes: float) -> list[Figure]:
    figures: list[Figure] = []
    stock_flops = None
    todo = versions(device, dropout, shrink)
    for name, make, backend, compiled in todo:
        torch.manual_seed(0)
        owner = make()
        figure, flops = counted(name, owner, shrink, tokens if device == "cpu" else 256, backend)
        stock_flops = stock_flops or flops
        # a Triton kernel's FLOPs are seen in the interpreter alone
        figure.flops_ratio = round(flops / stock_flops, 3) if device == "cpu" else None
        if device == "cuda":
            with contextlib.suppress(torch.cuda.OutOfMemoryError):
                seconds = 60 * minutes / len(todo) / 2
                figure.ms = timed(owner, tokens, seconds, torch.compile if compiled else lambda f: f)
        figures.append(figure)
        print(line(figure), file=sys.stderr, flush=True)
    return figures


def line(f: Figure) -> str:
    ms = "not yet measured" if f.ms is None else f"{f.ms:.3f} ms"
    flops = "" if f.flops_ratio is None else f", FLOPs {f.flops_ratio:.3f}"
    return f"{f.version:<32} {f.saved_kb:6.1f} KB a token, {f.of_stock:.2f} of 241; {f.launches} launches{flops}; {ms}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--shrink", type=int, default=None, help="divide all widths (default: 32, on a GPU 1)")
    parser.add_argument("--tokens", type=int, default=None, help="rows (default: 256, on a GPU 8192)")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--minutes", type=float, default=1.0, help="for the timings")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shrink = options.shrink or (1 if device == "cuda" else 32)
    tokens = options.tokens or (8192 if device == "cuda" else 256)
    if shrink not in (1, 2, 4, 8, 16, 32):
        parser.error(f"--shrink is {shrink}; accepted: 1, 2, 4, 8, 16, 32")
    figures = measure(device, options.dropout, shrink, tokens, options.minutes)
    if options.json:
        record = {"device": device, "shrink": shrink, "tokens": tokens, "dropout": options.dropout,
                  "package": vlkernels.__version__, "torch": torch.__version__.partition("+")[0],
                  "figures": [asdict(f) for f in figures]}  # fmt: skip
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    if not torch.cuda.is_available() and not meter._tl.INTERPRETED.value:
        # the switch is read when triton is imported
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.layer", *sys.argv[1:]],
            os.environ | {"TRITON_INTERPRET": "1"},
        )  # fmt: skip
    sys.exit(main())

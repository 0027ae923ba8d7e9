"""Training steps of whole models, swapped against unswapped: ms, tokens a second, peak memory, and where the time goes.

    python -m benchmarks.steps [--only llava,flamingo,blip2] [--json FILE] [--minutes 2] [--shrink 1]

On a GPU the figures go to benchmarks/results/steps.json, and to the folder that the environment variable OUT names.

llava     LLaVA-1.5-7B's second stage: frozen tower, projector and peft LoRA (r = 128, alpha = 256, p = 0.05, on all
          linears of the LLM) in training, gradient checkpointing, 16 samples of 1024 tokens with an image of 576 each.
flamingo  OpenFlamingo-9B's shape: a frozen 7B decoder (a Llama's layers in place of MPT's), a resampler and a gated
          block before every fourth layer in training, 16 samples of 256 tokens, an image of 256 patches each.
blip2     BLIP-2's first stage over frozen image tokens: 64 pairs, 257 x 1408 tokens an image, 32 words.

Weights are random, in bf16 (float32 adapters under autocast); a step is forward, backward and AdamW. Unswapped runs
transformers, peft and upstream's code. Where there is no GPU the models are divided by `--shrink`, which tests that
all of it runs; such figures are of no model that anybody trains.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlkernels
from vlkernels.modules import Blip2Stage1, GatedCrossAttentionBlock, PerceiverResampler, QFormer
from vlkernels.testing import clock

from . import record, upstream, upstream_blocks

VERSIONS = ("unswapped", "swapped")
HEAD = 64  # of the resampler's attention


@dataclass
class Figure:
    """ms: median of a step; peak_gib: most memory of a step, weights and optimizer among it; loss: of the first step,
    dropout apart the same for both versions. profile: (kernel, share of the device's time), the largest first.

    of_unswapped: ms over the unswapped model's. failure: why there is no timing.
    """

    step: str
    version: str
    tokens: int
    loss: float | None = None
    ms: float | None = None
    of_unswapped: float | None = None
    tokens_per_s: float | None = None
    peak_gib: float | None = None
    profile: list[tuple[str, float]] = field(default_factory=list)
    failure: str = ""


@dataclass(frozen=True)
class Step:
    """model: what is trained; loss(): of the same batch each time; tokens: of a batch, as the model's users count."""

    model: nn.Module
    loss: Callable[[], Tensor]
    tokens: int


def _divided(shrink: int, *sizes: int) -> list[int]:
    return [max(1, size // shrink) for size in sizes]


# -- LLaVA-1.5-7B, stage 2 -----------------------------------------------------------------------------------------


def llava(swapped: bool, device: str, shrink: int, dropout: float) -> Step:
    import peft
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    width, inner, heads, layers, rank, batch, image = _divided(shrink, 4096, 11008, 32, 32, 128, 16, 32000)
    side = max(2, 24 // shrink)
    vision = CLIPVisionConfig(
        hidden_size=1024 // shrink, intermediate_size=4096 // shrink, num_attention_heads=max(1, 16 // shrink),
        num_hidden_layers=max(2, 24 // shrink), image_size=14 * side, patch_size=14,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=heads,
        num_hidden_layers=layers, vocab_size=image + 64,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, image_seq_length=side**2)
    torch.manual_seed(0)
    with _made_on(device):
        model = LlavaForConditionalGeneration(config)
    model.requires_grad_(False)
    target = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=dropout, target_modules=target)
    model = peft.get_peft_model(model, lora)
    for name, p in model.named_parameters():
        if "multi_modal_projector" in name:
            p.requires_grad_(True)
        if ".lora_" in name:
            p.data = p.data.float()
            nn.init.normal_(p, std=0.02)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if swapped:
        vlkernels.swap(model, strict=True)
    length = max(2 * side**2, 1024 // shrink)
    ids = torch.randint(0, image, (batch, length), device=device)
    ids[:, 4 : 4 + side**2] = image
    pixels = torch.randn(batch, 3, 14 * side, 14 * side, device=device, dtype=torch.bfloat16)
    labels = ids.masked_fill(ids == image, -100)

    def loss() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss

    return Step(model, loss, batch * length)


# -- OpenFlamingo-9B -----------------------------------------------------------------------------------------------


class _Flamingo(nn.Module):
    """A frozen decoder with gated blocks before every fourth layer: ours, or upstream's code over their parameters."""

    def __init__(self, decoder: nn.Module, resampler: nn.Module, blocks: nn.ModuleList, every: int, stock: bool):
        super().__init__()
        self.decoder, self.resampler, self.blocks = decoder, resampler, blocks
        self.every, self.stock = every, stock

    def forward(self, ids: Tensor, patches: Tensor, locations: Tensor) -> Tensor:
        inner = self.decoder.model
        if self.stock:
            named = dict(self.resampler.named_parameters())
            media = upstream.flamingo(named, patches, K=HEAD)
        else:
            media = self.resampler(patches)
        h = inner.embed_tokens(ids)
        rotary = inner.rotary_emb(h, torch.arange(ids.shape[1], device=ids.device)[None])
        for i, layer in enumerate(inner.layers):
            if (i + 1) % self.every == 0:
                block = self.blocks[(i + 1) // self.every - 1]
                block = upstream_blocks.FlamingoBlock(block) if self.stock else block
                h = block(h, media, locations)
            h = layer(h, position_embeddings=rotary)
        logits = self.decoder.lm_head(inner.norm(h))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def flamingo(swapped: bool, device: str, shrink: int, dropout: float) -> Step:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, inner, heads, vision, batch, words = _divided(shrink, 4096, 16384, 32, 1024, 16, 50280)
    layers, every = max(4, 32 // shrink), 4
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=heads,
        num_hidden_layers=layers, vocab_size=words,
    )  # fmt: skip
    torch.manual_seed(0)
    with _made_on(device):
        decoder = LlamaForCausalLM(config).requires_grad_(False)
        resampler = PerceiverResampler(vision, depth=max(1, 6 // shrink), dim_head=HEAD)
        blocks = nn.ModuleList(GatedCrossAttentionBlock(width, vision) for _ in range(layers // every))
    for block in blocks:
        # as in the middle of training: at zero the gates' branches get no gradient
        for gate in (block.attn_gate, block.ff_gate):
            nn.init.constant_(gate, 0.5)
    model = _Flamingo(decoder, resampler, blocks, every, not swapped).train()
    length = max(16, 256 // shrink)
    ids = torch.randint(0, words, (batch, length), device=device)
    locations = torch.zeros(batch, length, dtype=torch.bool, device=device)
    locations[:, 0] = True
    patches = torch.randn(batch, 1, 1, max(8, 256 // shrink), vision, device=device, dtype=torch.bfloat16)
    return Step(model, lambda: model(ids, patches, locations), batch * length)


# -- BLIP-2, stage 1 -----------------------------------------------------------------------------------------------


def blip2(swapped: bool, device: str, shrink: int, dropout: float) -> Step:
    pairs, tokens, vision, layers = max(2, 64 // shrink), max(8, 257 // shrink), 1408 // shrink, max(2, 12 // shrink)
    width, inner, heads, words = *_divided(shrink, 768, 3072, 12), max(200, 30523 // shrink)
    torch.manual_seed(0)
    with _made_on(device):
        qformer = QFormer(
            hidden_size=width, heads=heads, layers=layers, intermediate_size=inner, encoder_hidden_size=vision,
            vocab_size=words, lm_head=True, hidden_dropout=dropout, attention_dropout=dropout,
        )  # fmt: skip
        model = Blip2Stage1(qformer, bos_token_id=words - 1).train()
    x = torch.randn(pairs, tokens, vision, device=device, dtype=torch.bfloat16)
    ids = torch.randint(1, words - 100, (pairs, 32), device=device)
    keep, order = torch.ones_like(ids), torch.arange(pairs, device=device).roll(1)

    def loss() -> Tensor:
        if swapped:
            return model(x, ids, keep).loss
        return upstream.lavis_stage1(model, x, ids, keep, (order, order))["loss"]

    return Step(model, loss, pairs * (tokens + 32))


STEPS = {"llava": llava, "flamingo": flamingo, "blip2": blip2}


@contextlib.contextmanager
def _made_on(device: str):
    """New parameters are bf16 on the device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


# -- measuring -----------------------------------------------------------------------------------------------------


def measure(
    name: str, version: str, device: str, shrink: int = 1, seconds: float = 10.0, dropout: float = 0.05
) -> Figure:
    """One version of one step."""
    step = None
    try:
        step = STEPS[name](version == "swapped", device, shrink, dropout)
        return _measured(step, Figure(name, version, step.tokens), device, seconds)
    except torch.cuda.OutOfMemoryError as error:
        tokens = 0 if step is None else step.tokens
        return Figure(name, version, tokens, failure=f"out of memory: {str(error).splitlines()[0][:200]}")
    finally:
        del step
        if device == "cuda":
            torch.cuda.empty_cache()


def _measured(step: Step, found: Figure, device: str, seconds: float) -> Figure:
    trained = [p for p in step.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=device == "cuda")

    def run() -> Tensor:
        loss = step.loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    torch.manual_seed(1)
    found.loss = float(run())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    found.ms = clock.measure([run], device, seconds, warmup=2, least=3, most=20).ms
    found.tokens_per_s = 1e3 * found.tokens / found.ms
    if device == "cuda":
        found.peak_gib = torch.cuda.max_memory_allocated(device) / 2**30
    found.profile = profiled(run, device)
    return found


def profiled(run: Callable[[], object], device: str, most: int = 15) -> list[tuple[str, float]]:
    """The kernels (operators on a CPU) of one step that took longest, with their share of all of them."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device == "cuda" else []
    with torch.profiler.profile(activities=kinds) as profile:
        run()
        clock.synchronise(device)
    times = {
        e.key: e.self_device_time_total if device == "cuda" else e.self_cpu_time_total for e in profile.key_averages()
    }
    total = sum(times.values()) or 1
    return [(name[:120], round(t / total, 4)) for name, t in sorted(times.items(), key=lambda kv: -kv[1])[:most] if t]


def all_steps(names: list[str], device: str, shrink: int, minutes: float, save: Callable[[list[Figure]], None]) -> None:
    """Every version of the named steps; what has been measured is saved after each."""
    figures: list[Figure] = []
    for name in names:
        before = None
        for version in VERSIONS:
            figure = measure(name, version, device, shrink, 60 * minutes / len(names) / len(VERSIONS) / 3)
            if version == VERSIONS[0]:
                before = figure.ms
            elif before and figure.ms:
                figure.of_unswapped = figure.ms / before
            figures.append(figure)
            print(line(figure), flush=True)
            save(figures)


def line(f: Figure) -> str:
    if f.failure:
        return f"{f.step} {f.version}: {f.failure}"
    ratio = "" if f.of_unswapped is None else f", {f.of_unswapped:.3f} of unswapped"
    peak = "" if f.peak_gib is None else f", peak {f.peak_gib:.1f} GiB"
    return f"{f.step} {f.version}: {f.ms:.1f} ms{ratio}, {f.tokens_per_s:.0f} tokens/s{peak}, loss {f.loss:.4f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(STEPS), help="comma separated (default %(default)s)")
    parser.add_argument("--json", type=Path, default=None, help="write the figures to this file")
    parser.add_argument("--minutes", type=float, default=2.0, help="for the timings")
    parser.add_argument("--shrink", type=int, default=None, help="divide all sizes (default: 64, on a GPU 1)")
    options = parser.parse_args(argv)
    names = options.only.split(",")
    if unknown := [n for n in names if n not in STEPS]:
        parser.error(f"--only names {', '.join(unknown)}; accepted: {', '.join(STEPS)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shrink = options.shrink or (1 if device == "cuda" else 64)
    if shrink not in (1, 2, 4, 8, 16, 32, 64):
        parser.error(f"--shrink is {shrink}; accepted: 1, 2, 4, 8, 16, 32, 64")
    run = asdict(record.environment(device)) | {"shrink": shrink}

    paths = [options.json or record.RESULTS / "steps.json"] if options.json or device == "cuda" else []
    paths += [Path(os.environ["OUT"]) / "steps.json"] if paths and os.environ.get("OUT") else []

    def save(figures: list[Figure]) -> None:
        content = {"run": run, "steps": [asdict(f) for f in figures]}
        for path in paths:
            path.write_text(json.dumps(content, indent=1) + "\n")

    all_steps(names, device, shrink, options.minutes, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())

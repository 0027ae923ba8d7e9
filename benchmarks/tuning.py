"""What training keeps with T5-base on images and text: full fine-tuning, LoRA, adapters and a ladder, at equal batch.

    python -m benchmarks.tuning [--text 20] [--images 36] [--target 10] [--batch 300]

Sizes and switches are those of ylsung/Ladder-Side-Tuning VL-T5/scripts/image: float32, dropout 0.1, 36 image tokens of
2048 features, LoRA of rank 150 on q and v (peft), adapters of a fourth of the width after every attention and
feed-forward with the norms trained, a ladder with R = 4. The visual embedding is trained everywhere. Saved bytes are
read off the graph that a forward with its loss builds on meta tensors at full size, with eager attention and a GPU's
fused dropout; gradients are 4 bytes a trained parameter, AdamW's state 8.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlkernels.integrations.ladder import add_ladder
from vlkernels.modules import VisualEmbedding
from vlkernels.testing import meter

from .memory import _dropout

FEATURES, RANK, REDUCTION = 2048, 150, 4
METHODS = ("full", "LoRA", "adapters", "ladder")


@dataclass
class Figure:
    """One method at one length, in MiB. kept: gradients + optimizer + saved; peak: weights too.

    ladder_of, ladder_of_peak: the ladder's share of them.
    """

    method: str
    text: int
    images: int
    target: int
    batch: int
    trained: int
    weights: float
    gradients: float
    optimizer: float
    saved: float
    kept: float
    peak: float
    ladder_of: float = 1.0
    ladder_of_peak: float = 1.0


def t5(device: str, **sizes) -> nn.Module:
    """T5-base, or a smaller one, with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    base = {
        "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "vocab_size": 32128,
        "dropout_rate": 0.1, "decoder_start_token_id": 0, "attn_implementation": "eager",
    }  # fmt: skip
    with torch.device(device):
        return T5ForConditionalGeneration(T5Config(**(base | sizes))).train()


class _Adapter(nn.Module):
    """x + up(gelu(down(x))) after a sublayer, before its dropout and residual: upstream's, in plain PyTorch."""

    def __init__(self, inner: nn.Module, width: int):
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(width, width // REDUCTION), nn.Linear(width // REDUCTION, width)

    def forward(self, *args, **kwargs):
        y = self.inner(*args, **kwargs)
        x = y[0] if isinstance(y, tuple) else y
        x = x + self.up(F.gelu(self.down(x), approximate="tanh"))
        return (x, *y[1:]) if isinstance(y, tuple) else x


def _with_adapters(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    width = model.config.d_model
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            for layer in block.layer:
                name = next(n for n in ("SelfAttention", "EncDecAttention", "DenseReluDense") if hasattr(layer, n))
                setattr(layer, name, _Adapter(getattr(layer, name), width))
    for name, p in model.named_parameters():
        p.requires_grad_("layer_norm" in name or ".down." in name or ".up." in name)
    return model


def built(method: str, device: str, **sizes) -> tuple[nn.Module, Callable[..., Tensor]]:
    """The model as the method trains it, and its loss of (ids, feats, boxes, labels)."""
    model = t5(device, **sizes)
    whole = model.config
    if method == "ladder":
        with torch.device(device):
            add_ladder(model, REDUCTION, visual={"feat_dim": FEATURES}, init="random")

        def ladder_loss(ids: Tensor, feats: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
            # without masks, whose values meta tensors do not have
            encoded = model.encoder(input_ids=ids, vis_feats=feats, boxes=boxes)
            return model(encoder_outputs=encoded, labels=labels).loss

        return model, ladder_loss
    with torch.device(device):
        visual = VisualEmbedding(FEATURES, whole.d_model, model.shared, eps=whole.layer_norm_epsilon)
        if method == "LoRA":
            from peft import LoraConfig, get_peft_model

            config = LoraConfig(r=RANK, lora_alpha=32, lora_dropout=0.1, target_modules=["q", "v"])
            tuned = get_peft_model(model, config).train()
        else:
            tuned = _with_adapters(model).train() if method == "adapters" else model
    for name, p in visual.named_parameters():
        p.requires_grad_("obj_order" not in name or method == "full")

    def loss(ids: Tensor, feats: Tensor, boxes: Tensor, labels: Tensor) -> Tensor:
        x = torch.cat((model.shared(ids), visual(feats, boxes)), 1)
        return tuned(inputs_embeds=x, labels=labels, use_cache=False).loss

    return nn.ModuleList((tuned, visual)), loss


def saved_of(method: str, batch: int, text: int, images: int, target: int, device: str = "meta", **sizes) -> tuple:
    """(bytes kept for backward, parameters, trained parameters)."""
    model, loss = built(method, device, **sizes)
    parameters = list({id(p): p for p in model.parameters()}.values())
    made = {"device": device}
    inputs = (
        torch.ones(batch, text, dtype=torch.long, **made), torch.zeros(batch, images, FEATURES, **made),
        torch.zeros(batch, images, 4, **made), torch.ones(batch, target, dtype=torch.long, **made),
    )  # fmt: skip
    with mock.patch("torch.nn.functional.dropout", _dropout):
        saved = meter.saved_bytes(lambda: loss(*inputs), [*parameters, *inputs])
    count = [sum(p.numel() for p in some) for some in (parameters, [p for p in parameters if p.requires_grad])]
    return saved, *count


def measure(batch: int = 300, text: int = 20, images: int = 36, target: int = 10, **sizes) -> list[Figure]:
    """All methods at one length; the ladder last."""
    found = []
    for method in METHODS:
        saved, parameters, trained = saved_of(method, batch, text, images, target, **sizes)
        weights, gradients, optimizer, saved = (n / 2**20 for n in (4 * parameters, 4 * trained, 8 * trained, saved))
        kept = gradients + optimizer + saved
        found.append(
            Figure(
                method, text, images, target, batch, trained,
                *(round(mib, 1) for mib in (weights, gradients, optimizer, saved, kept, weights + kept)),
            )
        )  # fmt: skip
    for figure in found:
        figure.ladder_of = round(found[-1].kept / figure.kept, 3)
        figure.ladder_of_peak = round(found[-1].peak / figure.peak, 3)
    return found


def record() -> list[dict]:
    """What benchmarks.modules writes: the two ends of the tasks' text lengths."""
    return [asdict(figure) for text in (20, 40) for figure in measure(text=text)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tuning", description=__doc__.splitlines()[0])
    for name, default in (("text", 20), ("images", 36), ("target", 10), ("batch", 300)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for figure in measure(**vars(parser.parse_args(argv))):
        print(figure)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())

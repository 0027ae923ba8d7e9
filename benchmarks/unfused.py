"""What a fused kernel would save where plain PyTorch stays: a ladder's rung and MemVP's memory beside a feed-forward.

    python -m benchmarks.unfused

Counted on meta tensors in bf16 at full size: bytes kept for backward and bytes moved, forward and backward, by the part
in plain PyTorch, by the layers that stand around it (transformers' Llama layers of the sizes named), and by a fused op,
which reads each argument once and writes each result once. Shares are those of part and layers together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlkernels.modules.ladder import ladder_mix
from vlkernels.modules.memvp import memory_ffn
from vlkernels.testing import meter

MADE = {"device": "meta", "dtype": torch.bfloat16}


@dataclass
class Figure:
    """A part in bytes a token. around: the layers without it; floor: moved by a fused op; least: kept by one.

    could_keep, could_move: what the fused op would take off part and layers together, as a share.
    """

    part: str
    kept: float
    kept_around: float
    least: float
    moved: float
    moved_around: float
    floor: float

    @property
    def could_keep(self) -> float:
        return (self.kept - self.least) / (self.kept + self.kept_around)

    @property
    def could_move(self) -> float:
        return (self.moved - self.floor) / (self.moved + self.moved_around)

    def __str__(self) -> str:
        return (
            f"{self.part}: keeps {self.kept:.0f} B a token, fused {self.least:.0f}, {self.could_keep:.1%} of a layer; "
            f"moves {self.moved / 1024:.1f} KiB a token, fused {self.floor / 1024:.1f}, {self.could_move:.1%} of it"
        )


def _layer(width: int, inner: int, heads: int, head: int) -> nn.Module:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_attention_heads=heads, num_key_value_heads=heads, head_dim=head
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        return LlamaDecoderLayer(config, 0).bfloat16()


def _empty(*shape: int, grad: bool = False) -> Tensor:
    return torch.empty(*shape, **MADE, requires_grad=grad)


def _count(call: Callable[[], Tensor], leaves: list[Tensor], apart: list[Tensor]) -> tuple[int, int]:
    """(bytes kept, bytes moved by forward and backward); without leaves there is no backward."""
    with torch.set_grad_enabled(bool(leaves)):
        kept = meter.saved_bytes(call, apart) if leaves else 0
        with meter.traffic() as traffic:
            y = call()
            if leaves:
                torch.autograd.grad(y, leaves, torch.ones_like(y))
    return kept, traffic.moved


def rung(name: str, width: int, inner: int, heads: int, head: int, batch: int, length: int, R: int = 4) -> Figure:
    """s <- g s + (1 - g) P(h) between a backbone's frozen layer, run forward only, and a side layer that is trained."""
    narrow, rows = width // R, batch * length
    s, h = _empty(batch, length, narrow, grad=True), _empty(batch, length, width)
    down, alpha = nn.Linear(width, narrow, **MADE), nn.Parameter(torch.empty(1, **MADE))
    own = [*down.parameters(), alpha]
    kept, moved = _count(lambda: ladder_mix(s, down(h), torch.sigmoid(alpha.float() / 0.1)), [s, *own], [s, *own])
    side, backbone = _layer(narrow, inner // R, heads, head // R), _layer(width, inner, heads, head)
    rotary = [tuple(_empty(batch, length, n) for _ in range(2)) for n in (head // R, head)]
    trained = list(side.parameters())
    around = _count(lambda: side(s, position_embeddings=rotary[0]), [s, *trained], [s, *trained, *rotary[0]])
    forward = _count(lambda: backbone(h, position_embeddings=rotary[1]), [], [])
    # forward h, s -> s'; backward dy, h, s -> ds; P read, dP written. It keeps h, and makes P(h) again.
    weights = 2 * (width * narrow + narrow)
    floor = 2 * rows * (2 * width + 5 * narrow) + 3 * weights
    found = (kept, around[0], 2 * rows * width, moved, around[1] + forward[1], floor)
    return Figure(name, *(n / rows for n in found))


def memory(batch: int, length: int, M: int = 320) -> Figure:
    """y = x + s silu(z keysᵀ) values beside the feed-forward of a frozen 7B layer, whose input requires gradients."""
    width, rows = 4096, batch * length
    x, z, base = (_empty(batch, length, width, grad=True) for _ in range(3))
    keys, values = (_empty(batch, M, width, grad=True) for _ in range(2))
    leaves = [base, z, keys, values]
    kept, moved = _count(lambda: base + memory_ffn(z, keys, values, 0.1), leaves, leaves)
    layer = _layer(width, 11008, 32, 128).requires_grad_(False)
    rotary = tuple(_empty(batch, length, 128) for _ in range(2))
    around = _count(lambda: layer(x, position_embeddings=rotary), [x], [x, *layer.parameters(), *rotary])
    # z is kept for the keys' gradient and by nothing else in a frozen layer; a fused op would keep it too
    kept += 2 * rows * width
    # forward z, base, keys, values -> y; backward dy, z, keys, values -> dz, dkeys, dvalues
    floor = 2 * (6 * rows * width + 6 * batch * M * width)
    found = (kept, around[0], 2 * rows * width, moved, around[1], floor)
    return Figure(f"memory_ffn, 7B, M = {M}, {batch} x {length}", *(n / rows for n in found))


def measure() -> list[Figure]:
    return [
        rung("ladder_mix, T5-base's widths, R = 4", 768, 3072, 12, 64, 300, 20),
        rung("ladder_mix, 7B, R = 4", 4096, 11008, 32, 128, 4, 512),
        memory(4, 512),
        memory(16, 128),
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("\n".join(map(str, measure())))
    sys.exit(0)

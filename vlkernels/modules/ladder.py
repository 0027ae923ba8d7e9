"""Ladder side tuning: a narrow side network that climbs beside a frozen backbone. arXiv 2206.06522; survey 4.2.2.

    s_0 = P_0(x),    s <- g_i s + (1 - g_i) P_i(h_i),    s <- Side_i(s),    logits = head(up(norm(s)))

h_i is the output of the backbone's layer i, P_0 and P_i are Linear(D, D / R), Side_i is the backbone's own kind of
layer with D / R, F / R and head width / R, g_i = sigmoid(alpha_i / T). No gradient reaches the backbone: it keeps
nothing for backward. The logits are head(up(norm(s))), and the last h_i gets there only through P_i and s: a fresh
ladder does NOT equal its backbone at step 0. `up` and every P are random there, and with the best of them the head
still reads D / R numbers a token.

The parts are plain PyTorch and sit under upstream's names on whatever runs the layers; `integrations.ladder` puts them
on transformers' T5 and Llama. Source: ylsung/Ladder-Side-Tuning VL-T5/src/my_transformers/modeling_t5.py and
VL-T5/src/modeling_t5.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._autocast import compute_dtype

GATES = ("learned", "schedule", "one", "none")


@dataclass(frozen=True)
class LadderConfig:
    """The switches of a ladder; every one is upstream's.

    reduction: R. Published: 4 for vision and language; upstream's argument defaults to 8. 1: every P is the identity.
    encoder_layers, decoder_layers: ascending numbers of the layers that keep a rung (gate, P_i, Side_i); None: all.
    gate: "learned" g = sigmoid(alpha / gate_T), alpha one number a layer, at first gate_alpha; "schedule" and "one" a
        buffer a layer, at first 1, for a schedule of the user's (`set_gates`) or none; "none": s + P_i(h_i), no gate.
    add_residual_after: mix after Side_i instead of before it.
    pool: AdaptiveAvgPool1d over the channels in place of each P_i (not of P_0).
    bias: of P_0, P_i and `up`.
    upstream_text_quirks: what upstream's text-only class does and its vision-language class does not: the encoder's
        side blocks after the first lose the relative position bias, and the decoder's side cross-attention sees
        padding. For checkpoints trained there.
    """

    reduction: int = 4
    encoder_layers: tuple[int, ...] | None = None
    decoder_layers: tuple[int, ...] | None = None
    gate: str = "learned"
    gate_T: float = 0.1
    gate_alpha: float = 0.0
    add_residual_after: bool = False
    pool: bool = False
    bias: bool = True
    upstream_text_quirks: bool = False

    def __post_init__(self):
        if isinstance(self.reduction, bool) or not isinstance(self.reduction, int) or self.reduction < 1:
            raise ValueError(f"reduction is {self.reduction!r}; accepted: an integer of 1 or more")
        if self.gate not in GATES:
            raise ValueError(f"gate is {self.gate!r}; accepted: {', '.join(map(repr, GATES))}")
        if not self.gate_T > 0:
            raise ValueError(f"gate_T is {self.gate_T!r}; accepted: a number above 0")
        for name in ("encoder_layers", "decoder_layers"):
            if (layers := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(layers))

    def reduced(self, **sizes: int) -> dict[str, int]:
        """Each size over R, rounded down. ValueError where nothing is left."""
        for name, size in sizes.items():
            if size < self.reduction:
                raise ValueError(f"reduction is {self.reduction}; accepted: at most the backbone's {name}, {size}")
        return {name: size // self.reduction for name, size in sizes.items()}


def rungs(name: str, layers: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """Which of `count` layers have a rung. ValueError for a list that is empty, unordered or out of range."""
    kept = tuple(range(count)) if layers is None else tuple(layers)
    whole = all(isinstance(i, int) and not isinstance(i, bool) and 0 <= i < count for i in kept)
    if not kept or not whole or any(a >= b for a, b in zip(kept, kept[1:], strict=False)):
        raise ValueError(f"{name} is {layers!r}; accepted: ascending numbers of layers, each from 0 to {count - 1}")
    return kept


def ladder_mix(s: Tensor, h: Tensor, gate: Tensor | None) -> Tensor:
    """g s + (1 - g) h, both (B, L, D / R), g one number; without a gate s + h.

    Computed as h + g (s - h) where g is learned: for its gradient backward then keeps s - h alone, not both.
    """
    if gate is None:
        return s + h
    if s.dtype != h.dtype:  # T5 in float16 keeps its stream in float32
        wide = torch.promote_types(s.dtype, h.dtype)
        s, h = s.to(wide), h.to(wide)
    learned, gate = gate.requires_grad, gate.to(s.dtype)
    return torch.addcmul(h, gate, s - h) if learned else gate * s + (1 - gate) * h


class Ladder:
    """What a stack of layers with a ladder has; mixed into the class of the module that runs the layers.

    Parameters, under upstream's names: `side_first_downsample` (P_0), `side_downsamples.i` (P_i), `side_gate_params.i`
    (alpha_i (1,), of every layer, also those without a rung) or buffers `side_gate_i`, `side_block.i`,
    `final_side_layer_norm`.
    """

    side_config: LadderConfig

    def add_side(
        self,
        config: LadderConfig,
        width: int,
        kept: tuple[int, ...],
        blocks: Sequence[nn.Module | None],
        norm: nn.Module,
    ) -> None:
        """Register the parts. blocks: Side_i or None, one for each layer of the backbone; norm: the side's last."""
        narrow, count = width // config.reduction, len(blocks)

        def down() -> nn.Module:
            return nn.Identity() if config.reduction == 1 else nn.Linear(width, narrow, bias=config.bias)

        self.side_config, self.side_kept = config, kept
        self.side_first_downsample = down()
        self.side_downsamples = nn.ModuleList(
            None if i not in kept else nn.AdaptiveAvgPool1d(narrow) if config.pool else down() for i in range(count)
        )
        self.side_block = nn.ModuleList(blocks)
        if config.gate == "learned":
            alpha = (nn.Parameter(torch.full((1,), float(config.gate_alpha))) for _ in range(count))
            self.side_gate_params = nn.ParameterList(alpha)
        elif config.gate != "none":
            for i in range(count):
                self.register_buffer(f"side_gate_{i}", torch.ones(1))
        self.final_side_layer_norm = norm

    def drop_side(self) -> None:
        """Take the parts off again."""
        for name in [n for n in (*self._modules, *self._buffers) if "side_" in n]:
            delattr(self, name)
        del self.side_config, self.side_kept

    @staticmethod
    def embed_words(table: nn.Module, ids: Tensor) -> Tensor:
        """Rows of the table. Of a frozen one without gradients: checkpointing makes transformers ask for them there,
        which would draw the whole backbone into the graph."""
        x = table(ids)
        return x if any(p.requires_grad for p in table.parameters()) else x.detach()

    @staticmethod
    def backbone_grad(layers: nn.Module, *inputs: Tensor | None) -> Callable:
        """The context of the backbone's layers: without autograd, unless one of them or an input requires gradients."""
        needed = any(x is not None and x.requires_grad for x in inputs) or any(
            p.requires_grad for p in layers.parameters()
        )
        return contextlib.nullcontext if needed else torch.no_grad

    def side_gate(self, i: int) -> Tensor | None:
        """g_i (1,), in float32 where it is learned."""
        if self.side_config.gate == "learned":
            return torch.sigmoid(self.side_gate_params[i].float() / self.side_config.gate_T)
        return None if self.side_config.gate == "none" else getattr(self, f"side_gate_{i}")

    def climb(
        self, i: int, s: Tensor, h: Tensor, block: Callable[[Tensor], Tensor], before: int = 0, after: int = 0
    ) -> Tensor:
        """The rung of layer i: s (B, before + L + after, D / R), h (B, L, D) -> the next s.

        before, after: rows that only the side network has (image tokens); P_i(h) is zero there, its bias too.
        """

        def mix(s: Tensor) -> Tensor:
            down = self.side_downsamples[i]
            narrow = isinstance(down, nn.Linear) and compute_dtype(h) is None
            rung = down(h.to(down.weight.dtype) if narrow else h)
            rung = F.pad(rung, (0, 0, before, after)) if before or after else rung
            return ladder_mix(s, rung, self.side_gate(i))

        return mix(block(s)) if self.side_config.add_residual_after else block(mix(s))


def upsample(config: LadderConfig, width: int) -> nn.Module:
    """`side_final_upsample`: Linear(D / R, D), the identity with R = 1."""
    if config.reduction == 1:
        return nn.Identity()
    return nn.Linear(width // config.reduction, width, bias=config.bias)


def set_gates(stack: nn.Module, value: float) -> None:
    """Set the fixed gates of every ladder in the module: what a schedule does between steps. 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"value is {value!r}; accepted: 0 to 1")
    found = [b for m in stack.modules() if isinstance(m, Ladder) for n, b in m.named_buffers(recurse=False)
             if n.startswith("side_gate_")]  # fmt: skip
    if not found:
        raise ValueError('no fixed gates here; accepted: a model with a ladder of gate="schedule" or gate="one"')
    for gate in found:
        gate.fill_(value)

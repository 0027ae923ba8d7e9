"""VL-PET: multi-head adapters behind gates of four granularities in the encoder, value-parallel ones in the decoder.

Hu et al., arXiv 2308.09804; HenryHZY/VL-PET src/my_transformers/modeling_bart.py; survey 4.2.1. How adapters are
called: `adapters.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._adapter import Activation, SublayerAdapter, bottleneck, probability
from ._parts import check_heads, check_tokens, plain
from .vl_adapter import VLAdapterController

GATES = ("large", "middleX", "middleY", "small")


class VLPETAdapter(SublayerAdapter):
    """branch(h, x) = scale G (M)    M(h) = h + up(gelu_new([down_1(h) | ... | down_N(h)])), x the residual input.

        large    G = sigmoid(up_g(gelu_new(down_g(x))))      (B, n, D)
        middleX  G = sigmoid(Linear(x + M)), D -> 1          (B, n, 1)
        middleY  G = 1 + g                                   (D)
        small    G = mean over n of sigmoid(Linear([x | M])), 2 D -> 1, padding included: (B, 1, 1)

    The survey's copies of a (D, 1) projection are the broadcast of G. large and middleY are one op after that of the
    gate; in the others the gate waits for M. Not the identity at the start: G M is not h.

    Args:
        width: D. r, heads: R and N, each head of rank R / N. gate_r: rank of the large gate, R when None.
        scale: 1 for BART, 0.3 for T5. zero_up: `multihead_up` starts at zero, as for T5; else as nn.Linear.
    Published: BART r=96, heads=4; T5 r=192, heads=4, scale=0.3, zero_up=True.

    Parameters: `multihead_down.{j}` (R / N, D), `multihead_up` (D, R); `gating_large_x_down` (gate_r, D) and `_up`,
    `gating_middle_xy_add` (1, D), `gating_small_xy_cat` (1, 2 D), or `gating_middle_ia3_add` (D), N(0, 0.02).
    """

    def __init__(
        self,
        width: int,
        r: int = 96,
        heads: int = 4,
        *,
        gate: str = "large",
        gate_r: int | None = None,
        scale: float = 1.0,
        zero_up: bool = False,
        act: str = "gelu_new",
        device=None,
        dtype=None,
    ):
        super().__init__(width)
        made = {"device": device, "dtype": dtype}
        if gate not in GATES:
            raise ValueError(f"gate is {gate!r}; accepted: {', '.join(GATES)}")
        if gate_r is not None and gate_r < 1:
            raise ValueError(f"gate_r is {gate_r}; accepted: 1 or more")
        self.gate, self.scale, self.act = gate, float(scale), Activation(act)
        self.needs_residual = gate != "middleY"
        head = check_heads("r", r, heads)
        self.multihead_down = nn.ModuleList(nn.Linear(width, head, **made) for _ in range(heads))
        self.multihead_up = nn.Linear(r, width, **made)
        if gate == "large":
            self.gating_large_x_down = nn.Linear(width, gate_r or r, **made)
            self.gating_large_x_up = nn.Linear(gate_r or r, width, **made)
        elif gate == "middleX":
            self.gating_middle_xy_add = nn.Linear(width, 1, **made)
        elif gate == "small":
            self.gating_small_xy_cat = nn.Linear(2 * width, 1, **made)
        else:
            self.gating_middle_ia3_add = nn.Parameter(torch.empty(width, **made).normal_(std=0.02))
        if zero_up:
            nn.init.zeros_(self.multihead_up.weight)
            nn.init.zeros_(self.multihead_up.bias)

    def _end(self, hidden, residual, norm, add):
        added = residual if add else None
        if self.gate == "middleY":
            gate = 1 + self.gating_middle_ia3_add
            return self._multihead(hidden, gate=gate, scale=self.scale, skip="gated", residual=added)
        if self.gate == "large":
            logits = bottleneck(residual, self.gating_large_x_down, self.gating_large_x_up, self.act)
            return self._multihead(
                hidden, gate=logits, gate_act="sigmoid", scale=self.scale, skip="gated", residual=added
            )
        m = self._multihead(hidden, skip="add")
        if self.gate == "middleX":
            gate = self.gating_middle_xy_add(residual + m).sigmoid()
        else:
            gate = self._small(residual, m)
        y = (self.scale * gate) * m
        return y if added is None else added + y

    def _multihead(self, hidden: Tensor, **words) -> Tensor:
        return bottleneck(
            hidden, self.multihead_down, self.multihead_up, self.act, **words
        )  # fmt: skip

    def _small(self, x: Tensor, m: Tensor) -> Tensor:
        """(B, 1, 1); of a plain projection the halves meet x and M apart, and nothing 2 D wide is made."""
        if x.dim() != 3:
            raise ValueError(f"hidden has shape {tuple(x.shape)}; accepted with the small gate: (B, n, D)")
        linear = self.gating_small_xy_cat
        if plain(linear, kinds=(nn.Linear,)):
            left, right = linear.weight.split(self.width, 1)
            logits = F.linear(x, left, linear.bias) + F.linear(m, right)
        else:
            logits = linear(torch.cat((x, m), -1))
        return logits.sigmoid().mean(1, keepdim=True)

    def extra_repr(self) -> str:
        return f"gate={self.gate}, heads={len(self.multihead_down)}, scale={self.scale:g}"


class VLPETAttention(nn.Module):
    """BART's attention, with value_adapter V = v_proj(c) + up(gelu_new(down(c))) of what the values are made from.

    Parameters: `q_proj`, `k_proj`, `v_proj`, `out_proj` (D, D) and `attn_value_parallel_adapter`, a
    VLAdapterController. forward: x (B, T, D); context (B, S, D), or x; mask additive or boolean, broadcast to
    (B, H, T, S); kv: what `keys_values` made, in place of context: adapted values are what a cache holds.
    """

    def __init__(
        self, width: int, heads: int, *, dropout: float = 0.0, value_adapter: VLAdapterController | None = None, **made
    ):
        super().__init__()
        self.width, self.head_dim, self.p = width, check_heads("width", width, heads), probability(dropout)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, nn.Linear(width, width, **made))
        self.attn_value_parallel_adapter = value_adapter

    def keys_values(self, context: Tensor, task: str | None = None) -> tuple[Tensor, Tensor]:
        """(B, H, S, K) each."""
        check_tokens("context", context, self.width)
        k, v = self.k_proj(context), self.v_proj(context)
        if self.attn_value_parallel_adapter is not None:
            v = self.attn_value_parallel_adapter.value(context, v, task)
        return self._heads(k), self._heads(v)

    def forward(self, x, context=None, mask=None, *, kv=None, causal=False, task=None) -> Tensor:
        q = self._heads(self.q_proj(x))
        k, v = self.keys_values(x if context is None else context, task) if kv is None else kv
        y = attend(q, k, v, mask, self.p if self.training else 0.0, causal)
        return self.out_proj(y)

    def _heads(self, t: Tensor) -> Tensor:
        return t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def attend(q, k, v, mask: Tensor | None, p: float = 0.0, causal: bool = False, scale: float | None = None) -> Tensor:
    """softmax(scale q kᵀ + mask) v of (B, H, T, K) and (B, H, S, K), as (B, T, H K); causal: of the last T keys."""
    T, S = q.shape[2], k.shape[2]
    if causal and mask is None and 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    causal = causal and mask is None and T > 1
    return F.scaled_dot_product_attention(q, k, v, mask, p, causal, scale=scale).transpose(1, 2).flatten(2)


class VLPETEncoderLayer(nn.Module):
    """BART's encoder layer with VL-PET after the attention and after the feed-forward: x (B, n, D) -> (B, n, D).

        x = self_attn_layer_norm(attn_adapter(self_attn(x), x)),  y = final_layer_norm(ff_adapter(fc2(gelu(fc1(x))), x))

    attention_mask: additive or boolean, broadcast to (B, H, n, n). The layer norms are trained with the adapters.
    ff: the feed-forward's width. adapter_options: VLPETAdapter's. dropout acts before each adapter, in training.
    Parameters: BART's, and `attn_adapter`, `ff_adapter`, VLPETAdapters each.
    """

    def __init__(
        self,
        width: int,
        attn_heads: int,
        ff: int,
        *,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        eps: float = 1e-5,
        device=None,
        dtype=None,
        **adapter_options,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.width, self.p = width, probability(dropout)
        self.self_attn = VLPETAttention(width, attn_heads, dropout=attention_dropout, **made)
        self.self_attn_layer_norm = nn.LayerNorm(width, eps=eps, **made)
        self.fc1, self.fc2 = nn.Linear(width, ff, **made), nn.Linear(ff, width, **made)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps, **made)
        self.attn_adapter = VLPETAdapter(width, **adapter_options, **made)
        self.ff_adapter = VLPETAdapter(width, **adapter_options, **made)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        check_tokens("x", x, self.width)
        h = self._dropped(self.self_attn(x, mask=attention_mask))
        x = self.attn_adapter(h, x, self.self_attn_layer_norm)
        h = self._dropped(self.fc2(F.gelu(self.fc1(x))))
        return self.ff_adapter(h, x, self.final_layer_norm)

    def _dropped(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.p) if self.p and self.training else h


class VLPETT5EncoderLayer(nn.Module):
    """T5's encoder layer with VL-PET: x = x + scale G M(f(RMSNorm(x))) for attention and feed-forward, pre-norm.

    The gates read x itself, before its norm, as "the sub-layer's input" says; upstream's T5 code was not at hand.
    forward: x (B, n, D); position_bias: additive, broadcast to (B, H, n, n), T5's relative bias and the padding mask.
    Parameters: T5's `layer.0.SelfAttention.{q,k,v,o}`, `layer.0.layer_norm`, `layer.1.DenseReluDense.{wi,wo}`,
    `layer.1.layer_norm`, and `attn_adapter`, `ff_adapter`: scale 0.3, r 192, up zero, as published.
    """

    def __init__(
        self,
        width: int,
        attn_heads: int,
        ff: int,
        *,
        d_kv: int | None = None,
        dropout: float = 0.0,
        eps: float = 1e-6,
        device=None,
        dtype=None,
        **adapter_options,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.width, self.heads, self.p = width, attn_heads, probability(dropout)
        inner = attn_heads * (d_kv or check_heads("width", width, attn_heads))
        self.layer = nn.ModuleList([nn.Module(), nn.Module()])
        linears = {name: nn.Linear(width, inner, bias=False, **made) for name in "qkv"}
        linears["o"] = nn.Linear(inner, width, bias=False, **made)
        self.layer[0].SelfAttention = nn.ModuleDict(linears)
        wi, wo = nn.Linear(width, ff, bias=False, **made), nn.Linear(ff, width, bias=False, **made)
        self.layer[1].DenseReluDense = nn.ModuleDict({"wi": wi, "wo": wo})
        for part in self.layer:
            part.layer_norm = nn.RMSNorm(width, eps=eps, **made)
        options = {"scale": 0.3, "r": 192, "zero_up": True} | adapter_options
        self.attn_adapter = VLPETAdapter(width, **options, **made)
        self.ff_adapter = VLPETAdapter(width, **options, **made)

    def forward(self, x: Tensor, position_bias: Tensor | None = None) -> Tensor:
        check_tokens("x", x, self.width)
        p = self.p if self.training else 0.0
        a, n = self.layer[0].SelfAttention, self.layer[0].layer_norm(x)
        q, k, v = (a[name](n).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv")
        # T5 does not scale its scores
        h = a["o"](attend(q, k, v, position_bias, p, scale=1.0))
        x = self.attn_adapter(F.dropout(h, p) if p else h, x)
        m, n = self.layer[1].DenseReluDense, self.layer[1].layer_norm(x)
        h = m["wo"](F.relu(m["wi"](n)))
        return self.ff_adapter(F.dropout(h, p) if p else h, x)


class VLPETDecoderLayer(nn.Module):
    """BART's decoder layer with VL-PET's value-parallel adapter in the cross-attention: x (B, T, D) -> (B, T, D).

    forward: enc (B, S, D); attention_mask, encoder_attention_mask: additive or boolean, broadcast to (B, H, T, ·), the
    first None for causal. past: () or what the last call returned: then the result is (y, past), keys and adapted
    values of the decoder and of enc, which is read in the first call only. task: of the adapter, default the first.

    Args: width, attn_heads, ff: of BART. r: the adapter's rank, 96 as published. tasks: names under which one adapter
        stands, or with single=False one each.
    Parameters: BART's, and `encoder_attn.attn_value_parallel_adapter.adapters.<task>.{down,up}_sampler`.
    """

    def __init__(
        self,
        width: int,
        attn_heads: int,
        ff: int,
        *,
        r: int = 96,
        tasks: Sequence[str] = ("default",),
        single: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.width, self.p = width, probability(dropout)
        adapter = VLAdapterController(width, tasks, r=r, single=single, **made)
        self.self_attn = VLPETAttention(width, attn_heads, dropout=attention_dropout, **made)
        self.encoder_attn = VLPETAttention(
            width, attn_heads, dropout=attention_dropout, value_adapter=adapter, **made
        )  # fmt: skip
        self.fc1, self.fc2 = nn.Linear(width, ff, **made), nn.Linear(ff, width, **made)
        for name in ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"):
            self.add_module(name, nn.LayerNorm(width, eps=eps, **made))

    def forward(
        self,
        x: Tensor,
        enc: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        past: tuple[Tensor, ...] | None = None,
        task: str | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, ...]]:
        check_tokens("x", x, self.width)
        if not past and enc is None:
            raise ValueError("enc is None; accepted: the encoder's output (B, S, D), or past of an earlier call")
        k, v = self.self_attn.keys_values(x)
        cross = past[2:] if past else self.encoder_attn.keys_values(enc, task)
        if past:
            k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
        h = self.self_attn(x, mask=attention_mask, kv=(k, v), causal=True)
        x = self.self_attn_layer_norm(x + self._dropped(h))
        h = self.encoder_attn(x, mask=encoder_attention_mask, kv=cross)
        x = self.encoder_attn_layer_norm(x + self._dropped(h))
        h = self.fc2(F.gelu(self.fc1(x)))
        y = self.final_layer_norm(x + self._dropped(h))
        return y if past is None else (y, (k, v, *cross))

    def _dropped(self, h: Tensor) -> Tensor:
        return F.dropout(h, self.p) if self.p and self.training else h

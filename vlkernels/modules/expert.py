"""Decoder layers with linears for each modality: CogVLM's visual expert, mPLUG-Owl2's modality-adaptive layer.

Which weight a token goes through is a number on the device: no row is gathered, none scattered, nothing waits.
Dims: B batch, L tokens, D width, H heads, G groups of keys and values, K head dim, F feed-forward width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._shuffle import ACTS
from ..ops.modality_linear import modality_linear
from ._children import child_problem
from ._parts import GatedLinears
from .lora_blocks import rotary, rotated

LANGUAGE, VISION = 0, 1
Cache = tuple[Tensor, Tensor]


def through(
    x: Tensor, index: Tensor, experts: Sequence[nn.Module], gate: Tensor | None = None, act: str = "silu"
) -> Tensor:
    """experts[index[t]](x[t]) of x (..., K), or of act(gate) * x; one op where the experts are plain linears.

    With one expert every row goes through it; its index is all zeros, and the op is there for the gate. A LoRA on an
    expert, a hook or a sharded weight is honoured: then every token goes through every expert.
    """
    if all(child_problem("expert", m, (nn.Linear,)) is None for m in experts) and len(experts) <= 4:
        weights = {f"w{e}": m.weight for e, m in enumerate(experts)}
        biases = {f"b{e}": m.bias for e, m in enumerate(experts)}
        # the op takes two weights or more; the second has no rows, and no gradient is written for it
        weights.setdefault("w1", weights["w0"].detach())
        return modality_linear(x, index, **weights, **biases, gate=gate, act=act)
    if gate is not None:
        x = ACTS[act](gate) * x
    y = None
    for e, expert in enumerate(experts):
        own = expert(x)
        y = torch.where((index == e).unsqueeze(-1), own, 0 if y is None else y)
    return y


def _modality(name: str, t: Tensor | None, x: Tensor) -> Tensor:
    """t (B, L) as int32, zeros where it is None, after an error for another shape, dtype or number than 0 and 1.

    The numbers are compared on the device: on a GPU the assertion stops the kernels behind it and nothing waits here.
    """
    shape = tuple(x.shape[:2])
    if t is None:
        return torch.zeros(shape, dtype=torch.int32, device=x.device)
    if not isinstance(t, Tensor) or t.dtype.is_floating_point or t.dtype.is_complex:
        got = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} is {got}; accepted: a tensor of booleans or integers, 0 and 1")
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}; accepted: (B, L) = {shape}")
    if t.dtype != torch.bool:
        torch._assert_async(((t == 0) | (t == 1)).all(), f"{name} holds other numbers than 0 and 1")
    return t.to(torch.int32)


def cogvlm_vision_mask(token_type_ids: Tensor) -> Tensor:
    """(B, L) bool: the tokens that go through the visual expert, for types 1 (image, with its begin and end) and 0.

    A token does if it and the next one are of the image: the last of each run, its end, is a language token.
    """
    image = token_type_ids == VISION
    return F.pad(image[:, :-1] & image[:, 1:], (0, 1))


def cogvlm_position_ids(token_type_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """(B, L) positions from 0 on: all inner tokens of an image share one, padding keeps the last.

    token_type_ids: (B, L), 1 image, 0 text. attention_mask: (B, L), 0 at padding.
    """
    image, text = token_type_ids == VISION, token_type_ids == LANGUAGE
    if attention_mask is not None:
        kept = attention_mask.bool()
        image, text = image & kept, text & kept
    # the first and the last of a run of image tokens count as text, where text or the sequence's end is beside them
    before, after = F.pad(text[:, :-1], (1, 0), value=True), F.pad(text[:, 1:], (0, 1), value=True)
    edge = image & (before | after)
    text, image = text | edge, image & ~edge
    steps = text | (image & F.pad(text[:, :-1], (1, 0)))
    return F.pad(steps[:, 1:], (1, 0)).to(torch.int64).cumsum(1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, cache: Cache | None, scale: float
) -> tuple[Tensor, Cache]:
    """Attention of q (B, H, L, K) over k, v (B, G, S, K) behind the cache's; causal where there is no mask."""
    if cache is not None:
        k, v = torch.cat((cache[0], k), 2), torch.cat((cache[1], v), 2)
    if mask is not None and mask.dim() == 2:
        causal = _causal(q.shape[2], k.shape[2], q.device)
        # a token of padding sees itself: a row that sees nothing has no softmax
        mask = causal & (mask[:, None, None, :].bool() | causal.triu(k.shape[2] - q.shape[2]))
    elif mask is None and cache is not None:
        mask = _causal(q.shape[2], k.shape[2], q.device)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    y = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y, (k, v)


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """(queries, keys) bool: the last query sees all keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _heads(t: Tensor, head_dim: int) -> Tensor:
    """(B, L, heads K) -> (B, heads, L, K)"""
    return t.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def _check_mask(mask: Tensor | None, x: Tensor, past: int) -> None:
    B, L, _ = x.shape
    if mask is not None and tuple(mask.shape) != (B, L + past) and (mask.dim() != 4 or mask.shape[-1] != L + past):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; accepted: (B, keys) = {(B, L + past)} with 0 at padding, "
            "or (B, 1, L, keys), boolean or added to the scores"
        )


class CogVLMVisualExpertAttention(nn.Module):
    """q, k, v and the output projection of the token's modality; all tokens attend together, causally.

    forward(x (B, L, D), index (B, L) int32 (0 language, 1 vision), cos_sin, attention_mask, cache) -> y, cache.
    Parameters: `{vision,language}_expert_query_key_value` (D + 2 G K, D), `{vision,language}_expert_dense` (D, D).
    """

    def __init__(self, hidden_size: int, heads: int, kv_heads: int, vision_bias: bool, made: dict):
        super().__init__()
        self.head_dim = hidden_size // heads
        self.sizes = (hidden_size, kv_heads * self.head_dim, kv_heads * self.head_dim)
        for kind, bias in (("vision", vision_bias), ("language", False)):
            self.add_module(
                f"{kind}_expert_query_key_value", nn.Linear(hidden_size, sum(self.sizes), bias=bias, **made)
            )
            self.add_module(f"{kind}_expert_dense", nn.Linear(hidden_size, hidden_size, bias=False, **made))

    def forward(
        self, x: Tensor, index: Tensor, cos_sin: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Cache]:
        experts = (self.language_expert_query_key_value, self.vision_expert_query_key_value)
        q, k, v = (_heads(t, self.head_dim) for t in through(x, index, experts).split(self.sizes, -1))
        y, cache = _attend(rotated(q, *cos_sin), rotated(k, *cos_sin), v, mask, cache, self.head_dim**-0.5)
        y = y.transpose(1, 2).flatten(2)
        return through(y, index, (self.language_expert_dense, self.vision_expert_dense)), cache


class _GatedMLP(GatedLinears):
    def forward(self, x: Tensor) -> Tensor:
        """W_down(silu(W_gate x) * W_up x), of which neither silu nor the product is kept for backward."""
        index = torch.zeros(x.shape[:-1], dtype=torch.int32, device=x.device)
        return through(self.up_proj(x), index, [self.down_proj], gate=self.gate_proj(x))


class CogVLMVisualExpertMLP(nn.Module):
    """SwiGLU of the token's modality: W_down(silu(W_gate x) * W_up x).

    Parameters: `{language,vision}_mlp.{gate,up}_proj` (F, D), `.down_proj` (D, F), without biases.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, made: dict):
        super().__init__()
        self.language_mlp = _GatedMLP(hidden_size, intermediate_size, **made)
        self.vision_mlp = _GatedMLP(hidden_size, intermediate_size, **made)

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        both = (self.language_mlp, self.vision_mlp)
        gate = through(x, index, [m.gate_proj for m in both])
        up = through(x, index, [m.up_proj for m in both])
        return through(up, index, [m.down_proj for m in both], gate=gate)


class CogVLMDecoderLayer(nn.Module):
    """CogVLM's decoder layer: h = x + Attn(RMS(x)), y = h + MLP(RMS(h)), with a visual expert in both.

    Args:
        kv_heads: groups of keys and values (CogVLM: `heads`, CogVLM2: 8). vision_bias: of the visual expert's q, k, v
            (CogVLM2). rope_theta: 10000, CogVLM2 500000.

    forward(x (B, L, D), token_type_ids (B, L), 1 for an image with its begin and end and 0 for text) -> y (B, L, D).
    attention_mask: (B, keys) with 0 at padding, or (B, 1, L, keys), boolean or added to the scores; None: causal.
    position_ids: (B, L); `cogvlm_position_ids` if not given. cache: (k, v) of earlier tokens, each (B, G, past, K);
    with use_cache the result is (y, cache). Without token_type_ids all tokens are text, as in a step of generation.

    Parameters: `self_attn.{vision,language}_expert_query_key_value`, `.{vision,language}_expert_dense`,
    `mlp.{vision,language}_mlp.{gate,up,down}_proj`, `input_layernorm`, `post_attention_layernorm` (eps 1e-5).
    `start_from_language()` copies the language weights to the visual expert, as training begins.

    Raises: TypeError, ValueError naming the argument; RuntimeError for other types than 0 and 1.

    Source: CogVLM (arXiv 2311.03079), THUDM/CogVLM; CogVLM2 (2408.16500).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        vision_bias: bool = False,
        rope_theta: float = 10000.0,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        kv_heads = kv_heads or heads
        _check_heads(hidden_size, heads, kv_heads)
        self.hidden_size, self.rope_theta = hidden_size, rope_theta
        self.self_attn = CogVLMVisualExpertAttention(hidden_size, heads, kv_heads, vision_bias, made)
        self.mlp = CogVLMVisualExpertMLP(hidden_size, intermediate_size, made)
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=eps, **made)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=eps, **made)

    @torch.no_grad()
    def start_from_language(self) -> None:
        """Copy the language experts' weights to the visual ones; a bias of theirs becomes zero."""
        pairs = [(getattr(self.self_attn, f"language_expert_{n}"), getattr(self.self_attn, f"vision_expert_{n}"))
                 for n in ("query_key_value", "dense")]  # fmt: skip
        pairs += [(getattr(self.mlp.language_mlp, f"{n}_proj"), getattr(self.mlp.vision_mlp, f"{n}_proj"))
                  for n in ("gate", "up", "down")]  # fmt: skip
        for language, vision in pairs:
            vision.weight.copy_(language.weight)
            if vision.bias is not None:
                vision.bias.zero_()

    def forward(
        self,
        x: Tensor,
        token_type_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cache: Cache | None = None,
        use_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:
        past = _past(x, self.hidden_size, attention_mask, cache)
        types = _modality("token_type_ids", token_type_ids, x)
        if position_ids is None:
            if past:
                raise ValueError("position_ids is None; accepted with a cache: (B, L), for images share positions")
            padding = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
            position_ids = cogvlm_position_ids(types, padding)
        index = cogvlm_vision_mask(types).to(torch.int32)
        cos_sin = rotary(position_ids, self.self_attn.head_dim, self.rope_theta)
        y, cache = self.self_attn(self.input_layernorm(x), index, cos_sin, attention_mask, cache)
        h = x + y
        y = h + self.mlp(self.post_attention_layernorm(h), index)
        return (y, cache) if use_cache else y


class MultiwayNorm(nn.Module):
    """RMSNorm with one scale for each modality: y[t] = x[t] / rms(x[t]) * weight_e, e = index[t].

    Parameters: `multiway.{0,1}.weight` (D), 0 text, 1 image.
    """

    def __init__(self, hidden_size: int, eps: float, made: dict):
        super().__init__()
        self.multiway = nn.ModuleList(nn.RMSNorm(hidden_size, eps=eps, **made) for _ in range(2))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        text, image = self.multiway
        # both keep x and their statistics; a scale picked for each row would be kept as wide as x
        return torch.where((index == 1).unsqueeze(-1), image(x), text(x))


class MultiwayLinear(nn.Module):
    """A linear for each modality. Parameters: `multiway.{0,1}.weight` (N, K), 0 text, 1 image."""

    def __init__(self, in_features: int, out_features: int, made: dict):
        super().__init__()
        self.multiway = nn.ModuleList(nn.Linear(in_features, out_features, bias=False, **made) for _ in range(2))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        return through(x, index, list(self.multiway))


class MPLUGOwl2DecoderLayer(nn.Module):
    """mPLUG-Owl2's decoder layer: norms, keys and values are of the token's modality, the rest is shared.

    forward(x (B, L, D), modality_indicators (B, L), 1 at the visual abstractor's outputs and 0 at text and padding) ->
    y (B, L, D). attention_mask, cache and use_cache as in CogVLMDecoderLayer; position_ids (B, L), 0 to L - 1 behind
    the cache if not given. kv_heads: groups of keys and values; upstream's own code takes `heads` alone.

    Parameters: `{input,post_attention}_layernorm.multiway.{0,1}` (eps 1e-5), `self_attn.{k,v}_proj.multiway.{0,1}`,
    `self_attn.{q,o}_proj`, `mlp.{gate,up,down}_proj`.

    Raises: TypeError, ValueError naming the argument; RuntimeError for other indicators than 0 and 1.

    Source: mPLUG-Owl2 (arXiv 2311.04257), X-PLUG/mPLUG-Owl.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        heads: int,
        kv_heads: int | None = None,
        *,
        rope_theta: float = 10000.0,
        eps: float = 1e-5,
        device=None,
        dtype=None,
    ):
        super().__init__()
        made = {"device": device, "dtype": dtype}
        kv_heads = kv_heads or heads
        _check_heads(hidden_size, heads, kv_heads)
        self.hidden_size, self.head_dim, self.rope_theta = hidden_size, hidden_size // heads, rope_theta
        width = kv_heads * self.head_dim
        self.self_attn = nn.Module()
        self.self_attn.q_proj = nn.Linear(hidden_size, hidden_size, bias=False, **made)
        self.self_attn.k_proj = MultiwayLinear(hidden_size, width, made)
        self.self_attn.v_proj = MultiwayLinear(hidden_size, width, made)
        self.self_attn.o_proj = nn.Linear(hidden_size, hidden_size, bias=False, **made)
        self.mlp = _GatedMLP(hidden_size, intermediate_size, **made)
        self.input_layernorm = MultiwayNorm(hidden_size, eps, made)
        self.post_attention_layernorm = MultiwayNorm(hidden_size, eps, made)

    @torch.no_grad()
    def start_from_language(self) -> None:
        """Copy the text weights to the image ones."""
        for module in self.modules():
            if isinstance(module, (MultiwayLinear, MultiwayNorm)):
                module.multiway[1].weight.copy_(module.multiway[0].weight)

    def forward(
        self,
        x: Tensor,
        modality_indicators: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        cache: Cache | None = None,
        use_cache: bool = False,
    ) -> Tensor | tuple[Tensor, Cache]:
        past = _past(x, self.hidden_size, attention_mask, cache)
        index = _modality("modality_indicators", modality_indicators, x)
        if position_ids is None:
            position_ids = torch.arange(past, past + x.shape[1], device=x.device).expand(x.shape[:2])
        cos_sin = rotary(position_ids, self.head_dim, self.rope_theta)
        n, attention = self.input_layernorm(x, index), self.self_attn
        q, k, v = (_heads(t, self.head_dim) for t in (
            attention.q_proj(n), attention.k_proj(n, index), attention.v_proj(n, index)))  # fmt: skip
        y, cache = _attend(rotated(q, *cos_sin), rotated(k, *cos_sin), v, attention_mask, cache, self.head_dim**-0.5)
        h = x + attention.o_proj(y.transpose(1, 2).flatten(2))
        y = h + self.mlp(self.post_attention_layernorm(h, index))
        return (y, cache) if use_cache else y


def _check_heads(hidden_size: int, heads: int, kv_heads: int) -> None:
    if heads < 1 or hidden_size % (2 * heads) or kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"hidden_size is {hidden_size}, heads {heads}, kv_heads {kv_heads}; accepted: heads of an even width, and "
            "kv_heads that divides heads"
        )


def _past(x: Tensor, hidden_size: int, mask: Tensor | None, cache: Cache | None) -> int:
    """Tokens in the cache, after an error for an x or a mask of another shape."""
    if x.dim() != 3 or x.shape[-1] != hidden_size:
        raise ValueError(f"x has shape {tuple(x.shape)}; accepted: (B, L, {hidden_size})")
    past = 0 if cache is None else cache[0].shape[2]
    _check_mask(mask, x, past)
    return past

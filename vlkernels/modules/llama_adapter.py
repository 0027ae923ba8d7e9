"""LLaMA-Adapter: attention, feed-forward and block of a Llama with a gated prefix, under upstream's parameter names.

    attention(x) = wo(o + factor * tanh(gate) * softmax(q K_Pᵀ / sqrt(K)) V_P),  o the causal attention over the text,
    K_P = wk(prompt), V_P = wv(prompt): of the raw prompt, without norm and without rotary positions.

v1: arXiv 2303.16199; v2: 2304.15010; source: OpenGVLab/LLaMA-Adapter. Survey eq. 25, which writes the gate without its
tanh. Rotary positions are in Meta's interleaved layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.lora_linear import lora_linear
from ..ops.lora_mlp import lora_mlp
from ..ops.lora_qkv import lora_qkv
from ..ops.prefix_attention import prefix_attention
from ..ops.prefix_attention.reference import MAX_PREFIX
from ._parts import check_heads, check_tokens, plain
from .visual_query import VisualQuery


class _Linears(nn.Module):
    """Linears by name, each with what LLaMA-Adapter v2 may add: a bias, a low-rank pair, an input scale and a shift."""

    def __init__(self, bias: bool, lora_rank: int, scale: bool, shift: bool, **made):
        super().__init__()
        if lora_rank < 0:
            raise ValueError(f"lora_rank is {lora_rank}; accepted: 0 for none, or more")
        self.lora_rank, self._options = lora_rank, (bias, scale, shift, made)

    def _add(self, name: str, width: int, out: int, biased: bool = True) -> None:
        bias, scale, shift, made = self._options
        linear = nn.Linear(width, out, bias=bias and biased, **made)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
        self.add_module(name, linear)
        if self.lora_rank:
            self.add_module(f"lora_{name}_l1", nn.Linear(width, self.lora_rank, bias=False, **made))
            self.add_module(f"lora_{name}_l2", nn.Linear(self.lora_rank, out, bias=False, **made))
            nn.init.zeros_(getattr(self, f"lora_{name}_l2").weight)
        if scale:
            self.register_parameter(f"{name}_scale", nn.Parameter(torch.ones(width, **made)))
        if shift:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(out, **made)))

    def _linear(self, name: str, x: Tensor, lora: bool = True) -> Tensor:
        """W (x * scale) + bias, and the low-rank pair's product with x itself."""
        scale, shift = getattr(self, f"{name}_scale", None), getattr(self, f"{name}_bias", None)
        y = getattr(self, name)(x if scale is None else x * scale)
        y = y if shift is None else y + shift
        if self.lora_rank and lora:
            y = y + getattr(self, f"lora_{name}_l2")(getattr(self, f"lora_{name}_l1")(x))
        return y

    def _low_rank(self, **names: str) -> dict | None:
        """Arguments of a group op, op's name=ours, or None where it must not read the children's weights."""
        _, scale, shift, _ = self._options
        pairs = [getattr(self, f"lora_{n}_l{i}", None) for n in names.values() for i in (1, 2)]
        if not self.lora_rank or scale or shift or not plain(*pairs, *(getattr(self, n) for n in names.values())):
            return None
        found = {}
        for role, name in names.items():
            linear, a, b = getattr(self, name), getattr(self, f"lora_{name}_l1"), getattr(self, f"lora_{name}_l2")
            prefix = f"{role}_" if role != "y" else ""
            values = {"weight": linear.weight, "bias": linear.bias, "a": a.weight, "b": b.weight, "scale": 1.0}
            found |= {prefix + key: value for key, value in values.items()}
        return found


class LlamaAdapterAttention(_Linears):
    """Self-attention with a gated prefix: x (B, L, D) -> (B, L, D).

    v1 with the defaults; v2 multimodal with bias=True and, as chosen there, lora_rank=16 and new_gate=True; v2 chat
    (scale and bias at each linear) with scale=True, shift=True, half_gate=True. A zero gate leaves the attention
    without prefix, bit for bit.

    Parameters as upstream's: `wq`, `wk`, `wv`, `wo`; `gate` (1, H, 1, 1), zeros, also in layers without a prefix;
    `new_gate` (1, 1, 1, 1), ones; biases of wq and wo with `bias`; `lora_w{q,k,v,o}_l1` (r, ·), `_l2` (·, r), `_l2`
    zero, not applied to the prompt; `w{q,k,v,o}_scale`, `w{q,k,v,o}_bias`, applied to the prompt too.

    Args:
        dim, heads, kv_heads: D, H, and G (H when None, as upstream).
        half_gate: tanh(gate) rounded to float16, as v1 and v2 chat do; else float32.

    forward: cos, sin ((B,) L, K / 2) of `interleaved_rotary`; mask additive or boolean, broadcast to (B, H, L, S), or
    None for causal; prompt (1 or B, P, D), P from 1 to 64, or None; past: (keys, values) (B, S', G, K) of earlier
    tokens, which must not hold the prompt: then the result is (y, (keys, values) of all tokens).
    For one row of a prompt the softmax is 1; new_gate is then not applied, as upstream. Without a mask upstream v2
    leaves out the softmax over the text, which is not imitated.

    Raises: ValueError naming the argument, what it got and what is accepted.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        bias: bool = False,
        lora_rank: int = 0,
        new_gate: bool = False,
        scale: bool = False,
        shift: bool = False,
        half_gate: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(bias, lora_rank, scale, shift, device=device, dtype=dtype)
        self.dim, self.heads, self.kv_heads = dim, heads, kv_heads or heads
        self.head_dim, self.half_gate = check_heads("dim", dim, heads), half_gate
        if self.head_dim % 2 or heads % self.kv_heads:
            raise ValueError(
                f"head dim {self.head_dim}, {heads} heads and {self.kv_heads} kv_heads; accepted: an even head dim, "
                "heads a multiple of kv_heads"
            )
        for name, out, biased in (("wq", heads, True), ("wk", self.kv_heads, False), ("wv", self.kv_heads, False)):
            self._add(name, dim, out * self.head_dim, biased)
        self._add("wo", dim, dim)
        self.gate = nn.Parameter(torch.zeros(1, heads, 1, 1, device=device, dtype=dtype))
        self.new_gate = nn.Parameter(torch.ones(1, 1, 1, 1, device=device, dtype=dtype)) if new_gate else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None = None,
        prompt: Tensor | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        check_tokens("x", x, self.dim)
        arguments = self._low_rank(q="wq", k="wk", v="wv")
        if arguments is None:
            projected = [self._linear(name, x) for name in ("wq", "wk", "wv")]
        else:
            projected = lora_qkv(x, **arguments)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in projected)
        q, k = rotated_pairs(q, cos, sin), rotated_pairs(k, cos, sin)
        if past is not None:
            k, v = (torch.cat((before.to(t.dtype), t), 1) for before, t in zip(past, (k, v), strict=True))
        o = attended(q, k, v, mask)
        if prompt is not None:
            o = self._with_prefix(o, q, prompt)
        y = self._out(o.flatten(2))
        return y if past is None else (y, (k, v))

    def _with_prefix(self, o: Tensor, q: Tensor, prompt: Tensor) -> Tensor:
        check_prompt(prompt, o.shape[0], self.dim)
        k, v = (self._linear(n, prompt, lora=False).unflatten(-1, (-1, self.head_dim)) for n in ("wk", "wv"))
        gate = self.gate.flatten()
        if self.half_gate:
            gate = gate.tanh().half()
        factor = self.new_gate.flatten() if self.new_gate is not None and prompt.shape[1] > 1 else None
        return prefix_attention(o, q, k, v, gate, factor, tanh=not self.half_gate)

    def _out(self, o: Tensor) -> Tensor:
        arguments = self._low_rank(y="wo")
        return self._linear("wo", o) if arguments is None else lora_linear(o, **arguments)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, half_gate={self.half_gate}"


class LlamaAdapterFeedForward(_Linears):
    """y = w2(silu(w1(x)) * w3(x)), x (B, L, D), with LLaMA-Adapter v2's additions at each linear.

    bias, lora_rank, scale, shift: as in LlamaAdapterAttention; the low-rank pairs are `lora_w{1,2,3}_l1`, `_l2`.
    hidden: the inner width; see `swiglu_width`. With a rank the whole is one `lora_mlp`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        bias: bool = False,
        lora_rank: int = 0,
        scale: bool = False,
        shift: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__(bias, lora_rank, scale, shift, device=device, dtype=dtype)
        self._add("w1", dim, hidden)
        self._add("w2", hidden, dim)
        self._add("w3", dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        arguments = self._low_rank(gate="w1", up="w3", down="w2")
        if arguments is not None:
            return lora_mlp(x, **arguments, act="silu")
        return self._linear("w2", F.silu(self._linear("w1", x)) * self._linear("w3", x))


class LlamaAdapterBlock(nn.Module):
    """h = x + attention(attention_norm(x)); y = h + feed_forward(ffn_norm(h)): a Llama layer in Meta's names.

    hidden: inner width of the feed-forward. new_gate, half_gate, kv_heads: of the attention; bias, lora_rank, scale,
    shift: of both. eps: of the RMSNorms. forward's arguments and result: LlamaAdapterAttention's.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        kv_heads: int | None = None,
        new_gate: bool = False,
        half_gate: bool = False,
        eps: float = 1e-5,
        **options,
    ):
        super().__init__()
        made = {key: options[key] for key in ("device", "dtype") if key in options}
        self.attention = LlamaAdapterAttention(
            dim, heads, kv_heads=kv_heads, new_gate=new_gate, half_gate=half_gate, **options
        )
        self.feed_forward = LlamaAdapterFeedForward(dim, hidden, **options)
        self.attention_norm = nn.RMSNorm(dim, eps, **made)
        self.ffn_norm = nn.RMSNorm(dim, eps, **made)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask=None, prompt=None, past=None):
        y = self.attention(self.attention_norm(x), cos, sin, mask, prompt, past)
        y, kept = y if past is not None else (y, None)
        h = x + y
        y = h + self.feed_forward(self.ffn_norm(h))
        return y if past is None else (y, kept)


class LlamaAdapterPrompts(nn.Module):
    """The prompts of the top layers: forward() -> a list, the lowest adapted layer's first, of (1, K, D).

    Parameter `adapter_query.weight` (K layers, D), N(0, 1), K = adapter_len. forward's visual (B, K, D), the output of
    a VisualQuery, or (B, 1, D), a projected image feature (v1), is added to each: then they are (B, K, D).
    """

    def __init__(self, layers: int, adapter_len: int, dim: int, *, device=None, dtype=None):
        super().__init__()
        check_prompt_size(layers, adapter_len)
        self.layers, self.adapter_len = layers, adapter_len
        self.adapter_query = nn.Embedding(layers * adapter_len, dim, device=device, dtype=dtype)

    def forward(self, visual: Tensor | None = None) -> list[Tensor]:
        return _prompts(self.adapter_query, self.adapter_len, visual)


class LlamaAdapterVisualPrompts(VisualQuery):
    """LLaMA-Adapter v2 multimodal: x (B, N, C) -> the prompts of `layers` layers, each (B, query_len, D).

        prompt[l] = adapter_query[l] + VisualQuery(x)

    Parameters: VisualQuery's and `adapter_query.weight` (layers query_len, D), N(0, 1). `query(x)` is the visual part.
    Published: 31 layers, all but the first. The blocks' eps is 1e-5 here, that of the timm which upstream pins.
    """

    def __init__(self, clip_dim: int, llm_dim: int, layers: int, *, eps: float = 1e-5, **options):
        super().__init__(clip_dim, llm_dim, eps=eps, **options)
        check_prompt_size(layers, self.query_len)
        made = {key: options[key] for key in ("device", "dtype") if key in options}
        self.adapter_query = nn.Embedding(layers * self.query_len, llm_dim, **made)

    def query(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def prompts(self, visual: Tensor) -> list[Tensor]:
        return _prompts(self.adapter_query, self.query_len, visual)

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.prompts(self.query(x))


def _prompts(query: nn.Embedding, rows: int, visual: Tensor | None) -> list[Tensor]:
    prompts = query.weight.view(-1, 1, rows, query.weight.shape[1])
    if visual is None:
        return list(prompts)
    if visual.dim() != 3 or visual.shape[1] not in (1, rows) or visual.shape[2] != prompts.shape[3]:
        raise ValueError(
            f"visual has shape {tuple(visual.shape)}; accepted: (B, {rows}, {prompts.shape[3]}) or one row for all"
        )
    return [prompt + visual for prompt in prompts]


# -- shared --------------------------------------------------------------------------------------------------------


def check_prompt_size(layers: int, rows: int) -> None:
    if layers < 1 or not 1 <= rows <= MAX_PREFIX:
        raise ValueError(f"{layers} layers of {rows} rows; accepted: 1 layer or more, 1 to {MAX_PREFIX} rows")


def check_prompt(prompt: Tensor, batch: int, dim: int) -> None:
    if prompt.dim() != 3 or prompt.shape[0] not in (1, batch) or prompt.shape[2] != dim:
        raise ValueError(
            f"prompt has shape {tuple(prompt.shape)}; accepted: (1 or B, P, D) with B = {batch}, D = {dim}"
        )
    if not 1 <= prompt.shape[1] <= MAX_PREFIX:
        raise ValueError(f"prompt has {prompt.shape[1]} rows; accepted: 1 to {MAX_PREFIX}")


def swiglu_width(dim: int, multiple_of: int) -> int:
    """Meta's inner width: two thirds of 4 D, rounded up to a multiple."""
    return -(-int(2 * 4 * dim / 3) // multiple_of) * multiple_of


def interleaved_rotary(length: int, head_dim: int, theta: float = 10000.0, device=None) -> tuple[Tensor, Tensor]:
    """cos and sin (length, head_dim / 2) in float32; angle i of position t is t * theta^(-2i / head_dim)."""
    steps = torch.arange(0, head_dim, 2, device=device).float() / head_dim
    angles = torch.outer(torch.arange(length, device=device).float(), 1.0 / theta**steps)
    return angles.cos(), angles.sin()


def rotated_pairs(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair (t[2i], t[2i + 1]) of t (B, L, H, K) turned by its angle, in float32 at least; cos ((B,) L, K / 2)."""
    if cos.shape[-2:] != (t.shape[1], t.shape[3] // 2):
        raise ValueError(f"cos has shape {tuple(cos.shape)}; accepted: (..., L, K / 2) = {t.shape[1], t.shape[3] // 2}")
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    a, b = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (c.to(wide.dtype).unsqueeze(-2) for c in (cos, sin))
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(t.dtype)


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / sqrt(K) + mask) v of (B, L, H, K) and (B, S, G, K), as (B, L, H, K); causal without a mask."""
    L, S = q.shape[1], k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if mask is None and 1 < L < S:
        # the queries are the last ones
        mask = torch.ones(L, S, dtype=torch.bool, device=q.device).tril(S - L)
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    y = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None and L > 1, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2)

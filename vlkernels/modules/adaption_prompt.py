"""Prefixes inside transformers-type attention: peft's AdaptionPrompt, and QaP's query that visits the image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.cross_attention import cross_attention
from ..ops.prefix_attention import prefix_attention
from ._parts import check_heads, check_tokens
from .llama_adapter import attended, check_prompt_size
from .lora_blocks import rotated


class AdaptionPromptAttention(nn.Module):
    """Self-attention with peft's adaption prompt: x (B, L, D), cos and sin (B, L, K) -> (B, L, D).

        y = o_proj(o + adaption_gate * softmax(q K_Pᵀ / sqrt(K)) V_P),  K_P, V_P = k_proj, v_proj(adaption_prompt)

    o is the attention over the text with rotary positions (half layout); the prompt gets none. The gate is one raw
    scalar, without tanh; 0 leaves the attention as it was, bit for bit. Keys and values may be grouped.

    Parameters as peft's: `adaption_prompt` (1, P, D), N(0, 1); `adaption_gate` (1), zero; `model.{q,k,v,o}_proj`.
    kv_bias: of q_proj, k_proj and v_proj. o_proj has no bias: peft would add it twice, once for the text's part and
    once for the prompt's.

    forward's attention_mask: additive or boolean, (B, 1 or H, L, L); causal without one.
    Source: peft tuners/adaption_prompt/layer.py; arXiv 2303.16199.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        adapter_len: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        kv_bias: bool = False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        check_prompt_size(1, adapter_len)
        kv_heads = kv_heads or heads
        self.head_dim = head_dim or check_heads("width", width, heads)
        if heads % kv_heads or self.head_dim % 2:
            raise ValueError(
                f"heads={heads}, kv_heads={kv_heads}, head_dim={self.head_dim}; accepted: heads a multiple of "
                "kv_heads, an even head_dim"
            )
        made = {"device": device, "dtype": dtype}
        self.width = width
        self.model = nn.Module()
        for name, out in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            self.model.add_module(f"{name}_proj", nn.Linear(width, out * self.head_dim, bias=kv_bias, **made))
        self.model.o_proj = nn.Linear(heads * self.head_dim, width, bias=False, **made)
        self.adaption_prompt = nn.Parameter(torch.empty(1, adapter_len, width, **made).normal_())
        self.adaption_gate = nn.Parameter(torch.zeros(1, **made))

    @classmethod
    def from_plain(cls, attention: nn.Module, adapter_len: int) -> AdaptionPromptAttention:
        """Around the projections of a transformers-type attention (`q_proj`, `k_proj`, `v_proj`, `o_proj`, `head_dim`),
        which are shared, not copied. Raises ValueError where o_proj has a bias."""
        q, k, v, o = (getattr(attention, f"{n}_proj") for n in "qkvo")
        if o.bias is not None:
            raise ValueError("o_proj has a bias, which peft's adaption prompt adds twice; accepted: one without")
        K, where = attention.head_dim, {"device": q.weight.device, "dtype": q.weight.dtype}
        found = cls(
            q.in_features, q.out_features // K, adapter_len, kv_heads=k.out_features // K, head_dim=K,
            kv_bias=q.bias is not None, **where,
        )  # fmt: skip
        for name, linear in (("q", q), ("k", k), ("v", v), ("o", o)):
            setattr(found.model, f"{name}_proj", linear)
        return found

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        check_tokens("x", x, self.width)
        m = self.model
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (m.q_proj, m.k_proj, m.v_proj))
        q, k = (rotated(t.transpose(1, 2), cos, sin).transpose(1, 2) for t in (q, k))
        o = attended(q, k, v, attention_mask)
        prompt = (linear(self.adaption_prompt).unflatten(-1, (-1, self.head_dim)) for linear in (m.k_proj, m.v_proj))
        return m.o_proj(prefix_attention(o, q, *prompt, self.adaption_gate, tanh=False).flatten(2))

    def extra_repr(self) -> str:
        return f"adapter_len={self.adaption_prompt.shape[1]}"


class QaPLayer(nn.Module):
    """QaP's step between a frozen layer's self-attention and feed-forward: p (B, n, D), x (B, N, C) -> (B, n, D).

        p_i = p + gate * (softmax(p W_Q (x W_K)ᵀ / sqrt(K)) x W_V) W_O                               survey eq. 24

    p holds one learnable query per modality (n is mostly 1), taken after it has passed the layer's self-attention with
    the text, which conditions it on the text; x are the modality's features. The result is the next layer's prefix.
    There is no public code: this follows the survey, whose W_V in the query's projection and residual on x do not fit
    the shapes and are read as p's own projection and a residual on p. Unconfirmed.

    Parameters: `q_proj` (D, D), `k_proj`, `v_proj` (D, C), `o_proj` (D, D), without biases; `gate` (1), zero: then p
    itself comes back, bit for bit. forward's mask: bool (B, N), True = attend.
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, *, device=None, dtype=None):
        super().__init__()
        made = {"bias": False, "device": device, "dtype": dtype}
        self.head_dim, self.context_width = check_heads("width", width, heads), context_width or width
        self.width = width
        self.q_proj = nn.Linear(width, width, **made)
        self.k_proj = nn.Linear(self.context_width, width, **made)
        self.v_proj = nn.Linear(self.context_width, width, **made)
        self.o_proj = nn.Linear(width, width, **made)
        self.gate = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))

    def forward(self, p: Tensor, x: Tensor, mask: Tensor | None = None) -> Tensor:
        check_tokens("p", p, self.width)
        check_tokens("x", x, self.context_width)
        q, k, v = (
            linear(t).unflatten(-1, (-1, self.head_dim))
            for linear, t in ((self.q_proj, p), (self.k_proj, x), (self.v_proj, x))
        )
        return p + self.gate * self.o_proj(cross_attention(q, k, v, mask=mask).flatten(2))

"""Transformer blocks of a decoder whose projections carry low-rank adapters, as one node a group.

transformers `models/llama/modeling_llama.py` over peft `tuners/lora/layer.py`. Hu et al., arXiv 2106.09685.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._shuffle import ACTS
from ..ops.lora_mlp import lora_mlp
from ..ops.lora_qkv import lora_qkv
from .lora import LoRALinear


def _group(layers: dict[str, LoRALinear]) -> dict | None:
    """Arguments of a group op, or None where the layers have to run one by one: merged, several adapters active, or
    adapters with different dropouts."""
    arguments, dropouts = {}, set()
    for name, layer in layers.items():
        if layer.merged or len(layer.active) > 1 or layer.fan_in_fan_out:
            return None
        arguments |= {f"{name}_weight": layer.weight, f"{name}_bias": layer.bias}
        for adapter in (layer.adapters[n] for n in layer.active):
            dropouts.add(adapter.p if layer.training else 0.0)
            arguments |= {f"{name}_a": adapter.a, f"{name}_b": adapter.b, f"{name}_lora_bias": adapter.bias}
            arguments[f"{name}_scale"] = adapter.scale
    return arguments | {"p": dropouts.pop()} if len(dropouts) == 1 else None


def _normed(norm: nn.RMSNorm | None) -> dict:
    return {} if norm is None else {"norm_weight": norm.weight, "eps": norm.eps}


class LoRAMLP(nn.Module):
    """y = down(act(gate(x)) * up(x)), each projection a `LoRALinear`; SwiGLU with act "silu".

    x (..., K) -> (..., K). Children `gate_proj`, `up_proj` (K -> F), `down_proj` (F -> K); their adapters are added,
    switched and merged as those of any LoRALinear, and the three run one by one where the group op does not cover it.

    Args:
        width, inner: K and F. r, alpha, dropout, rslora, lora_bias, adapter_dtype: of the adapter "default", see
            LoRALinear. bias: of the plain projections. act: silu, gelu (erf), gelu_tanh, relu, quick_gelu.
    """

    def __init__(self, width: int, inner: int, r: int, *, act: str = "silu", bias: bool = False, **adapter):
        super().__init__()
        if act not in ACTS:
            raise ValueError(f"act is {act!r}; accepted: {', '.join(ACTS)}")
        self.act = act
        self.gate_proj = LoRALinear(width, inner, r, bias=bias, **adapter)
        self.up_proj = LoRALinear(width, inner, r, bias=bias, **adapter)
        self.down_proj = LoRALinear(inner, width, r, bias=bias, **adapter)

    def forward(self, x: Tensor, norm: nn.RMSNorm | None = None) -> Tensor:
        """With `norm`: x + mlp(norm(x)), and the normalised x is not kept for backward."""
        arguments = _group({"gate": self.gate_proj, "up": self.up_proj, "down": self.down_proj})
        if arguments is not None:
            return lora_mlp(x, **arguments, **_normed(norm), act=self.act, residual=norm is not None)
        h = x if norm is None else norm(x)
        y = self.down_proj(ACTS[self.act](self.gate_proj(h)) * self.up_proj(h))
        return y if norm is None else x + y

    def extra_repr(self) -> str:
        return f"act={self.act}"


class LoRAAttention(nn.Module):
    """Self-attention with grouped keys and values and rotary positions (half layout), each projection a `LoRALinear`.

    x (B, L, K), cos and sin (B, L, head dim) -> (B, L, K). q = rope(x Wqᵀ), k = rope(x Wkᵀ), v = x Wvᵀ,
    y = softmax(q kᵀ / sqrt(head dim) + mask) v Woᵀ. Children `q_proj`, `k_proj`, `v_proj`, `o_proj`.

    Args:
        width: K. heads, kv_heads: heads is a multiple of kv_heads. head_dim: default width / heads. bias: of the plain
            projections. r and what follows: of the adapter "default", see LoRALinear.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        r: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        **adapter,
    ):
        super().__init__()
        kv_heads, head_dim = kv_heads or heads, head_dim or width // heads
        if heads % kv_heads or head_dim % 2:
            raise ValueError(
                f"heads={heads}, kv_heads={kv_heads}, head_dim={head_dim}; accepted: heads a multiple of kv_heads, an "
                "even head_dim"
            )
        self.head_dim = head_dim
        self.q_proj = LoRALinear(width, heads * head_dim, r, bias=bias, **adapter)
        self.k_proj = LoRALinear(width, kv_heads * head_dim, r, bias=bias, **adapter)
        self.v_proj = LoRALinear(width, kv_heads * head_dim, r, bias=bias, **adapter)
        self.o_proj = LoRALinear(heads * head_dim, width, r, bias=bias, **adapter)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None = None, norm: nn.RMSNorm | None = None
    ) -> Tensor:
        """attention_mask: additive or boolean, (B, 1 or heads, L, L); causal without one. With `norm` it is norm(x)
        that is projected, and it is not kept for backward."""
        arguments = _group({"q": self.q_proj, "k": self.k_proj, "v": self.v_proj})
        if arguments is not None:
            projected = lora_qkv(x, **arguments, **_normed(norm))
        else:
            h = x if norm is None else norm(x)
            projected = self.q_proj(h), self.k_proj(h), self.v_proj(h)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in projected)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        y = F.scaled_dot_product_attention(
            q, k, v, attention_mask, is_causal=attention_mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))


class LoRADecoderLayer(nn.Module):
    """h = x + attention(norm(x)); y = h + mlp(norm(h)), RMSNorms, as in Llama, Mistral and Qwen2.

    x (B, L, K) -> (B, L, K). Children `input_layernorm`, `self_attn` (LoRAAttention), `post_attention_layernorm`, `mlp`
    (LoRAMLP). Kept for backward: x, q, k, v, the attention's output, h, gate, up, and the rank-wide products.

    Args: as LoRAAttention and LoRAMLP; eps of the norms.
    """

    def __init__(
        self,
        width: int,
        inner: int,
        heads: int,
        r: int,
        *,
        kv_heads: int | None = None,
        act: str = "silu",
        eps: float = 1e-6,
        attention_bias: bool = False,
        **adapter,
    ):
        super().__init__()
        where = {k: adapter[k] for k in ("device", "dtype") if k in adapter}
        self.input_layernorm = nn.RMSNorm(width, eps, **where)
        self.self_attn = LoRAAttention(width, heads, r, kv_heads=kv_heads, bias=attention_bias, **adapter)
        self.post_attention_layernorm = nn.RMSNorm(width, eps, **where)
        self.mlp = LoRAMLP(width, inner, r, act=act, **adapter)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(x, cos, sin, attention_mask, self.input_layernorm)
        return self.mlp(x, self.post_attention_layernorm)


def rotary(position_ids: Tensor, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """cos and sin (B, L, head_dim) in float32 for positions (B, L); angle i is position * theta^(-2i / head_dim)."""
    steps = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.int64).float()
    angles = position_ids[..., None].float() * (1.0 / theta ** (steps / head_dim))
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rotated(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """t cos + rotate_half(t) sin for t (B, heads, L, head_dim)."""
    first, second = t.chunk(2, -1)
    return t * cos[:, None].to(t.dtype) + torch.cat((-second, first), -1) * sin[:, None].to(t.dtype)

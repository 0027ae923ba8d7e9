"""What blocks inside a language model are compared with, as upstream writes them: OpenFlamingo's gated block, and the
layers with visual experts.

Plain PyTorch over the parameters of our modules, whose names are upstream's.
"""

import torch
import torch.nn.functional as F
from torch import nn

from vlkernels.modules import MPLUGOwl2DecoderLayer, cogvlm_position_ids, cogvlm_vision_mask
from vlkernels.modules.lora_blocks import rotary, rotated


class FlamingoBlock(nn.Module):
    """open_flamingo's block as it is written there, to count against."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, media, locations):
        attn, (J, n) = self.block.attn, media.shape[1:3]
        time, heads = locations.cumsum(-1), attn.to_q.weight.shape[0] // attn.head_dim
        q = attn.to_q(attn.norm(x))
        k, v = attn.to_kv(media.flatten(1, 2)).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        sim = (q * attn.head_dim**-0.5) @ k.transpose(-1, -2)
        media_time = torch.arange(J, device=x.device).repeat_interleave(n) + 1
        seen = time[:, None, :, None] == media_time
        sim = sim.masked_fill(~seen, -torch.finfo(sim.dtype).max)
        sim = sim - sim.amax(-1, keepdim=True).detach()
        weights = sim.softmax(-1).masked_fill((time == 0)[:, None, :, None], 0.0)
        out = (weights @ v).transpose(1, 2).flatten(2)
        x = attn.to_out(out) * self.block.attn_gate.tanh() + x
        return self.block.ff(x) * self.block.ff_gate.tanh() + x


def scattered(x, mask, vision, language):
    y = x.new_empty((*x.shape[:-1], language.weight.shape[0]))
    y[mask] = vision(x[mask])
    y[~mask] = language(x[~mask])
    return y


def attended(q, k, v):
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    y = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
    return y.transpose(1, 2).flatten(2)


def flash_attended(q, k, v):
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2).flatten(2)


def heads(t, head_dim):
    return t.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def expert_layer(layer, x, types, flash=False):
    """A layer of CogVLM, CogVLM2 or mPLUG-Owl2 with the rows of each modality gathered and scattered.

    flash: causal attention through torch's own operator, which upstream takes where no row is padding.
    """
    attend = flash_attended if flash else attended
    if isinstance(layer, MPLUGOwl2DecoderLayer):
        mask, attention = types == 1, layer.self_attn

        def normed(norm, x):
            text, image = norm.multiway
            y = torch.empty_like(x)
            y[mask], y[~mask] = image(x[mask]), text(x[~mask])
            return y

        cos_sin = rotary(torch.arange(x.shape[1]).expand(x.shape[:2]), layer.head_dim)
        n = normed(layer.input_layernorm, x)
        k, v = (scattered(n, mask, m.multiway[1], m.multiway[0]) for m in (attention.k_proj, attention.v_proj))
        q, k, v = (heads(t, layer.head_dim) for t in (attention.q_proj(n), k, v))
        h = x + attention.o_proj(attend(rotated(q, *cos_sin), rotated(k, *cos_sin), v))
        n, mlp = normed(layer.post_attention_layernorm, h), layer.mlp
        return h + mlp.down_proj(F.silu(mlp.gate_proj(n)) * mlp.up_proj(n))
    mask, attention = cogvlm_vision_mask(types), layer.self_attn
    cos_sin = rotary(cogvlm_position_ids(types), attention.head_dim, layer.rope_theta)
    qkv = scattered(layer.input_layernorm(x), mask, attention.vision_expert_query_key_value,
                    attention.language_expert_query_key_value)  # fmt: skip
    q, k, v = (heads(t, attention.head_dim) for t in qkv.split(attention.sizes, -1))
    y = attend(rotated(q, *cos_sin), rotated(k, *cos_sin), v)
    h = x + scattered(y, mask, attention.vision_expert_dense, attention.language_expert_dense)
    n = layer.post_attention_layernorm(h)
    y = torch.empty_like(n)
    for rows, mlp in ((mask, layer.mlp.vision_mlp), (~mask, layer.mlp.language_mlp)):
        y[rows] = mlp.down_proj(F.silu(mlp.gate_proj(n[rows])) * mlp.up_proj(n[rows]))
    return h + y

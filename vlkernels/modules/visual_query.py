"""The visual branch of LLaMA-Adapter v2: its output is added to the adapter prompts of the language model's layers."""

from __future__ import annotations

from torch import Tensor, nn

from ._block import SelfAttentionBlock, run, with_constants
from ._parts import check_tokens


class VisualQuery(nn.Module):
    """LLaMA-Adapter v2's visual branch: x (B, N, C) -> (B, query_len, D), C = clip_dim, D = llm_dim.

        s = [visual_query; LN(clip_proj(x))];  y = LN(visual_proj(the first query_len rows of blocks(s)))

    x: CLIP's tokens with CLS, after its last norm and projection. The blocks are a ViT's: pre-norm (eps, 1e-6 in recent
    timm and 1e-5 in the one that upstream pins), packed query, key and value with biases, exact GELU, MLP ratio
    v_mlp_ratio. The last one computes the returned rows only.

    Parameters as upstream's: `visual_query.weight` (query_len, v), `clip_proj` (v, C), `clip_proj_norm`,
    `visual_blocks.{l}` as in SelfAttentionBlock, `visual_proj` (D, v), `visual_proj_norm`, v = v_embed_dim, the norms'
    eps 1e-5. Initialised as nn.Linear and nn.Embedding. level: of the blocks' MLPs, 0 keeps the first product, 1
    recomputes it.
    Source: OpenGVLab/LLaMA-Adapter llama_adapter_v2_multimodal7b/llama/llama_adapter.py; arXiv 2304.15010.
    """

    def __init__(
        self,
        clip_dim: int,
        llm_dim: int,
        *,
        v_embed_dim: int = 768,
        v_depth: int = 8,
        v_num_heads: int = 16,
        v_mlp_ratio: float = 4.0,
        query_len: int = 10,
        eps: float = 1e-6,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if query_len < 1 or v_depth < 0:
            raise ValueError(f"query_len is {query_len}, v_depth {v_depth}; accepted: 1 or more, 0 or more")
        made = {"device": device, "dtype": dtype}
        self.clip_dim, self.query_len = clip_dim, query_len
        self.clip_proj = nn.Linear(clip_dim, v_embed_dim, **made)
        self.clip_proj_norm = nn.LayerNorm(v_embed_dim, **made)
        self.visual_query = nn.Embedding(query_len, v_embed_dim, **made)
        inner = int(v_embed_dim * v_mlp_ratio)
        self.visual_blocks = nn.ModuleList(
            SelfAttentionBlock(v_embed_dim, v_num_heads, inner, act="gelu", eps=eps, level=level, **made)
            for _ in range(v_depth)
        )
        self.visual_proj = nn.Linear(v_embed_dim, llm_dim, **made)
        self.visual_proj_norm = nn.LayerNorm(llm_dim, **made)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("x", x, self.clip_dim)
        tokens = self.clip_proj_norm(self.clip_proj(x))
        s = with_constants(tokens, self.visual_query.weight, first=True)
        y = run(self.visual_blocks, s, slice(0, self.query_len))
        return self.visual_proj_norm(self.visual_proj(y))

    def extra_repr(self) -> str:
        return f"query_len={self.query_len}"

"""MemVP: visual prompts as key-value memory beside the feed-forward, so that the sequence stays as short as the text.

JieShibo/MemVP memvp/adapter.py, model.py; arXiv 2405.05615; survey 4.1.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .projector import AdapterMLP


def memory_ffn(z: Tensor, keys: Tensor, values: Tensor, scale: float, p: float = 0.0) -> Tensor:
    """scale * dropout(silu(z keysᵀ)) values: z (B, L, D), keys and values (B or 1, M, D) -> (B, L, D).

    No softmax and no 1 / sqrt(D). Plain PyTorch: two products with M = 320 columns beside the feed-forward's three with
    11008, and (B, L, M) kept, a fortieth of what the feed-forward keeps; a fused kernel would save one pass over that.

    Raises: ValueError naming the argument, what it got and what is accepted.
    """
    if z.dim() != 3 or keys.dim() != 3 or keys.shape[0] not in (1, z.shape[0]) or keys.shape[2] != z.shape[2]:
        raise ValueError(
            f"z has shape {tuple(z.shape)}, keys {tuple(keys.shape)}; accepted: (B, L, D) and (B or 1, M, D)"
        )
    if values.shape != keys.shape:
        raise ValueError(f"values has shape {tuple(values.shape)}; accepted: the shape of keys = {tuple(keys.shape)}")
    weights = F.silu(z @ keys.transpose(1, 2))
    return scale * (F.dropout(weights, p) @ values) if p else scale * (weights @ values)


class MemVPMemory(nn.Module):
    """The memory that all layers share: clip_feats (B, N, C) -> keys and values (B, M, D).

        V = 0.01 * has_image * adapter_proj(clip_feats), zero from row N on;  keys = V + E1, values = V + E2

    Parameters: `adapter_emb1` E1 (1, M, D), 0.02 N(0, 1); `adapter_emb2` E2 (1, M, D), zeros; `adapter_proj`, an
    AdapterMLP C -> hidden -> D with silu (upstream's `fc1`, `fc2` are its linear_1, linear_2). A sample without an
    image still has E1 and E2. Published for 7B: rows=320, hidden=128, C = 1024.

    forward's img_indicators (B,): 1 with an image, 0 without; None for images everywhere. clip_feats None: (1, M, D).
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        width: int,
        rows: int,
        *,
        scale: float = 0.01,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if rows < 1:
            raise ValueError(f"rows is {rows}; accepted: 1 or more")
        made = {"device": device, "dtype": dtype}
        self.adapter_emb1 = nn.Parameter(torch.randn(1, rows, width, **made) * 0.02)
        self.adapter_emb2 = nn.Parameter(torch.zeros(1, rows, width, **made))
        self.adapter_proj = AdapterMLP(in_features, hidden, width, scale=scale, rows=rows, level=level, **made)

    def forward(self, clip_feats: Tensor | None = None, img_indicators: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if clip_feats is None:
            return self.adapter_emb1, self.adapter_emb2
        v = self.adapter_proj(clip_feats, img_indicators)
        return v + self.adapter_emb1, v + self.adapter_emb2


class MemVPFeedForward(nn.Module):
    """y = ffn(z) + s * dropout(silu(z keysᵀ)) values: a feed-forward with the memory beside it; z after its norm.

    ffn: any module, kept as `ffn` and frozen or trained as it is. s: 0.1 for 7B. dropout acts while training.
    forward(z, keys, values): see MemVPMemory and memory_ffn.
    """

    def __init__(self, ffn: nn.Module, *, s: float = 0.1, dropout: float = 0.1):
        super().__init__()
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout is {dropout}; accepted: a dropout probability in [0, 1)")
        self.ffn, self.s, self.dropout = ffn, s, dropout

    def forward(self, z: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.ffn(z) + memory_ffn(z, keys, values, self.s, self.dropout if self.training else 0.0)

    def extra_repr(self) -> str:
        return f"s={self.s}, dropout={self.dropout}"


class MemVPAdapter(nn.Module):
    """fc2(gelu(fc1(x))), no biases: of MemVP's CLIP layers, x + mlp(ln_2(x)) + 0.1 * adapter(ln_2(x)).

    x (..., D). Parameters `fc1.weight` (r, D), Xavier-uniform, `fc2.weight` (D, r), zeros: then it adds nothing. r is
    12 for 7B.
    """

    def __init__(self, width: int, r: int = 12, *, device=None, dtype=None):
        super().__init__()
        if r < 1:
            raise ValueError(f"r is {r}; accepted: 1 or more")
        self.fc1 = nn.Linear(width, r, bias=False, device=device, dtype=dtype)
        self.fc2 = nn.Linear(r, width, bias=False, device=device, dtype=dtype)
        nn.init.xavier_uniform_(self.fc1.weight)
        nn.init.zeros_(self.fc2.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))

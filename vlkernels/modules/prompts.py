"""Prompts: trained rows that stand before a frozen model's tokens, or before the keys and values of its layers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class PrefixEncoder(nn.Module):
    """Prefix tuning (Li and Liang, arXiv 2101.00190; survey eq. 3): keys and values before each layer's own.

    n rows for `layers` layers of kv_heads heads of head_dim. Without hidden, `embedding.weight` (n, W) holds them,
    W = 2 layers kv_heads head_dim: entry 2 l is the keys of layer l, 2 l + 1 its values. With hidden they are
    re-parameterised: `embedding.weight` (n, width), `transform.0` (hidden, width), tanh, `transform.2` (W, hidden);
    width None stands for kv_heads head_dim, as for a model without grouped heads.

    forward(ids=None): (n, W), or (B, n, W) for ids (B, n) as peft calls it. past_key_values(B): for each layer (keys,
    values), (B, kv_heads, n, head_dim) each, as a cache holds them. The keys are not rotated, the text's positions
    start at n, and n ones stand before the attention mask: see `mask`. without_projection() is the same prefix with
    the projection applied once and dropped, as peft saves it.

    Parameters as peft's, below `prompt_encoder.<adapter>.`; initialised as nn.Embedding and nn.Linear.
    Source: peft tuners/prefix_tuning/model.py, peft_model.py.
    """

    def __init__(
        self,
        n: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        hidden: int | None = None,
        width: int | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if min(n, layers, kv_heads, head_dim) < 1:
            raise ValueError(f"n={n}, layers={layers}, kv_heads={kv_heads}, head_dim={head_dim}; accepted: 1 or more")
        made = {"device": device, "dtype": dtype}
        self.n, self.layers, self.kv_heads, self.head_dim = n, layers, kv_heads, head_dim
        total = 2 * layers * kv_heads * head_dim
        if hidden is None:
            self.embedding = nn.Embedding(n, total, **made)
            self.transform = None
        else:
            width = width or kv_heads * head_dim
            self.embedding = nn.Embedding(n, width, **made)
            self.transform = nn.Sequential(
                nn.Linear(width, hidden, **made), nn.Tanh(), nn.Linear(hidden, total, **made)
            )

    def forward(self, ids: Tensor | None = None) -> Tensor:
        rows = self.embedding.weight if ids is None else self.embedding(ids)
        return rows if self.transform is None else self.transform(rows)

    def past_key_values(self, batch: int, cache_len: int | None = None) -> tuple[tuple[Tensor, Tensor], ...]:
        """For each layer (keys, values); cache_len: how many tokens the cache takes, where it is of fixed size."""
        if cache_len is not None and self.n > cache_len:
            raise ValueError(f"the prefix has {self.n} rows; accepted: at most the cache's {cache_len}")
        flat = self().view(self.n, 2 * self.layers, self.kv_heads, self.head_dim)
        rows = flat.permute(1, 2, 0, 3).unsqueeze(1).expand(-1, batch, -1, -1, -1).unbind(0)
        return tuple(zip(rows[0::2], rows[1::2], strict=True))

    def mask(self, attention_mask: Tensor) -> Tensor:
        """(B, T) -> (B, n + T): the prefix is seen by all."""
        return _with_ones(attention_mask, self.n)

    @torch.no_grad()
    def without_projection(self) -> PrefixEncoder:
        flat = self()
        plain = PrefixEncoder(
            self.n, self.layers, self.kv_heads, self.head_dim, device=flat.device, dtype=flat.dtype
        )  # fmt: skip
        plain.embedding.weight.copy_(flat)
        return plain

    def extra_repr(self) -> str:
        return f"n={self.n}, layers={self.layers}, kv_heads={self.kv_heads}, head_dim={self.head_dim}"


class SoftPrompt(nn.Module):
    """Prompt tuning (arXiv 2104.08691): n rows before the token embeddings, x (B, T, D) -> (B, n + T, D).

    Positions start at 0 with the prompt; logits come for all n + T. `mask` puts n ones before an attention mask.
    forward(None, ids=ids) gives the rows alone, as peft's encoder. Parameter `embedding.weight` (n, D), as peft's below
    `prompt_encoder.<adapter>.`; N(0, 1), or the rows of `init`. Source: peft tuners/prompt_tuning/model.py.
    """

    def __init__(self, n: int, width: int, *, init: Tensor | None = None, device=None, dtype=None):
        super().__init__()
        if n < 1:
            raise ValueError(f"n is {n}; accepted: 1 or more")
        self.n = n
        self.embedding = nn.Embedding(n, width, device=device, dtype=dtype)
        if init is not None:
            if tuple(init.shape) != (n, width):
                raise ValueError(f"init has shape {tuple(init.shape)}; accepted: (n, D) = {n, width}")
            with torch.no_grad():
                self.embedding.weight.copy_(init)

    def forward(self, x: Tensor | None, ids: Tensor | None = None) -> Tensor:
        if x is None:
            return self.embedding.weight if ids is None else self.embedding(ids)
        _check_rows("x", x, self.embedding.weight.shape[1])
        return torch.cat((self.embedding.weight.to(x.dtype).expand(x.shape[0], -1, -1), x), 1)

    def mask(self, attention_mask: Tensor) -> Tensor:
        """(B, T) -> (B, n + T)"""
        return _with_ones(attention_mask, self.n)


class PromptFuse(nn.Module):
    """PromptFuse (arXiv 2203.08055): [P; X_v; X_t] into a frozen language model; P is all that is trained.

    forward(x_v (B, N, D) or None, x_t (B, T, D)) -> (B, n + N + T, D). Parameter `prompt` (n, D), 0.02 N(0, 1); the
    paper's count fits n = 20 at D = 768. There is no public code: written from the paper's description.
    blind_mask(N, T): bool (n + N + T, n + N + T), True = attend, of its BlindPrompt: rows of one modality do not attend
    to those of the other, the prompt attends to all and all to the prompt. Unconfirmed.
    """

    def __init__(self, n: int, width: int, *, device=None, dtype=None):
        super().__init__()
        if n < 1:
            raise ValueError(f"n is {n}; accepted: 1 or more")
        self.prompt = nn.Parameter(torch.randn(n, width, device=device, dtype=dtype) * 0.02)

    def forward(self, x_v: Tensor | None, x_t: Tensor) -> Tensor:
        parts = [x for x in (x_v, x_t) if x is not None]
        for x in parts:
            _check_rows("x_v or x_t", x, self.prompt.shape[1])
        return torch.cat((self.prompt.to(x_t.dtype).expand(x_t.shape[0], -1, -1), *parts), 1)

    def blind_mask(self, visual: int, text: int) -> Tensor:
        n = self.prompt.shape[0]
        kind = torch.tensor([0] * n + [1] * visual + [2] * text, device=self.prompt.device)
        return (kind[:, None] == 0) | (kind[None, :] == 0) | (kind[:, None] == kind[None, :])


class VPTPrompts(nn.Module):
    """Visual prompt tuning (arXiv 2203.12119): n rows after CLS in a vision transformer.

    forward(x, layer): what layer number `layer` gets. Layer 0: [CLS; P; patches] from x (B, 1 + N, D), whose positions
    are added already, for prompts have none. Deeper layers: x itself, or with `deep` x (B, 1 + n + N, D) with its n
    prompt rows replaced by those of the layer. The output keeps the n rows.

    Parameters as upstream's: `prompt_embeddings` (1, n, d); with deep `deep_prompt_embeddings` (layers - 1, n, d);
    d = D, or `project` with `prompt_proj` (project -> D) shared by all. Uniform in ±sqrt(6 / (3 patch² + d)). dropout
    of the prompts acts while training. Source: KMnP/vpt src/models/vit_prompt/vit.py.
    """

    def __init__(
        self,
        n: int,
        width: int,
        layers: int = 1,
        *,
        deep: bool = False,
        project: int = -1,
        patch: int = 16,
        dropout: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if min(n, layers) < 1:
            raise ValueError(f"n={n}, layers={layers}; accepted: 1 or more")
        made = {"device": device, "dtype": dtype}
        inner = project if project > 0 else width
        self.n, self.width, self.layers = n, width, layers
        self.prompt_proj = nn.Linear(project, width, **made) if project > 0 else nn.Identity()
        self.prompt_dropout = nn.Dropout(dropout)
        bound = math.sqrt(6.0 / (3 * patch**2 + inner))
        self.prompt_embeddings = nn.Parameter(torch.empty(1, n, inner, **made).uniform_(-bound, bound))
        rows = torch.empty(layers - 1, n, inner, **made).uniform_(-bound, bound) if deep else None
        self.deep_prompt_embeddings = None if rows is None else nn.Parameter(rows)
        if project > 0:
            nn.init.kaiming_normal_(self.prompt_proj.weight, a=0, mode="fan_out")

    def forward(self, x: Tensor, layer: int = 0) -> Tensor:
        _check_rows("x", x, self.width)
        if not 0 <= layer < self.layers:
            raise ValueError(f"layer is {layer}; accepted: 0 to {self.layers - 1}")
        if layer == 0:
            rows, after = self.prompt_embeddings, 1
        elif self.deep_prompt_embeddings is None:
            return x
        else:
            rows, after = self.deep_prompt_embeddings[layer - 1][None], 1 + self.n
        if x.shape[1] < after:
            raise ValueError(f"x has {x.shape[1]} rows; accepted: CLS, from layer 1 on {self.n} prompts, then patches")
        rows = self.prompt_dropout(self.prompt_proj(rows).expand(x.shape[0], -1, -1))
        return torch.cat((x[:, :1], rows.to(x.dtype), x[:, after:]), 1)


def _check_rows(name: str, x: Tensor, width: int) -> None:
    if x.dim() != 3 or x.shape[2] != width:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; accepted: (B, rows, D) with D = {width}")


def _with_ones(attention_mask: Tensor, n: int) -> Tensor:
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; accepted: (B, T)")
    return torch.cat((attention_mask.new_ones(attention_mask.shape[0], n), attention_mask), 1)

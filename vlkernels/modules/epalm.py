"""eP-ALM's soft prompt, and its visual tokens in the layers of a language model. mshukor/eP-ALM; arXiv 2303.11403."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class EpalmPrompt(nn.Module):
    """eP-ALM's soft prompt: forward(B) -> (B, n, D), the same rows for every sample; with deep a list of them.

    They stand before the text's embeddings and have no positional embedding. Parameters as upstream's:
    `prefix_embedding.0.weight` (n, D), and with mlp `prefix_embedding.1` (mid, D), tanh, `prefix_embedding.3` (D, mid).
    deep: nb_prompts of them, rows n nb_prompts. Initialised as nn.Embedding and nn.Linear. Source: models/epalm.py.
    """

    def __init__(
        self,
        n: int,
        width: int,
        *,
        mid: int | None = None,
        mlp: bool = True,
        deep: bool = False,
        nb_prompts: int = 12,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if n < 1 or nb_prompts < 1:
            raise ValueError(f"n={n}, nb_prompts={nb_prompts}; accepted: 1 or more")
        made = {"device": device, "dtype": dtype}
        self.n, self.deep, self.nb_prompts = n, deep, nb_prompts
        layers: list[nn.Module] = [nn.Embedding(n * nb_prompts if deep else n, width, **made)]
        if mlp:
            mid = mid or width
            layers += [nn.Linear(width, mid, **made), nn.Tanh(), nn.Linear(mid, width, **made)]
        self.prefix_embedding = nn.Sequential(*layers)

    def forward(self, batch: int) -> Tensor | list[Tensor]:
        # of the rows, once for all samples
        rows = self.prefix_embedding[1:](self.prefix_embedding[0].weight).unflatten(0, (-1, self.n))
        prompts = [part.expand(batch, -1, -1) for part in rows]
        return prompts if self.deep else prompts[0]


class EpalmInjection(nn.Module):
    """Where eP-ALM's visual tokens go: layers start <= i < end of the language model see one token at position 0.

    tokens: N of them, each (B, 1, D), as EpalmConnector gives them. Layer i gets number j = min((i - start) // step,
    N - 1), step = (end - start) // N, or 1 where N is larger. Before layer `start` the token is inserted, and the
    sequence is one longer from there to the logits; before later ones it replaces what stands at position 0.

    forward(x, layer, tokens, mask=None) -> (x, mask): before layer number `layer`. mask: additive (B, 1, T, T) or None;
    at the insertion it gets an open row and column, so that position 0 sees all of the text, padding included.
    It has no parameters. Source: models/opt.py.
    """

    def __init__(self, start: int, end: int):
        super().__init__()
        if not 0 <= start < end:
            raise ValueError(f"start={start}, end={end}; accepted: 0 <= start < end")
        self.start, self.end = start, end

    def index(self, layer: int, count: int) -> int | None:
        """Which of `count` tokens the layer gets, or None outside of the range."""
        if not self.start <= layer < self.end:
            return None
        step = (self.end - self.start) // count if self.end - self.start > count else 1
        return min((layer - self.start) // step, count - 1)

    def forward(
        self, x: Tensor, layer: int, tokens: Sequence[Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if not len(tokens):
            raise ValueError("tokens is empty; accepted: at least one (B, 1, D)")
        j = self.index(layer, len(tokens))
        if j is None:
            return x, mask
        token = tokens[j]
        if tuple(token.shape) != (x.shape[0], 1, x.shape[2]):
            shape = (x.shape[0], 1, x.shape[2])
            raise ValueError(f"tokens[{j}] has shape {tuple(token.shape)}; accepted: (B, 1, D) = {shape}")
        inserted = layer == self.start
        x = torch.cat((token.to(x.dtype), x if inserted else x[:, 1:]), 1)
        if inserted and mask is not None:
            mask = nn.functional.pad(mask, (1, 0, 1, 0))
        return x, mask

    def extra_repr(self) -> str:
        return f"start={self.start}, end={self.end}"

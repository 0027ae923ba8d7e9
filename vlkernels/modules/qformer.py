"""Q-Former (survey eq. 12-17): learned queries, optionally beside a text, that read an image through cross-attention.

Dims: B batch, M queries, T text tokens, N visual tokens, C their width, D hidden width, H heads, K = D / H.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops._shuffle import ACTS
from ..ops.linear_projector import linear_projector
from ._children import child_problem, hook_problem
from ._kv import layers_kv
from ._parts import as_bool
from ._post_norm import Stream, plain_linear, under
from .projector import _ALIASES, check_channels
from .qformer_layer import ImageKV, QFormerLayer, keys_values

# what is added to the score of a masked key: nothing is smaller, and a row without a visible key weighs all alike
LOWEST = torch.finfo(torch.float32).min


@dataclasses.dataclass(frozen=True)
class QFormerCache:
    """For each layer keys and values (B or 1, n, H, K) of the queries and, where there was a text, of the text.

    queries, text: how many tokens of each it holds.
    """

    layers: tuple[tuple[Tensor | None, ...], ...]
    queries: int
    text: int

    def select(self, rows: Tensor) -> QFormerCache:
        """The cache of batch rows `rows` (int64), as beam search needs it; what is the same in all rows stays so."""

        def taken(t: Tensor | None) -> Tensor | None:
            return t if t is None or t.shape[0] == 1 else t.index_select(0, rows)

        return dataclasses.replace(self, layers=tuple(tuple(taken(t) for t in layer) for layer in self.layers))


class QFormerOutput(NamedTuple):
    """Final states of the queries (B, M, D) and of the text (B, T, D), None where absent; cache where asked for."""

    queries: Tensor | None
    text: Tensor | None
    cache: QFormerCache | None = None

    @property
    def hidden(self) -> Tensor:
        """[queries; text] (B, M + T, D), upstream's last_hidden_state."""
        parts = [t for t in (self.queries, self.text) if t is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class QFormer(nn.Module):
    """BERT whose first M positions are learned queries that cross-attend to the image in every `freq`-th layer.

        h = LN(dropout(SelfAttention(x) W_o) + x)             rows of queries and text alike, shared weights
        h = LN(dropout(CrossAttention(h, image) W_o) + h)     queries, in layers 0, freq, 2 freq, ...
        y = LN(dropout(W2 act(W1 h)) + h)                     W1, W2 of their own for queries and for text

    x of the first layer is dropout(LN([query_embeds; word[id] + position])): queries get no position. Kept for
    backward are the sums under the norms, queries, keys, values, attention outputs, the FFN's first product and, once
    a call whatever the batch, the weights joined for the products of q, k, v and of the image's keys and values.

    Modes of forward: `query_embeds` and `image`; both with `input_ids` (bidirectional: image-text matching,
    InstructBLIP); `input_ids` alone; and image-grounded generation: a first call with `use_cache=True`, then
    `input_ids` with `cache`, causal, seeing all queries and earlier text (more tokens may follow with the returned
    cache). `causal=True` does it in one call, where the queries see no text.

    query_embeds of batch 1 serve the whole batch: up to the first cross-attention they are computed once.

    Parameters are named as in transformers' Blip2QFormerModel (`encoder.layer.{i}.attention.attention.query.weight`,
    ..., `layernorm`); with text also `embeddings.word_embeddings`, `embeddings.position_embeddings`, and with lm_head
    `cls.dense`, `cls.LayerNorm`, `cls.bias`, whose decoder is the word table. integrations.checkpoints maps LAVIS'.
    Initialised as BERT: normal with deviation 0.02, biases 0.

    Args:
        hidden_size, layers, heads, intermediate_size: D, number of layers, H, width inside the FFN.
        cross_attention_frequency: freq. encoder_hidden_size: C.
        vocab_size: words; 0 builds a Q-Former for queries only. max_position_embeddings: text positions.
        pad_token_id: the word whose embedding gets no gradient from being looked up (nn.Embedding's padding_idx).
        hidden_act: of the FFN. layer_norm_eps: of all norms. lm_head: build `cls`.
        hidden_dropout, attention_dropout: in training.
        masked: what a masked token's score gets in self-attention: transformers' lowest float, LAVIS' -10000.
        level: 0 keeps the FFN's first product and the image's keys and values for backward, 1 recomputes both.

    Source: salesforce/LAVIS blip2_models/Qformer.py; transformers models/blip_2, models/instructblip; arXiv 2301.12597.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        layers: int = 12,
        heads: int = 12,
        intermediate_size: int = 3072,
        cross_attention_frequency: int = 2,
        encoder_hidden_size: int = 1408,
        *,
        vocab_size: int = 0,
        max_position_embeddings: int = 512,
        pad_token_id: int | None = 0,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-12,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        masked: float = LOWEST,
        lm_head: bool = False,
        level: int = 0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if hidden_size % heads:
            raise ValueError(f"hidden_size is {hidden_size}, heads {heads}; accepted: a multiple of heads")
        if layers < 1 or cross_attention_frequency < 1:
            raise ValueError(
                f"layers is {layers}, cross_attention_frequency {cross_attention_frequency}; accepted: 1 or more"
            )
        if lm_head and not vocab_size:
            raise ValueError("lm_head is tied to the word table; accepted with a vocab_size")
        if level not in (0, 1):
            raise ValueError(f"level is {level!r}; accepted: 0, 1")
        act = _ALIASES.get(hidden_act, hidden_act)
        if act not in ACTS:
            raise ValueError(f"hidden_act is {hidden_act!r}; accepted: {', '.join((*ACTS, *_ALIASES))}")
        self.hidden_size, self.encoder_hidden_size, self.vocab_size = hidden_size, encoder_hidden_size, vocab_size
        self.head_dim, self.max_position_embeddings = hidden_size // heads, max_position_embeddings
        self.masked, self.level, self.hidden_dropout = masked, level, hidden_dropout
        made = {"device": device, "dtype": dtype}
        self.layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps, **made)
        if vocab_size:
            words = nn.Embedding(vocab_size, hidden_size, padding_idx=pad_token_id, **made)
            positions = nn.Embedding(max_position_embeddings, hidden_size, **made)
            self.embeddings = nn.ModuleDict({"word_embeddings": words, "position_embeddings": positions})
        options = {
            "act": act, "eps": layer_norm_eps, "text": vocab_size > 0, "hidden_dropout": hidden_dropout,
            "attention_dropout": attention_dropout,
        }  # fmt: skip
        found = (
            QFormerLayer(hidden_size, heads, intermediate_size, width, **options, **made)
            for width in (0 if i % cross_attention_frequency else encoder_hidden_size for i in range(layers))
        )
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(found)})
        self.cls = _Head(hidden_size, vocab_size, act, layer_norm_eps, **made) if lm_head else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=0.02)
                module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=0.02)
                if module.padding_idx is not None:
                    module.weight[module.padding_idx].zero_()

    @torch.no_grad()
    def copy_text_to_queries(self) -> None:
        """Start the queries' FFN as the text's, as LAVIS does after loading BERT's weights."""
        if not self.vocab_size:
            raise ValueError("this Q-Former has no text; accepted with a vocab_size")
        for layer in self.encoder.layer:
            layer.intermediate_query.load_state_dict(layer.intermediate.state_dict())
            layer.output_query.load_state_dict(layer.output.state_dict())

    def image_kv(self, image_embeds: Tensor, mask: Tensor | None = None, norm: nn.Module | None = None) -> ImageKV:
        """Keys and values of norm(image_embeds) (B, N, C) in all layers; mask (B, N), bool or integers, 1 = attend."""
        check_channels("image_embeds", image_embeds, self.encoder_hidden_size)
        if image_embeds.dim() != 3:
            raise ValueError(f"image_embeds has shape {tuple(image_embeds.shape)}; accepted: (B, N, C)")
        mask = as_bool("image mask", mask, image_embeds.shape[:2])
        cross = {
            i: m.crossattention.attention for i, m in enumerate(self.encoder.layer) if m.crossattention is not None
        }
        plain = {i: a for i, a in cross.items() if plain_linear(a.key) and plain_linear(a.value)}
        x, norms = image_embeds, None
        if norm is not None:
            usable = len(plain) == len(cross) and child_problem("norm", norm, (nn.LayerNorm,)) is None
            x, norms = (x, [norm] * len(plain)) if usable else (norm(x), None)
        layers: dict[int, dict[str, Tensor] | None] = {}
        if plain:
            weights = [(a.key.weight, a.value.weight) for a in plain.values()]
            biases = [(a.key.bias, a.value.bias) for a in plain.values()]
            found = layers_kv(x, weights, self.head_dim, biases=biases, norms=norms, level=self.level)
            layers.update(zip(plain, found, strict=True))
        for i in cross.keys() - plain.keys():
            # a sharded child is whole only while its layer runs
            whole = all(type(p) in (nn.Parameter, Tensor) for p in cross[i].parameters())
            whole = whole and hook_problem("layer", self.encoder.layer[i]) is None
            layers[i] = keys_values(x, cross[i], self.head_dim) if whole else None
        return ImageKV(layers, mask, x)

    def forward(
        self,
        query_embeds: Tensor | None = None,
        image: Tensor | ImageKV | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        index: Tensor | None = None,
        *,
        causal: bool = False,
        cache: QFormerCache | None = None,
        use_cache: bool = False,
        want: tuple[str, ...] = ("queries", "text"),
    ) -> QFormerOutput:
        """Final states of queries and text.

        Args:
            query_embeds: (B or 1, M, D). image: (B, N, C) with `image_mask` (B, N), or an ImageKV with its own mask.
            input_ids: int64 (B, T). attention_mask: (B, M + T) as upstream's, or (B, T) for the text alone, 1 = attend;
                with a cache T counts the tokens in it too.
            index: int64 (B,), which row of `image` each row of the batch attends to; rows may repeat.
            cache: of an earlier call; input_ids follow what it holds, and there are no query_embeds.
            want: of which of "queries" and "text" the final states are needed; the rest of the last layer is left out.

        Raises: TypeError, ValueError naming the argument, what it got and what is accepted.
        """
        batch = self._batch(query_embeds, image, input_ids, index, cache, want)
        if isinstance(image, Tensor):
            image = self.image_kv(image, image_mask)
        elif image_mask is not None:
            raise ValueError("image_mask is given beside no image tensor; accepted: image_kv(image, mask)")
        before = cache.text if cache is not None else 0
        M = cache.queries if cache is not None else 0 if query_embeds is None else query_embeds.shape[1]
        T = before + (0 if input_ids is None else input_ids.shape[1])
        query_mask, text_mask = _token_masks(attention_mask, batch, M, T)
        queries = None if query_embeds is None else self._embedded(query_embeds, batch)
        text = None if input_ids is None else self._embedded(self._words(input_ids, before), batch)
        kept, last = [], len(self.encoder.layer) - 1
        for i, layer in enumerate(self.encoder.layer):
            queries, text, own = layer(
                queries,
                text,
                None if cache is None else cache.layers[i],
                image=image,
                image_kv=None if image is None else image.layers.get(i),
                masks=(query_mask, text_mask, self.masked),
                index=index,
                causal=causal or cache is not None,
                level=self.level,
                want=("queries", "text") if i < last else want,
            )
            kept.append(own)
        made = QFormerCache(tuple(kept), M, T) if use_cache else None
        return QFormerOutput(*(None if s is None else s.settled() for s in (queries, text)), made)

    def lm_logits(self, text: Tensor) -> Tensor:
        """Word scores (..., V) of text states (..., D): decoder(LN(act(dense(x)))), the decoder tied to the words."""
        if self.cls is None:
            raise ValueError("this Q-Former has no LM head; accepted with lm_head=True")
        return self.cls(text, self.embeddings.word_embeddings)

    def _words(self, input_ids: Tensor, before: int) -> Tensor:
        end = before + input_ids.shape[1]
        if end > self.max_position_embeddings:
            raise ValueError(f"the text has {end} tokens; accepted: up to {self.max_position_embeddings}")
        places = torch.arange(before, end, device=input_ids.device)
        return self.embeddings.word_embeddings(input_ids) + self.embeddings.position_embeddings(places)

    def _embedded(self, x: Tensor, batch: int) -> Stream:
        if self.training and self.hidden_dropout:
            return Stream(F.dropout(self.layernorm(x).expand(batch, -1, -1), self.hidden_dropout))
        # queries of batch 1 stay so until they meet something of the batch, unless a dropout tells them apart
        return under(x.expand(batch, -1, -1) if self.encoder.layer[0].drops() else x, self.layernorm)

    def _batch(self, query_embeds, image, input_ids, index, cache, want) -> int:
        """B, or an error that names the argument that does not fit."""
        if query_embeds is None and input_ids is None:
            raise ValueError("accepted: query_embeds, input_ids or both")
        if not set(want) <= {"queries", "text"}:
            raise ValueError(f"want is {want!r}; accepted: some of 'queries', 'text'")
        sizes = {}
        if query_embeds is not None:
            check_channels("query_embeds", query_embeds, self.hidden_size)
            if query_embeds.dim() != 3:
                raise ValueError(f"query_embeds has shape {tuple(query_embeds.shape)}; accepted: (B or 1, M, D)")
            if image is None or cache is not None:
                raise ValueError("query_embeds are accepted with an image and without a cache")
            sizes["query_embeds"] = query_embeds.shape[0]
            if index is None:
                sizes["image"] = (image if isinstance(image, Tensor) else image.x).shape[0]
        elif image is not None or index is not None:
            raise ValueError("image and index are accepted with query_embeds only")
        if input_ids is not None:
            if not self.vocab_size:
                raise ValueError("input_ids are given to a Q-Former without text; accepted with a vocab_size")
            if input_ids.dim() != 2 or input_ids.is_floating_point():
                raise ValueError(f"input_ids is {input_ids.dtype} {tuple(input_ids.shape)}; accepted: integers (B, T)")
            sizes["input_ids"] = input_ids.shape[0]
        if cache is not None:
            if len(cache.layers) != len(self.encoder.layer):
                raise ValueError(f"cache holds {len(cache.layers)} layers; accepted: {len(self.encoder.layer)}")
            own = (t.shape[0] for layer in cache.layers for t in layer if t is not None)
            sizes["cache"] = next((b for b in own if b != 1), 1)
        if index is not None:
            if index.dim() != 1 or index.dtype != torch.int64:
                raise ValueError(f"index is {index.dtype} {tuple(index.shape)}; accepted: int64 (B,)")
            sizes["index"] = index.shape[0]
        if len({b for b in sizes.values() if b != 1}) > 1 or ("input_ids" in sizes and sizes["input_ids"] != max(
            sizes.values()
        )):  # fmt: skip
            raise ValueError(f"batch sizes differ: {sizes}; accepted: one number, or 1 for all but input_ids")
        return next((b for b in sizes.values() if b != 1), 1)


class _Head(nn.Module):
    """word scores = LN(act(x Wᵀ + b)) Eᵀ + bias, E the word table."""

    def __init__(self, hidden_size: int, vocab_size: int, act: str, eps: float, **made):
        super().__init__()
        self.act = act
        self.dense = nn.Linear(hidden_size, hidden_size, **made)
        self.LayerNorm = nn.LayerNorm(hidden_size, eps=eps, **made)
        self.bias = nn.Parameter(torch.zeros(vocab_size, **made))

    def forward(self, x: Tensor, words: nn.Embedding) -> Tensor:
        h = ACTS[self.act](self.dense(x))
        norm = self.LayerNorm
        if child_problem("norm", norm, (nn.LayerNorm,)) is not None:
            return F.linear(norm(h), words.weight, self.bias)
        return linear_projector(
            h, words.weight, self.bias, norm.weight, norm.bias, norm="layer", eps=norm.eps
        )  # fmt: skip


def _token_masks(mask: Tensor | None, batch: int, M: int, T: int) -> tuple[Tensor | None, Tensor | None]:
    """The queries' and the text's part of upstream's (B, M + T) mask, or of one over the text alone."""
    if mask is None:
        return None, None
    if mask.dim() == 2 and M and T and mask.shape[1] == T:
        return None, as_bool("attention_mask", mask, (batch, T))
    mask = as_bool("attention_mask", mask, (batch, M + T))
    return (mask[:, :M] if M else None), (mask[:, M:] if T else None)

"""BLIP-2's first stage: contrast, matching and generation from one image pass of the Q-Former."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .projector import check_channels
from .qformer import QFormer

# score of a pair that must not be drawn as a negative
EXCLUDED = -10000.0


class Stage1Output(NamedTuple):
    """loss: the sum of the three.

    sim_i2t, sim_t2i (B, B), divided by temp; image_feats (B, M, E) and text_feats (B, E), of length 1; itm_logits
    (3 B, 2) of [matching pairs; text with another image; image with another text], itm_labels (3 B);
    lm_logits (B, T - 1, V), scores of tokens 1 .. T - 1; negatives: (image of each text, text of each image), (B) each.
    """

    loss: Tensor
    loss_itc: Tensor
    loss_itm: Tensor
    loss_lm: Tensor
    sim_i2t: Tensor
    sim_t2i: Tensor
    image_feats: Tensor
    text_feats: Tensor
    itm_logits: Tensor
    itm_labels: Tensor
    lm_logits: Tensor
    negatives: tuple[Tensor, Tensor]


class Blip2Stage1(nn.Module):
    """Image-text contrast, matching and generation of one batch of pairs, as LAVIS' Blip2Qformer.forward.

    The image's keys and values are projected once, and serve the contrast pass (B rows) and the matching pass, whose
    3 B rows [pos, negative image, pos] address them by index; upstream projects them 4 times an image. Generation
    reuses the queries' keys and values of the contrast pass. Negatives are drawn on the device, within this batch.

        ITC  F = normalize(vision_proj(queries)), t = normalize(text_proj(text[0])), sim = max over queries F tᵀ / temp
        ITM  itm_head(queries beside text) averaged over the queries, for matching and drawn pairs
        ITG  LM scores of the text after the queries, its first token replaced by [DEC]

    Parameters `ln_vision` (C; eps 1e-5), `query_tokens` (1, M, D), `qformer.*` (with text and LM head),
    `vision_proj` and `text_proj` (E, D), `itm_head` (2, D), `temp`.

    Args:
        qformer: with a vocab_size and lm_head=True. n_query: M. embed_dim: E.
        bos_token_id: of [DEC]. pad_token_id: no loss is taken on it.
        label_smoothing: of ITC and of generation.

    Source: salesforce/LAVIS lavis/models/blip2_models/blip2_qformer.py; arXiv 2301.12597.
    """

    def __init__(
        self,
        qformer: QFormer,
        n_query: int = 32,
        embed_dim: int = 256,
        *,
        bos_token_id: int = 30522,
        pad_token_id: int = 0,
        label_smoothing: float = 0.1,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if qformer.cls is None:
            raise ValueError("qformer has no LM head; accepted with a vocab_size and lm_head=True")
        if not 0 <= bos_token_id < qformer.vocab_size:
            raise ValueError(f"bos_token_id is {bos_token_id}; accepted: 0 to {qformer.vocab_size - 1}")
        made = {"device": device, "dtype": dtype}
        self.bos_token_id, self.pad_token_id, self.label_smoothing = bos_token_id, pad_token_id, label_smoothing
        self.ln_vision = nn.LayerNorm(qformer.encoder_hidden_size, **made)
        self.query_tokens = nn.Parameter(torch.empty(1, n_query, qformer.hidden_size, **made))
        nn.init.normal_(self.query_tokens, std=0.02)
        self.qformer = qformer
        self.vision_proj = nn.Linear(qformer.hidden_size, embed_dim, **made)
        self.text_proj = nn.Linear(qformer.hidden_size, embed_dim, **made)
        self.itm_head = nn.Linear(qformer.hidden_size, 2, **made)
        self.temp = nn.Parameter(torch.full((), 0.07, **made))

    def forward(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> Stage1Output:
        """One step's losses.

        Args:
            image_embeds: (B, N, C), the vision model's tokens before ln_vision; image_mask (B, N), 1 = attend.
            input_ids, attention_mask: (B, T), padded texts; row b describes image b.
            image_ids: (B), where several texts may describe one image (retrieval fine-tuning): those are positives too.
            negatives: instead of drawing them, int64 (B) each, as Stage1Output's.
        """
        check_channels("image_embeds", image_embeds, self.ln_vision.normalized_shape[0])
        B = image_embeds.shape[0]
        if image_embeds.dim() != 3 or input_ids.dim() != 2 or input_ids.shape[0] != B:
            raise ValueError(
                f"image_embeds has shape {tuple(image_embeds.shape)}, input_ids {tuple(input_ids.shape)}; accepted: "
                "(B, N, C) and (B, T)"
            )
        if attention_mask.shape != input_ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; accepted: that of input_ids")
        image = self.qformer.image_kv(image_embeds, image_mask, self.ln_vision)
        seen = self.qformer(self.query_tokens, image, use_cache=True)
        text = self.qformer(input_ids=input_ids, attention_mask=attention_mask).text
        image_feats = F.normalize(self.vision_proj(seen.queries), dim=-1)
        text_feats = F.normalize(self.text_proj(text[:, 0]), dim=-1)
        # (B, B, M): image i's query m against text j
        similarity = torch.einsum("ime,je->ijm", image_feats, text_feats).amax(-1)
        sim_i2t, sim_t2i = similarity / self.temp, similarity.t() / self.temp
        loss_itc, same = self._contrast(sim_i2t, sim_t2i, image_ids)
        if negatives is None:
            negatives = (_drawn(sim_t2i, same), _drawn(sim_i2t, same))
        itm_logits = self._matching(image, input_ids, attention_mask, negatives)
        itm_labels = torch.cat((same.new_ones(B), same.new_zeros(2 * B))).long()
        loss_itm = F.cross_entropy(itm_logits, itm_labels)
        lm_logits, loss_lm = self._generation(seen.cache, input_ids, attention_mask)
        loss = loss_itc + loss_itm + loss_lm
        return Stage1Output(
            loss, loss_itc, loss_itm, loss_lm, sim_i2t, sim_t2i, image_feats, text_feats, itm_logits, itm_labels,
            lm_logits, negatives,
        )  # fmt: skip

    def _contrast(self, sim_i2t: Tensor, sim_t2i: Tensor, image_ids: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss, and which pairs (B, B) belong together."""
        B, smoothing = sim_i2t.shape[0], self.label_smoothing
        targets = torch.arange(B, device=sim_i2t.device)
        same = torch.eye(B, dtype=torch.bool, device=sim_i2t.device)
        if image_ids is not None:
            same = image_ids.view(-1, 1) == image_ids.view(1, -1)
            wanted = same.to(sim_i2t.dtype)
            targets = (1 - smoothing) * wanted / wanted.sum(1, keepdim=True) + smoothing / B
            smoothing = 0.0
        losses = [F.cross_entropy(sim, targets, label_smoothing=smoothing) for sim in (sim_i2t, sim_t2i)]
        return sum(losses) / 2, same

    def _matching(self, image, input_ids: Tensor, attention_mask: Tensor, negatives: tuple[Tensor, Tensor]) -> Tensor:
        own = torch.arange(input_ids.shape[0], device=input_ids.device)
        other_image, other_text = negatives
        ids = torch.cat((input_ids, input_ids, input_ids[other_text]))
        mask = torch.cat((attention_mask, attention_mask, attention_mask[other_text]))
        index = torch.cat((own, other_image, own))
        states = self.qformer(self.query_tokens, image, ids, mask, index=index, want=("queries",)).queries
        return self.itm_head(states).mean(1)

    def _generation(self, cache, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        ids = torch.cat((torch.full_like(input_ids[:, :1], self.bos_token_id), input_ids[:, 1:]), 1)
        # the last token predicts nothing
        states = self.qformer(input_ids=ids[:, :-1], attention_mask=attention_mask[:, :-1], cache=cache).text
        logits = self.qformer.lm_logits(states)
        labels = ids[:, 1:].masked_fill(ids[:, 1:] == self.pad_token_id, -100)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=self.label_smoothing)
        return logits, loss


@torch.no_grad()
def _drawn(similarity: Tensor, same: Tensor) -> Tensor:
    """For each row a column (B,), drawn by the softmax of its similarity among those that do not belong to it."""
    return torch.multinomial(similarity.float().masked_fill(same, EXCLUDED).softmax(1), 1).squeeze(1)

"""Llama with a ladder: the side network for decoder-only models, which upstream does not have.

The parts sit on LlamaModel under the names that upstream gives a decoder's, `side_final_upsample` among them. Backbone
and side layers are transformers' LlamaDecoderLayer; a side layer has the backbone's heads, each head width / R wide,
and rotary frequencies of that width. Images, if any, come before the text and reach the side network alone, as in VLT5.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import Tensor, nn

from ..modules.ladder import Ladder, LadderConfig, rungs, upsample
from .ladder_t5 import grow
from .swap import Shown, finished


def add_to_llama(model: nn.Module, config: LadderConfig) -> None:
    """Put the parts on a LlamaForCausalLM and change its classes; weights are those of the constructors."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

    stack, whole = model.model, model.config
    head = whole.head_dim or whole.hidden_size // whole.num_attention_heads
    sizes = config.reduced(hidden_size=whole.hidden_size, intermediate_size=whole.intermediate_size, head_dim=head)
    if sizes["head_dim"] % 2:
        raise ValueError(f"reduction is {config.reduction}; accepted: one that leaves heads of {head} an even width")
    count = len(stack.layers)
    kept = rungs("decoder_layers", config.decoder_layers, count)
    narrow = copy.deepcopy(whole)
    narrow.update(sizes)
    blocks = [LlamaDecoderLayer(narrow, layer_idx=count + kept.index(i)) if i in kept else None for i in range(count)]
    stack.__class__ = stack_class(type(stack))
    norm = LlamaRMSNorm(sizes["hidden_size"], eps=whole.rms_norm_eps)
    stack.add_side(config, whole.hidden_size, kept, blocks, norm)
    stack.side_rotary_emb = LlamaRotaryEmbedding(config=narrow)
    stack.side_final_upsample = upsample(config, whole.hidden_size)
    stack.side_block_config = narrow
    model.__class__ = model_class(type(model))


def remove_from_llama(model: nn.Module) -> None:
    model.model.drop_side()
    del model.model.side_block_config
    model.model.__class__ = type(model.model).vlkernels_original
    model.__class__ = type(model).vlkernels_original


@cache
def stack_class(original: type) -> type:
    """LlamaModel -> the same with a ladder; last_hidden_state is what the LM head reads."""
    from transformers.cache_utils import DynamicCache
    from transformers.masking_utils import create_causal_mask
    from transformers.modeling_outputs import BaseModelOutputWithPast

    class Fused(Ladder, original, metaclass=Shown):
        def forward(
            self,
            input_ids=None,
            attention_mask=None,
            position_ids=None,
            past_key_values=None,
            inputs_embeds=None,
            use_cache=None,
            vis_embeds=None,
            vis_attention_mask=None,
            output_hidden_states=None,
            output_attentions=None,
            return_dict=None,
            **kwargs,
        ):
            if (input_ids is None) == (inputs_embeds is None):
                raise ValueError("input_ids and inputs_embeds: accepted is exactly one of them")
            if output_attentions:
                raise ValueError("output_attentions is True; a ladder keeps no attentions; accepted: False")
            config, first_side = self.config, len(self.layers)
            self.side_block_config._attn_implementation = config._attn_implementation
            x = inputs_embeds if input_ids is None else self.embed_words(self.embed_tokens, input_ids)
            if use_cache is None:  # in training it would keep the frozen layers' keys and values alive
                use_cache = config.use_cache and not self.training
            if use_cache and past_key_values is None:
                past_key_values = DynamicCache(config=config)
            past = side_past = 0
            if past_key_values is not None:
                grow(past_key_values, first_side + len(self.side_kept))
                past = past_key_values.get_seq_length()
                side_past = past_key_values.get_seq_length(first_side)
            if position_ids is None:
                position_ids = torch.arange(x.shape[1], device=x.device)[None] + past
            mask = side_mask = create_causal_mask(
                config=config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
            )
            rotary = self.rotary_emb(x, position_ids=position_ids)

            # images that came with the first call are in the side network's cache
            side_x, images, fresh = x, int(side_past - past), 0
            if vis_embeds is not None and not isinstance(past, Tensor) and past == 0:
                if vis_embeds.dim() != 3 or (vis_embeds.shape[0], vis_embeds.shape[2]) != (x.shape[0], x.shape[2]):
                    shape = (x.shape[0], "N", x.shape[2])
                    raise ValueError(f"vis_embeds has shape {tuple(vis_embeds.shape)}; accepted: (B, N, D) = {shape}")
                images = fresh = vis_embeds.shape[1]
                side_x = torch.cat((vis_embeds.to(x.dtype), x), 1)
            side_ids = position_ids + images
            if fresh:
                before = torch.arange(images, device=x.device).expand(side_ids.shape[0], -1)
                side_ids = torch.cat((before, side_ids), 1)
            if images:
                side_mask = _side_mask(attention_mask, vis_attention_mask, x, images, fresh, past)
            side_rotary = self.side_rotary_emb(side_x, position_ids=side_ids)

            def side(block: nn.Module):
                return lambda s: block(
                    s, attention_mask=side_mask, position_embeddings=side_rotary, position_ids=side_ids,
                    past_key_values=past_key_values, use_cache=use_cache, **kwargs,
                )  # fmt: skip

            s, h = self.side_first_downsample(side_x), x
            backbone = self.backbone_grad(self.layers, x)
            states, side_states = (h,), (s,)
            for i, layer in enumerate(self.layers[: self.side_kept[-1] + 1]):
                with backbone():
                    h = layer(
                        h, attention_mask=mask, position_embeddings=rotary, position_ids=position_ids,
                        past_key_values=past_key_values, use_cache=use_cache, **kwargs,
                    )  # fmt: skip
                if i in self.side_kept:
                    s = self.climb(i, s, h, side(self.side_block[i]), before=fresh)
                if output_hidden_states:
                    states, side_states = (*states, h), (*side_states, s)
            y = self.side_final_upsample(self.final_side_layer_norm(s[:, fresh:]))
            found = BaseModelOutputWithPast(
                last_hidden_state=y,
                past_key_values=past_key_values if use_cache else None,
                hidden_states=states if output_hidden_states else None,
            )
            if output_hidden_states:
                found["side_hidden_states"] = side_states
            return found if return_dict is not False else found.to_tuple()

    return finished(Fused, original, __name__)


def _side_mask(text: Tensor | None, image: Tensor | None, x: Tensor, images: int, fresh: int, past: int) -> Tensor:
    """Additive (B, 1, rows, N + S) of [image; text], causal; rows are the new ones."""
    B, L = x.shape[:2]
    if text is not None and text.dim() != 2:
        raise ValueError(f"attention_mask has shape {tuple(text.shape)}; with vis_embeds accepted: (B, S)")
    text = torch.ones(B, past + L, dtype=torch.long, device=x.device) if text is None else text
    if image is None:
        image = text.new_ones(B, images)
    if tuple(image.shape) != (B, images):
        raise ValueError(f"vis_attention_mask has shape {tuple(image.shape)}; accepted: (B, N) = {(B, images)}")
    keep = torch.cat((image.to(text), text), 1) != 0
    columns = torch.arange(keep.shape[1], device=x.device)
    rows = columns[len(columns) - L - fresh :]
    seen = (columns <= rows[:, None]) & keep[:, None, None]
    return torch.zeros(seen.shape, dtype=x.dtype, device=x.device).masked_fill(~seen, torch.finfo(x.dtype).min)


@cache
def model_class(original: type) -> type:
    """LlamaForCausalLM -> the same, whose forward and generate take images for the side network."""

    class Fused(original, metaclass=Shown):
        def forward(
            self,
            input_ids=None,
            attention_mask=None,
            position_ids=None,
            past_key_values=None,
            inputs_embeds=None,
            labels=None,
            use_cache=None,
            logits_to_keep=0,
            vis_embeds=None,
            vis_attention_mask=None,
            **kwargs,
        ):
            return original.forward(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                labels=labels,
                use_cache=use_cache,
                logits_to_keep=logits_to_keep,
                vis_embeds=vis_embeds,
                vis_attention_mask=vis_attention_mask,
                **kwargs,
            )

    return finished(Fused, original, __name__)


_MAKERS = {"LlamaModel": stack_class, "LlamaForCausalLM": model_class}


def __getattr__(name: str):
    """A class with a ladder by its original's name, which is how pickle and deepcopy find it."""
    if name in _MAKERS:
        from transformers.models.llama import modeling_llama

        return _MAKERS[name](getattr(modeling_llama, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""T5 with a ladder, text only (upstream's T5ForConditionalGeneration) or with images (upstream's VLT5).

The model keeps its object, parameters and names; its classes become subclasses with another forward. Backbone and side
blocks are transformers' T5Block. The backbone's encoder sees text only; the side network sees [text; image].
"""

from __future__ import annotations

import copy
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.ladder import Ladder, LadderConfig, rungs, upsample
from .swap import Shown, finished

_ORDER = "encoder.visual_embedding.obj_order_embedding.weight"


def grow(kept, count: int, longest: int | None = None) -> None:
    """Give a transformers cache `count` layers: the side network's stand after the backbone's in the same cache."""
    from transformers.cache_utils import DynamicLayer, StaticLayer

    while len(kept.layers) < count:
        first = kept.layers[0] if kept.layers else None
        if first is None or type(first) is DynamicLayer:
            kept.layers.append(DynamicLayer())
        elif type(first) is StaticLayer:
            kept.layers.append(StaticLayer(max_cache_len=longest or first.max_cache_len))
        else:
            raise ValueError(f"past_key_values has a {type(first).__name__}; accepted: dynamic or static layers")


def add_to_t5(model: nn.Module, config: LadderConfig, visual: dict | None) -> None:
    """Put the parts on a T5ForConditionalGeneration and change its classes; weights are those of the constructors."""
    from transformers.models.t5.modeling_t5 import T5Block, T5LayerNorm

    from ..modules.linear_projector import VisualEmbedding

    whole = model.config
    sizes = config.reduced(d_model=whole.d_model, d_ff=whole.d_ff, d_kv=whole.d_kv)
    plans = [
        (stack, rungs(f"{name}_layers", getattr(config, f"{name}_layers"), len(stack.block)))
        for name, stack in (("encoder", model.encoder), ("decoder", model.decoder))
    ]
    seen = None
    if visual is not None:
        options = {"eps": whole.layer_norm_epsilon, **visual}
        if options.get("use_vis_order_embedding", True):
            options["obj_order_embedding"] = model.shared
        seen = VisualEmbedding(d_model=whole.d_model, **options)
    for stack, kept in plans:
        narrow = copy.deepcopy(stack.config)
        narrow.update(sizes)
        count = len(stack.block)
        blocks = [
            # the first rung owns the relative position bias
            T5Block(narrow, has_relative_attention_bias=i == kept[0], layer_idx=count + kept.index(i))
            if i in kept else None
            for i in range(count)
        ]  # fmt: skip
        stack.__class__ = stack_class(type(stack))
        stack.add_side(config, whole.d_model, kept, blocks, T5LayerNorm(sizes["d_model"], eps=whole.layer_norm_epsilon))
        stack.side_block_config, stack.side_visual = narrow, None
    if seen is not None:
        model.encoder.visual_embedding, model.encoder.side_visual = seen, dict(visual)
        if seen.obj_order_embedding is not None:
            # so that saving and resizing know it for the word table
            model._tied_weights_keys = {**model._tied_weights_keys, _ORDER: "shared.weight"}
    model.side_final_upsample = upsample(config, whole.d_model)
    model.__class__ = model_class(type(model))


def remove_from_t5(model: nn.Module) -> None:
    for stack in (model.encoder, model.decoder):
        stack.drop_side()
        del stack.side_block_config, stack.side_visual
        stack.__class__ = type(stack).vlkernels_original
    if hasattr(model.encoder, "visual_embedding"):
        del model.encoder.visual_embedding
        model.__dict__.pop("_tied_weights_keys", None)
    del model.side_final_upsample
    model.__class__ = type(model).vlkernels_original


@cache
def stack_class(original: type) -> type:
    """T5Stack -> the same with a ladder."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache
    from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    class Fused(Ladder, original, metaclass=Shown):
        def set_input_embeddings(self, new_embeddings):
            original.set_input_embeddings(self, new_embeddings)
            if getattr(getattr(self, "visual_embedding", None), "obj_order_embedding", None) is not None:
                self.visual_embedding.obj_order_embedding = new_embeddings

        def forward(
            self,
            input_ids=None,
            attention_mask=None,
            encoder_hidden_states=None,
            encoder_attention_mask=None,
            inputs_embeds=None,
            past_key_values=None,
            use_cache=None,
            side_encoder_hidden_states=None,
            side_encoder_attention_mask=None,
            vis_feats=None,
            boxes=None,
            vis_attention_mask=None,
            img_order_ids=None,
            obj_order_ids=None,
            output_hidden_states=None,
            output_attentions=None,
            return_dict=None,
            **kwargs,
        ):
            """As T5Stack's, with last_side_hidden_state (B, L + N, D / R) in the output. The decoder's output has the
            side network's state only, and its backbone stops at the last layer with a rung."""
            if (input_ids is None) == (inputs_embeds is None):
                raise ValueError("input_ids and inputs_embeds: accepted is exactly one of them")
            if output_attentions:
                raise ValueError("output_attentions is True; a ladder keeps no attentions; accepted: False")
            config = self.config
            self.side_block_config._attn_implementation = config._attn_implementation
            x = inputs_embeds if input_ids is None else self.embed_words(self.embed_tokens, input_ids)
            side_x, images = x, 0
            if vis_feats is not None:
                if not hasattr(self, "visual_embedding"):
                    raise ValueError("vis_feats is given to a ladder without a visual embedding; accepted: None")
                seen = self.visual_embedding(vis_feats, boxes, img_order_ids, obj_order_ids)
                side_x, images = torch.cat((x, seen.to(x.dtype)), 1), seen.shape[1]

            if use_cache is None:  # in training it would keep the frozen layers' keys and values alive
                use_cache = config.use_cache and not self.training
            if not self.is_decoder:
                past_key_values = None
            elif use_cache and past_key_values is None:
                past_key_values = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
            masks = {"config": config, "inputs_embeds": x}
            if self.is_decoder:
                past = past_key_values
                past = past.self_attention_cache if isinstance(past, EncoderDecoderCache) else past
                mask = side_mask = create_causal_mask(attention_mask=attention_mask, past_key_values=past, **masks)
            else:
                mask = side_mask = create_bidirectional_mask(attention_mask=attention_mask, **masks)
                if images:
                    both = joined_mask(attention_mask, vis_attention_mask, x, images)  # None when both are
                    side_mask = create_bidirectional_mask(config=config, inputs_embeds=side_x, attention_mask=both)
            cross = side_cross = None
            if self.is_decoder and encoder_hidden_states is not None:
                cross = create_bidirectional_mask(
                    attention_mask=encoder_attention_mask, encoder_hidden_states=encoder_hidden_states, **masks
                )
                if not self.side_config.upstream_text_quirks:
                    side_cross = create_bidirectional_mask(
                        attention_mask=side_encoder_attention_mask,
                        encoder_hidden_states=side_encoder_hidden_states,
                        **masks,
                    )
                if past_key_values is not None:
                    count = len(self.block) + len(self.side_kept)
                    grow(past_key_values.self_attention_cache, count)
                    grow(past_key_values.cross_attention_cache, count, side_encoder_hidden_states.shape[1])

            bias = cross_bias = side_bias = side_cross_bias = None
            if images:  # between words only; image rows and columns have none
                first = self.side_block[self.side_kept[0]].layer[0].SelfAttention
                side_bias = F.pad(first.compute_bias(x.shape[1], x.shape[1], device=x.device), (0, images, 0, images))
            lost = self.side_config.upstream_text_quirks and not self.is_decoder

            def side(block: nn.Module):
                def run(s: Tensor) -> Tensor:
                    nonlocal side_bias, side_cross_bias
                    s, side_bias, side_cross_bias = block(
                        s, side_mask, side_bias, side_encoder_hidden_states, side_cross, side_cross_bias,
                        past_key_values=past_key_values, **kwargs,
                    )  # fmt: skip
                    side_bias = None if lost else side_bias
                    return s

                return run

            s = self.side_first_downsample(self.dropout(side_x))
            backbone = self.backbone_grad(self.block, x, encoder_hidden_states)
            with backbone():
                h = self.dropout(x)
            states, side_states = (h,), (s,)
            for i, block in enumerate(self.block):
                if self.is_decoder and i > self.side_kept[-1]:
                    break
                with backbone():
                    h, bias, cross_bias = block(
                        h, mask, bias, encoder_hidden_states, cross, cross_bias,
                        past_key_values=past_key_values, **kwargs,
                    )  # fmt: skip
                if i in self.side_kept:
                    s = self.climb(i, s, h, side(self.side_block[i]), after=images)
                states, side_states = (*states, h), (*side_states, s)
                if not output_hidden_states:
                    states = side_states = ()
            s = self.dropout(self.final_side_layer_norm(s))
            if self.is_decoder:
                last = s
            else:
                with backbone():
                    last = self.dropout(self.final_layer_norm(h))
            found = BaseModelOutputWithPastAndCrossAttentions(
                last_hidden_state=last,
                past_key_values=past_key_values if use_cache else None,
                hidden_states=(*states[:-1], last if not self.is_decoder else states[-1]) if states else None,
            )
            found["last_side_hidden_state"] = s
            if output_hidden_states:
                found["side_hidden_states"] = (*side_states[:-1], s)
            return found if return_dict is not False else found.to_tuple()

    return finished(Fused, original, __name__)


def joined_mask(text: Tensor | None, image: Tensor | None, x: Tensor, images: int) -> Tensor | None:
    """(B, L + N) of two masks, 1 = keep; None is all ones, and of two of them."""
    rows = x.shape[0]
    if text is None and image is None:
        return None
    text = torch.ones(rows, x.shape[1], dtype=torch.long, device=x.device) if text is None else text
    if image is None:
        image = text.new_ones(rows, images)
    if tuple(image.shape) != (rows, images):
        raise ValueError(f"vis_attention_mask has shape {tuple(image.shape)}; accepted: (B, N) = {(rows, images)}")
    return torch.cat((text, image.to(text)), 1)


@cache
def model_class(original: type) -> type:
    """T5ForConditionalGeneration -> the same with a ladder."""
    from transformers.modeling_outputs import Seq2SeqLMOutput

    class Fused(original, metaclass=Shown):
        def forward(
            self,
            input_ids=None,
            attention_mask=None,
            decoder_input_ids=None,
            decoder_attention_mask=None,
            encoder_outputs=None,
            past_key_values=None,
            inputs_embeds=None,
            decoder_inputs_embeds=None,
            labels=None,
            use_cache=None,
            vis_feats=None,
            boxes=None,
            vis_attention_mask=None,
            img_order_ids=None,
            obj_order_ids=None,
            output_hidden_states=None,
            return_dict=None,
            **kwargs,
        ):
            """As T5ForConditionalGeneration's; vis_feats (B, N, C) and boxes (B, N, 4): the image, for the side network
            alone; then words equal to the padding token are masked where attention_mask is None, as upstream does."""
            if attention_mask is None and vis_feats is not None and input_ids is not None:
                attention_mask = input_ids.ne(self.config.pad_token_id).long()
            shared = {"output_hidden_states": output_hidden_states, **kwargs}
            if encoder_outputs is None:
                encoder_outputs = self.encoder(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    inputs_embeds=inputs_embeds,
                    vis_feats=vis_feats,
                    boxes=boxes,
                    vis_attention_mask=vis_attention_mask,
                    img_order_ids=img_order_ids,
                    obj_order_ids=obj_order_ids,
                    **shared,
                )
            elif "last_side_hidden_state" not in encoder_outputs:
                raise ValueError("encoder_outputs has no last_side_hidden_state; accepted: what model.encoder returns")
            hidden, side = encoder_outputs["last_hidden_state"], encoder_outputs["last_side_hidden_state"]
            images = side.shape[1] - hidden.shape[1]
            side_mask = attention_mask
            if images:
                side_mask = joined_mask(attention_mask, vis_attention_mask, hidden, images)
            if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
                decoder_input_ids = self._shift_right(labels)
            decoded = self.decoder(
                input_ids=decoder_input_ids,
                attention_mask=decoder_attention_mask,
                inputs_embeds=decoder_inputs_embeds,
                past_key_values=past_key_values,
                encoder_hidden_states=hidden,
                encoder_attention_mask=attention_mask,
                side_encoder_hidden_states=side,
                side_encoder_attention_mask=side_mask,
                use_cache=use_cache,
                **shared,
            )
            y = self.side_final_upsample(decoded.last_hidden_state)
            if self.config.scale_decoder_outputs:
                y = y * self.model_dim**-0.5
            logits = self.lm_head(y)
            loss = None
            if labels is not None:
                loss = F.cross_entropy(logits.flatten(0, 1), labels.to(logits.device).flatten(), ignore_index=-100)
            found = Seq2SeqLMOutput(
                loss=loss,
                logits=logits,
                past_key_values=decoded.past_key_values,
                decoder_hidden_states=decoded.hidden_states,
                encoder_last_hidden_state=hidden,
                encoder_hidden_states=encoder_outputs.get("hidden_states"),
            )
            return found if return_dict is not False else found.to_tuple()

    return finished(Fused, original, __name__)


_MAKERS = {"T5Stack": stack_class, "T5ForConditionalGeneration": model_class}


def __getattr__(name: str):
    """A class with a ladder by its original's name, which is how pickle and deepcopy find it."""
    if name in _MAKERS:
        from transformers.models.t5 import modeling_t5

        return _MAKERS[name](getattr(modeling_t5, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
